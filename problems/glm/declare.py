"""A g of the user's own that is a generalized linear model, declared to be one and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._numerics.known_objective import AbstractKnownObjective
from bilevel._tree import Structure, Tree, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED


@final
@dataclass(frozen=True, eq=False)
class Declared(AbstractKnownObjective):
    """A function g, and what it is: called, it is the function; its derivatives are those of `known`.

    Args:
        g: the function.
        known: the same, with its derivatives.
    """

    g: Callable[..., Tensor]
    known: AbstractKnownObjective

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def is_smooth(self) -> bool:
        return self.known.is_smooth

    def __call__(self, x: Tree, y: Tree, *data: Any) -> Tensor:
        return self.g(x, y, *data)

    def coefficients(self, x: Tree, *data: Any) -> tuple[Tensor, ...]:
        return self.known.coefficients(x, *data)

    def value_and_gradient(self, c: tuple[Tensor, ...], y: Tree, *data: Any) -> tuple[Tensor, Tree]:
        return self.known.value_and_gradient(c, y, *data)

    def expand(self, c: tuple[Tensor, ...], y: Tree, *data: Any) -> tuple[Tensor, Tree, tuple[Tensor, ...]]:
        return self.known.expand(c, y, *data)

    def product(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tree, *data: Any) -> Tree:
        return self.known.product(c, kept, v, *data)

    def products(
        self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tree, *data: Any
    ) -> tuple[Tree, tuple[Tensor, ...]]:
        return self.known.products(c, kept, v, *data)

    def slopes(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tree, *data: Any) -> tuple[Tensor, ...]:
        return self.known.slopes(c, kept, v, *data)

    def diagonal(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], *data: Any) -> Tree:
        return self.known.diagonal(c, kept, *data)


@checked(seed=SEED)
def declare(
    g: Callable[..., Tensor], known: AbstractKnownObjective, x0: Tree, y0: Tree, data: Any = None, *, seed: int = 0
) -> AbstractKnownObjective:
    """g as it is written, with the derivatives of `known`, which is the same function: compared at two random points.

    Values, both gradients, and a Hessian and a cross product in a random direction have to agree to 1e-8 (float32:
    1e-3), relative; those of g are autograd's. The points are within 1/2 of (x0, y0), entry by entry.

    Cost: two gradients and products of g by autograd at each point.

    Args:
        g: `g(x, y)`, or `g(x, y, data)`.
        known: a `GeneralizedLinearModel`, or an objective of your own that knows its derivatives.
        x0: an outer point, for its structure and where to look.
        y0: an inner one.
        data: what g takes as its third argument; of one task, where the problem has tasks.
        seed: of the points.

    Raises:
        ValueError: if they differ, naming what differs and by how much.

    Example:
        >>> from bilevel.problems.glm import GeneralizedLinearModel
        >>> X, b = torch.eye(2), torch.tensor([2.0, 4.0])
        >>> def mine(x, y):
        ...     return (X @ y - b).square().mean() / 2 + x.exp() * y.square().sum() / 2
        >>> model = GeneralizedLinearModel(X, b, penalty=lambda x: x.exp())
        >>> g = declare(mine, model, torch.tensor(0.0), torch.zeros(2))
        >>> wrong = GeneralizedLinearModel(X, b, penalty=lambda x: 2 * x.exp())
        >>> try:
        ...     declare(mine, wrong, torch.tensor(0.0), torch.zeros(2))
        ... except ValueError as error:
        ...     print(str(error).partition(".  ")[0][:79])
        `declare(g=..., known=...)` must be given two forms of one function. Got values
    """
    given = () if data is None else (data,)
    generator = torch.Generator().manual_seed(seed)
    (x, outer), (y, inner) = ravel(x0), ravel(y0)
    for name, vector in (("x0", x), ("y0", y)):
        if vector.is_meta or not bool(vector.isfinite().all()):
            raise ValueError(f"`declare({name}=...)` must be finite in every entry.")
    tol = 1e-8 if y.dtype == torch.float64 else 1e-3
    for _ in range(2):
        at = [each.detach() + torch.rand(each.shape, generator=generator).to(each) - 0.5 for each in (x, y)]
        v = torch.rand(y.shape, generator=generator).to(y) - 0.5
        try:
            own = _by_autograd(g, outer, inner, at[0], at[1], v, given)
            theirs = _by_formula(known, outer, inner, at[0], at[1], v, given)
        except (RuntimeError, IndexError) as error:
            shapes = f"x0 {tuple(x.shape)} and y0 {tuple(y.shape)} as vectors"
            why = str(error).partition("\n")[0][:200]
            raise ValueError(f"`declare(x0=..., y0=...)` must be what g takes. Got {shapes}: {why}") from error
        for name, a, b in zip(_NAMES, own, theirs, strict=True):
            size, gap = (float(torch.linalg.vector_norm(each)) for each in (a, a - b))
            if not gap <= tol * max(size, tol):
                raise ValueError(
                    f"`declare(g=..., known=...)` must be given two forms of one function. Got {name} that differ by"
                    f" {gap:.2g}, where that of g is {_shown(a)} and the declared one {_shown(b)}{_multiple(a, b)}."
                    f" Compare weights (the mean is 1/n each), halves and penalties."
                )
    return Declared(g, known)


_NAMES = ("values", "gradients in y", "Hessian products", "cross products")


def _by_autograd(
    g: Callable[..., Tensor], outer: Structure, inner: Structure, x: Tensor, y: Tensor, v: Tensor, data: Any
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x, y = x.requires_grad_(), y.requires_grad_()
        value = g(outer.unravel(x), inner.unravel(y), *data)
        (gradient,) = torch.autograd.grad(value, y, create_graph=True, allow_unused=True, materialize_grads=True)
        along = (gradient * v).sum()
        pulled = (
            torch.autograd.grad(along, (y, x), allow_unused=True, materialize_grads=True)
            if along.requires_grad
            else (torch.zeros_like(y), torch.zeros_like(x))
        )
    return value.detach(), gradient.detach(), *pulled


def _by_formula(
    known: AbstractKnownObjective, outer: Structure, inner: Structure, x: Tensor, y: Tensor, v: Tensor, data: Any
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        graph = known.coefficients(outer.unravel(x), *data)
    c = tuple(each.detach() for each in graph)
    with torch.no_grad():
        value, gradient, kept = known.expand(c, inner.unravel(y), *data)
        hv, slopes = known.products(c, kept, inner.unravel(v), *data)
    pairs = [(a, s) for a, s in zip(graph, slopes, strict=True) if a.requires_grad]
    gv = torch.zeros_like(x)
    if pairs:
        found = torch.autograd.grad([a for a, _ in pairs], x, [s for _, s in pairs], allow_unused=True)[0]
        gv = gv if found is None else found
    return value, inner.ravel(gradient, "grad_y g"), inner.ravel(hv, "H v"), gv


def _shown(a: Tensor) -> str:
    return f"{float(a):.4g}" if not a.dim() else f"of norm {float(torch.linalg.vector_norm(a)):.4g}"


def _multiple(a: Tensor, b: Tensor) -> str:
    """That one is a multiple of the other, where it is."""
    a, b = a.reshape(-1), b.reshape(-1)
    ratio = float(a @ b / (b @ b)) if float(b @ b) > 0 else 0.0
    is_one = ratio and float(torch.linalg.vector_norm(a - ratio * b)) <= 1e-6 * float(torch.linalg.vector_norm(a))
    return f", {ratio:.4g} times it" if is_one and a.numel() > 1 else ""
