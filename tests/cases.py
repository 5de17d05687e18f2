"""The tables: every estimator times every analytic problem. A new estimator is one more row of ESTIMATORS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import AID, ESJ, ITD, AbstractEstimator, BilevelProblem, FiniteDifference, Instance, Penalty, ravel
from bilevel._tree import tree_leaves, tree_map
from bilevel.problems.inverse_link import asinh, atanh, cardano, lambert
from bilevel.problems.log_sum_exp import log_sum_exp
from bilevel.problems.minimax import minimax
from bilevel.problems.nested import nested
from bilevel.problems.proximal_tasks import proximal_tasks
from bilevel.problems.quadratic import quadratic
from bilevel.problems.ridge import ridge, ridge_orthonormal
from bilevel.problems.weighted_logit import weighted_logit
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.gmres import GMRES
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.minres import MINRES
from bilevel.solvers.neumann import Neumann


@dataclass(frozen=True)
class Row:
    """An estimator and what is promised of it.

    Attributes:
        name: of the test.
        build: (tolerance for its inner and linear solver, number of outer variables) -> the estimator.
        rtol: its error relative to the closed form on every analytic problem, in float64 at tolerance 1e-11.
        rtol_curved: the same where y*(x) is not affine or f not quadratic; None: the same.
        rtol_single: its error in float32 at tolerance 1e-4 on well-conditioned problems.
        skip: problems that it does not apply to, or takes too long for.
    """

    name: str
    build: Callable[[float, int], AbstractEstimator]
    rtol: float
    rtol_curved: float | None = None
    rtol_single: float = 2e-3
    skip: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def _descent(tol: float) -> Iterate:
    return Iterate(GradientDescent(), max_steps=20_000, tol=0.1 * tol)


ESTIMATORS = (
    Row("aid-cg", lambda tol, _: AID(LBFGS(tol), CG(rtol=tol)), 1e-8),
    Row("aid-cg-damped", lambda tol, _: AID(LBFGS(tol), CG(rtol=tol), damping=1e-13), 1e-8),
    Row("aid-minres", lambda tol, _: AID(LBFGS(tol), MINRES(rtol=tol)), 1e-8),
    Row("aid-gmres", lambda tol, _: AID(LBFGS(tol), GMRES(rtol=tol)), 1e-8),
    Row("aid-dense", lambda tol, _: AID(LBFGS(tol), Dense()), 1e-8),
    Row("aid-neumann", lambda tol, _: AID(LBFGS(tol), Neumann(step=None, terms=100_000, rtol=tol)), 1e-8),
    Row("aid-descent", lambda tol, _: AID(_descent(tol), CG(rtol=tol)), 1e-8, skip=("ill-conditioned",)),
    Row("itd", lambda tol, _: ITD(_descent(tol)), 1e-8, skip=("ill-conditioned",)),
    Row("itd-forward", lambda tol, _: ITD(_descent(tol), forward=True), 1e-8, skip=("ill-conditioned", "log_sum_exp")),
    Row("itd-checkpointed", lambda tol, _: ITD(_descent(tol), checkpoint=True), 1e-8, skip=("ill-conditioned",)),
    Row("itd-truncated", lambda tol, _: ITD(_descent(tol), truncate=19_999), 1e-8, skip=("ill-conditioned",)),
    Row(
        "esj",
        lambda tol, p: ESJ(LBFGS(0.1 * tol), directions=p, radius=1e-5 if tol < 1e-8 else 0.1),
        1e-6,
        rtol_curved=1e-4,
        rtol_single=0.2,
        skip=("ill-conditioned",),
    ),
    Row(
        "penalty",
        lambda tol, _: Penalty(LBFGS(0.1 * tol), weight=1e4 if tol < 1e-8 else 30.0, extrapolate=True),
        1e-5,
        rtol_single=2e-2,
        skip=("ill-conditioned",),
    ),
    Row(
        "finite-difference",
        lambda tol, _: FiniteDifference(LBFGS(tol), step=1e-4 if tol < 1e-8 else 3e-2),
        1e-6,
        rtol_single=2e-2,
        skip=("ill-conditioned",),
    ),
)

PROBLEMS: dict[str, Callable[[], Instance]] = {
    "quadratic": lambda: quadratic(),
    "quadratic-coupled": lambda: quadratic(p=3, q=5, cross=1.0, seed=1),
    "quadratic-scalar": lambda: quadratic(p=1, q=1, kappa=1.0),
    "quadratic-wide": lambda: quadratic(p=7, q=2, kappa=3.0, cross=0.5),
    "ill-conditioned": lambda: quadratic(kappa=1e3),
    "nested": lambda: nested(cross=0.5),
    "minimax": minimax,
    "asinh": asinh,
    "lambert": lambert,
    "cardano": cardano,
    "atanh": atanh,
    "log_sum_exp": log_sum_exp,
    "weighted_logit": weighted_logit,
    "proximal_tasks": proximal_tasks,
    "proximal_tasks-scalar": lambda: proximal_tasks(per_weight=False),
    "ridge": ridge,
    "ridge-orthonormal": ridge_orthonormal,
}
AFFINE = {name for name in PROBLEMS if name.startswith(("quadratic", "ill", "nested", "minimax"))}
TABLE = [(row, name) for row in ESTIMATORS for name in PROBLEMS if name not in row.skip]


def point(instance: Instance, seed: int = 1, spread: float = 0.1) -> Any:
    """An outer point near x0, but at no special place."""
    generator = torch.Generator().manual_seed(seed)

    def move(leaf: Tensor) -> Tensor:
        return leaf + spread * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)

    return tree_map(move, instance.x0)


def flat(tree: Any) -> Tensor:
    """A structure as one vector."""
    return ravel(tree)[0].detach()


def distance(a: Any, b: Any) -> float:
    """|a - b| / |b| for structures, in float64."""
    a, b = flat(a).double(), flat(b).double()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def size(tree: Any) -> int:
    """The number of entries of a structure."""
    return flat(tree).numel()


def single(instance: Instance) -> tuple[BilevelProblem, Any, Any]:
    """The same problem for x and y in float32, and its starts; f and g are evaluated in float64."""

    def cast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, y: function(tree_map(Tensor.double, x), tree_map(Tensor.double, y)).float()

    problem = BilevelProblem(cast(instance.problem.f), cast(instance.problem.g))
    return problem, tree_map(Tensor.float, point(instance)), tree_map(Tensor.float, instance.y0)


def bits(tree: Any) -> bytes:
    """Every bit of a structure of tensors."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return b"".join(leaf.detach().contiguous().numpy().tobytes() for leaf in leaves)
