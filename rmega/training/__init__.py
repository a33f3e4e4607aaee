"""A training run: run (its loop), train (build, step), preflight, plan, disk, logs, monitor,
stopping, parity."""
