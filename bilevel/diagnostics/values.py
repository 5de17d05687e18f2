"""Tests of `check`: f and g run, are finite, and give the same value twice."""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel._numerics.misfits import origin
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject
from bilevel.requirements.padding import demand_padding_unseen

_REPEATS = 8  # evaluations at one point: a mask of two entries drawn anew agrees by chance once in 4^7 times


def values_are_finite(subject: Subject, found: Findings) -> Findings:
    """Whether f and g run at (x, y0), are finite, of one dtype and blind to padding; else "values" are wrong."""
    wrong = replace(found, wrong=found.wrong | {"values"})
    values = []
    for name, function in subject.functions:
        try:
            values.append((name, function(subject.x, subject.y0)))
        except Exception as error:  # whatever the user's functions raise is the verdict
            text = f"{name} raised {type(origin(error)).__name__}: {error}"
            return wrong.saying("values", False, text, f"make {name} run at (x, y0)")
    try:
        demand_padding_unseen(subject.problem, subject.x, subject.y0)
    except ValueError as error:
        return wrong.saying("values", False, str(error), "keep the padding of tasks out of f and g")
    names, dtype = " and ".join(name for name, _ in values), subject.x.dtype
    finite = all(bool(value.isfinite()) for _, value in values)
    same = all(value.dtype == dtype for _, value in values)
    return (found if finite else wrong).saying(
        "values",
        finite and (True if same else None),
        f"{', '.join(f'{name} = {float(value):.4g}' for name, value in values)} at (x, y0), in {dtype}".replace(
            "torch.", ""
        )
        + ("" if same else ", but " + ", ".join(f"{name} is {value.dtype}" for name, value in values)),
        f"start where {names} {'is' if len(values) == 1 else 'are'} finite"
        if not finite
        else "keep one dtype throughout",
    )


def values_are_repeatable(subject: Subject, found: Findings) -> Findings:
    """Whether f and g are deterministic: one value at one point."""
    for name, function in subject.functions:
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
    names = " and ".join(name for name, _ in subject.functions)
    verb = "are" if len(subject.functions) > 1 else "is"
    return found.saying("same value twice", True, f"{names} {verb} deterministic")
