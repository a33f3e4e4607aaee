#!/usr/bin/env python
"""Compare layouts: a few steps in each, every number against a single rank."""

import sys

from rmega.commands.check_layouts import cli

if __name__ == "__main__":
    sys.exit(cli())
