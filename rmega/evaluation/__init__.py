"""Held-out evaluation: rewards and labels in, metrics and findings out (numpy only, no torch).

rows (data files), scores (a scores file), results (all metrics), calibration, length_bias,
findings, probes (inputs whose answer is known), benchmarks (RewardBench, RM-Bench), table (the
terminal). During training: token_probes (the probes on token ids), in_training (log and files; the
only one that needs torch), files (reading them back).
"""
