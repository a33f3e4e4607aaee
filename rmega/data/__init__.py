"""Dataset on disk -> packed batches.

indexed (open, write), fingerprint (of a tokenizer), integrity (verify), stats, batching, balance,
packing.
"""
