"""Generalized linear models with penalties: g and its derivatives in closed form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._numerics.batched import is_batched
from bilevel._numerics.known_objective import AbstractKnownObjective
from bilevel._numerics.misfits import called
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import FINITE, POSITIVE, demand_range, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.inner_problems.linear_model import AbstractSampleLoss, Squared
from bilevel.problems.glm._gram import Gram
from bilevel.problems.glm._rows import Blocks, blocks_of
from bilevel.problems.glm.losses import AbstractRowLoss, SumOfOutputs

Coefficient: TypeAlias = Tensor | float | Callable[..., Tensor]

_SMALL = 512  # features: of more, X'WX costs more than a solve does without it


@final
@dataclass(frozen=True, eq=False)
class GeneralizedLinearModel(AbstractKnownObjective):
    """g(x, y) = sum_i w_i(x) l(X_i y, b_i) + sum_j a_j(x) y_j^2 / 2 + sum_j c_j(x) (sqrt(y_j^2 + eps^2) - eps).

    y is a vector `(d,)`, or a matrix `(C, d)` for C outputs. As g of a problem it is a function like any other, and
    knows its own derivatives: H v = X'(s * (X v)) + (a + ...) * v with the curvatures s computed once at each point and
    not traced by autograd, cross products in w, a and c, and the diagonal of H, which `Jacobi()` and `NewtonPCG` take.

    Cost: X is read once for a gradient, a product, or a product with its cross product, in blocks of rows that fit the
    cache; 4 n d C flops. Memory: 2 n C numbers at a point; sparse features are held twice. Where the loss is squared,
    weights do not depend on x, and X is dense with at most 512 features and twice as many rows or more, X'WX is formed
    from what X is at the first call, in the time of some d / 30 products, and X is not read again: 2 d^2 C flops.

    Args:
        features: X `(n, d)`, dense or sparse; or a function of the data of the problem, or of the task.
        targets: b `(n,)`, or `(n, C)` for losses of one number of several outputs; or a function of the data.
        loss: l: `Squared`, `LogLoss` (targets 1 and -1), `Huber` of `bilevel.inner_problems`, `Poisson`, `Softmax`
            (labels 0, ..., C - 1), or one of your own.
        weights: w `(n,)` or `()`; or a function `weights(x)`, or `weights(x, data)`. None: 1/n each, the mean.
        penalty: a, of a shape that broadcasts to that of y: `()`, or one for each feature `(d,)`; or a function of x.
            Groups share entries: `lambda x: x.exp()[group]`.
        rounded_l1: c, likewise.
        eps: where the L1 norm is rounded.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> from bilevel import BilevelProblem, hypergradient
        >>> X, b = torch.eye(2), torch.tensor([2.0, 4.0])
        >>> g = GeneralizedLinearModel(X, b, weights=torch.ones(2), penalty=lambda x: x.exp())
        >>> problem = BilevelProblem(lambda x, y: y.sum(), g)
        >>> hypergradient(problem, torch.zeros(2), torch.zeros(2)).grad.round(
        ...     decimals=3
        ... )  # y* = b / (1 + exp(x))
        tensor([-0.5000, -1.0000])
    """

    features: Tensor | Callable[[Any], Tensor]
    targets: Tensor | Callable[[Any], Tensor]
    loss: AbstractRowLoss | AbstractSampleLoss = Squared()
    weights: Tensor | Callable[..., Tensor] | None = None
    penalty: Coefficient | None = None
    rounded_l1: Coefficient | None = None
    eps: float = 1e-2
    _blocks: Blocks | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, eps=POSITIVE)
        sizes = [each.shape[0] for each in (self.features, self.targets) if isinstance(each, Tensor) and each.dim()]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"`GeneralizedLinearModel(features=..., targets=...)` must have a target for each row. Got {sizes[0]}"
                f" rows and {sizes[1]} targets."
            )
        if isinstance(self.features, Tensor) and self.features.layout == torch.strided:
            demand_shapes("GeneralizedLinearModel", {"features": Shape("n d")}, {"features": self.features})
        elif isinstance(self.features, Tensor):
            kept = self.features.sparse_dim() if self.features.layout is torch.sparse_coo else 2
            if self.features.dim() != 2 or kept != 2:
                raise ValueError(
                    "`GeneralizedLinearModel(features=...)` must be a matrix (n, d), sparse in both axes. Got shape"
                    f" {tuple(self.features.shape)}, {self.features.layout}."
                )
        for name, each in (("weights", self.weights), ("penalty", self.penalty), ("rounded_l1", self.rounded_l1)):
            if isinstance(each, Tensor):
                demand_shapes("GeneralizedLinearModel", {name: Shape(kind="number")}, {name: each})
            elif isinstance(each, float | int):
                demand_range("GeneralizedLinearModel", name, each, FINITE)
        object.__setattr__(self, "_blocks", blocks_of(self.features) if isinstance(self.features, Tensor) else None)

    def __reduce__(self) -> Any:
        fields = (self.features, self.targets, self.loss, self.weights, self.penalty, self.rounded_l1, self.eps)
        return GeneralizedLinearModel, fields

    @property
    def is_smooth(self) -> bool:
        return self.row_loss.is_smooth

    @property
    def row_loss(self) -> AbstractRowLoss:
        """l of all outputs."""
        return self.loss if isinstance(self.loss, AbstractRowLoss) else SumOfOutputs(self.loss)

    def __call__(self, x: Tree, y: Tensor, *data: Any) -> Tensor:
        c = self.coefficients(x, *data)
        V, b = _as_rows(y), self._targets(*data)
        (block,) = self._parts(*data, whole=True)
        total = _sum(self.row_loss.value(block.times(V), b), c[0])
        for (value, _, _), each in zip(self._terms(y), c[1:], strict=True):
            total = total + (each * value()).sum()
        return total

    def coefficients(self, x: Tree, *data: Any) -> tuple[Tensor, ...]:
        """w, a and c, those that there are."""
        like = self._features(*data)
        if self.weights is None:
            w = torch.full((), 1 / like.shape[0], dtype=like.dtype, device=like.device)
        elif isinstance(self.weights, Tensor):
            w = self.weights
        else:
            w = called("GeneralizedLinearModel(weights=...)(x, data)", self.weights, x, *data)
        found = [w]
        for name, given in (("penalty", self.penalty), ("rounded_l1", self.rounded_l1)):
            if given is None:
                continue
            if not isinstance(given, Tensor | float | int):
                given = called(f"GeneralizedLinearModel({name}=...)(x, data)", given, x, *data)
            found.append(torch.as_tensor(given, dtype=like.dtype, device=like.device))
        return tuple(found)

    def value_and_gradient(self, c: tuple[Tensor, ...], y: Tree, *data: Any) -> tuple[Tensor, Tree]:
        value, gradient, _ = self.expand(c, y, *data)
        return value, gradient

    def expand(self, c: tuple[Tensor, ...], y: Tree, *data: Any) -> tuple[Tensor, Tree, tuple[Tensor, ...]]:
        if self.gram is not None:
            return self.gram.expand(y, self._terms(y), c)
        w, V, loss, total, gradient = c[0], _as_rows(y), self.row_loss, None, None
        slopes, curvatures = [], []
        for block, b, own in self._each(y, w, *data):
            values, slope, curvature = loss.expand(block.times(V), b)
            part = _sum(values, own)
            total = part if total is None else total + part
            gradient = block.back(slope * own, gradient)
            slopes.append(slope)
            curvatures.append(curvature)
        assert total is not None and gradient is not None
        gradient = gradient.reshape(y.shape)
        for (value, first, _), each in zip(self._terms(y), c[1:], strict=True):
            total = total + (each * value()).sum()
            gradient = gradient + each * first()
        kept = [parts[0] if len(parts) == 1 else torch.cat(parts, -1) for parts in (slopes, curvatures)]
        return total, gradient, (y, *kept)

    def product(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tree, *data: Any) -> Tree:
        return self._run(c, kept, v, data, with_slopes=False)[0]

    def products(
        self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tree, *data: Any
    ) -> tuple[Tree, tuple[Tensor, ...]]:
        found, parts = self._run(c, kept, v, data, with_slopes=True)
        in_w = _fitted(parts, c[0]) if parts else torch.zeros_like(c[0])
        return found, (in_w, *self._penalty_slopes(c, kept, v))

    def slopes(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tree, *data: Any) -> tuple[Tensor, ...]:
        if self.gram is not None:
            return (torch.zeros_like(c[0]), *self._penalty_slopes(c, kept, v))
        V, slope = _as_rows(v), kept[1]
        blocks = self._parts(*data, whole=is_batched(v))
        parts = [(slope[..., block.samples] * block.times(V)).sum(0) for block in blocks]
        return (_fitted(parts, c[0]), *self._penalty_slopes(c, kept, v))

    def diagonal(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], *data: Any) -> Tree:
        if self.gram is not None:
            return self.gram.diagonal(kept[0], self._terms(kept[0]), c)
        y, _, curvature = kept
        loss, found = self.row_loss, None
        for block, _, own in self._each(y, c[0], *data):
            found = block.back_squared(loss.diagonal(curvature[..., block.samples]) * own, found)
        assert found is not None
        found = found.reshape(y.shape)
        for (_, _, second), each in zip(self._terms(y), c[1:], strict=True):
            found = found + each * second()
        return found

    def _run(
        self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tensor, data: Any, with_slopes: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """H v, and s(v) in w in parts; none where w is constant and it is not asked for."""
        if self.gram is not None:
            return self.gram.product(v, self._terms(kept[0]), c), []
        y, slope, curvature = kept
        w, V, loss, found, parts = c[0], _as_rows(v), self.row_loss, None, []
        each = w if w.dim() else None
        for block in self._parts(*data, whole=is_batched(v)):
            u = block.times(V)
            if with_slopes:
                parts.append((slope[..., block.samples] * u).sum(0))
            u = loss.bent(curvature[..., block.samples], u)
            found = block.back(u if each is None else u * each[block.samples], found)
        assert found is not None
        found = found.reshape(v.shape)
        found = w * found if each is None else found
        for (_, _, second), a in zip(self._terms(y), c[1:], strict=True):
            found = found + a * second() * v
        return found, parts

    @functools.cached_property
    def gram(self) -> Gram | None:
        """X'WX, where it is the curvature everywhere, and smaller than X."""
        X, b, w = self.features, self.targets, self.weights
        if not isinstance(X, Tensor) or not isinstance(b, Tensor) or not (w is None or isinstance(w, Tensor)):
            return None
        is_quadratic = isinstance(self.loss, Squared)
        small = X.layout == torch.strided and X.shape[1] <= _SMALL and X.shape[0] >= 2 * X.shape[1]
        return Gram.of(X, b, w) if is_quadratic and small else None

    def _penalty_slopes(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tensor) -> list[Tensor]:
        terms = zip(self._terms(kept[0]), c[1:], strict=True)
        return [_summed_to(first() * v, each) for (_, first, _), each in terms]

    def _terms(self, y: Tensor) -> Iterator[tuple[Callable[[], Tensor], ...]]:
        """Value, first and second derivative of each penalty that there is, entry by entry."""
        if self.penalty is not None:
            yield lambda: y.square() / 2, lambda: y, lambda: y.new_ones(())
        if self.rounded_l1 is not None:
            root = (y.square() + self.eps**2).sqrt()
            yield lambda: root - self.eps, lambda: y / root, lambda: self.eps**2 / root**3

    def _each(self, y: Tensor, w: Tensor, *data: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Blocks with their targets and weights."""
        b = self._targets(*data)
        for block in self._parts(*data, whole=is_batched(y)):
            yield block, b[..., block.samples], w[block.samples] if w.dim() else w

    def _features(self, *data: Any) -> Tensor:
        if isinstance(self.features, Tensor):
            return self.features
        return called("GeneralizedLinearModel(features=...)(data)", self.features, *data)

    def _targets(self, *data: Any) -> Tensor:
        """b `(n,)`, or `(C, n)`."""
        given = self.targets
        b = given if isinstance(given, Tensor) else called("GeneralizedLinearModel(targets=...)(data)", given, *data)
        return b.mT if b.dim() == 2 else b

    def _parts(self, *data: Any, whole: bool) -> Any:
        if self._blocks is not None and (not whole or len(self._blocks) == 1):
            return self._blocks
        return blocks_of(self._features(*data), whole=whole)


def _as_rows(y: Tensor) -> Tensor:
    return y.unsqueeze(0) if y.dim() == 1 else y


def _sum(values: Tensor, w: Tensor) -> Tensor:
    return values @ w if w.dim() else w * values.sum()


def _fitted(parts: list[Tensor], w: Tensor) -> Tensor:
    """s(v) in w, in its shape."""
    found = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return found if w.dim() else found.sum()


def _summed_to(found: Tensor, c: Tensor) -> Tensor:
    """What the derivative in c is, where c was broadcast to the shape of y."""
    while found.dim() > c.dim():
        found = found.sum(0)
    for axis, size in enumerate(c.shape):
        if size == 1 and found.shape[axis] != 1:
            found = found.sum(axis, keepdim=True)
    return found
