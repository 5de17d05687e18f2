"""The strong Wolfe line search, as a coroutine on numbers."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from bilevel._result import Status

DECREASE = 1e-4  # phi(t) <= phi(0) + DECREASE t phi'(0)
CURVATURE = 0.9  # |phi'(t)| <= CURVATURE |phi'(0)|
# At most so many: forty halvings shrink an interval to 1e-12 of itself, where the search ends anyway.
_EVALUATIONS = 40
# Where values and slopes are both noise, more tell nothing: ten halvings have shrunk the interval a thousandfold.
_EVALUATIONS_IN_NOISE = 10
_UNEXPLAINED = 10.0  # times what slopes at both ends say
_GROWTH = 10.0  # how much longer the next step may be while no upper end is known

Search: TypeAlias = Generator[float, tuple[float, float], Status]


class _End(NamedTuple):
    t: float
    phi: float
    slope: float


def strong_wolfe(phi0: float, slope0: float, t: float, noise: float, most: float = math.inf) -> Search:
    """Find t > 0 with phi(t) <= phi(0) + c1 t phi'(0) and |phi'(t)| <= c2 |phi'(0)|, c1 = 1e-4, c2 = 0.9.

    A coroutine: it yields the t to try and is sent (phi(t), phi'(t)). An interval whose best end satisfies the
    first condition is grown, then shrunk by cubic interpolation. Differences of phi up to `noise` are not
    believed: there the slopes alone decide, as in the approximate Wolfe conditions, so that gradients can be
    brought down to their own rounding floor rather than to the square root of that of phi.

    Source: Nocedal, Wright, "Numerical optimization" (2006), algorithms 3.5 and 3.6; Hager, Zhang, "A new conjugate
    gradient method with guaranteed descent and an efficient line search", SIAM J. Optim. 16 (2005).

    Args:
        phi0: phi(0).
        slope0: phi'(0), negative.
        t: the first step to try.
        noise: the rounding error of phi.
        most: the longest step that is allowed; there the first condition alone is enough while phi still falls.

    Returns:
        successful: the last t tried is acceptable (it may satisfy the first condition only, where no point was
        found that satisfies both); diverged: phi falls without end; nonfinite: no finite value was met;
        line_search_failed: there is no decrease.
    """
    lo, hi = _End(0.0, phi0, slope0), None
    for count in range(1, _EVALUATIONS + 1):
        phi, slope = yield t
        end = _End(t, phi, slope)
        finite = math.isfinite(phi) and math.isfinite(slope)
        if not finite or phi > phi0 + DECREASE * t * slope0 + noise or phi > lo.phi + noise:
            hi = end
        elif abs(slope) <= -CURVATURE * slope0:
            return Status.successful
        else:
            if slope * (1.0 if hi is None else hi.t - lo.t) >= 0:
                hi = lo
            lo = end
        if hi is None and t >= most:
            return Status.successful
        if hi is None:
            t = min(_GROWTH * t, most)
        elif abs(hi.t - lo.t) <= 1e-12 * max(hi.t, lo.t):
            break  # a kink, or rounding
        elif -t * slope0 <= noise and count >= _EVALUATIONS_IN_NOISE:
            break  # values and slopes are both noise
        else:
            t = _between(lo, hi, noise)
    if hi is None:
        return Status.diverged
    if lo.phi < phi0:
        yield lo.t
        return Status.successful
    return Status.line_search_failed if math.isfinite(hi.phi) else Status.nonfinite


def jump(trials: Sequence[tuple[float, float, float]]) -> float:
    """The largest jump of phi between neighboring trials (t, phi(t), phi'(t)) that no slope explains; 0: none.

    Where phi is continuous, values as near to one another as a failed search makes them differ by what slopes say,
    even wrong ones, within a factor. What is more is the error of evaluation, such as that of bfloat16 under autocast.
    """
    ordered = sorted(trial for trial in trials if math.isfinite(trial[1]) and math.isfinite(trial[2]))
    found = 0.0
    for (t, phi, slope), (after, phi_after, slope_after) in pairwise(ordered):
        apart = abs(phi_after - phi)
        if apart > _UNEXPLAINED * max(abs(slope), abs(slope_after)) * (after - t):
            found = max(found, apart)
    return found


def _between(lo: _End, hi: _End, noise: float) -> float:
    """Where between the ends to look next: the minimizer of the cubic through both, kept off the ends."""
    width = hi.t - lo.t
    if not (math.isfinite(hi.phi) and math.isfinite(hi.slope)):
        return lo.t + 0.2 * width
    if abs(hi.phi - lo.phi) <= noise and lo.slope * hi.slope < 0:
        fraction = lo.slope / (lo.slope - hi.slope)
    else:
        a, b = lo.slope * width, hi.slope * width
        d = a + b - 3 * (hi.phi - lo.phi)
        root = d * d - a * b
        if not (root >= 0 and math.isfinite(root)):
            return lo.t + 0.5 * width
        root = math.sqrt(root)
        below = b - a + 2 * root
        fraction = 1 - (b + root - d) / below if below != 0 else 0.5
    return lo.t + min(max(fraction, 0.1), 0.9) * width if math.isfinite(fraction) else lo.t + 0.5 * width
