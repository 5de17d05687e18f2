"""The words in which an objective is written."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_type
from bilevel.prox.box import Box, Nonnegative
from bilevel.prox.term import AbstractProxTerm
from bilevel.terms.block import Absolute, Denoiser, Norms, Product, Proximal, Squares
from bilevel.terms.expression import Expression, Term, broadcast
from bilevel.terms.linear_map import Identity


def variable(*shape: int) -> Expression:
    """y, an array of this shape; axes of a batch are not part of it.

    Example:
        >>> from bilevel.terms import Gradient
        >>> D = Gradient((64, 64))
        >>> (D @ variable(64, 64)).map.out_shape
        (2, 64, 64)
    """
    for size in shape:
        demand_type("variable", "shape", size, int)
    if any(size < 1 for size in shape):
        raise ValueError(f"`variable(*shape)` must be of positive sizes. Got {shape}.")
    return Expression(Identity(shape))


@checked()
def sum_squares(expression: Expression) -> Term:
    """|K y - c|^2, everywhere: no hidden half."""
    return Term(Squares(), expression)


@checked()
def norm1(expression: Expression) -> Term:
    """sum_i |(K y - c)_i|."""
    return Term(Absolute(), expression)


@checked()
def norm2_sum(expression: Expression) -> Term:
    """sum_i |(K y - c)_i|_2, the lengths taken along the first axis: of `D @ y` the isotropic total variation.

    Raises:
        ValueError: if the expression is a number.
    """
    if not expression.map.out_shape:
        raise ValueError("`norm2_sum(expression=...)` must have an axis to take lengths along. Got a number.")
    return Term(Norms(), expression)


@checked()
def box(expression: Expression, lower: float | Tensor | None = None, upper: float | Tensor | None = None) -> Term:
    """0 where lower <= K y - c <= upper, infinite elsewhere.

    Raises:
        ValueError: if a bound is not of the shape of the expression, and does not broadcast to it.
    """
    for name, bound in (("lower", lower), ("upper", upper)):
        if isinstance(bound, Tensor):
            broadcast("box", name, bound, expression.map.out_shape)
    return Term(Proximal(Box(lower, upper)), expression)


@checked()
def nonnegative(expression: Expression) -> Term:
    """0 where K y - c >= 0, infinite elsewhere."""
    return Term(Proximal(Nonnegative()), expression)


@checked()
def equal(expression: Expression, value: float | Tensor = 0.0) -> Term:
    """0 where K y - c = value, infinite elsewhere.

    Raises:
        ValueError: if the value is not of the shape of the expression, and does not broadcast to it.
    """
    if isinstance(value, Tensor):
        broadcast("equal", "value", value, expression.map.out_shape)
    return Term(Proximal(Box(value, value)), expression)


@checked()
def inner(c: Tensor, expression: Expression) -> Term:
    """<c, K y - c'>, a cost.

    Raises:
        ValueError: if c is not of the shape of the expression, and does not broadcast to it.
    """
    return Term(Product(broadcast("inner", "c", c, expression.map.out_shape)), expression)


@checked()
def penalty(term: AbstractProxTerm, expression: Expression) -> Term:
    """h(K y - c) for any h of `bilevel.prox`, or one of your own.

    Example:
        >>> from bilevel.prox import Simplex
        >>> shares = penalty(Simplex(), variable(3))
    """
    return Term(Proximal(term), expression)


@checked()
def prior(denoise: Callable[..., Tensor], expression: Expression) -> Term:
    """A denoiser v, sigma -> D(v, sigma) in the place of the proximal map of w h: sigma^2 = w / rho.

    No h need exist. What the algorithm converges to, if it does, is a fixed point: it does where D and
    the rest contract.
    """
    return Term(Denoiser(denoise), expression)
