"""Tasks whose parameters are Gaussian under a learned Gaussian prior: f, g, the start, the noise and the prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel._inner import AbstractInnerSolver
from bilevel._numerics.batched import is_batched
from bilevel._problem import Tasks
from bilevel._tree import Structure, Tree, tree_map, tree_parts
from bilevel._validate import demand_type
from bilevel.modules.functional import Functional
from bilevel.problems._variational import divergence, hyper_prior, normal_noise, rows, weights
from bilevel.problems.meta_learning._modules import SIDES, features_of, on_examples
from bilevel.problems.meta_learning._tasks import Loss, Side, is_cross_entropy, is_of_numbers, mixture_loss, task_loss
from bilevel.problems.meta_learning.gaussian_prior import GaussianPrior
from bilevel.problems.meta_learning.kl_system import KLSystem
from bilevel.problems.meta_learning.monte_carlo import MonteCarlo
from bilevel.problems.meta_learning.outer_objective import OuterObjective
from bilevel.problems.meta_learning.posterior_descent import PosteriorDescent

_KINDS: dict[str, Any] = {
    "prior": GaussianPrior,
    "draws": MonteCarlo,
    "inner": PosteriorDescent | AbstractInnerSolver,
    "system": KLSystem,
    "outer_objective": OuterObjective,
}
NOISE = {"support": "support_noise", "query": "query_noise"}


@final
@dataclass(frozen=True, eq=False, repr=False)
class Evidence:
    """g = E_q[support loss] + w KL(q || p) and the f of an `OuterObjective`, for one task.

    Attributes:
        output: (weights, inputs) -> the model's outputs.
        loss: (outputs, targets) -> the mean over samples.
        structure: of the weights.
        prior: its weight in g, and where its variance starts.
        monte_carlo: how E_q is evaluated.
        outer: what f is.
        features: whether inputs are `z["support"]` and `z["query"]` instead of the task's own.
    """

    output: Callable[[Tree, Tensor], Tensor]
    loss: Loss
    structure: Structure
    prior: GaussianPrior
    monte_carlo: MonteCarlo
    outer: OuterObjective
    features: bool = False

    def __repr__(self) -> str:
        """As it was when its numbers were the arguments of a method: a checkpoint knows its run by this text."""
        prior, draws, outer = self.prior, self.monte_carlo, self.outer
        settings = (
            f"method={'ibaml_head' if self.features else 'ibaml'!r}, kl_weight={prior.kl_weight!r},"
            f" samples={draws.samples!r}, evaluation_samples={draws.evaluation_samples!r},"
            f" log_variance={prior.log_variance!r}, isotropic={prior.isotropic!r},"
            f" learn_variance={prior.learn_variance!r}, antithetic={draws.antithetic!r}, outer_loss={outer.loss!r},"
            f" outer_kl_weight={outer.kl_weight!r}, hyper_prior_weight={outer.hyper_prior_weight!r},"
            f" precision_prior={outer.precision_prior!r}, seed={draws.seed!r}"
        )
        return (
            f"Evidence(output={self.output!r}, loss={self.loss!r}, structure={self.structure!r},"
            f" settings=Settings({settings}), features={self.features!r})"
        )

    def x0(self, params: Tree) -> dict[str, Tree]:
        """Where the prior starts: around these parameters."""
        if not self.prior.learn_variance:
            return {"mean": params}
        value = self.prior.log_variance
        if self.prior.isotropic:
            own = torch.tensor(value, dtype=self.structure.dtype, device=self.structure.device)
            return {"mean": params, "log_variance": own}
        return {"mean": params, "log_variance": tree_map(lambda leaf: torch.full_like(leaf, value), params)}

    def start(self, z: Mapping[str, Tree], *_: Any) -> dict[str, Tree]:
        """The posterior that is the prior."""
        if not self.prior.learn_variance:
            return {"mean": z["mean"]}
        log_d = z["log_variance"]
        if self.prior.isotropic:
            log_d = tree_map(lambda leaf: log_d + torch.zeros_like(leaf), z["mean"])
        return {"mean": z["mean"], "log_variance": log_d}

    def full(self, part: Mapping[str, Tree]) -> Mapping[str, Tree]:
        """A prior or posterior with its variance, where that is fixed."""
        if self.prior.learn_variance:
            return part
        return {**part, "log_variance": torch.full_like(rows(part["mean"])[:1].detach(), self.prior.log_variance)}

    @property
    def tasks(self) -> Tasks:
        """How the tasks of a problem of this are treated: as the draws are."""
        return "loop" if self.monte_carlo.loop else True

    def expectation(self, z: Tree, y: Tree, task: Mapping[str, Tensor], side: Side = "support") -> Tensor:
        """E_q[loss] on one side of the task, over the task's own noise."""
        outputs = self._outputs(z, y, task, side)
        if not is_batched(outputs):  # one task at a time: losses of any kind are right
            return torch.stack([task_loss(self.loss, output, task, side) for output in outputs]).mean()
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
        return self._of_draws(drawn, inputs, task.get(f"{side}_mask"))

    def _of_draws(self, drawn: Tree, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """The outputs of models side by side, or one after the other: `(samples, n, ...)`."""

        def one(drawn: Tree) -> Tensor:
            return on_examples(lambda examples: self.output(drawn, examples), inputs, mask)

        if self.monte_carlo.loop:
            leaves, build = tree_parts(drawn)
            rows = [leaf.unbind() for leaf in leaves]
            return torch.stack([one(build([row[k] for row in rows])) for k in range(len(rows[0]))])
        try:
            outputs: Tensor = torch.vmap(one, randomness="same")(drawn)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("vmap", "atching rule", "data pointer")):
                raise
            raise ValueError(
                f"the draws of a posterior are evaluated at once by `torch.vmap`, which cannot take this module"
                f" ({str(error).splitlines()[0]}). Write `draws=MonteCarlo(..., loop=True)`: draws and tasks one after"
                f" the other."
            ) from error
        return outputs

    def g(self, z: Tree, y: Tree, task: Mapping[str, Tensor]) -> Tensor:
        """The inner objective."""
        return self.expectation(z, y, task) + self.prior.kl_weight * divergence(self.full(z), self.full(y))

    def f(self, z: Tree, y: Tree, task: Mapping[str, Tensor]) -> Tensor:
        """The outer objective."""
        outer = self.outer
        if outer.loss == "expected":
            value = self.expectation(z, y, task, "query")
        else:
            value = mixture_loss(self.loss, self._outputs(z, y, task, "query"), task, "query")
        if outer.kl_weight:
            value = value + outer.kl_weight * divergence(self.full(z), self.full(y))
        if outer.hyper_prior_weight:
            value = value + outer.hyper_prior_weight * hyper_prior(self.full(z), *outer.precision_prior)
        return value

    def prepare(self, batch: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The batch with its noise: another one on the support and on the query set of each task."""
        tasks = len(batch["support_x"])
        like = torch.zeros((), dtype=self.structure.dtype, device=self.structure.device)
        shape = (2 * tasks, self.monte_carlo.samples, self.structure.size)
        noise = normal_noise(shape, seed, like, antithetic=self.monte_carlo.antithetic)
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
        found = self._of_draws(drawn, inputs, task.get("query_mask"))
        return found.log_softmax(-1) if self._classifies(task) else found

    def _classifies(self, task: Mapping[str, Tensor]) -> bool:
        """Whether outputs are logits: of the cross-entropy, or of another loss of numbers of classes."""
        if is_cross_entropy(self.loss) or is_of_numbers(self.loss):
            return is_cross_entropy(self.loss)
        return "support_y" in task and not task["support_y"].is_floating_point()

    def evaluation_noise(self) -> Tensor:
        """The noise of predictions: the same for every task."""
        own = self.monte_carlo
        like = torch.zeros((), dtype=self.structure.dtype, device=self.structure.device)
        shape = (own.evaluation_samples, self.structure.size)
        return normal_noise(shape, own.seed, like, antithetic=own.antithetic)


@final
@dataclass(frozen=True, eq=False)
class Predictive:
    """The functions of a learner: of a network under the prior, or of its head, where there are features of a body.

    The noise of predictions is the same for every task, and is drawn once.
    """

    model: Evidence
    net: Functional
    body: Functional | None = None
    noise: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", self.model.evaluation_noise())

    def encode(self, x: Tree, task: Mapping[str, Tensor]) -> dict[str, Tree]:
        """The prior of the head, and the features of both sets."""
        assert self.body is not None
        own = {key: x[key] for key in x if key != "body"}
        return {**own, **{side: features_of(self.body, x["body"], task, side) for side in SIDES}}

    def predict(self, x: Tree, y: Tree, task: Mapping[str, Tensor]) -> Tensor:
        return self.model.predict(y, self._inputs(x, task), self.noise, task)

    def draws(self, x: Tree, y: Tree, task: Mapping[str, Tensor]) -> Tensor:
        return self.model.draws(y, self._inputs(x, task), self.noise, task)

    def export(self, x: Tree) -> nn.Module:
        head = self.net.load(x["mean"])
        return head if self.body is None else nn.Sequential(self.body.load(x["body"]), head)

    def _inputs(self, x: Tree, task: Mapping[str, Tensor]) -> Tensor:
        return task["query_x"] if self.body is None else features_of(self.body, x["body"], task, "query")


def demand_variational(call: str, **given: object) -> None:
    """Refuse arguments of a variational method that are not of their types.

    Raises:
        TypeError: naming the first.
    """
    for name, value in given.items():
        demand_type(call, name, value, _KINDS[name])


def _targets(task: Mapping[str, Tensor], side: Side) -> list[str]:
    return [key for key in (f"{side}_y", f"{side}_mask") if key in task]
