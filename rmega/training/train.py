"""Model, optimizer and scheduler from Megatron-Core; one training step; one evaluation.

Shape letters: t tokens of a pack, n responses, m pairs. The loss is a sum over pairs with a count
(design rule 5): the summed gradient is divided by the count of the whole global batch, so no layout
changes what a step means.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from rmega import ops
from rmega.config import LossArgs, TrainingConfig
from rmega.data.batching import Batcher
from rmega.data.packing import PackedBatch
from rmega.distributed import is_reporting_rank, sum_over_ranks
from rmega.evaluation import results
from rmega.evaluation.token_probes import View, probe_stored
from rmega.megatron.fusion import fuse_weight_gradients, skip_single_rank_collectives
from rmega.megatron.grad_norm import grad_norm
from rmega.models import lora
from rmega.models.attention import active_kernel
from rmega.models.geometry import Geometry
from rmega.models.reward_model import RewardModel, transformer_config
from rmega.models.varlen import varlen_function
from rmega.precision import dtype_name


def build_model(
    config: TrainingConfig, geometry: Geometry, *, dtype: torch.dtype, device: torch.device
) -> list[RewardModel]:
    """This rank's chunks of the model (one, or ``--vpp`` of them), weights not loaded yet."""
    vpp = config.parallel.virtual_pipeline_model_parallel_size
    engine = use_transformer_engine(config, device)
    core = transformer_layout(config, geometry, dtype=dtype, on_cpu=device.type == "cpu")
    core.gradient_accumulation_fusion = fuse_weight_gradients(device, dtype)
    chunks = []
    for chunk in range(vpp or 1):
        stage = {"vp_stage": chunk, "ignore_virtual": False} if vpp else {}
        model = RewardModel(
            core,
            geometry,
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            vp_stage=chunk if vpp else None,
            prune_last_layer=config.model.prune_last_layer,
            transformer_engine=engine,
        ).to(device)
        if config.lora.lora_rank:
            lora.attach(model, config.lora)
        chunks.append(model)
    return chunks


def make_batcher(
    config: TrainingConfig, dataset, geometry: Geometry, *, max_consumed: int | None = None
) -> Batcher:
    """The batcher of this rank, which takes its share among the data-parallel ranks."""
    return Batcher.of(
        config,
        dataset,
        geometry,
        num_ranks=parallel_state.get_data_parallel_world_size(),
        rank=parallel_state.get_data_parallel_rank(),
        max_consumed=max_consumed,
        same_length=pads_packs(config, on_cpu=not torch.cuda.is_available()),
    )


def pads_packs(config: TrainingConfig, *, on_cpu: bool) -> bool:
    """Whether the packs of a step are padded to the longest. Pipeline stages then know the shape of
    what they receive; else they send it first, for which GPUs are waited for at every exchange."""
    return config.parallel.pipeline_model_parallel_size > 1 and not on_cpu


def transformer_layout(
    config: TrainingConfig, geometry: Geometry, *, dtype: torch.dtype = torch.float32, on_cpu: bool
):
    """megatron-core's configuration for these flags; ValueError where backbone and layout do not
    fit."""
    p = config.parallel
    return transformer_config(
        geometry,
        tp=p.tensor_model_parallel_size,
        pp=p.pipeline_model_parallel_size,
        vpp=p.virtual_pipeline_model_parallel_size,
        sp=p.sequence_parallel,
        dtype=dtype,
        pad_attention_heads=p.pad_attention_heads,
        recompute=p.recompute,
        first_stage_layers=p.num_layers_in_first_pipeline_stage,
        last_stage_layers=p.num_layers_in_last_pipeline_stage,
        deterministic=config.train.deterministic,
        on_cpu=on_cpu,
        fp8_format=config.model.fp8_format,
        fp8_recipe=config.model.fp8_recipe,
        prune_last_layer=config.model.prune_last_layer,
        same_length=pads_packs(config, on_cpu=on_cpu),
    )


def implementations(config: TrainingConfig, wrapped, optimizer, device: torch.device) -> str:
    """Which implementation of each part is active, for the log."""
    core = wrapped[0].config
    dtype = core.params_dtype
    inner = type(optimizer.chained_optimizers[0].optimizer)
    linear, fp8 = "megatron-core", config.model.fp8_format
    if use_transformer_engine(config, device):
        linear = f"transformer_engine {te_version()}" + (
            "" if fp8 == "none" else f" in fp8 ({fp8}, {config.model.fp8_recipe})"
        )
    if (products := ops.active_products(device, dtype)) != "torch":
        linear += f" with {products} products"
    # Without fusion a half-precision gradient is rounded before it is added: slower, less exact.
    added = "fused" if core.gradient_accumulation_fusion else f"in {dtype_name(dtype)}, then added"
    fused = ", fused" if any(group.get("fused") for group in optimizer.param_groups) else ""
    # Megatron-Core warns of each at every import (silenced by distributed.quiet_engine): once is
    # enough. flash_attn is used only where torch has no varlen attention.
    attention = () if varlen_function() else ("flash_attn",)
    absent = [
        name for name in ("transformer_engine", "apex", *attention) if find_spec(name) is None
    ]
    why_not = "" if "transformer_engine" in absent else transformer_engine_obstacle()
    return (
        f"gather and loss {ops.active_implementation(device)}, norm, rotation and activation"
        f" {ops.active_elementwise(device, dtype)}, attention"
        f" {active_kernel(device, dtype, core.kv_channels)}, linear {linear}, weight gradients"
        f" {added}, optimizer {inner.__module__.split('.')[0]} {inner.__name__}{fused}"
        + (", deterministic algorithms" if config.train.deterministic else "")
        + (f"; {why_not}" if why_not else "")
        + (f"; not installed: {', '.join(absent)}" if absent else "")
    )


def te_version() -> str:
    """Transformer Engine's release."""
    from megatron.core.utils import get_te_version

    return str(get_te_version())


def transformer_engine_obstacle() -> str:
    """Why Megatron-Core cannot use Transformer Engine; "" if it can."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        return ""
    if find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed (pip install 'rmega[te]')"
    try:
        import transformer_engine.pytorch.fp8  # noqa: F401

        reason = "Megatron-Core did not find what it needs in it"
    except Exception as error:  # whatever a broken installation raises
        reason = f"{type(error).__name__}: {error}"
    return f"Transformer Engine is installed, but Megatron-Core cannot use it ({reason})"


def use_transformer_engine(config: TrainingConfig, device: torch.device) -> bool:
    """Whether linear layers come from Transformer Engine; ValueError where it is asked for and
    cannot be had."""
    choice, fp8 = config.model.transformer_impl, config.model.fp8_format
    asked = f"--fp8-format {fp8}" if fp8 != "none" else "--transformer-impl transformer_engine"
    must = fp8 != "none" or choice == "transformer_engine"
    if choice == "local" or config.lora.lora_rank:
        return False
    if obstacle := transformer_engine_obstacle():
        if must:
            raise ValueError(f"{asked}: {obstacle}")
        return False
    if device.type != "cuda" and must:
        raise ValueError(f"{asked} needs a CUDA device")
    return device.type == "cuda"


def wrap_model(chunks: list[RewardModel], config: TrainingConfig) -> list[DistributedDataParallel]:
    """Give each chunk megatron-core's gradient buffers and data-parallel reduction."""
    p = config.parallel
    overlap = p.overlap_grad_reduce
    if overlap is None:  # on a CPU a reduction takes the cores that compute
        on_gpu = next(chunks[0].parameters()).is_cuda
        overlap = on_gpu and parallel_state.get_data_parallel_world_size() > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=p.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    core = chunks[0].config
    core.finalize_model_grads_func = _finalize
    skip_single_rank_collectives(wrapped)
    if overlap:
        hooks = [chunk.no_sync for chunk in wrapped]
        core.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return wrapped


def _finalize(model, num_tokens=None, **groups) -> None:
    """megatron-core's reduction of gradients without its division by the count of pairs: the
    optimizer divides by the count and the clipping factor at once, instead of two more passes
    over all gradients."""
    finalize_model_grads(model, None, **groups)


def build_optimizer(
    wrapped: list[DistributedDataParallel], config: TrainingConfig, total_steps: int
):
    """megatron-core's Adam and its schedule: (optimizer, scheduler)."""
    o = config.optimizer
    dtype = wrapped[0].config.params_dtype
    settings = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        clip_grad=o.clip_grad,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_eps=o.adam_eps,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        initial_loss_scale=o.initial_loss_scale,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    # The fp32 head has a group to itself: where one group holds two dtypes, the distributed
    # optimizer confuses their states when it saves them.
    of_head = ParamGroupOverride(wd_mult=1.0)
    if o.head_lr is not None:
        of_head.update(max_lr=o.head_lr, min_lr=o.min_lr * o.head_lr / o.lr)
    overrides = {
        **get_standard_config_overrides(settings),
        ParamKey(name="*reward_head.weight"): of_head,
    }
    optimizer = get_megatron_optimizer(
        settings,
        wrapped,
        config_overrides=overrides,
        use_gloo_process_groups=torch.cuda.is_available(),
    )
    for group in optimizer.param_groups:
        if (
            "foreach" in group
        ):  # torch's AdamW (no apex or Transformer Engine): one pass over memory instead of ten
            group["fused"], group["foreach"] = True, False
    wrapped[0].config.grad_scale_func = optimizer.scale_loss if dtype == torch.float16 else None
    # The schedule divides by both lengths.
    warmup = round(o.lr_warmup_fraction * total_steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=min(warmup, total_steps - 1),
        lr_decay_steps=total_steps + 1,
        lr_decay_style=o.lr_decay_style,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    # Warm-up starts from exactly 0 and decay ends at exactly the minimum: two wasted steps. Step k
    # of w uses lr k / w.
    scheduler.step(1)
    return optimizer, scheduler


REPORTED = (*ops.STATS, "num_terms")
"""What the last stage reports of a pack; num_terms: of what the loss is the mean over."""


def pair_loss(args: LossArgs, batch: PackedBatch, rewards: torch.Tensor):
    """Sum of the loss over a pack's pairs, their number, and ``REPORTED`` sums.

    ``--loss plackett_luce`` is a sum over choices, and their number is returned.

    ``--length-penalty`` A: the logit gains A (length of chosen - length of rejected), as if length
    alone won preferences, and the reward explains the rest (R-DPO, arXiv:2403.19159).
    ``--scale-by-rating``: scaled Bradley-Terry, -gap logsigmoid(d) over the number of pairs
    (HelpSteer2-Preference, arXiv:2410.01257), so that a pair of gap 2 counts as two pairs, its
    penalty included. Without ratings the margin is 0 and the weight 1.
    """
    gap = batch.rating_gap  # [m], NaN without ratings
    margin, weight = torch.zeros_like(gap), torch.ones_like(gap)
    if args.use_margin:
        margin = torch.where(gap.isnan(), margin, gap)
    if args.length_penalty:
        margin = margin - args.length_penalty * batch.length_gap
    if args.scale_by_rating:
        weight = torch.where(gap.isnan(), weight, gap)
    loss, stats = ops.pairwise_loss(
        rewards,
        batch.chosen,
        batch.rejected,
        margin,
        weight,
        loss=args.loss,
        penalty=args.penalty,
        penalty_weight=args.penalty_weight,
        label_smoothing=args.label_smoothing,
        barrier_clamp=args.barrier_clamp,
    )
    terms = batch.num_choices if args.loss == "plackett_luce" else len(batch.chosen)
    # torch.tensor would copy from the host and wait for it.
    count = torch.full((), terms, dtype=torch.int, device=rewards.device)
    return loss, count, torch.cat([stats, count[None].to(stats.dtype)])


def _forward_train(args: LossArgs, iterator: Iterator[PackedBatch], model):
    batch = next(iterator)
    return model(batch), partial(pair_loss, args, batch)


def _rewards_of(batch: PackedBatch, rewards: torch.Tensor, non_loss_data: bool = True):
    return batch.responses, rewards.detach()


def _forward_rewards(iterator: Iterator[PackedBatch], model):
    batch = next(iterator)
    return model(batch), partial(_rewards_of, batch)


def run_schedule(
    wrapped: Sequence, packs: list[PackedBatch], forward: Callable, *, forward_only: bool
) -> list[Any]:
    """Send the packs of a step through megatron-core's pipeline schedule; what the last stage
    reported per pack."""
    iterators = [iter(packs) for _ in wrapped]
    single = len(wrapped) == 1
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators[0] if single else iterators,
        model=wrapped[0] if single else list(wrapped),
        num_microbatches=len(packs),
        seq_length=max(pack.num_tokens for pack in packs),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


@dataclasses.dataclass
class StepReport:
    """What one step did, the same on every rank. Means are over the pairs of the global batch; the
    loss's is over ``num_terms``: pairs, or the choices of ``--loss plackett_luce``."""

    loss: float
    acc: float
    chosen_score_mean: float
    rejected_score_mean: float
    grad_norm: float | None
    updated: bool
    num_pairs: int
    num_terms: int
    num_samples: int
    num_tokens: int
    real_tokens: int
    num_microbatches: int
    padding: int
    wishes: list[float] = dataclasses.field(default_factory=list)
    """Sums over all ranks of the wishes to stop (``StopRequest.wishes``)."""


def forward_backward(
    wrapped: Sequence,
    packs: list[PackedBatch],
    args: LossArgs,
    wishes: Callable[[], list[float]] = list,
) -> tuple[dict[str, float], list[float]]:
    """Gradients of the loss summed over a global batch's pairs into the buffers (reduced over
    ranks); reported sums, and the sums over all ranks of what ``wishes`` answers after the pass.

    All of them come from the device in one synchronization.
    """
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    reports = run_schedule(wrapped, packs, partial(_forward_train, args), forward_only=False)
    device = packs[0].tokens.device
    names = (*REPORTED, "num_tokens", "real_tokens", "padding", "num_microbatches")
    own = [0.0] * len(names)
    first_rank = parallel_state.get_tensor_model_parallel_rank() == 0
    if first_rank and parallel_state.is_pipeline_first_stage():
        own[len(REPORTED) :] = (
            sum(p.num_tokens for p in packs),
            sum(p.real_tokens for p in packs),
            sum(p.padding for p in packs),
            len(packs),
        )
    # From pinned memory, because a copy from elsewhere waits for the device.
    sums = torch.tensor(
        [*own, *wishes()], dtype=torch.float64, pin_memory=device.type == "cuda"
    ).to(device, non_blocking=True)
    if first_rank and parallel_state.is_pipeline_last_stage():
        sums[: len(REPORTED)] = sum(report.detach().double() for report in reports)
    values = sum_over_ranks(sums).tolist()
    return dict(zip(names, values, strict=False)), values[len(names) :]


def optimizer_step(optimizer, count: float) -> tuple[bool, float | None]:
    """Divide the summed gradients by ``count``, clip and update; the parameters stay when the norm
    is not finite.

    What ``ChainedOptimizer.step`` does, with division and clipping as one factor, which torch's
    fused Adam applies while it reads the gradients. Returns (updated, norm of the mean gradient;
    None when fp16 overflowed).
    """
    if optimizer.prepare_grads():
        return False, None
    norm = grad_norm(optimizer) / count
    if not math.isfinite(norm):
        return False, norm
    clip = optimizer.config.clip_grad
    factor = (
        count * max(1.0, (norm + 1e-6) / clip) if clip > 0 else count
    )  # 1e-6 as in megatron-core's clipping
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False) or not part.get_parameters():
            continue
        if all(group.get("fused") for group in part.optimizer.param_groups):
            device = part.get_parameters()[0].device
            part.optimizer.grad_scale = torch.tensor(factor, dtype=torch.float32, device=device)
        else:
            for parameter in part.get_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0 / factor)
    return bool(optimizer.step_with_ready_grads()), norm


def train_step(
    wrapped: Sequence,
    optimizer,
    packs: list[PackedBatch],
    args: LossArgs,
    num_samples: int,
    wishes: Callable[[], list[float]] = list,
) -> StepReport:
    """One optimizer step on this rank's packs of a global batch of ``num_samples`` comparisons.
    ``wishes`` is asked after the backward pass; its answers are summed over ranks on the way."""
    optimizer.zero_grad()
    sums, wished = forward_backward(wrapped, packs, args, wishes)
    pairs, terms = max(sums["num_pairs"], 1.0), max(sums["num_terms"], 1.0)
    loss = (sums["base_loss"] + sums["penalty"]) / terms
    updated, norm = optimizer_step(optimizer, terms) if math.isfinite(loss) else (False, math.nan)
    return StepReport(
        loss=loss,
        acc=sums["num_correct"] / pairs,
        chosen_score_mean=sums["chosen_score"] / pairs,
        rejected_score_mean=sums["rejected_score"] / pairs,
        grad_norm=norm,
        updated=updated,
        num_pairs=int(sums["num_pairs"]),
        num_terms=int(sums["num_terms"]),
        num_samples=num_samples,
        num_tokens=int(sums["num_tokens"]),
        real_tokens=int(sums["real_tokens"]),
        num_microbatches=int(sums["num_microbatches"]),
        padding=int(sums["padding"]),
        wishes=wished,
    )


def _head_is_zero(wrapped: Sequence, device: torch.device) -> bool:
    """The same on every rank; only the last stage has the head."""
    names = (item for chunk in wrapped for item in chunk.named_parameters())
    heads = [head for name, head in names if name.endswith("reward_head.weight")]
    return not sum_over_ranks(torch.tensor(sum(bool(h.any()) for h in heads), device=device))


@torch.no_grad()
def compute_rewards(
    wrapped: Sequence,
    batcher: Batcher,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    batches: int | None = None,
) -> np.ndarray:
    """Rewards of every response of ``batcher.dataset``, in stored order, on every rank: float32
    [responses].

    With ``batches`` only that many global batches are scored, and the other rewards are 0. A head
    of zeros, that of a fresh model, gives 0 to every response: no forward is run."""
    if _head_is_zero(wrapped, device):
        if progress:
            progress(len(batcher.dataset))
        return np.zeros(batcher.num_responses, dtype=np.float32)
    modes = [chunk.training for chunk in wrapped]
    for chunk in wrapped:
        chunk.eval()
    out = torch.zeros(batcher.num_responses, dtype=torch.float32, device=device)
    try:
        for packs in itertools.islice(batcher.sweep(), batches):
            packs = [pack.to(device) for pack in packs]
            for numbers, rewards in run_schedule(
                wrapped, packs, _forward_rewards, forward_only=True
            ):
                if is_reporting_rank():
                    real = numbers >= 0
                    out[numbers[real]] = rewards[real]
            if progress:
                progress(
                    batcher.global_batch_size
                )  # on every rank after every batch; what it raises ends the sweep
    finally:
        for chunk, mode in zip(wrapped, modes, strict=True):
            chunk.train(mode)
    return sum_over_ranks(out).cpu().numpy()


def evaluate(
    wrapped: Sequence,
    batcher: Batcher,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    num_probed: int = 0,
) -> dict[str, Any]:
    """``rmega.evaluation.results.evaluate`` of a held-out set, with "reward_mean" and "reward_std"
    over all its responses; the same on every rank. ``num_probed`` comparisons are
    scored again in other forms. Where rewards are not finite, only {"not_finite": how many,
    "num_rewards": of how many}.
    """
    rewards = compute_rewards(wrapped, batcher, device, progress)
    if not_finite := int((~np.isfinite(rewards)).sum()):
        return {"not_finite": not_finite, "num_rewards": len(rewards)}
    items = results.stored_items(batcher.dataset, rewards)

    def score(view: View) -> np.ndarray:
        return compute_rewards(wrapped, batcher.over(view), device, progress)

    probes = (
        probe_stored(
            batcher.dataset,
            items,
            score,
            num_probed,
            max_tokens=batcher.max_tokens,
            share_prefix=batcher.share_prefix,
        )
        if num_probed
        else None
    )
    return {
        **results.evaluate(items, length_unit="tokens", probes=probes),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
    }


class Clock:
    """Time since it was made or last read, in seconds."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self._at, elapsed = now, now - self._at
        return elapsed
