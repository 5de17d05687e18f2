"""Quadratic programs made from their solution: the oracle of `bilevel.testing`, and every way to the hypergradient."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from bilevel import AID, KKT, FullKKT, hypergradient
from bilevel.solvers import MINRES, InteriorPoint, QuadraticProgram
from bilevel.testing import strategies
from bilevel.testing.programs import Program


@settings(max_examples=5)
@given(strategies.programs())
def test_solutions_multipliers_and_hypergradients_are_those_of_the_construction(known: Program) -> None:
    y0 = torch.zeros_like(known.y)
    truth = known.gradient()
    for problem, estimator in (
        (known.linear, KKT(QuadraticProgram())),
        (known.linear, AID(InteriorPoint(), MINRES(rtol=1e-13))),
        (known.written, KKT(InteriorPoint())),
        (known.written, FullKKT(InteriorPoint())),
    ):
        found = hypergradient(problem, known.x, y0, estimator=estimator)
        torch.testing.assert_close(found.y, known.y, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.grad, truth, rtol=1e-7, atol=1e-8 * float(1 + truth.norm()))
        assert found.multipliers is not None
        linear = problem.constraints is not None
        mu = found.multipliers.linear_inequalities if linear else found.multipliers.inequalities
        torch.testing.assert_close(mu, known.multipliers, rtol=1e-7, atol=1e-8)


@settings(max_examples=15)
@given(strategies.programs(kappa=10.0, margin=0.1))
def test_what_is_promised_of_programs_holds(known: Program) -> None:
    eigenvalues = torch.linalg.eigvalsh(known.Q)
    assert float(eigenvalues[0]) > 0.99 and float(eigenvalues[-1]) < 10.01
    assert bool(((known.multipliers >= 0.1) ^ (known.slack >= 0.1)).all())
    assert bool(((known.multipliers == 0) ^ (known.slack == 0)).all())
    rows = torch.cat([known.G[known.multipliers > 0], known.A])
    if len(rows):
        sizes = torch.linalg.svdvals(rows)
        assert float(sizes.min()) > 0.99 and float(sizes.max()) < 3.01
