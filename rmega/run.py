"""A training run from configuration to the last checkpoint: what ``examples/pretrain_reward.py`` composes."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from rmega import checkpoint, distributed, ops, precision, train
from rmega.config import TrainingConfig
from rmega.data.batching import Batcher, CostModel, Mixture
from rmega.data.indexed import open_preferences
from rmega.distributed import log
from rmega.logs import MetricsLog, Progress, duration, memory_mb, say, train_line
from rmega.models.hf import load_hf, read_geometry, resolve_model
from rmega.models.rotary import check_length

EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped early with everything saved; start again to go on
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "config.json",
                   "generation_config.json", "README.md", "LICENSE", "LICENSE.txt")


def named_prefix(text: str) -> tuple[str, str]:
    """``NAME=PREFIX`` or ``PREFIX`` -> (name, prefix); the name defaults to the prefix's last part."""
    name, equals, prefix = text.partition("=")
    return (name, prefix) if equals else (Path(text).name, text)


class Run:
    """Holds what the steps of a run share. The methods are called in the order in which they stand here."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        p = config.parallel
        self.folder = resolve_model(config.model.hf_model)
        self.geometry, self.hf_config = read_geometry(self.folder)
        train.transformer_layout(config, self.geometry, on_cpu=not torch.cuda.is_available())
        self.device = distributed.initialize(
            tp=p.tensor_model_parallel_size, pp=p.pipeline_model_parallel_size,
            vpp=p.virtual_pipeline_model_parallel_size, seed=config.train.seed,
            timeout_minutes=p.distributed_timeout_minutes)
        self.precision = precision.choose_together(config.train.precision, config.train.matmul_precision, self.device)
        self.state = checkpoint.RunState()
        self.best: tuple[float, int] | None = None

    def load_data(self) -> None:
        """Open the datasets and check that they belong to this model."""
        c = self.config
        self.dataset = Mixture.open(c.data.data_path, seed=c.train.seed)
        self.valid = {}
        for text in c.data.valid_data_path:
            name, prefix = named_prefix(text)
            if name in self.valid:
                raise ValueError(f"--valid-data-path {text}: the name {name} is taken (write NAME=PREFIX)")
            self.valid[name] = open_preferences(prefix)
        self.manifest = self.dataset.manifest
        for flag, dataset in [("--data-path", self.dataset), *(("--valid-data-path", d) for d in self.valid.values())]:
            self._check_manifest(flag, dataset)
        self._check_tokenizer()
        self.steps, self.comparisons = train.total_steps(c, len(self.dataset))
        shards = c.parallel.tensor_model_parallel_size * c.parallel.pipeline_model_parallel_size
        from megatron.core import parallel_state

        self.batching: dict[str, Any] = dict(
            max_tokens=c.data.max_tokens_per_microbatch, seed=c.train.seed, cost=CostModel.of(self.geometry),
            num_ranks=distributed.world_size() // shards, rank=parallel_state.get_data_parallel_rank(),
            share_prefix=not c.data.no_share_prefix,
            token_multiple=c.parallel.tensor_model_parallel_size if c.parallel.sequence_parallel else 1,
            microbatch_multiple=c.parallel.pipeline_model_parallel_size
            if c.parallel.virtual_pipeline_model_parallel_size else 1)
        self.batcher = Batcher(self.dataset, global_batch_size=c.train.global_batch_size,
                               max_consumed=self.comparisons, **self.batching)
        log(f"data: {len(self.dataset):,} comparisons per epoch from {', '.join(c.data.data_path)}; {self.steps:,} steps "
            f"of {c.train.global_batch_size}")

    def _check_manifest(self, flag: str, dataset) -> None:
        manifest = dataset.manifest
        if manifest["vocab_size"] > self.geometry.vocab_size:
            raise ValueError(f"{flag} {dataset.prefix}: was written with a tokenizer of {manifest['vocab_size']} ids, "
                             f"the model {self.folder} knows {self.geometry.vocab_size}")
        check_length(self.geometry, manifest["max_length"] or int(dataset.sequence_lengths.max()))
        for field in ("tokenizer_fingerprint", "reward_token_id"):
            if manifest[field] != self.manifest[field]:
                raise ValueError(f"{flag} {dataset.prefix}: {field} {manifest[field]} differs from that of "
                                 f"{self.dataset.prefix} ({self.manifest[field]}); preprocess both alike")

    def _check_tokenizer(self) -> None:
        """The data must have been written with the model's own tokenizer. Read on rank 0, known to all."""
        import torch.distributed as dist

        problem: list[str | None] = [None]
        if distributed.rank() == 0 and any((self.folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model")):
            from transformers import AutoTokenizer

            from rmega.data.tokenize import tokenizer_fingerprint

            own = tokenizer_fingerprint(AutoTokenizer.from_pretrained(str(self.folder)))
            if own != self.manifest["tokenizer_fingerprint"]:
                problem = [f"--data-path {self.dataset.prefix}: was written with the tokenizer {self.manifest['tokenizer']} "
                           f"({self.manifest['tokenizer_fingerprint']}), which is not that of --hf-model {self.folder} "
                           f"({own})"]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise ValueError(problem[0])

    def build(self) -> None:
        """Model, gradient buffers, optimizer and schedule; weights from the Hugging Face folder."""
        c = self.config
        self.wrapped = train.build_model(c, self.geometry, dtype=self.precision.dtype, device=self.device)
        self.head = "; ".join(dict.fromkeys(
            load_hf(chunk, self.folder, self.geometry, head_init=c.model.head_init, head_seed=c.train.seed)
            for chunk in self.wrapped))
        self.wrapped = train.wrap_model(self.wrapped, c)
        self.optimizer, self.scheduler = train.build_optimizer(self.wrapped, c, self.steps)
        log(f"model: {self.folder} ({self.geometry.family}, {self.geometry.num_layers} layers of "
            f"{self.geometry.hidden_size}), {self.head}")
        log(f"layout: tp {c.parallel.tensor_model_parallel_size}"
            f"{' + sequence parallel' if c.parallel.sequence_parallel else ''}, pp "
            f"{c.parallel.pipeline_model_parallel_size}"
            f"{f' x {c.parallel.virtual_pipeline_model_parallel_size} chunks' if c.parallel.virtual_pipeline_model_parallel_size else ''}"
            f", dp {self.batching['num_ranks']}{' (distributed optimizer)' if c.parallel.use_distributed_optimizer else ''}")
        log(f"compute: {self.precision.description}; {train.implementations(c, self.device, self.optimizer)}")

    def restore_or_start(self) -> None:
        """Go on from ``--load`` where it has a checkpoint; open the logs."""
        c = self.config
        found = checkpoint.find(c.checkpoint.load) if c.checkpoint.load else None
        if c.checkpoint.load and found is None and c.checkpoint.load != c.checkpoint.save:
            raise ValueError(f"--load {c.checkpoint.load}: no checkpoint in it")
        if found is None and c.checkpoint.save and checkpoint.latest_iteration(c.checkpoint.save) is not None:
            raise ValueError(f"--save {c.checkpoint.save}: holds a run already; go on with it by --load "
                             f"{c.checkpoint.save}, or choose another folder")
        if found is not None:
            info = checkpoint.read_info(found)
            checkpoint.check_same_optimizer(info, c.parallel.use_distributed_optimizer)
            self._check_same_run(info, found)
            self.state = checkpoint.load(found, wrapped=self.wrapped, optimizer=self.optimizer, scheduler=self.scheduler)
            if info.get("best"):
                self.best = tuple(info["best"])
        if c.checkpoint.save and distributed.rank() == 0:
            Path(c.checkpoint.save).mkdir(parents=True, exist_ok=True)
            Path(c.checkpoint.save, "config.json").write_text(json.dumps(c.as_dict(), indent=1), encoding="utf-8")
        self.metrics = MetricsLog(c.checkpoint.save, resumed_at=self.state.iteration if found else None,
                                  tensorboard=c.train.tensorboard, wandb_project=c.train.wandb_project,
                                  config=c.as_dict())

    def _check_same_run(self, info: dict[str, Any], found: Path) -> None:
        """Another batch size or seed would visit other comparisons than the ones that are left."""
        then, now = info["config"]["train"], self.config.train
        for field, flag in (("global_batch_size", "--global-batch-size"), ("seed", "--seed")):
            if then[field] != getattr(now, field):
                raise ValueError(f"{flag} {getattr(now, field)}: {found} was written with {then[field]}, and the order "
                                 "of the data depends on it")
        if info["manifest"].get("fingerprint") != self.manifest.get("fingerprint") or \
                info["num_comparisons"] != len(self.dataset):
            raise ValueError(f"--data-path: {found} was trained on other data ({info['num_comparisons']} comparisons "
                             f"per epoch then, {len(self.dataset)} now)")

    def train(self) -> int:
        """All steps that are left. Returns the exit code: 0, or 75 when it stopped early to be started again."""
        c, started = self.config, time.monotonic()
        stop = train.StopRequest(c.checkpoint.exit_duration_min)
        if self.state.iteration == 0:
            self._evaluate()
        progress = Progress("training", self.steps)
        progress.advance(self.state.iteration)
        skipped = 0
        clock, first = train.Clock(), self.state.iteration
        window: list[tuple[train.StepReport, float, float]] = []
        evaluated = saved = self.state.iteration
        while self.state.iteration < self.steps:
            documents = self.batcher.documents(self.state.consumed)
            packs = [pack.to(self.device) for pack in self.batcher.packs(documents)]
            data_time = clock.lap()
            lr = self.optimizer.param_groups[0]["lr"]
            report = train.train_step(self.wrapped, self.optimizer, packs, c.loss, len(documents))
            self.state.iteration += 1
            self.state.consumed += len(documents)
            self.scheduler.step(1)
            skipped = self._after_update(report, documents, skipped, progress)
            window.append((report, data_time, clock.lap()))
            progress.advance()
            step = self.state.iteration
            if step % c.train.log_interval == 0 or step == self.steps:
                self._log(step, lr, window, started, first, progress)
                window = []
            if c.train.eval_interval and step % c.train.eval_interval == 0 and step < self.steps:
                progress.clear()
                self._evaluate()
                evaluated = step
                clock.lap()
            if c.checkpoint.save_interval and step % c.checkpoint.save_interval == 0:
                self._save(progress)
                saved = step
                clock.lap()
            if reason := stop.agreed(self.device):
                say(progress, f"stopping after step {step}: {reason}")
                if c.checkpoint.save and saved != step:
                    self._save(progress)
                self.metrics.close()
                return 0 if step == self.steps else EXIT_REQUEUE
        progress.clear()
        if evaluated != self.steps or self.state.iteration == first:
            self._evaluate()
        if c.checkpoint.save and saved != self.steps:
            self._save(progress)
        self.metrics.close()
        log(f"done: {self.state.iteration} steps, {self.state.consumed:,} comparisons, "
            f"{duration(time.monotonic() - started)}")
        return 0

    def _after_update(self, report: train.StepReport, documents, skipped: int, progress: Progress) -> int:
        """Count updates in a row that were skipped; stop the run, with a file that replays the batch, at too many."""
        if report.updated:
            return 0
        skipped += 1
        norm = "overflow" if report.grad_norm is None else report.grad_norm
        say(progress, f"step {self.state.iteration}: loss {report.loss}, gradient norm {norm}: update skipped "
                      f"({skipped} in a row); comparisons {documents.tolist()}")
        limit = self.config.optimizer.max_skipped_steps
        if skipped >= limit:
            where = "(no --save folder to write the batch to)"
            if self.config.checkpoint.save:
                path = Path(self.config.checkpoint.save) / f"skipped_{self.state.iteration}.json"
                if distributed.rank() == 0:
                    path.write_text(json.dumps({"step": self.state.iteration, "documents": documents.tolist(),
                                                "loss": str(report.loss), "grad_norm": str(report.grad_norm),
                                                "config": self.config.as_dict()}), encoding="utf-8")
                where = f"the last batch is in {path}"
            raise ValueError(f"--max-skipped-steps {limit}: so many updates in a row had no finite gradient; {where}")
        return skipped

    def _log(self, step: int, lr: float, window: list, started: float, first: int, progress: Progress) -> None:
        reports = [r for r, _, _ in window]
        seconds = sum(d + s for _, d, s in window)
        pairs = sum(r.num_pairs for r in reports)
        mean = {name: sum(getattr(r, name) * r.num_pairs for r in reports) / max(pairs, 1)
                for name in ("loss", "acc", "chosen_score_mean", "rejected_score_mean")}
        norms = [r.grad_norm for r in reports if r.grad_norm is not None and math.isfinite(r.grad_norm)]
        tokens, real = sum(r.num_tokens for r in reports), sum(r.real_tokens for r in reports)
        padding = sum(r.padding for r in reports)
        elapsed = time.monotonic() - started
        eta = elapsed / (step - first) * (self.steps - step)
        row = {"lr": lr, "eta": duration(eta), "time": seconds / len(window),
               "data_time": sum(d for _, d, _ in window) / len(window), "memory": memory_mb(), **mean,
               "grad_norm": sum(norms) / len(norms) if norms else None,
               "num_samples": sum(r.num_samples for r in reports), "num_tokens": tokens,
               "shared": 1 - (tokens - padding) / max(real, 1), "fill": 1 - padding / max(tokens, 1),
               "pairs/s": pairs / seconds}
        say(progress, train_line(step, self.steps, row))
        self.metrics.row("train", step, {**{("pairs_per_second" if k == "pairs/s" else k): v for k, v in row.items()},
                                         "eta_seconds": eta, "real_tokens": real, "num_pairs": pairs,
                                         "skipped": sum(not r.updated for r in reports)})

    def _evaluate(self) -> None:
        for name, dataset in self.valid.items():
            batcher = Batcher(dataset, global_batch_size=self.config.train.global_batch_size, **self.batching)
            bar = Progress(f"evaluating {name}", len(dataset))
            result = train.evaluate(self.wrapped, batcher, self.device, bar.advance)
            bar.clear()
            step = self.state.iteration
            log(f"Iter(val) [{step}/{self.steps}]  {name}: accuracy {result['accuracy']:.4f} (95 % interval "
                f"{result['accuracy_low']:.4f} to {result['accuracy_high']:.4f}, {result['num_pairs']} pairs)  margin "
                f"{result['mean_margin']:.4f}  reward {result['reward_mean']:.4f} +- {result['reward_std']:.4f}")
            self.metrics.row("eval", step, {"name": name, **result})
            if name == next(iter(self.valid)) and (self.best is None or result["accuracy"] > self.best[0]):
                self.best = (result["accuracy"], step)

    def _save(self, progress: Progress) -> None:
        c = self.config
        begun = time.monotonic()
        folder = checkpoint.save(
            c.checkpoint.save, state=self.state, wrapped=self.wrapped, optimizer=self.optimizer,
            scheduler=self.scheduler, info=self._info(),
            hf_files=[self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()])
        checkpoint.prune(c.checkpoint.save, c.checkpoint.keep_last, self.best[1] if self.best else None)
        say(progress, f"saved {folder} in {time.monotonic() - begun:.1f} s")

    def _info(self) -> dict[str, Any]:
        """What a checkpoint says of itself beside the tensors."""
        source = next(iter(self.valid.values()), self.dataset)
        proof = []
        for i in range(min(self.config.checkpoint.num_proof_comparisons, len(source))):
            stored = source.get(i)
            proof.append({"prefix": stored.prefix.tolist(), "suffixes": [s.tolist() for s in stored.suffixes]})
        return {"config": self.config.as_dict(), "geometry": dataclasses.asdict(self.geometry),
                "hf_config": self.hf_config, "base_model": self.config.model.hf_model, "head": self.head,
                "manifest": self.manifest, "num_comparisons": len(self.dataset),
                "reward_token_id": self.manifest["reward_token_id"], "pad_token_id": self.manifest["pad_token_id"],
                "dtype": str(self.precision.dtype).removeprefix("torch."), "best": self.best,
                "ops": ops.active_implementation(self.device), "proof": proof}
