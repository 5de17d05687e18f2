"""Certificates with tasks, put together from those of the single problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._problem import BilevelProblem, Split
from bilevel._result import Solved, Status
from bilevel._tree import tree_map
from bilevel.certificates.certificate import Certificate
from bilevel.certificates.certify_flat import distance
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.solvers.cg import accurate_cg
from bilevel.solvers.saddle_cholesky import SaddleCholesky


def certify_tasks(
    problem: FlatProblem,
    kind: AbstractInnerProblem,
    x: Tensor,
    z: Tensor,
    y: Tensor,
    one: Callable[[FlatProblem, Tensor, Tensor], Certificate],
) -> Certificate:
    """A bound on |z - h(x)|, h = (1 / n) sum_i h_i over n tasks, from bounds on |z_i - h_i|.

    z_i is the implicit gradient of the task at its y, so that

        |z - h| <= |z - (1 / n) sum_i z_i| + (1 / n) sum_i |z_i - h_i|.

    The constants are those of each task. Where one of the bounds is infinite, so is this, with the reason and the task.

    Args:
        problem: in vectors, with tasks.
        kind: what y is in each of them.
        x: `(p,)`.
        z: the estimate.
        y: where it was made `(tasks, q)`.
        one: certifies the hypergradient of one task: (problem, z_i, y_i) -> its certificate.
    """
    own = problem.problem
    single = BilevelProblem(own.f, inner=kind, encode=own.encode, init=own.init)
    found, sum_z = [], torch.zeros_like(z)
    for k, point in enumerate(y):
        task = FlatProblem(single, problem.x, problem.y, _data_of(problem.data, k), problem.tally)
        z_k = implicit_at(task, kind, x, point)
        sum_z = sum_z + z_k
        found.append(one(task, z_k, point))
    n = len(found)
    failed = next(((k, each) for k, each in enumerate(found) if not math.isfinite(each.bound)), None)
    apart = distance(z, sum_z / n)
    names = dict.fromkeys(name for each in found for name in each.terms)
    terms = {name: sum(each.terms.get(name, 0.0) for each in found) / n for name in names}
    terms["estimate"] = terms.get("estimate", 0.0) + apart
    bound = apart + sum(each.bound for each in found) / n
    worst = max(found, key=lambda each: each.distance)
    return replace(
        worst,
        bound=bound if failed is None else math.inf,
        terms=terms if failed is None else {},
        proven=all(each.proven for each in found),
        confidence=max(1 - sum(1 - each.confidence for each in found), 0.0),
        grad_norm=float(z.double().norm()),
        stats=problem.tally.stats(),
        reason="" if failed is None else f"task {failed[0]}: {failed[1].reason}",
        remark="" if failed is None else failed[1].remark,
    )


def implicit_at(problem: FlatProblem, kind: AbstractInnerProblem, x: Tensor, y: Tensor) -> Tensor:
    """The implicit gradient of one problem at a y that is given, by accurate solvers."""
    _, fx, fy = outer_gradients(problem, x, y)
    solved = Solved(y, (Status.successful,), torch.zeros_like(y[..., 0]), 0)
    at = kind.linearize(problem, x, solved, lambda: Exact().linearize(problem, x, y), None)
    definite = at.operator.positive_definite and at.operator.blocks is None
    linear: AbstractLinearSolver = accurate_cg(y) if definite else SaddleCholesky()
    moved = at.cross(linear.solve(at.operator, at.right_hand_side(fy)).value, fy)
    return fx if moved is None else fx - moved


def _data_of(data: Any, k: int) -> Any:
    """Those of one task."""

    def cut(leaf: Any) -> Any:
        return leaf[k] if isinstance(leaf, Tensor) else leaf

    return Split(tree_map(cut, data.f), tree_map(cut, data.g)) if isinstance(data, Split) else tree_map(cut, data)
