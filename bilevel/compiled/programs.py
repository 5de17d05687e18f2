"""Programs: traced, compiled, kept in this process and on the disk."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel.compiled.refused import NotCompilableError
from bilevel.compiled.torch_inside import Call, build, demand_compiler, load, text_of
from bilevel.compiled.tracing import Traced

Run: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]  # (vectors, data) -> tensors

_LOG = logging.getLogger("bilevel.compiled")
_MOST = 64  # programs that are kept in a process
_FORMAT = 1


@final
@dataclass(frozen=True, eq=False)
class Program:
    """A traced computation that can be run.

    Attributes:
        traced: what it is made of.
        call: the tensors of all inputs -> those of the results.
        is_new: whether it was made, and not found, in this process.
    """

    traced: Traced
    call: Call
    notes: Any

    def run(self, vectors: Sequence[Tensor], data: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results at some vectors, with these data."""
        return self.call([*vectors, *data, *self.traced.constants])


_KNOWN: OrderedDict[Any, Program] = OrderedDict()
_LOADED: dict[str, Call] = {}


def program(
    key: Any, backend: str, made: Callable[[], tuple[Traced, Any]], inputs: Sequence[Tensor], what: str
) -> Program:
    """The program of a key: that which was made before in this process, or one from the disk, or a new one.

    A key tells code, captured values and shapes. One that was traced while a captured tensor had other entries than now
    is traced again: where its graph is the same, as it mostly is, nothing is compiled.

    Args:
        key: what tells it from others.
        backend: "inductor", or "eager", which runs the graph as it is.
        made: traces it, and gives what there is to know of it besides.
        inputs: vectors and data of the shapes that it is for.
        what: it computes, for the message.
    """
    key = (key, backend, torch.get_num_threads())
    known = _KNOWN.get(key)
    if known is not None and known.traced.is_fresh:
        _KNOWN.move_to_end(key)
        return known
    if backend == "inductor":
        demand_compiler()
    begun = time.perf_counter()
    traced, notes = made()
    call = _interpreted(traced) if backend == "eager" else _compiled(traced, inputs, what, begun)
    _KNOWN[key] = found = Program(traced, call, notes)
    while len(_KNOWN) > _MOST:
        _KNOWN.popitem(last=False)
    return found


def forget() -> None:
    """Forget all programs of this process; what is on the disk stays."""
    _KNOWN.clear()
    _LOADED.clear()


def folder() -> Path:
    """Where programs are kept between processes: `BILEVEL_CACHE_DIR`, or `bilevel` in the user's folder of caches.

    Each is a shared library that is loaded into the process: the folder must be the user's own.

    Raises:
        NotCompilableError: if others may write to it.
    """
    base = os.environ.get("BILEVEL_CACHE_DIR")
    if not base:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bilevel")
    found = Path(base) / "programs"
    found.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = found.stat()
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise NotCompilableError(
            f"`compile=True` loads programs from {found}, and others may write to it. Name a folder of your own in the"
            f" environment variable BILEVEL_CACHE_DIR."
        )
    return found


def _interpreted(traced: Traced) -> Call:
    def call(inputs: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            found: Sequence[Tensor] = traced.graph(*inputs)
            return found

    return call


def _compiled(traced: Traced, inputs: Sequence[Tensor], what: str, begun: float) -> Call:
    everything = [*inputs, *traced.constants]
    name = _name(traced, everything)
    if name in _LOADED:
        return _LOADED[name]
    library = folder() / f"{name}.so"
    if not library.exists():
        _LOG.warning("bilevel compiles %s: once, for %s.", what, library)
        made, part = build(traced.graph, everything), library.with_suffix(f".{os.getpid()}")
        shutil.copyfile(made, part)
        part.replace(library)
        _LOG.warning("bilevel has compiled %s in %.1f s.", what, time.perf_counter() - begun)
    _LOADED[name] = load(library)
    return _LOADED[name]


def _name(traced: Traced, inputs: Sequence[Tensor]) -> str:
    """A hash of all that a library is made of."""
    sizes = [(tuple(each.shape), each.stride(), str(each.dtype)) for each in inputs]
    machine = (torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), os.name, _FORMAT)
    return hashlib.blake2b(repr((text_of(traced.graph), sizes, machine)).encode(), digest_size=16).hexdigest()
