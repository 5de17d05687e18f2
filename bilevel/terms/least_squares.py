"""The smooth part of an objective, and the systems of its algorithms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.words import got
from bilevel.terms.block import Product, Squares, over
from bilevel.terms.expression import SumOfTerms, Term
from bilevel.terms.gram import Gram
from bilevel.terms.linear_map import AbstractLinearMap, Size

Apply = Callable[[Tensor], Tensor]
Solve = Callable[[Tensor, Tensor], Tensor]  # right-hand side, guess

_POWERS = 60
_SLACK = 1.02  # on a largest eigenvalue from power iteration, which finds it from below


def spread(number: float | Tensor, axes: int) -> Any:
    """A number, or `(*batch,)` of them, as a factor of arrays with so many axes."""
    if isinstance(number, Tensor) and number.dim():
        return number.reshape(*number.shape, *(1 for _ in range(axes)))
    return number


@final
@dataclass(frozen=True, eq=False)
class Parts:
    """q(y) = sum w |A y - b|^2 + sum <c, K y - e>, and the blocks h_j(K_j y - c_j) that are left.

    Args:
        squares: the terms of the first sum.
        products: those of the second.
        blocks: the others.
        axes: of y.
    """

    squares: tuple[Term, ...]
    products: tuple[Term, ...]
    blocks: tuple[Term, ...]
    axes: int

    @staticmethod
    def of(objective: SumOfTerms | Term) -> Parts:
        """Each term where it belongs."""
        objective = objective if isinstance(objective, SumOfTerms) else SumOfTerms((objective,))

        def those(*kinds: type) -> tuple[Term, ...]:
            return tuple(term for term in objective.terms if isinstance(term.block, kinds))

        smooth = those(Squares, Product)
        blocks = tuple(term for term in objective.terms if term not in smooth)
        return Parts(those(Squares), those(Product), blocks, len(objective.shape))

    @property
    def shape(self) -> Size:
        """Of y, without the axes of a batch."""
        return (*self.squares, *self.products, *self.blocks)[0].expression.map.in_shape

    def begun(self, y0: Tensor) -> Tensor:
        """y0 with the axes of the batch and in the precision of what was measured.

        Raises:
            ValueError: if it is no array of y's, or not of floating-point numbers.
        """
        shape, terms = self.shape, (*self.squares, *self.products, *self.blocks)
        cut = y0.dim() - len(shape)
        if cut < 0 or tuple(y0.shape[cut:]) != shape or not y0.is_floating_point():
            raise ValueError(
                f"the start `y0` must be of the shape of the variable, {shape}, with the axes of a batch in front, and"
                f" of floating-point numbers. Got {got(y0)}."
            )
        batches, dtype = [tuple(y0.shape[:cut])], y0.dtype
        for term in terms:
            for part in (term.expression.offset, term.block.c if isinstance(term.block, Product) else None):
                if part is not None:
                    batches.append(tuple(part.shape[: part.dim() - term.axes]))
                    dtype = torch.promote_types(dtype, part.dtype)
            if isinstance(term.weight, Tensor):
                batches.append(tuple(term.weight.shape))
        found = [max(sizes) for sizes in itertools.zip_longest(*map(reversed, batches), fillvalue=1)][::-1]
        for batch in batches:
            if any(n not in (1, m) for n, m in zip(reversed(batch), reversed(found), strict=False)):
                raise ValueError(
                    "the axes of batches in front of `y0`, of what was measured and of weights must go together. Got"
                    f" {sorted(set(batches))}."
                )
        return y0.to(dtype).expand(*found, *shape)

    def weight(self, term: Term) -> Any:
        """Of a term, for arrays like y."""
        return spread(term.weight, self.axes)

    @property
    def gram(self) -> Gram:
        """The Hessian of q."""
        total = Gram()
        for term in self.squares:
            total = total + (2 * self.weight(term)) * term.expression.map.gram
        return total

    def product(self, y: Tensor) -> Tensor:
        """The Hessian of q times y."""
        total = torch.zeros_like(y)
        for term in self.squares:
            A = term.expression.map
            total = total + 2 * self.weight(term) * A.adjoint(A.forward(y))
        return total

    def right_hand_side(self) -> Tensor | float:
        """- grad q(0)."""
        total: Tensor | float = 0.0
        for term in self.squares:
            if term.expression.offset is not None:
                A = term.expression.map
                total = total + 2 * self.weight(term) * A.adjoint(term.expression.offset)
        for term in self.products:
            assert isinstance(term.block, Product)
            total = total - self.weight(term) * term.expression.map.adjoint(term.block.c)
        return total

    def largest(self, like: Tensor) -> Tensor | float:
        """A bound on the largest eigenvalue of the Hessian of q, without a graph."""
        total: Tensor | float = 0.0
        for term in self.squares:
            weight = term.weight.detach().max() if isinstance(term.weight, Tensor) else term.weight
            total = total + 2 * weight * norm_squared(term.expression.map, like)
        return total


def norm_squared(A: AbstractLinearMap, like: Tensor) -> Tensor | float:
    """|A|_2^2 or a bound on it, without a graph: from A'A where it has a form, else by power iteration."""
    with torch.no_grad():
        gram = A.gram
        if gram.known:
            top = gram.largest()
            return torch.as_tensor(top).detach().to(like) if isinstance(top, Tensor) else top
        generator = torch.Generator().manual_seed(0)
        y = torch.rand(A.in_shape, generator=generator, dtype=torch.float64, device="cpu").to(like) + 0.1
        size = y.norm()
        for _ in range(_POWERS):
            y = A.adjoint(A.forward(y / size))
            size = y.norm().clamp_min(torch.finfo(y.dtype).tiny)
        found: Tensor = _SLACK * size
        return found


def system(gram: Gram, product: Apply, axes: int, rtol: float, max_steps: int) -> Solve:
    """r -> M^-1 r: closed where the form of M is, else by conjugate gradients from a guess."""
    if gram.closed:
        closed = gram.prepared()
        return lambda r, _: closed(r)
    return lambda r, guess: conjugate_gradients(product, r, guess, axes, rtol, max_steps)


def conjugate_gradients(
    product: Apply, r: Tensor, guess: Tensor, axes: int, rtol: float = 1e-10, max_steps: int = 500
) -> Tensor:
    """M^-1 r for symmetric positive definite M, of each array of a batch, with the derivative of the exact solution.

    With y the solution, dy = M^-1 (dr - dM y): the backward pass is one more solve, w = M^-1 g, and one product with M
    through which its parameters get - w' dM y; the steps leave no graph. Derivatives of higher order go the same way.

    Args:
        product: M, in operations of torch.
        r: the right-hand sides.
        guess: where to begin.
        axes: of one array; those in front are a batch.
        rtol: stop when |r - M y| <= rtol |r| in each array, or no float of this dtype is nearer.
        max_steps: at most so many.
    """
    with torch.no_grad():
        y = _descended(product, r.detach(), guess.detach(), axes, rtol, max_steps)

    def solve(right: Tensor) -> Tensor:
        return conjugate_gradients(product, right, torch.zeros_like(right), axes, rtol, max_steps)

    found: Tensor = _Solved.apply(y, r - product(y), solve)  # type: ignore[no-untyped-call]
    return found


@final
class _Solved(torch.autograd.Function):
    """y, which depends on a residual of (almost) zero as M^-1 does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, residual: Tensor, solve: Apply) -> Tensor:  # noqa: ARG004
        ctx.solve = solve
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, ctx.solve(grads[0]), None


def _descended(product: Apply, r: Tensor, y: Tensor, axes: int, rtol: float, max_steps: int) -> Tensor:
    on = over(axes)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(on, keepdim=True) if axes else a * b

    y = y.expand_as(r)
    residual = r - product(y)
    stop = max(rtol, 4 * torch.finfo(r.dtype).eps) ** 2 * dot(r, r)
    direction, rho = residual, dot(residual, residual)
    for _ in range(max_steps):
        going = rho > stop
        if not bool(going.any()):
            break
        image = product(direction)
        curvature = dot(direction, image)
        good = going & (curvature > 0)
        length = torch.where(good, rho / torch.where(good, curvature, 1.0), 0.0)
        y, residual = y + length * direction, residual - length * image
        rho, before = dot(residual, residual), rho
        direction = residual + torch.where(good, rho / torch.where(good, before, 1.0), 0.0) * direction
        if not bool(good.any()):
            break
    return y
