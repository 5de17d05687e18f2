"""The group lasso, and its conjugate, a ball for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._tree import Structure, Tree, ravel
from bilevel.arguments.fits import demand_types
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.prox.derivative import ProxDerivative, complement
from bilevel.prox.structured import group_derivative, norms_of, shrinkage
from bilevel.prox.term import AbstractProxTerm, demand_number, outside, relative_gap

Groups: TypeAlias = Tensor | Sequence[Sequence[int]] | Literal["rows", "leaves", "all"]


@final
@dataclass(frozen=True, eq=False)
class GroupLasso(AbstractProxTerm):
    """h(y) = sum_g w_g |y_g|, w >= 0, groups without overlap; prox_{t h}(v)_g = max(1 - t w_g / |v_g|, 0) v_g.

    Where |v_g| > t w_g, with e = v_g / |v_g|, the derivative in v is (1 - t w_g / |v_g|) I + (t w_g / |v_g|) e e', and
    that in w_g is -t e; else both are 0.

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", JRSS B 68 (2006).

    Args:
        weight: w: a number for all groups, or a tensor `(k,)` of one for each. An estimate at a negative weight ends
            with `Status.nonfinite`.
        groups: which entries are together: labels 0 ... k - 1, a tensor of integers with as many entries as y has; or
            for each group the indices of its entries, of y as one vector; or "rows" of a matrix (k of them, or of each
            leaf), "leaves" of a structure, "all" entries as one group.

    Raises:
        ValueError: if a group is empty, or an entry is in no group or in two.

    Example:
        >>> GroupLasso(1.0, [[0, 1], [2]]).prox(torch.tensor([3.0, 4.0, 0.5]), 2.5)
        tensor([1.5000, 2.0000, 0.0000])
    """

    weight: float | Tensor
    groups: Groups

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("GroupLasso", "weight", self.weight)
        object.__setattr__(self, "groups", _checked("GroupLasso", "weight", self.weight, self.groups))

    def value(self, y: Tree) -> Tensor:
        flat, structure = ravel(y, "y")
        labels, count = _labels("GroupLasso", self.groups, structure, self.weight)
        return (self.weight * norms_of(flat, labels, count)).sum()

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        flat, structure = ravel(v, "v")
        labels, count = _labels("GroupLasso", self.groups, structure, self.weight)
        return structure.unravel(shrinkage(flat, step * self.weight, labels, count).factors[labels] * flat)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        flat, structure = ravel(v, "v")
        norms = norms_of(flat, *_labels("GroupLasso", self.groups, structure, self.weight))
        return relative_gap(norms, step * self.weight).min()

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        flat, structure = ravel(v, "v")
        labels, count = _labels("GroupLasso", self.groups, structure, self.weight)
        return group_derivative(shrinkage(flat, step * self.weight, labels, count), labels, count)

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        flat, structure = ravel(v, "v")
        labels, count = _labels("GroupLasso", self.groups, structure, self.weight)
        return (~shrinkage(flat, step * self.weight, labels, count).dead).long()

    def labels(self, y: Structure) -> tuple[Tensor, int]:
        """The group of each entry of y as one vector, and how many groups there are."""
        return _labels("GroupLasso", self.groups, y, self.weight)

    def conjugate(self) -> GroupBall:
        return GroupBall(self.weight, self.groups)


@final
@dataclass(frozen=True, eq=False)
class GroupBall(AbstractProxTerm):
    """h(y) = 0 where |y_g| <= r_g for all groups g, infinite elsewhere; prox_{t h}(v)_g = min(1, r_g / |v_g|) v_g.

    The projection, whatever t. Outside, with e = v_g / |v_g|, the derivative in v is (r_g / |v_g|) (I - e e'), and that
    in r_g is e; inside they are I and 0.

    Args:
        radius: r: a number for all groups, or a tensor `(k,)` of one for each.
        groups: as those of `GroupLasso`.

    Example:
        >>> GroupBall(1.0, [[0, 1], [2]]).prox(torch.tensor([3.0, 4.0, 0.5]), 0.1)
        tensor([0.6000, 0.8000, 0.5000])
    """

    radius: float | Tensor
    groups: Groups

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("GroupBall", "radius", self.radius)
        object.__setattr__(self, "groups", _checked("GroupBall", "radius", self.radius, self.groups))

    def value(self, y: Tree) -> Tensor:
        flat, structure = ravel(y, "y")
        norms = norms_of(flat, *_labels("GroupBall", self.groups, structure, self.radius))
        return outside(norms - self.radius, self.radius, len(flat)).sum()

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        flat, structure = ravel(v, "v")
        labels, count = _labels("GroupBall", self.groups, structure, self.radius)
        shrunk = shrinkage(flat, self.radius, labels, count)
        factors = self.radius / torch.where(shrunk.norms == 0, 1.0, shrunk.norms)
        return structure.unravel(torch.where(shrunk.dead, 1.0, factors)[labels] * flat)

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        flat, structure = ravel(v, "v")
        return relative_gap(
            norms_of(flat, *_labels("GroupBall", self.groups, structure, self.radius)), self.radius
        ).min()

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        flat, structure = ravel(v, "v")
        labels, count = _labels("GroupBall", self.groups, structure, self.radius)
        return complement(group_derivative(shrinkage(flat, self.radius, labels, count), labels, count))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        flat, structure = ravel(v, "v")
        labels, count = _labels("GroupBall", self.groups, structure, self.radius)
        return shrinkage(flat, self.radius, labels, count).dead.long()

    def conjugate(self) -> GroupLasso:
        return GroupLasso(self.radius, self.groups)


def _checked(call: str, name: str, weight: float | Tensor, groups: Groups) -> Tensor | str:
    """The groups as labels; or the word, for what the structure of y tells."""
    if isinstance(weight, Tensor):
        axes = "" if not weight.dim() else "k"
        demand_shapes(call, {name: Shape(axes, kind="number", finite=False)}, {name: weight})
    if isinstance(groups, str):
        return groups
    if isinstance(groups, Tensor):
        demand_shapes(call, {"groups": Shape("q", kind="integer")}, {"groups": groups})
        labels = groups.long()
        if int(labels.min()) < 0:
            raise ValueError(f"`{call}(groups=...)` must be labels 0, 1, ... Got {int(labels.min())} among them.")
    else:
        owners: dict[int, int] = {}
        for g, members in enumerate(groups):
            if not members:
                raise ValueError(f"`{call}(groups=...)` must have entries in every group. Got none in group {g}.")
            for index in members:
                if index in owners:
                    raise ValueError(
                        f"`{call}(groups=...)` must be groups without overlap. Got the index {index} in groups"
                        f" {owners[index]} and {g}."
                    )
                owners[index] = g
        if sorted(owners) != list(range(len(owners))) or not owners:
            missing = next((k for k in range(len(owners)) if k not in owners), 0)
            raise ValueError(
                f"`{call}(groups=...)` must hold each index of an entry of y, 0, 1, ... Got no group with {missing}."
            )
        labels = torch.tensor([owners[k] for k in range(len(owners))], device="cpu")
    present = set(labels.tolist())
    if max(present) >= len(present):
        empty = next(g for g in range(len(present)) if g not in present)
        raise ValueError(f"`{call}(groups=...)` must have entries in every group. Got none in group {empty}.")
    return labels


def _labels(call: str, groups: Groups, y: Structure, weight: float | Tensor) -> tuple[Tensor, int]:
    """The label of each entry of y, and the number of groups."""
    count = 1
    if isinstance(groups, Tensor):
        if len(groups) != y.size:
            raise ValueError(
                f"`{call}(groups=...)` must name a group for each of the {y.size} entries of y. Got {len(groups)}."
            )
        labels, count = groups.to(y.device), int(groups.max()) + 1
    elif groups == "all":
        labels = torch.zeros(y.size, dtype=torch.int64, device=y.device)
    else:
        lengths = [
            [shape.numel()] if groups == "leaves" else [shape[1:].numel()] * (shape[0] if shape else 1)
            for shape in y.shapes
        ]
        sizes = torch.tensor([length for each in lengths for length in each], device=y.device)
        labels, count = torch.arange(len(sizes), device=y.device).repeat_interleave(sizes), len(sizes)
    if isinstance(weight, Tensor) and weight.dim() and len(weight) != count:
        name = "weight" if call == "GroupLasso" else "radius"
        raise ValueError(
            f"`{call}({name}=...)` must be a number, or hold one for each of the {count} groups. Got {len(weight)}."
        )
    return labels, count
