"""Memory that each rank of a layout needs, and whether a device has it.

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
layer and the activations of one layer.
"""

from __future__ import annotations

import dataclasses

import torch

from rmega import distributed
from rmega.config import TrainingConfig
from rmega.models.geometry import Geometry

GB = 1e9


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

    @property
    def state(self) -> int:
        """Bytes that are needed between steps, too."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.activations


def layers_of_stages(
    num_layers: int, pp: int, first: int | None = None, last: int | None = None
) -> list[int]:
    """Layers of each stage (all virtual chunks together)."""
    if pp == 1:
        return [num_layers]
    middle = pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    each = rest // middle if middle else 0
    layers = [each] * pp
    if first is not None:
        layers[0] = first
    if last is not None:
        layers[-1] = last
    return layers


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
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    sp = tp if p.sequence_parallel else 1  # ranks that share the rows outside of tensor parallelism
    groups = -(-g.num_query_groups // tp) * tp if p.pad_attention_heads else g.num_query_groups
    heads = groups * (g.num_attention_heads // g.num_query_groups)
    h, f, d = g.hidden_size, g.ffn_hidden_size, g.head_dim
    per_layer = ((heads + 2 * groups) * d * h + heads * d * h + 3 * f * h) // tp + 2 * h
    kept_whole = 4 * h / sp
    kept_cut = ((2 * heads + 3 * groups) * d + heads * d + 3 * f) / tp
    adapters, r = 0, config.lora.lora_rank
    if r:
        qkv = (heads + 2 * groups) * d
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
            ("qkv", 3, h / sp),
            ("proj", 1, 0),  # kept by attention in any case
            ("fc1", 2, h / sp),
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
        held = in_flight(stage, pp, p.virtual_pipeline_model_parallel_size, microbatches)
        if p.recompute == "full":
            activations = tokens * (h / sp * bytes_per_element * layers * held + per_token)
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
            )
        )
    return stages


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
