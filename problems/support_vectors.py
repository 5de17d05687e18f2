"""Support vector machines with a learned cost, and regression with a learned cost and tube, by their duals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel._sets import Box as Range
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SEED
from bilevel.inner_problems.linear_model import LinearModel, LogLoss
from bilevel.problems._criteria import Validation, fold_weights
from bilevel.problems._data import Arrays, load
from bilevel.problems._plots import COLORS, draw_bars
from bilevel.problems._sparse import fitted, signs
from bilevel.prox.bounded_l1 import BoundedL1
from bilevel.prox.box import Box
from bilevel.prox.term import AbstractProxTerm

_RANGE = (-12.0, 6.0)  # of logarithms


def cost_term(x: Tensor, *fold: Any) -> Box:
    """0 <= y <= exp(x), or y = 0 of the samples that a fold leaves out."""
    return Box(0.0, x.exp() * fold[0]["train"].sign() if fold else x.exp())


def tube_term(x: Tensor, *fold: Any) -> BoundedL1:
    """exp(x_1) |y|_1 where |y| <= exp(x_0), or y = 0 of the samples that a fold leaves out."""
    return BoundedL1(x[1].exp(), x[0].exp() * fold[0]["train"].sign() if fold else x[0].exp())


@checked(seed=SEED)
def svm(*, criterion: Validation = "held-out", folds: int = 5, data: Arrays | None = None, seed: int = 0) -> Instance:
    """The linear support vector machine on scikit-learn's breast cancer data, or on `data`; its cost exp(x) is learned.

    Inner problem, the dual of |w|^2 / 2 + C sum_i max(1 - t_i z_i'w, 0): the minimum over 0 <= y <= C of

        |sum_i y_i t_i z_i|^2 / 2 - sum_i y_i,    w = sum_i y_i t_i z_i,

    with an input that is always 1 for an intercept, which is penalized with the rest, so that there is no equality
    constraint. The outer objective is the logistic loss of w on validation data, or the mean of that on what each of
    several folds of the training samples leaves out. Where y* is determined by its free
    entries alone, at most as many as there are inputs, Phi is differentiable.

    Source: Klatzer, Pock, "Continuous hyper-parameter learning for support vector machines", CVWW 2015; Bertrand et
    al., JMLR 23 (2022), section 2.

    Args:
        criterion: what is minimized over x.
        folds: of the cross-validation.
        data: the user's own data, two classes; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
        ValueError: if there are more than two classes.
    """
    parts = load(data, "breast_cancer", sizes=(0.5, 0.25), seed=seed)
    t = signs(parts.y_train, parts.classes)
    Z = (parts.X_train * t.unsqueeze(1)).mT  # a column for each sample, as for each y_i
    train = LinearModel(Z, Z.new_zeros(Z.shape[0]), weights=Z.new_ones(Z.shape[0]), linear=-torch.ones_like(t))
    held, test = (
        LinearModel(X @ Z, signs(y, parts.classes), LogLoss())
        for X, y in ((parts.X_val, parts.y_val), (parts.X_test, parts.y_test))
    )
    return _instance(
        "svm",
        _Machine(train, held, test, LinearModel(parts.X_train @ Z, t, LogLoss())),
        cost_term,
        torch.tensor(-4.0, dtype=Z.dtype, device="cpu"),
        f"linear support vector machine on {'breast cancer' if data is None else 'your data'}, {criterion}",
        folds if criterion == "cross-validation" else None,
    )


@checked(seed=SEED)
def svr(*, criterion: Validation = "held-out", folds: int = 5, data: Arrays | None = None, seed: int = 0) -> Instance:
    """Linear support vector regression on scikit-learn's diabetes data, or on `data`; cost and tube are learned.

    Inner problem, the dual of |w|^2 / 2 + C sum_i max(|z_i'w - b_i| - e, 0): the minimum over |y| <= C of

        |sum_i y_i z_i|^2 / 2 - b'y + e |y|_1,    w = sum_i y_i z_i,

    with C = exp(x_0), e = exp(x_1), and an input that is always 1. The outer objective is the squared error of w on
    validation data, or the mean of that on what each of several folds of the training samples leaves out.

    Source: Smola, Schoelkopf, "A tutorial on support vector regression", Statistics and Computing 14 (2004).

    Args:
        criterion: what is minimized over x.
        folds: of the cross-validation.
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
    """
    parts = load(data, "diabetes", sizes=(0.5, 0.25), seed=seed, regression=True)
    Z = parts.X_train.mT
    train = LinearModel(Z, Z.new_zeros(Z.shape[0]), weights=Z.new_ones(Z.shape[0]), linear=-parts.y_train)
    held, test = (LinearModel(X @ Z, y) for X, y in ((parts.X_val, parts.y_val), (parts.X_test, parts.y_test)))
    return _instance(
        "svr",
        _Machine(train, held, test, LinearModel(parts.X_train @ Z, parts.y_train)),
        tube_term,
        torch.tensor([-4.0, -1.0], dtype=Z.dtype, device="cpu"),
        f"linear support vector regression on {'diabetes' if data is None else 'your data'}, {criterion}",
        folds if criterion == "cross-validation" else None,
    )


@final
@dataclass(frozen=True, eq=False)
class _Machine:
    """The dual objective, and losses of its y on validation data, on test data, and on the training samples."""

    train: LinearModel
    held: LinearModel
    test: LinearModel
    own: LinearModel


def _instance(
    call: str,
    machine: _Machine,
    term: Callable[..., AbstractProxTerm],
    x0: Tensor,
    name: str,
    folds: int | None,
) -> Instance:
    """By held-out loss, or by that of the samples that folds leave out, whose y are zero: they train nothing."""
    shown, y0 = _ShownMachine(machine.held, machine.test), torch.zeros_like(machine.own.sample_targets())
    settings: dict[str, Any] = {"constraint": Range(*_RANGE), "max_steps": 12}
    if folds is None:
        problem = BilevelProblem(machine.held, machine.train, prox=term)
        return Instance(
            problem=problem,
            x0=x0,
            y0=y0,
            description=name,
            metrics=shown.metrics,
            plot=shown.plot,
            settings=settings,
        )
    own = machine.own
    left_out = LinearModel(own.X, own.targets, own.loss, lambda fold: fold["held"])
    data = fold_weights(call, len(y0), folds)

    def refitted(x: Tensor) -> Tensor:
        return fitted(machine.train, term(x), y0)

    return Instance(
        problem=BilevelProblem(left_out, machine.train, prox=term, tasks=True),
        x0=x0,
        y0=y0,
        description=name,
        metrics=lambda x, _: shown.metrics(x, refitted(x)),
        plot=lambda figure, x, _: shown.plot(figure, x, refitted(x)),
        settings=settings | {"data": data},
    )


@final
@dataclass(frozen=True, eq=False)
class _ShownMachine:
    """Losses at y, and how many samples support it: inside, and at the cost."""

    held: LinearModel
    test: LinearModel

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        cost = x.reshape(-1)[0].exp()
        found = {
            "validation_loss": float(self.held(None, y)),
            "test_loss": float(self.test(None, y)),
            "cost": float(cost),
            "support_vectors": float((y != 0).sum()),
            "at_the_cost": float((y.abs() >= cost * (1 - 1e-9)).sum()),
        }
        if isinstance(self.test.loss, LogLoss):
            correct = (self.test.X @ y * self.test.sample_targets() > 0).double().mean()
            return found | {"test_accuracy": float(correct)}
        return found | {"tube": float(x.reshape(-1)[1].exp())}

    def plot(self, figure: Any, x: Tensor, y: Tensor) -> None:
        left, right = figure.subplots(1, 2)
        draw_bars(left, {k: v for k, v in self.metrics(x, y).items() if "loss" in k or "accuracy" in k}, "", 2)
        right.hist(y.tolist(), 40, color=COLORS[0])
        right.set_yscale("log")
        right.set_xlabel("dual variables y")
        right.set_ylabel("training samples")
        figure.tight_layout()
