"""Quantization: codes, schemes and recipes. Imports torch and numpy only."""
