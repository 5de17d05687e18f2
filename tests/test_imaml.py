"""iMAML against linear models, on which everything is known in closed form, and its bounds, limits and memory."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from bilevel import AID, ITD, BilevelError, Box, Estimate, Status, hypergradient, minimize
from bilevel._inner import Objective
from bilevel._tree import tree_leaves, tree_map
from bilevel.few_shot.learner import Learner
from bilevel.problems.meta_learning.abml import abml
from bilevel.problems.meta_learning.ibaml import ibaml
from bilevel.problems.meta_learning.imaml import imaml
from bilevel.solvers.adam import Adam
from bilevel.solvers.armijo import Armijo
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.newton import Newton

EXACT = LBFGS(tol=1e-13, max_steps=3000)


def half_mse(output: Tensor, target: Tensor) -> Tensor:
    """On a linear model |X y - t|^2 / 2n."""
    return mse_loss(output, target) / 2


def spd(n: int, low: float, high: float, seed: int) -> Tensor:
    """A symmetric matrix with eigenvalues evenly spaced in the logarithm between low and high."""
    rotation: Tensor = torch.linalg.qr(normal(n, n, seed=seed))[0]
    return rotation @ torch.diag(torch.logspace(math.log10(low), math.log10(high), n)) @ rotation.T


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = vectors * values.sqrt() @ vectors.T
    return found


@dataclass
class Quadratics:
    """Tasks with support loss (y - a)'A(y - a) / 2 and query loss (y - b)'B(y - b) / 2, A and B `(tasks, n, n)`."""

    A: Tensor
    a: Tensor
    B: Tensor
    b: Tensor

    @staticmethod
    def draw(tasks: int = 3, n: int = 5, low: float = 0.1, high: float = 10.0, seed: int = 0) -> Quadratics:
        A, B = (torch.stack([spd(n, low, high, seed + s + 2 * k) for k in range(tasks)]) for s in (0, 1))
        return Quadratics(A, normal(tasks, n, seed=seed + 71), B, normal(tasks, n, seed=seed + 72))

    @property
    def tasks(self) -> dict[str, Tensor]:
        n = self.a.shape[1]
        found: dict[str, Tensor] = {}
        for side, H, c in (("support", self.A, self.a), ("query", self.B, self.b)):
            X = math.sqrt(n) * torch.stack([root(h) for h in H])
            found |= {f"{side}_x": X, f"{side}_y": X @ c.unsqueeze(-1)}
        return found

    def learner(self, theta: Tensor, **options: Any) -> Learner:
        net = nn.Linear(self.a.shape[1], 1, bias=False)
        net.weight.data = theta.clone().unsqueeze(0)
        return imaml(net, half_mse, **options)

    def solution(self, theta: Tensor, lambda_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y*, (A + Lambda)^-1 B (y* - b) and the hypergradient of each task; lambda_ is `()` or `(n,)`."""
        matrix = self.A + torch.diag(lambda_.expand_as(theta))
        y = torch.linalg.solve(matrix, (self.A @ self.a.unsqueeze(-1)).squeeze(-1) + lambda_ * theta)
        v = torch.linalg.solve(matrix, (self.B @ (y - self.b).unsqueeze(-1)).squeeze(-1))
        return y, v, lambda_ * v


def estimate(learner: Learner, tasks: dict[str, Tensor], **options: Any) -> Estimate:
    options = {"estimator": learner.estimator, "data": tasks, **options}
    return hypergradient(learner.problem, options.pop("x", learner.x0), learner.y0, **options)


def solved(found: Estimate) -> Any:
    """v, which every implicit estimate has."""
    assert found.v is not None
    return found.v


def exact(learner: Learner) -> Learner:
    return replace(learner, estimator=AID(EXACT, Dense()))


# Closed forms


@pytest.mark.parametrize("lambda_", [0.3, 2.0, 50.0])
def test_hypergradient_on_quadratics_is_the_closed_form(lambda_: float) -> None:
    family, theta = Quadratics.draw(seed=1), normal(5, seed=9)
    found = estimate(exact(family.learner(theta, regularization=lambda_)), family.tasks)
    y, _, h = family.solution(theta, torch.tensor(lambda_))
    assert torch.allclose(found.y["weight"].squeeze(1), y, rtol=0, atol=1e-11)
    assert distance(found.grad["weight"], h.mean(0)) <= 1e-10
    eye = torch.eye(5)
    paper = torch.stack([
        torch.linalg.solve(eye + A / lambda_, B @ (yi - b))
        for A, B, yi, b in zip(family.A, family.B, y, family.b, strict=True)
    ])  # fmt: skip
    assert distance(found.grad["weight"], paper.mean(0)) <= 1e-10


def test_derivative_in_a_learned_scalar() -> None:
    family, theta, lambda_ = Quadratics.draw(seed=2), normal(5, seed=9), torch.tensor(1.7)
    learner = exact(family.learner(theta, regularization=1.7, learn_regularization=True))
    found = estimate(learner, family.tasks)
    y, _, h = family.solution(theta, lambda_)
    assert distance(found.grad["params"]["weight"], h.mean(0)) <= 1e-10
    support = (family.A @ (y - family.a).unsqueeze(-1)).squeeze(-1)
    in_lambda = (support * h).sum(-1).mean() / lambda_**2
    assert float(learner.x0["log_regularization"].exp()) == pytest.approx(1.7, rel=1e-15)
    assert distance(found.grad["log_regularization"], in_lambda * lambda_) <= 1e-10


@pytest.mark.parametrize("learned", [False, True])
def test_derivative_with_a_number_for_each_parameter(learned: bool) -> None:
    family, theta, lambda_ = Quadratics.draw(seed=3), normal(5, seed=9), torch.linspace(0.5, 4.0, 5)
    strength = {"weight": lambda_.unsqueeze(0)}
    learner = exact(family.learner(theta, regularization=strength, learn_regularization=learned))
    found = estimate(learner, family.tasks)
    y, v, h = family.solution(theta, lambda_)
    params = found.grad["params"] if learned else found.grad
    assert distance(params["weight"], h.mean(0)) <= 1e-10
    if learned:
        in_lambda = (-v * (y - theta)).mean(0)
        assert distance(found.grad["log_regularization"]["weight"].squeeze(0), in_lambda * lambda_) <= 1e-10


def test_derivative_with_a_number_for_each_layer_is_the_sum_over_its_entries() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    tasks = regression_tasks(2)
    layers = {name: 0.5 + k for k, name in enumerate(dict(net.named_parameters()))}
    entries = {name: torch.full_like(p, layers[name]) for name, p in net.named_parameters()}
    coarse, fine = (
        estimate(exact(imaml(net, mse_loss, regularization=strength, learn_regularization=True)), tasks).grad
        for strength in (layers, entries)
    )
    for name in layers:
        assert coarse["log_regularization"][name].shape == ()
        total = fine["log_regularization"][name].sum()
        assert torch.allclose(coarse["log_regularization"][name], total, rtol=1e-10, atol=1e-13)
        assert torch.allclose(coarse["params"][name], fine["params"][name], rtol=1e-10, atol=1e-13)


def test_strong_regularization_gives_the_gradient_of_the_query_loss_at_theta() -> None:
    family, theta = Quadratics.draw(seed=4), normal(5, seed=9)
    at_theta = (family.B @ (theta - family.b).unsqueeze(-1)).squeeze(-1).mean(0)
    errors = []
    for lambda_ in (1e4, 1e6):
        inner = Newton(tol=0.0, max_steps=3, linear=Dense())
        found = estimate(family.learner(theta, regularization=lambda_, inner=inner), family.tasks)
        errors.append(distance(found.grad["weight"], at_theta))
    assert errors[1] <= 1e-4
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)  # first order in 1 / lambda


def test_weak_regularization_gives_a_hypergradient_of_zero() -> None:
    family, theta = Quadratics.draw(seed=5), normal(5, seed=9)
    sizes = [
        float(estimate(exact(family.learner(theta, regularization=lambda_)), family.tasks).grad["weight"].norm())
        for lambda_ in (1e-5, 1e-7)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(100, rel=0.01)  # first order in lambda


# Bounds


SEEDS = range(1, 7)
LAMBDA, LOW, HIGH = 2.0, 0.1, 10.0
MU, BETA = LOW + LAMBDA, HIGH + LAMBDA
KAPPA = BETA / MU


def approximate(family: Quadratics, theta: Tensor, T: int, L: int) -> tuple[Estimate, Tensor, Tensor]:
    """The estimate after T inner and L linear steps, y* and the exact hypergradient, for one task."""
    learner = family.learner(theta, regularization=LAMBDA, step=2 / (BETA + MU), inner_steps=T, linear_steps=L)
    y, _, h = family.solution(theta, torch.tensor(LAMBDA))
    return estimate(learner, family.tasks), y[0], h[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_error_is_within_its_bound_and_its_parts_within_theirs(seed: int) -> None:
    family, theta = Quadratics.draw(1, 20, LOW, HIGH, seed=100 * seed), normal(20, seed=100 * seed + 50)
    L_f = float(torch.linalg.matrix_norm(family.B[0], 2))
    matrix = family.A[0] + LAMBDA * torch.eye(20)
    for T, L in itertools.product((1, 5, 16, 50), (1, 2, 5, 10)):
        found, y, h = approximate(family, theta, T, L)
        yT = found.y["weight"].reshape(-1)
        d = float((yT - y).norm())
        assert d <= ((KAPPA - 1) / (KAPPA + 1)) ** T * float((theta - y).norm()) * (1 + 1e-12)
        v = torch.linalg.solve(matrix, family.B[0] @ (yT - family.b[0]))
        off = solved(found)["weight"].reshape(-1) - v
        q = (math.sqrt(KAPPA) - 1) / (math.sqrt(KAPPA) + 1)
        assert float(off @ matrix @ off) ** 0.5 <= 2 * q**L * float(v @ matrix @ v) ** 0.5
        error = float((found.grad["weight"].reshape(-1) - h).norm())
        r = LAMBDA * float(off.norm())
        assert error <= LAMBDA / MU * L_f * d + r
        assert error > 1e-3 * (LAMBDA / MU * L_f * d + r)  # a bound that says something


@pytest.mark.parametrize("seed", SEEDS)
def test_error_falls_with_inner_and_with_linear_steps(seed: int) -> None:
    family, theta = Quadratics.draw(1, 20, LOW, HIGH, seed=100 * seed), normal(20, seed=100 * seed + 50)
    family = replace(family, B=torch.eye(20).unsqueeze(0))

    def error(T: int, L: int) -> float:
        found, _, h = approximate(family, theta, T, L)
        return distance(found.grad["weight"].reshape(-1), h)

    along = [error(n, n) for n in (1, 2, 4, 8, 16, 32)]
    assert all(b < a for a, b in itertools.pairwise(along))
    assert all(b < a for a, b in itertools.pairwise([error(T, 20) for T in (1, 2, 5, 16, 50)]))
    assert all(b < a for a, b in itertools.pairwise([error(120, L) for L in (1, 2, 3, 5, 10)]))
    assert error(16, 5) < 1e-2
    assert error(120, 20) < 1e-12


def slope(x: list[float], y: list[float]) -> float:
    lx, ly = (torch.tensor(values).log() for values in (x, y))
    return float(((lx - lx.mean()) * (ly - ly.mean())).sum() / (lx - lx.mean()).square().sum())


def test_error_is_first_order_in_the_distance_and_in_the_linear_error() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    learner, tasks = imaml(net, mse_loss, regularization=1.0), regression_tasks(1)
    truth = estimate(exact(learner), tasks)
    steps = (20, 40, 60, 80)
    by_y = [estimate(replace(learner, estimator=AID(_descent(n), Dense())), tasks) for n in steps]
    eps = [distance(e.y, truth.y) for e in by_y]
    errors = [distance(e.grad, truth.grad) for e in by_y]
    assert eps[-1] < 1e-2 * eps[0]
    assert slope(eps, errors) == pytest.approx(1, abs=0.1)
    by_v = [estimate(replace(learner, estimator=AID(EXACT, CG(rtol=t))), tasks) for t in (1e-2, 1e-3, 1e-4, 1e-6)]
    off = [distance(e.v, truth.v) for e in by_v]
    errors = [distance(e.grad, truth.grad) for e in by_v]
    assert off[-1] < 1e-2 * off[0]
    assert slope(off, errors) == pytest.approx(1, abs=0.1)


def _descent(steps: int) -> Iterate:
    return Iterate(GradientDescent(0.2), steps)


def test_error_of_unrolling_falls_by_the_contraction_of_a_step() -> None:
    family, theta, lambda_ = Quadratics.draw(1, 5, seed=6), normal(5, seed=9), 0.5
    step = 1 / (HIGH + lambda_)
    _, _, h = family.solution(theta, torch.tensor(lambda_))
    errors = []
    for N in (200, 210):
        learner = family.learner(theta, regularization=lambda_)
        found = estimate(replace(learner, estimator=ITD(Iterate(GradientDescent(step), N))), family.tasks)
        errors.append(distance(found.grad["weight"].reshape(-1), h[0]))
    assert (errors[1] / errors[0]) ** 0.1 == pytest.approx(1 - step * (LOW + lambda_), abs=0.005)


# Inner solvers


def regression_tasks(count: int, n: int = 6, seed: int = 0) -> dict[str, Tensor]:
    inputs, shift = normal(count, 2 * n, 2, seed=seed), normal(count, 1, 1, seed=seed + 1)
    targets = (inputs.sum(-1, keepdim=True) + shift).sin()
    return {
        "support_x": inputs[:, :n], "support_y": targets[:, :n], "query_x": inputs[:, n:], "query_y": targets[:, n:],
    }  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))


SOLVERS = {
    "descent": Iterate(GradientDescent(0.3), 400),
    "backtracking": Iterate(GradientDescent(0.05), 200, line_search=Armijo(growth=1.5)),
    "hessian-free": Newton(tol=0.0, max_steps=10, linear=CG(rtol=0.0, max_steps=5, recompute=False)),
    "lbfgs": LBFGS(tol=1e-10),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_inner_solver_leads_to_the_same_hypergradient(name: str) -> None:
    tasks = regression_tasks(3)
    learner = imaml(network(), mse_loss, regularization=0.5, inner=SOLVERS[name], linear_steps=60)
    reference = estimate(exact(learner), tasks)
    found = estimate(learner, tasks)
    assert found.status is Status.successful
    assert distance(found.y, reference.y) <= 1e-6
    assert distance(found.grad, reference.grad) <= 1e-5


def test_hessian_free_takes_at_most_five_products_a_step_for_every_task() -> None:
    family, theta = Quadratics.draw(3, 12, seed=8), normal(12, seed=9)
    inner = Newton(tol=0.0, max_steps=4, linear=CG(rtol=0.0, max_steps=5, recompute=False))
    found = estimate(family.learner(theta, inner=inner, linear_steps=2), family.tasks)
    assert found.stats.inner_steps == 4 * 3
    assert found.stats.hvps == (4 * 5 + 2) * 3


def test_backtracking_has_a_step_length_for_each_task() -> None:
    flat, steep = Quadratics.draw(1, 3, 0.1, 1.0, seed=1), Quadratics.draw(1, 3, 1e3, 1e4, seed=1)
    family = Quadratics(*(torch.cat([getattr(q, name) for q in (flat, steep)]) for name in ("A", "a", "B", "b")))
    options = {"regularization": 1.0, "inner": Iterate(GradientDescent(0.5), 30, line_search=Armijo())}
    both = estimate(family.learner(torch.zeros(3), **options), family.tasks)
    for k, alone in enumerate((flat, steep)):
        single = estimate(alone.learner(torch.zeros(3), **options), alone.tasks)
        assert torch.allclose(both.y["weight"][k], single.y["weight"][0], rtol=1e-10, atol=1e-12)
    fixed = estimate(family.learner(torch.zeros(3), regularization=1.0, step=0.5, inner_steps=30), family.tasks,
                     throw=False)  # fmt: skip
    assert fixed.status is Status.diverged


def test_damping_adds_to_the_system_and_nothing_else() -> None:
    family, theta = Quadratics.draw(seed=7), normal(5, seed=9)
    learner = family.learner(theta, regularization=2.0, inner=EXACT, linear_steps=50, damping=3.0)
    found = estimate(learner, family.tasks)
    y, _, _ = family.solution(theta, torch.tensor(2.0))
    v = torch.linalg.solve(family.A + 5.0 * torch.eye(5), (family.B @ (y - family.b).unsqueeze(-1)).squeeze(-1))
    assert torch.allclose(found.y["weight"].squeeze(1), y, atol=1e-11)
    assert distance(found.grad["weight"], 2.0 * v.mean(0)) <= 1e-10


def test_sixteen_gradients_and_five_products_are_counted_for_each_task_and_those_of_a_derived_step() -> None:
    tasks = regression_tasks(3)
    stats = estimate(imaml(network(), mse_loss, step=0.1), tasks).stats
    assert (stats.gradients, stats.hvps, stats.inner_steps) == (17 * 3, 5 * 3, 16 * 3)
    assert (stats.outer_gradients, stats.cross_products) == (3, 3)
    derived = estimate(imaml(network(), mse_loss), tasks).stats
    assert (derived.gradients, derived.inner_steps, derived.outer_gradients) == (18 * 3, 16 * 3, 3)
    assert 5 * 3 < derived.hvps <= (5 + 20) * 3


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_default_step_is_that_of_the_curvature(scale: float) -> None:
    """On quadratics with curvatures up to `scale` times 0.1 the step 0.1 diverges for the larger one."""
    torch.manual_seed(0)
    x = scale * torch.randn(3, 6, 2)
    tasks = {"support_x": x, "support_y": x[..., :1], "query_x": x, "query_y": x[..., :1]}
    for method in (imaml, ibaml, abml):
        learner = method(nn.Linear(2, 1), mse_loss)
        prepared = tasks if learner.prepare is None else learner.prepare(tasks, 0)
        found = estimate(learner, prepared, throw=False)
        assert not found.status.lost
        assert all(bool(leaf.isfinite().all()) for leaf in tree_leaves(found.grad))
    fixed = estimate(imaml(nn.Linear(2, 1), mse_loss, step=0.1), tasks, throw=False)
    assert fixed.status.lost == (scale > 1)


@pytest.mark.parametrize(("growth", "trials"), [(1.0, 7 + 1 + 1), (1.5, 7 + 2 + 1), (2.0, 7 + 2 + 2)])
def test_first_trial_of_a_step_is_the_last_length_times_growth(growth: float, trials: int) -> None:
    objective = Objective(lambda y: 50 * y.square().sum(-1))  # of the powers of 1/2, steps up to 1/64 descend
    solver = Iterate(GradientDescent(), 3, line_search=Armijo(growth=growth))
    solver.solve(objective, torch.ones(1))
    assert objective.tally.values == trials


@pytest.mark.parametrize("growth", [0.5, math.inf, math.nan])
def test_a_growth_that_shrinks_is_refused(growth: float) -> None:
    with pytest.raises(ValueError, match="growth"):
        Armijo(growth=growth)


# Curvature


def signed(output: Tensor, target: Tensor) -> Tensor:
    """sum_i s_i (o_i - t_i)^2 / 2n with targets (t, s): concave where s is negative."""
    return (target[:, 1] * (output[:, 0] - target[:, 0]).square()).mean() / 2


def indefinite_tasks() -> dict[str, Tensor]:
    """Two tasks on three weights: curvatures (1, 2, 3), and (3, 1, -4), on the support set."""
    x = math.sqrt(3) * torch.eye(3).expand(2, 3, 3)
    signs = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, -4.0]])
    support, query = normal(2, 3, seed=1), normal(2, 3, seed=2)
    return {
        "support_x": x, "support_y": torch.stack([support, signs], -1),
        "query_x": x, "query_y": torch.stack([query, torch.ones(2, 3)], -1),
    }  # fmt: skip


def test_negative_curvature_is_flagged_for_its_task_and_leaves_the_others_alone() -> None:
    tasks = indefinite_tasks()
    learner = imaml(nn.Linear(3, 1, bias=False), signed, regularization=1.0, inner_steps=3)
    found = estimate(learner, tasks, throw=False)
    assert found.status is Status.negative_curvature
    assert found.reports[1].statuses == (Status.successful, Status.negative_curvature)
    assert all(bool(leaf.isfinite().all()) for leaf in tree_leaves((found.grad, found.y, found.v)))
    with pytest.raises(BilevelError, match="negative or zero curvature"):
        estimate(learner, tasks)
    alone = estimate(learner, {name: entry[:1] for name, entry in tasks.items()})
    assert torch.allclose(solved(found)["weight"][0] * 2, solved(alone)["weight"][0], rtol=1e-12)


def test_enough_regularization_or_damping_makes_the_system_definite() -> None:
    tasks = indefinite_tasks()
    for options in ({"regularization": 5.0}, {"regularization": 1.0, "damping": 4.0}):
        learner = imaml(nn.Linear(3, 1, bias=False), signed, step=0.05, inner_steps=3, **options)  # type: ignore[arg-type]
        assert estimate(learner, tasks, throw=False).reports[1].status is Status.successful


# Batches


def taken(tasks: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    return {name: entry[k : k + 1] for name, entry in tasks.items()}


@pytest.mark.parametrize("name", SOLVERS)
def test_batch_is_the_mean_of_a_loop(name: str) -> None:
    tasks = regression_tasks(4)
    learner = imaml(network(), mse_loss, inner=replace(SOLVERS[name], max_steps=6))  # type: ignore[type-var]
    batch = estimate(learner, tasks, throw=False)
    singles = [estimate(learner, taken(tasks, k), throw=False) for k in range(4)]
    assert batch.value == pytest.approx(sum(single.value for single in singles) / 4, rel=1e-12)
    for name_, leaf in batch.grad.items():
        mean = torch.stack([single.grad[name_] for single in singles]).mean(0)
        assert torch.allclose(leaf, mean, rtol=1e-9, atol=1e-12)
        assert torch.allclose(batch.y[name_], torch.cat([single.y[name_] for single in singles]), rtol=1e-9, atol=1e-12)


def test_padded_samples_do_not_count() -> None:
    tasks = regression_tasks(3)
    mask = torch.ones(3, 6)
    mask[1, 4:] = 0
    padded = {**tasks, "support_mask": mask, "query_mask": mask}
    learner = imaml(network(), mse_loss)
    short = {name: entry[1:2, :4] for name, entry in tasks.items()}
    parts = [estimate(learner, short), *(estimate(learner, taken(tasks, k)) for k in (0, 2))]
    batch = estimate(learner, padded)
    for name, leaf in batch.grad.items():
        assert torch.allclose(leaf, torch.stack([part.grad[name] for part in parts]).mean(0), rtol=1e-9, atol=1e-13)


# Memory


def most_saved(function: Callable[[], Any]) -> int:
    """The most bytes that graphs held of tensors saved for their backward, at once."""
    held, most = 0, 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def release(size: int) -> None:
        nonlocal held
        held -= size

    def pack(tensor: Tensor) -> Kept:
        nonlocal held, most
        kept, size = Kept(tensor), tensor.numel() * tensor.element_size()
        held += size
        most = max(most, held)
        weakref.finalize(kept, release, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        function()
    return most


def test_saved_tensors_do_not_grow_with_inner_steps_and_grow_linearly_when_unrolled() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    tasks = {name: normal(2, 10, 1, seed=k) for k, name in enumerate(("support_x", "support_y", "query_x", "query_y"))}
    implicit, unrolled = [], []
    for N in (1, 2, 4, 8, 16):
        learner = imaml(net, mse_loss, step=0.01, inner_steps=N)
        implicit.append(most_saved(partial(estimate, learner, tasks, throw=False)))
        unrolled.append(most_saved(partial(estimate, replace(learner, estimator=ITD(learner.adapt)), tasks)))
    assert implicit == [implicit[0]] * 5
    slopes = [(b - a) / n for (a, b), n in zip(itertools.pairwise(unrolled), (1, 2, 4, 8), strict=True)]
    assert slopes == [slopes[0]] * 4
    assert slopes[0] > implicit[0] / 4


# What a user sees


def test_x_is_the_parameters_and_export_gives_the_module_back() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    learner = imaml(net, mse_loss)
    x = tree_map(lambda leaf: leaf + 1, learner.x0)
    exported = learner.export(x).state_dict()
    assert all(torch.equal(exported[name], x[name]) for name in x)
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)
    learned = imaml(net, mse_loss, learn_regularization=True)
    assert all(torch.equal(leaf, before[name]) for name, leaf in learned.export(learned.x0).state_dict().items())


def test_predictions_are_log_probabilities_under_a_cross_entropy_and_outputs_otherwise() -> None:
    net = nn.Linear(2, 3)
    task = {"query_x": normal(4, 2, seed=1)}
    classify, regress = imaml(net, cross_entropy), imaml(net, mse_loss)
    outputs = regress.predict(regress.x0, regress.y0, task)
    assert torch.equal(outputs, net(task["query_x"]))
    found = classify.predict(classify.x0, classify.y0, task)
    assert torch.allclose(found.exp().sum(-1), torch.ones(4))
    assert torch.allclose(found, outputs.log_softmax(-1))


def test_learned_regularization_stays_in_its_box() -> None:
    tasks = regression_tasks(3)
    learner = imaml(network(), mse_loss, regularization=1.0, learn_regularization=True)
    run = {"estimator": learner.estimator, "outer": Adam(0.3), "max_steps": 8, "data": tasks, "warm_start": False}
    free = minimize(learner.problem, learner.x0, learner.y0, throw=False, **run)  # type: ignore[arg-type]
    moved = float(free.x["log_regularization"])
    assert abs(moved) > 0.5
    box = Box(-0.2, 0.2)
    held = minimize(learner.problem, learner.x0, learner.y0, throw=False, constraint={"log_regularization": box}, **run)  # type: ignore[arg-type]
    assert abs(float(held.x["log_regularization"])) == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularization": 0.0}, "must be positive"),
        ({"regularization": float("nan")}, "must be finite"),
        ({"regularization": torch.ones(3)}, r"a number or a mapping .*Got a tensor of float64 \(3,\)"),
        ({"regularization": {"weight": 1.0}}, "name every parameter"),
        ({"regularization": {"weight": torch.ones(3), "bias": 1.0}}, "must broadcast"),
        ({"regularization": {"weight": torch.tensor([1.0, -1.0]), "bias": 1.0}}, "must be positive at 'weight'"),
        ({"linear_steps": 0}, "linear_steps"),
        ({"damping": -1.0}, "damping"),
        ({"step": 0.0}, "step"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        imaml(nn.Linear(2, 1), mse_loss, **options)
