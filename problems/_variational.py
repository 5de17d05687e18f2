"""Diagonal Gaussians over the parameters of a model: the divergence, draws, and the hyper-prior."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel._tree import Structure, Tree, tree_leaves


def rows(tree: Tree, batch: int = 0) -> Tensor:
    """The leaves `(*batch, ...)` of a tree side by side: `(*batch, n)`."""
    return torch.cat([leaf.reshape(*leaf.shape[:batch], -1) for leaf in tree_leaves(tree)], dim=-1)


def divergence(prior: Mapping[str, Tree], posterior: Mapping[str, Tree]) -> Tensor:
    """KL(N(m_t, d_t) || N(m, d)) = sum_i [l_i - l_ti + exp(l_ti - l_i) + (m_ti - m_i)^2 exp(-l_i) - 1] / 2, l = log d.

    Args:
        prior: `mean` m and `log_variance` l, of the same structure, or one number for all entries.
        posterior: `mean` m_t and `log_variance` l_t.

    Example:
        >>> prior = {"mean": torch.zeros(2), "log_variance": torch.tensor(0.0)}
        >>> float(divergence(prior, {"mean": torch.ones(2), "log_variance": torch.zeros(2)}))
        1.0
    """
    m, log_d, m_t, log_dt = (rows(part[key]) for part in (prior, posterior) for key in ("mean", "log_variance"))
    return (log_d - log_dt + (log_dt - log_d).exp() + (m_t - m).square() * (-log_d).exp() - 1).sum() / 2


def hyper_prior(prior: Mapping[str, Tree], shape: float, rate: float) -> Tensor:
    """-log p(m, d) up to a constant: m ~ N(0, 1) and 1 / d ~ Gamma(shape, rate), entry by entry.

    Example:
        >>> float(hyper_prior({"mean": torch.ones(2), "log_variance": torch.zeros(2)}, 1.0, 0.5))
        2.0
    """
    log_d = rows(prior["log_variance"])
    return rows(prior["mean"]).square().sum() / 2 + ((shape - 1) * log_d + rate * (-log_d).exp()).sum()


def weights(posterior: Mapping[str, Tree], noise: Tensor, structure: Structure) -> Tree:
    """Draws m_t + sqrt(d_t) e of the posterior, for noise e `(samples, n)`: leaves `(samples, ...)`."""
    mean = rows(posterior["mean"])
    drawn = mean + (rows(posterior["log_variance"]) / 2).exp() * noise.to(mean.device, mean.dtype)
    return structure.unravel(drawn)


def normal_noise(shape: tuple[int, ...], seed: int, like: Tensor, *, antithetic: bool) -> Tensor:
    """Standard normal numbers `(..., samples, n)` from the seed; antithetic: the second half is minus the first.

    Example:
        >>> noise = normal_noise((4, 3), 0, torch.zeros(()), antithetic=True)
        >>> bool((noise[2:] == -noise[:2]).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    samples = shape[-2] // 2 if antithetic else shape[-2]
    half = torch.randn((*shape[:-2], samples, shape[-1]), generator=generator, dtype=like.dtype, device="cpu").to(
        like.device
    )
    return torch.cat([half, -half], dim=-2) if antithetic else half
