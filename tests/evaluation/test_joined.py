"""Evaluations side by side: values, mean, spread, and what is refused."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

import pytest

from rmega.commands.evaluate import EvaluateArgs, main

DEMO = Path(__file__).resolve().parents[2] / "examples" / "data" / "demo.valid.jsonl"


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """Three evaluations of the demonstration set, by scores that are right ever more often."""
    root = tmp_path_factory.mktemp("joined")
    count = len(DEMO.read_text(encoding="utf-8").splitlines())
    paths = []
    for seed in range(3):
        scores, path = root / f"scores{seed}.jsonl", str(root / f"seed{seed}.json")
        rows = ({"scores": [float(i % (seed + 3) > 0), 0.5]} for i in range(count))
        scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
        main(EvaluateArgs(scores=[str(scores)], data=[str(DEMO)], json=path))
        paths.append(path)
    return paths


def test_the_table_has_each_mean_and_spread(evaluations, capsys) -> None:
    main(EvaluateArgs(join=evaluations))
    lines = capsys.readouterr().out.splitlines()
    (result,) = json.loads(Path(evaluations[0]).read_text())["sets"].values()
    assert lines[2].split() == [
        f"{result['num_pairs']}",
        "pairs",
        "accuracy",
        "length-contr.",
        "prefers",
        "longer",
    ]
    values = []
    for path, line in zip(evaluations, lines[3:6], strict=True):
        (result,) = json.loads(Path(path).read_text())["sets"].values()
        values.append(result["accuracy"])
        assert line.split()[:2] == [path, f"{result['accuracy']:.4f}"]
    assert len(set(values)) == 3
    assert lines[6].split()[:2] == ["mean", f"{statistics.fmean(values):.4f}"]
    assert lines[7].split()[:3] == ["standard", "deviation", f"{statistics.stdev(values):.4f}"]


def test_what_cannot_be_joined(evaluations, tmp_path) -> None:
    content = json.loads(Path(evaluations[0]).read_text())
    other, none = tmp_path / "other.json", tmp_path / "none.json"
    for result in content["sets"].values():
        result["num_pairs"] -= 1
    other.write_text(json.dumps(content))
    none.write_text("[1]")
    for args, says in (
        ({"join": evaluations[:1]}, "two or more files"),
        ({"join": [evaluations[0], os.path.relpath(evaluations[0])]}, "is named twice"),
        ({"join": [evaluations[0], str(other)]}, r"other.json: is about .* \(111 pairs\), .*112"),
        ({"join": [evaluations[0], str(none)]}, "none.json: not an evaluation"),
        ({"join": [evaluations[0], f"{none}.gone"]}, "none.json.gone: cannot be read"),
        ({"join": evaluations, "data": [str(DEMO)]}, "--data does not go with --join"),
        ({"join": evaluations, "json": "x"}, "--json does not go with --join"),
        ({}, "--data: files to evaluate on were expected"),
    ):
        with pytest.raises(ValueError, match=says):
            main(EvaluateArgs(**args))
