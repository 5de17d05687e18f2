"""Gauss-Newton products against dense J'LJ, and what an estimate says of the system that it solved instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import bilevel
from bilevel import (
    AID,
    BilevelError,
    BilevelProblem,
    Constants,
    Estimate,
    Exact,
    GaussNewton,
    Start,
    certify,
    check,
    compare,
    hypergradient,
    hyperobjective,
    minimize,
)
from bilevel._calculus import FiniteDifferences
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.inner_problems import SupervisedTraining
from bilevel.solvers import CG, LBFGS, MINRES, Adam, Dense, GradientDescent, Iterate, TruncatedCG

D = torch.float64
jacobian: Any = torch.autograd.functional.jacobian
hessian: Any = torch.autograd.functional.hessian
GEN = torch.Generator().manual_seed(0)
A, T = torch.randn(7, 3, generator=GEN, dtype=D), torch.randn(7, 2, generator=GEN, dtype=D)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 0])
X = torch.linspace(-1, 1, 7, dtype=D)


def mlp() -> bilevel.Functional:
    torch.manual_seed(0)
    return bilevel.functional(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double())


NET = mlp()


def outputs(x: Any, y: Any) -> Tensor:
    found: Tensor = NET(y, A) * (1 + 0.1 * x.mean())  # so that x moves the outputs as well
    return found


def loss(x: Any, z: Tensor) -> Tensor:
    each = nn.functional.cross_entropy(z, LABELS, reduction="none")
    found: Tensor = (x.sigmoid() * each).sum()
    return found


def regularizer(x: Any, y: Any) -> Tensor:
    found: Tensor = (x[0].exp() / 100) * sum(w.square().sum() + (w - 0.1).cosh().sum() for w in y.values())
    return found  # and not quadratic


def flat(problem: BilevelProblem, x: Any, y: Any, data: Any = None) -> tuple[FlatProblem, Tensor, Tensor]:
    (vx, sx), (vy, sy) = ravel(x, "x"), ravel(y, "y")
    return FlatProblem(problem, sx, sy, data), vx, vy


KIND = SupervisedTraining(outputs, loss, regularizer)
RIDGE = BilevelProblem(
    lambda x, y: (y - 1).square().sum(),
    inner=SupervisedTraining(
        lambda x, y: A @ y, lambda x, z: (z - T[:, 0]).square().sum() / 2, lambda x, y: x * y.square().sum()
    ),
)
PROBLEM = BilevelProblem(lambda x, y: (NET(y, A) - T).square().sum(), inner=KIND)


def test_products_are_those_of_the_dense_matrix_and_the_cross_product_is_exact() -> None:
    of, x, y = flat(PROBLEM, X, NET.params)
    at, exact = GaussNewton().linearize(of, x, y), Exact().linearize(of, x, y)

    def z(y: Tensor) -> Tensor:
        return outputs(x, of.y.unravel(y)).reshape(-1)

    J = jacobian(z, y)
    L = hessian(lambda z: loss(x, z.reshape(7, 2)), z(y))
    R = hessian(lambda y: regularizer(x, of.y.unravel(y)), y)
    dense = J.T @ L @ J + R
    torch.testing.assert_close(at.operator.dense(y), dense, rtol=1e-12, atol=1e-13)
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=D)
    torch.testing.assert_close(at.operator.residual(torch.zeros_like(v), v), -dense @ v, rtol=1e-12, atol=1e-13)
    before = of.tally.hvps
    assert torch.allclose(at.exact(v), exact.operator.mv(v), rtol=1e-12)  # type: ignore[misc]
    assert of.tally.hvps == before + 1  # that of `Exact`: the other came with the residual
    assert torch.allclose(at.cross(v), exact.cross(v), rtol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(at.gradient, exact.gradient, rtol=1e-12)
    assert not torch.allclose(dense, exact.operator.dense(y), rtol=1e-2)  # it is another matrix


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_products_are_positive_semidefinite_wherever_y_is(seed: int, scale: float) -> None:
    of, x, y = flat(PROBLEM, X, NET.params)
    generator = torch.Generator().manual_seed(seed)
    y = scale * torch.randn(y.shape, generator=generator, dtype=D)
    v = torch.randn(y.shape, generator=generator, dtype=D)
    found = float(v @ GaussNewton().curvature(of, x, y).operator.mv(v))
    assert found >= -1e-12 * float(v @ v)


def test_for_linear_outputs_and_squares_it_is_exact() -> None:
    problem = RIDGE
    x, y0 = torch.tensor(0.3, dtype=D), torch.zeros(3, dtype=D)
    solvers = LBFGS(1e-11), CG(1e-11)
    exact = hypergradient(problem, x, y0, estimator=AID(*solvers))
    found = hypergradient(problem, x, y0, estimator=AID(*solvers, products=GaussNewton()))
    torch.testing.assert_close(found.grad, exact.grad, rtol=1e-9, atol=0)
    assert found.substitute is not None and found.substitute.residual <= 1e-10
    assert exact.substitute is None


def test_given_parts_are_those_of_the_kind_and_a_missing_term_is_refused() -> None:
    plain = BilevelProblem(PROBLEM.f, PROBLEM.g)
    inner, linear = Iterate(GradientDescent(0.05), 5), CG(1e-8)
    declared = hypergradient(PROBLEM, X, NET.params, estimator=AID(inner, linear, products=GaussNewton()))
    given_here = AID(inner, linear, products=GaussNewton(outputs, loss, regularizer))
    torch.testing.assert_close(hypergradient(plain, X, NET.params, estimator=given_here).grad, declared.grad)
    lacking = AID(inner, linear, products=GaussNewton(outputs, loss))
    with pytest.raises(ValueError, match=r"`AID` does not apply: .*must be the parts of g. Got loss \+ regularizer ="):
        hypergradient(plain, X, NET.params, estimator=lacking)
    with pytest.raises(ValueError, match="inner=SupervisedTraining"):
        hypergradient(plain, X, NET.params, estimator=AID(inner, linear, products=GaussNewton()))
    for arguments in ({"outputs": outputs}, {"loss": loss}, {"regularizer": regularizer}):
        with pytest.raises(TypeError, match="GaussNewton"):
            GaussNewton(**arguments)


def test_tasks_side_by_side_are_each_their_own() -> None:
    def of_task(x: Tensor, y: Tensor, data: Any) -> Tensor:
        found: Tensor = (data[0] @ y).tanh()
        return found

    kind = SupervisedTraining(
        of_task, lambda x, z, data: (z - data[1]).square().sum(), lambda x, y, data: x.exp() * y.square().sum()
    )
    data = torch.randn(4, 5, 3, generator=GEN, dtype=D), torch.randn(4, 5, generator=GEN, dtype=D)
    f = lambda x, y, data: (y - 1).square().sum()  # noqa: E731
    x, y0 = torch.tensor(-1.0, dtype=D), torch.zeros(3, dtype=D)
    aid = AID(LBFGS(1e-10), CG(1e-10), products=GaussNewton())
    found = hypergradient(BilevelProblem(f, inner=kind, tasks=True), x, y0, data=data, estimator=aid)
    alone = [
        hypergradient(BilevelProblem(f, inner=kind), x, y0, data=(data[0][k], data[1][k]), estimator=aid)
        for k in range(4)
    ]
    torch.testing.assert_close(found.grad, torch.stack([each.grad for each in alone]).mean(), rtol=1e-8, atol=0)
    assert found.substitute is not None
    residuals = [each.substitute.residual for each in alone if each.substitute is not None]
    assert found.substitute.residual == pytest.approx(max(residuals), rel=1e-6)


@pytest.mark.parametrize("products", [GaussNewton(), Exact()])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_bias_is_measured_against_the_hessian_itself(products: Any, damping: float) -> None:
    aid = AID(Iterate(GradientDescent(0.02), 50), MINRES(1e-12), damping=damping, products=products)
    found = hypergradient(PROBLEM, X, NET.params, estimator=aid)
    of, x, _ = flat(PROBLEM, X, NET.params)
    y, v = ravel(found.y, "y")[0], ravel(found.v, "v")[0]
    fy = jacobian(lambda y: of.f(x, y), y)
    H = Exact().linearize(of, x, y).operator.dense(y)
    if not damping and isinstance(products, Exact):
        assert found.substitute is None
        return
    assert found.substitute is not None
    assert found.substitute.residual == pytest.approx(float((fy - H @ v).norm() / fy.norm()), rel=1e-6)
    assert ("Gauss-Newton" in found.substitute.system) == isinstance(products, GaussNewton)
    assert (f"damping {damping:.3g}" in found.substitute.system) == bool(damping)
    assert not aid.accurate
    assert Estimate.from_dict(found.to_dict()).substitute == found.substitute


def test_the_certificate_holds_with_the_residual_of_the_hessian_itself() -> None:
    """With a squared outer loss and linear outputs nothing but the damping is wrong, and the bound covers it."""
    kind = SupervisedTraining(lambda x, y: A @ y, lambda x, z: (z - x).square().sum() / 2)
    problem = BilevelProblem(lambda x, y: (y - 1).square().sum() / 2, inner=kind)
    eig = torch.linalg.eigvalsh(A.T @ A)
    constants = Constants(
        mu=float(eig[0]), L=float(eig[-1]), L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=float(eig[-1]) ** 0.5
    )
    y0 = torch.zeros(3, dtype=D)
    exact = hypergradient(problem, X, y0, estimator=AID(LBFGS(1e-11), Dense()))
    found = hypergradient(problem, X, y0, estimator=AID(LBFGS(1e-11), Dense(), damping=0.5, products=GaussNewton()))
    certificate = certify(problem, X, found, constants)
    error = float((found.grad - exact.grad).norm())
    assert error > 1e-3
    assert error <= certificate.bound
    assert certificate.terms["linear"] >= error / 2  # it is the residual that the bound consists of
    assert "that of another system by design (Gauss-Newton, damping 0.5" in certificate.remark
    assert not certify(problem, X, exact, constants).remark


def test_compare_tells_of_the_other_system() -> None:
    x, y0 = torch.tensor(0.3, dtype=D), torch.zeros(3, dtype=D)
    table = compare(RIDGE, x, y0, estimators=["network", "one-step"])
    assert "damping" in table.rows[0].substitute and not table.rows[1].substitute
    assert "network solves another system: " in str(table)


def test_truncated_cg_ends_where_curvature_does_and_says_so() -> None:
    operator = bilevel.LinearOperator(lambda v: v * torch.tensor([3.0, 1.0, -1.0]).double(), 3, positive_definite=True)
    b = torch.tensor([1.0, 1.0, 1e-3], dtype=D)
    found = TruncatedCG(max_steps=20).solve(operator, b)
    assert found.concave and found.status.ok
    assert float(found.residual) < float(b.norm())
    with_guess = TruncatedCG(max_steps=20).solve(operator, b, torch.ones(3, dtype=D))
    assert torch.equal(with_guess.value, found.value)
    definite = bilevel.LinearOperator(lambda v: v * torch.tensor([3.0, 1.0, 2.0]).double(), 3, positive_definite=True)
    solved = TruncatedCG(max_steps=3).solve(definite, b)
    assert not solved.concave
    torch.testing.assert_close(solved.value, b / torch.tensor([3.0, 1.0, 2.0]).double())
    wild = bilevel.LinearOperator(lambda v: v * torch.nan, 3, positive_definite=True)
    assert not TruncatedCG(max_steps=3).solve(wild, b).status.ok


def test_check_leads_from_negative_curvature_to_what_stands_it() -> None:
    """g is flat along one direction and concave along another, as in training."""
    kind = SupervisedTraining(lambda x, y: y[0] * y[1:], lambda x, z: (z - x[:2]).square().sum())
    problem = BilevelProblem(lambda x, y: y.square().sum(), inner=kind)
    found = check(problem, X, torch.tensor([0.0, 1e-9, 0.0], dtype=D), inner=Iterate(GradientDescent(1e-3), 1))
    verdict = next(each for each in found.verdicts if each.name == "curvature")
    assert "negative curvature" in verdict.found
    for word in ("'network'", "GaussNewton()", "'f2sa'"):
        assert word in verdict.remedy
    assert found.estimators["aid-cg"] and not found.estimators["network"]
    assert "'network'" in bilevel.Status.negative_curvature.value


def test_certified_accuracy_refuses_what_stands_in() -> None:
    with pytest.raises(ValueError, match="GaussNewton"):
        AID(LBFGS(), CG(), products=GaussNewton(), target_error=1e-3)
    assert FiniteDifferences().stands_in == ""


def online(problem: BilevelProblem) -> Any:
    return dict(problem=problem, x0=X, y0=NET.params, estimator="network", outer=Adam(0.05), max_steps=3)


def test_network_goes_on_with_y_in_a_run_and_starts_cold_elsewhere() -> None:
    warm = minimize(**online(PROBLEM))
    cold = minimize(**online(PROBLEM), warm_start=False)
    assert warm.stats.inner_steps < cold.stats.inner_steps / 2  # 100, 10, 10, ... against 100 each time
    x, other = X.clone().requires_grad_(), (X + 1).clone().requires_grad_()
    phi = hyperobjective(PROBLEM, NET.params, estimator="network")
    first = float(phi(x).detach())
    phi(other)
    assert float(phi(x).detach()) == first  # a function of x
    phi = hyperobjective(PROBLEM, NET.params, estimator="network", warm_start=True)
    phi(x)
    phi(other)
    assert float(phi(x).detach()) != first


def test_network_marks_what_it_solves_with_and_without_a_declaration() -> None:
    plain = BilevelProblem(PROBLEM.f, PROBLEM.g)
    declared = hypergradient(PROBLEM, X, NET.params, estimator="network")
    undeclared = hypergradient(plain, X, NET.params, estimator="network")
    assert declared.substitute is not None and declared.substitute.system.startswith("damping")  # H is definite
    assert undeclared.substitute is not None and undeclared.substitute.system.startswith("damping")
    assert declared.status.ok and undeclared.status.ok
    again = hypergradient(PROBLEM, X, NET.params, estimator="network", start=Start(declared.y, declared.v, 1))
    assert again.substitute is not None and again.substitute.system.startswith("Gauss-Newton, damping")
    assert again.stats.inner_steps <= 10 < declared.stats.inner_steps


def test_bfloat16_is_told_where_a_tolerance_is_below_it() -> None:
    """Under autocast a float32 y meets values that are rounded to three digits: no accurate default reaches its own."""

    def rough(x: Any, y: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found: Tensor = NET32(y, A32).float()
        return found

    net = mlp()
    NET32 = bilevel.functional(net.load(net.params).float())
    A32, x = A.float(), X.float()
    kind = SupervisedTraining(rough, loss, regularizer)
    problem = BilevelProblem(lambda x, y: rough(x, y).square().mean(), inner=kind)
    with pytest.raises(BilevelError) as caught:
        hypergradient(problem, x, NET32.params, estimator="aid-cg")
    assert not caught.value.status.ok
