"""Many constraints on many y, by products and by sparse rows: the derivative of dense matrices, and named failures."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AID, ITD, KKT, BilevelProblem, FiniteDifference, Penalty, Polytope, Status, check, hypergradient
from bilevel._estimate import AbstractEstimator
from bilevel.inner_problems import ManyConstraints
from bilevel.solvers import (
    MINRES,
    GradientDescent,
    InteriorPoint,
    Iterate,
    ProximalMultipliers,
    QuadraticProgram,
    SparseInteriorPoint,
    SparseSaddle,
)

D = torch.float64
PRODUCTS: AbstractEstimator = AID(ProximalMultipliers(), MINRES(1e-12))
SPARSE: AbstractEstimator = AID(SparseInteriorPoint(), SparseSaddle())
MIXED: AbstractEstimator = AID(SparseInteriorPoint(), MINRES(1e-12))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def sparse(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return matrix.to_sparse()


def differences(q: int) -> Tensor:
    """Row i is y[i] - y[i + 1]."""
    at = torch.arange(q - 1)
    values = torch.tensor([1.0, -1.0], dtype=D).repeat_interleave(q - 1)
    where = torch.stack([at.repeat(2), torch.cat([at, at + 1])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Tensor = torch.sparse_coo_tensor(where, values, (q - 1, q)).coalesce()
    return found


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 1).square().sum() + (x * y).sum()


def programs(seed: int, q: int = 20, k: int = 30, m: int = 3) -> tuple[Any, Any, Any, Tensor]:
    """g, dense constraints, the same with sparse rows, and x; everything moves with x."""
    L = normal(q, q, seed=seed)
    Q, linear = L @ L.mT / q + 0.1 * torch.eye(q, dtype=D), normal(q, seed=seed + 1)
    G, h, A = normal(k, q, seed=seed + 2), normal(k, seed=seed + 3).abs(), normal(m, q, seed=seed + 4)

    def g(x: Tensor, y: Tensor) -> Tensor:
        return y @ Q @ y / 2 + (linear * x) @ y

    def given(x: Tensor, kind: Any) -> Polytope:
        upper, equal, side = 0.5 + 0.1 * x.square().mean(), A.to(x), h.to(x)
        moved = G.to(x) * (1 + 0.1 * x[:1])
        return Polytope(A=kind(equal), b=0.1 * x[:m], G=kind(moved), h=side + 0.1 * x[0], lower=-0.5, upper=upper)

    return g, lambda x: given(x, lambda M: M), lambda x: given(x, sparse), normal(q, seed=seed + 5)


@pytest.mark.parametrize("estimator", [PRODUCTS, SPARSE, MIXED], ids=["products", "sparse", "mixed"])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_the_hypergradient_and_multipliers_are_those_of_dense_matrices(seed: int, estimator: AID) -> None:
    g, dense, rows, x = programs(seed)
    y0 = torch.zeros(20, dtype=D)
    exact = hypergradient(BilevelProblem(f, g, constraints=dense), x, y0, estimator=KKT(QuadraticProgram()))
    inner = ManyConstraints(g, constraints=dense if estimator is PRODUCTS else rows)
    found = hypergradient(BilevelProblem(f, inner=inner), x, y0, estimator=estimator)
    assert torch.allclose(found.y, exact.y, rtol=0, atol=1e-11)
    assert torch.allclose(found.grad, exact.grad, rtol=0, atol=1e-8)
    assert found.multipliers is not None and exact.multipliers is not None
    for part in ("linear_inequalities", "linear_equalities", "lower", "upper"):
        ours, theirs = getattr(found.multipliers, part), getattr(exact.multipliers, part)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-8), part


def test_constraints_as_functions_are_those_of_matrices_and_may_be_curved() -> None:
    q, k = 12, 9
    R, t = normal(k, q, q), normal(q, seed=1)
    S = R.mT @ R / q

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (y - 2 * t * x).square().sum() / 2 + y.cosh().log().sum()

    def c(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"curved": torch.einsum("i,kij,j->k", y, S, y) - x[:k].exp(), "line": (y.sum() - x[0]).reshape(1)}

    def e(x: Tensor, y: Tensor) -> Tensor:
        return y[:2] - y[2:4] - 0.1 * x[:2]

    x, y0 = normal(q, seed=4) / 3, torch.zeros(q, dtype=D)
    bounds = lambda x: Polytope(lower=-0.4, upper=0.6 + 0.1 * x[0])  # noqa: E731
    whole = BilevelProblem(f, g, inequalities=c, equalities=e, constraints=bounds)
    exact = hypergradient(whole, x, y0, estimator=KKT(InteriorPoint()))
    inner = ManyConstraints(g, c, e, bounds)
    found = hypergradient(BilevelProblem(f, inner=inner), x, y0)  # by name
    assert torch.allclose(found.y, exact.y, rtol=0, atol=1e-10)
    assert torch.allclose(found.grad, exact.grad, rtol=0, atol=1e-7)
    assert found.multipliers is not None and exact.multipliers is not None
    assert all(float(each.max()) > 1e-2 for each in exact.multipliers.inequalities.values())  # both hold
    for name in ("curved", "line"):
        assert torch.allclose(found.multipliers.inequalities[name], exact.multipliers.inequalities[name], atol=1e-8)
    assert torch.allclose(found.multipliers.equalities, exact.multipliers.equalities, atol=1e-8)


def test_ten_thousand_numbers_in_order_have_the_means_of_their_blocks() -> None:
    q = 10_000
    x = torch.linspace(0, 6, q, dtype=D).sin() + 0.1 * normal(q)
    G, t = differences(q), normal(q, seed=1)
    inner = ManyConstraints(
        lambda x, y: (y - x).square().sum() / 2, constraints=lambda x: Polytope(G=G, h=torch.zeros(q - 1, dtype=D))
    )
    found = hypergradient(BilevelProblem(lambda x, y: t @ y, inner=inner), x, torch.zeros(q, dtype=D))
    blocks: list[list[float]] = []  # pool adjacent violators
    for value in x.tolist():
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    sizes = torch.tensor([int(n) for _, n in blocks])
    pooled = torch.tensor([a for a, _ in blocks], dtype=D).repeat_interleave(sizes)
    index = torch.arange(len(blocks)).repeat_interleave(sizes)
    means = torch.zeros(len(blocks), dtype=D).index_add(0, index, t) / sizes
    assert torch.allclose(found.y, pooled, rtol=0, atol=1e-9)
    assert torch.allclose(found.grad, means[index], rtol=0, atol=1e-9)


def test_a_transport_plan_costs_what_a_linear_program_says_and_its_duals_are_the_gradient() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    k = 12
    C, a, b = normal(k, k).abs(), normal(k, seed=1).abs() + 0.1, normal(k, seed=2).abs() + 0.1
    a, b = a / a.sum(), b / b.sum()
    eye, one = torch.eye(k, dtype=D), torch.ones(1, k, dtype=D)
    A = torch.cat([torch.kron(eye, one), torch.kron(one, eye)[1:]])
    inner = ManyConstraints(
        lambda x, y: (C * y).sum(),
        constraints=lambda x: Polytope(A=sparse(A), b=torch.cat([x / x.sum(), b[1:]]), lower=0.0),
    )
    found = hypergradient(BilevelProblem(lambda x, y: (C * y).sum(), inner=inner), a, torch.zeros(k, k, dtype=D))
    exact = optimize.linprog(C.reshape(-1).numpy(), A_eq=A.numpy(), b_eq=torch.cat([a, b[1:]]).numpy())
    assert abs(float((C * found.y).sum()) - exact.fun) < 1e-11
    duals = torch.from_numpy(exact.eqlin.marginals.copy())[:k]
    assert torch.allclose(found.grad, duals - a @ duals, rtol=0, atol=1e-9)


def test_tasks_are_single_problems() -> None:
    q = 6

    def g(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        return (y - x * d).square().sum() / 2

    def c(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        return torch.cat([y[1:] - y[:-1] - 0.3 * x[0], y.square().sum().reshape(1) - d.abs().sum()])

    data, x, y0 = 2 * normal(4, q), 1 + 0.1 * normal(q, seed=1), torch.zeros(q, dtype=D)
    outer = lambda x, y, d: (y - d).square().sum()  # noqa: E731
    several = BilevelProblem(outer, inner=ManyConstraints(g, c), tasks=True)
    one = BilevelProblem(outer, inner=ManyConstraints(g, c))
    together = hypergradient(several, x, y0, data=data)
    alone = [hypergradient(one, x, y0, data=d) for d in data]
    assert torch.allclose(together.y, torch.stack([each.y for each in alone]), rtol=0, atol=1e-10)
    assert torch.allclose(together.grad, torch.stack([each.grad for each in alone]).mean(0), rtol=0, atol=1e-8)
    step = 1e-5 * normal(q, seed=3)
    up, down = (hypergradient(several, x + s * step, y0, data=data).value for s in (1, -1))
    assert abs(float(up - down) / 2 - float(together.grad @ step)) < 1e-7 * float(step.norm())


def status(problem: BilevelProblem, x: Tensor, q: int) -> Status:
    return hypergradient(problem, x, torch.zeros(q, dtype=D), throw=False).status


def many(g: Any, rows: Tensor, side: Any, as_rows: bool, outer: Any = None) -> BilevelProblem:
    if as_rows:
        inner = ManyConstraints(g, constraints=lambda x: Polytope(G=sparse(rows), h=side(x)))
    else:
        inner = ManyConstraints(g, lambda x, y: rows @ y - side(x))
    return BilevelProblem((lambda x, y: y.sum()) if outer is None else outer, inner=inner)


@pytest.mark.parametrize("as_rows", [False, True], ids=["functions", "sparse"])
def test_failures_are_named(as_rows: bool) -> None:
    eye, x = torch.eye(3, dtype=D), torch.ones(1, dtype=D)

    def near(x: Tensor, y: Tensor) -> Tensor:
        return (y - 1).square().sum() / 2

    both = torch.cat([eye, -eye])
    box = lambda x: torch.cat([x.expand(3), -(2 - x).expand(3)])  # noqa: E731  (2 - x <= y <= x)
    assert status(many(near, both, box, as_rows), 1.5 * x, 3) is Status.successful
    assert status(many(near, both, box, as_rows), 0.5 * x, 3) is Status.infeasible
    assert status(many(near, both, box, as_rows), x, 3) is Status.dependent_constraints  # they move apart
    assert status(many(near, eye, lambda x: x.expand(3), as_rows), x, 3) is Status.weakly_active
    twice = torch.cat([eye, eye])
    repeated = many(lambda x, y: (y - 2).square().sum(), twice, lambda x: x.expand(6), as_rows)
    found = hypergradient(repeated, x, torch.zeros(3, dtype=D))
    assert torch.allclose(found.grad, torch.full((1,), 3.0, dtype=D))
    flat = many(lambda x, y: (y[0] - x[0]).square(), eye[:1], lambda x: 2 * x, as_rows)
    assert not status(flat, x, 3).ok  # y_2 and y_3 are any
    falls = many(lambda x, y: y.sum() * x[0], eye, lambda x: x.expand(3), as_rows)
    assert not status(falls, x, 3).ok  # without end
    assert status(falls, -x, 3) is Status.successful
    bent = many(lambda x, y: -(y.square().sum()) + (y * x).sum(), both, lambda x: torch.ones(6, dtype=D), as_rows)
    assert not status(bent, x * 1e-3, 3).ok or bool(
        (hypergradient(bent, x * 1e-3, torch.zeros(3, dtype=D)).y.abs() == 1).all()
    )


@pytest.mark.parametrize("as_rows", [False, True], ids=["functions", "sparse"])
@pytest.mark.parametrize(("beyond", "slope"), [(1e-8, 1.0), (-1e-8, 0.0)], ids=["just free", "just held"])
def test_what_holds_only_just_is_told_by_multipliers(beyond: float, slope: float, as_rows: bool) -> None:
    problem = many(
        lambda x, y: (y - x).square().sum() / 2, torch.eye(3, dtype=D), lambda x: 1 + beyond + 0 * x.expand(3), as_rows
    )
    found = hypergradient(problem, torch.ones(1, dtype=D), torch.zeros(3, dtype=D))
    assert torch.allclose(found.grad, torch.full((1,), 3 * slope, dtype=D), rtol=0, atol=1e-8)


@pytest.mark.parametrize("as_rows", [False, True], ids=["functions", "sparse"])
def test_steps_used_up_are_no_success(as_rows: bool) -> None:
    _, dense, rows, x = programs(0)
    g = programs(0)[0]
    problem = BilevelProblem(f, inner=ManyConstraints(g, constraints=rows if as_rows else dense))
    solver = SparseInteriorPoint(max_steps=0) if as_rows else ProximalMultipliers(max_steps=0)
    linear = SparseSaddle() if as_rows else MINRES()
    found = hypergradient(problem, x, torch.zeros(20, dtype=D), estimator=AID(solver, linear), throw=False)
    assert found.reports[0].status is Status.max_steps
    above = many(lambda x, y: (y - x).square().sum(), -torch.eye(2, dtype=D), lambda x: -5 + 0 * x.expand(2), as_rows)
    zero = torch.zeros(2, dtype=D)  # far from y >= 5, which has points
    found = hypergradient(above, zero[:1], zero, estimator=AID(solver, linear), throw=False)
    assert found.reports[0].status is Status.max_steps


@pytest.mark.parametrize("as_rows", [False, True], ids=["functions", "sparse"])
def test_where_nothing_holds_it_is_the_minimizer_of_g(as_rows: bool) -> None:
    L, t = normal(6, 6), 10 * normal(6, seed=1)  # the gradient at y* is rounding of what cancels in it
    Q = L @ L.mT + torch.eye(6, dtype=D)
    wide = many(
        lambda x, y: y @ Q @ y / 2 - x * (t @ y), normal(4, 6, seed=2), lambda x: 1e3 + 0 * x.expand(4), as_rows
    )
    found = hypergradient(wide, torch.ones(1, dtype=D), torch.zeros(6, dtype=D))
    exact = torch.linalg.solve(Q, t)
    assert torch.allclose(found.y, exact, rtol=1e-10, atol=0)
    assert torch.allclose(found.grad, exact.sum().reshape(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("as_rows", [False, True], ids=["functions", "sparse"])
def test_units_do_not_matter(scale: float, as_rows: bool) -> None:
    rows = normal(8, 5)
    side = normal(8, seed=1).abs()
    x, t = normal(5, seed=2), 2 * normal(5, seed=3)
    plain = many(lambda x, y: (y - x * t).square().sum() / 2, rows, lambda x: side * x.square().sum(), as_rows, f)
    units = torch.logspace(-3, 3, 8, dtype=D)
    scaled = many(
        lambda x, y: scale * (y - x * t).square().sum() / 2,
        rows * units.unsqueeze(-1),
        lambda x: units * side * x.square().sum(),
        as_rows,
        f,
    )
    y0 = torch.zeros(5, dtype=D)
    one, other = (hypergradient(each, x, y0) for each in (plain, scaled))
    assert torch.allclose(one.y, other.y, rtol=0, atol=1e-9)
    assert torch.allclose(one.grad, other.grad, rtol=1e-6, atol=1e-7)


def test_single_precision_is_met_to_its_own_digits() -> None:
    g, dense, rows, x = programs(10)
    y0 = torch.zeros(20, dtype=D)
    exact = hypergradient(BilevelProblem(f, g, constraints=dense), x, y0, estimator=KKT(QuadraticProgram()))
    L = normal(20, 20, seed=10)
    Q, linear = (L @ L.mT / 20 + 0.1 * torch.eye(20, dtype=D)).float(), normal(20, seed=11).float()
    single = lambda x, y: y @ Q @ y / 2 + (linear * x) @ y  # noqa: E731
    for inner in (ManyConstraints(single, constraints=dense), ManyConstraints(single, constraints=rows)):
        found = hypergradient(BilevelProblem(f, inner=inner), x.float(), y0.float())
        assert found.grad.dtype == torch.float32
        assert torch.allclose(found.grad.double(), exact.grad, rtol=0, atol=5e-3 * float(exact.grad.norm()))


def test_check_finds_such_problems_sound_and_differences_agree() -> None:
    g, dense, rows, x = programs(20, q=6, k=5, m=1)
    y0 = torch.zeros(6, dtype=D)
    for constraints in (dense, rows):
        assert check(BilevelProblem(f, inner=ManyConstraints(g, constraints=constraints)), x, y0).ok
    problem = BilevelProblem(f, inner=ManyConstraints(g, constraints=dense))
    exact = hypergradient(problem, x, y0)
    found = hypergradient(problem, x, y0, estimator=FiniteDifference(ProximalMultipliers(tol=1e-13)))
    assert torch.allclose(found.grad, exact.grad, rtol=1e-5, atol=1e-6)


def test_what_does_not_apply_is_refused_by_name() -> None:
    g, dense, rows, x = programs(0)
    y0, problem = torch.zeros(20, dtype=D), BilevelProblem(f, inner=ManyConstraints(g, constraints=dense))
    sparsely = BilevelProblem(f, inner=ManyConstraints(g, constraints=rows))

    def refused(problem: BilevelProblem, estimator: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            hypergradient(problem, x, y0, estimator=estimator)

    refused(problem, KKT(InteriorPoint()), "must heed the constraints on y, which are known by products only")
    refused(problem, ITD(Iterate(GradientDescent(0.1), max_steps=3)), "does not apply")
    refused(problem, Penalty(ProximalMultipliers(), 10.0), "does not apply")
    refused(problem, AID(SparseInteriorPoint(), MINRES()), "functions, or dense")
    refused(problem, AID(ProximalMultipliers(), SparseSaddle()), "without them")
    refused(BilevelProblem(f, g, constraints=rows), "kkt", r"is sparse, and has to be dense here.*ManyConstraints")
    tasks = BilevelProblem(
        lambda x, y, d: f(x, y),
        inner=ManyConstraints(lambda x, y, d: g(x, y), constraints=lambda x, d: rows(x)),
        tasks=True,
    )
    with pytest.raises(ValueError, match=r"without tasks"):
        hypergradient(tasks, x, y0, data=torch.zeros(2))
    with pytest.raises(ValueError, match="needs one of them"):
        ManyConstraints(g)
    assert torch.allclose(hypergradient(sparsely, x, y0).y, hypergradient(problem, x, y0).y, rtol=0, atol=1e-10)
