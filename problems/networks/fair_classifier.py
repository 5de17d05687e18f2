"""A logistic regression whose covariance with a group is bounded, and the bound that new data ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bilevel._hypergradient import hypergradient
from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel._sets import Box
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, POSITIVE, SEED, SIZE, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.hypergrad.kkt import KKT
from bilevel.inner_problems.polytope import Polytope
from bilevel.problems._plots import COLORS
from bilevel.problems.networks.fair_adaptation import measured
from bilevel.problems.networks.fair_sources import GaussianGroups
from bilevel.solvers.interior_point import InteriorPoint

_TEST = 8000  # points
_LEVELS = 9  # of the picture
_NONE = 1e3  # a level that bounds nothing
ESTIMATOR = KKT(InteriorPoint())


@final
@dataclass(frozen=True, eq=False)
class FairClassifier:
    """y*(c) = argmin_y {mean log(1 + exp(-t_i y'u_i)) + ridge |y|^2 / 2 : |a'y| <= c},  a = mean (z_i - zbar) u_i.

    What `FairAdaptation` takes a few steps towards, solved: convex, with the covariance of the signed distance y'u,
    which is linear in y. u is an input with a 1 after it, t = 2 y_i - 1. The outer variable is the level c; `KKT`
    differentiates the optimality conditions. With m the multiplier of the constraint that holds, dg(y*(c))/dc = -m, and
    where none holds y* does not move with c. At the c from which on none holds, |a'y| of the free minimizer, y* has a
    kink.

    f is the loss on other data plus `price` times the square of the covariance of probabilities there.

    Source: Zafar, Valera, Gomez Rodriguez, Gummadi, "Fairness constraints", AISTATS 2017, equation 5.

    Args:
        x: inputs `(n, d)`, float64.
        y: labels `(n,)`, zeros and ones.
        z: the group `(n,)`, zeros and ones.
        ridge: see there.
        price: of unfairness in f.

    Raises:
        ValueError: if a number is out of range, or there are not as many rows in each.

    Example:
        >>> from bilevel import hypergradient
        >>> draws = GaussianGroups((0.2,), shots=40, queries=40).sample(1, 0)
        >>> own, new = (
        ...     FairClassifier(*(draws[f"{side}_{part}"][0].double() for part in "xyz"))
        ...     for side in ("support", "query")
        ... )
        >>> found = hypergradient(
        ...     own.problem(new), own.level(0.1), own.y0, estimator=KKT(InteriorPoint())
        ... )
        >>> round(float(own.covariance(found.y).abs()), 6)
        0.1
    """

    x: Tensor
    y: Tensor
    z: Tensor
    ridge: float = 1e-2
    price: float = 20.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, ridge=POSITIVE, price=AT_LEAST_0)
        shapes = {"x": Shape("n d"), "y": Shape("n"), "z": Shape("n")}
        demand_shapes("FairClassifier", shapes, {"x": self.x, "y": self.y, "z": self.z})

    @property
    def inputs(self) -> Tensor:
        """u `(n, d + 1)`."""
        return torch.cat([self.x, torch.ones_like(self.x[:, :1])], 1)

    @property
    def direction(self) -> Tensor:
        """a `(d + 1,)`."""
        return (self.z - self.z.mean()) @ self.inputs / len(self.z)

    @property
    def y0(self) -> Tensor:
        """Where solvers begin."""
        return torch.zeros_like(self.direction)

    @checked(value=AT_LEAST_0)
    def level(self, value: float) -> Tensor:
        """The outer variable of this value."""
        return torch.full_like(self.y0[0], value)

    @fitting
    def g(self, _: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        return binary_cross_entropy_with_logits(self.inputs @ y, self.y) + self.ridge * y.square().sum() / 2

    @fitting
    def covariance(self, y: Tensor) -> Tensor:
        """a'y `()`."""
        return self.direction @ y

    @fitting
    def multiplier(self, y: Tensor) -> Tensor:
        """m at y*: what is left of the gradient of g, along a: `()`."""
        inputs, a = self.inputs, self.direction
        gradient = ((inputs @ y).sigmoid() - self.y) @ inputs / len(inputs) + self.ridge * y
        return -(a @ y).sign() * (a @ gradient) / (a @ a)

    @fitting
    def constraints(self, c: Tensor) -> Polytope:
        """|a'y| <= c."""
        a = self.direction
        return Polytope(G=torch.stack([a, -a]), h=torch.stack([c, c]))

    @fitting
    def probabilities(self, y: Tensor) -> Tensor:
        """Of label 1, of each sample `(n,)`."""
        return (self.inputs @ y).sigmoid()

    @checked()
    def judged(self, y: Tensor) -> dict[str, float]:
        """The accuracy on these data, and the absolute covariance of probabilities with the group."""
        found = self.probabilities(y)
        covariance = measured(found, {"query_z": self.z}, "query").abs()
        return {
            "accuracy": float(((found > 0.5) == (self.y > 0.5)).double().mean()),
            "covariance": float(covariance),
        }

    @checked()
    def problem(self, other: FairClassifier) -> BilevelProblem:
        """The level that `other` data ask for."""

        def f(_: Tensor, y: Tensor) -> Tensor:
            unfair = measured(other.probabilities(y), {"query_z": other.z}, "query")
            return binary_cross_entropy_with_logits(other.inputs @ y, other.y) + self.price * unfair.square()

        return BilevelProblem(f, self.g, constraints=self.constraints)


@checked(level=POSITIVE, price=AT_LEAST_0, angle=AT_LEAST_0, samples=SIZE, ridge=POSITIVE, max_steps=COUNT, seed=SEED)
def fair_classifier(
    *,
    level: float = 0.4,
    price: float = 20.0,
    angle: float = math.pi / 16,
    samples: int = 1000,
    ridge: float = 1e-2,
    max_steps: int = 15,
    seed: int = 0,
) -> Instance:
    """How far the covariance of a linear classifier with a group is to be bounded: the level as the outer variable.

    Two Gaussian classes in the plane, the group as :class:`GaussianGroups` draws it; see :class:`FairClassifier`.

    Metrics, on 8,000 new points: accuracy and absolute covariance of probabilities with the group of the classifier at
    the level that was learned (`fair`), and without a constraint (`free`); the multiplier at the former.

    Args:
        level: where c begins.
        price: of the squared covariance in f.
        angle: by which the group's point of view is turned.
        samples: to learn from, and as many for f.
        ridge: of the inner problem.
        max_steps: of a run.
        seed: of the points.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> fair_classifier(samples=50).x0
        tensor(0.4000, dtype=torch.float64)
    """
    draws = GaussianGroups((angle,), shots=2 * samples, queries=_TEST).sample(1, seed)
    x, y, z = (draws[f"support_{part}"][0].double() for part in "xyz")
    own = FairClassifier(x[:samples], y[:samples], z[:samples], ridge, price)
    other = FairClassifier(x[samples:], y[samples:], z[samples:], ridge, price)
    x, y, z = (draws[f"query_{part}"][0].double() for part in "xyz")
    tests = FairClassifier(x, y, z)
    shown = _Shown(own, tests)
    return Instance(
        problem=own.problem(other),
        x0=own.level(level),
        y0=own.y0,
        description=f"the level of a fairness constraint, {samples} points of two classes",
        metrics=shown.metrics,
        plot=shown.plot,
        settings={
            "estimator": ESTIMATOR,
            "constraint": Box(lower=1e-3),
            "max_steps": max_steps,
        },
    )


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution."""

    own: FairClassifier
    tests: FairClassifier

    def solved(self, level: float) -> Tensor:
        """y*(c)."""
        own = self.own
        found: Tensor = hypergradient(own.problem(self.tests), own.level(level), own.y0, estimator=ESTIMATOR).y
        return found

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        free = {f"{name}_free": value for name, value in self.tests.judged(self.solved(_NONE)).items()}
        found = {f"{name}_fair": value for name, value in self.tests.judged(y).items()}
        return found | free | {"level": float(x), "multiplier": float(self.own.multiplier(y))}

    def plot(self, figure: Any, x: Tensor, y: Tensor) -> None:
        axes = figure.subplots(1, 1)
        most = float(self.own.covariance(self.solved(_NONE)).abs())
        path = [self.tests.judged(self.solved(most * (k + 0.5) / _LEVELS)) for k in range(_LEVELS + 1)]
        axes.plot(*([point[name] for point in path] for name in ("covariance", "accuracy")), "o-", color=COLORS[0])
        here = self.tests.judged(y)
        label = f"learned level {float(x):.2f}"
        axes.scatter([here["covariance"]], [here["accuracy"]], s=90, marker="D", color=COLORS[1], label=label, zorder=3)
        axes.set_xlabel("covariance of probabilities with the group, absolute")
        axes.set_ylabel("accuracy on new points")
        axes.legend()
        figure.tight_layout()
