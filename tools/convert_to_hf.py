#!/usr/bin/env python
"""Write a checkpoint as a Hugging Face folder, and prove that the folder gives the training's"""

import sys

from rmega.commands.export import cli

if __name__ == "__main__":
    sys.exit(cli())
