"""`bilevel check`: the verdicts on a problem."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bilevel.commands.raised import Failure
from bilevel.commands.result import plain
from bilevel.commands.subject import subject
from bilevel.diagnostics.check import check as check_problem
from bilevel.diagnostics.verdict import Outcome


def check(problem: str, settings: Sequence[str], seed: int | None, *, as_json: bool) -> None:
    """Print the verdicts on a problem at its start, as text or as JSON.

    Raises:
        ValueError: if the request makes no sense.
        Failure: if a test failed; the verdicts are printed first.
    """
    at = subject(problem, settings, seed)
    made = at.instance
    found = check_problem(made.problem, made.x0, made.y0, data=at.data, seed=seed or 0)
    print(json.dumps(plain(found.as_dict()), indent=2, allow_nan=False, ensure_ascii=False) if as_json else found)
    if not found.ok:
        failed = [verdict.name for verdict in found.verdicts if verdict.outcome is Outcome.failed]
        raise Failure(f"{problem} did not pass: {', '.join(failed)}.")
