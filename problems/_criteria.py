"""What penalties are chosen by: held-out loss, cross-validation, Stein's unbiased risk estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem
from bilevel.inner_problems.linear_model import LinearModel
from bilevel.prox.term import AbstractProxTerm

Criterion: TypeAlias = Literal["held-out", "cross-validation", "sure"]
Validation: TypeAlias = Literal["held-out", "cross-validation"]
Term: TypeAlias = Callable[..., AbstractProxTerm]

_APART = 1_000_003  # between the seed of X and that of the direction of a risk estimate


@final
@dataclass(frozen=True, eq=False)
class Validated:
    """A problem by one criterion, and the data that it is called with.

    Attributes:
        problem: f, g and the term.
        data: of its tasks.
    """

    problem: BilevelProblem
    data: dict[str, Tensor]


def fold_weights(call: str, n: int, folds: int) -> dict[str, Tensor]:
    """Weights of the samples that a fold trains on and leaves out, `(folds, n)` each; every one sums to 1.

    Raises:
        ValueError: if there are fewer than two folds, or more than samples.
    """
    if not 2 <= folds <= n:
        raise ValueError(f"`{call}(folds=...)` must be at least 2 and at most n = {n}. Got {folds}.")
    held = torch.arange(folds, device="cpu").unsqueeze(1) == torch.arange(n, device="cpu") % folds
    return {
        "train": ~held / (~held).sum(1, keepdim=True).double(),
        "held": held / held.sum(1, keepdim=True).double(),
    }


def cross_validated(call: str, model: LinearModel, term: Term, folds: int) -> Validated:
    """The mean over folds of the loss on the fold left out, where folds are tasks that share X."""
    train = LinearModel(model.X, model.targets, model.loss, lambda fold: fold["train"])
    left_out = LinearModel(model.X, model.targets, model.loss, lambda fold: fold["held"])
    data = fold_weights(call, model.X.shape[0], folds)
    return Validated(BilevelProblem(left_out, train, prox=term, tasks=True), data)


def risk_estimated(model: LinearModel, term: Term, variance: float, seed: int) -> Validated:
    """SURE = |b - X y|^2 - n s + 2 s dof, dof = <X y(b + e u) - X y(b), u> / e: two fits side by side, over 2 n.

    It is unbiased, up to e, for any y(b) that moves without jumps with b, so for every convex term: y* of the least
    squares is 1-Lipschitz in b through X y. The noise of b is Gaussian, of variance s.
    """
    X, b = model.X, model.sample_targets()
    n, generator = X.shape[0], torch.Generator().manual_seed((seed + _APART) % 2**63)  # not that of X
    u = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")
    e = 2 * variance**0.5 / n**0.3
    both = {
        "targets": torch.stack([b, b + e * u]),
        "fits": torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu"),
        "sign": torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu"),
    }

    def risk(_: Any, y: Tensor, part: dict[str, Tensor]) -> Tensor:
        z = torch.nn.functional.linear(X, y)
        fit = part["fits"] * ((z - b).square().sum() - n * variance)
        total: Tensor = fit + part["sign"] * (2 * variance / e) * (z @ u)
        return total / n  # the mean over the two is half of the sum

    inner = LinearModel(X, lambda part: part["targets"])
    return Validated(BilevelProblem(risk, inner, prox=term, tasks=True), both)
