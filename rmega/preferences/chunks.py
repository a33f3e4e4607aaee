"""A chunk: the piece of an input that one worker takes at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rmega.preferences.comparison import Rejected

CHUNK_BYTES = 1 << 19
CHUNK_ROWS = 256
MAX_ROW_BYTES = 1 << 26

Item = tuple[int, "dict[str, Any] | Rejected", str]
"""(line or row number from 1, the row or why it is none, its raw text where it is none)."""


@dataclass
class Chunk:
    """A piece of an input: ``payload`` is bytes of whole lines, a pyarrow batch, or a list of
    items."""

    input_index: int
    first: int
    """Number of the first line or row, from 1."""
    payload: Any
    num_bytes: int = 0
    """Bytes of text, roughly, for the rate."""
    position: int = 0
    """Bytes of the file read so far, for the progress."""
