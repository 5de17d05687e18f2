"""Expectations under a posterior, by draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from bilevel._validate import demand_types


@final
@dataclass(frozen=True)
class MonteCarlo:
    """E_q[loss] = mean_s loss(m_t + sqrt(d_t) e_s), with noise e_s ~ N(0, 1) that is part of the batch.

    Attributes:
        samples: draws of the posterior for each task and batch.
        evaluation_samples: draws for a prediction.
        antithetic: draw noise in pairs e, -e.
        seed: of the noise of predictions, which is the same for every task.
        loop: take draws, and tasks, one after the other: for modules that `torch.vmap` cannot take, such as recurrent
            ones. The numbers are the same.

    Raises:
        ValueError: if a number is less than one, or odd where pairs are drawn.

    Example:
        >>> MonteCarlo(samples=4, evaluation_samples=10).antithetic
        True
    """

    samples: int
    evaluation_samples: int
    antithetic: bool = True
    seed: int = 0
    loop: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        for name, value in (("samples", self.samples), ("evaluation_samples", self.evaluation_samples)):
            if value < 1:
                raise ValueError(f"`MonteCarlo({name}=...)` must be at least 1. Got {value}.")
        if self.antithetic and (self.samples % 2 or self.evaluation_samples % 2):
            raise ValueError(
                "`MonteCarlo(antithetic=True)` draws pairs: `samples` and `evaluation_samples` must be even."
                f" Got {self.samples} and {self.evaluation_samples}. Change them, or pass `antithetic=False`."
            )
