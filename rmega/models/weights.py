"""The weight table: which rows of which Hugging Face tensors make up each rmega tensor, for both
directions.

A rule is data, not code: a *global* (unsharded) rmega tensor is a stack, along dim 0, of row ranges
of Hugging Face tensors. Loading reads the rule forwards, an export reads it backwards, so the two
cannot disagree, and both are exact.

Shape letters: V vocabulary, h hidden size, f MLP width, a query heads, g key/value groups, r = a /
g, d head dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from rmega.models.geometry import Geometry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """What a family calls its tensors; the defaults are Llama's, which most families share.

    Names of a layer's tensors follow ``layer``, in which ``{i}`` is the layer's number from 0.
    """

    prefix: str = "model."
    """Before every name but those of the head and the output matrix; a bare backbone has none."""
    embedding: str = "model.embed_tokens.weight"
    layer: str = "model.layers.{i}."
    attention_norm: str = "input_layernorm.weight"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Modules of the projection: q, k, v, or one whose rows are grouped as Megatron-Core's."""
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    projection: str = "self_attn.o_proj.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    gate: str = "mlp.gate_proj.weight"
    up: str = "mlp.up_proj.weight"
    down: str = "mlp.down_proj.weight"
    final_norm: str = "model.norm.weight"
    head: str = "score.weight"
    output: str = "lm_head.weight"
    """A language model's output matrix, which a reward model does not need; a tied folder may have
    kept the embedding under this name alone."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` (exclusive) of the Hugging Face tensor ``name``."""

    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """One global rmega tensor and the parts that it is stacked from.

    ``shard_dim`` is the dimension that tensor parallelism cuts (None: every rank holds all of it).
    ``shard_blocks`` says into how many equal row blocks dim 0 falls before it is cut: 2 for
    ``linear_fc1``, whose rank holds its rows of the gate and then its rows of the up projection.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    shard_dim: int | None = None
    shard_blocks: int = 1

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """The smallest shape that a rank can hold; Megatron-Core may pad the cut dimension with
        zeros beyond it."""
        if self.shard_dim is None:
            return self.shape
        share = self.shard_blocks * -(-(self.shape[self.shard_dim] // self.shard_blocks) // tp_size)
        return (*self.shape[: self.shard_dim], share, *self.shape[self.shard_dim + 1 :])

    def local_rows(self, tp_rank: int, held: int) -> list[tuple[int, int]]:
        """The global row ranges that rank ``tp_rank``, holding ``held`` rows, holds, in its own
        order.

        Where Megatron-Core pads (the vocabulary, groups of heads), a range may reach beyond
        ``shape[0]``.
        """
        if self.shard_dim != 0:
            return [(0, held)]
        block, share = self.shape[0] // self.shard_blocks, held // self.shard_blocks
        return [
            (b * block + tp_rank * share, b * block + (tp_rank + 1) * share)
            for b in range(self.shard_blocks)
        ]

    def local_columns(self, tp_rank: int, held: int) -> tuple[int, int] | None:
        """The columns of the global tensor that rank ``tp_rank``, holding ``held`` columns, has;
        None means all."""
        if self.shard_dim != 1 or held >= self.shape[1]:
            return None
        return min(tp_rank * held, self.shape[1]), min((tp_rank + 1) * held, self.shape[1])

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[int, Part]]:
        """Cut the parts to the global rows ``start`` to ``stop``; yields (rows after ``start``,
        part)."""
        at = 0
        for part in self.parts:
            size = part.stop - part.start
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                yield low - start, Part(part.name, part.start + low - at, part.start + high - at)
            at += size


def whole(name: str, rows: int) -> tuple[Part, ...]:
    """A tensor that is one Hugging Face tensor, unchanged."""
    return (Part(name, 0, rows),)


def grouped_qkv(names: tuple[str, ...], geometry: Geometry) -> tuple[Part, ...]:
    """Megatron-Core's ``linear_qkv`` [(a + 2 g) d, ...]: for each group its r query heads, its key,
    its value. From separate q [a d, ...], k and v [g d, ...], or from one tensor laid out that
    way."""
    d, g = geometry.head_dim, geometry.num_query_groups
    r = geometry.num_attention_heads // g
    if len(names) == 1:
        return whole(names[0], g * (r + 2) * d)
    q, k, v = names
    parts: list[Part] = []
    for i in range(g):
        parts += [
            Part(q, i * r * d, (i + 1) * r * d),
            Part(k, i * d, (i + 1) * d),
            Part(v, i * d, (i + 1) * d),
        ]
    return tuple(parts)


def weight_table(geometry: Geometry, names: Names) -> list[WeightRule]:
    """Every global rmega tensor of a backbone and the tensors that it is stacked from, in the order
    of the layers; the reward head last."""
    h, f, d = geometry.hidden_size, geometry.ffn_hidden_size, geometry.head_dim
    a, g, vocab = geometry.num_attention_heads, geometry.num_query_groups, geometry.vocab_size
    qkv = (a + 2 * g) * d

    def norm(name: str, hf_name: str, width: int = h) -> WeightRule:
        return WeightRule(name, (width,), whole(hf_name, width))

    embedding = whole(names.embedding, vocab)
    rules = [WeightRule("embedding.word_embeddings.weight", (vocab, h), embedding, 0)]
    for i in range(geometry.num_layers):
        layer, hf = f"decoder.layers.{i}.", names.layer.format(i=i)
        attention, mlp = layer + "self_attention.", layer + "mlp."
        weights, biases = (
            grouped_qkv(tuple(f"{hf}{module}.{kind}" for module in names.qkv), geometry)
            for kind in ("weight", "bias")
        )
        gate_up = (*whole(hf + names.gate, f), *whole(hf + names.up, f))
        rules += [
            norm(layer + "input_layernorm.weight", hf + names.attention_norm),
            WeightRule(attention + "linear_qkv.weight", (qkv, h), weights, 0),
        ]
        if geometry.qkv_bias:
            rules.append(WeightRule(attention + "linear_qkv.bias", (qkv,), biases, 0))
        if geometry.qk_norm:
            rules += [
                norm(attention + "q_layernorm.weight", hf + names.q_norm, d),
                norm(attention + "k_layernorm.weight", hf + names.k_norm, d),
            ]
        projection, down = whole(hf + names.projection, h), whole(hf + names.down, h)
        rules += [
            WeightRule(attention + "linear_proj.weight", (h, a * d), projection, 1),
            norm(layer + "pre_mlp_layernorm.weight", hf + names.mlp_norm),
            WeightRule(mlp + "linear_fc1.weight", (2 * f, h), gate_up, 0, shard_blocks=2),
            WeightRule(mlp + "linear_fc2.weight", (h, f), down, 1),
        ]
    return [
        *rules,
        norm("decoder.final_layernorm.weight", names.final_norm),
        WeightRule("reward_head.weight", (1, h), whole(names.head, 1)),
    ]


def hf_shapes(table: Iterable[WeightRule]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor in the table, in the table's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in table:
        for part in rule.parts:
            rows = max(part.stop, *shapes.get(part.name, (0,))[:1])
            shapes[part.name] = (rows, *rule.shape[1:])
    return shapes
