"""Algorithms that solve no system: proximal gradient, linearized ADMM, primal-dual hybrid gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.terms.expression import SumOfTerms, Term
from bilevel.terms.least_squares import Parts, norm_squared, spread
from bilevel.terms.optimality import Optimality
from bilevel.terms.scheme import (
    AbstractAlgorithm,
    Scheme,
    State,
    at_step,
    demand_setting,
    demand_settings,
    proximal_step,
)

_SHORT = 0.99  # of the longest step that is known to converge


@final
@dataclass(frozen=True, eq=False)
class ProximalGradient(AbstractAlgorithm):
    """y <- prox_{t w h(K . - c)}(y - t grad q(y)).

    For objectives with one block at most, of an orthogonal K (K'K = KK' = a I: y itself, wavelets), whose proximal map
    is z + K' (prox_{a t w h}(K z - c) - K z + c) / a. Converges for t < 2 / L to the minimizer, whatever t.

    Cost of a step: each A and A' once, K and K' once, one proximal map.

    Source: Combettes, Wajs, "Signal recovery by proximal forward-backward splitting", Multiscale Modeling and
    Simulation 4 (2005).

    Args:
        step: t; None: 1 / L, with L the largest eigenvalue of the Hessian of q, a constant of the parameters. Or a
            schedule `(N,)`.
        thresholds: None: t w. Or a schedule of steps of the proximal map by itself, as for `ADMM`.

    Raises:
        ValueError: if a number is out of range; from `on`, if the objective has not this form.
    """

    step: float | Tensor | None = None
    thresholds: Tensor | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        if self.step is not None:
            demand_setting("ProximalGradient", "step", self.step)
        demand_settings("ProximalGradient", 1.0, self.thresholds)

    def on(self, objective: SumOfTerms | Term) -> Scheme:
        parts = Parts.of(objective)
        if len(parts.blocks) > 1 or not all(_is_orthogonal(term) for term in parts.blocks):
            raise ValueError(
                "`ProximalGradient` minimizes squares and linear terms with one other term at most, of y itself or"
                f" of an orthogonal map of it. Got {len(parts.blocks)} others. Use `ADMM`, or `PDHG`."
            )
        right = parts.right_hand_side()

        def begin(y0: Tensor) -> State:
            return {"y": parts.begun(y0)}

        def length(y: Tensor, k: int) -> Any:
            return 1 / parts.largest(y) if self.step is None else at_step(self.step, k)

        def gap(before: State, after: State, k: int) -> Tensor:
            y, new = before["y"], after["y"]
            slope = (y - new) / length(y, k) - (parts.product(y) - right)  # of the block at the new image
            return Optimality(parts).gap(new, [], [], slope)

        def advance(state: State, k: int) -> State:
            y = state["y"]
            t = length(y, k)
            y = y - t * (parts.product(y) - right)
            for term in parts.blocks:
                a = term.expression.map.gram.scalar
                z = term.expression.at(y)
                own = proximal_step(term, 1 / (a * t), self.thresholds, k, 0)
                y = y + term.expression.map.adjoint(term.block.prox(z, own, term.axes) - z) / a
            return {"y": y}

        return Scheme(begin, advance, gap)


@final
@dataclass(frozen=True, eq=False)
class LinearizedADMM(AbstractAlgorithm):
    """ADMM whose image step is one gradient step: y <- y - t [grad q(y) + rho sum_j K_j'(K_j y - c_j - v_j + u_j)].

    v_j and u_j are updated as `ADMM` does. Converges for t <= 1 / (L + rho sum |K_j|^2) to the minimizer of the
    objective, whatever rho. No system is solved.

    Cost of a step: A, A', K_j and K_j' once or twice, and the proximal maps.

    Source: Parikh, Boyd, "Proximal algorithms", Found. Trends Optim. 1 (2014), section 4.4.2, with q linearized too.

    Args:
        rho: as for `ADMM`.
        step: t; None: the longest of these, a constant of the parameters.
        thresholds: as for `ADMM`.

    Raises:
        ValueError: if a number is out of range.
    """

    rho: float | Tensor = 1.0
    step: float | Tensor | None = None
    thresholds: Tensor | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_settings("LinearizedADMM", self.rho, self.thresholds)
        if self.step is not None:
            demand_setting("LinearizedADMM", "step", self.step)

    def on(self, objective: SumOfTerms | Term) -> Scheme:
        parts, lengths = Parts.of(objective), _Lengths(objective)
        right = parts.right_hand_side()

        def begin(y0: Tensor) -> State:
            y0 = parts.begun(y0)
            v = [term.expression.at(y0) for term in parts.blocks]
            return {"y": y0, "v": v, "u": [torch.zeros_like(each) for each in v]}

        def gap(_: State, after: State, k: int) -> Tensor:
            rho, blocks = at_step(self.rho, k), parts.blocks
            slopes = [(term, rho * each) for term, each in zip(blocks, after["u"], strict=True)]
            return Optimality(parts).gap(after["y"], list(zip(blocks, after["v"], strict=True)), slopes)

        def advance(state: State, k: int) -> State:
            y, v, u = state["y"], state["v"], state["u"]
            rho = at_step(self.rho, k)
            t = at_step(self.step, k)
            if t is None:
                t = 1 / (lengths.curvature(y) + _detached(rho) * lengths.of(parts.blocks, y))
            pull = parts.product(y) - right
            for term, a, b in zip(parts.blocks, v, u, strict=True):
                pull = pull + rho * term.expression.map.adjoint(term.expression.at(y) - a + b)
            y = y - t * pull
            images = [term.expression.at(y) for term in parts.blocks]
            v = [
                term.block.prox(a + b, proximal_step(term, rho, self.thresholds, k, j), term.axes)
                for j, (term, a, b) in enumerate(zip(parts.blocks, images, u, strict=True))
            ]
            u = [b + a - c for a, b, c in zip(images, u, v, strict=True)]
            return {"y": y, "v": v, "u": u}

        return Scheme(begin, advance, gap)


@final
@dataclass(frozen=True, eq=False)
class PDHG(AbstractAlgorithm):
    """y' <- prox_{t w_0 h_0}(y - t [grad q(y) + sum_j K_j' p_j]), p_j <- prox_{rho (w_j h_j)*}(p_j + rho z_j).

    z_j = K_j (2y' - y) - c_j: primal-dual hybrid gradient, with the gradient of the smooth part. h_0 is the first block
    of y itself, if there is one; the others are dual. By Moreau's identity prox_{rho h*}(p) = p - rho prox_{h / rho}(p
    / rho). Converges for 1/t >= L/2 + rho sum |K_j|^2 to the minimizer of the objective, whatever rho. No system is
    solved.

    Cost of a step: A, A', K_j and K_j' once each, and the proximal maps.

    Source: Chambolle, Pock, "A first-order primal-dual algorithm for convex problems with applications to imaging",
    J. Math. Imaging Vis. 40 (2011); with a gradient: Condat, J. Optim. Theory Appl. 158 (2013), algorithm 3.1.

    Args:
        rho: the dual step: a number, or a schedule `(N,)`.
        step: t; None: the longest of these, a constant of the parameters, for which |K| takes 60 products each time
            that the scheme is made where K'K has no known form.

    Raises:
        ValueError: if a number is out of range.
    """

    rho: float | Tensor = 1.0
    step: float | Tensor | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_settings("PDHG", self.rho, None)
        if self.step is not None:
            demand_setting("PDHG", "step", self.step)

    def on(self, objective: SumOfTerms | Term) -> Scheme:
        parts, lengths = Parts.of(objective), _Lengths(objective)
        right = parts.right_hand_side()
        primal = next((term for term in parts.blocks if term.expression.is_variable), None)
        duals = tuple(term for term in parts.blocks if term is not primal)

        def begin(y0: Tensor) -> State:
            y0 = parts.begun(y0)
            return {"y": y0, "p": [torch.zeros_like(term.expression.at(y0)) for term in duals]}

        def length(y: Tensor, rho: Any, k: int) -> Any:
            t = at_step(self.step, k)
            if t is not None:
                return t
            return _SHORT / (lengths.curvature(y) / 2 + _detached(rho) * lengths.of(duals, y) + lengths.tiny(y))

        def gap(before: State, after: State, k: int) -> Tensor:
            y, new, rho = before["y"], after["y"], at_step(self.rho, k)
            slope, points = None, []
            if primal is not None:  # its slope at the new image, of which that is the proximal map
                slope = (y - new) / length(y, rho, k) - (parts.product(y) - right)
                for term, each in zip(duals, before["p"], strict=True):
                    slope = slope - term.expression.map.adjoint(each)
            for term, old, each in zip(duals, before["p"], after["p"], strict=True):
                points.append((term, term.expression.at(2 * new - y) + (old - each) / rho))
            return Optimality(parts).gap(new, points, list(zip(duals, after["p"], strict=True)), slope)

        def advance(state: State, k: int) -> State:
            y, p = state["y"], state["p"]
            rho = at_step(self.rho, k)
            t = length(y, rho, k)
            pull = parts.product(y) - right
            for term, each in zip(duals, p, strict=True):
                pull = pull + term.expression.map.adjoint(each)
            new = y - t * pull
            if primal is not None:
                new = primal.block.prox(new, spread(primal.weight * t, primal.axes), primal.axes)
            ahead = 2 * new - y
            found = []
            for term, each in zip(duals, p, strict=True):
                z = each / rho + term.expression.at(ahead)
                found.append(rho * (z - term.block.prox(z, proximal_step(term, rho, None, k, 0), term.axes)))
            return {"y": new, "p": found}

        return Scheme(begin, advance, gap)


@final
class _Lengths:
    """Bounds on squared norms, computed when they are first needed."""

    def __init__(self, objective: SumOfTerms | Term) -> None:
        self._parts, self._known = Parts.of(objective), dict[str, Any]()

    def curvature(self, y: Tensor) -> Any:
        """L."""
        if "q" not in self._known:
            self._known["q"] = self._parts.largest(y)
        return self._known["q"]

    def of(self, terms: tuple[Term, ...], y: Tensor) -> Any:
        """sum |K_j|^2."""
        if "K" not in self._known:
            self._known["K"] = sum(norm_squared(term.expression.map, y) for term in terms)
        return self._known["K"]

    @staticmethod
    def tiny(y: Tensor) -> float:
        return torch.finfo(y.dtype).tiny


def _detached(number: float | Tensor) -> float | Tensor:
    return number.detach() if isinstance(number, Tensor) else number


def _is_orthogonal(term: Term) -> bool:
    K = term.expression.map
    gram = K.gram
    parts = (gram.fourier, gram.diagonal, gram.dense)
    return K.in_shape == K.out_shape and gram.known and all(part is None for part in parts)
