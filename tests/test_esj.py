"""Evolution strategies: the laws of their variance, the standard error that is reported, common random numbers."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from bilevel_strategies import normal

from bilevel import ESJ, ITD, BilevelProblem, Split, Start, hypergradient
from bilevel.hypergrad.esj import Distribution
from bilevel.problems.quadratic import random_quadratic
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate

P = 4
FAMILY = random_quadratic(P, 6, eigenvalues=[1.0, 1.5, 2.0, 3.0, 4.0, 5.0], cross=0.5)
PROBLEM = BilevelProblem(FAMILY.f, FAMILY.g)
INNER = Iterate(GradientDescent(0.2), max_steps=4)
X, Y0 = normal(P, seed=1), normal(6, seed=2)
DRAWS = 40_000


def factor(distribution: str, k: int, p: int = P) -> float:
    """E|mean - w|^2 / |w|^2."""
    return {
        "gaussian": (p + 1) / k,
        "rademacher": (p - 1) / k,
        "sphere": (p - 1) / k,
        "orthonormal": p / k - 1,
    }[distribution]


def indirect() -> torch.Tensor:
    """w = J_N' grad_y f, by ITD."""
    itd = hypergradient(PROBLEM, X, Y0, estimator=ITD(INNER))
    w: torch.Tensor = itd.grad - (FAMILY.E @ itd.y + FAMILY.R @ X + FAMILY.s)
    return w


def many(distribution: Any, k: int, estimates: int, seed: int) -> torch.Tensor:
    """Estimates of w `(estimates, p)` from k directions each, u and its factor being the estimator's own."""
    w = indirect()
    if distribution == "orthonormal":
        drawn = [ESJ(INNER, k, distribution=distribution, seed=seed)._draw(X, count) for count in range(estimates)]
        u, c = torch.stack([d for d, _ in drawn]), drawn[0][1]
    else:
        u, c = ESJ(INNER, k * estimates, distribution=distribution, seed=seed)._draw(X, 0)
        u = u.reshape(estimates, k, P)
    return c * ((u @ w).unsqueeze(-1) * u).mean(1)


@pytest.mark.parametrize(
    ("distribution", "k"),
    [
        *((distribution, k) for distribution in ("gaussian", "rademacher", "sphere") for k in (1, 3)),
        *(("orthonormal", k) for k in (1, 3, 4)),
    ],
)
def test_mean_and_variance_follow_the_laws(distribution: Any, k: int) -> None:
    w = indirect()
    estimates = many(distribution, k, DRAWS if distribution != "orthonormal" else DRAWS // 2, seed=7)
    squares = (estimates - w).square().sum(1)
    expected = factor(distribution, k) * float(w.square().sum())
    if expected == 0:
        assert float(squares.max()) <= 1e-20
        return
    n = len(squares)
    assert abs(float(squares.mean()) - expected) <= 5 * float(squares.std()) / math.sqrt(n)
    assert abs(float(squares.mean()) - expected) <= 0.05 * expected  # the test can tell p + 1 from p or p - 1
    deviation = (estimates.mean(0) - w).abs() / (estimates.std(0) / math.sqrt(n))
    assert float(deviation.max()) <= 5


@pytest.mark.parametrize("distribution", get_args(Distribution))
def test_estimates_end_to_end_follow_the_law(distribution: Any) -> None:
    """Whole estimates over seeds, as a user takes them: their mean is ITD's, their deviation the law's."""
    reference, w = hypergradient(PROBLEM, X, Y0, estimator=ITD(INNER)).grad, indirect()
    squares, errors, k, n = [], [], 3, 300
    total = torch.zeros(P)
    for seed in range(n):
        esj = ESJ(INNER, k, radius=0.5, distribution=distribution, seed=seed)
        found = hypergradient(PROBLEM, X, Y0, estimator=esj)
        total += found.grad - reference
        squares.append(float((found.grad - reference).square().sum()))
        assert found.standard_error is not None
        errors.append(found.standard_error**2)
    true = factor(distribution, k) * float(w.square().sum())
    for sample in (torch.tensor(squares), torch.tensor(errors)):  # `standard_error` squared is true on average
        assert abs(float(sample.mean()) - true) <= 5 * float(sample.std()) / math.sqrt(n)
    assert float(total.norm()) / n <= 5 * math.sqrt(true / n)


@pytest.mark.parametrize("distribution", get_args(Distribution))
def test_standard_error_of_a_single_direction_is_true_on_average(distribution: Any) -> None:
    w = indirect()
    esj, true = ESJ(INNER, 1, distribution=distribution), factor(distribution, 1) * float(w.square().sum())
    samples = many(distribution, 1, 20_000, seed=3)
    ratio = (esj._error(samples[:1], samples[0]) / float(samples[0].norm())) ** 2
    squares = ratio * samples.square().sum(1)
    assert abs(float(squares.mean()) - true) <= 5 * float(squares.std()) / math.sqrt(len(squares))


@pytest.mark.parametrize("distribution", get_args(Distribution))
def test_directions_are_isotropic(distribution: Any) -> None:
    u, c = ESJ(INNER, P, distribution=distribution, seed=11)._draw(X, 0)
    assert u.shape == (P, P)
    blocks = [ESJ(INNER, P, distribution=distribution, seed=s)._draw(X, 0)[0] for s in range(3000)]
    cover = c * torch.stack([b.T @ b / P for b in blocks]).mean(0)
    assert float((cover - torch.eye(P)).abs().max()) <= 0.15
    if distribution == "orthonormal":
        assert float((u @ u.T - torch.eye(P)).abs().max()) <= 1e-12
        first = torch.stack([b[0] for b in blocks])
        assert float(first.mean(0).abs().max()) <= 5 / math.sqrt(3000)  # no preferred sign
    if distribution == "sphere":
        assert float((u.norm(dim=1) - 1).abs().max()) <= 1e-12
    if distribution == "rademacher":
        assert set(u.flatten().tolist()) == {-1.0, 1.0}


def test_seed_and_count_choose_the_directions() -> None:
    grads = {
        (seed, count): hypergradient(
            PROBLEM, X, Y0, estimator=ESJ(INNER, 2, seed=seed), start=hypergradient_start(count)
        ).grad
        for seed in (0, 1)
        for count in (0, 1)
    }
    values = list(grads.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    again = hypergradient(PROBLEM, X, Y0, estimator=ESJ(INNER, 2, seed=1), start=hypergradient_start(1))
    assert torch.equal(again.grad, grads[1, 1])


def hypergradient_start(count: int) -> Any:
    return Start(y=Y0, count=count)


def test_chunks_give_the_same_estimate() -> None:
    whole = hypergradient(PROBLEM, X, Y0, estimator=ESJ(INNER, 7, distribution="gaussian"))
    for chunk in (1, 2, 7, 50):
        part = hypergradient(PROBLEM, X, Y0, estimator=ESJ(INNER, 7, distribution="gaussian", chunk=chunk))
        assert float((part.grad - whole.grad).norm()) <= 1e-9 * float(whole.grad.norm())
        assert part.standard_error == pytest.approx(whole.standard_error)


def test_perturbed_and_unperturbed_solves_share_their_random_numbers() -> None:
    """A g that draws a mask anew at each call: the same mask in all rows of the batch, so differences stay exact."""

    def g(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mask = torch.rand(6) + 0.5
        return ((y - FAMILY.B @ x).square() * mask).sum() / 2

    problem = BilevelProblem(lambda x, y: y.sum(), g)
    torch.manual_seed(0)
    esj = ESJ(INNER, P, radius=1e-4)
    found = hypergradient(problem, X, Y0, estimator=esj, throw=False)  # which says that g is no function
    torch.manual_seed(0)
    masks = [torch.rand(6) + 0.5 for _ in range(4)]
    J = torch.zeros(6, P)
    for mask in masks:
        J = J - 0.2 * mask.unsqueeze(1) * (J - FAMILY.B)
    assert float((found.grad - J.sum(0)).norm()) <= 1e-8


def test_more_orthonormal_directions_than_variables_are_refused() -> None:
    with pytest.raises(ValueError, match="at most the number of outer variables, 4"):
        hypergradient(PROBLEM, X, Y0, estimator=ESJ(INNER, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 0}, r"ESJ\(directions=\.\.\.\)` must be at least 1"),
        ({"chunk": 0}, r"ESJ\(chunk=\.\.\.\)` must be at least 1"),
        ({"radius": 0.0}, r"ESJ\(radius=\.\.\.\)` must be positive"),
        ({"radius": math.nan}, r"ESJ\(radius=\.\.\.\)` must be positive"),
        ({"distribution": "uniform"}, "must be one of gaussian, rademacher, sphere, orthonormal"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ESJ(INNER, **options)


@pytest.mark.parametrize(
    ("distribution", "a"), [("gaussian", 6.0), ("rademacher", 4.0), ("sphere", 4.0), ("orthonormal", 4.0)]
)
def test_the_standard_error_of_one_direction_follows_its_law_exactly(distribution: Any, a: float) -> None:
    """A / (1 + a) |mean|^2 with a = (p + 1) / Q for Gaussian directions, (p - 1) / Q or p / Q - 1 for the others."""
    sample = torch.tensor([3.0, 0.0, 0.0, 0.0, 4.0])
    found = ESJ(INNER, 1, distribution=distribution)._error(torch.tensor([5.0]), sample)
    assert found == pytest.approx(5 * math.sqrt(a / (1 + a)), rel=1e-12)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere"])
def test_large_directions_are_drawn_one_at_a_time_and_the_same_for_any_chunk(
    distribution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilevel.hypergrad.directions._WHOLE", 0)
    whole, c = ESJ(INNER, 5, distribution=distribution)._draw(X, 3)
    assert whole.shape == (5, P)
    assert len({tuple(row) for row in whole.tolist()}) > 1
    for chunk in (1, 2, 9):
        blocks, factor = ESJ(INNER, 5, distribution=distribution, chunk=chunk)._blocks(X, 3)
        held = list(blocks)
        assert max(map(len, held)) == min(chunk, 5)
        assert torch.equal(torch.cat(held), whole)
        assert factor == c
    if distribution != "gaussian":
        assert float((whole.norm(dim=1) - (1.0 if distribution == "sphere" else 2.0)).abs().max()) <= 1e-12


@pytest.mark.parametrize("split", [False, True])
def test_an_encoding_is_evaluated_once_at_each_point_and_once_for_f(split: bool) -> None:
    """With Q directions Q + 1 times for g, whatever the steps; the value is that of g with the encoding written out."""
    A, calls = normal(5, P, seed=3), list[bool]()

    def encode(x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return data * (A @ x).tanh()

    def f(z: torch.Tensor, y: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        return (y @ z - 1).square() / 2

    def g(z: torch.Tensor, y: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        return (y - z).square().sum() / 2 + y.cosh().sum()

    data: Any = Split(f=torch.tensor(2.0), g=torch.tensor(0.5)) if split else torch.tensor(0.5)
    esj = ESJ(INNER, 3, radius=1e-4, distribution="rademacher", chunk=2)
    start = Start(y=torch.zeros(5), count=1)
    found = hypergradient(
        BilevelProblem(f, g, encode=encode), X, torch.zeros(5), estimator=esj, data=data, start=start
    ).grad
    assert len(calls) == 3 + 1 + 1
    plain = BilevelProblem(
        lambda x, y, data: f(encode(x, data), y, data), lambda x, y, data: g(encode(x, data), y, data)
    )
    written = hypergradient(plain, X, torch.zeros(5), estimator=esj, data=data, start=start).grad
    torch.testing.assert_close(found, written, rtol=1e-8, atol=1e-10)


def test_an_encoding_that_draws_random_numbers_draws_the_same_at_every_point() -> None:
    """Phi(x) = sum m x with a random m: the exact slope, whatever the radius, where all solves see one m."""
    problem = BilevelProblem(
        lambda z, y, _: y.sum(),
        lambda z, y, _: (y - z).square().sum() / 2,
        encode=lambda x, _: torch.rand(P) * x,
    )
    exact = Iterate(GradientDescent(1.0), max_steps=1)
    torch.manual_seed(0)
    m = torch.rand(P)
    start = Start(y=torch.zeros(P), count=1)
    for chunk in (None, 2):
        torch.manual_seed(0)
        esj = ESJ(exact, P, radius=0.1, chunk=chunk)
        found = hypergradient(problem, X, torch.zeros(P), estimator=esj, data=torch.zeros(1), start=start, throw=False)
        torch.testing.assert_close(found.grad, m)
