"""Single loops on finite sums: unbiased, exact in the limits where they must be, counted, resumed bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import BilevelProblem, FiniteDifferences, FiniteSum, Split, Status, minimize
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.algorithms import (
    MASOBA,
    SABA,
    SOBA,
    SPABA,
    SRBA,
    AbstractAlgorithm,
    Coupled,
    FdeHBO,
    Horizon,
    MovingAverage,
    Oracle,
    Plain,
    Power,
    Saga,
    SingleLoop,
    Storm,
)
from bilevel.algorithms.engine.recursive import Page, Past
from bilevel.algorithms.engine.saga import Table, Tables
from bilevel.extending import Joint
from bilevel.outer.batches import sources
from bilevel.solvers import Adam

P, Q = 3, 5


def samples(n: int, seed: int) -> tuple[Tensor, ...]:
    """Of sums of rank-one quadratics: u, w, c, e, a, b of g_i = (u y)^2/2 + (w x)^2/2 + (c x)(e y) + a y + b x."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (Q, P, P, Q, Q, P)
    return tuple(torch.randn(n, size, generator=generator, dtype=torch.float64) * 0.7 for size in sizes)


def objective(x: Tensor, y: Tensor, data: tuple[Tensor, ...]) -> Tensor:
    u, w, c, e, a, b = data
    terms: Tensor = (u @ y).square() / 2 + (w @ x).square() / 2 + 0.3 * (c @ x) * (e @ y) + a @ y + b @ x
    found: Tensor = terms.mean() + (y.square().sum() + x.square().sum()) / 2
    return found


PROBLEM = BilevelProblem(objective, objective)
OF_G, OF_F = samples(19, 0), samples(14, 1)  # 5 blocks of 4, the last of 3; 4 blocks of 4, the last of 2
X, Y = torch.full((P,), 0.5, dtype=torch.float64), torch.zeros(Q, dtype=torch.float64)


def split(batch_size: int = 4, order: Any = "shuffle", seed: int = 0) -> Split:
    return Split(g=FiniteSum(OF_G, batch_size, order, seed), f=FiniteSum(OF_F, batch_size, order, seed))


def everywhere(x: Tensor, y: Tensor, v: Tensor) -> Joint:
    """(D_x, D_y, D_v) on all samples, from second derivatives in closed form."""
    whole = [(t.T @ t / len(t), r.T @ s * 0.3 / len(t), w.T @ w / len(t)) for t, w, r, s, _, _ in (OF_G, OF_F)]
    (H, C, _), (Hf, Cf, Wf) = whole
    a, af, bf = OF_G[4].mean(0), OF_F[4].mean(0), OF_F[5].mean(0)
    gy, hv = H @ y + y + C.T @ x + a, H @ v + v
    fy, fx = Hf @ y + y + Cf.T @ x + af, Wf @ x + x + Cf @ y + bf
    return Joint(fx - C @ v, gy, hv - fy)


def solution() -> Tensor:
    """The stationary x, by linear algebra."""

    def h(x: Tensor) -> Tensor:
        y0, v0 = torch.zeros(Q, dtype=torch.float64), torch.zeros(Q, dtype=torch.float64)
        H = torch.stack([everywhere(x, row, v0).y - everywhere(x, y0, v0).y for row in torch.eye(Q).double()])
        y = torch.linalg.solve(H, -everywhere(x, y0, v0).y)
        v = torch.linalg.solve(H, -everywhere(x, y, v0).v)  # type: ignore[operator]
        return everywhere(x, y, v).x

    zero = torch.zeros(P, dtype=torch.float64)
    slopes = torch.stack([h(row) - h(zero) for row in torch.eye(P).double()], dim=1)
    found: Tensor = torch.linalg.solve(slopes, -h(zero))
    return found


def oracle(data: Any, step: int = 0) -> Oracle:
    return Oracle(FlatProblem(PROBLEM, ravel(X, "x")[1], ravel(Y, "y")[1]), sources(data), step=step)


def point(seed: int) -> Joint:
    generator = torch.Generator().manual_seed(seed)
    x, y, v = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (P, Q, Q))
    return Joint(x, y, v)


def close(one: Any, other: Any, tolerance: float = 1e-11) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def pairs() -> list[Oracle]:
    """Every block of g with every block of f, each once: on a grid of steps the two orders visit all pairs."""
    found, seen = [], set()
    for step in itertools.count():
        each = oracle(split(order="iid"), step)
        key = (each.block("g").number, each.block("f").number)
        if key not in seen:
            seen.add(key)
            found.append(each)
        if len(seen) == 5 * 4:
            return found
    raise AssertionError


def mean(directions: list[Joint]) -> Joint:
    parts = zip(*directions, strict=True)
    return Joint(*(torch.stack(list(part)).mean(0) for part in parts))


def test_directions_of_all_pairs_of_blocks_have_the_mean_of_everything_the_ragged_ones_too() -> None:
    at = point(0)
    close(mean([Coupled().on_batches(each, at)[0] for each in pairs()]), everywhere(*at))  # type: ignore[arg-type]
    close(Coupled().on_everything(oracle(split()), at)[0], everywhere(*at))  # type: ignore[arg-type]
    close(Coupled(FiniteDifferences()).on_everything(oracle(split()), at)[0], everywhere(*at), 1e-8)  # type: ignore[arg-type]


def test_tables_of_any_content_leave_the_mean_alone() -> None:
    at, saga = point(1), Saga()
    zero = saga.init(oracle(split()), Coupled(), at)
    generator = torch.Generator().manual_seed(2)

    def filled(table: Table, data: FiniteSum) -> Table:
        rows = torch.randn(table.rows.shape, generator=generator, dtype=torch.float64)
        weights = torch.tensor([data.block_number(k).weight for k in range(data.blocks)], dtype=torch.float64)
        return Table(rows, weights @ rows, -1, table.row)

    tables = Tables(filled(zero.g, split().g), filled(zero.f, split().f))
    close(mean([saga.reduce(each, Coupled(), at, tables).joint for each in pairs()]), everywhere(*at))  # type: ignore[arg-type]


def test_after_one_pass_without_steps_the_tables_hold_everything() -> None:
    at, saga = point(3), Saga()
    memory = saga.init(oracle(split()), Coupled(), at)
    for step in range(5):
        memory = saga.reduce(oracle(split(), step), Coupled(), at, memory).memory
    close(saga.reduce(oracle(split(), 5), Coupled(), at, memory).joint, everywhere(*at))  # type: ignore[arg-type]


def run(algorithm: AbstractAlgorithm[Any], data: Any, steps: int, **given: Any) -> Any:
    return minimize(PROBLEM, X, Y, algorithm=algorithm, data=data, max_steps=steps, **given)


COLLAPSED = {
    "saba": SABA(0.2, 0.1),
    "srba": SRBA(0.2, 0.1, period=3),
    "srba by default": SRBA(0.2, 0.1),
    "spaba": SPABA(0.2, 0.1, probability=0.4),
    "ma-soba": MASOBA(0.2, 0.1, theta=1.0),
    "saga by hand": SingleLoop(0.2, 0.1, reduction=Saga()),
    "no average": SingleLoop(0.2, 0.1, reduction=MovingAverage(lambda step: 1.0)),
    "no memory": SingleLoop(0.2, 0.1, reduction=Storm(lambda step: 1.0)),
    "any memory": SingleLoop(0.2, 0.1, reduction=Storm(Power(0.5))),
}


@pytest.mark.parametrize("name", COLLAPSED)
def test_on_all_the_data_every_reduction_is_soba(name: str) -> None:
    expected = run(SOBA(0.2, 0.1), split(order="full"), 12)
    for data in (split(order="full"), split(batch_size=100)):
        found = run(COLLAPSED[name], data, 12)
        close((found.x, found.y), (expected.x, expected.y))


def test_soba_by_differences_is_soba_on_a_quadratic() -> None:
    expected = run(SOBA(0.2, 0.1), split(order="full"), 12)
    for algorithm in (SOBA(0.2, 0.1, products=FiniteDifferences()), FdeHBO(0.2, 0.1, schedule=None)):
        found = run(algorithm, split(order="full"), 12)
        close((found.x, found.y), (expected.x, expected.y), 1e-8)


def test_soba_on_all_the_data_is_joint_descent_and_not_in_turns() -> None:
    at = Joint(X, Y, torch.zeros_like(Y))
    for _ in range(7):
        d = everywhere(at.x, at.y, at.v)  # type: ignore[arg-type]
        at = Joint(at.x - 0.1 * d.x, at.y - 0.2 * d.y, at.v - 0.2 * d.v)  # type: ignore[operator,arg-type]
    found = run(SOBA(0.2, 0.1), split(order="full"), 7)
    close((found.x, found.y), (at.x, at.y))


@pytest.mark.parametrize(
    "algorithm", [SABA(0.15, 0.1), SRBA(0.15, 0.1), SPABA(0.15, 0.1), SRBA(0.15, 0.1, products=FiniteDifferences())]
)
def test_constant_steps_with_reduced_variance_converge_to_the_solution(algorithm: AbstractAlgorithm[Any]) -> None:
    found = run(algorithm, split(), 400)
    differences = isinstance(getattr(algorithm, "products", None), FiniteDifferences)
    torch.testing.assert_close(found.x, solution(), rtol=0, atol=1e-8 if differences else 1e-11)
    assert float((run(SOBA(0.15, 0.1), split(), 400).x - solution()).norm()) > 1e-4  # constant steps alone do not


def test_visiting_every_block_once_an_epoch_beats_independent_draws() -> None:
    soba = SOBA(0.2, 0.2, schedule=Power(0.5))
    errors = {
        order: sorted(float((run(soba, split(1, order, seed), 300).x - solution()).norm()) for seed in range(3))[1]
        for order in ("shuffle", "iid")
    }
    assert errors["shuffle"] < errors["iid"] / 2


PER_SAMPLE = {
    "soba": (SOBA(0.1, 0.1), 3, 1),
    "saba": (SABA(0.1, 0.1), 3, 1),
    "ma-soba": (MASOBA(0.1, 0.1), 3, 1),
    "differences": (SOBA(0.1, 0.1, products=FiniteDifferences()), 5, 1),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_calls_are_counted_by_sample(name: str) -> None:
    algorithm, of_g, of_f = PER_SAMPLE[name]
    steps = 8
    visited = [oracle(split(), step) for step in range(steps + 1)]  # the last is an evaluation
    expected = sum(of_g * each.block("g").samples + of_f * each.block("f").samples for each in visited)
    expected += 2 * (of_g * len(OF_G[0]) + of_f * len(OF_F[0]))  # looks at all the data, at the start and at the end
    assert run(algorithm, split(), steps).stats.sample_calls == expected


def test_recursive_differences_cost_two_evaluations_and_now_and_then_all() -> None:
    expected = 2 * (3 * len(OF_G[0]) + len(OF_F[0]))  # looks
    for step in range(9):
        each = oracle(split(), step)
        full = 3 * len(OF_G[0]) + len(OF_F[0])
        expected += full if step % 4 == 0 else 2 * (3 * each.block("g").samples + each.block("f").samples)
    assert run(SRBA(0.1, 0.1, period=4), split(), 8).stats.sample_calls == expected


@pytest.mark.parametrize("probability", [0.15, 0.7])
def test_a_coin_asks_for_all_the_data_as_often_as_its_probability_says(probability: float) -> None:
    """Within four standard deviations; elsewhere the direction is a difference added to that of the step before."""
    at, before, steps = point(1), point(2), 300
    whole, past = Coupled().on_everything(oracle(split()), at)[0], Past.of(before, point(3))
    found = [Page(probability).reduce(oracle(split(), step), Coupled(), at, past).joint for step in range(steps)]
    share = sum(torch.equal(each.x, whole.x) for each in found) / steps
    assert abs(share - probability) < 4 * (probability * (1 - probability) / steps) ** 0.5


RESUMED = {
    "soba": SOBA(0.1, 0.1, schedule=Power(0.5)),
    "saba": SABA(0.1, 0.1),
    "srba": SRBA(0.1, 0.1, period=3),
    "spaba": SPABA(0.1, 0.1, probability=0.3),
    "ma-soba with Adam": MASOBA(0.1, Adam(0.05)),
    "fdehbo": FdeHBO(0.1, 0.1),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = run(RESUMED[name], split(), 11)
    for stop in (1, 4, 7):
        file = tmp_path / f"{stop}.pt"
        run(RESUMED[name], split(), stop, checkpoint=file)
        found = run(RESUMED[name], split(), 11, checkpoint=file, resume=True)
        assert torch.equal(found.x, whole.x) and torch.equal(found.y, whole.y)
        assert found.stats == whole.stats
        assert [record.value for record in found.history] == [record.value for record in whole.history]


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_visits_every_block_once(n: int, batch_size: int, seed: int, epoch: int) -> None:
    data = FiniteSum(torch.arange(float(n)), batch_size, seed=seed)
    visits = [data.block(epoch * data.blocks + t, 0) for t in range(data.blocks)]
    assert torch.cat([block.data for block in visits]).sort().values.tolist() == list(range(n))
    assert sum(block.weight for block in visits) == pytest.approx(1)
    assert [block.number for block in visits] == [
        FiniteSum(torch.arange(float(n)), batch_size, seed=seed).block(epoch * data.blocks + t, 0).number
        for t in range(data.blocks)
    ]


def test_f_and_g_are_drawn_independently_whatever_their_seeds() -> None:
    one = FiniteSum(torch.arange(64.0), 1)
    for data in (Split(f=one, g=one), one):
        found = sources(data)
        assert isinstance(found, Split)
        f, g = ([side.block(t, 0).number for t in range(64)] for side in (found.f, found.g))
        assert f != g and sum(a == b for a, b in zip(f, g, strict=True)) < 10


def test_tables_need_blocks() -> None:
    loader = [tuple(part[:4] for part in OF_G), tuple(part[4:8] for part in OF_G)]
    with pytest.raises(ValueError, match=r"table of what every block.*FiniteSum"):
        run(SABA(0.1, 0.1), loader, 3)
    assert run(MASOBA(0.1, 0.1), loader, 3).status is Status.steps_used_up


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (((torch.ones(3), torch.ones(4)), 2), "share a leading axis"),
        ((torch.ones(()), 2), "share a leading axis"),
        ((torch.ones(0, 2), 2), "share a leading axis"),
        (([], 2), "share a leading axis"),
        ((torch.ones(3), 0), "at least 1"),
        ((torch.ones(3), 2, "sorted"), "shuffle, iid, full"),
    ],
)
def test_sums_that_are_none_are_refused(arguments: tuple[Any, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FiniteSum(*arguments)


def test_steps_that_are_none_are_refused_by_the_name_of_the_algorithm() -> None:
    with pytest.raises(ValueError, match=r"SABA\(inner_step="):
        SABA(0.0, 0.1)
    with pytest.raises(ValueError, match=r"SRBA\(inner_step=<an optimizer>\)` needs `linear_step="):
        SRBA(Adam(0.1), 0.1)
    with pytest.raises(ValueError, match="probability"):
        SPABA(0.1, 0.1, probability=0.0)
    with pytest.raises(ValueError, match="theta"):
        MASOBA(0.1, 0.1, theta=0.0)


def test_y_and_x_are_stepped_by_optimizers() -> None:
    found = run(SingleLoop(Adam(0.1), Adam(0.05), 0.2, reduction=Plain()), split(order="full"), 800)
    torch.testing.assert_close(found.x, solution(), rtol=0, atol=1e-3)


def test_a_callable_of_two_arguments_is_told_the_role() -> None:
    asked: list[tuple[str, int]] = []

    def batch(role: str, number: int) -> Any:
        asked.append((role, number))
        return tuple(part[number % 3 :: 3] for part in (OF_F if role == "f" else OF_G))

    found = run(SOBA(0.1, 0.1), batch, 4)
    assert {("f", 3), ("g", 3), ("f", 4), ("g", 4)} <= set(asked)
    one = Split(f=lambda number: batch("f", number), g=lambda number: batch("g", number))
    assert torch.equal(found.x, run(SOBA(0.1, 0.1), one, 4).x)
    alike = run(SOBA(0.1, 0.1), lambda number, other=1: batch("f", number), 4)
    assert torch.equal(alike.y, run(SOBA(0.1, 0.1), Split(f=one.f, g=one.f), 4).y)


def test_steps_may_depend_on_how_many_there_are_to_be() -> None:
    falling = run(SOBA(0.2, 0.1, schedule=Horizon(16, 0.5), outer_schedule=Horizon(16, 0.25)), split(), 16)
    constant = run(SOBA(0.2 / 4, 0.1 / 2), split(), 16)
    close((falling.x, falling.y), (constant.x, constant.y))


def test_blocks_of_tasks_are_refused_and_all_tasks_are_not() -> None:
    """Each task has a y of its own, which the blocks of other tasks would be taken for."""
    tasks = BilevelProblem(lambda x, y, t: (y - t).square().sum(), lambda x, y, t: (y - x).square().sum(), tasks=True)
    one, data = torch.zeros(2).double(), torch.arange(12.0).double().reshape(6, 2)
    for blocks in (FiniteSum(data, 2), Split(f=FiniteSum(data, 3), g=data)):
        with pytest.raises(ValueError, match=r"other tasks at every step: blocks of [23] of 6"):
            minimize(tasks, one, one, algorithm=SOBA(0.1, 0.1), data=blocks, max_steps=2)
    for whole in (data, FiniteSum(data, 6), FiniteSum(data, 2, order="full")):
        found = minimize(tasks, one, one, algorithm=SOBA(0.2, 0.05), data=whole, max_steps=400)
        torch.testing.assert_close(found.x, data.mean(0), rtol=1e-6, atol=1e-6)
        if isinstance(whole, FiniteSum):
            assert found.stats.sample_calls == 401 * 6 * 4  # three of g and one of f, of each task
    for estimator in ("aid-cg", "itd"):
        found = minimize(tasks, one, one, estimator=estimator, data=[data[:3], data[3:]], max_steps=2)
        assert found.y.shape == (3, 2)


def test_what_asks_for_all_the_data_says_who_it_is() -> None:
    loader = [tuple(part[:4] for part in OF_G)]
    with pytest.raises(ValueError, match="`SRBA` does not apply: it asks for the whole data"):
        run(SRBA(0.1, 0.1), loader, 2)
