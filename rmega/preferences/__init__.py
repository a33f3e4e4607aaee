"""Raw preference data -> dataset on disk: rows of any common schema, comparisons, token ids, the
preprocessing run.

resolve (what --input names), sources and tables (reading rows), schemas, ranked and closest_schema
(recognizing them), comparison, scorable (rows to score), tokenizer and fast_bpe (ids), preprocess,
worker, dedup and assemble (the run).
"""
