"""A training run: run (its loop), start and components (what it is built of), train (a step),
rewards (an evaluation), and what surrounds them: checks, plans, logs, checkpoints, stopping."""
