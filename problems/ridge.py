"""Ridge regression with learned penalties: one for all features or one for each, in closed form."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._numerics.known_objective import AbstractKnownObjective
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, SEED, SIZE
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.certificates.certificate import Constants
from bilevel.problems._constants import RADIUS, structural
from bilevel.problems._data import Arrays, Dataset, load
from bilevel.problems._plots import draw_penalties
from bilevel.problems.glm.declare import Declared
from bilevel.problems.glm.model import GeneralizedLinearModel


@final
@dataclass(frozen=True, eq=False)
class Ridge:
    """g = |Xy - b|^2 / 2n + sum_j exp(x_j) y_j^2 / 2,  f = |Uy - c|^2 / 2m.

    x is one log-penalty `()` or one for each feature `(q,)`. With H = X'X / n + diag(exp x): y* = H^-1 X'b / n and
    dy*/dx = -H^-1 diag(exp(x) y*).

    C_G holds for |y - y*(x)| <= 1, the others for every y.

    Args:
        X: training inputs `(n, q)`.
        b: training targets `(n,)`.
        U: validation inputs `(m, q)`.
        c: validation targets `(m,)`.
    """

    X: Tensor
    b: Tensor
    U: Tensor
    c: Tensor

    def __post_init__(self) -> None:
        demand_types(self)
        axes = {"X": Shape("n q"), "b": Shape("n"), "U": Shape("m q"), "c": Shape("m")}
        demand_shapes("Ridge", axes, vars(self))

    @fitting
    def f(self, _: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        return half_mean_square(self.U, self.c, y)

    @fitting
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        return half_mean_square(self.X, self.b, y) + (x.exp() * y.square()).sum() / 2

    def known(self) -> AbstractKnownObjective:
        """g with its own derivatives."""
        return Declared(self.g, GeneralizedLinearModel(self.X, self.b, penalty=torch.exp))

    def _hessian(self, x: Tensor) -> Tensor:
        q = self.X.shape[1]
        return self.X.T @ self.X / self.X.shape[0] + torch.diag(x.exp().expand(q))

    @fitting
    def solution(self, x: Tensor) -> Tensor:
        """y*(x)."""
        y: Tensor = torch.linalg.solve(self._hessian(x), self.X.T @ self.b / self.X.shape[0])
        return y

    @fitting
    def gradient(self, x: Tensor) -> Tensor:
        """The hypergradient at x: -exp(x) y* v with H v = U'(Uy* - c) / m; summed for a single penalty."""
        y = self.solution(x)
        v: Tensor = torch.linalg.solve(self._hessian(x), self.U.T @ (self.U @ y - self.c) / self.U.shape[0])
        by_feature = -x.exp() * y * v
        return by_feature.sum() if x.dim() == 0 else by_feature

    @fitting
    def constants(self, x: Tensor) -> Constants:
        """The constants at x."""
        eigenvalues = torch.linalg.eigvalsh(self._hessian(x).double())
        weights, y = x.exp(), self.solution(x)
        bound = weights * (y.norm() + RADIUS) if x.dim() == 0 else (weights * (y.abs() + RADIUS)).max()
        return structural(
            mu=float(eigenvalues[0]),
            L=float(eigenvalues[-1]),
            L_fyy=float(torch.linalg.matrix_norm(self.U, 2)) ** 2 / self.U.shape[0],
            radius=RADIUS,
            M_xy=float(weights.max()),
            C_G=float(bound),
        )

    @fitting
    def instance(self, x0: Tensor, description: str) -> Instance:
        """The problem with everything known about it."""
        return Instance(
            problem=BilevelProblem(self.f, self.known()),
            x0=x0,
            y0=torch.zeros_like(self.X[0]),
            description=description,
            solution=self.solution,
            gradient=self.gradient,
            constants=self.constants,
            settings={"estimator": "aid-cg", "outer_step": 0.1, "max_steps": 150},
        )


def half_mean_square(X: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """|Xy - b|^2 / 2n."""
    return (torch.nn.functional.linear(X, y) - b).square().mean() / 2


@checked(n=SIZE, q=SIZE, noise=AT_LEAST_0, seed=SEED)
def ridge(
    *, n: int = 30, q: int = 5, per_feature: bool = True, noise: float = 0.5, seed: int = 0, double: bool = True
) -> Instance:
    """Ridge regression on random data of which only the first half of the features matters; see :class:`Ridge`.

    Args:
        n: training samples, and as many for validation.
        q: number of features.
        per_feature: one log-penalty for each feature, else one for all.
        noise: standard deviation of the targets' noise.
        seed: of the draw.
        double: float64, else float32.

    Raises:
        ValueError: if a size is less than 1.

    Example:
        >>> ridge(per_feature=False).x0.shape
        torch.Size([])
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    dtype = torch.float64 if double else torch.float32
    truth = normal(q) * (torch.arange(q, device="cpu") < (q + 1) // 2)
    X, U = normal(n, q), normal(n, q)
    family = Ridge(X, X @ truth + noise * normal(n), U, U @ truth + noise * normal(n))
    x0 = torch.full((q,) if per_feature else (), -2.0, dtype=dtype, device="cpu")
    return family.instance(x0, f"ridge regression, {'a penalty for each feature' if per_feature else 'one penalty'}")


@checked(q=SIZE, n=SIZE, seed=SEED)
def ridge_orthonormal(*, q: int = 6, n: int = 20, seed: int = 0) -> Instance:
    """Ridge with X'X / n = I and a validation target that shrinks y, so that x* is known.

    y_j* = z_j / (1 + exp x_j) with z = X'b / n; the validation data ask for y_j = s_j z_j with 0 < s_j < 1, hence
    x_j* = log(1 / s_j - 1) and Phi(x*) = 0.

    Args:
        q: number of features, at most n.
        n: training samples.
        seed: of the draw.

    Raises:
        ValueError: unless 1 <= q <= n.

    Example:
        >>> instance = ridge_orthonormal()
        >>> instance.value(instance.minimizer) < 1e-25
        True
    """
    if not 1 <= q <= n:
        raise ValueError(f"`ridge_orthonormal(q=..., n=...)` needs 1 <= q <= n. Got {q} and {n}.")
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, q, generator=generator, dtype=torch.float64, device="cpu"))[0]
    X = n**0.5 * basis
    z = 1 + torch.rand(q, generator=generator, dtype=torch.float64, device="cpu")
    s = 0.2 + 0.6 * torch.rand(q, generator=generator, dtype=torch.float64, device="cpu")
    instance = Ridge(X, X @ z, X, X @ (s * z)).instance(torch.zeros_like(z), "orthonormal ridge, x* known")
    return replace(instance, minimizer=(1 / s - 1).log())


@checked(seed=SEED)
def ridge_diabetes(*, per_feature: bool = False, data: Arrays | None = None, seed: int = 0) -> Instance:
    """Ridge regression on scikit-learn's diabetes data (442 x 10), or on `data`; see :class:`Ridge`.

    Half of the samples train, a quarter validates, a quarter tests. y* and the hypergradient are exact.

    Args:
        per_feature: one log-penalty for each feature, else one for all.
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
    """
    parts = load(data, "diabetes", sizes=(0.5, 0.25), seed=seed, regression=True)
    family = Ridge(parts.X_train, parts.y_train, parts.X_val, parts.y_val)
    shape = (parts.X_train.shape[1],) if per_feature else ()
    kind = "a log-penalty for each feature" if per_feature else "one log-penalty"
    name = "diabetes" if data is None else "your data"
    instance = family.instance(
        torch.full(shape, -2.0, dtype=torch.float64, device="cpu"), f"ridge regression on {name}, {kind}"
    )
    shown = _Shown(family, parts)
    return replace(instance, metrics=shown.metrics, plot=shown.plot)


@checked(seed=SEED)
def ridge_per_feature_diabetes(*, data: Arrays | None = None, seed: int = 0) -> Instance:
    """:func:`ridge_diabetes` with one log-penalty for each feature.

    Args:
        data: the user's own data; see `bilevel.problems.Arrays`.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is needed and missing.
    """
    return ridge_diabetes(per_feature=True, data=data, seed=seed)


def _baselines(family: Ridge, parts: Dataset) -> dict[str, float]:
    free = torch.linalg.lstsq(family.X, family.b.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    grid = torch.linspace(-10, 4, 57, dtype=family.X.dtype, device=family.X.device)
    best = min(grid, key=lambda x: float(family.f(x, family.solution(x))))
    found = {}
    for name, y in (("unregularized", free), ("grid_search", family.solution(best))):
        found[f"validation_loss_{name}"] = float(half_mean_square(parts.X_val, parts.y_val, y))
        found[f"test_loss_{name}"] = float(half_mean_square(parts.X_test, parts.y_test, y))
    return found


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """Losses at (x, y), of plain least squares, and of the best of one penalty on a grid; targets have variance 1."""

    family: Ridge
    parts: Dataset

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        return _baselines(self.family, self.parts)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        return {
            "validation_loss": float(self.family.f(x, y)),
            "test_loss": float(half_mean_square(self.parts.X_test, self.parts.y_test, y)),
            **self.baselines,
        }

    def plot(self, figure: Any, x: Tensor, y: Tensor) -> None:
        draw_penalties(figure, x, self.metrics(x, y), "mean squared error / 2")
