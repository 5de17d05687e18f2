"""Penalties learned by hypergradients: first one for all features, then each group's own; then a fit on all samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem
from bilevel._result import Status
from bilevel._sets import Box
from bilevel.hypergrad.aid import AID
from bilevel.inner_problems.linear_model import AbstractSampleLoss, LinearModel
from bilevel.outer.minimize import minimize
from bilevel.outer.solution import Solution
from bilevel.problems.glm.losses import AbstractRowLoss
from bilevel.problems.glm.model import Coefficient, GeneralizedLinearModel
from bilevel.prox.term import AbstractProxTerm
from bilevel.sklearn.folds import Folds
from bilevel.solvers.cg import CG
from bilevel.solvers.coordinate_descent import CoordinateDescent
from bilevel.solvers.jacobi import Jacobi
from bilevel.solvers.newton_pcg import NewtonPCG
from bilevel.solvers.quasi_newton import QuasiNewton

_TOL = 1e-8  # of inner gradients, where features and targets have spread 1


@final
@dataclass(frozen=True, eq=False)
class Learned:
    """What is learned.

    Attributes:
        x: logarithms of penalties, a row for each kind of penalty `(..., G)`.
        y: the fit on all samples.
        solution: the outer run that ended at x.
        steps: outer steps of all stages.
    """

    x: Tensor
    y: Tensor
    solution: Solution
    steps: int


@final
@dataclass(frozen=True, eq=False)
class Task:
    """A linear model, its samples, and its folds.

    Attributes:
        X: features `(n, d)`.
        targets: `(n, T)`, one column for each output or a column of labels.
        loss: of one output, or of a row of them.
        outputs: C, rows of coefficients; 0: y is a vector.
        train: weights of samples that train `(K, n)`.
        held: weights of samples held out `(K, n)`.
    """

    X: Tensor
    targets: Tensor
    loss: AbstractRowLoss | AbstractSampleLoss
    outputs: int
    train: Tensor
    held: Tensor

    def everything(self) -> Task:
        """One fold, which trains on all samples."""
        n = self.X.shape[0]
        whole = torch.full((1, n), 1 / n, dtype=self.train.dtype)
        return Task(self.X, self.targets, self.loss, self.outputs, whole, whole)

    def model(self, weights: Tensor, penalty: Coefficient | None, samples: Any = None) -> GeneralizedLinearModel:
        """The loss of all folds, with weights `(K, n)`, and a penalty; `samples`: a weight for each, of x."""
        targets = torch.cat([self.targets, weights.mT], 1)
        each = torch.ones((), dtype=weights.dtype) if samples is None else samples
        return GeneralizedLinearModel(self.X, targets, Folds(self.loss, len(weights)), each, penalty)

    def smooth(self, penalty: Callable[[Tensor], Tensor]) -> tuple[BilevelProblem, Tensor, AID]:
        """The problem of a quadratic penalty, where y starts, and what estimates its hypergradients."""
        problem = BilevelProblem(self.model(self.held, None), self.model(self.train, penalty))
        y0 = torch.zeros(len(self.train) * self.outputs, self.X.shape[1], dtype=torch.float64)
        return problem, y0, AID(NewtonPCG(_TOL), CG(rtol=1e-6, preconditioner=Jacobi()))

    def sparse(self, term: Callable[[Tensor], AbstractProxTerm]) -> tuple[BilevelProblem, Tensor, AID]:
        """The problem of a separable term that is not smooth: folds are tasks that share X."""
        assert isinstance(self.loss, AbstractSampleLoss)
        targets = self.targets[:, 0]
        train = LinearModel(self.X, targets, self.loss, weights=lambda fold: fold["train"])
        held = LinearModel(self.X, targets, self.loss, weights=lambda fold: fold["held"])
        problem = BilevelProblem(held, train, prox=lambda x, _: term(x), tasks=True)
        return problem, torch.zeros(self.X.shape[1], dtype=torch.float64), AID(CoordinateDescent(_TOL), CG(rtol=1e-6))

    @property
    def folds(self) -> dict[str, Tensor]:
        """The data of those tasks: their mean is over folds, which `held` has already."""
        return {"train": self.train, "held": self.held * len(self.held)}


# of a task, and of what makes x the logarithms of penalties of each feature, `(..., d)`
Posed = Callable[[Task, Callable[[Tensor], Tensor]], tuple[BilevelProblem, Tensor, AID]]


@final
@dataclass(frozen=True)
class Search:
    """How x is searched for.

    Attributes:
        name: of the estimator, for warnings.
        groups: of features `(d,)`, numbers from 0.
        start: where x begins, one number for each kind of penalty `(...)`.
        lower: of each entry of x.
        upper: likewise.
        max_iter: outer steps of a stage, at most.
        tol: of the outer method, relative to the gradient that it begins with.
    """

    name: str
    groups: Tensor
    start: Tensor
    lower: float
    upper: float
    max_iter: int
    tol: float

    def learn(self, task: Task, posed: Posed) -> Learned:
        """Learn x, first with one number for all groups, and fit all samples with what was best."""
        groups, x, steps = int(self.groups.max()) + 1, self.start.unsqueeze(-1), 0
        if groups > 1:
            first = self._run(task, posed(task, lambda x: x.expand(*x.shape[:-1], len(self.groups))), x)
            assert isinstance(first.best.x, Tensor)
            x, steps = first.best.x.expand(*self.start.shape, groups), len(first.history) - 1

        def each(x: Tensor) -> Tensor:
            return x[..., self.groups]

        found = self._run(task, posed(task, each), x.contiguous())
        warn_of(self.name, found)
        best, whole = found.best.x, task.everything()
        assert isinstance(best, Tensor)
        final = posed(whole, each)
        y = run(whole, final, best, 0).y
        assert isinstance(y, Tensor)
        return Learned(best, y[0] if final[0].tasks else y, found, max(1, steps + len(found.history) - 1))

    def _run(self, task: Task, problem: tuple[BilevelProblem, Tensor, AID], x: Tensor) -> Solution:
        box, outer = Box(self.lower, self.upper), QuasiNewton(rtol=self.tol)
        return run(task, problem, x, self.max_iter, outer=outer, constraint=box)


def warn_of(name: str, found: Solution) -> None:
    """Warn of estimates that failed on the way. A derivative on one side of a kink is one of a search over lassos.

    Trial points that a line search went back from do not count.
    """
    from sklearn.exceptions import ConvergenceWarning

    met = {record.status for record in found.history if not record.rejected and not record.status.ok}
    met -= {Status.weakly_active, Status.one_sided}
    if met:
        raised = f"`{name}.fit` met what did not succeed on the way: {Status.worst(met)}"
        warnings.warn(f"{raised} See `solution_`.", ConvergenceWarning, stacklevel=5)


def run(
    task: Task,
    problem: tuple[BilevelProblem, Tensor, AID],
    x: Tensor,
    max_iter: int,
    outer: QuasiNewton | None = None,
    constraint: Box | None = None,
) -> Solution:
    """A run from x; of no steps, what is known at x."""
    posed, y0, estimator = problem
    return minimize(
        posed,
        x,
        y0,
        estimator=estimator,
        outer=outer,
        max_steps=max_iter,
        constraint=constraint,
        throw=False,
        data=task.folds if posed.tasks else None,
    )
