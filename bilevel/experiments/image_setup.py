"""What experiments on images have in common: where the images come from, the network, and the settings of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import nn

from bilevel._optimizer import AbstractOptimizer
from bilevel.few_shot.experiment import Experiment
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.networks import conv_net, features
from bilevel.few_shot.options import Validating
from bilevel.few_shot.training import Evaluating, Training
from bilevel.solvers.adam import Adam
from bilevel.solvers.clipped import Clipped
from bilevel.solvers.scheduled import Cosine, Scheduled
from bilevel.tasks import Episodes, Splits


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
@dataclass(frozen=True)
class ImageSetting:
    """What can be chosen whatever the method is.

    Attributes:
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

    data: str = ""
    way: int = 0
    shots: int = 1
    queries: int = 5
    test_queries: int = 15
    filters: int = 32
    batch: int = 16
    rate: float = 3e-3
    cosine: int = 0
    clip: float = 0.0
    seed: int = 0


@final
@dataclass(frozen=True, eq=False)
class Setup:
    """A source of images with settings: the networks for it, and the experiment of a learner.

    Attributes:
        source: of the images.
        setting: what was chosen.
    """

    source: Source
    setting: ImageSetting

    @property
    def way(self) -> int:
        """Classes of a task."""
        return self.setting.way or self.source.way

    @property
    def features(self) -> int:
        """How many the body has."""
        return features(self.setting.filters, self.source.blocks, self.source.size)

    def body(self) -> nn.Sequential:
        """The network without a head."""
        own, chosen = self.source, self.setting
        return conv_net(chosen.filters, blocks=own.blocks, size=own.size, seed=chosen.seed)

    def network(self) -> nn.Sequential:
        """The network with a linear head."""
        own, chosen = self.source, self.setting
        return conv_net(chosen.filters, blocks=own.blocks, size=own.size, classes=self.way, seed=chosen.seed)

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
        chosen, turned, splits = self.setting, self.source.rotations, self.source.splits(self.setting.data)
        outer: AbstractOptimizer = Adam(chosen.rate)
        outer = Scheduled(outer, Cosine(chosen.cosine)) if chosen.cosine else outer
        return Experiment(
            learner,
            tasks=Episodes(splits.train, train_way or self.way, chosen.shots, chosen.queries, "train" in turned),
            validation=Validating(
                Episodes(splits.validation, self.way, chosen.shots, chosen.test_queries, "validation" in turned),
                every=self.source.max_steps // 20,
                episodes=100,
            ),
            test=Episodes(splits.test, self.way, chosen.shots, chosen.test_queries, "test" in turned),
            description=f"{learner.name} on {self.source.name}, {self.way} ways, {chosen.shots} shots",
            settings=Training(
                max_steps=self.source.max_steps,
                batch=chosen.batch,
                outer=Clipped(outer, max_norm=chosen.clip) if chosen.clip else outer,
            ),
            evaluation=Evaluating(curve=curve),
            tester=tester,
        )
