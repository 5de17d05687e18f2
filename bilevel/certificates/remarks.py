"""What to know of a bound that is true and says little."""

from __future__ import annotations

import math
from collections.abc import Mapping

_UNEVEN = 1e3  # times the error that L / mu admits: from here on the remedy is better scaled variables

_REMEDIES = {
    "inner": "solve the inner problem more accurately",
    "linear": "solve the linear system more accurately",
    "estimate": "take an estimate that is nearer to the implicit gradient: more steps, samples or weight",
    "penalty": "raise the weight",
    "refined": "solve the inner problem more accurately",
    "rounding": "compute in float64, and scale x and y so that rounding counts less",
}


def remark(bound: float, grad_norm: float, terms: Mapping[str, float], kappa: float | None, refined: bool) -> str:
    """That a bound exceeds |z|, why, and what helps; empty where it is less, or no bound at all.

    It is then valid and says nothing of the direction of h, nor that h is not 0; only that |h| <= |z| + bound. Either
    the error is large, or z is nearly 0 (at the end of a run), or the bound is far above the error: by up to L / mu
    times, since it cannot know along which curvatures the errors lie.
    """
    if not math.isfinite(bound) or bound < grad_norm or bound == 0:
        return ""
    part = max(terms, key=lambda name: terms[name])
    text = (
        f"valid, but not below |grad| = {grad_norm:.3g}: it tells neither where h points to nor that it is not 0. Most"
        f" of it is the part {part!r}: {_REMEDIES[part]}."
    )
    if kappa is not None and kappa >= _UNEVEN:
        text += (
            f" It may be up to L / mu = {kappa:.1e} times the error: rescale y so that its curvatures are alike, or"
            f" regularize g."
        )
    if not refined:
        text += " `certify(refine=True)` is sharper."
    return text + " `estimate.error_estimate` says how large the error is likely to be."
