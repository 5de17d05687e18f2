"""What must not change a hypergradient, or change it in a known way, on random quadratic and logistic problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bilevel_strategies import nestings, normal, smooth_problems
from cases import bits, flat, size
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, ESJ, ITD, BilevelProblem, FiniteDifference, Penalty, hypergradient
from bilevel._tree import Structure, ravel, tree_leaves, tree_map
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.gmres import GMRES
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.testing import properties

Case = tuple[BilevelProblem, Tensor, Tensor]

# (estimator for p outer variables and scale c of g, how exact it is); the inner work is the same in every unit of g
ESTIMATORS: dict[str, tuple[Callable[[int, float], Any], float]] = {
    "aid-cg": (lambda p, c: AID(LBFGS(1e-10 * c), CG(rtol=1e-12)), 1e-7),
    "aid-gmres": (lambda p, c: AID(LBFGS(1e-10 * c), GMRES(rtol=1e-12)), 1e-7),
    "aid-dense": (lambda p, c: AID(LBFGS(1e-10 * c), Dense()), 1e-7),
    "itd": (lambda p, c: ITD(Iterate(GradientDescent(), 6)), 1e-8),
    "itd-forward": (lambda p, c: ITD(Iterate(GradientDescent(), 6), forward=True), 1e-8),
    "itd-checkpointed": (lambda p, c: ITD(Iterate(GradientDescent(), 6), checkpoint=True), 1e-8),
    "one-step": (lambda p, c: ITD(Iterate(GradientDescent(), 6), truncate=1), 1e-8),
    "esj": (lambda p, c: ESJ(Iterate(GradientDescent(1e-3 / c), 6), min(p, 3), radius=1e-3), 1e-6),
    "penalty": (lambda p, c: Penalty(LBFGS(1e-11 * c), weight=1e3 / c), 1e-5),
    "finite-difference": (lambda p, c: FiniteDifference(LBFGS(1e-11 * c), step=1e-3), 1e-6),
}
every = pytest.mark.parametrize("name", ESTIMATORS)
few = settings(max_examples=4)


def grad_of(name: str, problem: BilevelProblem, x: Any, y0: Any, c: float = 1.0) -> Any:
    return hypergradient(problem, x, y0, estimator=ESTIMATORS[name][0](size(x), c), throw=False).grad


def check(name: str, got: Any, expected: Any, slack: float = 1.0) -> None:
    got, expected = flat(got), flat(expected)
    bound = slack * ESTIMATORS[name][1] * max(1.0, float(expected.norm()))
    assert float((got - expected).norm()) <= bound


def at(name: str, case: Case) -> tuple[Any, BilevelProblem, Tensor, Tensor]:
    """What a property of the testing kit takes."""
    problem, x, y0 = case
    return ESTIMATORS[name][0](size(x), 1.0), problem, x, y0


@every
@few
@given(st.data(), smooth_problems())
def test_cutting_x_and_y_into_leaves(name: str, data: st.DataObject, case: Case) -> None:
    _, x, y0 = case
    cut_x, cut_y = data.draw(nestings(x.numel())), data.draw(nestings(y0.numel()))
    properties.same_on_leaves(*at(name, case), tol=ESTIMATORS[name][1], cut_x=cut_x, cut_y=cut_y)


@every
@few
@given(st.data(), smooth_problems())
def test_permuting_leaves_permutes_the_gradient(name: str, data: st.DataObject, case: Case) -> None:
    if name == "esj":
        return  # its directions are drawn in the order of the leaves
    _, x, y0 = case
    order, inner_order = data.draw(st.permutations(range(x.numel()))), data.draw(st.permutations(range(y0.numel())))
    properties.permuting_leaves(*at(name, case), tol=ESTIMATORS[name][1], order=order, inner_order=inner_order)


@every
@few
@given(smooth_problems(), st.sampled_from([1e-3, 0.5, 40.0]))
def test_scaling_g(name: str, case: Case, c: float) -> None:
    scaled = ESTIMATORS[name][0](size(case[1]), c)
    properties.scaling_g(*at(name, case), tol=10 * ESTIMATORS[name][1], c=c, scaled=scaled)


@every
@few
@given(smooth_problems())
def test_term_in_x_only_of_g_changes_nothing(name: str, case: Case) -> None:
    # the penalty estimator subtracts two gradients in x, which the term makes larger
    properties.term_in_x_of_g(*at(name, case), tol=10 * ESTIMATORS[name][1])


@every
@few
@given(smooth_problems())
def test_term_in_x_only_of_f_adds_its_gradient(name: str, case: Case) -> None:
    properties.term_in_x_of_f(*at(name, case), tol=10 * ESTIMATORS[name][1])


@every
@few
@given(smooth_problems(), st.floats(-3, 3), st.floats(-3, 3))
def test_linear_in_f(name: str, case: Case, a: float, b: float) -> None:
    if name == "penalty":
        return  # linear in f in the limit of the weight only
    properties.linear_in_f(*at(name, case), tol=10 * ESTIMATORS[name][1], a=a, b=b)


@every
@few
@given(smooth_problems(), st.integers(0, 99))
def test_orthogonal_change_of_y(name: str, case: Case, seed: int) -> None:
    problem, x, y0 = case
    properties.orthogonal_change_of_y(*at(name, (problem, x, y0 + 0.2)), tol=10 * ESTIMATORS[name][1], seed=seed)


@every
@few
@given(smooth_problems(), st.integers(0, 99))
def test_orthogonal_change_of_x_turns_the_gradient(name: str, case: Case, seed: int) -> None:
    if name in ("esj", "finite-difference"):
        return  # their directions do not turn along
    problem, x, y0 = case
    V = torch.linalg.qr(normal(x.numel(), x.numel(), seed=seed))[0]
    turned = BilevelProblem(lambda z, y: problem.f(V @ z, y), lambda z, y: problem.g(V @ z, y))
    check(name, V @ grad_of(name, turned, V.T @ x, y0), grad_of(name, problem, x, y0), slack=10)


@every
@few
@given(smooth_problems())
def test_translation_of_y(name: str, case: Case) -> None:
    problem, x, y0 = case
    t = torch.linspace(-1, 1, y0.numel())
    moved = BilevelProblem(lambda x, y: problem.f(x, y - t), lambda x, y: problem.g(x, y - t))
    check(name, grad_of(name, moved, x, y0 + t), grad_of(name, problem, x, y0), slack=10)


@every
@few
@given(smooth_problems())
def test_variables_that_nothing_sees_have_gradient_zero(name: str, case: Case) -> None:
    problem, x, y0 = case
    wider = BilevelProblem(lambda x, y: problem.f(x["a"], y), lambda x, y: problem.g(x["a"], y))
    found = grad_of(name, wider, {"a": x, "b": torch.ones(2)}, y0)
    if name == "esj":
        return  # zeroth order: its directions are drawn in the larger space
    check(name, found["a"], grad_of(name, problem, x, y0))
    assert float(found["b"].abs().max()) <= 1e-9


@every
@few
@given(st.data(), smooth_problems())
def test_inputs_keep_their_bits(name: str, data: st.DataObject, case: Case) -> None:
    problem, x, y0 = case
    cut = data.draw(nestings(x.numel()))

    def joined(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
        return lambda x, y: function(ravel(x)[0], y)

    nested = tree_map(lambda leaf: leaf.clone().requires_grad_(), cut(x))
    before = bits((nested, y0))
    grad_of(name, BilevelProblem(joined(problem.f), joined(problem.g)), nested, y0)
    assert bits((nested, y0)) == before
    assert all(leaf.grad is None for leaf in tree_leaves(nested))


@every
@few
@given(smooth_problems(), st.integers(0, 9))
def test_warm_start_changes_nothing(name: str, case: Case, seed: int) -> None:
    if name.startswith(("itd", "one-step", "esj")):
        return  # a fixed number of steps from another start is another point
    problem, x, y0 = case
    estimator = ESTIMATORS[name][0](x.numel(), 1.0)
    near = x + 0.1 * normal(x.numel(), seed=seed)
    start = hypergradient(problem, near, y0, estimator=estimator, throw=False).start
    warm = hypergradient(problem, x, y0, estimator=estimator, start=start, throw=False)
    check(name, warm.grad, grad_of(name, problem, x, y0), slack=20)


@pytest.mark.parametrize("name", ["aid-cg", "aid-gmres", "aid-dense", "itd", "itd-forward", "one-step"])
@few
@given(smooth_problems())
def test_float32_is_close_to_float64(name: str, case: Case) -> None:
    problem, x, y0 = case

    def cast(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: function(x.double(), y.double()).float()

    tolerances = {"aid-cg": CG(1e-5), "aid-gmres": GMRES(1e-5), "aid-dense": Dense()}
    double = grad_of(name, problem, x, y0)
    hessian: Any = torch.autograd.functional.hessian(lambda y: problem.g(x, y), y0)  # type: ignore[no-untyped-call]
    scale = float(hessian.norm())
    if name in tolerances:
        estimator: Any = AID(LBFGS(1e-5 * max(scale, 1e-2)), tolerances[name])
    else:
        estimator = ESTIMATORS[name][0](x.numel(), 1.0)
    single = hypergradient(
        BilevelProblem(cast(problem.f), cast(problem.g)), x.float(), y0.float(), estimator=estimator, throw=False
    )
    assert single.grad.dtype == torch.float32
    assert float((single.grad.double() - double).norm()) <= 3e-3 * max(1.0, float(double.norm()))


def test_strategy_of_nestings_covers_the_vector() -> None:
    @given(st.data(), st.integers(1, 6))
    def inner(data: st.DataObject, n: int) -> None:
        vector = torch.arange(float(n))
        tree = data.draw(nestings(n))(vector)
        found, structure = ravel(tree)
        assert sorted(found.tolist()) == vector.tolist()
        assert isinstance(structure, Structure)

    inner()
