#!/usr/bin/env python
"""Average the weights of several checkpoints into one verified Hugging Face folder."""

import sys

from rmega.commands.average import cli

if __name__ == "__main__":
    sys.exit(cli())
