"""What an estimate costs, in oracle calls: `.stats` against the formulas of the docstrings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bilevel_strategies import families
from hypothesis import given, strategies as st

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelProblem,
    FiniteDifference,
    FiniteDifferences,
    Penalty,
    Start,
    Stats,
    hypergradient,
)
from bilevel.problems.quadratic import QuadraticFamily, random_quadratic
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.dense import Dense
from bilevel.solvers.gmres import GMRES
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.minres import MINRES
from bilevel.solvers.neumann import Neumann

P, Q = 3, 40
FAMILY = random_quadratic(P, Q, eigenvalues=[1.0 + i for i in range(Q)], cross=0.5, seed=3)
PROBLEM = BilevelProblem(FAMILY.f, FAMILY.g)
X, Y0 = torch.ones(P), torch.ones(Q)
STEPS = st.integers(0, 9)


def descent(steps: int) -> Iterate:
    return Iterate(GradientDescent(1 / Q), max_steps=steps)


def spent(estimator: Any, **options: Any) -> Stats:
    return hypergradient(PROBLEM, X, Y0, estimator=estimator, **options).stats


@given(STEPS, st.integers(0, 9))
def test_aid_with_cg(d: int, n: int) -> None:
    """D + 1 gradients, N + 1 Hessian products, one gradient of f, one cross product; a warm start: one product more."""
    aid = AID(descent(d), CG(rtol=0.0, max_steps=n))
    expected = Stats(gradients=d + 1, hvps=n + 1, cross_products=1, outer_gradients=1, inner_steps=d, linear_steps=n)
    cold = hypergradient(PROBLEM, X, Y0, estimator=aid)
    assert cold.stats == expected
    assert spent(aid, start=cold.start) == expected + Stats(hvps=1)


@pytest.mark.parametrize(
    ("linear", "products", "steps"),
    [
        (MINRES(rtol=0.0, max_steps=7), 8, 7),
        (GMRES(rtol=0.0, max_steps=7), 8, 7),
        (Neumann(step=1 / Q, terms=7), 7, 7),
        (Dense(), Q + 1, None),
    ],
    ids=lambda part: type(part).__name__,
)
def test_aid_with_other_linear_solvers(linear: Any, products: int, steps: int | None) -> None:
    stats = spent(AID(descent(4), linear))
    assert stats.hvps == products
    assert (stats.gradients, stats.cross_products, stats.outer_gradients, stats.values) == (5, 1, 1, 0)
    assert steps is None or stats.linear_steps == steps


def test_aid_with_a_closed_form_takes_one_gradient_and_one_to_judge_it_by() -> None:
    stats = spent(AID(ClosedForm(FAMILY.solution), CG(rtol=0.0, max_steps=5)))
    assert stats == Stats(gradients=2, hvps=6, cross_products=1, outer_gradients=1, linear_steps=5)


def test_finite_difference_products_are_two_gradients_each() -> None:
    stats = spent(AID(descent(4), CG(rtol=0.0, max_steps=5), products=FiniteDifferences()))
    assert (stats.hvps, stats.cross_products) == (6, 1)
    assert stats.gradients == 5 + 2 * 6


@given(STEPS, st.booleans())
def test_itd_in_reverse(n: int, has_init: bool) -> None:
    """N + 1 gradients, N - 1 Hessian products, N cross products; through an init N of each."""
    init = (lambda x: torch.ones(Q) * x.sum()) if has_init else None
    problem = BilevelProblem(FAMILY.f, FAMILY.g, init=init)
    stats = hypergradient(problem, X, Y0, estimator=ITD(descent(n))).stats
    assert stats == Stats(
        gradients=max(n, 1) if has_init else n + 1,
        hvps=n if has_init else max(n - 1, 0),
        cross_products=n,
        outer_gradients=1,
        inner_steps=n,
    )


def test_itd_with_a_tolerance_takes_a_product_of_each_kind_to_measure_what_the_derivative_lacks() -> None:
    """N Hessian products instead of N - 1, and N + 1 cross products: the last of each, and a gradient, at y_N."""
    inner = Iterate(GradientDescent(1 / Q), max_steps=10**6, tol=1e-6)
    stats = spent(ITD(inner))
    n = stats.inner_steps
    assert n > 100
    assert stats == Stats(gradients=n + 2, hvps=n, cross_products=n + 1, outer_gradients=1, inner_steps=n)


@given(STEPS)
def test_itd_with_checkpoints_takes_every_gradient_three_times_but_those_of_kept_states_twice(n: int) -> None:
    every = math.isqrt(max(n - 1, 0)) + 1
    assert spent(ITD(descent(n), checkpoint=True)) == Stats(
        gradients=3 * n - math.ceil(n / every) + 1,
        hvps=max(n - 1, 0),
        cross_products=n,
        outer_gradients=1,
        inner_steps=n,
    )


@given(STEPS, st.integers(1, 12))
def test_itd_truncated_goes_back_through_k_steps(n: int, k: int) -> None:
    """N + 1 gradients, K - 1 Hessian products, K cross products, K at most N; for K = 1 no second-order product."""
    k_or_n = min(k, n)
    assert spent(ITD(descent(n), truncate=k)) == Stats(
        gradients=n + 1, hvps=max(k_or_n - 1, 0), cross_products=k_or_n, outer_gradients=1, inner_steps=n
    )


@given(STEPS)
def test_itd_forward_takes_products_for_every_outer_variable(n: int) -> None:
    assert spent(ITD(descent(n), forward=True)) == Stats(
        gradients=n + 1, hvps=P * n, cross_products=P * n, outer_gradients=1, inner_steps=n
    )


@given(STEPS, st.integers(1, 6), st.sampled_from([None, 1, 4]))
def test_esj_takes_gradients_only(n: int, q: int, chunk: int | None) -> None:
    """(Q + 1)(N + 1) gradients, and no second derivative; in chunks, the unperturbed solve goes along with each."""
    solves = q + (1 if chunk is None else -(-q // chunk))
    assert spent(ESJ(descent(n), directions=q, distribution="gaussian", chunk=chunk)) == Stats(
        gradients=solves * (n + 1), outer_gradients=1, inner_steps=solves * n
    )


@given(STEPS, st.booleans())
def test_penalty_takes_two_inner_solves_or_three(n: int, extrapolate: bool) -> None:
    """A gradient of g in x for each y, one of f for each y; each step of a penalized solve is one of each."""
    m = 2 if extrapolate else 1
    assert spent(Penalty(descent(n), weight=10.0, extrapolate=extrapolate)) == Stats(
        gradients=(1 + m) * (n + 1) + 1 + m, outer_gradients=m * (n + 1) + 1 + m, inner_steps=(1 + m) * n
    )


@given(STEPS)
def test_finite_differences_take_two_solves_a_variable(n: int) -> None:
    solves = 2 * P + 1
    stats = spent(FiniteDifference(descent(n)))
    assert stats == Stats(gradients=solves * (n + 1), values=solves, inner_steps=solves * n)


@given(families(max_q=4))
def test_counts_of_batches_are_by_the_task(family: QuadraticFamily) -> None:
    tasks, q = 3, family.c.numel()
    problem = BilevelProblem(
        lambda x, y, t: family.f(x, y) * t, lambda x, y, t: family.g(x, y) + t * y.sum(), tasks=True
    )
    top = float(torch.linalg.eigvalsh(family.A)[-1])
    for estimator, hvps in (
        (AID(Iterate(GradientDescent(1 / top), 5), CG(rtol=0.0, max_steps=1)), 2),
        (ITD(Iterate(GradientDescent(1 / top), 5)), 4),
    ):
        stats = hypergradient(
            problem, torch.ones_like(family.s), torch.zeros(q), estimator=estimator, data=torch.ones(tasks)
        ).stats
        assert (stats.gradients, stats.hvps, stats.outer_gradients, stats.inner_steps) == (
            6 * tasks, hvps * tasks, tasks, 5 * tasks,
        )  # fmt: skip


def test_counts_are_what_is_evaluated() -> None:
    """g is called once a gradient, f once a gradient of f: nothing is evaluated that is not counted, in a run."""
    calls = {"f": 0, "g": 0}

    def counted(name: str, function: Any) -> Any:
        def call(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            calls[name] += 1
            value: torch.Tensor = function(x, y)
            return value

        return call

    problem = BilevelProblem(counted("f", FAMILY.f), counted("g", FAMILY.g))
    for estimator in (
        AID(descent(6), CG(rtol=0.0, max_steps=5)),
        ITD(descent(6)),
        ITD(descent(6), checkpoint=True),
        ITD(descent(6), forward=True),
        ITD(descent(6), truncate=2),
        Penalty(descent(6), weight=5.0, extrapolate=True),
        FiniteDifference(descent(6)),
    ):
        calls.update(f=0, g=0)
        later = Start(Y0, count=1)  # the first estimate of a run looks at f and g besides
        stats = hypergradient(problem, X, Y0, estimator=estimator, start=later).stats
        assert calls["g"] == stats.gradients
        assert calls["f"] == stats.outer_gradients + stats.values
