#!/usr/bin/env python
"""Repeat a batch whose gradient was not finite, one comparison at a time."""

import sys

from rmega.commands.replay import cli

if __name__ == "__main__":
    sys.exit(cli())
