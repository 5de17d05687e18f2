"""AID-BiO and ITD-BiO: descent along estimates that take a few steps from where the last one ended."""

from __future__ import annotations

from bilevel._optimizer import AbstractMinimizer, AbstractOptimizer
from bilevel.algorithms.descent import Descent
from bilevel.algorithms.engine.steps import Step
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE


@checked(inner_step=POSITIVE, outer_step=POSITIVE, inner_steps=AT_LEAST_1, linear_steps=AT_LEAST_1)
def aid_bio(
    inner_step: Step, outer_step: Step | AbstractMinimizer, inner_steps: int = 10, linear_steps: int = 10
) -> Descent:
    """AID-BiO: D steps of y, N steps of conjugate gradients for H v = grad_y f, one of x; y and v go on.

        D times  y <- y - alpha grad_y g;     v <- CG_N(H, grad_y f; from v);     x <- P(x - beta (grad_x f - G v))

    With D of the order of the condition number and N of its root, it is gradient descent on Phi; with D = N = 1 and a
    small beta it still converges, as both go on from where they were.

    Cost: D + 1 gradients of g, one of f, N + 2 products and one cross product a step.

    Source: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, algorithm 1.

    Args:
        inner_step: alpha, of y, at most 1 / L; or an optimizer.
        outer_step: beta, of x; or an optimizer.
        inner_steps: D.
        linear_steps: N.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, or a number of steps below 1.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> aid = aid_bio(inner_step=0.5, outer_step=0.5, inner_steps=3, linear_steps=1)
        >>> round(float(minimize(problem, x0, x0, algorithm=aid, max_steps=100).x), 6)
        3.0
    """
    from bilevel.hypergrad.aid import AID
    from bilevel.solvers.cg import CG
    from bilevel.solvers.iterate import Iterate

    inner = Iterate(_optimizer(inner_step), inner_steps)
    return Descent(AID(inner, CG(rtol=0.0, max_steps=linear_steps)), _outer(outer_step), warm_start=True)


@checked(inner_step=POSITIVE, outer_step=POSITIVE, inner_steps=AT_LEAST_1)
def itd_bio(inner_step: Step, outer_step: Step | AbstractMinimizer, inner_steps: int = 10) -> Descent:
    """ITD-BiO: D steps of y, the derivative of f(x, y_D(x)) through them, one step of x; y goes on.

        D times  y <- y - alpha grad_y g;      h = grad_x f - alpha sum_t G_t (I - alpha H_{t+1}) ... grad_y f

    with the start of the D steps taken as constant: where they are few, h is short of the gradient by about
    (1 - alpha mu)^D of its implicit part, from whatever start.

    Cost: D gradients, D products and D cross products a step, one gradient of f. Memory: D graphs.

    Source: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, algorithm 1.

    Args:
        inner_step: alpha, of y, at most 1 / L; or an optimizer that can be unrolled.
        outer_step: beta, of x; or an optimizer.
        inner_steps: D.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, or `inner_steps` below 1.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> itd = itd_bio(inner_step=0.5, outer_step=0.5, inner_steps=5)
        >>> round(float(minimize(problem, x0, x0, algorithm=itd, max_steps=100).x), 6)
        3.0
    """
    from bilevel.hypergrad.itd import ITD
    from bilevel.solvers.iterate import Iterate

    return Descent(ITD(Iterate(_optimizer(inner_step), inner_steps)), _outer(outer_step), warm_start=True)


def _optimizer(step: Step) -> AbstractOptimizer:
    from bilevel.solvers.gradient_descent import GradientDescent

    return step if isinstance(step, AbstractOptimizer) else GradientDescent(step)


def _outer(step: Step | AbstractMinimizer) -> AbstractOptimizer | AbstractMinimizer:
    return step if isinstance(step, AbstractMinimizer) else _optimizer(step)
