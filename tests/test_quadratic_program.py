"""Convex quadratic programs: closed forms, optimality conditions on random ones, and what cannot be solved."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings, strategies as st
from strategies import SEEDS, gaussian, spd_matrices
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.interior_point import Mehrotra, Program
from bilevel._numerics.quadratic_programs import solve_program, violation
from bilevel._numerics.saddle_point import SaddlePoint, pseudo_inverse
from bilevel._result import Solved, Status
from bilevel._sets import Simplex
from bilevel._tree import ravel
from bilevel.inner_problems.polytope import FlatPolytope, Polytope
from bilevel.solvers.cvxpy_program import Cvxpy
from bilevel.solvers.quadratic_program import QuadraticProgram

INF = torch.inf
Data: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # Q, q, A, b, lower, upper


def rows(*numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers)


def solve(
    Q: Tensor,
    q: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    lower: Tensor | float = -INF,
    upper: Tensor | float = INF,
    *,
    solver: AbstractInnerSolver = QuadraticProgram(),
) -> Solved:
    """One program, or several along a leading axis."""
    A = q.new_zeros(*q.shape[:-1], 0, q.shape[-1]) if A is None else A
    b = A.sum(-1) * 0 if b is None else b
    bounds = (torch.as_tensor(bound).to(q).expand_as(q) for bound in (lower, upper))

    def g(y: Tensor) -> Tensor:
        return (y * (Q @ y.unsqueeze(-1)).squeeze(-1)).sum(-1) / 2 + (q * y).sum(-1)

    objective = Objective(g, constraints=FlatPolytope(A, b.expand(A.shape[:-1]), *bounds))
    return solver.solve(objective, torch.zeros_like(q))


@st.composite
def programs(draw: st.DrawFn) -> Data:
    """Strictly convex, with a feasible point, some of whose bounds are infinite and some entries fixed."""
    Q = draw(spd_matrices(min_size=2, max_size=8))
    n, seed = len(Q), draw(SEEDS)
    m = draw(st.integers(0, n // 2))
    inside, q = gaussian(n, seed=seed + 1), gaussian(n, seed=seed + 2)
    A = gaussian(m * n, seed=seed + 3).reshape(m, n)
    kinds = draw(st.lists(st.sampled_from(["free", "lower", "upper", "both", "fixed"]), min_size=n, max_size=n))
    room = gaussian(n, seed=seed + 4).abs() * torch.tensor([0.0 if kind == "fixed" else 1.0 for kind in kinds])
    has_lower = torch.tensor([kind in ("lower", "both", "fixed") for kind in kinds])
    has_upper = torch.tensor([kind in ("upper", "both", "fixed") for kind in kinds])
    lower = torch.where(has_lower, inside - room, torch.full_like(inside, -INF))
    upper = torch.where(has_upper, inside + room, torch.full_like(inside, INF))
    return Q, q, A, A @ inside, lower, upper


# Closed forms


@given(SEEDS, st.integers(1, 12))
def test_the_nearest_point_of_the_simplex_is_its_projection(seed: int, n: int) -> None:
    point = gaussian(n, seed=seed)
    found = solve(torch.eye(n), -point, torch.ones(1, n), torch.ones(1), lower=0.0)
    assert found.status.ok
    assert torch.allclose(found.value, Simplex().project(point), rtol=0, atol=1e-12)


@given(SEEDS, st.integers(1, 10))
def test_the_nearest_point_of_a_box_is_clipped(seed: int, n: int) -> None:
    point = 2 * gaussian(n, seed=seed)
    found = solve(torch.eye(n), -point, lower=-1.0, upper=1.0)
    assert torch.allclose(found.value, point.clamp(-1, 1), rtol=0, atol=1e-14)
    held = point.clamp(-1, 1).abs() == 1
    assert torch.equal(found.value[held], point.clamp(-1, 1)[held])  # exactly on the bound
    assert found.at_bounds == int(held.sum())


@given(spd_matrices(min_size=2), SEEDS)
def test_with_equalities_only_it_is_one_linear_system(Q: Tensor, seed: int) -> None:
    n = len(Q)
    q, A, b = gaussian(n, seed=seed), gaussian(n, seed=seed + 1).reshape(1, n), torch.ones(1)
    found = solve(Q, q, A, b)
    full = torch.cat([torch.cat([Q, A.T], 1), torch.cat([A, torch.zeros(1, 1)], 1)])
    exact = torch.linalg.solve(full, torch.cat([-q, b]))
    assert torch.allclose(found.value, exact[:n], atol=1e-10)
    assert found.multipliers is not None and torch.allclose(found.multipliers, exact[n:], atol=1e-9)


def test_without_constraints_it_is_the_minimizer() -> None:
    Q = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    found = QuadraticProgram().solve(Objective(lambda y: (y @ Q * y).sum(-1) / 2 - y.sum(-1)), torch.ones(2))
    assert torch.allclose(found.value, torch.linalg.solve(Q, torch.ones(2)), atol=1e-14)


def test_a_linear_program_is_solved_at_a_vertex() -> None:
    found = solve(torch.zeros(3, 3), torch.tensor([1.0, 2.0, 3.0]), torch.ones(1, 3), torch.ones(1), 0.0, 1.0)
    assert found.status.ok and torch.equal(found.value, torch.tensor([1.0, 0.0, 0.0]))


# Optimality conditions


def optimality(program: Data, found: Solved) -> Tensor:
    """The largest violation of the optimality conditions, from their definition."""
    Q, q, A, b, lower, upper = program
    assert found.multipliers is not None
    y, pull = found.value, Q @ found.value + q + A.T @ found.multipliers
    free = (y > lower) & (y < upper)
    parts = [
        A @ y - b,
        (lower - y).clamp_min(0),
        (y - upper).clamp_min(0),
        pull[free],
        (-pull[(y == lower) & (y < upper)]).clamp_min(0),
        pull[(y == upper) & (y > lower)].clamp_min(0),
    ]
    return torch.cat(parts).abs().amax()


@given(programs())
def test_the_solution_satisfies_the_optimality_conditions(program: Data) -> None:
    found = solve(*program)
    assert found.status.ok
    size = 1 + sum(part[part.isfinite()].abs().max() for part in program if part.numel() and part.isfinite().any())
    # Held entries that hold only just may be off their bounds by rounding: they then count as free.
    assert float(optimality(program, found)) < 1e-9 * float(size) * 100


@given(programs(), SEEDS)
def test_no_feasible_point_is_better(program: Data, seed: int) -> None:
    Q, q, A, _, lower, upper = program
    y = solve(*program).value
    d = gaussian(len(y), seed=seed)
    d = d - torch.linalg.pinv(A) @ (A @ d) if len(A) else d
    d = torch.where(upper > lower, d, torch.zeros_like(d)) if not len(A) else d
    for t in (1e-3, 1e-1):
        moved = y + t * d
        if bool(((moved >= lower) & (moved <= upper)).all()):
            assert moved @ Q @ moved / 2 + q @ moved >= y @ Q @ y / 2 + q @ y - 1e-10


@given(programs(), st.floats(-4, 4), st.floats(-4, 4))
def test_units_do_not_matter(program: Data, of_y: float, of_g: float) -> None:
    Q, q, A, b, lower, upper = program
    c, k = 10**of_y, 10**of_g
    y = solve(*program).value
    scaled = solve(k * Q, k * c * q, A, c * b, c * lower, c * upper)
    assert scaled.status.ok
    assert torch.allclose(scaled.value / c, y, rtol=0, atol=1e-9 * float(1 + y.abs().max()))


@given(programs(), SEEDS)
def test_a_batch_is_a_loop(program: Data, seed: int) -> None:
    Q, q, A, b, lower, upper = program
    qs = torch.stack([q, gaussian(len(q), seed=seed), 100 * q])
    Qs, As, bs, lowers, uppers = (part.expand(3, *part.shape) for part in (Q, A, b, lower, upper))
    together = solve(Qs, qs, As, bs, lowers, uppers)
    for i in range(3):
        alone = solve(Q, qs[i], A, b, lower, upper)
        assert torch.allclose(together.value[i], alone.value, rtol=0, atol=1e-10 * float(1 + alone.value.abs().max()))
        assert together.statuses[i] is alone.status


def test_rows_end_each_for_itself() -> None:
    q = rows([-1.0, -1.0, -1.0], [torch.nan, 0.0, 0.0], [-1.0, -2.0, -3.0])
    b = rows([1.0], [1.0], [10.0])
    found = solve(torch.eye(3).expand(3, 3, 3), q, torch.ones(3, 1, 3), b, 0.0, 1.0)
    assert found.statuses == (Status.successful, Status.nonfinite, Status.infeasible)
    assert torch.allclose(found.value[0], torch.full((3,), 1 / 3), atol=1e-14)
    assert found.value[1].isnan().all()


def test_several_leading_axes_are_one_batch() -> None:
    q = gaussian(24, seed=1).reshape(2, 3, 4)
    found = solve(torch.eye(4).expand(2, 3, 4, 4), q, torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1), 0.0)
    expected = torch.stack([Simplex().project(-row) for row in q.reshape(-1, 4)]).reshape(2, 3, 4)
    assert torch.allclose(found.value, expected, atol=1e-12)
    assert found.residual.shape == (2, 3) and len(found.statuses) == 6
    assert found.multipliers is not None and found.multipliers.shape == (2, 3, 1)


def test_equalities_that_repeat_each_other_change_nothing() -> None:
    q = torch.tensor([-0.5, -0.5, 1.0])
    found = solve(torch.eye(3), q, torch.ones(3, 3), torch.ones(3), lower=0.0)
    assert found.status.ok and torch.allclose(found.value, torch.tensor([0.5, 0.5, 0.0]), atol=1e-14)


def test_a_fixed_entry_has_its_value_and_the_others_see_it() -> None:
    Q = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = solve(Q, torch.zeros(2), lower=torch.tensor([1.0, -INF]), upper=torch.tensor([1.0, INF]))
    assert torch.equal(found.value, torch.tensor([1.0, -0.5]))
    assert found.status.ok and found.steps == 0


def test_a_single_feasible_point_is_found() -> None:
    found = solve(torch.eye(3), torch.zeros(3), torch.ones(1, 3), torch.full((1,), 3.0), 0.0, 1.0)
    assert found.status.ok and torch.equal(found.value, torch.ones(3))


def test_a_bound_that_holds_only_just_is_met_to_rounding() -> None:
    found = solve(torch.eye(3), torch.tensor([-1.0, 0.0, 1.0]), lower=0.0)
    assert found.status.ok and torch.allclose(found.value, torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=1e-14)


# What cannot be solved


@pytest.mark.parametrize(
    ("A", "b", "lower", "upper"),
    [
        pytest.param(rows([1.0, 1.0, 1.0]), [10.0], 0.0, 1.0, id="beyond the box"),
        pytest.param(rows([1.0, 1.0, 1.0]), [3.001], 0.0, 1.0, id="just beyond the box"),
        pytest.param(rows([1.0, 1.0, 1.0]), [-1.0], 0.0, INF, id="on the other side of bounds"),
        pytest.param(rows([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]), [1.0, 1.0], 0.0, INF, id="contradicting equalities"),
        pytest.param(rows([1.0, 1.0, 1.0]), [1.0], 0.0, 0.0, id="not with the fixed entries"),
        pytest.param(rows([1.0, 1.0, 1.0]), [1.0], 1.0, 0.0, id="crossing bounds"),
    ],
)
def test_contradicting_constraints_are_reported(A: Tensor, b: list[float], lower: float, upper: float) -> None:
    found = solve(torch.eye(3), torch.tensor([1.0, -2.0, 0.5]), A, torch.tensor(b), lower, upper)
    assert found.status is Status.infeasible


def test_a_concave_direction_is_reported() -> None:
    Q = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    for lower, upper in ((-1.0, 1.0), (-INF, INF)):
        assert solve(Q, torch.ones(3), lower=lower, upper=upper).status is Status.not_positive_definite


def test_a_program_without_minimum_is_reported() -> None:
    assert solve(torch.zeros(2, 2), -torch.ones(2), lower=0.0).status is Status.not_positive_definite


def test_too_few_steps_are_reported_and_say_how_wrong_they_are() -> None:
    Q, q = torch.diag(torch.arange(1.0, 21.0)), gaussian(20, seed=0) * 5
    exact = solve(Q, q, torch.ones(1, 20), torch.ones(1), -0.5, 0.5)
    errors = []
    for steps in (0, 1, 2):
        found = solve(Q, q, torch.ones(1, 20), torch.ones(1), -0.5, 0.5, solver=QuadraticProgram(max_steps=steps))
        assert found.status is Status.max_steps and found.steps == steps
        assert float((found.value - exact.value).norm()) > 1e-3
        errors.append(float(found.residual))
    assert errors[0] > errors[-1] > 1e-3


def test_an_end_with_the_wrong_bounds_is_not_taken() -> None:
    """After few steps the bounds that seem to hold are the wrong ones: the interior point is the better one."""
    Q, q, A = torch.diag(torch.arange(1.0, 21.0))[None], gaussian(20, seed=0)[None] * 5, torch.ones(1, 1, 20)
    box = torch.full((1, 20), 0.5)
    program = Program(Q, q, A, torch.ones(1, 1), -box, box)
    for steps in range(5):
        inside, _, _ = Mehrotra(program).run(0.0, steps)
        found = solve_program(program, 1e-10, steps)
        end = violation(program, found.y, found.multipliers, program.gradient(found.y))
        y = inside.y.clamp(-box, box)
        assert float(end) <= float(violation(program, y, inside.multipliers, program.gradient(y))) + 1e-15


def test_what_is_not_quadratic_is_solved_by_models_or_reported() -> None:
    a, flat = torch.tensor([2.0, 0.5]), Polytope(upper=1.0).flat(ravel(torch.ones(2))[1])
    objective = Objective(lambda y: (y.exp() - a.exp() * y).sum(-1), constraints=flat)
    solved = QuadraticProgram().solve(objective, torch.zeros(2))
    assert solved.status.ok and torch.allclose(solved.value, torch.tensor([1.0, 0.5]), rtol=0, atol=1e-12)
    assert QuadraticProgram(max_models=1).solve(objective, torch.zeros(2)).status is Status.stagnated
    kink = Objective(lambda y: (y - 0.5).abs().pow(1.5).sum(-1), constraints=flat)  # Newton steps leap over it for ever
    assert QuadraticProgram().solve(kink, torch.zeros(2)).status is Status.stagnated


def test_the_residual_is_that_of_the_returned_point() -> None:
    Q, q, A = torch.eye(3)[None], torch.tensor([[-1.0, -0.2, 2.0]]), torch.ones(1, 1, 3)
    lower, upper = torch.zeros(1, 3), torch.full((1, 3), INF)
    program = Program(Q, q, A, torch.ones(1, 1), lower, upper)
    y, nu = torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[0.1]])
    assert float(violation(program, y, nu, y + q)) < 1e-15
    assert float(violation(program, y + 0.1, nu, y + q)) > 0.1  # A y = b
    assert float(violation(program, y, nu + 0.05, y + q)) > 0.02  # the free entries
    assert float(violation(program, y, nu, y + q - torch.tensor([[0.0, 0.0, 3.0]]))) > 0.2  # the sign of the held one


def test_the_method_takes_about_ten_steps_and_the_last_ones_are_fast() -> None:
    """Measured on programs like those of a support vector machine."""
    F = gaussian(25 * 16, seed=0).reshape(25, 16)
    Y = torch.eye(5).repeat_interleave(5, 0)
    Q = torch.kron(F @ F.T + torch.eye(25), torch.eye(5))[None]
    A = torch.kron(torch.eye(25), torch.ones(1, 5))[None]
    program = Program(Q, -Y.reshape(1, -1), A, torch.zeros(1, 25), torch.full((1, 125), -INF), 0.1 * Y.reshape(1, -1))
    errors = [float(Mehrotra(program).run(0.0, steps)[1]) for steps in (3, 5, 8, 11)]
    assert errors[0] > 1e-3 > errors[1] > 1e-6 > errors[2] and errors[3] < 1e-10
    assert 9 <= int(Mehrotra(program).run(1e-10, 100)[2]) <= 13


def test_float32_programs_are_solved_to_float32() -> None:
    F = gaussian(20, seed=0).reshape(5, 4)
    Q, q, A, b = F @ F.T + torch.eye(5), gaussian(5, seed=1), torch.ones(1, 5), torch.ones(1)
    found = solve(Q.float(), q.float(), A.float(), b.float(), 0.0, 0.4)
    exact = solve(Q, q, A, b, 0.0, 0.4)
    assert found.status.ok and found.value.dtype == torch.float32
    assert torch.allclose(found.value.double(), exact.value, atol=1e-6)
    assert torch.equal(found.value == 0, exact.value == 0) and bool((exact.value == 0).any())


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`QuadraticProgram\(tol=...\)` must be at least 0"):
        QuadraticProgram(tol=-1.0)
    with pytest.raises(ValueError, match=r"`QuadraticProgram\(max_steps=...\)` must be at least 0"):
        QuadraticProgram(max_steps=-1)
    with pytest.raises(ValueError, match=r"`QuadraticProgram\(max_models=...\)` must be at least 1"):
        QuadraticProgram(max_models=0)
    with pytest.raises(ValueError, match=r"must be of shape \(m, q\)"):
        Polytope(A=torch.ones(3))
    structure = ravel({"a": torch.ones(2), "b": torch.ones(1)})[1]
    with pytest.raises(ValueError, match="must have 3 columns"):
        Polytope(A=torch.ones(1, 2)).flat(structure)
    with pytest.raises(ValueError, match=r"Polytope\(upper=...\) must have the structure"):
        Polytope(upper=torch.ones(3)).flat(structure)


def test_a_polytope_is_given_in_the_structure_of_y() -> None:
    structure = ravel({"a": torch.ones(2), "b": torch.ones(())})[1]
    polytope = Polytope(A=torch.ones(1, 3), b=2.0, upper={"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
    flat = polytope.flat(structure)
    assert torch.equal(flat.upper, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(flat.lower, torch.full((3,), -INF))
    assert torch.equal(flat.b, torch.tensor([2.0]))
    scalar = Polytope(lower=0.0).flat(ravel(torch.tensor(1.0))[1])
    assert torch.equal(scalar.lower, torch.zeros(1)) and scalar.A.shape == (0, 1)


# Saddle-point systems


@given(spd_matrices(min_size=2, max_size=6), SEEDS)
def test_a_saddle_point_system_is_solved(M: Tensor, seed: int) -> None:
    n = len(M)
    A, r, t = gaussian(n, seed=seed).reshape(1, n), gaussian(n, seed=seed + 1), gaussian(1, seed=seed + 2)
    p, s = SaddlePoint.factor(M, A).solve(r, t)
    assert torch.allclose(M @ p + A.T @ s, r, atol=1e-9)
    assert torch.allclose(A @ p, t, atol=1e-9)


def test_a_saddle_point_system_needs_definiteness_on_the_null_space_only() -> None:
    A, r = torch.tensor([[0.0, 1.0]]), torch.tensor([2.0, 5.0])
    p, s = SaddlePoint.factor(torch.diag(torch.tensor([1.0, 0.0])), A).solve(r, torch.tensor([3.0]))
    assert torch.allclose(p, torch.tensor([2.0, 3.0])) and torch.allclose(s, torch.tensor([5.0]))
    lost = SaddlePoint.factor(torch.diag(torch.tensor([0.0, 1.0])), A)
    assert not lost.definite and lost.solve(r, torch.tensor([3.0]))[0].isnan().all()


def test_the_pseudo_inverse_ignores_scales_and_repetitions() -> None:
    S = torch.diag(torch.tensor([1e-12, 1.0, 0.0]))
    assert torch.allclose(pseudo_inverse(S), torch.diag(torch.tensor([1e12, 1.0, 0.0])))
    ones = torch.ones(2, 2)
    assert torch.allclose(pseudo_inverse(ones), ones / 4)


# Against other solvers


@pytest.mark.filterwarnings("ignore:Values in x were outside bounds")  # of scipy 1.12, about a step of its own
@given(programs())
def test_scipy_finds_no_better_point(program: Data) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    Q, q, A, b, lower, upper = (part.numpy() for part in program)
    constraints = [optimize.LinearConstraint(A, b, b)] if len(A) else []
    other = optimize.minimize(
        lambda y: y @ Q @ y / 2 + q @ y,
        solve(*program).value.numpy() * 0.9,
        jac=lambda y: Q @ y + q,
        method="SLSQP",
        bounds=optimize.Bounds(lower, upper),
        constraints=constraints,
        options={"ftol": 1e-14, "maxiter": 500},
    )
    y = solve(*program).value.numpy()
    feasible = (abs(A @ other.x - b) < 1e-9).all() if len(A) else True
    if other.success and feasible:
        assert y @ Q @ y / 2 + q @ y <= other.fun + 1e-7
        assert abs(y - other.x).max() < 1e-3 * (1 + abs(y).max())


@settings(max_examples=15)
@given(programs())
def test_cvxpy_finds_the_same_point(program: Data) -> None:
    pytest.importorskip("cvxpy")
    ours, theirs = solve(*program), solve(*program, solver=Cvxpy())
    assert theirs.status.ok
    assert torch.allclose(theirs.value, ours.value, rtol=0, atol=1e-6 * float(1 + ours.value.abs().max()))


def test_cvxpy_brings_a_program_into_standard_form_once_for_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    made: list[object] = []
    problem = cvxpy.Problem

    def counted(*parts: object) -> object:
        made.append(parts)
        return problem(*parts)

    monkeypatch.setattr(cvxpy, "Problem", counted)
    for k in range(3):
        found = solve((2 + k) * torch.eye(7), -torch.ones(7), lower=0.1 * k, solver=Cvxpy())
        assert torch.allclose(found.value, torch.full((7,), max(1 / (2 + k), 0.1 * k)))
    assert len(made) == 1
    solve(torch.eye(7), torch.ones(7), upper=1.0, solver=Cvxpy())
    assert len(made) == 2


@pytest.mark.parametrize("name", ["CLARABEL", "OSQP", "SCS"])
def test_every_solver_of_cvxpy_meets_the_default_tolerance(name: str) -> None:
    pytest.importorskip("cvxpy")
    point = torch.tensor([3.0, 0.2, -1.0, 0.7])
    found = solve(torch.eye(4) * 30, -30 * point, torch.ones(1, 4), torch.ones(1), 0.0, 0.9, solver=Cvxpy(solver=name))
    assert found.status.ok
    assert float(found.residual) < 1e-12


def test_cvxpy_reports_what_cannot_be_solved() -> None:
    pytest.importorskip("cvxpy")
    beyond = solve(torch.eye(3), torch.ones(3), torch.ones(1, 3), torch.full((1,), 9.0), 0.0, 1.0, solver=Cvxpy())
    assert beyond.status is Status.infeasible
    below = solve(torch.zeros(2, 2), -torch.ones(2), lower=0.0, solver=Cvxpy())
    assert below.status is Status.unbounded
    rough = solve(torch.eye(3), torch.ones(3), torch.ones(1, 3), torch.ones(1), 0.0, solver=Cvxpy(tol=0.0))
    assert rough.status is Status.stagnated
    with pytest.raises(ValueError, match=r"`Cvxpy\(tol=...\)` must be at least 0"):
        Cvxpy(tol=-1.0)


def test_without_cvxpy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ImportError, match=r'pip install "bilevel\[convex\]"'):
        solve(torch.eye(2), torch.ones(2), solver=Cvxpy())
