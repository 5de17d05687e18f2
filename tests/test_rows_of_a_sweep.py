"""Every row of a sweep is the run that it would be alone: state, value and calls, whatever the rows differ in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from test_single_loops import OF_F, OF_G, PROBLEM, X, Y, run, split
from test_sweep import ALGORITHMS
from torch import Tensor

from bilevel import BilevelProblem, FiniteSum, Solution, Split, minimize
from bilevel._flat import FlatProblem
from bilevel._numerics.uneven import Uneven
from bilevel._tree import ravel
from bilevel.algorithms import (
    ESJS,
    MEHA,
    SAMA,
    SOBA,
    SPABA,
    SRBA,
    Neumann,
    Page,
    RandomizedNeumann,
    ScaleBiO,
    SingleLoop,
)
from bilevel.algorithms.engine.rows import row_of
from bilevel.algorithms.engine.saga import Table
from bilevel.algorithms.oracle import Oracle
from bilevel.extending import AbstractAlgorithm, AbstractOptimizer, AbstractPreset
from bilevel.outer import sweep
from bilevel.outer.batches import sources
from bilevel.solvers import Adam, Clipped, GradientDescent, HeavyBall, Scheduled, TorchOptim

SEEDS = [0, 1, 5]


@pytest.fixture(autouse=True)
def nothing_is_solved(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Steps alone are counted: y is not solved anew for Phi."""
    if "best" not in request.node.name:
        monkeypatch.setattr(sweep, "_phi", lambda oracle, algorithm, state: algorithm.point(state)[0].sum(-1))


def leaves(state: Any) -> Iterator[Any]:
    """Every number of a state, with what a table is about to write written."""
    if isinstance(state, Table):
        state.write()
    if isinstance(state, dict):
        state = tuple(state.values())
    if is_dataclass(state):
        state = tuple(getattr(state, field.name) for field in fields(state))
    if isinstance(state, tuple | list):
        for part in state:
            yield from leaves(part)
    elif isinstance(state, Tensor | int | float):
        yield torch.as_tensor(state)


def batches(algorithm: Any, swept: dict[str, Any], data: Any) -> tuple[list[Any], list[dict[str, Any]], Any]:
    found = sweep.combinations(algorithm, swept)
    groups = sweep._alike(found, range(len(found)), (*sweep.STEPS, "ratio", "seed"))
    each = [one for group in groups for one in sweep._batches(algorithm, found, group, sources(data), X)]
    return each, found, sources(data)


def after(batch: Any, steps: int = 7) -> tuple[dict[int, Any], int]:
    like = FlatProblem(PROBLEM, ravel(X, "x")[1], ravel(Y, "y")[1])
    rows = batch.run(Oracle(like, batch.data, batch.draws), X, Y, steps)
    return rows, like.tally.stats().sample_calls


def demand_each_alone(algorithm: Any, swept: dict[str, Any], data: Any, tolerance: float = 1e-12) -> None:
    (batch,), found, given = batches(algorithm, swept, data)
    assert batch.rows == len(found)
    rows, calls = after(batch)
    alone = 0
    for k, settings in enumerate(found):
        one = sweep.configured(algorithm, settings)
        single, own = after(sweep._Batch(one, sweep.reordered(given, settings), [k], 0))
        alone += own
        pairs = zip(leaves(rows[k].state()), leaves(single[k].state()), strict=True)
        for left, right in pairs:
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    assert calls == alone


MORE = {
    "sama": SAMA(0.1, 0.1, inner_steps=2),
    "sama by adam": SAMA(Adam(0.05), 0.1, inner_steps=2),
    "soba by adam": SOBA(GradientDescent(0.1), Adam(0.02), linear_step=0.1),
    "saba by momentum": replace(ALGORITHMS["saba"], inner_step=0.1, outer_step=HeavyBall(0.05, 0.8)),
    "amigo by clipped steps": replace(
        ALGORITHMS["amigo"],
        inner_step=Clipped(HeavyBall(0.05, 0.5), max_norm=0.3),
        outer_step=Scheduled(Adam(0.02), lambda k: 1 / (1 + k)),
        linear_step=0.1,
    ),
    "stocbio by torch": replace(
        ALGORITHMS["stocbio"],
        inner_step=TorchOptim(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)),
        outer_step=TorchOptim(lambda p: torch.optim.AdamW(p, lr=0.02)),
        linear_step=0.1,
    ),
    "f2sa by adam": replace(ALGORITHMS["f2sa"], inner_step=Adam(0.02), outer_step=Adam(0.01)),
    "bome by adam": replace(ALGORITHMS["bome"], inner_step=Adam(0.02), outer_step=Adam(0.01)),
    "meha by adam": MEHA(Adam(0.02), Adam(0.01), weight=5.0),
    "scalebio": ScaleBiO(0.02, 0.01, weight_decay=0.1),
    "esj-s by adam": ESJS(Adam(0.02), Adam(0.01), inner_steps=3, directions=2, radius=0.1, distribution="gaussian"),
    "vrbo by adam": replace(ALGORITHMS["vrbo"], inner_step=Adam(0.02), outer_step=Adam(0.01), linear_step=0.1),
}


@pytest.mark.parametrize("name", [*ALGORITHMS, *MORE])
def test_each_row_is_the_run_alone_though_seeds_and_sizes_of_blocks_differ(name: str) -> None:
    given: Any = {**ALGORITHMS, **MORE}[name]
    swept: dict[str, Any] = {"seed": SEEDS}
    if name in ALGORITHMS:
        given = replace(given, inner_step=0.1, outer_step=0.05)
    loose = name in ("fdehbo", "differences") or name.startswith("sama")
    demand_each_alone(given, swept, split(), 1e-7 if loose else 1e-12)


@pytest.mark.parametrize("name", ["soba", "saba", "spaba", "bsa"])
def test_so_they_are_where_data_are_drawn_independently(name: str) -> None:
    given: Any = replace(ALGORITHMS[name], inner_step=0.1)
    demand_each_alone(given, {"seed": SEEDS, "ratio": [1.0, 4.0]}, split(order="iid"))


def test_coins_of_a_reduction_and_of_a_direction_fall_for_each_row_alone() -> None:
    """Rows that see all the data keep the steps of their own series."""
    loop = SingleLoop(0.1, 0.05, direction=RandomizedNeumann(3, 0.1, (3, 4, 9)), reduction=Page(0.5, (3, 4, 9)))
    steps = torch.tensor([0.05, 0.1, 0.2]).double()
    rows: Any = replace(loop, direction=replace(loop.direction, step=steps))  # type: ignore[type-var]
    data = sources(split())
    state, _ = _states(rows, data, X.expand(3, -1).clone(), Y.expand(3, -1).clone())
    for k, seed in enumerate((3, 4, 9)):
        one = replace(loop, direction=RandomizedNeumann(3, float(steps[k]), seed), reduction=Page(0.5, seed))
        alone, _ = _states(one, data, X, Y)
        for left, right in zip(leaves(row_of(state, k)), leaves(alone), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def _states(algorithm: Any, data: Any, x: Tensor, y: Tensor, steps: int = 7) -> tuple[Any, int]:
    like = FlatProblem(PROBLEM, ravel(X, "x")[1], ravel(Y, "y")[1])
    oracle = Oracle(like, data, algorithm.draws)
    state = algorithm.init(oracle, x, y)
    for k in range(steps):
        oracle = oracle.at(k)
        state = algorithm.step(oracle, state, algorithm.evaluate(oracle, state))
    return state, like.tally.stats().sample_calls


def test_optimizers_are_swept_beside_each_other_and_numbers_by_themselves() -> None:
    soba = SOBA(0.1, 0.1)
    each, _, _ = batches(soba, {"outer_step": [Adam(0.01), 0.1, Adam(0.1), 0.05]}, split())
    assert [(batch.members, batch.rows) for batch in each] == [([0, 2], 2), ([1, 3], 2)]
    demand_each_alone(soba, {"outer_step": [Adam(0.01), Clipped(HeavyBall(0.1, 0.5), max_value=0.1)]}, split())


@final
@dataclass(frozen=True)
class WholeTensor(AbstractOptimizer):
    """A step by the norm of everything it is given, and a state of another shape than the point's."""

    def init(self, point: Tensor) -> dict[str, Any]:
        return {"norms": torch.zeros(2, dtype=point.dtype)}

    def step(self, grad: Tensor, point: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        norms = torch.stack([state["norms"][1], grad.norm()])
        return point - 0.01 * grad / norms.sum(), {"norms": norms}

    @property
    def needs_curvature(self) -> bool:
        return False

    def tuned(self, largest_curvature: Tensor) -> WholeTensor:
        return self


def test_an_optimizer_that_looks_at_all_it_is_given_sees_its_row() -> None:
    demand_each_alone(SOBA(WholeTensor(), WholeTensor(), 0.1), {"seed": [0, 1]}, split())


@final
@dataclass(frozen=True)
class Coins(AbstractAlgorithm[Any]):
    """An algorithm of one's own with coins, which says nothing of several seeds."""

    inner_step: Any
    outer_step: Any
    seed: int = 0

    @property
    def loop(self) -> SingleLoop:
        return SingleLoop(self.inner_step, self.outer_step, reduction=Page(0.5, self.seed))

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Any:
        return self.loop.init(oracle, x, y)

    def evaluate(self, oracle: Oracle, state: Any) -> Any:
        return self.loop.evaluate(oracle, state)

    def step(self, oracle: Oracle, state: Any, found: Any) -> Any:
        return self.loop.step(oracle, state, found)

    def beside(self, inner_step: Any, outer_step: Any) -> Any:
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    def stationarity(self, oracle: Oracle, state: Any, found: Any) -> Tensor:
        return self.loop.stationarity(oracle, state, found)

    def point(self, state: Any) -> tuple[Tensor, Tensor]:
        return state.x, state.y


def test_algorithms_that_say_nothing_of_seeds_run_their_steps_side_by_side_and_seeds_in_turns() -> None:
    each, found, _ = batches(Coins(0.1, 0.1), {"seed": [0, 1], "outer_step": [0.05, 0.1]}, split())
    assert [batch.rows for batch in each] == [2, 2] and len(found) == 4


def test_runs_of_esj_side_by_side_have_radii_and_directions_of_their_own() -> None:
    rows, esj = torch.tensor([[1.0, 1.0], [300.0, 100.0]]).double(), ESJS(0.1, 0.1, directions=3)
    of_rows = esj._radius(rows)
    assert isinstance(of_rows, Tensor) and of_rows.shape == (2, 1, 1)
    assert of_rows.flatten().tolist() == [esj._radius(row) for row in rows] and of_rows[0] < of_rows[1] / 100
    several = replace(esj, seed=(3, 8))
    u, _ = several._directions(5, rows)
    assert torch.equal(u, torch.stack([replace(esj, seed=seed)._directions(5, rows[0])[0] for seed in (3, 8)]))
    with pytest.raises(ValueError, match="one number for a run"):
        run(several, split(), 3)


@pytest.mark.parametrize("own", ["tasks", "init", "tasks and init"])
def test_runs_of_esj_are_side_by_side_over_tasks_and_from_starts_of_their_own(own: str) -> None:
    """And curved, so that their radii and their directions are seen."""
    data = torch.tensor([[0.5, -1.0], [1.0, 0.3], [-0.2, 0.4]]).double()

    def g(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        return ((y - x.sin()).square() / 2 + (y - d).square() / 4 + 0.1 * y.cos()).sum()

    def f(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        return ((y - 1).square() + y * d).sum() + 0.1 * x.square().sum()

    init = (lambda x, d: x.exp() * d.mean(0)) if "init" in own else None
    problem = BilevelProblem(f, g, init=init, tasks="tasks" in own)
    x0, y0 = torch.tensor([0.3, -0.4]).double(), None if init else torch.zeros(2).double()
    given: dict[str, Any] = {"data": data, "max_steps": 12}
    esj = ESJS(0.1, 0.1, inner_steps=3, directions=2, radius=0.3)
    swept: Any = {"inner_step": [0.1, 0.3], "outer_step": [0.05, 0.2]}
    found = minimize(problem, x0, y0, algorithm=esj, sweep=swept, sweep_steps=12, **given)
    chosen = next(trial for trial in found.sweep if trial.chosen)
    alone = minimize(problem, x0, y0, algorithm=replace(esj, **chosen.settings), **given)
    torch.testing.assert_close(found.x, alone.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.y, alone.y, rtol=1e-12, atol=1e-12)


def test_how_often_all_the_data_are_seen_does_not_hang_on_the_block_that_comes_first() -> None:
    """A last block of two samples, drawn first, once made an epoch of it."""
    periods = set()
    for seed in range(8):
        data = sources(split(seed=seed))
        periods.add(Oracle(FlatProblem(PROBLEM, ravel(X)[1], ravel(Y)[1]), data).epoch)
    assert periods == {-(-(19 + 14) // 8)}


def test_the_best_of_seeds_on_ragged_blocks_goes_on_as_if_it_had_run_alone() -> None:
    swept: dict[str, Any] = {"outer_step": [0.02, 0.1], "seed": SEEDS}
    found = run(SPABA(0.1, 0.1), split(), 24, sweep=swept, sweep_steps=9)
    chosen = dict(next(trial for trial in found.sweep if trial.chosen).settings)
    alone = run(SPABA(0.1, **chosen), split(seed=chosen["seed"]), 24)
    torch.testing.assert_close(found.x, alone.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.y, alone.y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("asked", [[0, 1, 2, 3, 4], [4, 0, 3], [2, 4], [0, 1, 3], [1, 0, 3], [2], [1, 1, 4, 0, 4]])
def test_batches_of_two_sizes_are_told_apart_in_whatever_order_they_are_asked_for(asked: list[int]) -> None:
    """Run k has samples of value k, three of them or two."""
    sizes, groups = [3, 3, 2, 3, 2], ([3, 0, 1], [4, 2])
    data = tuple({"a": torch.tensor([[float(k)] * sizes[k] for k in group])} for group in groups)
    uneven = Uneven(tuple(torch.tensor(group) for group in groups), data)
    own = torch.arange(5.0)
    assert torch.equal(
        uneven.each(lambda part, rows: part["a"].sum(-1) + 100 * rows, own), own * (100 + torch.tensor(sizes))
    )
    found = uneven.of_runs(torch.tensor(asked))
    expected = torch.tensor([float(k * sizes[k]) for k in asked])
    total = found.each(lambda part: part["a"].sum(-1)) if isinstance(found, Uneven) else found["a"].sum(-1)
    assert torch.equal(total, expected)
    assert isinstance(found, Uneven) == (len({sizes[k] for k in asked}) == 2)


def test_rows_of_float32_stay_so_on_ragged_blocks() -> None:
    data = Split(*(FiniteSum(tuple(part.float() for part in side), 4) for side in (OF_F, OF_G)))
    found = minimize(
        PROBLEM, X.float(), Y.float(), algorithm=SRBA(0.1, 0.1), data=data, max_steps=9, sweep={"seed": SEEDS}
    )
    assert found.x.dtype == torch.float32


def test_learning_rates_of_a_preset_are_no_steps_of_its_loop() -> None:
    demand_each_alone(ScaleBiO(0.02, 0.01), {"inner_step": [0.01, 0.05], "outer_step": [0.01, 0.02]}, split())


@final
@dataclass(frozen=True)
class Halved(AbstractPreset):
    """A preset of one's own: its loop takes half of its step, or a series with steps of its own."""

    inner_step: float
    outer_step: float
    series: bool = False

    def combination(self) -> SingleLoop:
        if self.series:
            return SingleLoop(self.inner_step, self.outer_step, direction=Neumann(3, self.inner_step / 2))
        return SingleLoop(self.inner_step / 2, self.outer_step)


@pytest.mark.parametrize("series", [False, True])
def test_a_preset_whose_loop_has_other_steps_than_it_says_runs_in_turns(series: bool) -> None:
    each, _, _ = batches(Halved(0.1, 0.1, series), {"inner_step": [0.1, 0.2]}, split())
    assert [batch.rows for batch in each] == [0, 0]
    each, _, _ = batches(Halved(0.1, 0.1, True), {"outer_step": [0.1, 0.2]}, split())
    assert [batch.rows for batch in each] == [2]


@pytest.mark.parametrize("seed", [20261128, -20261128, 2**62])
def test_a_seed_may_be_a_date_and_longer(seed: int) -> None:
    """Products of it with numbers of steps are of more than the 64 bits that torch takes."""
    orders = {tuple(FiniteSum(OF_G, 2, seed=s).block(t, 0).number for t in range(10)) for s in (seed, seed + 1)}
    assert len(orders) == 2
    for algorithm in (SPABA(0.1, 0.1, seed=seed), ESJS(0.1, 0.1, inner_steps=2, directions=2, seed=seed)):
        assert run(algorithm, split(seed=seed), 3).status.ok


@pytest.mark.parametrize("curvature", [0.3, 4.0, 50.0])
def test_the_step_of_bome_by_its_name_fits_the_curvature_of_f_in_y(curvature: float) -> None:
    """Phi is flat, so that a step of x alone would be a hundred times as long."""
    problem = BilevelProblem(
        lambda x, y: curvature * (y - 1).square() / 2, lambda x, y: (y - 0.05 * x).square() / 2 + 0.01 * y.square()
    )
    zero = torch.tensor(0.0).double()
    found = minimize(problem, zero, zero, algorithm="bome", max_steps=300)
    assert 0 < float(found.x) < 25 and abs(float(found.y) - 1) < 1


def test_a_run_that_began_with_a_sweep_of_optimizers_is_resumed_and_saved(tmp_path: Path) -> None:
    """Its checkpoint once held what no reader takes, and was lost."""
    swept = {"outer_step": [Adam(0.01), TorchOptim(lambda p: torch.optim.SGD(p, lr=0.1))], "seed": [0, 1]}
    given: dict[str, Any] = {"sweep": swept, "sweep_steps": 4}
    soba, file = SOBA(0.1, 0.1, linear_step=0.1), tmp_path / "a.pt"
    whole = run(soba, split(), 20, **given)
    run(soba, split(), 9, checkpoint=file, **given)
    found = run(soba, split(), 20, checkpoint=file, resume=True, **given)
    assert torch.equal(found.x, whole.x) and found.sweep == whole.sweep
    whole.save(tmp_path / "solution")
    read = Solution.load(tmp_path / "solution").sweep
    assert [trial.value for trial in read] == [trial.value for trial in whole.sweep]
    assert str(read[0].settings["outer_step"]).startswith("Adam(step=0.01")
