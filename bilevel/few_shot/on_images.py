"""Experiments on images: handwritten characters (Omniglot, where you have the file) and digits (which need none).

A name is METHOD-DATA. Every method learns a small convolutional network whose batch normalization uses the statistics
of the set at hand, the query set included, as the published ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

from torch import nn
from torch.nn.functional import cross_entropy

from bilevel._learner import Learner
from bilevel._optimizer import AbstractOptimizer
from bilevel.few_shot.experiment import Experiment, Named
from bilevel.few_shot.networks import conv_net, features
from bilevel.problems.anil import anil
from bilevel.problems.ibaml import ibaml, ibaml_head
from bilevel.problems.imaml import imaml
from bilevel.problems.maml import maml
from bilevel.problems.proto_net import proto_net
from bilevel.problems.ridge_head import ridge_head
from bilevel.problems.shared_embedding import shared_embedding
from bilevel.problems.svm_head import svm_head
from bilevel.solvers.adam import Adam
from bilevel.solvers.clipped import Clipped
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.newton import Newton
from bilevel.solvers.scheduled import Cosine, Scheduled
from bilevel.tasks import Episodes, Splits, digits, omniglot


@final
@dataclass(frozen=True, eq=False)
class Source:
    """Classes of images, and how large a network and a run for them are.

    Attributes:
        name: as in the names of experiments.
        splits: path -> the classes; the path is empty where none was given.
        size: the side of the images.
        blocks: of the network.
        max_steps: of a run.
        way: classes of a task, where nothing is said.
        rotations: the parts in which turned images are classes of their own.
    """

    name: str
    splits: Callable[[str], Splits]
    size: int
    blocks: int
    max_steps: int
    way: int
    rotations: tuple[str, ...] = ("train",)


@final
@dataclass(frozen=True, eq=False)
class Setting:
    """What all methods have in common.

    Attributes:
        source: of the images.
        data: the path of the file, where the source needs one.
        way: classes of a task; 0: the source's number.
        shots: support images of each class.
        queries: query images of each class in training; in validation and test there are `test_queries`.
        test_queries: see there.
        filters: of each convolution.
        batch: tasks a step.
        rate: the step length of the outer Adam.
        cosine: the outer step length falls to zero within so many steps; 0: it is constant.
        clip: the largest norm of the hypergradient; 0: any.
        seed: of the weights.
    """

    source: Source
    data: str
    way: int
    shots: int
    queries: int
    test_queries: int
    filters: int
    batch: int
    rate: float
    cosine: int
    clip: float
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "way", self.way or self.source.way)

    @property
    def features(self) -> int:
        """How many the body has."""
        return features(self.filters, self.source.blocks, self.source.size)

    def body(self) -> nn.Sequential:
        """The network without a head."""
        return conv_net(self.filters, blocks=self.source.blocks, size=self.source.size, seed=self.seed)

    def network(self) -> nn.Sequential:
        """The network with a linear head."""
        own = self.source
        return conv_net(self.filters, blocks=own.blocks, size=own.size, classes=self.way, seed=self.seed)

    def head(self) -> nn.Linear:
        """The linear head by itself."""
        head = self.network()[-1]
        assert isinstance(head, nn.Linear)
        return head

    def experiment(
        self, learner: Learner, *, train_way: int = 0, tester: Learner | None = None, curve: tuple[int, ...] = ()
    ) -> Experiment:
        """The experiment of a learner.

        Args:
            learner: what is trained.
            train_way: classes of a training task, where they are not `way`.
            tester: the learner of validation and test, where it is another.
            curve: numbers of steps to report.
        """
        splits, turned = self.source.splits(self.data), self.source.rotations
        outer: AbstractOptimizer = Adam(self.rate)
        outer = Scheduled(outer, Cosine(self.cosine)) if self.cosine else outer
        return Experiment(
            learner,
            tasks=Episodes(splits.train, train_way or self.way, self.shots, self.queries, "train" in turned),
            validation=Episodes(splits.validation, self.way, self.shots, self.test_queries, "validation" in turned),
            test=Episodes(splits.test, self.way, self.shots, self.test_queries, "test" in turned),
            description=f"{learner.name} on {self.source.name}, {self.way} ways, {self.shots} shots",
            settings={
                "max_steps": self.source.max_steps,
                "batch": self.batch,
                "outer": Clipped(outer, max_norm=self.clip) if self.clip else outer,
                "validate_every": self.source.max_steps // 20,
                "validate_episodes": 100,
            },
            evaluation={"episodes": 600, "curve": curve},
            tester=tester,
        )


def maml_images(
    source: Source,
    data: str = "",
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    filters: int = 32,
    batch: int = 16,
    rate: float = 3e-3,
    cosine: int = 0,
    clip: float = 0.0,
    step: float = 0.4,
    inner_steps: int = 1,
    evaluation_steps: int = 1,
    first_order: bool = False,
    learn_steps: bool = False,
    seed: int = 0,
) -> Experiment:
    """MAML: all parameters are adapted."""
    setting = Setting(source, data, way, shots, queries, test_queries, filters, batch, rate, cosine, clip, seed)
    learner = maml(
        setting.network(),
        cross_entropy,
        step=step,
        inner_steps=inner_steps,
        evaluation_steps=evaluation_steps,
        first_order=first_order,
        learn_steps=learn_steps,
    )
    return setting.experiment(learner, curve=(0, 1, 5, 10))


def anil_images(
    source: Source,
    data: str = "",
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    filters: int = 32,
    batch: int = 16,
    rate: float = 3e-3,
    cosine: int = 0,
    clip: float = 0.0,
    step: float = 0.4,
    inner_steps: int = 5,
    seed: int = 0,
) -> Experiment:
    """ANIL: only the head is adapted."""
    setting = Setting(source, data, way, shots, queries, test_queries, filters, batch, rate, cosine, clip, seed)
    return setting.experiment(anil(setting.body(), setting.head(), cross_entropy, step=step, inner_steps=inner_steps))


def imaml_images(
    source: Source,
    data: str = "",
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    filters: int = 32,
    batch: int = 16,
    rate: float = 3e-3,
    cosine: int = 0,
    clip: float = 0.0,
    regularization: float = 2.0,
    step: float = 0.1,
    inner_steps: int = 16,
    linear_steps: int = 5,
    damping: float = 0.0,
    seed: int = 0,
) -> Experiment:
    """Proximal adaptation (iMAML): all parameters are adapted, near what was learned, and differentiated implicitly."""
    setting = Setting(source, data, way, shots, queries, test_queries, filters, batch, rate, cosine, clip, seed)
    learner = imaml(
        setting.network(),
        cross_entropy,
        regularization=regularization,
        step=step,
        inner_steps=inner_steps,
        linear_steps=linear_steps,
        damping=damping,
    )
    return setting.experiment(learner)


def ibaml_images(
    source: Source,
    data: str = "",
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    filters: int = 32,
    batch: int = 16,
    rate: float = 3e-3,
    cosine: int = 0,
    clip: float = 0.0,
    full: bool = False,
    kl_weight: float | None = None,
    samples: int = 4,
    log_variance: float | None = None,
    outer_loss: Literal["expected", "predictive"] = "predictive",
    step: float | None = None,
    inner_steps: int | None = None,
    linear_steps: int | None = None,
    damping: float | None = None,
    seed: int = 0,
) -> Experiment:
    """A Gaussian posterior of the head (or, `full`, of all parameters) under a learned prior: iBaML.

    The head's is found by quasi-Newton steps, or by gradient steps of length `step`, as that of all parameters is.
    """
    setting = Setting(source, data, way, shots, queries, test_queries, filters, batch, rate, cosine, clip, seed)
    if full:
        learner = ibaml(
            setting.network(),
            cross_entropy,
            kl_weight=4e-4 if kl_weight is None else kl_weight,
            samples=samples,
            log_variance=-8.5 if log_variance is None else log_variance,
            outer_loss=outer_loss,
            step=0.1 if step is None else step,
            inner_steps=5 if inner_steps is None else inner_steps,
            linear_steps=5 if linear_steps is None else linear_steps,
            damping=0.0 if damping is None else damping,
            seed=seed,
        )
    else:
        steps = 20 if inner_steps is None else inner_steps
        learner = ibaml_head(
            setting.body(),
            setting.head(),
            cross_entropy,
            kl_weight=1e-7 if kl_weight is None else kl_weight,
            samples=samples,
            log_variance=-9.0 if log_variance is None else log_variance,
            outer_loss=outer_loss,
            inner=LBFGS(tol=0.0, max_steps=steps) if step is None else Iterate(GradientDescent(step), steps),
            linear_steps=10 if linear_steps is None else linear_steps,
            damping=0.003 if damping is None else damping,
            seed=seed,
        )
    return setting.experiment(learner)


def proto_net_images(
    source: Source,
    data: str = "",
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    filters: int = 32,
    batch: int = 4,
    rate: float = 3e-3,
    cosine: int = 0,
    clip: float = 0.0,
    train_way: int = 0,
    seed: int = 0,
) -> Experiment:
    """Prototypical networks; `train_way` classes in training tasks (0: as many as are told apart later)."""
    setting = Setting(source, data, way, shots, queries, test_queries, filters, batch, rate, cosine, clip, seed)
    learner = proto_net(setting.body(), setting.features, train_way or setting.way)
    tester = proto_net(setting.body(), setting.features, setting.way)
    return setting.experiment(learner, train_way=train_way, tester=tester)


def ridge_images(
    source: Source,
    data: str = "",
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    filters: int = 32,
    batch: int = 8,
    rate: float = 3e-3,
    cosine: int = 0,
    clip: float = 0.0,
    regularization: float = 1.0,
    learn_regularization: bool = True,
    seed: int = 0,
) -> Experiment:
    """A ridge-regression head in closed form: R2D2."""
    setting = Setting(source, data, way, shots, queries, test_queries, filters, batch, rate, cosine, clip, seed)
    learner = ridge_head(
        setting.body(),
        setting.features,
        setting.way,
        regularization=regularization,
        learn_regularization=learn_regularization,
    )
    return setting.experiment(learner)


def svm_images(
    source: Source,
    data: str = "",
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    filters: int = 32,
    batch: int = 8,
    rate: float = 3e-3,
    cosine: int = 0,
    clip: float = 0.0,
    C: float = 0.1,
    dual_ridge: float = 1.0,
    seed: int = 0,
) -> Experiment:
    """A support-vector head, solved to its end: MetaOptNet-SVM."""
    setting = Setting(source, data, way, shots, queries, test_queries, filters, batch, rate, cosine, clip, seed)
    learner = svm_head(setting.body(), setting.features, setting.way, setting.way * shots, C=C, dual_ridge=dual_ridge)
    return setting.experiment(learner)


def embedding_images(
    source: Source,
    data: str = "",
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    filters: int = 32,
    batch: int = 8,
    rate: float = 3e-3,
    cosine: int = 0,
    clip: float = 0.0,
    regularization: float = 0.5,
    inner_steps: int = 10,
    seed: int = 0,
) -> Experiment:
    """A shared embedding: logistic heads solved to optimality by Newton steps, differentiated implicitly."""
    setting = Setting(source, data, way, shots, queries, test_queries, filters, batch, rate, cosine, clip, seed)
    inner = Newton(tol=1e-5, max_steps=inner_steps)
    learner = shared_embedding(
        setting.body(), setting.head(), cross_entropy, regularization=regularization, inner=inner
    )
    return setting.experiment(learner)


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
    ("ridge", "ridge-regression head in closed form (R2D2)", ridge_images),
    ("svm", "support-vector head (MetaOptNet)", svm_images),
    ("embedding", "logistic heads on a shared embedding, solved to optimality", embedding_images),
)
_SOURCES = (
    Source("digits", _digits, size=8, blocks=3, max_steps=500, way=3),
    Source("omniglot", _omniglot, size=28, blocks=4, max_steps=10_000, way=5),
)

IMAGES = tuple(
    Named(
        f"{method}-{source.name}",
        f"{description}; {source.name}" + (" (needs --set data=PATH)" if source.name == "omniglot" else ""),
        partial(build, source),
    )
    for source in _SOURCES
    for method, description, build in _METHODS
)
