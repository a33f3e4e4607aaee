#!/usr/bin/env python
"""Serve a reward model over HTTP."""

import sys

from rmega.commands.serve import cli

if __name__ == "__main__":
    sys.exit(cli())
