"""Federated methods as algorithms of `minimize`, meta-learning on devices, and the experiments over clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from torch import Tensor
from torch.nn.functional import mse_loss

from bilevel import AID, BilevelProblem, Split, hypergradient, minimize
from bilevel.cli import main
from bilevel.federated import (
    AggITD,
    Clients,
    FederatedMAML,
    FederatedSOBA,
    FedNest,
    OverClients,
    Participation,
    federate,
)
from bilevel.few_shot import mlp
from bilevel.modules.functional import functional
from bilevel.problems import federated_cleaning, federated_maml, federated_representation, hyper_cleaning, maml
from bilevel.problems.networks._on_clients import mean_over
from bilevel.solvers import CG, GradientDescent, Iterate
from bilevel.tasks import Sinusoid

Z, B = normal(6, 8, 3, seed=1), normal(6, 8, seed=2)


def _loss(y: Tensor, own: Any) -> Tensor:
    value: Tensor = (own[0] @ y - own[1]).square().mean() / 2
    return value


ONE = BilevelProblem(
    lambda x, y, own: _loss(y, own), lambda x, y, own: _loss(y, own) + (x.exp() * y.square()).sum() / 2
)
DATA = Split(f=(Z[:, :3], B[:, :3]), g=(Z[:, 3:], B[:, 3:]))
ZERO = torch.zeros(3, dtype=torch.float64)
HALF = Participation(share=0.5, dropout=0.2, late=0.1, seed=3)
METHODS = [FederatedSOBA(0.2, 0.05), FederatedSOBA(0.2, 0.05, local_steps=3), AggITD(0.2, 0.05, 4), FedNest(0.2, 0.05)]


@pytest.mark.parametrize("method", METHODS)
def test_steps_in_a_run_are_those_of_federate_with_the_same_rounds(method: Any) -> None:
    clients = Clients(ONE, ZERO, ZERO, DATA)
    own = federate(clients, ZERO, ZERO, method=method, steps=5, participation=HALF)
    found = minimize(mean_over(ONE, DATA), ZERO, ZERO, algorithm=OverClients(clients, method, HALF), max_steps=5)
    assert torch.equal(found.x, own.x)
    value = float(mean_over(ONE, DATA).f(*_after(clients, method, 2)))
    assert found.history[2].value == pytest.approx(value, rel=1e-12)


def _after(clients: Clients, method: Any, steps: int) -> tuple[Any, Any]:
    found = federate(clients, ZERO, ZERO, method=method, steps=steps, participation=HALF)
    return found.x, found.y


def test_a_resumed_run_has_the_rounds_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    clients, file = Clients(ONE, ZERO, ZERO, DATA), tmp_path / "state.pt"
    algorithm, problem = OverClients(clients, METHODS[0], HALF), mean_over(ONE, DATA)
    whole = minimize(problem, ZERO, ZERO, algorithm=algorithm, max_steps=9)
    minimize(problem, ZERO, ZERO, algorithm=algorithm, max_steps=4, checkpoint=file)
    found = minimize(problem, ZERO, ZERO, algorithm=algorithm, max_steps=9, checkpoint=file, resume=True)
    assert torch.equal(found.x, whole.x)
    assert found.estimate.note == whole.estimate.note


def test_a_tolerance_is_met_at_the_solution_and_not_at_a_start_with_no_linear_iterate() -> None:
    a = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    one = BilevelProblem(lambda x, y, a: (y - a).square() / 2, lambda x, y, a: (y - a * x).square() / 2)
    every = BilevelProblem(lambda x, y: one.f(x, y, a).mean(), lambda x, y: one.g(x, y, a).mean())
    zero = torch.zeros((), dtype=torch.float64)
    algorithm = OverClients(Clients(one, zero, zero, a), FederatedSOBA(0.5, 0.02))
    found = minimize(every, zero, zero, algorithm=algorithm, max_steps=2000, tol=1e-9)  # h is zero at the start
    assert len(found.history) > 100
    assert float(found.x) == pytest.approx(1.0, abs=1e-8)  # y*(x) = 3 x


@pytest.mark.parametrize(
    ("method", "who"), [(METHODS[0], HALF), (AggITD(0.2, 0.05, 4, derandomized=False), Participation())]
)
def test_a_tolerance_is_refused_where_luck_could_meet_it(method: Any, who: Participation) -> None:
    algorithm = OverClients(Clients(ONE, ZERO, ZERO, DATA), method, who)
    with pytest.raises(ValueError, match="`OverClients` asks only some in a step"):
        minimize(mean_over(ONE, DATA), ZERO, ZERO, algorithm=algorithm, max_steps=5, tol=1.0)


@pytest.mark.parametrize("first_order", [False, True])
def test_a_round_of_maml_on_devices_is_a_step_along_the_gradient_of_maml_on_their_tasks(first_order: bool) -> None:
    tasks = {name: part.double() for name, part in Sinusoid(3, 4).sample(5, seed=0).items()}
    net = functional(mlp([1, 4, 1]).double())
    own = maml(net, mse_loss, step=0.1, first_order=first_order)
    exact = hypergradient(own.problem, own.x0, own.y0, data=tasks, estimator=own.estimator)
    problem = BilevelProblem(*[lambda x, y, data: mse_loss(net(y, data[0]), data[1])] * 2)
    data = Split(f=(tasks["query_x"], tasks["query_y"]), g=(tasks["support_x"], tasks["support_y"]))
    clients = Clients(problem, own.x0, own.x0, data)
    found = federate(clients, own.x0, own.x0, method=FederatedMAML(0.1, 0.5, first_order), steps=1)
    moved = {name: (own.x0[name] - found.x[name]) / 0.5 for name in own.x0}
    assert all(distance(moved[name], exact.grad[name]) <= 1e-10 for name in moved)
    assert all(torch.equal(found.x[name], found.y[name]) for name in found.x)
    assert found.traffic.rounds == 1
    assert found.traffic.up == 5 * 8 * sum(leaf.numel() for leaf in own.x0.values())


def test_maml_on_devices_refuses_a_start_of_y_that_is_none_of_x() -> None:
    clients = Clients(ONE, torch.zeros(2, dtype=torch.float64), ZERO, DATA)
    with pytest.raises(ValueError, match=r"y0 must have as many entries as x0. Got 3 and 2"):
        federate(clients, torch.zeros(2, dtype=torch.float64), ZERO, method=FederatedMAML(0.1, 0.1), steps=1)


def test_the_problem_of_all_devices_has_the_gradient_of_their_mean() -> None:
    made = federated_maml(devices=4, width=3, share=1.0, dropout=0.0, outer_step=1.0)
    x0 = {name: leaf.double() for name, leaf in made.x0.items()}
    solution = minimize(made.problem, made.x0, made.y0, **{**made.settings, "max_steps": 1})
    moved = {name: made.x0[name] - solution.x[name] for name in x0}
    inner = Iterate(GradientDescent(1.0), 1)  # g = |y - x|^2 / 2
    exact = hypergradient(made.problem, made.x0, made.y0, estimator=AID(inner, CG(rtol=1e-6)))
    assert all(float((moved[k] - exact.grad[k]).norm()) <= 1e-4 * float(exact.grad[k].norm() + 1) for k in moved)


def test_cleaning_over_clients_has_the_objectives_of_cleaning(samples: tuple[Tensor, Tensor]) -> None:
    given: dict[str, Any] = {"n_train": 40, "n_val": 30, "data": samples, "seed": 2}
    own, over = hyper_cleaning(**given), federated_cleaning(clients=4, **given)
    x, y = normal(40, seed=5), normal(*own.y0.shape, seed=6)
    assert float(over.problem.f(x, y)) == pytest.approx(float(own.problem.f(x, y)), rel=1e-12)
    assert float(over.problem.g(x, y)) == pytest.approx(float(own.problem.g(x, y)), rel=1e-12)
    gradients = [hypergradient(each.problem, x, y, estimator="aid-cg").grad for each in (own, over)]
    assert distance(*gradients) <= 1e-8


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    """Three classes far apart."""
    labels = torch.arange(120) % 3
    return normal(120, 2, seed=7) * 0.3 + torch.stack([labels.cos(), labels.sin()], 1), labels


def test_wrong_labels_of_clients_get_lower_weights(samples: tuple[Tensor, Tensor]) -> None:
    made = federated_cleaning(clients=4, n_train=60, n_val=40, data=samples, max_steps=150)
    found = minimize(made.problem, made.x0, made.y0, **made.settings)
    assert made.metrics is not None
    assert made.metrics(found.x, found.y)["auc"] > 0.9


def test_a_representation_of_clients_is_better_than_that_at_random(samples: tuple[Tensor, Tensor]) -> None:
    made = federated_representation(clients=3, width=2, n_train=40, n_val=40, data=samples, max_steps=150, seed=1)
    found = minimize(made.problem, made.x0, made.y0, **made.settings)
    assert found.history[-1].value < 0.5 * found.history[0].value
    assert made.metrics is not None
    assert made.metrics(found.x, found.y)["test_accuracy_learned"] > 0.6


def test_devices_adapt_better_from_what_was_learned() -> None:
    made = federated_maml(devices=40, share=0.2, width=16, max_steps=150)
    found = minimize(made.problem, made.x0, made.y0, **made.settings)
    assert made.metrics is not None
    metrics = made.metrics(found.x, found.y)
    assert metrics["mse_adapted"] < 0.8 * metrics["mse_adapted_start"]


@pytest.mark.parametrize("name", ["federated-cleaning", "federated-representation", "federated-maml"])
def test_each_runs_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(["run", name, "--set", "max_steps=2", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "3 rounds" in said
    assert "object at" not in said + (tmp_path / "out/result.json").read_text()
