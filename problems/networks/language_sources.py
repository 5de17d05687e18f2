"""Weights of the sources of a language model's training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel._calculus import FiniteDifferences
from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import BETWEEN_0_AND_1, COUNT, POSITIVE, SEED, SIZE, demand_ranges
from bilevel.modules.functional import Functional, functional
from bilevel.problems._plots import draw_bars
from bilevel.problems.networks.byte_gpt import byte_gpt
from bilevel.problems.networks.text_sources import python_texts
from bilevel.ranks.rows import Rows

if TYPE_CHECKING:
    from bilevel.algorithms.algorithm import AbstractAlgorithm

CORRUPTED = "corrupted"  # the name of the source that is a copy of another one, half of it noise
_COPIED = "help"
_ENDS = (0.8, 0.9)  # of the parts of each text for training and for validation; the rest is for testing
_TESTED = 64  # windows of each text
_WEIGHT = 2.0  # of g against f
STEP_TIMES_WIDTH = 0.128  # of y: 2e-3 at width 64
_LINEAR_STEP = 0.03  # of v, short: along directions of negative curvature it grows by 1 + step |curvature| a step


@final
@dataclass(frozen=True, eq=False)
class SourceBatches:
    """(role, number) -> batch: windows of text, for g as many of each source, for f as many of each clean one.

    A window is `context` + 1 bytes that begin anywhere. Of the windows of the last source of g every second one is
    noise, when `noise` is 0.5: all its bytes are drawn uniformly. The same role and number is the same batch.

    Attributes:
        train: a text `(n_s,)` for each source of g; the last is the corrupted one.
        held_out: a text for each clean source.
        each: windows of each source in a batch.
        context: bytes of a window that are seen; the last is predicted only.
        noise: which share of the windows of the corrupted source is noise.
        seed: of all draws.
    """

    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    each: int
    context: int
    noise: float
    seed: int

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, each=SIZE, context=SIZE, noise=BETWEEN_0_AND_1, seed=SEED)

    @checked(number=COUNT)
    def __call__(self, role: Literal["f", "g"], number: int) -> Any:
        """For g (windows `(S each, context + 1)`, their sources `(S each,)`), for f the windows alone."""
        generator = torch.Generator().manual_seed(2 * (self.seed * 2**20 + number) + (role == "g"))
        texts = self.train if role == "g" else self.held_out
        windows = torch.cat([_windows(text, self.each, self.context, generator) for text in texts])
        if role == "f":
            return windows
        bad = round(self.noise * self.each)
        if bad:
            windows[-bad:] = torch.randint(256, (bad, self.context + 1), generator=generator)
        return windows, torch.arange(len(texts)).repeat_interleave(self.each)


def _windows(text: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    begins = torch.randint(len(text) - context, (count, 1), generator=generator)
    return text[begins + torch.arange(context + 1)].long()


@fitting
def source_loss(net: Functional, y: Tree, windows: Tensor) -> Tensor:
    """The mean cross-entropy of each window, in nats a byte: `(n,)`."""
    logits = net(y, windows[:, :-1])
    return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)


@final
@dataclass(frozen=True, eq=False)
class LanguageSources:
    """g = sum_s softmax(x)_s mean loss on source s,  f = mean loss on held-out text of all clean sources.

    y are the weights of a network that predicts the next byte, x `(S,)` the logits of the shares of the sources.

    Args:
        net: bytes `(n, t)` -> logits `(n, t, 256)`, as a function of its parameters.
        names: of the sources, the corrupted one last.
        batches: where the data come from.
        test: windows `(clean sources, n, context + 1)` that no run sees.
        steps: how many steps of Adam the network takes for comparison.
        step: of which length.
    """

    net: Functional
    names: tuple[str, ...]
    batches: SourceBatches
    test: Tensor
    steps: int
    step: float

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, steps=COUNT, step=POSITIVE)

    @fitting
    def f(self, _: Tensor, y: Tree, windows: Tensor) -> Tensor:
        """The outer objective on a batch."""
        return source_loss(self.net, y, windows).mean()

    @fitting
    def g(self, x: Tensor, y: Tree, batch: Any) -> Tensor:
        """The inner objective on a batch with as many windows of each source."""
        windows, sources = batch
        return x.numel() * (torch.softmax(x, 0)[sources] * source_loss(self.net, y, windows)).mean()

    @fitting
    def metrics(self, x: Tensor, y: Tree) -> dict[str, float]:
        """The shares; and the loss on test text of y, and of training from the same start with equal shares."""
        shares = torch.softmax(x.detach(), 0).tolist()
        found = {f"share_{name}": share for name, share in zip(self.names, shares, strict=True)}
        for kind, trained in (("learned", y), ("equal", self._trained(torch.zeros_like(x)))):
            losses = self._test_losses(trained)
            found[f"test_loss_{kind}"] = sum(losses) / len(losses)
            found |= {f"test_loss_{kind}_{name}": loss for name, loss in zip(self.names, losses, strict=False)}
        return found

    @fitting
    def plot(self, figure: Any, x: Tensor, y: Tree) -> None:
        """The shares, and the losses on test text."""
        left, right = figure.subplots(1, 2)
        shares = torch.softmax(x.detach(), 0).tolist()
        draw_bars(left, dict(zip(self.names, shares, strict=True)), "learned share", 1)
        losses = dict(zip(self.names, self._test_losses(y), strict=False))
        draw_bars(right, losses, "loss on test text (nats a byte)", 1)
        figure.tight_layout()

    def _test_losses(self, y: Tree) -> list[float]:
        with torch.no_grad():
            return [float(source_loss(self.net, y, windows).mean()) for windows in self.test]

    def _trained(self, x: Tensor) -> dict[str, Tensor]:
        """From the start by Adam, on the batches of a run, with these shares."""
        y = {name: leaf.clone().requires_grad_() for name, leaf in self.net.params.items()}
        adam = torch.optim.Adam(y.values(), lr=self.step)
        for number in range(self.steps):
            gradients = torch.autograd.grad(self.g(x, y, self.batches("g", number)), list(y.values()))
            for leaf, gradient in zip(y.values(), gradients, strict=True):
                leaf.grad = gradient
            adam.step()
        return {name: leaf.detach() for name, leaf in y.items()}


Method: TypeAlias = Literal["f2sa", "soba-fd", "sama", "scalebio"]
NAMES_OF_ALGORITHMS: tuple[Method, ...] = get_args(Method)

_OUTER_STEP: dict[Method, float] = {"f2sa": 0.03, "soba-fd": 0.05, "sama": 0.05, "scalebio": 0.03}


@checked(
    width=SIZE,
    depth=SIZE,
    heads=SIZE,
    context=SIZE,
    each=SIZE,
    noise=BETWEEN_0_AND_1,
    inner_step=POSITIVE,
    outer_step=POSITIVE,
    max_steps=COUNT,
    seed=SEED,
)
def language_sources(
    *,
    algorithm: Method = "scalebio",
    width: int = 200,
    depth: int = 2,
    heads: int = 4,
    context: int = 32,
    each: int = 8,
    noise: float = 0.5,
    inner_step: float | None = None,
    outer_step: float | None = None,
    max_steps: int = 200,
    seed: int = 0,
) -> Instance:
    """Which sources a language model should be trained on; see :class:`LanguageSources` and `python_texts`.

    A byte-level GPT is trained on four texts that come with Python and on a corrupted copy of one of them, half of
    whose windows are noise; f is the loss on held-out parts of the four. The share of the copy falls below 0.05.

    All algorithms step y and x together, each step on new batches, by Adam; none of them takes second derivatives.
    F2SA takes order 1: order 2 needs g - f / weight to be strongly convex in y, and the loss of a network is not.

    Args:
        algorithm: "f2sa" (weight 2), "soba-fd" (`SOBA` with `FiniteDifferences()`), "sama" or "scalebio" (weight 2).
        width: of the network, see `byte_gpt`.
        depth: its blocks.
        heads: of its attention.
        context: bytes that it sees.
        each: windows of each source in a batch of g, and of each clean one in a batch of f.
        noise: the share of noise among the windows of the corrupted source.
        inner_step: the learning rate of y; None: 0.128 / width. Adam moves every weight by the same length, and the
            outputs of a layer by width times that: 2e-3, right for a width of 64, is too long for one of 200, which is
            then no better after 100 steps than it is after 50 with 6e-4.
        outer_step: that of x; None: 0.05, but 0.03 of F2SA and ScaleBiO, whose directions are noisier.
        max_steps: of a run.
        seed: of the weights and of the batches.

    Raises:
        FileNotFoundError: if this Python comes without one of the texts.
        ValueError: if an argument is out of its range.

    Example:
        >>> instance = language_sources(width=8, depth=1, heads=1, context=4, each=2)
        >>> instance.x0.shape, instance.settings["max_steps"]
        (torch.Size([5]), 200)
    """
    inner_step = STEP_TIMES_WIDTH / width if inner_step is None else inner_step
    texts = python_texts()
    train, held_out, test = ([_part(text, k) for text in texts.values()] for k in range(3))
    copied = list(texts).index(_COPIED)
    batches = SourceBatches((*train, train[copied]), tuple(held_out), each, context, noise, seed)
    generator = torch.Generator().manual_seed(seed)
    shown = torch.stack([_windows(text, _TESTED, context, generator) for text in test])
    net = functional(byte_gpt(width=width, depth=depth, heads=heads, context=context, seed=seed))
    family = LanguageSources(net, (*texts, CORRUPTED), batches, shown, max_steps, inner_step)
    return Instance(
        problem=BilevelProblem(family.f, family.g),
        x0=torch.zeros(len(texts) + 1),
        y0=net.params,
        description=f"shares of {len(texts)} texts and a corrupted copy of {_COPIED!r}, byte-level GPT, {algorithm}",
        metrics=family.metrics,
        plot=family.plot,
        settings={
            "algorithm": _algorithm(
                algorithm, inner_step, _OUTER_STEP[algorithm] if outer_step is None else outer_step
            ),
            "data": Rows(batches),
            "max_steps": max_steps,
        },
    )


def _part(text: Tensor, k: int) -> Tensor:
    """Part k of a text: for training, validation or testing."""
    train, held_out = (int(len(text) * end) for end in _ENDS)
    return (text[:train], text[train:held_out], text[held_out:])[k]


def _algorithm(name: Method, inner_step: float, outer_step: float) -> AbstractAlgorithm[Any]:
    from bilevel.algorithms import F2SA, SAMA, SOBA, ScaleBiO
    from bilevel.solvers import Adam

    inner, outer = Adam(inner_step), Adam(outer_step)
    match name:
        case "f2sa":
            return F2SA(inner, outer, weight=_WEIGHT, order=1)
        case "soba-fd":
            return SOBA(inner, outer, linear_step=_LINEAR_STEP, products=FiniteDifferences())
        case "sama":
            return SAMA(inner, outer)
        case "scalebio":
            return ScaleBiO(inner_step, outer_step, weight=_WEIGHT)
