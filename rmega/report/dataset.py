"""Report on a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rmega.data.indexed import PreferenceDataset
from rmega.data.pairs import pairs
from rmega.data.stats import heuristic_text, lengths_of, show, summarize
from rmega.preferences.comparison import REASONS
from rmega.report import page
from rmega.report.figures import BLUE, GREY, drawing, require_matplotlib

MAX_SOURCES = 200
SETTINGS = (
    "tokenizer",
    "tokenizer_fingerprint",
    "template_hash",
    "reward_token_id",
    "pad_token_id",
    "vocab_size",
    "max_length",
    "overlong",
    "split",
    "holdout",
    "rmega",
)


def write_dataset_report(
    path: Path, dataset: PreferenceDataset, tokenizer: Any = None, *, num_examples: int = 5
) -> Path:
    """Write the page to ``path``. With a tokenizer (transformers') it shows some comparisons,
    spread over the set. ValueError without matplotlib."""
    require_matplotlib("report")
    summary, manifest = summarize(dataset), dataset.manifest
    tokens, made_of = summary["tokens"], manifest.get("input", {})
    sources = sorted(summary["sources"].items(), key=lambda item: -item[1]["tokens"])
    ties = "kept" if summary["ties"] == "keep" else "they give none"
    counts = [
        ("comparisons", summary["comparisons"]),
        ("responses", summary["responses"]),
        *((f"comparisons with {k}", n) for k, n in summary["responses_per_comparison"].items()),
        ("pairs", summary["pairs"]),
        (f"tied pairs ({ties})", summary["tied_pairs"]),
        ("comparisons with ratings", summary["graded_comparisons"]),
        ("tokens stored", tokens["stored"]),
        ("tokens without the shared prefix", tokens["without_sharing"]),
        ("tokens padded in fours", tokens["padded_in_fours"]),
        ("accuracy of taking the longer response", heuristic_text(summary["length_heuristic"])),
        (
            "accuracy of taking the first response of the row",
            heuristic_text(summary["position_heuristic"]),
        ),
    ]
    rejected = [(REASONS.get(r, r), n) for r, n in made_of.get("rejected", {}).items()]
    body = [
        f"<h1>Preference data: {page.escape(dataset.prefix)}</h1>\n",
        page.table(["", ""], [(name, _cell(value)) for name, value in counts]),
        page.figures(_figures(dataset)),
        _section(
            "Sources",
            ["source", "comparisons", "tokens"],
            [
                (name, f"{s['comparisons']:,}", f"{s['tokens']:,}")
                for name, s in sources[:MAX_SOURCES]
            ],
        ),
        _section("Scripts", ["script", "comparisons"], summary["scripts"].items()),
        _section("Left out", ["reason", "rows"], rejected),
        _section("Notes", ["note", "comparisons"], made_of.get("notes", {}).items()),
        _section("Settings", ["", ""], [(k, manifest.get(k)) for k in SETTINGS]),
        _section(
            "Files",
            ["file", "schema", "sha256"],
            [(f["name"], f["schema"], f["sha256"]) for f in made_of.get("files", [])],
        ),
    ]
    if tokenizer is not None and len(dataset):
        body.append("<h2>Examples</h2>\n")
        numbers = np.unique(np.linspace(0, len(dataset) - 1, num_examples).astype(int))
        body += [_example(show(dataset, number, tokenizer)) for number in numbers.tolist()]
    return page.write_page(path, f"Preference data: {dataset.prefix}", "".join(body))


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _section(title: str, head: list[str], rows: Any) -> str:
    cells = [[_cell(value) for value in row] for row in rows]
    return f"<h2>{title}</h2>\n" + (page.table(head, cells) if cells else "<p>none</p>\n")


def _example(lines: list[str]) -> str:
    """A comparison as ``show`` gives it: a title, then a head and a text for prefix and
    responses."""
    parts = [
        f'<div class="{("", "chosen")[i] if i < 2 else "rejected"}"><div class="message">'
        f'<div class="role">{page.escape(head[3:])}</div>'
        f'<div class="text">{page.escape(text)}</div></div></div>'
        for i, (head, text) in enumerate(zip(lines[1::2], lines[2::2], strict=True))
    ]
    return f"<details><summary>{page.escape(lines[0])}</summary>{''.join(parts)}</details>\n"


def _figures(dataset: PreferenceDataset) -> list[str]:
    lengths, scores = lengths_of(dataset), np.asarray(dataset.scores)
    graded = scores[np.asarray(dataset.document_indices[:-1])] > 0
    differences, margins = [np.zeros(0)], [np.zeros(0)]
    for which, better, worse in pairs(dataset.document_indices, scores):
        better_length = dataset.sequence_lengths[better].astype(np.int64)
        differences.append(better_length - dataset.sequence_lengths[worse])
        margins.append((scores[better] - scores[worse])[graded[which]])
    shown = [
        ("Prefix (shared by the responses)", lengths.prefix, "tokens", "comparisons"),
        ("Suffix (the response)", lengths.suffix, "tokens", "responses"),
        ("Conversation (prefix and suffix)", lengths.conversation, "tokens", "responses"),
        ("Better minus worse response", np.concatenate(differences), "tokens", "pairs"),
        ("Rating of the better minus the worse", np.concatenate(margins), "rating", "pairs"),
    ]
    return [_histogram(*figure) for figure in shown if len(figure[1])]


def _histogram(title: str, values: np.ndarray, unit: str, counted: str) -> str:
    """``values`` [n]; the outer bins also hold the outermost half percent on each side."""
    low, high = (float(x) for x in np.quantile(values, [0.005, 0.995]))
    low = min(low, 0.0)
    edges = np.linspace(low, high if high > low else low + 1, 41)
    mean = float(values.mean())
    with drawing(title) as (fig, ax):
        ax.hist(np.clip(values, edges[0], edges[-1]), edges, color=BLUE)
        ax.axvline(np.clip(mean, edges[0], edges[-1]), color=GREY, linestyle="--")
        ax.set(xlabel=unit, ylabel=counted)
    return page.figure(fig.svg, f"Mean {mean:,.4g} (dashed), median {np.median(values):,.4g}.")
