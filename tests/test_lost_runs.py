"""A run that diverges says so, and its best iterate is the one of the least measure, whatever its data are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import on_ranks
from test_single_loops import OF_F, OF_G, X, run, split

from bilevel import BilevelError, BilevelProblem, Split, Status, minimize
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
    SAMA,
    SOBA,
    SPABA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AmIGO,
    FdeHBO,
    StocBiO,
)
from bilevel.compiled.single_loop import compiled_loop
from bilevel.ranks import Shard
from bilevel.solvers import GradientDescent, Scheduled

GOOD, LATER = 0.1, 24  # the step of x, and when it becomes a bad one
STEP: Any = Scheduled(GradientDescent(GOOD), lambda k: 1.0 if k < LATER else 2000.0)
LOOPS: dict[str, Any] = {
    "soba": SOBA(0.2, STEP),
    "ma-soba": MASOBA(0.2, STEP, theta=0.5),
    "saba": SABA(0.2, STEP),
    "srba": SRBA(0.2, STEP, period=8),
    "spaba": SPABA(0.2, STEP, probability=0.2),
    "fsla": FSLA(0.2, STEP),
    "fdehbo": FdeHBO(0.2, STEP),
    "amigo": AmIGO(0.2, STEP, inner_steps=2, linear_steps=2),
    "stocbio": StocBiO(0.2, STEP, inner_steps=2, linear_steps=3),
    "bsa": BSA(0.2, STEP, inner_steps=2, linear_steps=3),
    "ttsa": TTSA(0.2, STEP, linear_steps=3),
    "mrbo": MRBO(0.2, STEP, linear_steps=3),
    "sustain": SUSTAIN(0.2, STEP, linear_steps=3),
    "vrbo": VRBO(0.2, STEP, inner_steps=2, linear_steps=3, period=8),
    "f2sa": F2SA(0.2, STEP, order=1),
    "f2sa-2": F2SA(0.2, STEP, weight=20.0, order=2),
    "pbgd": PBGD(0.2, STEP),
    "pbgd by gradients": PBGD(0.2, STEP, weight=5.0, form="gradient"),
    "bome": BOME(0.2, STEP, inner_steps=3),
    "meha": MEHA(0.2, STEP, weight=5.0),
    "sama": SAMA(0.2, STEP, inner_steps=2),
    "esj-s": ESJS(0.2, STEP, inner_steps=2, directions=2),
}
DATA: dict[str, Any] = {
    "all of them": Split(f=OF_F, g=OF_G),
    "a finite sum": split(),
    "batches": Split(f=lambda k: tuple(t[k % 3 :: 3] for t in OF_F), g=lambda k: tuple(t[k % 3 :: 3] for t in OF_G)),
}


def demand_least(found: Any) -> None:
    """That it is lost, and that the best of its iterates is the one of the least measure, and no other."""
    assert found.failed and found.status.lost and found.history[-1].step > LATER
    sound = [record for record in found.history if record.status.ok]
    least = min(sound, key=lambda record: (record.grad_norm, -record.step))
    assert (found.best.step, found.best.grad_norm, found.best.value) == (least.step, least.grad_norm, least.value)
    assert found.best.compared and 0 < found.best.step <= LATER
    assert float(found.best.x.norm()) < 5 < float(found.x.norm())


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", LOOPS)
def test_a_run_that_is_lost_keeps_the_iterate_of_the_least_measure(name: str, kind: str) -> None:
    given: Any = {"evaluate_every": 4} if kind == "a finite sum" else {}
    if kind == "batches" and name in ("saba", "srba", "spaba", "vrbo"):
        pytest.skip("it asks for all the data, or for blocks")
    demand_least(run(LOOPS[name], DATA[kind], 800, throw=False, **given))


def test_a_run_that_is_lost_at_once_keeps_its_start() -> None:
    for data in DATA.values():
        found = run(SOBA(0.2, 2000.0), data, 400, throw=False)
        assert found.status.lost and found.best.step == 0 and torch.equal(found.best.x, X)


def test_it_ends_long_before_numbers_do() -> None:
    """And is no success where its steps end while its iterates run away."""
    for kind in ("all of them", "batches"):
        found = run(LOOPS["soba"], DATA[kind], 2000, throw=False)
        assert found.status is Status.diverged and found.history[-1].step < LATER + 15
        assert any(report.part == "the iterates" for report in found.estimate.reports)


def test_a_lucky_batch_at_the_start_is_no_measure_of_those_that_follow() -> None:
    """Its gradients are a millionth of all others'."""
    problem = BilevelProblem(
        lambda x, y, w: w * ((y - 3).square() + 0.1 * x.square()).sum() / 2,
        lambda x, y, w: w * (y - x).square().sum() / 2,
    )

    def data(k: int) -> torch.Tensor:
        return torch.tensor(1e-8 if k == 0 else 1.0).double()

    zero = torch.zeros(2).double()
    assert minimize(problem, zero, zero, algorithm=SOBA(0.1, 0.1), data=data, max_steps=300).status.ok


def test_the_best_of_a_run_that_went_well_is_its_last_though_its_start_has_the_least_measure() -> None:
    """At v = 0 and y = y*(x) the directions are (grad_x f, 0, -grad_y f), however long the way is."""
    problem = BilevelProblem(
        lambda x, y: 0.01 * (y - 300).square().sum() / 2, lambda x, y: 0.01 * (y - 100 * x).square().sum() / 2
    )
    zero = torch.zeros(1).double()
    found = minimize(problem, zero, zero, algorithm=SOBA(20.0, 1e-4), max_steps=60)
    assert found.history[0].grad_norm < 0.1 * min(record.grad_norm for record in found.history[5:])
    assert float(found.x) > 1 and found.best.step == 60 and not found.best.compared


def test_what_is_thrown_has_it_too() -> None:
    with pytest.raises(BilevelError) as error:
        run(LOOPS["soba"], DATA["all of them"], 800)
    demand_least(error.value.partial)


def test_a_callback_that_ends_a_run_leaves_the_last_iterate() -> None:
    """It is nobody's failure."""
    found = run(LOOPS["soba"], DATA["all of them"], 800, callback=lambda record, _: record.step == LATER + 2)
    assert found.status.ok and found.best.step == LATER + 2


@pytest.mark.parametrize("kind", ["all of them", "a finite sum"])
@pytest.mark.parametrize("stop", [5, LATER, LATER + 3])
def test_so_does_a_run_that_was_interrupted_on_the_way(kind: str, stop: int, tmp_path: Path) -> None:
    given: Any = {"evaluate_every": 4} if kind == "a finite sum" else {}
    whole = run(LOOPS["soba"], DATA[kind], 800, throw=False, **given)
    file = tmp_path / "a.pt"
    run(LOOPS["soba"], DATA[kind], stop, checkpoint=file, throw=False, **given)
    found = run(LOOPS["soba"], DATA[kind], 800, checkpoint=file, resume=True, throw=False, **given)
    demand_least(found)
    assert found.best.step == whole.best.step and torch.equal(found.best.x, whole.best.x)
    content = torch.load(file, weights_only=False)
    content["least"]["record"]["step"] = 10**6
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"'least.record' is of no step"):
        run(LOOPS["soba"], DATA[kind], 800, checkpoint=file, resume=True, throw=False, **given)


def test_so_does_a_run_whose_steps_are_programs() -> None:
    algorithm = SOBA(0.2, 0.1, outer_schedule=lambda k: 1.0 if k < LATER else 2000.0)
    eager = run(algorithm, DATA["all of them"], 800, throw=False)
    found = run(compiled_loop(algorithm, "eager"), DATA["all of them"], 800, throw=False)
    demand_least(found)
    assert found.best.step == eager.best.step and found.status is eager.status
    torch.testing.assert_close(found.best.x, eager.best.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["all of them", "a finite sum"])
def test_so_does_the_chosen_run_of_a_sweep(kind: str) -> None:
    swept: dict[str, Any] = {"sweep": {"inner_step": [0.02, 0.2], "seed": [0, 1]}, "sweep_steps": 6}
    if kind == "all of them":
        swept["sweep"].pop("seed")
    found = run(replace(LOOPS["soba"], linear_step=0.2), DATA[kind], 800, **swept, throw=False)
    demand_least(found)
    assert found.best.step >= 6 and found.history[0].step == 6


def _over(group: Any, rank: int) -> Any:
    """A finite sum, and all the data, each of which every rank has a half of."""
    halves = Split(*(Shard(tuple(t[rank::2] for t in side)) for side in (OF_F, OF_G)))
    algorithm = SOBA(0.2, GOOD, outer_schedule=_later)
    found = []
    for data, given in ((split(), {"evaluate_every": 4}), (halves, {})):
        some = run(algorithm, data, 800, throw=False, group=group, **given)
        demand_least(some)
        found.append((some.best.step, some.best.x, some.status))
    return found


def _later(step: int) -> float:
    return 1.0 if step < LATER else 2000.0


def test_so_do_runs_over_ranks_with_the_same_bits_on_each() -> None:
    one, other = on_ranks(2, _over)
    algorithm = SOBA(0.2, GOOD, outer_schedule=_later)
    alone = [
        run(algorithm, split(), 800, throw=False, evaluate_every=4),
        run(algorithm, DATA["all of them"], 800, throw=False),
    ]
    for (step, x, status), (step_, x_, status_), single in zip(one, other, alone, strict=True):
        assert (step, status) == (step_, status_) == (single.best.step, single.status) and torch.equal(x, x_)
        torch.testing.assert_close(x, single.best.x, rtol=1e-10, atol=1e-10)
