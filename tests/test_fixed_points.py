"""Fixed points y = T(x, y): all ways to y and to its derivative against dense oracles, and what is refused where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelError,
    BilevelProblem,
    FiniteDifference,
    Penalty,
    Status,
    check,
    hypergradient,
    minimize,
)
from bilevel._inner import Objective
from bilevel._linear import ANY, AbstractLinearSolver, LinearOperator, OperatorProperties
from bilevel._numerics.arnoldi import arnoldi
from bilevel._numerics.mixing import Mixing
from bilevel._result import Solved
from bilevel.hypergrad.unrolling.checkpointed import Checkpointed
from bilevel.hypergrad.unrolling.forward import Forward
from bilevel.inner_problems import FixedPoint
from bilevel.solvers import (
    CG,
    FISTA,
    GMRES,
    LBFGS,
    MINRES,
    Anderson,
    BiCGStab,
    Broyden,
    Dense,
    FixedPointIteration,
    JacobianFree,
    LinearAnderson,
    Neumann,
    NormalCG,
)
from bilevel.testing import FixedPointFamily
from bilevel.testing.strategies import fixed_points, gaussian

D: dict[str, Any] = {"dtype": torch.float64}
LINEAR = (GMRES(1e-12), BiCGStab(1e-12), NormalCG(1e-12), LinearAnderson(1e-12, memory=20), Dense())
INNER = (Anderson(1e-13, memory=20), Broyden(1e-13))
FEW = settings(max_examples=8, deadline=None)


def drawn(radius: float, q: int = 6, p: int = 2, seed: int = 0, tanh: bool = False) -> tuple[FixedPointFamily, Tensor]:
    """A family of this spectral radius with complex eigenvalues, and an outer point."""
    A = gaussian(q, q, seed=seed)
    A = A * (radius / torch.linalg.eigvals(A).abs().max())
    B, c, t = gaussian(q, p, seed=seed + 1), gaussian(q, seed=seed + 2), gaussian(q, seed=seed + 3)
    return FixedPointFamily(A, B, c, t, gaussian(p, seed=seed + 4), tanh), gaussian(p, seed=seed + 9)


def close(found: Tensor, wanted: Tensor, tol: float = 1e-8) -> None:
    """Relative to the larger of 1 and the size."""
    assert float((found - wanted).norm()) <= tol * max(1.0, float(wanted.norm()))


@FEW
@given(fixed_points(), st.sampled_from(INNER), st.sampled_from((*LINEAR, Neumann(1.0, 5000, 1e-12))))
def test_every_solver_is_the_oracle_where_the_map_contracts(drawn_: Any, inner: Any, linear: Any) -> None:
    family, x, y0 = drawn_
    est = hypergradient(family.problem, x, y0, estimator=AID(inner, linear), throw=False)
    assume(est.status is not Status.breakdown)  # of the recurrence of BiCGStab
    close(est.y, family.solution(x))
    close(est.grad, family.gradient(x, family.solution(x)))


@pytest.mark.parametrize("radius", [1.4, 2.1])
@FEW
@given(st.data(), st.sampled_from(INNER), st.sampled_from(LINEAR))
def test_every_solver_of_systems_is_the_oracle_where_the_map_expands(
    radius: float, data: Any, inner: Any, linear: Any
) -> None:
    family, x, y0 = data.draw(fixed_points(radius=radius))
    est = hypergradient(family.problem, x, y0, estimator=AID(inner, linear), throw=False)
    assume(est.status is not Status.breakdown)
    close(est.y, family.solution(x))
    close(est.grad, family.gradient(x, family.solution(x)))


@FEW
@given(fixed_points(radius=0.7, tanh=True), st.sampled_from(INNER), st.sampled_from(LINEAR))
def test_a_tanh_layer_is_differentiated_as_its_dense_jacobian_says(drawn_: Any, inner: Any, linear: Any) -> None:
    family, x, y0 = drawn_
    est = hypergradient(family.problem, x, y0, estimator=AID(inner, linear), throw=False)
    assume(est.status is not Status.breakdown)
    eye = torch.eye(len(y0), **D)
    assume(float(torch.linalg.cond(eye - family.jacobian(est.y))) < 1e4)
    close(est.y, family.map(x, est.y), 1e-12)
    close(est.grad, family.gradient(x, est.y))


@pytest.mark.parametrize("tanh", [False, True])
def test_unrolling_and_differences_are_the_oracle_where_the_map_contracts(tanh: bool) -> None:
    family, x = drawn(0.8, tanh=tanh)
    y0, plain = torch.zeros(6, **D), FixedPointIteration(2000, tol=1e-13, min_steps=1)
    wanted = family.gradient(x, family.solution(x))
    for form in (ITD(plain), ITD(plain, Checkpointed()), ITD(plain, Forward())):
        close(hypergradient(family.problem, x, y0, estimator=form).grad, wanted)
    damped = replace(plain, damping=0.7)
    close(hypergradient(family.problem, x, y0, estimator=ITD(damped)).grad, wanted)
    for inner in INNER:
        close(hypergradient(family.problem, x, y0, estimator=ESJ(inner, directions=2)).grad, wanted, 1e-4)
        close(hypergradient(family.problem, x, y0, estimator=FiniteDifference(inner)).grad, wanted, 1e-6)


@pytest.mark.parametrize("name", ["implicit", "aid-gmres", "aid-dense", "aid-neumann", "itd", "itd-forward", "auto"])
def test_names_stand_for_solvers_of_fixed_points(name: str) -> None:
    family, x = drawn(0.7)
    est = hypergradient(family.problem, x, torch.zeros(6, **D), estimator=name)
    close(est.grad, family.gradient(x, family.solution(x)), 1e-2 if name == "auto" else 1e-7)


@pytest.mark.parametrize("radius", [1.4, 2.1])
@pytest.mark.parametrize("tanh", [False, True])
def test_what_rests_on_a_contraction_is_refused_where_there_is_none(radius: float, tanh: bool) -> None:
    family, x = drawn(radius, seed=3, tanh=tanh)
    if tanh:  # near zero, where its slope is one, and where it turns: farther out there is a cycle and no fixed point
        turn = 0.5 * torch.eye(6, **D)
        turn[:2, :2] = torch.tensor([[0.0, -radius], [radius, 0.0]], **D)
        family = FixedPointFamily(turn, family.B, torch.zeros(6, **D), family.t, family.s, True)
        x = torch.full((2,), 1e-3, **D)
    y0 = torch.full((6,), 0.01, **D)
    plain = AID(FixedPointIteration(), GMRES())
    assert hypergradient(family.problem, x, y0, estimator=plain, throw=False).reports[0].status is Status.expanding
    with pytest.raises(BilevelError, match="does not contract"):
        hypergradient(family.problem, x, y0, estimator=plain)
    for linear in (Neumann(1.0, 100), JacobianFree()):
        est = hypergradient(family.problem, x, y0, estimator=AID(Anderson(1e-12), linear), throw=False)
        assert [report.status for report in est.reports if report.part == "linear solver"] == [Status.expanding]
    unrolled = ITD(FixedPointIteration(200))
    ended = hypergradient(family.problem, x, y0, estimator=unrolled, throw=False).reports[0].status
    assert ended is (Status.max_steps if tanh else Status.expanding)
    est = hypergradient(family.problem, x, y0)  # and what does not is right
    close(est.grad, family.gradient(x, est.y))


@pytest.mark.parametrize("terms", [1, 5, 10, 20, 50, 100])
def test_the_error_of_the_neumann_series_declines_like_the_powers_of_the_radius(terms: int) -> None:
    family, x = drawn(0.9, q=8)
    exact = hypergradient(family.problem, x, torch.zeros(8, **D), estimator=AID(Anderson(1e-13), Dense()))
    est = hypergradient(
        family.problem, x, torch.zeros(8, **D), estimator=AID(Anderson(1e-13), Neumann(1.0, terms)), throw=False
    )
    assert isinstance(est.v, Tensor) and isinstance(exact.v, Tensor)
    apart, scale = float((est.v - exact.v).norm()), float(exact.v.norm())
    condition = float(torch.linalg.cond(torch.linalg.eig(family.A)[1]))
    assert apart <= condition * 0.9**terms * scale * (1 + 1e-9)
    if terms == 100:
        assert apart <= 1e-4 * scale


def test_the_jacobian_free_gradient_is_biased_and_says_so() -> None:
    family, x = drawn(0.5)
    y = family.solution(x)
    est = hypergradient(family.problem, x, torch.zeros(6, **D), estimator=AID(Anderson(1e-13), JacobianFree()))
    close(est.grad, family.s + family.B.mT @ (y - family.t), 1e-10)
    share = float((family.A.mT @ (y - family.t)).norm() / (y - family.t).norm())
    assert est.substitute is not None and est.substitute.system == "`JacobianFree`"
    assert est.substitute.residual == pytest.approx(share, rel=1e-8)
    assert not AID(Anderson(), JacobianFree()).accurate
    smooth = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
    with pytest.raises(ValueError, match=r"does not apply: .*spectral radius of I - A"):
        hypergradient(smooth, x, x, estimator=AID(LBFGS(), JacobianFree()))


@pytest.mark.parametrize("linear", [GMRES(1e-10), BiCGStab(1e-10), LinearAnderson(1e-10), NormalCG(1e-10), Dense()])
@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_an_eigenvalue_one_is_a_status_and_never_a_number_called_right(linear: Any, radius: float) -> None:
    q, Q = 5, torch.linalg.qr(gaussian(5, 5, seed=1)).Q
    A = Q @ torch.diag(torch.tensor([1.0, -radius, 0.3, -0.2, 0.1], **D)) @ Q.T
    off = torch.eye(q, **D) - torch.outer(Q[:, 0], Q[:, 0])  # so that there are fixed points, a line of them
    problem = BilevelProblem(
        lambda x, y: (off @ y).square().sum() / 2, fixed_point=lambda x, y: A @ y + off @ (x * torch.ones(q, **D))
    )
    est = hypergradient(
        problem, torch.tensor(1.0, **D), torch.zeros(q, **D), estimator=AID(Anderson(), linear), throw=False
    )
    assert est.status is Status.singular
    nowhere = BilevelProblem(lambda x, y: y.square().sum(), fixed_point=lambda x, y: A @ y + x)
    for inner in (Anderson(max_steps=60), Broyden(max_steps=60), FixedPointIteration(300)):
        est = hypergradient(nowhere, torch.ones(q, **D), torch.zeros(q, **D), estimator=AID(inner, linear), throw=False)
        assert not est.reports[0].status.ok and not est.status.ok


def test_estimators_that_need_a_g_or_symmetry_are_refused_by_name_with_the_remedy() -> None:
    family, x = drawn(0.5)
    y0 = torch.zeros(6, **D)
    for estimator in (AID(Anderson(), CG()), AID(Anderson(), MINRES()), Penalty(Anderson(), 10.0), "kkt", "penalty"):
        with pytest.raises(ValueError, match=r'does not apply: y is the fixed point of a map.*"implicit"'):
            hypergradient(family.problem, x, y0, estimator=estimator)
    for inner in (LBFGS(), FISTA()):
        with pytest.raises(ValueError, match=r"must heed the map whose fixed point y is.*`Anderson`"):
            hypergradient(family.problem, x, y0, estimator=AID(inner, GMRES()))
    for algorithm in ("f2sa", "bome", "stocbio"):
        with pytest.raises(ValueError, match="does not apply"):
            minimize(family.problem, x, y0, algorithm=algorithm, max_steps=2)
    smooth = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
    with pytest.raises(ValueError, match="`Anderson` solves y = T"):
        hypergradient(smooth, x, x, estimator=AID(Anderson(), GMRES()))
    with pytest.raises(ValueError, match="one kind of inner problem"):
        BilevelProblem(family.f, family.f, fixed_point=family.map)
    with pytest.raises(TypeError, match="fixed_point"):
        BilevelProblem(family.f, fixed_point=3)  # type: ignore[arg-type]
    cut = BilevelProblem(lambda x, y: y.sum(), fixed_point=lambda x, y: 0.5 * y.detach() + x)
    with pytest.raises(ValueError, match="fixed_point changes with y, but no path"):
        hypergradient(cut, x, x)


def test_structures_data_tasks_and_starts_are_those_of_any_inner_problem() -> None:
    def map_(x: Any, y: Any, data: Tensor) -> Any:
        return {"a": 0.5 * y["b"] - x * data, "b": (y["a"] * 0.3 + x).reshape(2)}

    problem = BilevelProblem(lambda x, y, data: (y["a"] * y["b"]).sum() * x, fixed_point=map_, tasks=True)
    data, x = gaussian(3, 2, seed=0), torch.tensor(0.7, **D)
    y0 = {"a": torch.zeros(2, **D), "b": torch.zeros(2, **D)}
    est = hypergradient(problem, x, y0, data=data)
    assert est.y["a"].shape == (3, 2)
    leaf = x.clone().requires_grad_()
    b = (leaf - 0.3 * leaf * data) / (1 - 0.15)
    a = 0.5 * b - leaf * data
    (wanted,) = torch.autograd.grad((a * b).sum(-1).mean() * leaf, leaf)
    close(est.grad, wanted, 1e-10)
    for estimator in ("itd", "esj", "finite-difference"):
        close(hypergradient(problem, x, y0, data=data, estimator=estimator).grad, wanted, 1e-4)
    loop = BilevelProblem(problem.f, fixed_point=map_, tasks="loop")
    close(hypergradient(loop, x, y0, data=data).grad, est.grad, 1e-12)
    started = BilevelProblem(lambda x, y: y.sum(), fixed_point=lambda x, y: 0.5 * y + x, init=lambda x: x)
    close(hypergradient(started, x, x).grad, torch.tensor(2.0, **D), 1e-10)


def test_a_row_of_a_batch_is_solved_as_it_is_alone() -> None:
    A = torch.stack([0.9 * torch.eye(3, **D), -1.4 * torch.eye(3, **D) + gaussian(3, 3, seed=1).triu(1)])
    b = gaussian(2, 3, seed=2)
    b[0] = 0  # solved at the start

    def objective(rows: slice) -> Objective:
        return Objective(lambda y: y.sum(-1), fixed_point=lambda y: (A[rows] @ y.unsqueeze(-1)).squeeze(-1) + b[rows])

    for solver in (Anderson(1e-12), Broyden(1e-12)):
        both = solver.solve(objective(slice(0, 2)), torch.zeros(2, 3, **D))
        alone = solver.solve(objective(slice(1, 2)), torch.zeros(1, 3, **D))
        assert both.statuses == (Status.successful,) * 2
        torch.testing.assert_close(both.value[1:], alone.value, rtol=0, atol=1e-13)
        assert not bool(both.value[0].any())
    found = FixedPointIteration().solve(objective(slice(0, 2)), torch.zeros(2, 3, **D))
    assert found.statuses == (Status.successful, Status.expanding)


def test_tolerances_are_absolute_and_relative_and_what_is_not_finite_is_a_status() -> None:
    family, x = drawn(0.9)
    big = replace(family, c=1e6 * family.c)

    def objective(map_: Any) -> Objective:
        return Objective(lambda y: y.sum(-1), fixed_point=map_)

    for solver in (Anderson(0.0, rtol=1e-6), Broyden(0.0, rtol=1e-6), FixedPointIteration(tol=1e-300, rtol=1e-6)):
        found = solver.solve(objective(lambda y: big.map(x, y)), torch.zeros(6, **D))
        size = float(found.value.norm())
        assert found.status is Status.successful and float(found.residual) <= 1e-6 * size
    assert float(found.residual) > 1e-9 * size
    for solver in (Anderson(), Broyden(), FixedPointIteration()):
        lost = solver.solve(objective(lambda y: y.sqrt() - 2), torch.ones(3, **D))
        assert lost.status in (Status.nonfinite, Status.diverged, Status.max_steps)
        lost = solver.solve(objective(lambda y: y * torch.nan), torch.ones(3, **D))
        assert lost.status is Status.nonfinite
        moved = solver.solve(objective(lambda y: y + 1), torch.zeros(3, **D))
        assert not moved.status.ok
    short = Anderson(1e-13, max_steps=2).solve(objective(lambda y: family.map(x, y)), torch.zeros(6, **D))
    assert short.status is Status.max_steps


def test_anderson_with_enough_memory_takes_the_steps_of_gmres_and_broyden_twice_as_many() -> None:
    family, x = drawn(2.1, q=10, seed=5)
    objective = Objective(lambda y: y.sum(-1), fixed_point=lambda y: family.map(x, y))
    mixed = Anderson(1e-10, memory=20).solve(objective, torch.zeros(10, **D))
    quasi = Broyden(1e-10).solve(objective, torch.zeros(10, **D))
    assert mixed.status.ok and mixed.steps <= 12 and quasi.status.ok and quasi.steps <= 22
    close(mixed.value, family.solution(x))
    operator = LinearOperator(lambda v: v - family.A.mT @ v, 10, symmetric=False)
    b = gaussian(10, seed=7)
    for k in (3, 6):
        other = GMRES(0.0, max_steps=k).solve(operator, b)
        left = family.A.mT @ (b - operator.mv(other.value))  # a step of length one from the least residual
        start = Mixing(torch.zeros_like(b), 20, 0.0)
        v = torch.zeros_like(b)
        for _ in range(k + 1):
            start.told(v, b - operator.mv(v))
            v = start.next(v, b - operator.mv(v), 1.0)
        close(b - operator.mv(v), left, 1e-7)
    assert LinearAnderson(1e-11, memory=20).solve(operator, b).steps <= 12


@FEW
@given(st.integers(1, 14), st.integers(0, 50))
def test_the_spectrum_is_exact_where_the_space_is_whole_and_bounded_elsewhere(n: int, seed: int) -> None:
    J = gaussian(n, n, seed=seed)
    whole = arnoldi(lambda v: v @ J.mT, torch.zeros(n, **D), n)
    values = torch.linalg.svdvals(torch.eye(n, **D) - J)
    assert float(whole.radius) == pytest.approx(float(torch.linalg.eigvals(J).abs().max()), rel=1e-6)
    assert float(whole.least) == pytest.approx(float(values[-1]), rel=1e-6, abs=1e-12)
    part = arnoldi(lambda v: v @ J.mT, torch.zeros(n, **D), max(n // 2, 1))
    assert float(part.least) >= float(values[-1]) - 1e-12 and float(part.largest) <= float(values[0]) + 1e-12


def test_a_fixed_point_is_checked_like_any_inner_problem() -> None:
    family, x = drawn(1.4)
    report = check(family.problem, x, torch.zeros(6, **D))
    assert report.ok and not report.estimators["aid-gmres"] and report.estimators["penalty"]
    kind = FixedPoint(lambda x, y: 0.5 * y.detach() + x)
    cut = check(BilevelProblem(lambda x, y: y.sum(), inner=kind), x, x)
    assert not cut.ok and cut.estimators["implicit"] and not cut.estimators["esj"]


@pytest.mark.parametrize("tasks", [False, True])
def test_a_kink_of_the_map_is_named_and_kinks_elsewhere_are_not(tasks: bool) -> None:
    """y = relu(y + x) / 2 + 0 has y* = max(x, 0), with a kink at 0 where T has one; smooth maps have none anywhere."""
    data: dict[str, Any] = {"data": torch.zeros(2, **D)} if tasks else {}

    def posed(T: Callable[[Tensor, Tensor], Tensor]) -> BilevelProblem:
        return BilevelProblem(
            lambda x, y, *_: y.sum(), fixed_point=lambda x, y, *_: T(x, y), tasks=tasks, allow_unused=True
        )

    relu = posed(lambda x, y: (y + x).relu() / 2)
    near = (5e-8, Status.successful)  # the kink is within the probes, and not at y*
    for x, expected in ((0.0, Status.kink), (0.3, Status.successful), (-0.3, Status.successful), near):
        found = hypergradient(relu, torch.full((3,), x, **D), torch.full((3,), 0.1, **D), throw=False, **data)
        assert found.status is expected, x
        if expected.ok:
            close(found.grad, torch.full((3,), float(x > 0), **D), 1e-8)
    smooth = posed(lambda x, y: (y + x).tanh() / 2 + (y * y).square() / 50)
    for x in (0.0, 0.2, 1.0):
        assert hypergradient(smooth, torch.full((3,), x, **D), torch.zeros(3, **D), **data).status.ok


@final
@dataclass(frozen=True)
class Own(AbstractLinearSolver):
    """A user's solver, which knows nothing of `last_mv`."""

    @property
    def demands(self) -> OperatorProperties:
        return ANY

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        columns = torch.stack([operator.mv(each) for each in torch.eye(len(b), **D)], 1)
        return Solved(torch.linalg.solve(columns, b), (Status.successful,), torch.zeros((), **D), 1)


def test_a_linear_solver_of_ones_own_that_measures_no_residual_gives_the_derivative() -> None:
    family, x = drawn(1.4)
    found = hypergradient(family.problem, x, torch.zeros(6, **D), estimator=AID(Anderson(1e-13, memory=20), Own()))
    known = hypergradient(family.problem, x, torch.zeros(6, **D), estimator=AID(Anderson(1e-13, memory=20), Dense()))
    assert float(known.grad.norm()) > 0.1
    torch.testing.assert_close(found.grad, known.grad)


def test_a_small_residual_that_is_no_small_error_is_no_success() -> None:
    """|y - T| = e |y - x| for T = (1 - e) y + e x: y = 0 meets 1e-8 where e = 1e-9, at a distance of 1 from y* = x."""
    for e, status in ((1e-9, Status.imprecise), (1e-4, Status.successful)):
        problem = BilevelProblem(lambda x, y: y @ y / 2, fixed_point=lambda x, y, e=e: y + e * (x - y))
        plain = AID(Broyden(), Dense())
        found = hypergradient(problem, torch.ones(1, **D), torch.zeros(1, **D), estimator=plain, throw=False)
        assert found.status is status
        assert status is not Status.successful or abs(float(found.grad) - 1) < 2e-4
    exact = AID(Broyden(1e-16), Dense())
    problem = BilevelProblem(lambda x, y: y.square().sum() / 2, fixed_point=lambda x, y: y + 1e-9 * (x - y))
    assert hypergradient(problem, torch.ones(1, **D), torch.zeros(1, **D), estimator=exact).status.ok
