#!/usr/bin/env python
"""Report on a training run: RUN/report.html."""

import sys

from rmega.commands.report_run import cli

if __name__ == "__main__":
    sys.exit(cli())
