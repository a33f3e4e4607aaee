"""Evaluation during training: log lines and files in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmega.distributed import log, rank
from rmega.evaluation.files import (
    FOLDER,
    FORMAT_VERSION,
    drop_after,
    folder_names,
    read_evaluations,
    step_file,
)
from rmega.evaluation.probes import NUM_PROBED
from rmega.evaluation.results import to_json
from rmega.evaluation.table import MARKS
from rmega.io import write_durably


class Evaluations:
    """The evaluations of a run. Every rank has one; rank 0 alone logs and writes.

    sets: name -> open dataset. probes: --eval-probes. run: the run folder, None without --save. A
    resumed run (``resumed_at``: the step it resumes from) loses the files of later steps, a run
    from scratch all of them.
    """

    def __init__(
        self, run: str | None, sets: Mapping[str, Any], *, probes: str, resumed_at: int | None
    ) -> None:
        self.run, self.sets, self.probes = run, sets, probes
        self._folders = folder_names(sets)
        self._biased = dict.fromkeys(sets, False)
        if rank() != 0 or run is None:
            return
        try:
            drop_after(run, resumed_at)
            for name, steps in read_evaluations(run).items():
                self._biased[name] = bool(_length_bias(steps[max(steps)]))
        except (OSError, ValueError) as error:
            log(f"warning: {FOLDER}: {error}; training continues")

    def num_probed(self, name: str, *, last: bool) -> int:
        """How many comparisons of a set are to be scored again at this evaluation."""
        wanted = self.probes == "every" or (self.probes == "last" and last)
        return min(NUM_PROBED, len(self.sets[name])) if wanted else 0

    def note(self, name: str, step: int, result: dict[str, Any], *, last: bool) -> None:
        """Log the findings of a result and keep it: all of them at the last evaluation of the run,
        before that only a strong length bias that the previous evaluation did not show."""
        bias = _length_bias(result)
        for sentence in result["findings"] if last else [] if self._biased[name] else bias:
            mark = f"[{MARKS[sentence['level']]}]"
            log(f"{mark:<4} {name}: {sentence['text']}")
        self._biased[name] = bool(bias)
        if rank() == 0 and self.run is not None:
            self._write(name, step, result)

    def _write(self, name: str, step: int, result: dict[str, Any]) -> None:
        assert self.run is not None
        path = step_file(Path(self.run, FOLDER, self._folders[name]), step)
        whole = {
            "format_version": FORMAT_VERSION,
            "subject": self.run,
            "step": step,
            "sets": {name: {**result, **_origin(self.sets[name])}},
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(to_json(whole), indent=1, allow_nan=False) + "\n")
        except OSError as error:  # an evaluation that is not kept is no reason to end a training
            log(f"warning: {path}: {error.strerror or error}; training continues")


def _length_bias(result: Mapping[str, Any]) -> list[dict[str, str]]:
    return [v for v in result["findings"] if v["about"] == "length" and v["level"] == "bad"]


def _origin(dataset: Any) -> dict[str, Any]:
    """The files that a dataset was made of, as tools/evaluate.py writes them. Of a set that was
    split, what was left out is not known for its parts."""
    manifest = dataset.manifest
    made_of = manifest.get("input", {})
    schemas = dict.fromkeys(str(file.get("schema", "")) for file in made_of.get("files", ()))
    return {
        "data": dataset.prefix,
        "schema": ", ".join(schemas),
        "left_out": {} if manifest.get("split") else made_of.get("rejected", {}),
        "notes": {} if manifest.get("split") else made_of.get("notes", {}),
    }
