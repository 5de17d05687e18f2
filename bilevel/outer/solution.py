"""What an outer run leaves: a record a step, where it ended, and the best that it saw."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel._estimate import COUNTS, Estimate
from bilevel._result import Stats, Status
from bilevel._tree import Tree
from bilevel.algorithms.outer_constraints import OuterConstraints
from bilevel.arguments.checked import checked as arguments
from bilevel.arguments.fits import demand_types
from bilevel.inner_problems.multipliers import Multipliers
from bilevel.outer.trial import Trial
from bilevel.portable.frames import frame
from bilevel.portable.html import card
from bilevel.portable.plain import checked, demanded, number, plain, refused, restored
from bilevel.portable.result import AbstractResult
from bilevel.portable.tensor_file import damaged, read_tensors, write_tensors


@final
@dataclass(frozen=True)
class Record:
    """One outer step.

    Attributes:
        step: which.
        value: Phi at the iterate, as the inner solution found it.
        grad_norm: |h|; with a constraint |x - P(x - h)|; plus the error bound, where one was asked for. Of an algorithm
            with another measure of stationarity, that measure: what `tol` is compared with.
        status: the estimate's status.
        stats: the oracle calls of this step: those since the record before.
        seconds: their wall-clock time.
        rejected: whether it is a trial point that a line search went back from: if the estimate failed there, that is
            no failure of the run.
        outer: violation and multipliers of the constraints on x and y*(x), where there are any.
    """

    step: int
    value: float
    grad_norm: float
    status: Status
    stats: Stats
    seconds: float
    rejected: bool = False
    outer: OuterConstraints | None = None

    def __post_init__(self) -> None:
        demand_types(self)

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data: the status by its name."""
        outer = None if self.outer is None else self.outer.as_dict()
        return {**asdict(self), "status": self.status.name, "outer": outer}

    @staticmethod
    @arguments("Record.from_dict")
    def from_dict(content: dict[str, Any]) -> Record:
        """The inverse of :meth:`as_dict`.

        Raises:
            ValueError: if it is no such data.
        """
        try:
            outer = None if content.get("outer") is None else OuterConstraints.from_dict(content["outer"])
            typed = {"status": Status[content["status"]], "stats": Stats(**content["stats"]), "outer": outer}
            return Record(**{**content, **typed})
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"`Record.from_dict(content=...)` must be what `as_dict` made. Got {error!r:.200}."
            ) from error


@final
@dataclass(frozen=True, eq=False)
class Best(AbstractResult):
    """The best iterate that a run has seen.

    That is the one of the lowest value, the later one of equals, among those that are in the constraint and whose
    estimate succeeded; where there is none of them, the first iterate.

    Values are compared only where they are of one function Phi: the data are the same at every step, and the algorithm
    solves the inner problem at each. Those of different batches, and those of a single loop such as `SOBA`, at whose
    inner iterate f may be anything, tell nothing: there it is the last iterate whose estimate succeeded, or, on the
    batches of a `FiniteSum`, the one of the least measure of stationarity on all the data. Where such a run is lost
    (`Status.lost`: it has diverged, or is no number any more), whatever its data are, the last iterates are those that
    ran away, and the best is the one of the least measure that was recorded, the start among them.

    Attributes:
        step: the step of its record.
        x: the iterate: the structure of x0.
        y: the inner solution there: the structure of y0.
        value: Phi(x).
        grad_norm: as in its record.
        compared: whether it was chosen by its value, or, on batches and where values are not Phi's, by its norm; False:
            it is the last one.
    """

    step: int
    x: Tree = field(repr=False)
    y: Tree = field(repr=False)
    value: float
    grad_norm: float
    compared: bool

    def __post_init__(self) -> None:
        demand_types(self)

    def to_dict(self) -> dict[str, Any]:
        """The iterate as plain data; :meth:`from_dict` is the inverse."""
        return {**vars(self), "x": plain(self.x, "x"), "y": plain(self.y, "y")}

    @staticmethod
    @arguments("Best.from_dict")
    def from_dict(content: Mapping[str, Any]) -> Best:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if it is no such data.
        """
        with refused("Best"):
            return Best(
                demanded(content, "step", int),
                restored(content["x"]),
                restored(content["y"]),
                number(content, "value"),
                number(content, "grad_norm"),
                demanded(content, "compared", bool),
            )


@final
@dataclass(frozen=True, eq=False)
class Solution(AbstractResult):
    """Where an outer run ended.

    Attributes:
        x: the last outer iterate: the structure of x0.
        y: the inner solution there, or the inner iterate: the structure of y0 (stacked in task mode).
        value: Phi(x).
        status: why the run stopped, or the worst status of an estimate on the way: `successful` if the tolerance was
            met, `steps_used_up` if the steps ended first and no tolerance was given, `max_steps` if one was;
            `stagnated` or `line_search_failed` if the outer method could go no further, `stopped` if the callback ended
            it.
        message: what to do about it; empty on success.
        stats: the oracle calls of the whole run.
        history: one record a step; the last is of x itself.
        estimate: the hypergradient at x, or the direction that the algorithm has for it.
        failed: whether something did not succeed that was asked for: an estimate, or the tolerance that was given. The
            outer method's own tolerance was not, and to miss it, or to go no further short of it, is no failure.
        converged: whether the tolerance was met at x: the one that was given, or the outer method's own. With
            accuracy="adaptive" that is certified.
        best: the best iterate.
        sweep: a row for each combination that was tried, where the run began with a sweep.
    """

    x: Tree = field(repr=False)
    y: Tree = field(repr=False)
    value: float
    status: Status
    message: str = field(repr=False)
    stats: Stats
    history: tuple[Record, ...] = field(repr=False)
    estimate: Estimate = field(repr=False)
    failed: bool
    converged: bool
    best: Best
    sweep: tuple[Trial, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def outer_constraints(self) -> OuterConstraints | None:
        """Violation and multipliers of the constraints on x and y*(x), if there are any: of the last record."""
        return self.history[-1].outer if self.history else None

    @property
    def multipliers(self) -> Multipliers | None:
        """Of the constraints on y at x, where there are any: those of `estimate`."""
        return self.estimate.multipliers

    def to_dict(self) -> dict[str, Any]:
        """The solution as nested dicts and lists of tensors, numbers and texts; :meth:`from_dict` is the inverse.

        `torch.save(solution.to_dict(), path)` is read by `torch.load(path, weights_only=True)`. The history is a list
        of what `Record.as_dict` makes.
        """
        return {
            "x": plain(self.x, "x"),
            "y": plain(self.y, "y"),
            "value": float(self.value),
            "status": self.status.name,
            "message": self.message,
            "stats": self.stats.as_dict(),
            "history": [record.as_dict() for record in self.history],
            "estimate": self.estimate.to_dict(),
            "failed": self.failed,
            "converged": self.converged,
            "best": self.best.to_dict(),
            "sweep": [trial.to_dict() for trial in self.sweep],
        }

    @staticmethod
    @arguments("Solution.from_dict")
    def from_dict(content: Mapping[str, Any]) -> Solution:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if it is no such data.
        """
        with refused("Solution"):
            return Solution(
                x=restored(content["x"]),
                y=restored(content["y"]),
                value=number(content, "value"),
                status=Status[demanded(content, "status", str)],
                message=demanded(content, "message", str),
                stats=Stats(**checked(content["stats"], **COUNTS)),
                history=tuple(map(_record, demanded(content, "history", list))),
                estimate=Estimate.from_dict(demanded(content, "estimate", dict)),
                failed=demanded(content, "failed", bool),
                converged=demanded(content, "converged", bool),
                best=Best.from_dict(demanded(content, "best", dict)),
                sweep=tuple(map(Trial.from_dict, content.get("sweep", ()))),
            )

    def to_pandas(self) -> Any:
        """The history as a `pandas.DataFrame`, a row for each record, with oracle counts as columns "stats.hvps", ...

        Raises:
            ImportError: if pandas is missing: `pip install "bilevel[pandas]"`.
        """
        return frame("Solution.to_pandas()", [record.as_dict() for record in self.history])

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        calls = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.stats.as_dict().items() if count)
        first, last = (self.history[0], self.history[-1]) if self.history else (None, None)
        norms = "" if first is None or last is None else f"{first.grad_norm:.2e} -> {last.grad_norm:.2e}"
        values = f"{self.value:.6g}" if first is None else f"{first.value:.6g} -> {self.value:.6g}"
        rows = [
            ("status", self.status.name + ("" if self.converged else ", not converged")),
            ("message", self.message),
            ("Phi", values),
            ("|h|", norms),
            ("best", f"{self.best.value:.6g} at step {self.best.step}"),
            ("steps", str(max(0, len(self.history) - 1))),
            ("seconds", f"{sum(record.seconds for record in self.history):.2f}"),
            ("calls", calls),
        ]
        return card("Solution", rows)

    @arguments("Solution.save")
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the solution with its history to one file in the format safetensors; see `Estimate.save`.

        Raises:
            ImportError: if safetensors is missing: `pip install "bilevel[safetensors]"`.
        """
        write_tensors(path, "Solution", {**self.to_dict(), "history": columns(self.history)})

    @staticmethod
    @arguments("Solution.load")
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Solution:
        """Read what :meth:`save` wrote. Nothing in the file is executed, and no module is imported for it.

        Args:
            path: the file.
            device: where its tensors go.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or holds something else.
            ImportError: if safetensors is missing.
        """
        with damaged(path, "Solution"):
            content = read_tensors(path, "Solution", device)
            return Solution.from_dict({**content, "history": records(content["history"])})


def _record(content: Mapping[str, Any]) -> Record:
    outer = content.get("outer")
    own = checked({name: value for name, value in content.items() if name != "outer"}, **_RECORD)
    own["outer"] = outer
    return Record.from_dict({**own, "stats": checked(own["stats"], **COUNTS)})


_NUMBER = (float, int)
_RECORD: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("step",), int),
    **dict.fromkeys(("value", "grad_norm", "seconds"), _NUMBER),
    **{"status": str, "stats": dict, "rejected": bool},
}
_FLOATS = ("value", "grad_norm", "seconds")
_OUTER = ("violation", "complementarity", "weight", "inequalities", "equalities")


def columns(history: Sequence[Record]) -> dict[str, Any]:
    """Records by columns, as tensors: some 90 bytes each, and every bit of their numbers."""
    names = sorted({record.status.name for record in history})
    counts = [list(record.stats.as_dict().values()) for record in history]
    return {
        "statuses": names,
        "status": torch.tensor([names.index(record.status.name) for record in history], dtype=torch.uint8),
        "step": torch.tensor([record.step for record in history], dtype=torch.int64),
        "rejected": torch.tensor([record.rejected for record in history], dtype=torch.bool),
        "stats": torch.tensor(counts, dtype=torch.int64).reshape(len(history), len(Stats().as_dict())),
        "counted": list(Stats().as_dict()),
        **{name: torch.tensor([getattr(r, name) for r in history], dtype=torch.float64) for name in _FLOATS},
        **_outer_columns([record.outer for record in history]),
    }


def _outer_columns(told: Sequence[OuterConstraints | None]) -> dict[str, Any]:
    """What is known of constraints on x, where every record tells: all have as many of them."""
    known = [each for each in told if each is not None]
    if not known or len(known) < len(told):
        return {}
    one = {name: [getattr(each, name) for each in known] for name in _OUTER}
    return {"outer": {name: torch.tensor(values, dtype=torch.float64) for name, values in one.items()}}


def records(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inverse of :func:`columns`, as plain data.

    Raises:
        ValueError: if columns are missing, or are not of one length.
    """
    names, counted = demanded(content, "statuses", list), demanded(content, "counted", list)
    one = {name: demanded(content, name, Tensor).tolist() for name in ("step", "status", "rejected", *_FLOATS)}
    rows = zip(*one.values(), demanded(content, "stats", Tensor).tolist(), strict=True)
    found = []
    for *values, counts in rows:
        record = dict(zip(one, values, strict=True))
        stats = dict(zip(counted, counts, strict=True))
        found.append({**record, "status": names[record["status"]], "stats": stats})
    if "outer" in content:
        told = [demanded(content["outer"], name, Tensor).tolist() for name in _OUTER]
        for record, own in zip(found, zip(*told, strict=True), strict=True):
            record["outer"] = dict(zip(_OUTER, own, strict=True))
    return found
