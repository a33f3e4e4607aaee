"""The worker process: rows of a chunk -> comparisons -> token ids."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmega.preferences import dedup, sources
from rmega.preferences.chunks import Chunk
from rmega.preferences.closest_schema import columns_of, what_is_missing
from rmega.preferences.comparison import Comparison, Rejected
from rmega.preferences.reader import Plan
from rmega.preferences.schemas import recognize, source_of
from rmega.preferences.tokenizer import PairTokenizer


@dataclass
class ChunkResult:
    """What a worker returns for a chunk."""

    tokens: bytes = b""
    lengths: bytes = b""
    scores: bytes = b""
    documents: bytes = b""
    source_names: list[str] = field(default_factory=list)
    rejected: list[tuple[int, str, str, str]] = field(default_factory=list)
    """(line, reason, detail, raw text)."""
    notes: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0


class Converter:
    """Rows -> tokens. One per worker process."""

    def __init__(
        self,
        tokenizer: PairTokenizer,
        plans: list[Plan],
        map_spec: str | None,
        keep_ties: bool = False,
    ) -> None:
        self.tokenizer, self.plans, self._map_spec = tokenizer, plans, map_spec
        self.keep_ties = keep_ties
        self.map = load_map(map_spec) if map_spec else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Converter, (self.tokenizer, self.plans, self._map_spec, self.keep_ties)

    def comparison(self, row: dict[str, Any], plan: Plan) -> Comparison:
        """The row as a comparison; raises `Rejected`."""
        schema = plan.schema
        source = source_of(row, plan.source.label)
        if self.map is not None:
            mapped = self._mapped(row)
            if isinstance(mapped, Comparison):
                mapped.source = mapped.source or source
                return mapped
            row, schema = mapped, recognize([mapped])
            source = source_of(row, source)
            if schema is None:
                raise Rejected(
                    "map_failed",
                    f"returned columns of no known schema: {columns_of(mapped)}; "
                    f"{what_is_missing(mapped)}",
                )
        assert schema is not None
        comparison = schema.convert(row, keep_ties=self.keep_ties)
        comparison.source = source
        return comparison

    def _mapped(self, row: dict[str, Any]) -> Any:
        assert self.map is not None
        try:
            mapped = self.map(row)
        except Exception as error:  # a user's function raises what it likes
            raise Rejected("map_failed", f"{type(error).__name__}: {error}"[:300]) from None
        if mapped is None:
            raise Rejected("skipped_by_map")
        if not isinstance(mapped, (dict, Comparison)):
            raise Rejected(
                "map_failed", f"returned {type(mapped).__name__}, not a dict or a Comparison"
            )
        return mapped

    def convert(self, chunk: Chunk) -> ChunkResult:
        """All rows of a chunk; ValueError with file and line under --overlong error."""
        plan, result = self.plans[chunk.input_index], ChunkResult()
        names: dict[str, int] = {}
        tokens: list[bytes] = []
        lengths: list[int] = []
        scores: list[float] = []
        documents: list[tuple[Any, ...]] = []
        for line, row, raw in sources.decode(chunk):
            result.num_rows += 1
            try:
                if isinstance(row, Rejected):
                    raise row
                comparison = self.comparison(row, plan)
                encoded = self.tokenizer.encode_comparison(comparison)
                parts = [encoded.prefix, *encoded.suffixes]
                part_lengths = [len(p) for p in parts]
                documents.append(
                    dedup.document_row(
                        comparison,
                        chunk.input_index,
                        line,
                        sum(part_lengths),
                        names.setdefault(comparison.source, len(names)),
                    )
                )
            except Rejected as why:
                if not raw and not isinstance(row, Rejected):
                    raw = _as_raw(row)
                result.rejected.append((line, why.reason, why.detail, raw))
                continue
            except UnicodeEncodeError:
                result.rejected.append((line, "not_utf8", "half of a surrogate pair", _as_raw(row)))
                continue
            except ValueError as error:
                raise ValueError(f"{plan.source.name}:{line}: {error}") from None
            tokens += [p.tobytes() for p in parts]
            lengths += part_lengths
            scores += [float(comparison.graded), *comparison.scores]
            result.notes.update(encoded.notes)
        result.tokens = b"".join(tokens)
        result.lengths = np.array(lengths, np.int32).tobytes()
        result.scores = np.array(scores, np.float64).tobytes()
        result.documents = np.array(documents, dedup.DOCUMENT).tobytes()
        result.source_names = list(names)
        return result


def _as_raw(row: Any) -> str:
    try:
        return json.dumps(row, ensure_ascii=True, default=str)[:2000]
    except (RecursionError, ValueError, TypeError):
        return ""


def load_map(spec: str) -> Callable[[dict[str, Any]], Any]:
    """The function FILE.py:FUNCTION of ``--map``."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise ValueError(
            f"--map {spec}: expected FILE.py:FUNCTION, and {path or spec} is no such file"
        )
    module_spec = importlib.util.spec_from_file_location("rmega_user_map", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"--map {path}: cannot be loaded ({type(error).__name__}: {error})"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--map {spec}: {path} has no function {name}")
    return function
