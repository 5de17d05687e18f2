"""Every derivative taken anywhere: gradients, retained Hessian products, cross products, finite differences."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, final

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.known_point import KnownObjective
from bilevel._numerics.second_derivatives import explain, explained, refuse_dropped_terms
from bilevel._result import Report, Status, Tally
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.arguments.unchecked import unchecked
from bilevel.portable.pickling import AbstractPortable
from bilevel.requirements.properties import START_ONLY, DoesNotApply

if TYPE_CHECKING:  # it is given a problem in vectors, and makes none
    from bilevel._flat import FlatProblem
    from bilevel.inner_problems.multipliers import Multipliers

_operator = unchecked(LinearOperator)  # of functions of this module
_LOST = 0.1  # of a product by differences: where rounding is more than that, hardly a digit is left


def grad(output: Tensor, leaf: Tensor, *, create_graph: bool = False, checked: bool = False) -> Tensor:
    """d output / d leaf, zero where output does not depend on leaf; with a graph only where that is complete.

    `checked` says that the same function has been found to have a second derivative.
    """
    if not output.requires_grad:
        return torch.zeros_like(leaf)
    if create_graph and not checked:
        refuse_dropped_terms(output, leaf)
    try:
        (found,) = torch.autograd.grad(output, leaf, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        explain(error)
        raise
    return torch.zeros_like(leaf, requires_grad=create_graph) if found is None else found


def value_and_gradient(function: Callable[[Tensor], Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """function(y) `(*batch,)` and its gradient `(*batch, q)`, without a graph: a step of an inner solver.

    What :func:`grad` does, written out: there are more of these than of all other derivatives.
    """
    leaf = y.detach().requires_grad_()
    value = function(leaf)
    if not value.requires_grad:
        return value.detach(), torch.zeros_like(leaf)
    try:
        (found,) = torch.autograd.grad(value if value.dim() == 0 else value.sum(), leaf, allow_unused=True)
    except RuntimeError as error:
        explain(error)
        raise
    return value.detach(), torch.zeros_like(leaf) if found is None else found


_AS_IT_IS = contextlib.nullcontext()


def with_graphs() -> contextlib.AbstractContextManager[object]:
    """Where graphs are made: `torch.enable_grad()`, which takes two microseconds, unless they are made anyhow."""
    return _AS_IT_IS if torch.is_grad_enabled() else torch.enable_grad()


def rows_of(y: Tensor) -> int:
    """How many problems stand side by side in y `(*batch, q)`: 1 without leading axes."""
    return 1 if y.dim() == 1 else y.shape[:-1].numel()


def total(values: Tensor) -> Tensor:
    """The sum over a batch `()`; a single value as it is: its sum would be an operation more, forward and backward."""
    return values if values.dim() == 0 else values.sum()


def outer_gradients(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Phi's integrand f(x, y) `()`, grad_x f `(p,)` and grad_y f `(*tasks, q)`, by one backward pass."""
    problem.tally.outer_gradients += rows_of(y)
    with with_graphs():
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = problem.by_itself().f(x, y)
        if not value.requires_grad:
            return problem.total(value)[0], torch.zeros_like(x), torch.zeros_like(y)
        try:
            fx, fy = torch.autograd.grad(value, (x, y), allow_unused=True)
        except RuntimeError as error:
            explain(error)
            raise
        fx, fy = torch.zeros_like(x) if fx is None else fx, torch.zeros_like(y) if fy is None else fy
    value, fx, fy = problem.total(value.detach(), fx, fy)
    return value, fx, fy


def inner_gradient_in_x(problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor | None:
    """grad_x of the sum of g(x, y) over the batch: `(p,)`, without a graph; None where g does not depend on x.

    Raises:
        DoesNotApply: if it does not, and y depends on x through its start only.
    """
    problem.tally.gradients += y.shape[:-1].numel()
    with torch.enable_grad(), explained():
        x = x.detach().requires_grad_()
        value = total(problem.part_of_g(x, y.detach()))
        found = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    if found is None and problem.problem.init is not None:
        raise DoesNotApply(START_ONLY)
    return found


def inner_gradients(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Values of g `(*tasks,)`, grad_x of their sum as in :func:`inner_gradient_in_x`, and grad_y: one backward pass.

    Raises:
        DoesNotApply: if g does not depend on x, and y depends on x through its start only.
    """
    problem.tally.gradients += y.shape[:-1].numel()
    with torch.enable_grad(), explained():
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        values = problem.g(x, y)
        gx, gy = torch.autograd.grad(total(values), (x, y), allow_unused=True) if values.requires_grad else (None, None)
    problem.tally.beside += 0 if gx is None else y.shape[:-1].numel()
    if gx is None and problem.problem.init is not None:
        raise DoesNotApply(START_ONLY)
    return values.detach(), gx, torch.zeros_like(y) if gy is None else gy


def demand_beyond_start(problem: FlatProblem, x: Tensor, y: Tensor) -> None:
    """Refuse a y that depends on x through its start only; one gradient with its graph, where there is an `init`.

    Raises:
        DoesNotApply: if no path of the graph leads from x to grad_y g.
    """
    if problem.problem.init is None:
        return
    with torch.enable_grad(), explained():
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        gradient = grad(total(problem.g(x, y)), y, create_graph=True)
        seen = gradient.requires_grad and torch.autograd.grad(gradient.sum(), x, allow_unused=True)[0] is not None
    if not seen:
        raise DoesNotApply(START_ONLY)


def hessian_operator(gradient: Tensor, y: Tensor, tally: Tally) -> LinearOperator:
    """d2g/dy2 as an operator, from a gradient in y whose graph is kept: a product is one backward pass.

    Building the graph once and reusing it is the cheapest exact product in eager torch: 0.9 to 2 times the cost
    of a gradient. Rows of a batch are independent, so that the product with the sum's Hessian is row by row.
    """
    rows, linear = rows_of(y), not gradient.requires_grad

    def mv(v: Tensor) -> Tensor:
        tally.hvps += rows
        if linear:  # g is linear in y
            return torch.zeros_like(v)
        try:
            (hv,) = torch.autograd.grad(gradient, y, v, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            explain(error)
            raise
        return torch.zeros_like(v) if hv is None else hv

    return _operator(mv, y.shape[-1], positive_definite=True)


def cross_operator(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[LinearOperator, Tensor, float]:
    """G'G / u^2 or GG' / u^2, whichever is smaller, with G = d2g/dxdy `(p, q)`, a vector like those it acts on, and u.

    Its largest eigenvalue is |G|^2 / u^2; u is 1, or where squares would be lost about the size of G. Two products with
    second derivatives of g each time, and one at first that is not counted; tasks side by side are one G.
    """
    problem.tally.gradients += y.shape[:-1].numel()
    with torch.enable_grad():
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = problem.g(x, y).sum()
        gx, gy = grad(value, x, create_graph=True), grad(value, y, create_graph=True)

    def pull(gradient: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
        problem.tally.cross_products += y.shape[:-1].numel()
        if not gradient.requires_grad:
            return torch.zeros_like(leaf)
        with explained():
            found = torch.autograd.grad(gradient, leaf, v, retain_graph=True, allow_unused=True, materialize_grads=True)
        return found[0]

    counted = problem.tally.cross_products
    size = float(pull(gy, x, torch.ones_like(y)).abs().max()) if x.numel() else 0.0
    problem.tally.cross_products = counted
    info = torch.finfo(x.dtype)
    lost = 0 < size < info.tiny**0.25 or info.max**0.25 < size < math.inf
    unit = math.ldexp(1.0, max(math.frexp(size)[1], math.frexp(info.tiny)[1])) if lost else 1.0

    if x.numel() <= y.numel():  # GG' u = G (G' u), with G' u the derivative in y of <grad_x g, u>
        return LinearOperator(lambda u: pull(gy, x, pull(gx, y, u) / unit) / unit, x.numel()), x.detach(), unit
    flat = y.detach().reshape(-1)

    def square(z: Tensor) -> Tensor:
        return (pull(gx, y, pull(gy, x, z.reshape(y.shape)) / unit) / unit).reshape(-1)

    return LinearOperator(square, flat.numel()), flat, unit


Products: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@final
class Linearization:
    """An optimality condition F(x, y) = 0 to first order at a point, as implicit differentiation needs it.

    With (dF/dy)' v = b, b made of grad_y f, the hypergradient is grad_x f - (dF/dx)' v. For a smooth inner problem
    F = grad_y g, dF/dy is the Hessian H, (dF/dx)' is G = d2g/dxdy and b = grad_y f; other kinds of inner problem have
    other unknowns v, and say so by a right-hand side of their own.

    Attributes:
        y: the point `(*batch, q)`.
        gradient: grad_y g there.
        operator: (dF/dy)', with its declared properties; its `last_mv` prepares the cross product as well.
        exact: v -> H v, where the operator is another matrix by design, free at the vector of `last_mv`; or None.
        products: v -> ((dF/dy)' v, (dF/dx)' v) in one pass; the latter is None where F does not depend on x.
        reports: what was found out about the point on the way, such as which bounds hold.
        multipliers: of constraints on y, where there are any.
        second_order: measures whether y is a strict minimum, for linear solvers that do not notice; None: nothing does.
        unreduced: makes another form of the same condition, without an active set; None: there is none.
    """

    @checked()
    def __init__(
        self,
        y: Tensor,
        gradient: Tensor,
        mv: Callable[[Tensor], Tensor],
        products: Products,
        pull: Callable[[Tensor], Tensor | None] | None = None,
        *,
        operator: LinearOperator | None = None,
        right_hand_side: Callable[[Tensor], Tensor] | None = None,
        moved: Callable[[Tensor, Tensor], Tensor | None] | None = None,
        reports: tuple[Report, ...] = (),
        start_in_x: bool = False,
        on: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
        exact: Callable[[Tensor], Tensor] | None = None,
        multipliers: Multipliers | None = None,
        second_order: Callable[[], Report] | None = None,
        unreduced: Callable[[], Linearization] | None = None,
    ) -> None:
        """Put it together.

        Args:
            y: the point.
            gradient: grad_y g there.
            mv: v -> (dF/dy)' v.
            products: both products.
            pull: v -> (dF/dx)' v alone, where that is cheaper; None: it is not.
            operator: what `mv` is, where it is not symmetric positive definite of the size of y.
            right_hand_side: grad_y f -> b; None: b = grad_y f.
            moved: (v, grad_y f) -> what belongs to (dF/dx)' v and depends on grad_y f itself, or None; None: nothing.
            reports: what was found out about the point.
            start_in_x: whether y starts where x says, so that an F without x is no proof that y does not move.
            on: S -> (v -> (dF/dy)' v on S, zero elsewhere), for v that are zero off S, where that is cheaper.
            exact: v -> H v, where `mv` stands for another matrix than the derivative of F; None: it does not.
            multipliers: of constraints on y.
            second_order: measures whether y is a strict minimum.
            unreduced: makes the form without an active set.
        """
        if not y.dim():
            raise ValueError("`Linearization(y=...)` must have an axis of entries. Got a tensor without axes.")
        self.y, self.gradient, self.products, self.reports, self.exact = y, gradient, products, reports, exact
        self._pull, self._right_hand_side, self._moved, self._start_in_x = pull, right_hand_side, moved, start_in_x
        self.on, self.multipliers, self.second_order, self.unreduced = on, multipliers, second_order, unreduced
        self._last: list[tuple[Tensor, int, Tensor | None]] = []  # shared, and not self: nothing refers to its owner
        last = self._last

        def last_mv(v: Tensor) -> Tensor:
            hv, gv = products(v)
            last[:] = [(v, v._version, gv)]
            return hv

        if operator is None:
            self.operator = _operator(mv, y.shape[-1], positive_definite=True, last_mv=last_mv)
        else:
            self.operator = replace(operator, last_mv=last_mv)

    def right_hand_side(self, fy: Tensor) -> Tensor:
        """b of the system (dF/dy)' v = b."""
        return fy if self._right_hand_side is None else self._right_hand_side(fy)

    def cross(self, v: Tensor, fy: Tensor | None = None) -> Tensor | None:
        """(dF/dx)' v `(p,)`, summed over the batch; None where F does not depend on x.

        Free of cost at the very vector at which a linear solver has just measured its true residual.

        Args:
            v: the solution of the linear system.
            fy: grad_y f, for kinds of inner problem whose condition moves with it; smooth ones do without.

        Raises:
            DoesNotApply: if F does not depend on x, and y depends on x through its start.
        """
        if self._last and self._last[0][0] is v and self._last[0][1] == v._version:
            found = self._last[0][2]
        else:
            found = self.products(v)[1] if self._pull is None else self._pull(v)
        if self._moved is not None and fy is not None:
            moved = self._moved(v, fy)
            found = moved if found is None else found if moved is None else found + moved
        if found is None and self._start_in_x:
            raise DoesNotApply(START_ONLY)
        return found


_linearization = unchecked(Linearization)


class AbstractProducts(AbstractPortable, abc.ABC):
    """How products with second derivatives of g are formed."""

    @property
    def stands_in(self) -> str:
        """What H is replaced by, in words; empty: nothing, products are with H itself, up to rounding and steps."""
        return ""

    @abc.abstractmethod
    def linearize(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        """The optimality condition at (x, y) to first order; one gradient."""

    def at_once(
        self, problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, *, checked: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """grad_y g, H v and G v (None where g does not depend on x) at one vector: what a single loop asks for.

        Args:
            problem: f and g.
            x: `(p,)`.
            y: `(*batch, q)`.
            v: like y.
            checked: whether g has been found to have a second derivative before.
        """
        linearized = self.linearize(problem, x, y)
        return linearized.gradient, *linearized.products(v)

    def curvature(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        """The same for products alone, on batches of which nobody asks the gradient: it is no oracle call then.

        Its `gradient` is not to be read.
        """
        return self.linearize(problem, x, y)

    def oracle(self, problem: FlatProblem, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """A function y -> (g, grad_y g) for inner solvers, where there is a faster one than autograd at each call."""
        return None

    def known(self, problem: FlatProblem, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Linearization]] | None:
        """y -> (g, the same as `linearize`), where g knows its own derivatives and these products are with them."""
        return None


@final
@dataclass(frozen=True)
class Exact(AbstractProducts):
    """Second derivatives by double backward through one retained graph; exact, one backward pass a product.

    Where g knows its own derivatives (`AbstractKnownObjective`), they are its own.
    """

    def known(self, problem: FlatProblem, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Linearization]] | None:
        known = problem.known
        return None if known is None else _Known(problem, KnownObjective(known, problem, x)).at

    def oracle(self, problem: FlatProblem, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        known = problem.known
        return None if known is None else KnownObjective(known, problem, x).value_and_gradient

    def linearize(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        problem.tally.gradients += rows_of(y)
        return self.curvature(problem, x, y)

    def curvature(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        tally, rows = problem.tally, rows_of(y)
        if (known := self.known(problem, x)) is not None:
            return known(y)[1]
        with with_graphs():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            gradient = grad(total(problem.part_of_g(x, y)), y, create_graph=True)
        operator = hessian_operator(gradient, y, tally)

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            tally.hvps += rows
            tally.cross_products += rows
            if not gradient.requires_grad:
                return torch.zeros_like(v), None
            try:
                hv, gv = torch.autograd.grad(gradient, (y, x), v, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                explain(error)
                raise
            return torch.zeros_like(v) if hv is None else hv, gv

        def pull(v: Tensor) -> Tensor | None:
            tally.cross_products += rows
            if not gradient.requires_grad:
                return None
            with explained():
                return torch.autograd.grad(gradient, x, v, retain_graph=True, allow_unused=True)[0]

        start_in_x = problem.problem.init is not None
        return _linearization(y.detach(), gradient.detach(), operator.mv, products, pull, start_in_x=start_in_x)

    def at_once(
        self, problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, *, checked: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tally, rows = problem.tally, rows_of(y)
        tally.gradients += rows
        if (known := self.known(problem, x)) is not None:
            at = known(y)[1]
            return at.gradient, *at.products(v)
        tally.hvps += rows
        tally.cross_products += rows
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            gradient = grad(total(problem.part_of_g(x, y)), y, create_graph=True, checked=checked)
        if not gradient.requires_grad:
            return gradient, torch.zeros_like(v), None
        with explained():
            hv, gv = torch.autograd.grad(gradient, (y, x), v, allow_unused=True)
        return gradient.detach(), torch.zeros_like(v) if hv is None else hv, gv


@final
@dataclass(frozen=True, eq=False)
class _Known:
    """g(x, .) to first order by its own formulas, counted as any other products; its gradients are counted outside."""

    problem: FlatProblem
    objective: KnownObjective

    def at(self, y: Tensor) -> tuple[Tensor, Linearization]:
        tally, rows, point = self.problem.tally, y.shape[:-1].numel(), self.objective.at(y)

        def mv(v: Tensor) -> Tensor:
            tally.hvps += rows
            return point.mv(v)

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            tally.hvps += rows
            tally.cross_products += rows
            return point.products(v)

        def pull(v: Tensor) -> Tensor | None:
            tally.cross_products += rows
            return point.cross(v)

        start_in_x = self.problem.problem.init is not None
        operator = LinearOperator(mv, y.shape[-1], positive_definite=True, diagonal=point.diagonal)
        return point.value, Linearization(
            y.detach(), point.gradient, mv, products, pull, operator=operator, start_in_x=start_in_x
        )


@final
@dataclass(frozen=True)
class FiniteDifferences(AbstractProducts):
    """Second derivatives by central differences of gradients, for operations without a double backward.

    H v ~ [grad_y g(x, y + t v) - grad_y g(x, y - t v)] / 2t and likewise for G v, with t = step (1 + |y|) / |v|.
    Two gradients a product. The error is O(step^2) for smooth g plus the rounding of the gradients over step;
    for networks with kinks (ReLU) it does not shrink with step: prefer exact products wherever they exist.

    Args:
        step: the relative step; None is the cube root of the dtype's rounding unit. One below ten units is reported as
            `Status.imprecise`.

    Raises:
        ValueError: if the step is not positive and finite.
    """

    step: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, step=POSITIVE)

    def linearize(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        return self._linearized(problem, x, y, of_gradient=True)

    def curvature(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        return self._linearized(problem, x, y, of_gradient=False)

    def _linearized(self, problem: FlatProblem, x: Tensor, y: Tensor, of_gradient: bool) -> Linearization:
        tally, rows = problem.tally, rows_of(y)
        eps = float(torch.finfo(y.dtype).eps)
        step = eps ** (1 / 3) if self.step is None else self.step
        lost = eps / step  # the rounding of gradients over the step
        reports = () if lost <= _LOST else (Report("finite-difference products", Status.imprecise, lost, 0),)

        def gradients(y: Tensor) -> tuple[Tensor, Tensor | None]:
            tally.gradients += rows
            with torch.enable_grad(), explained():
                xs, ys = x.detach().requires_grad_(), y.detach().requires_grad_()
                value = total(problem.part_of_g(xs, ys))
                if not value.requires_grad:
                    return torch.zeros_like(y), None
                gx, gy = torch.autograd.grad(value, (xs, ys), allow_unused=True)
            return torch.zeros_like(y) if gy is None else gy, gx

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            # One step for all tasks: gx is a sum over them, so that they must share it. Several x have one each.
            lead = x.dim() - 1
            sizes, lengths = problem.row_norms(v.flatten(lead)), problem.row_norms(y.flatten(lead))
            t = step * (1 + lengths) / torch.where(sizes > 0, sizes, 1.0)
            t_y, t_x = (
                t.reshape(*t.shape, *(1 for _ in y.shape[lead:])),
                t.reshape(*t.shape, *(1 for _ in x.shape[lead:])),
            )
            (up, up_x), (down, down_x) = gradients(y + t_y * v), gradients(y - t_y * v)
            cross = None if up_x is None or down_x is None else (up_x - down_x) / (2 * t_x)
            tally.hvps += rows
            tally.cross_products += rows
            return (up - down) / (2 * t_y), cross

        def mv(v: Tensor) -> Tensor:
            tally.cross_products -= rows  # formed on the way, not asked for
            return products(v)[0]

        start_in_x = problem.problem.init is not None
        gradient = gradients(y)[0] if of_gradient else torch.full_like(y, math.nan)
        return Linearization(y.detach(), gradient, mv, products, reports=reports, start_in_x=start_in_x)
