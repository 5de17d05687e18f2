"""Differences take steps that balance what they truncate with what they round."""

from __future__ import annotations

import math

import pytest
import torch

from bilevel import BilevelProblem, FiniteDifference, FiniteDifferences, hypergradient, ravel
from bilevel._flat import FlatProblem
from bilevel.solvers import ClosedForm


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_differences_by_default_steps_lose_a_third_of_the_digits_whatever_the_size_of_x(size: float) -> None:
    """Phi = exp(x / s) + x / s - 1 with s = max(1, x): a step of eps^(1/3) s balances truncation and rounding."""
    scale = max(1.0, size)
    problem = BilevelProblem(lambda x, y: y.exp().sum() + y.sum(), lambda x, y: (y - x / scale).square().sum())
    x = torch.full((1,), size)
    solver = ClosedForm(lambda x: x / scale)
    found = hypergradient(problem, x, torch.zeros(1), estimator=FiniteDifference(solver)).grad * scale
    exact = math.exp(size / scale) + 1
    assert abs(float(found) - exact) <= 3e-10


def test_products_by_differences_lose_a_third_of_the_digits() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y.exp() - 2 * x * y + x * y.square()).sum())
    flat = FlatProblem(problem, ravel(torch.ones(2))[1], ravel(torch.ones(2))[1])
    x, y, v = torch.ones(2), torch.tensor([0.3, -0.4]), torch.tensor([1.0, 2.0])
    H, G = FiniteDifferences().linearize(flat, x, y).products(v)
    assert G is not None
    assert float((H - (y.exp() + 2 * x) * v).abs().max()) <= 1e-9
    assert float((G - (2 * y - 2) * v).abs().max()) <= 1e-9
