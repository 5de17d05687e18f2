"""Prototypical networks: the bilevel problem whose inner solution is the mean of each class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from bilevel._numerics.batched import every_row
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SIZE
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
from bilevel.problems.meta_learning._tasks import task_loss
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm


@checked(features=SIZE, classes=SIZE)
def proto_net(body: nn.Module | Functional, features: int, classes: int, *, normalize: bool = False) -> Learner:
    """Prototypes: g = sum_i |y_k(i) - phi(s_i)|^2 / 2 over the support set,  f = CE(-|phi(q) - y_k|^2, k) on the query.

    x are the parameters of the body phi, y the prototypes of a task `(classes, features)`, k(i) the label of sample i.
    y* are the class means, and the inner Hessian is diagonal, with the number of support samples of each class: CG is
    exact after as many steps as these numbers differ, which is one for balanced tasks, and the hypergradient is that
    of autograd through the class means. A class without support samples has no prototype: that is refused.

    x does not depend on `classes`: train with more of them than will be told apart, and build another learner for
    those.

    Cost of an estimate: one forward and one backward pass of the body, whatever else is done with the features.

    Source: Snell, Swersky, Zemel, "Prototypical networks for few-shot learning", NeurIPS 2017.

    Args:
        body: maps inputs `(n, ...)` to features, `(n, features)` or `(n, ...)` of so many entries.
        features: their number.
        classes: how many classes a task has; labels are 0 to classes - 1.
        normalize: divide the squared distances by the number of features.

    Raises:
        ValueError: if a number is less than 1; from estimates, if a task has no support sample of a class.

    Example:
        >>> learner = proto_net(nn.Linear(3, 2), features=2, classes=5)
        >>> learner.y0.shape
        torch.Size([5, 2])
    """
    demand_positive("proto_net", features=features, classes=classes)
    net = as_functional(body)
    scale = 1.0 / features if normalize else 1.0

    def encode(x: Tree, task: Any) -> dict[str, Tensor]:
        return {side: features_of(net, x, task, side) for side in SIDES}

    def f(z: dict[str, Tensor], y: Tensor, task: Any) -> Tensor:
        return task_loss(cross_entropy, logits(z["query"], y), task, "query")

    def logits(points: Tensor, y: Tensor) -> Tensor:
        return -scale * (points.unsqueeze(1) - y).square().sum(-1)

    def members(task: Any) -> Tensor:
        return one_hot(task["support_y"].long(), classes).to(any_parameter(net))

    def g(z: dict[str, Tensor], y: Tensor, task: Any) -> Tensor:
        away = (z["support"] - members(task) @ y).square().sum(-1)
        return weighted(away, task, "support").sum() / 2

    def demand_support(own: Tensor) -> None:
        missing = every_row(own).sum(-2) == 0  # of each task, each class
        if bool(missing.any()):
            task, label = missing.reshape(-1, classes).nonzero()[0].tolist()
            which = f"Task {task} of the batch" if missing.dim() > 1 else "A task"
            raise ValueError(
                f"`proto_net(classes={classes})` needs support samples of every class in every task: prototypes are"
                f" their means. {which} has none of class {label}. Draw tasks that have some, or build"
                f" the learner for as many classes as the tasks have, with labels 0 to classes - 1."
            )

    def means(z: dict[str, Tensor], task: Any) -> Tensor:
        own = weighted(members(task), task, "support")
        demand_support(own)
        return own.T @ z["support"] / own.sum(0).unsqueeze(-1)

    solver = ClosedForm(means)
    return Learner(
        name="ProtoNet",
        problem=BilevelProblem(f, g, encode=encode, tasks=True),
        x0=dict(net.params),
        y0=any_parameter(net).new_zeros(classes, features),
        estimator=AID(solver, CG(rtol=1e-6, max_steps=classes)),
        adapt=solver,
        predict=lambda x, y, task: log_softmax(logits(features_of(net, x, task, "query"), y), dim=-1),
        export=net.load,
    )
