"""NestedMAML on a module and tasks of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem, Split
from bilevel._sets import Box
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT, POSITIVE, SEED, SIZE, demand_ranges
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._modules import as_functional
from bilevel.problems.meta_learning._tasks import Loss
from bilevel.problems.networks._batches import generator
from bilevel.problems.networks.lookahead import ByLargest, Lookahead
from bilevel.problems.networks.nested_maml import NestedMAML, Positive
from bilevel.solvers.adam import Adam
from bilevel.tasks.ragged import check_batch

Tasks: TypeAlias = Mapping[str, Tensor]
Weighted: TypeAlias = Literal["tasks", "instances"]


@checked(step=POSITIVE, inner_steps=COUNT, rate=POSITIVE, outer_step=POSITIVE, batch=SIZE, max_steps=COUNT, seed=SEED)
def task_weights(
    module: nn.Module | Functional,
    loss: Loss,
    tasks: Tasks,
    validation: Tasks,
    *,
    weighted: Weighted = "tasks",
    clusters: Tensor | None = None,
    positive: Positive = "projection",
    step: float = 0.01,
    inner_steps: int = 1,
    first_order: bool = False,
    rate: float = 5e-3,
    outer_step: float = 0.1,
    batch: int = 20,
    max_steps: int = 1500,
    seed: int = 0,
) -> Instance:
    """Which of the training tasks, of their instances, or of their clusters an initialization should be learned from.

    Weights begin at 1, where g is the loss of MAML, and move by the rule of NestedMAML, which asks what a step of the
    initialization would do to right tasks, `validation`: see :class:`NestedMAML` and :class:`Lookahead`. Batches are
    `batch` tasks of each side, every task once an epoch. Only weights of tasks in the batch (or of their clusters)
    move, the one that matters most by `outer_step`.

    Args:
        module: the network.
        loss: (outputs, targets) -> the mean over samples.
        tasks: the training tasks, a dict of tensors with a leading axis of tasks: `source.sample(count, seed)`.
        validation: right ones, likewise.
        weighted: "tasks", or "instances" of their query sets.
        clusters: C `(tasks, clusters)`, w = C x; None: each has a weight of its own.
        positive: "projection" or "softplus".
        step: of the adaptation.
        inner_steps: of the adaptation.
        first_order: without second derivatives of the adaptation.
        rate: the step length of Adam on the initialization.
        outer_step: of the weights.
        batch: tasks of each side.
        max_steps: of a run.
        seed: of the order of tasks.

    Returns:
        The instance: `minimize(instance.problem, instance.x0, instance.y0, **instance.settings)` learns weights x and
        an initialization y, for `functional(module).load(y)`, or `maml(module, loss)` with the same step.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range, tasks lack an entry, or C has another number of tasks.

    Example:
        >>> from bilevel import minimize
        >>> from bilevel.tasks import Sinusoid
        >>> sinusoids, line = Sinusoid(), torch.nn.Linear(1, 1)
        >>> instance = task_weights(
        ...     line,
        ...     torch.nn.functional.mse_loss,
        ...     sinusoids.sample(40, 0),
        ...     sinusoids.sample(20, 1),
        ...     max_steps=3,
        ... )
        >>> minimize(instance.problem, instance.x0, instance.y0, **instance.settings).x.shape
        torch.Size([40])
    """
    for name, each in (("tasks", tasks), ("validation", validation)):
        try:
            check_batch(each)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`task_weights({name}=...)` must be a batch of tasks: {error}") from None
    net, count = as_functional(module), len(tasks["support_x"])
    if clusters is not None and len(clusters) != count:
        raise ValueError(
            f"`task_weights(clusters=...)` must have a row for each of the {count} training tasks."
            f" Got shape {tuple(clusters.shape)}."
        )
    own = NestedMAML(net, loss, step, inner_steps, first_order, positive, clusters)
    rows = count if clusters is None else clusters.shape[1]
    shape = (rows,) if weighted == "tasks" else (rows, *tasks["query_y"].shape[1:2])
    one = 1.0 if positive == "projection" else math.log(math.expm1(1.0))
    like = next(iter(net.params.values()))
    settings = {
        "algorithm": Lookahead(ahead=step, inner_step=Adam(rate), outer_step=ByLargest(outer_step)),
        "data": Split(f=Pool(validation, batch, seed + 1), g=Pool(tasks, batch, seed)),
        "max_steps": max_steps,
    }
    return Instance(
        problem=BilevelProblem(own.f, own.g),
        x0=like.new_full(shape, one),
        y0=dict(net.params),
        description=f"weights of {rows} {'clusters' if clusters is not None else weighted} under an initialization",
        settings=settings | ({"constraint": Box(lower=0.0)} if positive == "projection" else {}),
    )


@final
@dataclass(frozen=True, eq=False)
class Pool:
    """Batch k of given tasks, with their `number`: every task once an epoch, in an order of the seed's.

    Args:
        tasks: all of them.
        size: of a batch; more than there are is all.
        seed: of the orders.

    Example:
        >>> pool = Pool({"support_x": torch.zeros(6, 1, 1)}, size=3, seed=0)
        >>> sorted(torch.cat([pool(0)["number"], pool(1)["number"]]).tolist())
        [0, 1, 2, 3, 4, 5]
    """

    tasks: Tasks
    size: int
    seed: int

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, size=SIZE, seed=SEED)
        sizes = {name: tuple(tensor.shape) for name, tensor in self.tasks.items()}
        if "support_x" not in sizes or not all(sizes.values()) or len({shape[0] for shape in sizes.values()}) > 1:
            raise ValueError(f"`Pool(tasks=...)` must have `support_x`, and tasks as its first axis. Got {sizes}.")

    def __call__(self, index: int) -> dict[str, Tensor]:
        count = len(self.tasks["support_x"])
        each = max(count // self.size, 1)
        order = torch.randperm(count, generator=generator(self.seed, index // each), device="cpu")
        rows = order[index % each * self.size :][: self.size]
        return {name: tensor[rows] for name, tensor in self.tasks.items()} | {"number": rows}
