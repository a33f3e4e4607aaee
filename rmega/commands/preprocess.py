"""Preference data of any common schema -> a dataset on disk.

python tools/preprocess_pref.py --input train.jsonl.gz --tokenizer MODEL --output-prefix data/train
"""

from __future__ import annotations

from rmega.cli import parse_args, run_tool


def main() -> None:
    from rmega.preferences.preprocess import PreprocessArgs, preprocess

    preprocess(parse_args(PreprocessArgs, description=__doc__))


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main)
