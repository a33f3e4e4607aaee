"""The parts of a run for its flags: model, batcher, optimizer and schedule from Megatron-Core."""

from __future__ import annotations

from importlib.util import find_spec

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
from megatron.core.utils import get_te_version

from rmega import ops
from rmega.config import TrainingConfig
from rmega.data.batching import Batcher
from rmega.megatron import param_gather
from rmega.megatron.fusion import fuse_weight_gradients, skip_single_rank_collectives
from rmega.models import lora
from rmega.models.attention import active_kernel
from rmega.models.geometry import Geometry
from rmega.models.hf import TIE_THRESHOLD
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
            tie_threshold=config.loss.loss == "rao_kupper",
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
    """Megatron-Core's configuration for these flags; ValueError where backbone and layout do not
    fit."""
    return transformer_config(
        geometry,
        config.parallel,
        dtype=dtype,
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
        linear = f"transformer_engine {get_te_version()}"
        if fp8 != "none":
            linear += f" in fp8 ({fp8}, {config.model.fp8_recipe})"
    if (kind := ops.active_matmul(device, dtype)) != "torch":
        linear += f" with {kind} matmuls"
    # Without fusion a half-precision gradient is rounded before it is added: slower, less exact.
    added = "fused" if core.gradient_accumulation_fusion else f"in {dtype_name(dtype)}, then added"
    fused = ", fused" if any(group.get("fused") for group in optimizer.param_groups) else ""
    # Megatron-Core warns of each at every import (silenced by distributed.quiet_megatron): once is
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
    """Give each chunk Megatron-Core's gradient buffers and data-parallel reduction."""
    p = config.parallel
    overlap, gather_late = p.overlap_grad_reduce, p.overlap_param_gather
    on_gpu = next(chunks[0].parameters()).is_cuda
    if overlap is None:  # on a CPU a reduction takes the cores that compute
        overlap = on_gpu and parallel_state.get_data_parallel_world_size() > 1
        overlap |= bool(gather_late)  # which needs its buckets
    if gather_late is None:
        gather_late = on_gpu and overlap and p.use_distributed_optimizer
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=gather_late,
        use_distributed_optimizer=p.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    core = chunks[0].config
    core.finalize_model_grads_func = _finalize
    skip_single_rank_collectives(wrapped)
    if gather_late:
        param_gather.hold_readers(wrapped)
    if overlap:
        hooks = [chunk.no_sync for chunk in wrapped]
        core.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return wrapped


def _finalize(model, num_tokens=None, **groups) -> None:
    """Megatron-Core's reduction of gradients without its division by the count of pairs: the
    optimizer divides by the count and the clipping factor at once, instead of two more passes
    over all gradients."""
    finalize_model_grads(model, None, **groups)
    lora.sum_partial_gradients(model)


def build_optimizer(
    wrapped: list[DistributedDataParallel], config: TrainingConfig, total_steps: int
):
    """Megatron-Core's Adam and its schedule: (optimizer, scheduler)."""
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
    # So does the threshold, which has the head's learning rate and no weight decay.
    lr = o.lr if o.head_lr is None else o.head_lr
    of_threshold = ParamGroupOverride(wd_mult=0.0, max_lr=lr, min_lr=o.min_lr * lr / o.lr)
    overrides = {
        **get_standard_config_overrides(settings),
        ParamKey(name="*reward_head.weight"): of_head,
    }
    if config.loss.loss == "rao_kupper":
        overrides[ParamKey(name=f"*{TIE_THRESHOLD}")] = of_threshold
    optimizer = get_megatron_optimizer(
        settings,
        wrapped,
        config_overrides=overrides,
        use_gloo_process_groups=torch.cuda.is_available(),
    )
    for group in optimizer.param_groups:
        if "foreach" in group:  # torch's AdamW: one pass over memory instead of ten
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
