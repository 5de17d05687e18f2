"""A few-shot learner: a bilevel problem over tasks, and how what was learned predicts on a new task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, final

from torch import Tensor, nn

from bilevel._estimate import AbstractEstimator
from bilevel._inner import AbstractInnerSolver
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.few_shot.likelihood import AbstractLikelihood
from bilevel.portable.pickling import AbstractPortable


@final
@dataclass(frozen=True, eq=False)
class Learner(AbstractPortable):
    """min_x mean_t f(x, y_t, task_t), y_t the task's adapted variable: what is trained, and how it is used after.

    A task is a dict of tensors: `support_x` `(n, ...)`, `support_y` `(n,)` or `(n, outputs)`, `query_x`, `query_y`, and
    optionally `support_mask` and `query_mask` `(n,)` with zeros at padding. A batch of tasks is the same dict with one
    more leading axis. g sees the support set, f the query set.

    Attributes:
        name: the method's.
        problem: f and g for one task; `problem.tasks` is True, or "loop".
        x0: what is learned across tasks, at its start.
        y0: one task's variable, for its structure (and its start, where the problem has no `init`).
        estimator: the hypergradient estimator that the method is published with; any that applies may be used.
        adapt: the inner solver that finds y for a new task.
        predict: (x, y, task) -> the query predictions of one task: log-probabilities `(queries, classes)` where targets
            are classes, else values `(queries, ...)`.
        export: x -> the user's module with what was learned, for `state_dict`.
        prepare: (batch, seed) -> the batch with whatever else f and g need, drawn from the seed (the noise of a
            Monte Carlo expectation); None: nothing.
        draws: (x, y, task) -> what `predict` averages over, `(samples, queries, ...)`: the query predictions of each
            draw of the task's posterior; None: there is no posterior.
        score: (x, y, task) -> the return of one task, a scalar, the higher the better: what it is judged by where
            there are no targets. Tasks are then any tensors with one leading axis; None: the accuracy, or the mean
            squared error, of `predict`.
        likelihood: of numbers given such a draw, for predictive densities and intervals; None: it is not known.
    """

    name: str
    problem: BilevelProblem
    x0: Tree = field(repr=False)
    y0: Tree = field(repr=False)
    estimator: AbstractEstimator
    adapt: AbstractInnerSolver
    predict: Callable[[Tree, Tree, Any], Tensor] = field(repr=False)
    export: Callable[[Tree], nn.Module] = field(repr=False)
    prepare: Callable[[Any, int], Any] | None = field(default=None, repr=False)
    draws: Callable[[Tree, Tree, Any], Tensor] | None = field(default=None, repr=False)
    likelihood: AbstractLikelihood | None = field(default=None, repr=False)
    score: Callable[[Tree, Tree, Any], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    def looped(self) -> Learner:
        """This learner with one task after the other, `tasks="loop"`: in training, adaptation and predictions alike.

        For modules and losses that `torch.vmap` cannot take (recurrent layers, `if`s on values, boolean masks), and for
        those to which the padding of tasks of different sizes would matter (batch normalization, class weights): the
        learners of `bilevel.problems` then show a module the examples of a task alone. The numbers are otherwise the
        same, at the cost of a call a task. Where a posterior is drawn from, see also `MonteCarlo(loop=True)`.

        Example:
            >>> from bilevel.problems import maml
            >>> maml(
            ...     nn.LSTM(2, 1), lambda output, target: (output[0] - target).square().mean()
            ... ).looped().problem.tasks
            'loop'
        """
        problem = copy.copy(self.problem)
        problem.tasks = "loop"
        return replace(self, problem=problem)
