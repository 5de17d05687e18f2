"""What is refused before any work is done, and in which words; and the ways to state a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bilevel import AID, BilevelError, BilevelProblem, Box, Split, Start, Status, hypergradient
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 3).square().sum() / 2


def g(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum() / 2


PROBLEM = BilevelProblem(f, g)
ONES, ZEROS = torch.ones(2), torch.zeros(2)
PROJECTION = AID(ClosedForm(lambda x, *data: x), CG(rtol=1e-12))


def solve(problem: Any = PROBLEM, x: Any = ONES, y0: Any = ZEROS, estimator: Any = PROJECTION, **more: Any) -> Any:
    return hypergradient(problem, x, y0, estimator=estimator, **more)


# The problem


@pytest.mark.parametrize("name", ["f", "g", "init"])
def test_an_objective_that_is_not_callable_is_refused_by_name(name: str) -> None:
    arguments: dict[str, Any] = {"f": f, "g": g} | {name: 1.0}
    with pytest.raises(TypeError, match=rf"`BilevelProblem\({name}=...\)` must be a callable. Got float"):
        BilevelProblem(**arguments)


def test_an_objective_may_be_any_callable() -> None:
    class Outer:
        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            return f(x, y)

    assert torch.equal(solve(BilevelProblem(Outer(), g)).grad, ONES - 3)
    assert torch.equal(solve(BilevelProblem(lambda *both: f(*both), g)).grad, ONES - 3)


def test_a_subclass_carries_data_and_needs_not_call_the_base_constructor() -> None:
    class Shifted(BilevelProblem):
        def __init__(self, target: float) -> None:
            self.target = target

        def f(self, x: Any, y: Any, *data: Any) -> Tensor:
            return (y - self.target).square().sum() / 2  # type: ignore[no-any-return]

        def g(self, x: Any, y: Any, *data: Any) -> Tensor:
            return g(x, y)

    problem = Shifted(5.0)
    assert (problem.init, problem.tasks) == (None, False)
    assert torch.equal(solve(problem).grad, ONES - 5)
    assert repr(problem) == "Shifted(f, g)"


def test_the_representation_says_what_there_is() -> None:
    assert repr(PROBLEM) == "BilevelProblem(f, g)"
    assert repr(BilevelProblem(f, g, init=lambda x: x, tasks=True)) == "BilevelProblem(f, g, init=..., tasks=True)"


# Its signature


def with_data(x: Tensor, y: Tensor, data: Tensor) -> Tensor:
    return g(x, y)


@pytest.mark.parametrize(
    ("problem", "data", "text"),
    [
        (BilevelProblem(with_data, g), None, r"`problem.f` will be called as f\(x, y\).*Pass `data=...`"),
        (BilevelProblem(f, with_data), None, r"`problem.g` will be called as g\(x, y\).*Pass `data=...`"),
        (BilevelProblem(f, g), ONES, r"`problem.f` will be called as f\(x, y, data\).*def f\(x, y, data\)"),
        (BilevelProblem(with_data, g), ONES, r"`problem.g` will be called as g\(x, y, data\)"),
        (BilevelProblem(f, lambda x: x), None, r"g\(x, y\), which it does not accept.*def g\(x, y\)"),
        (BilevelProblem(f, g, init=lambda: ONES), None, r"`problem.init` will be called as init\(x\).*def init\(x\)"),
    ],
)
def test_an_objective_of_another_signature_is_refused_before_any_work(problem: Any, data: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        solve(problem, data=data)


def test_what_is_no_problem_is_refused() -> None:
    with pytest.raises(
        TypeError,
        match=r"must be a BilevelProblem: write `BilevelProblem\(f, g\)`. Got a func",
    ):
        solve(g)


# What an objective returns


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda y: y, r"must return a scalar tensor. Got shape \(2,\). Reduce it"),
        (lambda y: 1.0, "must return a scalar tensor. Got float"),
        (lambda y: None, "must return a scalar tensor. Got NoneType"),
    ],
)
@pytest.mark.parametrize("level", ["f", "g"])
def test_an_objective_that_returns_no_scalar_is_refused_by_name(
    value: Callable[[Tensor], Any], text: str, level: str
) -> None:
    arguments: dict[str, Any] = {"f": f, "g": g} | {level: lambda x, y: value(y)}
    with pytest.raises(ValueError, match=rf"`problem.{level}` {text}"):
        solve(BilevelProblem(**arguments))


def test_one_entry_of_any_shape_is_a_scalar() -> None:
    problem = BilevelProblem(lambda x, y: f(x, y).reshape(1, 1), lambda x, y: g(x, y).reshape(1))
    assert torch.equal(solve(problem).grad, ONES - 3)


# Data


def test_data_reach_both_levels_and_split_data_each_its_own() -> None:
    problem = BilevelProblem(
        lambda x, y, a: (y - a).square().sum() / 2, lambda x, y, b: b.sum() / 2 * (y - x).square().sum() / 2
    )
    assert torch.equal(solve(problem, data=torch.tensor(4.0)).grad, ONES - 4)
    assert torch.equal(solve(problem, data=Split(f=5.0, g=torch.tensor(2.0))).grad, ONES - 5)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (None, r"\[\]"),
        ({"a": torch.ones(3, 1), "b": torch.ones(4, 1)}, "'3', '4'"),
        ({"a": torch.ones(3, 1), "b": torch.tensor(1.0)}, "'3', 'None'"),
        (Split(f=torch.ones(3), g=torch.ones(2)), "'2', '3'"),
    ],
)
def test_tasks_without_one_leading_axis_in_the_data_are_refused(data: Any, got: str) -> None:
    problem = BilevelProblem(lambda x, y, *d: f(x, y), lambda x, y, *d: g(x, y), tasks=True)
    structure = ravel(ONES)[1]
    with pytest.raises(ValueError, match=rf"one leading axis of tasks. Got leading sizes .*{got}.*torch.stack"):
        FlatProblem(problem, structure, structure, data)


# The arguments of `hypergradient`


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"x": None}, TypeError, "x must be a tensor or a nested dict, list or tuple of tensors. Got NoneType at x"),
        ({"y0": {"a": 0.0}}, TypeError, r"y0 must be a tensor .*Got float at y0\['a'\]"),
        (
            {"x": torch.ones(2, dtype=torch.int64)},
            TypeError,
            "x must hold real floating-point tensors. Got torch.int64",
        ),
        ({"x": ONES.float()}, ValueError, r"`hypergradient\(x, y0\)` need one dtype and device. Got torch.float32 on"),
        ({"x": ONES.to("meta")}, ValueError, "one dtype and device. Got torch.float64 on meta"),
        (
            {"estimator": None},
            TypeError,
            r"\(estimator=...\)` must be an estimator .* or a string. Got NoneType",
        ),
        ({"estimator": "aid-gc"}, ValueError, "there is no estimator 'aid-gc'. Did you mean 'aid-cg'?"),
        ({"estimator": "?"}, ValueError, r"there is no estimator '\?'. Names: implicit, aid-cg, "),
        (
            {"start": ZEROS},
            TypeError,
            r"\(start=...\)` must be a Start.* or None. Got a tensor of float64",
        ),
        ({"start": Start(torch.ones(3))}, ValueError, r"start.y must have the structure \(2,\). Got \(3,\)"),
        ({"start": Start(ZEROS, torch.ones(1))}, ValueError, r"start.v must have the structure \(2,\). Got \(1,\)"),
        ({"start": Start(ZEROS.float())}, ValueError, "start.y must be torch.float64 on cpu. Got torch.float32"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        solve(**arguments)


def test_a_start_that_init_returns_in_another_structure_is_refused() -> None:
    structure = ravel(ONES)[1]
    problem = BilevelProblem(f, g, init=lambda x: {"w": x})
    with pytest.raises(ValueError, match=r"init\(x\) must have the structure \(2,\). Got \{'w': \(2,\)\}"):
        FlatProblem(problem, structure, structure).start(ONES, ZEROS)


def test_implicit_differentiation_refuses_a_problem_that_sees_x_only_through_its_start() -> None:
    problem = BilevelProblem(f, lambda x, y: y.square().sum() / 2, init=lambda x: x)
    with pytest.raises(ValueError, match=r"depends on x only through its start.*Use `ITD` or `ESJ`"):
        solve(problem)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: AID(PROJECTION.inner, CG(), damping=-1.0), r"`AID\(damping=...\)` must be at least 0. Got -1.0"),
        (
            lambda: AID(PROJECTION.inner, CG(), damping=float("nan")),
            r"`AID\(damping=...\)` must be at least 0. Got nan",
        ),
    ],
)
def test_settings_out_of_range_are_refused(build: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()


# Failure


def test_a_failure_raises_with_what_was_computed_or_is_reported() -> None:
    concave = BilevelProblem(f, lambda x, y: -g(x, y))
    with pytest.raises(BilevelError, match="not positive definite") as caught:
        solve(concave)
    assert caught.value.status is Status.negative_curvature
    reported = solve(concave, throw=False)
    assert reported.status is Status.negative_curvature
    assert not reported.status.ok
    assert torch.equal(caught.value.partial.grad, reported.grad)
    assert "linear solver" in reported.message


def test_nan_is_reported_and_not_replaced() -> None:
    found = solve(BilevelProblem(lambda x, y: (x - 2).sum().sqrt() + f(x, y), g), throw=False)
    assert found.status is Status.nonfinite
    assert cast(Tensor, found.grad).isnan().all()
    assert found.value != found.value


class _OnlyMethods(BilevelProblem):
    def f(self, x: Tensor, y: Tensor, *data: Tensor) -> Tensor:
        return (y - 3).square().sum() / 2

    def g(self, x: Tensor, y: Tensor, *data: Tensor) -> Tensor:
        return (y - x).square().sum() / 2


class _WithoutG(BilevelProblem):
    def f(self, x: Tensor, y: Tensor, *data: Tensor) -> Tensor:
        return y.sum()


def test_a_subclass_needs_its_methods_only() -> None:
    x = torch.ones(2)
    assert torch.allclose(hypergradient(_OnlyMethods(), x, torch.zeros(2)).grad, x - 3)


def test_a_subclass_without_an_objective_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"BilevelProblem\(g="):
        _WithoutG()


@pytest.mark.parametrize("level", ["f", "g"])
def test_a_complex_value_is_refused_by_name(level: str) -> None:
    def turned(x: Tensor, y: Tensor) -> Tensor:
        return (y - x).square().sum() * (1 + 1j)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return (y - x).square().sum()

    problem = BilevelProblem(turned, plain) if level == "f" else BilevelProblem(plain, turned)
    with pytest.raises(ValueError, match=rf"`problem.{level}` must return a real number. Got torch.complex"):
        hypergradient(problem, torch.ones(2), torch.zeros(2))


@pytest.mark.parametrize("level", ["f", "g"])
@pytest.mark.parametrize("estimator", ["implicit", "itd", "esj", "finite-difference"])
def test_a_value_on_the_device_meta_is_refused_by_name(level: str, estimator: str) -> None:
    def away(x: Tensor, y: Tensor) -> Tensor:
        return (y - x).square().sum().to("meta")

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return (y - x).square().sum()

    problem = BilevelProblem(away, plain) if level == "f" else BilevelProblem(plain, away)
    with pytest.raises(ValueError, match=rf"`problem.{level}` must return a number. Got a tensor on the device 'meta'"):
        hypergradient(problem, torch.ones(2), torch.zeros(2), estimator=estimator)


def test_bounds_of_shapes_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"`Box\(lower=..., upper=...\)` must be of shapes that fit.*\(4,\)"):
        Box(torch.zeros(3), torch.ones(4))
    assert Box(torch.zeros(3), torch.ones(())).project(2 * torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
