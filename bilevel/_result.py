"""What comes back: statuses whose values are messages, oracle counts, solutions of sub-problems."""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, final

from torch import Tensor

from bilevel._numerics.rows import safe_row_norms
from bilevel.arguments.fits import demand_type, demand_types
from bilevel.arguments.ranges import COUNT, demand_range
from bilevel.arguments.unchecked import unchecked
from bilevel.portable.pickling import what_travels


class Status(enum.Enum):
    """Why a solver stopped; the value is the sentence shown to the user.

    Members are ordered from good to bad, which is what :meth:`worst` uses.

    Example:
        >>> Status.worst([Status.successful, Status.max_steps]).name
        'max_steps'
    """

    successful = "The tolerance was met, or all the steps that were asked for were taken."
    steps_used_up = (
        "The outer steps were used up. No tolerance was asked for, or the outer method's own was not met: this need not"
        " be the optimum. Raise `max_steps`, or pass `tol=`; `converged` is true where it is met."
    )
    stopped = "The callback ended the run."
    interrupted = "The run was interrupted; what was computed so far is kept. Resume it from its checkpoint."
    weakly_active = (
        "Strict complementarity fails: a constraint on y holds with a zero multiplier, so that y*(x) has a kink here"
        " and the estimate is a derivative on one side of it only. Move x a little, or pass `throw=False` to accept it."
    )
    dependent_constraints = (
        "The gradients of constraints that hold at y* are linearly dependent, and these constraints move apart with x:"
        " y*(x) has a kink here, or ceases to exist, and multipliers are not unique (LICQ fails). Move x a little,"
        " leave out a constraint that follows from others, or pass `throw=False` to accept it."
    )
    one_sided = (
        "Phi has a kink at x: its slopes to the two sides differ, so that there is no derivative, and the estimate is a"
        " mean of both or one of them. Move x a little, or pass `throw=False` to accept it."
    )
    max_steps = (
        "The maximum number of steps was reached before the tolerance was met. Raise `max_steps`, loosen the"
        " tolerance, or start closer (`start=` carries y and v over from the previous call)."
    )
    truncated = (
        "The derivative of the unrolled steps is not that of y*(x) yet, although y met its tolerance: the start was"
        " close to the solution, or a step led straight to it, so that the steps were few, or taken where derivatives"
        " of g are others; or the inner Hessian is nearly singular. Pass `min_steps=` to `Iterate`, which then goes on"
        " until it is, or start cold (`warm_start=False`); for `AID` none of this matters."
    )
    biased = (
        "The systematic error of the estimate, as far as it was measured (`Estimate.bias`), is above its accuracy: the"
        " weight of a penalty is too low for the curvatures of f and g, or a radius or step is too long for that of"
        " y*(x). Raise the weight, shorten the radius or step, or use an implicit estimator such as `aid-cg`."
    )
    imprecise = (
        "Too few digits are left: differences are taken over so little (a short radius or step, a high weight) that"
        " rounding, or the tolerance of the inner solver, is a large part of them; or an eigenvalue of dT/dy is so near"
        " to 1 that a fixed point may be far from a y that met its tolerance. Lengthen the radius or step, lower"
        " the weight, tighten the tolerance, or compute in float64."
    )
    stagnated = (
        "No further progress was possible before the tolerance was met: the rounding floor of this dtype was"
        " reached. Loosen the tolerance or compute in float64."
    )
    line_search_failed = (
        "The line search found no acceptable step. The objective may be non-smooth, noisy (dropout sampled anew"
        " at each call?) or its gradient wrong; `tol` may also be below what this dtype can reach."
    )
    kink = (
        "g, or the map of a fixed point, has a kink at the inner solution: derivatives jump there, and do not tell how"
        " y* moves with x. Give a non-smooth term as `prox=` (`bilevel.prox.L1`), replace it by a smooth one,"
        " or use 'finite-difference' or `ESJ`, which do not differentiate g; where Phi itself has a kink, move x a"
        " little."
    )
    negative_curvature = (
        "A direction of negative or zero curvature was met: the inner Hessian is not positive definite here, so"
        " y is not a strict minimum of g(x, .). Solve the inner problem more accurately, add a regularizer to g,"
        " pass `damping=`, or use `MINRES`, which needs no definiteness. Where y are the weights of a network, take"
        " 'network', `GaussNewton()` products, or an algorithm of first order such as 'f2sa'."
    )
    not_positive_definite = (
        "The matrix is not positive definite: its Cholesky factorization does not exist. y may not be a strict"
        " minimum of g(x, .), under constraints along those that hold (second-order sufficiency fails, as where a"
        " linear program has several solutions, or none): solve the inner problem more accurately, add a regularizer to"
        " g or pass `damping=`. Where several minimizers are meant, `minimize(algorithm=ValueFunction())` chooses among"
        " them."
    )
    singular = (
        "The matrix is singular to rounding: the system has no unique solution, and this is the least squares solution"
        " of least norm. y*(x) may not be unique, or constraints on y repeat each other: add a regularizer to g, pass"
        " `damping=`, or leave out the constraints that follow from others."
    )
    breakdown = (
        "The solver broke down before the tolerance was met: the operator is singular, or does not"
        " have the properties that it was declared to have."
    )
    not_a_solution = (
        "The given formula is not the solution of the inner problem: its residual is far above what rounding or a small"
        " error leaves. Check `ClosedForm(solution=...)` against g, or let a solver find y (`LBFGS()`)."
    )
    not_stationary = (
        "The parameters are no minimizer of the training objective: its gradient there is large beside those of single"
        " samples, so that what the first order says of leaving one out is not about them. Train on, to a small"
        " gradient (`LBFGS`, or a falling step), with the `l2` that is passed here; or raise `tol` to accept it."
    )
    descent_left = (
        "y minimizes g(x, .) and all constraints hold, but f is not known to be least there, even locally: to first"
        " order it falls along a direction that the conditions for y leave open, or there are none (no multipliers;"
        " more than ten constraints on y hold). Run it from other x0 and take the lowest value; or pass"
        " `throw=False` to accept the point, which is feasible."
    )
    infeasible = (
        "The constraints on y contradict each other: no y satisfies all of them. Check A, b and the bounds that"
        " `constraints` returns at this x."
    )
    unbounded = (
        "g is unbounded below on the constraints: it falls along a direction in which none of them ends. Add a bound on"
        " y or a regularizer to g."
    )
    infeasible_stationary = (
        "The constraints on x and y*(x) are violated, and no small change of x lowers the violation: they contradict"
        " each other, at least near here. Check `outer_inequalities` and `outer_equalities`, or start elsewhere."
    )
    weight_limit = (
        "The constraints on x and y*(x) are violated although their weight in the augmented Lagrangian has reached its"
        " limit: they may be badly scaled, contradict each other, or have no independent gradients. Scale them to"
        " values about 1, or start closer."
    )
    diverged = (
        "The iteration diverged: the residual grew far beyond where it began. Lower the step below 2 / L with L"
        " the largest curvature, or have it derived from an estimate of L: `step=None` of a solver, an algorithm by its"
        " name."
    )
    expanding = (
        "The map does not contract: the spectral radius of dT/dy was estimated to be at least 1, so that plain"
        " iteration and the series of its powers (`Neumann`, `JacobianFree`) diverge. Find y by `Anderson` or"
        " `Broyden`, and solve the linear system by `GMRES`, which need only that 1 is no eigenvalue of dT/dy."
    )
    not_repeatable = (
        "Its value changes from call to call, so that there is no Phi to differentiate. Fix the random numbers"
        " (`bilevel.functional(module)` keeps one dropout mask), close over nothing that changes, and pass mini-batches"
        " by `data=`; or pass `throw=False` to accept it."
    )
    nonfinite = (
        "NaN or Inf was met. Check f and g at the starting point, and their derivatives for operations such as"
        " sqrt or norm at zero; lower the step sizes if the iterates had grown."
    )

    @property
    def ok(self) -> bool:
        """Whether nothing failed: :attr:`successful`, or an outer run that ended as it was asked to."""
        return self in _OK

    @property
    def lost(self) -> bool:
        """Whether what was computed is no basis for anything: not finite, diverged, unbounded, or infeasible.

        Example:
            >>> [status.name for status in Status if status.lost]
            ['infeasible', 'unbounded', 'diverged', 'nonfinite']
        """
        return self in (Status.infeasible, Status.unbounded, Status.diverged, Status.nonfinite)

    def __repr__(self) -> str:
        return f"Status.{self.name}"

    @staticmethod
    def worst(statuses: Iterable[Status]) -> Status:
        """The last of the given statuses in the order of this enumeration; successful if there is none."""
        worst = Status.successful
        for status in statuses:  # nearly always all the same one
            if status is not worst and _ORDER[status] > _ORDER[worst]:
                worst = status
        return worst


_ORDER = {status: place for place, status in enumerate(Status)}
_OK = (Status.successful, Status.steps_used_up, Status.stopped)


def judged(residual: float, tol: float, otherwise: Status = Status.max_steps) -> Status:
    """What a residual says of a solution: nonfinite for NaN and Inf, successful up to `tol`, and else `otherwise`.

    Args:
        residual: recomputed at the solution.
        tol: what was asked for; infinite where nothing was, so that every finite residual is a success.
        otherwise: why it is larger than that.

    Example:
        >>> (
        ...     judged(1e-9, tol=1e-8).name,
        ...     judged(1e-7, tol=1e-8).name,
        ...     judged(math.nan, tol=math.inf).name,
        ... )
        ('successful', 'max_steps', 'nonfinite')
    """
    if not math.isfinite(residual):
        return Status.nonfinite
    return Status.successful if residual <= tol else otherwise


def judged_rows(residual: Tensor, tol: float, otherwise: Status = Status.max_steps) -> tuple[Status, ...]:
    """:func:`judged` for each entry of a tensor `(*batch,)`."""
    return tuple(judged(each, tol, otherwise) for each in residual.reshape(-1).tolist())


def first_statuses(*cases: tuple[Tensor, Status]) -> tuple[Status, ...]:
    """For each row the status of the first case that holds in it, and successful where none does.

    Args:
        cases: which rows `(*batch,)`, and what their status is then.

    Example:
        >>> from torch import tensor
        >>> lost, zero = tensor([True, False, False]), tensor([True, True, False])
        >>> found = first_statuses((lost, Status.nonfinite), (zero, Status.breakdown))
        >>> [status.name for status in found]
        ['nonfinite', 'breakdown', 'successful']
    """
    statuses = [status for _, status in cases]
    rows = zip(*(which.reshape(-1).tolist() for which, _ in cases), strict=True)
    return tuple(next((s for s, holds in zip(statuses, row, strict=True) if holds), Status.successful) for row in rows)


GROWTH = 10.0  # a residual this many times larger than at the start, at a larger objective, is a divergence


def ended(residual: float, value: float, first_residual: float, first_value: float, tol: float) -> Status:
    """How an inner iteration ended, by its residual and its objective at the end and at the start.

    Args:
        residual: at the end, such as |grad_y g|.
        value: of the objective at the end; read only where the residual has grown, and to be finite.
        first_residual: at the start.
        first_value: of the objective at the start.
        tol: what the residual was to reach; 0 where the steps were all that was asked for.

    Example:
        >>> ended(1e-9, 0.0, 1.0, 1.0, tol=1e-8), ended(20.0, 5.0, 1.0, 1.0, tol=0.0)
        (Status.successful, Status.diverged)
    """
    if not (math.isfinite(residual) and math.isfinite(value)):
        return Status.nonfinite
    if tol and residual <= tol:
        return Status.successful
    if residual > GROWTH * first_residual and not value <= first_value:
        return Status.diverged
    return Status.max_steps if tol else Status.successful


@final
@dataclass(frozen=True)
class Stats:
    """Oracle calls, the currency of the field: addable counts, one unit a problem (a task, a direction).

    Attributes:
        gradients: gradients of g in y (and in x, where an estimator needs it).
        hvps: products with the inner Hessian d2g/dy2.
        cross_products: products with the mixed derivative d2g/dxdy.
        outer_gradients: gradients of f.
        values: evaluations of f or g without a derivative (line searches).
        inner_steps: iterations of the inner solver.
        linear_steps: iterations of the linear solver.
        sample_calls: calls for single samples: of a gradient of g in y or in x, a product with either second
            derivative, or both gradients of f together, each times the samples of its batch. 0 where batches are not
            those of a `FiniteSum`.

    Example:
        >>> (Stats(gradients=2) + Stats(gradients=3, hvps=1)).gradients
        5
    """

    gradients: int = 0
    hvps: int = 0
    cross_products: int = 0
    outer_gradients: int = 0
    values: int = 0
    inner_steps: int = 0
    linear_steps: int = 0
    sample_calls: int = 0

    def __post_init__(self) -> None:
        demand_types(self)

    def __add__(self, other: Stats) -> Stats:
        return _stats(*[getattr(self, name) + getattr(other, name) for name in _NAMES])

    def __sub__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Stats)))

    def as_dict(self) -> dict[str, int]:
        """The counts by name, as plain data."""
        return {f.name: getattr(self, f.name) for f in fields(Stats)}


# What is counted one by one; once, as looking names up takes as long as a small gradient.
_NAMES = tuple(field.name for field in fields(Stats))
_COUNTS = tuple(name for name in _NAMES if name != "sample_calls")


_stats = unchecked(Stats)
_NONE = 0  # no samples, by default


@final
class Tally:
    """A running count of oracle calls; :meth:`stats` reads it.

    Args:
        f_samples: how many samples a batch of f has; 0: they are not counted.
        g_samples: the same of g.
        whole: the tally that this one is a part of; None: of none.
    """

    def __init__(self, f_samples: int = _NONE, g_samples: int = _NONE, whole: Tally | None = None) -> None:
        for name, count in (("f_samples", f_samples), ("g_samples", g_samples)):
            if count is not _NONE:  # as most are: a loop makes one at every step
                demand_type("Tally", name, count, int)
                demand_range("Tally", name, count, COUNT)
        if whole is not None:
            demand_type("Tally", "whole", whole, Tally | None)
        self.f_samples: float = f_samples
        self.g_samples: float = g_samples
        self.whole = whole
        self.parts: list[Tally] = []
        self._zero()

    def _zero(self) -> None:
        self.gradients = self.hvps = self.cross_products = self.outer_gradients = 0
        self.values = self.inner_steps = self.linear_steps = 0
        self.sample_calls = 0  # of parts that have been settled
        self.beside = 0  # gradients of g in x, where they are taken together with those in y

    def part(self, f_samples: float, g_samples: float) -> Tally:
        """A tally of calls for batches of these sizes, which count here as well; of several batches their mean."""
        found = Tally.__new__(Tally)  # at every step of a run: sizes of batches are counts
        found.f_samples, found.g_samples, found.whole, found.parts = f_samples, g_samples, self, []
        found._zero()
        self.parts.append(found)
        return found

    def settle(self) -> None:
        """Take over what the parts have counted: they are not used any more."""
        for part in self.parts:
            for name in _COUNTS:
                setattr(self, name, getattr(self, name) + getattr(part, name))
            self.sample_calls += part._calls()
        self.parts = []

    def clear(self) -> None:
        """Begin again at zero."""
        self._zero()
        for part in self.parts:
            part._zero()

    def add(self, stats: Stats) -> None:
        """Count these calls too."""
        for name, count in stats.as_dict().items():
            setattr(self, name, getattr(self, name) + count)

    def stats(self) -> Stats:
        """What has been counted so far, by the whole that this is a part of."""
        if self.whole is not None:
            return self.whole.stats()
        return sum((part._own() for part in self.parts), self._own()) if self.parts else self._own()

    @property
    def sampled(self) -> int:
        """`stats().sample_calls`, and nothing else: what a loop can ask at every step."""
        if self.whole is not None:
            return self.whole.sampled
        return self._calls() + sum(part._calls() for part in self.parts)

    def _calls(self) -> int:
        of_g = self.gradients + self.beside + self.hvps + self.cross_products
        return self.sample_calls + round(self.g_samples * of_g + self.f_samples * self.outer_gradients)

    def _own(self) -> Stats:
        return _stats(**{name: getattr(self, name) for name in _COUNTS}, sample_calls=self._calls())


@final
@dataclass(frozen=True, eq=False)
class Solved:
    """The solution of a sub-problem (linear system or inner minimization), or of a batch of them.

    Attributes:
        value: the solution, `(n,)`, or `(batch, n)` for independent problems side by side.
        statuses: why each problem stopped: one entry, or one for each row of the batch.
        residual: `|b - A v|` or `|grad g|` at `value`, recomputed there: `()` or `(batch,)`.
        steps: iterations taken (the most of any row).
        at_bounds: how many entries of `value` are held by bounds: there the gradient need not vanish, and y is not a
            stationary point of the objective.
        multipliers: of linear equality constraints A y = b, where there are any: grad g + A' multipliers = 0 on the
            entries that no bound holds.
        concave: whether a linear solver that ends there by design met a direction of curvature at most zero.
    """

    value: Tensor
    statuses: tuple[Status, ...]
    residual: Tensor
    steps: int
    at_bounds: int = 0
    multipliers: Tensor | None = None
    concave: bool = False

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def status(self) -> Status:
        """The worst of the statuses."""
        return self.statuses[0] if len(self.statuses) == 1 else Status.worst(self.statuses)


_PLAIN = (str, Status, float, int, tuple)  # the fields of a report


@final
@dataclass(frozen=True)
class Report:
    """How one part of an estimate ended, in words: which part, why it stopped, its residual and steps.

    Attributes:
        part: "inner solver", "linear solver" and the like.
        status: why it stopped; with tasks, the worst of them.
        residual: the largest.
        steps: the most.
        statuses: in task mode, why each task stopped; else empty.
    """

    part: str
    status: Status
    residual: float
    steps: int
    statuses: tuple[Status, ...] = ()

    def __post_init__(self) -> None:
        if tuple(map(type, vars(self).values())) != _PLAIN or self.steps or self.statuses:
            demand_types(self)  # nothing can be wrong with the others: a loop makes two of them at every step

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data: statuses by their names."""
        statuses = [status.name for status in self.statuses]
        return {**vars(self), "status": self.status.name, "statuses": statuses}

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Report:
        """The inverse of :meth:`as_dict`.

        Raises:
            ValueError: if it is no such data.
        """
        demand_type("Report.from_dict", "content", content, dict)
        try:
            statuses = tuple(Status[name] for name in content["statuses"])
            return Report(**{**content, "status": Status[content["status"]], "statuses": statuses})
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"`Report.from_dict(content=...)` must be what `as_dict` made. Got {error!r:.200}."
            ) from error

    def __str__(self) -> str:
        failed = sum(not status.ok for status in self.statuses)
        tasks = f" in {failed} of {len(self.statuses)} tasks" if failed else ""
        return f"{self.part}{tasks}: {self.status.value} (residual {self.residual:.3g} after {self.steps} steps)"


_report = unchecked(Report)


def report(part: str, solved: Solved, gradient: Tensor | None = None) -> Report:
    """How a solver ended, in words; `gradient` is what was measured at its solution, if it was again."""
    if type(part) is not str or type(solved) is not Solved:  # a loop makes two reports at every step
        demand_type("report", "part", part, str)
        demand_type("report", "solved", solved, Solved)
    residual = solved.residual
    if gradient is not None:
        if type(gradient) is not Tensor:
            demand_type("report", "gradient", gradient, Tensor | None)
        if not gradient.dim() or gradient.is_meta or not gradient.is_floating_point():
            raise ValueError("`report(gradient=...)` must have an axis of entries that hold floating point numbers.")
        residual = safe_row_norms(gradient)
    worst = residual.item() if not residual.dim() else float(residual.max()) if residual.numel() else 0.0
    return _report(part, solved.status, worst, solved.steps, solved.statuses if solved.value.dim() > 1 else ())


@final
@dataclass(frozen=True)
class Substitute:
    """The linear system that an estimate solved, by design, in the place of H v = grad_y f: a bias, and its size.

    Attributes:
        system: in words, such as "Gauss-Newton, damping 0.01".
        residual: |grad_y f - H v| / |grad_y f| with H itself, at the v that was found: 0 is no bias, and 1 that of
            v = 0. Measured by an exact product, or bounded by the triangle inequality where only damping is in the way;
            the largest of all tasks. NaN where it is not known.
        concave: whether a direction of curvature at most zero ended the solve: y is no strict minimum of g.
    """

    system: str
    residual: float
    concave: bool = False

    def __post_init__(self) -> None:
        demand_types(self)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"system": self.system, "residual": self.residual, "concave": self.concave}

    def __str__(self) -> str:
        concave = ", ended at a direction of no positive curvature" if self.concave else ""
        return f"{self.system}{concave}: |grad_y f - H v| is {self.residual:.2g} of |grad_y f|"


class BilevelError(RuntimeError):
    """A computation that did not succeed, raised where `throw=True`.

    Attributes:
        status: the typed reason.
        partial: what had been computed: the `Estimate` or `Solution` that `throw=False` would have returned. Of one
            that cannot be pickled the fields that can be arrive from a worker, in a namespace.
    """

    def __init__(self, message: str, status: Status, partial: Any = None) -> None:
        demand_type("BilevelError", "message", message, str)
        demand_type("BilevelError", "status", status, Status)
        RuntimeError.__init__(self, message)
        self.status = status
        self.partial = partial

    def __reduce__(self) -> Any:
        """An error has to arrive from a worker, with its own text, also where its partial result cannot."""
        state, (partial, lost) = dict(self.__dict__), what_travels(self.partial)
        if lost is not None:
            state |= {"partial": partial, "__notes__": [*state.get("__notes__", ()), lost]}
        return BilevelError, (str(self), self.status), state

    def __copy__(self) -> BilevelError:
        made = BilevelError(str(self), self.status)
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> BilevelError:
        made = BilevelError(str(self), self.status)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made
