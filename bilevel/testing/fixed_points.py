"""Fixed points in closed form, or next to it: what estimators and solvers for them are tested by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.shapes import Shape, demand_shapes

_NEWTON = 100  # steps


@final
@dataclass(frozen=True, eq=False)
class FixedPointFamily:
    """T(x, y) = A y + B x + c, or tanh of that, and f = |y - t|^2 / 2 + s'x.

    The oracle is dense: y* = (I - A)^-1 (B x + c), and h = s + (D B)' (I - (D A)')^-1 (y* - t), D = I, or the diagonal
    1 - y*^2 of the tanh, whose y* is found by Newton's method with the dense Jacobian.

    Args:
        A: `(q, q)`.
        B: `(q, p)`.
        c: `(q,)`.
        t: `(q,)`.
        s: `(p,)`.
        tanh: whether T is the tanh.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> family = FixedPointFamily(
        ...     torch.full((1, 1), -2.0).double(), torch.ones(1, 1).double(), one, one, one
        ... )
        >>> family.solution(2 * one)  # y = -2 y + x + 1
        tensor([1.], dtype=torch.float64)
    """

    A: Tensor
    B: Tensor
    c: Tensor
    t: Tensor
    s: Tensor
    tanh: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        axes = {"A": "q q", "B": "q p", "c": "q", "t": "q", "s": "p"}
        demand_shapes("FixedPointFamily", {name: Shape(each) for name, each in axes.items()}, vars(self))

    @property
    def problem(self) -> BilevelProblem:
        """f and T."""
        return BilevelProblem(self.f, fixed_point=self.map)

    @fitting
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        return (y - self.t).square().sum() / 2 + (self.s * x).sum()

    @fitting
    def map(self, x: Tensor, y: Tensor) -> Tensor:
        """T(x, y)."""
        image = self.A @ y + self.B @ x + self.c
        return image.tanh() if self.tanh else image

    @fitting
    def jacobian(self, y: Tensor) -> Tensor:
        """dT/dy at a fixed point y, where the slope of the tanh is 1 - y^2: `(q, q)`."""
        return self._slopes(y).unsqueeze(-1) * self.A

    @fitting
    def solution(self, x: Tensor) -> Tensor:
        """y*, of the tanh the one that Newton's method finds from zero."""
        y, eye = torch.zeros_like(self.c), torch.eye(len(self.c), dtype=self.A.dtype, device=self.A.device)
        for _ in range(_NEWTON if self.tanh else 1):
            image = self.map(x, y)
            step: Tensor = torch.linalg.solve(eye - self.jacobian(image if self.tanh else y), y - image)
            y = y - step
            if float(step.abs().max()) <= 1e-15:
                break
        return y

    @fitting
    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """The hypergradient, y the fixed point at x."""
        eye = torch.eye(len(self.c), dtype=self.A.dtype, device=self.A.device)
        w: Tensor = torch.linalg.solve((eye - self.jacobian(y)).mT, y - self.t)
        return self.s + self.B.mT @ (self._slopes(y) * w)

    def _slopes(self, y: Tensor) -> Tensor:
        return 1 - y.square() if self.tanh else torch.ones_like(y)
