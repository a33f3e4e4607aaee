"""Layout parity: a few steps in a given layout, with everything that must not depend on it.

Used by ``tools/check_layouts.py`` and by the tests: one code for both.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rmega import distributed
from rmega.config import (
    DataArgs,
    LoraArgs,
    LossArgs,
    ModelArgs,
    OptimizerArgs,
    ParallelArgs,
    TrainArgs,
    TrainingConfig,
)
from rmega.hub import resolve_start
from rmega.megatron import param_gather
from rmega.models import BACKBONES
from rmega.models.hf import TIE_THRESHOLD, global_parameters, load_hf, read_geometry
from rmega.models.lora_weights import adapter_table, initialize
from rmega.models.peft_folder import PeftFolder
from rmega.models.weights import WeightRule
from rmega.training import components, train
from rmega.training.rewards import compute_rewards

REWARD_BATCHES = 8  # of the dataset, which may be of any size
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
}
SWITCHES: dict[str, dict[str, Any]] = {
    "sp": {"sequence_parallel": True},
    "overlap": {"overlap_grad_reduce": True},
    "gather": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "pad": {"pad_attention_heads": True},
    "plainopt": {"use_distributed_optimizer": False},
    "recompute": {"recompute": "full"},
    "selective": {"recompute": "selective"},
    "1": {"overlap_grad_reduce": False, "overlap_param_gather": False},  # on GPUs, too
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout as it is written on a command line: ``tp2,sp,pp2,vpp2,dp2,recompute``."""

    text: str
    dp: int
    parallel: ParallelArgs

    @classmethod
    def parse(cls, text: str) -> Layout:
        """ValueError names a part that is not understood."""
        dp = 1
        values: dict[str, Any] = {"distributed_timeout_minutes": 2, **SWITCHES["1"]}
        for part in text.split(","):
            number = re.fullmatch(r"([a-z]+)(\d+)", part)
            if number and number[1] == "cp":
                raise ValueError(
                    f"--layouts {text}: context parallelism is not supported for reward models"
                )
            if number and number[1] == "dp":
                dp = int(number[2])
            elif number and number[1] in SIZES:
                values[SIZES[number[1]]] = int(number[2])
            elif part in SWITCHES:
                values |= SWITCHES[part]
            else:
                raise ValueError(
                    f"--layouts {text}: {part!r} is not one of tpN, ppN, vppN, dpN, firstN, lastN, "
                    f"{', '.join(switch for switch in SWITCHES if switch != '1')}"
                )
        return cls(text, dp, ParallelArgs(**values))

    @property
    def world_size(self) -> int:
        """Processes that it takes."""
        p = self.parallel
        return p.tensor_model_parallel_size * p.pipeline_model_parallel_size * self.dp


def layout_config(
    layout: Layout,
    *,
    hf_model: str,
    steps: int,
    global_batch_size: int,
    max_tokens: int,
    lr: float,
    loss: LossArgs | None = None,
    share_prefix: bool = True,
    prune_last_layer: bool = True,
    lora: LoraArgs | None = None,
) -> TrainingConfig:
    """The configuration of a run of a few steps in a layout, at a constant learning rate. loss: by
    default InternLM2's, with margins."""
    return TrainingConfig(
        model=ModelArgs(hf_model=hf_model, prune_last_layer=prune_last_layer, head_init="normal"),
        data=DataArgs(
            data_path=(), max_tokens_per_microbatch=max_tokens, share_prefix=share_prefix
        ),
        lora=lora or LoraArgs(),
        loss=loss or LossArgs(loss="focal", penalty="log_barrier", use_margin=True),
        train=TrainArgs(train_steps=steps, global_batch_size=global_batch_size, seed=7),
        # A larger epsilon keeps Adam smooth: with the usual one, a gradient that is rounding noise
        # moves its weight by the full learning rate in a random direction, in any layout.
        optimizer=OptimizerArgs(
            lr=lr,
            adam_eps=1e-3,
            lr_decay_style="constant",
            lr_warmup_fraction=0.0,
            weight_decay=0.01,
        ),
        parallel=layout.parallel,
    )


def build(config: TrainingConfig, dtype: torch.dtype = torch.float32):
    """(wrapped chunks, optimizer, scheduler, geometry, device) of a configuration; joins the
    process group."""
    config.check(distributed.world_size())
    p = config.parallel
    distributed.prepare_cuda(p.tensor_model_parallel_size, deterministic=config.train.deterministic)
    device = distributed.initialize(p, seed=config.train.seed)
    folder, adapter = resolve_start(config.model.hf_model)
    geometry, _ = read_geometry(folder)
    start = PeftFolder(adapter, geometry) if adapter else None
    chunks = components.build_model(config, geometry, dtype=dtype, device=device)
    for chunk in chunks:
        load_hf(chunk, folder, geometry, head_init=config.model.head_init, head_seed=3)
        if config.lora.lora_rank:
            initialize(chunk, geometry, config.lora, seed=config.train.seed, start=start)
    wrapped = components.wrap_model(chunks, config)
    optimizer, scheduler = components.build_optimizer(wrapped, config, config.train.train_steps)
    return wrapped, optimizer, scheduler, geometry, device


def gather_global(
    wrapped, geometry, value, lora: LoraArgs | None = None
) -> dict[str, torch.Tensor]:
    """``value(parameter)`` of every parameter that is trained, put together over tensor and
    pipeline ranks: name -> whole tensor.

    Padding of vocabulary and heads is cut away. Returned on rank 0; empty elsewhere.
    """
    param_gather.finish(wrapped)
    table = BACKBONES[geometry.family].weight_table(geometry)
    rules = {TIE_THRESHOLD: WeightRule(TIE_THRESHOLD, (1,), ())}
    rules |= {rule.name: rule for rule in [*table, *adapter_table(geometry, lora or LoraArgs())]}
    own: dict[str, torch.Tensor] = {}
    for chunk in wrapped:
        for name, parameter in global_parameters(chunk):
            if parameter.requires_grad:
                own[name] = value(parameter).detach().float().cpu().clone()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    first_replica = parallel_state.get_data_parallel_rank() == 0
    gathered = distributed.gather((tp_rank, own if first_replica else {}))
    if distributed.rank() != 0:
        return {}
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for tp_rank, tensors in gathered:
        for name, tensor in tensors.items():
            shards.setdefault(name, {})[tp_rank] = tensor
    return {
        name: _join(rules[name], [parts[r] for r in sorted(parts)])
        for name, parts in sorted(shards.items())
    }


def _join(rule: WeightRule, parts: list[torch.Tensor]) -> torch.Tensor:
    if rule.shard_dim is None or len(parts) == 1:
        whole = parts[0]
    elif rule.shard_dim == 1:
        whole = torch.cat(parts, dim=1)
    else:
        blocks = [
            torch.cat([part.chunk(rule.shard_blocks)[b] for part in parts])
            for b in range(rule.shard_blocks)
        ]
        whole = torch.cat(blocks)
    return whole[: rule.shape[0]] if whole.ndim == 1 else whole[: rule.shape[0], : rule.shape[1]]


@dataclasses.dataclass
class LayoutResult:
    """Results of a layout: loss and gradient norm per step, gradients of the first step, parameters
    and rewards after the last."""

    losses: list[float]
    grad_norms: list[float]
    grads: dict[str, torch.Tensor]
    params: dict[str, torch.Tensor]
    rewards: torch.Tensor


def run_layout(
    config: TrainingConfig, dataset, dtype: torch.dtype = torch.float32
) -> LayoutResult | None:
    """Run ``--train-steps`` steps on ``dataset``; called by every rank, the result is on rank 0
    (None elsewhere)."""
    wrapped, optimizer, scheduler, geometry, device = build(config, dtype)
    batcher = components.make_batcher(config, dataset, geometry)
    losses, norms, grads = [], [], {}
    consumed = 0
    for step in range(config.train.train_steps):
        documents = batcher.documents(consumed)
        packs = [pack.to(device) for pack in batcher.packs(documents, consumed)]
        if step == 0:
            # With the distributed optimizer each replica holds its own share of the reduced
            # gradient; the plain sum over replicas of what each has before the reduction is what
            # all layouts must agree on.
            grads = _first_gradients(wrapped, packs, config, geometry)
        report = train.train_step(wrapped, optimizer, packs, config.loss, len(documents))
        scheduler.step(1)
        losses.append(report.loss)
        norms.append(report.grad_norm)
        consumed += len(documents)
    params = gather_global(wrapped, geometry, lambda p: p.data, config.lora)
    rewards = compute_rewards(wrapped, batcher, device, batches=REWARD_BATCHES)
    if distributed.rank() != 0:
        return None
    return LayoutResult(losses, norms, grads, params, torch.from_numpy(rewards))


def _first_gradients(wrapped, packs, config: TrainingConfig, geometry) -> dict[str, torch.Tensor]:
    train.forward_backward(wrapped, packs, config.loss)
    replicas = parallel_state.get_data_parallel_world_size()
    if config.parallel.use_distributed_optimizer and replicas > 1:
        for chunk in wrapped:
            for buffer in chunk.buffers:
                for bucket in buffer.buckets:
                    shard = bucket.grad_data.numel() // replicas
                    start = parallel_state.get_data_parallel_rank() * shard
                    own = bucket.grad_data[start : start + shard].clone()
                    dist.all_gather_into_tensor(
                        bucket.grad_data, own, group=parallel_state.get_data_parallel_group()
                    )
    return gather_global(wrapped, geometry, lambda p: p.main_grad, config.lora)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of ``b``."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def worst_gradient(result: LayoutResult, reference: LayoutResult) -> str:
    """Name of the tensor whose gradient differs most, relative to its own largest value."""
    grads = reference.grads
    return max(grads, key=lambda name: _difference(result.grads[name], grads[name]))


def compare(result: LayoutResult, reference: LayoutResult) -> dict[str, float]:
    """Largest differences relative to the reference's largest value: losses, norms, gradients,
    parameters, rewards."""
    assert result.grads.keys() == reference.grads.keys()
    return {
        "loss": max(
            abs(a - b) / abs(b) for a, b in zip(result.losses, reference.losses, strict=True)
        ),
        "grad_norm": max(
            abs(a - b) / b for a, b in zip(result.grad_norms, reference.grad_norms, strict=True)
        ),
        "gradient": max(
            _difference(result.grads[name], reference.grads[name]) for name in reference.grads
        ),
        "parameter": max(
            _difference(result.params[name], reference.params[name]) for name in reference.params
        ),
        "reward": _difference(result.rewards, reference.rewards),
    }
