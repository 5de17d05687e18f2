"""What is asked of f and g once, at the first estimate of a run: whether they see x and y, and are functions at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import grad, total
from bilevel._estimate import FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._numerics.graphs import leads_to
from bilevel._problem import BilevelProblem
from bilevel._result import Report, Status, Tally
from bilevel._tree import tree_leaves
from bilevel.inner_problems.kinds import inner_objective, inner_problem
from bilevel.requirements.captured import captured_by
from bilevel.requirements.properties import DoesNotApply, Property

_ROUNDING = 1e3  # units of it by which two evaluations may differ, as sums on several threads or a GPU do
_MOVE = 1e-2  # relative: how far x or y is moved to see whether a value changes with it
_FAR, _SHORT = 1e2, 1e-2  # where a proximal map is looked at, relative to |y|, and its step
_CUT = (
    "`.item()`, `.detach()`, `.data`, `float()`, `torch.tensor(...)`, numpy and `torch.no_grad()` cut the derivative"
    " off"
)
_UNUSED = (
    "no path of any graph leads from x through {parts}, so that the hypergradient is zero whatever the numbers are. Use"
    " the x that is passed to them, in torch operations; or, if Phi is not to depend on x, say so by"
    " `BilevelProblem(..., allow_unused=True)`."
)


@final
@dataclass(frozen=True)
class Seen:
    """What a first look found.

    Attributes:
        unrepeatable: which of f and g has two values at one point, in words; empty: none.
        lacking: what the problem lacks, each with the reason; for whoever requires it.
    """

    unrepeatable: str = ""
    lacking: Mapping[Property, str] = field(default_factory=dict)


def first_look(
    problem: FlatProblem, x: Tensor, y: Tensor, h: Tensor | None = None, settings_see_x: bool = False
) -> Seen:
    """Whether f and g are functions, and whether their derivatives in x and y are there.

    Numbers do not decide. A graph without a path to x or y makes values be compared at another point, and only values
    that change where no path says so are a mistake: what is zero by its numbers is a right answer.

    Cost: three evaluations each of f and g, and one of whatever else y follows from; where x or y is missing in a
    graph, or the implicit term of h is zero, a few more and gradients. They are not counted.

    Args:
        problem: the problem in vectors, with the data that the estimate was made with.
        x: where `(p,)`.
        y: where, alike; a solution.
        h: the hypergradient that was found there; None: none was, and everything is looked at.
        settings_see_x: whether settings of the inner solver are functions of x, beside what the problem is made of.

    Raises:
        DoesNotApply: if g does not see y, if a function uses a captured x instead of its argument, or if h is zero
            since no path leads from x to anything, and the problem does not allow it.
    """
    look = _Look(problem.with_tally(Tally()), x, y, settings_see_x)
    return Seen(look.unrepeatable) if look.unrepeatable else Seen("", look.lacking(h))


def looked_at(
    problem: FlatProblem,
    x: Tensor,
    found: FlatEstimate,
    why_not: Callable[[BilevelProblem, Mapping[Property, str]], str],
    settings_see_x: bool = False,
) -> FlatEstimate:
    """The first estimate of a run, with a report if f or g is no function.

    Args:
        problem: as in `first_look`.
        x: alike.
        found: the estimate.
        why_not: why what made it does not apply to a problem that lacks something; empty: it does.
        settings_see_x: see `first_look`.

    Raises:
        DoesNotApply: see `first_look`.
        ValueError: if the problem lacks a derivative that is required.
    """
    y = found.y if bool(found.y.isfinite().all()) else problem.start(x, torch.zeros_like(found.y)).detach()
    failed = any(not report.status.ok for report in found.reports)
    seen = first_look(problem, x, y, None if failed and bool(found.grad.any()) else found.grad, settings_see_x)
    if seen.unrepeatable:
        told = Report(seen.unrepeatable, Status.not_repeatable, math.nan, 0)
        return replace(found, reports=(told, *found.reports))
    why = why_not(problem.problem, seen.lacking) if seen.lacking else ""
    if why:
        raise ValueError(why)
    return found


@final
@dataclass(frozen=True, eq=False)
class _Part:
    """A function that the problem is made of, as a tensor that is a function of x and y; no value was looked at yet."""

    name: str
    at: Callable[[Tensor, Tensor], Tensor]


@final
class _Look:
    """The functions of a problem at a point, and what their graphs and values say."""

    def __init__(self, problem: FlatProblem, x: Tensor, y: Tensor, settings_see_x: bool) -> None:
        self.problem, self.x, self.y, self.settings_see_x = problem, x.detach(), y.detach(), settings_see_x
        self.has_g = inner_problem(problem.problem).g is not None
        self.f, self.g = _Part("f", problem.f_each), _Part("g", problem.g)
        self.unrepeatable = ""
        self.values: dict[str, Tensor] = {}
        self.sees: dict[str, tuple[bool, bool]] = {}  # whether f and g see x and y
        self.fx = torch.zeros_like(self.x)
        for part in (self.f, self.g) if self.has_g else (self.f,):
            self._evaluate_twice(part)

    def _evaluate_twice(self, part: _Part) -> None:
        x, y = self.x.clone().requires_grad_(), self.y.clone().requires_grad_()
        with torch.enable_grad():
            value = part.at(x, y)
        in_x, in_y = leads_to(value, x, y)
        self.sees[part.name] = in_x, in_y
        if part is self.f and in_x:
            self.fx = grad(value.sum(), x) / (self.problem.tasks or 1)
        self.values[part.name] = value.detach()
        # Beside y, which may be special: noise that multiplies a zero does not show.
        once = self._beside(part)
        twice = value.detach() if once is None else self._beside(part)
        with torch.no_grad():
            once = part.at(self.x, self.y) if once is None or twice is None else once
        if not self.unrepeatable and twice is not None and _moved(once, twice):
            k = int((once - twice).abs().reshape(-1).argmax())
            values = f"{float(once.reshape(-1)[k]):.6g} and then {float(twice.reshape(-1)[k]):.6g}"
            self.unrepeatable = f"{part.name}, which gave {values} at the same point"

    def _beside(self, part: _Part) -> Tensor | None:
        """Its value near y; None where there is none."""
        try:
            with torch.no_grad():
                value = part.at(self.x, self._near("y"))
        except Exception:  # the user's function, at a point that it was not asked about
            return None
        return value if bool(value.isfinite().all()) else None

    def _near(self, leaf: str) -> Tensor:
        at = self.x if leaf == "x" else self.y
        near: Tensor = at + _MOVE * (1 + torch.linalg.vector_norm(at)) * _direction(at)
        return near

    def lacking(self, h: Tensor | None) -> dict[Property, str]:
        """What the problem lacks, with the reason; for whoever requires it."""
        lacking: dict[Property, str] = {}
        for leaf, sees in zip("xy", self.sees["f"], strict=True):
            if not sees and self._changes(self.f, leaf):
                lacking[Property.outer_gradient] = _detached("f", leaf)
        if not self.sees["f"][0]:
            self._refuse_captured("f")
        if self.has_g and not self.sees["g"][1]:
            self._refuse_without_y()
        suspicious = h is None or not _moved(h, self.fx)  # the implicit term is zero, or was not found
        parts = self._inner_parts()
        for part in parts:
            if part.name == "grad_y g" and self.sees["g"][0] and not suspicious:
                continue
            if part.name == "fixed_point" and not self._sees(part, "y") and self._changes(part, "y"):
                lacking[Property.second_derivatives] = _detached(part.name, "y")
            if self._sees(part, "x"):
                continue
            name = part.name.removeprefix("grad_y ")
            self._refuse_captured(name)
            if self._changes(part, "x"):
                reason = _detached(part.name, "x")
                lacking |= {Property.second_derivatives: reason, Property.beyond_start: reason}
        allowed = self.problem.problem.allow_unused or self.settings_see_x
        if not lacking and (h is None or not h.any()) and not allowed:
            self._refuse_unused(parts)
        return lacking

    def _refuse_without_y(self) -> None:
        """Refuse a g through which no path leads to y: every inner solver takes its gradient for zero."""
        if self._changes(self.g, "y"):
            raise DoesNotApply(_detached("g", "y"))
        if inner_objective(self.problem, self.x).is_plain:
            raise DoesNotApply("g does not depend on y: every y is a minimizer of it. Use the y that is passed to g.")

    def _inner_parts(self) -> list[_Part]:
        """What y follows from: grad_y g, steps, a proximal map, constraints, the start."""
        objective = inner_objective(self.problem, self.x)
        parts: list[_Part] = []
        if self.has_g:
            parts.append(_Part("grad_y g", self._gradient))
        if objective.own is not None:
            parts.append(_Part("step", self._step))
        if objective.prox is not None:
            parts.append(_Part("prox", self._prox))
        if objective.fixed_point is not None:
            parts.append(_Part("fixed_point", self._fixed_point))
        if objective.constraints is not None:
            parts.append(_Part("constraints", self._constraints))
        if objective.nonlinear is not None:
            parts.append(_Part("constraints on y", self._nonlinear))
        if objective.cones is not None:
            parts.append(_Part("parameters", self._parameters))
        if self.problem.problem.init is not None:
            parts.append(_Part("init", lambda x, y: self.problem.start(x, y)))
        return parts

    def _gradient(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            return grad(total(self.problem.g(x, leaf)), leaf, create_graph=x.requires_grad)

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        own = inner_objective(self.problem, x).own
        assert own is not None
        return own.step(y, self._gradient(x, y) if own.needs_gradient else None, 0)

    def _fixed_point(self, x: Tensor, y: Tensor) -> Tensor:
        image = inner_objective(self.problem, x).fixed_point
        assert image is not None
        return image(y)

    def _prox(self, x: Tensor, y: Tensor) -> Tensor:
        prox = inner_objective(self.problem, x).prox
        assert prox is not None
        # Far out and with a short step, where a penalty does not send everything to zero, nor a set hold its own.
        return prox(y + _FAR * (1 + torch.linalg.vector_norm(y)) * _direction(y), _SHORT)

    def _constraints(self, x: Tensor, y: Tensor) -> Tensor:
        polytope = inner_objective(self.problem, x).constraints
        assert polytope is not None
        return torch.cat([part.reshape(-1) for part in polytope.tensors()])

    def _nonlinear(self, x: Tensor, y: Tensor) -> Tensor:
        nonlinear = inner_objective(self.problem, x).nonlinear
        assert nonlinear is not None
        return torch.cat([nonlinear.inequalities(y).reshape(-1), nonlinear.equalities(y).reshape(-1)])

    def _parameters(self, x: Tensor, y: Tensor) -> Tensor:
        cones = inner_objective(self.problem, x).cones
        assert cones is not None
        return cones.parameters

    def _sees(self, part: _Part, leaf: str) -> bool:
        at = {"x": self.x, "y": self.y}
        at[leaf] = at[leaf].clone().requires_grad_()
        try:
            with torch.enable_grad():
                value = part.at(at["x"], at["y"])
        except NotImplementedError:  # a second derivative that there is not: whoever needs it says so
            return True
        return value.requires_grad and leads_to(value, at[leaf])[0]

    def _changes(self, part: _Part, leaf: str) -> bool:
        """Whether its values change with x, or with y; no, where they cannot be had nearby."""
        moved = {"x": self.x, "y": self.y, leaf: self._near(leaf)}
        try:
            with torch.no_grad():
                here = self.values.get(part.name)
                return _moved(part.at(self.x, self.y) if here is None else here, part.at(moved["x"], moved["y"]))
        except Exception:  # the user's function, at a point that it was not asked about
            return False

    def _refuse_captured(self, name: str) -> None:
        """Refuse a function that takes the very tensor that was passed as x from around it, and not as its argument."""
        given = [leaf for leaf in tree_leaves(self.problem.given) if isinstance(leaf, Tensor)]
        if name != "g":  # others often do without x, and may have the same tensor for a constant
            given = [leaf for leaf in given if leaf.requires_grad]
        own = getattr(self.problem.problem, f"_{name}", None) or getattr(self.problem.problem, name, None)
        if given and captured_by(own, given):
            raise DoesNotApply(
                f"{name} uses the tensor that was passed as x from around it, and not its argument: it would stay where"
                f" it is while x moves. Write `def {name}(x, ...)` and use that x."
            )

    def _refuse_unused(self, parts: list[_Part]) -> None:
        """Refuse a zero that follows from the graphs alone."""
        kind = self.problem.problem.inner
        names = ["f", *(part.name.removeprefix("grad_y ") for part in parts)]
        if self.sees["f"][0] or self.sees.get("g", (False,))[0]:
            return
        if kind is not None and (not parts or set(kind.functions) - set(names)):  # of a kind that tells no more
            return
        if any(self._sees(part, "x") for part in parts):
            return
        told = " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        raise DoesNotApply(_UNUSED.format(parts=told))


def _detached(name: str, leaf: str) -> str:
    return (
        f"the value of {name} changes with {leaf}, but no path of its graph leads to {leaf}, so that the derivative is"
        f" lost. Write it in torch operations on {leaf} itself: {_CUT}. If the values alone are to count, use"
        f" `FiniteDifference`."
    )


def _moved(a: Tensor, b: Tensor) -> bool:
    """Whether two values differ by more than rounding; entries that are not finite tell nothing."""
    if torch.equal(a, b):
        return False
    told = a.isfinite() & b.isfinite()
    if not bool(told.any()):  # nor is there anything to tell where there are no entries
        return False
    a, b = a[told], b[told]
    size = torch.maximum(a.abs().max(), b.abs().max())
    return bool((a - b).abs().max() > _ROUNDING * torch.finfo(a.dtype).eps * size)


def _direction(like: Tensor) -> Tensor:
    """A direction with entries of about 1 that follows no pattern of the user's, the same one each time."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
