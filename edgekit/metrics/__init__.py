"""Figures of quality computed from logits: Kullback-Leibler divergence, top-1, perplexity."""
