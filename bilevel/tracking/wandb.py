"""Weights & Biases."""

from __future__ import annotations

from typing import Any, final

from bilevel.arguments.fits import demand_type
from bilevel.tracking.tracker import AbstractTracker


@final
class WandB(AbstractTracker):
    """A run of Weights & Biases, which this begins and ends.

    Args:
        project: its name.
        run: the name of the run.
        mode: "online"; "offline", in files that `wandb sync` sends later; or "disabled".
        settings: of the run, as its configuration.

    Raises:
        ImportError: if wandb is missing: `pip install wandb`.

    Example:
        >>> from bilevel import minimize
        >>> from bilevel.problems import quadratic
        >>> instance = quadratic()
        >>> def run():
        ...     with WandB("quadratics", mode="offline") as tracker:
        ...         return minimize(
        ...             instance.problem, instance.x0, instance.y0, max_steps=3, callback=tracker
        ...         )
    """

    def __init__(
        self,
        project: str = "bilevel",
        *,
        run: str | None = None,
        mode: str = "online",
        settings: dict[str, str | int | float | bool] | None = None,
    ) -> None:
        demand_type("WandB", "project", project, str)
        demand_type("WandB", "run", run, str | None)
        demand_type("WandB", "settings", settings, dict[str, str | int | float | bool] | None)
        demand_type("WandB", "mode", mode, str)
        if mode not in ("online", "offline", "disabled"):
            raise ValueError(f'`WandB(mode=...)` must be "online", "offline" or "disabled". Got {mode!r:.80}.')
        try:
            import wandb
        except ImportError as error:
            raise ImportError("`WandB(...)` needs wandb: `pip install wandb`.") from error
        untyped: Any = wandb
        self._run: Any = untyped.init(project=project, name=run, mode=mode, config=settings or {})

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def settings(self, settings: dict[str, str | int | float | bool]) -> None:
        self._run.config.update(settings)

    def flush(self) -> None:
        """Its own process writes what it is sent."""

    def close(self) -> None:
        self._run.finish()
