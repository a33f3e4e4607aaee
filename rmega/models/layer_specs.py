"""Megatron-Core's specification of the layers of a pipeline stage."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from rmega.models.layers import (
    DecoderLayer,
    PackedCoreAttention,
    PackedSelfAttention,
    RMSNorm,
    SwiGLU,
)
from rmega.models.pooled_layer import PooledLastLayer


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
