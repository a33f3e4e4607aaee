#!/usr/bin/env python
"""torchrun with signals and exit codes that propagate."""

import sys

from rmega.commands.launch import cli

if __name__ == "__main__":
    sys.exit(cli())
