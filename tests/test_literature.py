"""The test problems of the literature: what is known of them holds, by means other than the library."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import KKT, hypergradient
from bilevel.problems import literature
from bilevel.problems.literature.collection import evaluate
from bilevel.problems.literature.starts import bounds, starts
from bilevel.solvers import InteriorPoint

COUNTS = {
    **{"strict_unconstrained": 3, "strict_box": 4, "strict_poly": 22, "strict_nonlinear": 5, "convex_poly": 2},
    **{"convex_nonlinear": 2, "lp": 35, "fractional_lp": 2, "nonconvex": 25, "simple": 9},
}
REFERENCES = [(name, i) for name in literature.names() for i in range(len(literature.references(name)))]
LINEAR = [*literature.names("lp"), *literature.names("fractional_lp")]
CONVEX = [name for name in literature.names() if literature.statement(name).kind.startswith(("strict", "convex"))]
SEVERAL = [*literature.names("nonconvex"), *literature.names("simple")]


def vector(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def best(name: str) -> tuple[Tensor, Tensor]:
    point = literature.statement(name).best
    return vector(point.x), vector(point.y)


def constraints(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Inner inequalities, and equalities as two of them."""
    equal = evaluate(name, "equal", x, y)
    return torch.cat([evaluate(name, "inner", x, y), equal, -equal])


def test_every_class_has_its_problems() -> None:
    assert {kind: len(literature.names(kind)) for kind in literature.KINDS} == COUNTS
    assert len(set(literature.names())) == 109
    assert len(REFERENCES) == 186


@pytest.mark.parametrize("name", literature.names())
def test_the_best_known_point_is_feasible_and_has_the_recorded_values(name: str) -> None:
    said, (x, y) = literature.statement(name).best, best(name)
    assert (len(x), len(y)) == literature.statement(name).sizes
    instance = literature.load(name)
    assert math.isclose(float(instance.problem.f(x, y)), said.f, rel_tol=1e-8, abs_tol=1e-8)
    assert math.isclose(float(instance.problem.g(x, y)), said.g, rel_tol=1e-8, abs_tol=1e-8)
    assert instance.metrics is not None
    found = instance.metrics(x, y)
    assert found["violation of outer constraints"] <= 1e-6
    assert found["violation of inner constraints"] <= 1e-6
    assert instance.minimizer is not None and torch.equal(torch.as_tensor(instance.minimizer), x)


def test_a_worse_and_an_infeasible_point_are_told_from_the_best() -> None:
    instance = literature.load("Bard1988Ex1")
    assert instance.metrics is not None
    assert instance.metrics(vector((5.0,)), vector((2.0,)))["gap to the best known"] == pytest.approx(8 / 17)
    assert instance.metrics(vector((1.0,)), vector((1.0,)))["violation of inner constraints"] == pytest.approx(1)
    assert instance.metrics(vector((-2.0,)), vector((1.0,)))["violation of outer constraints"] == pytest.approx(2)


def arrays(name: str, role: Any, x: Tensor) -> Callable[[Any], Any]:
    return lambda y: evaluate(name, role, x, torch.as_tensor(y)).numpy()


def slopes(name: str, role: Any, x: Tensor) -> Callable[[Any], Any]:
    derivative = torch.func.jacrev(lambda y: evaluate(name, role, x, y))
    return lambda y: derivative(torch.as_tensor(y)).numpy()


def inner_minimum(name: str, x: Tensor, start: Tensor) -> float:
    """By scipy's SLSQP; infinite where it ends at no feasible point."""
    optimize = pytest.importorskip("scipy.optimize")
    rules = [
        {
            "type": kind,
            "fun": lambda y, r=role, s=sign: s * arrays(name, r, x)(y),
            "jac": lambda y, r=role, s=sign: s * slopes(name, r, x)(y),
        }
        for role, kind, sign in (("inner", "ineq", -1), ("equal", "eq", 1))
        if len(evaluate(name, role, x, start))  # type: ignore[arg-type]
    ]
    found = optimize.minimize(
        arrays(name, "g", x), start.numpy(), jac=slopes(name, "g", x), method="SLSQP", constraints=rules,
        options={"ftol": 1e-12},
    )  # fmt: skip
    violation = constraints(name, x, torch.as_tensor(found.x)).clamp_min(0)
    return float(found.fun) if float(violation.sum()) <= 1e-6 else math.inf


@pytest.mark.parametrize("name", LINEAR)
def test_the_best_known_y_solves_the_inner_linear_program(name: str) -> None:
    """A linear-fractional objective has the sign of a linear one, g(y) - g(y*) times its denominator."""
    optimize = pytest.importorskip("scipy.optimize")
    x, y = best(name)
    G = torch.func.jacrev(lambda y: constraints(name, x, y))(y)
    c = torch.func.grad(lambda y: evaluate(name, "g", x, y))(y)
    h = G @ y - constraints(name, x, y)
    found = optimize.linprog(c.numpy(), A_ub=G.numpy(), b_ub=h.numpy(), bounds=(None, None))
    assert found.status == 0
    assert float(c @ y) <= found.fun + 1e-6 * max(1, abs(found.fun))


@pytest.mark.parametrize("name", CONVEX)
def test_no_y_is_better_for_g_than_the_best_known_one(name: str) -> None:
    x, y = best(name)
    known = float(evaluate(name, "g", x, y))
    for start in (y + 0.3, y - 0.7):
        assert known <= inner_minimum(name, x, start) + 1e-6 * max(1, abs(known))


@pytest.mark.parametrize("name", SEVERAL)
def test_no_y_is_globally_better_for_g_than_the_best_known_one(name: str) -> None:
    """By a dense grid for one variable, else by SLSQP from the best of many random points."""
    x, y = best(name)
    known = float(evaluate(name, "g", x, y))
    if len(y) == 1:
        low, high = (float(bound[1]) for bound in bounds(literature.statement(name)))
        grid = torch.linspace(low, high, 20001, dtype=torch.float64)
        each = torch.func.vmap(lambda t: (evaluate(name, "g", x, t[None]), constraints(name, x, t[None])))(grid)
        feasible = (each[1] <= 0).all(1)
        lowest = float(each[0][feasible].min()) if bool(feasible.any()) else math.inf
        assert known <= lowest + 1e-6
        return
    points = y + 2 * torch.randn(2000, len(y), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, rules = torch.func.vmap(lambda t: (evaluate(name, "g", x, t), constraints(name, x, t)))(points)
    order = (value + 1e3 * rules.clamp_min(0).sum(1)).argsort()
    for start in points[order[:3]]:
        assert known <= inner_minimum(name, x, start) + 2e-6 * max(1, abs(known))


def by_the_conditions(name: str, x: Tensor, y: Tensor) -> Tensor:
    """The derivative of Phi by one dense solve of the optimality conditions at y with the active constraints."""
    p, q = len(x), len(y)
    active = evaluate(name, "inner", x, y) > -1e-6
    z = torch.cat([x, y])

    def rows(z: Tensor) -> Tensor:
        return torch.cat([evaluate(name, "inner", z[:p], z[p:])[active], evaluate(name, "equal", z[:p], z[p:])])

    C = torch.func.jacrev(rows)(z)
    g = torch.func.grad(lambda z: evaluate(name, "g", z[:p], z[p:]))(z)
    w = torch.linalg.lstsq(C[:, p:].T, -g[p:]).solution if len(C) else z.new_zeros(0)
    L = torch.func.jacrev(torch.func.jacrev(lambda z: evaluate(name, "g", z[:p], z[p:]) + rows(z) @ w))(z)
    zero = z.new_zeros(len(C), len(C))
    K = torch.cat([torch.cat([L[p:, p:], C[:, p:].T], 1), torch.cat([C[:, p:], zero], 1)])
    moves = torch.linalg.solve(K, -torch.cat([L[p:, :p], C[:, :p]]))[:q]
    f = torch.func.grad(lambda z: evaluate(name, "f", z[:p], z[p:]))(z)
    found: Tensor = f[:p] + moves.T @ f[p:]
    return found


@pytest.mark.parametrize(("name", "i"), REFERENCES)
def test_hypergradients_are_the_reference_ones_and_those_of_the_optimality_conditions(name: str, i: int) -> None:
    known = literature.references(name)[i]
    x, y, h = vector(known.x), vector(known.y), vector(known.grad)
    scale = max(1.0, float(h.norm()))
    assert float((by_the_conditions(name, x, y) - h).norm()) <= 1e-6 * scale
    instance = literature.load(name)
    constrained = literature.statement(name).kind != "strict_unconstrained"
    found = hypergradient(
        instance.problem, x, torch.zeros_like(y), estimator=KKT(InteriorPoint()) if constrained else "implicit"
    )
    assert float((found.grad - h).norm()) <= 1e-6 * scale
    assert float((found.y - y).norm()) <= 1e-6 * max(1.0, float(y.norm()))
    assert found.value == pytest.approx(known.value, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", literature.names())
def test_starts_are_in_the_box_that_the_constraints_state_and_depend_on_the_seed_alone(name: str) -> None:
    said = literature.statement(name)
    lower, upper = bounds(said)
    points = [torch.cat(start) for start in starts(said, 5, seed=1)]
    assert all(bool((lower <= z).all()) and bool((z <= upper).all()) for z in points)
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(points, starts(said, 20, seed=1), strict=False))
    assert not torch.equal(points[0], torch.cat(starts(said, 1, seed=2)[0]))


def test_bounds_are_read_off_constraints_of_one_entry_and_no_other() -> None:
    said = literature.statement("AiyoshiShimizu1984Ex2")
    assert [each.tolist() for each in bounds(said)] == [[0, 0, -10, -10], [50, 50, 20, 20]]
    lower, upper = bounds(literature.statement("DempeDutta2012Ex24"))  # y^2 <= 0 bounds nothing here
    assert not bool(lower.isfinite().any()) and not bool(upper.isfinite().any())


def test_instances_and_statements_travel() -> None:
    instance = literature.load("Bard1988Ex1")
    again = pickle.loads(pickle.dumps(instance))
    x, y = best("Bard1988Ex1")
    assert float(again.problem.f(x, y)) == 17
    said = literature.statement("Bard1988Ex1")
    assert pickle.loads(pickle.dumps(said)) is said


def test_a_mistaken_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="Did you mean 'Bard1988Ex1'"):
        literature.load("Bard1988Ex11")


def test_only_checked_sources_are_told() -> None:
    assert literature.statement("LiuHart1994").source == ""
    assert "Math. Program. 40" in literature.statement("Bard1988Ex1").source
