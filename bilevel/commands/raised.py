"""What goes wrong in a run, and whose error it is: of f or g, or of how they were used."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from bilevel._numerics.misfits import origin
from bilevel._problem import BilevelProblem

_TORCH = Path(torch.__file__).parent


class Failure(Exception):  # noqa: N818  (its name is what the exit code says)
    """A computation that began and did not succeed; what it computed has been written."""


def told(error: BaseException, problem: str) -> str:
    """An error in a sentence, which names f or g where it was raised there."""
    name, kind = raised_by(error), type(origin(error)).__name__
    text = f"{kind}: {error}" if str(error) else kind
    return text if name is None else f"{name} of {problem} raised {text} (at {_where(origin(error))})"


def raised_by(error: BaseException) -> str | None:
    """Which objective of a problem raised the error, itself or by what it calls: "f", "g" or None."""
    for frame, _ in traceback.walk_tb(origin(error).__traceback__):
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if code.co_name in ("f", "g") and isinstance(first, BilevelProblem):
            return code.co_name
    return None


def _where(error: BaseException) -> str:
    """`file.py:12`: the innermost line that is not torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _TORCH not in Path(frame.filename).parents]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"
