"""Fixed points: y*(x) = T(x, y*(x))."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, Linearization
from bilevel._flat import FlatProblem
from bilevel._inner import Objective, closed_form
from bilevel._linear import FIXED_POINT, LinearOperator, OperatorProperties
from bilevel._numerics.arnoldi import arnoldi
from bilevel._numerics.learned_settings import settings_at
from bilevel._numerics.misfits import called
from bilevel._numerics.rows import row_dots, safe_row_norms
from bilevel._numerics.second_derivatives import explained
from bilevel._result import Report, Solved, Status
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.requirements.properties import DoesNotApply, Feature, Property

_OFF = 1e-2  # of max(1, |y|), which y may be from the fixed point


@final
@dataclass(frozen=True, eq=False)
class FixedPoint(AbstractInnerProblem):
    """y*(x) = T(x, y*(x)), with F = y - T(x, y), (dF/dy)' = I - J', J = dT/dy, and (dF/dx)' = -(dT/dx)'.

    So with (I - J') w = grad_y f the hypergradient is h = grad_x f + (dT/dx)' w. All that is needed is that 1 is no
    eigenvalue of J at y*; T need not contract. What is built on the powers of J does: plain iteration
    (`FixedPointIteration`), the series sum_k (J')^k grad_y f (`Neumann`), and its first term alone (`JacobianFree`).
    They are refused, by a status, where the spectral radius of J is estimated not to be below 1. `Anderson` and
    `Broyden` find y, and `GMRES`, `BiCGStab`, `NormalCG`, `LinearAnderson` and `Dense` solve the system anywhere else.

    There is no g. y may be any structure, and T returns one alike. `BilevelProblem(f, fixed_point=T)` is of this kind.

    Cost: T once, with its graph; a backward pass through it a product, as often as the linear solver asks; `products`
    of them for the estimate of the spectrum of J, by Arnoldi's method. Memory: the graph of one T, whatever the steps
    that lead to y, and `products` times that of y.

    Source: Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019; Blondel et al., "Efficient and modular
    implicit differentiation", NeurIPS 2022.

    Args:
        map: T, `T(x, y) -> y`, or `T(x, y, data)`; differentiable.
        products: how many products the estimate of the spectrum takes at most; where y has no more entries it is exact.

    Raises:
        TypeError: if T cannot be called.
        ValueError: if `products` is less than 1.

    Example:
        >>> from bilevel import BilevelProblem, hypergradient
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.sum(), fixed_point=lambda x, y: -2 * y + 3 * x
        ... )  # y* = x
        >>> hypergradient(problem, torch.ones(2), torch.zeros(2)).grad.round(decimals=3)
        tensor([1., 1.])
    """

    map: Callable[..., Tree]
    products: int = 16

    def __post_init__(self) -> None:
        if not callable(self.map):
            raise TypeError(f"`FixedPoint(map=...)` must be a function. Got {type(self.map).__name__}.")
        demand_types(self)
        demand_ranges(self, products=AT_LEAST_1)

    @property
    def offers(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.steps})

    @property
    def refusal(self) -> str:
        return (
            "y is the fixed point of a map, y = T(x, y), so that there is no g to minimize, and the system (I - dT/dy)'"
            ' w = grad_y f has no symmetry. Use "implicit", which is `AID` with `GMRES`; or `ITD`, `ESJ` or'
            " `FiniteDifference`, with an inner solver for fixed points such as `Anderson`."
        )

    @property
    def without_symmetry(self) -> str:
        return "the system of a fixed point, (I - dT/dy)' w = grad_y f, has no symmetry."

    @property
    def functions(self) -> Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]:
        return {"fixed_point": (self.map, ("x", "y"))}

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset({Feature.fixed_point})

    @property
    def operator(self) -> OperatorProperties:
        return FIXED_POINT

    @property
    def implicit(self) -> str:
        return "aid-gmres"

    def image(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
        """T(x, y) in vectors, of tasks and of several x side by side as well."""
        structure = problem.y

        def one(x: Tree, y: Tensor, *data: Any) -> Tensor:
            form = "fixed_point(x, y, data)"
            return structure.ravel(called(form, self.map, x, structure.unravel(y), *data), "fixed_point(x, y)")

        return problem.map(one, "g", x, y)

    def _image_at(self, problem: FlatProblem, x: Tensor) -> Callable[[Tensor], Tensor]:
        """y -> T(x, y) at one x, of which a map with a method `at(x, data)` makes once what does not change with y."""
        plain = problem.tasks is None and problem.across is None and problem.problem.encode is None
        if not hasattr(self.map, "at") or not plain or x.shape != (problem.x.size,) or x.requires_grad:
            return lambda y: self.image(problem, x, y)
        structure, prepared = problem.y, cast("Callable[..., Any]", getattr(self.map, "at"))  # noqa: B009
        at = cast("Callable[..., Tree]", problem.map(prepared, "g", x))

        def image(y: Tensor) -> Tensor:
            return structure.ravel(called("fixed_point(x, y, data)", at, structure.unravel(y)), "fixed_point(x, y)")

        return image

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        if products is not None and not isinstance(products, Exact):
            raise DoesNotApply(
                f"`{type(products).__name__}` products are of a function g, and the inner problem is a fixed point,"
                " whose products are backward passes through T. Leave out `products=` and `otherwise=`."
            )

        image = self._image_at(problem, x)

        def misfit(y: Tensor) -> Tensor:
            apart = y - image(y)
            return row_dots(apart, apart) / 2

        return Objective(
            misfit,
            problem.tally,
            closed_form=closed_form(problem, x),
            solves=products is not None or problem.problem.init is None,
            settings=settings_at(problem, x),
            fixed_point=image,
        )

    def linearize(
        self,
        problem: FlatProblem,
        x: Tensor,
        solved: Solved,
        smooth: Callable[[], Linearization],
        margin: float | None,
    ) -> Linearization:
        tally, rows = problem.tally, solved.value.shape[:-1].numel()
        tally.gradients += rows  # T, which stands where a gradient does
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), solved.value.detach().requires_grad_()
            image = self.image(problem, x, y)

        def mv(w: Tensor) -> Tensor:
            tally.hvps += rows
            found = _pulled(image, (y,), w)[0]
            return w if found is None else w - found

        def products(w: Tensor) -> tuple[Tensor, Tensor | None]:
            tally.hvps += rows
            tally.cross_products += rows
            in_y, in_x = _pulled(image, (y, x), w)
            return w if in_y is None else w - in_y, None if in_x is None else -in_x

        def pull(w: Tensor) -> Tensor | None:
            tally.cross_products += rows
            (in_x,) = _pulled(image, (x,), w)
            return None if in_x is None else -in_x

        forward: list[tuple[Tensor, Tensor | None]] = []  # w and J'w with its graph from there, once it is asked for

        def transposed(v: Tensor) -> Tensor:
            """(I - J) v: J v is the derivative of w -> J'w along v."""
            tally.hvps += rows
            if not forward:
                with torch.enable_grad():
                    weights = torch.zeros_like(y).requires_grad_()
                    forward.append((weights, _pulled(image, (y,), weights, again=True)[0]))
            weights, pulled = forward[0]
            found = None if pulled is None else _pulled(pulled, (weights,), v)[0]
            return v if found is None else v - found

        spectrum = arnoldi(lambda w: w - mv(w), y.detach(), self.products)
        singular = spectrum.singular(float(torch.finfo(y.dtype).eps), y.shape[-1])
        apart, size = safe_row_norms((y - image).detach()), safe_row_norms(y.detach())
        reports = (
            _told("spectral radius of the fixed-point map", spectrum.radius, None, spectrum.steps),
            _told("least singular value of I - dT/dy", spectrum.least, singular, spectrum.steps),
            # |y - T| over that value is what y may be off by, whatever tolerance was met.
            _near("distance of y from the fixed point", apart / spectrum.least / size.clamp_min(1.0)),
        )
        operator = LinearOperator(
            mv, y.shape[-1], symmetric=False, transposed_mv=transposed, contraction=spectrum.radius
        )
        return Linearization(
            y.detach(),
            y.detach() - image.detach(),
            mv,
            products,
            pull,
            operator=operator,
            reports=reports,
            start_in_x=problem.problem.init is not None,
        )


def _pulled(image: Tensor, leaves: tuple[Tensor, ...], w: Tensor, again: bool = False) -> tuple[Tensor | None, ...]:
    """The derivatives of <image, w> in the leaves; None where there is no path."""
    if not image.requires_grad:
        return tuple(None for _ in leaves)
    with explained():
        return torch.autograd.grad(image, leaves, w, retain_graph=True, create_graph=again, allow_unused=True)


def _near(part: str, relative: Tensor) -> Report:
    """The report of the largest relative distance, which is to be small; one that is not known is another's."""
    known = relative[relative.isfinite()]
    worst = float(known.max()) if known.numel() else 0.0
    return Report(part, Status.imprecise if worst > _OFF else Status.successful, worst, 0)


def _told(part: str, numbers: Tensor, failed: Tensor | None, steps: int) -> Report:
    """The report of a number of each row: the largest; where some fail, of those the least."""
    lost = ~numbers.isfinite()
    status, shown = Status.successful, numbers
    if failed is not None and bool(failed.any()):
        status = Status.singular
    if failed is not None:
        shown = -numbers
    if bool(lost.any()):
        status = Status.nonfinite
    worst = float(shown.max()) if shown.numel() else 0.0
    return Report(part, status, abs(worst), steps)
