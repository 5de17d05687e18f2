"""The tests behind `check`, in the order in which they build on each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Exact, cross_operator, grad, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import LinearOperator
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel._result import Solved
from bilevel.diagnostics.taylor import Slope, slope
from bilevel.diagnostics.verdict import Check, Outcome, Verdict
from bilevel.inner_problems.kinds import inner_objective
from bilevel.named.implicit import IMPLICIT, implicit_name
from bilevel.named.reference import reference
from bilevel.named.registry import estimators
from bilevel.named.setting import Setting
from bilevel.solvers.cg import accurate_cg

_REPEATS = 8  # evaluations at one point: a mask of two entries drawn anew agrees by chance once in 4^7 times
_DENSE = 200  # up to so many inner variables the spectrum at the solution is computed, not estimated


def _swapped(function: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor) -> Tensor:
    return function(x, y)


@final
class Checker:
    """The tests, in order; each may use what those before it found."""

    def __init__(
        self, problem: FlatProblem, x: Tensor, y0: Tensor, inner: AbstractInnerSolver | None, seed: int
    ) -> None:
        self.problem, self.x, self.inner = problem, x, inner
        self.constrained = problem.problem.constraints is not None
        self.y0 = problem.start(x, y0).detach()
        self.plain_y0 = y0
        self.generator = torch.Generator().manual_seed(seed)
        self.verdicts: list[Verdict] = []
        self.second_order, self.definite, self.solvable, self.smooth = True, True, True, True
        self.wrong: set[str] = set()  # "values", or which derivatives are not those of the values: "f in y", ...
        self.deterministic, self.detached = True, False
        self.dependence = ""
        self.y = self.y0

    def run(self) -> Check:
        self._values()
        if not self.wrong:
            self._deterministic()
            self._slopes()
        if not self.wrong & {"values", "g in y"}:  # nothing that follows would mean anything
            self._second_derivatives()
            self._inner_solution()
            self._curvature()
            self._dependence()
            self._scales()
            self._against_differences()
        return Check(tuple(self.verdicts), self.dependence, self._applicable())

    def _say(self, name: str, good: bool | None, found: str, remedy: str = "") -> None:
        outcome = {True: Outcome.passed, None: Outcome.warning, False: Outcome.failed}[good]
        self.verdicts.append(Verdict(name, outcome, found, "" if good else remedy))

    def _random(self, like: Tensor) -> Tensor:
        d = torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)
        unit: Tensor = d / torch.linalg.vector_norm(d)
        return unit

    def _f(self, x: Tensor, y: Tensor) -> Tensor:
        return self.problem.f(x, y)

    def _g(self, x: Tensor, y: Tensor) -> Tensor:
        return self.problem.g(x, y).sum()

    def _values(self) -> None:
        values = []
        for name, function in (("f", self._f), ("g", self._g)):
            try:
                values.append(function(self.x, self.y0))
            except Exception as error:  # whatever the user's functions raise is the verdict
                self.wrong.add("values")
                text = f"{name} raised {type(error).__name__}: {error}"
                self._say("values", False, text, f"make {name} run at (x, y0)")
                return
        f, g = values
        finite = bool(f.isfinite()) and bool(g.isfinite())
        same = f.dtype == g.dtype == self.x.dtype
        self._say(
            "values",
            finite and (True if same else None),
            f"f = {float(f):.4g}, g = {float(g):.4g} at (x, y0), in {self.x.dtype}".replace("torch.", "")
            + ("" if same else f", but f is {f.dtype} and g {g.dtype}"),
            "start where f and g are finite" if not finite else "keep one dtype throughout",
        )
        if not finite:
            self.wrong.add("values")

    def _deterministic(self) -> None:
        for name, function in (("f", self._f), ("g", self._g)):
            with torch.no_grad():
                y = self.y0 + 0.1 * (1 + torch.linalg.vector_norm(self.y0)) * self._random(
                    self.y0
                )  # off special points
                values = [function(self.x, y) for _ in range(_REPEATS)]
            once, twice = values[0], next((v for v in values if not torch.equal(v, values[0])), values[0])
            if once is not twice:
                self.deterministic = False
                self._say(
                    "same value twice",
                    False,
                    f"{name} gave {float(once):.6g} and then {float(twice):.6g} at the same point",
                    "fix the random numbers: `bilevel.functional(module)` keeps one dropout mask; draw mini-batches by"
                    " `data=`",
                )
                return
        self._say("same value twice", True, "f and g are deterministic")

    def _slopes(self) -> None:
        base = self.y0 + 0.1 * (1 + torch.linalg.vector_norm(self.y0)) * self._random(self.y0)  # off special points
        x = self.x + 0.01 * (1 + torch.linalg.vector_norm(self.x)) * self._random(self.x)
        found: list[tuple[str, Slope]] = []
        for name, function in (("f", self._f), ("g", self._g)):
            found.append((f"{name} in x", self._slope(partial(_swapped, function, base), x)))
            found.append((f"{name} in y", self._slope(partial(function, x), base)))
        wrong = {name: s for name, s in found if s.wrong and self.deterministic}
        self.wrong |= wrong.keys()
        # Of g in x only what changes grad_y g matters: a difference of Phi will tell.
        self.smooth = not [name for name, s in found if not s.smooth and not (name == "g in x" and s.wrong)]
        serious = [name for name in wrong if name != "g in x"]
        if serious:
            claims = [f"{name}: {wrong[name].claimed:.4g} against {wrong[name].measured:.4g}" for name in serious]
            self._say(
                "differentiable",
                False,
                f"the derivative by autograd is not that by differences along a random direction ({'; '.join(claims)})",
                f"write {' and '.join(sorted({name[0] for name in serious}))} in torch operations on x and y"
                " themselves: `.detach()`, `.item()`, `.data`, `torch.tensor(y)`, numpy and `torch.no_grad()` cut the"
                " derivative off, and a custom backward may be wrong",
            )
            return
        bad = [f"{name} ({s})" for name, s in found if not s.smooth]
        self._say(
            "differentiable",
            True if not bad else None,
            "Taylor remainders of f and g vanish like t^2" if not bad else f"not smooth here: {', '.join(bad)}",
            "kinks (ReLU, abs, max) are tolerable away from the solution; check .detach(), rounding, in-place"
            " operations, and custom derivatives otherwise",
        )

    def _slope(self, function: Callable[[Tensor], Tensor], at: Tensor) -> Slope:
        leaf = at.detach().requires_grad_()
        with torch.enable_grad():
            value = function(leaf)
            gradient = grad(value, leaf) if value.requires_grad else torch.zeros_like(leaf)
        d = self._random(at)
        predicted = float((gradient * d).sum())
        with torch.no_grad():
            return slope(
                lambda t: float(function(at + t * d)), predicted, float(torch.linalg.vector_norm(at)), at.dtype
            )

    def _second_derivatives(self) -> None:
        u, v = self._random(self.y0), self._random(self.y0)
        try:
            # Two linearizations, so that masks drawn anew between them show.
            hu = Exact().linearize(self.problem, self.x, self.y0).operator.mv(u)
            at = Exact().linearize(self.problem, self.x, self.y0)
            hv = at.operator.mv(v)
            at.products(v)
        except NotImplementedError as error:
            self.second_order = False
            self._say("second derivatives", None, str(error).split(". ")[0], str(error).split(". ", 1)[-1])
            return
        a, b = float((u * hv).sum()), float((v * hu).sum())
        size = float(torch.linalg.vector_norm(hu) + torch.linalg.vector_norm(hv))
        symmetric = abs(a - b) <= 100 * torch.finfo(u.dtype).eps ** 0.75 * max(size, 1e-30)
        self._say(
            "second derivatives",
            symmetric,
            f"<u, Hv> = {a:.6g}, <v, Hu> = {b:.6g}",
            "the Hessian is not symmetric: g changes between calls, or a part of its gradient is detached",
        )

    def _inner_solution(self) -> None:
        setting = Setting(self.problem, self.x, self.plain_y0)
        try:
            solver = self.inner if self.inner is not None else setting.inner()
            first = inner_objective(self.problem, self.x).gradient(self.y0)
            solved: Solved = solver.solve(inner_objective(self.problem, self.x), self.y0)
        except NotImplementedError:
            self._say("inner solution", None, "not tried: it needs a second derivative that torch does not have")
            return
        self.y = solved.value
        before, after = float(torch.linalg.vector_norm(first)), float(solved.residual.max())
        self.solvable = solved.status.ok and bool(solved.value.isfinite().all())
        self._say(
            "inner solution",
            self.solvable,
            f"|grad_y g| from {before:.3g} to {after:.3g} in {solved.steps} steps"
            if not self.constrained
            else f"optimality violated by {after:.3g} after {solved.steps} steps; {solved.at_bounds} bounds hold",
            solved.status.value,
        )
        if not self.y.isfinite().all():
            self.y = self.y0

    def _curvature(self) -> None:
        if not self.second_order:
            return
        hessian = Exact().linearize(self.problem, self.x, self.y).operator
        most = float(largest_eigenvalue(hessian, self.y).max())
        if hessian.size <= _DENSE:
            matrix = hessian.dense(self.y)
            eigenvalues = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
            least, most = float(eigenvalues[..., 0].min()), float(eigenvalues[..., -1].max())
        else:
            top = max(most, 1e-30)
            shifted = LinearOperator(lambda v: top * v - hessian.mv(v), hessian.size)
            # A Ritz value is at most lambda_max of the shifted operator: `least` may be too large, never too small.
            least = top - float(largest_eigenvalue(shifted, self.y, overshoot=0.01).max()) * 0.99
        eps = torch.finfo(self.y.dtype).eps * hessian.size
        self.definite = least > eps * abs(most)
        kappa = most / least if least > 0 else float("inf")
        if not self.definite:
            kind = "negative" if least < -eps * abs(most) else "no"
            self._say(
                "curvature",
                False,
                f"{kind} curvature at the inner solution: eigenvalues from {least:.3g} to {most:.3g}",
                "y*(x) is not a strict minimum: add a regularizer in y to g, or use 'aid-minres', ITD or ESJ knowingly",
            )
            return
        steps = int(kappa**0.5 * 5) + 1
        self._say(
            "curvature",
            True if kappa < 1e6 else None,
            f"positive definite, condition number {kappa:.3g}; conjugate gradients need about"
            f" {min(steps, hessian.size)} steps",
            "ill conditioned: rescale y, strengthen the regularizer, or give CG a preconditioner",
        )

    def _dependence(self) -> None:
        through_g = False
        if self.problem.problem.iterative:  # y is what the steps make of the start, whatever g looks like
            pass
        elif self.second_order:
            operator, like = cross_operator(self.problem, self.x, self.y)
            through_g = float(torch.linalg.vector_norm(operator.mv(self._random(like)))) > 0
        else:
            through_g = self._moves(lambda x: inner_objective(self.problem, x).gradient(self.y))
        through_g = through_g or (self.constrained and self._moves(self._constraints))
        through_start = False
        if self.problem.problem.init is not None:
            through_start = self._moves(lambda x: self.problem.start(x, self.plain_y0).detach())
        names = {(True, True): "both", (True, False): "inner objective", (False, True): "start"}
        self.dependence = names.get((through_g, through_start), "none")
        if self.dependence == "none":
            self.detached = self._moves(lambda x: inner_objective(self.problem, x).gradient(self.y))
            self._say(
                "y depends on x",
                False,
                "grad_y g changes with x, but its derivative in x is zero to autograd"
                if self.detached
                else "not at all: grad_y g does not change with x, and there is no start `init(x)`",
                "use x itself inside g(x, y); a detached or copied x does not count",
            )
        else:
            way = {
                "inner objective": "through g",
                "start": "through its start only: implicit estimators do not see that",
                "both": "through g and through its start, which matters only as far as the inner problem is unsolved",
            }[self.dependence]
            self._say("y depends on x", True if self.dependence != "start" else None, way, "use ITD or ESJ")
        if self.dependence == "start":  # y is what the steps make of it: nobody asks g for a strict minimum
            self.verdicts = [
                replace(verdict, outcome=Outcome.warning, remedy="of no account to estimators that differentiate steps")
                if verdict.name in ("inner solution", "curvature") and verdict.outcome is Outcome.failed
                else verdict
                for verdict in self.verdicts
            ]

    def _constraints(self, x: Tensor) -> Tensor:
        polytope = inner_objective(self.problem, x).constraints
        assert polytope is not None
        return torch.cat([part.detach().reshape(-1) for part in polytope.tensors()])

    def _moves(self, function: Callable[[Tensor], Tensor]) -> bool:
        step = 1e-2 * (1 + torch.linalg.vector_norm(self.x))
        return not torch.equal(function(self.x), function(self.x + step * self._random(self.x)))

    def _scales(self) -> None:
        found = []
        for name, vector in (("x", self.x), ("y*", self.y)):
            sizes = vector.abs()[vector != 0]
            if sizes.numel() and float(sizes.max() / sizes.min()) > 1e8:
                found.append(f"entries of {name} range from {float(sizes.min()):.1g} to {float(sizes.max()):.1g}")
        self._say(
            "scales",
            None if found else True,
            "; ".join(found) or "x and y* are evenly scaled",
            "optimize logarithms of quantities that differ by orders of magnitude",
        )

    def _against_differences(self) -> None:
        sound = self.second_order and self.definite and self.solvable and self.smooth
        if not sound or self.dependence != "inner objective":
            return
        solver = self.inner if self.inner is not None else Setting(self.problem, self.x, self.plain_y0).inner()
        if self.constrained:
            h = reference(Setting(self.problem, self.x, self.plain_y0))[0].grad
        else:
            at = Exact().linearize(self.problem, self.x, self.y)
            _, fx, fy = outer_gradients(self.problem, self.x, self.y)
            cross = at.cross(accurate_cg(self.y).solve(at.operator, fy).value)
            h = fx if cross is None else fx - cross
        d = self._random(self.x)
        t = torch.finfo(self.x.dtype).eps ** 0.25 * max(1.0, float(torch.linalg.vector_norm(self.x)))
        ends = []
        for sign in (1.0, -1.0):
            x = self.x + sign * t * d
            y = solver.solve(inner_objective(self.problem, x), self.y).value
            ends.append(float(self.problem.f(x, y)))
        slope, predicted = (ends[0] - ends[1]) / (2 * t), float(h @ d)
        size = max(abs(predicted), float(torch.linalg.vector_norm(h)) * self.x.numel() ** -0.5, 1e-12)
        off = abs(slope - predicted) / size
        self._say(
            "hypergradient",
            True if off < 1e-2 else (None if off < 0.1 else False),
            f"<h, d> = {predicted:.5g}, difference of Phi = {slope:.5g} along a random direction",
            "Phi is not smooth here, or the inner problem is not solved accurately enough",
        )

    def _applicable(self) -> dict[str, str]:
        return {name: self._why_not(name) for name in estimators()}

    def _why_not(self, name: str) -> str:
        """Why the estimator of that name does not apply; empty if it does."""
        name = implicit_name(self.problem) if name == IMPLICIT else name
        implicit, unrolled = name.startswith(("aid", "kkt")), name.startswith(("itd", "one-step"))
        by_values = name == "finite-difference"
        if "values" in self.wrong:
            return "f and g must run, and be finite, at (x, y0) first"
        if "g in y" in self.wrong:
            return "the derivative of g in y is not that of its values: no inner solver finds y*"
        if self.wrong & {"f in x", "f in y"} and not by_values:
            return "the derivative of f is not that of its values"
        if self.detached and not by_values and name != "esj":
            return "the derivative of grad_y g in x is zero to autograd: x is detached in g"
        if self.constrained and (implicit or unrolled or name == "penalty") and name != "kkt":
            return "y is constrained: grad_y g need not be zero at y*; use 'kkt'"
        if not self.second_order and (implicit or unrolled):
            return "an operation of g has no second derivative"
        if self.dependence == "start" and (implicit or name == "penalty"):
            return "y depends on x only through its start"
        if not self.definite and name in ("aid-cg", "aid-neumann", "aid-dense", "aid-nystrom", "kkt"):
            return "the inner Hessian is not positive definite at the solution"
        if self.dependence == "none" and not self.detached:
            return "y does not depend on x: Phi(x) = f(x, y*) needs no estimator"
        return ""
