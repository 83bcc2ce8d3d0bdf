"""Distributions over the vocabulary, from one row of logits, in float64."""

import math

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Floats = NDArray[np.float64]


def log_softmax(row: Logits) -> Floats:
    """Return the log-probabilities `[vocab]` of logits `[vocab]`."""
    shifted = row.astype(np.float64)
    shifted -= shifted.max()
    shifted -= math.log(float(np.exp(shifted).sum()))
    return shifted


def row_kld(p: Floats, q: Floats) -> float:
    """Return the divergence of log-probabilities q from p, in nats."""
    # Not np.dot: at 64k elements it starts BLAS threads that spin, for ten times the CPU.
    return float((np.exp(p) * (p - q)).sum())
