"""Weights of the tasks that an initialization is learned from: three levels, the innermost of them an adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT, POSITIVE, demand_ranges
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._modules import outputs_of
from bilevel.problems.meta_learning._tasks import Loss, Side, sample_losses, task_loss

Positive: TypeAlias = Literal["projection", "softplus"]
Parameters: TypeAlias = Mapping[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class NestedMAML:
    """g = mean_i w_i L(A(y, S_i), Q_i),  f = mean_j L(A(y, V_j), V'_j),  A(y, S) = y - step grad L(y, S): NestedMAML.

    x are weights w of training tasks, y the initialization that is learned from them, and f is how well it adapts to
    tasks that are known to be right: all three levels of min_x f(y*(x)), y*(x) = argmin_y g, y adapted to a task. With
    `inner_steps` above 1, A takes as many steps. x is one of

    - `(M,)`, a weight for each training task, w_i = x_i;
    - `(M, queries)`, one for each query instance: w_i L is then mean_k w_ik l_ik;
    - `(r,)` or `(r, queries)` with `clusters=C` `(M, r)`, w = C x: weights that tasks share.

    They are at least 0 by a constraint on x (`Box(lower=0.0)`, projected: a weight at 0 comes back where its derivative
    is negative), or w = softplus(x). A batch of g is a dict of tasks as learners take, and `number` `(m,)`, the rows of
    x or C that are theirs: h is zero in all others. A batch of f is a dict of tasks.

    g calls the gradient of the support loss, so that the Hessian of an implicit estimator (`AID`) has third derivatives
    of it, all of them exact. One step of length eta in the place of y*, from wherever y is, is the rule of the paper:
    `Lookahead`, or `ITD(Iterate(GradientDescent(eta), 1))`; it puts eta I for the inverse of that Hessian. At an exact
    y* of a g without further terms sum_i w_i dPhi/dw_i = 0, since scaling all weights leaves y* where it is.

    Cost of an evaluation: `inner_steps` gradients of the support losses of all tasks side by side, and a forward pass.

    Source: Killamsetty, Li, Zhao, Chen, Iyer, "A nested bi-level optimization framework for robust few shot learning",
    AAAI 2022. Its code leaves the adaptation out of the derivative for the weights; here it is in.

    Args:
        net: the module as a function of y.
        loss: (outputs, targets) -> the mean over samples.
        step: of the adaptation.
        inner_steps: of the adaptation.
        first_order: A(y, S) = y - step c with c constant, the gradient without a derivative (NestedMAML-FO).
        positive: how weights are kept from being negative, see above.
        clusters: C, or None.

    Raises:
        ValueError: if a number is out of range, or C is no matrix of numbers of at least 0.

    Example:
        >>> from bilevel.modules.functional import functional
        >>> net = functional(torch.nn.Linear(1, 1))
        >>> own = NestedMAML(net, torch.nn.functional.mse_loss, step=0.1)
        >>> tasks = {
        ...     name: torch.ones(4, 3, 1)
        ...     for name in ("support_x", "support_y", "query_x", "query_y")
        ... }
        >>> twice = own.g(
        ...     torch.full((9,), 2.0), net.params, tasks | {"number": torch.tensor([0, 3, 5, 8])}
        ... )
        >>> bool(torch.isclose(twice, 2 * own.f(torch.zeros(9), net.params, tasks)))
        True
    """

    net: Functional
    loss: Loss
    step: float = 0.01
    inner_steps: int = 1
    first_order: bool = False
    positive: Positive = "projection"
    clusters: Tensor | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, step=POSITIVE, inner_steps=COUNT)
        if self.clusters is not None and not (self.clusters.dim() == 2 and bool((self.clusters >= 0).all())):
            raise ValueError(
                "`NestedMAML(clusters=...)` must be a matrix (tasks, clusters) of numbers of at least 0. Got shape"
                f" {tuple(self.clusters.shape)}. Of labels, take `one_hot(labels).float()`."
            )

    @fitting
    def f(self, _: Tensor, y: Parameters, batch: Any) -> Tensor:
        """The mean loss of right tasks after adaptation."""
        return self.losses(self.adapted(y, batch), batch, "query").mean()

    @fitting
    def g(self, x: Tensor, y: Parameters, batch: Any) -> Tensor:
        """The weighted mean loss of training tasks after adaptation."""
        weights, there = self.weights(x, batch["number"]), self.adapted(y, batch)
        if weights.dim() == 1:
            return (weights * self.losses(there, batch, "query")).mean()
        each, mask = self.instance_losses(there, batch), batch.get("query_mask")
        if mask is None:
            return (weights * each).mean()
        padded: Tensor = (weights * each * mask).sum(1) / mask.sum(1)
        return padded.mean()

    @fitting
    def weights(self, x: Tensor, number: Tensor) -> Tensor:
        """W of the training tasks of these numbers: `(m,)`, or `(m, queries)`."""
        own = softplus(x) if self.positive == "softplus" else x
        return own[number] if self.clusters is None else self.clusters[number].to(own) @ own

    @fitting
    def adapted(self, y: Parameters, tasks: Any) -> dict[str, Tensor]:
        """A(y, S_i) of each task, `(m, ...)` for each parameter."""
        count, outside = len(tasks["support_x"]), torch.is_grad_enabled()
        there = {name: leaf.expand(count, *leaf.shape) for name, leaf in y.items()}
        for _ in range(self.inner_steps):
            with torch.enable_grad():
                moving = any(leaf.requires_grad for leaf in there.values())
                at = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in there.items()}
                total = self.losses(at, tasks, "support").sum()  # rows are independent
                further = outside and moving and not self.first_order
                slopes = torch.autograd.grad(total, list(at.values()), create_graph=further)
            there = {name: p - self.step * d for (name, p), d in zip(there.items(), slopes, strict=True)}
        return there

    @fitting
    def losses(self, there: Parameters, tasks: Any, side: Side) -> Tensor:
        """The loss of each task at parameters of its own `(m,)`."""

        def one(params: dict[str, Tensor], task: dict[str, Tensor]) -> Tensor:
            return task_loss(self.loss, outputs_of(self.net, params, task, side), task, side)

        found: Tensor = torch.vmap(one, randomness="same")(dict(there), _of_side(tasks, side))
        return found

    @fitting
    def instance_losses(self, there: Parameters, tasks: Any) -> Tensor:
        """The loss of each query instance `(m, queries)`."""

        def one(params: dict[str, Tensor], task: dict[str, Tensor]) -> Tensor:
            return sample_losses(self.loss, outputs_of(self.net, params, task, "query"), task["query_y"])

        found: Tensor = torch.vmap(one, randomness="same")(dict(there), _of_side(tasks, "query"))
        return found


def _of_side(tasks: Mapping[str, Tensor], side: Side) -> dict[str, Tensor]:
    return {name: tasks[name] for name in (f"{side}_x", f"{side}_y", f"{side}_mask") if name in tasks}
