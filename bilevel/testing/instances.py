"""Every property of a problem at once."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._instance import Instance
from bilevel._tree import ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, SEED
from bilevel.diagnostics.check import check
from bilevel.diagnostics.verdict import Outcome
from bilevel.hypergrad.aid import AID
from bilevel.inner_problems.kinds import inner_objective
from bilevel.solvers.dense import Dense
from bilevel.solvers.newton import Newton
from bilevel.testing.properties import close, estimate


@checked(tol=AT_LEAST_0, samples=COUNT, seed=SEED)
def check_problem(instance: Instance, *, tol: float = 1e-6, samples: int = 20, seed: int = 0) -> None:
    """Assert that f and g are sound at x0, and that what is claimed in closed form is true.

    The verdicts of `bilevel.check` (values, determinism, Taylor remainders, symmetry, curvature); that f and g can be
    evaluated in a batch, and keep the dtype; grad_y g(x, y*(x)) = 0; the gradient against the implicit one; the
    constants against curvatures and norms at points around y*.

    Args:
        instance: the problem, with whatever is known; small enough for a dense Hessian.
        tol: relative, of the closed forms.
        samples: points at which the constants are tried.
        seed: of these points.

    Raises:
        AssertionError: naming the failed property, what was found and what was expected.

    Example:
        >>> from bilevel.problems import catalogue
        >>> check_problem(catalogue()["quadratic"].build(p=2, q=3))
    """
    problem, x0, y0 = instance.problem, instance.x0, instance.y0
    for verdict in check(problem, x0, y0, seed=seed).verdicts:
        if verdict.outcome is Outcome.failed:
            raise AssertionError(f"{verdict.name}: found {verdict.found}. Expected otherwise: {verdict.remedy}.")
    x, y = ravel(x0)[0].detach(), ravel(y0)[0].detach()
    flat = FlatProblem(problem, ravel(x0)[1], ravel(y0)[1])
    _batches(flat, x, y)
    if instance.solution is not None:
        y = ravel(instance.solution(x0))[0].detach()
        left = torch.linalg.vector_norm(inner_objective(flat, x).gradient(y))
        first = torch.linalg.vector_norm(inner_objective(flat, x).gradient(y + 1))
        bound = tol * max(1.0, float(first))
        assert float(left) <= bound, (
            f"solution: found |grad_y g(x, y*)| = {float(left):.3g}, expected at most {bound:.3g}."
        )
    if instance.gradient is not None:
        found = instance.gradient(x0)
        aid = AID(Newton(1e-10 if y.dtype == torch.float64 else 1e-4), Dense())
        close("gradient", found, estimate(aid, problem, x0, y0).grad, tol, " Expected is the implicit gradient.")
    if instance.constants is not None:
        known = instance.solution is not None
        y = y if known else ravel(estimate(AID(Newton(1e-8), Dense()), problem, x0, y0).y)[0]
        _constants(instance, flat, x, y, samples, seed)


def _batches(flat: FlatProblem, x: Tensor, y: Tensor) -> None:
    for name, function in (("f", flat.f), ("g", flat.g)):
        value = function(x, y)
        assert value.dtype == x.dtype, f"dtype: found {name} of {value.dtype}, expected {x.dtype}."
        points = torch.stack([x, x + 0.01]), torch.stack([y, y + 0.01])
        try:
            batch = function(*points)
        except (RuntimeError, ValueError) as error:
            raise AssertionError(
                f"batches: {name} cannot be evaluated by `torch.vmap` ({error}). Expected operations on tensors only."
            ) from error
        close(f"batches of {name}", batch[1], function(points[0][1], points[1][1]), 1e-4)


def _constants(instance: Instance, flat: FlatProblem, x: Tensor, y: Tensor, samples: int, seed: int) -> None:
    assert instance.constants is not None
    known = instance.constants(instance.x0)
    generator = torch.Generator().manual_seed(seed)
    reach = min(1.0, known.radius)

    def at(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        linearization = Exact().linearize(flat, x, y)
        products = [linearization.products(e) for e in torch.eye(len(y), device="cpu").to(y)]
        hessian = torch.stack([hv for hv, _ in products])
        coupling = torch.stack([torch.zeros_like(x) if gv is None else gv for _, gv in products])
        _, fx, fy = outer_gradients(flat, x, y)
        return hessian, coupling, fx, fy

    here = at(y)
    slack = 1 + (1e-6 if y.dtype == torch.float64 else 1e-3)
    for _ in range(samples):
        move = torch.randn(len(y), generator=generator, dtype=torch.float64, device="cpu").to(y)
        share = float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
        move *= reach * share / torch.linalg.vector_norm(move)
        there, distance = at(y + move), float(torch.linalg.vector_norm(move))
        eigenvalues = torch.linalg.eigvalsh((there[0] + there[0].T).double() / 2)
        seen = {
            "L": float(eigenvalues[-1]),
            "C_G": float(torch.linalg.matrix_norm(there[1].double(), 2)),
            "M_yy": float(torch.linalg.matrix_norm((there[0] - here[0]).double(), 2)) / distance,
            "M_xy": float(torch.linalg.matrix_norm((there[1] - here[1]).double(), 2)) / distance,
            "L_fxy": float(torch.linalg.vector_norm(there[2] - here[2])) / distance,
            "L_fyy": float(torch.linalg.vector_norm(there[3] - here[3])) / distance,
        }
        least = float(eigenvalues[0])
        floor = 1e-6 * max(1.0, float(eigenvalues[-1]))
        if known.mu is not None and least < known.mu / slack - floor:
            raise AssertionError(f"constants: found an eigenvalue {least:.6g}, expected at least mu = {known.mu:.6g}.")
        for name, value in seen.items():
            claimed = getattr(known, name)
            if claimed is not None and value > claimed * slack + floor:
                raise AssertionError(f"constants: found {value:.6g}, expected at most {name} = {claimed:.6g}.")
