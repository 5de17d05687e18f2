"""Experiments on images: handwritten characters (Omniglot, where you have the file) and digits (which need none).

A name is METHOD-DATA. Every method learns a small convolutional network whose batch normalization uses the statistics
of the set at hand, the query set included, as the published ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.nn.functional import cross_entropy

from bilevel.experiments.image_setup import ImageSetting, Setup, Source
from bilevel.few_shot.experiment import Experiment, NamedExperiment
from bilevel.few_shot.learner import Learner
from bilevel.problems.meta_learning.anil import anil
from bilevel.problems.meta_learning.gaussian_prior import GaussianPrior
from bilevel.problems.meta_learning.ibaml import ibaml, ibaml_head
from bilevel.problems.meta_learning.imaml import imaml
from bilevel.problems.meta_learning.kl_system import KLSystem
from bilevel.problems.meta_learning.maml import maml
from bilevel.problems.meta_learning.matching_net import matching_net
from bilevel.problems.meta_learning.monte_carlo import MonteCarlo
from bilevel.problems.meta_learning.outer_objective import OuterLoss, OuterObjective
from bilevel.problems.meta_learning.posterior_descent import PosteriorDescent
from bilevel.problems.meta_learning.proto_net import proto_net
from bilevel.problems.meta_learning.ridge_head import ridge_head
from bilevel.problems.meta_learning.shared_embedding import shared_embedding
from bilevel.problems.meta_learning.svm_head import svm_head
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.newton import Newton
from bilevel.tasks import Splits, digits, omniglot

COMMON = ImageSetting()
EIGHT, FOUR = ImageSetting(batch=8), ImageSetting(batch=4)  # tasks a step, of methods that need fewer


def maml_images(
    source: Source,
    setting: ImageSetting = COMMON,
    step: float = 0.4,
    inner_steps: int = 1,
    evaluation_steps: int = 1,
    first_order: bool = False,
    learn_steps: bool = False,
) -> Experiment:
    """MAML: all parameters are adapted."""
    setup = Setup(source, setting)
    learner = maml(
        setup.network(),
        cross_entropy,
        step=step,
        inner_steps=inner_steps,
        evaluation_steps=evaluation_steps,
        first_order=first_order,
        learn_steps=learn_steps,
    )
    return setup.experiment(learner, curve=(0, 1, 5, 10))


def anil_images(
    source: Source,
    setting: ImageSetting = COMMON,
    step: float = 0.4,
    inner_steps: int = 5,
) -> Experiment:
    """ANIL: only the head is adapted."""
    setup = Setup(source, setting)
    return setup.experiment(anil(setup.body(), setup.head(), cross_entropy, step=step, inner_steps=inner_steps))


def imaml_images(
    source: Source,
    setting: ImageSetting = COMMON,
    regularization: float = 2.0,
    step: float = 0.1,
    inner_steps: int = 16,
    linear_steps: int = 5,
    damping: float = 0.0,
) -> Experiment:
    """Proximal adaptation (iMAML): all parameters are adapted, near what was learned, and differentiated implicitly."""
    setup = Setup(source, setting)
    learner = imaml(
        setup.network(),
        cross_entropy,
        regularization=regularization,
        step=step,
        inner_steps=inner_steps,
        linear_steps=linear_steps,
        damping=damping,
    )
    return setup.experiment(learner)


def ibaml_images(
    source: Source,
    setting: ImageSetting = COMMON,
    full: bool = False,
    kl_weight: float | None = None,
    test_kl_weight: float | None = None,
    samples: int = 4,
    log_variance: float | None = None,
    outer_loss: OuterLoss | None = None,
    step: float | None = None,
    inner_steps: int | None = None,
    linear_steps: int | None = None,
    damping: float | None = None,
) -> Experiment:
    """A Gaussian posterior of the head (or, `full`, of all parameters) under a learned prior: iBaML.

    The head's is found by quasi-Newton steps, or by gradient steps of length `step`, as that of all parameters is.
    The head's outer loss is that of the averaged probabilities, the other's that of single draws, unless `outer_loss`
    says otherwise. In validation and test the divergence may have another weight than in training, `test_kl_weight`.
    """
    setup = Setup(source, setting)

    def learner(weight: float | None) -> Learner:
        if full:
            return ibaml(
                setup.network(),
                cross_entropy,
                prior=GaussianPrior(4e-4 if weight is None else weight, -8.5 if log_variance is None else log_variance),
                draws=MonteCarlo(samples, 10, seed=setting.seed),
                inner=PosteriorDescent(5 if inner_steps is None else inner_steps, 0.1 if step is None else step),
                system=KLSystem(5 if linear_steps is None else linear_steps, 0.0 if damping is None else damping),
                outer_objective=OuterObjective(outer_loss or "expected"),
            )
        steps = 20 if inner_steps is None else inner_steps
        return ibaml_head(
            setup.body(),
            setup.head(),
            cross_entropy,
            prior=GaussianPrior(1e-7 if weight is None else weight, -9.0 if log_variance is None else log_variance),
            draws=MonteCarlo(samples, 100, seed=setting.seed),
            inner=LBFGS(tol=0.0, max_steps=steps) if step is None else Iterate(GradientDescent(step), steps),
            system=KLSystem(10 if linear_steps is None else linear_steps, 0.003 if damping is None else damping),
            outer_objective=OuterObjective(outer_loss or "predictive"),
        )

    tester = None if test_kl_weight is None else learner(test_kl_weight)
    return setup.experiment(learner(kl_weight), tester=tester)


def proto_net_images(
    source: Source,
    setting: ImageSetting = FOUR,
    train_way: int = 0,
) -> Experiment:
    """Prototypical networks; `train_way` classes in training tasks (0: as many as are told apart later)."""
    setup = Setup(source, setting)
    learner = proto_net(setup.body(), setup.features, train_way or setup.way)
    tester = proto_net(setup.body(), setup.features, setup.way)
    return setup.experiment(learner, train_way=train_way, tester=tester)


def matching_images(
    source: Source,
    setting: ImageSetting = FOUR,
    scale: float = 10.0,
    learn_scale: bool = True,
) -> Experiment:
    """Matching networks, without embeddings of a whole support set; the published attention has scale 1."""
    setup = Setup(source, setting)
    support = setup.way * setting.shots
    learner = matching_net(setup.body(), setup.features, setup.way, support, scale=scale, learn_scale=learn_scale)
    return setup.experiment(learner)


def ridge_images(
    source: Source,
    setting: ImageSetting = EIGHT,
    regularization: float = 1.0,
    learn_regularization: bool = True,
) -> Experiment:
    """A ridge-regression head in closed form: R2D2."""
    setup = Setup(source, setting)
    learner = ridge_head(
        setup.body(),
        setup.features,
        setup.way,
        regularization=regularization,
        learn_regularization=learn_regularization,
    )
    return setup.experiment(learner)


def svm_images(
    source: Source,
    setting: ImageSetting = EIGHT,
    C: float = 0.1,
    dual_ridge: float = 1.0,
) -> Experiment:
    """A support-vector head, solved to its end: MetaOptNet-SVM."""
    setup = Setup(source, setting)
    learner = svm_head(setup.body(), setup.features, setup.way, setup.way * setting.shots, C=C, dual_ridge=dual_ridge)
    return setup.experiment(learner)


def embedding_images(
    source: Source,
    setting: ImageSetting = EIGHT,
    regularization: float = 0.5,
    inner_steps: int = 10,
) -> Experiment:
    """A shared embedding: logistic heads solved to optimality by Newton steps, differentiated implicitly."""
    setup = Setup(source, setting)
    inner = Newton(tol=1e-5, max_steps=inner_steps)
    learner = shared_embedding(setup.body(), setup.head(), cross_entropy, regularization=regularization, inner=inner)
    return setup.experiment(learner)


def _omniglot(path: str) -> Splits:
    if not path:
        raise ValueError(
            "Omniglot is not part of the library: download it by `bilevel data omniglot`, and say where it is by"
            " `--set data=data/omniglot.npz`."
        )
    return omniglot(path)


def _digits(path: str) -> Splits:
    if path:
        raise ValueError("the digits come with scikit-learn: leave out `--set data=...`.")
    return digits()


_METHODS: tuple[tuple[str, str, Callable[..., Experiment]], ...] = (
    ("maml", "MAML: all parameters adapted by gradient steps", maml_images),
    ("anil", "ANIL: the head adapted by gradient steps", anil_images),
    ("imaml", "iMAML: all parameters adapted near the start, implicit gradients", imaml_images),
    ("ibaml", "iBaML: a Gaussian posterior of the head under a learned prior", ibaml_images),
    ("protonet", "prototypical networks: class means as a bilevel problem", proto_net_images),
    ("matching", "matching networks: attention over the support set by cosines", matching_images),
    ("ridge", "ridge-regression head in closed form (R2D2)", ridge_images),
    ("svm", "support-vector head (MetaOptNet)", svm_images),
    ("embedding", "logistic heads on a shared embedding, solved to optimality", embedding_images),
)
_SOURCES = (
    Source("digits", _digits, size=8, blocks=3, max_steps=500, way=3),
    Source("omniglot", _omniglot, size=28, blocks=4, max_steps=10_000, way=5),
)

IMAGES = tuple(
    NamedExperiment(
        f"{method}-{source.name}",
        f"{description}; {source.name}" + (" (needs --set data=PATH)" if source.name == "omniglot" else ""),
        partial(build, source),
    )
    for source in _SOURCES
    for method, description, build in _METHODS
)
