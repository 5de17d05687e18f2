"""Gradient descent on a Gaussian posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from bilevel._tree import Structure
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate


@final
@dataclass(frozen=True)
class PosteriorDescent:
    """(m_t, l_t) <- (m_t, l_t) - (a grad_m g, b grad_l g), K times from the prior, l_t = log d_t.

    Attributes:
        steps: K.
        step: a; None: 1 / L of each task, L the largest curvature of g at the prior, which takes some 10 to 20 products
            with the Hessian; a derivative through the steps (`abml`) takes it as a constant. (Where b is given: 0.1.)
        variance_step: b; None: a.

    Raises:
        ValueError: if a step length is not positive, or the number of steps negative.

    Example:
        >>> PosteriorDescent(steps=5, step=0.1, variance_step=0.5).steps
        5
    """

    steps: int
    step: float | None = None
    variance_step: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        if self.steps < 0:
            raise ValueError(f"`PosteriorDescent(steps=...)` must be at least 0. Got {self.steps}.")
        for name, value in (("step", self.step), ("variance_step", self.variance_step)):
            if value is not None and not value > 0:
                raise ValueError(f"`PosteriorDescent({name}=...)` must be positive. Got {value}.")

    @checked()
    def iterate(self, structure: Structure, *, learn_variance: bool) -> Iterate:
        """The iteration for a mean of that structure, with a log-variance for each entry if that is learned."""
        if self.variance_step is None or not learn_variance:
            return Iterate(GradientDescent(self.step), self.steps)
        like = torch.empty(structure.size, dtype=structure.dtype, device=structure.device)
        step = 0.1 if self.step is None else self.step
        lengths = torch.cat([torch.full_like(like, length) for length in (step, self.variance_step)])
        return Iterate(GradientDescent(lengths), self.steps)
