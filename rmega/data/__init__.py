"""Preference data: rows of any common schema -> comparisons -> token ids -> an indexed dataset on disk.

records (rows), sources (files, hub), tokenize (ids), checks, indexed (disk), preprocess (the whole line).
"""
