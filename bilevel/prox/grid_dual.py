"""The dual of squares and total variation on a grid: accelerated projected gradients, for rows of problems at once."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.prox.term import tiny

_LIPSCHITZ = 8.0  # of D D': the squared norm of differences on a grid
_LOOK = 20  # steps between looks at the residual, each of which waits for the numbers


def differences(y: Tensor) -> Tensor:
    """D y `(*batch, 2, m, n)`, y `(*batch, m, n)`: to the entry below, and to that on the right; zero at the border."""
    down, right = torch.zeros_like(y), torch.zeros_like(y)
    down = torch.cat([y[..., 1:, :] - y[..., :-1, :], down[..., :1, :]], dim=-2)
    right = torch.cat([y[..., 1:] - y[..., :-1], right[..., :1]], dim=-1)
    return torch.stack([down, right], dim=-3)


def pulled_back(z: Tensor) -> Tensor:
    """D' z `(*batch, m, n)`; what z has at the border does not count."""
    down, right = z[..., 0, :, :], z[..., 1, :, :]
    row, column = torch.zeros_like(down[..., :1, :]), torch.zeros_like(right[..., :1])
    down, right = down[..., :-1, :], right[..., :-1]
    rows = torch.cat([row, down], dim=-2) - torch.cat([down, row], dim=-2)
    return rows + torch.cat([column, right], dim=-1) - torch.cat([right, column], dim=-1)


def dual(v: Tensor, radius: Tensor, isotropic: bool, tol: float, max_steps: int) -> Tensor:
    """argmin_z |v - D' z|^2 / 2 over |z| <= r, for each difference, or for both of an entry if it is isotropic.

    Projected gradients with momentum, which starts anew for all rows where it leads one uphill.

    Returns:
        z `(*batch, 2, m, n)`, where the projected gradient is at most tol times the largest entry of v, or where
        `max_steps` end.
    """
    r = radius[..., None, None, None].clamp_min(0)
    stop = max(tol, 2 * torch.finfo(v.dtype).eps) * v.abs().amax((-2, -1)).clamp_min(tiny(v))
    z = torch.zeros_like(differences(v))
    ahead, momentum = z, torch.ones_like(radius)
    for k in range(max_steps):
        moved = projected(ahead + differences(v - pulled_back(ahead)) / _LIPSCHITZ, r, isotropic)
        step = moved - z
        uphill = ((ahead - moved) * step).sum((-3, -2, -1)) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        factor = torch.where(uphill, 0.0, (momentum - 1) / following)
        if k % _LOOK == 0:
            plain = projected(moved + differences(v - pulled_back(moved)) / _LIPSCHITZ, r, isotropic)
            largest = pulled_back(plain - moved).abs().amax((-2, -1)) * _LIPSCHITZ
            if bool(((largest <= stop) | largest.isnan()).all()):
                return plain
        ahead, z, momentum = moved + factor[..., None, None, None] * step, moved, following
    return z


def projected(z: Tensor, r: Tensor, isotropic: bool) -> Tensor:
    """z with every difference, or every pair of them, within radius r."""
    if not isotropic:
        return torch.minimum(torch.maximum(z, -r), r)
    norms = torch.linalg.vector_norm(z, dim=-3, keepdim=True)
    return torch.where(norms > r, z * (r / torch.where(norms > r, norms, 1.0)), z)


def components(joined: Tensor) -> Tensor:
    """The number of the component of each entry `(*batch, m * n)`, below m n, where edges `(*batch, 2, m, n)` join."""
    down, right = joined[..., 0, :-1, :], joined[..., 1, :, :-1]
    shape = joined.shape[:-3] + joined.shape[-2:]
    count = shape[-2] * shape[-1]
    labels = torch.arange(count, device=joined.device).reshape(shape[-2:]).expand(shape)
    while True:
        before, labels = labels, labels.clone()
        for edges, one, other in (
            (down, labels[..., :-1, :], labels[..., 1:, :]),
            (right, labels[..., :-1], labels[..., 1:]),
        ):
            least = torch.where(edges, torch.minimum(one, other), one)
            most = torch.where(edges, torch.minimum(one, other), other)
            one.copy_(least)
            other.copy_(torch.minimum(other, most))
        flat = labels.reshape(*shape[:-2], count)
        labels = flat.gather(-1, flat).reshape(shape)
        if torch.equal(before, labels):
            return flat


def bottleneck(slack: Tensor, labels: Tensor) -> Tensor:
    """The largest power of ten in 1, 0.1, ... 1e-9 such that edges with more slack make these components; or zero."""
    found = torch.zeros_like(slack[..., 0, 0, 0])
    for level in range(9, -1, -1):
        same = (components(slack >= 10.0**-level) == labels).all(-1)
        found = torch.where(same, 10.0**-level, found)
    return found
