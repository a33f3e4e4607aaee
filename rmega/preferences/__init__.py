"""Raw preference data -> dataset on disk: rows of any common schema, comparisons, token ids, the
preprocessing run.

resolve (what --input names), sources, json_files and tables (reading rows), schemas, ranked and
closest_schema (recognizing them), prompts, comparison, scorable (rows to score), tokenizer, fitting
and fast_bpe (ids), preprocess, worker, work_folder, dedup, assemble and printed (the run).
"""
