"""HTML of a report; escapes every text that comes from outside."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmega.io import write_durably

# The page may load nothing and run nothing, whatever text a data set brings along.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1c2026;
  background: #fff;
  max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 10px; padding-top: 14px; border-top: 2px solid #d9dee5;
  overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 26px 0 6px; }
p { margin: 6px 0; }
.sub { color: #4b5563; overflow-wrap: anywhere; }
nav a { margin-right: 14px; }
a { color: #00558c; }
.findings { border: 1px solid #cfd6de; border-left-width: 8px; border-radius: 4px;
  padding: 9px 14px; margin: 9px 0;
  display: grid; grid-template-columns: 150px 1fr; gap: 12px; }
.findings b { white-space: nowrap; }
.findings b .sub { font-weight: normal; }
.good { border-left-color: #0072b2; background: #f3f8fc; }
.warn { border-left-color: #e69f00; background: #fff9ec; }
.bad { border-left-color: #b3261e; background: #fdf3f2; }
.note { border-left-color: #8a94a0; background: #f7f8f9; }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 10px;
  margin: 14px 0; }
.tile { border: 1px solid #d9dee5; border-radius: 4px; padding: 8px 12px; }
.tile .value { font-size: 22px; font-weight: 600; line-height: 1.25; }
.tile .name, .tile .more { font-size: 13px; color: #4b5563; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px;
  margin: 12px 0; }
figure { margin: 0; }
figure.wide { grid-column: 1 / -1; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: 13px; color: #4b5563; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 8px 0; }
th, td { text-align: left; padding: 3px 16px 3px 0; border-bottom: 1px solid #e4e8ed;
  vertical-align: top; }
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; }
td.num { white-space: nowrap; }
th { vertical-align: bottom; }
details { border: 1px solid #d9dee5; border-radius: 4px; margin: 7px 0; padding: 6px 12px; }
summary { cursor: pointer; }
summary .gist { color: #4b5563; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px;
  margin-top: 8px; }
.message { border-left: 3px solid #b9c2cc; padding: 2px 10px; margin: 6px 0; }
.chosen .message { border-left-color: #0072b2; }
.rejected .message { border-left-color: #d55e00; }
.role { font-size: 12px; color: #4b5563; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; unicode-bidi: isolate; }
.cut { color: #4b5563; font-style: italic; }
@media (max-width: 760px) { .figures, .two, .findings { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; } }
@media print { details { break-inside: avoid; } }
"""

_WORDS = {
    "good": "\u2713 Good",
    "warn": "! Look at this",
    "bad": "\u2717 Problem",
    "note": "\u2013 Note",
}


def escape(text: Any) -> str:
    """Text that is safe between tags and in quoted attributes; control characters become
    visible."""
    shown = "".join(
        c if c in "\n\t" or c.isprintable() or ord(c) > 159 else "\ufffd" for c in str(text)
    )
    # a lone surrogate cannot be written as UTF-8
    return html.escape(shown.encode("utf-8", "replace").decode("utf-8"), quote=True)


def _kept(text: str) -> str:
    """Escaped, and no line break between a number and its percent sign."""
    return escape(text).replace(" %", "\u00a0%")


def findings(rows: Sequence[dict[str, str]]) -> str:
    """Boxes of findings; the level is a word and a mark, not a color alone."""
    return "".join(
        f'<div class="findings {v["level"]}"><b>{_WORDS[v["level"]]}<br>'
        f'<span class="sub">{escape(v["about"])}</span></b><span>{_kept(v["text"])}</span></div>\n'
        for v in rows
    )


def tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """Key numbers: (name, value, a few more words)."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><div class="name">{escape(n)}</div><div'
            f' class="value">{escape(v)}</div><div class="more">{escape(m)}</div></div>'
            for n, v, m in rows
        )
        + "</div>\n"
    )


def nav(prefix: str, names: Sequence[str]) -> str:
    """Links to the sections ``prefix-0``, ``prefix-1``, ..."""
    links = (f'<a href="#{prefix}-{i}">{escape(name)}</a>' for i, name in enumerate(names))
    return f"<nav>{''.join(links)}</nav>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; the first column is text, the others are numbers already written out."""

    def cells(row: Sequence[Any], tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{'' if i == 0 else ' class=num'}>{escape(c)}</{tag}>"
                for i, c in enumerate(row)
            )
            + "</tr>\n"
        )

    body = "".join(cells(r, "td") for r in rows)
    return f'<div class="scroll"><table>{cells(head, "th")}{body}</table></div>\n'


def figure(svg: str, caption: str, *, wide: bool = False) -> str:
    """A plot with its caption, which is also what a screen reader says."""
    return (
        f'<figure{" class=wide" if wide else ""} role="img" aria-label="{escape(caption)}">{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def figures(parts: Sequence[str]) -> str:
    """Figures side by side, two in a row where there is room."""
    return f'<div class="figures">{"".join(parts)}</div>\n'


def write_page(path: Path, title: str, body: str) -> Path:
    """Write one self-contained page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(
        path,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width,'
        f' initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}</body></html>\n",
    )
    return path
