"""ABML: adaptation as a Gaussian posterior under a learned Gaussian prior, differentiated through its iterations."""

from __future__ import annotations

from torch import nn

from bilevel._problem import BilevelProblem
from bilevel._tree import ravel
from bilevel._validate import grouped
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_type
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.likelihood import AbstractLikelihood
from bilevel.hypergrad.itd import ITD
from bilevel.modules.functional import Functional
from bilevel.problems.meta_learning._evidence import Evidence, Predictive, demand_variational
from bilevel.problems.meta_learning._formerly import INNER, MONTE_CARLO, OUTER, PRIOR
from bilevel.problems.meta_learning._modules import as_functional
from bilevel.problems.meta_learning._tasks import Loss
from bilevel.problems.meta_learning.gaussian_prior import GaussianPrior
from bilevel.problems.meta_learning.monte_carlo import MonteCarlo
from bilevel.problems.meta_learning.outer_objective import OuterObjective
from bilevel.problems.meta_learning.posterior_descent import PosteriorDescent


@grouped(prior=PRIOR, draws=MONTE_CARLO, inner=INNER, outer_objective=OUTER)
@checked()
def abml(
    module: nn.Module | Functional,
    loss: Loss,
    *,
    prior: GaussianPrior = GaussianPrior(kl_weight=4e-4, log_variance=-8.5),
    draws: MonteCarlo = MonteCarlo(samples=4, evaluation_samples=10),
    inner: PosteriorDescent = PosteriorDescent(steps=5),
    checkpoint: bool = False,
    outer_objective: OuterObjective = OuterObjective(),
) -> Learner:
    """ABML: g and f of `ibaml`, y what K steps of gradient descent on g make of the prior, and the gradient of that.

    The gradient is explicit: through the steps, the prior being both in g and the start of y. It is the exact gradient
    of what K steps give, whatever K, and differs from the gradient at y* by as much as the steps have yet to forget of
    their start. Cost of an estimate: K gradients of the expected loss and K products with its second derivatives;
    memory grows by one gradient's graph a step, or as the square root of K with `checkpoint`.

    Source: Ravi, Beatson, "Amortized Bayesian meta-learning", ICLR 2019. Theirs takes f on support and query set
    together, with `outer_objective.kl_weight` = `prior.kl_weight`, and draws with other variance reduction.

    Args:
        module: the network; its parameters that require a gradient are what the prior is over, and the mean's start.
        loss: (outputs, targets) -> mean over samples of -log p.
        prior: the weight w, and where d starts.
        draws: how expectations are evaluated.
        inner: the K steps.
        checkpoint: keep few of the iterates and compute the others again.
        outer_objective: f, where it is not that of `ibaml`.

    Raises:
        TypeError: if an argument is not of its type.

    Example:
        >>> abml(
        ...     nn.Linear(1, 1), nn.functional.mse_loss, inner=PosteriorDescent(steps=3)
        ... ).adapt.max_steps
        3
    """
    demand_type("abml", "inner", inner, PosteriorDescent)
    demand_variational("abml", prior=prior, draws=draws, outer_objective=outer_objective)
    net = as_functional(module)
    model = Evidence(net, loss, ravel(net.params, "the module's parameters")[1], prior, draws, outer_objective)
    solver, own = inner.iterate(model.structure, learn_variance=prior.learn_variance), Predictive(model, net)
    return Learner(
        name="abml",
        problem=BilevelProblem(model.f, model.g, init=model.start, tasks=model.tasks),
        x0=model.x0(net.params),
        y0=model.start(model.x0(net.params)),
        estimator=ITD(solver, checkpoint=checkpoint),
        adapt=solver,
        predict=own.predict,
        export=own.export,
        prepare=model.prepare,
        draws=own.draws,
        likelihood=loss if isinstance(loss, AbstractLikelihood) else None,
    )
