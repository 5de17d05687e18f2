"""Directions of all iterates of a loop at once, from batches: what a step follows before any variance reduction."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, total
from bilevel._flat import FlatProblem
from bilevel._numerics.rows import row_norm_numbers
from bilevel._numerics.second_derivatives import explained
from bilevel._result import Report, Status
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.portable.pickling import AbstractPortable
from bilevel.requirements.properties import START_ONLY, DoesNotApply


class Joint(NamedTuple):
    """One tensor for each iterate: points, or directions to move against.

    Attributes:
        x: `(p,)`.
        y: `(*tasks, q)`.
        v: like y; None: the loop has no linear iterate.
    """

    x: Tensor
    y: Tensor
    v: Tensor | None

    def plus(self, other: Joint, factor: float = 1.0) -> Joint:
        """self + factor other."""
        v = None if self.v is None or other.v is None else torch.add(self.v, other.v, alpha=factor)
        return Joint(torch.add(self.x, other.x, alpha=factor), torch.add(self.y, other.y, alpha=factor), v)

    def times(self, factor: float) -> Joint:
        """factor self."""
        return Joint(factor * self.x, factor * self.y, None if self.v is None else factor * self.v)


class Pieces(NamedTuple):
    """What a batch of g and one of f say of (D_y, D_v, D_x), apart: each is a mean over its own batch.

    Attributes:
        gy: grad_y g.
        hv: H v.
        gv: G v; zero where g does not depend on x.
        fy: grad_y f.
        fx: grad_x f.
    """

    gy: Tensor
    hv: Tensor
    gv: Tensor
    fy: Tensor
    fx: Tensor

    def weighted(self, of_f: float, of_g: float) -> Pieces:
        """Those of g times one factor, those of f times another."""
        gy, hv, gv = (piece if of_g == 1 else of_g * piece for piece in self[:3])
        fy, fx = (piece if of_f == 1 else of_f * piece for piece in self[3:])
        return Pieces(gy, hv, gv, fy, fx)

    def joint(self) -> Joint:
        """D_x = grad_x f - G v, D_y = grad_y g, D_v = H v - grad_y f."""
        return Joint(self.fx - self.gv, self.gy, self.hv - self.fy)


class AbstractDirection(AbstractPortable, abc.ABC):
    """(D_y, D_v, D_x) or (D_y, D_x) at a point, from batches or from all the data."""

    @property
    @abc.abstractmethod
    def draws(self) -> Draws:
        """How many batches it takes."""

    @abc.abstractmethod
    def linear_start(self, y: Tensor) -> Tensor | None:
        """v before the first step; None: there is no linear iterate."""

    @abc.abstractmethod
    def on_batches(self, oracle: Oracle, at: Joint) -> tuple[Joint, Tensor]:
        """Unbiased for `on_everything`, as far as the direction is, and f on its batch; the same batches anywhere."""

    @abc.abstractmethod
    def on_everything(self, oracle: Oracle, at: Joint) -> tuple[Joint, Tensor]:
        """The same on all the data."""


@final
@dataclass(frozen=True)
class Coupled(AbstractDirection):
    """D_y = grad_y g, D_v = H v - grad_y f, D_x = grad_x f - G v: zero at the same time, at y*, H^-1 grad_y f, x* only.

    The same batch of g in its three terms, and one of f that is independent of it.

    Cost: 3 calls of g and one of f for each sample (products by differences: 5 and 1), in one backward pass through one
    gradient's graph and one of f.

    Source: Dagreou, Ablin, Vaiter, Moreau, NeurIPS 2022 (their v has the other sign).

    Args:
        products: of second derivatives; `FiniteDifferences()` where operations have no double backward.
    """

    products: AbstractProducts = Exact()

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def draws(self) -> Draws:
        return Draws(f=1, g=1)

    def linear_start(self, y: Tensor) -> Tensor | None:
        return torch.zeros_like(y)

    def on_batches(self, oracle: Oracle, at: Joint) -> tuple[Joint, Tensor]:
        pieces, value = self.pieces(oracle.problem(), at, checked=oracle.step > 0)
        return pieces.weighted(oracle.block("f").scale, oracle.block("g").scale).joint(), value

    def on_everything(self, oracle: Oracle, at: Joint) -> tuple[Joint, Tensor]:
        pieces, value = self.pieces(oracle.whole(), at)
        return pieces.joint(), value

    def pieces(self, problem: FlatProblem, at: Joint, *, checked: bool = False) -> tuple[Pieces, Tensor]:
        """The five terms, and f.

        Args:
            problem: f and g, on batches or on everything.
            at: where.
            checked: whether g has been found to have a second derivative before.

        Raises:
            DoesNotApply: if x reaches y through its start only.
        """
        x, y, v = at
        assert v is not None
        gy, hv, gv = self.products.at_once(problem, x, y, v, checked=checked)
        if gv is None and problem.problem.init is not None:
            raise DoesNotApply(START_ONLY)
        value, fx, fy = rows_of_outer_gradients(problem, x, y)
        return Pieces(gy, hv, torch.zeros_like(x) if gv is None else gv, fy, fx), value


def rows_of_outer_gradients(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f `(*several,)`, grad_x f and grad_y f, for several x side by side as well."""
    problem.tally.outer_gradients += y.shape[:-1].numel()
    with torch.enable_grad(), explained():
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = problem.f(x, y)
        if not value.requires_grad:
            return value, torch.zeros_like(x), torch.zeros_like(y)
        fx, fy = torch.autograd.grad(total(value), (x, y), allow_unused=True, materialize_grads=True)
    return value.detach(), fx, fy


def residual_report(part: str, direction: Tensor) -> Report:
    """How far an iterate is from where it is going; an iterate has no tolerance to miss."""
    residual = row_norm_numbers(direction if direction.dim() == 1 else direction.reshape(-1))[0]
    return Report(part, Status.successful if math.isfinite(residual) else Status.nonfinite, residual, 0)
