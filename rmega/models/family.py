"""``Family``: everything in which families of backbones differ, as data.

All are decoders with RMSNorm, rotary attention and a gated silu MLP. What they share, reading
``config.json`` into a ``Geometry`` and writing it back, is here and names no family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rmega.models.geometry import Geometry
from rmega.models.hf_config import is_positive, positive_int, read_rope, refuse, rope_fields
from rmega.models.weights import Names, WeightRule, weight_table


@dataclasses.dataclass(frozen=True)
class Only:
    """The values of a field of ``config.json`` that can be honored. Exports write the first."""

    values: tuple[Any, ...]
    reason: str


NO_BIAS = Only((False, None), "biases are not supported")
COMMON = {
    "hidden_act": Only(("silu", "swish"), "only the gated silu MLP is supported"),
    "attention_dropout": Only((0.0, None), "dropout is not supported; 0.0 trains without it"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family: how its ``config.json`` reads and what its tensors are called."""

    model_type: str
    """``model_type`` of its ``config.json``."""
    architecture: str
    """Class of its reward models with one label, read as such and written by an export."""
    base_architectures: tuple[str, ...]
    """Classes of its language models and bare backbones."""
    trained_as: str | None = None
    """The family that it is a copy of, under which it is trained and exported."""
    names: Names = Names()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the published configuration class assumes where ``config.json`` says nothing."""
    only: Mapping[str, Only] = dataclasses.field(default_factory=dict)
    """Fields beyond ``COMMON`` of which not every value can be honored."""
    qkv_bias: bool = False
    qk_norm: bool = False
    own_head_dim: bool = True
    """Whether ``head_dim`` is a field; if not, it is hidden size / heads."""
    sliding_window: Literal["never", "always", "switched"] = "never"
    """Whether ``sliding_window`` acts: always unless it is null, or by ``use_sliding_window``."""
    rope_type_field: str = "rope_type"
    """Name of the type within ``rope_scaling``, the form before transformers 5."""
    code: tuple[Path, ...] = ()
    """Files of modeling code that an export carries, for a class that transformers lacks."""
    export_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of an export's ``config.json``."""

    def weight_table(self, geometry: Geometry) -> list[WeightRule]:
        """Every global rmega tensor and the Hugging Face tensors that it is stacked from."""
        return weight_table(geometry, self.names)

    def read_geometry(self, hf_config: dict[str, Any]) -> Geometry:
        """Geometry from ``config.json`` as a dict. Raises ValueError with file and field on
        anything that cannot be honored."""
        config = {**self.defaults, **hf_config}
        config["_missing"] = self.defaults.keys() - hf_config.keys()
        has_head = self._read_architectures(config)
        if config.get("quantization_config"):
            raise refuse(
                config,
                "quantization_config",
                "quantized weights cannot be trained; use the unquantized folder",
            )
        for field, only in {**COMMON, **self.only}.items():
            if config.get(field, only.values[0]) not in only.values:
                raise refuse(config, field, only.reason)
        self._check_window(config)

        heads = positive_int(config, "num_attention_heads")
        groups = positive_int(config, "num_key_value_heads", heads)
        hidden = positive_int(config, "hidden_size")
        head_dim = positive_int(config, "head_dim", max(hidden // heads, 1))
        if heads % groups:
            raise refuse(
                config, "num_key_value_heads", f"does not divide num_attention_heads={heads}"
            )
        if config.get("head_dim") is None and hidden % heads:
            raise refuse(config, "num_attention_heads", f"does not divide hidden_size={hidden}")
        if head_dim % 2:
            raise refuse(config, "head_dim", "rotary embeddings need an even head dimension")
        if not self.own_head_dim and head_dim * heads != hidden:
            raise refuse(
                config, "head_dim", f"{self.architecture} has hidden_size / num_attention_heads"
            )
        theta, scaling = read_rope(config)
        eps, tied = config.get("rms_norm_eps"), config.get("tie_word_embeddings")
        eps = 1e-6 if eps is None else eps
        if not is_positive(eps):
            raise refuse(config, "rms_norm_eps", "a positive number is needed")
        if not isinstance(tied or False, bool):
            raise refuse(config, "tie_word_embeddings", "true or false is needed")
        return Geometry(
            family=self.trained_as or self.model_type,
            num_layers=positive_int(config, "num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=positive_int(config, "intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            vocab_size=positive_int(config, "vocab_size"),
            max_position_embeddings=positive_int(config, "max_position_embeddings"),
            norm_eps=float(eps),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(tied),
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            has_reward_head=has_head,
        )

    def _read_architectures(self, config: dict[str, Any]) -> bool:
        """Whether the folder is a reward model; ValueError on classes of another kind."""
        given, labels = config.get("architectures") or (), config.get("id2label")
        if not isinstance(given, list | tuple):
            raise refuse(config, "architectures", "a list of classes is needed")
        if not isinstance(labels or {}, dict):
            raise refuse(config, "id2label", "an object is needed")
        names = tuple(given)
        allowed = (self.architecture, *self.base_architectures)
        if unknown := [name for name in names if name not in allowed]:
            raise refuse(
                config, "architectures", f"{unknown[0]} is not one of {', '.join(allowed)}"
            )
        has_head = self.architecture in names
        num_labels = len(labels) if labels else config.get("num_labels", 1 if has_head else 2)
        if has_head and num_labels != 1:
            raise ValueError(
                f"{config.get('_path', 'config.json')}: {names[0]} with {num_labels} labels is a"
                " classifier, not a reward model (num_labels must be 1)"
            )
        return has_head

    def _check_window(self, config: dict[str, Any]) -> None:
        """Attention here is full: ValueError where a window would hide tokens from others."""
        if self.sliding_window == "never":
            return
        switched = self.sliding_window == "switched"
        window = config.get("sliding_window")
        if switched and not config.get("use_sliding_window"):
            window = None
        if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
            raise refuse(config, "sliding_window", "a whole number or null is needed")
        positions = positive_int(config, "max_position_embeddings")
        if window is not None and window >= positions:
            return
        if types := config.get("layer_types"):
            if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
                raise refuse(config, "layer_types", "only full_attention is supported")
            if switched:  # the list decides which layers have a window
                return
        first = (config.get("max_window_layers") or 0) if switched else 0
        if not isinstance(first, int):
            raise refuse(config, "max_window_layers", "a whole number is needed")
        if window is not None and first < positive_int(config, "num_hidden_layers"):
            raise refuse(
                config,
                "sliding_window",
                "attention in a window shorter than max_position_embeddings="
                f"{positions} is not supported; where no text is longer than {window} tokens the"
                " window never acts, and the field can be set to null",
            )

    def export_config(
        self,
        geometry: Geometry,
        source: dict[str, Any],
        *,
        dtype: str,
        reward_token_id: int,
        pad_token_id: int,
    ) -> dict[str, Any]:
        """``config.json`` of an export, readable by transformers 4.44 and by 5; ValueError where
        this family cannot express the geometry (of another family, by ``--format``).

        ``source`` is the base model's: what does not touch arithmetic (initializer, begin and end
        of text) comes from it. Rotary parameters and dtype are written in the older and in the
        newer form, because each version reads one of them.
        """
        self._check_expressible(geometry)
        window = {
            "never": {},
            "always": {"sliding_window": None},
            "switched": {"use_sliding_window": False, "sliding_window": None},
        }[self.sliding_window]
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": geometry.hidden_size,
            "intermediate_size": geometry.ffn_hidden_size,
            "num_hidden_layers": geometry.num_layers,
            "num_attention_heads": geometry.num_attention_heads,
            "num_key_value_heads": geometry.num_query_groups,
            **({"head_dim": geometry.head_dim} if self.own_head_dim else {}),
            "vocab_size": geometry.vocab_size,
            "max_position_embeddings": geometry.max_position_embeddings,
            "rms_norm_eps": geometry.norm_eps,
            **{field: only.values[0] for field, only in {**COMMON, **self.only}.items()},
            **window,
            "initializer_range": source.get("initializer_range", 0.02),
            "use_cache": False,
            "pretraining_tp": 1,
            "tie_word_embeddings": geometry.tie_word_embeddings,
            **rope_fields(geometry, type_field=self.rope_type_field),
            "bos_token_id": source.get("bos_token_id"),
            "eos_token_id": source.get("eos_token_id"),
            "pad_token_id": pad_token_id,
            "reward_token_id": reward_token_id,
            "id2label": {"0": "reward"},
            "label2id": {"reward": 0},
            "torch_dtype": dtype,
            "dtype": dtype,
            **self.export_fields,
        }

    def _check_expressible(self, geometry: Geometry) -> None:
        for field, what in (
            ("qkv_bias", "biases on queries, keys and values"),
            ("qk_norm", "norms on queries and keys"),
        ):
            has, wants = getattr(geometry, field), getattr(self, field)
            if has != wants:
                raise ValueError(
                    f"--format {self.model_type}: {self.architecture} has"
                    f" {what if wants else f'no {what}'}, and the model has"
                    f" {what if has else 'none'}"
                )
        a, d, h = geometry.num_attention_heads, geometry.head_dim, geometry.hidden_size
        if not self.own_head_dim and a * d != h:
            raise ValueError(
                f"--format {self.model_type}: {a} heads of {d} do not make the hidden size {h}, as"
                f" {self.architecture} needs"
            )
