"""``--dry-run``: memory per rank, tokens per step and pipeline bubble of a layout, printed.

Tokens and FLOP of a step come from the lengths in the data (two FLOP per multiply-add of the
matmuls). The bubble is (pp - 1) / (m vpp + pp - 1) of a step of m micro-batches (Narayanan et al.
2021).
"""

from __future__ import annotations

import dataclasses
import math

from rmega import distributed
from rmega.config import TrainingConfig
from rmega.data.batching import Batcher, Mixture
from rmega.hub import model_config_folder
from rmega.models.geometry import Geometry
from rmega.models.hf import read_geometry
from rmega.training import components, preflight
from rmega.training.logs import duration
from rmega.training.plan import GB, StagePlan, plan_stages, refuse_what_cannot_fit

H100_FLOPS = 989e12
"""Dense bf16 peak of an H100 SXM (NVIDIA's data sheet)."""
USUAL_MFU = 0.4
"""Share of the peak that well-tuned trainings of this size reach (Megatron-LM: 41 % at 1.7B)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What a step computes, from the lengths in the data (means over the steps that were looked
    at)."""

    comparisons: int
    comparisons_per_epoch: int
    flops: float
    """Of all ranks, without recomputation: what the model needs."""
    tokens: float
    microbatches: float
    largest_microbatch: int
    bubble: float
    imbalance: float
    """Maximum load of a data-parallel rank over the mean."""


def flops_of(config: TrainingConfig, geometry: Geometry, batcher, document: int) -> float:
    """FLOP of forward and backward pass of one comparison: two per multiply-add of the
    matmuls (``CostModel``); the backward pass is twice the forward one, or once where weights are
    frozen (LoRA). A pruned last layer makes keys and values of every token, the rest of it for
    pooled tokens. ``--batch-centering`` computes a second forward pass."""
    g, cost = geometry, batcher.cost
    tokens, layer = batcher.size(document)
    forward = g.num_layers * layer
    if config.model.prune_last_layer:
        prefix, suffixes = batcher.lengths(document)
        key_value = 2.0 * g.hidden_size * g.num_query_groups * g.head_dim
        pooled = len(suffixes) * (cost.linear - key_value)
        attended = cost.quadratic * sum(prefix + suffix for suffix in suffixes)
        forward += key_value * tokens + pooled + attended - layer
    passes = (2 if config.lora.lora_rank else 3) + (config.loss.batch_centering > 0)
    return 2.0 * forward * passes


def plan_step(
    config: TrainingConfig, geometry: Geometry, *, replicas: int, steps: int = 8
) -> StepPlan:
    """Look at the first ``steps`` global batches of the data, dealt out as a run would; reads
    lengths only."""
    p, c = config.parallel, config
    dataset = Mixture.open(c.data.data_path, seed=c.train.seed)
    vpp = p.virtual_pipeline_model_parallel_size
    batcher = Batcher.of(c, dataset, geometry, num_ranks=replicas)
    tokens = microbatches = largest = 0
    imbalance = flops = 0.0
    for step in range(steps):
        loads = []
        for bins in batcher.plan(batcher.documents(step * c.train.global_batch_size)):
            load = 0.0
            for documents in bins:
                sizes = [batcher.size(number) for number in documents]
                own = sum(size for size, _ in sizes)
                own += -own % batcher.token_multiple
                tokens, largest = tokens + own, max(largest, own)
                load += sum(cost for _, cost in sizes)
                flops += sum(flops_of(c, geometry, batcher, number) for number in documents)
            loads.append(load)
            microbatches += len(bins)
        imbalance += max(loads) * len(loads) / max(sum(loads), 1e-9)
    each = microbatches / steps / replicas
    pp = p.pipeline_model_parallel_size
    return StepPlan(
        comparisons=c.train.global_batch_size,
        comparisons_per_epoch=len(dataset),
        flops=flops / steps,
        tokens=tokens / steps,
        microbatches=each,
        largest_microbatch=largest,
        imbalance=imbalance / steps,
        bubble=(pp - 1) / (each * (vpp or 1) + pp - 1),
    )


def describe(
    config: TrainingConfig,
    geometry: Geometry,
    stages: list[StagePlan],
    step: StepPlan,
    dtype: str,
    replicas: int,
) -> str:
    """The page that --dry-run prints."""
    p = config.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    vpp = p.virtual_pipeline_model_parallel_size
    lines = [
        (
            f"model: {config.model.hf_model} ({geometry.family}, {geometry.num_layers} layers of"
            f" {geometry.hidden_size})"
        ),
        (
            f"layout: tp {tp}{' + sequence parallel' if p.sequence_parallel else ''} x pp"
            f" {pp}{f' ({vpp} chunks each)' if vpp else ''} x dp {replicas} = {tp * pp * replicas}"
            f" ranks; {dtype}, recompute {p.recompute},"
            f" {'distributed' if p.use_distributed_optimizer else 'whole'} optimizer"
        ),
        *(
            [
                f"LoRA: {config.lora.describe()}; trained on each rank:"
                f" {', '.join(f'{s.trained / 1e6:.1f} M' for s in stages)}"
            ]
            if config.lora.lora_rank
            else []
        ),
        "",
        (
            "GB per rank    layers   parameters    weights  gradients  optimizer  activations     "
            " total"
        ),
    ]
    for s in stages:
        lines.append(
            f"stage {s.stage:<8} {s.layers:>6} {s.parameters / 1e6:>10.1f} M"
            f" {s.weights / GB:>10.2f} {s.gradients / GB:>10.2f} {s.optimizer / GB:>10.2f}"
            f" {s.activations / GB:>12.2f} {s.total / GB:>10.2f}"
        )
    lines += [
        "(without the workspace of kernels and communication, and what the allocator keeps back)",
        "",
        (
            f"step: {step.comparisons} comparisons, {step.tokens:,.0f} tokens"
            f" ({step.tokens / replicas:,.0f} per replica) in {step.microbatches:.1f} micro-batches"
            f" per replica, the largest of {step.largest_microbatch:,} tokens"
        ),
        (
            f"pipeline bubble: {100 * step.bubble:.1f} % of a step; max/mean load across DP ranks:"
            f" {step.imbalance:.3f}"
        ),
        _hours(config, step, tp * pp * replicas),
    ]
    return "\n".join(lines)


def _hours(config: TrainingConfig, step: StepPlan, gpus: int) -> str:
    steps, comparisons = config.train.total_steps(step.comparisons_per_epoch)
    whole = step.flops * comparisons / step.comparisons
    seconds = whole / (USUAL_MFU * H100_FLOPS * gpus)
    return (
        f"computing: {step.flops:.3g} FLOP per step, {whole:.3g} in {steps:,} steps; H100s at"
        f" {100 * USUAL_MFU:.0f} % MFU (assumed, not measured) would take"
        f" {duration(math.ceil(seconds))} on {gpus} ({gpus * seconds / 3600:,.2f} GPU hours)"
    )


def dry_run(config: TrainingConfig) -> int:
    """Print the plan of a configuration, without ranks and without weights. Raises ValueError where
    it cannot work."""
    distributed.quiet_megatron()
    p = config.parallel
    replicas = p.data_parallel_size or 1
    config.check(p.tensor_model_parallel_size * p.pipeline_model_parallel_size * replicas)
    geometry, _ = read_geometry(model_config_folder(config.model.hf_model))
    components.transformer_layout(config, geometry, on_cpu=True)
    preflight.check_save(config)
    for dataset in Mixture.open(config.data.data_path, seed=config.train.seed).datasets:
        preflight.check_positions("--data-path", dataset, geometry)
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    step = plan_step(config, geometry, replicas=replicas)
    size = {
        "replicas": replicas,
        "bytes_per_element": 4 if precision == "fp32" else 2,
        "tokens": max(step.largest_microbatch, 1),
        "microbatches": step.microbatches,
    }
    stages = plan_stages(config, geometry, **size)
    print(describe(config, geometry, stages, step, precision, replicas))
    if p.recompute != "full":
        other = dataclasses.replace(p, recompute="full")
        recomputed = plan_stages(dataclasses.replace(config, parallel=other), geometry, **size)
        print(
            f"memory with --recompute full: {max(s.total for s in recomputed) / GB:.2f} GB on the"
            f" fullest rank instead of {max(s.total for s in stages) / GB:.2f}, for one more"
            " forward pass per step"
        )
    if p.device_memory_gb is not None:
        refuse_what_cannot_fit(stages, p.device_memory_gb * GB)
        worst = max(s.total for s in stages)
        print(f"fits: the fullest rank needs {worst / GB:.1f} of {p.device_memory_gb:g} GB")
    return 0
