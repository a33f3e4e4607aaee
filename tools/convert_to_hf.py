#!/usr/bin/env python
"""Export a checkpoint to a verified Hugging Face folder."""

import sys

from rmega.commands.export import cli

if __name__ == "__main__":
    sys.exit(cli())
