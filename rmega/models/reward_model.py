"""The reward model of one pipeline stage: embedding, decoder layers, reward head.

Shape letters: t tokens of a pack, n responses in it, h hidden, tp tensor-parallel size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from rmega.config import ParallelArgs
from rmega.data.packing import PackedBatch
from rmega.models.geometry import Geometry
from rmega.models.layer_specs import block_spec
from rmega.models.layers import PackedRewardParams, link_norms
from rmega.models.pooled_layer import pool_rows
from rmega.models.rotary import inverse_frequencies, rotary_tables


def padded_groups(geometry: Geometry, tp: int) -> int:
    """Key/value groups when they are padded with zero groups to a multiple of ``tp``."""
    return -(-geometry.num_query_groups // tp) * tp


def _check_divides(geometry: Geometry, parallel: ParallelArgs) -> None:
    """Raise ValueError, naming the flag, where tensor parallelism does not divide the backbone."""
    tp = parallel.tensor_model_parallel_size
    if geometry.num_query_groups % tp and not parallel.pad_attention_heads:
        added = padded_groups(geometry, tp) - geometry.num_query_groups
        raise ValueError(
            f"--tp {tp} does not divide the model's {geometry.num_query_groups} key/value heads "
            f"({geometry.num_attention_heads} query heads); --pad-attention-heads adds "
            f"{added} group{'s' * (added != 1)} of zero heads, which is exact"
        )
    if geometry.ffn_hidden_size % tp:
        raise ValueError(
            f"--tp {tp} does not divide the model's MLP width {geometry.ffn_hidden_size}"
        )
    if geometry.hidden_size % tp:
        raise ValueError(
            f"--tp {tp} does not divide the model's hidden size {geometry.hidden_size}"
        )


def transformer_config(
    geometry: Geometry,
    parallel: ParallelArgs | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
    on_cpu: bool = True,
    fp8_format: str = "none",
    fp8_recipe: str = "tensorwise",
    prune_last_layer: bool = True,
    same_length: bool = False,
) -> TransformerConfig:
    """Megatron-Core's configuration of a backbone in a layout (None: one rank). Raises ValueError
    where they do not fit. ``same_length``: the packs of a step are as long as each other."""
    p = parallel or ParallelArgs()
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    vpp = p.virtual_pipeline_model_parallel_size
    _check_divides(geometry, p)
    groups = padded_groups(geometry, tp)
    heads = groups * (geometry.num_attention_heads // geometry.num_query_groups)
    pipeline = {}
    if pp > 1:
        # With two stages, previous and next rank are the same process and batched sends of an
        # interleaved schedule cross: gradients would be silently wrong.
        pipeline = dict(
            overlap_p2p_comm=bool(vpp),
            batch_p2p_comm=not vpp,
            pipeline_dtype=dtype,
            num_layers_in_first_pipeline_stage=p.num_layers_in_first_pipeline_stage,
            num_layers_in_last_pipeline_stage=p.num_layers_in_last_pipeline_stage,
        )
        _check_stages(geometry, p)
    return TransformerConfig(
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        ffn_hidden_size=geometry.ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=geometry.head_dim,
        layernorm_epsilon=geometry.norm_eps,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        use_te_activation_func=True,  # takes the activation from the layer's specification
        add_bias_linear=False,
        add_qkv_bias=geometry.qkv_bias,
        qk_layernorm=geometry.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=p.sequence_parallel and tp > 1,
        variable_seq_lengths=not same_length,
        # asked for with variable lengths, in dense models too
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,  # must be set before the data-parallel wrapper is built
        gradient_accumulation_fusion=False,
        deterministic_mode=deterministic or on_cpu,
        recompute_granularity=None if p.recompute == "none" else p.recompute,
        recompute_method="uniform" if p.recompute == "full" else None,
        recompute_num_layers=1 if p.recompute == "full" else None,
        fp8=None if fp8_format == "none" else fp8_format,
        fp8_recipe=fp8_recipe,
        # The rows of a pruned layer are as many as there are responses: no multiple of anything.
        first_last_layers_bf16=fp8_format != "none",
        num_layers_at_start_in_bf16=0,
        num_layers_at_end_in_bf16=int(prune_last_layer),
        **pipeline,
    )


def _check_stages(geometry: Geometry, parallel: ParallelArgs) -> None:
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    layers, stages = geometry.num_layers, pp
    for given in (first, last):
        if given is not None:
            layers, stages = layers - given, stages - 1
    chunks = vpp or 1
    if stages and (layers <= 0 or layers % (stages * chunks)):
        raise ValueError(
            f"--pp {pp}{f' --vpp {vpp}' if vpp else ''} does not divide the model's"
            f" {geometry.num_layers}"
            f" layers{' that are left for the middle stages' if (first or last) else ''}: {layers}"
            f" layers over {stages} stages{f' of {chunks} chunks' if vpp else ''}"
            " (--num-layers-in-first-pipeline-stage and --num-layers-in-last-pipeline-stage make"
            " stages uneven)"
        )


class RewardModel(MegatronModule):
    """What one pipeline stage (or one virtual chunk of it) holds.

    Composed of Megatron-Core's embedding and block; not a ``GPTModel``, which would carry a
    language-model head into checkpoints and stages. ``forward`` takes a ``PackedBatch`` and returns
    rewards [n] in fp32 on the last stage, hidden states elsewhere.
    """

    def __init__(
        self,
        config: TransformerConfig,
        geometry: Geometry,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        prune_last_layer: bool = True,
        transformer_engine: bool = False,
        tie_threshold: bool = False,
    ) -> None:
        """``tie_threshold``: the last stage has the threshold of ``--loss rao_kupper``."""
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # asked for by the schedules
        self.geometry = geometry
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.prune_last_layer = prune_last_layer
        self.share_embeddings_and_output_weights = False  # there is no output embedding to share
        # A buffer: moved to the device once, not copied there by every forward pass.
        self.register_buffer("speeds", inverse_frequencies(geometry), persistent=False)
        if pre_process:
            tp = config.tensor_model_parallel_size
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=-(-geometry.vocab_size // tp) * tp,
                max_sequence_length=geometry.max_position_embeddings,
                position_embedding_type="rope",
            )
        self.decoder = TransformerBlock(
            config,
            block_spec(
                config,
                post_process=post_process,
                prune_last_layer=prune_last_layer,
                vp_stage=vp_stage,
                transformer_engine=transformer_engine,
            ),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        link_norms(self.decoder, config)
        if post_process:
            self.reward_head = torch.nn.Linear(
                config.hidden_size, 1, bias=False, dtype=torch.float32
            )
            torch.nn.init.zeros_(self.reward_head.weight)
        self.tie_threshold = None
        if post_process and tie_threshold:
            # softplus(0) = ln 2: equal rewards win, lose and tie with probability 1/3 each.
            self.tie_threshold = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32))
        _mark_shards(self)

    def set_input_tensor(self, input_tensor: list[torch.Tensor]) -> None:
        """Called by the pipeline schedule with what the previous stage sent."""
        self.decoder.set_input_tensor(
            input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ):
        """Megatron-Core's; weights of padded heads may be longer or shorter in a checkpoint of
        another layout."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, value in state.items():
            if name.endswith(("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight")):
                value.allow_shape_mismatch = True
        return state

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """[n] fp32 rewards on the last stage, else hidden states [t(/tp), 1, h]."""
        cos, sin = rotary_tables(batch.position_ids, self.speeds, self.config.params_dtype)
        pack = PackedRewardParams(
            segments=batch.segments,
            pooled_segments=batch.pooled_segments,
            pooled=batch.pooled,
            cos=cos,
            sin=sin,
            token_keys=batch.token_keys,
        )
        hidden = self.embedding(batch.tokens, batch.position_ids) if self.pre_process else None
        if hidden is not None and self.config.recompute_granularity == "full":
            # A recomputed layer has gradients only where its input wants one, and the output of a
            # frozen embedding does not.
            hidden.requires_grad_(torch.is_grad_enabled())
        # [t(/tp), 1, h], on the last stage [n, 1, h] where its last layer is pruned
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=pack)
        if not self.post_process:
            return hidden
        if not self.prune_last_layer:
            hidden = pool_rows(hidden, batch.pooled, self.config.sequence_parallel)
        # Head and loss are fp32 in every precision: a bf16 reward of 4.03 and one of 4.04 are the
        # same number.
        return self.reward_head(hidden.squeeze(1).float()).squeeze(1)


def _mark_shards(model: torch.nn.Module) -> None:
    """Record on each weight how tensor parallelism cuts it.

    Megatron-Core before 0.18 does this while it initializes weights, which is skipped here because
    they are read from a folder; unmarked, they would count on tensor rank 0 only and the gradient
    norm would be too small. Biases are marked in every version.
    """
    for module in model.modules():
        if hasattr(getattr(module, "weight", None), "tensor_model_parallel"):
            continue  # from 0.18 on Megatron-Core marks them itself
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            set_tensor_model_parallel_attributes(
                module.weight, True, 0, getattr(module, "stride", 1) or 1
            )
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)
