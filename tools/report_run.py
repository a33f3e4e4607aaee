#!/usr/bin/env python
"""Draw a training run: python tools/report_run.py RUN writes RUN/report.html from"""

import sys

from rmega.commands.report_run import cli

if __name__ == "__main__":
    sys.exit(cli())
