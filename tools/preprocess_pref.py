#!/usr/bin/env python
"""Preference data of any common schema -> a dataset on disk."""

import sys

from rmega.commands.preprocess import cli

if __name__ == "__main__":
    sys.exit(cli())
