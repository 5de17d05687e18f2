"""The alternating direction method of multipliers, and half-quadratic splitting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, BELOW_1, Range, demand_ranges
from bilevel.terms.expression import SumOfTerms, Term
from bilevel.terms.gram import Gram
from bilevel.terms.least_squares import Parts, Solve, system
from bilevel.terms.optimality import Optimality
from bilevel.terms.scheme import AbstractAlgorithm, Scheme, State, at_step, demand_settings, proximal_step

Order = Literal["yvu", "vyu", "vuy"]
_RELAXATION = Range(open=True, below=2.0)


@final
@dataclass(frozen=True, eq=False)
class ADMM(AbstractAlgorithm):
    """y <- argmin q + rho/2 sum_j |z_j - v_j + u_j|^2, v_j <- prox_{w_j h_j / rho}(z_j + u_j), u_j <- u_j + z_j - v_j.

    z_j = K_j y - c_j. Minimizes F(y) = q(y) + sum_j w_j h_j(K_j y - c_j), q the squares and the linear terms, all else
    blocks. Any rho > 0 leads to the same minimizer, for the thresholds w_j / rho are those of the objective; rho
    changes the speed.

    The image step is the solution of one system, with the Hessian of q plus rho sum K_j'K_j: by two transforms where
    all of these are convolutions, differences and Fourier samples; a division where they are masks; a factorization
    where they are matrices; else by conjugate gradients from the last image, differentiated as the exact solution is.

    Cost of a step: that solve, each K_j and K_j' once, and each proximal map once.

    Source: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and statistical learning via the alternating
    direction method of multipliers", Found. Trends Mach. Learn. 3 (2011); for images Afonso, Bioucas-Dias, Figueiredo,
    "An augmented Lagrangian approach to the constrained optimization formulation of imaging inverse problems", IEEE TIP
    20 (2011).

    Args:
        rho: a number, or a schedule `(N,)` of one for each step, which may be learned.
        thresholds: None: w_j / rho. Or a schedule of steps of the proximal maps by itself, `(N,)`, or `(N, blocks)`:
            the weights of the blocks are then not looked at, and the fixed point is of no objective one knows.
        order: of the three updates. The fixed points are the same ones.
        relaxation: alpha in (0, 2): K y is replaced by alpha K y + (1 - alpha) v in the updates of v and u; 1.6 is
            often faster. 1 with the order "vyu".
        rtol: of conjugate gradients, where they are needed.
        linear_steps: at most so many of them.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel.terms import norm1, sum_squares, variable
        >>> y = variable(2)
        >>> lasso = 0.5 * sum_squares(y - torch.tensor([3.0, 0.1])) + 1.0 * norm1(y)
        >>> ADMM(rho=2.0).on(lasso).solve(torch.zeros(2)).y.round(decimals=3)
        tensor([2., 0.])
    """

    rho: float | Tensor = 1.0
    thresholds: Tensor | None = None
    order: Order = "yvu"
    relaxation: float = 1.0
    rtol: float = 1e-10
    linear_steps: int = 500

    def __post_init__(self) -> None:
        demand_types(self)
        demand_settings("ADMM", self.rho, self.thresholds)
        demand_ranges(self, relaxation=_RELAXATION, rtol=BELOW_1, linear_steps=AT_LEAST_1)
        if self.order == "vyu" and self.relaxation != 1.0:
            raise ValueError(f'`ADMM(relaxation=...)` must be 1 with the order "vyu". Got {self.relaxation}.')

    def on(self, objective: SumOfTerms | Term) -> Scheme:
        made = _Splitting(objective, self.rho, self.thresholds, self.rtol, self.linear_steps)

        def begin(y0: Tensor) -> State:
            y0 = made.begun(y0)
            v = made.images(y0)
            return {"y": y0, "v": v, "u": [torch.zeros_like(each) for each in v]}

        def duals(y: Tensor, v: list[Tensor], u: list[Tensor], k: int) -> tuple[list[Tensor], list[Tensor]]:
            a = [self._relaxed(new, old) for new, old in zip(made.images(y), v, strict=True)]
            points = _sums(a, u)
            v = made.proximal(points, k)
            return v, _differences(points, v)

        def advance(state: State, k: int) -> State:
            y, v, u = state["y"], state["v"], state["u"]
            if self.order == "yvu":
                y = made.image(y, _differences(v, u), k)
                v, u = duals(y, v, u, k)
            elif self.order == "vuy":
                v, u = duals(y, v, u, k)
                y = made.image(y, _differences(v, u), k)
            else:
                v = made.proximal(_sums(made.images(y), u), k)
                y = made.image(y, _differences(v, u), k)
                u = _differences(_sums(u, made.images(y)), v)
            return {"y": y, "v": v, "u": u}

        def gap(before: State, after: State, k: int) -> Tensor:
            y, v, u = after["y"], after["v"], after["u"]
            if self.order == "vyu":  # v is the proximal map of what u was before y moved
                u = _differences(u, _differences(made.images(y), made.images(before["y"])))
            return made.gap(y, v, u, k)

        return Scheme(begin, advance, gap)

    def _relaxed(self, a: Tensor, v: Tensor) -> Tensor:
        return a if self.relaxation == 1.0 else self.relaxation * a + (1 - self.relaxation) * v


@final
@dataclass(frozen=True, eq=False)
class HQS(AbstractAlgorithm):
    """y <- argmin q(y) + rho/2 sum_j |K_j y - c_j - v_j|^2, v_j <- prox_{(w_j/rho) h_j}(K_j y - c_j).

    Half-quadratic splitting minimizes, for a constant rho, the smoothed objective q(y) + sum_j M_j(K_j y - c_j), with
    the Moreau envelope M_j(z) = min_v w_j h_j(v) + rho/2 |z - v|^2 in the place of w_j h_j: it becomes the objective
    as rho grows, and the steps become small. So rho does change the answer here; a rho that grows with the steps is how
    it is used.

    Source: Geman, Yang, "Nonlinear image recovery with half-quadratic regularization", IEEE TIP 4 (1995).

    Args:
        rho: as for `ADMM`.
        thresholds: as for `ADMM`.
        rtol: as for `ADMM`.
        linear_steps: as for `ADMM`.

    Raises:
        ValueError: if a number is out of range.
    """

    rho: float | Tensor = 1.0
    thresholds: Tensor | None = None
    rtol: float = 1e-10
    linear_steps: int = 500

    def __post_init__(self) -> None:
        demand_types(self)
        demand_settings("HQS", self.rho, self.thresholds)
        demand_ranges(self, rtol=BELOW_1, linear_steps=AT_LEAST_1)

    def on(self, objective: SumOfTerms | Term) -> Scheme:
        made = _Splitting(objective, self.rho, self.thresholds, self.rtol, self.linear_steps)

        def begin(y0: Tensor) -> State:
            y0 = made.begun(y0)
            return {"y": y0, "v": made.images(y0)}

        def advance(state: State, k: int) -> State:
            y = made.image(state["y"], state["v"], k)
            return {"y": y, "v": made.proximal(made.images(y), k)}

        def gap(_: State, after: State, k: int) -> Tensor:
            y, v = after["y"], after["v"]  # of the envelope: its slope is rho (z - v), and nothing has to be v
            return made.gap(y, v, _differences(made.images(y), v), k, points=False)

        return Scheme(begin, advance, gap)


@final
class _Splitting:
    """The two updates that both algorithms consist of."""

    def __init__(
        self,
        objective: SumOfTerms | Term,
        rho: float | Tensor,
        thresholds: Tensor | None,
        rtol: float,
        linear_steps: int,
    ) -> None:
        self.parts, self.rho, self.thresholds = Parts.of(objective), rho, thresholds
        self._right = self.parts.right_hand_side()
        self._own, self._blocks = self.parts.gram, _gram_of_blocks(self.parts)
        self._cg = rtol, linear_steps
        self._constant = not (isinstance(rho, Tensor) and rho.dim())
        self._kept = self._system(rho) if self._constant else None

    def _system(self, rho: Any) -> Solve:
        def product(y: Tensor) -> Tensor:
            total = self.parts.product(y)
            for term in self.parts.blocks:
                K = term.expression.map
                total = total + rho * K.adjoint(K.forward(y))
            return total

        return system(self._own.plus(rho, self._blocks), product, self.parts.axes, *self._cg)

    def image(self, y: Tensor, targets: list[Tensor], k: int) -> Tensor:
        """argmin q(y) + rho/2 sum |K_j y - c_j - target_j|^2."""
        rho = at_step(self.rho, k)
        pulled: Tensor | None = None
        for term, target in zip(self.parts.blocks, targets, strict=True):
            c = term.expression.offset
            own = term.expression.map.adjoint(target if c is None else target + c)
            pulled = own if pulled is None else pulled + own
        right = self._right if pulled is None else self._right + rho * pulled
        right = torch.as_tensor(right, dtype=y.dtype, device=y.device)
        solve = self._system(rho) if self._kept is None else self._kept
        return solve(right.expand_as(y), y)

    def begun(self, y0: Tensor) -> Tensor:
        """y0 as the state holds it.

        Raises:
            ValueError: if it does not fit, or the system of the image has no unique solution.
        """
        if self._kept is not None and self._own.plus(self.rho, self._blocks).singular:
            raise ValueError(
                "the squares and the maps of the other terms must determine y: sum w A'A + rho sum K'K has to be"
                " positive definite. Got a system that is singular. Add a term of y itself, such as `box(y)` or"
                " `1e-6 * sum_squares(y)`."
            )
        return self.parts.begun(y0)

    def gap(self, y: Tensor, v: list[Tensor], u: list[Tensor], k: int, points: bool = True) -> Tensor:
        """How far y is from a minimizer, with slopes rho u_j."""
        rho, blocks = at_step(self.rho, k), self.parts.blocks
        slopes = [(term, rho * each) for term, each in zip(blocks, u, strict=True)]
        return Optimality(self.parts).gap(y, list(zip(blocks, v, strict=True)) if points else [], slopes)

    def images(self, y: Tensor) -> list[Tensor]:
        """K_j y - c_j."""
        return [term.expression.at(y) for term in self.parts.blocks]

    def proximal(self, points: list[Tensor], k: int) -> list[Tensor]:
        """prox_{(w_j/rho) h_j}, or with the threshold of the schedule."""
        rho = at_step(self.rho, k)
        return [
            term.block.prox(point, proximal_step(term, rho, self.thresholds, k, j), term.axes)
            for j, (term, point) in enumerate(zip(self.parts.blocks, points, strict=True))
        ]


def _gram_of_blocks(parts: Parts) -> Gram:
    total = Gram()
    for term in parts.blocks:
        total = total + term.expression.map.gram
    return total


def _sums(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [first + second for first, second in zip(a, b, strict=True)]


def _differences(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [first - second for first, second in zip(a, b, strict=True)]
