"""Lists and objects that a file stores as text: JSON, Python repr, NumPy repr.

CSV files have nothing else. pandas writes a column of arrays so, without commas between elements:
``[{'role': 'user', ...}\\n {...}]``.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from typing import Any

_UNREADABLE = (
    ValueError,
    SyntaxError,
    IndexError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
_OPENING, _CLOSING = frozenset("[{("), frozenset("]})")
_NAMES = {"nan": "None", "null": "None", "true": "True", "false": "False", "inf": "1e999"}


def value_of(text: str) -> Any:
    """The list or object that a text encodes; None if it encodes none."""
    for parse in (json.loads, lambda text: ast.literal_eval(_with_commas(text))):
        try:
            value = parse(text)
        except _UNREADABLE:
            continue
        return value if isinstance(value, (list, dict)) else None
    return None


def as_list(value: Any) -> list[Any] | None:
    """A list, also one that is written as text; else None."""
    if isinstance(value, str) and re.match(r"\s*(array\()?\s*\[", value):
        value = value_of(value)
    return value if isinstance(value, list) else None


def _with_commas(text: str) -> str:
    """The repr of lists, dicts and arrays as Python source: commas between the elements of arrays,
    without ``array(`` and ``, dtype=object)``. ValueError where an array was shortened (``...``).

    Python itself would read ``['a' 'b']`` as one text.
    """
    out: list[str] = []
    calls: list[bool] = []  # for each open bracket: whether it is that of array( or np.float64(
    ended = named = skipping = False  # after a value; after a name of NumPy; in dtype=...
    for kind, token, *_ in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
        if kind in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.INDENT):
            continue
        if token == "...":
            raise ValueError("a shortened array")
        if token in _CLOSING:
            if not calls.pop():
                out.append(token)
            ended, skipping = True, False
        elif skipping or token == "." or (token == "," and calls and calls[-1]):
            skipping = skipping or token == ","  # what follows the array: dtype=object
        elif kind == tokenize.NAME and token in ("array", "np", "numpy") or named and token != "(":
            if ended:
                out.append(",")
            named, ended = True, False
        else:
            if ended and token not in (",", ":"):
                out.append(",")
            if token in _OPENING:
                calls.append(named)
            if not (token in _OPENING and named):
                out.append(_NAMES.get(token, token))
            ended = token not in _OPENING and token not in (",", ":", "-", "+")
            named = False
    return " ".join(out)
