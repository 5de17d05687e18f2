"""Parametrized cvxpy problems as inner problems: their hypergradients against differences of accurate solutions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AID, KKT, BilevelError, BilevelProblem, Status, check, from_cvxpy, hypergradient, minimize, ravel
from bilevel._numerics.cones import Cone, Faces
from bilevel.solvers import GMRES, MINRES, Adam, Clarabel, Dense, QuadraticProgram

cp = pytest.importorskip("cvxpy")
D = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def squares(x: Any, y: Any) -> Tensor:
    vector = ravel(y)[0]
    return vector.square().sum() / 2 + (vector * normal(vector.numel(), seed=9)).sum()


def lp() -> tuple[Any, Any, Any]:
    c, G, h, y = cp.Parameter(4), cp.Parameter((6, 4)), cp.Parameter(6), cp.Variable(4)
    problem = cp.Problem(cp.Minimize(c @ y), [G @ y <= h, cp.norm_inf(y) <= 3])
    x = {"c": normal(4), "G": normal(6, 4, seed=1), "h": normal(6, seed=2).abs()}
    return from_cvxpy(problem, {"c": c, "G": G, "h": h}, y), x, squares


def qp() -> tuple[Any, Any, Any]:
    F, a, G, b, y = cp.Parameter((5, 5)), cp.Parameter(5), cp.Parameter((7, 5)), cp.Parameter(1), cp.Variable(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ y - a)), [G @ y <= 0.3, cp.sum(y) == b])
    x = (normal(5, 5), normal(5, seed=1), normal(7, 5, seed=2), torch.tensor([0.1], dtype=D))
    return from_cvxpy(problem, (F, a, G, b), y), x, squares


def socp() -> tuple[Any, Any, Any]:
    c, F, r, y = cp.Parameter(4), cp.Parameter((3, 4)), cp.Parameter(nonneg=True), cp.Variable(4)
    problem = cp.Problem(cp.Minimize(c @ y + 0.4 * cp.norm(F @ y - 1)), [cp.norm(y) <= r, cp.norm(y[:2]) <= 40])
    x = {"c": normal(4), "F": normal(3, 4, seed=1), "log r": torch.tensor(-0.2, dtype=D)}
    inner = from_cvxpy(
        problem, {"c": c, "F": F, "r": r}, y, values=lambda x: {"c": x["c"], "F": x["F"], "r": x["log r"].exp()}
    )
    return inner, x, squares


def logistic() -> tuple[Any, Any, Any]:
    weight, Z, y = cp.Parameter(nonneg=True), cp.Parameter((8, 3)), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.logistic(Z @ y)) + weight * cp.sum_squares(y)))
    return from_cvxpy(problem, [weight, Z], [y]), [torch.tensor(0.3, dtype=D), normal(8, 3)], squares


def entropy() -> tuple[Any, Any, Any]:
    q, y = cp.Parameter(4), cp.Variable(4)
    problem = cp.Problem(cp.Maximize(cp.sum(cp.entr(y)) - q @ y), [cp.sum(y) == 1])
    return from_cvxpy(problem, q, y), normal(4), squares


def sdp() -> tuple[Any, Any, Any]:
    S, Y = cp.Parameter((4, 4), symmetric=True), cp.Variable((4, 4), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(Y - S)), [Y >> 0, cp.diag(Y) == 1])
    return from_cvxpy(problem, S, Y, values=lambda x: x + x.T), normal(4, 4), squares


def lifted() -> tuple[Any, Any, Any]:
    C, Y, z = cp.Parameter((3, 3)), cp.Variable((3, 3), PSD=True), cp.Variable((2, 2), bounds=[-0.3, 0.2])
    problem = cp.Problem(
        cp.Minimize(cp.trace(C @ Y) + cp.sum_squares(z - C[:2, 1:])), [cp.trace(Y) == 1, Y[0, 1] >= 0.1]
    )
    return from_cvxpy(problem, C, {"z": z, "Y": Y}, values=lambda x: x + x.T), normal(3, 3), squares


PROGRAMS = (lp, qp, socp, logistic, entropy, sdp, lifted)


def posed(make: Callable[[], tuple[Any, Any, Any]]) -> tuple[BilevelProblem, Any, Any]:
    inner, x, f = make()
    return BilevelProblem(f, inner=inner), x, inner.start()


def slope(problem: BilevelProblem, x: Any, y0: Any, step: float = 1e-5) -> tuple[float, float]:
    """The derivative of Phi along a direction by the implicit gradient, and by a central difference."""
    vector, structure = ravel(x)
    e = normal(vector.numel(), seed=5)
    e = e / torch.linalg.vector_norm(e)
    found = float(ravel(hypergradient(problem, x, y0).grad)[0] @ e)
    ends = [hypergradient(problem, structure.unravel(vector + t * e), y0).value for t in (step, -step)]
    return found, (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("make", PROGRAMS)
def test_the_hypergradient_is_the_slope_of_accurate_solutions(make: Callable[[], tuple[Any, Any, Any]]) -> None:
    found, difference = slope(*posed(make))
    assert abs(found - difference) <= 1e-6 * max(1.0, abs(found))


@pytest.mark.parametrize("make", [qp, lifted])
def test_solutions_are_those_of_cvxpy(make: Callable[[], tuple[Any, Any, Any]]) -> None:
    C, Y, z = cp.Parameter((3, 3)), cp.Variable((3, 3), PSD=True), cp.Variable((2, 2), bounds=[-0.3, 0.2])
    problem = cp.Problem(cp.Minimize(cp.trace(C @ Y) + cp.sum_squares(z - C[:2, 1:])), [cp.trace(Y) == 1])
    inner = from_cvxpy(problem, C, {"z": z, "Y": Y})
    value = normal(3, 3)
    value = value + value.T
    found = hypergradient(BilevelProblem(squares, inner=inner), value, inner.start()).y
    C.value = value.numpy()
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    for name, theirs in (("z", z), ("Y", Y)):
        assert torch.allclose(found[name], torch.as_tensor(theirs.value, dtype=D), atol=1e-7)


@pytest.mark.parametrize("make", [qp, socp, logistic])
def test_all_solvers_of_symmetric_systems_give_the_same_hypergradient(make: Callable[[], tuple[Any, Any, Any]]) -> None:
    problem, x, y0 = posed(make)
    expected = ravel(hypergradient(problem, x, y0, estimator=KKT(Clarabel())).grad)[0]
    for linear in (Dense(), MINRES(rtol=1e-12), GMRES(rtol=1e-12)):
        found = hypergradient(problem, x, y0, estimator=AID(Clarabel(), linear))
        assert torch.allclose(ravel(found.grad)[0], expected, rtol=1e-7, atol=1e-8)


def test_a_batch_of_tasks_gives_what_single_problems_give() -> None:
    F, a, y = cp.Parameter((3, 3)), cp.Parameter(3), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ y - a)), [cp.norm(y) <= 0.4, y[0] >= 0])
    inner = from_cvxpy(problem, {"F": F, "a": a}, y, values=lambda x, task: {"F": x, "a": task})
    tasks, x = normal(4, 3, seed=3), normal(3, 3, seed=4)

    def f(x: Tensor, y: Tensor, task: Tensor) -> Tensor:
        return (y * task).sum() + y.square().sum()

    together = hypergradient(BilevelProblem(f, inner=inner, tasks=True), x, inner.start(), data=tasks)
    alone = [hypergradient(BilevelProblem(f, inner=inner), x, inner.start(), data=task) for task in tasks]
    assert torch.allclose(together.grad, torch.stack([each.grad for each in alone]).mean(0), atol=1e-12)
    assert torch.allclose(together.y, torch.stack([each.y for each in alone]), atol=1e-12)


def test_variables_that_do_not_show_in_y_need_not_be_unique() -> None:
    # Of the bound on an inactive norm, any number between the norm and the limit will do.
    a, y = cp.Parameter(3), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y - a)), [cp.norm(y) <= 100])
    inner, x = from_cvxpy(problem, a, y), normal(3)
    found = hypergradient(BilevelProblem(lambda x, y: y.square().sum() / 2, inner=inner), x, inner.start())
    assert torch.allclose(found.grad, x, atol=1e-9)


def test_a_y_that_is_not_unique_is_no_success() -> None:
    a, y = cp.Parameter(), cp.Variable(2)
    inner = from_cvxpy(cp.Problem(cp.Minimize(cp.square(y[0] + y[1] - a)), [cp.norm_inf(y) <= 9]), a, y)
    problem = BilevelProblem(lambda x, y: y[0], inner=inner)
    found = hypergradient(problem, torch.tensor(1.0, dtype=D), inner.start(), throw=False)
    assert found.status is Status.not_positive_definite


@pytest.mark.parametrize(("level", "status"), [(1.0, Status.weakly_active), (1.001, Status.successful)])
def test_a_kink_is_reported_and_its_neighbour_is_not(level: float, status: Status) -> None:
    a, y = cp.Parameter(2), cp.Variable(2)
    inner = from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(y - a)), [cp.norm(y) <= 1]), a, y)
    x = torch.tensor([0.6, 0.8], dtype=D) * level
    problem = BilevelProblem(lambda x, y: y[0] + y[1], inner=inner)
    assert hypergradient(problem, x, inner.start(), throw=False).status is status


def test_constraints_that_hold_and_depend_on_each_other_are_reported_unless_they_always_do() -> None:
    a, y = cp.Parameter(2), cp.Variable(2)
    cost = cp.Minimize(cp.sum_squares(y) + cp.sum(y))
    at = torch.zeros(2, dtype=D)

    def status(*rows: Any) -> Status:
        inner = from_cvxpy(cp.Problem(cost, list(rows)), a, y)
        return hypergradient(BilevelProblem(lambda x, y: y.sum(), inner=inner), at, inner.start(), throw=False).status

    same = y[0] + y[1] >= a[0], 2 * y[0] + 2 * y[1] >= 2 * a[0]
    assert status(*same).ok
    assert status(same[0], y[0] + y[1] >= a[1]) is Status.dependent_constraints


@pytest.mark.parametrize(("radius", "slope", "status"), [(-1.0, 1.0, "infeasible"), (None, 1.0, "unbounded")])
def test_programs_without_a_solution_have_a_status(radius: float | None, slope: float, status: str) -> None:
    c, y = cp.Parameter(2), cp.Variable(2)
    rows = [] if radius is None else [cp.norm(y) <= radius]
    inner = from_cvxpy(cp.Problem(cp.Minimize(c @ y), rows), c, y)
    problem = BilevelProblem(lambda x, y: y.sum(), inner=inner)
    found = hypergradient(problem, torch.ones(2, dtype=D), inner.start(), throw=False)
    assert status in [report.status.name for report in found.reports]
    assert bool(found.grad.isnan().all())
    with pytest.raises(BilevelError):
        hypergradient(problem, torch.ones(2, dtype=D), inner.start())


def test_steps_that_are_used_up_and_a_tolerance_that_is_missed_are_statuses() -> None:
    problem, x, y0 = posed(logistic)
    few = hypergradient(problem, x, y0, estimator=KKT(Clarabel(max_steps=3, newton_steps=0)), throw=False)
    assert few.status is Status.max_steps
    strict = hypergradient(problem, x, y0, estimator=KKT(Clarabel(tol=0.0)), throw=False)
    assert strict.reports[0].status is Status.stagnated
    assert strict.reports[0].residual < 1e-12


def test_what_is_not_convex_or_not_parametrized_in_a_disciplined_way_is_refused_by_name() -> None:
    P, a, y = cp.Parameter((2, 2), PSD=True), cp.Parameter(2), cp.Variable(2)
    refused = {
        "must be DPP": cp.Problem(cp.Minimize(cp.norm(a[0] * a[1] * y - 1))),
        "disciplined convex": cp.Problem(cp.Maximize(cp.sum_squares(y - a))),
        "continuous variables": cp.Problem(cp.Minimize(cp.sum(cp.Variable(2, integer=True)) + a @ y)),
        "power cones": cp.Problem(cp.Minimize(cp.sum(cp.power(y - a, 3.3, approx=False)) - cp.sum(y))),
    }
    for words, problem in refused.items():
        with pytest.raises(ValueError, match=rf"`from_cvxpy\(problem=...\)`.*{words}"):
            from_cvxpy(problem, a, y)
    fine = cp.Problem(cp.Minimize(cp.sum_squares(y - a)))
    with pytest.raises(TypeError, match=r"must be a cvxpy.Problem. Got 3"):
        from_cvxpy(3, a, y)
    with pytest.raises(ValueError, match="does not occur in it"):
        from_cvxpy(fine, P, y)
    with pytest.raises(ValueError, match="each once"):
        from_cvxpy(fine, [a, a], y)
    with pytest.raises(TypeError, match=r"`from_cvxpy\(variables=...\)` must be a cvxpy.Variable"):
        from_cvxpy(fine, a, a)
    with pytest.raises(ValueError, match="name all parameters without a value"):
        from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(y - a) + cp.Parameter(2) @ y)), a, y)


def test_what_is_left_out_stays_at_its_value_and_the_given_problem_is_not_changed() -> None:
    a, shift, y = cp.Parameter(2), cp.Parameter(2, value=[1.0, 2.0]), cp.Variable(2)
    given = cp.Problem(cp.Minimize(cp.sum_squares(y - a - shift)))
    inner = from_cvxpy(given, a, y)
    assert a.value is None and shift.value.tolist() == [1.0, 2.0] and y.value is None
    shift.value = [9.0, 9.0]
    found = hypergradient(BilevelProblem(lambda x, y: y.sum(), inner=inner), torch.zeros(2, dtype=D), inner.start())
    assert torch.allclose(found.y, torch.tensor([1.0, 2.0], dtype=D))


def test_values_outside_of_a_declared_domain_are_refused_by_the_name_of_the_parameter() -> None:
    w, y = cp.Parameter(nonneg=True, name="weight"), cp.Variable(2)
    inner = from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(y - 1) + w * cp.norm1(y))), w, y)
    problem = BilevelProblem(lambda x, y: y.sum(), inner=inner)
    assert hypergradient(problem, torch.tensor(0.1, dtype=D), inner.start()).status.ok
    with pytest.raises(ValueError, match="weight was declared 'nonneg'"):
        hypergradient(problem, torch.tensor(-0.1, dtype=D), inner.start())
    S, Y = cp.Parameter((2, 2), PSD=True, name="S"), cp.Variable((2, 2), symmetric=True)
    inner = from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(Y - S))), S, Y)
    problem = BilevelProblem(lambda x, y: y.sum(), inner=inner)
    assert hypergradient(problem, torch.eye(2, dtype=D), inner.start()).status.ok
    for wrong in (-torch.eye(2, dtype=D), torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=D)):
        with pytest.raises(ValueError, match="S was declared"):
            hypergradient(problem, wrong, inner.start())


def test_x_and_y_have_the_structures_of_parameters_and_variables() -> None:
    a, b, y, z = cp.Parameter(2), cp.Parameter(), cp.Variable(2), cp.Variable((2, 2))
    given = cp.Problem(cp.Minimize(cp.sum_squares(y - a) + cp.sum_squares(z - b)))
    problem = BilevelProblem(
        lambda x, y: y["y"].sum() + y["z"][0, 1], inner=from_cvxpy(given, {"a": a, "b": b}, {"y": y, "z": z})
    )
    x = {"b": torch.tensor(3.0, dtype=D), "a": normal(2)}
    found = hypergradient(problem, x, {"z": torch.zeros(2, 2, dtype=D), "y": torch.zeros(2, dtype=D)})
    assert torch.allclose(found.y["y"], x["a"], atol=1e-9)
    assert torch.allclose(found.grad["b"], torch.ones((), dtype=D), atol=1e-9)
    with pytest.raises(ValueError, match="`from_cvxpy`: x must have the structure"):
        hypergradient(problem, {"a": normal(2)}, {"y": torch.zeros(2, dtype=D), "z": torch.zeros(2, 2, dtype=D)})
    with pytest.raises(ValueError, match="the variables of `from_cvxpy` must have the structure"):
        hypergradient(problem, x, torch.zeros(6, dtype=D))


def test_single_precision_is_computed_in_double_and_returned_in_single() -> None:
    inner, x, _ = socp()
    problem, single = BilevelProblem(lambda x, y: y.sum(), inner=inner), {k: v.float() for k, v in x.items()}
    found = hypergradient(problem, single, inner.start(torch.zeros((), dtype=torch.float32)))
    double = hypergradient(problem, x, inner.start())
    assert found.y.dtype == torch.float32
    assert torch.allclose(ravel(found.grad)[0].double(), ravel(double.grad)[0], atol=1e-4)


def test_estimators_that_need_a_g_refuse_and_minimize_and_check_go_through() -> None:
    problem, x, y0 = posed(entropy)
    for name in ("itd", "penalty", "aid-cg"):
        with pytest.raises(ValueError, match="cone program"):
            hypergradient(problem, x, y0, estimator=name)
    with pytest.raises(ValueError, match="Use `Clarabel`"):
        hypergradient(problem, x, y0, estimator=KKT(QuadraticProgram()))
    exact = hypergradient(problem, x, y0).grad
    assert torch.allclose(hypergradient(problem, x, y0, estimator="finite-difference").grad, exact, atol=1e-6)
    first = hypergradient(problem, x, y0).value
    assert minimize(problem, x, y0, outer=Adam(0.1), max_steps=5).value < first
    assert "kkt" in str(check(problem, x, y0))


def test_without_cvxpy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, x, y0 = posed(entropy)
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    monkeypatch.setitem(sys.modules, "clarabel", None)
    with pytest.raises(ImportError, match=r"bilevel\[convex\]"):
        from_cvxpy(None, None, None)
    with pytest.raises(ImportError, match=r"bilevel\[convex\]"):
        hypergradient(problem, x, y0)


@pytest.mark.parametrize(
    "cone",
    [
        Cone("zero", 2, 1),
        Cone("nonnegative", 4, 1),
        Cone("second-order", 2, 4),
        Cone("second-order", 2, 1),
        Cone("second-order", 2, 2),
        Cone("psd", 2, 3),
        Cone("exponential", 5, 3),
    ],
    ids=lambda cone: f"{cone.kind}-{cone.order}",
)
def test_projections_split_a_point_into_orthogonal_parts_and_their_derivative_is_that_of_differences(
    cone: Cone,
) -> None:
    v = normal(60, cone.count * cone.size) * 10 ** normal(60, 1, seed=1)
    faces, size = Faces.at((cone,), v), v.abs().amax(-1)
    s = faces.projection
    assert torch.allclose(Faces.at((cone,), s).projection, s, rtol=1e-12, atol=1e-13)
    assert bool(((s * (s - v)).sum(-1).abs() <= 1e-13 * size**2).all())
    other = Faces.at((cone,), normal(60, v.shape[1], seed=2)).projection
    assert bool(((other * (s - v)).sum(-1) >= -1e-12 * size).all())  # s - v is in the dual cone
    h, step = normal(*v.shape, seed=3), 1e-6 * size.unsqueeze(-1)
    ends = [Faces.at((cone,), v + sign * step * h).projection for sign in (1, -1)]
    off = (faces.turned(faces.d * faces.turned(h), back=True) - (ends[0] - ends[1]) / (2 * step)).abs().amax(-1)
    assert bool((off <= 1e-7)[faces.margin > 1e-3 * size].all())
