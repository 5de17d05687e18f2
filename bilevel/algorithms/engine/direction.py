"""Directions of all iterates of a loop at once, from batches: what a step follows before any variance reduction."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, grad, total
from bilevel._flat import FlatProblem
from bilevel._numerics.rows import row_norm_numbers
from bilevel._numerics.second_derivatives import explained
from bilevel._numerics.seeds import within_64_bits
from bilevel._result import Report, Status
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
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

    def of_runs(self, runs: Tensor) -> Joint:
        """Those of some of several runs side by side."""
        return Joint(self.x[runs], self.y[runs], None if self.v is None else self.v[runs])


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

    def weighted(self, of_f: float | Tensor, of_g: float | Tensor) -> Pieces:
        """Those of g times one factor, those of f times another."""
        gy, hv, gv = (times(of_g, piece) for piece in self[:3])
        fy, fx = (times(of_f, piece) for piece in self[3:])
        return Pieces(gy, hv, gv, fy, fx)

    def joint(self) -> Joint:
        """D_x = grad_x f - G v, D_y = grad_y g, D_v = H v - grad_y f."""
        return Joint(self.fx - self.gv, self.gy, self.hv - self.fy)


Known: TypeAlias = tuple[Tensor, Tensor, Tensor]  # f, grad_x f and grad_y f


class Drawn(NamedTuple):
    """What a direction is formed from: one batch of f and numbered ones of g, or all the data under every number.

    Means over a batch of g times `of_g`, and those over that of f times `of_f`, are unbiased: numbers, or one for each
    of several runs side by side `(runs, 1)`.

    Attributes:
        problem: number -> the problem with that batch of g, from 0, and the one batch of f.
        of_f: the factor of f.
        of_g: number -> that of g.
        chance: (seed, n) -> a number below n that belongs to these batches, whatever the point; None: on all the data
            nothing is left to chance.
        checked: whether g has been found to have a second derivative, at an earlier step.
        runs: of several runs side by side those that this is for; None: all.
        part: runs -> the same for some of these; None: as this is.
    """

    problem: Callable[[int], FlatProblem]
    of_f: float | Tensor
    of_g: Callable[[int], float | Tensor]
    chance: Callable[[int, int], int] | None
    checked: bool = False
    runs: Tensor | None = None
    part: Callable[[Tensor], Drawn] | None = None

    def of_each(self, values: Sequence[Any]) -> list[Any]:
        """Of what there is for each of several runs side by side that of those that these batches are for."""
        return list(values) if self.runs is None else [values[int(k)] for k in self.runs]

    def of_runs(self, runs: Tensor) -> Drawn:
        """The same for some of them; all the data are those of every run."""
        return self if self.part is None else self.part(runs)

    @staticmethod
    def batches(oracle: Oracle, f: int = 0, g: int = 0) -> Drawn:
        """Batch number f of f, and of g those from number g."""
        return Drawn(
            lambda k: oracle.problem(f, g + k),
            oracle.block("f", f).scale,
            lambda k: oracle.block("g", g + k).scale,
            lambda seed, n: int(torch.randint(n, (g + 1,), generator=generator(seed, oracle.step), device="cpu")[g]),
            oracle.step > 0,
            oracle.runs,
            lambda runs: Drawn.batches(oracle.of_runs(runs), f, g),
        )

    @staticmethod
    def everything(oracle: Oracle) -> Drawn:
        """All the data."""
        whole = oracle.whole()
        return Drawn(lambda _: whole, 1.0, lambda _: 1.0, None, runs=oracle.runs)


class AbstractDirection(AbstractPortable, abc.ABC):
    """(D_y, D_v, D_x) or (D_y, D_x) at a point, from batches or from all the data.

    Attributes:
        products: how it forms products with second derivatives.
    """

    products: AbstractProducts

    @property
    @abc.abstractmethod
    def draws(self) -> Draws:
        """How many batches it takes; D_x alone takes no more."""

    @property
    def first(self) -> tuple[int, int]:
        """The numbers of its first batches of f and of g; 0, unless other parts of a step have batches before."""
        return 0, 0

    @abc.abstractmethod
    def linear_start(self, y: Tensor) -> Tensor | None:
        """v before the first step; None: there is no linear iterate."""

    @property
    def is_linear(self) -> bool:
        """Whether there is a linear iterate."""
        return self.linear_start(torch.zeros(0, device="cpu")) is not None

    @property
    def goes_beside(self) -> bool:
        """Whether it is formed for several (x, y, v) side by side as well as for one. No, unless it says so."""
        return False

    def of_seeds(self, seeds: tuple[int, ...]) -> AbstractDirection | None:
        """The same for several runs side by side, what is left to chance decided by a seed for each; None, unless said.

        One that leaves nothing to chance but the batches is itself.
        """
        return None

    @abc.abstractmethod
    def joint(self, drawn: Drawn, at: Joint) -> tuple[Joint, Tensor]:
        """All of it, and f on its batch, from the data that are drawn."""

    def part(self, drawn: Drawn, at: Joint) -> tuple[Joint, Tensor] | None:
        """This rank's part of it, and of f, where it is a mean over samples that are over ranks: :func:`summed` is it.

        None, as for one that says nothing: it is no such mean.
        """
        return None

    @abc.abstractmethod
    def outer(self, drawn: Drawn, at: Joint, known: Known | None = None) -> tuple[Tensor, Tensor]:
        """D_x alone, and f; `known` are f and its gradients on that batch at that point, where they are known."""

    def error_bound(self, about: Beforehand) -> Bound:
        """|D_x - h| on all the data, where |y - y*| and |v - v*| are `about.distance` and `about.linear_distance`.

        Raises:
            ValueError: if no bound is known, as here, for one that says nothing.
        """
        raise ValueError(f"no bound is known for the direction {self!r}.")

    def on_batches(self, oracle: Oracle, at: Joint, f: int = 0, g: int = 0) -> tuple[Joint, Tensor]:
        """Unbiased for `on_everything`, as far as the direction is, and f on its batch; the same batches anywhere.

        Args:
            oracle: of this step.
            at: the point.
            f: by how many its batch of f comes after the first.
            g: the same of those of g.
        """
        return self.joint(Drawn.batches(oracle, self.first[0] + f, self.first[1] + g), at)

    def on_everything(self, oracle: Oracle, at: Joint) -> tuple[Joint, Tensor]:
        """The same on all the data."""
        return self.joint(Drawn.everything(oracle), at)


@final
@dataclass(frozen=True)
class Coupled(AbstractDirection):
    """D_y = grad_y g, D_v = H v - grad_y f, D_x = grad_x f - G v: zero at the same time, at y*, H^-1 grad_y f, x* only.

    The same batch of g in its three terms, and one of f that is independent of it.

    Cost: 3 calls of g and one of f for each sample (products by differences: 5 and 1), in one backward pass through one
    gradient's graph and one of f; D_x alone one of each.

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

    @property
    def goes_beside(self) -> bool:
        return True

    def of_seeds(self, seeds: tuple[int, ...]) -> Coupled:
        return self

    def linear_start(self, y: Tensor) -> Tensor | None:
        return torch.zeros_like(y)

    def joint(self, drawn: Drawn, at: Joint) -> tuple[Joint, Tensor]:
        return summed(drawn.problem(0), *self.part(drawn, at))

    def part(self, drawn: Drawn, at: Joint) -> tuple[Joint, Tensor]:
        problem = drawn.problem(0).by_itself()
        pieces, value = self.pieces(problem, at, checked=drawn.checked)
        return pieces.weighted(drawn.of_f, drawn.of_g(0)).joint(), value

    def outer(self, drawn: Drawn, at: Joint, known: Known | None = None) -> tuple[Tensor, Tensor]:
        x, y, v = at
        assert v is not None
        problem = drawn.problem(0)
        value, fx, _ = rows_of_outer_gradients(problem, x, y) if known is None else known
        cross = self.products.curvature(problem, x, y).cross(v)
        return minus(drawn.of_f * fx, cross, drawn.of_g(0)), value

    def error_bound(self, about: Beforehand) -> Bound:
        from bilevel.bounds.directions import tracking

        demand_exact(self)
        return tracking(
            about.constants,
            distance=about.distance,
            linear_distance=linear_distance(about),
            outer_gradient_norm=about.outer_gradient_norm,
        )

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
        one = problem.by_itself()
        gy, hv, gv = self.products.at_once(one, x, y, v, checked=checked)
        if gv is None and problem.problem.init is not None:
            raise DoesNotApply(START_ONLY)
        value, fx, fy = rows_of_outer_gradients(one, x, y)
        *pieces, value = problem.total(gy, hv, torch.zeros_like(x) if gv is None else gv, fy, fx, value)
        return Pieces(*pieces), value


def summed(problem: FlatProblem, part: Joint, value: Tensor) -> tuple[Joint, Tensor]:
    """A direction and f from the ranks' parts of them: one message of 2q + p + 1 floats; as they are without ranks."""
    if problem.across is None:
        return part, value
    found = problem.total(part.x, part.y, *(() if part.v is None else (part.v,)), value)
    return Joint(found[0], found[1], None if part.v is None else found[2]), found[-1]


def demand_exact(direction: AbstractDirection) -> None:
    """Refuse a bound for products by differences.

    Raises:
        ValueError: naming them.
    """
    if not isinstance(direction.products, Exact):
        name = type(direction.products).__name__
        raise ValueError(f"no bound is known for products by `{name}`. Call `error_bound` with `products=Exact()`.")


def linear_distance(about: Beforehand) -> float:
    """|v - v*|.

    Raises:
        ValueError: if it is not known.
    """
    if about.linear_distance is None:
        raise ValueError(
            "`error_bound(linear_distance=...)` is needed for an algorithm with a linear iterate: |v - v*|, v* ="
            " H^-1 grad_y f at y*. Got None. At the start v is zero, so that |grad_y f| / mu bounds it."
        )
    return about.linear_distance


def demand_row_step(loop: Any, name: str, step: float | Tensor | None) -> None:
    """Refuse a step that is none: a number, or one for each of several runs at once `(rows,)`.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(step, Tensor):
        demand_ranges(loop, None, **{name: POSITIVE})
        return
    plain = step.dim() == 1 and step.is_floating_point() and step.device.type != "meta"
    if not plain or not bool(((step > 0) & step.isfinite()).all()):
        call = f"{type(loop).__name__}({name}=...)"
        raise ValueError(f"`{call}` must be one positive finite number for each row. Got {step}.")


def times(factor: float | Tensor, rows: Tensor) -> Tensor:
    """factor rows, itself for a factor of 1; a tensor `(runs, 1)` has one for each of several runs `(runs, n)`."""
    return rows if not isinstance(factor, Tensor) and factor == 1 else factor * rows


def minus(fx: Tensor, cross: Tensor | None, factor: float | Tensor) -> Tensor:
    """grad_x f - factor G v, where g depends on x."""
    if cross is None:
        return fx
    return fx - factor * cross if isinstance(factor, Tensor) else torch.sub(fx, cross, alpha=factor)


def rows_of_inner_gradients(problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
    """grad_y g, of the shape of y."""
    problem.tally.gradients += y.shape[:-1].numel()
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        return grad(total(problem.part_of_g(x.detach(), y)), y)


def rows_of_outer_gradients(problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f `(*several,)`, grad_x f and grad_y f, for several x side by side as well."""
    problem.tally.outer_gradients += y.shape[:-1].numel()
    with torch.enable_grad(), explained():
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = problem.by_itself().f(x, y)
        if not value.requires_grad:
            return problem.total(value)[0], torch.zeros_like(x), torch.zeros_like(y)
        fx, fy = torch.autograd.grad(total(value), (x, y), allow_unused=True, materialize_grads=True)
    value, fx, fy = problem.total(value.detach(), fx, fy)
    return value, fx, fy


def residual_report(part: str, direction: Tensor) -> Report:
    """How far an iterate is from where it is going; an iterate has no tolerance to miss."""
    residual = row_norm_numbers(direction if direction.dim() == 1 else direction.reshape(-1))[0]
    return Report(part, Status.successful if math.isfinite(residual) else Status.nonfinite, residual, 0)


def generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step, on the CPU, so that every device sees the same: a function of seed and step."""
    found = torch.Generator("cpu")
    found.manual_seed(within_64_bits(seed * 1_000_003 + step))
    return found
