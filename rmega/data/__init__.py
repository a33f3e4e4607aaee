"""Dataset on disk -> packed batches.

indexed (open), writer, pairs, fingerprint (of a tokenizer), integrity (verify), stats, batching,
balance, packing.
"""
