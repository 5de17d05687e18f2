"""MLflow."""

from __future__ import annotations

import time
from typing import Any, final

from bilevel.arguments.fits import demand_type
from bilevel.tracking.tracker import AbstractTracker


@final
class MLflow(AbstractTracker):
    """Metrics and parameters of a run of MLflow, which this begins and ends; another run that is active is left alone.

    Args:
        experiment: its name; made where there is none.
        run: the name of the run.
        uri: of the tracking server, or of a file store or data base; None: MLflow's own.
        settings: of the run, as parameters.

    Raises:
        ImportError: if mlflow is missing: `pip install "bilevel[mlflow]"`.

    Example:
        >>> from bilevel import minimize
        >>> from bilevel.problems import quadratic
        >>> instance = quadratic()
        >>> def run():
        ...     with MLflow("quadratics", run="first") as tracker:
        ...         return minimize(
        ...             instance.problem, instance.x0, instance.y0, max_steps=3, callback=tracker
        ...         )
    """

    def __init__(
        self,
        experiment: str = "bilevel",
        *,
        run: str | None = None,
        uri: str | None = None,
        settings: dict[str, str | int | float | bool] | None = None,
    ) -> None:
        demand_type("MLflow", "experiment", experiment, str)
        demand_type("MLflow", "run", run, str | None)
        demand_type("MLflow", "uri", uri, str | None)
        demand_type("MLflow", "settings", settings, dict[str, str | int | float | bool] | None)
        try:
            import mlflow.entities  # pyright: ignore[reportMissingImports]
            from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError('`MLflow(...)` needs mlflow: `pip install "bilevel[mlflow]"`.') from error
        self._entities: Any = mlflow.entities
        self._client: Any = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if known is None else known.experiment_id
        self.run_id: str = self._client.create_run(number, run_name=run).info.run_id
        if settings:
            self.settings(settings)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._entities.Metric(name, number, now, step) for name, number in numbers.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def settings(self, settings: dict[str, str | int | float | bool]) -> None:
        params = [self._entities.Param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(self.run_id, params=params)

    def flush(self) -> None:
        """Nothing waits: each number is sent at once."""

    def close(self) -> None:
        self._client.set_terminated(self.run_id)
