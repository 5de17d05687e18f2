"""Adaptation that takes unlabelled samples as its own, those that say most of the labelled ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel._problem import BilevelProblem
from bilevel._tree import Tree, tree_map
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, POSITIVE, demand_ranges
from bilevel.inner_problems.iteration import Iteration
from bilevel.modules.functional import Functional
from bilevel.problems.networks.adapted import adapted
from bilevel.problems.networks.selection import AbstractSelection, Informative, Nothing, Seen

Guide: TypeAlias = Literal["support", "cross"]


@checked()
def ramp(part: float) -> float:
    """exp(-5 (1 - min(part, 1))^2): 0.0067 at the start, and 1 where `part` is 1.

    Example:
        >>> [round(ramp(k / 5), 3) for k in range(6)]
        [0.007, 0.041, 0.165, 0.449, 0.819, 1.0]
    """
    return math.exp(-5 * (1 - min(part, 1.0)) ** 2)


@final
@dataclass(frozen=True, eq=False)
class SemiSupervised:
    """min_x mean_t CE(Q; y_T) + a CE(A'; y_T),  y_{k+1} = y_k - step grad [CE(S) + c_k CE(A_k)](y_k): PLATINUM.

    A_k are samples of the task's unlabelled set, chosen at y_k with labels of their own by a `selection`; A' is chosen
    at y_T among those that no step had. The choice is a function of y that is piecewise constant: derivatives do not go
    through it, and the hypergradient is that of the iteration with the choices as they are. It is made once a step and
    is an entry of y, so that everything that asks again at y_k sees the same. c_k is a function of the step's number.

    x is {"body", "head"}, y {"params", "chosen", "taken", "weight"}, a task a dict as learners take, and `unlabeled_x`
    `(n, ...)`; optionally `unlabeled_noise` `(T + 1, n)`, which random choices read, `outer_weight` `()`, an a of the
    task, and `selection` `(T + 1, classes, n)`, choices that are held (:meth:`frozen`). g is then one function in every
    step and can be handed to other estimators.

    Cost of a hypergradient: T gradients of both losses and as many products with second derivatives for each task, T +
    1 passes of its support and unlabelled sets for the choice, and the choice. Memory of T graphs.

    Source: Li, Kothawade, Chen, Iyer, "PLATINUM: semi-supervised model agnostic meta-learning using submodular mutual
    information", ICML 2022. Its meta-training guides the inner choices by the query set, whose labels are known there,
    and the outer one by the support set ("cross"); its tests have the support set alone.

    Args:
        body: the network up to the features.
        head: a linear layer from features to classes.
        selection: how samples are chosen.
        step: of the adaptation.
        steps: T.
        picks: samples for each class in a step.
        outer_picks: samples for each class in f.
        weight: k -> c_k, with (k, T); None: `ramp(k / T)`.
        outer_weight: a, where tasks have none of their own.
        first_order: hold gradients of the steps constant.
        guide: of the choices in steps: "support"; or "cross", the query set, in training only. f has "support".

    Raises:
        ValueError: if a number is out of range.
    """

    body: Functional
    head: Functional
    selection: AbstractSelection = Informative()
    step: float = 0.1
    steps: int = 5
    picks: int = 5
    outer_picks: int = 5
    weight: Callable[[int, int], float] | None = None
    outer_weight: float = 1.0
    first_order: bool = False
    guide: Guide = "support"

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, step=POSITIVE, steps=COUNT, picks=COUNT, outer_picks=COUNT, outer_weight=AT_LEAST_0)

    @property
    def iteration(self) -> Iteration:
        """The inner problem."""
        return Iteration(self.advance, steps=self.steps, objective_function=self.g)

    @property
    def problem(self) -> BilevelProblem:
        """The problem over tasks."""
        return BilevelProblem(self.f, inner=self.iteration, init=self.init, tasks=True)

    @property
    def x0(self) -> dict[str, Tree]:
        """Where learning begins."""
        return {"body": dict(self.body.params), "head": dict(self.head.params)}

    @checked()
    def y0(self, tasks: Any) -> Tree:
        """The structure of y, made from a batch of tasks."""
        with torch.no_grad():
            return self.init(self.x0, {name: part[0] for name, part in tasks.items()})

    @fitting
    def logits(self, params: Tree, inputs: Tensor) -> Tensor:
        """Of samples `(n, ...)`: `(n, classes)`."""
        found: Tensor = self.head(params["head"], self.body(params["body"], inputs))
        return found

    def f(self, x: Tree, y: Tree, task: Any) -> Tensor:
        value = cross_entropy(self.logits(y["params"], task["query_x"]), task["query_y"])
        a: Tensor | float = task.get("outer_weight", self.outer_weight)
        return value + a * self.unlabelled(y["params"], y["chosen"], task)

    def g(self, x: Tree, y: Tree, task: Any) -> Tensor:
        value = cross_entropy(self.logits(y["params"], task["support_x"]), task["support_y"])
        weight: Tensor = y["weight"].detach()
        return value + weight * self.unlabelled(y["params"], y["chosen"], task)

    @fitting
    def unlabelled(self, params: Tree, chosen: Tensor, task: Any) -> Tensor:
        """The mean cross-entropy of chosen samples under the labels they are chosen for; 0 where there are none."""
        chosen = chosen.detach()
        if isinstance(self.selection, Nothing) and "selection" not in task:
            return chosen.sum() * 0
        log = self.logits(params, task["unlabeled_x"]).log_softmax(-1)
        return -(chosen.mT * log).sum() / chosen.sum().clamp_min(1)

    def init(self, x: Tree, task: Any) -> Tree:
        params = {part: dict(x[part]) for part in ("body", "head")}
        free = torch.ones_like(task["unlabeled_x"].flatten(1)[:, 0])
        chosen = self._choice(params, task, 0, free)
        return {"params": params, "chosen": chosen, "taken": chosen.amax(0), "weight": self._weight(0, chosen)}

    def advance(self, x: Tree, y: Tree, gradient: Tree, k: int, task: Any) -> Tree:
        held = torch.Tensor.detach if self.first_order else _as_it_is
        params = {
            part: {name: leaf - self.step * held(gradient["params"][part][name]) for name, leaf in own.items()}
            for part, own in y["params"].items()
        }
        free = 1 - y["taken"].detach() if k + 1 >= self.steps else torch.ones_like(y["taken"])
        chosen = self._choice(params, task, k + 1, free)
        taken = torch.maximum(y["taken"].detach(), chosen.amax(0))
        return {"params": params, "chosen": chosen, "taken": taken, "weight": self._weight(k + 1, chosen)}

    def _weight(self, k: int, like: Tensor) -> Tensor:
        part = ramp(k / self.steps) if self.weight is None else self.weight(k, self.steps)
        return torch.full_like(like[0, 0], part)

    def _choice(self, params: Tree, task: Any, k: int, free: Tensor) -> Tensor:
        held: Tensor | None = task.get("selection")
        if held is not None:
            return held[min(k, len(held) - 1)].to(free)
        if isinstance(self.selection, Nothing):  # the number of classes is all that is asked
            with torch.no_grad():
                classes = self.logits(params, task["support_x"]).shape[-1]
            return torch.zeros_like(free).expand(classes, -1).clone()
        count = self.outer_picks if k >= self.steps else self.picks
        with torch.no_grad():
            params = tree_map(lambda leaf: leaf.detach(), params)
            guide = "query" if self.guide == "cross" and k < self.steps else "support"
            parts = [self.body(params["body"], task[f"{side}_x"]).flatten(1) for side in ("unlabeled", guide)]
            own, labelled = (self.head(params["head"], part) for part in parts)
            noise = task.get("unlabeled_noise")
            noise = torch.zeros_like(free) if noise is None else noise[min(k, len(noise) - 1)]
            seen = Seen(own, parts[0], task[f"{guide}_y"], labelled, parts[1], free, noise)
            return self.selection.choose(seen, count).detach()

    @checked()
    def adapted(self, x: Tree, tasks: Any, steps: int | None = None) -> Tree:
        """The y of each task after T steps, or so many: `(tasks, ...)` for each leaf."""
        return adapted(self.iteration, self.init, x, tasks, self.steps if steps is None else steps)

    @checked()
    def frozen(self, x: Tree, tasks: Any) -> dict[str, Tensor]:
        """The tasks with the choices at x, to be held."""
        made = [self.adapted(x, tasks, k)["chosen"] for k in range(self.steps + 1)]
        return {**tasks, "selection": torch.stack(made, 1)}


def _as_it_is(gradient: Tensor) -> Tensor:
    return gradient
