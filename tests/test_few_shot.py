"""Training over tasks: exact, resumable, choosing by validation; evaluation over episodes."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from bilevel import AID, BilevelError, BilevelProblem, Status, functional, hypergradient, minimize
from bilevel._files import write_atomically
from bilevel._tree import tree_leaves
from bilevel.few_shot import (
    Evaluating,
    Experiment,
    OuterLoop,
    Progress,
    Reporting,
    Saving,
    Score,
    Trained,
    Training,
    Validating,
    adapt,
    conv_net,
    evaluate,
    mlp,
    predict,
    read_best,
    train,
)
from bilevel.few_shot.evaluate import score_tasks
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.networks import features
from bilevel.problems.meta_learning.imaml import imaml
from bilevel.problems.meta_learning.maml import maml
from bilevel.problems.meta_learning.proto_net import proto_net
from bilevel.problems.meta_learning.ridge_head import ridge_head
from bilevel.problems.meta_learning.svm_head import svm_head
from bilevel.solvers.adam import Adam
from bilevel.solvers.cg import CG
from bilevel.solvers.clipped import Clipped
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.scheduled import Cosine, Scheduled, StepDecay
from bilevel.tasks import AbstractTasks, Batch, Sinusoid, batches
from bilevel.tasks._random import seed_of_step


@final
@dataclass(frozen=True, eq=False)
class Recorded(AbstractTasks):
    """Tasks that remember which of them were asked for."""

    source: AbstractTasks
    calls: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def sample(self, count: int, seed: int) -> Batch:
        self.calls.append((count, seed))
        return self.source.sample(count, seed)


@final
@dataclass(frozen=True)
class Blobs(AbstractTasks):
    """Three classes around random centres in the plane."""

    spread: float = 0.3
    ragged: bool = False

    def sample(self, count: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(count, 3, 1, 2, generator=generator)
        points = (centres + self.spread * torch.randn(count, 3, 6, 2, generator=generator)).flatten(1, 2)
        labels = torch.arange(3).repeat_interleave(6).expand(count, -1)
        support = torch.arange(18) % 6 < 2
        batch = {
            "support_x": points[:, support],
            "support_y": labels[:, support],
            "query_x": points[:, ~support],
            "query_y": labels[:, ~support],
        }
        if self.ragged:
            batch["query_mask"] = (torch.rand(count, 12, generator=generator) < 0.7).to(points.dtype)
            batch["query_mask"][:, 0] = 1.0
        return batch


def regression(steps: int = 1) -> Learner:
    return maml(mlp((1, 8, 1)), mse_loss, step=0.05, inner_steps=steps)


def classification() -> Learner:
    return maml(mlp((2, 8, 3)), cross_entropy, step=0.5, inner_steps=2)


def prior_mean(quality: Any = None) -> Learner:
    """The task's mean, from few samples and a learned prior mean: everything in closed form. `quality` replaces f."""

    def g(x: Tensor, y: Tensor, task: Any) -> Tensor:
        value: Tensor = (y - task["support_y"]).square().sum() / 2 + (y - x).square() / 2
        return value

    def f(x: Tensor, y: Tensor, task: Any) -> Tensor:
        value: Tensor = (y - task["query_y"]).square().mean()
        return value

    def solution(x: Tensor, task: Any) -> Tensor:
        value: Tensor = (x + task["support_y"].sum()) / (1 + task["support_y"].numel())
        return value

    x0 = torch.tensor(3.0)
    inner = ClosedForm(solution)
    problem = BilevelProblem(f if quality is None else quality, g, tasks=True)

    def forecast(x: Tensor, y: Tensor, task: Any) -> Tensor:
        return y.expand(task["query_y"].shape)

    return Learner("mean", problem, x0, torch.tensor(0.0), AID(inner, CG()), inner, forecast, lambda x: nn.Linear(1, 1))


wrong: Any = 0.5  # neither an optimizer nor a function


def same(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


# Training


def test_training_is_minimize_on_batches_of_new_tasks() -> None:
    learner, tasks = regression(), Sinusoid()
    trained = train(learner, tasks, max_steps=5, batch=4, seed=3, outer=Adam(0.01))
    solution = minimize(
        learner.problem,
        learner.x0,
        learner.y0,
        estimator=learner.estimator,
        outer=Adam(0.01),
        max_steps=5,
        data=batches(tasks, 4, 3),
        warm_start=False,
    )
    assert same(trained.x, solution.x)
    assert [record.value for record in trained.history] == [record.value for record in solution.history]
    assert trained.stats == solution.stats
    assert (trained.ended, trained.step, trained.failed) == ("max_steps", 5, {})


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_tasks() -> None:
    runs = [train(regression(), Sinusoid(), max_steps=3, batch=2, seed=seed) for seed in (0, 0, 1)]
    assert same(runs[0].x, runs[1].x)
    assert not same(runs[0].x, runs[2].x)


@dataclass
class Crash:
    """A callback that interrupts at a step."""

    at: int

    def __call__(self, progress: Any) -> None:
        if progress.record.step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [3, 6, 7, 8])  # before, at and after a validation; before and after a checkpoint
def test_an_interrupted_run_resumes_bit_for_bit(at: int, tmp_path: Path) -> None:
    def run(name: str, callback: Any, resume: bool) -> Any:
        return train(
            classification(),
            Blobs(),
            max_steps=11,
            batch=3,
            outer=Scheduled(Clipped(Adam(0.02), max_norm=1.0), Cosine(11)),
            validation=Validating(Blobs(), every=3, episodes=5),
            out=Saving(tmp_path / name, every=4, resume=resume),
            callback=callback,
        )

    whole = run("whole", None, False)
    with pytest.raises(KeyboardInterrupt):
        run("parts", Crash(at), False)
    parts = run("parts", None, True)
    assert same(parts.x, whole.x)
    assert same(parts.last, whole.last)
    assert parts.step == whole.step
    assert [record.value for record in parts.history] == [record.value for record in whole.history]
    scores = [[(v.step, v.score, v.loss, v.interval) for v in run.validations] for run in (parts, whole)]
    assert scores[0] == scores[1]
    assert [step for step, *_ in scores[0]] == [0, 3, 6, 9, 11]
    assert same(read_best(tmp_path / "parts" / "best.pt")["x"], whole.x)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a folder"])
def test_an_exception_leaves_training_with_what_was_trained(
    error: type[BaseException], kept: bool, tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.record.step == 7:
            raise error("mine")

    def run(max_steps: int, callback: Any = None, out: Any = None) -> Any:
        validation = Validating(Blobs(), every=3, episodes=5)
        learner = made_once
        return train(
            learner, Blobs(), max_steps=max_steps, batch=3, validation=validation, callback=callback, out=out
        )  # fmt: skip

    made_once = classification()
    with pytest.raises(error, match="mine") as raised:
        run(11, stop, tmp_path if kept else None)
    partial = raised.value.partial  # type: ignore[attr-defined]
    assert isinstance(partial, Trained) and partial.ended == "interrupted" and "mine" in partial.message
    shorter = run(7)
    assert same(partial.last, shorter.last)
    assert [record.value for record in partial.history] == [record.value for record in shorter.history]
    assert [validation.step for validation in partial.validations] == [0, 3, 6]
    assert partial.step in (0, 3, 6)
    partial.module()
    with pytest.raises(ValueError, match="max_steps") as refused:
        run(-1)
    assert refused.value.partial is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", ["checkpoint.pt", "best.pt", "model.pt"])
def test_a_file_that_cannot_be_written_leaves_what_was_trained(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bilevel.few_shot import validate
    from bilevel.outer import saves

    original = write_atomically

    def full(path: Any, write: Any) -> None:
        if Path(path).name == file:
            raise OSError(28, "No space left on device")
        original(path, write)

    for module in (saves, validate, sys.modules[train.__module__]):
        monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(BilevelError, match=r"could not be written: .*No space left") as raised:
        train(
            regression(), Sinusoid(), max_steps=6, batch=2, out=Saving(tmp_path, every=2),
            validation=Validating(Sinusoid(), every=3, episodes=4),
        )  # fmt: skip
    partial = raised.value.partial
    if file == "best.pt":  # at the first step, whose estimate is whole
        assert isinstance(partial, Trained) and len(partial.history) == 1
    else:
        assert isinstance(partial, Trained) and len(partial.history) == (7 if file == "model.pt" else 2)
    assert not (tmp_path / file).exists()


def test_training_on_other_tasks_or_by_another_learner_is_another_run(tmp_path: Path) -> None:
    def run(tasks: AbstractTasks, batch: int = 3, resume: Any = True) -> Any:
        return train(classification(), tasks, max_steps=4, batch=batch, out=Saving(tmp_path, resume=resume))

    run(Blobs(), resume=False)
    with pytest.raises(ValueError, match=r"spread was 0.3 and is 0.5"):
        run(Blobs(0.5))
    with pytest.raises(ValueError, match=r"size was 3 and is 4"):
        run(Blobs(), batch=4)
    run(Blobs())  # of a module that begins with other parameters
    assert run(Blobs(0.5), resume="force").history[-1].step == 4
    with pytest.raises(ValueError, match='must be True, False or "force"'):
        Saving(tmp_path, resume="no")  # type: ignore[arg-type]


def getting_worse(x: Tensor, y: Tensor, task: Any) -> Tensor:
    return -(x.square())


def test_validations_ahead_of_the_checkpoint_are_kept_and_count_for_patience_when_reached(tmp_path: Path) -> None:
    # The outer objective rewards a large prior mean, which is ever worse for tasks of mean zero.
    learner = dataclasses.replace(prior_mean(getting_worse), x0=torch.tensor(0.5))
    validation = Recorded(Sinusoid())

    def run(max_steps: int, *, resume: bool, patience: int | None = None) -> Any:
        return train(
            learner,
            Sinusoid(),
            max_steps=max_steps,
            batch=2,
            outer=GradientDescent(0.1),
            validation=Validating(validation, every=2, episodes=10, patience=patience),
            out=Saving(tmp_path, every=100, resume=resume),
        )

    run(2, resume=False)
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    ahead = run(6, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(checkpoint)  # as after a crash: best.pt is of step 6
    made = len(validation.calls)
    again = run(40, resume=True, patience=3)
    assert len(validation.calls) == made
    assert again.ended == "patience"
    assert again.history[-1].step == 6
    assert again.validations == ahead.validations
    assert (again.step, again.x) == (0, learner.x0)


def test_the_best_x_is_kept_when_validation_gets_worse_and_patience_ends_the_run() -> None:
    # The outer objective rewards a large prior mean, which is ever worse for tasks of mean zero.
    learner = dataclasses.replace(prior_mean(getting_worse), x0=torch.tensor(0.5))
    trained = train(
        learner,
        Sinusoid(),
        max_steps=40,
        batch=2,
        outer=GradientDescent(0.1),
        validation=Validating(Sinusoid(), every=2, episodes=10, patience=3),
    )
    assert trained.ended == "patience"
    assert [v.step for v in trained.validations] == [0, 2, 4, 6]
    scores = [v.score for v in trained.validations]
    assert scores == sorted(scores)
    assert trained.step == 0
    assert trained.best == trained.validations[0]
    assert torch.equal(trained.x, learner.x0)
    assert trained.last > trained.x


def test_the_best_x_is_the_one_that_scores_best_on_the_validation_tasks() -> None:
    trained = train(
        prior_mean(), Sinusoid(), max_steps=20, batch=2, outer=Adam(0.5), validation=Validating(Sinusoid(), every=1)
    )
    scores = {v.step: v.score for v in trained.validations}
    assert trained.step == min(scores, key=lambda step: scores[step])
    assert 0 < trained.step < 20
    assert trained.best is not None
    assert trained.best.score == min(scores.values())
    again = train(prior_mean(), Sinusoid(), max_steps=trained.step, batch=2, outer=Adam(0.5))
    assert torch.equal(trained.x, again.last)


def test_accuracy_is_better_when_larger() -> None:
    trained = train(
        classification(), Blobs(), max_steps=12, batch=4, outer=Adam(0.02), validation=Validating(Blobs(), every=3)
    )
    scores = [v.score for v in trained.validations]
    assert trained.best is not None
    assert trained.best.metric == "accuracy"
    assert trained.best.score == max(scores) > scores[0]


def test_validation_tasks_are_the_same_at_each_validation_and_not_those_of_training() -> None:
    tasks, validation = Recorded(Sinusoid()), Recorded(Sinusoid())
    train(regression(), tasks, max_steps=4, batch=2, validation=Validating(validation, every=2, episodes=3))
    assert len(validation.calls) == 3
    assert len(set(validation.calls)) == 1
    assert not {seed for _, seed in validation.calls} & {seed for _, seed in tasks.calls}
    assert {count for count, _ in tasks.calls} == {2}


def test_a_callback_stops_the_run_and_sees_the_score_of_the_batch() -> None:
    seen = []

    def callback(progress: Any) -> bool:
        seen.append(progress)
        return bool(progress.record.step == 4)

    learner = regression()
    trained = train(
        learner, Sinusoid(), max_steps=9, batch=3, callback=Reporting(callback, score_every=2), outer=Adam(0.01)
    )
    assert trained.ended == "callback"
    assert [progress.record.step for progress in seen] == [0, 1, 2, 3, 4]
    for progress in seen[::2]:  # a squared error is the outer loss itself
        assert progress.score == pytest.approx(progress.record.value, rel=1e-12)
    assert [progress.score for progress in seen[1::2]] == [None, None]
    assert seen[-1].seconds > seen[0].seconds > 0


def test_a_time_limit_stops_the_run_after_a_validation() -> None:
    trained = train(
        regression(),
        Sinusoid(),
        max_steps=10**6,
        batch=2,
        outer=OuterLoop(seconds=0.2),
        validation=Validating(Sinusoid(), every=10**6),
    )
    assert trained.ended == "seconds"
    assert trained.validations[-1].step == trained.history[-1].step > 0
    assert trained.seconds < 30


def test_a_time_limit_counts_the_earlier_parts_of_a_resumed_run(tmp_path: Path) -> None:
    first = train(regression(), Sinusoid(), max_steps=20, batch=2, out=tmp_path)
    again = train(
        regression(),
        Sinusoid(),
        max_steps=500,
        batch=2,
        outer=OuterLoop(seconds=1e-6),
        out=Saving(tmp_path, resume=True),
    )
    assert again.ended == "seconds"
    assert again.history[-1].step == 20
    assert again.seconds > sum(record.seconds for record in first.history[:-1])


def test_estimates_that_fail_are_counted_and_do_not_stop_the_run() -> None:
    inner = Iterate(GradientDescent(0.05), max_steps=1, tol=1e-12)
    learner = dataclasses.replace(prior_mean(), estimator=AID(inner, CG()))
    trained = train(learner, Sinusoid(), max_steps=3, batch=2)
    assert trained.failed == {"max_steps": 4}
    assert trained.ended == "max_steps"
    with pytest.raises(BilevelError):
        train(learner, Sinusoid(), max_steps=3, batch=2, outer=OuterLoop(throw=True))


def at_batches(lost: set[int], x0: float = 0.0) -> tuple[Learner, AbstractTasks]:
    """Phi(x) = -x; not finite on batches of these numbers, whatever x is."""

    def f(x: Tensor, y: Tensor, task: Any) -> Tensor:
        return -x + 0 * y + torch.where(task["bad"] > 0, torch.inf, 0.0) * (1 + y.square())

    seeds = {seed_of_step(0, step) for step in lost}

    class Numbered(AbstractTasks):
        def sample(self, count: int, seed: int) -> dict[str, Tensor]:
            return {**Sinusoid().sample(count, seed), "bad": torch.full((count,), float(seed in seeds))}

    return dataclasses.replace(prior_mean(f), x0=torch.tensor(x0)), Numbered()


def test_no_step_is_taken_along_what_is_not_finite_and_the_run_goes_on_with_the_next_batch() -> None:
    learner, tasks = at_batches({2, 3, 6})
    told: list[Progress] = []
    trained = train(
        learner, tasks, max_steps=9, batch=2, outer=GradientDescent(1.0), callback=Reporting(told.append, score_every=1)
    )
    assert (trained.ended, trained.skipped, trained.failed) == ("max_steps", 3, {"nonfinite": 3})
    assert float(trained.x) == 9 - 3
    assert [p.record.status is Status.nonfinite for p in told] == [k in {2, 3, 6} for k in range(10)]
    assert [p.score is None for p in told] == [k in {2, 3, 6} for k in range(10)]


@pytest.mark.parametrize(("lost", "skip", "at"), [({2, 3, 4, 5}, 3, 5), ({2}, 0, 2), ({7, 8, 9}, 10, 9), ({9}, 0, 9)])
def test_too_many_lost_estimates_in_a_row_or_at_the_end_stop_the_run_with_all_that_was_trained(
    lost: set[int], skip: int, at: int, tmp_path: Path
) -> None:
    learner, tasks = at_batches(lost)
    loop = OuterLoop(GradientDescent(1.0), skip=skip)
    with pytest.raises(BilevelError, match=r"were not finite, or diverged.*NaN or Inf was met") as raised:
        train(learner, tasks, max_steps=9, batch=2, outer=loop, out=tmp_path)
    partial = raised.value.partial
    assert isinstance(partial, Trained) and partial.ended == "failed" and "NaN" in partial.message
    assert raised.value.status is Status.nonfinite and partial.history[-1].step == at
    assert float(partial.x) == min(lost)
    assert (tmp_path / "model.pt").exists()
    learner, tasks = at_batches(lost - {min(lost)})
    assert train(learner, tasks, max_steps=9, batch=2, outer=dataclasses.replace(loop, skip=3)).ended == "max_steps"


def test_lost_estimates_of_the_earlier_part_of_a_resumed_run_count(tmp_path: Path) -> None:
    learner, tasks = at_batches({2, 3, 4, 5, 6, 7})
    loop = OuterLoop(GradientDescent(1.0), skip=4)
    train(learner, tasks, max_steps=9, batch=2, outer=loop, out=tmp_path, callback=lambda p: p.record.step == 4)
    with pytest.raises(BilevelError) as raised:
        train(learner, tasks, max_steps=9, batch=2, outer=loop, out=Saving(tmp_path, resume=True))
    assert raised.value.partial.history[-1].step == 6
    assert raised.value.partial.skipped == 5


def test_no_step_is_taken_along_an_estimate_whose_inner_solver_diverged() -> None:
    """g = (y - m)^2 / 2 of the targets' mean m, times 50 on some batches, where the step 0.05 is too long."""

    class Steep(AbstractTasks):
        def __init__(self, steep: set[int]) -> None:
            self.seeds = {seed_of_step(0, step) for step in steep}

        def sample(self, count: int, seed: int) -> dict[str, Tensor]:
            scale = 50.0 if seed in self.seeds else 1.0
            return {**Sinusoid().sample(count, seed), "scale": torch.full((count,), scale)}

    problem = BilevelProblem(
        f=lambda x, y, task: (y - task["query_y"]).square().mean(),
        g=lambda x, y, task: task["scale"] * (y - task["support_y"]).square().mean() / 2 + (y - x).square() / 2,
        init=lambda x, task: x,
        tasks=True,
    )
    inner = Iterate(GradientDescent(0.05), max_steps=60)
    learner = dataclasses.replace(prior_mean(), problem=problem, x0=torch.tensor(3.0), estimator=AID(inner, CG()))
    trained = train(learner, Steep({1, 4}), max_steps=6, batch=2, outer=Adam(0.1))
    assert trained.failed == {"diverged": 2} and trained.skipped == 2
    again = train(learner, Steep(set()), max_steps=6, batch=2, outer=Adam(0.1))
    assert again.skipped == 0 and float(again.x) < float(trained.x) < 3  # two steps fewer


def test_nan_ends_the_run_and_the_best_x_is_kept() -> None:
    def f(x: Tensor, y: Tensor, task: Any) -> Tensor:
        return -(x + torch.where(x > 2, torch.nan, 0.0) + 0 * y)

    learner = dataclasses.replace(prior_mean(f), x0=torch.tensor(0.0))
    with pytest.raises(BilevelError) as raised:
        train(
            learner,
            Sinusoid(),
            max_steps=9,
            batch=2,
            outer=GradientDescent(1.0),
            validation=Validating(Sinusoid(), every=1),
        )
    trained = raised.value.partial
    assert trained.ended == "failed"
    assert trained.failed == {"nonfinite": 7} and trained.skipped == 7
    assert "NaN" in trained.message
    assert [v.step for v in trained.validations] == list(range(10))
    assert trained.x.isfinite()


def test_the_learned_start_loads_into_the_users_module(tmp_path: Path) -> None:
    module = mlp((1, 8, 1), seed=7)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trained = train(maml(module, mse_loss), Sinusoid(), max_steps=2, batch=2, outer=Adam(0.1), out=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    fresh = mlp((1, 8, 1))
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert same(dict(fresh.named_parameters()), trained.x)
    fresh.load_state_dict(trained.module().state_dict())
    assert not torch.equal(fresh.state_dict()["0.weight"], before["0.weight"])


def test_what_a_learner_draws_depends_on_the_seed_and_the_step_only() -> None:
    drawn: list[int] = []

    def prepare(batch: Any, seed: int) -> Any:
        drawn.append(seed)
        return batch

    learner = dataclasses.replace(regression(), prepare=prepare)
    train(learner, Sinusoid(), max_steps=3, batch=2, seed=1)
    first = list(dict.fromkeys(drawn))
    drawn.clear()
    train(learner, Sinusoid(), max_steps=3, batch=2, seed=1)
    assert first == list(dict.fromkeys(drawn))
    assert len(first) == 4
    drawn.clear()
    train(learner, Sinusoid(), max_steps=3, batch=2, seed=2)
    assert not set(first) & set(drawn)


def test_chunks_change_nothing_but_rounding() -> None:
    runs = [
        train(regression(), Sinusoid(), max_steps=3, batch=5, outer=OuterLoop(chunk_size=size)) for size in (None, 2)
    ]
    for a, b in zip(*(tree_leaves(run.x) for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_batches_move_to_the_dtype_of_x_and_labels_stay_integers() -> None:
    learner = maml(mlp((2, 4, 3)).float(), cross_entropy, step=0.5)
    found = adapt(learner, learner.x0, Blobs().sample(2, 0))
    assert found.batch["support_x"].dtype == torch.float32
    assert found.batch["support_y"].dtype == torch.int64
    assert predict(learner, learner.x0, found).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: train(regression(), Sinusoid(), max_steps=-1), "max_steps"),
        (lambda: train(regression(), Sinusoid(), max_steps=1, batch=0), "batch"),
        (lambda: train(regression(), Sinusoid(), max_steps=1, batch=2.5), "must be an integer"),  # type: ignore[arg-type]
        (lambda: Validating(Sinusoid(), every=0), "every"),
        (lambda: Validating(Sinusoid(), episodes=0), "episodes"),
        (lambda: Validating(Sinusoid(), patience=0), "patience"),
        (lambda: OuterLoop(seconds=0.0), "seconds"),
        (lambda: Saving("here", every=0), "every"),
        (lambda: Reporting(score_every=0), "score_every"),
        (lambda: Training(max_steps=-1), "max_steps"),
        (lambda: Training(batch=0), "batch"),
    ],
)
def test_senseless_settings_are_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: OuterLoop("adam"), "an optimizer such as"),  # type: ignore[arg-type]
        (lambda: Validating(Sinusoid(), learner=Sinusoid()), "a `Learner`"),  # type: ignore[arg-type]
        (lambda: Saving(3), "must be a path. Got 3"),  # type: ignore[arg-type]
        (lambda: Reporting(3), "a function of the `Progress`"),  # type: ignore[arg-type]
        (lambda: train(regression(), Sinusoid(), max_steps=1, validation=3), "validation"),  # type: ignore[arg-type]
        (lambda: train(regression(), Sinusoid(), max_steps=1, steps=3), "unexpected keyword argument 'steps'"),  # type: ignore[call-arg]
    ],
)
def test_settings_of_other_types_are_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        make()


def test_ungrouped_keywords_are_the_groups_and_say_so(tmp_path: Path) -> None:
    told: dict[str, list[float | None]] = {"old": [], "new": []}

    def old(max_steps: int, resume: bool) -> Any:
        keywords: dict[str, Any] = {
            "outer": Adam(0.02),
            "schedule": Cosine(6),
            "estimator": "itd",
            "constraint": None,
            "chunk_size": 2,
            "seconds": 1e6,
            "throw": True,
            "validation": Sinusoid(),
            "validation_learner": regression(3),
            "validate_every": 2,
            "validate_episodes": 5,
            "patience": 2,
            "out": tmp_path / "old",
            "resume": resume,
            "checkpoint_every": 2,
            "callback": lambda progress: told["old"].append(progress.score),
            "score_every": 2,
        }
        return train(regression(), Sinusoid(), max_steps=max_steps, batch=3, **keywords)

    def new(max_steps: int, resume: bool) -> Any:
        return train(
            regression(),
            Sinusoid(),
            max_steps=max_steps,
            batch=3,
            outer=OuterLoop(Scheduled(Adam(0.02), Cosine(6)), "itd", chunk_size=2, seconds=1e6, throw=True),
            validation=Validating(Sinusoid(), every=2, episodes=5, patience=2, learner=regression(3)),
            out=Saving(tmp_path / "new", every=2, resume=resume),
            callback=Reporting(lambda progress: told["new"].append(progress.score), score_every=2),
        )

    with pytest.warns(
        DeprecationWarning, match=r"validate_every=.*write `train\(outer=OuterLoop\(optimizer=Scheduled\("
    ):
        runs = [old(3, False), old(6, True), new(3, False), new(6, True)]
    for before, now in ((runs[0], runs[2]), (runs[1], runs[3])):
        assert before.ended == now.ended
        assert [record.value for record in before.history] == [record.value for record in now.history]
        assert [v.score for v in before.validations] == [v.score for v in now.validations]
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before.x), tree_leaves(now.x), strict=True))
    assert told["old"] == told["new"]
    with pytest.warns(DeprecationWarning, match="validation_learner"):  # a run of the old form goes on in the new one
        again = old(7, True)
    assert again.history[0].value == runs[0].history[0].value


@pytest.mark.parametrize(("keyword", "text"), [({"patience": 2}, "`validation=`"), ({"resume": True}, "`out=`")])
def test_ungrouped_keywords_of_nothing_say_what_they_need(keyword: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"needs {text}"):
        train(regression(), Sinusoid(), max_steps=1, **keyword)
    with pytest.warns(DeprecationWarning, match="checkpoint_every"):  # without a folder it said nothing
        train(regression(), Sinusoid(), max_steps=1, batch=2, checkpoint_every=5)  # type: ignore[call-arg]


def test_resuming_what_was_never_begun_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(regression(), Sinusoid(), max_steps=1, out=Saving(tmp_path, resume=True))


def test_scores_of_another_learner_are_refused_on_resuming(tmp_path: Path) -> None:
    train(regression(), Sinusoid(), max_steps=1, batch=2, out=tmp_path, validation=Validating(Sinusoid(), episodes=2))
    with pytest.raises(ValueError, match="structure"):
        train(classification(), Blobs(), max_steps=1, batch=2, out=Saving(tmp_path, resume=True), validation=Blobs())
    (tmp_path / "best.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not readable"):
        train(regression(), Sinusoid(), max_steps=1, batch=2, out=Saving(tmp_path, resume=True), validation=Sinusoid())


# Evaluation


def test_a_score_is_the_mean_with_its_interval() -> None:
    values = torch.tensor([0.2, 0.9, 0.4, 0.7])
    found = Score.of(values)
    mean = sum(values.tolist()) / 4
    spread = math.sqrt(sum((value - mean) ** 2 for value in values.tolist()) / 3)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.interval == pytest.approx(1.96 * spread / 2, rel=1e-12)
    assert math.isnan(Score.of(values[:1]).interval)


def test_evaluation_is_a_loop_over_tasks() -> None:
    learner, x = classification(), dict(classification().x0)
    found = evaluate(learner, x, Blobs(), episodes=6, batch=6, seed=4)
    tasks = Recorded(Blobs())
    evaluate(learner, x, tasks, episodes=6, batch=6, seed=4)
    sampled = Blobs().sample(*tasks.calls[0])
    net = functional(mlp((2, 8, 3)))
    accuracies, before, losses = [], [], []
    for k in range(6):
        y = x
        support_x, support_y, query_x, query_y = (
            sampled[key][k] for key in ("support_x", "support_y", "query_x", "query_y")
        )
        before.append((net(y, query_x).argmax(-1) == query_y).double().mean())
        for _ in range(2):
            leaves = {name: value.detach().requires_grad_() for name, value in y.items()}
            gradients = torch.autograd.grad(cross_entropy(net(leaves, support_x), support_y), list(leaves.values()))
            y = {name: leaves[name].detach() - 0.5 * g for name, g in zip(leaves, gradients, strict=True)}
        accuracies.append((net(y, query_x).argmax(-1) == query_y).double().mean())
        losses.append(cross_entropy(net(y, query_x), query_y))
    assert found.metric == "accuracy"
    torch.testing.assert_close(found.scores, torch.stack(accuracies), rtol=0, atol=1e-12)
    assert found.before.mean == pytest.approx(float(torch.stack(before).mean()), abs=1e-12)
    assert found.loss.mean == pytest.approx(float(torch.stack(losses).mean()), rel=1e-10)
    assert found.score == Score.of(torch.stack(accuracies))
    assert found.log_probabilities is not None
    assert found.targets is not None
    assert len(found.log_probabilities) == len(found.targets) == 6 * 12
    assert found.stats.gradients > 0


def test_the_curve_is_the_score_after_other_numbers_of_steps_on_the_same_tasks() -> None:
    learner = regression()
    found = evaluate(learner, learner.x0, Sinusoid(), episodes=8, batch=3, curve=(3, 0, 1))
    assert list(found.curve) == [0, 1, 3]
    assert found.curve[0] == found.before
    assert found.curve[1] == found.score
    three = evaluate(learner, learner.x0, Sinusoid(), episodes=8, batch=3, steps=3)
    assert three.score == found.curve[3]
    assert three.score.mean < found.score.mean < found.before.mean
    least = dataclasses.replace(learner, adapt=Iterate(GradientDescent(0.05), 5, tol=1e-12, min_steps=4))
    assert evaluate(least, learner.x0, Sinusoid(), episodes=8, batch=3, steps=1).score == found.score


def test_evaluation_draws_as_many_tasks_as_asked_for_and_repeats_them() -> None:
    tasks = Recorded(Sinusoid())
    learner = regression()
    first = evaluate(learner, learner.x0, tasks, episodes=7, batch=3, seed=1)
    assert [count for count, _ in tasks.calls] == [3, 3, 1]
    assert len({seed for _, seed in tasks.calls}) == 3
    assert torch.equal(evaluate(learner, learner.x0, tasks, episodes=7, batch=3, seed=1).scores, first.scores)
    assert not torch.equal(evaluate(learner, learner.x0, tasks, episodes=7, batch=3, seed=2).scores, first.scores)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), partial(cross_entropy), lambda output, target: cross_entropy(output, target)]
)
def test_the_loss_of_classes_is_that_of_probabilities_however_the_cross_entropy_is_written(loss: Any) -> None:
    module = mlp((2, 3), seed=1)
    by_function, by_other = maml(module, cross_entropy), maml(module, loss)
    expected = evaluate(by_function, by_function.x0, Blobs(), episodes=10)
    found = evaluate(by_other, by_other.x0, Blobs(), episodes=10)
    assert found.loss.mean == pytest.approx(expected.loss.mean, rel=1e-6)
    assert found.log_probabilities is not None
    torch.testing.assert_close(found.log_probabilities.exp().sum(-1), torch.ones(len(found.log_probabilities)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda batch: {key: batch[key] for key in batch if key != "support_y"}, "a batch of tasks needs support_x"),
        (lambda batch: {key: entry[:, :0] for key, entry in batch.items()}, "a task needs examples"),
        (lambda batch: {**batch, "support_y": batch["support_y"][:, 1:]}, "must agree in tasks and examples"),
    ],
)
def test_malformed_tasks_are_refused(change: Any, text: str) -> None:
    @final
    @dataclass(frozen=True)
    class Malformed(AbstractTasks):
        def sample(self, count: int, seed: int) -> Batch:
            changed: Batch = change(Blobs().sample(count, seed))
            return changed

    learner = imaml(mlp((2, 3)), cross_entropy)
    with pytest.raises(ValueError, match=text):
        train(learner, Malformed(), max_steps=1)
    with pytest.raises(ValueError, match=text):
        evaluate(learner, learner.x0, Malformed(), episodes=1)


def test_what_is_no_learner_no_source_and_no_x_is_refused() -> None:
    learner, wrong = maml(mlp((2, 3)), cross_entropy), Blobs().sample(2, 0)
    with pytest.raises(TypeError, match=r"`train\(learner=...\)` must be a `Learner`.*Got Sequential"):
        train(mlp(), Blobs(), max_steps=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`train\(tasks=...\)` must be a source of tasks.*Got dict"):
        train(learner, wrong, max_steps=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`train\(validation=...\)` must be a source"):
        train(learner, Blobs(), max_steps=1, validation=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`evaluate\(tasks=...\)` must be a source"):
        evaluate(learner, learner.x0, wrong, episodes=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"structure of `learner.x0`.*Got Sequential"):
        evaluate(learner, mlp((2, 3)), Blobs(), episodes=1)


@pytest.mark.parametrize("method", ["maml", "proto_net", "svm_head", "ridge_head"])
def test_labels_may_be_any_integers(method: str) -> None:
    @final
    @dataclass(frozen=True)
    class Short(AbstractTasks):
        def sample(self, count: int, seed: int) -> Batch:
            batch = Blobs().sample(count, seed)
            return {**batch, "support_y": batch["support_y"].int(), "query_y": batch["query_y"].int()}

    torch.manual_seed(0)
    body = nn.Linear(2, 3)
    learner = {
        "maml": maml(body, cross_entropy),
        "proto_net": proto_net(body, 3, 3),
        "svm_head": svm_head(body, 3, 3, 6),
        "ridge_head": ridge_head(body, 3, 3),
    }[method]
    expected, found = (train(learner, tasks, max_steps=1, batch=2) for tasks in (Blobs(), Short()))
    assert found.history[-1].value == pytest.approx(expected.history[-1].value, rel=1e-6)
    scores = [evaluate(learner, found.x, tasks, episodes=5) for tasks in (Blobs(), Short())]
    assert scores[0].loss == scores[1].loss


def test_padded_queries_do_not_count() -> None:
    learner, source = classification(), Blobs(ragged=True)
    found = evaluate(learner, learner.x0, source, episodes=4, batch=4)
    tasks = Recorded(source)
    evaluate(learner, learner.x0, tasks, episodes=4, batch=4)
    sampled = source.sample(*tasks.calls[0])
    output = predict(learner, learner.x0, adapt(learner, learner.x0, sampled))
    right = (output.argmax(-1) == sampled["query_y"]) & (sampled["query_mask"] > 0)
    torch.testing.assert_close(found.scores, right.sum(1) / sampled["query_mask"].sum(1))
    assert found.targets is not None
    assert len(found.targets) == int(sampled["query_mask"].sum())


def test_adaptations_that_fail_are_counted_by_task() -> None:
    inner = Iterate(GradientDescent(0.2), max_steps=5, tol=1e-1)
    learner = dataclasses.replace(prior_mean(), adapt=inner)
    found = evaluate(learner, learner.x0, Sinusoid(), episodes=30)
    solved = adapt(learner, learner.x0, Sinusoid().sample(30, 0))
    assert set(found.failed) <= {"max_steps", "diverged"}
    assert len(solved.statuses) == 30
    fine = evaluate(dataclasses.replace(learner, adapt=Iterate(GradientDescent(0.05), 500, tol=1e-8)), learner.x0,
                    Sinusoid(), episodes=30)  # fmt: skip
    assert sum(found.failed.values()) > 0
    assert fine.failed == {}


@pytest.mark.parametrize("bad", [20.0, math.inf])
def test_tasks_whose_adaptation_diverges_are_scored_counted_and_told_apart(bad: float) -> None:
    """g = c (y - m)^2 / 2 + ...; c is 1, and `bad` on the third of each four tasks, where steps of 0.2 diverge."""

    @final
    @dataclass(frozen=True)
    class Quarter(AbstractTasks):
        def sample(self, count: int, seed: int) -> dict[str, Tensor]:
            c = torch.where(torch.arange(count) % 4 == 2, bad, 1.0)
            return {**Sinusoid(queries=3).sample(count, seed), "c": c}

    problem = BilevelProblem(
        f=lambda x, y, task: (y - task["query_y"]).square().mean(),
        g=lambda x, y, task: task["c"] * (y - task["support_y"]).square().mean() / 2 + (y - x).square() / 2,
        tasks=True,
    )
    learner = dataclasses.replace(prior_mean(), problem=problem, adapt=Iterate(GradientDescent(0.2), 60))
    found = evaluate(learner, learner.x0, Quarter(), episodes=40)
    rest = torch.arange(40) % 4 != 2
    assert found.lost == 10 and sum(found.failed.values()) == 10
    assert found.settled is not None
    assert found.settled.mean == pytest.approx(float(found.scores[rest].double().mean()))
    assert found.as_dict()["settled"]["mean"] == found.settled.mean
    assert not found.score.mean < 1e3 * found.settled.mean  # larger, or NaN
    whole = evaluate(dataclasses.replace(learner, adapt=Iterate(GradientDescent(0.02), 60)), learner.x0, Sinusoids())
    assert whole.lost == 0 and whole.settled == whole.score


@final
@dataclass(frozen=True)
class Sinusoids(AbstractTasks):
    def sample(self, count: int, seed: int) -> dict[str, Tensor]:
        return {**Sinusoid(queries=3).sample(count, seed), "c": torch.ones(count)}


def test_predictions_that_are_not_numbers_are_wrong() -> None:
    batch = {"query_y": torch.zeros(1, 3, dtype=torch.long)}
    predictions = torch.tensor([[[0.0, -1.0], [math.nan, math.nan], [-1.0, 0.0]]])
    assert float(score_tasks(predictions, batch)) == pytest.approx(1 / 3)


def test_minimize_skips_only_where_another_batch_comes() -> None:
    learner = prior_mean()
    batch = Sinusoid().sample(2, 0)
    options: dict[str, Any] = {"estimator": learner.estimator, "max_steps": 1}
    for wrong in ({"data": batch}, {"throw": False}, {"data": batch, "throw": False, "skip": -1}):
        with pytest.raises(ValueError, match=r"`minimize\(skip=\.\.\.\)`"):
            minimize(learner.problem, learner.x0, learner.y0, **{"skip": 2, **options, **wrong})
    assert minimize(learner.problem, learner.x0, learner.y0, data=batch, throw=False, skip=2, **options).status.ok


def test_adaptation_reads_no_query_target() -> None:
    learner = classification()
    batch = Blobs().sample(3, 0)
    other = {**batch, "query_y": (batch["query_y"] + 1) % 3}
    assert same(adapt(learner, learner.x0, batch).y, adapt(learner, learner.x0, other).y)


def test_adapted_variables_are_those_of_the_estimator() -> None:
    learner, batch = regression(3), Sinusoid().sample(4, 0)
    found = hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=batch)
    adapted = adapt(learner, learner.x0, batch)
    for a, b in zip(*(tree_leaves(y) for y in (adapted.y, found.y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_steps_need_an_iteration_and_predictions_the_shape_of_the_targets() -> None:
    learner = prior_mean()
    with pytest.raises(ValueError, match="ClosedForm"):
        evaluate(learner, learner.x0, Sinusoid(), episodes=2, steps=2)
    with pytest.raises(ValueError, match="at least 0"):
        evaluate(regression(), regression().x0, Sinusoid(), episodes=2, steps=-1)
    wrong = dataclasses.replace(regression(), predict=lambda x, y, task: torch.zeros(3))
    with pytest.raises(ValueError, match="one value for each query target"):
        evaluate(wrong, wrong.x0, Sinusoid(), episodes=2)
    wrong = dataclasses.replace(classification(), predict=lambda x, y, task: torch.zeros(3))
    with pytest.raises(ValueError, match="log-probabilities"):
        evaluate(wrong, wrong.x0, Blobs(), episodes=2)
    with pytest.raises(ValueError, match="episodes"):
        evaluate(learner, learner.x0, Sinusoid(), episodes=0)


def test_test_tasks_are_untouched_until_the_final_evaluation() -> None:
    parts = [Recorded(Sinusoid()) for _ in range(3)]
    experiment = Experiment(
        regression(),
        parts[0],
        Validating(parts[1], every=2, episodes=3),
        parts[2],
        settings=Training(max_steps=4, batch=2),
        evaluation=Evaluating(episodes=4),
    )
    trained = experiment.train(seed=5)
    assert parts[0].calls
    assert parts[1].calls
    assert not parts[2].calls
    experiment.evaluate(trained.x, seed=5)
    seeds = [{seed for _, seed in part.calls} for part in parts]
    assert seeds[2]
    assert not seeds[0] & seeds[1]
    assert not (seeds[0] | seeds[1]) & seeds[2]


def test_experiments_of_mappings_are_those_of_values_and_say_so(tmp_path: Path) -> None:
    parts = (regression(), Sinusoid(), Sinusoid(), Sinusoid())
    settings: Any = {"max_steps": 4, "batch": 2, "validate_every": 2, "outer": Adam(0.1), "schedule": Cosine(4)}
    evaluation: Any = {"episodes": 4, "curve": (0,)}
    with pytest.warns(DeprecationWarning, match=r"write `Experiment\((settings=Training|evaluation=Evaluating)"):
        old = Experiment(
            *parts, settings=settings | {"checkpoint_every": 2}, evaluation=evaluation, tester=regression(3)
        )
    new = Experiment(
        *parts[:2],
        Validating(Sinusoid(), every=2),
        Sinusoid(),
        settings=Training(4, 2, Scheduled(Adam(0.1), Cosine(4)), checkpoint_every=2),
        evaluation=Evaluating(4, curve=(0,)),
        tester=regression(3),
    )
    assert old.settings.checkpoint_every == new.settings.checkpoint_every
    found = [each.train(1) for each in (old, new)]
    assert [record.value for record in found[0].history] == [record.value for record in found[1].history]
    assert found[0].validations[1].score == found[1].validations[1].score
    assert len(found[0].validations) == len(found[1].validations) == 3
    tester = Validating(Sinusoid(), every=2, learner=regression(3))
    direct = train(regression(), Sinusoid(), max_steps=4, batch=2, seed=1, outer=new.settings.outer, validation=tester)
    assert [v.score for v in direct.validations] == [v.score for v in found[1].validations]
    assert torch.equal(*(each.evaluate(found[1].x, 1).scores for each in (old, new)))

    told: list[int] = []
    changes: Any = {"max_steps": 3, "outer": Adam(0.2), "validate_every": 3, "out": tmp_path, "resume": False}
    changes |= {"callback": lambda progress: told.append(progress.record.step)}
    with pytest.warns(DeprecationWarning, match=r"write `replace\(experiment"):
        changed = new.train(1, changes)
    loop = dataclasses.replace(new.settings, max_steps=3, outer=Adam(0.2))
    other = dataclasses.replace(new, settings=loop, validation=Validating(Sinusoid(), every=3))
    again = other.train(1, out=tmp_path / "again")
    assert [record.value for record in changed.history] == [record.value for record in again.history]
    assert [v.step for v in changed.validations] == [v.step for v in again.validations] == [0, 3]
    assert told == [0, 1, 2, 3]
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "best.pt", "model.pt", "again"}
    with pytest.warns(DeprecationWarning, match=r"write `replace\(experiment, evaluation"):
        few = new.evaluate(again.x, 1, {"episodes": 2})
    assert few.episodes == 2
    assert list(few.curve) == [0]
    with pytest.warns(DeprecationWarning, match="settings"), pytest.raises(TypeError, match="cannot hold out"):
        Experiment(*parts, settings=settings | {"out": tmp_path})
    with pytest.warns(DeprecationWarning, match="changes"), pytest.raises(TypeError, match="no argument 'steps'"):
        new.train(1, {"steps": 3})


# Schedules and clipping


def test_a_schedule_scales_the_step_length() -> None:
    schedule = StepDecay((2, 3), factor=0.1)
    for make in (Adam, GradientDescent, lambda step: HeavyBall(step, 0.0)):
        wrapped, y = Scheduled(make(0.5), schedule), torch.tensor([1.0, -2.0])
        state, plain = wrapped.init(y), make(0.5).init(y)
        reference = y
        for k in range(5):
            gradient = torch.tensor([0.3, -1.0]) * (k + 1)
            y, state = wrapped.step(gradient, y, state)
            moved, plain = make(0.5).step(gradient, reference, plain)
            reference = reference + schedule(k) * (moved - reference)
            torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-14)


def test_a_constant_schedule_and_a_wide_clip_change_no_bit() -> None:
    plain = train(regression(), Sinusoid(), max_steps=3, batch=2, outer=Adam(0.01))
    wrapped = train(
        regression(),
        Sinusoid(),
        max_steps=3,
        batch=2,
        outer=Scheduled(Clipped(Adam(0.01), max_norm=1e9, max_value=1e9), lambda step: 1.0),
    )
    assert same(plain.x, wrapped.x)


def test_clipping_bounds_the_gradient_row_by_row_and_hides_no_nan() -> None:
    y, gradient = torch.zeros(3, 2), torch.tensor([[3.0, 4.0], [0.3, 0.4], [math.nan, 1.0]])
    moved = Clipped(GradientDescent(1.0), max_norm=1.0).step(gradient, y, {})[0]
    torch.testing.assert_close(moved[:2], -torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    assert moved[2].isnan().any()
    infinite = torch.tensor([[math.inf, 5.0]])
    moved = Clipped(GradientDescent(1.0), max_value=2.0).step(infinite, torch.zeros(1, 2), {})[0]
    assert moved.tolist() == [[-math.inf, -2.0]]


def test_cosine_falls_from_one_to_the_floor_after_a_warm_up() -> None:
    cosine = Cosine(steps=10, floor=0.2, warmup=3)
    values = [cosine(k) for k in range(20)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[3:14] == sorted(values[3:14], reverse=True)
    assert values[8] == pytest.approx(0.6)
    assert values[13:] == pytest.approx([0.2] * 7)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Clipped(Adam(0.1)), ValueError, "max_norm=` or `max_value"),
        (lambda: Clipped(Adam(0.1), max_norm=0.0), ValueError, "must be positive"),
        (lambda: Clipped(wrong, max_norm=1.0), TypeError, "must be an optimizer"),
        (lambda: Scheduled(wrong, Cosine(2)), TypeError, "must be an optimizer"),
        (lambda: Scheduled(Adam(0.1), wrong), TypeError, "must be a function"),
        (lambda: Cosine(0), ValueError, r"steps=...\)` must be at least 1"),
        (lambda: Cosine(2, floor=2.0), ValueError, "floor"),
        (lambda: StepDecay(0), ValueError, r"milestones=...\)` must be at least 1"),
    ],
)
def test_senseless_wrappers_are_refused(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


# Networks


def test_networks_have_the_features_they_say_and_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    for filters, blocks, size in ((4, 4, 28), (3, 3, 8), (2, 2, 7)):
        body = conv_net(filters, blocks=blocks, size=size)
        assert body(torch.zeros(2, 1, size, size)).shape == (2, features(filters, blocks, size))
    weights = [list(conv_net(2, seed=seed).parameters()) for seed in (1, 1, 2)]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="filters"):
        conv_net(0)
    with pytest.raises(ValueError, match="inputs and outputs"):
        mlp((3,))


# TensorBoard


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ImportError, match=r'pip install "bilevel\[tensorboard\]"'):
        train(regression(), Sinusoid(), max_steps=1, callback=Reporting(tensorboard=tmp_path))


def test_scalars_are_those_of_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[tuple[str, int], float] = {}
    closed: list[str] = []

    @final
    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name, step] = value

        def close(self) -> None:
            closed.append(self.folder)

    for name in ("torch.utils.tensorboard", "torch.utils.tensorboard.writer"):
        stub = types.ModuleType(name)
        stub.__dict__["SummaryWriter"] = Writer
        monkeypatch.setitem(sys.modules, name, stub)
    trained = train(
        regression(),
        Sinusoid(),
        max_steps=4,
        batch=2,
        validation=Validating(Sinusoid(), every=3, episodes=2),
        callback=Reporting(score_every=2, tensorboard=tmp_path),
    )
    assert closed == [str(tmp_path)]
    for record in trained.history:
        assert written["outer/loss", record.step] == record.value
        assert written["outer/gradient_norm", record.step] == record.grad_norm
    assert {step for name, step in written if name == "batch/score"} == {0, 2, 4}
    for validation in trained.validations:
        assert written["validation/mse", validation.step] == validation.score
