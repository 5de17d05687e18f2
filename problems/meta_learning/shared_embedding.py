"""A body that all tasks share, and a head that each task solves for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from bilevel._estimate import AbstractEstimator
from bilevel._inner import AbstractInnerSolver
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree, tree_leaves
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.aid import AID
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._modules import SIDES, as_functional, on_examples, outputs_of, prediction
from bilevel.problems.meta_learning._tasks import Loss, Side, task_loss
from bilevel.solvers.cg import CG
from bilevel.solvers.newton import Newton


@checked(regularization=AT_LEAST_0)
def shared_embedding(
    body: nn.Module | Functional,
    head: nn.Module | Functional,
    loss: Loss,
    *,
    regularization: float = 0.5,
    inner: AbstractInnerSolver | None = None,
    estimator: AbstractEstimator | None = None,
) -> Learner:
    """Shared embedding: g = loss(head_y(phi(support))) + r |y|^2 / 2,  f = loss(head_y(phi(query))),  x = phi.

    x are the body's parameters, y those of a task's head, which starts from the head as it was given: unlike in ANIL
    the start is not learned, and at an exact solution it does not matter. With a linear head and a convex loss g is
    strongly convex for r > 0.

    Estimators: `AID`, the default; `ITD(Iterate(GradientDescent(step), N))`, whose error falls by 1 - step mu a
    step; `ESJ(Iterate(...))`, which needs no second derivatives. `AID` and `ITD` compute the features once an estimate;
    `ESJ` moves x, and computes them for each direction.

    Cost of an estimate: one forward and one backward pass of the body; the inner steps and the products with the
    Hessian are of the head on given features. `Newton` takes few steps whatever the features' scale.

    Source: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021; Sow, Ji,
    Liang, "On the convergence theory for Hessian-free bilevel algorithms", NeurIPS 2022.

    Args:
        body: maps inputs `(n, ...)` to what the head takes.
        head: maps features to outputs: `nn.Linear(features, classes)`.
        loss: (outputs, targets) -> mean over samples.
        regularization: r.
        inner: solves for the head, in estimates and of new tasks; None: Newton's method.
        estimator: of the hypergradient; None: `AID` with `inner` and conjugate gradients.

    Raises:
        ValueError: if the regularization is negative.

    Example:
        >>> learner = shared_embedding(
        ...     nn.Linear(3, 8), nn.Linear(8, 5), nn.functional.cross_entropy
        ... )
        >>> learner.y0["weight"].shape
        torch.Size([5, 8])
    """
    if not regularization >= 0:
        raise ValueError(f"`shared_embedding(regularization=...)` must be at least 0. Got {regularization}.")
    phi, net = as_functional(body), as_functional(head)
    solver = Newton(tol=1e-4, max_steps=20) if inner is None else inner

    own = _Shared(phi, net, loss, regularization)
    return Learner(
        name="shared embedding",
        problem=BilevelProblem(own.f, own.g, encode=own.encode, tasks=True),
        x0=dict(phi.params),
        y0=dict(net.params),
        estimator=AID(solver, CG(rtol=1e-4)) if estimator is None else estimator,
        adapt=solver,
        predict=own.predict,
        export=phi.load,
    )


@final
@dataclass(frozen=True, eq=False)
class _Shared:
    """The functions of the learner."""

    phi: Functional
    net: Functional
    loss: Loss
    regularization: float

    def encode(self, x: Tree, task: Any) -> dict[str, Tensor]:
        return {side: outputs_of(self.phi, x, task, side) for side in SIDES}

    def head_of(self, y: Tree, z: dict[str, Tensor], task: Any, side: Side) -> Tensor:
        return on_examples(partial(self.net, y), z[side], task.get(f"{side}_mask"))

    def f(self, z: dict[str, Tensor], y: Tree, task: Any) -> Tensor:
        return task_loss(self.loss, self.head_of(y, z, task, "query"), task, "query")

    def g(self, z: dict[str, Tensor], y: Tree, task: Any) -> Tensor:
        fit = task_loss(self.loss, self.head_of(y, z, task, "support"), task, "support")
        for leaf in tree_leaves(y):
            fit = fit + self.regularization / 2 * leaf.square().sum()
        return fit

    def predict(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return prediction(self.loss, self.net(y, outputs_of(self.phi, x, task, "query")))
