"""Checkpoints of a run: checkpoint (save, load), snapshot (asynchronous copies), run_folder (names,
health, pruning)."""
