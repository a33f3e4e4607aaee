"""Every training flag, its default and its meaning.

Imports neither torch nor megatron-core, so that ``--help`` answers at once on a login node.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

NONE: Any = tyro.conf.arg(help_behavior_hint="(default: none)")
"""For a flag with an empty list by default, of which the help would say ``(default: )``."""

MIN_COMPARISONS = 16
"""Held-out comparisons that a checkpoint must keep for an export to count as verified."""


def _alias(short: str) -> Any:
    return tyro.conf.arg(aliases=[f"--{short}"])


_WORDS = {"on": True, "off": False}

SWITCH: Any = tyro.constructors.PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[on|off]",
    instance_from_str=lambda words: _WORDS[words[0]] if words else True,
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: [{None: "auto", True: "on", False: "off"}[value]],
    choices=tuple(_WORDS),
)
"""For a bool whose default depends on what the run finds: ``--flag``, ``--flag off``, or None."""


@dataclasses.dataclass(kw_only=True)
class ModelArgs:
    """Model"""

    hf_model: str
    """Backbone or reward model to start from: a Hugging Face folder, a hub name, or
    modelscope:NAME. Also a peft adapter folder, whose rank --lora-rank must match."""
    head_init: Literal["zero", "normal"] = "zero"
    """Initialization of a new reward head. An existing reward head is kept."""
    prune_last_layer: bool = True
    """Compute the last layer only for the tokens that are read. --no-prune-last-layer computes it
    for all tokens: same rewards, slower."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear layers: Megatron-Core's own, or Transformer Engine's. auto: Transformer Engine on CUDA
    machines where it is installed."""
    fp8_format: Literal["none", "hybrid", "e4m3"] = "none"
    """Run linear layers in fp8 (Transformer Engine, Hopper or newer). hybrid: e4m3 forward, e5m2
    for gradients. The pruned last layer, head, norms and attention stay in bf16."""
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How fp8 tensors are scaled: one factor each, per block, or in blocks of 32 (Blackwell)."""


LORA_TARGETS = ("qkv", "proj", "fc1", "fc2")


@dataclasses.dataclass(kw_only=True)
class LoraArgs:
    """LoRA"""

    lora_rank: int = 0
    """Train LoRA adapters of this rank, plus the reward head, with the backbone frozen. 0: train
    all weights."""
    lora_alpha: float | None = None
    """The adapter output is multiplied by alpha / rank. Default: 2 x rank."""
    lora_target: str = "all-linear"
    """Linear layers that get adapters, comma-separated: qkv (peft's q_proj, k_proj, v_proj), proj
    (o_proj), fc1 (gate_proj, up_proj), fc2 (down_proj), or all-linear."""
    lora_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    lora_dropout: float = 0.0
    """Probability with which each element of an adapter's input is zeroed in training. The masks
    are the same in every layout."""

    @classmethod
    def recorded(cls, config: Mapping[str, Any] | None) -> LoraArgs:
        """The adapters of a run, by the configuration that its checkpoint holds."""
        return cls(**((config or {}).get("lora") or {}))

    @property
    def targets(self) -> tuple[str, ...]:
        """The layers of ``--lora-target``, in the order of ``LORA_TARGETS``; ValueError on any
        other."""
        if self.lora_target == "all-linear":
            return LORA_TARGETS
        given = self.lora_target.split(",")
        for name in given:
            if name not in LORA_TARGETS:
                raise ValueError(
                    f"--lora-target {self.lora_target}: {name!r} is not one of"
                    f" {', '.join(LORA_TARGETS)} (joined by commas), or all-linear"
                )
        return tuple(name for name in LORA_TARGETS if name in given)

    @property
    def alpha(self) -> float:
        """``--lora-alpha``, or its default."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.lora_rank) if self.lora_rslora else self.lora_rank)

    def describe(self) -> str:
        """For the log."""
        dropout = f", dropout {self.lora_dropout:g}" if self.lora_dropout else ""
        return (
            f"rank {self.lora_rank} on {', '.join(self.targets)}, scaled by {self.scale:g}{dropout}"
        )

    def check(self) -> None:
        """Raise ValueError, naming the flag."""
        if self.lora_rank < 0:
            raise ValueError(f"--lora-rank {self.lora_rank}: must not be negative")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"--lora-alpha {self.lora_alpha}: must be greater than 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora-dropout {self.lora_dropout}: must lie from 0 to below 1")
        assert self.targets  # raises ValueError
        if self.lora_rank:
            return
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) != field.default:
                raise ValueError(f"{_flag(field.name)} {value} needs --lora-rank")


@dataclasses.dataclass(kw_only=True)
class DataArgs:
    """Data"""

    data_path: tuple[str, ...]
    """Prefixes written by tools/preprocess_pref.py. Write WEIGHT=PREFIX to visit a dataset WEIGHT
    times per epoch (2: twice, 0.5: a different half each epoch)."""
    valid_data_path: Annotated[tuple[str, ...], NONE] = ()
    """Prefixes to evaluate on, each reported under its own name (NAME=PREFIX, or the prefix's last
    part)."""
    share_prefix: bool = True
    """Compute the prompt once for all responses of a comparison. --no-share-prefix recomputes it
    for each response: same rewards, slower."""
    max_tokens_per_microbatch: int = 8192
    """Maximum tokens per forward pass. A longer comparison gets a pass of its own."""


@dataclasses.dataclass(kw_only=True)
class LossArgs:
    """Loss"""

    loss: Literal["ranking", "focal", "plackett_luce", "rao_kupper"] = "focal"
    """ranking: -logsigmoid(d - margin), where d is the chosen minus the rejected reward. focal:
    ranking times (1 - 2 relu(sigmoid(d - margin) - 1/2))^2 (InternLM2). plackett_luce: likelihood
    of the full ranking of K answers, averaged over its choices; for two answers it equals
    ranking. rao_kupper: ranking with ties and one trained threshold eta (Rao and Kupper 1967): a
    response wins with probability sigmoid(d - eta), else the pair is tied. For data of
    tools/preprocess_pref.py --keep ties."""
    penalty: Literal["none", "log_barrier", "l2", "center"] = "log_barrier"
    """Keeps scores in range. log_barrier: rises steeply near +-5 (InternLM2). l2: squared scores.
    center: squared sum of a pair's scores (TRL)."""
    penalty_weight: float = 0.01
    """Weight of the penalty."""
    label_smoothing: float = 0.0
    """Assumed probability that a label is wrong (0 to below 0.5)."""
    use_margin: bool = False
    """Use the difference of the ratings as the margin of the loss (0 for comparisons without
    ratings)."""
    scale_by_rating: bool = False
    """Multiply the loss of a pair by the difference of its ratings (1 for comparisons without
    ratings; scaled Bradley-Terry of HelpSteer2-Preference). Can be combined with --use-margin."""
    length_penalty: float = 0.0
    """Add this times (length of chosen - length of rejected), in tokens, to the logit of a pair, so
    that the reward does not absorb a preference for length."""
    batch_centering: float = 0.0
    """Add this times the squared mean reward of the global batch to the loss. Each step then costs
    a second forward pass (the mean must be known before the backward pass), unless the whole batch
    is one pack on one data-parallel rank."""
    barrier_clamp: bool = False
    """XTuner's form of the log barrier: no gradient beyond +-4.999. By default the barrier
    continues linearly."""


@dataclasses.dataclass(kw_only=True)
class TrainArgs:
    """Training"""

    train_steps: int | None = None
    """Number of optimizer steps. Give either this or --train-epochs."""
    train_epochs: float | None = None
    """Passes over the data; the last step may be smaller than a global batch."""
    global_batch_size: int = 64
    """Comparisons per optimizer step, over all ranks."""
    seed: int = 42
    """Seed of the data order and of --head-init normal."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs from compute capability 8.0, and on CPUs whose bf16 matmul measures at
    least 1.5 times as fast as fp32; else fp32. Head, loss, gradient accumulation and optimizer
    state are always fp32."""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """torch.set_float32_matmul_precision. auto: the fastest setting that is as accurate as fp32 on
    this machine, by measurement."""
    deterministic: bool = False
    """Bitwise reproducible runs on the same GPUs and layout, at some cost in speed: deterministic
    algorithms of torch, cuBLAS and NCCL. CPU runs are reproducible without it."""
    log_interval: int | None = None
    """Steps between log lines. Default: a fiftieth of the run's steps, between 1 and 10."""
    eval_interval: int = 0
    """Steps between evaluations; 0: before and after training only."""
    eval_probes: Literal["off", "last", "every"] = "last"
    """Score 16 comparisons of each validation set again with responses reversed, blanked, and under
    a wrong prompt: never, at the last evaluation of the run, or at each."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Also write the metrics for TensorBoard, under --save. auto: where it is installed."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (WANDB_MODE=offline works without network)."""

    def total_steps(self, num_comparisons: int) -> tuple[int, int]:
        """(optimizer steps, comparisons) of the whole run, with ``num_comparisons`` per epoch."""
        if self.train_steps is not None:
            return self.train_steps, self.train_steps * self.global_batch_size
        assert self.train_epochs is not None  # one of the two is given, see check
        comparisons = math.ceil(self.train_epochs * num_comparisons)
        return math.ceil(comparisons / self.global_batch_size), comparisons


@dataclasses.dataclass(kw_only=True)
class OptimizerArgs:
    """Optimizer"""

    lr: float = 2e-5
    """Peak learning rate."""
    head_lr: float | None = None
    """Peak learning rate of the reward head, on the same schedule; --min-lr is scaled by the same
    factor. Default: --lr."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_fraction: float = 0.03
    """Fraction of the steps used for the linear warm-up from 0."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay (never on norms)."""
    adam_beta1: float = 0.9
    """Adam's beta1."""
    adam_beta2: float = 0.999
    """Adam's beta2."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    initial_loss_scale: float = 65536.0
    """First loss scale of --precision fp16."""
    max_skipped_steps: int = 10
    """Stop after this many consecutive updates were skipped because of a non-finite gradient."""


@dataclasses.dataclass(kw_only=True)
class ParallelArgs:
    """Layout"""

    tensor_model_parallel_size: Annotated[int, _alias("tp")] = 1
    """Tensor-parallel ranks: each layer is split over them."""
    pipeline_model_parallel_size: Annotated[int, _alias("pp")] = 1
    """Pipeline stages."""
    virtual_pipeline_model_parallel_size: Annotated[int | None, _alias("vpp")] = None
    """Model chunks per pipeline stage (interleaved schedule)."""
    sequence_parallel: Annotated[bool, _alias("sp")] = False
    """Split norms and residuals along the tokens over the tensor-parallel ranks. Saves memory;
    needs --tp > 1."""
    context_parallel_size: Annotated[int, _alias("cp")] = 1
    """Context parallelism is not supported: only 1 is accepted."""
    data_parallel_size: Annotated[int | None, _alias("dp")] = None
    """Number of replicas. Follows from the number of processes; if given, it is checked against
    it."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, when stages are uneven."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, when stages are uneven."""
    pad_attention_heads: bool = False
    """Add groups of zero heads so that --tp divides the key/value heads. Exact: zero heads stay
    zero."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state and update over the replicas. Checkpoints made with it can be resumed
    in any layout, those without it only by runs that also do without."""
    overlap_grad_reduce: Annotated[bool | None, SWITCH] = None
    """Overlap gradient reduction with the backward pass. Default: on for GPUs with more than one
    replica."""
    overlap_param_gather: Annotated[bool | None, SWITCH] = None
    """Gather the weights that the distributed optimizer has updated during the next forward pass.
    Default: on where gradient reduction is overlapped on GPUs."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass: nothing, attention, or whole layers."""
    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer than this ends the run with an error."""
    dry_run: bool = False
    """Print memory and parameters per rank of this layout, and exit. Needs --tp, --pp and --dp
    only, and starts no ranks."""
    device_memory_gb: float | None = None
    """Memory per device in GB. A layout that needs more is refused before weights are read."""


@dataclasses.dataclass(kw_only=True)
class CheckpointArgs:
    """Checkpoints"""

    save: str | None = None
    """Run folder: checkpoints, metrics.jsonl, configuration."""
    load: str | None = None
    """Run folder to resume from (its newest healthy checkpoint), or one of its checkpoints. May be
    the same as --save, also when it is still empty."""
    save_interval: int = 0
    """Steps between checkpoints; 0: only those of --save-best. The last step is always saved."""
    async_save: bool = True
    """Write checkpoints in the background; needs memory for one copy. --no-async-save waits for
    each."""
    keep_last: int = 0
    """Keep this many of the newest checkpoints, and the best; 0: keep all."""
    save_best: bool = True
    """Also save after an evaluation (--eval-interval) that is the best so far on the first --valid-
    data-path."""
    exit_duration_min: float | None = None
    """After this many minutes save and exit with code 75, so that a job queue can restart the
    run."""
    num_verification_comparisons: int = 16
    """Comparisons stored with each checkpoint, with their rewards, to verify its exports: held-out
    ones first, then ones of the training set."""


@dataclasses.dataclass(kw_only=True)
class TrainingConfig:
    """Train a reward model on preference data: one process, or several under torchrun or
    tools/launch.py."""

    model: ModelArgs
    data: DataArgs
    lora: LoraArgs = dataclasses.field(default_factory=LoraArgs)
    loss: LossArgs = dataclasses.field(default_factory=LossArgs)
    train: TrainArgs = dataclasses.field(default_factory=TrainArgs)
    optimizer: OptimizerArgs = dataclasses.field(default_factory=OptimizerArgs)
    parallel: ParallelArgs = dataclasses.field(default_factory=ParallelArgs)
    checkpoint: CheckpointArgs = dataclasses.field(default_factory=CheckpointArgs)

    def check(self, world_size: int) -> None:
        """Raise ValueError, naming the flag, on anything that can be known to be wrong before a
        model is read."""
        if (self.train.train_steps is None) == (self.train.train_epochs is None):
            raise ValueError("give one of --train-steps and --train-epochs")
        self._check_values()
        self._check_ranges()
        self._check_effects()
        self._check_losses()
        self._check_layout(world_size)
        if self.checkpoint.save_interval and not self.checkpoint.save:
            raise ValueError("--save-interval needs --save")
        self.lora.check()
        self._check_linear_layers()

    def _check_ranges(self) -> None:
        t, p, o = self.train, self.parallel, self.optimizer
        for flag, value in (
            ("--train-steps", t.train_steps),
            ("--train-epochs", t.train_epochs),
            ("--global-batch-size", t.global_batch_size),
            ("--log-interval", t.log_interval),
            ("--max-tokens-per-microbatch", self.data.max_tokens_per_microbatch),
            ("--tp", p.tensor_model_parallel_size),
            ("--pp", p.pipeline_model_parallel_size),
            ("--vpp", p.virtual_pipeline_model_parallel_size),
            ("--cp", p.context_parallel_size),
            ("--dp", p.data_parallel_size),
            ("--num-layers-in-first-pipeline-stage", p.num_layers_in_first_pipeline_stage),
            ("--num-layers-in-last-pipeline-stage", p.num_layers_in_last_pipeline_stage),
            ("--distributed-timeout-minutes", p.distributed_timeout_minutes),
            ("--device-memory-gb", p.device_memory_gb),
            ("--lr", o.lr),
            ("--head-lr", o.head_lr),
            ("--adam-eps", o.adam_eps),
            ("--max-skipped-steps", o.max_skipped_steps),
            ("--exit-duration-min", self.checkpoint.exit_duration_min),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{flag} {value}: must be greater than 0")
        for flag, value in (
            ("--weight-decay", o.weight_decay),
            ("--clip-grad", o.clip_grad),
            ("--penalty-weight", self.loss.penalty_weight),
            ("--length-penalty", self.loss.length_penalty),
            ("--batch-centering", self.loss.batch_centering),
            ("--min-lr", o.min_lr),
            ("--eval-interval", t.eval_interval),
            ("--save-interval", self.checkpoint.save_interval),
            ("--keep-last", self.checkpoint.keep_last),
            ("--num-verification-comparisons", self.checkpoint.num_verification_comparisons),
            ("--seed", t.seed),
        ):
            if value < 0:
                raise ValueError(f"{flag} {value}: must not be negative")
        if o.min_lr > o.lr:
            raise ValueError(f"--min-lr {o.min_lr}: must not be greater than --lr {o.lr}")
        for flag, beta in (("--adam-beta1", o.adam_beta1), ("--adam-beta2", o.adam_beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{flag} {beta}: must be in [0, 1)")
        if o.initial_loss_scale < 1:
            raise ValueError(f"--initial-loss-scale {o.initial_loss_scale}: must be at least 1")
        if not 0 <= self.loss.label_smoothing < 0.5:
            raise ValueError(f"--label-smoothing {self.loss.label_smoothing}: must be in [0, 0.5)")
        if not 0 <= o.lr_warmup_fraction < 1:
            raise ValueError(f"--lr-warmup-fraction {o.lr_warmup_fraction}: must be in [0, 1)")

    def _check_losses(self) -> None:
        for loss, names, message in (
            (
                "plackett_luce",
                ("label_smoothing", "scale_by_rating"),
                ": is defined for pairs, not for --loss plackett_luce, whose choices are among"
                " several answers",
            ),
            (
                "rao_kupper",
                ("label_smoothing", "use_margin", "scale_by_rating", "length_penalty"),
                " does not go with --loss rao_kupper, whose margin is its threshold",
            ),
        ):
            for name in names if self.loss.loss == loss else ():
                if getattr(self.loss, name):
                    raise ValueError(_flag(name) + message)

    def _check_layout(self, world_size: int) -> None:
        """Also switches off overlaps that have nothing to overlap."""
        p = self.parallel
        if p.context_parallel_size != 1:
            raise ValueError(
                f"--cp {p.context_parallel_size}: context parallelism is not supported for reward"
                " models"
            )
        shards = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
        if world_size % shards:
            raise ValueError(
                f"--tp {p.tensor_model_parallel_size} x --pp {p.pipeline_model_parallel_size} ="
                f" {shards} does not divide the {world_size} processes that were started (torchrun"
                " --nproc-per-node)"
            )
        replicas = world_size // shards
        if p.data_parallel_size not in (None, replicas):
            raise ValueError(
                f"--dp {p.data_parallel_size}: {world_size} processes leave {replicas} replicas of "
                f"--tp {p.tensor_model_parallel_size} x --pp {p.pipeline_model_parallel_size}"
            )
        if self.train.global_batch_size < replicas:
            raise ValueError(
                f"--global-batch-size {self.train.global_batch_size} is smaller than the {replicas}"
                " data-parallel ranks"
            )
        if p.sequence_parallel and p.tensor_model_parallel_size == 1:
            raise ValueError("--sp needs --tp greater than 1")
        if p.virtual_pipeline_model_parallel_size and p.pipeline_model_parallel_size == 1:
            raise ValueError("--vpp needs --pp greater than 1")
        if p.overlap_grad_reduce and replicas == 1:
            p.overlap_grad_reduce = False  # nothing to reduce, hence nothing to overlap
        if p.overlap_param_gather and replicas == 1:
            p.overlap_param_gather = False
        if p.overlap_param_gather and not p.use_distributed_optimizer:
            raise ValueError(
                "--overlap-param-gather needs the distributed optimizer: without it nothing is"
                " gathered"
            )
        if p.overlap_param_gather and p.overlap_grad_reduce is False:
            raise ValueError(
                "--overlap-param-gather needs --overlap-grad-reduce, whose buckets it gathers"
            )

    def _check_linear_layers(self) -> None:
        """Adapters and fp8 each need an implementation of the linear layers of their own."""
        m = self.model
        if self.lora.lora_rank:
            needed = ""
            if m.transformer_impl == "transformer_engine":
                needed = "--transformer-impl transformer_engine"
            elif m.fp8_format != "none":
                needed = f"--fp8-format {m.fp8_format}"
            if needed:
                raise ValueError(
                    f"{needed} does not go with --lora-rank: adapters are on Megatron-Core's own"
                    " linear layers"
                )
        if m.fp8_format != "none":
            given = f"--fp8-format {m.fp8_format}"
            if m.transformer_impl == "local":
                raise ValueError(f"{given} needs Transformer Engine, not --transformer-impl local")
            if self.train.precision not in ("auto", "bf16"):
                raise ValueError(f"{given} goes with --precision bf16, not {self.train.precision}")

    def _check_effects(self) -> None:
        """No flag asks for what the other flags rule out. Switching off what is off anyway, and 0
        for none, are accepted: that is what happens."""
        t, o, c = self.train, self.optimizer, self.checkpoint
        evaluates = (bool(self.data.valid_data_path), "--valid-data-path")
        saves = (bool(c.save), "--save")
        stages = (self.parallel.pipeline_model_parallel_size > 1, "--pp greater than 1")
        # auto resumes in the precision of the checkpoint, else it never is fp16.
        fp16 = t.precision == "fp16" or (t.precision == "auto" and bool(c.load))
        for group, name, (effective, needed) in (
            (self.loss, "penalty_weight", (self.loss.penalty != "none", "a --penalty")),
            (
                self.loss,
                "barrier_clamp",
                (self.loss.penalty == "log_barrier", "--penalty log_barrier"),
            ),
            (self.model, "fp8_recipe", (self.model.fp8_format != "none", "--fp8-format")),
            (o, "min_lr", (o.lr_decay_style != "constant", "--lr-decay-style cosine or linear")),
            (o, "initial_loss_scale", (fp16, "--precision fp16")),
            (t, "eval_interval", evaluates),
            (t, "eval_probes", evaluates),
            (t, "tensorboard", saves),
            (c, "keep_last", saves),
            (c, "num_verification_comparisons", saves),
            (self.parallel, "num_layers_in_first_pipeline_stage", stages),
            (self.parallel, "num_layers_in_last_pipeline_stage", stages),
        ):
            value = getattr(group, name)
            if value and value not in (getattr(type(group), name), "off") and not effective:
                given = _flag(name) if value is True else f"{_flag(name)} {value}"
                raise ValueError(f"{given} has no effect without {needed}")

    def _check_values(self) -> None:
        """No flag takes nan or infinity, an integer that 64 bits do not hold, or what is no
        text."""
        for group in dataclasses.fields(self):
            for name, value in dataclasses.asdict(getattr(self, group.name)).items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{_flag(name)} {value}: must be a finite number")
                if isinstance(value, int) and abs(value) >= 2**63:
                    raise ValueError(f"{_flag(name)} {value}: is too large")
                for text in value if isinstance(value, tuple) else [value]:
                    if isinstance(text, str):
                        try:
                            text.encode()
                        except UnicodeEncodeError:  # no file could record it
                            raise ValueError(
                                f"{_flag(name)} {text!r}: bytes that are no UTF-8 text in the name"
                            ) from None

    @property
    def token_multiple(self) -> int:
        """What the tokens of a pack are rounded up to a multiple of. Sequence parallelism cuts them
        over the tensor ranks; fp8 matmuls want whole blocks of a rank's tokens (16, for mxfp8
        32: megatron-core's ``get_fp8_align_size``)."""
        p, m = self.parallel, self.model
        ranks = p.tensor_model_parallel_size if p.sequence_parallel else 1
        return ranks * (1 if m.fp8_format == "none" else 32 if m.fp8_recipe == "mxfp8" else 16)

    @property
    def microbatch_multiple(self) -> int:
        """What the packs of a step come in a multiple of: an interleaved pipeline takes as many as
        it has stages."""
        p = self.parallel
        return p.pipeline_model_parallel_size if p.virtual_pipeline_model_parallel_size else 1

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, group by group."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, groups: Mapping[str, Any]) -> TrainingConfig:
        """The configuration that ``as_dict`` recorded. Fields that this version does not have are
        left out; those that it has in addition get their defaults."""
        built = {}
        for name, kind in group_types().items():
            known = {field.name for field in dataclasses.fields(kind)}
            values = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in groups.get(name, {}).items()
                if key in known
            }
            built[name] = kind(**values)
        return cls(**built)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def group_types() -> dict[str, type]:
    """The groups of ``TrainingConfig`` by name, to build one from ``as_dict`` again."""
    return {
        "model": ModelArgs,
        "data": DataArgs,
        "lora": LoraArgs,
        "loss": LossArgs,
        "train": TrainArgs,
        "optimizer": OptimizerArgs,
        "parallel": ParallelArgs,
        "checkpoint": CheckpointArgs,
    }
