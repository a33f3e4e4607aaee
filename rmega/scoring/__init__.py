"""Rewards of a trained model: scorer (one process), batch (files), queue and server (HTTP)."""
