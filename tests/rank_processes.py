"""Functions run by several ranks of gloo at once, in forks of this process."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import ended, forked


def on_ranks(size: int, call: Callable[[Any, int], Any], seconds: float = 30.0) -> list[Any]:
    """What `call(group, rank)` returns on each rank; an exception is returned as it is."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def one(rank: int) -> int:
            torch.set_num_threads(1)
            store = f"file://{place / 'store'}"
            timeout = timedelta(seconds=seconds)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
            try:
                found = call(dist.group.WORLD, rank)
            except Exception as error:
                found = error
            (place / str(rank)).write_bytes(pickle.dumps(found))
            return 0

        numbers = [forked(partial(one, rank)) for rank in range(size)]
        codes = [ended(number) for number in numbers]
        assert codes == [0] * size, codes
        return [pickle.loads((place / str(rank)).read_bytes()) for rank in range(size)]
