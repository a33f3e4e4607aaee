#!/usr/bin/env python
"""Inspect a preference dataset: statistics, one comparison, verification, report."""

import sys

from rmega.commands.inspect_data import cli

if __name__ == "__main__":
    sys.exit(cli())
