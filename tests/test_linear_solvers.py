"""Every linear solver keeps the contract of `AbstractLinearSolver`; each keeps the promises of its own method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, strategies as st
from strategies import (
    SEEDS,
    batch_of,
    gaussian,
    indefinite_matrices,
    invertible_matrices,
    orthogonal,
    right_hand_sides,
    spd,
    spd_matrices,
    spectra,
    systems,
)
from torch import Tensor

from bilevel._linear import AbstractLinearSolver, AbstractPreconditioner, LinearOperator
from bilevel._result import Solved, Status
from bilevel.solvers import CG, GMRES, MINRES, Dense, Jacobi, Neumann, Nystrom, NystromPreconditioner

RTOL = 1e-11
GENERAL: dict[str, AbstractLinearSolver] = {
    "gmres": GMRES(rtol=RTOL),
    "dense": Dense(),
}
SYMMETRIC: dict[str, AbstractLinearSolver] = GENERAL | {"minres": MINRES(rtol=RTOL)}
DEFINITE: dict[str, AbstractLinearSolver] = SYMMETRIC | {
    "cg": CG(rtol=RTOL),
    "cg-jacobi": CG(rtol=RTOL, preconditioner=Jacobi()),
    "cg-nystrom": CG(rtol=RTOL, preconditioner=NystromPreconditioner(rank=2)),
    "gmres-restarted": GMRES(rtol=RTOL, restart=3, max_steps=2000),
    "neumann": Neumann(step=None, terms=5000, rtol=RTOL),
}
EVERY: dict[str, AbstractLinearSolver] = DEFINITE | {
    "nystrom": Nystrom(rank=3),
    "cg-steps": CG(rtol=0.0, max_steps=20),
    "minres-steps": MINRES(rtol=0.0, max_steps=20),
    "gmres-steps": GMRES(rtol=0.0, max_steps=20),
    "neumann-steps": Neumann(step=None, terms=20),
}


def table(solvers: dict[str, AbstractLinearSolver]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("solver", list(solvers.values()), ids=list(solvers))


def times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)


def operator(A: Tensor, *, positive_definite: bool = True, symmetric: bool = True) -> LinearOperator:
    return LinearOperator(lambda v: times(A, v), A.shape[-1], positive_definite, symmetric)


@dataclass
class Probe:
    """An operator that counts its products and keeps the vectors at which the true residual was measured."""

    A: Tensor
    products: int = 0
    last: list[tuple[Tensor, int]] = field(default_factory=list)

    def operator(self, *, positive_definite: bool = True) -> LinearOperator:
        def mv(v: Tensor) -> Tensor:
            self.products += 1
            return times(self.A, v)

        def last_mv(v: Tensor) -> Tensor:
            self.last.append((v, v._version))
            return mv(v)

        return LinearOperator(mv, self.A.shape[-1], positive_definite, last_mv=last_mv)


def assert_solves(solved: Solved, A: Tensor, b: Tensor, bound: float = 1e-9) -> None:
    truth = torch.linalg.solve(A, b)
    assert solved.status.ok, solved
    assert float((solved.value - truth).norm()) <= bound * float(truth.norm())


def krylov(A: Tensor, b: Tensor, k: int) -> Tensor:
    """An orthonormal basis of Krylov_k(A, b), in columns."""
    columns = [b / b.norm()]
    for _ in range(k - 1):
        w = A @ columns[-1]
        for _ in range(2):
            w = w - torch.stack(columns, -1) @ (torch.stack(columns, -1).T @ w)
        columns.append(w / w.norm())
    return torch.stack(columns, -1)


# --- the dense solution, for every kind of system that a solver promises ---


@table(DEFINITE)
@given(system=systems(spd_matrices(max_condition=20.0)))
def test_definite_systems_are_solved(solver: AbstractLinearSolver, system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    assert_solves(solver.solve(operator(A), b), A, b)


@table(DEFINITE)
@given(system=systems(spd_matrices(max_condition=20.0)), seed=SEEDS)
def test_the_guess_does_not_change_the_answer(
    solver: AbstractLinearSolver, system: tuple[Tensor, Tensor], seed: int
) -> None:
    A, b = system
    assert_solves(solver.solve(operator(A), b, 10 * gaussian(len(b), seed=seed)), A, b)


@table(SYMMETRIC)
@given(system=systems(indefinite_matrices()))
def test_indefinite_systems_are_solved(solver: AbstractLinearSolver, system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    assert_solves(solver.solve(operator(A, positive_definite=False), b), A, b)


@table(GENERAL)
@given(system=systems(invertible_matrices()))
def test_general_systems_are_solved(solver: AbstractLinearSolver, system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    assert_solves(solver.solve(operator(A, positive_definite=False, symmetric=False), b), A, b)


@table(DEFINITE)
@given(system=batch_of(spd_matrices(min_size=2, max_condition=20.0)))
def test_rows_of_a_batch_are_solved(solver: AbstractLinearSolver, system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    solved = solver.solve(operator(A), b)
    truth = torch.linalg.solve(A, b)
    assert solved.statuses == (Status.successful,) * len(b)
    assert bool(((solved.value - truth).norm(dim=-1) <= 1e-9 * truth.norm(dim=-1)).all())


@pytest.mark.parametrize("name", ["gmres", "dense", "minres"])
@given(system=batch_of(indefinite_matrices(min_size=2)))
def test_rows_of_an_indefinite_batch_are_solved(name: str, system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    solved = SYMMETRIC[name].solve(operator(A, positive_definite=False), b)
    truth = torch.linalg.solve(A, b)
    assert solved.statuses == (Status.successful,) * len(b)
    assert bool(((solved.value - truth).norm(dim=-1) <= 1e-9 * truth.norm(dim=-1)).all())


# --- the contract ---


@table(EVERY)
@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize("guessed", [False, True])
def test_zero_right_hand_side_gives_zero(solver: AbstractLinearSolver, shape: tuple[int, ...], guessed: bool) -> None:
    A = spd(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1)
    solved = solver.solve(operator(A), torch.zeros(shape), torch.ones(shape) if guessed else None)
    assert solved.status.ok
    assert torch.equal(solved.value, torch.zeros(shape))
    assert torch.equal(solved.residual, torch.zeros(shape[:-1]))


@table(EVERY)
def test_a_zero_row_gives_zero_and_leaves_its_neighbour_alone(solver: AbstractLinearSolver) -> None:
    A = spd(torch.tensor([1.0, 2.0, 3.0]), 1)
    b = torch.stack([torch.zeros(3), torch.ones(3)])
    solved = solver.solve(operator(A), b, torch.ones(2, 3))
    alone = solver.solve(operator(A), b[1], torch.ones(3))
    assert torch.equal(solved.value[0], torch.zeros(3))
    torch.testing.assert_close(solved.value[1], alone.value, rtol=1e-9, atol=1e-9)


@table(EVERY)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("guessed", [False, True])
def test_the_residual_is_measured_at_the_very_tensor_returned(
    solver: AbstractLinearSolver, batched: bool, guessed: bool
) -> None:
    A = spd(torch.tensor([1.0, 2.0, 5.0, 9.0]), 3)
    b = gaussian(4, seed=1)
    A, b = (torch.stack([A, 2 * A]), torch.stack([b, b.flip(0)])) if batched else (A, b)
    probe = Probe(A)
    solved = solver.solve(probe.operator(), b, torch.ones_like(b) if guessed else None)
    returned = [vector for vector, _ in probe.last if vector is solved.value]
    assert len(returned) == 1
    assert probe.last[-1][0] is solved.value
    assert probe.last[-1][1] == solved.value._version
    torch.testing.assert_close(solved.residual, (b - times(A, solved.value)).norm(dim=-1), rtol=1e-6, atol=1e-14)
    assert solved.value.shape == b.shape


@table(EVERY)
@pytest.mark.parametrize("batched", [False, True])
def test_inputs_are_left_alone(solver: AbstractLinearSolver, batched: bool) -> None:
    A = spd(torch.tensor([1.0, 2.0, 5.0, 9.0]), 3)
    b, guess = gaussian(4, seed=1), gaussian(4, seed=2)
    if batched:
        A, b, guess = torch.stack([A, A]), torch.stack([b, -b]), torch.stack([guess, b])
    before = b.clone(), guess.clone()
    for start in (None, guess):
        solved = solver.solve(operator(A), b, start)
        assert torch.equal(b, before[0])
        assert torch.equal(guess, before[1])
        assert solved.value.data_ptr() not in (b.data_ptr(), guess.data_ptr())


@table(EVERY)
def test_products_that_alias_their_argument_are_left_alone(solver: AbstractLinearSolver) -> None:
    b = gaussian(3, seed=1)
    solved = solver.solve(LinearOperator(lambda v: v, 3, positive_definite=True), b)
    torch.testing.assert_close(solved.value, b, rtol=0.4 if isinstance(solver, Nystrom) else 1e-6, atol=0.0)


@table(EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["b", "A", "guess"])
def test_what_is_not_finite_is_reported_for_its_row_only(solver: AbstractLinearSolver, bad: float, where: str) -> None:
    A, b, guess = torch.stack([spd(torch.tensor([1.0, 2.0, 5.0]), 3)] * 2), torch.ones(2, 3), torch.ones(2, 3)
    alone = solver.solve(operator(A[1]), b[1], guess[1])
    {"b": b, "guess": guess, "A": A[:, 0]}[where][0, 1] = bad
    one = solver.solve(operator(A[0]), b[0], guess[0])
    both = solver.solve(operator(A), b, guess)
    if where == "guess" and isinstance(solver, Dense | Nystrom):  # direct methods do not look at it
        assert both.status is one.status is alone.status
    else:
        assert one.statuses == (Status.nonfinite,)
        assert both.statuses == (Status.nonfinite, alone.status)
    torch.testing.assert_close(both.value[1], alone.value, rtol=1e-9, atol=1e-12)


@table({name: solver for name, solver in EVERY.items() if name.startswith(("cg", "minres", "gmres", "neumann"))})
@pytest.mark.parametrize("batched", [False, True])
def test_nan_ends_the_steps(solver: AbstractLinearSolver, batched: bool) -> None:
    b = torch.ones(2, 30) if batched else torch.ones(30)
    assert solver.solve(operator(torch.full((30, 30), math.nan)), b).steps <= 1


@table(EVERY)
@given(system=batch_of(spd_matrices(min_size=4, max_condition=10.0)))
def test_a_batch_equals_a_loop(solver: AbstractLinearSolver, system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    both = solver.solve(operator(A), b)
    loop = [solver.solve(operator(A[k]), b[k]) for k in range(len(b))]
    assert both.statuses == tuple(one.status for one in loop)
    for k, one in enumerate(loop):
        assert float((both.value[k] - one.value).norm()) <= 1e-8 * float(one.value.norm())


@table(EVERY)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("batched", [False, True])
def test_the_answer_scales_with_the_right_hand_side_in_float32(
    solver: AbstractLinearSolver, size: float, batched: bool
) -> None:
    solver = (
        CG(rtol=1e-5, preconditioner=solver.preconditioner)
        if isinstance(solver, CG)
        else MINRES(rtol=1e-5)
        if isinstance(solver, MINRES)
        else GMRES(rtol=1e-5, restart=solver.restart)
        if isinstance(solver, GMRES)
        else Neumann(None, 5000, 1e-5)
        if isinstance(solver, Neumann)
        else solver
    )
    A = spd(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 3)
    b = gaussian(5, seed=1)
    expected = torch.linalg.solve(A, b) if not isinstance(solver, Nystrom) else solver.solve(operator(A), b).value
    single = (b * size).float()
    if batched:
        A, single = torch.stack([A, A]), torch.stack([single, single])
    solved = solver.solve(operator(A.float()), single)
    assert solved.status.ok
    assert solved.value.dtype == solved.residual.dtype == torch.float32
    error = (solved.value.double() / size - expected).norm(dim=-1)
    assert float(error.max()) <= 3e-5 * float(expected.norm())


@table(DEFINITE)
def test_the_solution_as_a_guess_is_returned(solver: AbstractLinearSolver) -> None:
    A, v = spd(torch.tensor([1.0, 2.0, 4.0]), 0), torch.tensor([1.0, -2.0, 3.0])
    solved = solver.solve(operator(A), A @ v, v)
    assert solved.status.ok
    assert torch.equal(solved.value, v)


@table({name: solver for name, solver in EVERY.items() if name.endswith("-steps") and not name.startswith("neumann")})
@given(system=systems(spd_matrices(max_size=5, max_condition=20.0)))
def test_steps_beyond_exact_convergence_are_harmless(
    solver: AbstractLinearSolver, system: tuple[Tensor, Tensor]
) -> None:
    A, b = system
    assert_solves(solver.solve(operator(A), b), A, b, 1e-12)
    assert_solves(solver.solve(operator(A), b, torch.linalg.solve(A, b)), A, b, 1e-12)


@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
@pytest.mark.parametrize("batched", [False, True])
def test_exact_convergence_ends_the_steps(kind: type, batched: bool) -> None:
    probe, b = Probe(spd(torch.linspace(1, 3, 5), 3)), gaussian(5, seed=1)
    solved = kind(rtol=0.0, max_steps=40).solve(probe.operator(), torch.stack([b, -b]) if batched else b)
    assert solved.status.ok
    assert probe.products <= 10


@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_running_out_of_steps_fails_only_those_who_gave_a_tolerance(kind: type, tolerance: float) -> None:
    A, b = spd(torch.linspace(1, 100, 10), 3), torch.ones(10)
    solved = kind(rtol=tolerance, max_steps=3).solve(operator(A), b)
    assert solved.status is (Status.max_steps if tolerance else Status.successful)
    assert solved.steps == 3
    assert float(solved.residual) > 1e-3


@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
@pytest.mark.parametrize(("guessed", "expected"), [(False, 6), (True, 7)])
def test_a_krylov_step_costs_one_product(kind: type, guessed: bool, expected: int) -> None:
    probe, b = Probe(spd(torch.linspace(1, 100, 10), 3)), torch.ones(10)
    solved = kind(rtol=0.0, max_steps=5).solve(probe.operator(), b, b if guessed else None)
    assert solved.steps == 5
    assert probe.products == expected
    assert len(probe.last) == 1


@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
@given(value=st.floats(0.01, 100.0), system=systems(spd_matrices()))
def test_a_multiple_of_the_identity_takes_one_step(kind: type, value: float, system: tuple[Tensor, Tensor]) -> None:
    b = system[1]
    solved = kind(rtol=1e-10).solve(operator(value * torch.eye(len(b))), b)
    assert solved.steps == 1
    torch.testing.assert_close(solved.value, b / value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
@pytest.mark.parametrize("batched", [False, True])
def test_the_rounding_floor_is_reported_as_stagnation(kind: type, batched: bool) -> None:
    A, b = spd(torch.logspace(0, 3, 20), 3).float(), gaussian(20, seed=1).float()
    A, b = (torch.stack([A, A]), torch.stack([b, b])) if batched else (A, b)
    solved = kind(rtol=1e-12, max_steps=3000).solve(operator(A), b)
    assert set(solved.statuses) == {Status.stagnated}
    assert solved.steps < 3000
    assert float((solved.residual / b.norm(dim=-1)).max()) < 1e-4


@pytest.mark.parametrize("kind", [CG, MINRES])
@pytest.mark.parametrize("batched", [False, True])
def test_success_means_that_the_true_residual_meets_the_tolerance(kind: type, batched: bool) -> None:
    """In float32, at condition 1e5, the residual of the recurrence drifts away from the true one."""
    A, b = spd(torch.logspace(0, 5, 60), 3).float(), gaussian(60, seed=1).float()
    A, b = (torch.stack([A, A]), torch.stack([b, b.flip(0)])) if batched else (A, b)
    probe = Probe(A)
    solved = kind(rtol=2e-5, max_steps=20_000).solve(probe.operator(), b)
    assert len(probe.last) > 1  # it restarted
    true = (b.double() - times(A.double(), solved.value.double())).norm(dim=-1) / b.double().norm(dim=-1)
    for residual, status in zip(true.reshape(-1).tolist(), solved.statuses, strict=True):
        assert status in (Status.successful, Status.stagnated)
        assert (residual <= 2.2e-5) == status.ok


# --- conjugate gradients ---


@given(system=systems(spd_matrices(min_size=8, max_size=12, max_condition=100.0)), k=st.integers(1, 8))
def test_cg_iterates_are_energy_projections_on_krylov_spaces(system: tuple[Tensor, Tensor], k: int) -> None:
    A = system[0] + torch.diag(torch.linspace(0, 50, len(system[1])))  # distinct eigenvalues
    b = system[1] + 1.0
    V = krylov(A, b, k)
    expected = V @ torch.linalg.solve(V.T @ A @ V, V.T @ b)
    solved = CG(rtol=0.0, max_steps=k).solve(operator(A), b)
    assert solved.status.ok
    assert float((solved.value - expected).norm()) <= 1e-8 * float(expected.norm())


@given(system=systems(spd_matrices(min_size=5, max_size=20, max_condition=1e3)))
def test_cg_errors_obey_the_sharp_bound_and_fall_monotonically(system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    truth = torch.linalg.solve(A, b)
    eigenvalues = torch.linalg.eigvalsh(A)
    root = math.sqrt(float(eigenvalues[-1] / eigenvalues[0]))
    q, start = (root - 1) / (root + 1), float(torch.sqrt(truth @ b))
    previous = float(truth.norm())
    for k in range(1, len(b)):
        error = CG(rtol=0.0, max_steps=k).solve(operator(A), b).value - truth
        assert float(torch.sqrt(error @ (A @ error))) <= 2 * q**k / (1 + q ** (2 * k)) * start + 1e-12 * start
        assert float(error.norm()) <= previous + 1e-12 * float(truth.norm())
        previous = float(error.norm())


def test_the_cg_bound_is_attained_with_its_factor_two() -> None:
    """At kappa = 1.1 the bound without the factor 2 is violated after one step, and the one with it is met."""
    A, b = torch.diag(torch.tensor([1.0, 1.1])), torch.tensor([1.0, 1.1**0.5])
    truth = torch.linalg.solve(A, b)
    error = CG(rtol=0.0, max_steps=1).solve(operator(A), b).value - truth
    ratio = float(torch.sqrt((error @ (A @ error)) / (truth @ b)))
    q = (math.sqrt(1.1) - 1) / (math.sqrt(1.1) + 1)
    assert q < ratio <= 2 * q / (1 + q * q) * (1 + 1e-12)


@pytest.mark.parametrize("batched", [False, True])
def test_cg_reports_negative_curvature_with_the_iterate_of_least_residual(batched: bool) -> None:
    A, b = torch.diag(torch.tensor([10.0, 8.0, 6.0, 4.0, -0.05])), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.2])
    residuals = [float(b.norm())]
    for k in range(1, 6):
        solved = CG(rtol=0.0, max_steps=k).solve(operator(A), b)
        residuals.append(float(solved.residual))
        if not solved.status.ok:
            break
    if batched:
        solved = CG(rtol=1e-10).solve(operator(torch.stack([A, A.abs()])), torch.stack([b, b]))
        assert solved.statuses == (Status.negative_curvature, Status.successful)
        assert float((times(A.abs(), solved.value[1]) - b).norm()) <= 1e-9
    else:
        solved = CG(rtol=1e-10).solve(operator(A), b)
        assert solved.status is Status.negative_curvature
    assert float(solved.residual.reshape(-1)[0]) == pytest.approx(min(residuals[:-1]), rel=1e-9)
    assert min(residuals[:-1]) < 0.5 * residuals[0]


def test_cg_keeps_the_least_residual_though_residuals_rose_before_the_negative_curvature() -> None:
    A = torch.diag(torch.tensor([0.27, 0.21, 0.08, 0.47, -0.14]))
    b = torch.tensor([0.87, 0.31, 0.73, 0.18, 0.013])
    residuals, k = [float(b.norm())], 0
    while True:
        k += 1
        solved = CG(rtol=0.0, max_steps=k).solve(operator(A), b)
        if not solved.status.ok:
            break
        residuals.append(float(solved.residual))
    assert residuals[-1] > 1.5 * min(residuals)  # the last one is not the best
    assert min(residuals) < 0.9 * residuals[0]
    assert float(solved.residual) == pytest.approx(min(residuals), rel=1e-9)
    both = CG(rtol=0.0, max_steps=k).solve(operator(torch.stack([A, A])), torch.stack([b, b]))
    torch.testing.assert_close(both.value[0], solved.value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batched", [False, True])
def test_cg_never_calls_a_semidefinite_inconsistent_system_solved(batched: bool) -> None:
    A, b = torch.diag(torch.tensor([2.0, 1.0, 0.0])), torch.ones(3)
    A, b = (torch.stack([A, A]), torch.stack([b, b])) if batched else (A, b)
    solved = CG(rtol=1e-8).solve(operator(A), b)
    assert solved.status is Status.negative_curvature
    assert bool(solved.value.isfinite().all())


@given(values=spectra(min_size=2, max_size=6), seed=SEEDS)
def test_cg_solves_semidefinite_consistent_systems(values: Tensor, seed: int) -> None:
    values = torch.cat([values / values.max(), torch.zeros(2)])
    A = spd(values, seed)
    b = A @ gaussian(len(values), seed=seed + 1)
    solved = CG(rtol=1e-9).solve(operator(A), b)
    assert solved.status.ok
    assert float((b - A @ solved.value).norm()) <= 1.01e-9 * float(b.norm())


@pytest.mark.parametrize("batched", [False, True])
def test_cg_refuses_a_preconditioner_that_is_not_positive_definite(batched: bool) -> None:
    @dataclass(frozen=True)
    class Negative(AbstractPreconditioner):
        def build(self, operator: LinearOperator, like: Tensor):  # type: ignore[no-untyped-def]
            return lambda r: -r

    A, b = torch.diag(torch.tensor([1.0, 2.0])), torch.ones(2)
    solved = CG(preconditioner=Negative()).solve(operator(A), torch.stack([b, b]) if batched else b)
    assert set(solved.statuses) == {Status.breakdown}
    assert torch.equal(solved.value, torch.zeros_like(solved.value))


def test_cg_meets_an_absolute_tolerance() -> None:
    A, b = spd(torch.linspace(1, 100, 20), 3), gaussian(20, seed=1)
    loose, tight = (CG(rtol=0.0, atol=atol).solve(operator(A), b) for atol in (1e-2, 1e-8))
    assert loose.status.ok
    assert tight.status.ok
    assert 1e-8 < float(loose.residual) <= 1e-2
    assert float(tight.residual) <= 1e-8


# --- minimal residuals ---


@pytest.mark.parametrize("kind", [MINRES, GMRES])
@given(system=systems(indefinite_matrices(min_size=6, max_size=10)))
def test_residuals_are_the_least_over_krylov_spaces_and_never_grow(kind: type, system: tuple[Tensor, Tensor]) -> None:
    A = system[0] + torch.diag(torch.linspace(0, 10, len(system[1])))
    b = system[1] + 1.0
    previous = float(b.norm())
    for k in range(1, 6):
        AV = A @ krylov(A, b, k)
        least = float((b - AV @ torch.linalg.lstsq(AV, b, driver="gelsd").solution).norm())
        residual = float(kind(rtol=0.0, max_steps=k).solve(operator(A, positive_definite=False), b).residual)
        assert residual == pytest.approx(least, rel=1e-7, abs=1e-10 * float(b.norm()))
        assert residual <= previous * (1 + 1e-12)
        previous = residual


@pytest.mark.parametrize("kind", [MINRES, GMRES])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_singular_inconsistent_systems_end_in_a_breakdown_at_the_least_residual(
    kind: type, batched: bool, seed: int
) -> None:
    A, b = spd(torch.tensor([3.0, -2.0, 1.0, 0.0, 0.0]), seed), orthogonal(5, seed) @ torch.linspace(1, 2, 5)
    least = float((b - A @ torch.linalg.pinv(A) @ b).norm())
    A, b = (torch.stack([A, torch.eye(5)]), torch.stack([b, b])) if batched else (A, b)
    solved = kind(rtol=1e-9).solve(operator(A, positive_definite=False), b)
    assert solved.statuses == (Status.breakdown, Status.successful)[: len(solved.statuses)]
    assert float(solved.residual.reshape(-1)[0]) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("kind", [MINRES, GMRES])
@pytest.mark.parametrize("rtol", [0.0, 1e-9])
def test_singular_inconsistent_systems_are_never_called_solved(kind: type, rtol: float) -> None:
    for seed in range(20):  # among them right-hand sides that hardly contain an eigenvector
        A, b = spd(torch.tensor([3.0, -2.0, 1.0, 0.0, 0.0]), seed), gaussian(5, seed=seed + 10)
        solved = kind(rtol=rtol, max_steps=20).solve(operator(A, positive_definite=False), b)
        assert solved.status in (Status.breakdown, Status.max_steps, Status.stagnated)


@pytest.mark.parametrize("kind", [MINRES, GMRES])
def test_a_zero_operator_is_a_breakdown(kind: type) -> None:
    solved = kind().solve(operator(torch.zeros(3, 3), positive_definite=False), torch.ones(3))
    assert solved.status is Status.breakdown
    assert torch.equal(solved.value, torch.zeros(3))


def test_gmres_is_exact_after_as_many_steps_as_there_are_distinct_eigenvalues() -> None:
    A = orthogonal(6, 1) @ torch.diag(torch.tensor([1.0, 1.0, 2.0, 2.0, -3.0, -3.0])) @ orthogonal(6, 1).T
    b = gaussian(6, seed=2)
    solved = GMRES(rtol=1e-12).solve(operator(A, positive_definite=False, symmetric=False), b)
    assert solved.steps == 3
    assert_solves(solved, A, b, 1e-13)


def test_gmres_needs_all_steps_for_a_cyclic_shift_and_stands_still_when_restarted() -> None:
    A, b = torch.roll(torch.eye(6), 1, dims=0), torch.eye(6)[0]
    shift = operator(A, positive_definite=False, symmetric=False)
    full = GMRES(rtol=1e-10).solve(shift, b)
    assert full.steps == 6
    assert_solves(full, A, b, 1e-13)
    restarted = GMRES(rtol=1e-10, restart=3).solve(shift, b)
    assert restarted.status is Status.stagnated
    assert float(restarted.residual) == pytest.approx(1.0)


def test_gmres_restarts_after_the_steps_asked_for() -> None:
    A, b = torch.eye(12) + 0.3 * gaussian(12, 12, seed=1) / 3, gaussian(12, seed=2)
    V = krylov(A, b, 3)
    first = V @ torch.linalg.lstsq(A @ V, b).solution
    W = krylov(A, b - A @ first, 2)
    expected = first + W @ torch.linalg.lstsq(A @ W, b - A @ first).solution
    solver = GMRES(rtol=0.0, max_steps=5, restart=3)
    solved = solver.solve(operator(A, positive_definite=False, symmetric=False), b)
    assert solved.steps == 5
    torch.testing.assert_close(solved.value, expected, rtol=1e-10, atol=1e-12)


def test_gmres_keeps_its_basis_orthogonal_on_an_ill_conditioned_system() -> None:
    A = orthogonal(60, 1) @ torch.diag(torch.logspace(0, 8, 60)) @ orthogonal(60, 2)
    b = A @ torch.ones(60)
    solved = GMRES(rtol=1e-12, max_steps=60).solve(operator(A, positive_definite=False, symmetric=False), b)
    assert solved.status.ok
    assert float((b - A @ solved.value).norm()) <= 1.01e-12 * float(b.norm())


# --- the Neumann series ---


@given(system=systems(spd_matrices(max_condition=50.0)), terms=st.integers(1, 12), seed=SEEDS)
def test_neumann_is_its_exact_formula(system: tuple[Tensor, Tensor], terms: int, seed: int) -> None:
    A, b = system
    step = 1.0 / float(torch.linalg.eigvalsh(A)[-1])
    P, truth = torch.eye(len(b)) - step * A, torch.linalg.solve(A, b)
    power = torch.linalg.matrix_power(P, terms)
    solved = Neumann(step, terms).solve(operator(A), b)
    assert solved.status.ok
    series = step * sum((torch.linalg.matrix_power(P, k) @ b for k in range(terms)), torch.zeros_like(b))
    torch.testing.assert_close(solved.value, series, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(truth - solved.value, power @ truth, rtol=1e-9, atol=1e-12)
    assert float(solved.residual) == pytest.approx(float((power @ b).norm()), rel=1e-9, abs=1e-13)
    guess = gaussian(len(b), seed=seed)
    warm = Neumann(step, terms).solve(operator(A), b, guess)
    torch.testing.assert_close(truth - warm.value, power @ (truth - guess), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("terms", "guessed", "products"), [(1, False, 1), (7, False, 7), (7, True, 8)])
def test_neumann_costs_its_terms_less_one_and_a_residual(terms: int, guessed: bool, products: int) -> None:
    probe, b = Probe(spd(torch.linspace(1, 9, 4), 3)), torch.ones(4)
    solved = Neumann(0.1, terms).solve(probe.operator(), b, -b if guessed else None)
    assert probe.products == products
    assert solved.steps == terms
    assert len(probe.last) == 1


@pytest.mark.parametrize("rtol", [1e-3, 1e-8])
def test_neumann_stops_at_its_tolerance(rtol: float) -> None:
    A, b = spd(torch.linspace(1, 9, 4), 3), gaussian(4, seed=1)
    solved = Neumann(0.1, 10_000, rtol).solve(operator(A), b)
    assert solved.status.ok
    assert 0.7 * rtol < float(solved.residual / b.norm()) <= rtol  # the factor of a step is 0.9
    short = Neumann(0.1, 3, rtol).solve(operator(A), b)
    assert short.status is Status.max_steps
    assert short.steps == 3


@pytest.mark.parametrize("terms", [1, 3, 200, 5000])
@pytest.mark.parametrize("batched", [False, True])
def test_neumann_reports_its_divergence_with_the_iterate_of_least_residual(terms: int, batched: bool) -> None:
    A, b = torch.diag(torch.tensor([1.0, 10.0])), torch.tensor([1.0, 0.05])
    A, b = (torch.stack([A, torch.eye(2)]), torch.stack([b, b])) if batched else (A, b)
    solved = Neumann(0.5, terms).solve(operator(A), b)
    residuals = [
        torch.linalg.vector_norm(times(torch.linalg.matrix_power(torch.eye(2) - 0.5 * A, k), b), dim=-1)
        for k in range(min(terms, 20) + 1)
    ]
    first = [float(residual.reshape(-1)[0]) for residual in residuals]
    expected = min(first) if max(first) > 1.01 * first[0] or terms > 3 else first[-1]
    assert float(solved.residual.reshape(-1)[0]) == pytest.approx(expected, rel=1e-9)
    if terms > 1:
        assert solved.statuses[0] is Status.diverged
    if batched:
        assert solved.statuses[1] is Status.successful
        assert float(solved.residual[1]) == pytest.approx(0.5**terms * float(b[1].norm()), abs=1e-15)


def test_neumann_stops_where_it_diverges() -> None:
    """And does not take the terms that are left."""
    for b in (torch.ones(2), torch.ones(3, 2)):
        solved = Neumann(step=3.0, terms=1000).solve(operator(torch.eye(2)), b)
        assert solved.steps < 10
        assert set(solved.statuses) == {Status.diverged}


@given(system=systems(spd_matrices(max_condition=1e3)))
def test_neumann_without_a_step_never_diverges(system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    solved = Neumann(None, 50).solve(operator(A), b)
    assert solved.status.ok
    largest = float(torch.linalg.eigvalsh(A)[-1])
    longest = torch.linalg.matrix_power(torch.eye(len(b)) - A / largest, 50) @ b
    shortest = torch.linalg.matrix_power(torch.eye(len(b)) - 0.9 * A / largest, 50) @ b
    assert float(longest.norm()) - 1e-12 <= float(solved.residual) <= float(shortest.norm()) + 1e-12


@pytest.mark.parametrize(
    ("A", "status"),
    [(-torch.eye(2), Status.negative_curvature), (torch.zeros(2, 2), Status.breakdown)],
    ids=["negative", "zero"],
)
def test_neumann_without_a_step_reports_an_operator_without_positive_eigenvalues(A: Tensor, status: Status) -> None:
    solved = Neumann(None, 5).solve(operator(A), torch.ones(2))
    assert solved.status is status
    assert torch.equal(solved.value, torch.zeros(2))


def test_neumann_converges_for_a_contraction_that_is_not_symmetric() -> None:
    A = torch.tensor([[1.0, -3.0], [0.0, 1.2]])  # the residual grows for a few terms
    b = torch.tensor([0.1, 1.0])
    solved = Neumann(1.0, 200).solve(operator(A, positive_definite=False, symmetric=False), b)
    assert_solves(solved, A, b, 1e-13)
    third = Neumann(1.0, 1).solve(operator(A, positive_definite=False, symmetric=False), b)
    assert third.status.ok
    torch.testing.assert_close(third.value, b)


# --- the dense factorization ---


def test_dense_reports_a_matrix_that_is_not_positive_definite_and_solves_it_all_the_same() -> None:
    A, b = spd(torch.tensor([3.0, 1.0, -2.0]), 4), gaussian(3, seed=1)
    solved = Dense().solve(operator(A), b)
    assert solved.status is Status.not_positive_definite
    torch.testing.assert_close(solved.value, torch.linalg.solve(A, b), rtol=1e-12, atol=1e-13)
    both = Dense().solve(operator(torch.stack([A, A @ A])), torch.stack([b, b]))
    assert both.statuses == (Status.not_positive_definite, Status.successful)
    torch.testing.assert_close(both.value[1], torch.linalg.solve(A @ A, b), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("positive_definite", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_dense_answers_a_singular_system_by_least_squares_and_reports_it(positive_definite: bool, seed: int) -> None:
    A, b = spd(torch.tensor([3.0, 1.0, 0.0]), seed), gaussian(3, seed=seed + 7)
    solved = Dense().solve(operator(A, positive_definite=positive_definite), b)
    assert solved.status is (Status.not_positive_definite if positive_definite else Status.singular)
    torch.testing.assert_close(solved.value, torch.linalg.pinv(A, rtol=1e-12) @ b, rtol=1e-9, atol=1e-12)


def test_dense_says_of_a_saddle_point_system_with_a_repeated_constraint_that_it_is_singular() -> None:
    H, row = spd(torch.tensor([3.0, 2.0, 1.0]), 1), gaussian(3, seed=2)
    A = torch.zeros(5, 5)
    A[:3, :3], A[3:, :3], A[:3, 3:] = H, torch.stack([row, row]), torch.stack([row, row], -1)
    regular = A.clone()
    regular[3, 0], regular[0, 3] = regular[3, 0] + 1, regular[0, 3] + 1
    b = gaussian(5, seed=3)
    solved = Dense().solve(operator(torch.stack([A, regular]), positive_definite=False), torch.stack([b, b]))
    assert solved.statuses == (Status.singular, Status.successful)
    assert solved.status is Status.singular
    assert "singular to rounding" in solved.status.value
    assert "Krylov" not in solved.status.value
    torch.testing.assert_close(solved.value[0], torch.linalg.pinv(A, rtol=1e-12) @ b, rtol=1e-9, atol=1e-12)


def test_dense_reports_an_operator_that_is_not_symmetric_though_declared() -> None:
    A, b = torch.tensor([[2.0, 1.0], [0.0, 2.0]]), torch.ones(2)
    for positive_definite in (True, False):
        solved = Dense().solve(operator(A, positive_definite=positive_definite), b)
        assert solved.status is Status.breakdown
        torch.testing.assert_close(solved.value, torch.linalg.solve(A, b))


def test_dense_refines_its_solution_once() -> None:
    """An LU factorization whose pivots grow: without refinement the residual is 1e8 times larger."""
    n = 45
    A = torch.eye(n) - torch.tril(torch.ones(n, n), -1)
    A[:, -1] = 1.0
    b = gaussian(n, seed=1)
    solved = Dense().solve(operator(A, positive_definite=False, symmetric=False), b)
    assert solved.status.ok
    assert float(solved.residual) <= 1e-12 * float(b.norm())


# --- Nystrom ---


@given(
    system=systems(spd_matrices(min_size=4, max_condition=100.0)),
    rank=st.integers(1, 4),
    damping=st.floats(1e-3, 10.0),
    seed=SEEDS,
)
def test_nystrom_is_the_damped_inverse_of_its_approximation(
    system: tuple[Tensor, Tensor], rank: int, damping: float, seed: int
) -> None:
    A, b = system
    n = len(b)
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:rank]
    C = A[drawn]
    Ak = C.T @ torch.linalg.solve(C[:, drawn], C)
    dense = torch.linalg.solve(Ak + damping * torch.eye(n), b)
    # the formula of the paper
    woodbury = b / damping - C.T @ torch.linalg.solve(C[:, drawn] + C @ C.T / damping, C @ b) / damping**2
    solved = Nystrom(rank, damping, seed).solve(operator(A), b)
    assert solved.status.ok
    torch.testing.assert_close(solved.value, dense, rtol=1e-8, atol=1e-9 / damping)
    torch.testing.assert_close(solved.value, woodbury, rtol=1e-7, atol=1e-7 / damping)
    error = float(torch.linalg.matrix_norm(A - Ak, 2))
    exact = torch.linalg.solve(A + damping * torch.eye(n), b)
    assert float((solved.value - exact).norm()) <= error / (damping * (damping + error)) * float(b.norm()) + 1e-8


@given(system=systems(spd_matrices(max_condition=100.0)), damping=st.floats(1e-6, 1.0))
def test_nystrom_with_all_columns_is_only_damped(system: tuple[Tensor, Tensor], damping: float) -> None:
    A, b = system
    solved = Nystrom(len(b) + 3, damping).solve(operator(A), b)
    torch.testing.assert_close(
        solved.value, torch.linalg.solve(A + damping * torch.eye(len(b)), b), rtol=1e-9, atol=1e-11
    )
    undamped = Nystrom(len(b)).solve(operator(A), b)
    torch.testing.assert_close(undamped.value, torch.linalg.solve(A, b), rtol=1e-5, atol=1e-6)


def test_nystrom_is_stable_for_columns_that_are_linearly_dependent() -> None:
    """A of rank 3 and 10 columns: the formula with a plain inverse of M loses all digits."""
    G = gaussian(20, 3, seed=1)
    A, b = G @ G.T, gaussian(20, seed=2)
    for damping in (1.0, 1e-6):
        solved = Nystrom(10, damping).solve(operator(A), b)
        assert solved.status.ok
        expected = torch.linalg.solve(A + damping * torch.eye(20), b)
        assert float((solved.value - expected).norm()) <= 1e-7 * float(expected.norm())


@pytest.mark.parametrize("batched", [False, True])
def test_nystrom_costs_one_product_a_column(batched: bool) -> None:
    A, b = spd(torch.linspace(1, 9, 6), 3), torch.ones(6)
    probe = Probe(torch.stack([A, A]) if batched else A)
    Nystrom(4, 0.1).solve(probe.operator(), torch.stack([b, b]) if batched else b)
    assert probe.products == 5


def test_nystrom_derives_the_damping_of_least_residual() -> None:
    """For right-hand sides outside the columns, on average: a damping three times larger or smaller is worse."""
    A = spd(1 / torch.arange(1, 201).square(), 3)
    drawn, b = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:10], gaussian(200, 40, seed=2)
    Q = torch.linalg.qr(A[:, drawn]).Q
    b = b - Q @ (Q.T @ b)
    C = A[drawn]
    E = A - C.T @ torch.linalg.solve(C[:, drawn], C)
    z = b[:, 0]  # E z = A z - A_k z outside the columns, v = z / rho there: rho is read off
    rho = float(z @ z / (z @ Nystrom(10).solve(operator(A), z).value))
    best = float(E.square().sum() / E.trace())
    assert 0.4 * best < rho < 2.5 * best
    residuals = [
        sum(float(Nystrom(10, damping).solve(operator(A), column).residual) ** 2 for column in b.T)
        for damping in (rho / 3, rho, 3 * rho)
    ]
    assert residuals[1] < min(residuals[0], residuals[2])


def test_nystrom_reports_indefinite_and_vanishing_operators() -> None:
    A = spd(torch.tensor([3.0, 1.0, -2.0]), 4)
    assert Nystrom(3, 0.1).solve(operator(A), torch.ones(3)).status is Status.not_positive_definite
    assert Nystrom(3).solve(operator(torch.zeros(3, 3)), torch.ones(3)).status is Status.breakdown
    damped = Nystrom(3, 2.0).solve(operator(torch.zeros(3, 3)), torch.ones(3))
    torch.testing.assert_close(damped.value, 0.5 * torch.ones(3))


def test_nystrom_draws_the_same_columns_for_the_same_seed() -> None:
    A, b = spd(torch.linspace(1, 50, 30), 3), gaussian(30, seed=1)
    first, again, other = (Nystrom(5, 0.5, seed).solve(operator(A), b).value for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


# --- preconditioners ---


def preconditioned_steps(A: Tensor, b: Tensor, preconditioner: AbstractPreconditioner) -> tuple[int, int]:
    plain = CG(rtol=1e-9, max_steps=5000).solve(operator(A), b)
    helped = CG(rtol=1e-9, max_steps=5000, preconditioner=preconditioner).solve(operator(A), b)
    truth = torch.linalg.solve(A, b)
    for solved in (plain, helped):
        assert solved.status.ok
        assert float((b - times(A, solved.value)).norm()) <= 1.01e-9 * float(b.norm())
        assert float((solved.value - truth).norm()) <= 1e-5 * float(truth.norm())
    return plain.steps, helped.steps


@pytest.mark.parametrize("estimated", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_jacobi_saves_steps_where_the_scales_of_variables_differ(estimated: bool, batched: bool) -> None:
    scales = torch.logspace(-2, 2, 40)
    A = scales[:, None] * spd(torch.linspace(1, 2, 40), 3) * scales
    b = gaussian(40, seed=1)
    diagonal = torch.diagonal(A).clone()
    if batched:
        A, b = torch.stack([A, A]), torch.stack([b, b])
    plain, helped = preconditioned_steps(A, b, Jacobi() if estimated else Jacobi(diagonal))
    assert helped < plain / 3


@pytest.mark.parametrize("batched", [False, True])
def test_the_nystrom_preconditioner_saves_steps_where_few_eigenvalues_are_large(batched: bool) -> None:
    A = spd(torch.cat([torch.logspace(2, 5, 10), torch.linspace(1, 2, 50)]), 3)
    b = gaussian(60, seed=1)
    if batched:
        A, b = torch.stack([A, 3 * A]), torch.stack([b, b.flip(0)])
    plain, helped = preconditioned_steps(A, b, NystromPreconditioner(rank=20))
    assert helped < plain / 2
    assert helped <= 15


def test_the_nystrom_preconditioner_is_the_inverse_of_its_sketch_raised_to_its_least_eigenvalue() -> None:
    G = gaussian(12, 4, seed=1)
    A, r = G @ G.T, gaussian(12, seed=2)
    values, vectors = torch.linalg.eigh(A)
    theta, U = values[-4:], vectors[:, -4:]
    for damping in (0.0, 0.5):  # a sketch of the rank of A is exact
        inverse = NystromPreconditioner(4, damping).build(operator(A), r)
        expected = (theta[0] + damping) * U @ ((U.T @ r) / (theta + damping)) + r - U @ (U.T @ r)
        torch.testing.assert_close(inverse(r), expected, rtol=1e-8, atol=1e-10)


def test_the_estimated_diagonal_is_exact_for_diagonal_operators_and_unbiased_for_others() -> None:
    d = torch.tensor([1.0, 10.0, 100.0])
    inverse = Jacobi(samples=2).build(operator(torch.diag(d)), torch.zeros(3))
    torch.testing.assert_close(inverse(torch.ones(3)), 1 / d)
    A = spd(torch.linspace(1, 3, 10), 3)
    estimated = 1 / Jacobi(samples=4000).build(operator(A), torch.zeros(10))(torch.ones(10))
    spread = (A.square().sum(1) - torch.diagonal(A).square()).sqrt() / math.sqrt(4000)
    assert bool(((estimated - torch.diagonal(A)).abs() <= 4 * spread).all())


def test_jacobi_is_positive_whatever_the_diagonal() -> None:
    like = torch.zeros(3)
    for diagonal in (torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3), -torch.ones(3)):
        inverse = Jacobi(diagonal).build(operator(torch.eye(3)), like)(torch.ones(3))
        assert bool(((inverse > 0) & inverse.isfinite()).all())
    noisy = torch.eye(3) + 5 * (torch.ones(3, 3) - torch.eye(3))  # estimates of both signs
    for seed in range(20):
        inverse = Jacobi(samples=2, seed=seed).build(operator(noisy), like)(torch.ones(3))
        assert bool(((inverse > 0) & inverse.isfinite()).all())


def test_jacobi_calls_for_its_diagonal_once_a_solve() -> None:
    calls = []

    def diagonal() -> Tensor:
        calls.append(1)
        return torch.tensor([1.0, 4.0])

    A, b = torch.diag(torch.tensor([1.0, 4.0])), torch.ones(2)
    solved = CG(preconditioner=Jacobi(diagonal)).solve(operator(A), b)
    assert calls == [1]
    assert solved.steps == 1
    assert_solves(solved, A, b)


@given(system=systems(spd_matrices(max_condition=100.0)), rank=st.integers(1, 10), seed=SEEDS)
def test_preconditioners_never_change_the_answer(system: tuple[Tensor, Tensor], rank: int, seed: int) -> None:
    A, b = system
    for preconditioner in (
        Jacobi(seed=seed),
        Jacobi(1 + gaussian(len(b), seed=seed).square()),
        NystromPreconditioner(rank, seed=seed),
        NystromPreconditioner(rank, 1.0, seed),
    ):
        assert_solves(CG(rtol=RTOL, max_steps=1000, preconditioner=preconditioner).solve(operator(A), b), A, b)


# --- refusals ---


def test_solvers_refuse_operators_without_the_properties_they_need() -> None:
    b = torch.ones(2)
    symmetric = operator(torch.eye(2), positive_definite=False)
    general = operator(torch.eye(2), positive_definite=False, symmetric=False)
    for solver, refused in (
        (CG(), symmetric),
        (CG(), general),
        (MINRES(), general),
        (Nystrom(1), general),
        (Neumann(None, 3), general),
    ):
        with pytest.raises(ValueError, match="requires an operator declared symmetric"):
            solver.solve(refused, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CG(rtol=-1.0), r"`CG\(rtol=...\)` must be at least 0. Got -1.0."),
        (lambda: CG(atol=math.nan), r"`CG\(atol=...\)` must be at least 0. Got nan."),
        (lambda: CG(max_steps=-1), r"`CG\(max_steps=...\)` must be at least 0. Got -1."),
        (lambda: MINRES(rtol=-1.0), r"`MINRES\(rtol=...\)` must be at least 0. Got -1.0."),
        (lambda: GMRES(max_steps=-2), r"`GMRES\(max_steps=...\)` must be at least 0. Got -2."),
        (lambda: GMRES(restart=0), r"`GMRES\(restart=...\)` must be at least 1. Got 0."),
        (lambda: Neumann(step=0.0, terms=1), r"`Neumann\(step=...\)` must be positive and finite. Got 0.0."),
        (lambda: Neumann(step=None, terms=0), r"`Neumann\(terms=...\)` must be at least 1. Got 0."),
        (lambda: Neumann(step=1.0, terms=1, rtol=-1.0), r"`Neumann\(rtol=...\)` must be at least 0. Got -1.0."),
        (lambda: Nystrom(rank=0), r"`Nystrom\(rank=...\)` must be at least 1. Got 0."),
        (lambda: Nystrom(rank=1, damping=0.0), r"`Nystrom\(damping=...\)` must be positive and finite. Got 0.0."),
        (lambda: NystromPreconditioner(0), r"`NystromPreconditioner\(rank=...\)` must be at least 1. Got 0."),
        (lambda: NystromPreconditioner(1, -1.0), r"`NystromPreconditioner\(damping=...\)` must be at least 0"),
        (lambda: Jacobi(samples=1), r"`Jacobi\(samples=...\)` must be at least 2. Got 1."),
        (
            lambda: Jacobi(torch.ones(3)).build(operator(torch.eye(2)), torch.ones(2)),
            r"`Jacobi\(diagonal=...\)` must have the shape \(2,\)",
        ),
    ],
)
def test_arguments_are_checked(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


@given(n=st.integers(1, 5), data=st.data())
def test_right_hand_sides_are_never_zero(n: int, data: st.DataObject) -> None:
    assert float(data.draw(right_hand_sides(n)).norm()) > 0


@given(systems(spd_matrices()))
def test_without_recomputing_cg_takes_one_product_less_for_the_same_answer(system: tuple[Tensor, Tensor]) -> None:
    A, b = system
    counts = []
    for recompute in (True, False):
        calls = [0]

        def mv(v: Tensor, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            return v @ A

        solver = CG(rtol=0.0, max_steps=3, recompute=recompute)
        solved = solver.solve(LinearOperator(mv, len(b), positive_definite=True), b)
        counts.append((calls[0], solved))
    (more, checked), (fewer, unchecked) = counts
    assert fewer == more - 1
    assert torch.equal(checked.value, unchecked.value)
    assert abs(float(checked.residual - unchecked.residual)) <= 1e-9 * float(b.norm())


def test_without_recomputing_batches_and_guesses_are_solved_and_missed_tolerances_reported() -> None:
    A = spd(torch.tensor([1.0, 2.0, 5.0]), seed=3)
    b = gaussian(2, 3, seed=1)
    operator = LinearOperator(lambda v: v @ A, 3, positive_definite=True)
    exact = torch.linalg.solve(A, b.T).T
    solved = CG(rtol=1e-12, recompute=False).solve(operator, b, guess=gaussian(2, 3, seed=2))
    assert solved.status is Status.successful
    assert float((solved.value - exact).norm()) <= 1e-11
    assert CG(rtol=1e-12, max_steps=1, recompute=False).solve(operator, b).status is Status.max_steps
    assert CG(recompute=False).solve(operator, b * torch.nan).status is Status.nonfinite


@pytest.mark.parametrize("max_steps", [4, 6])
def test_gmres_that_runs_out_of_steps_at_the_end_of_a_cycle_is_out_of_steps_and_not_stuck(max_steps: int) -> None:
    """On the cyclic shift every residual before step n is |b|: cycles of two never gain anything."""
    shift = torch.eye(6).roll(1, 0)
    solver = GMRES(rtol=1e-9, restart=2, max_steps=max_steps)
    solved = solver.solve(operator(shift, positive_definite=False), torch.eye(6)[0])
    assert solved.status is (Status.max_steps if max_steps == 4 else Status.stagnated)
    assert solved.steps == 4


def test_minres_breaks_down_where_the_residual_is_of_least_norm_and_not_where_a_is_indefinite() -> None:
    """A r = 0 ends it, however small r is; r'A r = 0 does not."""
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    solved = MINRES(rtol=1e-12).solve(operator(swap, positive_definite=False), torch.tensor([1.0, 0.0]))
    assert solved.status is Status.successful
    assert torch.allclose(solved.value, torch.tensor([0.0, 1.0]))
    flat = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    solved = MINRES(rtol=1e-12).solve(operator(flat, positive_definite=False), torch.tensor([1.0, 2.0, 1.0]))
    assert solved.status is Status.breakdown
    assert float(solved.residual) == pytest.approx(1.0)
    assert float(solved.value.norm()) < 10  # before it grows along the null space
    assert solved.steps <= 3


@pytest.mark.parametrize("solver", [CG(), MINRES(), GMRES()])
def test_a_tolerance_is_taken_relative_to_the_right_hand_side(solver: AbstractLinearSolver) -> None:
    other = solver.with_tolerance(1e-3, 10.0)
    assert other is not None
    solved = other.solve(operator(torch.diag(torch.linspace(1, 9, 40)), positive_definite=True), torch.full((40,), 1.6))
    assert 1e-6 < float(solved.residual) <= 1.6 * 40**0.5 * 1e-4


def test_gmres_may_start_anew_after_every_step() -> None:
    solved = GMRES(rtol=1e-9, restart=1, max_steps=500).solve(
        operator(torch.diag(torch.tensor([1.0, 2.0]))), torch.ones(2)
    )
    assert solved.status is Status.successful
