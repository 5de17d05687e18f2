"""The same properties of a hypergradient, tried on this library and on others: a table in docs/conformance.md.

`python benchmarks/conformance.py --hypertorch PATH`, in an environment with the libraries to be compared.

Each library is called through the adapters in peers/, whose first lines state the settings: the best that its
documentation offers, with at least as many products as the problem needs. `--tolerance` is what a relative error must
not exceed to be called right.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _harness
import _threads  # noqa: F401
import torch
from _harness import PEERS, Call, Options, UnavailableError, write
from _workloads import Workload
from torch import Tensor

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"
BEGIN, END = "<!-- results: written by conformance.py -->\n", "<!-- end of results -->\n"
PACKAGES = {"torchopt": "torchopt", "betty": "betty-ml", "boat": "boat-torch", "higher": "higher", "jaxopt": "jaxopt"}
P, Q = 4, 6
Build = Callable[[Workload], Call]  # a library with a method, for any number of products


# Quadratics with closed forms


@dataclass(frozen=True)
class Family:
    """g = y'Ay/2 - y'Bx, times scale; f = |y - t|^2 / 2; so that h = B'A^-1 (y* - t), y* = A^-1 B x, exactly.

    Attributes:
        eigenvalues: of A.
        leaves: the sizes of the leaves of y; an empty one is a tensor without axes.
        scale: of g, which h does not depend on.
        extra: |x|^2 times this is added to g, which changes neither y* nor h.
        solved: whether the workload's y is y*, else the zero vector.
        match: whether t = y*, so that the linear system has a right-hand side of zero, and h = 0.
        dtype: of everything.
    """

    eigenvalues: tuple[float, ...] = tuple(1 + 9 * k / (Q - 1) for k in range(Q))
    leaves: tuple[tuple[int, ...], ...] = ((Q,),)
    scale: float = 1.0
    extra: float = 0.0
    solved: bool = True
    match: bool = False
    dtype: torch.dtype = torch.float64

    def workload(self) -> tuple[Workload, Tensor]:
        """The problem, and its hypergradient in float64."""
        generator = torch.Generator().manual_seed(0)
        q = len(self.eigenvalues)
        rotation = torch.linalg.qr(torch.randn(q, q, generator=generator, dtype=torch.float64)).Q
        A = rotation @ torch.diag(torch.tensor(self.eigenvalues, dtype=torch.float64)) @ rotation.mT
        B = torch.randn(q, P, generator=generator, dtype=torch.float64)
        x = torch.randn(P, generator=generator, dtype=torch.float64)
        y = torch.linalg.solve(A, B @ x)
        t = y.clone() if self.match else torch.randn(q, generator=generator, dtype=torch.float64)
        h = B.mT @ torch.linalg.solve(A, y - t)
        at = y if self.solved else torch.zeros_like(y)
        sizes = [max(1, *shape) if shape else 1 for shape in self.leaves]
        ys = tuple(part.reshape(shape) for part, shape in zip(at.split(sizes), self.leaves, strict=True))
        arrays = {name: value.to(self.dtype) for name, value in (("A", A), ("B", B), ("t", t))}
        scale, extra = self.scale, self.extra

        def inner(a: Any, x: Any, ys: Any) -> Any:
            y = _flat(ys)
            return scale * (y @ (a["A"] @ y) / 2 - y @ (a["B"] @ x)) + extra * (x @ x)

        def outer(a: Any, x: Any, ys: Any) -> Any:  # noqa: ARG001
            difference = _flat(ys) - a["t"]
            return difference @ difference / 2

        return Workload(
            name="quadratic",
            arrays=arrays,
            outer=outer,
            inner=inner,
            outer_jax=outer,
            inner_jax=inner,
            x=x.to(self.dtype),
            ys=tuple(leaf.to(self.dtype) for leaf in ys),
            step=1 / (scale * max(self.eigenvalues)),
        ), h


def _flat(ys: Any) -> Any:
    """The leaves in one vector, of torch or of jax."""
    if isinstance(next(iter(ys)), Tensor):
        return torch.cat([leaf.reshape(-1) for leaf in ys])
    import jax.numpy as jnp

    return jnp.concatenate([leaf.reshape(-1) for leaf in ys])


# Properties


@dataclass(frozen=True)
class Property:
    """One row: what is asked, and the error found: 0 is right."""

    name: str
    error: Callable[[Build], float]
    single: bool = False  # whether in float32, where errors are those of rounding


def off(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|, or |found| where the truth is zero."""
    size = float(torch.linalg.vector_norm(truth))
    return float(torch.linalg.vector_norm(found.detach().double() - truth)) / (size if size > 1e-12 else 1.0)


def exact(family: Family) -> Callable[[Build], float]:
    """The error against the closed form."""

    def error(build: Build) -> float:
        workload, h = family.workload()
        return off(build(workload)(), h)

    return error


def repeated(build: Build) -> float:
    """The most that three calls of one object differ from the closed form."""
    workload, h = Family().workload()
    call = build(workload)
    return max(off(call(), h) for _ in range(3))


def unpolluted(build: Build) -> float:
    """What arrives in the .grad of the user's own tensors, and how they change."""
    workload, _ = Family().workload()
    x, ys = workload.x.requires_grad_(), tuple(leaf.requires_grad_() for leaf in workload.ys)
    before = [leaf.detach().clone() for leaf in (x, *ys)]
    call = build(replace(workload, x=x, ys=ys))
    call()
    call()
    written = [0.0 if leaf.grad is None else float(leaf.grad.abs().max()) for leaf in (x, *ys)]
    moved = [float((leaf.detach() - old).abs().max()) for leaf, old in zip((x, *ys), before, strict=True)]
    return max(written + moved)


SCALAR = (2.0,)
IMPLICIT = [
    Property("exact: A = 2I", exact(Family(eigenvalues=(2.0,) * Q))),
    Property("exact: condition number 10", exact(Family())),
    Property("the same for y in three leaves", exact(Family(leaves=((3,), (1,), (2,))))),
    Property("the same for 7 g", exact(Family(scale=7.0))),
    Property("the same with 50 &#124;x&#124;² added to g", exact(Family(extra=50.0))),
    Property("zero right-hand side gives zero", exact(Family(match=True))),
    Property("y a tensor without axes", exact(Family(eigenvalues=SCALAR, leaves=((),)))),
    Property("the same when called again", repeated),
    Property("leaves the user's tensors alone", unpolluted),
    Property("float32 close to float64", exact(Family(dtype=torch.float32)), single=True),
]


# Libraries


@dataclass(frozen=True)
class Column:
    """A library with a method: how it is built for a number of products, or why it is not."""

    library: str
    method: str
    products: int
    build: Build | None = None
    why: str = ""

    @property
    def title(self) -> str:
        return f"{self.library}<br>{self.method}"


def columns(kind: str, options: Options) -> list[Column]:
    """All the libraries with one method: "cg", "neumann" or "unrolled"."""
    found = [Column("bilevel", kind, 0, ours(kind))]
    for name in options.peers:
        try:
            found.append(Column(PACKAGES.get(name, name), kind, 0, theirs(_harness.peer(name, options), kind)))
        except UnavailableError as reason:
            found.append(Column(PACKAGES.get(name, name), kind, 0, None, str(reason)))
    return found


def work(kind: str, workload: Workload) -> int:
    """Products that suffice: far more than CG needs, so that it runs on past exact convergence; others converge."""
    return {"cg": 4 * workload.size, "neumann": 600, "unrolled": 600}[kind]


def ours(kind: str) -> Build:
    """This library, with tolerances of 0."""
    from bilevel import ITD, BilevelProblem, hypergradient
    from bilevel.solvers import GradientDescent, Iterate

    def build(workload: Workload) -> Call:
        if kind != "unrolled":
            return _harness.ours(workload, kind, work(kind, workload))
        problem = BilevelProblem(workload.f, workload.g)
        itd = ITD(Iterate(GradientDescent(workload.step), max_steps=work(kind, workload)))
        return lambda: hypergradient(problem, workload.x, workload.ys, estimator=itd).grad

    return build


def theirs(adapter: Any, kind: str) -> Build:
    """A peer; UnavailableError is raised where it is called, if it has no such method."""

    def build(workload: Workload) -> Call:
        if kind != "unrolled":
            return adapter.implicit(workload, kind, work(kind, workload))
        return next(iter(adapter.unrolled(workload, work(kind, workload)).values()))

    return build


def cell(prop: Property, column: Column, tolerance: float) -> str:
    """`right`, the error, or the first words of the exception."""
    if column.build is None:
        return column.why
    try:
        error = prop.error(column.build)
    except UnavailableError as reason:
        return f"– ({str(reason).removeprefix('skipped: ')})"
    except Exception as error:  # whatever a library raises is its result
        words = " ".join(str(error).split()).replace("|", "&#124;").replace("<", "&lt;")
        return f"{type(error).__name__}: {words[:60]}"
    if error != error:
        return "**NaN**"
    if error <= (1e-5 if prop.single else tolerance):
        return "right"
    return f"**{error:.1e}**"


# The page


def table(kind: str, heading: str, options: Options, tolerance: float) -> str:
    """One method: a row a property, a column a library."""
    chosen = columns(kind, options)
    lines = [f"### {heading}", "", "| property | " + " | ".join(c.library for c in chosen) + " |"]
    lines.append("|---" * (len(chosen) + 1) + "|")
    for prop in IMPLICIT if kind != "unrolled" else UNROLLED:
        cells = [cell(prop, column, tolerance) for column in chosen]
        lines.append(f"| {prop.name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


UNROLLED = [
    replace(prop, error=exact(Family(solved=False))) if prop.name.startswith("exact: cond") else prop
    for prop in IMPLICIT
    if not prop.name.startswith("zero right-hand")
]


def versions(options: Options) -> str:
    """What was compared."""
    names = ["torch", *(PACKAGES[name] for name in options.peers if name in PACKAGES)]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    if options.hypertorch is not None:
        found.append(f"hypertorch {_commit(options.hypertorch)}")
    return ", ".join(found)


def _commit(checkout: Path) -> str:
    import subprocess

    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "of unknown commit"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hypertorch", type=Path, help="a checkout of github.com/prolearner/hypertorch")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"which of {','.join(PEERS)} ('' for none)")
    parser.add_argument("--tolerance", type=float, default=1e-8, help="relative error that is right (1e-8)")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the tables go (docs/conformance.md)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    peers = tuple(name for name in given.peers.split(",") if name)
    if "jaxopt" in peers:
        import jax

        jax.config.update("jax_enable_x64", True)
    options = Options(1, quick=False, out=None, hypertorch=given.hypertorch, peers=peers)
    tables = [
        table("cg", "Implicit gradient by conjugate gradients", options, given.tolerance),
        table("neumann", "Implicit gradient by Neumann series", options, given.tolerance),
        table("unrolled", "Reverse mode through gradient descent", options, given.tolerance),
    ]
    before, rest = given.page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = f"\nVersions: {versions(options)}.\n\n" + "\n".join(tables) + "\n"
    write(given.page, before + BEGIN + text + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
