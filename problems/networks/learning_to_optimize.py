"""Learned optimizers by name: on quadratics beside Chebyshev's steps, on logistic regressions, on small networks."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SEED, SIZE
from bilevel.hypergrad.itd import ITD
from bilevel.hypergrad.unrolling.truncated import Truncated
from bilevel.problems._plots import COLORS
from bilevel.problems.networks.learned_optimizer import LearnedOptimizer
from bilevel.problems.networks.optimizees import LogisticBatches, Quadratics, SmallNetworks
from bilevel.problems.networks.update_rules import AbstractRule, CoordinateLSTM, LearnedPreconditioner, LearnedSteps
from bilevel.solvers.adam import Adam
from bilevel.solvers.clipped import Clipped
from bilevel.solvers.own_steps import OwnSteps
from bilevel.tasks.source import batches

On: TypeAlias = Literal["quadratics", "logistic", "networks"]
Rule: TypeAlias = Literal["step", "layer", "coordinate", "preconditioner", "lstm"]
LONGER = (1, 2, 5)  # times as many steps as were trained with
_TEST = 300  # tasks
_GRID = tuple(10.0 ** (k / 4) for k in range(-8, 6))  # of constant steps, the best of which is reported
_ROWS = {"quadratics": Quadratics, "logistic": LogisticBatches, "networks": SmallNetworks}


@checked(steps=SIZE, truncate=COUNT, rate=POSITIVE, batch=SIZE, max_steps=COUNT, seed=SEED)
def learning_to_optimize(
    *,
    on: On = "quadratics",
    rule: Rule = "step",
    steps: int = 8,
    truncate: int = 0,
    summed: bool = False,
    rate: float = 0.02,
    batch: int = 32,
    max_steps: int = 600,
    seed: int = 0,
) -> Instance:
    """An optimizer that is trained through N of its steps, and judged also on more of them than that.

    Every step of the run draws new tasks. f is the logarithm of the relative squared error of quadratics after N steps,
    or of what is above the least loss of logistic regressions, whose gradients come from batches; of networks it is the
    cross-entropy itself, whose logarithm would be learned on easy tasks alone. See :class:`LearnedOptimizer`.

    Metrics: on 300 new tasks the mean of that loss after N, 2 N and 5 N steps of the learned optimizer (`learned_8`,
    ...), of gradient descent with the constant step that is best after N among 14 (`constant_8`), and on quadratics
    of Chebyshev's N steps, repeated, which are the best in the worst case over the interval of curvatures; there also
    the largest factor by which N steps multiply the error at a curvature of the interval (`worst_...`).

    Args:
        on: "quadratics", "logistic" or "networks".
        rule: steps of each iteration ("step"), of each and each layer ("layer"), or coordinate ("coordinate"); a
            preconditioner, the same at each; or an LSTM for every coordinate ("lstm"). A preconditioner and a step for
            each coordinate make sense where coordinates mean the same in every task: not on quadratics.
        steps: N.
        truncate: differentiate the last K steps only; 0: all.
        summed: the mean of the losses after each step in the place of the last one.
        rate: the step length of Adam on x.
        batch: tasks of a step.
        max_steps: of a run.
        seed: of tasks, and of the LSTM.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> learning_to_optimize(steps=3).x0["all"].shape
        torch.Size([3])
    """
    source = _ROWS[on](dtype=torch.float64)
    start = (10.0, 1.0) if on == "quadratics" else (2.0, 2.0) if on == "logistic" else (0.5, 0.5)
    rules: dict[str, AbstractRule] = {
        "preconditioner": LearnedPreconditioner(start[1]),
        "lstm": CoordinateLSTM(seed=seed),
    }
    chosen = rules[rule] if rule in rules else LearnedSteps(steps, rule, start)  # type: ignore[arg-type]
    coefficients = (1.0 / steps,) * steps if summed else None
    logarithm = on != "networks"
    own = LearnedOptimizer(chosen, source.loss, steps, coefficients, logarithm, first_order=rule == "lstm")
    x0, y0 = own.start(source.sample(1, seed))
    shown = _Shown(own, on, source.sample(_TEST, seed + 2**20))
    return Instance(
        problem=own.problem,
        x0=x0,
        y0=y0,
        description=f"an optimizer for {on} ({rule}), trained through {steps} steps",
        metrics=shown.metrics,
        plot=shown.plot,
        settings={
            "estimator": ITD(OwnSteps(), Truncated(truncate)) if truncate else ITD(OwnSteps()),
            "outer": Clipped(Adam(rate), max_norm=1.0),
            "data": batches(source, batch, seed),
            "max_steps": max_steps,
        },
    )


def chebyshev(low: float, high: float, count: int) -> Tensor:
    """The N steps of which max |prod_k (1 - s_k a)| over a in [low, high] is least: `(N,)`, the longest last.

    The inverses of the roots of Chebyshev's polynomial on the interval; the maximum is 2 / (z^N + z^-N) with
    z = (r + 1) / (r - 1) and r the root of high / low.

    Example:
        >>> chebyshev(0.5, 1.5, 1)
        tensor([1.], dtype=torch.float64)
    """
    angles = math.pi * (2 * torch.arange(count, dtype=torch.float64, device="cpu") + 1) / (2 * count)
    return 2 / ((high + low) + (high - low) * angles.cos())


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution."""

    own: LearnedOptimizer
    on: On
    tests: Any

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, losses in ({"learned": self._losses(self.own, x)} | self.baselines).items():
            found |= {f"{name}_{k * self.own.steps}": float(losses[k * self.own.steps]) for k in LONGER}
        if self.on == "quadratics" and "all" in x:
            own = Quadratics()
            several = {"learned": x["all"].detach().exp(), "chebyshev": chebyshev(own.low, own.high, self.own.steps)}
            several["constant"] = torch.full_like(x["all"].detach(), 2 / (own.low + own.high))
            found |= {f"worst_{name}": _worst(steps, own) for name, steps in several.items()}
        return found

    @functools.cached_property
    def baselines(self) -> dict[str, Tensor]:
        """The mean loss after each number of steps."""
        known = {step: self._of_steps((step,)) for step in _GRID}
        end = self.own.steps
        best = min((losses for losses in known.values() if losses.isfinite().all()), key=lambda each: float(each[end]))
        found = {"constant": best}
        if self.on == "quadratics":
            low, high = Quadratics().low, Quadratics().high
            found["chebyshev"] = self._of_steps(tuple(chebyshev(low, high, end).tolist()))
        return found

    def plot(self, figure: Any, x: Tree, y: Tree) -> None:
        axes = figure.subplots(1, 1)
        several = {"learned": self._losses(self.own, x)} | self.baselines
        for k, (name, losses) in enumerate(several.items()):
            axes.plot(losses.tolist(), label=name, color=COLORS[k])
        axes.axvline(self.own.steps, color=COLORS[3], linestyle=":", label="trained until here")
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        axes.set_ylabel("mean loss of new tasks")
        axes.legend()
        figure.tight_layout()

    def _losses(self, own: LearnedOptimizer, x: Tree) -> Tensor:
        return own.trajectory(x, self.tests, LONGER[-1] * self.own.steps).mean(0)

    def _of_steps(self, lengths: tuple[float, ...]) -> Tensor:
        own = LearnedOptimizer(LearnedSteps(len(lengths)), self.own.loss, len(lengths))
        return self._losses(own, {"all": torch.tensor(lengths, dtype=torch.float64, device="cpu").log()})


def _worst(steps: Tensor, on: Quadratics) -> float:
    curvatures = torch.linspace(on.low, on.high, 2001, dtype=torch.float64, device="cpu").unsqueeze(1)
    return float((1 - curvatures * steps).prod(1).abs().max())
