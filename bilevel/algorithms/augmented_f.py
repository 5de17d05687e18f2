"""The outer objective of an augmented Lagrangian: f and the constraints, as the f of a problem like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._problem import BilevelProblem, Split
from bilevel._tree import Tree
from bilevel.algorithms.oracle import AbstractData, Oracle
from bilevel.algorithms.outer_constraints import entries
from bilevel.portable.pickling import AbstractPortable

Function = Callable[..., Tree]


@final
@dataclass(frozen=True, eq=False)
class Lagrange:
    """Multipliers `(*tasks, k)` and `(*tasks, m)`, and the weight w; w = 0: f alone, w = inf: the violation alone."""

    inequalities: Tensor
    equalities: Tensor
    weight: float


@final
@dataclass(frozen=True, eq=False)
class _Augmented(AbstractPortable):
    """f + sum_i (max(0, lambda_i + w c_i)^2 - lambda_i^2) / (2 w) + sum_j nu_j e_j + w e_j^2 / 2."""

    f: Callable[..., Tensor]
    inequalities: Function | None
    equalities: Function | None
    at: Lagrange
    of_tasks: bool

    def __call__(self, x: Tree, y: Tree, *data: Any) -> Tensor:
        multipliers, nu, w = self.at.inequalities, self.at.equalities, self.at.weight
        if self.of_tasks:
            *_, (own, multipliers, nu) = data
            data = (own,)
        violation = w == torch.inf
        total: Any = 0.0 if violation else self.f(x, y, *data)
        if w == 0:
            alone: Tensor = total
            return alone
        if self.inequalities is not None:
            c = entries(self.inequalities, "outer_inequalities", x, y, *data)
            shifted = (c if violation else multipliers + w * c).clamp_min(0)
            square = shifted.square().sum() / 2
            total = total + (square if violation else (square - multipliers.square().sum() / 2) / w)
        if self.equalities is not None:
            e = entries(self.equalities, "outer_equalities", x, y, *data)
            square = e.square().sum() / 2
            total = total + (square if violation else (nu * e).sum() + w * square)
        found: Tensor = total
        return found


@final
@dataclass(frozen=True, eq=False)
class _WithMultipliers(AbstractData):
    """The data of f, and beside those of each task its multipliers."""

    source: AbstractData
    at: Lagrange

    def batch(self, index: int, first: int) -> Any:
        return self.source.batch(index, first), self.at.inequalities, self.at.equalities

    def whole(self) -> Any:
        return self.source.whole(), self.at.inequalities, self.at.equalities

    @property
    def samples(self) -> int:
        return self.source.samples

    @property
    def has_whole(self) -> bool:
        return self.source.has_whole

    @property
    def is_fixed(self) -> bool:
        return self.source.is_fixed


def augmented(oracle: Oracle, inequalities: Function | None, equalities: Function | None, at: Lagrange) -> Oracle:
    """The oracle of the problem whose f is the augmented Lagrangian; its calls count at the same place.

    With tasks every task has multipliers of its own, which go along with its data, and f is the mean of their terms.
    """
    like, data = oracle.like, oracle.data
    of_tasks = like.tasks is not None
    made = _with_f(like.problem, _Augmented(like.problem.f, inequalities, equalities, at, of_tasks))
    if of_tasks:
        of_f, of_g = (data.f, data.g) if isinstance(data, Split) else (data, data)
        data = Split(f=_WithMultipliers(of_f, at), g=of_g)
    flat = FlatProblem(made, like.x, like.y, like.data, like.tally, given=like.given)
    return oracle.about(flat, data)


def _with_f(problem: BilevelProblem, f: Callable[..., Tensor]) -> BilevelProblem:
    """The same problem with another f, whether f was given to it or is a method of its class."""
    made = copy.copy(problem)
    vars(made).update(f=f, _f=f)
    return made
