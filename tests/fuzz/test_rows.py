"""The short form of the fuzz script: two files of every schema, and one of each kind."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.rows import KINDS, ROWS_OF_A_FILE, TEMPLATES, fuzz


def test_mutated_rows_are_kept_or_counted(tmp_path: Path, small_llama: Path) -> None:
    count = ROWS_OF_A_FILE * len(TEMPLATES) * 2
    totals = fuzz(count, 1, tmp_path, str(small_llama))
    assert totals["mutated rows"] == count and totals["rows kept"] > 200
    assert totals["rows"] == totals["rows kept"] + totals["rows rejected"]
    assert len(TEMPLATES) * len(KINDS) > 100  # the script itself goes through all of them
