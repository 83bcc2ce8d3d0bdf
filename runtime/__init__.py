"""Engines behind one protocol, generation, benchmarks."""
