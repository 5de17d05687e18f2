"""What a form of unrolling is: how y_N(x), the last iterate of an inner solver, is differentiated."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from torch import Tensor

from bilevel.hypergrad.unrolling.lacking import LOOSE
from bilevel.portable.pickling import AbstractPortable

if TYPE_CHECKING:
    from bilevel._inner import State
    from bilevel.hypergrad.unrolling.walk import Walk


@final
@dataclass(frozen=True, eq=False)
class Unrolled:
    """F(x) = f(x, y_N(x)) and its derivative.

    Attributes:
        grad: dF/dx `(p,)`.
        value: F `()`.
        end: the state after the last step, without a graph; its first entry is y_N `(*tasks, q)`.
        left: the part of the derivative that is lacking, where the steps are to converge; None: they are not, or the
            form does not say.
        allowed: how much of it may be.
    """

    grad: Tensor
    value: Tensor
    end: State
    left: float | None = None
    allowed: float = LOOSE


class AbstractUnrolling(AbstractPortable, abc.ABC):
    """A way to the derivative of F(x) = f(x, y_N(x)), where state_{k+1} = T_k(x, state_k) and y_N is in the last state.

    A value without state. With adjoints a_k (of the state before step k) and tangents Z_k = d state_k / dx,

        a_k = (dT_k/dstate)' a_{k+1},   dF/dx = df/dx + sum_k (dT_k/dx)' a_{k+1}       from the last step to the first,
        Z_{k+1} = (dT_k/dstate) Z_k + dT_k/dx,   dF/dx = df/dx + Z_N' df/dy            from the first step to the last.
    """

    @abc.abstractmethod
    def differentiate(self, walk: Walk) -> Unrolled:
        """Walk the iteration to its end and differentiate what f makes of it."""
