"""Raw preference data -> dataset on disk: rows of any common schema, comparisons, token ids, the
preprocessing run.

resolve (what --input names), sources and tables (reading rows), schemas, ranked and closest_schema
(recognizing them), prompts, comparison, scorable (rows to score), tokenizer, fitting and fast_bpe
(ids), preprocess, worker, dedup, assemble and printed (the run).
"""
