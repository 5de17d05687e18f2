"""The same properties of a hypergradient, tried on this library and on others: a table in docs/conformance.md.

`python benchmarks/conformance.py --hypertorch PATH`, in an environment with the libraries to be compared.

Each library is called through the adapters in peers/, whose first lines state the settings. `--tolerance` is what a
relative error must not exceed to be called right.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _harness
import _threads  # noqa: F401
import torch
from _harness import PEERS, Call, Options, UnavailableError, write
from _silent import CASES, Case, outcome
from _workloads import Workload
from torch import Tensor

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"
BEGIN, END = "<!-- results: written by conformance.py -->\n", "<!-- end of results -->\n"
PACKAGES = {"torchopt": "torchopt", "betty": "betty-ml", "boat": "boat-torch", "higher": "higher", "jaxopt": "jaxopt"}
P, Q = 4, 6
TIGHT, TIGHT_SINGLE = 1e-12, 1e-6  # of the linear solvers that have a tolerance, in float64 and in float32
# How many products: as many as there are inner variables; four times that; or as CG needs in exact arithmetic.
ENOUGH, BEYOND, FEWEST = "enough", "beyond", "fewest"


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
class Steps:
    """How many products, or inner steps, are taken, and to which tolerance of the linear system."""

    count: int
    tolerance: float


Build = Callable[[Workload, Steps], Call]  # a library with a method


@dataclass(frozen=True)
class Property:
    """One row: what is asked of a problem, and how the error is measured; 0 is right."""

    name: str
    family: Family
    error: Callable[[Callable[[Workload], Call], Family], float]
    beyond: bool = False  # past exact convergence, with a tolerance of 0
    own: bool = False  # about the user's own tensors, which some libraries do not work on


def off(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|, or |found| where the truth is zero."""
    size = float(torch.linalg.vector_norm(truth))
    return float(torch.linalg.vector_norm(found.detach().double() - truth)) / (size if size > 1e-12 else 1.0)


def exact(build: Callable[[Workload], Call], family: Family) -> float:
    """The error against the closed form."""
    workload, h = family.workload()
    return off(build(workload)(), h)


def repeated(build: Callable[[Workload], Call], family: Family) -> float:
    """The most that three calls of one object differ from the closed form."""
    workload, h = family.workload()
    call = build(workload)
    return max(off(call(), h) for _ in range(3))


def unpolluted(build: Callable[[Workload], Call], family: Family) -> float:
    """What arrives in the .grad of the user's own tensors, and how they change."""
    workload, _ = family.workload()
    x, ys = workload.x.requires_grad_(), tuple(leaf.requires_grad_() for leaf in workload.ys)
    before = [leaf.detach().clone() for leaf in (x, *ys)]
    call = build(replace(workload, x=x, ys=ys))
    call()
    call()
    written = [0.0 if leaf.grad is None else float(leaf.grad.abs().max()) for leaf in (x, *ys)]
    moved = [float((leaf.detach() - old).abs().max()) for leaf, old in zip((x, *ys), before, strict=True)]
    return max(written + moved)


PROPERTIES = [
    Property("exact: A = 2I", Family(eigenvalues=(2.0,) * Q), exact),
    Property("exact: condition number 10", Family(), exact),
    Property("the same for y in three leaves", Family(leaves=((3,), (1,), (2,))), exact),
    Property("the same for 7 g", Family(scale=7.0), exact),
    Property("the same with 50 &#124;x&#124;² added to g", Family(extra=50.0), exact),
    Property("the same past exact convergence, tolerance 0", Family(), exact, beyond=True),
    Property("a right-hand side of zero gives zero", Family(match=True), exact),
    Property("y a tensor without axes", Family(eigenvalues=(2.0,), leaves=((),)), exact),
    Property("the same when called again", Family(), repeated),
    Property("leaves the user's tensors alone", Family(), unpolluted, own=True),
    Property("float32 close to float64", Family(dtype=torch.float32), exact),
]


# Libraries

OWN = {
    "betty": "variables live in its modules, in whose .grad it returns",
    "boat": "variables live in its modules, in whose .grad it returns",
    "jaxopt": "arrays are immutable",
}


@dataclass(frozen=True)
class Column:
    """A library with a method: how it is built, or why it is not."""

    library: str
    build: Build | None = None
    why: str = ""

    @property
    def title(self) -> str:
        """The name under which it is installed."""
        return PACKAGES.get(self.library, self.library)


def columns(kind: str, options: Options) -> list[Column]:
    """All the libraries with one method: "cg", "neumann" or "unrolled"."""
    found = [Column("bilevel", ours(kind))]
    for name in options.peers:
        try:
            found.append(Column(name, theirs(_harness.peer(name, options), kind)))
        except UnavailableError as reason:
            found.append(Column(name, None, str(reason)))
    return found


def steps(kind: str, family: Family, amount: str) -> Steps:
    """CG: as many steps as y has entries, to a tight tolerance; a series or an unroll: until it has converged."""
    if kind != "cg":
        return Steps(1200 if amount == BEYOND else 600, 0.0)
    if amount == FEWEST:
        return Steps(len(set(family.eigenvalues)), 0.0)
    if amount == BEYOND:
        return Steps(4 * len(family.eigenvalues), 0.0)
    return Steps(len(family.eigenvalues), TIGHT if family.dtype == torch.float64 else TIGHT_SINGLE)


def ours(kind: str) -> Build:
    """This library."""
    from bilevel import AID, ITD, BilevelProblem, hypergradient
    from bilevel.solvers import CG, ClosedForm, GradientDescent, Iterate, Neumann

    def build(workload: Workload, taken: Steps) -> Call:
        problem = BilevelProblem(workload.f, workload.g)
        inner = ClosedForm(lambda _: workload.ys)
        estimator = {
            "cg": lambda: AID(inner, CG(rtol=taken.tolerance, max_steps=taken.count)),
            "neumann": lambda: AID(inner, Neumann(step=workload.step, terms=taken.count + 1)),
            "unrolled": lambda: ITD(Iterate(GradientDescent(workload.step), max_steps=taken.count)),
        }[kind]()
        return lambda: hypergradient(problem, workload.x, workload.ys, estimator=estimator, throw=False).grad

    return build


def theirs(adapter: Any, kind: str) -> Build:
    """A peer; UnavailableError is raised where it is called, if it has no such method."""

    def build(workload: Workload, taken: Steps) -> Call:
        if kind != "unrolled":
            return adapter.implicit(workload, kind, taken.count, taken.tolerance)
        return next(iter(adapter.unrolled(workload, taken.count).values()))

    return build


def cell(prop: Property, column: Column, kind: str, tolerance: float) -> str:
    """`right`, the error, the first words of the exception, or why the property does not apply."""
    if column.build is None:
        return f"- ({column.why.removeprefix('skipped: ')})"
    if prop.own and column.library in OWN:
        return f"- ({OWN[column.library]})"
    family = prop.family if kind != "unrolled" else replace(prop.family, solved=False)
    found = attempt(prop, column.build, steps(kind, family, BEYOND if prop.beyond else ENOUGH), family, tolerance)
    if kind != "cg" or prop.beyond or found == "right" or found.startswith("-"):
        return found
    fewest = steps(kind, family, FEWEST)
    if attempt(prop, column.build, fewest, family, tolerance) == "right":
        return f"{found} (right with tolerance 0 and {fewest.count} step{'s' if fewest.count > 1 else ''})"
    return found


def attempt(prop: Property, build: Build, taken: Steps, family: Family, tolerance: float) -> str:
    """What comes of one setting."""
    try:
        error = prop.error(lambda workload: build(workload, taken), family)
    except UnavailableError as reason:
        return f"- ({str(reason).removeprefix('skipped: ')})"
    except Exception as raised:  # whatever a library raises is its result
        words = " ".join(str(raised).split()).replace("|", "&#124;").replace("<", "&lt;").replace("[", "\\[")
        return f"{type(raised).__name__}: {words[:60]}"
    if error != error:
        return "**NaN**"
    return "right" if error <= (tolerance if family.dtype == torch.float64 else 1e-5) else f"**{error:.1e}**"


# Silence


def asked(case: Case) -> Callable[[Workload], Call]:
    """This library, as a user asks it: what does not succeed raises, and phi is called as it is called in training."""
    from bilevel import AID, ITD, BilevelProblem, hypergradient, hyperobjective
    from bilevel.solvers import CG, ClosedForm, GradientDescent, Iterate, Neumann

    def ask(workload: Workload) -> Call:
        problem, inner = BilevelProblem(workload.f, workload.g), ClosedForm(lambda _: workload.ys)
        if case.kind != "unrolled":
            linear = CG(rtol=case.tolerance, max_steps=case.count)
            series = Neumann(step=workload.step, terms=case.count + 1, rtol=case.tolerance)
            estimator = AID(inner, linear if case.kind == "cg" else series)
            return lambda: hypergradient(problem, workload.x, workload.ys, estimator=estimator).grad
        if case.calls == 1:  # the name, whose steps end where they have converged
            return lambda: hypergradient(problem, workload.x, workload.ys, estimator="itd").grad
        phi = hyperobjective(
            problem, workload.ys, estimator=ITD(Iterate(GradientDescent(workload.step), max_steps=case.count))
        )

        def call() -> Tensor:
            x = workload.x.clone().requires_grad_()
            return torch.autograd.grad(phi(x), x)[0]

        return call

    return ask


def answer(case: Case, column: Column) -> str:
    """What a library answers to a case, or why it is not asked."""
    if column.build is None:
        return f"- ({column.why.removeprefix('skipped: ')})"
    if column.library in case.inapplicable:
        return f"- ({case.inapplicable[column.library]})"
    build, taken = column.build, Steps(case.count, case.tolerance)
    try:
        return outcome(case, asked(case) if column.library == "bilevel" else lambda workload: build(workload, taken))
    except UnavailableError as reason:
        return f"- ({str(reason).removeprefix('skipped: ')})"


def silence(options: Options) -> str:
    """The table of cases: a row a case, a column a library."""
    heading = "| case | " + " | ".join(c.title for c in columns("cg", options)) + " |"
    lines = ["### Wrong without a word", "", heading, "|---" * (heading.count("|") - 1) + "|"]
    for case in CASES:
        cells = [answer(case, column) for column in columns(case.kind, options)]
        lines.append(f"| {case.name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


# The page


def table(kind: str, heading: str, options: Options, tolerance: float) -> str:
    """One method: a row a property, a column a library."""
    chosen = columns(kind, options)
    lines = [f"### {heading}", "", "| property | " + " | ".join(c.title for c in chosen) + " |"]
    lines.append("|---" * (len(chosen) + 1) + "|")
    for prop in PROPERTIES:
        if kind == "unrolled" and prop.family.match:
            continue  # it solves no linear system
        cells = [cell(prop, column, kind, tolerance) for column in chosen]
        lines.append(f"| {prop.name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


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
        found.append(f"hypertorch {_checkout(options.hypertorch)}")
    return ", ".join(found)


def _checkout(path: Path) -> str:
    """The version in setup.py, and the commit where there is one."""
    setup = path / "setup.py"
    declared = re.search(r"version\s*=\s*['\"]([^'\"]+)", setup.read_text()) if setup.exists() else None
    command = ["git", "-C", str(path), "rev-parse", "--short", "HEAD"]
    commit = ""
    if (path / ".git").exists():
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return " ".join(filter(None, [declared[1] if declared else "", commit.strip(), "(a checkout)"]))


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
        silence(options),
    ]
    before, rest = given.page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = f"\nVersions: {versions(options)}.\n\n" + "\n".join(tables) + "\n"
    write(given.page, before + BEGIN + text + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
