#!/usr/bin/env python
"""Score conversations with a reward model: one line of JSON per row, in the order of the input."""

import sys

from rmega.commands.score import cli

if __name__ == "__main__":
    sys.exit(cli())
