"""Experiments by name."""

from __future__ import annotations

from bilevel.experiments.on_images import IMAGES
from bilevel.experiments.on_policies import POLICIES
from bilevel.experiments.on_sinusoids import SINUSOIDS
from bilevel.few_shot.experiment import NamedExperiment


def experiments() -> dict[str, NamedExperiment]:
    """Every experiment by its name.

    Example:
        >>> experiments()["maml-sinusoid"].build(inner_steps=5).learner.name
        'MAML'
    """
    return {entry.name: entry for entry in (*SINUSOIDS, *IMAGES, *POLICIES)}
