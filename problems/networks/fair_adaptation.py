"""Adaptation under a fairness constraint: steps on a Lagrangian and its multiplier, from a start that is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import softmax

from bilevel._problem import BilevelProblem
from bilevel._sets import Box
from bilevel._tree import Tree, ravel
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, POSITIVE, demand_ranges
from bilevel.inner_problems.iteration import Iteration
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._modules import outputs_of
from bilevel.problems.meta_learning._tasks import Loss, Side, task_loss
from bilevel.problems.networks.adapted import adapted

Measure: TypeAlias = Literal["covariance", "difference"]
Scored: TypeAlias = Literal["probability", "output"]
OuterLoss: TypeAlias = Literal["lagrangian", "reference"]


@final
@dataclass(frozen=True, eq=False)
class FairAdaptation:
    """min_{y0} max_{m0 >= 0} mean_t L_t(y_K) + m0 (u_t(y_K) - c) on query sets, y_K by K primal-dual steps: PDFM.

    In a task, with u the unfairness on the support set, from the learned pair (y0, m0),

        y_{k+1} = y_k - step grad [L(y_k) + m_k (u(y_k) - c)],      m_{k+1} = [m_k + dual_step (u(ybar) - c)]_+,

    ybar the mean of y_1, ..., y_{k+1}. u is the absolute value of a measure of the scores s of a binary group z, zbar
    its mean: the decision-boundary covariance mean (z - zbar) s, or the difference of the groups' mean scores. Since

        mean (z - zbar) s = zbar (1 - zbar) (E[s | z = 1] - E[s | z = 0])

    the two are one in balanced groups up to a factor of 4. A group that is not there counts as no difference. On n
    samples the covariance of a scorer that is fair is some 0.2 / sqrt(n): of ten samples more than a c of 0.05.

    x is {"params": y0, "dual": m0}, y {"params", "sum", "dual"}, a task a dict as learners take, and `support_z` and
    `query_z` `(n,)` of zeros and ones. What is differentiated are the steps, `ITD(OwnSteps())`: at a saddle point the
    start would be forgotten, and with a few averaged steps it is not. The multiplier moves by its own ascent along the
    violation on query sets, whatever the steps make of it: to an outer optimizer, which descends, f offers the negative
    of that as its derivative in m0, so that `minimize` runs both (`Ascending` gives m0 a step of its own).

    `outer="reference"` is the loss of the reference's code: L alone in the place of the Lagrangian, m0 as above.

    The iteration adapts, and does not solve: on convex problems it may stall or its multiplier grow without end.
    :class:`FairClassifier` has the solution.

    Cost of a hypergradient for T tasks: T K gradients of the Lagrangian and as many products with second derivatives
    (`first_order`: none), and T K passes of the support set for the multiplier.

    Source: Zhao, Chen, Wang, Khan, "A primal-dual subgradient approach for fair meta learning", ICDM 2020; the
    covariance is that of Zafar, Valera, Gomez Rodriguez, Gummadi, "Fairness constraints", AISTATS 2017. The
    publication's code has `first_order`, the outer loss of its name, and scores that are probabilities.

    Args:
        net: the module as a function of its parameters.
        loss: (outputs, targets) -> the mean over samples.
        level: c.
        step: of y.
        dual_step: of the multiplier.
        steps: K.
        dual: where m0 begins.
        measure: u.
        scored: what s is of outputs `(n, 1)` or `(n, 2)`: the probability of the second class, or the (last) output
            itself, as of a regression, or where the constraint is to be convex.
        outer: the outer loss.
        first_order: hold gradients of the steps constant.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel import ITD, hypergradient
        >>> from bilevel.modules.functional import functional
        >>> from bilevel.solvers import OwnSteps
        >>> net = functional(torch.nn.Linear(2, 1))
        >>> own = FairAdaptation(net, torch.nn.functional.mse_loss, scored="output", steps=2)
        >>> tasks = {
        ...     f"{side}_{part}": torch.ones(3, 4, 2)[..., : 2 if part == "x" else 1]
        ...     for side in ("support", "query")
        ...     for part in "xy"
        ... }
        >>> tasks |= {
        ...     f"{side}_z": torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand(3, 4)
        ...     for side in ("support", "query")
        ... }
        >>> found = hypergradient(
        ...     own.problem, own.x0, own.y0, estimator=ITD(OwnSteps()), data=tasks
        ... )
        >>> round(float(found.grad["dual"]), 3)  # nothing is unfair: the multiplier may fall
        0.05
    """

    net: Functional
    loss: Loss
    level: float = 0.05
    step: float = 0.01
    dual_step: float = 0.01
    steps: int = 10
    dual: float = 1.0
    measure: Measure = "covariance"
    scored: Scored = "probability"
    outer: OuterLoss = "lagrangian"
    first_order: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, level=AT_LEAST_0, step=POSITIVE, dual_step=AT_LEAST_0, steps=COUNT, dual=AT_LEAST_0)

    @property
    def iteration(self) -> Iteration:
        """The inner problem."""
        return Iteration(self.advance, steps=self.steps, objective_function=self.g)

    @property
    def problem(self) -> BilevelProblem:
        """The problem over tasks."""
        return BilevelProblem(self.f, inner=self.iteration, init=self.init, tasks=True)

    @property
    def x0(self) -> dict[str, Tree]:
        """Where learning begins."""
        params = dict(self.net.params)
        return {"params": params, "dual": next(iter(params.values())).new_tensor(self.dual)}

    @property
    def y0(self) -> Tree:
        """The structure of what is adapted."""
        return self.init(self.x0)

    @property
    def constraint(self) -> Box:
        """m0 >= 0, for `minimize`."""
        vector, _ = ravel(self.x0)
        lower = torch.full_like(vector, -torch.inf)
        lower[-1] = 0.0
        return Box(lower=lower)

    @fitting
    def unfairness(self, params: Tree, task: Any, side: Side) -> Tensor:
        """u at these parameters on one side of a task."""
        return measured(self.scores(params, task, side), task, side, self.measure).abs()

    @fitting
    def scores(self, params: Tree, task: Any, side: Side) -> Tensor:
        """s `(n,)`."""
        output = outputs_of(self.net, params, task, side)
        if self.scored == "output":
            return output.reshape(len(output), -1)[:, -1]
        return output.reshape(-1).sigmoid() if output[0].numel() == 1 else softmax(output, -1)[:, -1]

    def f(self, x: Tree, y: Tree, task: Any) -> Tensor:
        value = task_loss(self.loss, outputs_of(self.net, y["params"], task, "query"), task, "query")
        excess = self.unfairness(y["params"], task, "query") - self.level
        dual: Tensor = x["dual"]
        if self.outer == "lagrangian":
            value = value + dual.detach() * excess
        return value + (dual.detach() - dual) * excess.detach()  # no value, and ascent for who descends

    def g(self, x: Tree, y: Tree, task: Any) -> Tensor:
        value = task_loss(self.loss, outputs_of(self.net, y["params"], task, "support"), task, "support")
        dual: Tensor = y["dual"]
        return value + dual * (self.unfairness(y["params"], task, "support") - self.level)

    def init(self, x: Tree, _task: Any = None) -> Tree:
        none = {name: torch.zeros_like(leaf) for name, leaf in x["params"].items()}
        return {"params": dict(x["params"]), "sum": none, "dual": x["dual"].detach()}

    def advance(self, x: Tree, y: Tree, gradient: Tree, k: int, task: Any) -> Tree:
        slopes = {name: d.detach() if self.first_order else d for name, d in gradient["params"].items()}
        params = {name: leaf - self.step * slopes[name] for name, leaf in y["params"].items()}
        total = {name: leaf + params[name] for name, leaf in y["sum"].items()}
        mean = {name: (leaf.detach() if self.first_order else leaf) / (k + 1) for name, leaf in total.items()}
        excess = self.unfairness(mean, task, "support") - self.level
        return {"params": params, "sum": total, "dual": (y["dual"] + self.dual_step * excess).clamp_min(0)}

    @checked()
    def adapted(self, x: Tree, tasks: Any) -> Tree:
        """The y of each task, for predictions: `(tasks, ...)` for each leaf."""
        return adapted(self.iteration, self.init, x, tasks, self.steps)


@checked()
def measured(scores: Tensor, task: Mapping[str, Tensor], side: Side, measure: Measure = "covariance") -> Tensor:
    """The covariance of scores with the group, or the difference of the groups' means, on one side of a task: `()`.

    Args:
        scores: s `(n,)`.
        task: with `{side}_z` and optionally `{side}_mask` `(n,)`.
        side: "support" or "query".
        measure: which.

    Example:
        >>> task = {"query_z": torch.tensor([0.0, 0.0, 1.0, 1.0])}
        >>> scores = torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> (
        ...     float(measured(scores, task, "query")),
        ...     float(measured(scores, task, "query", "difference")),
        ... )
        (0.25, 1.0)
    """
    z = task[f"{side}_z"].to(scores)
    mask = task.get(f"{side}_mask")
    there = torch.ones_like(z) if mask is None else mask.to(scores)
    if measure == "covariance":
        zbar = (there * z).sum() / there.sum()
        return (there * (z - zbar) * scores).sum() / there.sum()
    ones, zeros = (there * z).sum(), (there * (1 - z)).sum()
    gap = (there * z * scores).sum() / ones.clamp_min(1) - (there * (1 - z) * scores).sum() / zeros.clamp_min(1)
    return torch.where((ones > 0) & (zeros > 0), gap, torch.zeros_like(gap))
