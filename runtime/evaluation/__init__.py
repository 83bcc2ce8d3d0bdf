"""Perplexity and divergence of any engine on a text, and their table."""
