"""Certified adaptive accuracy against fixed tolerances: oracle calls until |h| <= 1e-6, with one outer optimizer.

    python benchmarks/adaptive_accuracy.py [--out DIR]

prints a table and writes it to benchmarks/results/adaptive_accuracy.md. The numbers are counts, the same on every
machine up to rounding. Both sides start each solve where the previous one ended, with L-BFGS and conjugate gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import _threads  # noqa: F401
import torch

from bilevel import AID, AbstractOptimizer, Constants, Instance, Solution, certify, minimize
from bilevel._tree import Tree
from bilevel.problems.hyper_cleaning import hyper_cleaning
from bilevel.problems.logistic import logistic_breast_cancer
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.lbfgs import LBFGS

TOL = 1e-6  # of |h|
FIXED = (1e-8, 1e-10, 1e-12, 1e-13)


@dataclass(frozen=True)
class Case:
    """A problem, the outer optimizer of all runs on it, and the constants that its certificates use."""

    name: str
    instance: Instance
    outer: AbstractOptimizer
    max_steps: int
    constants: Callable[[Tree], Constants]


def cases() -> list[Case]:
    """The two problems."""
    torch.set_default_dtype(torch.float64)
    cancer, cleaning = logistic_breast_cancer(), hyper_cleaning(n_train=50, n_val=200, regularization=0.02)
    of_cancer, of_cleaning = cancer.constants, cleaning.constants
    assert of_cancer is not None and of_cleaning is not None
    # The formula's bound on d2g/dxdy is loose here; with one outer variable bounding it costs two cross products.
    return [
        Case("logistic, breast cancer", cancer, GradientDescent(10.0), 300, lambda x: replace(of_cancer(x), C_G=None)),
        Case("hyper-cleaning, digits, 50 weights", cleaning, HeavyBall(1000.0), 300, of_cleaning),
    ]


def fixed(case: Case, tol: float) -> Solution:
    """Both solvers at one tolerance."""
    aid = AID(LBFGS(tol=tol), CG(rtol=tol))
    return minimize(
        case.instance.problem,
        case.instance.x0,
        case.instance.y0,
        estimator=aid,
        outer=case.outer,
        max_steps=case.max_steps,
        tol=TOL,
        throw=False,
    )


def adaptive(case: Case) -> Solution:
    """Each estimate as accurate as its certificate says that it has to be."""
    return minimize(
        case.instance.problem,
        case.instance.x0,
        case.instance.y0,
        estimator=AID(LBFGS(), CG()),
        outer=case.outer,
        max_steps=case.max_steps,
        tol=TOL,
        accuracy="adaptive",
        constants=case.constants,
        throw=False,
    )


def row(case: Case, name: str, solution: Solution) -> tuple[str, int, float]:
    """A line of the table, the gradients and Hessian products, and the certified |h| at the end."""
    certificate = certify(case.instance.problem, solution.x, solution.estimate, case.constants(solution.x))
    high, stats = certificate.norm_interval[1], solution.stats
    cost = stats.gradients + stats.hvps
    line = (
        f"| {name} | {len(solution.history)} | {solution.status.name} | {certificate.grad_norm:.1e} | {high:.1e} |"
        f" {stats.gradients} | {stats.hvps} | {stats.cross_products} | {cost} |"
    )
    return line, cost, high


def table(case: Case) -> list[str]:
    """Every run on one problem, and the ratio of adaptive accuracy to each fixed tolerance."""
    lines = [
        f"## {case.name} (outer: {case.outer})",
        "",
        "| accuracy | steps | status | final norm of h | certified to be at most | gradients | Hessian products"
        " | cross products | gradients + Hessian products |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    line, least, _ = row(case, "adaptive", adaptive(case))
    lines.append(line)
    ratios = []
    for tol in FIXED:
        line, cost, high = row(case, f"fixed, {tol:g}", fixed(case, tol))
        lines.append(line)
        ratios.append(f"{least / cost:.2f} of that at {tol:g}{'' if high <= TOL else ', which certifies less'}")
    return [*lines, "", f"Adaptive accuracy takes {'; '.join(ratios)}.", ""]


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description="adaptive accuracy against fixed tolerances")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    text = "\n".join(
        [
            "# Certified adaptive accuracy",
            "",
            f"Calls of oracles until |h| <= {TOL:g}. Adaptive runs stop only where that is certified; fixed ones where",
            "their own estimate says so, whatever its error. Made by `python benchmarks/adaptive_accuracy.py`.",
            "",
            *(line for case in cases() for line in table(case)),
        ]
    )
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "adaptive_accuracy.md").write_text(text)


if __name__ == "__main__":
    main()
