#!/usr/bin/env python
"""Evaluate a reward model, or scores from a file."""

import sys

from rmega.commands.evaluate import cli

if __name__ == "__main__":
    sys.exit(cli())
