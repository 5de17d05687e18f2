"""Problems of total work: generalized linear models with penalties or weights to learn, and their exact gradients."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _threads  # noqa: F401
import numpy as np
import torch
from torch import Tensor

from bilevel import BilevelProblem
from bilevel.inner_problems import LogLoss, Squared
from bilevel.problems.glm import GeneralizedLinearModel, Softmax

D = torch.float64


@dataclass(frozen=True)
class Case:
    """min_x f(y*(x)) + rho |x - x0|^2 / 2, f the mean loss on (U, c), y* of the training loss on (X, b), w(x) and a(x).

    Without the term in rho there is no minimizer: penalties of useless features run off to infinity, others to zero.

    Attributes:
        name: what tables call it.
        X: `(n, d)`, dense or CSR; with tasks `(T, n, d)`.
        b: labels 0, ..., C - 1, or numbers; with tasks `(T, n)`.
        U: held-out inputs.
        c: their targets.
        loss: "logistic", "softmax" or "squared".
        outputs: C.
        penalty: None: exp(x_j) for each feature; a number: that, and the weights are sigmoid(x_i) / n.
        x0: where x starts.
        most: evaluations of a run.
    """

    name: str
    X: Tensor = field(repr=False)
    b: Tensor = field(repr=False)
    U: Tensor = field(repr=False)
    c: Tensor = field(repr=False)
    loss: str
    outputs: int
    penalty: float | None
    x0: Tensor = field(repr=False)
    most: int = 400
    rho: float = 1e-5

    @property
    def is_tasks(self) -> bool:
        """Whether there are several training sets."""
        return self.X.dim() == 3

    @property
    def y0(self) -> Tensor:
        """Zero, of one task."""
        d = self.X.shape[-1]
        return torch.zeros((self.outputs, d) if self.loss == "softmax" else (d,), dtype=D)

    @property
    def data(self) -> Any:
        """The data of the tasks."""
        return {"X": self.X, "b": self.b, "U": self.U, "c": self.c} if self.is_tasks else None

    def model(self, held_out: bool = False) -> GeneralizedLinearModel:
        """g, or f, which has neither weights nor penalties to learn."""
        X, b = (self.U, self.c) if held_out else (self.X, self.b)
        loss: Any = {"logistic": LogLoss(), "softmax": Softmax(), "squared": Squared()}[self.loss]
        targets = (2 * b - 1).to(D) if self.loss == "logistic" else b
        if self.is_tasks:
            first, second = ("U", "c") if held_out else ("X", "b")
            a = None if held_out else lambda x, _: x.exp()
            return GeneralizedLinearModel(lambda t: t[first], lambda t: t[second], loss, penalty=a)
        if held_out:
            return GeneralizedLinearModel(X, targets, loss)
        if self.penalty is None:
            return GeneralizedLinearModel(X, targets, loss, penalty=torch.exp)
        return GeneralizedLinearModel(
            X, targets, loss, weights=lambda x: torch.sigmoid(x) / len(x), penalty=self.penalty
        )

    def problem(self, seen: Any, structured: bool = True) -> BilevelProblem:
        """The problem for bilevel; `seen` is called with every x at which f is evaluated for its gradient."""
        held, g = self.model(held_out=True), self.model()

        def f(x: Tensor, y: Tensor, *data: Any) -> Tensor:
            seen(x)
            return held(x, y, *data) + self.rho / 2 * (x - self.x0).square().sum()

        return BilevelProblem(f, g if structured else (lambda x, y, *data: g(x, y, *data)), tasks=self.is_tasks)


def a9a(path: Path | None, quick: bool) -> Case:
    """a9a with a penalty for each of its 123 features: half of the training set trains, the other half validates."""
    rows = 2000 if quick else 32561
    if path is not None and (path / "a9a.npz").exists():
        held = np.load(path / "a9a.npz")
        pointers, columns, labels = held["indptr_train"], held["indices_train"], held["y_train"]
        name = "a9a, 123 penalties"
    else:  # 14 features of 123 are one in every row
        draw = np.random.default_rng(0)
        columns = np.concatenate([np.sort(draw.choice(123, 14, replace=False)) for _ in range(rows)])
        pointers = np.arange(rows + 1) * 14
        truth = draw.normal(size=123)
        scores = truth[columns].reshape(rows, 14).sum(1)
        labels = (scores + 2 * draw.normal(size=rows) > np.quantile(scores, 0.76)).astype(int)
        name = "generated, of the size of a9a, 123 penalties"
    half = rows // 2
    parts = []
    for begin, end in ((0, half), (half, rows)):
        where = slice(int(pointers[begin]), int(pointers[end]))
        parts.append(_csr(pointers[begin : end + 1] - pointers[begin], columns[where], (end - begin, 123)))
    b = torch.from_numpy(np.asarray(labels[:rows])).long()
    return Case(name, parts[0], b[:half], parts[1], b[half:], "logistic", 1, None, torch.full((123,), -6.0, dtype=D))


def _csr(pointers: Any, columns: Any, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            torch.from_numpy(np.asarray(pointers, dtype=np.int32)),
            torch.from_numpy(np.asarray(columns, dtype=np.int32)),
            torch.ones(len(columns), dtype=D),
            shape,
        )


def cleaning(path: Path | None, quick: bool) -> Case:
    """Hyper-cleaning, 40 % of the training labels wrong: MNIST's 10 000 test images, or scikit-learn's digits."""
    if path is not None and (path / "mnist10k.npz").exists() and not quick:
        held = np.load(path / "mnist10k.npz")
        images, labels, train, name = held["images"].reshape(-1, 784) / 255, held["labels"], 5000, "mnist10k"
    else:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images, train, name = images / 16, 200 if quick else 900, "digits"
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=draw)
    X = torch.from_numpy(np.asarray(images, dtype=np.float64))[order]
    X = torch.cat([X, torch.ones(len(X), 1, dtype=D)], 1)
    b = torch.from_numpy(np.asarray(labels)).long()[order]
    wrong = torch.rand(train, generator=draw) < 0.4
    shift = torch.randint(1, 10, (train,), generator=draw)
    noisy = torch.where(wrong, (b[:train] + shift) % 10, b[:train])
    held_out = slice(train, 2 * train)
    c = 1e-2 if quick else 5e-3
    return Case(
        f"hyper-cleaning, {name}, {train} weights",
        X[:train].contiguous(),
        noisy,
        X[held_out].contiguous(),
        b[held_out],
        "softmax",
        10,
        2 * c,
        torch.zeros(train, dtype=D),
    )


def ridge(quick: bool) -> Case:
    """Ridge regression, 5000 samples, 300 features of different scales, a penalty for each."""
    n, d = (300, 20) if quick else (5000, 300)
    draw = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1, d, dtype=D)
    truth = torch.randn(d, generator=draw, dtype=D) * (torch.arange(d) % 2)
    X = torch.randn(2 * n, d, generator=draw, dtype=D) * scales
    b = X @ truth + 4 * torch.randn(2 * n, generator=draw, dtype=D)
    return Case(
        f"ridge, {d} penalties", X[:n], b[:n], X[n:], b[n:], "squared", 1, None, torch.full((d,), -3.0, dtype=D)
    )


def sinusoids(quick: bool) -> Case:
    """Few-shot sinusoids: 100 tasks of 10 shots, ridge regression on 40 shared cosines, a penalty for each."""
    from bilevel.tasks import Sinusoid

    tasks, width = (5, 10) if quick else (100, 40)
    batch = Sinusoid(shots=10, queries=20, noise=0.3, dtype=D).sample(tasks, seed=0)
    draw = torch.Generator().manual_seed(0)
    frequency, phase = torch.randn(width, generator=draw, dtype=D), 6.28 * torch.rand(width, generator=draw, dtype=D)

    def features(x: Tensor) -> Tensor:
        return torch.cos(x * frequency + phase)

    return Case(
        f"few-shot sinusoids, {tasks} tasks, {width} penalties",
        features(batch["support_x"]),
        batch["support_y"].squeeze(-1),
        features(batch["query_x"]),
        batch["query_y"].squeeze(-1),
        "squared",
        1,
        None,
        torch.full((width,), -4.0, dtype=D),
    )
