"""Phi as a differentiable function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_strategies import families, normal
from cases import ESTIMATORS, PROBLEMS, bits, distance, flat, point, single
from hypothesis import given, settings
from torch import Tensor

from bilevel import AID, ESJ, BilevelError, BilevelProblem, Status, hypergradient, hyperobjective
from bilevel._tree import tree_leaves, tree_map
from bilevel.problems.quadratic import QuadraticFamily, quadratic
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS

AID_CG = AID(LBFGS(1e-11), CG(1e-12))


def leaf_of(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@pytest.mark.parametrize("row", ESTIMATORS, ids=str)
def test_gradient_is_the_hypergradient_bit_for_bit(row: Any) -> None:
    instance = PROBLEMS["nested"]()
    x = tree_map(leaf_of, point(instance))
    estimator = row.build(1e-11, 8)
    expected = hypergradient(instance.problem, x, instance.y0, estimator=estimator)
    phi = hyperobjective(instance.problem, instance.y0, estimator=estimator)
    value = phi(x)
    assert value.shape == ()
    assert value.item() == expected.value
    assert phi.last is not None
    assert bits((phi.last.grad, phi.last.y)) == bits((expected.grad, expected.y))
    torch.autograd.backward(value)
    assert bits([leaf.grad for leaf in tree_leaves(x)]) == bits(expected.grad)


def test_backward_accumulates_as_any_function_of_torch() -> None:
    instance = quadratic()
    x = leaf_of(point(instance))
    phi = hyperobjective(instance.problem, instance.y0, estimator=AID_CG)
    torch.autograd.backward(phi(x))
    once = x.grad.clone()  # type: ignore[union-attr]
    torch.autograd.backward(phi(x))
    assert distance(x.grad, 2 * once) <= 1e-9


def test_operations_before_and_after() -> None:
    """d/dz [2 Phi(sin z) + sum(sin z)] = cos z (2 h + 1)."""
    instance = quadratic(cross=0.5)
    z = leaf_of(point(instance))
    phi = hyperobjective(instance.problem, instance.y0, estimator=AID_CG)
    x = z.sin()
    torch.autograd.backward(2 * phi(x) + x.sum())
    assert instance.gradient is not None
    assert distance(z.grad, z.detach().cos() * (2 * instance.gradient(z.detach().sin()) + 1)) <= 1e-9


def test_two_calls_in_one_graph() -> None:
    instance = quadratic()
    a, b = leaf_of(point(instance, 1)), leaf_of(point(instance, 2))
    phi = hyperobjective(instance.problem, instance.y0, estimator=AID_CG)
    torch.autograd.backward(phi(a) * phi(b))
    assert instance.gradient is not None
    assert distance(a.grad, instance.value(b.detach()) * instance.gradient(a.detach())) <= 1e-8
    assert distance(b.grad, instance.value(a.detach()) * instance.gradient(b.detach())) <= 1e-8


@settings(max_examples=10)
@given(families(kappa=10.0))
def test_slope_along_any_direction_is_that_of_its_values(family: QuadraticFamily) -> None:
    """Phi is quadratic, so a central difference at any distance is its derivative."""
    x, u = normal(family.s.numel(), seed=1), normal(family.s.numel(), seed=2)
    phi = hyperobjective(
        BilevelProblem(family.f, family.g), torch.zeros_like(family.c), estimator=AID(LBFGS(1e-12), CG(1e-12)),
        throw=False,
    )  # fmt: skip
    leaf = leaf_of(x)
    torch.autograd.backward(phi(leaf))
    slope = float(leaf.grad @ u)  # type: ignore[operator]
    with torch.no_grad():
        difference = float(phi(x + u / 2) - phi(x - u / 2))
    assert slope == pytest.approx(difference, rel=1e-7, abs=1e-7)


def test_only_leaves_that_require_grad_get_one() -> None:
    instance = PROBLEMS["nested"]()
    x = point(instance)
    x["scale"]["log"].requires_grad_()
    phi = hyperobjective(instance.problem, instance.y0, estimator=AID_CG)
    torch.autograd.backward(phi(x))
    assert instance.gradient is not None
    assert distance(x["scale"]["log"].grad, instance.gradient(tree_map(Tensor.detach, x))["scale"]["log"]) <= 1e-8
    assert x["shift"].grad is None


def test_without_grad_it_is_a_number() -> None:
    instance = quadratic()
    phi = hyperobjective(instance.problem, instance.y0, estimator=AID_CG)
    with torch.no_grad():
        assert not phi(leaf_of(instance.x0)).requires_grad
    assert not phi(instance.x0).requires_grad
    assert float(phi(instance.x0)) == pytest.approx(instance.value(instance.x0), rel=1e-9)


def test_torch_adam_with_a_scheduler_descends_to_the_minimizer() -> None:
    instance = quadratic()
    x = leaf_of(instance.x0)
    phi = hyperobjective(instance.problem, instance.y0)
    optimizer = torch.optim.Adam([x], lr=0.3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    values = []
    for _ in range(300):
        optimizer.zero_grad()
        value = phi(x)
        torch.autograd.backward(value)
        optimizer.step()
        scheduler.step()
        values.append(value.item())
    assert values[-1] < values[0]
    assert distance(x, instance.minimizer) <= 1e-4


def test_warm_start_is_kept_and_saves_work() -> None:
    instance = quadratic()
    x = point(instance)
    counts: dict[bool, int] = {}
    for warm in (True, False):
        phi = hyperobjective(instance.problem, instance.y0, estimator=AID_CG, warm_start=warm)
        assert phi.last is None
        for _ in range(2):
            phi(x)
        assert phi.last is not None
        counts[warm] = phi.last.stats.inner_steps
        assert phi.last.start.count == 2
    assert counts[True] == 0
    assert counts[False] > 5


@pytest.mark.parametrize("warm", [True, False])
def test_every_call_draws_its_own_directions(warm: bool) -> None:
    instance = quadratic()
    esj = ESJ(Iterate(GradientDescent(0.1), 5), directions=1)
    phi, other = (hyperobjective(instance.problem, instance.y0, estimator=esj, warm_start=warm) for _ in range(2))
    grads = []
    for call in (phi, phi, other, other):
        call(instance.x0)
        assert call.last is not None
        grads.append(flat(call.last.grad))
    directions = [g / g.norm() for g in grads]
    assert not torch.allclose(directions[0], directions[1])
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


def test_second_derivative_is_refused() -> None:
    instance = quadratic()
    x = leaf_of(point(instance))
    phi = hyperobjective(instance.problem, instance.y0, estimator=AID_CG)
    (h,) = torch.autograd.grad(phi(x), x, create_graph=True)
    assert instance.gradient is not None
    assert distance(h, instance.gradient(x.detach())) <= 1e-8
    with pytest.raises(NotImplementedError, match="first derivative only"):
        torch.autograd.backward(h.square().sum() + x.sum())


def test_float32_in_and_out() -> None:
    problem, x, y0 = single(quadratic())
    x = leaf_of(x)
    value = hyperobjective(problem, y0)(x)
    torch.autograd.backward(value)
    assert value.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_data_are_handed_through() -> None:
    problem = BilevelProblem(lambda x, y, d: (y * d).sum(), lambda x, y, d: (y - d * x).square().sum())
    x = leaf_of(torch.ones(2))
    phi = hyperobjective(problem, torch.zeros(2), estimator=AID_CG)
    for d in (2.0, 3.0):
        x.grad = None
        torch.autograd.backward(phi(x, torch.tensor(d)))
        assert distance(x.grad, torch.full((2,), d * d)) <= 1e-9
    with pytest.raises(TypeError, match=r"Pass `data=\.\.\.`"):
        phi(x)


def test_failures_raise_or_are_kept() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
    estimator = AID(Iterate(GradientDescent(1e-3), max_steps=3, tol=1e-6), CG())
    x = leaf_of(torch.ones(2))
    with pytest.raises(BilevelError, match="maximum number of steps") as caught:
        hyperobjective(problem, torch.zeros(2), estimator=estimator)(x)
    assert caught.value.status is Status.max_steps
    assert caught.value.partial.grad.shape == (2,)
    phi = hyperobjective(problem, torch.zeros(2), estimator=estimator, throw=False)
    torch.autograd.backward(phi(x))
    assert phi.last is not None
    assert phi.last.status is Status.max_steps


def test_mixed_dtypes_are_refused() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
    with pytest.raises(ValueError, match="one dtype and device"):
        hyperobjective(problem, torch.zeros(2), estimator=AID_CG)(torch.zeros(2, dtype=torch.float32))
