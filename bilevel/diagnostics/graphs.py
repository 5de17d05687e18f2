"""Test of `check`: what f and the inner problem owe to x and y is in their graphs."""

from __future__ import annotations

from bilevel.diagnostics.findings import Findings
from bilevel.diagnostics.subject import Subject
from bilevel.requirements.first_look import first_look
from bilevel.requirements.properties import DoesNotApply


def graphs_are_whole(subject: Subject, found: Findings) -> Findings:
    """Whether f, g and whatever else y follows from see x and y where their values do; silent where they do."""
    if found.detached or not found.deterministic:  # which has been said
        return found
    try:
        lost = "; ".join(dict.fromkeys(first_look(subject.problem, subject.x, found.y).lacking.values()))
    except DoesNotApply as refused:
        lost = refused.reason
    if not lost or (found.dependence == "none" and "no path of any graph" in lost):
        return found
    what, _, remedy = lost.partition(". ")
    return found.saying("graphs", False, what, remedy)
