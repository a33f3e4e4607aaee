"""Self-contained HTML reports: one file each, without scripts or network. Needs the extra
``plots``.

page (HTML), figures (matplotlib -> inline SVG), panels and tables (of evaluation results),
evaluation, training (a run), held_out (the validation sets of a run), dataset.
"""
