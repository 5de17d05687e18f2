"""Inequalities G y <= h of the inner problem, as they are written: no slack by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, ESJ, KKT, BilevelProblem, Polytope, Status, check, hypergradient
from bilevel.solvers import GMRES, MINRES, ClosedForm, Dense, QuadraticProgram


def optnet(seed: int, q: int, k: int, m: int = 0) -> dict[str, Tensor]:
    """A strictly feasible random program y'Qy / 2 + c'y, G y <= h, A y = b, condition of Q at most 10."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    U = torch.linalg.qr(normal(q, q))[0]
    Q = U @ torch.diag(torch.linspace(1, 10, q, dtype=torch.float64)) @ U.T
    G, A, inside = normal(k, q), normal(m, q), 0.1 * normal(q)
    return {"Q": Q, "c": 3 * normal(q), "G": G, "h": G @ inside + 0.2 + torch.rand(k, generator=generator).double()} | (
        {"A": A, "b": A @ inside} if m else {}
    )


def solved(x: dict[str, Tensor]) -> Tensor:
    """y* by trying which inequalities hold: the first that is feasible with multipliers of the right sign."""
    q, k = len(x["c"]), len(x["h"])
    A, b = x.get("A", torch.zeros(0, q).double()), x.get("b", torch.zeros(0).double())
    for held in itertools.chain.from_iterable(itertools.combinations(range(k), r) for r in range(q - len(b) + 1)):
        rows = torch.cat([A, x["G"][list(held)]])
        n = len(rows)
        K = torch.cat([torch.cat([x["Q"], rows.T], 1), torch.cat([rows, torch.zeros(n, n).double()], 1)])
        both: Tensor = torch.linalg.solve(K, torch.cat([-x["c"], b, x["h"][list(held)]]))
        y, multipliers = both[:q], both[q + len(b) :]
        if bool((x["G"] @ y <= x["h"] + 1e-10).all()) and bool((multipliers >= 0).all()):
            return y
    raise AssertionError("no active set fits")


def problem(target: Tensor) -> BilevelProblem:
    return BilevelProblem(
        lambda x, y: (y - target).square().sum() / 2,
        lambda x, y: y @ x["Q"] @ y / 2 + x["c"] @ y,
        constraints=lambda x: Polytope(A=x.get("A"), b=x.get("b", 0.0), G=x["G"], h=x["h"]),
    )


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 6), st.integers(0, 1))
def test_the_hypergradient_in_every_coefficient_is_that_of_the_active_set(seed: int, q: int, k: int, m: int) -> None:
    """As autograd has it through the equations of the inequalities that hold."""
    x = {name: value.requires_grad_() for name, value in optnet(seed, q, k, m).items()}
    target = torch.arange(float(q)).double()
    y = solved(x)
    truth = torch.autograd.grad((y - target).square().sum() / 2, list(x.values()), materialize_grads=True)
    plain = {name: value.detach() for name, value in x.items()}
    found = hypergradient(problem(target), plain, torch.zeros(q).double(), throw=False)
    if found.status is Status.weakly_active:
        return
    assert found.status is Status.successful
    torch.testing.assert_close(found.y, y.detach(), rtol=1e-9, atol=1e-9)
    for name, h in zip(x, truth, strict=True):
        seen = found.grad[name]
        if name == "Q":  # the matrix of a quadratic form acts by its symmetric part
            seen, h = (seen + seen.T) / 2, (h + h.T) / 2
        torch.testing.assert_close(seen, h, rtol=1e-7, atol=1e-8)


def test_the_formulas_of_optnet_hold() -> None:
    """In h and G -d_l and d_l y' + lambda d_y', where the inequalities hold: Amos and Kolter, ICML 2017, (8)."""
    x = optnet(3, 4, 5)
    target = torch.ones(4).double()
    found = hypergradient(problem(target), x, torch.zeros(4).double())
    held = (x["G"] @ found.y - x["h"]).abs() < 1e-9
    assert 0 < int(held.sum()) < 5
    G = x["G"][held]
    n = len(G)
    K = torch.cat([torch.cat([x["Q"], G.T], 1), torch.cat([G, torch.zeros(n, n).double()], 1)])
    multipliers = torch.linalg.solve(K, torch.cat([-x["c"], x["h"][held]]))[4:]
    d = torch.linalg.solve(K, torch.cat([-(found.y - target), torch.zeros(n).double()]))
    d_y, d_l = d[:4], d[4:]
    assert bool((multipliers > 0).all())
    torch.testing.assert_close(found.grad["c"], d_y)
    torch.testing.assert_close(found.grad["h"][held], -d_l)
    torch.testing.assert_close(found.grad["G"][held], torch.outer(d_l, found.y) + torch.outer(multipliers, d_y))
    assert float(found.grad["h"][~held].abs().max()) < 1e-20


@pytest.mark.parametrize("linear", [MINRES(rtol=1e-12), GMRES(rtol=1e-12), Dense()], ids=lambda s: type(s).__name__)
def test_other_linear_solvers_give_the_same(linear: Any) -> None:
    x, y0 = optnet(5, 4, 4, 1), torch.zeros(4).double()
    exact = hypergradient(problem(y0 + 1), x, y0, estimator=KKT(QuadraticProgram())).grad
    found = hypergradient(problem(y0 + 1), x, y0, estimator=AID(QuadraticProgram(), linear)).grad
    for name in x:
        torch.testing.assert_close(found[name], exact[name], rtol=1e-7, atol=1e-8)


def test_a_bound_may_be_written_as_an_inequality() -> None:
    x, eye = torch.tensor([2.0, -1.0, 0.3]).double(), torch.eye(3).double()

    def nearest(**limits: Any) -> Any:
        near = BilevelProblem(
            lambda x, y: (y * torch.tensor([1.0, 2.0, 3.0])).sum(),
            lambda x, y: (y - x).square().sum(),
            constraints=lambda x: Polytope(**limits),
        )
        return hypergradient(near, x, torch.zeros(3).double())

    one, other = nearest(upper=1.0), nearest(G=eye, h=1.0)
    torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(one.y, other.y)
    scaled = nearest(G=1e6 * eye, h=1e6)  # the unit of a row says nothing
    torch.testing.assert_close(one.grad, scaled.grad)
    open_ended = nearest(G=eye, h=torch.tensor([1.0, torch.inf, torch.inf]))
    torch.testing.assert_close(one.grad, open_ended.grad)


def test_a_linear_program_at_a_vertex_moves_with_its_constraints() -> None:
    """min -y_1 - y_2, y_1 + 2 y_2 <= x_1, 3 y_1 + y_2 <= x_2, y >= 0: the vertex of both, ((2, -1), (-1, 3)) x / 5."""
    linear = BilevelProblem(
        lambda x, y: y.square().sum(),
        lambda x, y: -y.sum(),
        constraints=lambda x: Polytope(G=torch.tensor([[1.0, 2.0], [3.0, 1.0]]), h=x, lower=0.0),
    )
    x = torch.tensor([4.0, 6.0]).double()
    found = hypergradient(linear, x, torch.zeros(2).double())
    T = torch.tensor([[-1.0, 2.0], [3.0, -1.0]]).double() / 5
    torch.testing.assert_close(found.y, T @ x)
    torch.testing.assert_close(found.grad, 2 * T.T @ (T @ x))


def test_tasks_have_inequalities_of_their_own_and_are_what_they_are_alone() -> None:
    data = [optnet(seed, 3, 4) for seed in range(6)]
    batch = {name: torch.stack([each[name] for each in data]) for name in data[0]}
    tasks = BilevelProblem(
        lambda x, y, t: (y - x).square().sum() / 2,
        lambda x, y, t: y @ t["Q"] @ y / 2 + (t["c"] + x) @ y,
        constraints=lambda x, t: Polytope(G=t["G"], h=t["h"]),
        tasks=True,
    )
    x, y0 = torch.ones(3).double(), torch.zeros(3).double()
    together = hypergradient(tasks, x, y0, data=batch)
    alone = [
        hypergradient(tasks, x, y0, data={name: value[k : k + 1] for name, value in batch.items()}) for k in range(6)
    ]
    torch.testing.assert_close(together.grad, torch.stack([each.grad for each in alone]).mean(0))
    torch.testing.assert_close(together.y, torch.cat([each.y for each in alone]))


def test_zeroth_order_and_closed_forms_heed_inequalities() -> None:
    x, y0 = optnet(3, 4, 5), torch.zeros(4).double()
    exact = hypergradient(problem(y0 + 1), x, y0)
    by_formula = hypergradient(problem(y0 + 1), x, y0, estimator=KKT(ClosedForm(solved)))
    torch.testing.assert_close(by_formula.grad["h"], exact.grad["h"], rtol=1e-7, atol=1e-8)
    wrong = hypergradient(problem(y0 + 1), x, y0, estimator=KKT(ClosedForm(lambda x: solved(x) + 0.5)), throw=False)
    assert wrong.status is Status.not_a_solution
    directions = hypergradient(
        problem(y0 + 1),
        x,
        y0,
        estimator=ESJ(QuadraticProgram(), 45, radius=1e-6, distribution="orthonormal"),
        throw=False,
    )
    assert float((directions.grad["c"] - exact.grad["c"]).norm()) < 1e-3 * float(exact.grad["c"].norm())


def test_contradictions_kinks_and_wrong_shapes_are_told() -> None:
    y0, rows = torch.zeros(2).double(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()

    def nearest(h: Any, G: Tensor = rows) -> Any:
        near = BilevelProblem(
            lambda x, y: y.sum(), lambda x, y: (y - x).square().sum(), constraints=lambda x: Polytope(G=G, h=h(x))
        )
        return hypergradient(near, torch.ones(2).double(), y0, throw=False)

    assert nearest(lambda x: torch.tensor([-1.0, -1.0])).status is Status.infeasible
    assert nearest(lambda x: torch.stack([x[1], x[1]])).status is Status.weakly_active  # y* = x lies on y_1 <= x_2
    assert nearest(lambda x: torch.stack([x[1] - 0.5, x[1]])).status is Status.successful
    with pytest.raises(ValueError, match=r"`Polytope\(G=...\)` must have 2 columns"):
        nearest(lambda x: 1.0, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"Polytope\(G=...\)"):
        Polytope(G=torch.ones(3))


def test_check_sees_x_in_inequalities() -> None:
    moving = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: (y - 3).square().sum(),
        constraints=lambda x: Polytope(G=torch.ones(1, 2), h=x.sum()),
    )
    x, y0 = torch.tensor([1.0]).double(), torch.zeros(2).double()
    torch.testing.assert_close(hypergradient(moving, x, y0).grad, torch.ones(1).double())
    assert "through the inner problem" in str(check(moving, x, y0))
