"""Arguments of a wrong type are refused where they are given, by a text that says what to write."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

import bilevel.hypergrad
import bilevel.hypergrad.unrolling
import bilevel.solvers
from bilevel import AID, ESJ, ITD, Box, CompiledITD, FiniteDifference, Penalty
from bilevel._estimate import AbstractEstimator
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver, AbstractPreconditioner
from bilevel._optimizer import AbstractOptimizer, AbstractOuterDriver
from bilevel._validate import demand_type
from bilevel.arguments.checked import checked
from bilevel.federated import Clients
from bilevel.hypergrad.unrolling.form import AbstractUnrolling
from bilevel.problems import mislabelled_tasks, task_weights
from bilevel.problems.glm import GeneralizedLinearModel, declare
from bilevel.solvers import (
    CG,
    LBFGS,
    Adam,
    ClosedForm,
    GradientDescent,
    HeavyBall,
    Iterate,
    Jacobi,
    Nesterov,
    Neumann,
    Newton,
    Scipy,
    ScipyMinimize,
)
from bilevel.solvers.nystrom import NystromPreconditioner
from bilevel.tasks import Sinusoid
from bilevel.testing.properties import same_on_leaves

KINDS = (
    AbstractEstimator,
    AbstractInnerSolver,
    AbstractLinearSolver,
    AbstractPreconditioner,
    AbstractOptimizer,
    AbstractOuterDriver,
    AbstractUnrolling,
)
VALID: dict[str, Any] = {"inner": LBFGS(), "linear": CG(), "optimizer": Adam(0.1), "max_steps": 3, "step": 0.1}
VALID |= {
    "terms": 3,
    "steps": 3,
    "solution": lambda x: x,
    "rank": 2,
    "schedule": lambda step: 1.0,
    "estimator": AID(LBFGS(), CG()),
    "first": AID(LBFGS(), CG()),
    "then": AID(LBFGS(), CG()),
    "factory": lambda params: None,
    "decay": 0.1,
}


def configured() -> Iterator[tuple[Any, str]]:
    """Every solver and estimator with each of its arguments."""
    for package in (bilevel.solvers, bilevel.hypergrad, bilevel.hypergrad.unrolling):
        for module in pkgutil.iter_modules(package.__path__):
            cls: Any
            for cls in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
                own = inspect.isclass(cls) and cls.__module__ == f"{package.__name__}.{module.name}"
                if own and issubclass(cls, KINDS) and "__dataclass_fields__" in vars(cls):
                    yield from ((cls, name) for name in inspect.signature(cls).parameters)


@pytest.mark.parametrize(("cls", "name"), [pytest.param(*c, id=f"{c[0].__name__}.{c[1]}") for c in configured()])
def test_an_argument_of_no_known_type_is_refused_by_name(cls: Any, name: str) -> None:
    required = [n for n, p in inspect.signature(cls).parameters.items() if p.default is inspect.Parameter.empty]
    unrolled = {"inner": Iterate(Adam(0.1), 3)} if cls in (ITD, CompiledITD) else {}
    given: Any = {n: VALID[n] for n in required} | unrolled
    with pytest.raises(TypeError, match=rf"^`{cls.__name__}\({name}=\.\.\.\)` must be .*\. Got object\."):
        cls(**{**given, name: object()})


LOOSE: Any = lambda kind: kind  # noqa: E731  (what a type checker would refuse is what is tried)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: AID(LOOSE("lbfgs"), CG()),
            "`AID(inner=...)` must be an inner solver such as `LBFGS()`. Got 'lbfgs' (str).",
        ),
        (
            lambda: AID(LOOSE(CG()), LOOSE(LBFGS())),
            "`AID(inner=...)` must be an inner solver such as `LBFGS()`. Got CG. Write `AID(linear=...)`.",
        ),
        (
            lambda: AID(LBFGS(), LOOSE(CG)),
            "`AID(linear=...)` must be a linear solver such as `CG()`. Got the class CG itself: write `CG(...)`.",
        ),
        (lambda: AID(LBFGS(), CG(), damping=LOOSE("a")), "`AID(damping=...)` must be a number. Got 'a' (str)."),
        (
            lambda: CG(preconditioner=LOOSE(3)),
            "`CG(preconditioner=...)` must be a preconditioner such as `Jacobi()` or None. Got 3 (int).",
        ),
        (lambda: CG(rtol=LOOSE("x")), "`CG(rtol=...)` must be a number. Got 'x' (str)."),
        (lambda: CG(max_steps=LOOSE(2.5)), "`CG(max_steps=...)` must be an integer or None. Got 2.5 (float)."),
        (lambda: CG(rtol=LOOSE(True)), "`CG(rtol=...)` must be a number. Got True (bool)."),
        (lambda: Scipy(bounds=LOOSE((0.0, 1.0, 2.0))), "`Scipy(bounds=...)` must be a pair (lower, upper)"),
        (lambda: Scipy(bounds=LOOSE(("a", 1.0))), "`Scipy(bounds=...)` must be a pair (lower, upper)"),
        (lambda: CG(recompute=LOOSE(1)), "`CG(recompute=...)` must be True or False. Got 1 (int)."),
        (
            lambda: ITD(Iterate(LOOSE(LBFGS()), 3)),
            "`Iterate(optimizer=...)` must be an optimizer such as `GradientDescent(0.1)`. Got LBFGS.",
        ),
        (
            lambda: Iterate(LOOSE(GradientDescent), 3),
            "`Iterate(optimizer=...)` must be an optimizer such as `GradientDescent(0.1)`."
            " Got the class GradientDescent itself: write `GradientDescent(...)`.",
        ),
        (
            lambda: Iterate(GradientDescent(0.1), LOOSE(2.5)),
            "`Iterate(max_steps=...)` must be an integer. Got 2.5 (float).",
        ),
        (lambda: Iterate(GradientDescent(0.1), max_steps=LOOSE(True)), "must be an integer. Got True (bool)."),
        (lambda: ClosedForm(LOOSE(3)), "`ClosedForm(solution=...)` must be a function x -> y. Got 3 (int)."),
        (
            lambda: Scipy(bounds=LOOSE(Box(0.0, 1.0))),
            "`Scipy(bounds=...)` must be a pair (lower, upper) of numbers, flat tensors or None. Got Box.",
        ),
        (
            lambda: GradientDescent(LOOSE("a")),
            "`GradientDescent(step=...)` must be a number or a tensor or a function of 1 argument or a function of 2"
            " arguments or None. Got 'a' (str).",
        ),
        (lambda: Newton(linear=LOOSE(LBFGS())), "`Newton(linear=...)` must be a linear solver such as `CG()` or None."),
        (lambda: ESJ(LBFGS(), seed=LOOSE(torch.Generator())), "`ESJ(seed=...)` must be an integer. Got Generator."),
        (lambda: ITD(LOOSE(LBFGS)), "`ITD(inner=...)` must be an iteration of differentiable steps."),
    ],
)
def test_the_text_says_what_is_required_and_what_arrived(build: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        build()


def test_numbers_of_numpy_and_tensors_without_axes_are_numbers() -> None:
    """Those of Python, from then on; a tensor of a fraction is no count, and one with a gradient no number."""
    solver = LBFGS(tol=float(np.float64(1e-8)), max_steps=LOOSE(np.int64(5)))
    assert Iterate(GradientDescent(torch.tensor(0.1)), LOOSE(np.int64(3)), tol=LOOSE(np.float32(0.5))).max_steps == 3
    assert CG(atol=1).atol == 1
    assert Penalty(solver, weight=10).weight == 10
    counted = Iterate(GradientDescent(0.1), LOOSE(torch.tensor(3)), tol=LOOSE(torch.tensor(0.5)))
    assert (type(counted.max_steps), type(counted.tol)) == (int, float)
    with pytest.raises(TypeError, match=r"max_steps=...\)` must be an integer. Got a tensor of float64 \(\)"):
        Iterate(GradientDescent(0.1), LOOSE(torch.tensor(3.0)))
    with pytest.raises(TypeError, match=r"rtol=...\)` must be a number. Got a tensor .* requires a gradient: write"):
        CG(rtol=LOOSE(torch.tensor(0.5, requires_grad=True)))


def test_what_fits_is_taken() -> None:
    jacobi = Jacobi(diagonal=lambda: torch.ones(2))
    assert CG(preconditioner=jacobi).preconditioner is jacobi
    assert Jacobi(torch.ones(2)).diagonal is not None
    assert CG(preconditioner=NystromPreconditioner(rank=2)).preconditioner is not None
    assert FiniteDifference(Scipy(bounds=(None, torch.ones(2)))).step is None
    assert (HeavyBall().momentum, Nesterov().momentum, Neumann(None, 3).step) == (0.9, None, None)
    assert ScipyMinimize(options={"disp": False}).options == {"disp": False}


def test_every_annotation_of_an_argument_can_be_looked_up() -> None:
    for cls in {cls for cls, _ in configured()}:
        assert typing.get_type_hints(cls).keys() >= {field.name for field in dataclasses.fields(LOOSE(cls))}


def test_one_argument_of_a_call_is_refused_alike() -> None:
    demand_type("minimize", "callback", print, Callable[..., Any] | None)
    with pytest.raises(TypeError, match=r"^`minimize\(callback=...\)` must be a function or None. Got 3 \(int\).$"):
        demand_type("minimize", "callback", 3, Callable[..., Any] | None)


NOTHING = torch.ones(2, device="meta")
QUADRATIC = bilevel.BilevelProblem(lambda x, y: (x * y).sum(), lambda x, y: ((y - x) ** 2).sum())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: bilevel.influence(lambda y, b: (y - b) ** 2, NOTHING, torch.ones(3), torch.ones(2)),
            "influence(params",
        ),
        (lambda: task_weights(torch.nn.Linear(1, 1), mse_loss, {}, Sinusoid().sample(3, 0)), "task_weights(tasks"),
        (
            lambda: task_weights(
                torch.nn.Linear(1, 1), mse_loss, Sinusoid().sample(3, 0), {"support_x": torch.ones(2)}
            ),
            "task_weights(validation",
        ),
        (lambda: GeneralizedLinearModel(torch.ones(2, 2), torch.ones(2), penalty=float("nan")), "(penalty"),
        (lambda: GeneralizedLinearModel(torch.ones(2, 2), torch.ones(2), weights=NOTHING), "(weights"),
        (lambda: declare(LOOSE(None), LOOSE(None), torch.tensor([float("nan")]), torch.ones(2)), "declare"),
        (lambda: Clients(QUADRATIC, torch.ones(1), torch.ones(1), NOTHING), "(data"),
        (
            lambda: same_on_leaves(AID(LBFGS(), CG()), LOOSE(QUADRATIC), torch.ones(2), torch.tensor(1.0)),
            "same_on_leaves",
        ),
        (lambda: mislabelled_tasks(way=1), "mislabelled_tasks(way"),
    ],
)
def test_what_holds_nothing_or_no_numbers_is_refused_by_name(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        call()


def test_a_call_is_named_where_another_word_contains_its_name() -> None:
    @checked()
    def train(constraint: int) -> None:
        raise ValueError("`minimize(constraint=...)` failed.")

    with pytest.raises(ValueError, match="minimize") as caught:
        train(1)
    assert caught.value.__notes__ == ["In `train(constraint=...)`."]
