"""The report on a dataset as one HTML page: no script, no network, no further file."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from rmega.data.indexed import PreferenceDataset
from rmega.data.stats import lengths_of, pairs, show, summarise
from rmega.preferences.comparison import REASONS

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: .15em .9em .15em 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: 0 1.5em 1em 0; } figcaption { color: #555; font-size: .9em; }
rect { fill: #4477aa; } text { font-size: 10px; fill: #555; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .8em; overflow-wrap: anywhere; }
pre.good { border-left: 4px solid #228833; } pre.bad { border-left: 4px solid #cc3311; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } pre { background: #242424; } }
"""


def histogram(values: np.ndarray, title: str, *, bins: int = 40, signed: bool = False) -> str:
    """An SVG histogram of ``values`` [n]; the last bin also holds what lies beyond the 99.5th
    percentile."""
    width, height = 440, 150
    if not len(values):
        return ""
    high = max(float(np.percentile(values, 99.5)), 1e-9)
    low = min(float(np.percentile(values, 0.5)), 0.0) if signed else min(0.0, float(values.min()))
    counts, edges = np.histogram(
        np.clip(values, low, high), bins=bins, range=(low, high if high > low else low + 1)
    )
    top = max(1, int(counts.max()))
    step = width / bins
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - height * n / top:.1f}" width="{step - 1:.1f}"'
        f' height="{height * n / top:.1f}"><title>{edges[i]:,.4g} to {edges[i + 1]:,.4g}:'
        f" {n:,}</title></rect>"
        for i, n in enumerate(counts.tolist())
    )
    ticks = "".join(
        f'<text x="{width * i / 4:.0f}" y="{height + 14}" text-anchor="middle">'
        f"{low + (edges[-1] - low) * i / 4:,.4g}</text>"
        for i in range(5)
    )
    mean = float(values.mean())
    return (
        f'<figure><svg width="{width + 60}" height="{height + 20}" viewBox="-30 -2 {width + 60}'
        f' {height + 22}" role="img"'
        f' aria-label="{escape(title)}">{bars}{ticks}</svg><figcaption>{escape(title)}: mean'
        f" {mean:,.4g}, median {np.median(values):,.4g}</figcaption></figure>"
    )


def _table(rows: list[tuple[str, Any]], head: tuple[str, str] | None = None) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"<td>{escape(str(value))}</td>"
        return (
            f'<td class="n">{value:,}</td>'
            if isinstance(value, int)
            else f'<td class="n">{value:,.4g}</td>'
        )

    header = f"<tr><th>{escape(head[0])}</th><th>{escape(head[1])}</th></tr>" if head else ""
    return f"<table>{header}{''.join(f'<tr><td>{escape(str(k))}</td>{cell(v)}</tr>' for k, v in rows)}</table>"


def _heuristic(summary: dict[str, Any]) -> str:
    if not summary["pairs"]:
        return "-"
    low, high = summary["interval"]
    return (
        f"{summary['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, {summary['pairs']:,}"
        " pairs)"
    )


def report(dataset: PreferenceDataset, tokenizer: Any = None, *, num_examples: int = 5) -> str:
    """The page as text. With a tokenizer (transformers') it shows some comparisons, spread over the
    set."""
    summary, manifest, lengths = summarise(dataset), dataset.manifest, lengths_of(dataset)
    difference, margins = [], []
    graded = np.asarray(dataset.scores)[np.asarray(dataset.document_indices[:-1])] > 0
    for which, better, worse in pairs(dataset):
        difference.append(
            dataset.sequence_lengths[better].astype(np.int64) - dataset.sequence_lengths[worse]
        )
        margins.append((dataset.scores[better] - dataset.scores[worse])[graded[which]])
    tokens = summary["tokens"]
    run = manifest.get("input", {})
    parts = [
        (
            "<!doctype html><html lang=en><meta"
            f" charset=utf-8><title>{escape(dataset.prefix)}</title><meta name=viewport"
            f" content='width=device-width'><style>{_STYLE}</style>"
        ),
        f"<h1>Preference data: {escape(dataset.prefix)}</h1>",
        _table(
            [
                ("comparisons", summary["comparisons"]),
                ("responses", summary["responses"]),
                ("pairs", summary["pairs"]),
                ("tied pairs (they give none)", summary["tied_pairs"]),
                ("comparisons with ratings", summary["graded_comparisons"]),
                ("tokens stored", tokens["stored"]),
                ("tokens without the shared prefix", tokens["without_sharing"]),
                ("tokens padded in fours", tokens["padded_in_fours"]),
                ("the longer response is the better one", _heuristic(summary["length_heuristic"])),
                (
                    "the first response of the row is the better one",
                    _heuristic(summary["position_heuristic"]),
                ),
            ]
        ),
        "<h2>Lengths in tokens</h2>",
        histogram(lengths.prefix, "prefix (shared by the responses)"),
        histogram(lengths.suffix, "suffix (the response)"),
        histogram(lengths.conversation, "conversation (prefix and suffix)"),
        (
            histogram(np.concatenate(difference), "better minus worse response", signed=True)
            if difference
            else ""
        ),
    ]
    if margins and sum(map(len, margins)):
        parts.append(
            f"<h2>Margins</h2>{histogram(np.concatenate(margins), 'rating of the better minus the worse')}"
        )
    parts += [
        "<h2>Responses per comparison</h2>",
        _table(
            [(k, n) for k, n in summary["responses_per_comparison"].items()],
            ("responses", "comparisons"),
        ),
        "<h2>Sources</h2>",
        _table(
            [
                (name, f"{s['comparisons']:,} comparisons, {s['tokens']:,} tokens")
                for name, s in sorted(
                    summary["sources"].items(), key=lambda item: -item[1]["tokens"]
                )[:200]
            ]
        ),
        "<h2>Scripts</h2>",
        _table(list(summary["scripts"].items()), ("script", "comparisons")),
        "<h2>Left out</h2>",
        (
            _table(
                [(REASONS.get(r, r), n) for r, n in run.get("rejected", {}).items()],
                ("reason", "rows"),
            )
            if run.get("rejected")
            else "<p>nothing</p>"
        ),
        "<h2>Changed or noticed</h2>",
        (
            _table(list(run["notes"].items()), ("what", "comparisons"))
            if run.get("notes")
            else "<p>nothing</p>"
        ),
        "<h2>Settings</h2>",
        _table(
            [
                (k, manifest.get(k))
                for k in (
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
            ]
        ),
        "<h2>Files</h2>",
        _table([(f["name"], f"{f['schema']}, sha256 {f['sha256']}") for f in run.get("files", [])]),
    ]
    if tokenizer is not None and len(dataset):
        parts.append("<h2>Examples</h2>")
        for index in np.unique(np.linspace(0, len(dataset) - 1, num_examples).astype(int)).tolist():
            lines = show(dataset, index, tokenizer)
            parts.append(f"<h3>{escape(lines[0])}</h3>")
            for number, (head, text) in enumerate(zip(lines[1::2], lines[2::2], strict=True)):
                kind = ("", "good")[number] if number < 2 else "bad"
                parts.append(f'<p>{escape(head[3:])}</p><pre class="{kind}">{escape(text)}</pre>')
    return "\n".join(parts) + "\n</html>\n"
