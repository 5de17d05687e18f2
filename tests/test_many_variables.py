"""Constraints on many y, by products alone; batches of programs; cvxpylayers as an oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AID, KKT, BilevelProblem, Polytope, Status, hypergradient, ravel
from bilevel._numerics.interior_point import Program
from bilevel._numerics.polyhedron_projection import projected
from bilevel._numerics.principal_pivoting import pivoted
from bilevel._numerics.quadratic_programs import solve_program
from bilevel.solvers import MINRES, ActiveSet, InteriorPoint, QuadraticProgram

D = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def smoothed(q: int, inequalities: int = 0) -> BilevelProblem:
    A, G, t = normal(3, q), normal(inequalities, q, seed=1) if inequalities else None, normal(q, seed=2)
    return BilevelProblem(
        lambda x, y: (y - 0.3).square().sum() / 2,
        lambda x, y: (y - x * t).square().sum() / 2 + (y[1:] - y[:-1]).square().sum(),
        constraints=lambda x: Polytope(A=A, b=0.2 * A.sum(-1) * x.mean(), G=G, h=2.0, lower=-0.1, upper=0.6),
    )


@pytest.mark.parametrize("inequalities", [0, 4])
def test_products_alone_give_the_hypergradient_of_dense_matrices(inequalities: int) -> None:
    problem, x, y0 = smoothed(40, inequalities), torch.ones(40, dtype=D), torch.zeros(40, dtype=D)
    dense = hypergradient(problem, x, y0, estimator=KKT(QuadraticProgram()))
    found = hypergradient(problem, x, y0, estimator=AID(ActiveSet(), MINRES(rtol=1e-11)))
    assert torch.allclose(found.y, dense.y, rtol=0, atol=1e-11)
    assert torch.allclose(found.grad, dense.grad, rtol=0, atol=1e-9)


def test_where_nothing_holds_active_sets_end_at_the_minimizer_of_g() -> None:
    L, t = normal(6, 6), 10 * normal(6, seed=1)  # the gradient at y* is rounding of what cancels in it
    Q = L @ L.mT + torch.eye(6, dtype=D)
    for wide in (Polytope(lower=-1e3, upper=1e3), Polytope(G=normal(4, 6, seed=2), h=1e3)):
        problem = BilevelProblem(
            lambda x, y: y.sum(),
            lambda x, y: y @ Q @ y / 2 - x * (t @ y),
            constraints=lambda x, wide=wide: wide,
        )
        x, y0 = torch.ones(1, dtype=D), torch.zeros(6, dtype=D)
        found = hypergradient(problem, x, y0, estimator=AID(ActiveSet(), MINRES(1e-12)))
        assert torch.allclose(found.grad, torch.linalg.solve(Q, t).sum().reshape(1), rtol=1e-9, atol=0)


def test_no_matrix_is_formed_of_many_variables() -> None:
    q = 10_000
    problem, x, y0 = smoothed(q), torch.ones(q, dtype=D), torch.zeros(q, dtype=D)
    found = hypergradient(problem, x, y0, estimator=AID(ActiveSet(), MINRES(rtol=1e-8)))
    assert found.status.ok
    assert found.stats.hvps < q / 4  # a dense Hessian takes q


@pytest.mark.filterwarnings("ignore:Sparse")  # torch's own, of its layouts
@pytest.mark.parametrize("part", ["A", "G"])
def test_rows_that_are_a_function_are_refused_and_sparse_ones_where_they_have_to_be_dense(part: str) -> None:
    given: Any = {part: sum}
    with pytest.raises(TypeError, match=rf"`Polytope\({part}=...\)` must be a matrix, .*`inequalities=`.*jacrev"):
        Polytope(**given)
    at, rows = ravel(torch.zeros(3))[1], torch.eye(3).to_sparse()
    for sparse in (rows, rows.to_sparse_csr()):
        with pytest.raises(
            ValueError, match=rf"`Polytope\({part}=...\)` is sparse, .*`inner=ManyConstraints\(.*to_dense"
        ):
            Polytope(**{part: sparse}).parts(at)
    with pytest.raises(ValueError, match="must be a matrix"):
        Polytope(**{part: torch.ones(3).to_sparse()})
    with pytest.raises(ValueError, match="must have 3 columns"):
        Polytope(**{part: torch.eye(2).to_sparse()}).sparse_parts(at)


def test_contradictory_constraints_and_steps_used_up_are_statuses() -> None:
    def status(b: float, solver: ActiveSet) -> Status:
        problem = BilevelProblem(
            lambda x, y: y.sum(),
            lambda x, y: (y - x).cosh().sum() + y.square().sum(),
            constraints=lambda x: Polytope(A=torch.ones(1, 3, dtype=D), b=b, lower=0.0, upper=1.0),
        )
        at = torch.tensor([0.5, 2.0, -1.0], dtype=D)
        estimator = AID(solver, MINRES())
        return hypergradient(problem, at, torch.zeros(3, dtype=D), estimator=estimator, throw=False).reports[0].status

    assert status(4.0, ActiveSet()) is Status.infeasible
    assert status(2.0, ActiveSet()) is Status.successful
    assert status(2.0, ActiveSet(max_steps=0)) is Status.max_steps


def test_the_projection_is_the_solution_of_its_quadratic_program() -> None:
    v, A = normal(5, 12), normal(5, 2, 12, seed=1)
    lower, upper = torch.full_like(v, -0.5), torch.full_like(v, 0.7)
    b = (A @ (normal(5, 12, seed=2).clamp(-0.5, 0.7)).unsqueeze(-1)).squeeze(-1)
    w, _, off = projected(v, A, b, lower, upper)
    program = Program(torch.eye(12, dtype=D).expand(5, 12, 12), -v, A, b, lower, upper)
    assert torch.allclose(w, solve_program(program, 1e-12, 100).y, rtol=0, atol=1e-10)
    assert float(off.max()) < 1e-13


def test_pivoting_ends_where_interior_points_do_and_leaves_degenerate_programs_to_them() -> None:
    n, k, rows = 6, 4, 50
    L, G = normal(rows, n, n), normal(rows, k, n, seed=1)
    Q = torch.nn.functional.pad(L @ L.mT + torch.eye(n, dtype=D), (0, k, 0, k))
    A = torch.cat([G, torch.eye(k, dtype=D).expand(rows, k, k)], -1)
    q = torch.nn.functional.pad(3 * normal(rows, n, seed=2), (0, k))
    lower = torch.cat([torch.full((rows, n), -0.3, dtype=D), torch.zeros(rows, k, dtype=D)], -1)
    h = normal(rows, k, seed=3).abs()
    program = Program(Q, q, A, h, lower, torch.full_like(lower, torch.inf), k)
    ahead = pivoted(program, 50)
    assert ahead is not None
    done = ahead.done  # not those that come to a set of more rows than variables
    assert float(done.double().mean()) > 0.9
    inside = solve_program(Program(Q, q, A, h, lower, torch.full_like(lower, torch.inf)), 1e-12, 100)
    assert torch.allclose(ahead.y[done, :n], inside.y[done, :n], rtol=0, atol=1e-11)
    assert inside.y.isfinite().all()
    weak = Program(Q, q * 0, A, h * 0, lower, program.upper, k)  # all hold at zero, with zero multipliers
    again = pivoted(weak, 50)
    assert again is not None and not bool(again.done.any())


def quadratic(tasks: bool) -> BilevelProblem:
    return BilevelProblem(
        lambda x, y, d: y.square().sum() / 2,
        lambda x, y, d: y @ d["Q"] @ y / 2 + (x * d["q"]) @ y,
        constraints=lambda x, d: Polytope(G=d["G"], h=d["h"]),
        tasks=tasks,
    )


def programs(count: int, n: int = 20, k: int = 10) -> dict[str, Tensor]:
    L = normal(count, n, n)
    Q = L @ L.mT / n + torch.eye(n, dtype=D)
    return {
        "Q": Q,
        "q": normal(count, n, seed=1),
        "G": normal(count, k, n, seed=2),
        "h": normal(count, k, seed=3).abs(),
    }


def test_a_batch_of_a_thousand_programs_gives_what_single_solves_give() -> None:
    data, x, y0 = programs(1000), torch.ones(20, dtype=D), torch.zeros(20, dtype=D)
    found = hypergradient(quadratic(True), x, y0, data=data)
    for i in (0, 123, 999):
        alone = hypergradient(quadratic(False), x, y0, data={name: part[i] for name, part in data.items()})
        assert torch.allclose(found.y[i], alone.y, rtol=0, atol=1e-9)
    few = {name: part[:5] for name, part in data.items()}
    singles = [
        hypergradient(quadratic(False), x, y0, data={name: part[i] for name, part in few.items()}).grad
        for i in range(5)
    ]
    assert torch.allclose(
        hypergradient(quadratic(True), x, y0, data=few).grad, torch.stack(singles).mean(0), rtol=0, atol=1e-9
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_cvxpylayers_dense_gives_the_same_hypergradient_of_a_quadratic_program() -> None:
    cp, layers = pytest.importorskip("cvxpy"), pytest.importorskip("cvxpylayers.torch")
    data, x = programs(1, 6, 4), torch.ones(6, dtype=D)
    one = {name: part[0] for name, part in data.items()}
    F, q, y = cp.Parameter((6, 6)), cp.Parameter(6), cp.Variable(6)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ y) / 2 + q @ y), [one["G"].numpy() @ y <= one["h"].numpy()])
    layer = layers.CvxpyLayer(problem, parameters=[F, q], variables=[y])
    leaf = x.clone().requires_grad_()
    root = torch.linalg.cholesky(one["Q"]).mT.contiguous()
    (theirs,) = layer(root, leaf * one["q"], solver_args={"eps": 1e-10, "mode": "dense"})
    (truth,) = torch.autograd.grad(theirs.square().sum() / 2, leaf)
    ours = hypergradient(quadratic(False), x, torch.zeros(6, dtype=D), data=one)
    assert torch.allclose(ours.grad, truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "constraints",
    [
        lambda x: Polytope(lower=0.0),
        lambda x: Polytope(lower=0.0 * x, upper=x),
        lambda x: Polytope(A=torch.ones(1, 4, dtype=D), b=2.0),
        lambda x: Polytope(G=torch.ones(1, 4, dtype=D), h=2.0),
        lambda x: Polytope(G=torch.ones(1, 4, dtype=D), h=2.0, lower=0.0),
    ],
    ids=["lower bounds", "a box that moves", "an equality", "an inequality", "both"],
)
def test_active_sets_are_those_of_interior_points_with_and_without_rows(constraints: Any) -> None:
    target, x = torch.tensor([[1.0, 2.0, 3.0, -1.0], [0.7, 0.9, 1.1, 1.3]], dtype=D)
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum() + (x * y).sum(),
        lambda x, y: (y - x * target).square().sum() / 2 + y.cosh().log().sum(),
        constraints=constraints,
    )
    found = hypergradient(problem, x, torch.zeros(4, dtype=D), estimator=AID(ActiveSet(), MINRES(rtol=1e-12)))
    exact = hypergradient(problem, x, torch.zeros(4, dtype=D), estimator=KKT(InteriorPoint()))
    torch.testing.assert_close(found.y, exact.y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.grad, exact.grad, rtol=1e-8, atol=1e-8)
