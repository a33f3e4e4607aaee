"""Megatron-Core layer specs of a reward model, and the pruned last layer.

Shape letters: t tokens, n pooled tokens, h hidden, a query heads and g key/value groups of this
tensor rank, r = a / g, d head dimension, tp tensor-parallel size.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    linear_with_grad_accumulation_and_async_allreduce,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import linear_with_frozen_weight
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from rmega import ops
from rmega.data.packing import Segments
from rmega.models import varlen
from rmega.models.attention import (
    HeadNorms,
    packed_attention,
    pooled_attention,
    projection_attention,
)


@dataclasses.dataclass
class PackedRewardParams(PackedSeqParams):
    """What every layer knows of a pack; Megatron-Core hands it through to the core attention
    unchanged.

    cos, sin: [t, d/2]. pooled: [n] rows whose hidden state becomes a reward. token_keys: [t], for
    dropout.
    """

    segments: Segments | None = None
    pooled_segments: Segments | None = None
    pooled: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    token_keys: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.qkv_format = "thd"


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with fp32 statistics. Under sequence parallelism its gradient is summed
    over tensor ranks, unless it sees the same rows on all of them (``replicated``)."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        replicated: bool = False,
        **_: object,
    ) -> None:
        super().__init__()
        device = (
            "cpu"
            if config.use_cpu_initialization
            else torch.device("cuda", torch.cuda.current_device())
        )
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel and not replicated
        self.eps = eps
        self._prepared: tuple[torch.Tensor, torch.Tensor] | None = None  # (x, its norm)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The norm of x; with a ``residual`` see ``after_residual``, which comes this way because
        hooks before a forward may have to provide the weight."""
        if residual is not None:
            self._prepared = ops.add_rms_norm(x, residual, self.weight, self.eps)
            return self._prepared[0]
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] is x:
            return prepared[1]
        return ops.rms_norm(x, self.weight, self.eps)

    def after_residual(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + x, of which the norm is computed in the same pass over memory where one kernel
        does both, and kept for the ``forward`` that follows."""
        if not ops.fuses_add_rms_norm(x):
            return residual + x
        return self(x, residual)


class SwiGLU(MegatronModule):
    """silu(gate) * up for x = [gate, up] along the last axis."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.swiglu(x)


class PackedCoreAttention(torch.nn.Module):
    """Rotation and attention over a pack: query [t, a, d], key and value [t, g, d] -> [t, a * d];
    or query is the fused projection [t, (a + 2 g) d], and key and value are empty."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **_: object,
    ) -> None:
        super().__init__()
        self.scale = config.softmax_scale or config.kv_channels**-0.5
        self.head_dim = config.kv_channels
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.norms: Callable[[], HeadNorms | None] = lambda: None  # of PackedSelfAttention

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        *,
        packed_seq_params: PackedRewardParams,
        attn_mask_type=None,
        attention_bias=None,
    ):
        pack = packed_seq_params
        if query.dim() == 2:  # the fused projection, from PackedSelfAttention
            slots = query.shape[1] // self.head_dim  # a + 2 g
            groups = slots // (self.heads_per_group + 2)
            heads = slots - 2 * groups
            return projection_attention(
                query, pack.cos, pack.sin, heads, groups, pack.segments, self.scale, self.norms()
            )
        query, key = ops.rope(query, pack.cos, pack.sin), ops.rope(key, pack.cos, pack.sin)
        return packed_attention(query, key, value, pack.segments, self.scale)


class PackedSelfAttention(SelfAttention):
    """Megatron-Core's. Where one kernel does split, norms of heads, rotation and gather, the core
    attention gets the fused projection as it is, in place of the query."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.reads_inner_weights = self.config.qk_layernorm  # those of the norms
        self.core_attention.norms = self.norms

    def norms(self) -> HeadNorms | None:
        """The norms of queries and keys, in models that have them."""
        if not self.config.qk_layernorm:
            return None
        q, k = self.q_layernorm, self.k_layernorm
        return HeadNorms(q.weight, k.weight, q.eps)

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, **options):
        x, d = hidden_states, self.hidden_size_per_attention_head
        if not varlen.fuses_projection(x.device, x.dtype, d, self.config.qk_layernorm):
            return super().get_query_key_value_tensors(x, key_value_states, **options)
        mixed, _ = self.linear_qkv(x)  # [t, 1, (a + 2 g) d]
        nothing = mixed.new_empty(0, 1)
        return mixed, nothing, nothing


class DecoderLayer(TransformerLayer):
    """Megatron-Core's, whose residual additions prepare the norm that follows."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn_bda = _addition_before(self.pre_mlp_layernorm)


def _addition_before(norm: RMSNorm):
    """In place of Megatron-Core's ``get_bias_dropout_add``: there is no bias and no dropout."""

    def add(x_with_bias, residual, prob):
        return norm.after_residual(x_with_bias[0], residual)

    return lambda training, fused: add


def link_norms(block: torch.nn.Module, config: TransformerConfig) -> None:
    """Let the last addition of each layer prepare the first norm of the next one, or the final
    norm. Not where whole layers are recomputed, which see copies of their inputs."""
    if config.recompute_granularity == "full":
        return
    norms = [layer.input_layernorm for layer in block.layers]
    final = getattr(block, "final_layernorm", None)
    for layer, norm in zip(block.layers, [*norms[1:], final], strict=False):
        if isinstance(norm, RMSNorm):
            layer.mlp_bda = _addition_before(norm)


class PooledLastLayer(DecoderLayer):
    """A decoder layer whose output is only the pooled rows: hidden [t(/tp), 1, h] -> [n, 1, h], the
    same on all ranks.

    Keys and values are computed for every token; query, attention, projection and MLP for pooled
    tokens only, which is all that a reward reads. Under sequence parallelism the pooled rows of the
    residual stream are exchanged, never the whole sequence, and what follows runs on replicated
    rows, hence with ``sequence_parallel`` off inside.
    """

    reads_inner_weights = True  # slices of linear_qkv's, and of its adapter's

    def __init__(self, config: TransformerConfig, *args, **kwargs) -> None:
        inner = copy.copy(config)
        inner.sequence_parallel = False
        super().__init__(inner, *args, **kwargs)
        self.shards_sequence = config.sequence_parallel
        self.input_layernorm.weight.sequence_parallel = config.sequence_parallel

    def forward(
        self, hidden_states: torch.Tensor, *, packed_seq_params: PackedRewardParams, **_: object
    ):
        pack, attention = packed_seq_params, self.self_attention
        x = self.input_layernorm(hidden_states)  # [t(/tp), 1, h]
        lora = getattr(attention, "lora_qkv", None)
        if lora is not None:
            x, u = lora.down(x)
            u = u.squeeze(1)  # [t, 3 rank]
        # Every tensor rank reads all tokens; backward sums what the ranks' heads want of them.
        if self.shards_sequence:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
        elif lora is None:  # an adapter has done it
            x = copy_to_tensor_model_parallel_region(x)
        x = x.squeeze(1)  # [t, h]
        g = attention.num_query_groups_per_partition
        r = attention.num_attention_heads_per_partition // g
        d = attention.hidden_size_per_attention_head

        # Rows of the fused projection: for each group its r query heads, its key, its value.
        linear = attention.linear_qkv
        weight = linear.weight.view(g, r + 2, d, -1)
        bias = None if linear.bias is None else linear.bias.view(g, r + 2, d)
        query = _linear(  # [n, g r d]
            ops.gather_last_token(x, pack.pooled),
            weight[:, :r].reshape(g * r * d, -1),
            None if bias is None else bias[:, :r].reshape(-1),
        )
        key_value = _linear(  # [t, 2 g d]
            x,
            weight[:, r:].transpose(0, 1).reshape(2 * g * d, -1),
            None if bias is None else bias[:, r:].transpose(0, 1).reshape(-1),
        )
        cos, sin, scale = pack.cos, pack.sin, attention.core_attention.scale
        if lora is not None:
            of_query, of_key_value = u.tensor_split([lora.rank], dim=1)  # [t, rank], [t, 2 rank]
            query = lora.up(query, ops.gather_last_token(of_query, pack.pooled), slice(0, 1))
            key_value = lora.up(key_value, of_key_value, slice(1, 3))
        query, norms = query.view(-1, g * r, d), attention.norms()
        if norms is not None:
            query = ops.rms_norm(query, norms.q_weight, norms.eps)
        query = ops.rope(query, cos[pack.pooled], sin[pack.pooled])
        segments = pack.pooled_segments
        out = pooled_attention(query, key_value, cos, sin, segments, scale, norms)  # [n, g r d]
        out, _ = attention.linear_proj(out[:, None])
        pooled = pool_rows(hidden_states, pack.pooled, self.shards_sequence)  # [n, 1, h]
        return self._forward_mlp(self.pre_mlp_layernorm.after_residual(out, pooled)), None


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [t, k] times weight [n, k] transposed plus bias [n], by the function behind Megatron-Core's
    linear layers, so that in half precision on a CPU it is computed as theirs are
    (``fusion.py``)."""
    run = linear_with_grad_accumulation_and_async_allreduce
    if not weight.requires_grad:
        run = partial(linear_with_frozen_weight, tp_group=None)
    return run(
        x,
        weight,
        bias,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
    )


def pool_rows(hidden: torch.Tensor, pooled: torch.Tensor, shards_sequence: bool) -> torch.Tensor:
    """Rows ``pooled`` [n] of the whole sequence -> [n, 1, h] on every tensor rank.

    ``hidden`` is [t, 1, h], or this rank's shard [t/tp, 1, h] under sequence parallelism; then each
    rank puts in the rows that it holds and their sum is taken, whose backward hands each rank the
    gradient of its own rows.
    """
    hidden = hidden.squeeze(1)
    if not shards_sequence:
        return ops.gather_last_token(hidden, pooled)[:, None]
    from megatron.core.parallel_state import get_tensor_model_parallel_rank

    local = pooled - get_tensor_model_parallel_rank() * hidden.shape[0]  # [n], in this shard
    mine = (local >= 0) & (local < hidden.shape[0])
    rows = ops.gather_last_token(hidden, local.clamp(0, hidden.shape[0] - 1)) * mine[:, None].to(
        hidden.dtype
    )
    return reduce_from_tensor_model_parallel_region(rows)[:, None]


def layer_spec(
    module: type = DecoderLayer, *, qk_norm: bool = False, transformer_engine: bool = False
) -> ModuleSpec:
    """One decoder layer. ``qk_norm`` normalizes queries and keys over the head dimension.
    ``transformer_engine`` takes its linear layers from Transformer Engine, the rest is ours."""
    column, row = ColumnParallelLinear, RowParallelLinear
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        column, row = TEColumnParallelLinear, TERowParallelLinear
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=PackedCoreAttention,
                    linear_proj=row,
                    # By these names Megatron-Core sums their gradients over tensor ranks, which
                    # see different heads.
                    q_layernorm=RMSNorm if qk_norm else IdentityOp,
                    k_layernorm=RMSNorm if qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=SwiGLU),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    config: TransformerConfig,
    *,
    post_process: bool,
    prune_last_layer: bool,
    vp_stage: int | None = None,
    transformer_engine: bool = False,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage; on the last stage the last of them is pruned unless
    switched off."""
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    qk_norm = config.qk_layernorm
    layers = [layer_spec(qk_norm=qk_norm, transformer_engine=transformer_engine)] * count
    prune = post_process and prune_last_layer
    if prune:
        # The pruned layer slices the fused query-key-value weight, which is a plain linear layer in
        # either case.
        layers = [*layers[:-1], layer_spec(PooledLastLayer, qk_norm=qk_norm)]
    return TransformerBlockSubmodules(
        layer_specs=layers, layer_norm=ModuleSpec(module=RMSNorm, params={"replicated": prune})
    )
