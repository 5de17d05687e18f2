"""Experiments by name."""

from __future__ import annotations

from torch.nn.functional import mse_loss

from bilevel._learner import Learner
from bilevel.few_shot.experiment import Experiment, Named
from bilevel.few_shot.networks import mlp
from bilevel.problems.maml import maml
from bilevel.solvers.adam import Adam
from bilevel.solvers.clipped import Clipped
from bilevel.tasks.sinusoid import Sinusoid


def maml_sinusoid(
    shots: int = 10, batch: int = 25, step: float = 0.01, inner_steps: int = 1, learn_steps: bool = False, seed: int = 0
) -> Experiment:
    """MAML on sinusoids: the experiment of Finn, Abbeel and Levine, ICML 2017."""
    learner = maml(mlp(seed=seed), mse_loss, step=step, inner_steps=inner_steps, learn_steps=learn_steps)
    return _sinusoid(learner, shots, batch)


def fomaml_sinusoid(
    shots: int = 10, batch: int = 25, step: float = 0.01, inner_steps: int = 1, seed: int = 0
) -> Experiment:
    """First-order MAML on the same."""
    learner = maml(mlp(seed=seed), mse_loss, step=step, inner_steps=inner_steps, first_order=True)
    return _sinusoid(learner, shots, batch)


def _sinusoid(learner: Learner, shots: int, batch: int, max_steps: int = 5000, clip: float | None = None) -> Experiment:
    outer = Adam(1e-3)
    return Experiment(
        learner,
        tasks=Sinusoid(shots=shots, queries=shots),
        validation=Sinusoid(shots=shots, queries=100),
        test=Sinusoid(shots=shots, queries=100),
        settings={
            "max_steps": max_steps,
            "batch": batch,
            "outer": outer if clip is None else Clipped(outer, max_norm=clip),
            "validate_every": 250,
        },
        evaluation={"episodes": 600, "curve": (0, 1, 5, 10)},
    )


_NAMED = (
    Named("maml-sinusoid", "MAML: regress sinusoids after one gradient step", maml_sinusoid),
    Named("fomaml-sinusoid", "first-order MAML on the same", fomaml_sinusoid),
)


def experiments() -> dict[str, Named]:
    """Every experiment by its name.

    Example:
        >>> experiments()["maml-sinusoid"].build(inner_steps=5).learner.name
        'MAML'
    """
    return {entry.name: entry for entry in _NAMED}
