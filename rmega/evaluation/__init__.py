"""Evaluation that cannot fool you: rows and scores in, a judgement and its verdict out (numpy only, no torch).

rows (data files), scores (a scores file), judge (the numbers), probes (a model on inputs whose answer is known),
benchmarks (RewardBench, RM-Bench), table (the terminal).
"""
