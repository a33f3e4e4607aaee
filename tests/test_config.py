"""Flags: names and aliases, checks that name the flag, and one line instead of a traceback."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rmega.cli import parse_args, run_tool
from rmega.config import TrainingConfig

NEEDED = ["--hf-model", "m", "--data-path", "d"]
STEPS = [*NEEDED, "--train-steps", "3"]


def parse(*argv: str) -> TrainingConfig:
    return parse_args(TrainingConfig, argv)


def test_megatrons_names_and_the_short_ones() -> None:
    long = parse(
        *STEPS,
        "--tensor-model-parallel-size",
        "2",
        "--pipeline-model-parallel-size",
        "4",
        "--virtual-pipeline-model-parallel-size",
        "2",
        "--sequence-parallel",
        "--data-parallel-size",
        "3",
        "--context-parallel-size",
        "1",
    )
    short = parse(*STEPS, "--tp", "2", "--pp", "4", "--vpp", "2", "--sp", "--dp", "3", "--cp", "1")
    assert (
        long == short
        and short.parallel.tensor_model_parallel_size == 2
        and short.parallel.sequence_parallel
    )
    assert (
        parse(*STEPS, "--no-use-distributed-optimizer").parallel.use_distributed_optimizer is False
    )


def test_several_sets() -> None:
    config = parse(
        "--hf-model",
        "m",
        "--data-path",
        "2=a",
        "b",
        "--valid-data-path",
        "x=c",
        "--train-epochs",
        "0.5",
    )
    assert config.data.data_path == ("2=a", "b") and config.data.valid_data_path == ("x=c",)
    assert config.train.train_epochs == 0.5 and config.train.train_steps is None


def test_defaults_are_the_papers() -> None:
    """XTuner's InternLM2 recipe: focal loss, log barrier, AdamW(0.9, 0.999), clip 1, 3 % warm-up,
    cosine to 0."""
    config = parse(*STEPS)
    assert (config.loss.loss, config.loss.penalty, config.loss.penalty_weight) == (
        "focal",
        "log_barrier",
        0.01,
    )
    o = config.optimizer
    assert (o.lr, o.min_lr, o.lr_warmup_fraction, o.lr_decay_style) == (2e-5, 0.0, 0.03, "cosine")
    assert (o.weight_decay, o.adam_beta1, o.adam_beta2, o.clip_grad) == (0.0, 0.9, 0.999, 1.0)
    assert config.train.global_batch_size == 64


def test_as_dict_is_json_and_complete() -> None:
    config = parse(*STEPS, "--tp", "2")
    back = json.loads(json.dumps(config.as_dict()))
    groups = {field.name: field.type for field in dataclasses.fields(TrainingConfig)}
    assert set(back) == set(groups)
    assert TrainingConfig.from_dict(back) == config
    back["train"]["of_another_version"] = 1
    del back["optimizer"]["clip_grad"]
    assert TrainingConfig.from_dict(back) == config
    assert back["parallel"]["tensor_model_parallel_size"] == 2 and back["train"]["train_steps"] == 3


@pytest.mark.parametrize(
    ("argv", "world", "message"),
    [
        (NEEDED, 1, "--train-steps and --train-epochs"),
        ([*STEPS, "--train-epochs", "1"], 1, "--train-steps and --train-epochs"),
        ([*NEEDED, "--train-steps", "0"], 1, "--train-steps 0"),
        ([*NEEDED, "--train-epochs", "-1"], 1, "--train-epochs -1"),
        ([*NEEDED, "--train-epochs", "nan"], 1, "--train-epochs nan"),
        ([*STEPS, "--global-batch-size", "0"], 1, "--global-batch-size 0"),
        ([*STEPS, "--global-batch-size", "3"], 4, "--global-batch-size 3 is smaller than the 4"),
        ([*STEPS, "--max-tokens-per-microbatch", "0"], 1, "--max-tokens-per-microbatch 0"),
        ([*STEPS, "--log-interval", "0"], 1, "--log-interval 0"),
        ([*STEPS, "--lr", "0"], 1, "--lr 0"),
        ([*STEPS, "--lr", "nan"], 1, "--lr nan"),
        ([*STEPS, "--clip-grad", "-1"], 1, "--clip-grad -1"),
        ([*STEPS, "--weight-decay", "-0.1"], 1, "--weight-decay -0.1"),
        ([*STEPS, "--penalty-weight", "-1"], 1, "--penalty-weight -1"),
        ([*STEPS, "--length-penalty", "-1"], 1, "--length-penalty -1"),
        ([*STEPS, "--batch-centering", "-1"], 1, "--batch-centering -1"),
        (
            [*STEPS, "--loss", "plackett_luce", "--label-smoothing", "0.1"],
            1,
            "--label-smoothing: is defined for pairs, not for --loss plackett_luce",
        ),
        (
            [*STEPS, "--loss", "plackett_luce", "--scale-by-rating"],
            1,
            "--scale-by-rating: is defined for pairs, not for --loss plackett_luce",
        ),
        *(
            ([*STEPS, "--loss", "rao_kupper", *flag], 1, f"{flag[0]} does not go with --loss rao_k")
            for flag in (
                ("--label-smoothing", "0.1"),
                ("--use-margin",),
                ("--scale-by-rating",),
                ("--length-penalty", "0.01"),
            )
        ),
        ([*STEPS, "--min-lr", "-1"], 1, "--min-lr -1"),
        ([*STEPS, "--label-smoothing", "0.5"], 1, "--label-smoothing 0.5"),
        ([*STEPS, "--lr-warmup-fraction", "1"], 1, "--lr-warmup-fraction 1"),
        ([*STEPS, "--cp", "2"], 2, "--cp 2"),
        ([*STEPS, "--tp", "0"], 1, "--tp 0"),
        (
            [*STEPS, "--tp", "2", "--pp", "2"],
            6,
            "--tp 2 x --pp 2 = 4 does not divide the 6 processes",
        ),
        ([*STEPS, "--tp", "2", "--dp", "2"], 2, "--dp 2: 2 processes leave 1 replicas"),
        ([*STEPS, "--lora-rank", "-1"], 1, "--lora-rank -1"),
        ([*STEPS, "--lora-alpha", "8"], 1, "--lora-alpha 8.0 needs --lora-rank"),
        ([*STEPS, "--lora-rslora"], 1, "--lora-rslora True needs --lora-rank"),
        ([*STEPS, "--lora-target", "qkv"], 1, "--lora-target qkv needs --lora-rank"),
        ([*STEPS, "--lora-rank", "4", "--lora-alpha", "0"], 1, "--lora-alpha 0.0"),
        ([*STEPS, "--lora-rank", "4", "--lora-target", "q_proj"], 1, "'q_proj' is not one of qkv"),
        ([*STEPS, "--lora-rank", "4", "--lora-target", "qkv,"], 1, "'' is not one of qkv"),
        ([*STEPS, "--lora-rank", "4", "--fp8-format", "hybrid"], 1, "--fp8-format hybrid does not"),
        ([*STEPS, "--barrier-clamp", "--penalty", "l2"], 1, "--barrier-clamp has no effect"),
        ([*STEPS, "--fp8-recipe", "mxfp8"], 1, "--fp8-recipe mxfp8 has no effect"),
        (
            [*STEPS, "--lr-decay-style", "constant", "--min-lr", "1e-6"],
            1,
            "--min-lr 1e-06 has no effect",
        ),
        *(
            ([*STEPS, *flags], 1, f"{' '.join(flags[:2])} has no effect without {needed}")
            for flags, needed in (
                (("--penalty-weight", "0.02", "--penalty", "none"), "a --penalty"),
                (("--initial-loss-scale", "1024.0"), "--precision fp16"),
                (
                    ("--initial-loss-scale", "1024.0", "--precision", "bf16", "--load", "run"),
                    "--precision fp16",
                ),
                (("--eval-interval", "5"), "--valid-data-path"),
                (("--eval-probes", "every"), "--valid-data-path"),
                (("--tensorboard", "on"), "--save"),
                (("--keep-last", "2"), "--save"),
                (("--num-verification-comparisons", "32"), "--save"),
                (("--num-layers-in-first-pipeline-stage", "1"), "--pp greater than 1"),
                (("--num-layers-in-last-pipeline-stage", "1"), "--pp greater than 1"),
            )
        ),
        ([*STEPS, "--head-lr", "0"], 1, "--head-lr 0"),
        ([*STEPS, "--sp"], 1, "--sp needs --tp greater than 1"),
        ([*STEPS, "--vpp", "2"], 1, "--vpp needs --pp greater than 1"),
        ([*STEPS, "--save-interval", "5"], 1, "--save-interval needs --save"),
        ([*STEPS, "--save-interval", "-5", "--save", "x"], 1, "--save-interval -5"),
        ([*STEPS, "--keep-last", "-1"], 1, "--keep-last -1"),
        ([*STEPS, "--min-lr", "1"], 1, "--min-lr 1.0: must not be greater than --lr 2e-05"),
        ([*STEPS, "--save", "b\udcffc"], 1, "--save 'b\\udcffc': bytes that are no UTF-8 text"),
        (
            [*STEPS, "--valid-data-path", "a", "b\udcffc"],
            1,
            "--valid-data-path 'b\\udcffc': bytes that are no UTF-8 text",
        ),
        ([*STEPS, "--lr", "inf"], 1, "--lr inf: must be a finite number"),
        ([*STEPS, "--initial-loss-scale", "0"], 1, "--initial-loss-scale 0.0"),
        ([*STEPS, "--adam-beta1", "1"], 1, "--adam-beta1 1.0"),
        ([*STEPS, "--adam-beta2", "-0.1"], 1, "--adam-beta2 -0.1"),
        ([*STEPS, "--adam-eps", "0"], 1, "--adam-eps 0"),
        ([*STEPS, "--vpp", "0"], 1, "--vpp 0"),
        ([*STEPS, "--dp", "0"], 1, "--dp 0"),
        ([*STEPS, "--seed", "-1"], 1, "--seed -1"),
        ([*STEPS, "--seed", str(2**64)], 1, "--seed 18446744073709551616: is too large"),
        ([*STEPS, "--distributed-timeout-minutes", "0"], 1, "--distributed-timeout-minutes 0"),
        ([*STEPS, "--exit-duration-min", "-1"], 1, "--exit-duration-min -1"),
        ([*STEPS, "--device-memory-gb", "0"], 1, "--device-memory-gb 0"),
        (
            [*STEPS, "--num-layers-in-first-pipeline-stage", "0"],
            1,
            "--num-layers-in-first-pipeline",
        ),
        ([*STEPS, "--num-verification-comparisons", "-1"], 1, "--num-verification-comparisons -1"),
        (
            [*STEPS, "--overlap-param-gather", "--overlap-grad-reduce", "off"],
            2,
            "--overlap-param-gather needs --overlap-grad-reduce",
        ),
        (
            [*STEPS, "--overlap-param-gather", "--no-use-distributed-optimizer"],
            2,
            "--overlap-param-gather needs the distributed optimizer",
        ),
    ],
)
def test_what_is_wrong_is_named(argv, world, message) -> None:
    with pytest.raises(ValueError) as error:
        parse(*argv).check(world)
    assert message in str(error.value)


def test_switching_off_what_is_off_passes() -> None:
    off = "--penalty none --penalty-weight 0 --eval-probes off --tensorboard off --keep-last 0"
    parse(*STEPS, *off.split(), "--no-save-best", "--no-async-save").check(1)
    parse(*STEPS, "--initial-loss-scale", "9", "--load", "run").check(1)  # may be one in fp16


def test_what_is_right_passes() -> None:
    parse(*STEPS, "--tp", "2", "--sp", "--pp", "2", "--vpp", "2", "--dp", "2").check(8)
    config = parse(*STEPS, "--overlap-grad-reduce")
    config.check(1)
    assert not config.parallel.overlap_grad_reduce  # nothing to reduce over
    config = parse(*STEPS, "--overlap-param-gather")
    config.check(1)
    assert config.parallel.overlap_param_gather is False


@pytest.mark.parametrize(
    "words,value",
    [([], None), (["--overlap-grad-reduce"], True)]
    + [(["--overlap-grad-reduce", word], word == "on") for word in ("on", "off")],
)
def test_a_switch_whose_default_depends_on_the_run(words, value) -> None:
    config = parse(*STEPS, *words, "--lr", "0.5")
    assert config.parallel.overlap_grad_reduce is value and config.optimizer.lr == 0.5
    back = TrainingConfig.from_dict(config.as_dict())
    assert back.parallel.overlap_grad_reduce is value


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--hf-model", "m"],
        [*STEPS, "--lr", "fast"],
        [*STEPS, "--learning-rate", "1"],
        [*STEPS, "--loss", "hinge"],
    ],
)
def test_flags_that_cannot_be_read_end_with_2(argv, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2
    said = capsys.readouterr()
    missing = {(): "--hf-model", ("--hf-model", "m"): "--data-path"}.get(
        tuple(argv), argv[-2] if argv else ""
    )
    assert missing in said.err + said.out


def test_help_explains_every_flag(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert not end.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for group in dataclasses.fields(TrainingConfig):
        for field in dataclasses.fields(__import__("rmega.config").config.__dict__[group.type]):
            assert "--" + field.name.replace("_", "-") in text, field.name
    assert "Number of optimizer steps. Give either this or --train-epochs." in text


def test_run_tool(capsys) -> None:
    def fails(error: BaseException) -> int:
        raise error

    assert run_tool(lambda: None) == 0 and run_tool(lambda code: code, 75) == 75
    assert run_tool(fails, ValueError("--lr: no")) == 2
    assert capsys.readouterr().err == "error: --lr: no\n"
    assert run_tool(fails, OSError(28, "No space left on device", "/x")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert run_tool(fails, KeyboardInterrupt()) == 130
    with pytest.raises(KeyError):  # ours to fix: keeps its traceback
        run_tool(fails, KeyError("x"))


def test_fp8_goes_with_transformer_engine_and_bf16() -> None:
    fp8 = [*STEPS, "--fp8-format", "hybrid"]
    parse(*fp8).check(1)
    with pytest.raises(
        ValueError,
        match="--fp8-format hybrid needs Transformer Engine, not --transformer-impl local",
    ):
        parse(*fp8, "--transformer-impl", "local").check(1)
    with pytest.raises(
        ValueError, match="--fp8-format hybrid goes with --precision bf16, not fp16"
    ):
        parse(*fp8, "--precision", "fp16").check(1)


@pytest.mark.parametrize(
    "flags,multiple",
    [
        ([], 1),
        (["--tp", "2"], 1),
        (["--tp", "2", "--sp"], 2),
        (["--fp8-format", "e4m3"], 16),
        (["--fp8-format", "hybrid", "--tp", "4", "--sp"], 64),
        (["--fp8-format", "hybrid", "--fp8-recipe", "mxfp8", "--tp", "2"], 32),
    ],
)
def test_token_multiple(flags, multiple) -> None:
    assert parse(*STEPS, *flags).token_multiple == multiple


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*NEEDED, "--learning-rate", "3"], ["--learning-rate: no such flag; did you mean --lr?"]),
        (
            [*NEEDED, "--bf16", "--num_train_epochs=3"],
            [
                "--bf16: no such flag; did you mean --precision bf16?",
                "--num_train_epochs: no such flag; did you mean --train-epochs?",
            ],
        ),
        (
            ["--hf-modl", "m", "--data-path", "d"],
            ["--hf-modl: no such flag; did you mean --hf-model?"],
        ),
        (
            [*NEEDED, "--global-batch-sise", "3"],
            ["--global-batch-sise: no such flag; did you mean --global-batch-size?"],
        ),
        ([*NEEDED, "--xyzzy", "3", "--tp", "x"], []),
    ],
)
def test_a_flag_that_is_not_there_names_the_one_that_is(argv, said, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and [x for x in lines if x.startswith("error:")] == [
        f"error: {x}" for x in said
    ]


def test_help_of_lists_and_of_the_program(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/tools/score.py"])
    with pytest.raises(SystemExit):
        parse("--help")
    said = capsys.readouterr().out
    assert (
        "(default: )" not in said
        and "usage: tools/score.py" in said
        and "sigmoid(d - margin)" in said
    )


def test_no_number_is_taken_without_a_check() -> None:
    """Every flag with a number refuses nan, infinity and an integer that 64 bits do not hold."""
    import typing

    from rmega.config import group_types

    for group, cls in group_types().items():
        for name, kind in typing.get_type_hints(cls).items():
            kinds = set(typing.get_args(kind)) | {kind}
            for number_kind, values in ((float, (float("nan"), float("inf"))), (int, (2**63,))):
                if number_kind not in kinds or bool in kinds:
                    continue
                for value in values:
                    config = parse(*STEPS)
                    setattr(getattr(config, group), name, value)
                    with pytest.raises(ValueError):
                        config.check(1)


def test_adapters_of_the_flags() -> None:
    def of(*argv: str) -> tuple:
        lora = parse(*STEPS, *argv).lora
        lora.check()
        return lora.targets, lora.scale

    every = ("qkv", "proj", "fc1", "fc2")
    assert of("--lora-rank", "16") == (every, 2.0)
    assert of("--lora-rank", "16", "--lora-alpha", "8", "--lora-rslora") == (every, 2.0)
    assert of("--lora-rank", "4", "--lora-alpha", "8", "--lora-target", "fc2,qkv") == (
        ("qkv", "fc2"),
        2.0,
    )
