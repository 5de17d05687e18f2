"""What torch's default device is does not matter: inputs say where everything is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch

from bilevel import (
    AID,
    ESJ,
    BilevelProblem,
    Box,
    Certified,
    Constants,
    FiniteDifferences,
    Polytope,
    Simplex,
    certify,
    check,
    compare,
    estimators,
    hypergradient,
    hyperobjective,
    minimize,
    prox,
)
from bilevel.hypergrad.esj import Distribution
from bilevel.problems.hyper_cleaning import hyper_cleaning_synthetic
from bilevel.problems.logistic import logistic
from bilevel.problems.nested import nested
from bilevel.problems.quadratic import quadratic
from bilevel.problems.ridge import ridge
from bilevel.solvers import CG, LBFGS, MINRES, Jacobi, Newton, Nystrom, NystromPreconditioner
from bilevel.tasks.linear import LinearTasks

A, B = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([[1.0, 0.2, 0.5], [0.3, -1.0, 0.5]])
X, Y0 = torch.tensor([0.7, -0.4]), torch.zeros(3)


def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y - 1).square().sum() / 2 + x.square().sum() / 10


def g(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (A * y * y).sum() / 2 - (x @ B) @ y


PROBLEM = BilevelProblem(f, g)
OTHERS = {
    "first-order": BilevelProblem(f, g, init=lambda x: x @ B),
    "kkt": BilevelProblem(f, g, constraints=lambda x: Polytope(lower=-5.0, upper=5.0)),
}


@pytest.fixture(autouse=True)
def _elsewhere() -> Iterator[None]:
    """The meta device, on which nothing can be read: whatever is made there by default fails."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("name", list(estimators()))
def test_named_estimators_are_where_their_inputs_are(name: str) -> None:
    found = hypergradient(OTHERS.get(name, PROBLEM), X, Y0, estimator=name)
    assert found.grad.device == X.device and bool(found.grad.isfinite().all())


@pytest.mark.parametrize("distribution", get_args(Distribution))
def test_directions_are_drawn_where_x_is(distribution: Any) -> None:
    esj = ESJ(LBFGS(), 2, distribution=distribution)
    found = hypergradient(PROBLEM, X, Y0, estimator=esj).grad
    torch.set_default_device(None)
    assert torch.equal(found, hypergradient(PROBLEM, X, Y0, estimator=esj).grad)


def known() -> Constants:
    return Constants(mu=1.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0)


CALLS: dict[str, Callable[[], object]] = {
    "minimize": lambda: minimize(PROBLEM, X, Y0, max_steps=2, constraint=Box(-2.0, 2.0)),
    "simplex": lambda: minimize(PROBLEM, X, Y0, max_steps=2, constraint=Simplex()),
    "soba": lambda: minimize(PROBLEM, X, Y0, max_steps=2, algorithm="soba"),
    "check": lambda: str(check(PROBLEM, X, Y0)),
    "compare": lambda: str(compare(PROBLEM, X, Y0, estimators=["aid-cg", "esj", "penalty"])),
    "certify": lambda: certify(PROBLEM, X, hypergradient(PROBLEM, X, Y0), known()),
    "certified": lambda: hypergradient(
        PROBLEM, X, Y0, estimator=Certified(AID(LBFGS(), CG()), relative_error=0.1, constants=known())
    ),
    "estimated": lambda: hypergradient(PROBLEM, X, Y0, estimator=Certified(AID(LBFGS(), CG()), relative_error=0.1)),
    "auto": lambda: hypergradient(PROBLEM, X, Y0, estimator="auto"),
    "hyperobjective": lambda: hyperobjective(PROBLEM, Y0)(X),
    "preconditioned": lambda: hypergradient(PROBLEM, X, Y0, estimator=AID(Newton(), CG(preconditioner=Jacobi()))),
    "sketched": lambda: hypergradient(
        PROBLEM, X, Y0, estimator=AID(Newton(), CG(preconditioner=NystromPreconditioner(2)))
    ),
    "nystrom": lambda: hypergradient(PROBLEM, X, Y0, estimator=AID(Newton(), Nystrom(2))),
    "differences": lambda: hypergradient(
        PROBLEM, X, Y0, estimator=AID(LBFGS(), MINRES(rtol=1e-4), products=FiniteDifferences())
    ),
    "composite": lambda: hypergradient(BilevelProblem(f, g, prox=lambda x: prox.L1(0.1)), X, Y0),
    "problems": lambda: [quadratic(), nested(), ridge(), logistic(), hyper_cleaning_synthetic()],
    "tasks": lambda: LinearTasks().sample(3, 0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_make_nothing_on_the_default_device(call: Callable[[], object]) -> None:
    call()
