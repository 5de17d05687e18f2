"""The processes of a group, what they tell each other, and how much that is."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel._result import BilevelError, Status
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT
from bilevel.arguments.words import got

T = TypeVar("T")


@final
class Ranks:
    """The processes of a group of `torch.distributed`, that counts its messages.

    All ranks call the same methods in the same order, with tensors of the same sizes. A message is one collective; its
    floats are what each rank contributes.

    Args:
        group: of `torch.distributed`, that this process is one of; `torch.distributed.group.WORLD` is all of them.

    Raises:
        ValueError: if there is no such group, or this process is none of its own.

    Attributes:
        rank: which one this is, 0, 1, ...
        size: how many there are.
        messages: how many collectives this process has taken part in.
        floats: how many numbers it has contributed to them.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import distributed
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     distributed.init_process_group(
        ...         "gloo", init_method=f"file://{file.name}.0", rank=0, world_size=1
        ...     )
        >>> ranks = Ranks(distributed.group.WORLD)
        >>> ranks.total(torch.ones(2), torch.tensor(3.0)), ranks.messages, ranks.floats
        ((tensor([1., 1.]), tensor(3.)), 1, 3)
        >>> distributed.destroy_process_group()
    """

    def __init__(self, group: Any) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "`Ranks(group=...)` needs `torch.distributed`: call `torch.distributed.init_process_group('gloo')`"
                " first, as a process that `torchrun` has started."
            )
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                "`Ranks(group=...)` must be a group of `torch.distributed` that this process is one of. Got"
                f" {got(group)}. Pass `torch.distributed.group.WORLD`, or what `new_group` returns to its members."
            )
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.messages = self.floats = 0

    def total(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The sums over ranks of each tensor, of one dtype: one message. What is not finite on one is so on all.

        Raises:
            TypeError: if there is none, or they are no tensors of one dtype.
        """
        kinds = {each.dtype if isinstance(each, Tensor) else type(each).__name__ for each in tensors}
        if len(kinds) != 1 or not all(isinstance(each, Tensor) for each in tensors):
            raise TypeError(
                f"`Ranks.total(*tensors)` must be given tensors of one dtype, one at least. Got"
                f" {', '.join(sorted(map(str, kinds))) or 'none'}. Convert them with `.to(...)`."
            )
        parts = [tensor.reshape(-1) for tensor in tensors]
        message = torch.cat(parts)  # a copy: the collective writes to it
        self._send(message.numel(), lambda: dist.all_reduce(message, group=self.group))
        sums = torch.split(message, [len(part) for part in parts])
        return tuple(part.reshape(tensor.shape) for part, tensor in zip(sums, tensors, strict=True))

    def gathered(self, value: T) -> list[T]:
        """What each rank has, in their order: plain data; one message, whose floats are not counted.

        Raises:
            TypeError: if it cannot be sent.
        """
        try:
            pickle.dumps(value)
        except Exception as error:
            raise TypeError(
                f"`Ranks.gathered(value=...)` must be plain data, which can be pickled. Got {type(value).__name__}"
                f" ({type(error).__name__}). Send numbers, texts, tensors, or lists and dicts of these."
            ) from error
        found: list[Any] = [None] * self.size
        self._send(0, lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    @checked(count=COUNT)
    def rows(self, count: int) -> slice:
        """Which of so many things belong to this rank: consecutive ones, their numbers differing by at most 1."""
        return share_of(count, self.rank, self.size)

    def _send(self, floats: int, collective: Any) -> None:
        self.messages += 1
        self.floats += floats
        try:
            collective()
        except RuntimeError as error:
            text = str(error).strip()
            raise BilevelError(
                f"rank {self.rank} of {self.size} has waited in vain: another rank has stopped, hangs, or takes longer"
                f" than the group's timeout ({text.splitlines()[0][:200] if text else type(error).__name__}). See what"
                f" that rank says; `init_process_group(timeout=...)` sets how long ranks wait for each other.",
                Status.interrupted,
            ) from error


def share_of(count: int, rank: int, size: int) -> slice:
    """Which of `count` things belong to one of `size` ranks.

    Example:
        >>> [share_of(5, rank, 3) for rank in range(3)]
        [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
    """
    return slice(count * rank // size, count * (rank + 1) // size)


def everywhere(ranks: Ranks, call: Callable[[], T]) -> list[T]:
    """What each rank finds by itself, in their order, on every rank: one message.

    Raises:
        BilevelError: on the other ranks, if one of them has raised something.
    """
    found: list[tuple[T, str] | str] = []
    try:
        mine: tuple[T, str] | str = (call(), "")
    except BaseException as error:
        ranks.gathered(f"{type(error).__name__}: {error}"[:500])
        raise
    found = ranks.gathered(mine)
    failed = [f"rank {rank} ({each})" for rank, each in enumerate(found) if isinstance(each, str)]
    if failed:
        raise BilevelError(f"what all ranks do together was ended by {'; '.join(failed)}.", Status.interrupted)
    return [each[0] for each in found if not isinstance(each, str)]


def first_says(ranks: Ranks, asked: Callable[[], object]) -> bool:
    """What rank 0 answers, which alone is asked, on every rank: one message of one float.

    Raises:
        BilevelError: on the other ranks, if what rank 0 was asked has raised something.
    """
    answer = 0.0
    try:
        if ranks.rank == 0:
            answer = float(bool(asked()))
    except BaseException:
        answer = 2.0
        raise
    finally:
        answer = float(ranks.total(torch.tensor(answer))[0])
    if answer > 1:
        raise BilevelError("rank 0 has been ended by its callback: see what it says.", Status.interrupted)
    return answer > 0


def demand_ranks(call: str, group: Any) -> Ranks | None:
    """The ranks of what `group=` is given; None: no group was.

    Args:
        call: what was given it.
        group: a group, or `Ranks`, which then counts.

    Raises:
        ValueError: as `Ranks` does.
    """
    if group is None or isinstance(group, Ranks):
        return group
    try:
        return Ranks(group)
    except ValueError as error:
        raise ValueError(f"`{call}(group=...)`: {error}") from error


def demand_alike(ranks: Ranks, call: str, told: dict[str, str], differences: Any) -> None:
    """Refuse to begin where ranks are told by other parts: code, settings, sizes or values of data.

    Args:
        ranks: the processes.
        call: what they are about to do together.
        told: this rank's parts by name.
        differences: (parts of rank 0, those of another) -> what is otherwise, in words.

    Raises:
        ValueError: on every rank, naming the first rank that differs from rank 0, and in what.
    """
    everyone: Sequence[dict[str, str]] = ranks.gathered(told)
    for rank, parts in enumerate(everyone):
        missing = sorted(everyone[0].keys() ^ parts.keys())
        found = differences(everyone[0], parts) + [f"{name} is there on one of them alone" for name in missing]
        if found:
            raise ValueError(
                f"`{call}(group=...)` needs the same on every rank, and rank {rank} has not what rank 0 has:"
                f" {'; '.join(found[:6])}{' and more' * (len(found) > 6)}. Run the same code with the same settings and"
                f" data everywhere; data that a rank alone has are `Shard(...)`."
            )
