"""The modules of a decoder layer that are not Megatron-Core's: norms, activation, packed attention.

Shape letters: t tokens, n pooled tokens, h hidden, a query heads and g key/value groups of this
tensor rank, d head dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from rmega import ops
from rmega.data.packing import Segments
from rmega.models import varlen
from rmega.models.attention import HeadNorms, packed_attention, projection_attention


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
