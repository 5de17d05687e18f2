"""What the minimizers of scipy under constraints share: rows one by one, multipliers, an exact end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._inner import Objective
from bilevel._numerics.interior_point import Point
from bilevel._numerics.nonlinear_programs import NonlinearProgram, newton
from bilevel._numerics.quadratic_programs import violation
from bilevel._numerics.rows import matrix_times, row_moduli
from bilevel._numerics.saddle_point import pseudo_inverse
from bilevel._result import Solved, Status, first_statuses
from bilevel.inner_problems.nonlinear_constraints import Tangents
from bilevel.inner_problems.polytope import padded
from bilevel.solvers._convex_program import ConvexProgram
from bilevel.solvers._scipy import as_numpy, scipy_optimize

_FLOOR = 1e-12  # of the gradient at the start: what a gradient is compared with at least
_NEAR = 1e-3  # relative slacks of what may hold; which do is decided where multipliers are known


@final
class Row:
    """One problem of a batch as functions of numpy arrays; evaluated with all of them, the others where they are.

    Args:
        program: the batch.
        k: which one.
        y: where all of them are.
    """

    def __init__(self, program: ConvexProgram, k: int, y: Tensor) -> None:
        self.program, self.k, self.y = program, k, y.detach().reshape(-1, program.q).clone()
        self.A, self.b, self.lower, self.upper, self.G, self.h = (as_rows(part[k]) for part in program.linear)
        bounded = self.h < math.inf
        self.G, self.h = self.G[bounded], self.h[bounded]
        self._seen: tuple[bytes, Tangents] | None = None

    def at(self, flat: Any) -> Tensor:
        """All y, this one replaced, as the objective takes them."""
        there = self.y.clone()
        there[self.k] = torch.from_numpy(flat.copy()).to(there)
        return there.reshape(self.program.like.shape)

    def value_and_gradient(self, flat: Any) -> tuple[float, Any]:
        """Of g."""
        value, gradient = self.program.objective.value_and_gradient(self.at(flat))
        return float(value.reshape(-1)[self.k].double()), as_numpy(gradient.reshape(-1, self.program.q)[self.k])

    def hessian(self, flat: Any) -> Any:
        """Of g: `(q, q)`."""
        y = self.at(flat)
        return as_rows(self.program.rows(self.program.objective.hessian(y)[2].dense(y))[self.k])

    def part(self, flat: Any, name: str) -> Any:
        """The inequalities "c", the equalities "e", or their gradients "C", "E"."""
        at = self.tangents(flat)
        return as_rows(self.program.rows({"c": at.c, "e": at.e, "C": at.C, "E": at.E}[name])[self.k])

    def curvature(self, flat: Any, z: Any, name: str) -> Any:
        """Sum of the Hessians of the inequalities "c" or equalities "e", with weights: `(q, q)`."""
        at = self.tangents(flat)
        weights = {"c": torch.zeros_like(at.c), "e": torch.zeros_like(at.e)}
        weights[name].reshape(-1, weights[name].shape[-1])[self.k] = torch.from_numpy(z.copy()).to(at.c)
        bend = at.curvature(weights["c"], weights["e"]).dense(at.y.detach())
        return as_rows(self.program.rows(bend)[self.k])

    def tangents(self, flat: Any) -> Tangents:
        """The nonlinear constraints; kept, as values and gradients are asked for one after the other."""
        key = flat.tobytes()
        if self._seen is None or self._seen[0] != key:
            self._seen = key, self.program.nonlinear.tangents(self.at(flat))
        return self._seen[1]

    @property
    def counts(self) -> tuple[int, int]:
        """How many nonlinear inequalities and equalities there are."""
        at = self.tangents(as_numpy(self.y[self.k]))
        return at.c.shape[-1], at.e.shape[-1]


def as_rows(part: Tensor) -> Any:
    """In float64 on the CPU."""
    return part.detach().double().cpu().numpy().copy()


# A method of scipy for one problem, from a start: where it ended, its steps, and whether it had used them up.
RowMethod: TypeAlias = Callable[[Any, "Row", Any], tuple[Any, int, bool]]


def minimized(
    user: str, method: RowMethod, objective: Objective, y0: Tensor, tol: float | None, max_steps: int
) -> Solved:
    """The problems of a batch one after the other; then all by Newton's method on the constraints that hold."""
    optimize = scipy_optimize(user)
    tol = (1e-10 if y0.dtype == torch.float64 else 1e-5) if tol is None else tol
    given = ConvexProgram(objective, y0.detach())
    found, steps, spent = given.rows(y0), [0] * len(given.linear[0]), [False] * len(given.linear[0])
    lower, upper = given.linear[2:4]
    found = torch.minimum(torch.maximum(found, lower), upper)
    for k in range(len(found)):
        if not bool((lower[k] <= upper[k]).all()):  # which is found out below
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it stopped short: the violation is measured
            if not max_steps:
                spent[k] = True
                continue
            x, steps[k], spent[k] = method(optimize, Row(given, k, found), as_numpy(found[k]))
        found[k] = torch.from_numpy(x.copy()).to(found)
    objective.tally.inner_steps += sum(steps)
    program = ConvexProgram(objective, given.natural(found))
    problem = NonlinearProgram(program.model, program.residuals, program.slacks)
    point, floor = _completed(program)
    best, _ = newton(problem, point, floor)
    y = program.natural(best.y)
    model, flat, multipliers = program.finished(y, best.multipliers)
    gradient = padded(program.rows(objective.last_gradient(y)), flat)
    model = replace(model, q=gradient - matrix_times(model.Q, flat))
    error = violation(model, flat, multipliers, gradient, floor)
    unsolved = ~(error <= tol)
    tried, none = bool(unsolved.any()), torch.zeros_like(unsolved)
    exhausted = torch.tensor(spent, device=error.device)
    statuses = first_statuses(
        (given.undefined() if tried else none, Status.nonfinite),
        (unsolved & (program.contradictory(y) if tried else none), Status.infeasible),
        (unsolved & (program.ray(y) if tried else none), Status.unbounded),
        (unsolved & exhausted, Status.max_steps),
        (unsolved, Status.stagnated),
    )
    held = int(((flat >= model.upper) | (flat <= model.lower)).sum())
    shape = y0.shape[:-1]
    own = multipliers.reshape(*shape, -1).to(y0)
    return Solved(y, statuses, error.reshape(shape).to(y0), max(steps), held, own)


def _completed(program: ConvexProgram) -> tuple[Point, Tensor]:
    """Slacks and multipliers at the start of a program, the latter by least squares; and the floor of gradients."""
    entries, none = program.start()
    model = program.model(entries, none)
    at, sign = model.program, entries.new_tensor([[1.0], [-1.0]])
    primal, _ = at.scales(entries, none)
    limits = torch.stack([at.upper, -at.lower], -2)
    bounded = limits.isfinite()
    slacks = torch.where(bounded, limits - sign * entries.unsqueeze(-2), torch.inf)
    near = slacks <= _NEAR * primal.unsqueeze(-1)
    free, z = ~near.any(-2), torch.zeros_like(slacks)
    pull, multipliers = model.gradient, none
    for _ in range(2):  # what is near a bound and pulls away from it is free
        A_F = at.A * free.unsqueeze(-2)
        multipliers = -matrix_times(pseudo_inverse(A_F @ A_F.mT), matrix_times(A_F, model.gradient * free))
        pull = model.gradient + matrix_times(at.A.mT, multipliers)
        z = torch.where(bounded & (slacks <= _NEAR * primal.unsqueeze(-1)), -sign * pull.unsqueeze(-2), 0.0).clamp_min(
            0
        )
        free = (z == 0).all(-2)
    floor = _FLOOR * torch.maximum(row_moduli(model.gradient), row_moduli(pull))
    return Point(entries, multipliers, torch.where(bounded, slacks.clamp_min(0), 1.0), z), floor
