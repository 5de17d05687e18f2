"""What a hypergradient estimator is, and what it returns."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel._result import Report, Stats, Status, Substitute
from bilevel._tree import Tree, tree_leaves
from bilevel.arguments.checked import checked as arguments
from bilevel.arguments.fits import demand_types
from bilevel.inner_problems.multipliers import Multipliers
from bilevel.portable.html import card
from bilevel.portable.pickling import AbstractPortable
from bilevel.portable.plain import checked, demanded, number, optional_number, plain, refused, restored, same_bits
from bilevel.portable.result import AbstractResult
from bilevel.portable.tensor_file import damaged, read_tensors, write_tensors
from bilevel.requirements.properties import STRICTEST, Property

if TYPE_CHECKING:
    from bilevel._flat import FlatProblem
    from bilevel._linear import AbstractLinearSolver
    from bilevel.bounds.beforehand import Beforehand
    from bilevel.bounds.bound import Bound
    from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True, eq=False)
class Start(AbstractResult):
    """A warm start: what one estimate hands to the next.

    Attributes:
        y: where the inner solver starts: the structure of y.
        v: where the linear solver starts, or None: the structure of y.
        count: how many estimates came before; estimators that draw random numbers draw other ones at each count.
    """

    y: Tree
    v: Tree | None = None
    count: int = 0

    def __post_init__(self) -> None:
        demand_types(self)

    def to_dict(self) -> dict[str, Any]:
        """The start as nested dicts and lists of tensors and numbers; :meth:`from_dict` is the inverse."""
        return {"y": plain(self.y, "y"), "v": plain(self.v, "v"), "count": self.count}

    @staticmethod
    @arguments("Start.from_dict")
    def from_dict(content: Mapping[str, Any]) -> Start:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if it is no such data.
        """
        with refused("Start"):
            v = content["v"]
            return Start(restored(content["y"]), None if v is None else restored(v), demanded(content, "count", int))


def _nowhere() -> Start:
    return Start(None)


@final
@dataclass(frozen=True)
class LeftBehind:
    """In the place of what estimates the error of an estimate that travelled without its f and g."""

    why: str

    def __call__(self) -> float:
        raise ValueError(
            f"`Estimate.error_estimate` is computed from f and g, which this estimate came without: {self.why}. Read it"
            f" where the estimate is made, or make the estimate again: `hypergradient(..., start=estimate.start)`."
        )


@final
@dataclass(frozen=True, eq=False)
class Estimate(AbstractResult):
    """A hypergradient and everything that is known about it.

    It holds no graph, and h, x, y and v once each; `start` makes copies. What it holds may be written to, once what is
    made of it later (`start`, `error_estimate`) has been read: these refuse what has been written to.

    Attributes:
        grad: the estimate of grad Phi(x): the structure of x.
        value: Phi at x, as the inner solution found it.
        y: the inner solution: the structure of y (in task mode stacked along a leading axis).
        v: the solution of the linear system H v = grad_y f, where the estimator solves one.
        status: the worst status of its parts.
        reports: how each part ended (inner solver, linear solver), with its residual.
        stats: oracle counts.
        standard_error: for estimators that sample: an estimate of the root-mean-square distance |grad - E grad|.
        bias: for estimators that take differences over a radius, a step or a weight: an estimate of the systematic part
            of |grad - grad Phi|, from that and from rounding and tolerances over it; no bound. Some is measured at the
            first estimate of a run only, at the cost of further inner solves; None: not measured.
        bound: a certified bound on the error, where the estimator was asked for an accuracy.
        note: why this estimator, where it was chosen for you.
        penalized: for the penalty estimator: y_w and the weight w.
        second_level: how `error_estimate` is computed.
        x: where: the structure of x.
        warm: how `start` is made.
        substitute: the system that was solved in the place of H v = grad_y f by design (Gauss-Newton products,
            damping, a truncated linear solver), with its residual against H itself; None: it was H v = grad_y f.
        multipliers: of the constraints on y, in their structures, where there are any and the estimator differentiates
            them; see `Multipliers`.
    """

    grad: Tree = field(repr=False)
    value: float
    y: Tree = field(repr=False)
    v: Tree | None = field(repr=False)
    status: Status
    reports: tuple[Report, ...]
    stats: Stats
    standard_error: float | None = None
    bias: float | None = None
    bound: float | None = None
    note: str = ""
    penalized: tuple[Tree, float] | None = field(default=None, repr=False)
    second_level: Callable[[], float] | None = field(default=None, repr=False)
    x: Tree = field(default=None, repr=False)
    warm: Callable[[], Start] = field(default=_nowhere, repr=False)
    substitute: Substitute | None = None
    multipliers: Multipliers | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    @cached_property
    def start(self) -> Start:
        """The warm start for the next call: `hypergradient(..., start=estimate.start)`; made when it is first read.

        Raises:
            ValueError: if y or v has been written to before.
        """
        return self.warm()

    @property
    def error_estimate(self) -> float:
        """An estimate of |grad - grad Phi(x)| that needs no constants; not a bound (see `certify` for one).

        The distance to the implicit gradient after one Newton correction of y, whose own error is of second order in
        |y - y*|. Computed when it is read, at the cost of two linear solves, two gradients of g and one of f, which
        `stats` does not count. NaN where the correction does not exist.

        Raises:
            ValueError: if x, y, v or grad has been written to.
        """
        return float("nan") if self.second_level is None else self.second_level()

    @property
    def message(self) -> str:
        """The reports of the parts that failed, one sentence each; empty if none did.

        Where f or g is no function only that, as the failures of solvers follow from it.
        """
        failed = [report for report in self.reports if not report.status.ok]
        causes = [report for report in failed if report.status is Status.not_repeatable]
        return " ".join(map(str, causes or failed))

    def to_dict(self) -> dict[str, Any]:
        """The estimate as nested dicts and lists of tensors, numbers and texts; :meth:`from_dict` is the inverse.

        `torch.save(estimate.to_dict(), path)` is read by `torch.load(path, weights_only=True)`. The tensors are those
        of the estimate, not copies. What is computed when it is read, `error_estimate`, is not in it.

        Example:
            >>> import torch
            >>> from bilevel import BilevelProblem, hypergradient
            >>> problem = BilevelProblem(
            ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
            ... )
            >>> found = hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0)).to_dict()
            >>> found["grad"], found["status"], Estimate.from_dict(found).start.count
            (tensor(-2.), 'successful', 1)
        """
        y, v, start = plain(self.y, "y"), plain(self.v, "v"), self.start.to_dict()
        moved = {name: part for name, part in (("y", y), ("v", v)) if not same_bits(part, start[name])}
        numbers = {name: _float(getattr(self, name)) for name in _NUMBERS}
        return {
            "grad": plain(self.grad, "grad"),
            "value": float(self.value),
            "y": y,
            "v": v,
            "status": self.status.name,
            "reports": [report.as_dict() for report in self.reports],
            "stats": self.stats.as_dict(),
            **numbers,
            "note": self.note,
            "penalized": plain(self.penalized, "penalized"),
            "x": plain(self.x, "x"),
            "substitute": None if self.substitute is None else self.substitute.as_dict(),
            "multipliers": None if self.multipliers is None else self.multipliers.to_dict(),
            "start": {name: part for name, part in start.items() if name == "count" or name in moved},
        }

    @staticmethod
    @arguments("Estimate.from_dict")
    def from_dict(content: Mapping[str, Any]) -> Estimate:
        """The inverse of :meth:`to_dict`; `error_estimate` needs f and g, and says so.

        Raises:
            ValueError: if it is no such data.
        """
        with refused("Estimate"):
            v, penalized = restored(content["v"]), restored(content["penalized"])
            if penalized is not None:
                y_w, weight = penalized
                penalized = y_w, float(weight)
            return Estimate(
                grad=restored(content["grad"]),
                value=number(content, "value"),
                y=restored(content["y"]),
                v=v,
                status=Status[demanded(content, "status", str)],
                reports=tuple(map(_report, demanded(content, "reports", list))),
                stats=Stats(**checked(content["stats"], **COUNTS)),
                note=demanded(content, "note", str),
                penalized=penalized,
                second_level=LeftBehind("it was read from a file, or made of plain data"),
                x=restored(content["x"]),
                substitute=_substitute(content.get("substitute")),
                multipliers=_multipliers(content.get("multipliers")),
                warm=_Remade({"y": content["y"], "v": content["v"], **demanded(content, "start", dict)}),
                **{name: optional_number(content, name) for name in _NUMBERS},
            )

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        told = [(report.part, f"{report.status.name}, residual {report.residual:.2e}") for report in self.reports]
        calls = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.stats.as_dict().items() if count)
        size = float(torch.linalg.vector_norm(torch.stack([leaf.norm().cpu() for leaf in tree_leaves(self.grad)])))
        errors = [
            (name.replace("_", " "), f"{value:.2e}")
            for name, value in (("standard_error", self.standard_error), ("bias", self.bias), ("bound", self.bound))
            if value is not None
        ]
        rows = [("Phi", f"{float(self.value):.6g}"), ("|h|", f"{size:.6g}"), ("status", self.status.name)]
        return card(
            "Estimate", [*rows, ("message", self.message), *errors, *told, ("calls", calls), ("note", self.note)]
        )

    @arguments("Estimate.save")
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimate to one file in the format safetensors, its numbers and texts as JSON in the header.

        The file is whole or absent. :meth:`load` reads it, bit for bit, in the structures of x and y; and so does
        whatever reads safetensors: `safetensors.torch.load_file(path)["grad"]`.

        Raises:
            ImportError: if safetensors is missing: `pip install "bilevel[safetensors]"`.
        """
        write_tensors(path, "Estimate", self.to_dict())

    @staticmethod
    @arguments("Estimate.load")
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Estimate:
        """Read what :meth:`save` wrote. Nothing in the file is executed, and no module is imported for it.

        Args:
            path: the file.
            device: where its tensors go.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or holds something else.
            ImportError: if safetensors is missing.
        """
        with damaged(path, "Estimate"):
            return Estimate.from_dict(read_tensors(path, "Estimate", device))


def _substitute(content: Mapping[str, Any] | None) -> Substitute | None:
    return None if content is None else Substitute(**checked(content, **_SUBSTITUTE))


def _multipliers(content: Mapping[str, Any] | None) -> Multipliers | None:
    return None if content is None else Multipliers.from_dict(content)


def _report(content: Mapping[str, Any]) -> Report:
    return Report.from_dict(checked(content, **_REPORT))


COUNTS: dict[str, type] = dict.fromkeys(Stats().as_dict(), int)
_REPORT: dict[str, type | tuple[type, ...]] = {
    "part": str,
    "status": str,
    "residual": (float, int),
    "steps": int,
    "statuses": list,
}
_SUBSTITUTE: dict[str, type | tuple[type, ...]] = {"system": str, "residual": (float, int), "concave": bool}
_NUMBERS = ("standard_error", "bias", "bound")


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


@final
@dataclass(frozen=True, eq=False)
class _Remade:
    """How the start of an estimate that was plain data is made."""

    content: Mapping[str, Any]

    def __call__(self) -> Start:
        return Start.from_dict(self.content)


@final
@dataclass(frozen=True, eq=False)
class FlatStart:
    """A warm start in vectors: y `(*tasks, q)`, v alike or None; see `Start`."""

    y: Tensor
    v: Tensor | None = None
    count: int = 0

    def __post_init__(self) -> None:
        demand_types(self)


@final
@dataclass(frozen=True, eq=False)
class FlatEstimate:
    """An estimate in vectors: grad `(p,)`, value `()`, y `(*tasks, q)`; see `Estimate`.

    `value_error` is how far the value may be from Phi(x) to first order, which is |v'grad_y g|, where that is known:
    what a line search must not take for a change of Phi. With `of_steps` y is what steps with settings in x make of a
    start, whatever the inner problem is.
    """

    grad: Tensor
    value: Tensor
    y: Tensor
    reports: tuple[Report, ...]
    v: Tensor | None = None
    standard_error: float | None = None
    penalized: tuple[Tensor, float] | None = None
    bound: float | None = None
    note: str = ""
    bias: float | None = None
    value_error: float | None = None
    of_steps: bool = False
    substitute: Substitute | None = None
    multipliers: Multipliers | None = None

    def __post_init__(self) -> None:
        demand_types(self)


class AbstractRequiring(AbstractPortable, abc.ABC):
    """What declares what it requires of an inner problem: estimators, and whole algorithms."""

    @property
    def requires(self) -> frozenset[Property]:
        """What it requires of the inner problem: the strictest, a smooth minimization, unless it says otherwise.

        One place checks it before every estimate, so that an estimator is refused by name where its mathematics does
        not apply; and `check`, `compare` and "auto" read it.
        """
        return STRICTEST

    @property
    def solves_with(self) -> tuple[AbstractLinearSolver, ...]:
        """The linear solvers that it uses beside those among its fields; their demands are part of its own."""
        return ()

    def error_bound(self, about: Beforehand) -> Bound:
        """|estimate - h| <= total, before anything is computed, from the configuration; what `error_bound` returns.

        Of an algorithm it is that of the direction that x is moved along first.

        The functions of `bilevel.bounds` are what it is made of, with `AbstractInnerSolver.solution_bound` and
        `AbstractLinearSolver.relative_error` for the solvers.

        Raises:
            ValueError: if no bound is known for the configuration, as here, for one that says nothing.
        """
        raise ValueError(
            f"no bound is known for {type(self).__name__}. Bound a computed hypergradient by `certify`, or call the"
            f" function of `bilevel.bounds` that describes it."
        )


class AbstractEstimator(AbstractRequiring):
    """Estimates the hypergradient h = grad Phi(x), Phi(x) = f(x, y*(x)).

    An estimator is a frozen value that holds its solvers. It never raises for a failure to converge: that is in
    the reports. It refuses problems to which its mathematics does not apply by a ValueError that says why.
    """

    @property
    def takes_encoding(self) -> bool:
        """Whether it may be given z = encode(x) in the place of x, and the chain rule applied after.

        True for one that only forms products with derivatives of f and g; one that moves x, or states its error in x,
        must see x itself.
        """
        return False

    @property
    def forgets_start(self) -> bool:
        """Whether an estimate does not depend on where y and v start, but for the tolerances of its solvers.

        A run of estimates then starts each where the one before ended, which saves work and changes nothing. Where the
        start is part of the answer (a fixed number of steps), it begins each at y0. One that says nothing is taken to
        remember its start.
        """
        return False

    @property
    def online(self) -> bool:
        """Whether a run of `minimize` goes on with y and v by itself, although what it finds depends on where they are.

        For estimators of few steps, that never solve the inner problem to the end: y follows x as x moves. One that
        says nothing begins each estimate at y0, unless it forgets its start. Either can be asked for by `warm_start`.
        """
        return False

    @property
    def accurate(self) -> bool:
        """Whether h is the gradient of the value that comes with it, up to the tolerances of its solvers.

        True of one that is neither biased by construction (truncated, damped, of low rank, of first order, penalized),
        nor random, nor of a fixed number of steps. Where the data do not change either, `minimize` takes `QuasiNewton`
        by default, and else `Adam`. One that says nothing is taken to be inaccurate.
        """
        return False

    def with_seed(self, seed: int) -> AbstractEstimator | None:
        """This estimator, drawing its random numbers from another seed; None: it draws none.

        One that says nothing is taken to draw none: `bilevel run --seed` then says that it has no effect.
        """
        return None

    def certified(
        self,
        target_error: float | None,
        relative_error: float | None,
        constants: Constants | Callable[[Tree], Constants] | None,
    ) -> AbstractEstimator | None:
        """This estimator with targets for its certified error, the larger of which counts; None: it certifies none.

        Its estimates have a `bound`, which is at most max(target_error, relative_error |h|) where they succeed.
        `minimize(accuracy="adaptive")` asks for it, and refuses an estimator that says nothing.

        Args:
            target_error: the target for the bound; None: there is only the other.
            relative_error: the same, relative to |h|.
            constants: what is known of f and g, or a function of x that tells; None: what the estimator itself knows.
        """
        return None

    @abc.abstractmethod
    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        """The estimate at x `(p,)`, from a warm start; oracle calls are counted in `problem.tally`.

        Raises:
            ValueError: if the estimator does not apply to the problem.
        """
