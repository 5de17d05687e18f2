"""The keywords that the variational methods took before their arguments were grouped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bilevel._validate import Group
from bilevel.problems.meta_learning.posterior_descent import PosteriorDescent


def _descent(inner: Any, changes: dict[str, Any]) -> Any:
    """Another inner solver goes before the steps of gradient descent, as it did."""
    return replace(inner, **changes) if isinstance(inner, PosteriorDescent) else inner


def _same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


PRIOR = Group(_same("kl_weight", "log_variance", "isotropic", "learn_variance"))
MONTE_CARLO = Group(_same("samples", "evaluation_samples", "antithetic", "seed"))
INNER = Group({"inner_steps": "steps", "step": "step", "variance_step": "variance_step"}, _descent)
SYSTEM = Group({"linear_steps": "steps", "damping": "damping", "form": "form"})
OUTER = Group({"outer_loss": "loss", "outer_kl_weight": "kl_weight", **_same("hyper_prior_weight", "precision_prior")})
