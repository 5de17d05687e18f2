"""iBaML: adaptation as a Gaussian posterior under a learned Gaussian prior, differentiated implicitly."""

from __future__ import annotations

from torch import nn

from bilevel._inner import AbstractInnerSolver
from bilevel._problem import BilevelProblem
from bilevel._tree import ravel
from bilevel._validate import grouped
from bilevel.arguments.checked import checked
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.likelihood import AbstractLikelihood
from bilevel.hypergrad.aid import AID
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._evidence import Evidence, Predictive, demand_variational
from bilevel.problems.meta_learning._formerly import INNER, MONTE_CARLO, OUTER, PRIOR, SYSTEM
from bilevel.problems.meta_learning._modules import as_functional
from bilevel.problems.meta_learning._tasks import Loss
from bilevel.problems.meta_learning.gaussian_prior import GaussianPrior
from bilevel.problems.meta_learning.kl_products import KLDiagonal, KLProducts
from bilevel.problems.meta_learning.kl_system import KLSystem
from bilevel.problems.meta_learning.monte_carlo import MonteCarlo
from bilevel.problems.meta_learning.outer_objective import OuterObjective
from bilevel.problems.meta_learning.posterior_descent import PosteriorDescent
from bilevel.solvers.cg import CG


@grouped(prior=PRIOR, draws=MONTE_CARLO, inner=INNER, system=SYSTEM, outer_objective=OUTER)
@checked()
def ibaml(
    module: nn.Module | Functional,
    loss: Loss,
    *,
    prior: GaussianPrior = GaussianPrior(kl_weight=4e-4, log_variance=-8.5),
    draws: MonteCarlo = MonteCarlo(samples=4, evaluation_samples=10),
    inner: PosteriorDescent | AbstractInnerSolver = PosteriorDescent(steps=5),
    system: KLSystem = KLSystem(steps=5),
    outer_objective: OuterObjective = OuterObjective(),
) -> Learner:
    """iBaML: g = E_q[loss(support)] + w KL(q || p), f = E_q[loss(query)], q = N(m_t, d_t) from the prior p = N(m, d).

    x is the prior, {"mean": m, "log_variance": log d}, both of the structure of the module's parameters; y the task's
    posterior, likewise, which starts at the prior. The weight w counts in g, and so in its Hessian and in the mixed
    derivative.

    Expectations are means over draws m_t + sqrt(d_t) e. `learner.prepare(batch, seed)` puts the noise e into the
    batch, and everything about one batch uses the same: inner gradients, Hessian products, mixed derivative. Otherwise
    y would not be stationary, and the products not those of one function. Predictions average probabilities over noise
    of their own.

    The hypergradient is implicit: H v = grad_y f by conjugate gradients with the divergence's diagonal as
    preconditioner; see `KLProducts`. Memory does not grow with the inner steps. Cost of an estimate: `inner.steps` + 1
    gradients of the expected loss, `system.steps` + 1 products with its Hessian, and one gradient of f, each
    `draws.samples` times that of the module. With the variances frozen and equal, and no noise, this is iMAML with
    lambda = w / d.

    Source: Zhang, Li, Gao, Giannakis, "Scalable Bayesian meta-learning through generalized implicit gradients",
    AAAI 2023.

    Args:
        module: the network; its parameters that require a gradient are what the prior is over, and the mean's start.
        loss: (outputs, targets) -> mean over samples of -log p: `F.cross_entropy`, or `GaussianLikelihood(variance)`.
        prior: the weight w, and where d starts.
        draws: how expectations are evaluated.
        inner: gradient descent in y, or another inner solver.
        system: how the linear system is solved.
        outer_objective: f, where it is not as above.

    Raises:
        TypeError: if an argument is not of its type.

    Example:
        >>> import torch
        >>> from bilevel import hypergradient
        >>> prior = GaussianPrior(kl_weight=0.1, log_variance=-2.0)
        >>> learner = ibaml(nn.Linear(1, 1), nn.functional.mse_loss, prior=prior)
        >>> tasks = {
        ...     name: torch.ones(3, 4, 1)
        ...     for name in ("support_x", "support_y", "query_x", "query_y")
        ... }
        >>> tasks = learner.prepare(tasks, seed=0)
        >>> found = hypergradient(
        ...     learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=tasks
        ... )
        >>> found.y["log_variance"]["weight"].shape
        torch.Size([3, 1, 1])
    """
    demand_variational("ibaml", prior=prior, draws=draws, inner=inner, system=system, outer_objective=outer_objective)
    net = as_functional(module)
    model = Evidence(net, loss, ravel(net.params, "the module's parameters")[1], prior, draws, outer_objective)
    aid, own = _implicit(model, inner, system), Predictive(model, net)
    return Learner(
        name="ibaml",
        problem=BilevelProblem(model.f, model.g, init=model.start, tasks=model.tasks),
        x0=model.x0(net.params),
        y0=model.start(model.x0(net.params)),
        estimator=aid,
        adapt=aid.inner,
        predict=own.predict,
        export=own.export,
        prepare=model.prepare,
        draws=own.draws,
        likelihood=loss if isinstance(loss, AbstractLikelihood) else None,
    )


@grouped(prior=PRIOR, draws=MONTE_CARLO, inner=INNER, system=SYSTEM, outer_objective=OUTER)
@checked()
def ibaml_head(
    body: nn.Module | Functional,
    head: nn.Module | Functional,
    loss: Loss,
    *,
    prior: GaussianPrior = GaussianPrior(kl_weight=4e-2, log_variance=-2.0),
    draws: MonteCarlo = MonteCarlo(samples=10, evaluation_samples=100),
    inner: PosteriorDescent | AbstractInnerSolver = PosteriorDescent(steps=10),
    system: KLSystem = KLSystem(steps=10),
    outer_objective: OuterObjective = OuterObjective(),
) -> Learner:
    """A Bayesian head: iBaML of the last layers, with a body that all tasks share.

    x is {"body", "mean", "log_variance"}, y the posterior of the head under that prior. With F the body's features of a
    set, g = E_q[loss(head; F(support))] + w KL(q || p) and f = E_q[loss(head; F(query))]: the body has no prior and is
    not adapted. Its features are computed once for each hypergradient, whatever the number of steps and draws, so that
    many of both are cheap. With a linear head and the cross-entropy, g is convex in the mean.

    Args:
        body: the module that makes features; what it returns for a sample is taken as one vector.
        head: the module that makes outputs of features.
        loss: as for `ibaml`, like all that follow; the prior is that of the head's parameters.
        prior: the weight w, and where d starts.
        draws: how expectations are evaluated.
        inner: gradient descent in y, or another inner solver.
        system: how the linear system is solved.
        outer_objective: f, where it is not as above.

    Raises:
        TypeError: if an argument is not of its type.

    Example:
        >>> learner = ibaml_head(nn.Linear(3, 4), nn.Linear(4, 2), nn.functional.cross_entropy)
        >>> sorted(learner.x0), sorted(learner.y0)
        (['body', 'log_variance', 'mean'], ['log_variance', 'mean'])
    """
    demand_variational(
        "ibaml_head", prior=prior, draws=draws, inner=inner, system=system, outer_objective=outer_objective
    )
    features, top = as_functional(body), as_functional(head)
    structure = ravel(top.params, "the module's parameters")[1]
    model = Evidence(top, loss, structure, prior, draws, outer_objective, features=True)
    aid, own = _implicit(model, inner, system), Predictive(model, top, features)
    return Learner(
        name="ibaml_head",
        problem=BilevelProblem(model.f, model.g, init=model.start, encode=own.encode, tasks=model.tasks),
        x0={"body": dict(features.params), **model.x0(top.params)},
        y0=model.start(model.x0(top.params)),
        estimator=aid,
        adapt=aid.inner,
        predict=own.predict,
        export=own.export,
        prepare=model.prepare,
        draws=own.draws,
        likelihood=loss if isinstance(loss, AbstractLikelihood) else None,
    )


def _implicit(model: Evidence, inner: PosteriorDescent | AbstractInnerSolver, system: KLSystem) -> AID:
    """The implicit gradient of a model."""
    solver = (
        inner.iterate(model.structure, learn_variance=model.prior.learn_variance)
        if isinstance(inner, PosteriorDescent)
        else inner
    )
    products = KLProducts(model.expectation, model.prior.kl_weight, system.form, model.prior.fixed)
    linear = CG(rtol=0.0, max_steps=system.steps, preconditioner=KLDiagonal())
    return AID(solver, linear, damping=system.damping, products=products)
