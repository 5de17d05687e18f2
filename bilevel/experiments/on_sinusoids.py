"""Experiments on sinusoids: the regression of Finn, Abbeel and Levine, ICML 2017."""

from __future__ import annotations

from torch.nn.functional import mse_loss

from bilevel.few_shot.experiment import Experiment, NamedExperiment
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.networks import mlp
from bilevel.few_shot.options import Validating
from bilevel.few_shot.training import Evaluating, Training
from bilevel.problems.meta_learning.anil import anil
from bilevel.problems.meta_learning.gaussian_likelihood import GaussianLikelihood
from bilevel.problems.meta_learning.gaussian_prior import GaussianPrior
from bilevel.problems.meta_learning.ibaml import ibaml, ibaml_head
from bilevel.problems.meta_learning.imaml import imaml
from bilevel.problems.meta_learning.kl_system import KLSystem
from bilevel.problems.meta_learning.maml import maml
from bilevel.problems.meta_learning.monte_carlo import MonteCarlo
from bilevel.solvers.adam import Adam
from bilevel.solvers.armijo import Armijo
from bilevel.solvers.cg import CG
from bilevel.solvers.clipped import Clipped
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.newton import Newton
from bilevel.tasks.sinusoid import Sinusoid


def maml_sinusoid(
    shots: int = 10, batch: int = 25, step: float = 0.01, inner_steps: int = 1, learn_steps: bool = False, seed: int = 0
) -> Experiment:
    """MAML; its score is that after `inner_steps` steps, the curve that of more."""
    learner = maml(mlp(seed=seed), mse_loss, step=step, inner_steps=inner_steps, learn_steps=learn_steps)
    return _experiment(learner, shots, _training(batch), curve=(0, 1, 5, 10))


def fomaml_sinusoid(
    shots: int = 10, batch: int = 25, step: float = 0.01, inner_steps: int = 1, seed: int = 0
) -> Experiment:
    """First-order MAML."""
    learner = maml(mlp(seed=seed), mse_loss, step=step, inner_steps=inner_steps, first_order=True)
    return _experiment(learner, shots, _training(batch), curve=(0, 1, 5, 10))


def anil_sinusoid(
    shots: int = 10, batch: int = 25, step: float = 0.01, inner_steps: int = 5, seed: int = 0
) -> Experiment:
    """ANIL: the last layer is adapted, by as many steps as were trained with."""
    net = mlp(seed=seed)
    learner = anil(net[:-1], net[-1], mse_loss, step=step, inner_steps=inner_steps)
    return _experiment(learner, shots, _training(batch))


def imaml_sinusoid(
    shots: int = 10,
    batch: int = 10,
    regularization: float = 0.5,
    step: float = 0.05,
    inner_steps: int = 16,
    linear_steps: int = 5,
    clip: float = 1.0,
    seed: int = 0,
) -> Experiment:
    """Proximal adaptation with backtracking, iMAML: curvature grows in training, and no fixed step stays stable."""
    inner = Iterate(GradientDescent(step), inner_steps, line_search=Armijo(growth=1.5))
    learner = imaml(mlp(seed=seed), mse_loss, regularization=regularization, inner=inner, linear_steps=linear_steps)
    return _experiment(learner, shots, _training(batch, max_steps=2000, clip=clip))


def ibaml_sinusoid(
    shots: int = 10,
    batch: int = 25,
    rate: float = 2e-3,
    noise: float = 0.3,
    variance: float | None = None,
    full: bool = False,
    kl_weight: float | None = None,
    samples: int | None = None,
    log_variance: float | None = None,
    inner_steps: int | None = None,
    linear_steps: int = 10,
    clip: float = 10.0,
    seed: int = 0,
) -> Experiment:
    """A learned Gaussian prior of the last layer (or, `full`, of all), iBaML; the score is that of the predictive mean.

    `noise` is the standard deviation of that on the targets, `variance` what the likelihood takes for its square; all
    parameters are adapted less exactly, so that what is left of the error counts as noise there.
    """
    net = mlp(seed=seed)
    system = KLSystem(linear_steps)
    if full:
        steps = 12 if inner_steps is None else inner_steps
        learner = ibaml(
            net,
            GaussianLikelihood(0.3 if variance is None else variance),
            prior=GaussianPrior(
                0.03 if kl_weight is None else kl_weight, -4.5 if log_variance is None else log_variance
            ),
            draws=MonteCarlo(4 if samples is None else samples, 100, seed=seed),
            inner=Iterate(GradientDescent(0.05), steps, line_search=Armijo(growth=1.5)),
            system=system,
        )
    else:
        steps = 3 if inner_steps is None else inner_steps
        learner = ibaml_head(
            net[:-1],
            net[-1],
            GaussianLikelihood(0.09 if variance is None else variance),
            prior=GaussianPrior(
                0.1 if kl_weight is None else kl_weight, -2.0 if log_variance is None else log_variance
            ),
            draws=MonteCarlo(10 if samples is None else samples, 100, seed=seed),
            inner=Newton(tol=0.0, max_steps=steps, linear=CG(rtol=0.0, max_steps=10)),
            system=system,
        )
    return _experiment(learner, shots, _training(batch, rate=rate, max_steps=500, clip=clip), noise=noise)


def _experiment(
    learner: Learner,
    shots: int,
    training: Training,
    *,
    curve: tuple[int, ...] = (),
    noise: float = 0.0,
) -> Experiment:
    return Experiment(
        learner,
        tasks=Sinusoid(shots=shots, queries=shots, noise=noise),
        validation=Validating(Sinusoid(shots=shots, queries=100, noise=noise), every=250),
        test=Sinusoid(shots=shots, queries=100, noise=noise),
        description=f"{learner.name} on sinusoids, {shots} shots" + (f", noise {noise:g}" if noise else ""),
        settings=training,
        evaluation=Evaluating(curve=curve),
    )


def _training(batch: int, *, rate: float = 1e-3, max_steps: int = 5000, clip: float | None = None) -> Training:
    outer = Adam(rate) if clip is None else Clipped(Adam(rate), max_norm=clip)
    return Training(max_steps, batch, outer, checkpoint_every=1000)


SINUSOIDS = (
    NamedExperiment("maml-sinusoid", "MAML: regress sinusoids after one gradient step", maml_sinusoid),
    NamedExperiment("fomaml-sinusoid", "first-order MAML on the same", fomaml_sinusoid),
    NamedExperiment("anil-sinusoid", "ANIL on the same: only the last layer is adapted", anil_sinusoid),
    NamedExperiment("imaml-sinusoid", "iMAML on the same, with backtracking and implicit gradients", imaml_sinusoid),
    NamedExperiment(
        "ibaml-sinusoid", "iBaML on the same: a Gaussian posterior of the last layer for each task", ibaml_sinusoid
    ),
)
