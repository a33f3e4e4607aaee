"""The pruned last layer: keys and values of every token, the rest for pooled tokens only.

Shape letters: t tokens, n pooled tokens, h hidden, a query heads and g key/value groups of this
tensor rank, r = a / g, d head dimension, tp tensor-parallel size.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    linear_with_grad_accumulation_and_async_allreduce,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import linear_with_frozen_weight
from megatron.core.transformer.transformer_config import TransformerConfig

from rmega import ops
from rmega.models.attention import pooled_attention
from rmega.models.layers import DecoderLayer, PackedRewardParams


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
            x, u = lora(x)
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
    local = pooled - get_tensor_model_parallel_rank() * hidden.shape[0]  # [n], in this shard
    mine = (local >= 0) & (local < hidden.shape[0])
    rows = ops.gather_last_token(hidden, local.clamp(0, hidden.shape[0] - 1)) * mine[:, None].to(
        hidden.dtype
    )
    return reduce_from_tensor_model_parallel_region(rows)[:, None]
