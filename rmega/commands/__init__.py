"""The programs: their flags and what they print.

``tools/*.py`` and the installed ``rmega-*`` commands both call these: train, preprocess, export,
score, evaluate, serve; inspect_data, report_run, check_layouts, replay, launch.
"""
