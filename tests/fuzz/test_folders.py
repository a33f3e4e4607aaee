"""The short form of the fuzz script of folders."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.folders import ALL_DAMAGE, BREACH, fuzz


def test_damaged_folders_are_refused_or_read_right(tmp_path: Path) -> None:
    counts = fuzz(60, 3, tmp_path)
    assert sum(counts.values()) == 60 and not [key for key in counts if key[2] == BREACH]
    assert sum(n for key, n in counts.items() if key[2] == "refused") > 20
    assert len({kind for _, kind, _ in counts}) > len(ALL_DAMAGE) // 2
