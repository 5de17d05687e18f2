"""Test of `check`: y depends on x, and by which way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bilevel._calculus import cross_operator
from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject
from bilevel.diagnostics.verdict import Outcome, Verdict
from bilevel.inner_problems.kinds import inner_objective
from bilevel.requirements.properties import Feature

_FAR, _SHORT = 1e2, 1e-2  # where a proximal map is looked at, relative to |y|, and its step

_WAYS = {
    "inner objective": "through g",
    "start": "through its start only: implicit estimators do not see that",
    "both": "through g and through its start, which matters only as far as the inner problem is unsolved",
}
_WAYS_OF_STEPS = {"inner objective": "through its steps", "start": "through its start", "both": "by steps and start"}


def y_depends_on_x(subject: Subject, found: Findings) -> Findings:
    """Whether y moves with x: through g or the constraints, through its start, through both or not at all."""
    through_g, through_start = _through_g(subject, found), _through_start(subject)
    names = {(True, True): "both", (True, False): "inner objective", (False, True): "start"}
    found = replace(found, dependence=names.get((through_g, through_start), "none"))
    if found.dependence == "none":
        detached = subject.stationary and subject.moves(lambda x: inner_objective(subject.problem, x).gradient(found.y))
        return replace(found, detached=detached).saying(
            "y depends on x",
            False,
            "grad_y g changes with x, but its derivative in x is zero to autograd"
            if detached
            else f"not at all: {_what(subject)} not change with x, and there is no start `init(x)`",
            "use x itself inside g(x, y); a detached or copied x does not count",
        )
    good = True if found.dependence != "start" else None
    ways = _WAYS if subject.stationary else _WAYS_OF_STEPS
    what = "g" if subject.minimizes_g else "the inner problem" if subject.has_g else "F(x, y)"
    way = ways[found.dependence].replace("through g", f"through {what}")
    found = found.saying("y depends on x", good, way, "use ITD or ESJ")
    if found.dependence == "start":  # y is what the steps make of it: nobody asks g for a strict minimum
        return replace(found, verdicts=tuple(map(_of_no_account, found.verdicts)))
    return found


def _through_g(subject: Subject, found: Findings) -> bool:
    if not subject.stationary or not subject.has_g:  # nothing but the solution tells
        return subject.moves(lambda x: subject.solved(x, found.y if subject.stationary else subject.y0).value)
    if found.second_order:
        # At another x as well: a derivative that happens to be zero, of x^2 at 0, is one all the same.
        seen = any(_crossed(subject, x, found.y) for x in (subject.x, subject.near(subject.x, 1e-2)))
    else:
        seen = subject.moves(lambda x: inner_objective(subject.problem, x).gradient(found.y))
    return seen or _beside_g(subject, found)


def _crossed(subject: Subject, x: Tensor, y: Tensor) -> bool:
    """Whether d2g/dxdy is not zero."""
    operator, like, _ = cross_operator(subject.problem, x, y)
    return float(torch.linalg.vector_norm(operator.mv(subject.direction(like)))) > 0


def _what(subject: Subject) -> str:
    if not subject.stationary:
        return "the steps do"
    return "grad_y g does" if subject.minimizes_g else "the inner problem does"


def _beside_g(subject: Subject, found: Findings) -> bool:
    """Whether what the inner problem has beyond a g changes with x."""
    if found.constrained:
        return subject.moves(lambda x: _constraints(subject, x, found.y))
    if Feature.prox not in subject.kind.features:
        return False
    # Far out and with a short step, where a penalty does not send everything to zero, nor a set hold its own.
    far = subject.near(found.y, _FAR)
    return subject.moves(lambda x: _prox(subject, x, far))


def _prox(subject: Subject, x: Tensor, v: Tensor) -> Tensor:
    prox = inner_objective(subject.problem, x).prox
    assert prox is not None
    return prox(v, _SHORT).detach()


def _through_start(subject: Subject) -> bool:
    if subject.problem.problem.init is None:
        return False
    return subject.moves(lambda x: subject.problem.start(x, subject.given).detach())


def _constraints(subject: Subject, x: Tensor, y: Tensor) -> Tensor:
    objective = inner_objective(subject.problem, x)
    parts = [] if objective.constraints is None else [*objective.constraints.tensors()]
    parts += [] if objective.nonlinear is None else [*objective.nonlinear.values(y)]
    return torch.cat([part.detach().reshape(-1) for part in parts])


def _of_no_account(verdict: Verdict) -> Verdict:
    """The verdict on an inner problem that is not solved, where only its steps matter."""
    if verdict.name not in ("inner solution", "curvature") or verdict.outcome is not Outcome.failed:
        return verdict
    return replace(verdict, outcome=Outcome.warning, remedy="of no account to estimators that differentiate steps")
