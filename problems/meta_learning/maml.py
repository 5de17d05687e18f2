"""MAML: a start from which a few gradient steps fit a new task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel._estimate import AbstractEstimator
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SIZE
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.first_order import FirstOrder
from bilevel.hypergrad.itd import ITD
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._modules import as_functional, outputs_of, prediction
from bilevel.problems.meta_learning._tasks import Loss, task_loss
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate


@checked(step=POSITIVE, inner_steps=SIZE, evaluation_steps=COUNT)
def maml(
    module: nn.Module | Functional,
    loss: Loss,
    *,
    step: float = 0.01,
    inner_steps: int = 1,
    evaluation_steps: int | None = None,
    first_order: bool = False,
    learn_steps: bool = False,
) -> Learner:
    """min_x mean_t L_t^query(y_N),  y_0 = x,  y_{k+1} = y_k - step grad L_t^support(y_k): MAML.

    h = mean_t prod_{k<N} (I - step H_k) grad L_t^query(y_N), H_k = d2 L_t^support(y_k), the factor k = 0 leftmost. The
    iteration is the definition, there is no argmin: `ITD` and `ESJ` apply, and `FirstOrder`, which leaves the product
    out; `AID` and `Penalty` do not, and say so.

    With `learn_steps` each entry of the parameters has its own step a = exp(log_steps), learned with them (Meta-SGD,
    whose steps may be negative; these may not): y_{k+1} = y_k - a grad L(y_k), an instance of learned optimizer
    settings, `GradientDescent(step=lambda x: {name: log_step.exp(), ...})`. An estimator of your own needs that inner
    solver, `learner.estimator.inner`, since the steps are no part of the problem's functions.

    Cost of one hypergradient for T tasks, N steps: T N gradients of the support loss and as many Hessian products;
    memory of N graphs of the support loss of all tasks (`ITD(checkpoint=True)`: of one, and of 2 sqrt(N) copies of y).
    With steps longer than 2 / |H| the product grows like (1 + step |H|)^N: take the step in proportion to 1 / N.

    Losses are means over samples: the reference code's inner loss for classification is the number of classes times
    that, so that its steps 0.4 (Omniglot, 5 ways) and 0.01 (mini-ImageNet, 5 ways) are 2.0 and 0.05 here. Layers of
    batch normalization use the statistics of the batch at hand, in the query set as well; tasks that are padded are
    then refused, unless they are taken one after the other: `learner.looped()`.

    Source: Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017;
    Li, Zhou, Chen, Li, "Meta-SGD: learning to learn quickly for few-shot learning", arXiv 2017.

    Args:
        module: the network, or `functional(module, ...)` with policies of its own.
        loss: (outputs, targets) -> the mean over samples: `F.mse_loss`, `F.cross_entropy`.
        step: the inner step; where steps are learned, what they start from.
        inner_steps: N.
        evaluation_steps: the number of steps on a new task; None: N.
        first_order: first-order MAML: h = mean_t grad L_t^query(y_N).
        learn_steps: learn a step for each entry of the parameters.

    Returns:
        The learner: x is the dict of parameters; with `learn_steps`, {"params": ..., "log_steps": ...}.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel import hypergradient
        >>> learner = maml(nn.Linear(1, 1), torch.nn.functional.mse_loss, step=0.1)
        >>> tasks = {
        ...     name: torch.ones(4, 3, 1)
        ...     for name in ("support_x", "support_y", "query_x", "query_y")
        ... }
        >>> found = hypergradient(
        ...     learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=tasks
        ... )
        >>> found.y["weight"].shape
        torch.Size([4, 1, 1])
    """
    steps = inner_steps if evaluation_steps is None else evaluation_steps
    net = as_functional(module)
    descent = GradientDescent(_steps if learn_steps else step)
    inner = Iterate(descent, inner_steps)
    estimator: AbstractEstimator = FirstOrder(inner) if first_order else ITD(inner)

    own = _Adapted(net, loss, learn_steps)
    x0: Tree = dict(net.params)
    if learn_steps:
        log_step = torch.tensor(step, dtype=torch.float64, device="cpu").log()
        x0 = {
            "params": x0,
            "log_steps": {name: torch.full_like(p, float(log_step)) for name, p in net.params.items()},
        }
    return Learner(
        name="FOMAML" if first_order else "MAML",
        problem=BilevelProblem(own.f, own.g, init=own.init, iterative=learn_steps, tasks=True),
        x0=x0,
        y0=dict(net.params),
        estimator=estimator,
        adapt=Iterate(descent, steps),
        predict=own.predict,
        export=own.export,
    )


def _steps(x: Tree) -> Tree:
    """The learned steps of Meta-SGD."""
    return {name: log_step.exp() for name, log_step in x["log_steps"].items()}


@final
@dataclass(frozen=True, eq=False)
class _Adapted:
    """The functions of the learner."""

    net: Functional
    loss: Loss
    learn_steps: bool

    def f(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return task_loss(self.loss, outputs_of(self.net, y, task, "query"), task, "query")

    def g(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return task_loss(self.loss, outputs_of(self.net, y, task, "support"), task, "support")

    def init(self, x: Tree, task: Any) -> Tree:
        return x["params"] if self.learn_steps else x

    def predict(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return prediction(self.loss, outputs_of(self.net, y, task, "query"))

    def export(self, x: Tree) -> nn.Module:
        return self.net.load(x["params"] if self.learn_steps else x)
