"""What a check of a problem found."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, final

from bilevel.arguments.fits import demand_types
from bilevel.portable.folded import folded
from bilevel.portable.html import grid


class Outcome(enum.Enum):
    """How a test of a problem came out."""

    passed = "ok"
    warning = "note"
    failed = "FAIL"


@final
@dataclass(frozen=True)
class Verdict:
    """One test: its name, how it came out, what was found, and what to do."""

    name: str
    outcome: Outcome
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        demand_types(self)


@final
@dataclass(frozen=True)
class Check:
    """The verdicts on a problem; print it.

    Attributes:
        verdicts: in the order in which they build on each other.
        dependence: how y depends on x: "inner objective", "start", "both" or "none"; empty if that is unknown.
        estimators: for each name of `bilevel.estimators()`, why it does not apply, or an empty string if it does.
    """

    verdicts: tuple[Verdict, ...]
    dependence: str
    estimators: dict[str, str] = field(repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def ok(self) -> bool:
        """Whether no test failed."""
        return all(verdict.outcome is not Outcome.failed for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """The verdicts as plain data."""
        return {
            "ok": self.ok,
            "dependence": self.dependence,
            "verdicts": [
                {"name": v.name, "outcome": v.outcome.value, "found": v.found, "remedy": v.remedy}
                for v in self.verdicts
            ],
            "estimators": dict(self.estimators),
        }

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = [(v.name, v.outcome.value, v.found + (f" -> {v.remedy}" if v.remedy else "")) for v in self.verdicts]
        apply = [name for name, why in self.estimators.items() if not why]
        notes = [f"estimators that apply: {', '.join(apply) or 'none'}"]
        return grid("Check: " + ("ok" if self.ok else "failed"), ("test", "outcome", "found"), rows, notes)

    def __str__(self) -> str:
        width = max(len(v.name) for v in self.verdicts)
        lines = []
        for v in self.verdicts:
            lines.append(folded(v.found, f"{v.outcome.value:>4}  {v.name:<{width}}  "))
            if v.remedy:
                lines.append(folded(v.remedy, f"{'':>4}  {'':<{width}}  -> "))
        apply = [name for name, why in self.estimators.items() if not why]
        lines.append(folded(f"estimators that apply: {', '.join(apply) or 'none'}", rest="  "))
        refused: dict[str, list[str]] = {}
        for name, why in self.estimators.items():
            if why:
                refused.setdefault(why, []).append(name)
        lines += [folded(f"not {', '.join(names)}: {why}", "  ", "    ") for why, names in refused.items()]
        return "\n".join(lines)
