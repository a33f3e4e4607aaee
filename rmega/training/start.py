"""Data, checkpoint to resume from, and the built model of a run."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import torch

from rmega import distributed, precision
from rmega.checkpointing import base_model, checkpoint, run_folder
from rmega.checkpointing.find import check_exports
from rmega.config import MIN_COMPARISONS, OptimizerArgs, TrainingConfig
from rmega.data.batching import Batcher, Mixture
from rmega.data.indexed import PreferenceDataset, open_preferences, split_label
from rmega.distributed import log
from rmega.hub import adapter_base, resolve_start
from rmega.io import write_durably
from rmega.models import lora_weights
from rmega.models.geometry import Geometry
from rmega.models.hf import load_hf, read_geometry
from rmega.models.peft_folder import PeftFolder
from rmega.training import components, plan, preflight, resume


def named_prefix(text: str) -> tuple[str, str]:
    """``NAME=PREFIX`` or ``PREFIX`` -> (name, prefix); the name defaults to the prefix's last
    part."""
    name, prefix = split_label(text)
    return (Path(prefix).name if name is None else name), prefix


@dataclasses.dataclass(kw_only=True)
class Base:
    """The base model, and this rank's device."""

    name: str
    """--hf-model, or the base model that an adapter there names."""
    folder: Path
    adapter: PeftFolder | None
    """The adapter that --hf-model names, to start from."""
    geometry: Geometry
    hf_config: dict[str, Any]
    device: torch.device


@dataclasses.dataclass(kw_only=True)
class Start(Base):
    """What is known of a run before its model is built."""

    config: TrainingConfig
    precision: precision.Precision
    found: Path | None
    """The checkpoint to resume from."""
    info: dict[str, Any]
    """Its rmega.json; {} at the start of a run."""
    changes: list[dict[str, Any]]
    """What differed at each resume: {"iteration": ..., flag: [before, from there on]}."""
    dataset: Mixture
    valid: dict[str, PreferenceDataset]
    evaluated: set[str]
    """Validation sets whose evaluation at the step of ``found`` is in the run's metrics.jsonl."""
    base_record: dict[str, Any] | None
    """With LoRA, what checkpoints record of the frozen weights."""
    steps: int
    batcher: Batcher

    @property
    def resumed_at(self) -> int | None:
        return self.info["iteration"] if self.found else None

    def is_complete(self) -> bool:
        """Whether ``--load`` has the run's last step and its evaluation of every set: then nothing
        needs to be built."""
        last = bool(self.found) and self.info["iteration"] >= self.steps
        return last and self.evaluated >= self.valid.keys()


def join(config: TrainingConfig) -> Base:
    """Check what needs no other rank, and join the process group."""
    p = config.parallel
    distributed.prepare_cuda(p.tensor_model_parallel_size, deterministic=config.train.deterministic)
    preflight.check_save(config)
    folder, adapter_folder = resolve_start(config.model.hf_model)
    geometry, hf_config = read_geometry(folder)
    adapter, name = None, config.model.hf_model
    if adapter_folder is not None:
        name = adapter_base(adapter_folder, "--hf-model")
        adapter = PeftFolder(adapter_folder, geometry)
        adapter.check_flags(config.lora)
    components.transformer_layout(config, geometry, on_cpu=not torch.cuda.is_available())
    plan.check_memory(config, geometry)
    device = distributed.initialize(p, seed=config.train.seed)
    check_exports("--hf-model", folder, adapter_folder)
    return Base(
        name=name,
        folder=folder,
        adapter=adapter,
        geometry=geometry,
        hf_config=hf_config,
        device=device,
    )


def prepare(config: TrainingConfig, base: Base) -> Start:
    """Find the checkpoint, open the datasets, and check that all belong together. Called by every
    rank, inside the run folder's lock."""
    c = config
    if c.checkpoint.save:
        run_folder.check_shared(c.checkpoint.save)
        preflight.check_save(c)  # another run may have ended since
        if distributed.rank() == 0:
            run_folder.clean(c.checkpoint.save)
    else:
        log(
            "note: no --save: weights and metrics of this run will not be kept (--save FOLDER"
            " keeps them)"
        )
    folder, geometry = base.folder, base.geometry
    found = preflight.find_start(c)
    info = run_folder.read_info(found) if found else {}
    changes = list(info.get("changes", []))
    if found:
        preflight.check_same_model(info, found, geometry, folder)
        if differences := resume.changes(info, c):
            log(resume.describe(differences))
            changes.append({"iteration": info["iteration"], **differences})
    base_record = base_model.record(folder) if c.lora.lora_rank else None
    if found and base_record:
        base_model.check(info, found, base_record, "--hf-model")
    chosen = precision.choose_together(
        resume.precision_to_use(info, c.train.precision), c.train.matmul_precision, base.device
    )
    scale = c.optimizer.initial_loss_scale
    if chosen.dtype != torch.float16 and scale != OptimizerArgs.initial_loss_scale:
        raise ValueError(
            f"--initial-loss-scale {scale} has no effect: the run computes in"
            f" {precision.dtype_name(chosen.dtype)}"
        )
    dataset, valid = _open_data(c, geometry, folder)
    evaluated: set[str] = set()
    if found:
        preflight.check_same_data(info, found, dataset)
        evaluated = preflight.evaluated_before(c, info["iteration"])
    steps, comparisons = c.train.total_steps(len(dataset))
    log(
        f"data: {len(dataset):,} comparisons per epoch from {', '.join(c.data.data_path)};"
        f" {steps:,} steps of {c.train.global_batch_size}"
    )
    return Start(
        **vars(base),
        config=c,
        precision=chosen,
        found=found,
        info=info,
        changes=changes,
        dataset=dataset,
        valid=valid,
        evaluated=evaluated,
        base_record=base_record,
        steps=steps,
        batcher=components.make_batcher(c, dataset, geometry, max_consumed=comparisons),
    )


def _open_data(
    config: TrainingConfig, geometry: Geometry, folder: Path
) -> tuple[Mixture, dict[str, PreferenceDataset]]:
    dataset = Mixture.open(config.data.data_path, seed=config.train.seed)
    valid: dict[str, PreferenceDataset] = {}
    for text in config.data.valid_data_path:
        name, prefix = named_prefix(text)
        if name in valid:
            raise ValueError(
                f"--valid-data-path {text}: the name {name} is taken (write NAME=PREFIX)"
            )
        valid[name] = open_preferences(prefix)
    for flag, one in [
        *(("--data-path", d) for d in dataset.datasets),
        *(("--valid-data-path", d) for d in valid.values()),
    ]:
        preflight.check_dataset(flag, one, dataset, geometry, folder)
        preflight.check_content(flag, one)
    preflight.check_ratings(dataset, config.loss)
    preflight.check_ties(dataset, valid.values(), config.loss)
    preflight.check_tokenizer(dataset, folder)
    preflight.check_reward_token(dataset, folder)
    # Now, not at the export after a week of training.
    kept = min(
        config.checkpoint.num_verification_comparisons, sum(map(len, valid.values())) + len(dataset)
    )
    if config.checkpoint.save and kept < MIN_COMPARISONS:
        log(
            f"note: verifying an export takes {MIN_COMPARISONS} comparisons, checkpoints of this"
            f" run will hold {kept} (--num-verification-comparisons)"
        )
    return dataset, valid


@dataclasses.dataclass(kw_only=True)
class Model:
    """What a step changes."""

    wrapped: list
    """Chunks of the model on this rank, each with its gradient buffers."""
    optimizer: Any
    scheduler: Any
    state: checkpoint.RunState
    head: str
    """How the reward head of the run began."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step; not the head's, where --head-lr gives it its own."""
        groups = self.optimizer.param_groups
        return next(group["lr"] for group in groups if group.get("default_config", True))

    def advance(self, comparisons: int) -> None:
        """A step on so many comparisons is done."""
        self.state.iteration += 1
        self.state.consumed += comparisons
        self.scheduler.step(1)

    @property
    def parts(self) -> dict[str, Any]:
        """As the functions of ``rmega.checkpointing.checkpoint`` want them."""
        return {"wrapped": self.wrapped, "optimizer": self.optimizer, "scheduler": self.scheduler}


def build(start: Start) -> Model:
    """Model, gradient buffers, optimizer and schedule; weights from the Hugging Face folder, and
    everything from the checkpoint where the run resumes from one."""
    # Megatron-Core collects garbage at every save, while training waits: not among all modules.
    gc.freeze()
    c = start.config
    chunks = components.build_model(
        c, start.geometry, dtype=start.precision.dtype, device=start.device
    )
    heads = [
        load_hf(
            chunk, start.folder, start.geometry, head_init=c.model.head_init, head_seed=c.train.seed
        )
        for chunk in chunks
    ]
    head, adapter = "; ".join(dict.fromkeys(heads)), start.adapter
    if c.lora.lora_rank:
        for chunk in chunks:
            lora_weights.initialize(chunk, start.geometry, c.lora, seed=c.train.seed, start=adapter)
        if adapter is not None and adapter.has_head:
            head = f"head from {adapter.folder}"
        origin = "new" if adapter is None else adapter.describe()
        log(f"adapters: {c.lora.describe()}; {'from the checkpoint' if start.found else origin}")
        if layers := lora_weights.above_dimensions(start.geometry, c.lora):
            log(
                f"warning: --lora-rank {c.lora.lora_rank} is larger than the smaller dimension of"
                f" matrices of {layers}: their update has at most that rank, the rest costs memory"
            )
    wrapped = components.wrap_model(chunks, c)
    optimizer, scheduler = components.build_optimizer(wrapped, c, start.steps)
    log(
        f"model: {start.folder} ({start.geometry.family}, {start.geometry.num_layers} layers of"
        f" {start.geometry.hidden_size}), {'head from the checkpoint' if start.found else head}"
    )
    log(f"layout: {layout(start)}")
    log(
        f"compute: {start.precision.description}; "
        f"{components.implementations(c, wrapped, optimizer, start.device)}"
    )
    state = checkpoint.RunState()
    if start.found:
        state = checkpoint.load(
            start.found, wrapped=wrapped, optimizer=optimizer, scheduler=scheduler
        )
    return Model(
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
        state=state,
        head=start.info.get("head", head),
    )


def layout(start: Start) -> str:
    """The line that names the layout."""
    p = start.config.parallel
    vpp = p.virtual_pipeline_model_parallel_size
    return (
        f"tp {p.tensor_model_parallel_size}"
        f"{' + sequence parallel' if p.sequence_parallel else ''}, pp"
        f" {p.pipeline_model_parallel_size}{f' x {vpp} chunks' if vpp else ''}, dp"
        f" {start.batcher.num_ranks}"
        f"{' (distributed optimizer)' if p.use_distributed_optimizer else ''}"
    )


def write_config(start: Start) -> None:
    """RUN/config.json: the flags in force, and what follows from them."""
    run = start.config.checkpoint.save
    if run is None or distributed.rank() != 0:
        return
    Path(run).mkdir(parents=True, exist_ok=True)
    known = {
        "steps": start.steps,
        "layout": layout(start),
        "precision": precision.dtype_name(start.precision.dtype),
        "changes": start.changes,
    }
    content = {**start.config.as_dict(), "run": known}
    write_durably(Path(run, "config.json"), json.dumps(content, indent=1))
