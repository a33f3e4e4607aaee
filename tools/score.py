#!/usr/bin/env python
"""Score conversations: one JSON line per row, in input order."""

import sys

from rmega.commands.score import cli

if __name__ == "__main__":
    sys.exit(cli())
