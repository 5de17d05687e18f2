"""Few-shot training and evaluation over ranks: the trajectory, scores and files of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import on_ranks
from torch import Tensor
from torch.nn.functional import mse_loss

from bilevel import BilevelError
from bilevel.few_shot import OuterLoop, Progress, Saving, Validating, evaluate, mlp, train
from bilevel.few_shot.learner import Learner
from bilevel.problems.meta_learning.imaml import imaml
from bilevel.problems.meta_learning.maml import maml
from bilevel.ranks import Ranks
from bilevel.solvers import Adam, GradientDescent, Iterate
from bilevel.tasks import Sinusoid

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

P = 1 * 6 + 6 + 6 + 1


def _learners() -> dict[str, Learner]:
    torch.manual_seed(0)
    net = mlp([1, 6, 1]).double()
    steps = Iterate(GradientDescent(0.05), max_steps=3)
    return {
        "maml": maml(net, mse_loss, step=0.05, inner_steps=2),
        "imaml": imaml(net, mse_loss, regularization=2.0, inner=steps, linear_steps=3),
    }


def _train(name: str, group: Any = None, steps: int = 3, **more: Any) -> Any:
    loop = OuterLoop(Adam(1e-2), chunk_size=2 if name == "maml" else None)
    validation = Validating(Sinusoid(), every=2, episodes=7)
    return train(
        _learners()[name],
        Sinusoid(),
        **{"max_steps": steps, "batch": 5, "outer": loop, "validation": validation, "group": group, **more},
    )


def _flat(x: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in x.values()])


def _all(group: Any, rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, learner in _learners().items():
        scores: list[float | None] = []

        def told(progress: Progress, scores: list[float | None] = scores) -> None:
            scores.append(progress.score)

        trained = _train(name, group, callback=told)
        ranks = Ranks(group)
        test = evaluate(learner, trained.x, Sinusoid(), episodes=7, batch=3, curve=(0, 1), group=ranks)
        values = [record.value for record in trained.history]
        validations = [validation.score for validation in trained.validations]
        curve = {steps: score.mean for steps, score in test.curve.items()}
        numbers = test.score.mean, test.score.interval, test.before.mean, curve, test.episodes, test.stats
        found[name] = _flat(trained.last), values, validations, scores, numbers, ranks.messages
    costs = []
    for steps in (2, 4):
        ranks = Ranks(group)
        _train("maml", ranks, steps, validation=None)
        costs.append((ranks.messages, ranks.floats))
    found["a step"] = [(b - a) / 2 for a, b in zip(*costs, strict=True)]
    place = folder / "run"
    _train("maml", group, 2, out=Saving(place, every=2))
    resumed = _train("maml", group, 4, out=Saving(place, every=2, resume=True))
    found["resumed"] = torch.equal(_flat(resumed.last), _flat(_train("maml", group, 4).last))
    found["files"] = sorted(path.name for path in place.iterdir() if not path.name.startswith("."))

    def raised(**more: Any) -> Any:
        try:
            return _train("maml", group, **more)
        except Exception as error:
            return type(error).__name__, str(error)

    found["seed"] = raised(seed=rank)
    found["validation"] = raised(validation=Validating(Sinusoid(), every=2, episodes=7 + rank))
    found["stopped"] = _train("maml", group, 9, callback=lambda progress: rank == 0 and progress.record.step == 1).ended
    found["time"] = _train("maml", group, 9, outer=OuterLoop(seconds=1e-9)).history[-1].step

    def fails(progress: Progress) -> None:
        raise KeyError("mine")

    found["failing"] = raised(callback=fails)
    learner = _learners()["maml"]

    def predict(x: Any, y: Any, task: Any) -> Tensor:
        if rank == 1:
            raise KeyError("mine")
        return learner.predict(x, y, task)

    try:
        found["evaluation"] = evaluate(
            replace(learner, predict=predict), learner.x0, Sinusoid(), episodes=4, group=group
        )
    except (BilevelError, KeyError) as error:
        found["evaluation"] = type(error).__name__, str(error)
    return found


def test_training_and_evaluation_over_two_ranks_are_those_of_one_with_the_same_bits_on_both(tmp_path: Path) -> None:
    first, second = on_ranks(2, lambda group, rank: _all(group, rank, tmp_path))
    for found in (first, second):
        if isinstance(found, Exception):
            raise found
    for name, learner in _learners().items():
        scores: list[float | None] = []
        trained = _train(name, callback=lambda progress, scores=scores: scores.append(progress.score))
        test = evaluate(learner, trained.x, Sinusoid(), episodes=7, batch=3, curve=(0, 1))
        x, values, validations, told, numbers, messages = first[name]
        assert torch.equal(x, second[name][0]) and values == second[name][1]
        assert torch.allclose(x, _flat(trained.last), rtol=0, atol=1e-12), name
        assert values == pytest.approx([record.value for record in trained.history], abs=1e-12)
        assert validations == pytest.approx([validation.score for validation in trained.validations], abs=1e-11)
        assert told == pytest.approx(scores, abs=1e-12) and second[name][3] == []
        assert numbers[0] == second[name][4][0] == pytest.approx(test.score.mean, abs=1e-11)
        assert numbers[1] == pytest.approx(test.score.interval, abs=1e-11) and numbers[4] == 7
        assert numbers[2] == pytest.approx(test.before.mean, abs=1e-11) and numbers[5] == test.stats
        assert numbers[3] == pytest.approx({k: score.mean for k, score in test.curve.items()}, abs=1e-11)
        assert messages == 1
    for found in (first, second):
        assert found["a step"] == [1, P + 5 + 3 * 2] and found["resumed"]
        assert (
            found["seed"][0] == "ValueError" and "`train(group=...)`" in found["seed"][1] and "seed" in found["seed"][1]
        )
        assert found["validation"][0] == "ValueError" and "episodes" in found["validation"][1]
        assert found["stopped"] == "callback" and found["time"] == 0
        assert found["files"] == ["best.pt", "checkpoint.pt", "model.pt"]
    assert first["evaluation"][0] == "BilevelError" and "rank 1 (KeyError: 'mine')" in first["evaluation"][1]
    assert second["evaluation"][0] == "KeyError"
    assert first["failing"][0] == "KeyError" and second["failing"][0] == "BilevelError"
