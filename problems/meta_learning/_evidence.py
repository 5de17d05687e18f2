"""Tasks whose parameters are Gaussian under a learned Gaussian prior: f, g, the start, the noise and the prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from bilevel._tree import Structure, Tree, ravel, tree_map
from bilevel.problems._variational import divergence, hyper_prior, normal_noise, rows, weights
from bilevel.problems.meta_learning._tasks import Loss, Side, is_cross_entropy, is_of_numbers, mixture_loss, task_loss

OuterLoss: TypeAlias = Literal["expected", "predictive"]

NOISE = {"support": "support_noise", "query": "query_noise"}


@final
@dataclass(frozen=True)
class Settings:
    """What the variational methods have in common; the arguments of `ibaml`, which explains them.

    Raises:
        ValueError: if one is out of range.
    """

    method: str
    kl_weight: float
    samples: int
    evaluation_samples: int
    log_variance: float
    isotropic: bool
    learn_variance: bool
    antithetic: bool
    outer_loss: OuterLoss
    outer_kl_weight: float
    hyper_prior_weight: float
    precision_prior: tuple[float, float]
    seed: int

    def __post_init__(self) -> None:
        name = self.method
        if not self.kl_weight > 0:
            raise ValueError(
                f"`{name}(kl_weight=...)` must be positive. Got {self.kl_weight}. Without a prior, tasks share nothing."
            )
        for key, least in (
            ("samples", 1),
            ("evaluation_samples", 1),
            ("outer_kl_weight", 0),
            ("hyper_prior_weight", 0),
        ):
            if not getattr(self, key) >= least:
                raise ValueError(f"`{name}({key}=...)` must be at least {least}. Got {getattr(self, key)}.")
        if self.antithetic and (self.samples % 2 or self.evaluation_samples % 2):
            raise ValueError(
                f"`{name}(antithetic=True)` draws pairs: `samples` and `evaluation_samples` must be even."
                f" Got {self.samples} and {self.evaluation_samples}. Change them, or pass `antithetic=False`."
            )
        if self.outer_loss not in get_args(OuterLoss):
            allowed = " or ".join(map(repr, get_args(OuterLoss)))
            raise ValueError(f"`{name}(outer_loss=...)` must be {allowed}. Got {self.outer_loss!r}.")
        if not math.isfinite(self.log_variance):
            raise ValueError(f"`{name}(log_variance=...)` must be a finite number. Got {self.log_variance}.")
        if min(self.precision_prior) <= 0:
            raise ValueError(f"`{name}(precision_prior=...)` must be positive numbers. Got {self.precision_prior}.")
        if not self.learn_variance and self.isotropic:
            raise ValueError(f"`{name}(isotropic=True)` says what is learned of a variance: needs learn_variance=True.")


@final
@dataclass(frozen=True, eq=False)
class Evidence:
    """g = E_q[support loss] + w KL(q || p) and f = E_q[query loss] + w' KL(q || p) - w'' log p(m, d), for one task.

    Or, in f, the loss of the averaged probabilities of the queries in the place of their average loss.

    Attributes:
        output: (weights, inputs) -> the model's outputs.
        loss: (outputs, targets) -> the mean over samples.
        structure: of the weights.
        settings: the rest.
        features: whether inputs are `z["support"]` and `z["query"]` instead of the task's own.
    """

    output: Callable[[Tree, Tensor], Tensor]
    loss: Loss
    structure: Structure
    settings: Settings
    features: bool

    @staticmethod
    def of(
        output: Callable[[Tree, Tensor], Tensor], loss: Loss, params: Tree, settings: Settings, *, features: bool
    ) -> Evidence:
        """With the structure of these parameters."""
        return Evidence(output, loss, ravel(params, "the module's parameters")[1], settings, features)

    def prior(self, params: Tree) -> dict[str, Tree]:
        """Where the prior starts: around these parameters."""
        if not self.settings.learn_variance:
            return {"mean": params}
        value = self.settings.log_variance
        if self.settings.isotropic:
            own = torch.tensor(value, dtype=self.structure.dtype, device=self.structure.device)
            return {"mean": params, "log_variance": own}
        return {"mean": params, "log_variance": tree_map(lambda leaf: torch.full_like(leaf, value), params)}

    def start(self, z: Mapping[str, Tree], *_: Any) -> dict[str, Tree]:
        """The posterior that is the prior."""
        if not self.settings.learn_variance:
            return {"mean": z["mean"]}
        log_d = z["log_variance"]
        if self.settings.isotropic:
            log_d = tree_map(lambda leaf: log_d + torch.zeros_like(leaf), z["mean"])
        return {"mean": z["mean"], "log_variance": log_d}

    def full(self, part: Mapping[str, Tree]) -> Mapping[str, Tree]:
        """A prior or posterior with its variance, where that is fixed."""
        if self.settings.learn_variance:
            return part
        return {**part, "log_variance": torch.full_like(rows(part["mean"])[:1].detach(), self.settings.log_variance)}

    def expectation(self, z: Tree, y: Tree, task: Mapping[str, Tensor], side: Side = "support") -> Tensor:
        """E_q[loss] on one side of the task, over the task's own noise."""
        outputs = self._outputs(z, y, task, side)
        # Targets are given to every draw: torch's mse_loss is wrong in vmaps of which the inner one has no targets.
        own = {key: task[key].expand(len(outputs), *task[key].shape) for key in _targets(task, side)}
        return torch.vmap(lambda output, own: task_loss(self.loss, output, own, side))(outputs, own).mean()

    def _outputs(self, z: Tree, y: Tree, task: Mapping[str, Tensor], side: Side) -> Tensor:
        """The outputs of each draw `(samples, n, ...)`."""
        inputs = z[side] if self.features else task[f"{side}_x"]
        if NOISE[side] not in task:
            raise KeyError(
                f"The tasks need the entry {NOISE[side]!r}, the noise of the expectation. Call `learner.prepare(batch,"
                f" seed)` first."
            )
        drawn = weights(self.full(y), task[NOISE[side]], self.structure)
        outputs: Tensor = torch.vmap(lambda drawn: self.output(drawn, inputs), randomness="same")(drawn)
        return outputs

    def g(self, z: Tree, y: Tree, task: Mapping[str, Tensor]) -> Tensor:
        """The inner objective."""
        return self.expectation(z, y, task) + self.settings.kl_weight * divergence(self.full(z), self.full(y))

    def f(self, z: Tree, y: Tree, task: Mapping[str, Tensor]) -> Tensor:
        """The outer objective."""
        settings = self.settings
        if settings.outer_loss == "expected":
            value = self.expectation(z, y, task, "query")
        else:
            value = mixture_loss(self.loss, self._outputs(z, y, task, "query"), task, "query")
        if settings.outer_kl_weight:
            value = value + settings.outer_kl_weight * divergence(self.full(z), self.full(y))
        if settings.hyper_prior_weight:
            value = value + settings.hyper_prior_weight * hyper_prior(self.full(z), *settings.precision_prior)
        return value

    def prepare(self, batch: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The batch with its noise: another one on the support and on the query set of each task."""
        tasks = len(batch["support_x"])
        like = torch.zeros((), dtype=self.structure.dtype, device=self.structure.device)
        shape = (2 * tasks, self.settings.samples, self.structure.size)
        noise = normal_noise(shape, seed, like, antithetic=self.settings.antithetic)
        return {**batch, NOISE["support"]: noise[:tasks], NOISE["query"]: noise[tasks:]}

    def predict(self, y: Tree, inputs: Tensor, noise: Tensor, task: Mapping[str, Tensor]) -> Tensor:
        """The posterior predictive: of classes the log of the mean probability, else the mean output."""
        found = self.draws(y, inputs, noise, task)
        if self._classifies(task):
            return found.logsumexp(0) - math.log(len(noise))
        return found.mean(0)

    def draws(self, y: Tree, inputs: Tensor, noise: Tensor, task: Mapping[str, Tensor]) -> Tensor:
        """The predictions of each draw of the posterior, `(samples, n, ...)`."""
        drawn = weights(self.full(y), noise, self.structure)
        found: Tensor = torch.vmap(lambda drawn: self.output(drawn, inputs), randomness="same")(drawn)
        return found.log_softmax(-1) if self._classifies(task) else found

    def _classifies(self, task: Mapping[str, Tensor]) -> bool:
        """Whether outputs are logits: of the cross-entropy, or of another loss of numbers of classes."""
        if is_cross_entropy(self.loss) or is_of_numbers(self.loss):
            return is_cross_entropy(self.loss)
        return "support_y" in task and not task["support_y"].is_floating_point()

    def evaluation_noise(self) -> Tensor:
        """The noise of predictions: the same for every task."""
        settings = self.settings
        like = torch.zeros((), dtype=self.structure.dtype, device=self.structure.device)
        shape = (settings.evaluation_samples, self.structure.size)
        return normal_noise(shape, settings.seed, like, antithetic=settings.antithetic)


def _targets(task: Mapping[str, Tensor], side: Side) -> list[str]:
    return [key for key in (f"{side}_y", f"{side}_mask") if key in task]
