#!/usr/bin/env python
"""Does a layout change anything? Run a few steps in each, and hold every number against one rank."""

import sys

from rmega.commands.check_layouts import cli

if __name__ == "__main__":
    sys.exit(cli())
