"""TensorBoard scalars of a training run."""

from __future__ import annotations

import os
from typing import Any, final

from bilevel.few_shot.validate import Validation
from bilevel.outer.solution import Record


@final
class Board:
    """Scalars by step: `outer/{loss,gradient_norm,seconds,skipped}`, `batch/score` and `validation/...`.

    Args:
        folder: where TensorBoard finds them.

    Raises:
        ImportError: if tensorboard is missing, naming the extra to install.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError('`tensorboard=` needs tensorboard: `pip install "bilevel[tensorboard]"`.') from error
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, record: Record, score: float | None, validation: Validation | None) -> None:
        """The scalars of a step."""
        scalars: dict[str, float | None] = {
            "outer/loss": record.value,
            "outer/gradient_norm": record.grad_norm,
            "outer/seconds": record.seconds,
            "outer/skipped": float(record.status.lost),
            "batch/score": score,
        }
        if validation is not None:
            scalars |= {
                f"validation/{validation.metric}": validation.score,
                f"validation/{validation.metric}_before": validation.before,
                "validation/loss": validation.loss,
            }
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
