"""What an interior-point method asks of an objective with constraints: models, residuals, certificates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from bilevel._inner import Objective
from bilevel._numerics.interior_point import Program
from bilevel._numerics.nonlinear_programs import Model
from bilevel._numerics.quadratic_programs import solve_program, without_fixed
from bilevel._numerics.rows import matrix_times, positive_or_one, row_moduli
from bilevel.inner_problems.nonlinear_constraints import FlatConstraints, Tangents, tangent
from bilevel.inner_problems.polytope import FlatPolytope, lengths, padded

_SLIGHT = 1e-6  # of the size of y, or of a step: what counts as a violation
_BEYOND = 1e6  # times the size of y: how far a certificate reaches
_TRIES = 100


@final
@dataclass(frozen=True, eq=False)
class ConvexProgram:
    """Min g(y) under constraints, with one axis of rows, in float64, slacks of inequalities among the entries.

    Rows of constraints: linear equalities, e, linear inequalities, c. The gradients of e and c are divided by lengths
    that stay the same, those at the start, and entries with equal bounds are taken out.

    Attributes:
        objective: g and its constraints, as they are given.
        like: the start, of the shape and dtype that the objective takes.
    """

    objective: Objective
    like: Tensor

    @cached_property
    def _last(self) -> list[Any]:
        """Where the last model was, and that."""
        return []

    @property
    def q(self) -> int:
        """How many entries y has."""
        return self.like.shape[-1]

    @property
    def slacks(self) -> int:
        """How many inequalities there are."""
        return self.linear[4].shape[-2] + self.lengths[1].shape[-1]

    @cached_property
    def nonlinear(self) -> FlatConstraints:
        """The constraints that are no polytope."""
        if self.objective.nonlinear is not None:
            return self.objective.nonlinear
        return FlatConstraints(_none, _none)

    @cached_property
    def linear(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A, b, lower, upper, G and h, in rows."""
        polytope, y = self.objective.constraints, self.like
        if polytope is None:
            free = torch.full_like(y, torch.inf)
            polytope = FlatPolytope(y.new_zeros(*y.shape[:-1], 0, self.q), y.new_zeros(*y.shape[:-1], 0), -free, free)
        A, b, lower, upper, G, h = (
            self.rows(part.detach().expand(*y.shape[:-1], *part.shape[part.dim() - axes :]))
            for part, axes in zip(polytope.natural(self.q), (2, 1, 1, 1, 2, 1), strict=True)
        )
        return A, b, lower, upper, G, h

    @cached_property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Of the gradients of e and c at the start, or what their values make of them: `(rows, m)`, `(rows, k)`."""
        at, far = self.nonlinear.tangents(self.like), 1 + row_moduli(self.rows(self.like))
        found = []
        for values, gradients in ((at.e, at.E), (at.c, at.C)):
            sizes = torch.maximum(torch.linalg.vector_norm(self.rows(gradients), dim=-1), self.rows(values).abs() / far)
            found.append(positive_or_one(torch.where(sizes.isfinite(), sizes, 1.0)))
        return found[0], found[1]

    def rows(self, part: Tensor) -> Tensor:
        """A batch of vectors or matrices with one axis of rows, in float64."""
        dtype = torch.float32 if part.device.type == "mps" else torch.float64
        batch = self.like.shape[:-1]
        return part.detach().reshape(batch.numel(), *part.shape[len(batch) :]).to(dtype)

    def natural(self, entries: Tensor) -> Tensor:
        """Y, of the shape and dtype that the objective takes, of entries `(rows, n)`."""
        _, _, lower, upper, _, _ = self.linear
        y = torch.where(lower >= upper, lower, entries[:, : self.q])
        return y.reshape(self.like.shape).to(self.like)

    def model(self, entries: Tensor, multipliers: Tensor) -> Model:
        """The Lagrangian to second order, and tangents, without entries with equal bounds; the last is kept."""
        last = self._last
        if last and last[0] is entries and last[1] is multipliers:
            found: Model = last[2]
            return found
        whole = self.whole(self.natural(entries), multipliers)
        made = Model(without_fixed(whole.program)[0], whole.gradient)
        last[:] = [entries, multipliers, made]
        return made

    def whole(self, y: Tensor, multipliers: Tensor) -> Model:
        """The same with all entries."""
        _, gradient, hessian = self.objective.hessian(y)
        at = self.nonlinear.tangents(y)
        z, nu = self._shares(multipliers)
        z = z.clamp_min(0)  # on the way they may be anything; so L is convex where g and c are
        H = hessian.dense(y)
        if at.c.shape[-1] or at.e.shape[-1]:
            H = H + at.curvature(z, nu).dense(y)
        H = self.rows((H + H.mT) / 2)
        polytope = self._tangents(at)
        gradient, flat = self.rows(gradient), self.rows(y)
        slacks = polytope.A.shape[-1] - self.q
        q = gradient - matrix_times(H, flat)
        Q = torch.nn.functional.pad(H, (0, slacks, 0, slacks))
        program = Program(Q, padded(q, polytope.lower), polytope.A, polytope.b, polytope.lower, polytope.upper)
        return Model(program, padded(gradient, polytope.lower))

    def residuals(self, entries: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """grad g + (dE/dy)' multipliers, and E, at entries with slacks."""
        y = self.natural(entries)
        A, b, lower, upper, G, h = self.linear
        (m, k), flat, slacks = (A.shape[-2], G.shape[-2]), self.rows(y), entries[:, self.q :]
        z, nu = self._shares(multipliers)
        c, e, pull = (self.rows(part) for part in self.nonlinear.pulled(y, z, nu))
        e, c = e / self.lengths[0], c / self.lengths[1]
        last = multipliers.shape[-1] - k - c.shape[-1]
        bounded = h != torch.inf
        pull = pull + self.rows(self.objective.gradient(y)) + matrix_times(A.mT, multipliers[:, :m])
        pull = pull + matrix_times(G.mT, multipliers[:, last : last + k] * bounded)
        stationarity = torch.cat([torch.where(lower >= upper, entries[:, : self.q], pull), multipliers[:, last:]], -1)
        above = torch.where(bounded, matrix_times(G, flat) - torch.where(bounded, h, 0.0), 0.0) + slacks[:, :k]
        return stationarity, torch.cat([matrix_times(A, flat) - b, e, above, c + slacks[:, k:]], -1)

    def _shares(self, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """The multipliers of c and e themselves, in the shape that the objective takes."""
        A, e_length, c_length = self.linear[0], *self.lengths
        m, k = e_length.shape[-1], c_length.shape[-1]
        nu = multipliers[:, A.shape[-2] : A.shape[-2] + m] / e_length
        z = multipliers[:, multipliers.shape[-1] - k :] / c_length
        batch = self.like.shape[:-1]
        return z.reshape(*batch, k).to(self.like), nu.reshape(*batch, m).to(self.like)

    def _tangents(self, at: Tangents) -> FlatPolytope:
        A, b, lower, upper, G, h = self.linear
        y = self.rows(at.y)
        e, E, c, C = (self.rows(part) for part in (at.e, at.E, at.c, at.C))
        e_length, c_length = self.lengths
        E, e, C, c = E / e_length.unsqueeze(-1), e / e_length, C / c_length.unsqueeze(-1), c / c_length
        k = G.shape[-2] + C.shape[-2]
        bounded = h != torch.inf
        none = torch.cat([~bounded, torch.zeros_like(c, dtype=torch.bool)], -1)
        G = torch.cat([torch.where(bounded.unsqueeze(-1), G, 0.0), C], -2)
        h = torch.cat([torch.where(bounded, h, 0.0), matrix_times(C, y) - c], -1)
        A, b = torch.cat([A, E], -2), torch.cat([b, matrix_times(E, y) - e], -1)
        slack = torch.eye(k, dtype=y.dtype, device=y.device).expand(len(y), k, k)
        rows = torch.cat([torch.cat([A, A.new_zeros(*A.shape[:-1], k)], -1), torch.cat([G, slack], -1)], -2)
        zero = torch.zeros_like(none, dtype=y.dtype)
        return FlatPolytope(
            rows,
            torch.cat([b, h], -1),
            torch.cat([lower, zero.masked_fill(none, -torch.inf)], -1),
            torch.cat([upper, zero + torch.inf], -1),
        )

    def start(self) -> tuple[Tensor, Tensor]:
        """The entries of the start, with the slacks that constraints leave, and multipliers that are zero."""
        at = self._tangents(self.nonlinear.tangents(self.like))
        entries = at.with_slacks(self.rows(self.like))
        fixed = at.lower >= at.upper
        return torch.where(fixed, 0.0, entries), at.b.new_zeros(at.b.shape)

    def finished(self, y: Tensor, multipliers: Tensor) -> tuple[Program, Tensor, Tensor]:
        """At the solution y: the program with all entries, gradients of c of length one; (y, slacks); multipliers."""
        at = self.nonlinear.tangents(y)
        polytope = FlatPolytope(*(self.rows(part) for part in tangent(self.objective.constraints, at).tensors()))
        z, nu = self._shares(multipliers)
        H = self.objective.hessian(y)[2].dense(y)
        if at.c.shape[-1] or at.e.shape[-1]:
            H = H + at.curvature(z, nu).dense(y)
        slacks = polytope.A.shape[-1] - self.q
        Q = torch.nn.functional.pad(self.rows((H + H.mT) / 2), (0, slacks, 0, slacks))
        flat = polytope.with_slacks(self.rows(y))
        m, first = nu.shape[-1], self.linear[0].shape[-2]
        middle = multipliers[:, first + m : multipliers.shape[-1] - z.shape[-1]]
        own = torch.cat([multipliers[:, :first], self.rows(nu), middle, self.rows(z) * lengths(self.rows(at.C))], -1)
        zero = torch.zeros_like(polytope.lower)
        return Program(Q, zero, polytope.A, polytope.b, polytope.lower, polytope.upper), flat, own

    def undefined(self) -> Tensor:
        """Where g or a constraint, or a first derivative of one, is not finite at the start: `(rows,)`."""
        at = self.nonlinear.tangents(self.like)
        value, gradient = self.objective.value_and_gradient(self.like)
        parts = [self.rows(value.unsqueeze(-1)), self.rows(gradient), *(self.rows(part) for part in (at.c, at.e))]
        parts += [self.rows(part).flatten(1) for part in (at.C, at.E)] + [self.linear[0].flatten(1), self.linear[1]]
        known = ~torch.cat(parts, -1).isfinite().all(-1)
        return known | torch.stack([part.isnan().any(-1) for part in self.linear[2:4]]).any(0)

    def ray(self, y: Tensor) -> Tensor:
        """Whether g falls without end along a direction in which no constraint ends: `(rows,)`.

        It is looked for in the model at y: d with H d = 0, g'd least, C d <= 0, E d = 0 and -1 <= d <= 1. Values of g
        and the constraints far out along it decide.
        """
        finite = self.rows(y).isfinite().all(-1)
        flat = torch.where(finite.unsqueeze(-1), self.rows(y), self.rows(self.like))
        there = flat.reshape(self.like.shape).to(self.like)
        _, gradient, hessian = self.objective.hessian(there)
        g, H = self.rows(gradient), self.rows(hessian.dense(there))
        at = self.nonlinear.tangents(there)
        A, _, lower, upper, G, h = self.linear
        E, C = self.rows(at.E) / self.lengths[0].unsqueeze(-1), self.rows(at.C) / self.lengths[1].unsqueeze(-1)
        G = torch.where((h != torch.inf).unsqueeze(-1), G, 0.0)
        g, H = g / positive_or_one(row_moduli(g)), H / positive_or_one(row_moduli(H.flatten(1))).unsqueeze(-1)
        one, rows = torch.ones_like(flat), torch.cat([A, E, H], -2)
        box = (torch.where(lower.isfinite(), 0.0, -one), torch.where(upper.isfinite(), 0.0, one))
        G = torch.cat([G, C], -2)
        recession = FlatPolytope.lifted(rows, rows.new_zeros(rows.shape[:-1]), *box, G, G.new_zeros(G.shape[:-1]))
        n = recession.A.shape[-1]
        q = padded(g, recession.lower)
        found = solve_program(Program(g.new_zeros(len(g), n, n), q, *recession.tensors()), 1e-9, 100)
        step = found.y[:, : self.q]
        falls = finite & ((g * step).sum(-1) < -_SLIGHT)
        step = torch.where(falls.unsqueeze(-1), step, 0.0) * (1 + row_moduli(flat))
        values, outside = [], []
        for t in (0.0, 1e3, 3e3):
            ahead = (flat + t * step).reshape(self.like.shape).to(self.like)
            values.append(self.rows(self.objective.value(ahead).unsqueeze(-1)).squeeze(-1))
            outside.append(self.violated(ahead)[0].amax(-1))
        far = values[1] - values[0]
        falls = falls & (far < 0) & (values[2] - values[0] < 2.5 * far)  # as fast as a line, or faster
        level = _SLIGHT * 1e3 * row_moduli(step).squeeze(-1) + outside[0]
        return falls & (outside[1] <= level) & (outside[2] <= 3 * level)

    def violated(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """By how much each constraint is violated at y, in distances: `(rows, all)`, and the same with signs."""
        A, b, lower, upper, G, h = self.linear
        flat = self.rows(y)
        c, e = (self.rows(part) for part in self.nonlinear.values(y))
        equal = torch.cat([matrix_times(A, flat) - b, e / self.lengths[0]], -1)
        over = [matrix_times(G, flat) - h, c / self.lengths[1], flat - upper, lower - flat]
        signed = torch.cat([equal, torch.cat(over, -1).clamp_min(0)], -1)
        return signed.abs(), signed

    def contradictory(self, y: Tensor) -> Tensor:
        """Whether no point near or far satisfies the constraints: `(rows,)`, by a certificate.

        Let w be the violations at the point where their squares are least. Then w'(constraints) is stationary there,
        and positive; where it is convex, it is positive everywhere.
        """
        A, _, lower, upper, G, _ = self.linear
        crossed = (lower > upper).any(-1)
        eye = torch.eye(self.q, dtype=A.dtype, device=A.device)
        flat = torch.where(self.rows(y).isfinite().all(-1, keepdim=True), self.rows(y), self.rows(self.like))
        proven = torch.zeros_like(crossed)
        damping = torch.ones_like(flat[:, :1])
        for _ in range(_TRIES):
            there = flat.reshape(self.like.shape).to(self.like)
            w = self.violated(there)[1]
            at = self.nonlinear.tangents(there)
            c, e = at.c.shape[-1], at.e.shape[-1]
            rows = torch.cat(
                [
                    A,
                    self.rows(at.E) / self.lengths[0].unsqueeze(-1),
                    G,
                    self.rows(at.C) / self.lengths[1].unsqueeze(-1),
                    eye.expand(len(flat), *eye.shape),
                    -eye.expand(len(flat), *eye.shape),
                ],
                -2,
            )
            pull = matrix_times(rows.mT, w)
            gap, slope = w.square().sum(-1), torch.linalg.vector_norm(pull, dim=-1)
            reach = _BEYOND * (1 + torch.linalg.vector_norm(flat, dim=-1))
            proven = (gap.sqrt() > _SLIGHT * (1 + row_moduli(flat).squeeze(-1))) & (slope * reach < gap)
            if bool((proven | (gap == 0)).all()):
                break
            first = A.shape[-2] + e + G.shape[-2]
            z, nu = w[:, first : first + c] / self.lengths[1], w[:, A.shape[-2] : A.shape[-2] + e] / self.lengths[0]
            batch = self.like.shape[:-1]
            bend = at.curvature(z.reshape(*batch, c).to(self.like), nu.reshape(*batch, e).to(self.like))
            held = rows * (w != 0).unsqueeze(-1)
            H = held.mT @ held + (self.rows(bend.dense(there)) if c or e else 0.0)
            level = torch.diagonal(H, dim1=-2, dim2=-1).amax(-1, keepdim=True)
            size = positive_or_one(level)
            M = H + ((damping * 1e-8 + 1e-14) * size).unsqueeze(-1) * eye
            M = torch.where(M.isfinite(), M, eye)
            step = -torch.linalg.solve_ex(M, pull.nan_to_num().unsqueeze(-1))[0].squeeze(-1)
            ahead = flat + step
            now = self.violated(ahead.reshape(self.like.shape).to(self.like))[1].square().sum(-1)
            better = (now < gap).unsqueeze(-1)
            flat = torch.where(better, ahead, flat)
            damping = torch.where(better, damping / 10, damping * 10).clamp(1e-3, 1e16)
        found: Tensor = crossed | proven
        return found


def _none(y: Tensor) -> Tensor:
    return y.new_zeros(*y.shape[:-1], 0)
