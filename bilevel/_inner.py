"""Inner minimizations: the objective g(x, .) at a fixed x, and what an inner solver is."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import (
    AbstractProducts,
    Exact,
    Linearization,
    grad,
    hessian_operator,
    rows_of,
    total,
    value_and_gradient,
)
from bilevel._flat import FlatProblem
from bilevel._linear import LinearOperator
from bilevel._numerics.learned_settings import settings_at
from bilevel._numerics.misfits import called
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.spectrum import eigenvalue_ends
from bilevel._result import Solved, Status, Tally
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.unchecked import unchecked
from bilevel.portable.pickling import AbstractPortable
from bilevel.requirements.properties import Feature

if TYPE_CHECKING:
    from bilevel._optimizer import Setting
    from bilevel.certificates.certificate import Constants
    from bilevel.inner_problems.cone_form import FlatConeProgram
    from bilevel.inner_problems.flat_image import FlatImage
    from bilevel.inner_problems.nonlinear_constraints import FlatConstraints
    from bilevel.inner_problems.polytope import FlatPolytope
    from bilevel.inner_problems.separable import SeparableObjective

State: TypeAlias = tuple[Tensor, ...]  # an inner iteration's state; its first entry is y


@final
@dataclass(frozen=True, eq=False)
class OwnStep:
    """The step of an inner problem that is an iteration.

    Attributes:
        step: (y, gradient, number) -> the next y; differentiable, also in x. The gradient is None where it uses none.
        count: how many steps the problem takes, where an inner solver is not told otherwise.
        needs_gradient: whether it uses grad_y g.
    """

    step: Callable[[Tensor, Tensor | None, int], Tensor]
    count: int
    needs_gradient: bool


@final
class Objective:
    """y -> g(x, y) at a fixed x: values, gradients and Hessian products, counted.

    Vectors are `(q,)`, or `(*batch, q)` for independent problems side by side with values `(*batch,)`. One
    objective lives for one solve.

    Args:
        function: y -> values; differentiable by autograd.
        tally: where the calls are counted.
        linearize: how the owner wants the objective linearized at the solution; see :meth:`last_gradient`.
        closed_form: applies a user's map x -> y in the user's structures; see `ClosedForm`.
        constraints: linear constraints on y, for solvers that heed them.
        oracle: y -> (values, gradients), where there is a faster way than autograd.
        prox: (v, step) -> argmin_y h_x(y) + |y - v|^2 / (2 step), where the problem has a term h; differentiable.
        own: the problem's own step, where it is an iteration.
        solves: whether the y that is wanted solves an equation, and is not what some steps make of a start.
        settings: (setting, step) -> the value of a setting of an optimizer that is a function of x; see `setting`.
        active: (v, step) -> codes `(*batch, k)` of the manifold that the proximal map sends v to, where there are any:
            the support and its signs, say. Solvers go on until they stay.
        separable: what coordinate descent reads, where the problem is so.
        nonlinear: constraints on y that are no polytope, for solvers that heed them; linear ones stand beside them.
        cones: the cone program that the inner problem is, in the place of a function, for solvers that heed it.
        fixed_point: y -> T(x, y) `(*batch, q)`, where the y that is wanted is its fixed point; differentiable.
        known: y -> (g, g to second order), where g knows its own derivatives.
        image: gives k, A and b where the term is k(A y + b), for solvers that take it apart; else None.

    Example:
        >>> objective = Objective(lambda y: (y - 1).square().sum())
        >>> objective.gradient(torch.zeros(2))
        tensor([-2., -2.])
    """

    @checked()
    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        tally: Tally | None = None,
        linearize: Callable[[Tensor], Linearization] | None = None,
        closed_form: Callable[[Callable[..., object]], Tensor] | None = None,
        constraints: FlatPolytope | None = None,
        oracle: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        prox: Callable[[Tensor, Tensor | float], Tensor] | None = None,
        own: OwnStep | None = None,
        solves: bool = True,
        settings: Callable[[Setting, int], Tensor] | None = None,
        active: Callable[[Tensor, Tensor | float], Tensor] | None = None,
        separable: SeparableObjective | None = None,
        nonlinear: FlatConstraints | None = None,
        cones: FlatConeProgram | None = None,
        fixed_point: Callable[[Tensor], Tensor] | None = None,
        known: Callable[[Tensor], tuple[Tensor, Linearization]] | None = None,
        image: Callable[[], FlatImage | None] | None = None,
    ) -> None:
        self.function = function
        self.tally = Tally() if tally is None else tally
        self.closed_form, self.solves = closed_form, solves and own is None
        self.constraints, self.prox, self.own, self.active = constraints, prox, own, active
        self.linearization: Linearization | None = None
        self._linearize, self._oracle, self._settings, self._known = linearize, oracle, settings, known
        self.separable, self.nonlinear, self.cones, self.fixed_point = separable, nonlinear, cones, fixed_point
        self._image = image

    @property
    def is_plain(self) -> bool:
        """Whether y is to minimize g alone: there are no constraints, no proximal map, no map, no steps of its own."""
        beyond = (self.constraints, self.nonlinear, self.prox, self.own, self.cones, self.fixed_point)
        return all(part is None for part in beyond)

    @cached_property
    def image(self) -> FlatImage | None:
        """K, A and b where the term is k(A y + b) with the map of k alone known; made when first asked for."""
        return None if self._image is None else self._image()

    def scaled(self, factor: float) -> Objective:
        """Factor times this objective, for solvers whose squares would be lost at its own scale; it cannot be unrolled.

        Args:
            factor: a power of two, so that nothing is rounded.
        """
        oracle = self._oracle

        def scaled(y: Tensor) -> tuple[Tensor, Tensor]:
            assert oracle is not None
            value, gradient = oracle(y)
            return factor * value, factor * gradient

        return Objective(lambda y: factor * self.function(y), self.tally, oracle=None if oracle is None else scaled)

    def setting(self, setting: Setting, step: int = 0) -> Tensor:
        """The value at x, for a step, of a function of x: `(*batch, 1)` or `(*batch, q)`, differentiable in x.

        NaN where it is out of its range.

        Raises:
            ValueError: if this objective has no x.
        """
        if self._settings is None:
            raise ValueError(
                f"`{setting.owner}({setting.name}=...)` is a function of x, and this objective one of y alone: pass a"
                f" number. Functions of x are for `ITD`, `ESJ` and `FiniteDifference`."
            )
        return self._settings(setting, step)

    def value(self, y: Tensor) -> Tensor:
        """g(x, y): `(*batch,)`, without a graph."""
        self.tally.values += rows_of(y)
        with torch.no_grad():
            return self.function(y)

    def value_and_gradient(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """g(x, y) and grad_y g(x, y): `(*batch,)` and `(*batch, q)`, without a graph."""
        self.tally.gradients += rows_of(y)
        if self._oracle is not None:
            return self._oracle(y)
        if not torch.is_grad_enabled():  # which mostly is: setting it takes a microsecond a step
            with torch.enable_grad():
                return value_and_gradient(self.function, y)
        return value_and_gradient(self.function, y)

    def gradient(self, y: Tensor) -> Tensor:
        """grad_y g(x, y): `(*batch, q)`, without a graph."""
        return self.value_and_gradient(y)[1]

    def last_gradient(self, y: Tensor) -> Tensor:
        """The gradient at the point that a solver is about to return; a solver calls it at most once, there.

        Where the owner of the objective needs more at the solution (an implicit estimator needs the graph of
        this very gradient), it is built here and kept as `linearization`, so that nothing is computed twice.
        """
        if self._linearize is None:
            return self.gradient(y)
        self.linearization = self._linearize(y)
        return self.linearization.gradient

    def known_at(self, separable: SeparableObjective, y: Tensor, z: Tensor, gradient: Tensor) -> None:
        """Keep what a solver that reads the structure knows at the point that it is about to return.

        Args:
            separable: the structure.
            y: the point.
            z: X y.
            gradient: grad_y g there.
        """
        if self._linearize is not None:
            self.linearization = separable.linearized(y, z, gradient)

    def hessian(self, y: Tensor) -> tuple[Tensor, Tensor, LinearOperator]:
        """g, grad_y g and the operator of d2g/dy2 at y; the gradient's graph is built once and kept.

        Where g knows its own derivatives nothing of it is computed again for a y that is returned.
        """
        self.tally.gradients += rows_of(y)
        if self._known is not None:
            value, at = self._known(y)
            if self._linearize is not None:
                self.linearization = at
            return value, at.gradient, replace(at.operator, last_mv=None)
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            value = self.function(leaf)
            gradient = grad(total(value), leaf, create_graph=True)
        return value.detach(), gradient.detach(), hessian_operator(gradient, leaf, self.tally)

    def largest_curvature(self, y: Tensor) -> Tensor:
        """An upper estimate of the largest eigenvalue of d2g/dy2 at y: `(*batch,)`; some 10 to 20 products.

        The products are exact, or central differences of gradients where torch has no second derivative of g.
        """
        return self.curvature_ends(y)[0]

    def curvature_ends(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`largest_curvature`, and with the same products the least curvature that they see: `(*batch,)` each."""
        try:
            operator = self.hessian(y)[2]
            return eigenvalue_ends(operator, y)
        except NotImplementedError:
            step = torch.finfo(y.dtype).eps ** (1 / 3) * (1 + torch.linalg.vector_norm(y, dim=-1, keepdim=True))

        def mv(v: Tensor) -> Tensor:
            t = step / safe_row_norms(v).clamp_min(torch.finfo(v.dtype).tiny).unsqueeze(-1)
            product: Tensor = (self.gradient(y + t * v) - self.gradient(y - t * v)) / (2 * t)
            return product

        return eigenvalue_ends(LinearOperator(mv, y.shape[-1]), y)


class AbstractInnerSolver(AbstractPortable, abc.ABC):
    """Finds y*(x) = argmin_y g(x, y) to a tolerance or for a number of steps.

    The contract of every solver: `Solved.residual` is |grad_y g| at the returned point itself; y0 is not
    modified; NaN is a status; rows of a batch are independent problems, each with its own steps and status.
    """

    @property
    def heeds(self) -> frozenset[Feature]:
        """What it heeds beyond a smooth objective: nothing unless it says otherwise.

        It is refused where the inner problem has anything else. `heeds_constraints` is the older way to say so.
        """
        return frozenset({Feature.constraints}) if self.heeds_constraints else frozenset()

    @property
    def heeds_constraints(self) -> bool:
        """Whether it minimizes under `Objective.constraints`; see `heeds`."""
        return False

    @property
    def forgets_start(self) -> bool:
        """Whether where it stops does not depend on where it starts: it has a tolerance, or a formula.

        One that says nothing is taken to remember it: a run of estimates then starts it at y0 each time.
        """
        return False

    @property
    def why_iteration(self) -> str:
        """Why the inner problem, solved by it, is an iteration: y what its steps make of a start. A clause; else empty.

        Such as settings of its steps that are functions of x, which move y_N with x in a way that no optimality
        condition sees. Estimators that require one are then refused. One that says nothing solves the inner problem.
        """
        return ""

    @abc.abstractmethod
    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        """Minimize the objective from y0: `(q,)`, or `(*batch, q)` for independent problems side by side."""

    @property
    def tolerance(self) -> float | None:
        """What it brings `Solved.residual` to; None: it has no tolerance, or its steps are all that was asked for.

        One that says nothing is taken to have none: what its residuals are multiplied by is then not held against it.
        """
        return None

    def with_tolerance(self, tol: float) -> AbstractInnerSolver | None:
        """This solver, stopping where `Solved.residual` is at most `tol`; None: it has no tolerance.

        One that says nothing is taken to have none: certified accuracy then uses it as it is, and takes its y for the
        best that it finds.
        """
        return None

    def with_steps(self, steps: int) -> AbstractInnerSolver | None:
        """This solver, taking at most so many steps, and all of them if it has no tolerance; None: it is no iteration.

        One that says nothing is taken to be none: `adapt(steps=...)` then refuses it.
        """
        return None

    def solution_bound(self, constants: Constants, distance: float) -> float:
        """A bound on |y - y*| where it stops, having started within `distance` of y*; for `error_bound`.

        Raises:
            ValueError: if none is known, as here, for a solver that says nothing; or if a constant is missing.
        """
        raise unbounded(self, "bounds.gradient_descent")

    def as_gradient_descent(self, call: str) -> tuple[float, int]:
        """The step and the number of steps, if it is gradient descent with both fixed; for `error_bound`.

        Args:
            call: the function of `bilevel.bounds` that is to be called with them, to be named where it is not.

        Raises:
            ValueError: if it is not, as here, for a solver that says nothing.
        """
        raise unbounded(self, call)


def unbounded(solver: AbstractInnerSolver, call: str) -> ValueError:
    """That it is not known in advance where a solver ends, and which function of `bilevel.bounds` to call instead."""
    return ValueError(
        f"no bound is known for {solver!r}: only for `Iterate(GradientDescent(step), max_steps=N)`. Where its iterates"
        f" contract as those do, call `{call}` with that step and number of steps."
    )


class AbstractUnrollable(AbstractInnerSolver):
    """An inner solver that is an iteration of differentiable steps, state_{k+1} = T_k(x, state_k): what ITD takes.

    A state is a tuple of tensors whose first entry is y. `solve` must take exactly these steps.
    """

    max_steps: int
    tol: float | None
    min_steps: int  # taken though the tolerance is met, for the derivative; where positive, more if it needs them

    @property
    def needs_gradient(self) -> bool:
        """Whether a step takes grad_y g at `state[0]`; one that does not is given None, and g is not evaluated."""
        return True

    @property
    def residual_step(self) -> Tensor | float | None:
        """What `tol` is compared with: a gives |y_k - y_{k+1}| / a, the residual of a proximal step of length a.

        None: |grad_y g|, or where the steps are the problem's own |y_k - y_{k+1}|.
        """
        return None

    def moved(self, state: State, new: State) -> Tensor:
        """What `tol` is compared with, times `residual_step` where there is one: y_k - y_{k+1} `(*tasks, q)`."""
        return state[0] - new[0]

    def allowed(self, y: Tensor) -> Tensor | float:
        """What the residual at y may be: `tol`, or more where that is relative to y; `(*tasks,)`."""
        return self.tol or 0.0

    def missed(self, objective: Objective, y: Tensor, statuses: tuple[Status, ...]) -> tuple[Status, ...]:
        """The same statuses of steps that have ended at y, or why those have failed that have."""
        return statuses

    @abc.abstractmethod
    def tuned(self, objective: Objective, y0: Tensor) -> AbstractUnrollable:
        """This solver with all fixed that it left open, such as step sizes, derived from the curvature at y0."""

    def tuned_on_the_way(self, objective: Objective, y0: Tensor) -> AbstractUnrollable | None:
        """The same, derived from the curvature all along the way from y0, for where the steps of `tuned` have failed.

        None, as here: nothing was left open, or nothing on the way calls for other steps than those.
        """
        return None

    @abc.abstractmethod
    def begin(self, y0: Tensor) -> State:
        """The state before the first step; differentiable in y0."""

    @abc.abstractmethod
    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        """One step; differentiable in the gradient, in the state and, through the objective, in x.

        Args:
            objective: what else a step may use of the inner problem, such as `objective.prox(v, step)` or
                `objective.own.step(y, gradient, index)`.
            gradient: grad_y g at `state[0]`, with its graph from x and y; None where `needs_gradient` is False.
            state: the state before the step.
            index: the number of the step: 0, 1, ...
        """


def _values_and_gradients(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """g and grad_y g of all ranks, in one message."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        value = problem.by_itself().g(x.detach(), leaf)
        gradient = grad(total(value), leaf)
    value, gradient = problem.total(value.detach(), gradient)
    return value, gradient


_objective = unchecked(Objective)


def smooth_objective(
    problem: FlatProblem,
    x: Tensor,
    products: AbstractProducts | None,
    *,
    constraints: FlatPolytope | None = None,
    prox: Callable[[Tensor, Tensor | float], Tensor] | None = None,
    own: OwnStep | None = None,
    solves: bool = True,
    active: Callable[[Tensor, Tensor | float], Tensor] | None = None,
    separable: SeparableObjective | None = None,
    nonlinear: FlatConstraints | None = None,
    image: Callable[[], FlatImage | None] | None = None,
) -> Objective:
    """g(x, .) for inner solvers, with whatever else a kind has."""
    # From a start that depends on x, y may be meant as what steps make of it; an implicit estimator means the solution.
    solves = solves and (products is not None or problem.problem.init is None)
    linearize = None if products is None else lambda y: products.linearize(problem, x, y)
    made = Exact() if products is None else products
    oracle = made.oracle(problem, x)
    if oracle is None and problem.across is not None:
        oracle = partial(_values_and_gradients, problem, x)
    return _objective(
        problem.g_at(x),
        problem.tally,
        linearize,
        closed_form(problem, x),
        constraints,
        oracle,
        prox,
        own,
        solves,
        settings_at(problem, x),
        active,
        separable,
        nonlinear,
        known=made.known(problem, x),
        image=image,
    )


def closed_form(problem: FlatProblem, x: Tensor) -> Callable[[Callable[..., Tree]], Tensor]:
    """How a user's map x -> y*(x) becomes one of vectors; see `ClosedForm`."""

    def apply(solution: Callable[..., Tree]) -> Tensor:
        def one(x: Tree, *data: object) -> Tensor:
            found = called("solution(x, data)", solution, x, *data)
            return problem.y.ravel(found, "ClosedForm(solution=...)(x)")

        if x.dim() == 1:
            return problem.map(one, "g", x)
        return torch.stack([problem.map(one, "g", row) for row in x])  # a user's map need not be vectorizable

    return apply
