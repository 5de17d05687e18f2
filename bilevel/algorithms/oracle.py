"""What an algorithm sees of the problem at one outer step: batches by role and number, and the whole data."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.uneven import Uneven, of_rows
from bilevel._problem import Split
from bilevel._sets import AbstractSet
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, COUNT, POSITIVE, demand_ranges
from bilevel.arguments.unchecked import unchecked
from bilevel.portable.pickling import AbstractPortable

Role: TypeAlias = Literal["f", "g"]


@final
@dataclass(frozen=True, eq=False)
class Block:
    """A batch, and which of the blocks it is that all samples are divided into.

    Attributes:
        data: what an objective is called with.
        number: which block it is, 0, ..., count - 1; None: batches have no identity.
        count: N, how many blocks there are.
        samples: how many samples it has; 0: that is not known.
        weight: its share w of all samples.
        share: of the mean over it, what the samples of this rank weigh, where they are over ranks and `data` are those.
        numbers: of runs side by side, each of which has a block of its own, which these are `(runs,)`; the data then
            have one axis of runs more. None: all see the same.
        sizes: how many samples each of these has `(runs,)`, where they are not all as many; `samples` and `weight` are
            then those of a whole block. None: they are all as many.
    """

    data: Any
    number: int | None = None
    count: int = 1
    samples: int = 0
    weight: float = 1.0
    numbers: Tensor | None = None
    share: float = 1.0
    sizes: Tensor | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, number=COUNT, count=AT_LEAST_1, samples=COUNT, weight=POSITIVE, share=AT_LEAST_0)

    @property
    def scale(self) -> float | Tensor:
        """w N: what makes its mean, drawn from N blocks alike, an unbiased estimate of the mean over all samples.

        A number; of runs side by side whose blocks differ in size one for each, `(runs, 1)`.
        """
        return self.weights * self.count

    @property
    def weights(self) -> float | Tensor:
        """`weight`, or where the blocks of several runs differ in size that of each `(runs, 1)`."""
        if self.sizes is None:
            return self.weight
        weights: Tensor = (self.sizes * (self.weight / self.samples)).unsqueeze(-1)
        return weights

    @property
    def seen(self) -> float:
        """How many samples a run sees in it, on average."""
        return self.samples if self.sizes is None else float(self.sizes.mean())

    @checked("Block.of_runs")
    def of_runs(self, runs: Tensor) -> Block:
        """That of some of several runs side by side."""
        if self.numbers is None:
            return self
        data = self.data.of_runs(runs) if isinstance(self.data, Uneven) else of_rows(self.data, runs)
        sizes = None if self.sizes is None else self.sizes[runs.to(self.sizes.device)]
        return replace(self, data=data, numbers=self.numbers[runs], sizes=sizes)


_block = unchecked(Block)


class AbstractData(AbstractPortable, abc.ABC):
    """Numbered batches, and all samples together where these are known: what f, or g, or both are called with."""

    @abc.abstractmethod
    def batch(self, index: int, first: int) -> Any:
        """Batch number `index` = 0, 1, ...; from now on none before number `first` <= index is asked for."""

    @abc.abstractmethod
    def whole(self) -> Any:
        """All samples as one batch.

        Raises:
            ValueError: if only batches are known.
        """

    def block(self, index: int, first: int) -> Block:
        """Batch number `index`, with its identity where it has one."""
        return _block(self.batch(index, first))

    @property
    def samples(self) -> int:
        """How many samples there are in all; 0: that is not known."""
        return 0

    @property
    def batch_samples(self) -> int:
        """How many samples a batch has, of blocks a whole one; 0: that is not known."""
        return self.block(0, 0).samples

    @property
    def share(self) -> float:
        """Of the mean over all samples, what those of this rank weigh; 1, unless they are over ranks."""
        return 1.0

    def independent(self, stream: int) -> AbstractData:
        """The same samples in an order of their own, where there is one to choose."""
        return self

    @property
    def has_whole(self) -> bool:
        """Whether all samples together are known, so that `whole` gives them. No, unless said."""
        return False

    @property
    def is_fixed(self) -> bool:
        """Whether every batch is the same, so that values at different steps are of one function. No, unless said."""
        return False


def is_fixed(data: AbstractData | Split) -> bool:
    """Whether each of its sources gives the same batch at every step."""
    return data.f.is_fixed and data.g.is_fixed if isinstance(data, Split) else data.is_fixed


def has_whole(data: AbstractData | Split) -> bool:
    """Whether all the samples are known, of each of its sources."""
    return data.f.has_whole and data.g.has_whole if isinstance(data, Split) else data.has_whole


@final
@dataclass(frozen=True)
class Draws:
    """How many batches an algorithm draws at each step, for f and for g.

    Batch `number` of step k is then the item k * draws + number of the data, whatever was drawn before: a run that is
    resumed at step k sees what an uninterrupted one does.
    """

    f: int = 1
    g: int = 1

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, f=AT_LEAST_1, g=AT_LEAST_1)


@final
class Oracle:
    """The problem and its data at one outer step.

    Batches are drawn by role and number. Where f and g have data of their own (a `Split`), those of f and of g are
    independent of each other. Where they share one source, number i of f and number i of g are the same item of it:
    an algorithm that needs them to be independent takes different numbers.

    Within a step the same number is the same batch, which can be evaluated at any (x, y), as often as need be.

    Args:
        like: the problem with its structures; its tally counts the calls of every problem handed out here.
        data: where batches come from, for both levels or for each.
        draws: how many a step takes.
        region: the constraint on x, or None.
        step: which step.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, Split
        >>> from bilevel._tree import ravel
        >>> from bilevel.outer.batches import sources
        >>> problem = BilevelProblem(
        ...     lambda x, y, b: (y - b).square(), lambda x, y, b: (y - x - b).square()
        ... )
        >>> one, structure = ravel(torch.ones(()))
        >>> data = Split(f=torch.ones(()), g=lambda index: torch.tensor(10.0 * index))
        >>> oracle = Oracle(
        ...     FlatProblem(problem, structure, structure), sources(data), Draws(f=1, g=2)
        ... ).at(3)
        >>> oracle.draw("g", 1)  # item 3 * 2 + 1
        tensor(70.)
        >>> oracle.problem(f=0, g=1).g(one, 2 * one)
        tensor(4761.)
    """

    @checked(step=COUNT)
    def __init__(
        self,
        like: FlatProblem,
        data: AbstractData | Split,
        draws: Draws = Draws(),
        region: AbstractSet | None = None,
        step: int = 0,
    ) -> None:
        self.like, self.data, self.draws, self.region, self.step = like, data, draws, region, step
        self.runs: Tensor | None = None  # of several runs side by side those that this is about; None: all
        self._of: Oracle | None = None  # that of all of them
        self._drawn: dict[tuple[str, int], Block] = {}
        self._problems: dict[tuple[int, int], FlatProblem] = {}

    def at(self, step: int) -> Oracle:
        """The oracle of another step; what this one has handed out is not used any more."""
        self.like.tally.settle()
        found = Oracle.__new__(Oracle)  # at every step of a run: what has been checked is not checked again
        vars(found).update(vars(self), step=step, _drawn={}, _problems={})
        return found

    def about(self, like: FlatProblem, data: AbstractData | Split) -> Oracle:
        """The oracle of another problem at the same step."""
        found = Oracle.__new__(Oracle)
        vars(found).update(vars(self), like=like, data=data, _drawn={}, _problems={})
        return found

    def of_runs(self, runs: Tensor) -> Oracle:
        """The oracle of some of several runs side by side, at the same step: each of them sees its own batches.

        Args:
            runs: which `(count,)`, on the CPU.
        """
        found = Oracle.__new__(Oracle)
        whole = self if self._of is None else self._of
        runs = runs if self.runs is None else self.runs[runs]
        vars(found).update(vars(self), runs=runs, _of=whole, _drawn={}, _problems={})
        return found

    def draw(self, role: Role, number: int = 0) -> Any:
        """Batch `number` of this step, for f or for g.

        Raises:
            ValueError: if the algorithm has not declared so many.
        """
        return self.block(role, number).data

    def block(self, role: Role, number: int = 0) -> Block:
        """The same with its identity, where the data have blocks.

        Raises:
            ValueError: if the algorithm has not declared so many.
        """
        if isinstance(self.data, Split):
            key: str = role
            source: AbstractData = self.data.f if role == "f" else self.data.g
            most = self.draws.f if role == "f" else self.draws.g
        else:
            key, source, most = "both", self.data, max(self.draws.f, self.draws.g)
        if (key, number) not in self._drawn:
            if not 0 <= number < most:
                raise ValueError(
                    f"`Oracle.draw({role!r}, {number})` needs a number below {most}, which is how many the algorithm"
                    f" declares to draw at a step. Raise `draws`."
                )
            if self._of is not None and self.runs is not None:
                self._drawn[key, number] = self._of.block(role, number).of_runs(self.runs)
            else:
                first = self.step * most
                self._drawn[key, number] = source.block(first + number, first)
        return self._drawn[key, number]

    @property
    def epoch(self) -> int:
        """About how many steps, of one batch of f and of g each, see all samples once; 1 where that is not known."""
        sources = (self.data.f, self.data.g) if isinstance(self.data, Split) else (self.data, self.data)
        batches = [source.batch_samples for source in sources]
        if not all(batches):
            return 1
        return -(-sum(source.samples for source in sources) // sum(batches))

    def problem(self, f: int = 0, g: int = 0) -> FlatProblem:
        """The problem with batch number `f` for f and batch number `g` for g."""
        if (f, g) not in self._problems:
            of_f, of_g = self.block("f", f), self.block("g", g)
            alike = of_f.data is of_g.data and not isinstance(self.data, Split)
            data = of_f.data if alike else Split(f=of_f.data, g=of_g.data)
            own = {role for role, block in (("f", of_f), ("g", of_g)) if block.numbers is not None}
            shares = of_f.share, of_g.share
            self._problems[f, g] = self._with(data, of_f.seen, of_g.seen, frozenset(own), shares)
        return self._problems[f, g]

    def first(self) -> FlatProblem:
        """The first problem that was handed out at this step; that of the first batches if none was."""
        return next(iter(self._problems.values())) if self._problems else self.problem()

    def whole(self) -> FlatProblem:
        """The problem on all the data.

        Raises:
            ValueError: if only batches of them are known.
        """
        if isinstance(self.data, Split):
            of_f, of_g = self.data.f, self.data.g
            shares = of_f.share, of_g.share
            return self._with(Split(f=of_f.whole(), g=of_g.whole()), of_f.samples, of_g.samples, shares=shares)
        shares = self.data.share, self.data.share
        return self._with(self.data.whole(), self.data.samples, self.data.samples, shares=shares)

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the constraint on x; x itself where there is none."""
        if self.region is None:
            return x
        return self.region.project(x) if x.dim() == 1 else torch.stack([self.region.project(row) for row in x])

    def residual(self, x: Tensor, direction: Tensor) -> Tensor:
        """|d|, or with a constraint on x |x - P(x - d)|: zero at a stationary point, for d = grad Phi."""
        if self.region is None:
            return safe_row_norms(direction)
        return safe_row_norms(x - self.region.project(x - direction))

    @property
    def is_fixed(self) -> bool:
        """Whether the data are the same at every step: Phi is then one function."""
        return is_fixed(self.data)

    @property
    def has_whole(self) -> bool:
        """Whether all the data are known, of f and of g."""
        return has_whole(self.data)

    def _with(
        self,
        data: Any,
        f_samples: float,
        g_samples: float,
        own_data: frozenset[str] = frozenset(),
        shares: tuple[float, float] = (1.0, 1.0),
    ) -> FlatProblem:
        like, tally = self.like, self.like.tally
        if like.problem.tasks:  # which the rows of y count already
            f_samples, g_samples = min(f_samples, 1), min(g_samples, 1)
        if f_samples or g_samples:
            tally = tally.part(f_samples, g_samples)
        return like.on(data, tally, own_data, shares)
