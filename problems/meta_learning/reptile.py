"""Reptile: towards the adapted parameters of every task; a baseline."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SIZE
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.first_order import Reptile
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._tasks import Loss
from bilevel.problems.meta_learning.maml import maml
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate


@checked(step=POSITIVE, inner_steps=SIZE, evaluation_steps=COUNT)
def reptile(
    module: nn.Module | Functional,
    loss: Loss,
    *,
    step: float = 0.01,
    inner_steps: int = 5,
    evaluation_steps: int | None = None,
) -> Learner:
    """Reptile: h = x - mean_t y_N,  y_0 = x,  y_{k+1} = y_k - step grad L_t^support(y_k).

    The problem of `maml` with a direction that is no gradient of it: the query sets are not used in training. A
    baseline. With the outer step `GradientDescent(e)`, x moves the fraction e of the way to the mean of the y_N.

    Cost: T N gradients for T tasks; memory of one graph, whatever N.

    Source: Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", arXiv 2018.

    Args:
        module: the network, or `functional(module, ...)` with policies of its own.
        loss: (outputs, targets) -> the mean over samples.
        step: the inner step.
        inner_steps: N; with 1 this is joint training.
        evaluation_steps: the number of steps on a new task; None: N.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> learner = reptile(nn.Linear(1, 1), nn.functional.mse_loss)
        >>> learner.name
        'Reptile'
    """
    learner = maml(module, loss, step=step, inner_steps=inner_steps, evaluation_steps=evaluation_steps)
    return replace(learner, name="Reptile", estimator=Reptile(Iterate(GradientDescent(step), inner_steps)))
