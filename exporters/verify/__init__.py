"""Proof that a file computes what the model computes: decoders, networks, and the text they run."""
