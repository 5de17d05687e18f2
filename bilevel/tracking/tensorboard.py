"""TensorBoard."""

from __future__ import annotations

import os
from typing import Any, final

from bilevel.arguments.fits import demand_type
from bilevel.tracking.tracker import AbstractTracker


@final
class TensorBoard(AbstractTracker):
    """Scalars in a folder, for `tensorboard --logdir FOLDER`.

    Args:
        folder: of this run; those of several runs beside each other are drawn together.
        settings: of the run, shown as text.

    Raises:
        ImportError: if tensorboard is missing: `pip install "bilevel[tensorboard]"`.

    Example:
        >>> from bilevel import minimize
        >>> from bilevel.problems import quadratic
        >>> instance = quadratic()
        >>> def run(folder):
        ...     with TensorBoard(folder) as board:
        ...         return minimize(
        ...             instance.problem, instance.x0, instance.y0, max_steps=3, callback=board
        ...         )
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, settings: dict[str, str | int | float | bool] | None = None
    ) -> None:
        demand_type("TensorBoard", "folder", folder, str | os.PathLike)
        demand_type("TensorBoard", "settings", settings, dict[str, str | int | float | bool] | None)
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError('`TensorBoard(...)` needs tensorboard: `pip install "bilevel[tensorboard]"`.') from error
        untyped: Any = SummaryWriter
        self._writer: Any = untyped(os.fspath(folder))
        if settings:
            self.settings(settings)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def settings(self, settings: dict[str, str | int | float | bool]) -> None:
        text = "\n".join(f"    {name} = {value}" for name, value in settings.items())
        self._writer.add_text("settings", text)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
