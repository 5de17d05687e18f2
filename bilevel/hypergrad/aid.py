"""Approximate implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, final

from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, FiniteDifferences, outer_gradients
from bilevel._estimate import FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver, unmet
from bilevel._numerics.rows import row_norm_numbers
from bilevel._result import Report, Status, report
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.arguments.unchecked import unchecked
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.bounds.implicit import aid
from bilevel.certificates.certificate import Constants
from bilevel.hypergrad.abstract_implicit import AbstractImplicit
from bilevel.hypergrad.implicit import solution
from bilevel.hypergrad.one_sided import moved_to
from bilevel.hypergrad.rounded import rounding_reports
from bilevel.hypergrad.substituted import substituted
from bilevel.inner_problems.kinds import inner_problem
from bilevel.requirements.properties import DoesNotApply, Property

if TYPE_CHECKING:
    from bilevel.hypergrad.certified import Certified


def _plain(y: Tensor) -> Tensor:
    return y.detach() if y.requires_grad else y


_estimate = unchecked(FlatEstimate)
_NEEDED = frozenset({Property.stationary, Property.second_derivatives, Property.beyond_start, Property.outer_gradient})


@final
@dataclass(frozen=True)
class AID(AbstractImplicit):
    """AID: h = grad_x f - (d2g/dxdy) v with (d2g/dy2) v = grad_y f, at an approximate inner solution y.

    With another linear solver this is AID-CG, AID-Neumann, the dense implicit gradient, and so on. Where y solves
    another condition F(x, y) = 0 than grad_y g = 0 (constraints on y, a non-smooth term), it is h = grad_x f -
    (dF/dx)' v with (dF/dy)' v = grad_y f in the unknowns of that kind of inner problem, by a linear solver that its
    declared properties admit: `CG` where it is positive definite, `MINRES` where it is symmetric, `GMRES` for
    anything.

    Cost: the inner solver's D gradients and one more, one gradient of f, the linear solver's N Hessian products
    and one for its true residual (one more for a warm start), one cross product. Memory, whatever the inner steps: the
    graph of one gradient, what a product through it takes, y and grad_y f, and what the linear solver holds: 5 q in all
    with `CG` (v, its residual and its direction), as in a loop by hand. The result holds h, y, v and x, each once.

    Error: with d = y - y*, r = grad_y f - H v and J = dy*/dx, exactly (d2f/dxdy) d + J'((d2f/dy2) d - r) where f
    and g are quadratic; in general first order in |d| and |r|. With damping the system solved is another one, and
    the bias is O(damping / mu); with `GaussNewton()` products it is another one as well. The estimate then says so, and
    how far its v is from solving H v = grad_y f: `Estimate.substitute`.

    Source: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, algorithm 1; Ji, Yang,
    Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, equation (3).

    Args:
        inner: finds y*(x).
        linear: solves the linear system.
        damping: solve with H + damping I instead of H.
        products: how second derivatives are formed: `Exact()`, or `FiniteDifferences()` where g has operations
            without a second derivative, `CompiledProducts()` for small networks, `GaussNewton()` where H is not
            positive definite.
        otherwise: the products to solve with instead, once a direction of negative curvature was met, such as
            `GaussNewton()`: one gradient and a second linear solve. None: the answer of the linear solver stands.
        target_error: `AID(inner, linear, target_error=..., relative_error=..., constants=...)` is the older form of
            `Certified(AID(inner, linear), ...)`, and does as that does.
        relative_error: see `Certified`.
        constants: see `Certified`.
        margin: the relative distance from a kink of y*(x), where a bound or a support changes, below which it is
            reported as `Status.weakly_active`; None: 1e-10, or 1e-6 in float32.
        side: at a kink of y*(x) there are two derivatives: "right" takes that towards larger entries of x, "left" that
            towards smaller ones, all entries together. It is the implicit gradient at x (1 + 9e-8) (float32: 8e-4), or
            as much less, whose distance to that at x itself is of that order, and which a report names. The inner
            solver has to be accurate to less than that: 1e-10 or so. None: at x.

    Raises:
        ValueError: from `estimate`, if bounds on y are active that the problem does not know of, or if y depends on x
            only through its start (`init=`): the implicit function theorem does not see the start; use `ITD` or `ESJ`.

    Example:
        >>> import torch
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.solvers import CG, LBFGS
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> aid = AID(inner=LBFGS(tol=1e-8), linear=CG(rtol=1e-8))
        >>> hypergradient(problem, torch.ones(2), torch.zeros(2), estimator=aid).grad
        tensor([-2., -2.])
    """

    inner: AbstractInnerSolver
    linear: AbstractLinearSolver
    damping: float = 0.0
    products: AbstractProducts = Exact()
    target_error: float | None = None
    relative_error: float | None = None
    constants: Constants | Callable[[Tree], Constants] | None = None
    margin: float | None = None
    side: Literal["left", "right"] | None = None
    otherwise: AbstractProducts | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, damping=AT_LEAST_0, margin=AT_LEAST_0, target_error=AT_LEAST_0, relative_error=AT_LEAST_0)
        try:
            _ = self._certified  # which refuses what it cannot do
        except ValueError as error:
            error.add_note("In `AID(damping=..., target_error=..., relative_error=...)`.")
            raise

    @property
    def _certified(self) -> Certified | None:
        """What the older form of `Certified` means; None: there is no target."""
        if self.target_error is None and self.relative_error is None:
            return None
        return self.certified(self.target_error, self.relative_error, self.constants)

    @property
    def takes_encoding(self) -> bool:
        return self._certified is None and self.side is None  # a certificate is of the error in x, and a side one of x

    @property
    def forgets_start(self) -> bool:
        return self._certified is not None or (self.inner.forgets_start and self.linear.forgets_start)

    @property
    def requires(self) -> frozenset[Property]:
        if (certified := self._certified) is not None:
            return certified.requires
        return _NEEDED - {Property.second_derivatives} if isinstance(self.products, FiniteDifferences) else _NEEDED

    @property
    def accurate(self) -> bool:
        if self._certified is not None:
            return self._certified.accurate
        exact = not isinstance(self.products, FiniteDifferences)
        exact = exact and not self.products.stands_in and self.otherwise is None
        return self.forgets_start and exact and not self.damping and not self.linear.is_approximate

    def certified(
        self,
        target_error: float | None,
        relative_error: float | None,
        constants: Constants | Callable[[Tree], Constants] | None,
    ) -> Certified:
        from bilevel.hypergrad.certified import Certified

        plain = replace(self, target_error=None, relative_error=None, constants=None)
        return Certified(plain, target_error, relative_error, self.constants if constants is None else constants)

    def error_bound(self, about: Beforehand) -> Bound:
        if (certified := self._certified) is not None:
            return certified.error_bound(about)
        if not isinstance(self.products, Exact):
            raise ValueError(
                f"no bound is known for `AID(products={type(self.products).__name__}(...))`. Call `bounds.aid` for"
                f" exact ones."
            )
        return aid(
            about.constants,
            distance=self.inner.solution_bound(about.constants, about.distance),
            outer_gradient_norm=about.outer_gradient_norm,
            linear_error=self.linear.relative_error(about.constants, self.damping),
            damping=self.damping + self.linear.own_damping,
        )

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        if (certified := self._certified) is not None:
            return certified.estimate(problem, x, start)
        beside: tuple[Report, ...] = ()
        if self.side is not None:
            x, distance = moved_to(x, self.side)
            beside = (Report(f"the {self.side} side of x", Status.successful, distance, 0),)
        # A name for the start would keep it beyond the inner solve.
        solved, at, ended = solution(
            problem, x, _plain(problem.start(x, start.y)), self.inner, self.products, self.margin
        )
        y = solved.value
        if lacks := unmet(self.linear.demands, at.operator.properties):
            raise DoesNotApply(
                f"{inner_problem(problem.problem).without_symmetry} `{type(self.linear).__name__}` {lacks}"
            )
        value, fx, fy = outer_gradients(problem, x, y)
        b = at.right_hand_side(fy)
        system = self.linear.solve(at.operator.shifted(self.damping), b, start.v)
        problem.tally.linear_steps += system.steps
        used: AbstractImplicit = self
        if self.otherwise is not None and (system.concave or Status.negative_curvature in system.statuses):
            used = replace(self, products=self.otherwise, otherwise=None)
            at = used.products.linearize(problem, x, y)
            b = at.right_hand_side(fy)
            system = replace(self.linear.solve(at.operator.shifted(self.damping), b, None), concave=True)
            problem.tally.linear_steps += system.steps
        v = system.value
        cross = at.cross(v, fy)
        h = fx if cross is None else fx - cross
        reports = (ended, *at.reports, report("linear solver", system), *beside)
        if at.second_order is not None and not self.linear.finds_indefinite:
            reports += (at.second_order(),)
        kind = None if start.count else inner_problem(problem.problem)
        if kind is not None and kind.g is not None and not kind.features:
            reports += rounding_reports(used, problem, x, y, h, by_sign=used is not self)
        substitute = substituted(used, at, b, system)
        if v.shape != y.shape:
            return _estimate(h, value, y, reports, substitute=substitute, multipliers=at.multipliers)
        sizes = zip(row_norm_numbers(v), solved.residual.reshape(-1).tolist(), strict=True)
        error = sum(size * residual for size, residual in sizes)  # f(y) - f(y*) = grad_y f'(y - y*) = v'grad_y g
        return _estimate(h, value, y, reports, v, value_error=error, substitute=substitute)
