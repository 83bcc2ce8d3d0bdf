"""Quantization-aware training: an ordinary loop whose result is codes."""
