"""Torch's second derivatives: what is wrong without a word is refused, and what is right passes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import AID, BilevelError, BilevelProblem, FiniteDifferences, hypergradient
from bilevel.solvers import CG, ClosedForm

SURVEY = Path(__file__).resolve().parent.parent / "benchmarks" / "second_derivatives.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_operation_that_is_wrong_without_a_word_is_refused_and_every_right_one_passes() -> None:
    spec = importlib.util.spec_from_file_location("second_derivatives", SURVEY)
    assert spec is not None and spec.loader is not None
    survey: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(survey)
    words = {name: survey.verdict(name)[0] for name in survey.CASES}
    assert sum(word == "right" for word in words.values()) > 600
    passing = {name for name, word in words.items() if word in ("right", "wrong") and not survey.refusal(name)}
    wrong = {name for name, word in words.items() if word == "wrong"}
    right = {name for name, word in words.items() if word == "right"}
    assert wrong & passing == survey.AT_A_KINK | survey.CUT_OFF
    assert right - passing == survey.BY_CHANCE


def test_a_norm_that_vanishes_at_the_solution_is_not_successful() -> None:
    """Torch's second derivative of |y|^2, as the square of a norm, is NaN at y = 0."""
    problem = BilevelProblem(lambda x, y: (y - 1).square().sum(), lambda x, y: y.norm().square() + x * y.square().sum())
    aid = AID(ClosedForm(lambda x: torch.zeros(3)), CG())
    with pytest.raises(BilevelError, match=r"NaN|not finite|nonfinite|infinite"):
        hypergradient(problem, torch.tensor(1.0), torch.zeros(3), estimator=aid)
    aid = AID(ClosedForm(lambda x: torch.zeros(3)), CG(), products=FiniteDifferences())
    assert hypergradient(problem, torch.tensor(1.0), torch.zeros(3), estimator=aid).status.ok
