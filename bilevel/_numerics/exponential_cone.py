"""The projection onto the exponential cone, and its derivative."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_REACH = 600.0  # exp of it is finite
_STEPS = 150  # half of them of a bisection over 1200, which Newton's steps shorten


def exponential_faces(v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pi(v), Q, d and margin (see `Face`) for the closure of {y > 0, y exp(x / y) <= z} at v = (x, y, z) `(*batch, 3)`.

    On the curved part of the boundary v = a p + b q, with the rays p = (r, 1, exp r) of the cone and
    q = (1, 1 - r, -exp(-r)) of its polar, orthogonal for the same r; r solves one equation, and is monotone in it. From
    dv = p da + q db + (a p' + b q') dr follows D Pi: 1 along p, 0 along q, and along the normal n of both
    n'(a p') / n'(a p' + b q').

    Source: Friberg, "Projection onto the exponential cone: a univariate root-finding problem", Optim. Methods Softw. 38
    (2023).
    """
    x, y, z = v.unbind(-1)
    size = v.abs().amax(-1).clamp_min(torch.finfo(v.dtype).tiny)
    above = torch.where(y > 0, z - y * _exp(x / torch.where(y > 0, y, 1.0)), torch.minimum(-x, z))
    inside = torch.where(y > 0, above >= 0, (y == 0) & (x <= 0) & (z >= 0))
    below = torch.where(x > 0, -math.e * z - x * _exp(y / torch.where(x > 0, x, 1.0)), torch.minimum(-y, -z))
    polar = torch.where(x > 0, below >= 0, (x == 0) & (y <= 0) & (z <= 0)) & ~inside
    flat = (x < 0) & (y < 0) & ~inside & ~polar
    curved = ~(inside | polar | flat)
    r = _root(*(torch.where(curved, part, other) for part, other in ((x, 1.0), (y, 0.0), (z, 0.0))))
    # Rays over their largest entry, exp |r|; where that is large, the one equation gives a or b without cancellation.
    up, down = torch.exp(-r.clamp_min(0)), torch.exp(r.clamp_max(0))
    zero, one, norm = torch.zeros_like(r), torch.ones_like(r), r * r - r + 1
    p = torch.stack([r * up, up, torch.exp(r.clamp_max(0))], -1)
    q = torch.stack([down, (1 - r) * down, -torch.exp(-r.clamp_min(0))], -1)
    a, b = ((r - 1) * x + y) / norm, (x - r * y) / norm
    a, b = torch.where(r > 0, z + b * up, a), torch.where(r > 0, b, a * down - z)
    long_p, long_q = p * a.unsqueeze(-1), q * b.unsqueeze(-1)
    turn_p = torch.stack([up, zero, torch.exp(r.clamp_max(0))], -1) * a.unsqueeze(-1)
    turn_q = torch.stack([zero, -down, torch.exp(-r.clamp_min(0))], -1) * b.unsqueeze(-1)
    unit_p, unit_q = (w / torch.linalg.vector_norm(w, dim=-1, keepdim=True) for w in (p, q))
    n = torch.linalg.cross(unit_p, unit_q)
    near, far = (n * turn_p).sum(-1), (n * turn_q).sum(-1)
    share = (near / torch.where(near + far == 0, 1.0, near + far)).clamp(0, 1)
    Q = torch.stack([unit_p, unit_q, n], -1)
    eye = torch.eye(3, dtype=v.dtype, device=v.device)
    Q = torch.where(curved[..., None, None], Q, eye)
    ones = torch.ones_like(v)
    on_flat = torch.stack([one, zero, (z > 0).to(v)], -1)
    d = torch.stack([one, zero, share], -1)
    where = [mask.unsqueeze(-1) for mask in (inside, polar, flat)]
    d = torch.where(where[0], ones, torch.where(where[1], 0.0, torch.where(where[2], on_flat, d)))
    projection = torch.where(where[0], v, torch.where(where[1], 0.0, torch.where(where[2], on_flat * v, long_p)))
    lengths = torch.minimum(torch.linalg.vector_norm(long_p, dim=-1), torch.linalg.vector_norm(long_q, dim=-1))
    on_flat_margin = torch.stack([-x, -y, z.abs()]).amin(0)
    margin = torch.where(inside, above, torch.where(polar, below, torch.where(flat, on_flat_margin, lengths)))
    return projection, Q, d, torch.minimum(margin.abs(), size)


def _root(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """R with a exp(r) - b exp(-r) = z, which increases in r where a and b are positive: between two bounds."""
    infinite = torch.full_like(x, _REACH)
    # a > 0: (r - 1) x + y > 0; b > 0: x - r y > 0.
    turn_a, turn_b = 1 - y / torch.where(x == 0, 1.0, x), x / torch.where(y == 0, 1.0, y)
    low = torch.maximum(torch.where(x > 0, turn_a, -infinite), torch.where(y < 0, turn_b, -infinite))
    high = torch.minimum(torch.where(x < 0, turn_a, infinite), torch.where(y > 0, turn_b, infinite))
    low, high = low.clamp(-_REACH, _REACH), high.clamp(-_REACH, _REACH)
    r = (low + high) / 2
    for k in range(_STEPS):
        norm, up, down = r * r - r + 1, _exp(r), _exp(-r)
        a, b = ((r - 1) * x + y) / norm, (x - r * y) / norm
        value = a * up - b * down - z
        low, high = torch.where(value < 0, r, low), torch.where(value < 0, high, r)
        bend = (2 * r - 1) / norm
        slope = (x / norm - a * bend + a) * up - (-y / norm - b * bend - b) * down
        newton = r - value / torch.where(slope > 0, slope, 1.0)
        safe = (slope > 0) & (newton > low) & (newton < high)
        still = (newton - r).abs() <= 2 * torch.finfo(r.dtype).eps * (1 + r.abs())
        settled = bool((still | (high - low <= 0)).all())
        # Far out, where the exponential rules, Newton's steps have length one: every other step halves the interval.
        r = torch.where(safe | still, newton, (low + high) / 2) if k % 2 or settled else (low + high) / 2
        if settled:
            break
    return r


def _exp(r: Tensor) -> Tensor:
    return r.clamp_max(_REACH).exp()
