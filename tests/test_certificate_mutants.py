"""Every ingredient of theorem A is necessary: without it the bound is below the error of some case."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from certificate_cases import TERMS, Drawn, drawn, pairs
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, BilevelProblem, Constants, certify, hypergradient
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.certificates.completed import completed
from bilevel.certificates.measured import Measured
from bilevel.certificates.residuals import measure
from bilevel.certificates.theorems import along, theorem_a
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS

Mutant = Callable[[Measured, float, Tensor, Constants], tuple[Measured, float, Tensor, Constants]]

MUTANTS: dict[str, Mutant] = {
    "M_xy": lambda found, mu, delta, known: (found, mu, delta, replace(known, M_xy=0.0)),
    "M_yy": lambda found, mu, delta, known: (found, mu, delta, replace(known, M_yy=0.0)),
    "L_fyy": lambda found, mu, delta, known: (found, mu, delta, replace(known, L_fyy=0.0)),
    "L_fxy": lambda found, mu, delta, known: (found, mu, delta, replace(known, L_fxy=0.0)),
    "linear residual": lambda found, mu, delta, known: (replace(found, r=0 * found.r), mu, delta, known),
    "inner residual": lambda found, mu, delta, known: (found, mu, 0 * delta, known),
    "mu doubled": lambda found, mu, delta, known: (found, 2 * mu, delta / 2, known),
}
VIOLATIONS: Counter[str] = Counter()


def bound(found: Measured, mu: float, delta: Tensor, known: Constants) -> float:
    """Theorem A, with C_G extended along the segment as certificates do it."""
    return theorem_a(found, mu, delta, along(known, float(delta.max()))).total + found.rounding


def confront(case: Drawn, seed: int) -> None:
    """The bound is above the error at inexact points of a problem; where that of a mutant is not, it is counted."""
    flat = case.flat(torch.float64)
    for y, v in pairs(case, seed, 5, 5):
        known, _ = completed(flat, case.x, y, case.constants)
        assert known.mu is not None
        found = measure(flat, case.x, y, v, known)
        whole = (found, known.mu, found.e / known.mu, known)
        error = float(torch.linalg.vector_norm(found.h - case.h))
        assert error <= bound(*whole)
        VIOLATIONS["cases"] += 1
        for name, mutate in MUTANTS.items():
            VIOLATIONS[name] += error > bound(*mutate(*whole))


MIXED = drawn(("quadratic", "logistic", "cleaning", "curved"), (torch.float64,))
ALONE = [drawn(("curved",), (torch.float64,), (term,)) for term in TERMS]  # each constant has its turn


@pytest.fixture(scope="module")
def violations() -> Counter[str]:
    VIOLATIONS.clear()
    for problems, examples in ((MIXED, 40), *((problems, 10) for problems in ALONE)):
        settings(max_examples=examples)(given(problems, st.integers(0, 10_000))(confront))()
    return VIOLATIONS


@pytest.mark.parametrize("name", MUTANTS)
def test_without_this_ingredient_the_bound_fails(name: str, violations: Counter[str]) -> None:
    assert violations[name] >= 10, violations


def test_without_its_extension_along_the_segment_a_measured_cross_derivative_is_too_small() -> None:
    """g = (1 + x) y^2 / 2 - y, f = y at y = v = 0: G = y is zero there, and not at y*."""
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: ((1 + x) * y.square() / 2 - y).sum())
    x, y = torch.zeros(1), torch.zeros(1)
    flat = FlatProblem(problem, ravel(x)[1], ravel(y)[1])
    constants = Constants(mu=1.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=1.0)
    known, _ = completed(flat, x, y, constants)
    found = measure(flat, x, y, torch.zeros(1), known)
    error = 1.0  # h = -y* v* = -1, and the implicit gradient at y = v = 0 is 0
    assert bound(found, 1.0, found.e, known) >= error
    assert bound(found, 1.0, found.e, replace(known, local=frozenset())) < error


def test_without_m_yy_the_bound_fails_where_f_is_linear() -> None:
    """f = y, g = cosh y + y^2/2 - x y: with v exact, M_yy alone stands between the bound and zero."""
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y.cosh() + y.square() / 2 - x * y).sum())
    x, steps = torch.tensor([2.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    known = Constants(mu=2.0, L=10.0, L_fyy=0.0, L_fxy=0.0, M_yy=math.sinh(2.0), M_xy=0.0, C_G=1.0)
    exact = hypergradient(problem, x, steps, estimator=AID(LBFGS(1e-12), Dense())).grad
    rough = hypergradient(problem, x, steps, estimator=AID(Iterate(GradientDescent(0.1), 2), Dense()))
    error = float((rough.grad - exact).norm())
    assert error > 1e-2
    assert certify(problem, x, rough, known).bound >= error
    assert certify(problem, x, rough, replace(known, M_yy=0.0)).bound < error
