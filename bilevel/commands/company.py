"""`torchrun -m bilevel run`: one run of several processes, of which rank 0 has the folder and what a person sees."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist

from bilevel._problem import Split
from bilevel.algorithms.finite_sum import FiniteSum
from bilevel.commands.folder import Folder
from bilevel.commands.plan import Plan, Request
from bilevel.ranks.ranks import Ranks
from bilevel.ranks.rows import Rows

_RESTARTS = "TORCHELASTIC_RESTART_COUNT"


@final
class Company:
    """The ranks of a run, and whether they have been told what it is.

    Args:
        ranks: the processes; None: this one alone.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks, self._told = ranks, False

    @property
    def leads(self) -> bool:
        """Whether this is the process that has the folder."""
        return self.ranks is None or self.ranks.rank == 0

    def tell(self, **content: Any) -> None:
        """By rank 0, last before they compute together: what the others need to know."""
        self._told = True
        if self.ranks is not None:
            self.ranks.gathered(content)

    def told(self) -> dict[str, Any] | None:
        """By the others: what rank 0 tells; None: nothing is to be computed, and it says itself why."""
        assert self.ranks is not None
        found: dict[str, Any] | None = self.ranks.gathered(None)[0]
        return found

    @contextlib.contextmanager
    def led(self) -> Iterator[None]:
        """By rank 0: have the others leave where nothing comes of the run."""
        try:
            yield
        finally:
            if self.ranks is not None and not self._told:
                self.ranks.gathered(None)


@contextlib.contextmanager
def company() -> Iterator[Company]:
    """The processes that `torchrun` has started together; this one alone where it has not, or has started one."""
    if not ("LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield Company(None)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store_of_this_start(size)
    if store is None:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Company(Ranks(dist.group.WORLD))
    finally:
        dist.destroy_process_group()


def _store_of_this_start(size: int) -> Any:
    """Where ranks tell each other their addresses, apart from those of earlier starts; None: torch finds it.

    The agent of `torchrun` keeps one store over all restarts, and torch reads from it without saying of which start:
    ranks that are started again would look for each other where the dead ones have been.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    made: Any = dist  # which exports more than it says
    store = made.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    return made.PrefixStore(f"start_{os.environ.get(_RESTARTS, '0')}", store)


def as_restarted(request: Request) -> Request:
    """The request of a process that `torchrun` has started again, after one of them had died: the run goes on.

    Raises:
        ValueError: if nothing says which run that is.
    """
    if not int(os.environ.get(_RESTARTS, "0")):
        return request
    if request.out is None:
        raise ValueError(
            "`torchrun` has restarted this run, and there is no `--out DIR` to say which one it is. Start it with"
            " `--out`, so that restarts go on from its checkpoint."
        )
    if not Folder(Path(request.out)).result.exists():  # it died before it had begun
        return request
    return replace(request, resume=True, overwrite=False)


def demand_shared(request: Request, made: Plan, company: Company) -> None:
    """Refuse a problem that has nothing which ranks could share.

    Raises:
        ValueError: naming it.
    """
    if company.ranks is None or made.instance.problem.tasks:
        return
    data = made.options.get("data")
    sides = (data.f, data.g) if isinstance(data, Split) else (data,)
    if not (isinstance(data, Rows) or all(isinstance(side, FiniteSum) for side in sides)):
        raise ValueError(
            f"{request.problem} cannot be run over {company.ranks.size} ranks: it has neither tasks"
            f" (`BilevelProblem(tasks=True)`) nor samples that they could share (`data=FiniteSum(...)` or"
            f" `Rows(...)` for f and g). Run it in one process, without `torchrun`."
        )
