"""LoRA: low-rank adapters beside the linear layers of a frozen backbone (Hu et al. 2021).

A linear layer y = W x becomes y = W x + s B A x with A [r, in], B [out, r] and s = alpha / r, or
alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023). Query, key and value have an A and a B each, and
so have gate and up projection.

On tensor ranks B is cut as the weight is in columns (qkv, fc1), and A in rows (proj, fc2). What an
adapter adds to an output or to an input's gradient joins the sum over ranks that the linear layer
needs anyway; the other one of A and B has a partial gradient on each rank, which is summed once per
step. Columns under sequence parallelism would have to keep the whole sequence for that: there A is
applied to this rank's tokens, and x A^T, r wide, is gathered.

Dropout of an adapter's input multiplies each element by 0 or 1 / (1 - p), by the token's key and
the channel (``rmega.data.token_keys``). Query, key and value share a mask, and so do gate and up
projection; peft draws one for each.

Shape letters: t tokens, h hidden, r rank, n parts (3 for qkv, 2 for fc1, else 1), g key/value
groups of this tensor rank, tp tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from rmega.config import LORA_TARGETS, LoraArgs
from rmega.data.token_keys import chain, keys
from rmega.models import low_rank
from rmega.models.pooled_layer import PooledLastLayer

PLACES = {"qkv": "self_attention", "proj": "self_attention", "fc1": "mlp", "fc2": "mlp"}
"""Target -> the module of a layer that holds its linear layer, ``linear_TARGET``."""
COLUMN = ("qkv", "fc1")


class Adapter(MegatronModule):
    """The A and B of one linear layer on this tensor rank, added to its output by its hooks.

    ``a`` [n r, in] holds the A of all parts, ``b0``, ``b1``, ... [rows of a part, r] the B of each.
    """

    def __init__(
        self,
        config: TransformerConfig,
        linear: torch.nn.Module,
        *,
        args: LoraArgs,
        target: str,
        layer_number: int,
        rows: Sequence[int],
        groups: int,
        sequence_parallel: bool,
    ) -> None:
        super().__init__(config)
        self.rank, self.scale, self.dropout = args.lora_rank, args.scale, args.lora_dropout
        self.groups, self.count = groups, len(rows)
        self.token_keys: torch.Tensor | None = None  # [t] of the pack, given by its layer
        self.column = target in COLUMN
        self.sequence_parallel = sequence_parallel
        self.gathers = self.column and sequence_parallel
        linear.explicit_expert_comm = not self.gathers  # leaves all exchange to its caller
        weight = linear.weight

        def zeros(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))

        self.a = zeros(len(rows) * self.rank, weight.shape[1])
        for i, size in enumerate(rows):
            setattr(self, f"b{i}", zeros(size, self.rank))
        self.cut = {f"b{i}": 0 for i in range(len(rows))} if self.column else {"a": 1}
        for name, parameter in self.named_parameters():
            if name in self.cut:
                set_tensor_model_parallel_attributes(parameter, True, self.cut[name], 1)
            else:  # as Megatron-Core marks a partial gradient
                parameter.sequence_parallel = True
        self.hooks = (
            linear.register_forward_pre_hook(self._before),
            linear.register_forward_hook(self._after),
        )
        self._u: torch.Tensor | None = None  # from the one hook to the other
        if self.dropout:
            count = weight.shape[1]  # input channels here
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            first = 0 if self.column else tp_rank * count
            channels = keys(chain(layer_number, LORA_TARGETS.index(target)), first, count)
            self.channel_keys = torch.from_numpy(channels).to(weight.device)  # [in(/tp)]

    @property
    def parts(self) -> list[torch.nn.Parameter]:
        """The B of each part."""
        return [getattr(self, f"b{i}") for i in range(self.count)]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, s x A^T of all parts): [t(/tp), 1, in(/tp)] -> the same for the linear layer to read,
        and [t(/tp), 1, n r], the t that ``up`` finds in the linear layer's output."""
        fused = self.config.gradient_accumulation_fusion
        if self.column and not self.gathers:
            x = copy_to_tensor_model_parallel_region(x)
        if self.training and self.dropout:
            _, u = low_rank.down(self._dropped(x), self.a, self.scale, fused=fused)
        else:
            x, u = low_rank.down(x, self.a, self.scale, fused=fused)
        if self.gathers:
            u = gather_from_sequence_parallel_region(u, tensor_parallel_output_grad=True)
        return x, u

    def up(
        self, out: torch.Tensor, u: torch.Tensor, parts: slice = slice(None), groups: int = 1
    ) -> torch.Tensor:
        """``out`` [..., rows of the parts] with B u of some parts added in place; ``u``: their
        columns of what ``forward`` returned, [..., parts r]. ``groups``: how the output interleaves
        the parts."""
        fused = self.config.gradient_accumulation_fusion
        return low_rank.up(out, u, self.parts[parts], groups, fused=fused)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x [t(/tp), 1, in(/tp)] with each element multiplied by 0 or 1 / (1 - p)."""
        token_keys = self.token_keys
        if token_keys is None:
            raise ValueError(
                "--lora-dropout: the pack has no token_keys (Batcher.packs makes them)"
            )
        if self.gathers:
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            token_keys = token_keys.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        zeroed = drop_mask(token_keys, self.channel_keys, self.dropout)[:, None]
        return x.masked_fill(zeroed, 0.0) * (1 / (1 - self.dropout))

    def _before(self, linear: torch.nn.Module, args: tuple) -> tuple:
        x, self._u = self(args[0])
        return (x, *args[1:])

    def _after(self, linear: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        (out, bias), u, self._u = output, self._u, None  # [t(/tp), 1, out(/tp)]
        out = self.up(out, u, groups=self.groups)
        if not self.column and self.sequence_parallel:
            out = reduce_scatter_to_sequence_parallel_region(out)
        elif not self.column:
            out = reduce_from_tensor_model_parallel_region(out)
        return out, bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        """As Megatron-Core's linear layers make theirs. What belongs to padded heads may be longer
        or shorter in a checkpoint of another layout."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.cut,
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in self.cut:
            state[prefix + name].allow_shape_mismatch = "self_attention" in prefix
        return state


def drop_mask(token_keys: torch.Tensor, channel_keys: torch.Tensor, p: float) -> torch.Tensor:
    """bool [t, k], true with probability ``p``, from int32 [t] and [k]."""
    x = token_keys[:, None] ^ channel_keys  # hashed by lowbias32 (Wellons 2018), with wraparound
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    x = x ^ (x >> 16 & 0xFFFF)  # uniform over int32
    return x < min(round(p * 2**32), 2**32 - 1) - 2**31


def _give_keys(layer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a layer, run again by recomputation: hands the pack's token keys to the
    layer's adapters."""
    pack = kwargs["packed_seq_params"]
    behind_qkv = pack.token_keys
    if behind_qkv is not None and isinstance(layer, PooledLastLayer):
        behind_qkv = behind_qkv[pack.pooled]  # which sees pooled rows only
    for target, place in PLACES.items():
        if (adapter := getattr(getattr(layer, place), f"lora_{target}", None)) is not None:
            adapter.token_keys = pack.token_keys if target == "qkv" else behind_qkv


def attach(model: torch.nn.Module, args: LoraArgs) -> None:
    """Freeze a stage of the model except its reward head, and add adapters (all zeros) to its
    layers. Call it before the data-parallel wrapper and the optimizer are built, which then
    allocate no buffers for frozen weights."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("reward_head.", "tie_threshold")))
    for layer in model.decoder.layers:
        if args.lora_dropout:
            layer.register_forward_pre_hook(_give_keys, with_kwargs=True)
        for target in args.targets:
            holder = getattr(layer, PLACES[target])
            linear = getattr(holder, f"linear_{target}")
            groups, rows = 1, [linear.weight.shape[0]]
            if target == "qkv":
                groups, d = holder.num_query_groups_per_partition, holder.config.kv_channels
                rows = [holder.num_attention_heads_per_partition * d, groups * d, groups * d]
            elif target == "fc1":
                rows = [rows[0] // 2] * 2
            sequence_parallel = holder.config.sequence_parallel
            if isinstance(layer, PooledLastLayer) and target == "qkv":
                sequence_parallel = layer.shards_sequence  # the rest of it sees whole rows
            adapter = Adapter(
                holder.config,
                linear,
                args=args,
                target=target,
                layer_number=layer.layer_number,
                rows=rows,
                groups=groups,
                sequence_parallel=sequence_parallel,
            )
            setattr(holder, f"lora_{target}", adapter)


def sum_partial_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Sum partial gradients over tensor ranks. Under sequence parallelism Megatron-Core does it."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or chunks[0].config.sequence_parallel:
        return
    partial = [
        parameter.main_grad
        for chunk in chunks
        for parameter in chunk.parameters()
        if parameter.requires_grad and getattr(parameter, "sequence_parallel", False)
    ]
    if partial:
        total = torch.cat([grad.flatten() for grad in partial])
        torch.distributed.all_reduce(total, group=group)
        for grad, summed in zip(partial, total.split([g.numel() for g in partial]), strict=True):
            grad.copy_(summed.view_as(grad))


def delta(
    a: torch.Tensor, parts: Sequence[torch.Tensor], *, groups: int, scale: float
) -> torch.Tensor:
    """s B A in the rows of the fused weight, fp32 [rows, in]."""
    each = [b.float() @ one.float() for b, one in zip(parts, a.chunk(len(parts)), strict=True)]
    return low_rank.interleave(each, groups) * scale


@torch.no_grad()
def merge(model: torch.nn.Module) -> None:
    """Add the adapters to the weights and remove them: a plain model with the same rewards."""
    for module in list(model.modules()):
        for target in PLACES:
            if (adapter := getattr(module, f"lora_{target}", None)) is None:
                continue
            linear = getattr(module, f"linear_{target}")
            change = delta(adapter.a, adapter.parts, groups=adapter.groups, scale=adapter.scale)
            linear.weight.copy_(linear.weight.float() + change)
            for hook in adapter.hooks:
                hook.remove()
            linear.explicit_expert_comm = False
            delattr(module, f"lora_{target}")
