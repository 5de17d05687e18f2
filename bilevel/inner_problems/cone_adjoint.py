"""The adjoint of the optimality conditions of cone programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Linearization
from bilevel._linear import LinearOperator, SaddleBlocks
from bilevel._numerics.cone_programs import ConePoint, ConeProgram, Reduced, dependent, unreached
from bilevel._numerics.cones import Faces
from bilevel._numerics.rows import matrix_times, positive_or_one, row_moduli
from bilevel._result import Report, Solved, Status, Tally
from bilevel.inner_problems.cone_form import AffineMap, ConeForm
from bilevel.inner_problems.margins import default_margin, kink_report

_CLOSE = 100.0  # times the violation of the optimality conditions: how far off v may be
_SHOWN = 1e-9  # of a direction, in y: less is rounding
_MOVES = 1e-7  # of the derivative of what holds: less is rounding


@final
@dataclass(frozen=True, eq=False)
class AdjointCones:
    """Solutions of cone programs, and how they move with x; the system is that of `ConicProgram`.

    Attributes:
        form: the programs as functions of parameters.
        program: the programs, a row each.
        recover: z -> y.
        leaf: x.
        moving: the parameters `(*batch, parameters)`, with a graph from x.
        solved: y, and (z, w) as its multipliers.
        tally: where products are counted.
    """

    form: ConeForm
    program: ConeProgram
    recover: AffineMap
    leaf: Tensor
    moving: Tensor
    solved: Solved
    tally: Tally

    @cached_property
    def point(self) -> ConePoint:
        """(z, v); zero where a program has no solution."""
        assert self.solved.multipliers is not None
        n = self.program.c.shape[-1]
        known = self.solved.multipliers.reshape(-1, self.size).to(self.program.c)
        known = torch.where(known.isfinite().all(-1, keepdim=True), known, 0.0)
        return ConePoint.of(self.program, known[:, :n], known[:, n:])

    @cached_property
    def faces(self) -> Faces:
        """The projection at v."""
        return self.point.faces

    @cached_property
    def reduced(self) -> Reduced:
        """The derivative of the conditions."""
        return Reduced.at(self.point, self.faces)

    @cached_property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """M and B, dense."""
        return self.reduced.blocks()

    @cached_property
    def unseen(self) -> Tensor:
        """W, of directions Z in which z is not unique and that do not show in y, Z'W = I `(rows, n, n)`; others are 0.

        As M Z = 0, B Z = 0 and E Z = 0, a solution of the system with M + W W' is one of that with M: multiplied by Z',
        its first rows say W'u = 0.
        """
        Z, W = unreached(*self.blocks)
        flat = Z.mT.reshape(-1, Z.shape[-1])
        shown = self.recover(flat) - self.recover(torch.zeros_like(flat))
        hidden = row_moduli(shown) <= _SHOWN * row_moduli(flat)
        return W * hidden.reshape(len(Z), 1, -1)

    @property
    def size(self) -> int:
        """How many unknowns there are: n + m."""
        return self.program.c.shape[-1] + self.program.b.shape[-1]

    def linearization(self, margin: float | None) -> Linearization:
        """The conditions to first order, with what was found out about the point."""
        y = self.solved.value
        M, B = self.blocks
        M = M + self.unseen @ self.unseen.mT
        reports = (self._kink(margin), *self._dependence(B))
        n = M.shape[-1]
        M, B = (part.reshape(*y.shape[:-1], *part.shape[-2:]) for part in (M, B))
        leading = LinearOperator(lambda u: matrix_times(M, u.to(M)).to(u), n)
        everywhere = torch.ones(*y.shape[:-1], n, dtype=torch.bool, device=y.device)
        blocks = SaddleBlocks(leading, B.to(y), everywhere)
        return Linearization(
            y,
            torch.zeros_like(y),
            self._mv,
            lambda v: (self._mv(v), self._pull(v)),
            self._pull,
            operator=LinearOperator(self._mv, self.size, blocks=blocks),
            right_hand_side=self._right_hand_side,
            reports=reports,
        )

    def _parts(self, v: Tensor) -> tuple[Tensor, Tensor]:
        rows = v.reshape(-1, self.size).to(self.program.c)
        n = self.program.c.shape[-1]
        return rows[:, :n], rows[:, n:]

    def _mv(self, v: Tensor) -> Tensor:
        reduced, (u, s) = self.reduced, self._parts(v)
        self.tally.hvps += len(u)
        rows = reduced.rows_times(u)
        pull = torch.where(reduced.held, s, reduced.weight * rows)
        top = self.program.P.times(u) + reduced.rows_transposed(pull)
        top = top + matrix_times(self.unseen, matrix_times(self.unseen.mT, u))
        return torch.cat([top, torch.where(reduced.held, rows, s)], -1).reshape(v.shape).to(v)

    def _pull(self, v: Tensor) -> Tensor | None:
        reduced, (u, s) = self.reduced, self._parts(v)
        self.tally.cross_products += len(u)
        r = torch.where(reduced.held, s, reduced.weight * reduced.rows_times(u))
        return self._in_x(u, self.faces.turned(r, back=True))

    def _in_x(self, u: Tensor, r: Tensor) -> Tensor | None:
        """The derivative in x of u'(P z + c + A'w) + r'(A z - b); None where nothing depends on x."""
        if not self.moving.requires_grad:
            return None
        w = self.point.multipliers(self.faces)
        in_p = self.form.pulled(self.program, self.point.z, w, u, r).reshape(self.moving.shape)
        return torch.autograd.grad(self.moving, self.leaf, in_p, retain_graph=True, allow_unused=True)[0]

    def _right_hand_side(self, fy: Tensor) -> Tensor:
        in_z = self.recover.pulled(fy.reshape(-1, fy.shape[-1]).to(self.program.c), self.program.c.shape[-1])
        b = torch.cat([in_z, torch.zeros_like(self.program.b)], -1)
        return b.reshape(*fy.shape[:-1], self.size).to(fy)

    def _kink(self, margin: float | None) -> Report:
        v = self.point.v
        distance = self.faces.margin / positive_or_one(row_moduli(v)).squeeze(-1)
        least = default_margin(self.solved.value) if margin is None else margin
        uncertain = _CLOSE * self.point.violation(self.faces)
        uncertain = torch.where(uncertain.isfinite(), uncertain, 0.0)
        # In units in which `least` is the bound: a point that is not accurate is near a kink from further away.
        distance = distance / (uncertain / least).clamp_min(1.0) if least > 0 else distance
        return kink_report("active faces", distance.reshape(self.solved.value.shape[:-1]), least)

    def _dependence(self, B: Tensor) -> tuple[Report, ...]:
        """Whether constraints that hold depend on each other here, and not at other x; nothing if they do not."""
        if not self.moving.requires_grad or not bool(self.reduced.held.any()):
            return ()
        generator = torch.Generator(device="cpu").manual_seed(0)
        noise = torch.randn(self.program.b.shape, generator=generator, dtype=torch.float64, device="cpu").to(B)
        noise = torch.where(self.reduced.held, noise, 0.0)
        none = torch.zeros_like(self.program.c)
        moved, whole = (self._in_x(none, self.faces.turned(r, back=True)) for r in (dependent(B, noise), noise))
        if moved is None or whole is None or not bool(whole.abs().max() > 0):
            return ()
        size = float(moved.abs().max() / whole.abs().max())
        status = Status.successful if size <= _MOVES else Status.dependent_constraints
        return (Report("independence of what holds", status, size, 0),)
