"""What stochastic algorithms keep: nothing that grows with the data, but for tables, whose size is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from live import Live, without_collector
from torch import Tensor

from bilevel import BilevelProblem, FiniteDifferences, FiniteSum, Split, minimize
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.algorithms import (
    BOME,
    BSA,
    F2SA,
    FSLA,
    MASOBA,
    MEHA,
    MRBO,
    PBGD,
    SABA,
    SOBA,
    SPABA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AmIGO,
    FdeHBO,
    Oracle,
    StocBiO,
)
from bilevel.outer.batches import sources

P, Q, BATCH = 3, 5, 2
X, Y = torch.ones(P, dtype=torch.float64), torch.zeros(Q, dtype=torch.float64)


def g(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    return ((rows @ y).square() / 2 + (rows[:, :P] @ x) * y.sum()).mean() + y.square().sum() / 2


def f(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    return (rows @ y - 1).square().mean() / 2 + x.square().sum() / 2


PROBLEM = BilevelProblem(f, g)


def data(blocks: int) -> Split:
    rows = torch.randn(2, blocks * BATCH, Q, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Split(f=FiniteSum(rows[0], BATCH), g=FiniteSum(rows[1], BATCH))


# besides x and y, in numbers: no more than this
ALGORITHMS: dict[str, tuple[Any, Callable[[int], int]]] = {
    "SOBA": (SOBA(0.01, 0.01), lambda _: Q),
    "MA-SOBA": (MASOBA(0.01, 0.01), lambda _: Q + P),
    # the tables, their means, and the row that is written next
    "SABA": (SABA(0.01, 0.01), lambda blocks: Q + (blocks + 2) * (2 * Q + P) + (blocks + 2) * (Q + P)),
    "SRBA": (SRBA(0.01, 0.01, period=4), lambda _: 3 * (2 * Q + P)),
    "SRBA-FD": (SRBA(0.01, 0.01, period=4, products=FiniteDifferences()), lambda _: 3 * (2 * Q + P)),
    "SPABA": (SPABA(0.01, 0.01, probability=0.3), lambda _: 3 * (2 * Q + P)),
    "FdeHBO": (FdeHBO(0.01, 0.01), lambda _: 3 * (2 * Q + P)),
    "FSLA": (FSLA(0.01, 0.01), lambda _: 2 * Q + 2 * P),
    "AmIGO": (AmIGO(0.01, 0.01, None, 2, 2), lambda _: Q),
    "StocBiO": (StocBiO(0.01, 0.01, None, 2, 2), lambda _: 2 * Q),
    "BSA": (BSA(0.01, 0.01, None, 2, 2), lambda _: Q),
    "TTSA": (TTSA(0.01, 0.01, None, 2), lambda _: Q),
    "MRBO": (MRBO(0.01, 0.01, None, 2), lambda _: 2 * (Q + P)),
    "SUSTAIN": (SUSTAIN(0.01, 0.01, None, 2), lambda _: 2 * (Q + P)),
    "VRBO": (VRBO(0.01, 0.01, None, 2, 2, period=4), lambda _: 2 * (Q + P)),
    "F2SA": (F2SA(0.01, 0.01, order=1), lambda _: Q),
    "PBGD": (PBGD(0.01, 0.01), lambda _: Q),
    "BOME": (BOME(0.01, 0.01), lambda _: Q),
    "MEHA": (MEHA(0.01, 0.01), lambda _: Q),
}


def state(algorithm: Any, blocks: int, steps: int = 2) -> Any:
    like = FlatProblem(PROBLEM, ravel(X)[1], ravel(Y)[1])
    oracle = Oracle(like, sources(data(blocks)), algorithm.draws)
    found = algorithm.init(oracle, X, Y)
    for _ in range(steps):
        found = algorithm.step(oracle, found, algorithm.evaluate(oracle, found))
        oracle = oracle.at(oracle.step + 1)
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for part in fields(value):
            yield from tensors(getattr(value, part.name))


def numbers(algorithm: Any, blocks: int) -> int:
    """How many numbers the state holds besides x and y; views of one storage count once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() // 8 for t in tensors(state(algorithm, blocks))}
    return sum(found.values()) - P - Q


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_state_holds_no_more_numbers_than_its_algorithm_says(name: str) -> None:
    algorithm, most = ALGORITHMS[name]
    assert numbers(algorithm, 4) <= most(4)
    assert numbers(algorithm, 8) <= most(8)


def test_a_table_has_a_row_of_2q_and_p_for_each_block_of_g_and_one_of_q_and_p_for_each_of_f() -> None:
    algorithm = ALGORITHMS["SABA"][0]
    assert numbers(algorithm, 8) - numbers(algorithm, 4) == 4 * (2 * Q + P + Q + P)


def held(algorithm: Any, blocks: int) -> int:
    """Bytes of all storages that a run has made and holds, at its last look, the samples themselves aside."""
    samples = data(blocks)
    seen: list[int] = []
    with without_collector(), Live(peaks=False) as live:
        minimize(
            PROBLEM,
            X,
            Y,
            algorithm=algorithm,
            data=samples,
            max_steps=4,
            evaluate_every=4,
            callback=lambda *_: seen.append(live.bytes),
            throw=False,
        )
    return seen[-1]


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "SABA"])
def test_a_run_without_tables_holds_as_much_whatever_the_number_of_samples(name: str) -> None:
    algorithm = ALGORITHMS[name][0]
    assert held(algorithm, 4) == held(algorithm, 8)


def test_a_run_with_tables_holds_these_in_addition() -> None:
    algorithm = ALGORITHMS["SABA"][0]
    assert held(algorithm, 8) - held(algorithm, 4) == 8 * 4 * (2 * Q + P + Q + P)
