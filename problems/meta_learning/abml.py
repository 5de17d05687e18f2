"""ABML: adaptation as a Gaussian posterior under a learned Gaussian prior, differentiated through its iterations."""

from __future__ import annotations

from torch import nn

from bilevel._problem import BilevelProblem
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.likelihood import AbstractLikelihood
from bilevel.hypergrad.itd import ITD
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._evidence import Evidence, OuterLoss, Settings
from bilevel.problems.meta_learning._modules import as_functional
from bilevel.problems.meta_learning._tasks import Loss
from bilevel.problems.meta_learning.ibaml import descent


def abml(
    module: nn.Module | Functional,
    loss: Loss,
    *,
    kl_weight: float = 4e-4,
    samples: int = 4,
    evaluation_samples: int = 10,
    log_variance: float = -8.5,
    isotropic: bool = False,
    learn_variance: bool = True,
    inner_steps: int = 5,
    step: float = 0.1,
    variance_step: float | None = None,
    checkpoint: bool = False,
    antithetic: bool = True,
    outer_loss: OuterLoss = "expected",
    outer_kl_weight: float = 0.0,
    hyper_prior_weight: float = 0.0,
    precision_prior: tuple[float, float] = (1.0, 0.01),
    seed: int = 0,
) -> Learner:
    """ABML: g and f of `ibaml`, y what K steps of gradient descent on g make of the prior, and the gradient of that.

    The gradient is explicit: through the steps, the prior being both in g and the start of y. It is the exact gradient
    of what K steps give, whatever K, and differs from the gradient at y* by as much as the steps have yet to forget of
    their start. Cost of an estimate: K gradients of the expected loss and K products with its second derivatives;
    memory grows by one gradient's graph a step, or as the square root of K with `checkpoint`.

    Source: Ravi, Beatson, "Amortized Bayesian meta-learning", ICLR 2019. Theirs takes f on support and query set
    together, with `outer_kl_weight` = `kl_weight`, and draws with other variance reduction.

    Args:
        module: the network; its parameters that require a gradient are what the prior is over, and the mean's start.
        loss: (outputs, targets) -> mean over samples of -log p.
        kl_weight: w.
        samples: draws of the posterior for each task and batch.
        evaluation_samples: draws for a prediction.
        log_variance: where the prior's starts.
        isotropic: learn one prior variance for all parameters.
        learn_variance: learn the prior's variance, and adapt the posterior's.
        inner_steps: K.
        step: of gradient descent in the mean.
        variance_step: the same in the log-variance; None: `step`.
        checkpoint: keep few of the iterates and compute the others again.
        antithetic: draw noise in pairs e, -e.
        outer_loss: "expected": f as above; "predictive": f is -log E_q[p(target)], the loss of what is predicted.
        outer_kl_weight: add so many times KL(q || p) to f.
        hyper_prior_weight: add so many times -log p(m, d) to f.
        precision_prior: shape and rate of the Gamma distribution of 1 / d.
        seed: of the noise of predictions.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> abml(nn.Linear(1, 1), nn.functional.mse_loss, inner_steps=3).adapt.max_steps
        3
    """
    settings = Settings(
        "abml",
        kl_weight,
        samples,
        evaluation_samples,
        log_variance,
        isotropic,
        learn_variance,
        antithetic,
        outer_loss,
        outer_kl_weight,
        hyper_prior_weight,
        precision_prior,
        seed,
    )
    net = as_functional(module)
    model = Evidence.of(net, loss, net.params, settings, features=False)
    solver = descent(model, step, variance_step, inner_steps)
    noise = model.evaluation_noise()
    return Learner(
        name="abml",
        problem=BilevelProblem(model.f, model.g, init=model.start, tasks=True),
        x0=model.prior(net.params),
        y0=model.start(model.prior(net.params)),
        estimator=ITD(solver, checkpoint=checkpoint),
        adapt=solver,
        predict=lambda _, y, task: model.predict(y, task["query_x"], noise, task),
        export=lambda x: net.load(x["mean"]),
        prepare=model.prepare,
        draws=lambda _, y, task: model.draws(y, task["query_x"], noise, task),
        likelihood=loss if isinstance(loss, AbstractLikelihood) else None,
    )
