#!/usr/bin/env python
"""Write a checkpoint as a verified Hugging Face folder (see rmega/commands/export.py)."""

import sys

from rmega.commands.export import cli

if __name__ == "__main__":
    sys.exit(cli())
