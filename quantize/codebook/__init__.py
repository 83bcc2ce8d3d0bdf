"""Codebooks: weights as indices into a few learned numbers, and how those are found."""
