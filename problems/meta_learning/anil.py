"""ANIL: the head is adapted to a task, the body is shared; and the test with no inner loop at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SIZE
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.itd import ITD
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._modules import (
    SIDES,
    as_functional,
    on_examples,
    outputs_of,
    prediction,
    weighted,
)
from bilevel.problems.meta_learning._tasks import Loss, Side, task_loss
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate


@checked(step=POSITIVE, inner_steps=SIZE, evaluation_steps=COUNT)
def anil(
    body: nn.Module | Functional,
    head: nn.Module | Functional,
    loss: Loss,
    *,
    step: float = 0.1,
    inner_steps: int = 5,
    evaluation_steps: int | None = None,
) -> Learner:
    """min_{phi, w} mean_t L_t^query(phi, w_N),  w_0 = w,  w_{k+1} = w_k - step grad_w L_t^support(phi, w_k): ANIL.

    With P_k = I - step d2_ww L^support(w_k) and v_k = prod_{j>=k} P_j grad_w L^query(w_N), the factor of the least j
    leftmost, h_w = v_0 and h_phi = grad_phi L^query - step sum_k [d_phi grad_w L^support(w_k)]' v_{k+1}, the mean of
    both over tasks. The features of the two sets are computed once for each hypergradient, whatever N.

    phi enters g, and w only the start: `ITD` and `ESJ` give the above; `AID` gives its limit for N to infinity where
    the head's loss is strongly convex, in which h_w is zero (|h_w| <= (1 - step mu)^N |grad_w L^query(w_N)| for steps
    up to 1 / L) and only phi is learned.

    Cost of one hypergradient for T tasks: one forward and backward pass of the body on both sets; T N gradients
    and T N products with second derivatives of the head. Memory: one graph of the body, N of the head.

    The curvature of the adapted loss is set by the learned features: adapt with the number of steps that was trained
    with. With more, the iteration may leave the region where it is stable. Batch normalization in the body uses the
    statistics of each of the two sets by itself.

    Source: Raghu, Raghu, Bengio, Vinyals, "Rapid learning or feature reuse? Towards understanding the effectiveness
    of MAML", ICLR 2020; Ji, Lee, Liang, Poor, "Convergence of meta-learning with task-specific adaptation over partial
    parameters", NeurIPS 2020.

    Args:
        body: the network up to the features: of an `nn.Sequential`, `module[:-1]`.
        head: what is adapted, its bias included: `module[-1]`.
        loss: (outputs, targets) -> the mean over samples: `F.mse_loss`, `F.cross_entropy`.
        step: the inner step.
        inner_steps: N.
        evaluation_steps: the number of steps on a new task; None: N, as it should be.

    Returns:
        The learner: x is {"body": phi, "head": w}; `export` gives an `nn.Sequential` with those two children.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from bilevel import hypergradient
        >>> learner = anil(
        ...     nn.Sequential(nn.Linear(1, 8), nn.Tanh()), nn.Linear(8, 1), nn.functional.mse_loss
        ... )
        >>> tasks = {
        ...     name: torch.ones(4, 3, 1)
        ...     for name in ("support_x", "support_y", "query_x", "query_y")
        ... }
        >>> found = hypergradient(
        ...     learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=tasks
        ... )
        >>> found.y["bias"].shape
        torch.Size([4, 1])
    """
    steps = inner_steps if evaluation_steps is None else evaluation_steps
    features, top = as_functional(body), as_functional(head)
    descent = GradientDescent(step)

    own = _Adapted(features, top, loss)
    return Learner(
        name="ANIL",
        problem=BilevelProblem(own.f, own.g, init=own.init, encode=own.encode, tasks=True),
        x0={"body": dict(features.params), "head": dict(top.params)},
        y0=dict(top.params),
        estimator=ITD(Iterate(descent, inner_steps)),
        adapt=Iterate(descent, steps),
        predict=own.predict,
        export=own.export,
    )


@final
@dataclass(frozen=True, eq=False)
class _Adapted:
    """The functions of the learner."""

    features: Functional
    top: Functional
    loss: Loss

    def encode(self, x: Tree, task: Any) -> Tree:
        return {**{side: outputs_of(self.features, x["body"], task, side) for side in SIDES}, "head": x["head"]}

    def on_head(self, y: Tree, z: Tree, task: Any, side: Side) -> Tensor:
        return on_examples(partial(self.top, y), z[side], task.get(f"{side}_mask"))

    def f(self, z: Tree, y: Tree, task: Any) -> Tensor:
        return task_loss(self.loss, self.on_head(y, z, task, "query"), task, "query")

    def g(self, z: Tree, y: Tree, task: Any) -> Tensor:
        return task_loss(self.loss, self.on_head(y, z, task, "support"), task, "support")

    def init(self, z: Tree, task: Any) -> Tree:
        return z["head"]

    def predict(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return prediction(self.loss, self.top(y, outputs_of(self.features, x["body"], task, "query")))

    def export(self, x: Tree) -> nn.Module:
        module = nn.Sequential()
        module.add_module("body", self.features.load(x["body"]))
        module.add_module("head", self.top.load(x["head"]))
        return module


@checked(classes=SIZE)
def no_inner_loop(learner: Learner, features: Callable[[Tree, Tensor], Tensor], classes: int) -> Learner:
    """score_c(q) = sum_i cos(phi(q), phi(s_i)) 1[label_i = c] over the support samples s_i: NIL, a learner for testing.

    What a trained MAML or ANIL learner is worth without its head and without adaptation. Predictions are the logarithm
    of the softmax of the scores; only their order is what the paper defines. Training is that of `learner`, unchanged.

    Cost of a prediction: one forward pass of the features on both sets.

    Source: Raghu, Raghu, Bengio, Vinyals, "Rapid learning or feature reuse? Towards understanding the effectiveness
    of MAML", ICLR 2020.

    Args:
        learner: what was trained.
        features: (x, inputs `(n, ...)`) -> the penultimate features `(n, ...)`. For ANIL it is
            `lambda x, inputs: net(x["body"], inputs)` with `net = functional(body)`.
        classes: their number.

    Raises:
        ValueError: if `classes` is less than 1.

    Example:
        >>> import torch
        >>> net = as_functional(nn.Linear(1, 2))
        >>> base = anil(net, nn.Linear(2, 2), nn.functional.cross_entropy)
        >>> learner = no_inner_loop(base, lambda x, inputs: net(x["body"], inputs), classes=2)
        >>> task = {
        ...     "support_x": torch.ones(2, 1),
        ...     "support_y": torch.tensor([0, 1]),
        ...     "query_x": torch.ones(3, 1),
        ... }
        >>> learner.predict(learner.x0, learner.y0, task).exp()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    predict = partial(_by_cosines, features, classes)
    return replace(learner, name="NIL", adapt=Iterate(GradientDescent(1.0), 0), predict=predict, draws=None)


def _by_cosines(
    features: Callable[[Tree, Tensor], Tensor],
    classes: int,
    x: Tree,
    y: Tree,  # noqa: ARG001
    task: Any,
) -> Tensor:
    points = (on_examples(partial(features, x), task[f"{side}_x"], task.get(f"{side}_mask")) for side in SIDES)
    support, query = (normalize(each.flatten(1), dim=-1) for each in points)
    labels = weighted(one_hot(task["support_y"].long(), classes).to(support), task, "support")
    return (query @ support.T @ labels).log_softmax(-1)
