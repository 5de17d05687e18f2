"""The conformance report calls right what is right, and wrong what is wrong."""

from __future__ import annotations

import importlib
import sys
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
    for name in ("conformance", "_threads", "_harness", "_workloads", "peers"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["cg", "neumann", "unrolled"])
def test_this_library_has_every_property(report: Any, kind: str) -> None:
    column = report.Column("bilevel", report.ours(kind))
    for prop in report.PROPERTIES:
        if not (kind == "unrolled" and prop.family.match):
            assert report.cell(prop, column, kind, 1e-8) == "right", prop.name


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
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| property")]
    assert all(row.split(" | ")[1] == "right" for row in rows)
