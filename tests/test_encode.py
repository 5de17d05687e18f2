"""A problem whose objectives see z = encode(x) is the problem with encode written into them, only cheaper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from torch import Tensor

from bilevel import AID, ESJ, ITD, BilevelProblem, FiniteDifference, Penalty, Start, certify, hypergradient, minimize
from bilevel.certificates.certificate import Constants
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS

TASKS, N, D = 3, 5, 4
DATA = {"s": normal(TASKS, N, D, seed=1), "t": normal(TASKS, N, seed=2), "q": normal(TASKS, N, D, seed=3)}
ONE = {key: leaf[0] for key, leaf in DATA.items()}
X = {"body": normal(D, 2, seed=4), "scale": torch.tensor(0.7)}
Y0 = torch.zeros(2)
STEPS = Iterate(GradientDescent(0.05), 7)


def encode(x: Any, task: Any) -> Any:
    """Features of a small network, and an entry of x that f needs as it is."""
    return {"s": (task["s"] @ x["body"]).tanh(), "q": (task["q"] @ x["body"]).tanh(), "scale": x["scale"]}


def g(z: Any, y: Tensor, task: Any) -> Tensor:
    value: Tensor = (z["s"] @ y - task["t"]).square().sum() / 2 + y.square().sum() / 4 + y.cosh().sum() / 8
    return value


def f(z: Any, y: Tensor, task: Any) -> Tensor:
    value: Tensor = (z["scale"] * (z["q"] @ y) - task["t"]).square().mean()
    return value


def start(z: Any, task: Any) -> Tensor:
    value: Tensor = z["scale"] * z["s"].mean(0)
    return value


KNOWN = Constants(mu=0.5, L_fyy=10.0, L_fxy=10.0, M_yy=1.0, M_xy=10.0)
ESTIMATORS = {
    "aid-cg": (AID(LBFGS(1e-11), CG(1e-12)), 1e-9),
    "aid-certified": (AID(LBFGS(1e-11), CG(1e-12), target_error=1e-6, constants=KNOWN), 1e-5),
    "itd": (ITD(STEPS), 1e-12),
    "itd-checkpointed": (ITD(STEPS, checkpoint=True), 1e-12),
    "itd-forward": (ITD(STEPS, forward=True), 1e-12),
    "esj": (ESJ(STEPS, directions=3, radius=1e-3), 1e-8),
    "penalty": (Penalty(LBFGS(1e-12), weight=50.0), 1e-8),
    "finite-difference": (FiniteDifference(LBFGS(1e-12)), 1e-6),
}


def written_out(tasks: bool, has_init: bool) -> BilevelProblem:
    return BilevelProblem(
        lambda x, y, d: f(encode(x, d), y, d),
        lambda x, y, d: g(encode(x, d), y, d),
        init=(lambda x, d: start(encode(x, d), d)) if has_init else None,
        tasks=tasks,
    )


def encoded(tasks: bool, has_init: bool, count: list[int] | None = None) -> BilevelProblem:
    def counted(x: Any, task: Any) -> Any:
        if count is not None:
            count.append(1)
        return encode(x, task)

    return BilevelProblem(f, g, encode=counted, init=start if has_init else None, tasks=tasks)


@pytest.mark.parametrize("has_init", [False, True])
@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_encoding_changes_nothing(name: str, tasks: bool, has_init: bool) -> None:
    estimator, rtol = ESTIMATORS[name]
    data = DATA if tasks else ONE
    plain = hypergradient(written_out(tasks, has_init), X, Y0, estimator=estimator, data=data)
    found = hypergradient(encoded(tasks, has_init), X, Y0, estimator=estimator, data=data)
    assert distance(found.grad, plain.grad) <= rtol
    assert found.value == pytest.approx(plain.value, rel=1e-9)
    assert torch.allclose(found.y, plain.y, atol=1e-9)
    assert found.grad["scale"].shape == ()


@pytest.mark.parametrize("name", ["aid-cg", "itd", "itd-checkpointed", "penalty"])
def test_it_is_computed_once(name: str) -> None:
    count: list[int] = []
    problem, estimator = encoded(True, False, count), ESTIMATORS[name][0]
    first = hypergradient(problem, X, Y0, estimator=estimator, data=DATA)  # which looks at f and g besides
    count.clear()
    hypergradient(problem, X, Y0, estimator=estimator, data=DATA, start=first.start)
    assert len(count) == 1


def test_chunks_are_encoded_one_by_one() -> None:
    count: list[int] = []
    estimator = ESTIMATORS["aid-cg"][0]
    whole = hypergradient(encoded(True, False), X, Y0, estimator=estimator, data=DATA)
    later, problem = Start(whole.y, count=1), encoded(True, False, count)
    found = hypergradient(problem, X, Y0, estimator=estimator, data=DATA, chunk_size=2, start=later)
    assert distance(found.grad, whole.grad) <= 1e-9
    assert len(count) == 2


def test_a_closed_form_is_given_the_encoding() -> None:
    problem = BilevelProblem(
        lambda z, y, d: (z - y).square().sum(),
        lambda z, y, d: (y - z.sin()).square().sum() / 2,
        encode=lambda x, d: d["c"] * x.exp(),
        tasks=True,
    )
    data, x = {"c": torch.tensor([0.5, 2.0])}, torch.tensor([0.3, -0.2])
    aid = AID(ClosedForm(lambda z, d: z.sin()), CG(1e-12))
    estimate = hypergradient(problem, x, torch.zeros(2), estimator=aid, data=data)
    leaf = x.clone().requires_grad_()
    z = data["c"].unsqueeze(1) * leaf.exp()
    (expected,) = torch.autograd.grad((z - z.sin()).square().sum(-1).mean(), leaf)
    assert torch.allclose(estimate.grad, expected, atol=1e-13)


def test_a_certificate_is_of_the_error_in_x() -> None:
    """With |dx -> z| = 10 the error in x is ten times that in z."""
    problem = BilevelProblem(
        lambda z, y: y.sum(), lambda z, y: (y - z).square().sum() / 2, encode=lambda x: 10 * x, tasks=False
    )
    x = torch.ones(1)
    estimate = hypergradient(problem, x, torch.zeros(1), estimator=AID(STEPS, CG(rtol=0.0, max_steps=0)))
    constants = Constants(mu=1.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0)
    assert float(estimate.grad) == 0.0
    assert certify(problem, x, estimate, constants).bound == pytest.approx(10.0)


def test_minimize_goes_through_an_encoding() -> None:
    plain = minimize(written_out(True, False), X, Y0, estimator=ESTIMATORS["aid-cg"][0], data=DATA, max_steps=5)
    found = minimize(encoded(True, False), X, Y0, estimator=ESTIMATORS["aid-cg"][0], data=DATA, max_steps=5)
    assert distance(found.x, plain.x) <= 1e-7


def test_an_encoding_that_does_not_take_the_data_is_refused() -> None:
    problem = BilevelProblem(f, g, encode=lambda x: x, tasks=True)
    with pytest.raises(TypeError, match=r"`problem.encode` will be called as encode\(x, data\)"):
        hypergradient(problem, X, Y0, data=DATA)


def test_an_encoding_without_x_gives_zero() -> None:
    problem = BilevelProblem(
        lambda z, y: (z * y).sum(), lambda z, y: (y - z).square().sum(), encode=lambda x: torch.ones(2),
        allow_unused=True,
    )  # fmt: skip
    assert hypergradient(problem, torch.ones(3), torch.zeros(2)).grad.abs().max() == 0
