#!/usr/bin/env python
"""Look into a preference dataset."""

import sys

from rmega.commands.inspect_data import cli

if __name__ == "__main__":
    sys.exit(cli())
