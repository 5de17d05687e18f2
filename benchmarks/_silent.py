"""Problems on which a hypergradient is easily wrong without a word: a number must be right, or something must be said.

Said is an exception, a warning, or in this library a status, which raises; a number that is none of the problem's, or
that is wrong, without any of these, is silent. Each case is asked of every library in the way of the other tables, with
the settings that its documentation recommends where the case leaves a choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from _workloads import Workload
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

P, Q = 4, 6
PURE = "functions are pure: nothing is drawn anew, and arrays are immutable"
TORCH = "an option of torch"
ON_PURPOSE = "`stop_gradient` is written on purpose, and `float()` raises"
ABSOLUTE = "its tolerance is absolute"


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: what is wrong, or easily overlooked.
        kind: by which method it is asked: "cg", "neumann" or "unrolled".
        workload: makes the problem, and the hypergradient; None where there is none, so that something must be said.
        count: products, or inner steps.
        tolerance: of the linear system.
        right: which relative error is right.
        calls: how often one object is asked.
        inapplicable: by library, why the case does not apply to it.
    """

    name: str
    kind: str
    workload: Callable[[], tuple[Workload, Tensor | None]]
    count: int = Q
    tolerance: float = 1e-12
    right: float = 1e-7
    calls: int = 1
    inapplicable: Mapping[str, str] = field(default_factory=dict)


def _stopped(value: Any) -> Any:
    """The value without its graph, of torch or of jax."""
    if isinstance(value, Tensor):
        return value.detach()
    import jax

    return jax.lax.stop_gradient(value)


def _exp(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.exp()
    import jax.numpy as jnp

    return jnp.exp(value)


def _made(
    inner: Callable[..., Any], outer: Callable[..., Any], arrays: dict[str, Tensor], x: Tensor, y: Tensor, step: float
) -> Workload:
    return Workload("silent", arrays, outer, inner, outer, inner, x, (y,), step)


def _target(a: Any, x: Any, ys: Any) -> Any:  # noqa: ARG001
    return ((ys[0] - a["t"]) ** 2).sum() / 2


def _quadratic(kappa: float = 10.0) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """A, B and t, x, y* and h of g = y'Ay/2 - y'Bx, f = |y - t|^2 / 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rotation = torch.linalg.qr(normal(Q, Q)).Q
    A = (
        rotation
        @ torch.diag(torch.logspace(0, torch.tensor(kappa).log10().item(), Q, dtype=torch.float64))
        @ rotation.mT
    )
    B, x, t = normal(Q, P), normal(P), normal(Q)
    y = torch.linalg.solve(A, B @ x)
    return {"A": A, "B": B, "t": t}, x, y, B.mT @ torch.linalg.solve(A, y - t)


def _g(a: Any, x: Any, ys: Any) -> Any:
    return ys[0] @ (a["A"] @ ys[0]) / 2 - ys[0] @ (a["B"] @ x)


def _one_step() -> tuple[Workload, Tensor]:
    """One step of 1 / L lands on y*, from where the cross derivative is not yet that of y*."""
    x = torch.tensor([0.3], dtype=torch.float64)
    y = x * (-x).exp()
    return _made(
        lambda a, x, ys: (_exp(x) * ys[0] ** 2 / 2 - x * ys[0]).sum(),  # noqa: ARG005
        lambda a, x, ys: ((ys[0] - 1) ** 2).sum(),  # noqa: ARG005
        {},
        x,
        torch.zeros_like(x),
        float((-x).exp()),
    ), 2 * (y - 1) * (-x).exp() * (1 - x)


def _few_steps() -> tuple[Workload, Tensor]:
    """y_5 = (I - (I - aA)^5) A^-1 B x from zero, which another start would change."""
    a, x, y, _ = _quadratic()
    step = 0.1
    left = torch.linalg.matrix_power(torch.eye(Q, dtype=torch.float64) - step * a["A"], 5)
    end = y - left @ y
    J = torch.linalg.solve(a["A"], a["B"]) - left @ torch.linalg.solve(a["A"], a["B"])
    return _made(_g, _target, a, x, torch.zeros_like(y), step), J.mT @ (end - a["t"])


def _detached_f() -> tuple[Workload, Tensor]:
    a, x, y, h = _quadratic()
    return _made(_g, lambda a, x, ys: _target(a, x, [_stopped(ys[0])]), a, x, y, 0.1), h


def _detached_g() -> tuple[Workload, Tensor]:
    a, x, y, h = _quadratic()
    return _made(lambda a, x, ys: _g(a, _stopped(x), ys), _target, a, x, y, 0.1), h


def _at_zero(build: Callable[[], tuple[Workload, Tensor]]) -> Callable[[], tuple[Workload, Tensor]]:
    """The same from y0 = 0, for unrolling."""

    def made() -> tuple[Workload, Tensor]:
        workload, h = build()
        arrays, x, (y,) = workload.arrays, workload.x, workload.ys
        return _made(workload.inner, workload.outer, arrays, x, torch.zeros_like(y), workload.step), h

    return made


def _not_solved() -> tuple[Workload, Tensor]:
    a, x, y, h = _quadratic()
    return _made(_g, _target, a, x, 7 * y, 0.1), h


def _kink() -> tuple[Workload, Tensor]:
    """y* = 3x sits on the kink of |y - 3x|, and moves with it."""
    x = torch.tensor([0.7, -0.4], dtype=torch.float64)
    a = {"t": torch.ones(2, dtype=torch.float64)}
    return _made(
        lambda a, x, ys: ((ys[0] - x) ** 2).sum() / 2 + 10 * abs(ys[0] - 3 * x).sum(),  # noqa: ARG005
        _target,
        a,
        x,
        3 * x,
        0.05,
    ), 3 * (3 * x - a["t"])


def _maximum() -> tuple[Workload, None]:
    a, x, y, _ = _quadratic()
    return _made(lambda a, x, ys: -_g(a, x, ys), _target, a, x, y, 0.1), None


def _ill_conditioned() -> tuple[Workload, Tensor]:
    a, x, y, h = _quadratic(1e4)
    return _made(_g, _target, a, x, y, 1e-4), h


def _tiny() -> tuple[Workload, Tensor]:
    a, x, y, h = _quadratic()
    single = {name: value.float() for name, value in a.items()}
    scale = 1e-22  # whose square is no float32
    return _made(
        lambda a, x, ys: scale * _g(a, x, ys),
        lambda a, x, ys: scale * _target(a, x, ys),
        single,
        x.float(),
        y.float(),
        0.1 / scale,
    ), scale * h


def _random() -> tuple[Workload, None]:
    a, x, y, _ = _quadratic()

    def inner(a: Any, x: Any, ys: Any) -> Any:
        kept = (torch.rand(Q, dtype=torch.float64) > 0.2).double() / 0.8  # dropout
        return _g(a, x, [ys[0] * kept])

    return _made(inner, _target, a, x, y, 0.1), None


def _embedding(**options: Any) -> Callable[[], tuple[Workload, Tensor | None]]:
    def made() -> tuple[Workload, Tensor | None]:
        a, x, _, _ = _quadratic()
        index = torch.tensor([0, 0, 0, 1, 2])

        def inner(a: Any, x: Any, ys: Any, **options: Any) -> Any:
            rows = F.embedding(index, ys[0].reshape(3, 2), **options)
            return ((rows.sum(1) - (a["B"] @ x)[:5]) ** 2).sum() / 2 + (ys[0] ** 2).sum() / 2

        def plain(x: Tensor) -> Tensor:
            H = torch.autograd.functional.hessian(
                lambda y: inner(a, x, [y]), torch.zeros(Q, dtype=torch.float64), create_graph=True
            )  # type: ignore[no-untyped-call]
            slope = torch.autograd.functional.jacobian(
                lambda y: inner(a, x, [y]), torch.zeros(Q, dtype=torch.float64), create_graph=True
            )  # type: ignore[no-untyped-call]
            return torch.linalg.solve(H, -slope)

        y = plain(x)
        J = torch.autograd.functional.jacobian(plain, x)  # type: ignore[no-untyped-call]
        clipped = "max_norm" in options  # whose derivative torch takes for that of the identity
        workload = _made(lambda a, x, ys: inner(a, x, ys, **options), _target, a, x, y.detach(), 0.1)
        return workload, None if clipped else J.mT @ (y.detach() - a["t"])

    return made


_JAX = {"jaxopt": PURE}
_OPTION = {"jaxopt": TORCH}
_STOP = {"jaxopt": ON_PURPOSE}
CASES = (
    Case("unrolling: one step of 1/L meets the solution", "unrolled", _one_step, count=100),
    Case("unrolling: five steps, asked three times", "unrolled", _few_steps, count=5, calls=3),
    Case("f without a graph in y, implicit", "cg", _detached_f, inapplicable=_STOP),
    Case("f without a graph in y, unrolled", "unrolled", _at_zero(_detached_f), count=600, inapplicable=_STOP),
    Case("g without a graph in x, implicit", "cg", _detached_g, inapplicable=_STOP),
    Case("g without a graph in x, unrolled", "unrolled", _at_zero(_detached_g), count=600, inapplicable=_STOP),
    Case("a y that is not y*", "cg", _not_solved),
    Case("y* on a kink of g", "cg", _kink, count=2),
    Case("y at a maximum of g", "cg", _maximum),
    Case("conjugate gradients: half of the steps that are needed", "cg", _ill_conditioned, count=3),
    Case("Neumann series: 600 terms at condition number 1e4", "neumann", _ill_conditioned, count=600),
    Case("f and g times 1e-22, in float32", "cg", _tiny, tolerance=0.0, right=1e-4),
    Case("dropout drawn anew at each call of g", "cg", _random, inapplicable=_JAX),
    Case("`embedding(scale_grad_by_freq=True)` in g", "cg", _embedding(scale_grad_by_freq=True), inapplicable=_OPTION),
    Case("`embedding(max_norm=...)` in g", "cg", _embedding(max_norm=0.1), inapplicable=_OPTION),
    Case(
        "a relative tolerance of 2",
        "cg",
        lambda: _of_two(_quadratic()),
        tolerance=2.0,
        inapplicable={"betty": "its CG has no tolerance", "hypertorch": ABSOLUTE, "boat": ABSOLUTE},
    ),
)


def _of_two(parts: tuple[dict[str, Tensor], Tensor, Tensor, Tensor]) -> tuple[Workload, Tensor]:
    a, x, y, h = parts
    return _made(_g, _target, a, x, y, 0.1), h


def outcome(case: Case, ask: Callable[[Workload], Callable[[], Tensor]]) -> str:
    """`right`, `said: ...` with the first words, or what is wrong without a word.

    Args:
        case: the case.
        ask: workload -> a call that returns a hypergradient.
    """
    workload, truth = case.workload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call = ask(workload)
            found = [call().detach().double().reshape(-1) for _ in range(case.calls)]
        except Exception as raised:  # whatever a library raises is its answer
            if type(raised).__name__ == "UnavailableError":
                raise
            return f"said: {_words(raised)}"
    told = [each for each in caught if not issubclass(each.category, DeprecationWarning | FutureWarning)]
    if not all(bool(each.isfinite().all()) for each in found):
        return "said: NaN"
    if truth is None:
        return f"said: {_words(told[0].message)}" if told else "**a number**"
    size = float(torch.linalg.vector_norm(truth))
    error = max(float(torch.linalg.vector_norm(each - truth)) / size for each in found)
    if error <= case.right:
        return "right"
    return f"said: {_words(told[0].message)}" if told else f"**{error:.1e}**"


def _words(raised: Exception | Warning | str) -> str:
    status = getattr(raised, "status", None)  # of this library, whose message begins with what was called
    text = " ".join(str(raised if status is None else status.name).split())
    for mark, written in (("|", "&#124;"), ("<", "&lt;"), ("[", "\\[")):
        text = text.replace(mark, written)
    return f"{type(raised).__name__}: {text[:70]}"
