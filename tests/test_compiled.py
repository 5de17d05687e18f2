"""Compiled programs give the numbers of those who are not compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from torch import Tensor

from bilevel import AID, ITD, BilevelProblem, CompiledITD, CompiledProducts, Polytope, Split, Start, hypergradient
from bilevel._flat import FlatProblem
from bilevel._result import Status
from bilevel._tree import ravel
from bilevel.solvers.adam import Adam
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS

TASKS, N = 3, 4
DATA = {"X": normal(TASKS, N, 2, seed=1), "t": normal(TASKS, N, seed=2), "label": 2}
X = {"w": normal(2, seed=3), "s": torch.tensor(0.4)}


def g(x: Any, y: Any, task: Any) -> Tensor:
    value: Tensor = (task["X"] @ y["w"] * task["label"] - task["t"]).sin().square().sum() + (x["s"] * y["s"] - 1) ** 2
    return value


def f(x: Any, y: Any, task: Any) -> Tensor:
    value: Tensor = (task["X"] @ y["w"] - task["t"]).cosh().mean() + y["s"] * x["w"].square().sum()
    return value


def problem(tasks: bool = True, has_init: bool = True, encoded: bool = False) -> BilevelProblem:
    encode = (lambda x, _: {"w": x["w"].exp(), "s": x["s"]}) if encoded else None
    return BilevelProblem(f, g, init=(lambda x, _: x) if has_init else None, encode=encode, tasks=tasks)


def one(tree: Any) -> Any:
    return {key: leaf[0] if isinstance(leaf, Tensor) else leaf for key, leaf in tree.items()}


@pytest.mark.parametrize("optimizer", [GradientDescent(0.1), HeavyBall(0.1, 0.5), Adam(0.1)])
@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("has_init", [False, True])
def test_it_is_itd(optimizer: Any, tasks: bool, has_init: bool) -> None:
    itd = ITD(Iterate(optimizer, max_steps=3))
    data, of = DATA if tasks else one(DATA), problem(tasks, has_init)
    expected = hypergradient(of, X, X, estimator=itd, data=data)
    found = hypergradient(of, X, X, estimator=CompiledITD(itd.inner, backend="eager"), data=data)
    assert distance(found.grad, expected.grad) <= 1e-13
    assert found.value == pytest.approx(expected.value, rel=1e-13)
    assert distance(found.y, expected.y) <= 1e-13
    if has_init:
        assert found.stats == expected.stats
        assert found.reports[0].residual == pytest.approx(expected.reports[0].residual)
    assert found.status is Status.successful


def test_through_an_encoding() -> None:
    itd = ITD(Iterate(GradientDescent(0.1), max_steps=3))
    expected = hypergradient(problem(encoded=True), X, X, estimator=itd, data=DATA)
    found = hypergradient(problem(encoded=True), X, X, estimator=CompiledITD(itd.inner, backend="eager"), data=DATA)
    assert distance(found.grad, expected.grad) <= 1e-13


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about itself
def test_by_the_compiler_itself() -> None:
    itd = ITD(Iterate(GradientDescent(0.1), max_steps=2))
    compiled, of = CompiledITD(itd.inner), problem()
    for seed in (0, 1):  # the second time with other numbers, by the same program
        data = {**DATA, "t": normal(TASKS, N, seed=seed)}
        expected = hypergradient(of, X, X, estimator=itd, data=data)
        found = hypergradient(of, X, X, estimator=compiled, data=data)
        assert distance(found.grad, expected.grad) <= 1e-12
        assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert len(compiled._programs) == 1


def test_other_shapes_are_another_program() -> None:
    itd = ITD(Iterate(GradientDescent(0.1), max_steps=2))
    compiled, of = CompiledITD(itd.inner, backend="eager"), problem()
    fewer = {key: leaf[:2] if isinstance(leaf, Tensor) else leaf for key, leaf in DATA.items()}
    for data in (DATA, fewer):
        expected = hypergradient(of, X, X, estimator=itd, data=data)
        assert distance(hypergradient(of, X, X, estimator=compiled, data=data).grad, expected.grad) <= 1e-13
    assert len(compiled._programs) == 2


def test_other_constants_and_other_nestings_of_the_same_shapes_are_other_programs() -> None:
    itd = ITD(Iterate(GradientDescent(0.1), max_steps=2))
    compiled, of = CompiledITD(itd.inner, backend="eager"), problem()
    swapped = {"t": DATA["t"], "X": DATA["X"], "label": 2}  # the same leaves in another order
    for data in (DATA, {**DATA, "label": 3}, {**DATA, "label": 3.5}, swapped):
        expected = hypergradient(of, X, X, estimator=itd, data=data)
        assert distance(hypergradient(of, X, X, estimator=compiled, data=data).grad, expected.grad) <= 1e-13
    sums = BilevelProblem(
        lambda x, y: (y * x["a"].sum()).square().sum(), lambda x, y: (y - x["b"].sum()).square().sum() / 2
    )
    for sizes in ((1, 3), (3, 1)):
        x, y = {"a": torch.ones(sizes[0]), "b": torch.full((sizes[1],), 2.0)}, torch.ones(2)
        expected = hypergradient(sums, x, y, estimator=itd)
        assert distance(hypergradient(sums, x, y, estimator=compiled).grad, expected.grad) <= 1e-6


def test_data_that_are_one_tensor_at_first_are_two_later() -> None:
    """Tracing would make one input of them."""
    of = BilevelProblem(
        lambda x, y, d: ((y - d["a"]) * d["b"]).square().sum(), lambda x, y, d: (y - x * d["b"]).square().sum() / 2
    )
    same, itd = torch.ones(2, dtype=torch.float64), ITD(Iterate(GradientDescent(0.5), max_steps=2))
    compiled = CompiledITD(itd.inner, backend="eager")
    for data in ({"a": same, "b": same}, {"a": 5 * same, "b": 2 * same}):
        expected = hypergradient(of, 3 * same, same, estimator=itd, data=data)
        assert float(expected.grad.abs().min()) > 0.1
        assert distance(hypergradient(of, 3 * same, same, estimator=compiled, data=data).grad, expected.grad) <= 1e-13


def test_what_is_not_finite_is_reported_for_its_task() -> None:
    targets = normal(TASKS, N, seed=2)
    targets[1] = torch.nan
    data = {**DATA, "t": targets}
    found = hypergradient(
        problem(),
        X,
        X,
        estimator=CompiledITD(Iterate(GradientDescent(0.1), 2), backend="eager"),
        data=data,
        throw=False,
    )
    assert [status.ok for status in found.reports[0].statuses] == [True, False, True]
    assert found.status is Status.nonfinite


def test_a_number_of_steps_that_depends_on_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a fixed number of steps"):
        CompiledITD(Iterate(GradientDescent(0.1), 5, tol=1e-3))


def test_an_open_step_length_is_refused() -> None:
    compiled = CompiledITD(Iterate(GradientDescent(), 5), backend="eager")
    with pytest.raises(ValueError, match="needs a step length"):
        hypergradient(problem(), X, X, estimator=compiled, data=DATA)


def test_what_cannot_be_unrolled_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be an iteration of differentiable steps\. Got LBFGS"):
        CompiledITD(LBFGS())


def proximal(x: Any, y: Any, task: Any) -> Tensor:
    value: Tensor = g(x, y, task) + 4 * sum((y[key] - x[key]).square().sum() for key in x)
    return value


AT = Iterate(GradientDescent(0.05), max_steps=30)


@pytest.mark.parametrize("inner", [AT, Iterate(GradientDescent(), 10), LBFGS(1e-10)])
@pytest.mark.parametrize("linear", [CG(1e-8), CG(0.0, max_steps=3, recompute=False)])
@pytest.mark.parametrize("tasks", [False, True])
def test_compiled_products_are_the_exact_ones(inner: Any, linear: Any, tasks: bool) -> None:
    of, data = BilevelProblem(f, proximal, init=lambda x, _: x, tasks=tasks), DATA if tasks else one(DATA)
    compiled = AID(inner, linear, products=CompiledProducts(backend="eager"))
    expected = hypergradient(of, X, X, estimator=AID(inner, linear), data=data)
    found = hypergradient(of, X, X, estimator=compiled, data=data)
    assert distance(found.grad, expected.grad) <= 1e-12
    assert distance(found.y, expected.y) <= 1e-12
    assert found.stats == expected.stats
    assert found.status is Status.successful


def test_compiled_products_through_an_encoding() -> None:
    of = BilevelProblem(f, proximal, encode=lambda x, _: {"w": x["w"].exp(), "s": x["s"]}, tasks=True)
    expected = hypergradient(of, X, X, estimator=AID(AT, CG(1e-8)), data=DATA)
    compiled = AID(AT, CG(1e-8), products=CompiledProducts(backend="eager"))
    assert distance(hypergradient(of, X, X, estimator=compiled, data=DATA).grad, expected.grad) <= 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about itself
def test_products_by_the_compiler_itself() -> None:
    of, products = BilevelProblem(f, proximal, tasks=True), CompiledProducts()
    for seed in (0, 1):  # the second time with other numbers, by the same programs
        data = {**DATA, "t": 0.3 * normal(TASKS, N, seed=seed)}
        expected = hypergradient(of, X, X, estimator=AID(AT, CG(1e-8)), data=data)
        found = hypergradient(of, X, X, estimator=AID(AT, CG(1e-8), products=products), data=data)
        assert distance(found.grad, expected.grad) <= 1e-11
    assert len(products._programs) == 2  # a gradient; and one with what is kept of it, H v, and H v with G v


def test_compiled_products_of_what_does_not_depend_on_x() -> None:
    """The implicit function theorem sees nothing; and a g that is linear in y has no Hessian."""
    aid = AID(AT, CG(1e-8), products=CompiledProducts(backend="eager"))
    adapted = BilevelProblem(f, lambda x, y, task: y["w"].square().sum(), init=lambda x, _: x, tasks=True)
    with pytest.raises(ValueError, match="depends on x only through its start"):
        hypergradient(adapted, X, X, estimator=aid, data=DATA)
    linear = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (x * y).sum())
    structure = ravel(torch.ones(2))[1]
    flat = FlatProblem(linear, structure, structure)
    at = CompiledProducts(backend="eager").linearize(flat, torch.ones(2), torch.ones(2))
    hv, gv = at.products(torch.tensor([1.0, 2.0]))
    assert hv.tolist() == [0.0, 0.0]
    assert gv is not None
    assert gv.tolist() == [1.0, 2.0]


def test_data_of_two_levels_cannot_be_compiled() -> None:
    aid = AID(AT, CG(1e-8), products=CompiledProducts(backend="eager"))
    for estimator in (aid, CompiledITD(AT, backend="eager")):
        with pytest.raises(ValueError, match="needs one batch of data for f and g"):
            hypergradient(problem(), X, X, estimator=estimator, data=Split(f=DATA, g=DATA))


def test_a_second_estimate_calls_no_function_of_the_user_but_f() -> None:
    """Gradients and products come from the programs that the first one made."""
    calls = 0

    def counted(x: Any, y: Any, task: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return proximal(x, y, task)

    of, aid = BilevelProblem(f, counted, tasks=True), AID(AT, CG(1e-8), products=CompiledProducts(backend="eager"))
    first = hypergradient(of, X, X, estimator=aid, data=DATA)
    calls = 0
    later = Start({name: torch.stack([leaf] * 3) for name, leaf in X.items()}, count=1)  # the first looks at g besides
    second = hypergradient(of, X, X, estimator=aid, data=DATA, start=later)
    assert calls == 0
    assert distance(second.grad, first.grad) == 0


def test_two_problems_of_equal_shapes_are_two_programs() -> None:
    compiled = CompiledITD(AT, backend="eager")
    for scale in (1.0, 2.0):
        of = BilevelProblem(lambda x, y, s=scale: s * y.square().sum(), lambda x, y: (y - x).square().sum() / 2)
        found = hypergradient(of, torch.ones(2), torch.zeros(2), estimator=compiled)
        expected = hypergradient(of, torch.ones(2), torch.zeros(2), estimator=ITD(AT))
        assert distance(found.grad, expected.grad) <= 1e-13


def test_constraints_are_refused_and_an_outer_objective_without_a_graph_is_not() -> None:
    compiled, g = CompiledITD(AT, backend="eager"), lambda x, y: (y - x).square().sum() / 2
    bounded = BilevelProblem(lambda x, y: y.sum(), g, constraints=lambda x: Polytope(lower=-0.5))
    with pytest.raises(ValueError, match="`CompiledITD` does not apply: y is constrained"):
        hypergradient(bounded, torch.ones(2), torch.zeros(2), estimator=compiled)
    constant = BilevelProblem(lambda x, y: torch.tensor(1.0), g)
    assert hypergradient(constant, torch.ones(2), torch.zeros(2), estimator=compiled).grad.tolist() == [0.0, 0.0]
