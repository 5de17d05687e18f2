"""Directions without a linear iterate: v is a Neumann series on batches of its own, whole or one random term of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.algorithm import AbstractAlgorithm, RowStep
from bilevel.algorithms.engine.direction import (
    AbstractDirection,
    Drawn,
    Joint,
    Known,
    demand_exact,
    demand_row_step,
    minus,
    rows_of_outer_gradients,
    times,
)
from bilevel.algorithms.oracle import Draws
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.bounds.directions import truncated_series


class Product(Protocol):
    """(k, r) -> H_k r, k = 1, 2, ...; of some of several runs side by side, where these are told."""

    def __call__(self, k: int, r: Tensor, runs: Tensor | None = None, /) -> Tensor: ...


@final
@dataclass(frozen=True)
class Neumann(AbstractDirection):
    """D_y = grad_y g, D_x = grad_x f - G v, v = step sum_{k < K} (I - step H_k) ... (I - step H_1) grad_y f.

    H_1, ..., H_{K-1} are of batches of g of their own, the same ones in all terms; grad_y g and G are of another batch
    of g, and the gradients of f of one of f. The mean over batches is step sum_{k < K} (I - step H)^k grad_y f, which
    is short of v* = H^-1 grad_y f by (I - step H)^K v*: a bias |G| (1 - step mu)^K |v*| of D_x that no steps remove.

    Cost: 2 calls of g, K - 1 products and one call of f for each sample.

    Args:
        terms: K; K - 1 products.
        step: of the series; below 2 / L with L the largest eigenvalue of the H_k for it to converge. A tensor `(rows,)`
            has one for each of several runs at once.
        products: of second derivatives; `FiniteDifferences()` where operations have no double backward.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if `terms` is below 1, or the step not positive.
    """

    terms: int
    step: float | Tensor
    products: AbstractProducts = Exact()

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, terms=AT_LEAST_1)
        demand_row_step(self, "step", self.step)

    @property
    def draws(self) -> Draws:
        return Draws(f=1, g=self.terms)

    @property
    def goes_beside(self) -> bool:
        return True

    def linear_start(self, y: Tensor) -> Tensor | None:
        return None

    def joint(self, drawn: Drawn, at: Joint) -> tuple[Joint, Tensor]:
        return _joint(self, self._v, drawn, at)

    def outer(self, drawn: Drawn, at: Joint, known: Known | None = None) -> tuple[Tensor, Tensor]:
        return _outer(self, self._v, drawn, at, known)

    def error_bound(self, about: Beforehand) -> Bound:
        return _bound(self, self.terms, self.step, about)

    def of_seeds(self, seeds: tuple[int, ...]) -> Neumann:
        return self

    def _v(self, drawn: Drawn, product: Product, b: Tensor) -> Tensor:
        step = _step_of_rows(self.step, b, drawn)
        v = r = step * b
        for k in range(1, self.terms):
            r = _less(r, product(k, r), step)
            v = v + r
        return v


@final
@dataclass(frozen=True)
class RandomizedNeumann(AbstractDirection):
    """D_y and D_x of `Neumann` with one term of its series: v = K step (I - step H_k) ... (I - step H_1) grad_y f.

    k is uniform on 0, ..., K - 1, the same at every point at which the batches of a step are evaluated, so that the
    mean of v is that of `Neumann`, for half its products and more noise. On all the data it is `Neumann`.

    Cost: 2 calls of g, (K - 1) / 2 products on average and one call of f for each sample.

    Args:
        terms: K.
        step: of the series, or one for each of several runs at once `(rows,)`.
        seed: of k, a function of it and the number of the step; one for each of several runs at once.
        products: of second derivatives; `FiniteDifferences()` where operations have no double backward.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if `terms` is below 1, or the step not positive.
    """

    terms: int
    step: float | Tensor
    seed: int | tuple[int, ...] = 0
    products: AbstractProducts = Exact()

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, terms=AT_LEAST_1)
        demand_row_step(self, "step", self.step)

    @property
    def draws(self) -> Draws:
        return Draws(f=1, g=self.terms)

    @property
    def goes_beside(self) -> bool:
        return True

    def linear_start(self, y: Tensor) -> Tensor | None:
        return None

    def joint(self, drawn: Drawn, at: Joint) -> tuple[Joint, Tensor]:
        return _joint(self, self._v, drawn, at)

    def outer(self, drawn: Drawn, at: Joint, known: Known | None = None) -> tuple[Tensor, Tensor]:
        return _outer(self, self._v, drawn, at, known)

    def error_bound(self, about: Beforehand) -> Bound:
        return _bound(self, self.terms, self.step, about)

    def of_seeds(self, seeds: tuple[int, ...]) -> RandomizedNeumann:
        return replace(self, seed=seeds)

    def _v(self, drawn: Drawn, product: Product, b: Tensor) -> Tensor:
        if drawn.chance is None:
            return Neumann(self.terms, self.step)._v(drawn, product, b)
        step = _step_of_rows(self.step, b, drawn)
        v = self.terms * step * b
        if isinstance(self.seed, tuple):
            return self._v_of_each(drawn, product, v, step, self.seed)
        for k in range(1, 1 + drawn.chance(self.seed, self.terms)):
            v = _less(v, product(k, v), step)
        return v

    def _v_of_each(
        self, drawn: Drawn, product: Product, v: Tensor, step: float | Tensor, seeds: tuple[int, ...]
    ) -> Tensor:
        """The terms of several runs, of which each has its own number of factors."""
        chance = drawn.chance
        assert chance is not None
        factors = torch.tensor([chance(seed, self.terms) for seed in drawn.of_each(seeds)], device="cpu")
        for k in range(1, 1 + int(factors.max())):
            runs = (factors >= k).nonzero().squeeze(-1)
            own = step[runs] if isinstance(step, Tensor) else step
            v = v.index_copy(0, runs.to(v.device), _less(v[runs], product(k, v[runs], runs), own))
        return v


def _step_of_rows(step: float | Tensor, like: Tensor, drawn: Drawn) -> float | Tensor:
    if not isinstance(step, Tensor):
        return step
    step = step if drawn.runs is None else step[drawn.runs]
    return step.reshape(-1, *(1 for _ in like.shape[1:]))


def _less(r: Tensor, product: Tensor, step: float | Tensor) -> Tensor:
    """r - step H r."""
    return r - step * product if isinstance(step, Tensor) else torch.sub(r, product, alpha=step)


def series_beside(
    loop: AbstractAlgorithm[Any], linear_step: float | None, inner_step: RowStep, outer_step: RowStep
) -> AbstractAlgorithm[Any] | None:
    """A loop for several runs at once, whose series has the steps of y where it has none of its own."""
    beside = loop.beside(inner_step, outer_step)
    if beside is None or linear_step is not None:
        return beside
    rows: Any = beside
    found: AbstractAlgorithm[Any] = replace(rows, direction=replace(rows.direction, step=inner_step))
    return found


Series: TypeAlias = Callable[[Drawn, Product, Tensor], Tensor]


def _joint(direction: AbstractDirection, series: Series, drawn: Drawn, at: Joint) -> tuple[Joint, Tensor]:
    """(D_x, D_y), grad_y g and G of one batch."""
    problem, scale = drawn.problem(0), drawn.of_g(0)
    linearized = direction.products.linearize(problem, at.x, at.y)
    value, fx, fy = rows_of_outer_gradients(problem, at.x, at.y)
    v = series(drawn, _products(direction, drawn, at), drawn.of_f * fy)
    d_x = minus(drawn.of_f * fx, linearized.cross(v), scale)
    return Joint(d_x, scale * linearized.gradient, None), value


def _outer(
    direction: AbstractDirection, series: Series, drawn: Drawn, at: Joint, known: Known | None
) -> tuple[Tensor, Tensor]:
    """D_x alone."""
    problem = drawn.problem(0)
    value, fx, fy = rows_of_outer_gradients(problem, at.x, at.y) if known is None else known
    v = series(drawn, _products(direction, drawn, at), drawn.of_f * fy)
    cross = direction.products.curvature(problem, at.x, at.y).cross(v)
    return minus(drawn.of_f * fx, cross, drawn.of_g(0)), value


def _bound(direction: AbstractDirection, terms: int, step: float | Tensor, about: Beforehand) -> Bound:
    demand_exact(direction)
    if isinstance(step, Tensor):
        raise ValueError(f"no bound is known for `{type(direction).__name__}` with several runs side by side.")
    return truncated_series(
        about.constants,
        step=step,
        terms=terms,
        distance=about.distance,
        outer_gradient_norm=about.outer_gradient_norm,
    )


def _products(direction: AbstractDirection, drawn: Drawn, at: Joint) -> Product:
    """(k, r) -> H_k r, unbiased; a graph is kept for as long as one problem is asked for."""
    kept: list[tuple[object, Callable[[Tensor], Tensor]]] = []

    def product(k: int, r: Tensor, runs: Tensor | None = None) -> Tensor:
        if runs is not None:
            some, (x, y, _) = drawn.of_runs(runs), at.of_runs(runs)
            return times(some.of_g(k), direction.products.curvature(some.problem(k), x, y).operator.mv(r))
        problem = drawn.problem(k)
        if not kept or kept[0][0] is not problem:
            kept[:] = [(problem, direction.products.curvature(problem, at.x, at.y).operator.mv)]
        return times(drawn.of_g(k), kept[0][1](r))

    return product
