"""A multi-class support vector machine on learned features: a task's head by its dual quadratic program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from bilevel._inner import AbstractInnerSolver
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, POSITIVE, SIZE, Range
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.kkt import KKT
from bilevel.inner_problems.polytope import Polytope
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._modules import (
    any_parameter,
    as_functional,
    demand_positive,
    features_of,
    prediction,
    weighted,
)
from bilevel.problems.meta_learning._tasks import Loss, task_loss
from bilevel.solvers.quadratic_program import QuadraticProgram


@checked(
    features=SIZE,
    classes=Range(2, 2.0**31),
    support=SIZE,
    C=POSITIVE,
    dual_ridge=AT_LEAST_0,
    scale=POSITIVE,
    label_smoothing=BELOW_1,
)
def svm_head(
    body: nn.Module | Functional,
    features: int,
    classes: int,
    support: int,
    *,
    C: float = 0.1,
    dual_ridge: float = 1.0,
    scale: float = 1.0,
    learn_scale: bool = True,
    label_smoothing: float = 0.0,
    solver: AbstractInnerSolver | None = None,
) -> Learner:
    """SVM head: g = |W|^2 / 2 + r |a|^2 / 2 - <Y, a>, W = a'F;  f = cross-entropy of gamma phi(query) W'.

    x are the body phi and the scale gamma; F = phi(support) `(support, features)`; y = a is the dual variable
    `(support, classes)` of the multi-class machine of Crammer and Singer, samples first, constrained to a <= C Y and
    rows that sum to zero; Y are the one-hot labels. Its primal is min_W |W|^2 / 2 + C sum_i xi_i with
    <w_k - w_c, phi_i> <= xi_i - 1 for the classes k other than c = y_i, and xi >= 0; W are the weights `(classes,
    features)`. The ridge r of the dual, which the published code has, makes a unique where there are more samples than
    features; it is the same machine with sqrt(r) e_i appended to the i-th feature vector. A sample with a_i = 0
    supports nothing: the head does not depend on it.

    The program is solved to its end and differentiated by its optimality conditions (`KKT`). The published method stops
    after few interior-point steps; where y is still far from the solution that formula is not valid, and the status
    says `max_steps`.

    Cost of an estimate: one forward and one backward pass of the body, and in the features only, 2 `support` `classes`
    products with K + r I, K = FF', and some ten factorizations of as many equations.

    This is MetaOptNet-SVM; there C = 0.1, r = 1, label smoothing 0.1 on miniImageNet and 0 elsewhere.

    Source: Lee, Maji, Ravichandran, Soatto, "Meta-learning with differentiable convex optimization", CVPR 2019;
    Crammer, Singer, "On the algorithmic implementation of multiclass kernel-based vector machines", JMLR 2 (2001).

    Args:
        body: maps inputs `(n, ...)` to features, `(n, features)` or `(n, ...)` of so many entries.
        features: their number.
        classes: the number of classes of a task.
        support: the number of support samples of a task, padding included; `support_mask` leaves samples out.
        C: the weight of the slacks, and the bound on a.
        dual_ridge: r.
        scale: gamma, or its start.
        learn_scale: learn gamma, as the entry "scale" of x; the body's parameters are under "body".
        label_smoothing: eps: targets 1 - eps for the class, eps / (classes - 1) for the others.
        solver: of the quadratic program; None: `QuadraticProgram()`.

    Raises:
        ValueError: if a number is out of range; from estimates, if a task has another number of support samples.

    Example:
        >>> learner = svm_head(nn.Linear(3, 8), features=8, classes=5, support=25)
        >>> learner.y0.shape
        torch.Size([25, 5])
    """
    demand_positive("svm_head", features=features, classes=classes - 1, support=support)
    for name, number in (("C", C), ("scale", scale)):
        if not 0 < number < math.inf:
            raise ValueError(f"`svm_head({name}=...)` must be positive. Got {number}.")
    if not 0 <= dual_ridge < math.inf:
        raise ValueError(f"`svm_head(dual_ridge=...)` must be at least 0. Got {dual_ridge}.")
    if not 0 <= label_smoothing < (classes - 1) / classes:
        raise ValueError(
            f"`svm_head(label_smoothing=...)` must be at least 0 and below (classes - 1) / classes ="
            f" {(classes - 1) / classes:.3g}. Got {label_smoothing}."
        )
    net = as_functional(body)
    like = any_parameter(net)
    x0: Tree = {"body": dict(net.params)} | ({"scale": like.new_tensor(scale)} if learn_scale else {})
    rows = torch.kron(torch.eye(support, device="cpu"), torch.ones(1, classes, device="cpu")).to(
        like
    )  # each sample's entries sum to zero
    # Torch spreads its smoothing over all classes, the true one included.
    loss = partial(cross_entropy, label_smoothing=label_smoothing * classes / (classes - 1))

    own = _Machine(
        net,
        loss,
        sizes=(support, features, classes),
        C=C,
        dual_ridge=dual_ridge,
        scale=None if learn_scale else scale,
        rows=rows,
    )
    inner = QuadraticProgram() if solver is None else solver
    return Learner(
        name="svm head",
        problem=BilevelProblem(own.f, own.g, encode=own.encode, constraints=own.constraints, tasks=True),
        x0=x0,
        y0=like.new_zeros(support, classes),
        estimator=KKT(inner),
        adapt=inner,
        predict=own.predict,
        export=own.export,
    )


@final
@dataclass(frozen=True, eq=False)
class _Machine:
    """The functions of the learner; `scale` is None where it is learned, `rows` sum the entries of each sample."""

    net: Functional
    loss: Loss
    sizes: tuple[int, int, int]
    C: float
    dual_ridge: float
    scale: float | None
    rows: Tensor

    def encode(self, x: Tree, task: Any) -> Tree:
        support, features, _ = self.sizes
        F = features_of(self.net, x["body"], task, "support")
        _demand(F, features, support)
        query = features_of(self.net, x["body"], task, "query")
        z = {"kernel": F @ F.T, "support": F, "query": query}
        return z | ({"scale": x["scale"]} if self.scale is None else {})

    def labels(self, task: Mapping[str, Tensor]) -> Tensor:
        return one_hot(task["support_y"].long(), self.sizes[2]).to(self.rows)

    def output(self, x: Tree, F: Tensor, query: Tensor, y: Tensor) -> Tensor:
        gamma = x["scale"] if self.scale is None else self.scale
        logits: Tensor = gamma * (query @ (F.T @ y))
        return logits

    def f(self, z: Tree, y: Tensor, task: Any) -> Tensor:
        return task_loss(self.loss, self.output(z, z["support"], z["query"], y), task, "query")

    def g(self, z: Tree, y: Tensor, task: Any) -> Tensor:
        square = (y * (z["kernel"] @ y)).sum() + self.dual_ridge * y.square().sum()
        value: Tensor = square / 2 - (self.labels(task) * y).sum()
        return value

    def constraints(self, _: Tree, task: Any) -> Polytope:
        kept = weighted(self.rows.new_ones(self.sizes[0], 1), task, "support") > 0
        upper = torch.where(kept, self.C * self.labels(task), 0.0)
        lower = torch.where(kept, -torch.inf, torch.zeros_like(upper))
        return Polytope(A=self.rows, b=0.0, lower=lower, upper=upper)

    def predict(self, x: Tree, y: Tensor, task: Any) -> Tensor:
        z = self.encode(x, task)
        return prediction(cross_entropy, self.output(x, z["support"], z["query"], y))

    def export(self, x: Tree) -> nn.Module:
        return self.net.load(x["body"])


def _demand(F: Tensor, features: int, support: int) -> None:
    for name, wanted, got in (("features", features, F.shape[-1]), ("support", support, len(F))):
        if wanted != got:
            raise ValueError(f"`svm_head({name}=...)` must be what a task has, {got}. Got {wanted}.")
