"""Checkpoints, configurations, tokenizers and one file per model family."""
