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


def kld(reference_logits: Logits, logits: Logits) -> float:
    """Mean Kullback-Leibler divergence of softmax(logits) from softmax(reference), in nats."""
    width = logits.shape[-1]
    rows = zip(reference_logits.reshape(-1, width), logits.reshape(-1, width), strict=True)
    # Row by row: float64 copies of all rows would be the peak of an export's memory.
    return float(np.mean([row_kld(log_softmax(p), log_softmax(q)) for p, q in rows]))


def top1(reference_logits: Logits, logits: Logits) -> float:
    """Return the share of positions whose most likely token agrees."""
    return float(np.mean(reference_logits.argmax(-1) == logits.argmax(-1)))
