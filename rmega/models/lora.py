"""LoRA: low-rank adapters beside the linear layers of a frozen backbone (Hu et al. 2021).

A linear layer y = W x becomes y = W x + s B A x with A [r, in], B [out, r] and s = alpha / r, or
alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023). A starts uniform in +-1 / sqrt(in), B at zero, as
peft has it. Query, key and value have an A and a B each, and so have gate and up projection.

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

import dataclasses
import zlib
from collections.abc import Iterator, Sequence

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
from rmega.models import BACKBONES, low_rank
from rmega.models.geometry import Geometry
from rmega.models.hf import REWARD_HEAD, global_parameters
from rmega.models.layers import PooledLastLayer
from rmega.models.peft_folder import PeftFolder
from rmega.models.weights import Part, WeightRule, whole

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
        target: str,
        rank: int,
        scale: float,
        dropout: float,
        layer_number: int,
        rows: Sequence[int],
        groups: int,
        sequence_parallel: bool,
    ) -> None:
        super().__init__(config)
        self.rank, self.scale, self.groups, self.count = rank, scale, groups, len(rows)
        self.dropout, self.token_keys = dropout, None  # keys [t] of the pack, given by its layer
        self.column = target in COLUMN
        self.sequence_parallel = sequence_parallel
        self.gathers = self.column and sequence_parallel
        linear.explicit_expert_comm = not self.gathers  # leaves all exchange to its caller
        weight = linear.weight

        def zeros(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))

        self.a = zeros(len(rows) * rank, weight.shape[1])
        for i, size in enumerate(rows):
            setattr(self, f"b{i}", zeros(size, rank))
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
        if dropout:
            count = weight.shape[1]  # input channels here
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            first = 0 if self.column else tp_rank * count
            channels = keys(chain(layer_number, LORA_TARGETS.index(target)), first, count)
            self.channel_keys = torch.from_numpy(channels).to(weight.device)  # [in(/tp)]

    @property
    def parts(self) -> list[torch.nn.Parameter]:
        """The B of each part."""
        return [getattr(self, f"b{i}") for i in range(self.count)]

    def down(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
        """``out`` [..., rows of the parts] with B u of some parts added in place: their columns of
        ``down``'s, [..., parts r]. ``groups``: how the output interleaves the parts."""
        fused = self.config.gradient_accumulation_fusion
        return low_rank.up(out, u, self.parts[parts], groups, fused=fused)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``down``. Hooks before a forward may have to provide the weights, of ``up`` as well."""
        return self.down(x)

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
    """Before each forward of a layer, which recomputation repeats: its pack's keys, for its
    adapters."""
    pack = kwargs["packed_seq_params"]
    behind_qkv = pack.token_keys
    if behind_qkv is not None and isinstance(layer, PooledLastLayer):
        behind_qkv = behind_qkv[pack.pooled]  # which sees pooled rows only
    for target, place in PLACES.items():
        if (adapter := getattr(getattr(layer, place), f"lora_{target}", None)) is not None:
            adapter.token_keys = pack.token_keys if target == "qkv" else behind_qkv


def adapters(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Adapter]]:
    """(linear layer, its adapter) of every adapted layer of a model."""
    for module in model.modules():
        for target in PLACES:
            if isinstance(adapter := getattr(module, f"lora_{target}", None), Adapter):
                yield getattr(module, f"linear_{target}"), adapter


def attach(model: torch.nn.Module, args: LoraArgs) -> None:
    """Freeze a stage of the model but for its reward head, and give its layers adapters (zeros
    yet). Call it before the data-parallel wrapper and the optimizer are built, which then have no
    buffers for what is frozen."""
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
                target=target,
                rank=args.lora_rank,
                scale=args.scale,
                dropout=args.lora_dropout,
                layer_number=layer.layer_number,
                rows=rows,
                groups=groups,
                sequence_parallel=sequence_parallel,
            )
            setattr(holder, f"lora_{target}", adapter)


def sum_partial_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Sum over tensor ranks the gradients that each has a part of. Under sequence parallelism
    Megatron-Core does it."""
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


def adapter_table(geometry: Geometry, args: LoraArgs) -> list[WeightRule]:
    """Every global tensor of the adapters, made of the tensors that peft has for the family's
    modules (without peft's ``base_model.model.`` in front)."""
    h, f, d = geometry.hidden_size, geometry.ffn_hidden_size, geometry.head_dim
    a, g = geometry.num_attention_heads, geometry.num_query_groups
    names, rank = BACKBONES[geometry.family].names, args.lora_rank
    qkv = names.qkv if len(names.qkv) == 3 else [f"{names.qkv[0]}.{x}" for x in "qkv"]
    modules = {  # target -> [(module, rows)], columns
        "qkv": (list(zip(qkv, (a * d, g * d, g * d), strict=True)), h),
        "proj": ([(names.projection.removesuffix(".weight"), h)], a * d),
        "fc1": ([(name.removesuffix(".weight"), f) for name in (names.gate, names.up)], h),
        "fc2": ([(names.down.removesuffix(".weight"), h)], f),
    }
    rules = []
    for i in range(geometry.num_layers):
        for target in args.targets:
            parts, columns = modules[target]
            ours = f"decoder.layers.{i}.{PLACES[target]}.lora_{target}."
            theirs = [names.layer.format(i=i) + module for module, _ in parts]
            of_a = tuple(Part(f"{name}.lora_A.weight", 0, rank) for name in theirs)
            shape = (len(parts) * rank, columns)
            rules.append(WeightRule(ours + "a", shape, of_a, None if target in COLUMN else 1))
            for part, (_, rows) in enumerate(parts):
                of_b = whole(f"{theirs[part]}.lora_B.weight", rows)
                cut = 0 if target in COLUMN else None
                rules.append(WeightRule(f"{ours}b{part}", (rows, rank), of_b, cut))
    return rules


def above_dimensions(geometry: Geometry, args: LoraArgs) -> str:
    """The targets with a matrix whose smaller dimension the rank exceeds, as "qkv (16), fc1 (32)";
    "" for none. Accepted, as peft does, for it is exact: the update of such a matrix has no higher
    rank than its smaller dimension, and the rest of the adapter costs memory only."""
    smallest: dict[str, int] = {}
    for rule in adapter_table(dataclasses.replace(geometry, num_layers=1), args):
        target, _, factor = rule.name.rpartition("lora_")[2].partition(".")
        size = rule.shape[1] if factor == "a" else rule.shape[0]
        smallest[target] = min(size, smallest.get(target, size))
    return ", ".join(f"{name} ({n})" for name, n in smallest.items() if args.lora_rank > n)


@torch.no_grad()
def initialize(
    model: torch.nn.Module,
    geometry: Geometry,
    args: LoraArgs,
    *,
    seed: int = 0,
    start: PeftFolder | None = None,
) -> None:
    """Give this stage's adapters their start: A from ``seed`` and B zero, or what ``start`` has,
    and the reward head of ``start``, if it has one."""
    rules = {rule.name: rule for rule in adapter_table(geometry, args)}
    for name, parameter in global_parameters(model):
        if name == REWARD_HEAD and start is not None and start.has_head:
            parameter.copy_(start.read(start.head, parameter.shape))
        if name not in rules:
            continue
        rule, at = rules[name], 0
        values = new_a(rule, seed) if name.endswith(".a") else torch.zeros(rule.shape)
        for part in rule.parts if start is not None else ():
            size = part.stop - part.start
            if part.name in start:
                values[at : at + size] = start.read(part.name, (size, rule.shape[1]))
            at += size
        copy_shard(parameter, rule, values)


def copy_shard(parameter: torch.Tensor, rule: WeightRule, values: torch.Tensor) -> None:
    """Copy this rank's part of a global tensor; what belongs to padded heads becomes zero."""
    parameter.zero_()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    ((top, bottom),) = rule.local_rows(tp_rank, parameter.shape[0])
    left, right = rule.local_columns(tp_rank, parameter.shape[1]) or (0, parameter.shape[1])
    own = values[top:bottom, left:right]
    parameter[: own.shape[0], : own.shape[1]].copy_(own)


def new_a(rule: WeightRule, seed: int) -> torch.Tensor:
    """The start of one global A [n r, in], fp32: the same in every layout, for it depends on the
    tensor's name and ``seed`` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {rule.name}".encode()))
    bound = rule.shape[1] ** -0.5
    return torch.empty(rule.shape).uniform_(-bound, bound, generator=generator)


def delta(
    a: torch.Tensor, parts: Sequence[torch.Tensor], *, groups: int, scale: float
) -> torch.Tensor:
    """s B A in the rows of the fused weight, fp32 [rows, in]."""
    each = [b.float() @ one.float() for b, one in zip(parts, a.chunk(len(parts)), strict=True)]
    return low_rank.interleave(each, groups) * scale


@torch.no_grad()
def merge(model: torch.nn.Module) -> None:
    """Add the adapters to the weights and take them away: the plain model with the same rewards."""
    for module in list(model.modules()):
        for target in PLACES:
            adapter = getattr(module, f"lora_{target}", None)
            if adapter is None:
                continue
            weight = getattr(module, f"linear_{target}").weight
            change = delta(adapter.a, adapter.parts, groups=adapter.groups, scale=adapter.scale)
            weight.copy_(weight.float() + change)
            for hook in adapter.hooks:
                hook.remove()
            getattr(module, f"linear_{target}").explicit_expert_comm = False
            delattr(module, f"lora_{target}")
