"""What worker processes import: functions with names, problems of them, and work that is the same everywhere."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import BilevelError, BilevelProblem, Status, hypergradient, minimize
from bilevel.requirements.properties import DoesNotApply
from bilevel.tasks import Sinusoid, batches

x0 = {"a": torch.tensor([0.5, -0.3], dtype=torch.float64), "b": torch.tensor(0.2, dtype=torch.float64)}


class Inner(NamedTuple):
    """y."""

    u: Any
    w: Any


y0 = Inner(torch.zeros(2, dtype=torch.float64), [torch.zeros(3, dtype=torch.float64)])


def f(x: Any, y: Any) -> Tensor:
    """Smooth, and of all entries."""
    found: Tensor = (y.u - 1).square().sum() + (y.w[0] - x["b"]).cosh().sum()
    return found


def number(step: int) -> float:
    """Of a step."""
    return 1.0 / (1 + step)


def g(x: Any, y: Any) -> Tensor:
    """Strongly convex in y."""
    found: Tensor = (y.u - x["a"]).square().sum() + (y.w[0] - x["b"]).square().sum() + (y.u.sum() + y.w[0].sum()).cosh()
    return found


PROBLEM = BilevelProblem(f, g)
NAMES = ("implicit", "aid-dense", "aid-minres", "aid-neumann", "itd", "itd-truncated", "esj", "penalty")


def estimate(name: str) -> Any:
    """One hypergradient."""
    return hypergradient(PROBLEM, x0, y0, estimator=name, throw=False)


def run(name: str) -> Any:
    """A short run."""
    return minimize(PROBLEM, x0, y0, estimator=name, max_steps=3, throw=False)


def fail(_: int) -> Any:
    """A solver that does not get to its tolerance."""
    from bilevel import AID
    from bilevel.solvers import CG, LBFGS

    return hypergradient(PROBLEM, x0, y0, estimator=AID(LBFGS(1e-12, max_steps=1), CG()))


def fail_of_lambdas(_: int) -> Any:
    """The partial result of one whose f is a lambda, beside what no pickle takes."""
    raise BilevelError("it failed", Status.diverged, {"estimate": estimate("itd"), "hook": lambda: None})


class OwnError(Exception):
    """With arguments of its own."""

    def __init__(self, number: int) -> None:
        Exception.__init__(self, number)


def training_that_is_left(_: int) -> Any:
    """By an error of a callback, the learner being made of lambdas."""
    from bilevel.few_shot import train

    def leave(progress: Any) -> None:
        if progress.record.step == 2:
            raise OwnError(3)

    return train(lambdas(), Sinusoid(), max_steps=4, batch=2, callback=leave)


def training_that_fails(_: int) -> Any:
    """The same, by numbers that are none."""
    from bilevel.few_shot import OuterLoop, train
    from bilevel.solvers import GradientDescent

    return train(lambdas(), Sinusoid(), max_steps=9, batch=2, outer=OuterLoop(GradientDescent(1e200), skip=0))


def lambdas() -> Any:
    """A learner that no pickle takes."""
    from bilevel import ITD
    from bilevel.few_shot import Learner
    from bilevel.solvers import GradientDescent, Iterate

    problem = BilevelProblem(
        lambda x, y, task: (y - task["query_y"]).square().mean(),
        lambda x, y, task: (y - task["support_y"]).square().mean() / 2,
        init=lambda x, task: x,
        tasks=True,
    )
    inner, start = Iterate(GradientDescent(0.1), max_steps=1), torch.tensor(3.0)
    predict = lambda x, y, task: y.expand(task["query_y"].shape)  # noqa: E731
    return Learner("mean", problem, start, start, ITD(inner), inner, predict, lambda x: torch.nn.Identity())


def run_that_is_left(_: int) -> Any:
    """By an error of a callback, y being of a class that no module has."""
    kind: Any = namedtuple("kind", ["u", "w"])

    def leave(record: Any, _: Any) -> None:
        if record.step == 2:
            raise KeyError("left")

    return minimize(PROBLEM, x0, kind(*y0), estimator="itd", max_steps=3, callback=leave)


def does_not_apply(_: int) -> Any:
    """An error with an attribute."""
    raise DoesNotApply("it is what it is")


def lost(_: int) -> Any:
    """An estimate of a problem that cannot be pickled."""
    problem: Callable[..., Any] = lambda x, y: f(x, y)  # noqa: E731
    return hypergradient(BilevelProblem(problem, g), x0, y0)


class Tasks(torch.utils.data.Dataset[Any]):
    """Batches of tasks, one an index."""

    def __init__(self) -> None:
        self.draw = batches(Sinusoid(shots=3, queries=2, dtype=torch.float64), 4, seed=7)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, step: int) -> Any:
        return self.draw(step), estimate(NAMES[step]).to_dict()["grad"]


class Own(BilevelProblem):
    """A problem that carries its data."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.hook: Any = None

    def f(self, x: Any, y: Any, *_: Any) -> Tensor:
        """The distance to the data."""
        found: Tensor = (y - self.data).square().sum()
        return found

    def g(self, x: Any, y: Any, *_: Any) -> Tensor:
        """The distance to x."""
        found: Tensor = (y - x).square().sum()
        return found


def with_data(x: Any, y: Any, data: Any) -> Tensor:
    """A quadratic near the data."""
    found: Tensor = (y - x - data["d"]).square().sum()
    return found


def of_many(x: Any, y: Any) -> Tensor:
    """A quadratic of many leaves."""
    return torch.stack([(y[key] - x[key]).square().sum() for key in y]).sum()


def weights(seed: int) -> Tensor:
    """Of a network with a seed."""
    from bilevel.few_shot import mlp

    return next(mlp((3, 4, 1), seed=seed).parameters()).detach()


def collected(task: Any, params: Any, seed: int) -> Any:
    """Episodes, for those who are never asked for any."""
    return task, params, seed
