#!/usr/bin/env python
"""Serve a reward model over HTTP for RLHF loops: OpenRLHF's /get_reward and a plain /score."""

import sys

from rmega.commands.serve import cli

if __name__ == "__main__":
    sys.exit(cli())
