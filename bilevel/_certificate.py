"""The constants that error bounds are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Constants:
    """What is known of f and g along the segment from y to y*(x); every constant is an upper bound but mu.

    Each constant is kept apart, never lumped into one L; None means unknown.

    Attributes:
        mu: strong convexity of g(x, .): a lower bound on the eigenvalues of d2g/dy2.
        L: an upper bound on them.
        L_fyy: Lipschitz constant in y of grad_y f.
        L_fxy: Lipschitz constant in y of grad_x f.
        M_yy: Lipschitz constant in y of d2g/dy2.
        M_xy: Lipschitz constant in y of d2g/dxdy.
        C_G: a bound on the norm of d2g/dxdy.

    Raises:
        ValueError: if mu is not positive or another constant is negative.

    Example:
        >>> Constants(mu=0.1, L=1.0).kappa
        10.0
    """

    mu: float
    L: float | None = None
    L_fyy: float | None = None
    L_fxy: float | None = None
    M_yy: float | None = None
    M_xy: float | None = None
    C_G: float | None = None

    def __post_init__(self) -> None:
        if not self.mu > 0:
            raise ValueError(f"`Constants(mu=...)` must be positive: g must be strongly convex in y. Got {self.mu}.")
        for name in ("L", "L_fyy", "L_fxy", "M_yy", "M_xy", "C_G"):
            constant = getattr(self, name)
            if constant is not None and not constant >= 0:
                raise ValueError(f"`Constants({name}=...)` must be at least 0, or None if unknown. Got {constant}.")

    @property
    def kappa(self) -> float | None:
        """The condition number L / mu of the inner Hessian; None if L is unknown."""
        return None if self.L is None else self.L / self.mu
