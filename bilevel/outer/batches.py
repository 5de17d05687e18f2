"""What f and g are called with: one batch for every step, a loader, or a callable, as numbered batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from bilevel._problem import Split
from bilevel.algorithms.finite_sum import FiniteSum
from bilevel.algorithms.oracle import AbstractData, Block, Draws
from bilevel.outer.randomness import drawn_so_far, go_on_from
from bilevel.ranks.ranks import Ranks
from bilevel.ranks.rows import Rows
from bilevel.ranks.shard import Shard
from bilevel.requirements.properties import DoesNotApply


def sources(data: Any, ranks: Ranks | None = None) -> AbstractData | Split:
    """Numbered batches from what `minimize(data=...)` is given; for a `Split` from each of its sides.

    A tensor, a mapping or a tuple is one batch, whatever the number. Any other iterable (a list of batches, a
    DataLoader) yields batches in order and starts again at its end. A callable is called with the number, and one of
    two arguments with the role, "f" or "g", and the number. With samples over ranks they are this rank's.

    Raises:
        TypeError: if `data` is none of these, is an iterator, which cannot be started again, or an array or a list of
            arrays or numbers, which torch functions do not take.
        ValueError: if with ranks nothing says what a rank has, or `Rows` are one side of a `Split`.
    """
    if isinstance(data, Rows):
        each = [_Numbered(partial(data, "f")), _Numbered(partial(data, "g"))]
        return Split(*each) if ranks is None else Split(*(_Part(side, data, ranks) for side in each))
    if isinstance(data, Split) and any(isinstance(side, Rows) for side in (data.f, data.g)):
        raise ValueError(
            "`minimize(data=Split(...))` has a side for f and one for g, and `Rows((role, number) -> batch)` is both:"
            " pass it by itself, `data=Rows(...)`."
        )
    if ranks is not None:
        if isinstance(data, Split):
            return Split(_of_rank(data.f, ranks).independent(0), _of_rank(data.g, ranks).independent(1))
        found = _of_rank(data, ranks)
        return Split(found.independent(0), found.independent(1)) if isinstance(found, FiniteSum) else found
    if isinstance(data, Split):
        return Split(_source(data.f).independent(0), _source(data.g).independent(1))
    if callable(data) and not isinstance(data, AbstractData | Tensor | Mapping | Iterable) and _takes_roles(data):
        return Split(_Numbered(partial(data, "f")), _Numbered(partial(data, "g")))
    if isinstance(data, FiniteSum):  # f and g see the same samples, each in an order of its own
        return Split(data.independent(0), data.independent(1))
    return _source(data)


def _takes_roles(function: Callable[..., Any]) -> bool:
    """Whether a callable is one of (role, number): it requires two arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return False
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return sum(each.default is each.empty for each in positional) == 2


def _source(data: Any) -> AbstractData:
    if isinstance(data, AbstractData):
        return data
    if data is None or isinstance(data, Tensor | Mapping | tuple):
        return _OneBatch(data)
    if isinstance(data, Iterator):
        raise TypeError(
            f"`minimize(data=...)` must be something that can be started again. Got an iterator"
            f" ({type(data).__name__}). Pass a list of batches, a DataLoader or a callable `step -> batch`."
        )
    if isinstance(data, list):
        for i, batch in enumerate(data):
            _refuse_array(batch, f"data[{i}]", "A list is a loader, one entry a step; one batch of several is a tuple.")
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        _refuse_array(data, "data", "")
        return _Loader(data)
    if callable(data):
        return _Numbered(data)
    raise TypeError(
        f"`minimize(data=...)` must be a batch (tensor, dict or tuple), a loader, or a callable step -> batch."
        f" Got {type(data).__name__}."
    )


def _of_rank(data: Any, ranks: Ranks) -> AbstractData:
    """What a rank has of data whose samples are over ranks.

    Raises:
        ValueError: if nothing says how they are.
    """
    if isinstance(data, FiniteSum):
        return data.of_rank(ranks.rank, ranks.size)
    if isinstance(data, Shard) and not isinstance(data.data, list | Iterator | FiniteSum):
        return _Own(_source(data.data), data, ranks)
    inside = f"Shard({type(data.data).__name__})" if isinstance(data, Shard) else type(data).__name__
    raise ValueError(
        f"`minimize(group=...)` must know how the samples are shared. Got data={inside}. Pass"
        f" `FiniteSum(tensors, batch_size)` or `Rows((role, number) -> batch)`, the same on every rank, of which each"
        f" takes its part; or `Shard(batch)` or `Shard(step -> batch)`, what this rank alone has; or a problem with"
        f" `tasks=True`, whose tasks are shared."
    )


def demand_own(data: Any) -> None:
    """Refuse a share of the data where there are no ranks to share them with.

    Raises:
        ValueError: if there is one.
    """
    if any(isinstance(side, Shard) for side in ((data.f, data.g) if isinstance(data, Split) else (data,))):
        raise ValueError("`Shard(...)` is what one of several ranks has. Pass `group=`, or the data themselves.")


@final
class _Own(AbstractData):
    """A rank's own batches, weighed by how many samples all ranks have in theirs: one message of `size` floats each.

    One message in all for a batch that is the same at every step.
    """

    def __init__(self, of: AbstractData, shard: Shard, ranks: Ranks) -> None:
        self.of, self.shard, self.ranks = of, shard, ranks
        self.latest: dict[int, Block] = {}

    def batch(self, index: int, first: int) -> Any:
        return self.block(index, first).data

    def block(self, index: int, first: int) -> Block:
        index, first = (0, 0) if self.of.is_fixed else (index, first)
        for passed in [number for number in self.latest if number < first]:
            del self.latest[passed]
        if index not in self.latest:
            batch = self.of.batch(index, first)
            counts = torch.zeros(self.ranks.size, dtype=torch.float64)
            counts[self.ranks.rank] = self.shard.count(batch)
            counts = self.ranks.total(counts)[0]
            share = float(counts[self.ranks.rank] / counts.sum())
            self.latest[index] = Block(batch, 0 if self.of.is_fixed else None, share=share)
        return self.latest[index]

    def whole(self) -> Any:
        self.of.whole()  # for its refusal
        return self.block(0, 0).data

    @property
    def share(self) -> float:
        return self.block(0, 0).share

    @property
    def has_whole(self) -> bool:
        return self.of.has_whole

    @property
    def is_fixed(self) -> bool:
        return self.of.is_fixed


@final
class _Part(AbstractData):
    """A rank's rows of batches that all ranks have."""

    def __init__(self, of: AbstractData, rows: Rows, ranks: Ranks) -> None:
        self.of, self.rows, self.ranks = of, rows, ranks
        self.latest: dict[int, Block] = {}

    def batch(self, index: int, first: int) -> Any:
        return self.block(index, first).data

    def block(self, index: int, first: int) -> Block:
        for passed in [number for number in self.latest if number < first]:
            del self.latest[passed]
        if index not in self.latest:  # a step asks for its batch and for its share
            batch, share = self.rows.of_rank(self.of.batch(index, first), self.ranks.rank, self.ranks.size)
            self.latest[index] = Block(batch, share=share)
        return self.latest[index]

    def whole(self) -> Any:
        return self.of.whole()  # a refusal


def first_shares(data: AbstractData | Split) -> tuple[float, float]:
    """What the samples of this rank weigh in the first batches of f and of g."""
    if isinstance(data, Split):
        return data.f.block(0, 0).share, data.g.block(0, 0).share
    share = data.block(0, 0).share
    return share, share


def first_batch(data: Any) -> Any:
    """What f and g are called with first: the data of a problem at its start.

    Raises:
        TypeError: as :func:`sources` does.
        ValueError: if there is no batch.
    """
    found = sources(data)
    return Split(found.f.batch(0, 0), found.g.batch(0, 0)) if isinstance(found, Split) else found.batch(0, 0)


_SEEN = 8  # blocks whose curvature is looked at: the worst of a few tells about that of all


def some_blocks(data: AbstractData | Split) -> list[Any]:
    """Some blocks of g beside the first batch, where it has blocks, as what f and g are called with."""
    if not isinstance(data, Split) or not isinstance(data.g, FiniteSum) or data.g.is_fixed:
        return []
    step = -(-data.g.blocks // _SEEN)
    return [Split(data.f.batch(0, 0), data.g.block_number(k).data) for k in range(0, data.g.blocks, step)]


def shares_of_some(data: AbstractData | Split) -> list[tuple[float, float]]:
    """What the samples of this rank weigh in each of :func:`some_blocks`, in f and in g."""
    if not isinstance(data, Split) or not isinstance(data.g, FiniteSum) or data.g.is_fixed:
        return []
    step = -(-data.g.blocks // _SEEN)
    here = data.f.block(0, 0).share
    return [(here, data.g.block_number(k).share) for k in range(0, data.g.blocks, step)]


def _refuse_array(batch: Any, name: str, hint: str) -> None:
    if isinstance(batch, int | float | str | bytes) or type(batch).__module__ == "numpy":
        raise TypeError(
            f"`minimize(data=...)` must hold tensors. Got {type(batch).__name__} at {name}. Write"
            f" `torch.as_tensor(...)`. {hint}".strip()
        )


@final
class _OneBatch(AbstractData):
    """The same batch at every number: all samples there are."""

    def __init__(self, all_samples: Any) -> None:
        self.all_samples, self._block = all_samples, Block(all_samples, number=0)

    def batch(self, index: int, first: int) -> Any:
        return self.all_samples

    def whole(self) -> Any:
        return self.all_samples

    def block(self, index: int, first: int) -> Block:
        return self._block

    @property
    def has_whole(self) -> bool:
        return True

    @property
    def is_fixed(self) -> bool:
        return True


@final
class _Numbered(AbstractData):
    """A function number -> batch."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def batch(self, index: int, first: int) -> Any:
        return self.function(index)

    def whole(self) -> Any:
        raise _only_batches("a callable", self.function)


@final
class _Loader(AbstractData):
    """An iterable of batches: run forward as far as is asked for, the latest batches kept."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader, self.batches, self.reached = loader, self._cycle(), -1
        self.latest: dict[int, Any] = {}
        self.begun: dict[str, Any] | None = None  # the number that the iteration under way began with, and at what draw
        self.known: Mapping[str, Any] | None = None  # the same, of the run that is resumed

    def batch(self, index: int, first: int) -> Any:
        for passed in [number for number in self.latest if number < first]:
            del self.latest[passed]
        while self.reached < index:
            batch = next(self.batches)
            self.reached += 1
            if self.reached >= first:
                self.latest[self.reached] = batch
        return self.latest[index]

    def whole(self) -> Any:
        raise _only_batches("a loader", self.loader)

    def run_forward(self, first: int) -> None:
        """To before batch number `first`."""
        while self.reached < first - 1:
            next(self.batches)
            self.reached += 1

    def _cycle(self) -> Iterator[Any]:
        while True:
            empty, first = True, self.reached + 1
            if self.known is not None and self.known["first"] == first:
                go_on_from(self.known["drawn"])
            if not isinstance(self.loader, list):
                self.begun = {"first": first, "drawn": drawn_so_far()}
            try:
                started = iter(self.loader)
            except Exception as error:
                error.add_note(
                    f"`minimize(data=...)` is {type(self.loader).__name__}, which could not be iterated over."
                )
                raise
            for batch in started:
                empty = False
                yield batch
            if empty:
                raise ValueError(
                    "`minimize(data=...)` yields no batch: the loader is empty, or cannot be started again."
                )


def positions(data: AbstractData | Split) -> list[Any]:
    """With which batch, and where of the global random numbers, loaders began what they are in the middle of."""
    return [source.begun if isinstance(source, _Loader) else None for source in _sides(data)]


def expect(data: AbstractData | Split, known: list[Any] | None) -> None:
    """Have loaders begin as `positions` told of another run: those that shuffle by the global random numbers.

    One that shuffles by a generator of its own has its order anyhow.
    """
    for source, begun in zip(_sides(data), known or (), strict=False):
        if isinstance(source, _Loader):
            source.known = begun


def run_forward(data: AbstractData | Split, draws: Draws, step: int) -> None:
    """Bring loaders to where they are before a step."""
    counts = (draws.f, draws.g) if isinstance(data, Split) else (max(draws.f, draws.g),)
    for source, count in zip(_sides(data), counts, strict=True):
        if isinstance(source, _Loader):
            source.run_forward(step * count)


def _sides(data: AbstractData | Split) -> tuple[AbstractData, ...]:
    return (data.f, data.g) if isinstance(data, Split) else (data,)


def _only_batches(kind: str, data: Any) -> DoesNotApply:
    return DoesNotApply(
        f"it asks for the whole data, and `minimize(data=...)` has only batches of them: {kind}"
        f" ({type(data).__name__}). Pass `data=FiniteSum(tensors, batch_size)`, or all samples as one batch (a tensor,"
        f" dict or tuple), or use an algorithm that needs batches only, such as 'soba' or 'ma-soba'."
    )


def demand_all_tasks(data: AbstractData | Split) -> None:
    """Refuse blocks of tasks, of which every step would see others: f and g must see the same, and y is one of each.

    Raises:
        ValueError: if a side is a `FiniteSum` of several blocks.
    """
    for side in _sides(data):
        if isinstance(side, FiniteSum) and not side.is_fixed:
            raise ValueError(
                f"`minimize(data=FiniteSum(...))` of a problem with tasks would give f and g other tasks at every step:"
                f" blocks of {side.batch_size} of {side.samples}. Pass all tasks as one batch (a tensor, dict or"
                f" tuple), or, with `estimator=`, batches of tasks as a list or a loader, which both see."
            )
