"""Calls of a module as of a function: each finds it as it was given, in any number of threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel._numerics.batched import RANDOM
from bilevel._tree import tree_leaves
from bilevel.modules.copies import Left, vacate, working_copy
from bilevel.modules.first_call import Call, cloned, demand_repeatable, examine
from bilevel.modules.layers import (
    BatchNormPolicy,
    DropoutPolicy,
    settle_dropout,
    settle_gradients,
    settle_normalization,
)
from bilevel.modules.module_call import Slots


@final
class Calls:
    """A module that is called with other parameters in the place of its own.

    A call has a working copy to itself, so that threads do not meet in one, and neither does a call inside of a call;
    copies are kept for the next ones. A copy costs what the structure of the module does: its tensors are shared.
    """

    TOLD_BY = ("original", "batch_norm", "dropout", "seed")  # what a run is told by; the copies come and go

    def __init__(
        self,
        original: nn.Module,
        left: tuple[Left, ...],
        names: frozenset[str],
        batch_norm: BatchNormPolicy,
        dropout: DropoutPolicy,
        seed: int,
    ) -> None:
        self._made_of = original, left, names, batch_norm, dropout, seed
        self._original, self._left, self._names, self._seed = original, left, names, seed
        self._batch_norm: BatchNormPolicy = batch_norm
        self._dropout: DropoutPolicy = dropout
        self._mutable: dict[tuple[str, str], None] = {}
        self._idle = [self._new()]
        self._draws_nothing = self._idle[0].is_deterministic
        in_place = any(getattr(part, "inplace", False) for part in original.modules())
        self._is_known = self._draws_nothing and not in_place
        self._writes_inputs = False
        self._forms: set[Any] = set()

    def call(self, params: Mapping[str, Tensor], inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The module's output.

        Raises:
            ValueError: what `Functional.__call__` raises.
        """
        call = params, inputs, keywords
        if not self._is_known:
            form = (len(inputs), *keywords)
            if form not in self._forms:
                self._examine(call)
                self._forms.add(form)
            if self._writes_inputs:
                call = params, *cloned((inputs, keywords))
        idle = self._idle
        try:
            slots = idle.pop()  # one step, in whatever thread
        except IndexError:
            slots = self._new()
        try:
            return self._run(slots, call)
        finally:
            idle.append(slots)

    def __reduce__(self) -> Any:
        """Without the working copies: they are made anew."""
        learned = {name: getattr(self, name) for name in ("_mutable", "_writes_inputs", "_forms")}
        return _restored, (self._made_of, learned)

    def exported(self) -> nn.Module:
        """A copy of the module as it was given."""
        return copy.deepcopy(self._original)

    def _new(self) -> Slots:
        working = working_copy(self._original, self._left)
        settle_normalization(working, self._batch_norm)
        settle_dropout(working, self._dropout)
        settle_gradients(working)
        slots = Slots(working, tuple(self._mutable))
        vacate(working, self._names)
        return slots

    def _examine(self, call: Call) -> None:
        params, inputs, keywords = call
        call = dict(params), inputs, keywords
        found = examine(self._original, self._new(), self._run, call)
        self._writes_inputs |= found.writes_inputs
        if found.mutable:
            self._mutable |= dict.fromkeys(found.mutable)
            self._idle = []
        try:  # a copy costs as much as a call of a small module: one that was made already serves
            slots = self._idle.pop()
        except IndexError:
            slots = self._new()
        demand_repeatable((slots, slots), self._run, call)
        self._idle.append(slots)

    def _run(self, slots: Slots, call: Call) -> Any:
        if self._draws_nothing:
            return slots.call(*call)
        leaves = tree_leaves((dict(call[0]), *call[1:]))
        devices = sorted({t.device.index for t in leaves if isinstance(t, Tensor) and t.device.type == "cuda"})
        with RANDOM, _fixed_random_state(self._seed, devices) as has_drawn:
            output = slots.call(*call)
            if self._dropout == "refuse" and has_drawn():
                raise ValueError(
                    '`functional(dropout="refuse")`: the module drew random numbers in its forward. Write'
                    ' `functional(module, dropout="fixed")` to have the same ones at each call, or call'
                    " `module.eval()` before."
                )
        return output


def _restored(made_of: Any, learned: dict[str, Any]) -> Calls:
    calls = Calls(*made_of)
    calls.__dict__.update(learned)
    if learned["_mutable"]:
        calls._idle = []
    return calls


@contextmanager
def _fixed_random_state(seed: int, devices: list[int]) -> Iterator[Callable[[], bool]]:
    """Seed the generators of the CPU and of these CUDA devices; restore them. Yields whether they were used."""
    generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)]
    # Generator by generator: `torch.manual_seed` would also reset devices that are not restored.
    with torch.random.fork_rng(devices, device_type="cuda"):
        for generator in generators:
            generator.manual_seed(seed)
        states = [generator.get_state() for generator in generators]
        yield lambda: any(not torch.equal(s, g.get_state()) for s, g in zip(states, generators, strict=True))
