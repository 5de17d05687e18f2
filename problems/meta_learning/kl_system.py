"""The linear system of the implicit gradient of a variational method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final, get_args

from bilevel._validate import demand_types
from bilevel.problems.meta_learning.kl_products import Form


@final
@dataclass(frozen=True)
class KLSystem:
    """(H + damping I) v = grad_y f, by conjugate gradients with the divergence's diagonal as preconditioner.

    H is that of `KLProducts`, the preconditioner `KLDiagonal`.

    Attributes:
        steps: of conjugate gradients; all are taken.
        damping: see there.
        form: how the divergence's second derivatives are evaluated, "autograd" or "substituted"; see `KLProducts`.

    Raises:
        ValueError: if a number is out of range, or the form is not known.

    Example:
        >>> KLSystem(steps=10, form="substituted").damping
        0.0
    """

    steps: int
    damping: float = 0.0
    form: Form = "autograd"

    def __post_init__(self) -> None:
        demand_types(self)
        if self.steps < 1:
            raise ValueError(f"`KLSystem(steps=...)` must be at least 1. Got {self.steps}.")
        if not self.damping >= 0:
            raise ValueError(f"`KLSystem(damping=...)` must be at least 0. Got {self.damping}.")
        if self.form not in get_args(Form):
            allowed = " or ".join(map(repr, get_args(Form)))
            raise ValueError(f"`KLSystem(form=...)` must be {allowed}. Got {self.form!r}.")
