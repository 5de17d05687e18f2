"""Semi-supervised meta-learning on digits or characters, beside pseudo-labels, random choices and MAML."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from bilevel._instance import Instance
from bilevel._tree import Tree, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SEED, SIZE
from bilevel.few_shot.networks import conv_net, features
from bilevel.hypergrad.itd import ITD
from bilevel.modules.functional import functional
from bilevel.outside.of_argument import of_argument
from bilevel.problems._plots import COLORS, draw_bars
from bilevel.problems.networks._modules import made
from bilevel.problems.networks.adapted import adapted
from bilevel.problems.networks.selection import AbstractSelection, AtRandom, Confident, Informative, Nothing
from bilevel.problems.networks.semi_supervised import Guide, SemiSupervised, ramp
from bilevel.problems.networks.submodular import FacilityQueries, FacilitySamples, GraphCut, LogDeterminant
from bilevel.problems.networks.unlabelled_episodes import UnlabelledEpisodes
from bilevel.solvers.adam import Adam
from bilevel.solvers.own_steps import OwnSteps
from bilevel.tasks.digits import digits
from bilevel.tasks.images import AbstractImages, Subset
from bilevel.tasks.omniglot import omniglot
from bilevel.tasks.source import AbstractTasks, Batch, batches

Chosen: TypeAlias = Literal["fl2mi", "fl1mi", "gcmi", "logdet", "pseudo-labels", "random", "none"]
SELECTIONS: dict[str, AbstractSelection] = {
    "fl2mi": Informative(FacilityQueries()),
    "fl1mi": Informative(FacilitySamples()),
    "gcmi": Informative(GraphCut()),
    "logdet": Informative(LogDeterminant()),
    "pseudo-labels": Confident(),
    "random": AtRandom(),
    "none": Nothing(),
}
NAMES = {"none": "MAML", "pseudo-labels": "pseudo-labels", "random": "random choice"}
_TEST, _AT_ONCE = 600, 100  # episodes
_DIGITS = 6  # that are learned from


@checked(
    way=COUNT,
    shots=SIZE,
    queries=SIZE,
    unlabeled=SIZE,
    distractors=COUNT,
    filters=SIZE,
    step=POSITIVE,
    steps=SIZE,
    test_steps=SIZE,
    picks=SIZE,
    outer_picks=SIZE,
    ramp_steps=SIZE,
    rate=POSITIVE,
    batch=SIZE,
    max_steps=COUNT,
    seed=SEED,
)
def semi_supervised(
    *,
    selection: Chosen = "fl2mi",
    way: int = 0,
    shots: int = 1,
    queries: int = 5,
    unlabeled: int = 14,
    distractors: int = 0,
    filters: int = 16,
    step: float = 0.1,
    steps: int = 5,
    test_steps: int = 10,
    picks: int = 5,
    outer_picks: int = 5,
    ramp_steps: int = 100,
    first_order: bool = False,
    guide: Guide = "cross",
    rate: float = 1e-3,
    batch: int = 4,
    max_steps: int = 500,
    data: str | Path | None = None,
    seed: int = 0,
) -> Instance:
    """Few-shot tasks with unlabelled images, which an adaptation may take as its own: PLATINUM and baselines.

    On digits 0 to 5, a network of 64 and 64 units learns, and digits 6 to 9 are for testing; with `data`, a file of
    Omniglot, a convolutional network, and the characters of the usual splits and their rotations. See
    :class:`SemiSupervised`; the weight of the outer loss on unlabelled images rises over `ramp_steps` as in the
    publication.

    Metrics, on the same 600 test tasks: the accuracy after adaptation of this learner (`accuracy`) and of MAML,
    pseudo-labels and random choices, each trained for as many steps of the same Adam (`accuracy_maml`, ...); the mean
    differences over tasks to each (`gain_maml`, ...), with half the width of their 95 % intervals (`..._within`); and
    of each the share of choices with the right label (`precision_...`) and of distractors (`distractors_...`), where
    the adaptation ends.

    Args:
        selection: of the samples, by an information: "fl2mi", "fl1mi", "gcmi", "logdet"; or "pseudo-labels", "random",
            "none".
        way: classes of a task; 0: 3 of digits, 5 of Omniglot.
        shots: support images of each.
        queries: query images of each.
        unlabeled: unlabelled images of each class.
        distractors: other classes among the unlabelled images.
        filters: of each convolution.
        step: of the adaptation.
        steps: of the adaptation in training.
        test_steps: of the adaptation in tests.
        picks: samples for each class in a step.
        outer_picks: samples for each class in f.
        ramp_steps: in which their weight in f rises to 1.
        first_order: without second derivatives.
        guide: of the choices in training: "cross", the query set, as published; or "support". In tests it is "support".
        rate: the step length of Adam.
        batch: tasks of a step.
        max_steps: of a run.
        data: the file of Omniglot; None: scikit-learn's digits.
        seed: of tasks and network.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if scikit-learn is needed and missing.
        ValueError: if an argument is out of its range, or there are not as many classes or images.

    Example:
        >>> semi_supervised(filters=4).x0["head"]["bias"].shape
        torch.Size([3])
    """
    train, test = _classes(data)
    ways, turned = way or (3 if data is None else 5), data is not None
    given = (ways, shots, queries, unlabeled, distractors, turned, max(steps, test_steps))
    source, tests = (UnlabelledEpisodes(classes, *given) for classes in (train, test))
    if data is None:
        body: nn.Module = made(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()), seed
        )
        width = 64
    else:
        size = train.shape[-1]
        body, width = made(lambda: conv_net(filters, size=size, seed=seed), seed), features(filters, 4, size)
    head = made(lambda: nn.Linear(width, ways), seed)
    own = SemiSupervised(
        functional(body),
        functional(head),
        SELECTIONS[selection],
        step,
        steps,
        picks,
        outer_picks,
        first_order=first_order,
        guide=guide,
    )
    draw = Ramped(source, batch, seed, ramp_steps)
    shown = _Shown(own, selection, draw, tests, (max_steps, test_steps, seed), rate)
    return Instance(
        problem=own.problem,
        x0=own.x0,
        y0=own.y0(source.sample(1, seed)),
        description=f"a start for {ways}-way tasks with {unlabeled} unlabelled images of each class",
        metrics=shown.metrics,
        plot=shown.plot,
        settings={"estimator": ITD(OwnSteps()), "outer": Adam(rate), "data": draw, "max_steps": max_steps},
    )


def _classes(data: str | Path | None) -> tuple[AbstractImages, AbstractImages]:
    if data is not None:
        with of_argument("semi_supervised", "data"):
            splits = omniglot(data)
        return splits.train, splits.test
    train = digits().train
    assert isinstance(train, Subset)
    return tuple(train.images.subset(range(*ends)) for ends in ((0, _DIGITS), (_DIGITS, 10)))  # type: ignore[return-value]


@final
@dataclass(frozen=True)
class Ramped:
    """Batch k of a source, with the `outer_weight` of step k, `ramp(k / length)`.

    Args:
        source: of the tasks.
        size: of a batch.
        seed: of its draws.
        length: of the ramp.
    """

    source: AbstractTasks
    size: int
    seed: int
    length: int

    def __call__(self, step: int) -> Batch:
        found = batches(self.source, self.size, self.seed)(step)
        weight = torch.full_like(found["support_x"].flatten(1)[:, 0], ramp(step / self.length))
        return found | {"outer_weight": weight}


@final
@dataclass(frozen=True, eq=False)
class _Shown:
    """What a person is told of a solution; baselines are trained when they are first asked for."""

    own: SemiSupervised
    name: str
    draw: Ramped
    tests: UnlabelledEpisodes
    run: tuple[int, int, int]
    rate: float

    @functools.cached_property
    def baselines(self) -> dict[str, dict[str, Tensor]]:
        others = {name: replace(self.own, selection=SELECTIONS[name]) for name in NAMES if name != self.name}
        return {name: self.tested(other, self._trained(other)) for name, other in others.items()}

    def metrics(self, x: Tree, y: Tree) -> dict[str, float]:
        several = {"": self.tested(self.own, x)} | self.baselines
        found: dict[str, float] = {}
        for name, each in several.items():
            end = "" if not name else "_" + {"none": "maml"}.get(name, name.replace("-", "_"))
            found |= {f"{key}{end}": float(value.nanmean()) for key, value in each.items()}
            if name:
                gain = several[""]["accuracy"] - each["accuracy"]
                found |= {
                    f"gain{end}": float(gain.mean()),
                    f"gain{end}_within": float(1.96 * gain.std() / len(gain) ** 0.5),
                }
        return {name: value for name, value in found.items() if value == value}

    def plot(self, figure: Any, x: Tree, y: Tree) -> None:
        several = {self.name: self.tested(self.own, x)} | self.baselines
        left, right = figure.subplots(1, 2)
        labels = {name: NAMES.get(name, f"PLATINUM, {name.upper()}") for name in several}
        draw_bars(
            left, {labels[name]: float(each["accuracy"].mean()) for name, each in several.items()}, "test accuracy"
        )
        shares = {name: each for name, each in several.items() if name != "none"}
        for k, (key, label) in enumerate((("precision", "right label"), ("distractors", "distractor"))):
            places = [place + 0.4 * k for place in range(len(shares))]
            right.bar(
                places, [float(each[key].nanmean()) for each in shares.values()], 0.4, label=label, color=COLORS[k]
            )
        right.set_xticks([place + 0.2 for place in range(len(shares))], [labels[name] for name in shares], fontsize=8)
        right.set_xlabel("choice")
        right.set_ylabel("share of chosen images")
        right.legend()
        figure.tight_layout()

    def tested(self, own: SemiSupervised, x: Tree) -> dict[str, Tensor]:
        """Of each test task the accuracy, and the shares of choices with the right label and of distractors."""
        made: dict[str, list[Tensor]] = {"accuracy": [], "precision": [], "distractors": []}
        steps = self.run[1]
        longer = replace(
            own, guide="support", steps=steps + 1, weight=lambda k, count: ramp(k / (count - 1))
        )  # one more choice, no more steps
        for k in range(_TEST // _AT_ONCE):
            tasks = self.tests.sample(_AT_ONCE, 2**21 + k)
            y = longer.adapted(x, tasks, steps)
            with torch.no_grad():
                logits = torch.vmap(own.logits)(y["params"], tasks["query_x"])
            made["accuracy"].append((logits.argmax(-1) == tasks["query_y"]).double().mean(1))
            chosen, truth = y["chosen"], tasks["unlabeled_y"]
            labels = torch.arange(chosen.shape[1], device=truth.device).reshape(1, -1, 1)
            count = chosen.sum((1, 2))
            made["precision"].append((chosen * (truth.unsqueeze(1) == labels)).sum((1, 2)) / count)
            made["distractors"].append((chosen * (truth.unsqueeze(1) < 0)).sum((1, 2)) / count)
        return {name: torch.cat(parts) for name, parts in made.items()}

    def _trained(self, own: SemiSupervised) -> Tree:
        """X after the steps of the run, by torch alone."""
        start, structure = ravel(own.x0)
        x = start.clone().requires_grad_()
        moving = torch.optim.Adam([x], lr=self.rate)
        for k in range(self.run[0]):
            tasks = self.draw(k)
            tree = structure.unravel(x)
            y = adapted(own.iteration, own.init, tree, tasks, own.steps, graph=True)
            loss = torch.vmap(lambda y, task, tree=tree: own.f(tree, y, task), randomness="same")(y, tasks).mean()
            moving.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            moving.step()
        return structure.unravel(x.detach())
