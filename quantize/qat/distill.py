"""Losses that keep a quantized model near its float self; logits are `[..., vocab]`."""

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.errors import EdgekitError


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of KL(teacher || student) over the positions, in nats."""
    ours, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return _kl(ours, theirs).mean()


def top_k_divergence(
    student: Tensor, teacher: Tensor, k: int = 32, temperature: float = 1.0
) -> Tensor:
    """Return the tempered, decoupled divergence on the teacher's `k` most likely tokens, in nats.

    A reconstruction of the objective that the LFM2 report (arXiv 2511.23404) names. By the chain
    rule, KL(T || S) is the divergence of the mass of the top k, plus that mass times the divergence
    within the top k, plus the tail's part, which is left out: the teacher's `k` logits and their
    mass are all that must be kept. Only the divergence within is tempered (times its square, so
    that gradients keep their size): the mass of other tokens has no temperature, and to temper a
    truncated distribution as a whole would compare different supports.
    """
    if not 1 <= k <= student.shape[-1]:
        raise EdgekitError(f"k must be 1 to {student.shape[-1]}, the vocabulary, got {k}")
    if not temperature > 0:
        raise EdgekitError(f"temperature must be positive, got {temperature}")
    ours, theirs = student.float(), teacher.float()
    likely, where = theirs.topk(k, -1)
    chosen = ours.gather(-1, where)
    mass = _log_mass(likely, theirs)
    divergence_of_mass = _binary_kl(_log_mass(chosen, ours), mass)
    within = _kl((chosen / temperature).log_softmax(-1), (likely / temperature).log_softmax(-1))
    return (divergence_of_mass + mass.exp() * temperature**2 * within).mean()


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return KL(theirs || ours) of log-probabilities along the last axis."""
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def _log_mass(part: Tensor, whole: Tensor) -> Tensor:
    """Return the logarithm of the share that some logits have, never quite 0."""
    share = part.logsumexp(-1) - whole.logsumexp(-1)
    return share.clamp(max=-torch.finfo(torch.float32).eps)


def _binary_kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the divergence of two events from the logarithms of their probabilities."""
    rest_ours, rest_theirs = torch.log(-torch.expm1(ours)), torch.log(-torch.expm1(theirs))
    inside = theirs.exp() * (theirs - ours)
    return inside + rest_theirs.exp() * (rest_theirs - rest_ours)
