"""Losses of distillation, against torch's distributions and the formula written out."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from edgekit.errors import EdgekitError
from edgekit.quantize.qat.distill import kl_divergence, top_k_divergence


def _logits(seed: int, vocabulary: int = 50) -> Tensor:
    return torch.randn(2, 7, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def test_the_divergence_is_torchs() -> None:
    student, teacher = _logits(0), _logits(1)
    expected = torch_kl(Categorical(logits=teacher), Categorical(logits=student)).mean()
    torch.testing.assert_close(kl_divergence(student, teacher), expected)


def test_the_top_k_of_the_whole_vocabulary_is_the_divergence() -> None:
    student, teacher = _logits(0), _logits(1)
    found = top_k_divergence(student, teacher, k=50)
    torch.testing.assert_close(found, kl_divergence(student, teacher), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_top_k_is_the_formula(temperature: float) -> None:
    student, teacher, k = _logits(0).double(), _logits(1).double(), 8
    found = []
    for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        likely = t.argsort(descending=True)[:k]
        p, q = t.softmax(0), s.softmax(0)
        mass, ours = p[likely].sum(), q[likely].sum()
        binary = mass * (mass / ours).log() + (1 - mass) * ((1 - mass) / (1 - ours)).log()
        p, q = (t[likely] / temperature).softmax(0), (s[likely] / temperature).softmax(0)
        found.append(binary + mass * temperature**2 * (p * (p / q).log()).sum())
    expected = torch.stack(found).mean().float()
    torch.testing.assert_close(top_k_divergence(student, teacher, k, temperature), expected)


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient() -> None:
    teacher = _logits(1)
    teacher[0, 0, 3] = 200.0  # as good as certain
    for loss in (kl_divergence, top_k_divergence):
        student = teacher.clone().requires_grad_()
        value = loss(student, teacher)
        value.backward()
        assert student.grad is not None
        assert abs(value.item()) < 1e-6
        assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (51, 1.0), (8, 0.0), (8, float("nan"))])
def test_settings_without_a_meaning_are_refused(k: int, temperature: float) -> None:
    with pytest.raises(EdgekitError, match="must be"):
        top_k_divergence(_logits(0), _logits(1), k, temperature)
