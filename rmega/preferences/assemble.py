"""Check the converted rows as a whole, drop what is rejected, write the dataset."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import rmega
from rmega.data.indexed import exists
from rmega.data.writer import PreferenceWriter
from rmega.preferences import dedup
from rmega.preferences.work_folder import WorkFolder

MAX_SOURCES = 4096


def check_outputs(outputs: Sequence[str], *, force: bool) -> None:
    """ValueError where one of the ``outputs`` exists and is not to be replaced."""
    for output in outputs:
        if exists(output) and not force:
            raise ValueError(
                f"--output-prefix {outputs[0]}: a dataset is there already ({output}.*); --force"
                " replaces it"
            )


def select(
    work: WorkFolder, documents: np.ndarray, *, keep_duplicates: bool, held_out: np.ndarray | None
) -> tuple[np.ndarray, dict[str, int]]:
    """(kept [N] bool, overlap with the held-out set). The others are rejected in ``work``."""
    keep = np.ones(len(documents), bool)
    overlap: dict[str, int] = {}

    def leave_out(mask: np.ndarray, reason: str) -> None:
        rows = documents[mask & keep]
        keep[mask] = False
        for file, line in zip(rows["file"].tolist(), rows["line"].tolist(), strict=True):
            work.reject(file, line, reason)

    if not keep_duplicates:
        repeated, contradictory = dedup.find_duplicates(documents)
        leave_out(repeated, "duplicate")
        leave_out(contradictory, "contradiction")
    if held_out is not None:
        inside = np.isin(documents["prompt"], held_out)
        overlap = {
            "prompts": len(np.unique(documents["prompt"][inside & keep])),
            "comparisons": int((inside & keep).sum()),
            "held_out_prompts": len(held_out),
        }
        leave_out(inside, "holdout")
    return keep, overlap


def finish(
    work: WorkFolder,
    *,
    outputs: Sequence[str],
    force: bool,
    settings: dict[str, Any],
    schemas: Sequence[str],
    keep_duplicates: bool,
    held_out: np.ndarray | None,
    valid_fraction: float,
    max_rejected: float,
) -> list[dict[str, Any]]:
    """Check the set and write the dataset(s) at ``outputs`` (training, then validation).

    ``settings`` is the tokenizer's part of the manifest. Returns the manifests.
    """
    arrays = work.arrays()
    documents = arrays["documents"]
    keep, overlap = select(work, documents, keep_duplicates=keep_duplicates, held_out=held_out)
    work.check_faults(max_rejected)
    assert int(keep.sum()) + sum(work.rejected.values()) == work.num_rows, (
        "a row is neither kept nor rejected"
    )
    if not keep.any():
        path = work.write_rejected()
        raise ValueError(
            f"--input: no comparison is left of {work.num_rows} rows; why is in {path}"
        )
    valid = np.zeros(len(documents), bool)
    if valid_fraction:
        valid = dedup.split_by_prompt(documents, keep, valid_fraction)
    names, source_ids = _source_table(work, documents)
    work.write_rejected()
    run = {
        "rows": work.num_rows,
        "rejected": dict(sorted(work.rejected.items())),
        "missing": dict(sorted(work.missing.items())),
        "notes": dict(sorted(work.notes.items())),
        "files": [
            {
                "name": s.name,
                "schema": schema,
                "sha256": work.hashes.get(s.name),
                "split": s.split,
                "revision": s.revision,
            }
            for s, schema in zip(work.inputs, schemas, strict=True)
        ],
    }
    manifests, writers = [], []
    with contextlib.ExitStack() as stack:
        for part, output, mask in zip(
            ("train", "valid"), outputs, (keep & ~valid, keep & valid), strict=False
        ):
            chosen = np.flatnonzero(mask)
            writer = stack.enter_context(PreferenceWriter(output))
            writers.append(writer)
            _copy(arrays, chosen, source_ids, writer)
            manifests.append(
                writer.seal(
                    {
                        "rmega": rmega.__version__,
                        **settings,
                        **_heuristics(documents[chosen]),
                        "sources": names,
                        "input": run,
                        "split": (
                            {"part": part, "valid_fraction": valid_fraction}
                            if valid_fraction
                            else None
                        ),
                        "holdout": overlap or None,
                    }
                )
            )
        check_outputs(outputs, force=force)  # at the start nobody had written them
        for writer in reversed(writers):
            writer.publish()
    return manifests


def _source_table(work: WorkFolder, documents: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of sources, and uint16 [N]. Where the source column has a value per row, the
    files' names are used instead."""
    if len(work.source_names) <= MAX_SOURCES:
        return work.source_names, documents["source"].astype(np.uint16)
    labels = sorted({s.label for s in work.inputs})
    of_input = np.array([labels.index(s.label) for s in work.inputs], np.uint16)
    work.notes[
        f"more than {MAX_SOURCES} names in the source column: the files' names are used instead"
    ] += 1
    return labels, of_input[documents["file"]]


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64: the ranges ``start .. start + count``, concatenated."""
    offsets = np.cumsum(counts) - counts
    return np.repeat(starts - offsets, counts) + np.arange(int(counts.sum()))


def _copy(
    arrays: dict[str, np.ndarray],
    chosen: np.ndarray,
    source_ids: np.ndarray,
    writer: PreferenceWriter,
) -> None:
    """Write the documents with these numbers [n]; runs of neighbors are copied in one piece."""
    documents = arrays["documents"]
    num_sequences = documents["num_sequences"].astype(np.int64)
    sequence_ends, token_ends = (
        np.cumsum(num_sequences),
        np.cumsum(documents["num_tokens"].astype(np.int64)),
    )
    borders = np.concatenate([[0], np.flatnonzero(np.diff(chosen) != 1) + 1, [len(chosen)]])
    first, last = chosen[borders[:-1]], chosen[borders[1:] - 1]
    starts = token_ends[first] - documents["num_tokens"][first].astype(np.int64)
    for start, end in zip(starts.tolist(), token_ends[last].tolist(), strict=True):
        writer.add_tokens(arrays["tokens"][start:end])
    rows = _ranges((sequence_ends - num_sequences)[chosen], num_sequences[chosen])
    writer.add_documents(
        arrays["lengths"][rows], arrays["scores"][rows], num_sequences[chosen], source_ids[chosen]
    )


def _heuristics(chosen: np.ndarray) -> dict[str, Any]:
    """What only the rows knew: how often the first response of a row is the better one, and the
    scripts."""
    scripts = np.bincount(chosen["script"], minlength=len(dedup.SCRIPTS))
    return {
        "position_heuristic": {
            "first_wins": int(chosen["first_wins"].sum()),
            "pairs": int(chosen["first_pairs"].sum()),
        },
        "scripts": {name: int(n) for name, n in zip(dedup.SCRIPTS, scripts, strict=True) if n},
    }
