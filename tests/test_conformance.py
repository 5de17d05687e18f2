"""The conformance report calls right what is right, and wrong what is wrong."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="an installed package comes without its benchmarks")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", "MPLBACKEND"):
        monkeypatch.setenv(name, "")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("conformance")
    for name in ("conformance", "_threads", "_harness", "_silent", "_workloads", "peers"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["cg", "neumann", "unrolled"])
def test_this_library_has_every_property(report: Any, kind: str) -> None:
    column = report.Column("bilevel", report.ours(kind))
    for prop in report.PROPERTIES:
        if not (kind == "unrolled" and prop.family.match):
            assert report.cell(prop, column, kind, 1e-8) == "right", prop.name


def test_this_library_is_right_or_says_something_in_every_case(report: Any) -> None:
    column = report.Column("bilevel", report.ours("cg"))
    found = {case.name: report.answer(case, column) for case in report.CASES}
    assert len(found) == len(report.CASES)
    assert {name: said for name, said in found.items() if not said.startswith(("right", "said: "))} == {}


@pytest.mark.filterwarnings("default")
def test_a_case_tells_right_said_and_silent_apart(report: Any) -> None:
    cases = {case.name: case for case in report.CASES}
    case = cases["a y that is not y*"]
    truth: torch.Tensor = case.workload()[1]

    def of(answer: Any, case: Any = case) -> str:
        found: str = report.outcome(case, lambda _: answer)
        return found

    def warned() -> torch.Tensor:
        warnings.warn("not converged", RuntimeWarning, stacklevel=2)
        return truth * 2

    def old() -> torch.Tensor:
        warnings.warn("this will go", FutureWarning, stacklevel=2)
        return truth * 2

    def raised() -> torch.Tensor:
        raise RuntimeError("y [is]\nno | solution")

    assert of(lambda: truth) == "right"
    assert of(lambda: truth * 2) == of(old) == "**1.0e+00**"
    assert of(lambda: truth * float("nan")) == "said: NaN"
    assert of(warned) == "said: RuntimeWarning: not converged"
    assert of(raised) == "said: RuntimeError: y \\[is] no &#124; solution"
    assert of(lambda: truth, cases["y at a maximum of g"]) == "**a number**"
    again = iter([1.0, 1.0, 3.0])  # only the third call is wrong
    five = cases["unrolling: five steps, asked three times"]
    h = five.workload()[1]
    assert of(lambda: h * next(again), five) == "**2.0e+00**"


@pytest.mark.parametrize("start", ["unrolling: one step", "unrolling: five steps"])
def test_the_truth_of_an_unrolled_case_is_the_derivative_of_its_steps(report: Any, start: str) -> None:
    (case,) = [case for case in report.CASES if case.name.startswith(start)]
    workload, h = case.workload()
    x = workload.x.clone().requires_grad_()
    ys = tuple(leaf.clone().requires_grad_() for leaf in workload.ys)
    for _ in range(case.count):
        slopes = torch.autograd.grad(workload.g(x, ys), ys, create_graph=True)
        ys = tuple(leaf - workload.step * slope for leaf, slope in zip(ys, slopes, strict=True))
    assert report.off(torch.autograd.grad(workload.f(x, ys), x)[0], h) < 1e-10


def test_the_closed_form_is_the_derivative_of_phi(report: Any) -> None:
    workload, h = report.Family(leaves=((3,), (1,), (2,)), extra=2.0, scale=3.0).workload()
    A, B = workload.arrays["A"], workload.arrays["B"]

    def phi(x: torch.Tensor) -> Any:
        return workload.f(x, (torch.linalg.solve(A, B @ x),))

    jacobian: Any = torch.autograd.functional.jacobian(phi, workload.x)  # type: ignore[no-untyped-call]
    assert report.off(jacobian, h) < 1e-12
    y = workload.flat.requires_grad_()
    (slope,) = torch.autograd.grad(workload.g(workload.x, workload.cut(y)), y)
    assert slope.norm() < 1e-12


def test_what_is_wrong_is_called_wrong(report: Any) -> None:
    right = report.ours("cg")

    def raises(*_: Any) -> Any:
        raise RuntimeError("no\nmemory | at all")

    def pollutes(workload: Any, taken: Any) -> Any:
        def call() -> Any:
            workload.f(workload.x, workload.ys).backward()
            return right(workload, taken)()

        return call

    def of(name: str, build: Any) -> str:
        prop = next(prop for prop in report.PROPERTIES if prop.name.startswith(name))
        found: str = report.cell(prop, report.Column("x", build), "cg", 1e-8)
        return found

    assert of("exact: cond", lambda w, s: lambda: 2 * right(w, s)()) == "**1.0e+00**"
    assert of("exact: cond", lambda w, s: lambda: right(w, s)() * float("nan")) == "**NaN**"
    assert of("exact: cond", raises) == "RuntimeError: no memory &#124; at all"
    assert of("leaves", pollutes).startswith("**")
    fewer = lambda w, s: right(w, replace(s, count=s.count - (s.tolerance > 0)))  # noqa: E731
    assert of("exact: cond", fewer).endswith("(right with tolerance 0 and 6 steps)")


def test_the_page_is_whole_and_made_by_this_script(report: Any) -> None:
    text = report.PAGE.read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    for prop in report.PROPERTIES:
        assert text.count(f"| {prop.name} |") == (2 if prop.family.match else 3)
    rows = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| property", "| case"))
    ]
    ours = {row.removeprefix("| ").split(" | ")[0]: row.split(" | ")[1] for row in rows}
    cases = [case.name for case in report.CASES]
    assert all(ours[name].startswith(("right", "said: ")) for name in cases)
    assert all(found == "right" for name, found in ours.items() if name not in cases)
    assert all(text.count(f"| {name} |") == 1 for name in cases)
