"""The most memory that a computation held at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_memory(function: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """The result of a call, and the most bytes of tensors that it held at once beyond what was there before.

    On CUDA the allocator's own count; on the CPU the running sum of torch's allocation events, which makes the call
    several times slower. Do not time it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined, unused-ignore]  # pyright: ignore
        most = max(most, held)
    record.action_map.clear()  # it refers to the record, which would keep all events until the collector runs
    return result, most


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler prints when it starts unless this variable says otherwise."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
