"""Error bounds as values: the constants that they assume, and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, final

from bilevel._result import Stats
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.portable.html import card

Source: TypeAlias = Literal["given", "structural", "estimated"]
# the constants that are upper bounds
UPPER = ("L", "L_fyy", "L_fxy", "M_yy", "M_xy", "C_G", "L_f_minus", "L_cyy", "L_cxy", "M_cyy", "M_cxy")
_SLACK = 1e-9  # mu = L of a multiple of the identity, each computed in its own way
LOCAL = frozenset({"mu", "L", "C_G"})  # those that certificates can extend from the point where they were measured


@final
class NonfiniteError(ArithmeticError):
    """NaN or Inf was met: there is nothing to bound."""


@final
@dataclass(frozen=True)
class Constants:
    """What is known of f and g along the segment from y to y*(x); every constant is an upper bound but mu.

    Each constant is kept apart, never lumped into one L; None means unknown. Derivatives in x are those in the x that
    the hypergradient is of: with an `encode`, those of f(encode(x), y) and g(encode(x), y).

    Attributes:
        mu: strong convexity of g(x, .): a lower bound on the eigenvalues of d2g/dy2. None: none is known, which
            leaves the local theorem, at a strict local minimum.
        L: an upper bound on them.
        L_fyy: Lipschitz constant in y of grad_y f.
        L_fxy: Lipschitz constant in y of grad_x f.
        M_yy: Lipschitz constant in y of d2g/dy2.
        M_xy: Lipschitz constant in y of d2g/dxdy.
        C_G: a bound on the norm of d2g/dxdy. None: bounded from the operator at y, with a stated confidence.
        L_f_minus: a bound on the most negative curvature of f in y: 0 where f is convex in y. None: L_fyy.
        radius: the constants hold for points within this distance of y*(x), and y is known to be among them, by the
            convexity of g or otherwise; without mu, and under nonlinear constraints or rows that turn with x, within
            this distance of the y that is certified.
        source: where they come from: "given" by the user, "structural" (from the formula of a problem), or
            "estimated" from products.
        heuristic: the names of those that are estimates without a guarantee.
        confidence: the probability that the other estimated ones hold.
        local: the names of those among mu, L and C_G that were measured at y only: certificates extend them along the
            segment, by M_yy and M_xy.
        L_cyy: of constraints c on y, all of them together, equalities and the rows of a `Polytope` included: the
            Lipschitz constant in y of grad_y c as a matrix, which bounds |sum_i u_i d2c_i/dy2| / |u|. 0 where c is
            affine in y.
        L_cxy: the same of grad_x c. 0 where c is c_1(y) + c_2(x).
        M_cyy: the Lipschitz constant in y of sum_i u_i d2c_i/dy2, over |u|. 0 where c is quadratic in y.
        M_cxy: the same of sum_i u_i d2c_i/dxdy.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if mu is not positive, another constant is negative, or one is not finite; if mu exceeds L; if
            `radius`, `confidence`, `source`, `heuristic` or `local` is none of what it may be.

    Example:
        >>> Constants(mu=0.1, L=1.0).kappa
        10.0
    """

    mu: float | None
    L: float | None = None
    L_fyy: float | None = None
    L_fxy: float | None = None
    M_yy: float | None = None
    M_xy: float | None = None
    C_G: float | None = None
    L_f_minus: float | None = None
    radius: float = math.inf
    source: Source = "given"
    heuristic: frozenset[str] = frozenset()
    confidence: float = 1.0
    local: frozenset[str] = frozenset()
    L_cyy: float | None = None
    L_cxy: float | None = None
    M_cyy: float | None = None
    M_cxy: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        if self.mu is not None and not 0 < self.mu < math.inf:
            raise ValueError(
                f"`Constants(mu=...)` must be positive and finite: g must be strongly convex in y. Got {self.mu}."
                f" Leave it None if no mu is known."
            )
        for name in UPPER:
            constant = getattr(self, name)
            if constant is not None and not 0 <= constant < math.inf:
                raise ValueError(
                    f"`Constants({name}=...)` must be at least 0 and finite, or None if unknown. Got {constant}."
                )
        both = self.mu is not None and self.L is not None and not self.local & {"mu", "L"}
        if both and self.mu > self.L * (1 + _SLACK):  # type: ignore[operator]
            raise ValueError(
                f"`Constants(mu=..., L=...)` must be bounds on the same eigenvalues, mu <= L. Got mu = {self.mu:g} and"
                f" L = {self.L:g}."
            )
        if not self.radius > 0 or not 0 < self.confidence <= 1:
            raise ValueError(
                f"`Constants(radius=..., confidence=...)` needs radius > 0 and 0 < confidence <= 1. Got {self.radius}"
                f" and {self.confidence}."
            )
        for name, known in (("heuristic", {"mu", *UPPER}), ("local", LOCAL)):
            unknown = set(getattr(self, name)) - known
            if unknown:
                raise ValueError(
                    f"`Constants({name}=...)` must name constants among {', '.join(sorted(known))}. Got"
                    f" {', '.join(sorted(map(repr, unknown)))}."
                )

    @property
    def kappa(self) -> float | None:
        """The condition number L / mu of the inner Hessian; None if either is unknown."""
        return None if self.L is None or self.mu is None else self.L / self.mu


@final
@dataclass(frozen=True)
class Assumption:
    """One constant that a certificate rests on.

    Attributes:
        name: which.
        value: its value, as it entered the bound.
        source: where it came from, in words.

    Example:
        >>> print(Assumption("mu", 0.1, "given"))
        mu = 0.1 (given)
    """

    name: str
    value: float
    source: str

    def __post_init__(self) -> None:
        demand_types(self)

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.3g} ({self.source})"


@final
@dataclass(frozen=True, eq=False)
class Certificate:
    """A bound on |z - h(x)| for an estimate z of the hypergradient h, and everything that it rests on.

    Attributes:
        bound: the bound; infinite where the theorem does not apply (see `reason`).
        terms: its parts: "inner" (the inner solution), "linear" (the linear system), "estimate" (the distance from z
            to the implicit gradient that was certified), "rounding"; or, where that is less, "estimate" (the distance
            to the refined hypergradient) and "refined" (its bound).
        theorem: "A" (global mu), "B" (local, Newton-Kantorovich), "penalty" (first-order), "manifold" (A or B there),
            "face" (A or B there) or "kkt" (Newton-Kantorovich for the optimality conditions under constraints).
        proven: whether the bound is a theorem given `assumed`; otherwise some constant is a heuristic.
        confidence: the probability that the constants hold which were bounded from products.
        assumed: the constants, with their sources.
        distance: the bound on |y - y*(x)|.
        grad_norm: |z|.
        stats: the oracle calls that certifying took.
        refined: where asked for, a better hypergradient: after one Newton correction of y.
        refined_bound: its own error bound; infinite where the theorem does not apply there.
        reason: why the bound is infinite or not proven; empty otherwise.
        remark: where the bound is valid and not below |z|, so that it says little: why, and what helps; else empty.
    """

    bound: float
    terms: Mapping[str, float] = field(repr=False)
    theorem: str
    proven: bool
    confidence: float
    assumed: tuple[Assumption, ...] = field(repr=False)
    distance: float = field(repr=False)
    grad_norm: float = field(repr=False)
    stats: Stats = field(repr=False)
    refined: Tree | None = field(default=None, repr=False)
    refined_bound: float | None = None
    reason: str = ""
    remark: str = ""

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def descent(self) -> bool:
        """Whether -z is certainly a descent direction of Phi: bound < |z| implies <z, h> > 0."""
        return self.bound < self.grad_norm

    @property
    def norm_interval(self) -> tuple[float, float]:
        """An interval that holds |h(x)|: [|z| - bound, |z| + bound], cut at 0 and rounded outward."""
        ulps = 1e-15 * (self.grad_norm + self.bound)
        return max(0.0, self.grad_norm - self.bound - ulps), self.grad_norm + self.bound + ulps

    def as_dict(self) -> dict[str, Any]:
        """Everything but the refined hypergradient as plain data; what is not finite is None, as JSON has no such."""
        low, high = self.norm_interval
        content = {
            "bound": self.bound,
            "terms": dict(self.terms),
            "theorem": self.theorem,
            "proven": self.proven,
            "confidence": self.confidence,
            "assumed": [asdict(assumption) for assumption in self.assumed],
            "distance": self.distance,
            "grad_norm": self.grad_norm,
            "norm_interval": [low, high],
            "descent": self.descent,
            "refined_bound": self.refined_bound,
            "stats": self.stats.as_dict(),
            "reason": self.reason,
            "remark": self.remark,
        }
        plain: dict[str, Any] = _finite(content)
        return plain

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        low, high = self.norm_interval
        sure = "" if self.confidence == 1 else f", with probability {self.confidence:.3g}"
        rows = [
            ("|grad - h|", f"<= {self.bound:.3g} ({'proven' if self.proven else 'heuristic'}{sure})"),
            ("theorem", self.theorem),
            ("parts", ", ".join(f"{name} {value:.3g}" for name, value in self.terms.items() if value > 0)),
            ("|h|", f"{low:.3g} to {high:.3g}"),
            ("-grad is", "a descent direction" if self.descent else "not known to be a descent direction"),
            ("assumed", "; ".join(map(str, self.assumed))),
            ("note", " ".join(text for text in (self.reason, self.remark) if text)),
        ]
        return card("Certificate", rows)

    def __str__(self) -> str:
        kind = "proven" if self.proven else "heuristic"
        if self.confidence < 1:
            kind += f", with probability {self.confidence:.3g}"
        parts = ", ".join(f"{name} {value:.3g}" for name, value in self.terms.items() if value > 0)
        lines = [f"|grad - h| <= {self.bound:.3g}  ({kind}; theorem {self.theorem})", f"  parts: {parts or 'none'}"]
        lines.append("  assumed: " + "; ".join(map(str, self.assumed)))
        low, high = self.norm_interval
        verdict = "a descent direction" if self.descent else "not known to be a descent direction"
        lines.append(f"  so {low:.3g} <= |h| <= {high:.3g}, and -grad is {verdict}")
        lines += [f"  note: {text}" for text in (self.reason, self.remark) if text]
        return "\n".join(lines)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
