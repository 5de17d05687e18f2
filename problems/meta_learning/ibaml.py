"""iBaML: adaptation as a Gaussian posterior under a learned Gaussian prior, differentiated implicitly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bilevel._inner import AbstractInnerSolver
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.likelihood import AbstractLikelihood
from bilevel.hypergrad.aid import AID
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._evidence import Evidence, OuterLoss, Settings
from bilevel.problems.meta_learning._modules import as_functional, features_of
from bilevel.problems.meta_learning._tasks import Loss
from bilevel.problems.meta_learning.kl_products import Form, KLDiagonal, KLProducts
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate


def ibaml(
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
    inner: AbstractInnerSolver | None = None,
    linear_steps: int = 5,
    form: Form = "autograd",
    damping: float = 0.0,
    antithetic: bool = True,
    outer_loss: OuterLoss = "expected",
    outer_kl_weight: float = 0.0,
    hyper_prior_weight: float = 0.0,
    precision_prior: tuple[float, float] = (1.0, 0.01),
    seed: int = 0,
) -> Learner:
    """iBaML: g = E_q[loss(support)] + w KL(q || p), f = E_q[loss(query)], q = N(m_t, d_t) from the prior p = N(m, d).

    x is the prior, {"mean": m, "log_variance": log d}, both of the structure of the module's parameters; y the task's
    posterior, likewise, which starts at the prior. The weight w counts in g, and so in its Hessian and in the mixed
    derivative. With w = 1 / n, n the size of the support set, and a loss that is a mean of -log p, -n g is the evidence
    lower bound; less is a tempered posterior.

    Expectations are means over `samples` draws m_t + sqrt(d_t) e. `learner.prepare(batch, seed)` puts the noise e into
    the batch, and everything about one batch uses the same: inner gradients, Hessian products, mixed derivative.
    Otherwise y would not be stationary, and the products not those of one function. Predictions average
    probabilities over noise of their own: with `outer_loss="predictive"`, f is the loss of such averages, -log E_q[p],
    which is at most E_q[-log p] and does not make the posterior narrower than the predictions need.

    The hypergradient is implicit: H v = grad_y f by conjugate gradients with the divergence's diagonal as
    preconditioner; see `KLProducts`. Memory does not grow with the inner steps. Cost of an estimate: `inner_steps` + 1
    gradients of the expected loss, `linear_steps` + 1 products with its Hessian, and one gradient of f, each `samples`
    times that of the module. `w / d` is to the mean what lambda is to iMAML's parameters: with the variances frozen and
    equal, and no noise, this is iMAML with lambda = w / d.

    Source: Zhang, Li, Gao, Giannakis, "Scalable Bayesian meta-learning through generalized implicit gradients",
    AAAI 2023.

    Args:
        module: the network; its parameters that require a gradient are what the prior is over, and the mean's start.
        loss: (outputs, targets) -> mean over samples of -log p: `F.cross_entropy`, or `GaussianLikelihood(variance)`.
        kl_weight: w.
        samples: draws of the posterior for each task and batch.
        evaluation_samples: draws for a prediction.
        log_variance: where the prior's starts.
        isotropic: learn one prior variance for all parameters; posteriors have one for each all the same.
        learn_variance: learn the prior's variance, and adapt the posterior's. False: both stay at `log_variance`.
        inner_steps: of gradient descent in y.
        step: of gradient descent in the mean.
        variance_step: the same in the log-variance; None: `step`.
        inner: another inner solver instead of gradient descent.
        linear_steps: steps of conjugate gradients.
        form: how the divergence's second derivatives are evaluated; see `KLProducts`.
        damping: solve with H + damping I in the place of H.
        antithetic: draw noise in pairs e, -e.
        outer_loss: "expected": f as above; "predictive": f is -log E_q[p(target)], the loss of what is predicted.
        outer_kl_weight: add so many times KL(q || p) to f.
        hyper_prior_weight: add so many times -log p(m, d) to f, with m ~ N(0, 1) and 1 / d ~ Gamma.
        precision_prior: shape and rate of that Gamma distribution.
        seed: of the noise of predictions.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel import hypergradient
        >>> learner = ibaml(nn.Linear(1, 1), nn.functional.mse_loss, kl_weight=0.1, log_variance=-2.0)
        >>> tasks = {name: torch.ones(3, 4, 1) for name in ("support_x", "support_y", "query_x", "query_y")}
        >>> tasks = learner.prepare(tasks, seed=0)
        >>> found = hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=tasks)
        >>> found.y["log_variance"]["weight"].shape
        torch.Size([3, 1, 1])
    """
    settings = Settings(
        "ibaml",
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
    solver = descent(model, step, variance_step, inner_steps) if inner is None else inner
    noise = model.evaluation_noise()
    return Learner(
        name="ibaml",
        problem=BilevelProblem(model.f, model.g, init=model.start, tasks=True),
        x0=model.prior(net.params),
        y0=model.start(model.prior(net.params)),
        estimator=_implicit(model, solver, linear_steps, form, damping),
        adapt=solver,
        predict=lambda _, y, task: model.predict(y, task["query_x"], noise, task),
        export=lambda x: net.load(x["mean"]),
        prepare=model.prepare,
        draws=lambda _, y, task: model.draws(y, task["query_x"], noise, task),
        likelihood=loss if isinstance(loss, AbstractLikelihood) else None,
    )


def ibaml_head(
    body: nn.Module | Functional,
    head: nn.Module | Functional,
    loss: Loss,
    *,
    kl_weight: float = 4e-2,
    samples: int = 10,
    evaluation_samples: int = 100,
    log_variance: float = -2.0,
    isotropic: bool = False,
    learn_variance: bool = True,
    inner_steps: int = 10,
    step: float = 0.1,
    variance_step: float | None = None,
    inner: AbstractInnerSolver | None = None,
    linear_steps: int = 10,
    form: Form = "autograd",
    damping: float = 0.0,
    antithetic: bool = True,
    outer_loss: OuterLoss = "expected",
    outer_kl_weight: float = 0.0,
    hyper_prior_weight: float = 0.0,
    precision_prior: tuple[float, float] = (1.0, 0.01),
    seed: int = 0,
) -> Learner:
    """A Bayesian head: iBaML of the last layers, with a body that all tasks share.

    x is {"body", "mean", "log_variance"}, y the posterior of the head under that prior. With F the body's features of a
    set, g = E_q[loss(head; F(support))] + w KL(q || p) and f = E_q[loss(head; F(query))]: the body has no prior and is
    not adapted. Its features are computed once for each hypergradient, whatever the number of steps and draws, so that
    many of both are cheap. With a linear head and the cross-entropy, g is convex in the mean.

    Args:
        body: the module that makes features; what it returns for a sample is taken as one vector.
        head: the module that makes outputs of features.
        loss: as for `ibaml`, like all that follow.
        kl_weight: w.
        samples: draws of the posterior for each task and batch.
        evaluation_samples: draws for a prediction.
        log_variance: where the prior's starts.
        isotropic: learn one prior variance for all parameters of the head.
        learn_variance: learn the prior's variance, and adapt the posterior's.
        inner_steps: of gradient descent in y.
        step: of gradient descent in the mean.
        variance_step: the same in the log-variance; None: `step`.
        inner: another inner solver instead of gradient descent.
        linear_steps: steps of conjugate gradients.
        form: how the divergence's second derivatives are evaluated.
        damping: solve with H + damping I in the place of H.
        antithetic: draw noise in pairs e, -e.
        outer_loss: "expected": f as above; "predictive": f is -log E_q[p(target)], the loss of what is predicted.
        outer_kl_weight: add so many times KL(q || p) to f.
        hyper_prior_weight: add so many times -log p(m, d) to f.
        precision_prior: shape and rate of the Gamma distribution of 1 / d.
        seed: of the noise of predictions.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> learner = ibaml_head(nn.Linear(3, 4), nn.Linear(4, 2), nn.functional.cross_entropy)
        >>> sorted(learner.x0), sorted(learner.y0)
        (['body', 'log_variance', 'mean'], ['log_variance', 'mean'])
    """
    settings = Settings(
        "ibaml_head",
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
    features, top = as_functional(body), as_functional(head)
    model = Evidence.of(top, loss, top.params, settings, features=True)
    solver = descent(model, step, variance_step, inner_steps) if inner is None else inner
    noise = model.evaluation_noise()

    def encode(x: Tree, task: Mapping[str, Tensor]) -> dict[str, Tree]:
        prior = {key: x[key] for key in x if key != "body"}
        return {**prior, **{side: features_of(features, x["body"], task[f"{side}_x"]) for side in ("support", "query")}}

    return Learner(
        name="ibaml_head",
        problem=BilevelProblem(model.f, model.g, init=model.start, encode=encode, tasks=True),
        x0={"body": dict(features.params), **model.prior(top.params)},
        y0=model.start(model.prior(top.params)),
        estimator=_implicit(model, solver, linear_steps, form, damping),
        adapt=solver,
        predict=lambda x, y, task: model.predict(y, features_of(features, x["body"], task["query_x"]), noise, task),
        export=lambda x: nn.Sequential(features.load(x["body"]), top.load(x["mean"])),
        prepare=model.prepare,
        draws=lambda x, y, task: model.draws(y, features_of(features, x["body"], task["query_x"]), noise, task),
        likelihood=loss if isinstance(loss, AbstractLikelihood) else None,
    )


def _implicit(model: Evidence, solver: AbstractInnerSolver, linear_steps: int, form: Form, damping: float) -> AID:
    if not linear_steps >= 1:
        raise ValueError(f"`{model.settings.method}(linear_steps=...)` must be at least 1. Got {linear_steps}.")
    fixed = None if model.settings.learn_variance else model.settings.log_variance
    products = KLProducts(model.expectation, model.settings.kl_weight, form, fixed)
    linear = CG(rtol=0.0, max_steps=linear_steps, preconditioner=KLDiagonal())
    return AID(solver, linear, damping=damping, products=products)


def descent(model: Evidence, step: float, variance_step: float | None, steps: int) -> Iterate:
    """Gradient descent on the posterior, with a step of its own for the log-variance.

    Raises:
        ValueError: if a step is not positive.
    """
    if variance_step is None or not model.settings.learn_variance:
        return Iterate(GradientDescent(step), steps)
    if not (step > 0 and variance_step > 0):
        raise ValueError(
            f"`{model.settings.method}(step=..., variance_step=...)` must be positive. Got {step}, {variance_step}."
        )
    like = torch.empty(model.structure.size, dtype=model.structure.dtype, device=model.structure.device)
    return Iterate(GradientDescent(torch.cat([torch.full_like(like, s) for s in (step, variance_step)])), steps)
