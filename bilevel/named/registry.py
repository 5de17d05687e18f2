"""Estimators by name: those of the library, and those that users register."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from bilevel._estimate import AbstractEstimator
from bilevel._flat import FlatProblem
from bilevel._optimizer import AbstractMinimizer, AbstractOptimizer
from bilevel._result import BilevelError
from bilevel.arguments.nearest import nearest
from bilevel.named.auto import Auto
from bilevel.named.builders import (
    Builder,
    aid,
    cg,
    dense,
    esj,
    finite_difference,
    first_order,
    gmres,
    itd,
    kkt,
    minres,
    network,
    neumann,
    nystrom,
    penalty,
    truncated,
)
from bilevel.named.implicit import IMPLICIT, implicit_name
from bilevel.named.registration import AUTO, demand_registration
from bilevel.named.setting import Setting


@final
@dataclass(frozen=True)
class NamedEstimator:
    """A name's one line of description, and how its estimator is built where the problem is first met."""

    description: str
    build: Builder


def _implicit(s: Setting) -> AbstractEstimator:
    """The estimator of another name, by the kind of inner problem."""
    return _named()[implicit_name(s.problem, s.x, s.y0)].build(s)


_TABLE: dict[str, tuple[Builder, str]] = {
    IMPLICIT: (_implicit, "the default: the implicit gradient that fits, aid-cg, or kkt under constraints on y"),
    "aid-cg": (aid(cg), "implicit gradient, conjugate gradients: the default for smooth strongly convex g"),
    "aid-neumann": (aid(neumann), "implicit gradient, Neumann series with a step from the largest curvature"),
    "aid-dense": (aid(dense), "implicit gradient, Cholesky factorization of the dense inner Hessian (few y)"),
    "aid-minres": (aid(minres), "implicit gradient, MINRES: symmetric systems, definite or not"),
    "aid-gmres": (aid(gmres), "implicit gradient, GMRES: any invertible system"),
    "aid-nystrom": (aid(nystrom), "implicit gradient, Nystrom approximation of low rank with damping (biased)"),
    "network": (
        network,
        "for modules: few warm inner steps, damped Gauss-Newton or Hessian, truncated (biased; online)",
    ),
    "itd": (itd(), "reverse mode through the inner steps; memory grows with them"),
    "itd-truncated": (truncated(20), "reverse mode through the last 20 inner steps (biased)"),
    "itd-forward": (itd(forward=True), "forward mode through the inner steps; cost grows with the number of x"),
    "itd-checkpointed": (itd(checkpoint=True), "reverse mode, recomputing: memory grows with the root of the steps"),
    "one-step": (truncated(1), "reverse mode through the last inner step only, Jacobian-free (biased)"),
    "first-order": (first_order, "no second derivatives: y moves as its start does or not (biased; FOMAML)"),
    "esj": (esj, "evolution-strategy Jacobian: zeroth order, perturbed inner solves in one batch"),
    "kkt": (kkt, "implicit gradient under constraints on y, from the optimality conditions that hold (few y)"),
    "penalty": (penalty, "fully first-order value function, with Richardson extrapolation in the weight"),
    "finite-difference": (finite_difference, "central differences of Phi: an oracle for tests, 2p inner solves"),
}
_BUILT_IN = {name: NamedEstimator(description, build) for name, (build, description) in _TABLE.items()}
_REGISTERED: dict[str, NamedEstimator] = {}  # by users, in this process


def _named() -> dict[str, NamedEstimator]:
    return _BUILT_IN | _REGISTERED


def estimators() -> dict[str, str]:
    """The estimators that can be asked for by name, each with one line of description; registered ones last.

    Example:
        >>> estimators()["aid-cg"][:17]
        'implicit gradient'
    """
    return {name: named.description for name, named in _named().items()}


def register_estimator(name: str, build: Builder, description: str) -> None:
    """Give an estimator of your own a name, which then stands for it wherever a name may be given.

    That is in `hypergradient`, `minimize`, `hyperobjective`, `compare` with its budgets, `check`, and on the command
    line, of a problem in a file that registers it. Call it at the top level of a module: a name is known in the process
    that has imported it, so that a worker process has it by importing the same module.

    Args:
        name: one word, such as "mine".
        build: setting -> estimator, a function of this one argument, called where the problem is first met.
            `setting.inner()`, `setting.unrolled()` and `setting.linear()` are solvers that are accurate there, or that
            spend a budget: with
            `per_step`, how many gradients and products of g one inner step brings with it in your estimator. One that
            asks for none of them, nor for `setting.steps(per_step)`, has no budgets.
        description: one line, for lists.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the name is taken, or it is not one word, or the description not one line.

    Example:
        >>> import torch
        >>> from bilevel import AID, BilevelProblem, hypergradient, register_estimator
        >>> from bilevel.solvers import MINRES
        >>> register_estimator(
        ...     "mine",
        ...     lambda s: AID(s.inner(per_step=2), MINRES(max_steps=s.steps(2))),
        ...     "by MINRES",
        ... )
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator="mine").grad
        tensor([-2.])
    """
    demand_registration("register_estimator", name, build, description, known=_named(), registered=_REGISTERED)
    _REGISTERED[name] = NamedEstimator(description, build)


def demand_names(*names: Any) -> None:
    """Refuse what is no estimator's name.

    Raises:
        ValueError: with the name that comes nearest.
    """
    known = list(_named())
    for name in names:
        if name not in known:
            raise ValueError(
                f"there is no estimator {str(name)[:100]!r}. {nearest(name, known)}Names: {', '.join(known)}."
            )


def build(name: str, s: Setting) -> AbstractEstimator:
    """The named estimator for a setting: accurate, or one that spends about `s.budget` gradients and products of g.

    Raises:
        ValueError: if there is no such name, it is not known what the estimator spends, the budget is too small, or the
            builder of a registered name fails or returns something else.
    """
    demand_names(name)
    s = replace(s, name=name)
    found = _registered(name, s) if name in _REGISTERED else _BUILT_IN[name].build(s)
    if s.budget is not None and not s.asked:
        raise ValueError(f"it is not known what {name!r} spends. Pass an estimator instead of a budget.")
    return found


def _registered(name: str, s: Setting) -> AbstractEstimator:
    """What a user's builder makes; one that does not work costs its own row of a comparison and no other."""
    try:
        found: object = _REGISTERED[name].build(s)
    except (ValueError, NotImplementedError, BilevelError):  # these say themselves why it is not to be had here
        raise
    except Exception as error:
        raise ValueError(
            f"{name!r} could not be built: the `build` that it was registered with raised {type(error).__name__}:"
            f" {error}. Correct it: `register_estimator(build=...)` takes a function of a setting."
        ) from error
    if not isinstance(found, AbstractEstimator):
        raise ValueError(
            f"{name!r} could not be built: the `build` that it was registered with must return an estimator, such as"
            f" `AID(...)`. Got {found!r}."
        )
    return found


def resolve(
    estimator: AbstractEstimator | Auto | str, problem: FlatProblem, x: Tensor, y0: Tensor
) -> AbstractEstimator:
    """An estimator from a name, a wish or itself.

    Raises:
        TypeError: if it is none of them.
        ValueError: if there is no estimator of that name.
    """
    if isinstance(estimator, AbstractEstimator):
        return estimator
    s = Setting(problem, x, y0)
    if estimator == AUTO or isinstance(estimator, Auto):
        from bilevel.named.choice import choose

        return choose(estimator if isinstance(estimator, Auto) else Auto(), s, tuple(_named()), build)
    if not isinstance(estimator, str):
        raise TypeError(
            f"`estimator` must be an estimator such as `AID(...)` or a name. Got {type(estimator).__name__}."
            f" Names: {', '.join(_named())}."
        )
    return build(estimator, s)


def default_outer(estimator: AbstractEstimator, is_fixed: bool) -> AbstractOptimizer | AbstractMinimizer:
    """The outer method of `minimize` where none is given.

    `QuasiNewton()` where the estimates are accurate and the data are the same at every step, so that Phi is one
    function and h its gradient; `Adam(0.05)` for others, whose bias or noise a line search would take for a wrong
    gradient.

    Args:
        estimator: what estimates h; see `AbstractEstimator.accurate`.
        is_fixed: whether the data are the same at every step.
    """
    from bilevel.solvers.adam import Adam
    from bilevel.solvers.quasi_newton import QuasiNewton

    return QuasiNewton() if estimator.accurate and is_fixed else Adam(0.05)
