"""What the builder of a named estimator is given: the problem where it is first met, and the parts that fit it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._estimate import AbstractEstimator, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._linear import AbstractLinearSolver
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Status, Tally
from bilevel.arguments.fits import demand_types
from bilevel.inner_problems.kinds import inner_objective, inner_problem
from bilevel.requirements.properties import DoesNotApply, Feature, Property, implied

# Of an unrolled iteration: at condition numbers beyond about 300 it ends before 1e-7, which is reported, and a name
# does not take minutes.
MOST_STEPS = 5000

# How a part of an estimate may end whose error is then compared with those at other weights.
_TOLD = frozenset({Status.successful, Status.biased, Status.imprecise, Status.stagnated})
_RUNG, _RUNGS = 16.0, 5  # of the weights that are tried: by which factor, and how many beside the first


@final
class BudgetError(ValueError):
    """A budget in which an estimator cannot take one step."""


_BENIGN = 100.0  # condition numbers up to which what a tolerance leaves of y is alike at both ends of a difference
_FLOOR = 16.0  # rounding units of L |y|: what gradients are brought down to at most
_NEWTON = 20  # steps, each of which doubles the digits; rounding ends them sooner

_LONGER = 1e-2  # of the size of x: a move over which a smooth gradient still changes about as it does nearby
_JUMPS = 100.0  # times that: not smooth


@final
@dataclass(frozen=True, eq=False)
class Setting:
    """What a name's builder is given: from it come solvers that are accurate, or that spend a budget.

    Without a budget, `inner`, `unrolled` and `linear` are accurate for the dtype and for the problem. With one they
    take a fixed number of steps: the budget over what a step costs, which the estimator knows and says as
    `per_step`, the gradients of g and the products with its second derivatives that one inner step brings with it.

    Args:
        problem: the problem.
        x: where it is first met.
        y0: where the inner solvers start.
        budget: how many gradients and products of g to spend; None: as many as accuracy takes.
        name: the name whose estimator is built, for messages.
        others: the problem on other batches of the data, where it is met on batches.
        corners: how far x may go, where it is bounded.

    Attributes:
        asked: every `per_step` that was asked for. Where there is none, the builder did not heed the budget.

    Example:
        >>> from bilevel import AID, BilevelProblem
        >>> from bilevel._tree import ravel
        >>> x, structure = ravel(torch.ones(2), "x")
        >>> problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
        >>> flat = FlatProblem(problem, structure, structure, None)
        >>> Setting(flat, x, x, budget=100).inner(per_step=2)
        LBFGS(tol=0.0, max_steps=50, memory=10)
    """

    problem: FlatProblem
    x: Tensor
    y0: Tensor
    budget: int | None = None
    name: str = "the estimator"
    others: tuple[FlatProblem, ...] = ()
    corners: tuple[Tensor, ...] = ()
    asked: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def double(self) -> bool:
        """Whether the computation is in float64."""
        return self.y0.dtype == torch.float64

    @property
    def rounding(self) -> float:
        """The rounding unit of the computation."""
        return float(torch.finfo(self.y0.dtype).eps)

    @property
    def features(self) -> frozenset[Feature]:
        """What inner solvers must heed."""
        return inner_problem(self.problem.problem).features

    @property
    def _is_separable(self) -> bool:
        """Whether coordinate descent can read the inner problem."""
        return inner_objective(self.problem.with_tally(Tally()), self.x).separable is not None

    @property
    def is_sparse(self) -> bool:
        """Whether the constraints on y are rows of a sparse matrix."""
        constraints = inner_objective(self.problem.with_tally(Tally()), self.x).nonlinear
        return constraints is not None and constraints.sparse is not None

    @property
    def _is_of_image(self) -> bool:
        """Whether the term of the inner problem is one that splitting solvers take apart."""
        return inner_objective(self.problem.with_tally(Tally()), self.x).image is not None

    def steps(self, per_step: int) -> int | None:
        """How many steps the budget is enough for, at so many gradients and products a step; None without a budget.

        Raises:
            BudgetError: if it is not enough for one.
        """
        self.asked.append(per_step)
        if self.budget is None:
            return None
        if self.budget < per_step:
            raise BudgetError(f"a budget of {self.budget} oracle calls is too small for {self.name!r}.")
        return self.budget // per_step

    def accuracy(self, double: float, single: float) -> float:
        """A relative tolerance by dtype; 0 with a budget, where steps decide."""
        if self.budget is not None:
            return 0.0
        return double if self.double else single

    def inner(self, per_step: int = 1, over: float = 1.0, reads: bool = True) -> AbstractInnerSolver:
        """For estimators that take any inner solver: L-BFGS, or one that heeds what the inner problem has beyond a g.

        That is coordinate descent for a linear model with a separable term, and `ADMM` for one of a linear image.

        One for constraints takes its own steps, some tens of systems in y, whatever the budget.

        A residual r leaves |y - y*| <= r / mu. Where the condition number of H, as seen by some 14 products with it at
        the start, is so large that the tolerance of :meth:`inner_tol` leaves more than 1e-4 of |y| (float32: 5e-3),
        y is solved for to less, by `Newton` where L-BFGS does not get there, and as far as rounding lets it.

        Args:
            per_step: how many gradients and products of g an inner step brings with it.
            over: of estimators that take differences of y, their length: its error is divided by that.
            reads: whether it may read what g and the term are made of; not where it is to minimize g and more.
        """
        from bilevel.named.solved_on import SolvedOn
        from bilevel.solvers.admm import ADMM
        from bilevel.solvers.clarabel import Clarabel
        from bilevel.solvers.coordinate_descent import CoordinateDescent
        from bilevel.solvers.interior_point import InteriorPoint
        from bilevel.solvers.lbfgs import LBFGS
        from bilevel.solvers.newton import Newton
        from bilevel.solvers.proximal_multipliers import ProximalMultipliers
        from bilevel.solvers.quadratic_program import QuadraticProgram
        from bilevel.solvers.sparse_interior_point import SparseInteriorPoint

        steps = self.steps(per_step)
        if Feature.cones in self.features:
            return Clarabel()
        if Feature.many_constraints in self.features:
            return SparseInteriorPoint() if self.is_sparse else ProximalMultipliers()
        if Feature.nonlinear_constraints in self.features:
            return InteriorPoint()
        if Feature.constraints in self.features:
            return QuadraticProgram()
        if Feature.fixed_point in self.features:
            return self._fixed_point(steps)
        if steps is None and reads and self._is_separable:
            return CoordinateDescent(self.inner_tol())
        if steps is None and reads and self._is_of_image:
            return ADMM(max_steps=10 * MOST_STEPS, tol=self.inner_tol())
        if self.features:
            return self._stepwise(steps, 0)
        if steps is not None:
            return LBFGS(tol=0.0, max_steps=steps)
        # 1000: accurate L-BFGS takes tens to hundreds of steps; what needs more is ill-posed, and is reported.
        tol = self.inner_tol()
        aim = max(tol * self._conditioned(over), math.ulp(0.0))
        solver = LBFGS(tol=aim, max_steps=1000)
        return solver if aim == tol else SolvedOn(solver, Newton(tol=aim, max_steps=_NEWTON), tol)

    def unrolled(self, per_step: int = 1, min_steps: int = 0) -> AbstractInnerSolver:
        """For estimators that differentiate the iteration: gradient descent until y is as accurate as they need it.

        At least `min_steps`, where there is no budget.
        """
        from bilevel.solvers.gradient_descent import GradientDescent
        from bilevel.solvers.iterate import Iterate

        steps = self.steps(per_step)
        if Feature.cones in self.features:  # the estimator is refused, and says why
            return Iterate(GradientDescent(), max_steps=1)
        if self.features & {Feature.prox, Feature.own_steps}:
            return self._stepwise(steps, min_steps)
        if Feature.fixed_point in self.features:
            from bilevel.solvers.fixed_point_iteration import FixedPointIteration

            if steps is not None:
                return FixedPointIteration(steps, tol=None)
            return FixedPointIteration(MOST_STEPS, math.ulp(0.0), self._residual(), min_steps=min_steps)
        if steps is not None:
            return Iterate(GradientDescent(), max_steps=steps)
        if self.problem.problem.init is not None:
            # The number of steps is part of the problem, adaptation and not convergence: ten, as many as few-shot
            # learning takes at most.
            return Iterate(GradientDescent(), max_steps=10)
        # As accurate as `derivative_steps` makes the derivative. Where y0 is far, gradients there are no scale for y*.
        tol = self.inner_tol()
        near = max(self._gradients(self._solution, self.problem.with_tally(Tally()))[:2])
        tol = min(tol, self._rounded(near)) * (1e2 if self.double else 10)
        return Iterate(GradientDescent(), max_steps=MOST_STEPS, tol=tol, min_steps=min_steps)

    def _stepwise(self, steps: int | None, min_steps: int) -> AbstractInnerSolver:
        """For a non-smooth term and for steps of the problem's own: differentiable steps that heed them."""
        from bilevel.solvers.fista import FISTA
        from bilevel.solvers.own_steps import OwnSteps

        if Feature.own_steps in self.features:
            return OwnSteps()
        if steps is not None:
            return FISTA(max_steps=steps, tol=None)
        # Ten times as many as of gradient descent: where columns are correlated, the support is settled late.
        return FISTA(max_steps=10 * MOST_STEPS, tol=self.inner_tol(), min_steps=min_steps)

    def _fixed_point(self, steps: int | None) -> AbstractInnerSolver:
        """For the fixed point of a map, contracting or not; what is asked of y is relative to y."""
        from bilevel.solvers.anderson import Anderson

        if steps is not None:
            return Anderson(tol=0.0, max_steps=steps)
        return Anderson(tol=math.ulp(0.0), rtol=self._residual(), memory=20)

    def _residual(self) -> float:
        """What |y - T(x, y)| may be at most, relative to |y|: two digits above what rounding leaves of it, or so."""
        return 1e-12 if self.double else 1e-5

    def linear(self, per_step: int = 2) -> AbstractLinearSolver:
        """For implicit estimators: conjugate gradients; a budget is by default half inner steps, half linear ones."""
        from bilevel.solvers.cg import CG

        return CG(rtol=self.accuracy(1e-9, 1e-4), max_steps=self.steps(per_step))

    def inner_tol(self) -> float:
        """A gradient norm that counts as zero: relative to the gradient at y0, or to L |y0| if that is larger.

        A warm start makes the first gradient of later solves small, so that this is fixed where the problem is
        first met. It is 1e-9 of the scale in float64 and 1e-4 of it in float32. Where y0 = 0 happens to be the
        solution, the scale is what the gradient becomes as x moves.
        """
        if self.features & {Feature.own_steps, Feature.fixed_point}:  # no gradient is made zero, there may be none
            return torch.finfo(self.y0.dtype).tiny
        quiet = self.problem.with_tally(Tally())
        y = self.problem.start(self.x, self.y0).detach()
        scale, response, root = self._gradients(y, quiet, self._ends[0] if bool((y != 0).any()) else None)
        return self._rounded(response if scale <= root * response else scale)

    def _conditioned(self, over: float) -> float:
        """By how much less than its tolerance y is to be solved for: 1 where that is good enough, or none would be."""
        usual, wanted = (1e-9, 1e-4) if self.double else (1e-4, 5e-3)
        kappa = self._condition
        if over * wanted >= usual * kappa / 2 or (over < 1 and kappa <= _BENIGN) or not kappa < 0.1 / self.rounding:
            return 1.0
        return min(max(over * wanted / kappa, _FLOOR * self.rounding) / usual, 1.0)

    @cached_property
    def _condition(self) -> float:
        """The condition number of H at the start, as some 14 products see it; Inf where H is not positive definite."""
        top, least = self._ends
        found = float(torch.where(least > 0, top.double() / least.double(), math.inf).max())
        return found if found >= 1 else math.inf

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """The largest and the least curvature of g in y at the start, by some 14 products."""
        quiet = self.problem.with_tally(Tally())
        return inner_objective(quiet, self.x).curvature_ends(self.problem.start(self.x, self.y0).detach())

    def _gradients(self, y: Tensor, quiet: FlatProblem, top: Tensor | None = None) -> tuple[float, float, float]:
        """The size of gradients of g near y: there, or L |y|; what x makes of it, moved by its size; and a step."""
        objective = inner_objective(quiet, self.x)
        gradient = objective.gradient(y)
        scale = safe_row_norms(gradient)
        if bool((y != 0).any()):
            top = objective.largest_curvature(y) if top is None else top
            scale = scale.maximum(top.abs() * safe_row_norms(y))
        root = torch.finfo(y.dtype).eps ** 0.5
        signs = torch.randint(0, 2, self.x.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        signs = signs.to(self.x) * 2 - 1
        reach = self.x.abs().max().clamp_min(1.0)

        def response(move: float) -> float:
            moved = inner_objective(quiet, self.x + move * reach * signs).gradient(y)
            return float(safe_row_norms(moved - gradient).max() / move)

        near, far = response(root), response(_LONGER)
        # A jump over a tiny move is no response: y starts on a kink of g.
        return float(scale.max()), far if near > _JUMPS * far else near, root

    def _rounded(self, scale: float) -> float:
        # Rounding leaves a gradient of about eps of its scale (2e-16, 1e-7) times a factor that grows with q and the
        # cancellation in g: 1e-9 and 1e-4 are reached in practice, and leave room for the latter.
        tol = (1e-9 if self.double else 1e-4) * scale
        least = math.ulp(0.0)  # 0 would be no tolerance at all
        return max(tol, least) if math.isfinite(tol) else least  # what is not finite is reported by the solver

    def relative_damping(self, share: float) -> float:
        """A share of the largest curvature of g in y at the start; the share itself where g is flat. 14 products."""
        if inner_problem(self.problem.problem).g is None:  # the estimator is refused, and says why
            return share
        top = float(self._ends[0].abs().max())
        return share * top if 0 < top < math.inf else share

    def derivative_steps(self) -> int:
        """How many steps of gradient descent the derivative of its iterates needs, wherever y starts.

        That is the least k >= 1 with |(I - H / L)^k grad_y f| <= 1e-7 |grad_y f| (float32: 1e-3), found by taking them
        at y*(x); both are well above rounding and below what such a derivative is asked for. From a start where H or
        the cross derivative is another it takes more: `ITD` measures that, and goes on, as it does where there is a
        non-smooth term, for which this is 1. 0 where steps are not chosen for accuracy: with a budget or an `init`, and
        where they are those of the problem.
        """
        offers = inner_problem(self.problem.problem).offers
        if Property.steps not in offers or self.budget is not None or self.problem.problem.init is not None:
            return 0
        if Property.smooth not in offers or self.features:
            return int(bool(self.features & {Feature.prox, Feature.fixed_point}))
        quiet = self.problem.with_tally(Tally())
        objective = inner_objective(quiet, self.x)
        y = self._solution
        left = outer_gradients(quiet, self.x, y)[2]
        hessian = objective.hessian(y)[2]
        step = 1 / objective.largest_curvature(y).clamp_min(torch.finfo(y.dtype).tiny).unsqueeze(-1)
        left = left / safe_row_norms(left).max().clamp_min(torch.finfo(left.dtype).tiny)  # squares are not lost
        target = (1e-7 if self.double else 1e-3) * torch.linalg.vector_norm(left)
        for k in range(1, MOST_STEPS):
            left = left - step * hessian.mv(left)
            if not torch.linalg.vector_norm(left) > target:
                return k
        return MOST_STEPS

    @cached_property
    def _solution(self) -> Tensor:
        """y*(x) `(*tasks, q)`, as `inner` finds it; y0 where that is not finite."""
        quiet = self.problem.with_tally(Tally())
        y0 = self.problem.start(self.x, self.y0).detach()
        y = replace(self, budget=None).inner().solve(inner_objective(quiet, self.x), y0).value
        return torch.where(y.isfinite(), y, y0)

    def penalty_weight(self) -> float:
        """A weight that makes g dominate f: a multiple of the ratio of their largest curvatures in y.

        With extrapolation the bias falls like 1 / weight^2, while the tolerance of y is multiplied by the weight: at
        1e4 that is 1e-8 and 1e-5 in float64, at 1e2 in float32 1e-4 and 1e-2. It is where `measured_weight` begins:
        the bias is that of the least curvatures which grad_y f has a part in, and these are not known here.
        1 where there is no g to be weighed, or y is not its minimizer: the estimator is then refused by name.
        """
        if Property.valued not in implied(inner_problem(self.problem.problem).offers):
            return 1.0
        quiet = self.problem.with_tally(Tally())
        y0 = self.problem.start(self.x, self.y0).detach()
        objectives = (Objective(lambda y: quiet.g(self.x, y)), Objective(lambda y: quiet.f_each(self.x, y)))
        top_g, top_f = (float(objective.largest_curvature(y0).abs().max()) for objective in objectives)
        ratio = top_f / top_g if top_f > 0 and top_g > 0 else 1.0
        if top_f == 0:  # f is linear in y: the shift of y is |grad f| / (weight mu), compared with |y| or 1
            _, _, fy = outer_gradients(quiet, self.x, y0)
            ratio = float(safe_row_norms(fy).max()) / (top_g or 1.0)
        ratio = ratio if math.isfinite(ratio) else 1.0
        return (1e4 if self.double else 1e2) * max(ratio, torch.finfo(self.y0.dtype).tiny)

    def measured_weight(self, estimator: Callable[[float], AbstractEstimator], first: float) -> float:
        """The weight, of `first` and its multiples, at which an estimate here says that its error is least.

        They grow sixteenfold until the error is a thousandth (float32: a hundredth) of the hypergradient or grows with
        them, and shrink alike where that is so from the start. `first` with a budget, and where no estimate says.

        Cost: one estimate where `first` will do, which is the rule up to condition numbers of some hundred.
        """
        if self.budget is not None or Property.valued not in implied(inner_problem(self.problem.problem).offers):
            return first
        quiet = self.problem.with_tally(Tally())
        y = self.problem.start(self.x, self.y0).detach()
        errors: dict[float, float] = {}

        def error(w: float) -> float:
            nonlocal y
            try:
                found = estimator(w).estimate(quiet, self.x, FlatStart(y))
            except DoesNotApply:  # which is said where it is applied
                return math.inf
            size = float(safe_row_norms(found.grad.reshape(-1)))
            solved = all(report.status in _TOLD for report in found.reports)  # else no weight helps
            known = solved and found.bias is not None and found.bias < math.inf and 0 < size < math.inf
            if known and bool(found.y.isfinite().all()):
                y = found.y
            errors[w] = math.inf if not known or found.bias is None else found.bias / size
            return errors[w]

        target, w = 1e-3 if self.double else 1e-2, first
        if not (math.isfinite(first) and error(first) < math.inf):
            return first
        for factor in (_RUNG, 1 / _RUNG):
            w, before = first, errors[first]
            for _ in range(_RUNGS):
                if before <= target:
                    break
                w = factor * w
                now = error(w) if 0 < w < math.inf else math.inf
                if not now < before:
                    break
                before = now
            if w != factor * first or errors.get(w, math.inf) < errors[first]:
                break  # it got better that way
        return min(errors, key=lambda weight: errors[weight])
