"""Checkpoint -> verified Hugging Face folder: convert (the whole), write_weights, folder (other
files), verify, model_card."""
