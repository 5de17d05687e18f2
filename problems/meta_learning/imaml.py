"""iMAML: adaptation as the minimizer of a task's loss near the shared parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from bilevel._inner import AbstractInnerSolver
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, SIZE
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.aid import AID
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._modules import as_functional, outputs_of, prediction
from bilevel.problems.meta_learning._tasks import Loss, task_loss
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate

Strength: TypeAlias = float | Mapping[str, float | Tensor]


@checked(step=POSITIVE, inner_steps=SIZE, linear_steps=SIZE, damping=AT_LEAST_0)
def imaml(
    module: nn.Module | Functional,
    loss: Loss,
    *,
    regularization: Strength = 2.0,
    learn_regularization: bool = False,
    step: float | None = None,
    inner_steps: int = 16,
    inner: AbstractInnerSolver | None = None,
    linear_steps: int = 5,
    damping: float = 0.0,
) -> Learner:
    """iMAML: g = loss(y; support) + lambda |y - theta|^2 / 2,  f = loss(y; query),  x = theta, y from y_0 = theta.

    The hypergradient is lambda (H + lambda I)^-1 grad f = (I + H / lambda)^-1 grad f at y, with H the Hessian of the
    support loss: it does not depend on the path to y, and memory does not grow with the inner steps. For lambda -> inf
    it tends to grad f(theta), for lambda -> 0 to zero where the support loss has a strict minimum.

    g is strongly convex, and y a function of theta, for lambda above the most negative curvature of the support loss.
    Where it is not, `CG` reports `Status.negative_curvature` for the task and what it had found until then counts:
    train with the norm of the hypergradient clipped, `outer=Clipped(Adam(1e-3), max_norm=1.0)`: near such points it is
    large and says little. With a step too long for the curvature gradient descent diverges, which the hypergradient
    does not discourage; `train` takes no step along such an estimate. A step that is left out is derived from the
    curvature where y starts; with a line search gradient descent cannot diverge.

    Cost of an estimate: `inner_steps` + 1 gradients of the support loss, `linear_steps` products with H (and those of
    a derived step), one gradient of the query loss. Memory: the graph of one gradient.

    Error for a y at distance d from y*, a linear solution at distance r, and mu the least eigenvalue of H + lambda I:
    at most (lambda / mu) (L_f + rho M_f / mu) d + r, with M_f and L_f bounds on the query loss's gradient and Hessian
    and rho the Lipschitz constant of H.

    Source: Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients", NeurIPS 2019.

    Args:
        module: the network; its parameters that require a gradient are theta.
        loss: (outputs, targets) -> mean over samples.
        regularization: lambda: one number, or one for each parameter by name: numbers, or tensors that broadcast to
            the parameter.
        learn_regularization: learn it too: x is {"params": theta, "log_regularization": log lambda}, the latter of the
            structure that `regularization` has. To keep lambda within limits pass a projection,
            `minimize(constraint={"log_regularization": Box(math.log(0.01), math.log(5000))})`.
        step: of gradient descent in y; None: 1 / L of each task, L the largest curvature of g at theta, which takes
            some 10 to 20 products with H.
        inner_steps: of gradient descent in y.
        inner: another inner solver instead of it. With backtracking: `Iterate(GradientDescent(0.05), 16,
            line_search=Armijo())`; Hessian-free: `Newton(tol=0.0, max_steps=5, linear=CG(rtol=0.0, max_steps=5))`.
        linear_steps: steps of conjugate gradients.
        damping: solve with H + (lambda + damping) I in the place of H + lambda I; another, biased hypergradient.

    Raises:
        ValueError: if a number is out of range, or `regularization` names what the module does not have.

    Example:
        >>> from bilevel import hypergradient
        >>> net = nn.Linear(1, 1, bias=False)
        >>> learner = imaml(net, nn.functional.mse_loss, regularization=1.0)
        >>> tasks = {
        ...     name: torch.ones(3, 4, 1)
        ...     for name in ("support_x", "support_y", "query_x", "query_y")
        ... }
        >>> found = hypergradient(
        ...     learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=tasks
        ... )
        >>> found.y["weight"].shape
        torch.Size([3, 1, 1])
    """
    net = as_functional(module)
    strength = _strength(net, regularization)
    if not linear_steps >= 1:
        raise ValueError(f"`imaml(linear_steps=...)` must be at least 1. Got {linear_steps}. Use `maml` without any.")
    solver = Iterate(GradientDescent(step), inner_steps) if inner is None else inner
    own = _Adapted(net, loss, strength, learn_regularization)
    x0: Tree = dict(net.params)
    if learn_regularization:
        x0 = {"params": x0, "log_regularization": _log(net, strength)}
    return Learner(
        name="iMAML",
        problem=BilevelProblem(own.f, own.g, init=own.init, tasks=True),
        x0=x0,
        y0=dict(net.params),
        estimator=AID(solver, CG(rtol=0.0, max_steps=linear_steps, recompute=False), damping=damping),
        adapt=solver,
        predict=own.predict,
        export=own.export,
    )


@final
@dataclass(frozen=True, eq=False)
class _Adapted:
    """The functions of the learner."""

    net: Functional
    loss: Loss
    strength: float | dict[str, Tensor]
    learn_regularization: bool

    def parts(self, x: Tree) -> tuple[dict[str, Tensor], Tree]:
        """theta and lambda."""
        if not self.learn_regularization:
            return x, self.strength
        log = x["log_regularization"]
        return x["params"], log.exp() if isinstance(log, Tensor) else {name: log[name].exp() for name in log}

    def f(self, _: Tree, y: dict[str, Tensor], task: Any) -> Tensor:
        return task_loss(self.loss, outputs_of(self.net, y, task, "query"), task, "query")

    def g(self, x: Tree, y: dict[str, Tensor], task: Any) -> Tensor:
        theta, lambda_ = self.parts(x)
        names = list(self.net.params)
        fit = task_loss(self.loss, outputs_of(self.net, y, task, "support"), task, "support")
        # Joined: a few operations on one vector, whatever the number of layers.
        away = (_join([y[name] for name in names]) - _join([theta[name] for name in names])).square()
        if isinstance(lambda_, dict):
            weights = _join([lambda_[name].expand_as(y[name]) for name in names])
            return fit + (weights * away).sum() / 2
        value: Tensor = fit + lambda_ / 2 * away.sum()
        return value

    def init(self, x: Tree, _: Any) -> Tree:
        return self.parts(x)[0]

    def predict(self, _: Tree, y: Tree, task: Any) -> Tensor:
        return prediction(self.loss, outputs_of(self.net, y, task, "query"))

    def export(self, x: Tree) -> nn.Module:
        return self.net.load(self.parts(x)[0])


def _join(leaves: list[Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def _strength(net: Functional, given: Strength) -> float | dict[str, Tensor]:
    """The regularization as a number, or as a tensor for each parameter."""
    if not isinstance(given, Mapping):
        if isinstance(given, Tensor) and given.numel() != 1:
            raise ValueError(
                "`imaml(regularization=...)` must be one number, or a dict with one entry for each parameter by name."
                f" Got a tensor of shape {tuple(given.shape)}."
            )
        if not 0 < given < math.inf:
            raise ValueError(f"`imaml(regularization=...)` must be positive. Got {given}.")
        return float(given)
    if given.keys() != net.params.keys():
        raise ValueError(
            f"`imaml(regularization=...)` must be a number, or name every parameter of the module."
            f" Got {sorted(given)} for {sorted(net.params)}."
        )
    found = {
        name: torch.as_tensor(given[name], dtype=own.dtype, device=own.device).detach()
        for name, own in net.params.items()
    }
    for name, value in found.items():
        try:
            value.expand_as(net.params[name])
        except RuntimeError as error:
            raise ValueError(
                f"`imaml(regularization=...)` must broadcast to shape {tuple(net.params[name].shape)} at {name!r}."
                f" Got {tuple(value.shape)}."
            ) from error
        if not bool((value > 0).all() & value.isfinite().all()):
            raise ValueError(f"`imaml(regularization=...)` must be positive at {name!r}. Got {float(value.min())}.")
    return found


def _log(net: Functional, strength: float | dict[str, Tensor]) -> Tree:
    if isinstance(strength, dict):
        return {name: value.log() for name, value in strength.items()}
    first = next(iter(net.params.values()))
    return torch.tensor(math.log(strength), dtype=first.dtype, device=first.device)
