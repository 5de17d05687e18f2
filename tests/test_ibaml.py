"""iBaML and ABML against Bayesian linear regression in closed form, finite differences, iMAML and each other."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, final, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax, mse_loss

from bilevel import AID, ITD, BilevelProblem, LinearOperator, Solved, Status, hypergradient, minimize, ravel
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._tree import tree_map
from bilevel.few_shot import adapt, calibration_of, draws, evaluate, predict, train
from bilevel.few_shot.adapt import noise_seed
from bilevel.few_shot.learner import Learner
from bilevel.problems import (
    BayesianRegression,
    GaussianLikelihood,
    GaussianPrior,
    KLDiagonal,
    KLProducts,
    KLSystem,
    MonteCarlo,
    OuterObjective,
    PosteriorDescent,
    abml,
    bayesian_regression,
    ibaml,
    ibaml_head,
    imaml,
    maml,
)
from bilevel.problems._variational import divergence, hyper_prior
from bilevel.problems.meta_learning._tasks import mixture_loss
from bilevel.problems.meta_learning.kl_products import Form
from bilevel.solvers.adam import Adam
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.newton import Newton
from bilevel.tasks import Episodes, digits
from bilevel.tasks._random import seed_of_step
from bilevel.tasks.source import AbstractTasks

WEIGHTS = [1.0, 0.3]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks(*matrices: Tensor) -> Tensor:
    found: Tensor = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]
    return found


def flat(tree: Any) -> Tensor:
    return ravel(tree)[0]


def relative(found: Any, truth: Any) -> float:
    return float((flat(found) - flat(truth)).norm() / flat(truth).norm())


def prepared(learner: Learner, batch: dict[str, Tensor], seed: int = 0) -> Any:
    assert learner.prepare is not None
    return learner.prepare(batch, seed)


def aid_of(learner: Learner, **changes: Any) -> AID:
    assert isinstance(learner.estimator, AID)
    return replace(learner.estimator, **changes)


def gradient_of(learner: Learner, data: Any, estimator: Any = None, x: Any = None) -> Tensor:
    x = learner.x0 if x is None else x
    estimator = learner.estimator if estimator is None else estimator
    return flat(hypergradient(learner.problem, x, learner.y0, estimator=estimator, data=data, throw=False).grad)


def regressions(tasks: int = 3, n: int = 6, q: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return {
        "support_x": normal(tasks, n, q, seed=seed),
        "support_y": normal(tasks, n, seed=seed + 1),
        "query_x": normal(tasks, n, q, seed=seed + 2),
        "query_y": normal(tasks, n, seed=seed + 3),
    }


def gaussian(q: int = 4, seed: int = 7) -> dict[str, Tensor]:
    return {"mean": normal(q, seed=seed), "log_variance": normal(q, seed=seed + 1)}


def problem_of(family: BayesianRegression) -> BilevelProblem:
    return BilevelProblem(family.f, family.g, init=lambda x, _: x, tasks=True)


# Closed forms


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_closed_form_of_the_posterior_is_stationary(weight: float) -> None:
    family, data, x = BayesianRegression(0.5, weight), regressions(), gaussian()
    y = {key: value.requires_grad_() for key, value in family.solution(x, data).items()}
    gradients = torch.autograd.grad(family.g(x, y, data).sum(), [y["mean"], y["log_variance"]])
    assert max(float(gradient.abs().max()) for gradient in gradients) <= 1e-10


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_closed_form_of_the_gradient_is_that_of_autograd_through_the_posterior(weight: float) -> None:
    family, data = BayesianRegression(0.5, weight), regressions()
    x = tree_map(Tensor.requires_grad_, gaussian())
    value = family.f(x, family.solution(x, data), data).mean()
    truth = torch.autograd.grad(value, [x["mean"], x["log_variance"]])
    assert relative(family.gradient(tree_map(Tensor.detach, x), data), list(truth)) <= 1e-10


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("form", ["autograd", "substituted"])
def test_the_implicit_gradient_at_the_posterior_is_the_closed_form(weight: float, form: Any) -> None:
    family, data, x = BayesianRegression(0.5, weight), regressions(), gaussian()
    products = KLProducts(family.expectation, weight, form)
    for linear in (Dense(), CG(rtol=1e-12, preconditioner=KLDiagonal())):
        aid = AID(ClosedForm(family.solution), linear, products=products)
        found = hypergradient(problem_of(family), x, x, estimator=aid, data=data)
        assert relative(found.grad, family.gradient(x, data)) <= 1e-10


def test_one_problem_without_tasks_is_differentiated_alike() -> None:
    family, task, x = BayesianRegression(0.5, 0.3), one_task(), gaussian()
    problem = BilevelProblem(lambda x, y: family.f(x, y, task), lambda x, y: family.g(x, y, task))
    products = KLProducts(lambda x, y: family.expectation(x, y, task), 0.3)
    aid = AID(ClosedForm(lambda x: family.solution(x, task)), CG(1e-12, preconditioner=KLDiagonal()), products=products)
    assert relative(hypergradient(problem, x, x, estimator=aid).grad, family.gradient(x, task)) <= 1e-10


def test_the_instance_has_the_gradient_that_it_says() -> None:
    made = bayesian_regression(kl_weight=0.7)
    assert made.gradient is not None
    assert made.solution is not None
    x = gaussian(3)
    aid = AID(ClosedForm(made.solution), Dense())
    found = hypergradient(made.problem, x, made.y0, estimator=aid)
    assert relative(found.grad, made.gradient(x)) <= 1e-10


# Second derivatives


def linearized(family: BayesianRegression, form: Any, y: Any, x: Any, task: Any) -> tuple[Tensor, Tensor, Tensor]:
    """H, G and grad_y g of one task, in the order mean, log-variance."""
    task = {key: value.unsqueeze(0) for key, value in task.items()}
    x_vector, x_structure = ravel(x)
    y_vector, y_structure = ravel(y)
    problem = FlatProblem(problem_of(family), x_structure, y_structure, task)
    at = KLProducts(family.expectation, family.kl_weight, form).linearize(problem, x_vector, y_vector.unsqueeze(0))
    eye = torch.eye(len(y_vector)).unsqueeze(1)
    hessian = torch.stack([at.operator.mv(row)[0] for row in eye])
    pulled = [at.cross(row) for row in eye]
    both = [at.products(row) for row in eye]
    assert torch.equal(hessian, torch.stack([hv[0] for hv, _ in both]))
    cross = torch.stack([column for column in pulled if column is not None], 1)
    assert torch.equal(cross, torch.stack([column for _, column in both if column is not None], 1))
    return hessian, cross, at.gradient[0]


def one_task() -> dict[str, Tensor]:
    return {key: value[0] for key, value in regressions(seed=20).items()}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_blocks_are_those_of_the_formula_and_of_autograd_wherever_y_is(weight: float) -> None:
    family, task, x, y = BayesianRegression(0.5, weight), one_task(), gaussian(), gaussian(seed=9)
    hessian, cross, gradient = linearized(family, "autograd", y, x, task)
    X, d, r = task["support_x"], x["log_variance"].exp(), (y["log_variance"] - x["log_variance"]).exp()
    curvature = X.square().sum(0) / (2 * 0.5) * y["log_variance"].exp() + weight * r / 2
    formula = blocks(X.mT @ X / 0.5 + torch.diag(weight / d), torch.diag(curvature))
    assert float((hessian - formula).abs().max()) <= 1e-10
    J = -weight * torch.cat(
        [
            torch.cat([torch.diag(1 / d), torch.diag((y["mean"] - x["mean"]) / d)], 1),
            torch.cat([torch.zeros(4, 4), torch.diag(r / 2)], 1),
        ]
    )
    assert float((cross - J.mT).abs().max()) <= 1e-10

    def g(x: Tensor, y: Tensor) -> Tensor:
        prior, posterior = ({"mean": v[:4], "log_variance": v[4:]} for v in (x, y))
        return family.g(prior, posterior, task)

    def in_y(x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(g, argnums=1)(x, y)
        return found

    at = (flat(x), flat(y))
    assert float((gradient - in_y(*at)).abs().max()) <= 1e-10
    assert float((hessian - torch.func.jacrev(in_y, argnums=1)(*at)).abs().max()) <= 1e-10
    assert float((cross.mT - torch.func.jacrev(in_y, argnums=0)(*at)).abs().max()) <= 1e-10


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("form", ["autograd", "substituted"])
def test_the_implicit_function_theorem_gives_the_derivative_of_the_posterior(weight: float, form: Any) -> None:
    family, task, x = BayesianRegression(0.5, weight), one_task(), gaussian()
    hessian, cross, _ = linearized(family, form, family.solution(x, task), x, task)

    def solution(x: Tensor) -> Tensor:
        return flat(family.solution({"mean": x[:4], "log_variance": x[4:]}, task))

    truth = torch.func.jacrev(solution)(flat(x))
    assert float((-torch.linalg.solve(hessian, cross.mT) - truth).abs().max()) <= 1e-10


def in_variances(family: BayesianRegression, x: Any, y: Any, task: Any) -> tuple[Tensor, Tensor, Tensor]:
    """H and J in (m_t, d_t) and (m, d) with the data in the prior's place, and diag(1, d_t)."""
    w, X, s = family.kl_weight, task["support_x"], family.variance
    d, d_t = x["log_variance"].exp(), y["log_variance"].exp()
    in_mean = X.mT @ (X @ y["mean"] - task["support_y"]) / s
    in_variance = X.square().sum(0) / (2 * s)
    hessian = blocks(X.mT @ X / s + torch.diag(w / d), torch.diag(w / 2 * (1 / d + 2 * in_variance / w).square()))
    J = torch.cat(
        [
            torch.cat([torch.diag(-w / d), torch.diag(in_mean / d)], 1),
            torch.cat([torch.zeros(4, 4), torch.diag(-w / (2 * d.square()))], 1),
        ]
    )
    return hessian, J, torch.cat([torch.ones(4), d_t])


def test_the_substituted_form_is_that_of_the_variance_in_other_units() -> None:
    family, task, x, y = BayesianRegression(0.5, 0.3), one_task(), gaussian(), gaussian(seed=9)
    hessian, J, units = in_variances(family, x, y, task)
    found, cross, _ = linearized(family, "substituted", y, x, task)
    prior_units = torch.cat([torch.ones(4), x["log_variance"].exp()])
    assert float((found - units[:, None] * hessian * units).abs().max()) <= 1e-10
    assert float((cross.mT - units[:, None] * J * prior_units).abs().max()) <= 1e-10


def test_a_hessian_in_the_variance_needs_the_gradient_too() -> None:
    family, task, x, y = BayesianRegression(0.5, 0.3), one_task(), gaussian(), gaussian(seed=9)
    d_t = y["log_variance"].exp()

    def g(v: Tensor) -> Tensor:
        return family.g(x, {"mean": v[:4], "log_variance": v[4:].log()}, task)

    in_d = torch.func.jacrev(torch.func.grad(g))(torch.cat([y["mean"], d_t]))[4:, 4:]
    hessian, _, gradient = linearized(family, "autograd", y, x, task)
    converted = (hessian[4:, 4:] - torch.diag(gradient[4:])) / torch.outer(d_t, d_t)
    assert float((converted - in_d).abs().max()) <= 1e-10 * float(in_d.abs().max())


def test_the_preconditioner_leaves_conjugate_gradients_one_step_for_each_eigenvalue_of_the_data() -> None:
    family, data, x = BayesianRegression(0.5), regressions(n=1), gaussian()
    x["log_variance"] = torch.tensor([-8.0, -3.0, 0.0, 4.0])
    products = KLProducts(family.expectation, 1.0)

    def error(steps: int, preconditioner: Any) -> float:
        linear = CG(rtol=0.0, max_steps=steps, preconditioner=preconditioner)
        aid = AID(ClosedForm(family.solution), linear, products=products)
        found = hypergradient(problem_of(family), x, x, estimator=aid, data=data, throw=False)
        return relative(found.grad, family.gradient(x, data))

    assert error(2, KLDiagonal()) <= 1e-8  # the identity, and one sample
    assert error(2, None) >= 1e-2
    for name in ("ibaml", "ibaml_head"):
        linear = aid_of(learners()[name]).linear
        assert isinstance(linear, CG)
        assert linear.preconditioner == KLDiagonal()


def test_a_preconditioner_needs_an_operator_that_knows_its_diagonal() -> None:
    operator = LinearOperator(lambda v: v, 2, positive_definite=True)
    with pytest.raises(ValueError, match="comes with a diagonal"):
        KLDiagonal().build(operator, torch.ones(2))
    known = replace(operator, diagonal=torch.tensor([1.0, 3.0])).shifted(1.0)
    assert KLDiagonal().build(known, torch.ones(2))(torch.ones(2)).tolist() == [0.5, 0.25]


# The evidence


@pytest.mark.parametrize("weight", WEIGHTS)
def test_where_both_objectives_are_one_there_is_no_implicit_part(weight: float) -> None:
    family, data, x = BayesianRegression(0.5, weight), regressions(), gaussian()
    problem = BilevelProblem(family.g, family.g, tasks=True)
    aid = AID(ClosedForm(family.solution), Dense(), products=KLProducts(family.expectation, weight))
    found = hypergradient(problem, x, x, estimator=aid, data=data)
    y, d = family.solution(x, data), x["log_variance"].exp()
    away, d_t = y["mean"] - x["mean"], y["log_variance"].exp()
    formula = {"mean": -away / d, "log_variance": (1 - (d_t + away.square()) / d) / 2}
    assert relative(found.grad, {key: weight * value.mean(0) for key, value in formula.items()}) <= 1e-10
    assert found.v is not None
    assert float(flat(found.v).abs().max()) <= 1e-10


def orthogonal(tasks: int, n: int, q: int, seed: int) -> Tensor:
    scale = 0.5 + torch.rand(tasks, 1, q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs: Tensor = torch.linalg.qr(normal(tasks, n, q, seed=seed))[0] * scale
    return inputs


def test_with_orthogonal_inputs_the_gradient_is_that_of_the_evidence() -> None:
    family, data = BayesianRegression(0.5), regressions(n=7)
    data["support_x"] = orthogonal(3, 7, 4, seed=3)
    x = tree_map(Tensor.requires_grad_, gaussian())
    evidence = family.negative_log_evidence(x, data)
    truth = torch.autograd.grad(evidence.mean(), [x["mean"], x["log_variance"]])
    x = tree_map(Tensor.detach, x)
    assert torch.allclose(family.g(x, family.solution(x, data), data), evidence, rtol=1e-12)
    problem = BilevelProblem(family.g, family.g, tasks=True)
    aid = AID(ClosedForm(family.solution), CG(rtol=1e-12, preconditioner=KLDiagonal()))
    products = KLProducts(family.expectation, 1.0)
    found = hypergradient(problem, x, x, estimator=replace(aid, products=products), data=data)
    assert relative(found.grad, list(truth)) <= 1e-10


def test_the_evidence_is_more_than_its_bound_for_other_inputs() -> None:
    family, data, x = BayesianRegression(0.5), regressions(), gaussian()
    gap = family.g(x, family.solution(x, data), data) - family.negative_log_evidence(x, data)
    assert float(gap.min()) > 1e-3


def test_the_prior_that_made_the_tasks_is_recovered() -> None:
    tasks, n, mean, variance = 2000, 12, torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.1, 1.0, 0.5, 2.0])
    X = torch.linalg.qr(normal(tasks, n, 4, seed=0))[0] * n**0.5
    truth = mean + variance.sqrt() * normal(tasks, 4, seed=1)
    b = (X @ truth.unsqueeze(-1)).squeeze(-1) + 0.5 * normal(tasks, n, seed=2)
    data, family = {"support_x": X, "support_y": b}, BayesianRegression(0.25)
    problem = BilevelProblem(family.g, family.g, init=lambda x, _: x, tasks=True)
    estimator = AID(
        ClosedForm(family.solution),
        CG(rtol=1e-8, preconditioner=KLDiagonal()),
        products=KLProducts(family.expectation, 1.0),
    )
    x0 = {"mean": torch.zeros(4), "log_variance": torch.zeros(4)}
    outer = HeavyBall(0.2, 0.5)
    found = minimize(problem, x0, x0, estimator=estimator, outer=outer, data=data, tol=3e-3, max_steps=200)
    assert found.status is Status.successful
    # Four standard errors of the mean and of the variance of 2000 draws seen through the noise.
    assert bool(((found.x["mean"] - mean).abs() <= torch.tensor([0.042, 0.095, 0.071, 0.130])).all())
    learned = found.x["log_variance"].exp()
    assert bool(((learned - variance).abs() <= torch.tensor([0.029, 0.142, 0.079, 0.269])).all())


# How far the iteration gets


def ill_conditioned(n: int = 32, kappa: float = 50.0) -> dict[str, Tensor]:
    """One task with cond(X'X) = kappa."""
    U, V = torch.linalg.qr(normal(2 * n, n, seed=0))[0], torch.linalg.qr(normal(n, n, seed=1))[0]
    X = U @ torch.diag(torch.logspace(0, math.log10(kappa), n, dtype=torch.float64).sqrt()) @ V.mT
    truth, Q = normal(n, seed=2), normal(2 * n, n, seed=3)
    b, c = X @ truth + normal(2 * n, seed=4), Q @ truth + normal(2 * n, seed=5)
    return {"support_x": X[None], "support_y": b[None], "query_x": Q[None], "query_y": c[None]}


CURVE = (1, 5, 10, 20, 50, 100, 200, 400)


@final
@dataclass(frozen=True)
class Regression:
    """The ill-conditioned task under the prior N(0, I), with gradient descent of step 1 / L in y."""

    family: BayesianRegression
    data: dict[str, Tensor]
    x: dict[str, Tensor]

    def error(self, estimator: Any) -> float:
        found = hypergradient(problem_of(self.family), self.x, self.x, estimator=estimator, data=self.data, throw=False)
        return relative(found.grad, self.family.gradient(self.x, self.data))

    def inner(self, steps: int) -> Iterate:
        X = self.data["support_x"][0]
        largest = float(torch.linalg.matrix_norm(X, 2).square()) / self.family.variance + 1
        return Iterate(GradientDescent(1 / largest), steps)

    def aid(self, inner: Any, linear: AbstractLinearSolver, form: Any = "autograd") -> AID:
        return AID(inner, linear, products=KLProducts(self.family.expectation, self.family.kl_weight, form))

    def conjugate(self, steps: int) -> CG:
        return CG(rtol=0.0, max_steps=steps)


@pytest.fixture(scope="module")
def regression() -> Regression:
    return Regression(
        BayesianRegression(1.0), ill_conditioned(), {"mean": torch.zeros(32), "log_variance": torch.zeros(32)}
    )


def test_implicit_gradients_are_nearer_than_explicit_ones_after_any_number_of_steps(regression: Regression) -> None:
    inner = [regression.inner(steps) for steps in CURVE]
    explicit = [regression.error(ITD(solver)) for solver in inner]
    implicit = [regression.error(regression.aid(solver, Dense())) for solver in inner]
    assert all(i < e for i, e in zip(implicit, explicit, strict=True))
    assert all(b < a for errors in (explicit, implicit) for a, b in pairwise(errors))
    # No plateau: either goes on falling with the steps.
    assert explicit[-1] < 0.3 * explicit[-2] < 0.1 * explicit[-3]
    assert implicit[-1] < 0.3 * implicit[-2] < 0.2 * implicit[-3]


def test_the_linear_solver_sets_the_level_at_which_implicit_gradients_stay(regression: Regression) -> None:
    exact = ClosedForm(regression.family.solution)
    levels = {steps: regression.error(regression.aid(exact, regression.conjugate(steps))) for steps in (2, 5, 16, 24)}
    assert list(levels.values()) == sorted(levels.values(), reverse=True)
    assert levels[2] > 0.4
    assert 0.05 < levels[5] < 0.3
    assert levels[24] < 1e-3
    for steps in (2, 5):
        found = [regression.error(regression.aid(regression.inner(k), regression.conjugate(steps))) for k in (200, 300)]
        assert found == pytest.approx([levels[steps]] * 2, rel=0.05)
    assert regression.error(ITD(regression.inner(400))) < 2e-3


def test_the_substituted_form_is_worse_far_from_the_posterior_and_better_near_it(regression: Regression) -> None:
    def both(steps: int) -> tuple[float, float]:
        inner = regression.inner(steps)
        autograd, substituted = (
            regression.error(regression.aid(inner, Dense(), form)) for form in ("autograd", "substituted")
        )
        return autograd, substituted

    far, near = both(5), both(400)
    assert 0.5 < far[0] < 1 < far[1] < 4
    assert 1e-4 < near[0] < 2e-3
    assert near[1] < 1e-6


def slope(x: list[float], y: list[float]) -> float:
    a, b = torch.tensor(x).log(), torch.tensor(y).log()
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


@final
@dataclass(frozen=True)
class Perturbed(AbstractLinearSolver):
    """The exact solution, moved by `distance` along a random direction."""

    distance: float

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        exact = Dense().solve(operator, b, guess).value
        direction = normal(*b.shape, seed=11)
        v = exact + self.distance * direction / direction.norm()
        residual = torch.linalg.vector_norm(operator.residual(b, v), dim=-1)
        return Solved(v, (Status.successful,) * len(v), residual, 1)


@pytest.mark.parametrize("form", ["autograd", "substituted"])
def test_the_error_is_of_first_order_in_the_distance_of_y_and_of_the_linear_solution(
    regression: Regression, form: Any
) -> None:
    distances = [10.0**-k for k in range(2, 7)]
    direction = normal(64, seed=10)
    direction = direction / direction.norm()

    def moved(distance: float) -> ClosedForm:
        def solution(x: Any, task: Any) -> Any:
            y = regression.family.solution(x, task)
            return {
                "mean": y["mean"] + distance * direction[:32],
                "log_variance": y["log_variance"] + distance * direction[32:],
            }

        return ClosedForm(solution)

    in_y = [regression.error(regression.aid(moved(distance), Dense(), form)) for distance in distances]
    assert slope(distances, in_y) == pytest.approx(1, abs=0.1)
    exact = ClosedForm(regression.family.solution)
    in_v = [regression.error(regression.aid(exact, Perturbed(distance), form)) for distance in distances]
    assert slope(distances, in_v) == pytest.approx(1, abs=0.1)


def test_the_error_of_the_linear_solution_obeys_the_bound_of_conjugate_gradients(regression: Regression) -> None:
    def v(linear: AbstractLinearSolver) -> Tensor:
        aid = regression.aid(ClosedForm(regression.family.solution), linear)
        found = hypergradient(
            problem_of(regression.family), regression.x, regression.x, estimator=aid, data=regression.data, throw=False
        )
        return flat(found.v)

    X = regression.data["support_x"][0]
    eigenvalues = torch.cat([torch.linalg.eigvalsh(X.mT @ X + torch.eye(32)), torch.full((32,), 0.5)])
    kappa = float(eigenvalues.max() / eigenvalues.min())
    exact, q = v(Dense()), (kappa**0.5 - 1) / (kappa**0.5 + 1)
    for steps in (1, 2, 5, 8, 16):
        error = float((v(regression.conjugate(steps)) - exact).norm())
        assert error <= 2 * kappa**0.5 * q**steps * float(exact.norm())


def test_the_error_of_explicit_gradients_falls_as_the_distance_of_the_steps(regression: Regression) -> None:
    X = regression.data["support_x"][0]
    rho = 1 - float(torch.linalg.eigvalsh(X.mT @ X).min() + 1) / float(torch.linalg.matrix_norm(X, 2).square() + 1)
    slowest = max(rho, 1 - 0.5 / float(torch.linalg.matrix_norm(X, 2).square() + 1))
    steps = [400, 500, 600]
    errors = [regression.error(ITD(regression.inner(k))) for k in steps]
    rates = [(b / a) ** (1 / 100) for a, b in pairwise(errors)]
    assert rates == pytest.approx([slowest] * 2, abs=0.02)


# Monte Carlo


def logistic_tasks(tasks: int = 2, n: int = 30) -> dict[str, Tensor]:
    X, U, truth = normal(tasks, n, 6, seed=30), normal(tasks, n, 6, seed=31), normal(6, 1, seed=32)
    noise = normal(2, tasks, n, seed=33)
    b, c = (((Z @ truth).squeeze(-1) + e) > 0 for Z, e in ((X, noise[0]), (U, noise[1])))
    return {"support_x": X, "support_y": b.double(), "query_x": U, "query_y": c.double()}


def linear_net(inputs: int = 6, outputs: int = 1, bias: bool = False, seed: int = 40) -> nn.Module:
    net = nn.Linear(inputs, outputs, bias=bias).double()
    with torch.no_grad():
        net.weight.copy_(0.3 * normal(outputs, inputs, seed=seed))
    return net


NEWTON = Newton(tol=1e-12)


@pytest.mark.parametrize("isotropic", [False, True])
def test_the_gradient_is_that_of_finite_differences_of_the_problem_solved_again(isotropic: bool) -> None:
    learner = ibaml(
        linear_net(),
        binary_cross_entropy_with_logits,
        prior=GaussianPrior(0.05, -1.0, isotropic=isotropic),
        draws=MonteCarlo(32, 10),
        inner=NEWTON,
        system=KLSystem(40),
        outer_objective=OuterObjective(kl_weight=0.02, hyper_prior_weight=0.03, precision_prior=(2.0, 0.5)),
    )
    data = prepared(learner, logistic_tasks(), 3)
    x, structure = ravel(learner.x0)

    def value(x: Tensor) -> float:
        estimator = AID(NEWTON, CG(rtol=0.0, max_steps=1))
        found = hypergradient(
            learner.problem, structure.unravel(x), learner.y0, estimator=estimator, data=data, throw=False
        )
        assert found.reports[0].residual <= 1e-12
        return found.value

    step = 1e-4
    differences = torch.stack(
        [torch.tensor((value(x + step * unit) - value(x - step * unit)) / (2 * step)) for unit in torch.eye(len(x))]
    )

    def error(found: Tensor) -> float:
        return float((found - differences).norm() / differences.norm())

    products = aid_of(learner).products
    assert isinstance(products, KLProducts)
    for form in get_args(Form):
        aid = aid_of(learner, products=replace(products, form=form))
        assert error(gradient_of(learner, data, aid)) <= 1e-6
    assert error(gradient_of(learner, data, aid_of(learner, linear=CG(rtol=0.0, max_steps=1)))) > 1e-2


def test_other_noise_in_the_products_is_another_gradient() -> None:
    learner = ibaml(
        linear_net(),
        binary_cross_entropy_with_logits,
        prior=GaussianPrior(0.05, -1.0),
        draws=MonteCarlo(32, 10),
        inner=NEWTON,
        system=KLSystem(40),
    )
    data = prepared(learner, logistic_tasks(), 3)
    other = prepared(learner, logistic_tasks(), 4)
    products = aid_of(learner).products
    assert isinstance(products, KLProducts)

    def fresh(x: Any, y: Any, task: Any) -> Tensor:
        return products.expectation(x, y, {**task, "support_noise": task["other"]})

    data = {**data, "other": other["support_noise"]}
    wrong = aid_of(learner, products=replace(products, expectation=fresh))
    assert 1e-3 < relative(gradient_of(learner, data, wrong), gradient_of(learner, data)) < 1


@pytest.mark.parametrize("loss", [GaussianLikelihood(0.3), mse_loss, nn.MSELoss()])
def test_integers_are_numbers_for_a_loss_of_numbers(loss: Any) -> None:
    learner = ibaml(nn.Linear(2, 1).double(), loss)
    task = {"query_x": normal(4, 2, seed=80)}
    found = learner.predict(learner.x0, learner.y0, task)  # without targets
    assert found.shape == (4, 1)
    assert float(found.abs().max()) > 0
    integers = {**task, "support_y": torch.arange(4)}
    assert torch.equal(learner.predict(learner.x0, learner.y0, integers), found)


@pytest.mark.parametrize(
    ("loss", "outputs", "target", "message"),
    [
        (mse_loss, (2, 3, 3), torch.zeros(3), r"must have the shape of the outputs, \(3, 3\)"),
        (cross_entropy, (2, 3, 3), torch.zeros(3), "must be numbers of classes"),
        (GaussianLikelihood(1.0), (2, 3, 2), torch.zeros(3, 2), "or one number a sample"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), (2, 3, 3), torch.arange(3), "with `weight`"),
        (nn.CrossEntropyLoss(ignore_index=0), (2, 3, 3), torch.arange(3), "`ignore_index`"),
    ],
)
def test_targets_and_losses_of_no_mixture_are_refused(loss: Any, outputs: Any, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_loss(loss, torch.zeros(outputs), {"query_y": target}, "query")


def test_noise_is_a_function_of_the_seed_and_another_one_for_each_task_and_side() -> None:
    learner = ibaml(linear_net(), binary_cross_entropy_with_logits, draws=MonteCarlo(6, 10))
    batch = logistic_tasks()
    data, again, other = (prepared(learner, batch, seed) for seed in (3, 3, 4))
    noise = data["support_noise"]
    assert noise.shape == data["query_noise"].shape == (2, 6, 6)
    assert torch.equal(noise, again["support_noise"])
    assert torch.equal(noise[:, 3:], -noise[:, :3])
    for one, two in ((noise, other["support_noise"]), (noise, data["query_noise"]), (noise[0], noise[1])):
        assert float((one - two).abs().min()) > 0
    assert set(batch) == {"support_x", "support_y", "query_x", "query_y"}
    single = ibaml(linear_net(), binary_cross_entropy_with_logits, draws=MonteCarlo(5, 3, antithetic=False))
    assert prepared(single, batch, 0)["support_noise"].shape == (2, 5, 6)
    learner = ibaml(linear_net(), binary_cross_entropy_with_logits, draws=MonteCarlo(20_000, 10))
    many = prepared(learner, batch, 0)["support_noise"]
    assert float(many.var() - 1) == pytest.approx(0, abs=0.02)


def test_tasks_without_noise_are_refused() -> None:
    learner = ibaml(linear_net(), binary_cross_entropy_with_logits)
    with pytest.raises(Exception, match=r"learner\.prepare"):
        hypergradient(
            learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=logistic_tasks(), throw=False
        )


def test_the_divergence_is_that_of_torch_distributions() -> None:
    x, y = gaussian(seed=1), gaussian(seed=5)
    p, q = (Normal(part["mean"], (part["log_variance"] / 2).exp()) for part in (x, y))
    assert float(divergence(x, y)) == pytest.approx(float(kl_divergence(q, p).sum()), rel=1e-12)
    assert float(divergence(x, x)) == 0
    single = {"mean": x["mean"], "log_variance": torch.tensor(0.7)}
    spread = {"mean": x["mean"], "log_variance": torch.full((4,), 0.7)}
    assert float(divergence(single, y)) == pytest.approx(float(divergence(spread, y)), rel=1e-14)
    assert float(BayesianRegression(1.0).divergence(x, y)) == pytest.approx(float(divergence(x, y)), rel=1e-12)


def test_the_hyper_prior_is_that_of_torch_distributions() -> None:
    gamma: Any = torch.distributions.Gamma(torch.tensor(2.0), torch.tensor(0.5))
    standard: Any = Normal(0.0, 1.0)

    def constant_free(x: Any) -> Tensor:
        found: Tensor = -standard.log_prob(x["mean"]).sum() - gamma.log_prob((-x["log_variance"]).exp()).sum()
        return found

    x, other = gaussian(seed=1), gaussian(seed=5)
    found = hyper_prior(x, 2.0, 0.5) - hyper_prior(other, 2.0, 0.5)
    assert float(found) == pytest.approx(float(constant_free(x) - constant_free(other)), rel=1e-12)


# The learners


def classification(tasks: int = 3, n: int = 8, classes: int = 3, inputs: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(50)
    return {
        "support_x": normal(tasks, n, inputs, seed=51),
        "support_y": torch.randint(0, classes, (tasks, n), generator=generator),
        "query_x": normal(tasks, n + 1, inputs, seed=52),
        "query_y": torch.randint(0, classes, (tasks, n + 1), generator=generator),
    }


def net(seed: int = 60) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=seed + k))
    return module


WIDE = GaussianPrior(kl_weight=0.1, log_variance=-2.0)


def learners(**changes: Any) -> dict[str, Learner]:
    arguments: dict[str, Any] = {"prior": WIDE, "draws": MonteCarlo(4, 10), "inner": PosteriorDescent(4), **changes}
    module = net()
    return {
        "ibaml": ibaml(module, cross_entropy, **arguments),
        "ibaml_head": ibaml_head(module[:2], module[2], cross_entropy, **arguments),
        "abml": abml(module, cross_entropy, **arguments),
    }


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("name", ["ibaml", "ibaml_head", "abml"])
def test_objectives_are_those_of_their_definition(name: str, isotropic: bool) -> None:
    prior = replace(WIDE, isotropic=isotropic)
    outer_objective = OuterObjective(kl_weight=0.2, hyper_prior_weight=0.3, precision_prior=(2.0, 0.5))
    learner = learners(prior=prior, outer_objective=outer_objective)[name]
    task = {key: value[0] for key, value in prepared(learner, classification()).items()}
    x, structure = learner.x0, ravel(learner.y0["mean"])[1]
    m, l_t = flat(x["mean"]) + 0.1 * normal(structure.size, seed=98), normal(structure.size, seed=99) - 2
    y = {"mean": structure.unravel(m), "log_variance": structure.unravel(l_t)}
    z = x if learner.problem.encode is None else learner.problem.encode(x, task)

    def expected(side: str) -> float:
        total = 0.0
        for noise in task[f"{side}_noise"]:
            drawn = structure.unravel(m + (l_t / 2).exp() * noise)
            drawn = {f"2.{key}": value for key, value in drawn.items()} if name == "ibaml_head" else drawn
            outputs = torch.func.functional_call(net(), drawn, (task[f"{side}_x"],))
            total += float(cross_entropy(outputs, task[f"{side}_y"]).detach()) / 4
        return total

    kl = float(divergence(x, y))
    g = expected("support") + 0.1 * kl
    f = expected("query") + 0.2 * kl + 0.3 * float(hyper_prior(x, 2.0, 0.5))
    assert float(learner.problem.g(z, y, task).detach()) == pytest.approx(g, rel=1e-12)
    assert float(learner.problem.f(z, y, task).detach()) == pytest.approx(f, rel=1e-12)
    assert learner.problem.init is not None
    start = learner.problem.init(z, task)
    assert torch.equal(flat(start), torch.cat([flat(x["mean"]), torch.full((structure.size,), -2.0)]))
    bare = learners(prior=prior)[name].problem
    assert float(bare.f(z, y, task).detach()) == pytest.approx(expected("query"), rel=1e-12)


@pytest.mark.parametrize("name", ["ibaml", "ibaml_head", "abml"])
def test_the_predictive_outer_loss_is_that_of_the_averaged_probability(name: str) -> None:
    learner = learners(outer_objective=OuterObjective("predictive", kl_weight=0.2))[name]
    batch = prepared(learner, classification())
    mask = torch.ones(batch["query_y"].shape, dtype=torch.float64)
    mask[0, 2:5] = 0
    x, structure = learner.x0, ravel(learner.y0["mean"])[1]
    m, l_t = flat(x["mean"]) + 0.1 * normal(structure.size, seed=98), normal(structure.size, seed=99) - 2
    y = {"mean": structure.unravel(m), "log_variance": structure.unravel(l_t)}
    for data, kept in ((batch, torch.ones_like(mask)), ({**batch, "query_mask": mask}, mask)):
        task = {key: value[0] for key, value in data.items()}
        encode = learner.problem.encode
        z = x if encode is None else encode(x, task)
        probabilities = []
        for noise in task["query_noise"]:
            drawn = structure.unravel(m + (l_t / 2).exp() * noise)
            drawn = {f"2.{key}": value for key, value in drawn.items()} if name == "ibaml_head" else drawn
            logits = torch.func.functional_call(net(), drawn, (task["query_x"],)).detach()
            probabilities.append(logits.softmax(1).gather(1, task["query_y"][:, None])[:, 0])
        nll = -torch.stack(probabilities).mean(0).log()
        expected = float((nll * kept[0]).sum() / kept[0].sum()) + 0.2 * float(divergence(x, y))
        assert float(learner.problem.f(z, y, task).detach()) == pytest.approx(expected, rel=1e-12)
        whole = {**data, "support_mask": torch.ones_like(batch["support_y"], dtype=torch.float64)}
        assert gradient_of(learner, whole).isfinite().all()


def test_the_predictive_outer_loss_of_numbers_is_the_density_of_the_mixture() -> None:
    likelihood = GaussianLikelihood(0.3)
    learner = ibaml(
        nn.Linear(2, 1).double(),
        likelihood,
        prior=GaussianPrior(4e-4, -1.0),
        outer_objective=OuterObjective("predictive"),
    )
    batch = {f"{side}_x": normal(1, 4, 2, seed=70 + k) for k, side in enumerate(("support", "query"))}
    batch |= {f"{side}_y": normal(1, 4, seed=72 + k) for k, side in enumerate(("support", "query"))}  # no column
    task = {key: value[0] for key, value in prepared(learner, batch).items()}
    W = learner.x0["mean"]["weight"] + math.exp(-0.5) * task["query_noise"][:, :2][:, None]
    b = learner.x0["mean"]["bias"] + math.exp(-0.5) * task["query_noise"][:, 2:]
    outputs = task["query_x"] @ W.mT + b[:, None]
    expected = likelihood.predictive_nll(outputs, task["query_y"][:, None])
    assert float(learner.problem.f(learner.x0, learner.y0, task)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("name", ["ibaml", "ibaml_head"])
def test_closed_forms_of_the_divergence_are_what_autograd_finds_at_any_y(name: str, isotropic: bool) -> None:
    learner = learners(prior=replace(WIDE, isotropic=isotropic))[name]
    data = prepared(learner, classification())
    exact, plain = aid_of(learner, linear=Dense()), AID(learner.adapt, Dense())
    assert float((gradient_of(learner, data, exact) - gradient_of(learner, data, plain)).abs().max()) <= 1e-14
    damped = [replace(aid, damping=0.3) for aid in (exact, plain)]
    one, two = (gradient_of(learner, data, aid) for aid in damped)
    assert float((one - two).abs().max()) <= 1e-14


@pytest.mark.parametrize("form", ["autograd", "substituted"])
@pytest.mark.parametrize("name", ["ibaml", "ibaml_head"])
def test_both_forms_are_one_where_the_inner_problem_is_solved(name: str, form: Any) -> None:
    learner = learners()[name]
    products = aid_of(learner).products
    assert isinstance(products, KLProducts)
    solver = LBFGS(1e-11, max_steps=2000)
    learner = replace(learner, adapt=solver, estimator=AID(solver, Dense(), products=replace(products, form=form)))
    data = prepared(learner, classification())
    plain = AID(learner.adapt, Dense())
    assert relative(gradient_of(learner, data), gradient_of(learner, data, plain)) <= 1e-8


def test_a_shared_body_has_the_gradient_of_the_composition() -> None:
    learner = learners(inner=PosteriorDescent(3))["ibaml_head"]
    problem, data = learner.problem, prepared(learner, classification())
    assert problem.encode is not None
    encode, f, g, init = problem.encode, problem.f, problem.g, problem.init
    assert init is not None
    composed = BilevelProblem(
        lambda x, y, task: f(encode(x, task), y, task),
        lambda x, y, task: g(encode(x, task), y, task),
        init=lambda x, task: init(encode(x, task), task),
        tasks=True,
    )
    for estimator in (AID(learner.adapt, Dense()), ITD(learner.adapt)):
        plain = hypergradient(composed, learner.x0, learner.y0, estimator=estimator, data=data, throw=False)
        found = hypergradient(problem, learner.x0, learner.y0, estimator=estimator, data=data, throw=False)
        assert relative(found.grad, plain.grad) <= 1e-12
    plain = hypergradient(composed, learner.x0, learner.y0, estimator=AID(learner.adapt, Dense()), data=data)
    own = hypergradient(problem, learner.x0, learner.y0, estimator=aid_of(learner, linear=Dense()), data=data)
    assert relative(own.grad, plain.grad) <= 1e-12
    assert float(flat(own.grad["body"]).norm()) > 1e-3


@pytest.mark.parametrize("name", ["ibaml", "ibaml_head", "abml"])
def test_tasks_side_by_side_are_the_mean_of_a_loop(name: str) -> None:
    learner = learners()[name]
    data = prepared(learner, classification())
    each = [gradient_of(learner, {key: value[k : k + 1] for key, value in data.items()}) for k in range(3)]
    assert relative(gradient_of(learner, data), torch.stack(each).mean(0)) <= 1e-11
    some = hypergradient(
        learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=data, throw=False, chunk_size=2
    )
    assert relative(some.grad, gradient_of(learner, data)) <= 1e-11


@pytest.mark.parametrize("name", ["ibaml", "ibaml_head", "abml"])
def test_padding_does_not_count(name: str) -> None:
    learner = learners()[name]
    data = prepared(learner, classification())
    padded = {**data, "support_mask": torch.ones(3, 10), "query_mask": torch.ones(3, 11)}
    for side, size in (("support", 8), ("query", 9)):
        padded[f"{side}_mask"][:, size:] = 0
        padded[f"{side}_x"] = torch.cat([data[f"{side}_x"], 9 * normal(3, 2, 4, seed=70)], 1)
        padded[f"{side}_y"] = torch.cat([data[f"{side}_y"], torch.ones(3, 2, dtype=torch.int64)], 1)
    assert relative(gradient_of(learner, padded), gradient_of(learner, data)) <= 1e-12


def test_the_explicit_gradient_is_that_of_the_steps() -> None:
    learner = learners(inner=PosteriorDescent(3, variance_step=0.5), outer_objective=OuterObjective(kl_weight=0.1))[
        "abml"
    ]
    data = prepared(learner, classification())
    x, structure = ravel(learner.x0)
    direction, step = normal(len(x), seed=80), 1e-5

    def value(x: Tensor) -> float:
        found = hypergradient(
            learner.problem, structure.unravel(x), learner.y0, estimator=learner.estimator, data=data, throw=False
        )
        return found.value

    difference = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert float(gradient_of(learner, data) @ direction) == pytest.approx(difference, rel=1e-6)
    checkpointed = ITD(Iterate(learner.adapt.optimizer, 3), checkpoint=True)  # type: ignore[attr-defined]
    assert relative(gradient_of(learner, data, checkpointed), gradient_of(learner, data)) <= 1e-12


def test_log_variances_have_a_step_of_their_own() -> None:
    data = classification()
    one = learners(inner=PosteriorDescent(1, 0.1))["ibaml"]
    two = learners(inner=PosteriorDescent(1, 0.1, 0.4))["ibaml"]
    data = prepared(one, data)

    def moved(learner: Learner) -> Any:
        aid = AID(learner.adapt, CG(rtol=0.0, max_steps=1))
        y = hypergradient(learner.problem, learner.x0, learner.y0, estimator=aid, data=data, throw=False).y
        return [flat(y[key]) - flat(tree_map(lambda leaf: leaf.expand(3, *leaf.shape), learner.y0[key])) for key in y]

    (m_1, l_1), (m_2, l_2) = moved(one), moved(two)
    assert torch.equal(m_1, m_2)
    assert float(l_1.abs().max()) > 1e-5
    assert torch.allclose(4 * l_1, l_2, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_with_variances_frozen_and_no_noise_it_is_imaml(noise: float) -> None:
    prior = GaussianPrior(kl_weight=0.3, log_variance=-1.1, learn_variance=False)
    frozen = ibaml(net(), cross_entropy, prior=prior, inner=PosteriorDescent(4, 0.1), system=KLSystem(3))
    lambda_ = prior.kl_weight * math.exp(-prior.log_variance)
    other = imaml(net(), cross_entropy, regularization=lambda_, step=0.1, inner_steps=4, linear_steps=3)
    data = prepared(frozen, classification())
    data = {key: noise * value if key.endswith("noise") else value for key, value in data.items()}
    assert list(frozen.x0) == list(frozen.y0) == ["mean"]
    error = relative(gradient_of(frozen, data), gradient_of(other, classification()))
    assert error <= 1e-12 if noise == 0 else error > 1e-3


def test_for_linear_regression_it_is_imaml_with_noise_too() -> None:
    batch = {key: value.unsqueeze(-1) if key.endswith("_y") else value for key, value in regressions(q=6).items()}
    prior = GaussianPrior(kl_weight=0.3, log_variance=-1.1, learn_variance=False)
    frozen = ibaml(linear_net(), mse_loss, prior=prior, system=KLSystem(3))
    other = imaml(linear_net(), mse_loss, regularization=0.3 * math.exp(1.1), inner_steps=5, linear_steps=3)
    assert relative(gradient_of(frozen, prepared(frozen, batch)), gradient_of(other, batch)) <= 1e-10


def saved_bytes(learner: Learner, data: Any) -> int:
    """The most bytes that any one evaluation keeps for its derivatives: what is packed, less what was let go before."""
    live = peak = 0

    @final
    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal live, peak
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            live += self.size
            peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.size

    def unpack(held: Held) -> Tensor:
        return held.tensor

    with saved_tensors_hooks(Held, unpack):
        hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=data, throw=False)
    return peak


def test_memory_grows_with_the_steps_of_explicit_gradients_and_not_of_implicit_ones() -> None:
    found: dict[str, list[int]] = {"ibaml": [], "ibaml_head": [], "abml": []}
    for steps in (2, 4, 8, 16):
        for name, learner in learners(inner=PosteriorDescent(steps)).items():
            found[name].append(saved_bytes(learner, prepared(learner, classification())))
    assert len(set(found["ibaml"])) == len(set(found["ibaml_head"])) == 1
    a, b, c, d = found["abml"]
    assert (c - b) == 2 * (b - a) == (d - c) // 2 > 0


def test_explicit_gradients_through_a_prior_that_is_the_start_only_are_not_implicit() -> None:
    learner = learners()["abml"]
    data = prepared(learner, classification())
    implicit = gradient_of(learner, data, AID(Iterate(GradientDescent(0.1), 4), Dense()))
    assert relative(gradient_of(learner, data), implicit) > 0.05


# Predictions


@pytest.mark.parametrize("name", ["ibaml", "ibaml_head", "abml"])
def test_predictions_are_the_mean_probability_of_draws(name: str) -> None:
    learner = learners(draws=MonteCarlo(4, 6, seed=4))[name]
    task = {key: value[0] for key, value in classification().items()}
    x = learner.x0
    found = learner.predict(x, learner.y0, task).detach()
    assert found.shape == (9, 3)
    assert torch.allclose(found.exp().sum(-1), torch.ones(9))
    assert torch.equal(found, learner.predict(x, learner.y0, task).detach())
    generator = torch.Generator().manual_seed(4)
    size = flat(x["mean"]).numel()
    half = torch.randn(3, size, generator=generator, dtype=torch.float64)
    total = torch.zeros(9, 3)
    for noise in torch.cat([half, -half]):
        drawn = ravel(x["mean"])[1].unravel(flat(x["mean"]) + math.exp(-1.0) * noise)
        module = net()
        if name == "ibaml_head":
            drawn = {f"2.{key}": value for key, value in drawn.items()}
        logits = torch.func.functional_call(module, drawn, (task["query_x"],)).detach()
        total += log_softmax(logits, -1).exp() / 6
    assert float((found.exp() - total).abs().max()) <= 1e-12
    sharp = {
        "mean": x["mean"],
        "log_variance": tree_map(lambda leaf: torch.full_like(leaf, -60.0), learner.y0["log_variance"]),
    }
    certain = log_softmax(net().requires_grad_(False)(task["query_x"]), -1)
    assert torch.allclose(learner.predict(x, sharp, task), certain, atol=1e-10)


def test_what_was_learned_is_exported_as_a_module() -> None:
    for learner in learners().values():
        module = learner.export(tree_map(lambda leaf: leaf + 1, learner.x0))
        inputs = normal(2, 4, seed=90)
        moved = net()
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(1)
        assert torch.allclose(module(inputs), moved(inputs))


def test_predictive_moments_of_a_linear_model_are_those_of_its_posterior() -> None:
    likelihood = GaussianLikelihood(0.3)
    X, y = normal(5, 6, seed=91), {"mean": normal(6, seed=92), "log_variance": normal(6, seed=93)}
    draws = y["mean"] + (y["log_variance"] / 2).exp() * normal(200_000, 6, seed=94)
    outputs = draws @ X.mT
    mean, variance = likelihood.moments(outputs)
    truth = (X.square() * y["log_variance"].exp()).sum(1) + 0.3
    assert float((mean - X @ y["mean"]).abs().max()) <= 5 * float(truth.max() / 200_000) ** 0.5
    assert float((variance / truth - 1).abs().max()) <= 0.02
    targets = X @ y["mean"] + truth.sqrt() * normal(20_000, 5, seed=95)
    low, high = likelihood.interval(outputs, 0.9)
    assert float(((low <= targets) & (targets <= high)).double().mean()) == pytest.approx(0.9, abs=0.01)
    exact = -torch.distributions.Normal(X @ y["mean"], truth.sqrt()).log_prob(targets[0]).mean()  # type: ignore[no-untyped-call]
    assert float(likelihood.predictive_nll(outputs, targets[0])) == pytest.approx(float(exact), rel=0.01)


@pytest.mark.parametrize("loss", [mse_loss, cross_entropy])
def test_predictions_average_the_draws_of_a_posterior(loss: Any) -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(2, 3), nn.Linear(3, 2)
    targets = torch.arange(2).repeat(3, 2) if loss is cross_entropy else torch.randn(3, 4, 2)
    batch = {
        "support_x": torch.randn(3, 4, 2),
        "support_y": targets,
        "query_x": torch.randn(3, 4, 2),
        "query_y": targets,
    }
    whole = nn.Sequential(body, head)
    short = PosteriorDescent(5, 0.01)
    for learner in (ibaml_head(body, head, loss), ibaml(whole, loss, inner=short), abml(whole, loss, inner=short)):
        adapted = adapt(learner, learner.x0, batch)
        found, mean = draws(learner, learner.x0, adapted), predict(learner, learner.x0, adapted)
        assert found.shape == (3, 100 if learner.name == "ibaml_head" else 10, 4, 2)
        assert float(found.var(1).min()) > 0
        torch.testing.assert_close(found.exp().mean(1).log() if loss is cross_entropy else found.mean(1), mean)
    with pytest.raises(ValueError, match=r"needs a learner whose tasks have a posterior.*Got MAML"):
        draws(maml(whole, loss), learner.x0, adapted)


def test_a_gaussian_likelihood_refuses_targets_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"needs targets of the outputs' shape, \(3, 2\)\. Got \(3, 1\)"):
        GaussianLikelihood(1.0)(torch.zeros(3, 2), torch.zeros(3, 1))


LOSSES = (cross_entropy, nn.CrossEntropyLoss(), lambda output, target: cross_entropy(output, target) / 2)


def test_the_predictive_probability_is_an_average_however_the_cross_entropy_is_written() -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 3)
    task = {"support_x": torch.randn(1, 6, 2), "support_y": torch.arange(6)[None] % 3, "query_x": torch.randn(1, 4, 2)}
    task["query_y"] = torch.zeros(1, 4).long()
    found = [
        learner.predict(learner.x0, learner.y0, {key: entry[0] for key, entry in task.items()})
        for learner in (ibaml(net, loss, prior=GaussianPrior(4e-4, 1.0)) for loss in LOSSES)
    ]
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])


def test_the_loss_of_a_gaussian_likelihood_is_minus_its_log_density() -> None:
    output, target = normal(4, 1, seed=96), normal(4, 1, seed=97)
    truth = -torch.distributions.Normal(output, 0.3**0.5).log_prob(target).mean()  # type: ignore[no-untyped-call]
    assert float(GaussianLikelihood(0.3)(output, target)) == pytest.approx(float(truth), rel=1e-12)


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianPrior(0.0, -2.0), "kl_weight"),
        (lambda: GaussianPrior(0.1, math.inf), "log_variance"),
        (lambda: GaussianPrior(0.1, -2.0, isotropic=True, learn_variance=False), "isotropic"),
        (lambda: MonteCarlo(0, 10), "samples"),
        (lambda: MonteCarlo(3, 10), "antithetic"),
        (lambda: MonteCarlo(4, 3), "antithetic"),
        (lambda: OuterObjective("mean"), r"must be one of expected, predictive\. Got 'mean'"),  # type: ignore[arg-type]
        (lambda: OuterObjective(kl_weight=-1.0), "kl_weight"),
        (lambda: OuterObjective(hyper_prior_weight=-1.0), "hyper_prior_weight"),
        (lambda: OuterObjective(precision_prior=(0.0, 1.0)), "precision_prior"),
        (lambda: PosteriorDescent(-1), "steps"),
        (lambda: PosteriorDescent(1, -1.0), "step"),
        (lambda: PosteriorDescent(1, 1.0, -1.0), "variance_step"),
        (lambda: KLSystem(0), "steps"),
        (lambda: KLSystem(1, damping=-1.0), "damping"),
        (lambda: KLSystem(1, form="exact"), "form"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": 0.1}, r"`ibaml\(prior=...\)` must be a `GaussianPrior`. Got 0.1"),
        ({"draws": 4}, "a `MonteCarlo`"),
        ({"inner": 5}, r"a `PosteriorDescent` or an inner solver"),
        ({"system": CG()}, "a `KLSystem`"),
        ({"outer_objective": Adam(0.1)}, "an? `OuterObjective`"),
        ({"weight": 0.1}, "unexpected keyword argument 'weight'"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ibaml(net(), cross_entropy, **arguments)


OLD: dict[str, Any] = {
    "kl_weight": 0.1,
    "samples": 6,
    "evaluation_samples": 8,
    "log_variance": -2.0,
    "isotropic": True,
    "inner_steps": 3,
    "step": 0.2,
    "variance_step": 0.3,
    "outer_loss": "predictive",
    "outer_kl_weight": 0.02,
    "hyper_prior_weight": 0.03,
    "precision_prior": (2.0, 0.5),
    "seed": 5,
}
NEW: dict[str, Any] = {
    "prior": replace(WIDE, isotropic=True),
    "draws": MonteCarlo(6, 8, seed=5),
    "inner": PosteriorDescent(3, 0.2, 0.3),
    "outer_objective": OuterObjective("predictive", 0.02, 0.03, (2.0, 0.5)),
}


@pytest.mark.parametrize(
    ("build", "old", "new"),
    [
        (
            lambda **keywords: ibaml(net(), cross_entropy, **keywords),
            {"linear_steps": 2, "damping": 0.1, "form": "substituted"},
            {"system": KLSystem(2, 0.1, "substituted")},
        ),
        (lambda **keywords: ibaml_head(net()[:2], net()[2], cross_entropy, **keywords), {}, {}),
        (lambda **keywords: abml(net(), cross_entropy, **keywords), {}, {}),
    ],
)
def test_ungrouped_keywords_are_the_groups_and_say_so(build: Callable[..., Learner], old: Any, new: Any) -> None:
    with pytest.warns(DeprecationWarning, match=r"write `[a-z_]+\(prior=GaussianPrior\(kl_weight=0.1"):
        before = build(**OLD, **old)
    now = build(**NEW, **new)
    data = prepared(now, classification())
    assert all(torch.equal(value, data[key]) for key, value in prepared(before, classification()).items())
    assert torch.equal(gradient_of(before, data), gradient_of(now, data))
    task = {key: value[0] for key, value in classification().items()}
    assert torch.equal(*(learner.predict(learner.x0, learner.y0, task) for learner in (before, now)))


@pytest.mark.parametrize("name", ["ibaml", "ibaml_head"])
def test_checkpoints_from_before_the_groups_know_their_run(name: str) -> None:
    products = aid_of(learners(outer_objective=OuterObjective("predictive"))[name]).products
    assert isinstance(products, KLProducts)
    assert (
        f"settings=Settings(method='{name}', kl_weight=0.1, samples=4, evaluation_samples=10, log_variance=-2.0,"
        " isotropic=False, learn_variance=True, antithetic=True, outer_loss='predictive', outer_kl_weight=0.0,"
        f" hyper_prior_weight=0.0, precision_prior=(1.0, 0.01), seed=0), features={name == 'ibaml_head'})>"
    ) in repr(products.expectation)


def test_an_ungrouped_keyword_leaves_the_rest_of_its_group_as_the_method_has_it() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"write `ibaml_head\(draws=MonteCarlo\(samples=6, evaluation_samples=100\)"
    ):
        learner = ibaml_head(net()[:2], net()[2], cross_entropy, samples=6)  # type: ignore[call-arg]
    assert prepared(learner, classification())["support_noise"].shape[1] == 6
    assert float(learner.x0["log_variance"]["weight"][0, 0]) == -2.0
    with pytest.warns(DeprecationWarning, match=r"write `ibaml\(inner=Newton\("):
        assert ibaml(net(), cross_entropy, inner=NEWTON, step=0.1).adapt is NEWTON  # type: ignore[call-arg]


def test_arguments_out_of_range_are_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="weight"):
        KLProducts(lambda: torch.zeros(()), 0.0)
    with pytest.raises(ValueError, match="variance"):
        GaussianLikelihood(0.0)
    with pytest.raises(ValueError, match="level"):
        GaussianLikelihood(1.0).interval(torch.zeros(2, 1), 1.0)
    with pytest.raises(ValueError, match="kl_weight"):
        BayesianRegression(1.0, 0.0)
    with pytest.raises(ValueError, match="tasks"):
        bayesian_regression(tasks=0)


# The figure of the documentation

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "implicit_bayes_figure.py"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="an installed package comes without its documentation")
def test_the_figure_shows_what_its_page_says(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("implicit_bayes_figure", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    path = tmp_path / "images" / "implicit_bayes.png"
    by_inner, by_linear = example.draw(path, [1, 5, 100, 200], [5, 16])
    assert path.read_bytes().startswith(b"\x89PNG")
    explicit, implicit = by_inner[example.EXPLICIT][1], by_inner[example.IMPLICIT][1]
    assert explicit[0] > 3 * implicit[0] > 3
    assert all(e > 1.3 * i for e, i in zip(explicit, implicit, strict=True))
    assert implicit[1] > 0.8
    substituted = by_inner[example.SUBSTITUTED][1]
    assert substituted[0] > 5
    assert substituted[-1] < 0.2 * implicit[-1]
    (levels,) = (curve[1] for curve in by_linear.values())
    assert levels == pytest.approx([0.11, 0.009], rel=0.1)
    assert (EXAMPLE.parent.parent / "images" / "implicit_bayes.png").stat().st_size < 150_000


def test_it_trains_is_evaluated_and_calibrated_as_any_other_learner() -> None:
    pytest.importorskip("sklearn")
    source = digits()
    episodes = Episodes(source.train, way=3, shots=2, queries=5)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()).double()
    learner = ibaml_head(
        body, nn.Linear(16, 3).double(), cross_entropy, prior=GaussianPrior(0.05, -2.0), draws=MonteCarlo(10, 20)
    )
    trained = train(learner, episodes, max_steps=12, batch=8, outer=Adam(1e-2))
    found = [evaluate(learner, x, episodes, episodes=40) for x in (learner.x0, trained.x)]
    assert found[1].loss.mean < found[0].loss.mean
    assert found[1].score.mean > found[1].before.mean + 0.1
    calibrated = calibration_of(found[1])
    assert calibrated.accuracy == pytest.approx(found[1].score.mean, abs=1e-6)
    assert calibrated.nll == pytest.approx(found[1].loss.mean, rel=1e-5)
    assert 0 < calibrated.ece <= calibrated.mce < 1


class Padded(AbstractTasks):
    """Noisy lines whose last two queries of every second task are padding, with absurd targets."""

    def sample(self, count: int, seed: int) -> dict[str, Tensor]:
        noise = normal(count, 12, 1, seed=seed % 1000)
        x = normal(count, 12, 1, seed=seed % 1000 + 1)
        y = 2 * x + 0.5 * noise
        mask = torch.ones(count, 7, dtype=torch.float64)
        mask[::2, 5:] = 0
        targets = torch.where(mask > 0, y[:, 5:, 0], 1e6)
        return {
            "support_x": x[:, :5],
            "support_y": y[:, :5, 0],
            "query_x": x[:, 5:],
            "query_y": targets,
            "query_mask": mask,
        }


def test_densities_and_intervals_of_new_tasks_are_those_of_the_likelihood() -> None:
    likelihood, tasks = GaussianLikelihood(0.1), Padded()
    prior = GaussianPrior(kl_weight=0.2, log_variance=-4.0)
    learner = ibaml(nn.Linear(1, 1).double(), likelihood, prior=prior, draws=MonteCarlo(4, 50))
    found = evaluate(learner, learner.x0, tasks, episodes=6, batch=6, seed=3)
    adapted = adapt(learner, learner.x0, tasks.sample(6, seed_of_step(3, 0)), seed=noise_seed(3, 0))
    outputs = draws(learner, learner.x0, adapted)
    nll, inside = [], []
    for task in range(6):
        kept = 5 if task % 2 == 0 else 7
        target = adapted.batch["query_y"][task, :kept, None]
        low, high = likelihood.interval(outputs[task, :, :kept])
        nll.append(float(likelihood.predictive_nll(outputs[task, :, :kept], target)))
        inside.append(float(((low < target) & (target < high)).double().mean()))
    assert found.nll is not None
    assert found.coverage is not None
    assert found.nll.mean == pytest.approx(sum(nll) / 6, rel=1e-12)
    assert found.coverage.mean == pytest.approx(sum(inside) / 6, rel=1e-12)
    assert 0 < found.coverage.mean < 1
    assert found.as_dict()["coverage"]["mean"] == found.coverage.mean
    plain = evaluate(maml(nn.Linear(1, 1).double(), mse_loss), learner.x0["mean"], tasks, episodes=2)
    assert plain.nll is None
    assert plain.coverage is None


@pytest.mark.parametrize("name", ["ibaml", "ibaml_head"])
def test_the_damping_of_the_system_is_that_of_the_implicit_gradient(name: str) -> None:
    module = net()
    arguments: Any = {
        **{"prior": WIDE, "draws": MonteCarlo(4, 10), "inner": LBFGS(1e-10, max_steps=2000)},
        "system": KLSystem(steps=300, damping=0.3),
    }
    if name == "ibaml":
        learner = ibaml(module, cross_entropy, **arguments)
    else:
        learner = ibaml_head(module[:2], module[2], cross_entropy, **arguments)
    data = prepared(learner, classification())
    damped, plain = (AID(learner.adapt, Dense(), damping=damping) for damping in (0.3, 0.0))
    found = gradient_of(learner, data)
    assert relative(found, gradient_of(learner, data, damped)) <= 1e-6
    assert relative(found, gradient_of(learner, data, plain)) >= 1e-2
