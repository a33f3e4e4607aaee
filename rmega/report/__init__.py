"""Pages to look at: one self-contained HTML file each, for an evaluation and for a run.

page (HTML), figures (matplotlib -> inline SVG), evaluation, run. Needs the extra ``plots``; no network, no script.
"""
