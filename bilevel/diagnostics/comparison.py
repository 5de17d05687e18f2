"""What a comparison of estimators found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, final

from bilevel._result import Stats, Status
from bilevel.arguments.fits import demand_types
from bilevel.portable.colors import style
from bilevel.portable.folded import COLUMNS, folded
from bilevel.portable.frames import frame
from bilevel.portable.html import grid

_HEAD = ("estimator", "budget", "error/|h|", "certified", "std. error", "1-cos", "calls", "ms", "MB", "status")
_NARROW = ("estimator", "budget", "error", "bound", "std.", "1-cos", "calls", "ms", "MB", "ok")  # in 80 columns
_WORDS = {"error": "that of the hypergradient", "bound": "what is certified of it", "std.": "its standard error"}


@final
@dataclass(frozen=True)
class Row:
    """One estimator at one budget.

    Attributes:
        name: which.
        budget: how many oracle calls it was given; None: its own tolerances.
        error: |h_estimated - h_reference|.
        relative: the same over |h_reference|.
        cosine: of the angle between the two.
        certificate: the bound on the error; None without constants.
        standard_error: for estimators that sample.
        stats: oracle calls.
        seconds: wall-clock time, of the faster of two calls.
        memory: the most bytes of tensors held at once.
        status: the name of the estimate's status.
        reason: why it does not apply, or what did not succeed; empty otherwise.
        substitute: which linear system it solved by design in the place of H v = grad_y f, and with which residual
            against H itself; empty: none.
    """

    name: str
    budget: int | None
    error: float | None = None
    relative: float | None = None
    cosine: float | None = None
    certificate: float | None = None
    standard_error: float | None = None
    stats: Stats | None = None
    seconds: float | None = None
    memory: int | None = None
    status: str = ""
    reason: str = ""
    substitute: str = ""

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def applies(self) -> bool:
        """Whether the estimator gave a number."""
        return self.error is not None

    @property
    def cost(self) -> int | None:
        """Oracle calls with derivatives of g: gradients, Hessian products and cross products."""
        s = self.stats
        return None if s is None else s.gradients + s.hvps + s.cross_products


@final
@dataclass(frozen=True)
class Comparison:
    """The estimators on one problem; print it, or plot it.

    Attributes:
        rows: one for each estimator and budget.
        norm: |h| of the reference.
        reference: how the reference was computed.
        reference_error: its own certified error where constants are known, else its two-level estimate, else how far
            it is from differences of Phi, or those of two lengths from each other.
    """

    rows: tuple[Row, ...]
    norm: float
    reference: str
    reference_error: float = field(default=float("nan"))

    def __post_init__(self) -> None:
        demand_types(self)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {
            "norm": self.norm,
            "reference": self.reference,
            "reference_error": self.reference_error,
            "rows": [asdict(row) for row in self.rows],
        }

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`, with oracle counts as columns "stats.hvps", ...

        Raises:
            ImportError: if pandas is missing: `pip install "bilevel[pandas]"`.
        """
        return frame("Comparison.to_pandas()", [asdict(row) for row in self.rows])

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return grid(self._title, _HEAD, [self._cells(row) for row in self.rows if row.applies], self._notes())

    def __str__(self) -> str:
        applying = [row for row in self.rows if row.applies]
        table = [_NARROW, *((*self._cells(row)[:-1], _answer(row)) for row in applying)]
        shown = [i for i in range(len(_NARROW)) if i == 0 or any(line[i] for line in table[1:])]  # no empty columns
        widths = [max(len(line[i]) for line in table) for i in range(len(_NARROW))]
        roomy = sum(widths[i] + 2 for i in shown) - 2 <= COLUMNS
        lines = [
            ("  " if roomy else " ").join(
                line[i].ljust(widths[i]) if i == 0 else line[i].rjust(widths[i]) for i in shown
            )
            for line in table
        ]
        units = ", ".join(f"{name}: {_WORDS[name]}" for i, name in enumerate(_NARROW) if i in shown and name in _WORDS)
        units += "; in units of |h|"
        failed = [f"{row.name}: {row.status}" for row in applying if _answer(row) == "no"]
        notes = [folded(note, rest="  ") for note in dict.fromkeys((self._title, units, *failed, *self._notes()))]
        return "\n".join(line.rstrip() for line in (notes[0], *lines, *notes[1:]))

    @property
    def _title(self) -> str:
        known = f"known to within {self.reference_error:.2g}" if self.reference_error >= 0 else "of unknown accuracy"
        return f"|h| = {self.norm:.6g} by {self.reference}, {known}"

    def _notes(self) -> list[str]:
        lines = []
        if any(row.certificate is not None and self.norm < row.certificate < math.inf for row in self.rows):
            lines.append("certified errors above 1 are valid and say little: the remark of `certify(...)` says why")
        lines += [f"{row.name} solves another system: {row.substitute}" for row in self.rows if row.substitute]
        return lines + [f"not {row.name}: {row.reason}" for row in self.rows if not row.applies]

    def _cells(self, row: Row) -> tuple[str, ...]:
        def number(value: float | None, form: str = ".1e") -> str:
            return "" if value is None else f"{value:{form}}"

        scale = self.norm or 1.0
        return (
            row.name,
            "" if row.budget is None else str(row.budget),
            number(row.relative),
            number(None if row.certificate is None else row.certificate / scale),
            number(None if row.standard_error is None else row.standard_error / scale),
            number(None if row.cosine is None else max(0.0, 1 - row.cosine)),
            str(row.cost),
            number(None if row.seconds is None else 1e3 * row.seconds, ".3g"),
            number(None if row.memory is None else row.memory / 1e6, ".2g"),
            row.status,
        )

    def plot(self, figure: Any) -> None:
        """Error against oracle calls, one line an estimator, its certificate dashed, on a matplotlib figure."""
        if not callable(getattr(figure, "subplots", None)):
            raise TypeError(
                f"`Comparison.plot(figure=...)` must be a figure of matplotlib. Got {type(figure).__name__}."
            )
        axes = figure.subplots()
        names = list(dict.fromkeys(row.name for row in self.rows if row.applies))
        scale = self.norm or 1.0
        for index, name in enumerate(names):
            rows = sorted((r for r in self.rows if r.name == name and r.applies), key=lambda r: r.cost or 0)
            color, marker = style(index)
            errors = [max(r.relative or 0.0, 1e-17) for r in rows]
            axes.plot([r.cost for r in rows], errors, linestyle="-", color=color, marker=marker, label=name)
            if all(r.certificate is not None for r in rows):
                axes.plot(
                    [r.cost for r in rows], [(r.certificate or 0.0) / scale for r in rows], ".--", color=color, lw=0.8
                )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="gradients + Hessian products + cross products",
            ylabel="relative error (dashed: certificate)",
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside the lines


def _answer(row: Row) -> str:
    """Whether the estimate succeeded, in a word; empty where there is no status."""
    if row.status not in Status.__members__:
        return row.status
    return "yes" if Status[row.status].ok else "no"
