"""Ridge regression on learned features: a task's head in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from bilevel._numerics.half import widened
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
    prediction,
    weighted,
)
from bilevel.problems.meta_learning._tasks import Loss, task_loss
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm


@checked(features=SIZE, outputs=SIZE, regularization=POSITIVE, scale=POSITIVE)
def ridge_head(
    body: nn.Module | Functional,
    features: int,
    outputs: int,
    loss: Loss = cross_entropy,
    *,
    regularization: float = 1.0,
    learn_regularization: bool = False,
    scale: float = 1.0,
    calibrate: bool = True,
) -> Learner:
    """Ridge head: g = |F y - T|^2 / 2 + lambda |y|^2 / 2,  f = loss(a phi(query) y + b),  F = phi(support).

    x are the body phi and, unless told otherwise, the scale a and the offset b of the outputs (under a cross-entropy
    the offset has no effect); y is a task's head `(features, outputs)`; T are the support targets, one-hot where they
    are classes. y* = F'(F F' + lambda)^-1 T where there are fewer samples than features, (F'F + lambda)^-1 F'T else:
    the same, by whichever system is the smaller.

    This is R2D2, and MetaOptNet with ridge regression (lambda = 50 there, `learn_regularization=False`).

    Cost of an estimate: one forward and one backward pass of the body; one system of the size of the support set; and
    in the features only, CG in at most one step more than there are support samples, whose matrix has no more distinct
    eigenvalues.

    Source: Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form solvers", ICLR 2019;
    Lee, Maji, Ravichandran, Soatto, "Meta-learning with differentiable convex optimization", CVPR 2019.

    Args:
        body: maps inputs `(n, ...)` to features, `(n, features)` or `(n, ...)` of so many entries.
        features: their number.
        outputs: the number of classes of a task, or of columns of a regression's targets.
        loss: of the query set: (outputs, targets) -> mean over samples.
        regularization: lambda.
        learn_regularization: learn lambda too, as the entry "log_regularization" of x.
        scale: a, or its start.
        calibrate: learn a and b, as the entries "scale" and "bias" of x; x is the body's parameters under "body".

    Raises:
        ValueError: if a number is out of range; from estimates, if support targets do not fit the outputs.

    Example:
        >>> learner = ridge_head(nn.Linear(3, 8), features=8, outputs=5, learn_regularization=True)
        >>> sorted(learner.x0)
        ['bias', 'body', 'log_regularization', 'scale']
    """
    demand_positive("ridge_head", features=features, outputs=outputs)
    for name, number in (("regularization", regularization), ("scale", scale)):
        if not 0 < number < math.inf:
            raise ValueError(f"`ridge_head({name}=...)` must be positive. Got {number}.")
    net = as_functional(body)
    like = any_parameter(net)
    x0: Tree = {"body": dict(net.params)}
    if calibrate:
        x0 |= {"scale": like.new_tensor(scale), "bias": like.new_tensor(0.0)}
    if learn_regularization:
        x0 |= {"log_regularization": like.new_tensor(math.log(regularization))}

    own = _Head(
        net,
        loss,
        sizes=(features, outputs),
        regularization=None if learn_regularization else regularization,
        scale=None if calibrate else scale,
    )
    solver = ClosedForm(own.solution)
    return Learner(
        name="ridge head",
        problem=BilevelProblem(own.f, own.g, encode=own.encode, tasks=True),
        x0=x0,
        y0=like.new_zeros(features, outputs),
        estimator=AID(solver, CG(rtol=1e-5)),
        adapt=solver,
        predict=own.predict,
        export=own.export,
    )


@final
@dataclass(frozen=True, eq=False)
class _Head:
    """The functions of the learner; `regularization` and `scale` are None where they are learned."""

    net: Functional
    loss: Loss
    sizes: tuple[int, int]
    regularization: float | None
    scale: float | None

    def encode(self, x: Tree, task: Any) -> Tree:
        z = {side: features_of(self.net, x["body"], task, side) for side in SIDES}
        return z | {name: x[name] for name in x if name != "body"}

    def strength(self, x: Tree) -> float | Tensor:
        """lambda."""
        if self.regularization is not None:
            return self.regularization
        log: Tensor = x["log_regularization"]
        return log.exp()

    def head(self, x: Tree, points: Tensor, y: Tensor) -> Tensor:
        fitted: Tensor = points @ y
        return x["scale"] * fitted + x["bias"] if self.scale is None else self.scale * fitted

    def targets(self, task: Any) -> Tensor:
        given: Tensor = task["support_y"]
        outputs = self.sizes[1]
        if not given.is_floating_point():
            given = one_hot(given.long(), outputs).to(any_parameter(self.net))
        elif given.shape[1:] != (outputs,) and (given.dim() != 1 or outputs != 1):
            raise ValueError(
                f"`ridge_head(outputs={outputs})` needs support_y of (n, {outputs}) numbers, or of (n,) integers where"
                f" they are classes. Got {tuple(given.shape)}, {given.dtype}. Convert labels with `.long()`."
            )
        columns: Tensor = given.reshape(-1, outputs)
        return columns

    def f(self, z: Tree, y: Tensor, task: Any) -> Tensor:
        return task_loss(self.loss, self.head(z, z["query"], y), task, "query")

    def g(self, z: Tree, y: Tensor, task: Any) -> Tensor:
        errors = weighted((z["support"] @ y - self.targets(task)).square(), task, "support")
        value: Tensor = (errors.sum() + self.strength(z) * y.square().sum()) / 2
        return value

    def solution(self, z: Tree, task: Any) -> Tensor:
        """y*."""
        roots = weighted(torch.ones_like(z["support"][:, :1]), task, "support").sqrt()
        F, T = roots * z["support"], roots * self.targets(task)
        if len(F) < self.sizes[0]:
            primal: Tensor = F.T @ _solve(F @ F.T, self.strength(z), T)
            return primal
        return _solve(F.T @ F, self.strength(z), F.T @ T)

    def predict(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return prediction(self.loss, self.head(x, features_of(self.net, x["body"], task, "query"), y))

    def export(self, x: Tree) -> nn.Module:
        return self.net.load(x["body"])


def _solve(matrix: Tensor, shift: float | Tensor, right: Tensor) -> Tensor:
    shifted = matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    solution: Tensor = torch.linalg.solve(widened(shifted), widened(right)).to(right.dtype)
    return solution
