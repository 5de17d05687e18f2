"""Tests of `check`: derivatives are those of the values, and torch has the second ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bilevel._calculus import Exact, grad
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject
from bilevel.diagnostics.taylor import Slope, slope


def derivatives_are_right(subject: Subject, found: Findings) -> Findings:
    """Whether the derivatives of f and g in x and y by autograd are those of the values, and smooth."""
    y, x = subject.near(subject.y0, 0.1), subject.near(subject.x, 0.01)
    slopes: list[tuple[str, Slope]] = []
    for name, function in subject.functions:
        slopes.append((f"{name} in x", _slope(subject, partial(_swapped, function, y), x)))
        slopes.append((f"{name} in y", _slope(subject, partial(function, x), y)))
    wrong = {name: s for name, s in slopes if s.wrong and found.deterministic}
    # Of g in x only what changes grad_y g matters: a difference of Phi will tell.
    smooth = not [name for name, s in slopes if not s.smooth and not (name == "g in x" and s.wrong)]
    found = replace(found, wrong=found.wrong | wrong.keys(), smooth=smooth)
    serious = [name for name in wrong if name != "g in x"]
    if serious:
        claims = [f"{name}: {wrong[name].claimed:.4g} against {wrong[name].measured:.4g}" for name in serious]
        return found.saying(
            "differentiable",
            False,
            f"the derivative by autograd is not that by differences along a random direction ({'; '.join(claims)})",
            f"write {' and '.join(sorted({name[0] for name in serious}))} in torch operations on x and y"
            " themselves: `.detach()`, `.item()`, `.data`, `torch.tensor(y)`, numpy and `torch.no_grad()` cut the"
            " derivative off, and a custom backward may be wrong",
        )
    bad = [f"{name} ({s})" for name, s in slopes if not s.smooth]
    return found.saying(
        "differentiable",
        True if not bad else None,
        f"Taylor remainders of {' and '.join(name for name, _ in subject.functions)} vanish like t^2"
        if not bad
        else f"not smooth here: {', '.join(bad)}",
        "kinks (ReLU, abs, max) are tolerable away from the solution; check .detach(), rounding, in-place"
        " operations, and custom derivatives otherwise",
    )


def _swapped(function: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor) -> Tensor:
    return function(x, y)


def _slope(subject: Subject, function: Callable[[Tensor], Tensor], at: Tensor) -> Slope:
    leaf = at.detach().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)
        gradient = grad(value, leaf) if value.requires_grad else torch.zeros_like(leaf)
    d = subject.direction(at)
    predicted = float((gradient * d).sum())
    with torch.no_grad():
        return slope(lambda t: float(function(at + t * d)), predicted, float(torch.linalg.vector_norm(at)), at.dtype)


def second_derivatives_exist(subject: Subject, found: Findings) -> Findings:
    """Whether torch has the second derivatives of g, and they are right.

    The Hessian is symmetric, <u, H v> = <v, H u>, and what the derivative of <u, grad_y g> along v is by differences.
    """
    if not subject.has_g:
        return found
    u, v = subject.direction(subject.y0), subject.direction(subject.y0)
    try:
        # Two linearizations, so that masks drawn anew between them show.
        hu = Exact().linearize(subject.problem, subject.x, subject.y0).operator.mv(u)
        at = Exact().linearize(subject.problem, subject.x, subject.y0)
        hv = at.operator.mv(v)
        at.products(v)
    except NotImplementedError as error:
        what, _, remedy = str(error).partition(". ")
        return replace(found, second_order=False).saying("second derivatives", None, what, remedy)
    a, b = float((u * hv).sum()), float((v * hu).sum())
    size = float(torch.linalg.vector_norm(hu) + torch.linalg.vector_norm(hv))
    symmetric = abs(a - b) <= 100 * torch.finfo(u.dtype).eps ** 0.75 * max(size, 1e-30)
    if symmetric and found.deterministic and found.smooth and "g in y" not in found.wrong:
        measured = _second_slope(subject, u, v, a)
        if measured.wrong:
            return replace(found, second_order=False).saying(
                "second derivatives",
                False,
                f"<u, Hv> = {a:.6g}, by differences of gradients {measured.measured:.6g}",
                "torch drops a term: the backward of a `torch.autograd.Function` in g detaches what depends on its"
                " inputs. Save inputs or outputs only, by `ctx.save_for_backward`, and compute without `no_grad`",
            )
    return found.saying(
        "second derivatives",
        symmetric,
        f"<u, Hv> = {a:.6g}, <v, Hu> = {b:.6g}",
        "the Hessian is not symmetric: g changes between calls, or a part of its gradient is detached",
    )


def _second_slope(subject: Subject, u: Tensor, v: Tensor, claimed: float) -> Slope:
    """<u, grad_y g> along v at y0, whose slope is claimed to be <u, H v>."""
    problem, x = subject.problem, subject.x
    size = float(torch.linalg.vector_norm(subject.y0))

    def along(t: float) -> float:
        leaf = (subject.y0 + t * v).detach().requires_grad_()
        with torch.enable_grad():
            return float((u * grad(problem.g(x, leaf).sum(), leaf)).sum())

    return slope(along, claimed, size, u.dtype)
