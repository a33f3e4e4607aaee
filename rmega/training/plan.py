"""Memory, tokens per step and pipeline bubble of a layout (``--dry-run``).

Shape letters: T tokens of a micro-batch, h hidden, f MLP width, a query heads, g key/value groups,
d head dimension, V vocabulary, L layers of a stage, tp, pp, vpp, dp sizes of the layout.

Parameters per layer and tensor rank, from the weight table: (a + 2g) d h + a d h + 3 f h over tp,
and two norms h. Gradients are fp32 and complete on every replica (Megatron-Core's buffer). Adam
keeps two fp32 moments, and an fp32 copy of parameters in half precision; the distributed optimizer
shards these over dp. These three are exact up to the padding of buffers. With LoRA, gradients
and optimizer state are those of adapters and head alone. Activations count the
tensors that autograd keeps per token and layer (the method of Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", for the operators used here):
  2h for each of the two norms (input and output),     once, or over tp under sequence parallelism
  (2a + 3g) d for queries, keys before and after rotation, and values;  over tp
  a d for attention's output, 3f for the MLP's matmul and activation;   over tp
and apply to as many micro-batches as the schedule keeps in flight. Full recomputation keeps h per
layer and the activations of one layer. The bubble is (pp - 1) / (m vpp + pp - 1) of a step of m
micro-batches (Narayanan et al. 2021).
"""

from __future__ import annotations

import dataclasses
import math

from rmega.config import TrainingConfig
from rmega.hub import model_config_folder
from rmega.models.geometry import Geometry
from rmega.training.logs import duration

GB = 1e9
H100_FLOPS = 989e12
"""Dense bf16 peak of an H100 SXM (NVIDIA's data sheet)."""
USUAL_MFU = 0.4
"""Share of the peak that well-tuned trainings of this size reach (Megatron-LM: 41 % at 1.7B)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Bytes of one rank of a pipeline stage; every tensor and data rank of a stage has the same."""

    stage: int
    layers: int
    parameters: int
    """How many (not bytes)."""
    trained: int
    """How many of them are not frozen."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    microbatches_in_flight: float

    @property
    def state(self) -> int:
        """Bytes that are there between steps too."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.activations


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


def layers_of_stages(
    num_layers: int, pp: int, first: int | None = None, last: int | None = None
) -> list[int]:
    """Layers of each stage (all virtual chunks together)."""
    if pp == 1:
        return [num_layers]
    middle = pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    each = rest // middle if middle else 0
    return [
        (
            first
            if s == 0 and first is not None
            else last
            if s == pp - 1 and last is not None
            else each
        )
        for s in range(pp)
    ]


def in_flight(stage: int, pp: int, vpp: int | None, microbatches: float) -> float:
    """Micro-batches whose activations a stage holds at most (1F1B, or interleaved: in units of all
    its layers)."""
    if not vpp:
        return min(pp - stage, microbatches)
    chunks = (pp - stage - 1) * 2 + (vpp - 1) * pp + 1
    return min(chunks / vpp, microbatches)


def plan_stages(
    config: TrainingConfig,
    geometry: Geometry,
    *,
    replicas: int,
    bytes_per_element: int,
    tokens: int,
    microbatches: float,
) -> list[StagePlan]:
    """The plan of every pipeline stage, for micro-batches of ``tokens`` tokens."""
    p, g = config.parallel, geometry
    tp, pp, vpp = (
        p.tensor_model_parallel_size,
        p.pipeline_model_parallel_size,
        p.virtual_pipeline_model_parallel_size,
    )
    groups = -(-g.num_query_groups // tp) * tp if p.pad_attention_heads else g.num_query_groups
    heads = groups * (g.num_attention_heads // g.num_query_groups)
    h, f, d = g.hidden_size, g.ffn_hidden_size, g.head_dim
    per_layer = ((heads + 2 * groups) * d * h + heads * d * h + 3 * f * h) // tp + 2 * h
    kept_whole = 4 * h / (tp if p.sequence_parallel else 1)
    kept_cut = ((2 * heads + 3 * groups) * d + heads * d + 3 * f) / tp
    adapters, r = 0, config.lora.lora_rank
    if r:
        qkv, tokens_cut = (heads + 2 * groups) * d, tp if p.sequence_parallel else 1
        sizes = {
            "qkv": 3 * r * h + r * qkv // tp,
            "proj": r * (heads * d // tp + h),
            "fc1": 2 * r * (h + f // tp),
            "fc2": r * (f // tp + h),
        }
        adapters = sum(sizes[target] for target in config.lora.targets)
        # A frozen layer keeps no input; an adapter keeps its input and x A^T, with dropout also a
        # mask of a byte per element, and behind attention the input without what was dropped.
        for target, parts, width in (
            ("qkv", 3, h / tokens_cut),
            ("proj", 1, 0),  # kept by attention in any case
            ("fc1", 2, h / tokens_cut),
            ("fc2", 1, f / tp),
        ):
            kept_whole += parts * r if target in config.lora.targets else -width
            if config.lora.lora_dropout and target in config.lora.targets:
                kept_cut += (width or heads * d / tp) / bytes_per_element
                kept_cut += 0 if width else heads * d / tp
    if p.recompute == "selective":
        kept_cut -= heads * d / tp
    per_token = (kept_whole + kept_cut) * bytes_per_element
    stages = []
    counts = layers_of_stages(
        g.num_layers, pp, p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage
    )
    for stage, layers in enumerate(counts):
        half = layers * (per_layer + adapters)
        if stage == 0:
            half += -(-g.vocab_size // tp) * h
        if stage == pp - 1:
            half += h  # final norm
        head = h if stage == pp - 1 else 0  # fp32 in every precision
        trained = layers * adapters if r else half
        held = in_flight(stage, pp, vpp, microbatches)
        if p.recompute == "full":
            one = h / (tp if p.sequence_parallel else 1) * bytes_per_element
            activations = tokens * (one * layers * held + per_token)
        else:
            activations = tokens * per_token * layers * held
        cut = replicas if p.use_distributed_optimizer else 1
        main_copy = 0 if bytes_per_element == 4 else 4
        stages.append(
            StagePlan(
                stage=stage,
                layers=layers,
                parameters=half + head,
                trained=trained + head,
                weights=half * bytes_per_element + 4 * head,
                gradients=4 * (trained + head),
                optimizer=((8 + main_copy) * trained + 8 * head) // cut,
                activations=int(activations),
                microbatches_in_flight=held,
            )
        )
    return stages


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
    from rmega.data.batching import Batcher, Mixture

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


def refuse_what_cannot_fit(
    stages: list[StagePlan], memory: float, *, only_state: bool = False
) -> None:
    """Raise ValueError where a rank needs more than ``memory`` bytes, saying what would help."""
    worst = max(stages, key=lambda s: s.state if only_state else s.total)
    need = worst.state if only_state else worst.total
    if need <= memory:
        return
    advice = (
        "more --tp or --pp, or --use-distributed-optimizer with more replicas"
        if worst.state > memory
        else "--recompute full, --sp, or a smaller --max-tokens-per-microbatch"
    )
    raise ValueError(
        f"this layout needs {need / GB:.1f} GB on each rank of stage {worst.stage} (weights "
        f"{worst.weights / GB:.1f}, gradients {worst.gradients / GB:.1f}, optimizer "
        f"{worst.optimizer / GB:.1f}"
        f"{'' if only_state else f', activations {worst.activations / GB:.1f}'}), "
        f"and a device has {memory / GB:.1f} GB: {advice}"
    )


def check_memory(config: TrainingConfig, geometry: Geometry) -> None:
    """Refuse, before weights are read, a layout whose state alone is larger than a device (or
    --device-memory-gb)."""
    import torch

    from rmega import distributed

    p = config.parallel
    memory = p.device_memory_gb and p.device_memory_gb * GB
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(distributed.device()).total_memory
    if memory is not None:
        shards = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
        stages = plan_stages(
            config,
            geometry,
            replicas=distributed.world_size() // shards,
            tokens=0,
            microbatches=1,
            bytes_per_element=4 if config.train.precision == "fp32" else 2,
        )
        refuse_what_cannot_fit(stages, memory, only_state=True)


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
    from rmega import distributed
    from rmega.data.batching import Mixture
    from rmega.models.hf import read_geometry
    from rmega.training import components, preflight

    distributed.quiet_engine()
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
