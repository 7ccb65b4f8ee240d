"""The distillation loss, against its formula written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_rsst import distillation_loss


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits]
    return [power / math.fsum(powers) for power in powers]


@given(
    seed=st.integers(0, 99),
    shape=st.sampled_from([(3,), (2, 3), (2, 4, 3), (1, 1)]),
    weight=st.floats(0, 1),
    temperature=st.floats(0.5, 8),
)
def test_against_the_formula(seed, shape, weight, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "st")
    loss = torch.tensor(0.7, dtype=torch.float64)
    divergences = []
    for s, t in zip(student.view(-1, shape[-1]), teacher.view(-1, shape[-1]), strict=True):
        q, p = softmax(s.tolist(), temperature), softmax(t.tolist(), temperature)
        divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    mean = math.fsum(divergences) / len(divergences)
    expected = (1 - weight) * 0.7 + weight * temperature**2 * mean
    got = distillation_loss(student, teacher, loss, weight=weight, temperature=temperature)
    assert float(got) == pytest.approx(expected, abs=1e-12)


def test_literal():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0 * math.log(3.0), 0.0]])
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    got = distillation_loss(student, teacher, torch.tensor(1.0))
    assert float(got) == pytest.approx(0.5 + 0.5 * 4.0 * divergence)


def test_gradients_reach_the_student_alone():
    student, teacher = (torch.randn(5, 3, requires_grad=True) for _ in "st")
    loss = nn.functional.cross_entropy(student, torch.zeros(5, dtype=torch.int64))
    distillation_loss(student, teacher, loss).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("weight", [0, 1])
def test_one_of_the_two_alone(weight):
    student, loss = torch.randn(5, 3), torch.tensor(2.0)
    got = distillation_loss(student, student, loss, weight=weight)
    assert float(got) == pytest.approx(2.0 - 2.0 * weight, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits_are_compared_in_float32(dtype):
    student, teacher = torch.randn(4, 6).to(dtype), torch.randn(4, 6).to(dtype)
    got = distillation_loss(student, teacher, torch.tensor(0.0))
    assert got.dtype == torch.float32
    assert torch.equal(got, distillation_loss(student.float(), teacher.float(), torch.tensor(0.0)))


def test_classes_that_cannot_be_are_no_nan():
    student = torch.tensor([[1.0, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -1e4, 1.0]])
    distillation_loss(student, teacher, torch.tensor(0.0)).backward()
    assert bool(student.grad.isfinite().all())


ONE: Tensor = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, "weight: expected a fraction in [0, 1], got 1.5.", {"weight": 1.5}),
        (ValueError, "temperature: expected a number > 0, got 0. Pass a finite number above 0.", {"temperature": 0}),
        (ValueError, "temperature: expected a number > 0, got inf.", {"temperature": math.inf}),
        (ValueError, "teacher: expected logits of shape (2, 3), got shape (2, 4). Run teacher and student on", {"teacher": torch.zeros(2, 4)}),
        (ValueError, "loss: expected one number, got shape (2,). Pass loss.mean().", {"loss": torch.zeros(2)}),
        (TypeError, "student: expected a tensor of floating-point numbers, got torch.int64.", {"student": torch.zeros(2, 3).long()}),
        (TypeError, "teacher: expected a tensor of floating-point numbers, got dict. Pass what the model", {"teacher": {}}),
        (TypeError, "loss: expected a tensor of floating-point numbers, got float. Pass the loss itself", {"loss": 1.0}),
    ],
)  # fmt: skip
def test_what_is_refused(error: Any, text: str, arguments: Any) -> None:
    given_ = {"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 3), "loss": ONE, **arguments}
    with pytest.raises(error) as caught:
        distillation_loss(**given_)
    assert text in str(caught.value)


def test_a_class_that_both_rule_out_adds_nothing() -> None:
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    ruled_out = torch.tensor([True, False, False, False, False])
    both = (each.masked_fill(ruled_out, -torch.inf) for each in (student, teacher))
    loss = distillation_loss(*both, ONE)
    torch.testing.assert_close(loss, distillation_loss(student[:, 1:], teacher[:, 1:], ONE))
    loss.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
