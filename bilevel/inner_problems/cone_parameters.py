"""Parameters of a cone program: what they are called, and which values they may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_SLACK = 1e-9  # of the size of a value: what rounding may take it outside


@final
@dataclass(frozen=True)
class Parameter:
    """A parameter, and its place among the entries that x gives.

    Attributes:
        name: for messages.
        shape: of its value.
        start: the first of its entries, row by row.
        domain: what was declared of it, and is used where the problem is found to be convex: "nonneg", "pos", "nonpos",
            "neg", "PSD", "NSD", "symmetric", "diag".
    """

    name: str
    shape: tuple[int, ...]
    start: int
    domain: frozenset[str] = frozenset()

    def violated(self, values: Tensor) -> str:
        """Which declaration the values `(rows, *shape)` do not meet; empty: none."""
        slack = _SLACK * float(values.abs().max()) if values.numel() else 0.0
        signs = {"nonneg": 1.0, "pos": 1.0, "nonpos": -1.0, "neg": -1.0}
        for name, sign in signs.items():
            if name in self.domain and bool((sign * values < -slack).any()):
                return name
        if self.domain & {"symmetric", "PSD", "NSD"} and bool(((values - values.mT).abs() > slack).any()):
            return "symmetric"
        if "diag" in self.domain and bool(
            ((values - torch.diag_embed(values.diagonal(0, -2, -1))).abs() > slack).any()
        ):
            return "diag"
        for name, sign in (("PSD", 1.0), ("NSD", -1.0)):
            if name in self.domain and bool((torch.linalg.eigvalsh(sign * values) < -max(slack, 1e-12)).any()):
                return name
        return ""


def demand_domains(parameters: tuple[Parameter, ...], given: Tensor) -> None:
    """Refuse values outside of what was declared: what the problem was found convex for.

    Args:
        parameters: the parameters.
        given: their values `(rows, entries)`; NaN is left to the solver.

    Raises:
        ValueError: naming the parameter.
    """
    for each in parameters:
        size = torch.Size(each.shape).numel()
        values = given[:, each.start : each.start + size].reshape(-1, *each.shape)
        if not each.domain or not bool(values.isfinite().all()):
            continue
        why = each.violated(values)
        if why:
            raise ValueError(
                f"`from_cvxpy(parameters=...)`: {each.name} was declared {why!r}, for which the problem is convex. Got"
                f" values that are not. Keep x where they are, or have `values=` map it there (`x.exp()`)."
            )
