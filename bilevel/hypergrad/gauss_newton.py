"""Gauss-Newton products: a Hessian of g that is positive semidefinite, whatever the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization, grad, total
from bilevel._flat import FlatProblem
from bilevel._numerics.misfits import called
from bilevel._numerics.second_derivatives import explained, refuse_dropped_terms
from bilevel._tree import Tree
from bilevel.inner_problems.declarations import Composition
from bilevel.inner_problems.kinds import inner_problem
from bilevel.requirements.properties import DoesNotApply

_ROUNDING = 1e3  # units of the outputs' dtype, in which g and the sum of its parts may differ


@final
@dataclass(frozen=True, eq=False)
class GaussNewton(AbstractProducts):
    """H_GN = J' (d2 loss / dz2) J + d2 regularizer / dy2 in the place of H: `AID(products=GaussNewton())`.

    Here g = loss(x, z) + regularizer(x, y), z = outputs(x, y), J = dz/dy. H_GN is positive semidefinite for every loss
    that is convex in z and every regularizer that is convex in y, wherever y is. It leaves out
    sum_i (d loss / dz_i) d2 z_i / dy2, and so is H where the outputs are linear in y, and near it where every sample is
    fitted. Cross products are exact.

    The estimate is biased, and says by how much: `Estimate.substitute.residual` is |grad_y f - H v| / |grad_y f| with H
    itself: an exact product at v, in the pass of the cross product.

    Cost: one graph, that of exact products; a product is a pass to the outputs, J v, one through the loss, and one
    back: about an exact one. Memory: as `Exact`, and one vector. Tasks side by side as well.

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation
    14 (2002). J v is the derivative of J'u in u, which needs no forward mode.

    Args:
        outputs: `outputs(x, y) -> tensor`, or `outputs(x, y, data)`. None: those that the inner problem declares,
            `BilevelProblem(f, inner=SupervisedTraining(outputs, loss, regularizer))`.
        loss: `loss(x, z) -> scalar`, or `loss(x, z, data)`.
        regularizer: `regularizer(x, y) -> scalar`, or `regularizer(x, y, data)`; None: none.

    Raises:
        TypeError: if one of them cannot be called, or one of outputs and loss is missing.
        ValueError: from an estimate, if g is not the sum of these parts, or nothing is declared.

    Example:
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.solvers import CG, LBFGS
        >>> t = torch.tensor([1.0, 2.0])
        >>> def outputs(x, y):
        ...     return y.tanh() * t
        >>> def loss(x, z):
        ...     return (z - x).square().sum()
        >>> problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: loss(x, outputs(x, y)))
        >>> aid = AID(LBFGS(tol=1e-6), CG(), products=GaussNewton(outputs, loss))
        >>> found = hypergradient(problem, torch.tensor(0.5), torch.zeros(1), estimator=aid)
        >>> found.substitute.system
        'Gauss-Newton'
    """

    outputs: Callable[..., Tensor] | None = None
    loss: Callable[..., Tensor] | None = None
    regularizer: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if self.outputs is None and self.loss is None:
            if self.regularizer is not None:
                raise TypeError(
                    "`GaussNewton(regularizer=...)` belongs to outputs and a loss. Got neither. Pass `outputs=` and"
                    " `loss=` as well, or none of the three."
                )
            return
        if self.outputs is None or self.loss is None:
            raise TypeError(
                f"`GaussNewton(outputs=..., loss=...)` must be given both, or none where the inner problem declares"
                f" them. Got {'outputs' if self.loss is None else 'loss'} alone."
            )
        Composition(self.outputs, self.loss, self.regularizer).demand_callable("GaussNewton")

    @property
    def stands_in(self) -> str:
        return "Gauss-Newton"

    def linearize(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        problem.tally.gradients += y.shape[:-1].numel()
        return self.curvature(problem, x, y)

    def curvature(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        tally, rows = problem.tally, y.shape[:-1].numel()
        parts = self._parts(problem)
        with torch.enable_grad(), explained():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            z, dtype = _outputs(parts, problem, x, y)
            value = total(_loss(parts, problem, x, z))
            rest = total(_regularizer(parts, problem, x, y))
            if self.outputs is not None:
                _demand_parts(problem, x, y, value + rest, dtype)
            refuse_dropped_terms(value, y)
            in_z = grad(value, z, create_graph=True, checked=True)
            pulled = torch.zeros_like(y)
            if z.requires_grad:
                pulled = torch.autograd.grad(z, y, in_z, create_graph=True, allow_unused=True, materialize_grads=True)[
                    0
                ]
            of_rest = grad(rest, y, create_graph=True)
            gradient = pulled + of_rest
        curved = pulled.requires_grad and in_z.requires_grad

        def through(in_outputs: Tensor | None, v: Tensor) -> Tensor:
            """J' (d2 loss) (J v) + (d2 regularizer) v, from J v."""
            sources, along = [], []  # one pass back through both terms: half of the time of small networks is passes
            if in_outputs is not None:
                (weighted,) = torch.autograd.grad(in_z, z, in_outputs, retain_graph=True, allow_unused=True)
                if weighted is not None:
                    sources, along = [z], [weighted]
            if of_rest.requires_grad:
                sources, along = [*sources, of_rest], [*along, v]
            if not sources:
                return torch.zeros_like(v)
            (found,) = torch.autograd.grad(sources, y, along, retain_graph=True, allow_unused=True)
            return torch.zeros_like(v) if found is None else found

        def mv(v: Tensor) -> Tensor:
            tally.hvps += rows
            with explained():
                moved = (
                    torch.autograd.grad(pulled, in_z, v, retain_graph=True, allow_unused=True)[0] if curved else None
                )
                return through(moved, v)

        seen: list[tuple[Tensor, int, Tensor]] = []  # the latest v of `products`, and H v there

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            tally.hvps += 2 * rows  # one of them exact
            tally.cross_products += rows
            if not gradient.requires_grad:
                return torch.zeros_like(v), None
            leaves = (in_z, y, x) if curved else (y, x)
            with explained():
                found = torch.autograd.grad(gradient, leaves, v, retain_graph=True, allow_unused=True)
                hv, gv = found[-2:]
                seen[:] = [(v, v._version, torch.zeros_like(v) if hv is None else hv)]
                return through(found[0] if curved else None, v), gv

        def pull(v: Tensor) -> Tensor | None:
            tally.cross_products += rows
            if not gradient.requires_grad:
                return None
            with explained():
                return torch.autograd.grad(gradient, x, v, retain_graph=True, allow_unused=True)[0]

        def exact(v: Tensor) -> Tensor:
            if not (seen and seen[0][0] is v and seen[0][1] == v._version):
                products(v)
            return seen[0][2] if seen else torch.zeros_like(v)

        start_in_x = problem.problem.init is not None
        return Linearization(y.detach(), gradient.detach(), mv, products, pull, start_in_x=start_in_x, exact=exact)

    def _parts(self, problem: FlatProblem) -> Composition:
        if self.outputs is not None and self.loss is not None:
            return Composition(self.outputs, self.loss, self.regularizer)
        declared = inner_problem(problem.problem).composition
        if declared is None:
            raise DoesNotApply(
                "`GaussNewton()` products need to know what g is made of. Write `BilevelProblem(f,"
                " inner=SupervisedTraining(outputs, loss, regularizer))`, or `GaussNewton(outputs=..., loss=...)`."
            )
        return declared


def _outputs(parts: Composition, problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, torch.dtype]:
    """z `(*tasks, ...)` in the dtype of y, and the dtype that it was computed in."""
    dtypes: list[torch.dtype] = []

    def one(x: Tree, y: Tensor, *data: Any) -> Tensor:
        found = called("outputs(x, y, data)", parts.outputs, x, problem.y.unravel(y), *data)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"`outputs(x, y)` must return a tensor of real numbers. Got {got}.")
        dtypes.append(found.dtype)
        return found.to(y.dtype)

    return problem.map(one, "g", x, y), dtypes[-1]


def _loss(parts: Composition, problem: FlatProblem, x: Tensor, z: Tensor) -> Tensor:
    def one(x: Tree, z: Tensor, *data: Any) -> Tensor:
        return _number("loss(x, z)", called("loss(x, z, data)", parts.loss, x, z, *data))

    return problem.map(one, "g", x, z)


def _regularizer(parts: Composition, problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
    regularizer = parts.regularizer
    if regularizer is None:
        return y.new_zeros(())

    def one(x: Tree, y: Tensor, *data: Any) -> Tensor:
        found = called("regularizer(x, y, data)", regularizer, x, problem.y.unravel(y), *data)
        return _number("regularizer(x, y)", found)

    return problem.map(one, "g", x, y)


def _number(call: str, found: object) -> Tensor:
    if not isinstance(found, Tensor) or found.numel() != 1:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"`{call}` must return a scalar tensor. Got {got}. Reduce it with `.mean()` or `.sum()`.")
    return found.reshape(())


def _demand_parts(problem: FlatProblem, x: Tensor, y: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    """Refuse parts whose sum is not g; one value of g.

    Raises:
        DoesNotApply: with both values.
    """
    problem.tally.values += y.shape[:-1].numel()
    with torch.no_grad():
        own, sum_of_parts = float(total(problem.g(x, y))), float(value)
    unit = _ROUNDING * float(torch.finfo(dtype).eps)
    if abs(own - sum_of_parts) > unit * (abs(own) + abs(sum_of_parts)):  # NaN is reported elsewhere
        raise DoesNotApply(
            f"`GaussNewton(outputs=..., loss=..., regularizer=...)` must be the parts of g. Got"
            f" loss + regularizer = {sum_of_parts:.6g}, where g is {own:.6g}. Leave no term of g out."
        )
