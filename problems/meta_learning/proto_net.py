"""Prototypical networks: the bilevel problem whose inner solution is the mean of each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

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
    own = _Prototypes(net, classes, 1.0 / features if normalize else 1.0)
    solver = ClosedForm(own.means)
    return Learner(
        name="ProtoNet",
        problem=BilevelProblem(own.f, own.g, encode=own.encode, tasks=True),
        x0=dict(net.params),
        y0=any_parameter(net).new_zeros(classes, features),
        estimator=AID(solver, CG(rtol=1e-6, max_steps=classes)),
        adapt=solver,
        predict=own.predict,
        export=net.load,
    )


@final
@dataclass(frozen=True, eq=False)
class _Prototypes:
    """The functions of the learner."""

    net: Functional
    classes: int
    scale: float

    def encode(self, x: Tree, task: Any) -> dict[str, Tensor]:
        return {side: features_of(self.net, x, task, side) for side in SIDES}

    def f(self, z: dict[str, Tensor], y: Tensor, task: Any) -> Tensor:
        return task_loss(cross_entropy, self.logits(z["query"], y), task, "query")

    def g(self, z: dict[str, Tensor], y: Tensor, task: Any) -> Tensor:
        away = (z["support"] - self.members(task) @ y).square().sum(-1)
        return weighted(away, task, "support").sum() / 2

    def means(self, z: dict[str, Tensor], task: Any) -> Tensor:
        """y*: the mean of each class."""
        own = weighted(self.members(task), task, "support")
        self.demand_support(own)
        return own.T @ z["support"] / own.sum(0).unsqueeze(-1)

    def predict(self, x: Tree, y: Tensor, task: Any) -> Tensor:
        return log_softmax(self.logits(features_of(self.net, x, task, "query"), y), dim=-1)

    def logits(self, points: Tensor, y: Tensor) -> Tensor:
        return -self.scale * (points.unsqueeze(1) - y).square().sum(-1)

    def members(self, task: Any) -> Tensor:
        return one_hot(task["support_y"].long(), self.classes).to(any_parameter(self.net))

    def demand_support(self, own: Tensor) -> None:
        missing = every_row(own).sum(-2) == 0  # of each task, each class
        if bool(missing.any()):
            task, label = missing.reshape(-1, self.classes).nonzero()[0].tolist()
            which = f"Task {task} of the batch" if missing.dim() > 1 else "A task"
            raise ValueError(
                f"`proto_net(classes={self.classes})` needs support samples of every class in every task: prototypes"
                f" are their means. {which} has none of class {label}. Draw tasks that have some, or build"
                f" the learner for as many classes as the tasks have, with labels 0 to classes - 1."
            )
