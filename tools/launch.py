#!/usr/bin/env python
"""torchrun for training: the same flags, signals passed on, the ranks' own exit code, no wall of"""

import sys

from rmega.commands.launch import cli

if __name__ == "__main__":
    sys.exit(cli())
