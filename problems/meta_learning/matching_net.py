"""Matching networks: a query is what the support samples that it looks like are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import POSITIVE, SIZE
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.aid import AID
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._modules import (
    SIDES,
    any_parameter,
    as_functional,
    demand_positive,
    features_of,
    weighted,
)
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm


@checked(features=SIZE, classes=SIZE, support=SIZE, scale=POSITIVE)
def matching_net(
    body: nn.Module | Functional,
    features: int,
    classes: int,
    support: int,
    *,
    scale: float = 1.0,
    learn_scale: bool = False,
) -> Learner:
    """p(c | q) = sum_i a_i(q) [c_i = c],  a(q) = softmax_i(gamma cos(phi(q), y_i));  g = sum_i |y_i - phi(s_i)|^2 / 2.

    x are the parameters of the body phi (and gamma, where it is learned), y the memory of a task `(support, features)`,
    c_i the label of support sample i, and f the mean of -log p(c | q) over the queries. y* are the support samples'
    features: nothing is adapted, the inner Hessian is the identity, CG is exact after one step, and the hypergradient
    is that of autograd through the features of both sets. A class is what its samples weigh together: unlike class
    means, several samples of a class may look unlike each other.

    The published cosines have no scale, gamma = 1: with few support samples, attention is then hardly more than an
    average, p(c | q) at most e^2 times that of another class in one shot. A larger or learned one is sharper. The
    published method also has embeddings of a whole support set (LSTMs over it), which this leaves out.

    Cost of an estimate: one forward and one backward pass of the body, and support x queries cosines.

    Source: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, "Matching networks for one shot learning", NeurIPS
    2016.

    Args:
        body: maps inputs `(n, ...)` to features, `(n, features)` or `(n, ...)` of so many entries.
        features: their number.
        classes: how many classes a task has; labels are 0 to classes - 1.
        support: the number of support samples of a task, padding included; `support_mask` leaves samples out.
        scale: gamma, or its start.
        learn_scale: learn gamma, as the entry "scale" of x; the body's parameters are under "body".

    Raises:
        ValueError: if a number is out of range; from estimates, if a task has another number of support samples.

    Example:
        >>> learner = matching_net(nn.Linear(3, 2), features=2, classes=5, support=5)
        >>> learner.y0.shape
        torch.Size([5, 2])
    """
    demand_positive("matching_net", features=features, classes=classes, support=support)
    if not 0 < scale < math.inf:
        raise ValueError(f"`matching_net(scale=...)` must be positive. Got {scale}.")
    net = as_functional(body)
    like = any_parameter(net)
    own = _Memory(net, features, classes, support, None if learn_scale else scale)
    solver = ClosedForm(own.memory)
    x0: Tree = {"body": dict(net.params)} | ({"scale": like.new_tensor(scale)} if learn_scale else {})
    return Learner(
        name="matching network",
        problem=BilevelProblem(own.f, own.g, encode=own.encode, tasks=True),
        x0=x0,
        y0=like.new_zeros(support, features),
        estimator=AID(solver, CG(rtol=1e-6, max_steps=1)),
        adapt=solver,
        predict=own.predict,
        export=own.export,
    )


@final
@dataclass(frozen=True, eq=False)
class _Memory:
    """The functions of the learner; `scale` is None where it is learned."""

    net: Functional
    features: int
    classes: int
    support: int
    scale: float | None

    def encode(self, x: Tree, task: Any) -> dict[str, Tensor]:
        z = {side: features_of(self.net, x["body"], task, side) for side in SIDES}
        shape = (self.support, self.features)
        if tuple(z["support"].shape) != shape:
            raise ValueError(
                f"`matching_net(support={self.support}, features={self.features})` must be what a task has."
                f" Got features of shape {tuple(z['support'].shape)} on its support set."
            )
        return z | ({"scale": x["scale"]} if self.scale is None else {})

    def f(self, z: dict[str, Tensor], y: Tensor, task: Any) -> Tensor:
        logs = self.logs(z, z["query"], y, task)
        losses = -logs.gather(1, task["query_y"].long().unsqueeze(1)).squeeze(1)
        mask = task.get("query_mask")
        return losses.mean() if mask is None else (losses * mask).sum() / mask.sum()

    def g(self, z: dict[str, Tensor], y: Tensor, task: Any) -> Tensor:
        return (y - self.memory(z, task)).square().sum() / 2

    def memory(self, z: dict[str, Tensor], task: Any) -> Tensor:
        """y*: the features of the support samples, and zero for those that pad."""
        return weighted(z["support"], task, "support")

    def logs(self, z: Tree, query: Tensor, y: Tensor, task: Any) -> Tensor:
        """Log p(c | q) `(queries, classes)`; of a class without support samples minus infinity."""
        gamma = z["scale"] if self.scale is None else self.scale
        attention = (gamma * (normalize(query, dim=-1) @ normalize(y, dim=-1).T)).unsqueeze(-1)
        members = weighted(one_hot(task["support_y"].long(), self.classes).to(y), task, "support")
        logs: Tensor = torch.where(members > 0, attention, -torch.inf).logsumexp(1)
        return logs.log_softmax(-1)

    def predict(self, x: Tree, y: Tensor, task: Any) -> Tensor:
        return self.logs(x, features_of(self.net, x["body"], task, "query"), y, task)

    def export(self, x: Tree) -> nn.Module:
        return self.net.load(x["body"])
