"""A sweep is its runs: side by side, counted, recorded, and the best one goes on as if it had run alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_single_loops import OF_F, OF_G, PROBLEM, X, Y, objective, run, samples, split
from torch import Tensor

from bilevel import (
    AID,
    BilevelError,
    BilevelProblem,
    Box,
    FiniteDifferences,
    FiniteSum,
    Solution,
    Split,
    Status,
    minimize,
    prox,
)
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.algorithms import (
    BOME,
    BSA,
    ESJS,
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
    VRBO,
    AmIGO,
    FdeHBO,
    Power,
    StocBiO,
)
from bilevel.algorithms.descent import Descent
from bilevel.algorithms.oracle import Oracle
from bilevel.algorithms.several_orders import SeveralOrders
from bilevel.outer import sweep
from bilevel.solvers import CG, LBFGS, Adam, GradientDescent

EVEN_G, EVEN_F = samples(20, 0), samples(16, 1)
STEPS: dict[str, Any] = {"inner_step": [0.05, 0.2], "outer_step": [0.02, 0.1, 0.2]}

ALGORITHMS: dict[str, Any] = {
    "soba": SOBA(1.0, 1.0, schedule=Power(0.5)),
    "saba": SABA(1.0, 1.0),
    "srba": SRBA(1.0, 1.0, period=3),
    "spaba": SPABA(1.0, 1.0, probability=0.4),
    "ma-soba": MASOBA(1.0, 1.0),
    "fdehbo": FdeHBO(1.0, 1.0),
    "differences": SRBA(1.0, 1.0, period=3, products=FiniteDifferences()),
    "amigo": AmIGO(1.0, 1.0, inner_steps=2, linear_steps=2),
    "fsla": FSLA(1.0, 1.0),
    "stocbio": StocBiO(1.0, 1.0, inner_steps=2, linear_steps=3),
    "stocbio with a step of its own": StocBiO(1.0, 1.0, linear_step=0.1, linear_steps=3),
    "bsa": BSA(1.0, 1.0, linear_steps=3),
    "mrbo": MRBO(1.0, 1.0, linear_steps=3),
    "sustain": SUSTAIN(1.0, 1.0, linear_steps=3),
    "vrbo": VRBO(1.0, 1.0, inner_steps=2, linear_steps=3, period=3),
    "f2sa": F2SA(1.0, 1.0, order=1),
    "f2sa-2": F2SA(1.0, 1.0, weight=20.0, inner_steps=2),
    "pbgd": PBGD(1.0, 1.0, weight=5.0, inner_steps=2),
    "pbgd by gradients": PBGD(1.0, 1.0, weight=5.0, form="gradient"),
    "bome": BOME(1.0, 1.0, inner_steps=3),
    "bome by values": BOME(1.0, 1.0, inner_steps=3, barrier="value"),
    "esj-s": ESJS(1.0, 1.0, inner_steps=3, directions=2, radius=0.1),
    "meha": MEHA(1.0, 1.0, weight=5.0),
    "meha with a step of its own": MEHA(1.0, 1.0, 0.1, weight=5.0),
}


def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each batch of a sweep has, as they are run; 0: one alone."""
    rows, whole = [], sweep._Batch.run

    def run(batch: Any, *given: Any) -> Any:
        rows.append(batch.rows)
        return whole(batch, *given)

    monkeypatch.setattr(sweep._Batch, "run", run)
    return rows


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_best_goes_on_as_if_it_had_run_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm: Any = ALGORITHMS[name]
    rows = together(monkeypatch)
    found = run(algorithm, split(), 24, sweep=STEPS, sweep_steps=9)
    assert rows == [6]
    assert len(found.sweep) == 6 and sum(trial.chosen for trial in found.sweep) == 1
    chosen = next(trial for trial in found.sweep if trial.chosen)
    assert chosen.value == min(trial.value for trial in found.sweep)
    alone = run(replace(algorithm, **chosen.settings), split(), 24)
    tolerance = 1e-7 if name in ("fdehbo", "differences") else 1e-11
    torch.testing.assert_close(found.x, alone.x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.y, alone.y, rtol=tolerance, atol=tolerance)
    assert found.history[0].step == 9 and found.history[-1].step == 24


def test_values_are_phi_on_all_the_data_and_calls_are_counted_for_every_row() -> None:
    soba = SOBA(0.1, 0.1)
    found = run(soba, split(), 8, sweep={"outer_step": [0.05, 0.1]}, sweep_steps=4)
    for trial in found.sweep:
        alone = run(SOBA(0.1, trial.settings["outer_step"]), split(), 4)
        y = alone.y - torch.linalg.solve(_hessian(alone.x), _inner_gradient(alone.x, alone.y))
        assert trial.value == pytest.approx(float(objective(alone.x, y, OF_F)), rel=1e-2)
    plain = run(soba, split(), 8)
    four = run(soba, split(), 4)
    assert found.stats.sample_calls > plain.stats.sample_calls + four.stats.sample_calls / 2


def _inner_gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    at = y.clone().requires_grad_()
    return torch.autograd.grad(objective(x, at, OF_G), at)[0]


def _hessian(x: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(Y)
    rows = [_inner_gradient(x, row) - _inner_gradient(x, zero) for row in torch.eye(len(Y)).double()]
    return torch.stack(rows)


def test_a_row_whose_y_has_not_moved_is_not_the_best() -> None:
    """f(x, y) - v'grad_y g is zero there, far below the least Phi."""
    nothing, zero = FiniteSum(torch.zeros(8).double(), 2), torch.tensor(0.0).double()
    problem = BilevelProblem(
        lambda x, y, d: (y - 3 - d).square().mean() / 2 + x.square() / 2,
        lambda x, y, d: (y - x - d).square().mean() / 2,
    )
    swept = {"inner_step": [1e-6, 0.1]}
    found = minimize(problem, zero, zero + 3, algorithm=SABA(0.1, 0.05), data=nothing, max_steps=400, sweep=swept)
    assert [trial.chosen for trial in found.sweep] == [False, True]
    assert float(found.x) == pytest.approx(1.5, abs=1e-6)


def test_rows_are_of_the_dtype_of_x() -> None:
    one = torch.zeros(2, dtype=torch.float32)
    problem = BilevelProblem(lambda x, y, a: (a @ y - 1).square().mean(), lambda x, y, a: (a @ (y - x)).square().mean())
    data = FiniteSum(torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32), 3)
    found = minimize(problem, one, one, algorithm=SOBA(0.1, 0.1), data=data, max_steps=12, sweep=STEPS)
    assert found.x.dtype == torch.float32


def test_ratios_and_seeds_are_swept_too() -> None:
    found = run(SOBA(0.1, 0.1), split(), 6, sweep={"ratio": [1.0, 4.0], "seed": [0, 1]}, sweep_steps=3)
    assert [tuple(trial.settings.values()) for trial in found.sweep] == [(1.0, 0), (1.0, 1), (4.0, 0), (4.0, 1)]
    chosen = next(trial for trial in found.sweep if trial.chosen).settings
    alone = run(SOBA(0.1, 0.1 / chosen["ratio"]), split(seed=chosen["seed"]), 6)
    torch.testing.assert_close(found.x, alone.x, rtol=1e-11, atol=1e-11)


OWN_COINS = ("spaba", "bsa", "esj-s")
REDUCED = ("soba", "saba", "srba", "spaba", "ma-soba", "fsla", "bsa", "mrbo", "vrbo", "f2sa", "esj-s")


@pytest.mark.parametrize("name", REDUCED)
def test_orders_of_the_data_run_side_by_side(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = ALGORITHMS[name]
    algorithm: Any = replace(given, inner_step=0.1)
    swept = {"outer_step": [0.02, 0.1], "seed": [0, 1, 2]}

    def data(seed: int = 0) -> Split:
        return Split(g=FiniteSum(EVEN_G, 4, seed=seed), f=FiniteSum(EVEN_F, 4, seed=seed))

    rows = together(monkeypatch)
    found = run(algorithm, data(), 24, sweep=swept, sweep_steps=9)  # of which any row may be the best
    assert rows == [6]
    chosen = dict(next(trial for trial in found.sweep if trial.chosen).settings)
    own = {"seed": chosen["seed"]} if name in OWN_COINS else {}
    single: Any = replace(algorithm, outer_step=chosen["outer_step"], **own)
    alone = run(single, data(chosen["seed"]), 24)
    tolerance = 1e-7 if name in ("fdehbo", "differences") else 1e-11
    torch.testing.assert_close(found.x, alone.x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.y, alone.y, rtol=tolerance, atol=tolerance)


def test_what_cannot_run_side_by_side_runs_one_after_the_other() -> None:
    swept = {"period": [2, 5], "outer_step": [0.05, 0.1]}
    found = run(SRBA(0.1, 0.1), split(), 12, sweep=swept, sweep_steps=6)
    chosen = next(trial for trial in found.sweep if trial.chosen).settings
    torch.testing.assert_close(found.x, run(SRBA(0.1, **chosen), split(), 12).x, rtol=1e-11, atol=1e-11)
    adam = run(MASOBA(0.1, Adam(0.1)), split(), 12, sweep={"inner_step": [0.05, 0.1]}, sweep_steps=6)
    assert len(adam.sweep) == 2


def test_combinations_that_diverge_are_told_and_not_chosen() -> None:
    found = run(SOBA(0.1, 0.1), split(), 400, sweep={"outer_step": [0.1, 100.0]}, sweep_steps=300)
    assert [trial.status for trial in found.sweep] == [Status.successful, Status.diverged]
    assert found.sweep[0].chosen and found.status.ok
    swept: dict[str, Any] = {"sweep": {"outer_step": [100.0, 200.0]}, "sweep_steps": 300}
    lost = run(SOBA(0.1, 0.1), split(), 400, **swept, throw=False)
    assert lost.failed and lost.status.lost and lost.best.step == 0 and torch.equal(lost.best.x, X)
    assert [(trial.status, trial.chosen) for trial in lost.sweep] == [(Status.diverged, k == 0) for k in range(2)]
    with pytest.raises(BilevelError, match="All combinations of the sweep had diverged") as error:
        run(SOBA(0.1, 0.1), split(), 400, **swept)
    assert error.value.status is lost.status and error.value.partial.sweep == lost.sweep


def test_rows_are_projected_each() -> None:
    def within(**given: Any) -> Any:
        return minimize(
            PROBLEM, X, Y, algorithm=SOBA(0.1, 0.1), data=split(), max_steps=12, constraint=Box(0.3, 0.6), **given
        )

    found = within(sweep={"outer_step": [0.1, 0.2]}, sweep_steps=6)
    assert bool(((found.x >= 0.3) & (found.x <= 0.6)).all())


def test_a_run_that_began_with_a_sweep_is_resumed_without_it(tmp_path: Path) -> None:
    whole = run(SABA(1.0, 1.0), split(), 30, sweep=STEPS, sweep_steps=5)
    file = tmp_path / "a.pt"
    run(SABA(1.0, 1.0), split(), 12, sweep=STEPS, sweep_steps=5, checkpoint=file)
    found = run(SABA(1.0, 1.0), split(), 30, sweep=STEPS, sweep_steps=5, checkpoint=file, resume=True)
    assert torch.equal(found.x, whole.x) and found.sweep == whole.sweep
    assert found.stats == whole.stats
    with pytest.raises(ValueError, match="other settings"):
        run(SABA(1.0, 1.0), split(), 30, sweep={"outer_step": [0.1]}, checkpoint=file, resume=True)
    assert Solution.from_dict(found.to_dict()).sweep == found.sweep


def test_a_run_that_chose_and_swept_by_itself_goes_on_further_than_it_was_to(tmp_path: Path) -> None:
    file = tmp_path / "auto.pt"
    for steps, rows in ((30, 3), (100, 5)):  # as many as these are long enough to tell of
        short = run("auto", split(), steps, checkpoint=file)  # type: ignore[arg-type]
        found = run("auto", split(), 160, checkpoint=file, resume=True)  # type: ignore[arg-type]
        assert len(short.sweep) == rows and found.sweep == short.sweep and found.history[-1].step == 160
        assert found.stats.sample_calls > short.stats.sample_calls
        file.unlink()
    short = run("auto", split(), 15, checkpoint=file)  # type: ignore[arg-type]
    found = run("auto", split(), 160, checkpoint=file, resume=True)  # type: ignore[arg-type]
    assert short.sweep == found.sweep == () and found.history[-1].step == 160


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"sweep": {"outer": [0.1]}}, r"must name fields of `SOBA`.*'outer'"),
        ({"sweep": {}}, "a list of values"),
        ({"sweep": {"outer_step": []}}, "a list of values"),
        ({"sweep": {"outer_step": [0.1], "ratio": [1.0]}}, "`ratio` or `outer_step`"),
        ({"sweep": {"outer_step": [-0.1]}}, r"SOBA\(outer_step=...\)` must be positive"),
    ],
)
def test_sweeps_that_are_none_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        run(SOBA(0.1, 0.1), split(), 10, **given)


def test_a_sweep_is_of_an_algorithm_on_data_that_are_known() -> None:
    loader = [tuple(part[:4] for part in OF_G)]
    with pytest.raises(ValueError, match="compares values on all the data"):
        run(SOBA(0.1, 0.1), loader, 10, sweep={"outer_step": [0.1]})
    with pytest.raises(ValueError, match="Pass `algorithm=`"):
        minimize(PROBLEM, X, Y, data=split(), sweep={"outer_step": [0.1]})


@pytest.mark.parametrize(
    "algorithm",
    [SABA(0.1, 0.1), SOBA(0.1, 0.1), F2SA(0.1, 0.1), PBGD(0.1, 0.1), BOME(0.1, 0.1), MEHA(0.1, 0.1)],
    ids=lambda a: type(a).__name__,
)
def test_each_row_sees_the_order_of_its_own(algorithm: Any) -> None:
    orders = [FiniteSum(EVEN_G, 4, seed=seed) for seed in (0, 5, 9)]
    stacked, f = SeveralOrders.of(tuple(orders), X), FiniteSum(EVEN_F, 16)
    assert isinstance(stacked, SeveralOrders)
    x, y = ravel(X)[1], ravel(Y)[1]
    like, steps = FlatProblem(PROBLEM, x, y), torch.full((3,), 0.1).double()

    def after(algorithm: Any, g: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        oracle = Oracle(like, Split(f=f, g=g), algorithm.draws)
        state = algorithm.init(oracle, x, y)
        for k in range(12):
            oracle = oracle.at(k)
            state = algorithm.step(oracle, state, algorithm.evaluate(oracle, state))
        found: torch.Tensor = algorithm.point(state)[0]
        return found

    rows = after(algorithm.beside(steps, steps), stacked, X.expand(3, -1), Y.expand(3, -1))
    alone = [after(algorithm, order, X, Y) for order in orders]
    torch.testing.assert_close(rows, torch.stack(alone), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(alone[0], alone[1])


@pytest.mark.parametrize(
    ("algorithm", "of"),
    [
        (F2SA(0.1, 0.1, order=1), "tasks"),
        (PBGD(0.1, 0.1), "tasks"),
        (PBGD(0.1, 0.1, form="gradient"), "tasks"),
        (BOME(0.1, 0.1), "tasks"),
        (MEHA(0.1, 0.1), "tasks"),
        (MEHA(0.1, 0.1), "a term"),  # of which the others know nothing
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_each_row_is_its_own_run_with_tasks_and_with_a_term(
    algorithm: Any, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = together(monkeypatch)
    data: Any = {"data": torch.tensor([[0.5, -1.0], [1.0, 0.3], [-0.2, 0.4]]).double()} if of == "tasks" else {}
    weights = torch.tensor([1.0, 2.0]).double()

    def f(x: Any, y: Any, *shift: Any) -> Any:
        return (y - 1).square().sum() / 2 + sum((y * d).sum() for d in shift) + 0.1 * x.square().sum()

    def g(x: Any, y: Any, *shift: Any) -> Any:
        return (weights * (y - x).square()).sum() / 2 + sum((y - d).square().sum() / 4 for d in shift)

    problem = BilevelProblem(f, g, tasks=of == "tasks")
    if of == "a term":
        problem = BilevelProblem(f, g, prox=lambda x: prox.L1(0.1 * x.exp()))
    start = torch.tensor([0.3, -0.4]).double(), torch.zeros(2).double()
    swept: Any = {"inner_step": [0.1, 0.3], "outer_step": [0.05, 0.2]}
    found = minimize(problem, *start, algorithm=algorithm, max_steps=12, sweep=swept, sweep_steps=12, **data)
    assert rows == [4]
    chosen = next(trial for trial in found.sweep if trial.chosen)
    alone = minimize(problem, *start, algorithm=replace(algorithm, **chosen.settings), max_steps=12, **data)
    torch.testing.assert_close(found.x, alone.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.y, alone.y, rtol=1e-12, atol=1e-12)


def test_a_sweep_over_what_does_not_apply_is_refused_before_anything_is_computed() -> None:
    asked = list[int]()

    def g(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        asked.append(1)
        return (y - x).square().sum()

    problem = BilevelProblem(lambda _, y, b: (y - b).square().sum(), g, iterative=True)
    one = torch.ones(2, dtype=torch.float64)
    algorithm = Descent(AID(LBFGS(), CG()), GradientDescent(0.1))
    outer = [GradientDescent(0.1), GradientDescent(0.2)]
    with pytest.raises(ValueError, match="does not apply"):
        minimize(problem, one, one, algorithm=algorithm, data=one, max_steps=4, sweep={"outer": outer})
    assert not asked
