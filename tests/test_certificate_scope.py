"""Certificates are of unconstrained minimizers of a smooth g, and nothing else is certified, whoever is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel import (
    AID,
    ITD,
    Auto,
    BilevelProblem,
    Certified,
    Constants,
    Estimate,
    Penalty,
    Polytope,
    certify,
    compare,
    hypergradient,
    minimize,
)
from bilevel.extending import AbstractInnerProblem, FlatProblem, Objective, Property
from bilevel.inner_problems import Iteration, SmoothMinimization
from bilevel.prox import L1
from bilevel.solvers import CG, LBFGS, GradientDescent, Iterate

X, Y = torch.ones(2), torch.zeros(2)
KNOWN = Constants(mu=2.0, L=2.0, L_fyy=2.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=2.0)


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 3).square().sum()


def g(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum()


@final
@dataclass(frozen=True, eq=False)
class Equation(AbstractInnerProblem):
    """A user's kind: y solves an equation that one smooth function describes, but minimizes nothing (a saddle)."""

    def objective(self, problem: FlatProblem, x: Tensor, products: Any) -> Objective:
        return SmoothMinimization(g).objective(problem, x, products)

    @property
    def offers(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.smooth})

    @property
    def refusal(self) -> str:
        return "y is a saddle point."

    @property
    def g(self) -> Callable[..., Tensor]:
        return g


def apart(x: Tensor, y: Tensor) -> Tensor:
    """A g with terms in x and in y, which has no path from x to grad_y g."""
    return y.square().sum() + x.square().sum()


OUTSIDE: dict[str, BilevelProblem] = {
    "init only": BilevelProblem(f, lambda x, y: y.square().sum(), init=lambda x: x),
    "init only, x apart": BilevelProblem(f, apart, init=lambda x: x),
    "init only, f nearly without y": BilevelProblem(
        lambda x, y: (x - 3).square().sum() + 1e-9 * f(x, y), lambda x, y: y.square().sum(), init=lambda x: x
    ),
    "iterative": BilevelProblem(f, g, iterative=True),
    "iteration": BilevelProblem(f, inner=Iteration(lambda x, y, k: y - x * y, steps=2)),
    "constraints": BilevelProblem(f, g, constraints=lambda x: Polytope(lower=torch.zeros(2), upper=torch.ones(2) / 2)),
    "prox": BilevelProblem(f, g, prox=lambda x: L1(0.1)),
    "kind": BilevelProblem(f, inner=Equation()),
}
CASES = pytest.mark.parametrize("name", OUTSIDE)


def made(problem: BilevelProblem, dtype: torch.dtype = torch.float64) -> Estimate:
    """An estimate as a user might hold one, wherever it came from."""
    plain = BilevelProblem(f, g)
    steps = ITD(Iterate(GradientDescent(0.1), max_steps=3))
    estimate = hypergradient(plain, X.to(dtype), Y.to(dtype), estimator=steps, throw=False)
    return replace(estimate, penalized=(Y.to(dtype), 100.0))


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name not in ("prox", "constraints")])  # with theorems
@pytest.mark.parametrize("options", [{}, {"refine": True}, {"first_order": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_certify_refuses_what_its_theorems_are_not_of(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    for constants in (KNOWN, replace(KNOWN, C_G=None, L=None)):
        with pytest.raises(ValueError, match=r"`certify` does not apply: .*(start|smooth minimization)"):
            certify(OUTSIDE[name], X.to(dtype), made(OUTSIDE[name], dtype), constants, **options)


@CASES
@pytest.mark.parametrize("targets", [{"target_error": 1e3}, {"relative_error": 0.5}, {"target_error": 1e-6}])
@pytest.mark.parametrize("constants", [KNOWN, None])
def test_certified_accuracy_refuses_it_although_its_first_guess_would_do(
    name: str, targets: dict[str, float], constants: Constants | None
) -> None:
    certified = Certified(AID(LBFGS(), CG()), **targets, constants=constants)
    with pytest.raises(ValueError, match=r"`Certified` does not apply|must heed"):
        hypergradient(OUTSIDE[name], X, Y, estimator=certified, throw=False)


@CASES
def test_adaptive_accuracy_and_auto_refuse_it(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not apply|must heed"):
        minimize(
            *(OUTSIDE[name], X, Y),
            estimator=AID(LBFGS(), CG()),
            accuracy="adaptive",
            constants=KNOWN,
            max_steps=2,
        )
    with pytest.raises(ValueError, match="does not apply"):
        hypergradient(OUTSIDE[name], X, Y, estimator=Auto(constants=KNOWN))


@CASES
def test_a_comparison_has_no_certificates_of_it(name: str) -> None:
    if name == "kind":
        pytest.skip("has no estimator that would be a reference")
    found = compare(OUTSIDE[name], X, Y, constants=KNOWN, memory=False, estimators=["itd", "one-step", "esj"])
    assert [row.certificate for row in found.rows] == [None] * 3


@CASES
def test_there_is_no_estimate_of_the_error_by_a_newton_step_either(name: str) -> None:
    if name in ("kind", "iteration", "constraints", "prox"):
        estimator: Any = "implicit" if name in ("constraints", "prox") else "finite-difference"
    else:
        estimator = ITD(Iterate(GradientDescent(0.1), max_steps=3))
    if name == "kind":
        return
    assert math.isnan(hypergradient(OUTSIDE[name], X, Y + 0.1, estimator=estimator, throw=False).error_estimate)


@final
class Square(torch.autograd.Function):
    """Y^2 summed, with a first derivative only."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        found: Tensor = 2 * grads[0] * y
        return found


def test_without_second_derivatives_the_first_order_certificate_sees_the_start_too_and_models_rounding() -> None:
    square: Any = Square.apply
    start_only = BilevelProblem(f, lambda x, y: square(y), init=lambda x: x)
    with pytest.raises(ValueError, match=r"`certify` does not apply: .*start"):
        certify(start_only, X, made(start_only), KNOWN, first_order=True)
    problem = BilevelProblem(f, lambda x, y: square(y) - 2 * x @ y)
    penalty = hypergradient(problem, X, Y, estimator=Penalty(LBFGS(), weight=50.0))
    whole = certify(problem, X, penalty, KNOWN, first_order=True)
    assert whole.proven
    modelled = certify(problem, X, penalty, replace(KNOWN, L=None), first_order=True)
    assert not modelled.proven
    assert "L is not known, and g has no second derivatives" in modelled.reason
    for found in (whole, modelled):
        assert float((penalty.grad - 2 * (X - 3)).norm()) <= found.bound < math.inf


INSIDE: dict[str, BilevelProblem] = {
    "init beside": BilevelProblem(f, g, init=lambda x: 2 * x),
    "no x at all": BilevelProblem(lambda x, y: f(x, y) + x.sum(), lambda x, y: y.square().sum()),
    "inner": BilevelProblem(f, inner=SmoothMinimization(g)),
    "encode": BilevelProblem(f, g, encode=lambda x: x + 1),
}


@pytest.mark.parametrize("name", INSIDE)
def test_neighbours_that_are_unconstrained_minimizations_are_certified(name: str) -> None:
    problem = INSIDE[name]
    shift = 1.0 if name == "encode" else 0.0
    h = torch.ones(2) if name == "no x at all" else 2 * (X + shift - 3)
    for constants in (KNOWN, replace(KNOWN, C_G=None, L=None)):
        for estimator in (
            AID(LBFGS(tol=1e-3), CG()),
            Certified(AID(LBFGS(), CG()), target_error=1e-9, constants=constants),
            Penalty(LBFGS(), weight=50.0),
        ):
            if name == "no x at all" and isinstance(estimator, Penalty):
                continue
            estimate = hypergradient(problem, X, Y + 0.3, estimator=estimator)
            found = certify(problem, X, estimate, constants)
            assert found.proven
            assert float((estimate.grad - h).norm()) <= found.bound
            if isinstance(estimator, Penalty):
                first = certify(problem, X, estimate, constants, first_order=True)
                assert float((estimate.grad - h).norm()) <= first.bound < math.inf


def test_derivatives_in_x_are_those_through_an_encoding() -> None:
    """A C_G of g(z, y) in z is refuted where it is too small for g(encode(x), y), in `certify` and on the way."""
    problem = BilevelProblem(f, g, encode=lambda x: 10 * x)
    estimate = hypergradient(problem, X, Y, estimator=AID(LBFGS(), CG()))
    assert "C_G = 2 does not hold" in certify(problem, X, estimate, KNOWN).reason
    certified = Certified(AID(LBFGS(), CG()), target_error=1e-6, constants=KNOWN)
    found = hypergradient(problem, X, Y, estimator=certified, throw=False)
    assert not found.status.ok
    assert found.bound == math.inf
    assert "C_G = 2 does not hold" in found.note
    right = hypergradient(problem, X, Y, estimator=replace(certified, constants=replace(KNOWN, C_G=20.0)))
    assert right.bound is not None and right.bound <= 1e-6
    assert right.note == ""


def test_a_comparison_says_that_certified_errors_above_one_say_little() -> None:
    """A mu that is a million times too small makes them so."""
    rough = {"rough": AID(Iterate(GradientDescent(0.1), max_steps=5), CG())}
    for mu, little in ((2.0, False), (2e-6, True)):
        found = compare(INSIDE["inner"], X, Y, constants=replace(KNOWN, mu=mu), estimators=rough, memory=False)
        assert ("are valid and say little" in str(found)) is little
