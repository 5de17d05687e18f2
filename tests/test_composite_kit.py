"""Random composite problems away from kinks, and the property test of the kind: it passes, and names what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from composite_terms import Rows, Simplex, Without
from hypothesis import given, settings
from prox_cases import CASES
from torch import Tensor

from bilevel import AID, BilevelProblem, check, hypergradient
from bilevel._tree import ravel
from bilevel.diagnostics.verdict import Outcome
from bilevel.prox import L1, AbstractProxTerm, ProxDerivative
from bilevel.prox.derivative import diagonal
from bilevel.solvers import CG, FISTA
from bilevel.testing import check_composite, strategies

DOUBLE = torch.float64


@settings(max_examples=6)
@given(strategies.composites())
def test_composite_problems_are_differentiated_rightly(case: tuple[BilevelProblem, Tensor, Tensor]) -> None:
    check_composite(*case)


@settings(max_examples=3)
@given(strategies.composites(terms=[lambda x: Simplex(1 + x[0].sigmoid())]))
def test_terms_of_ones_own_are_drawn(case: tuple[BilevelProblem, Tensor, Tensor]) -> None:
    check_composite(*case)
    found = hypergradient(*case, estimator=AID(FISTA(tol=1e-10, max_steps=10_000), CG(1e-10)))
    assert isinstance(found.y, Tensor) and float(found.y.min()) >= 0


@final
@dataclass(frozen=True, eq=False)
class Wrong(AbstractProxTerm):
    """The L1 norm with something wrong."""

    weight: Tensor
    what: str

    def value(self, y: Any) -> Tensor:
        return L1(self.weight).value(y)

    def prox(self, v: Any, step: Tensor | float) -> Any:
        weight = 2 * self.weight.detach() - self.weight if self.what == "sign" else self.weight
        step = 1.0 if self.what == "step" else step
        return L1(weight).prox(v, step)

    def margin(self, v: Any, step: Tensor | float) -> Tensor:
        return L1(self.weight).margin(v, step)

    def derivative(self, v: Any, step: Tensor | float) -> ProxDerivative:
        on = (v.abs() > step * self.weight).to(v.dtype)
        return diagonal(on * 0.5 if self.what == "derivative" else on)

    def conjugate(self) -> AbstractProxTerm:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("what", "words"),
    [("derivative", "as a fixed point"), ("sign", "central differences"), ("step", "y = prox"), ("", "")],
)
def test_what_is_wrong_with_a_term_is_named(what: str, words: str) -> None:
    target = torch.tensor([2.0, -1.5, 0.1, 1.5], dtype=DOUBLE)
    problem = BilevelProblem(
        lambda x, y: y.square().sum() / 2,
        lambda x, y: (y - target).square().sum() / 4,
        prox=lambda x: Wrong(x, what),
    )
    arguments = problem, torch.tensor(0.3, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE)
    if not words:
        check_composite(*arguments)
        return
    with pytest.raises(AssertionError, match=words):
        check_composite(*arguments)


def test_structures_are_checked_as_they_are() -> None:
    problem = BilevelProblem(
        lambda x, y: y["w"].sum() * y["b"],
        lambda x, y: (y["w"] - 2).square().sum() + (y["b"] - x["c"]).square() / 2 + y["b"] * y["w"].sum() / 4,
        prox=lambda x: Keyed(x["l"]),
    )
    x = {"l": torch.tensor(0.5, dtype=DOUBLE), "c": torch.tensor(1.0, dtype=DOUBLE)}
    check_composite(problem, x, {"w": torch.zeros(2, 2, dtype=DOUBLE), "b": torch.zeros((), dtype=DOUBLE)})
    with pytest.raises(ValueError, match="must have a `prox=`"):
        check_composite(BilevelProblem(problem.f, problem.g), x, {"w": x["l"], "b": x["l"]})


@final
@dataclass(frozen=True, eq=False)
class Keyed(AbstractProxTerm):
    """Rows of one leaf only; it does not know its derivative."""

    weight: Tensor

    def value(self, y: Any) -> Tensor:
        return Rows(self.weight).value(y["w"])

    def prox(self, v: Any, step: Tensor | float) -> Any:
        return {"w": Rows(self.weight).prox(v["w"], step), "b": v["b"]}

    def margin(self, v: Any, step: Tensor | float) -> Tensor:
        return Rows(self.weight).margin(v["w"], step)

    def conjugate(self) -> AbstractProxTerm:
        raise NotImplementedError


LIBRARY = ("ElasticNet", "GroupLasso-rows", "Simplex", "NuclearNorm", "Quadratic")


@pytest.mark.parametrize("name", LIBRARY)
def test_terms_of_the_library_are_differentiated_on_their_manifolds(name: str) -> None:
    case = CASES[name]
    zero = case.point(torch.zeros(1, dtype=DOUBLE))
    size = len(ravel(zero)[0])
    generator = torch.Generator().manual_seed(5)
    A = torch.randn(2 * size, size, generator=generator, dtype=DOUBLE) / size**0.5
    b, c = 2 * torch.randn(2 * size, generator=generator, dtype=DOUBLE), torch.randn(size, generator=generator).double()
    problem = BilevelProblem(
        lambda x, y: c @ ravel(y)[0] + ravel(y)[0].square().sum(),
        lambda x, y: (A @ ravel(y)[0] - b).square().sum() / 2 + x * ravel(y)[0][0] / 10,
        prox=lambda x: case.make(x.exp() * case.parameters[0], *case.parameters[1:]),
    )
    check_composite(problem, torch.tensor(-0.4, dtype=DOUBLE), zero)


def test_check_says_what_the_support_is_how_far_it_is_from_a_kink_and_whether_y_is_unique() -> None:
    target = torch.tensor([2.0, -1.5, 0.1, 0.2], dtype=DOUBLE)

    def built(g: Any, term: Any = L1) -> BilevelProblem:
        return BilevelProblem(lambda x, y: y.square().sum() / 2, g, prox=lambda x: term(x.exp()))

    def verdicts(problem: BilevelProblem) -> dict[str, Any]:
        found = check(problem, torch.tensor(-0.5, dtype=DOUBLE), torch.full_like(target, 0.5))
        return {each.name: each for each in found.verdicts}

    good = verdicts(built(lambda x, y: (y - target).square().sum() / 2))
    assert good["support"].outcome is Outcome.passed and "2 of 4 directions" in good["support"].found
    assert good["curvature"].outcome is Outcome.passed and "condition number 1" in good["curvature"].found
    flat = verdicts(built(lambda x, y: (y.sum() - 3).square() / 2))
    assert flat["curvature"].outcome is Outcome.failed and "no curvature on the support" in flat["curvature"].found
    fixed = verdicts(built(lambda x, y: (y - target).square().sum() / 2, lambda w: Without(L1(w))))
    assert fixed["curvature"].outcome is Outcome.passed and "fixed-point map" in fixed["curvature"].found
