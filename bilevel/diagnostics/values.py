"""Tests of `check`: f and g run, are finite, and give the same value twice."""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject

_REPEATS = 8  # evaluations at one point: a mask of two entries drawn anew agrees by chance once in 4^7 times


def values_are_finite(subject: Subject, found: Findings) -> Findings:
    """Whether f and g run at (x, y0), are finite, and of one dtype; else "values" are wrong."""
    wrong = replace(found, wrong=found.wrong | {"values"})
    values = []
    for name, function in (("f", subject.f), ("g", subject.g)):
        try:
            values.append(function(subject.x, subject.y0))
        except Exception as error:  # whatever the user's functions raise is the verdict
            text = f"{name} raised {type(error).__name__}: {error}"
            return wrong.saying("values", False, text, f"make {name} run at (x, y0)")
    f, g = values
    dtype = subject.x.dtype
    finite = bool(f.isfinite()) and bool(g.isfinite())
    same = f.dtype == g.dtype == dtype
    return (found if finite else wrong).saying(
        "values",
        finite and (True if same else None),
        f"f = {float(f):.4g}, g = {float(g):.4g} at (x, y0), in {dtype}".replace("torch.", "")
        + ("" if same else f", but f is {f.dtype} and g {g.dtype}"),
        "start where f and g are finite" if not finite else "keep one dtype throughout",
    )


def values_are_repeatable(subject: Subject, found: Findings) -> Findings:
    """Whether f and g are deterministic: one value at one point."""
    for name, function in (("f", subject.f), ("g", subject.g)):
        with torch.no_grad():
            y = subject.near(subject.y0, 0.1)
            once, *others = [function(subject.x, y) for _ in range(_REPEATS)]
        twice = next((value for value in others if not torch.equal(value, once)), None)
        if twice is not None:
            return replace(found, deterministic=False).saying(
                "same value twice",
                False,
                f"{name} gave {float(once):.6g} and then {float(twice):.6g} at the same point",
                "fix the random numbers: `bilevel.functional(module)` keeps one dropout mask; draw mini-batches by"
                " `data=`",
            )
    return found.saying("same value twice", True, "f and g are deterministic")
