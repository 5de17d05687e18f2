"""A run is told by the content of whatever f and g use, and is the same in every process."""

from __future__ import annotations

import argparse
import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import json
import operator
import os
import random
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

from bilevel import AID, BilevelProblem, Split, minimize
from bilevel.outer.fingerprint import Fingerprint, differences
from bilevel.solvers import CG, Adam, ClosedForm


class Mode(enum.Enum):
    FAST = (1, 2)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Without a method of its own."""

    rate: float
    pair: Any = None


class Config(types.SimpleNamespace):
    """Of the user's own, like the next ones."""


class Queue(collections.deque[Any]):
    pass


class Table(dict[str, Any]):
    scale = 1.0


class Image(np.ndarray[Any, Any]):
    pass


class Lazy:
    settings = argparse.Namespace(rate=1)

    def __init__(self, power: int) -> None:
        self.power = power

    @functools.cached_property
    def loss(self) -> int:
        return self.power


class Net(nn.Module):
    def __init__(self, scale: float) -> None:
        nn.Module.__init__(self)
        self._scale = scale


class Loader(DataLoader[Any]):
    def __init__(self, rate: float, workers: int = 0) -> None:
        DataLoader.__init__(self, DATA, batch_size=2, num_workers=workers)
        self._rate = rate


def square(batch: Any) -> Any:
    return batch**2


def rated(rate: float) -> Callable[[Any], Any]:
    def f(y: Any) -> Any:
        return y * f.rate  # type: ignore[attr-defined]

    f.rate = rate  # type: ignore[attr-defined]
    return f


def table(value: float) -> Table:
    made = Table(a=1)
    made.scale = value
    return made


DATA = TensorDataset(torch.arange(6.0))
NESTED = {(1, "a"): 1.0, (2, "b"): 2.0}
# Two that differ, of each kind
PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "argparse": lambda: (argparse.Namespace(rate=0.1), argparse.Namespace(rate=0.2)),
    "dataclass": lambda: (Settings(1.0), Settings(2.0)),
    "split": lambda: (Split(f=[torch.ones(1)], g=[1]), Split(f=[torch.zeros(1)], g=[1])),
    "namespace": lambda: (types.SimpleNamespace(a=[1]), types.SimpleNamespace(a=[2])),
    "own namespace": lambda: (Config(a=1), Config(a=2)),
    "deque": lambda: (collections.deque([1, 2]), collections.deque([1, 3])),
    "deque of tensors": lambda: (collections.deque([torch.ones(1)]), collections.deque([torch.zeros(1)])),
    "own deque": lambda: (Queue([1]), Queue([2])),
    "longest": lambda: (collections.deque([1], 2), collections.deque([1], 3)),
    "fraction": lambda: (fractions.Fraction(1, 3), fractions.Fraction(2, 3)),
    "decimal": lambda: (decimal.Decimal("0.1"), decimal.Decimal("0.10")),
    "view": lambda: (types.MappingProxyType({"a": 1}), types.MappingProxyType({"a": 2})),
    "array": lambda: (array.array("d", [1.0]), array.array("d", [2.0])),
    "bytearray": lambda: (bytearray(b"a"), bytearray(b"b")),
    "memoryview": lambda: (memoryview(b"abc"), memoryview(b"abd")),
    "objects": lambda: (np.array([1, "a"], dtype=object), np.array([1, "b"], dtype=object)),
    "own array": lambda: (np.ones(2).view(Image), np.zeros(2).view(Image)),
    "masked": lambda: (np.ma.array([1.0, 2.0], mask=[False, True]), np.ma.array([1.0, 2.0], mask=[True, False])),
    "ufunc": lambda: (np.sin, np.cos),
    "numpy generator": lambda: (np.random.default_rng(0), np.random.default_rng(1)),
    "method of a generator": lambda: (np.random.default_rng(0).normal, np.random.default_rng(1).normal),
    "random": lambda: (random.Random(0), random.Random(1)),
    "torch generator": lambda: (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    "method of a tensor": lambda: (torch.ones(2).dot, torch.zeros(2).dot),
    "method of a list": lambda: ([1].index, [2].index),
    "date": lambda: (datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)),
    "pattern": lambda: (re.compile("a"), re.compile("b")),
    "path": lambda: (Path("a/b"), Path("a/c")),
    "getter": lambda: (operator.itemgetter(1), operator.itemgetter(2)),
    "caller": lambda: (operator.methodcaller("f", a=1), operator.methodcaller("f", a=2)),
    "counter": lambda: (collections.Counter("ab"), collections.Counter("aab")),
    "user dict": lambda: (collections.UserDict(a=1), collections.UserDict(a=2)),
    "tuple keys": lambda: (NESTED, {**NESTED, (1, "a"): 3.0}),
    "objects for keys": lambda: ({Mode.FAST: 1, int: 2}, {Mode.FAST: 1, int: 3}),
    "own dict": lambda: (table(1.0), table(2.0)),
    "set of tuples": lambda: ({("a", 1), ("b", 2)}, {("a", 1), ("b", 3)}),
    "set of fractions": lambda: ({fractions.Fraction(k, 7) for k in range(9)}, {fractions.Fraction(1, 7)}),
    "partial": lambda: (functools.partial(square, Path("a")), functools.partial(square, Path("b"))),
    "function with attributes": lambda: (rated(1.0), rated(2.0)),
    "loss of torch": lambda: (torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 2.0)),
    "lazy": lambda: (Lazy(1), Lazy(2)),
    "private attribute of a module": lambda: (Net(1.0), Net(2.0)),
    "loader's collate": lambda: (DataLoader(DATA), DataLoader(DATA, collate_fn=square)),
    "loader's order": lambda: (DataLoader(DATA), DataLoader(DATA, shuffle=True)),
    "loader's size": lambda: (DataLoader(DATA, batch_size=2), DataLoader(DATA, batch_size=3)),
    "loader's end": lambda: (DataLoader(DATA, 4), DataLoader(DATA, 4, drop_last=True)),
    "loader's seed": lambda: tuple(  # type: ignore[dict-item,return-value]
        DataLoader(DATA, shuffle=True, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    ),
    "sampler": lambda: tuple(  # type: ignore[dict-item,return-value]
        DataLoader(DATA, sampler=RandomSampler(range(6), num_samples=k)) for k in (4, 5)
    ),
    "weights": lambda: (WeightedRandomSampler([1.0, 2.0], 2), WeightedRandomSampler([1.0, 3.0], 2)),
    "subset": lambda: (Subset(DATA, [0, 1]), Subset(DATA, [0, 2])),
    "own loader": lambda: (Loader(1.0), Loader(2.0)),
}


def parts(value: Any) -> dict[str, str]:
    made = Fingerprint({}, {"value": value})
    assert made.unread == [], made.unread
    return made.parts


@pytest.mark.parametrize("name", PAIRS)
def test_two_values_of_a_kind_are_told_from_each_other_and_each_is_told_the_same_twice(name: str) -> None:
    (first, other), (again, _) = PAIRS[name](), PAIRS[name]()
    assert parts(first) == parts(again)
    assert differences(parts(first), parts(other))


def test_what_a_value_holds_is_the_same_in_another_process() -> None:
    program = (
        "import json, test_fingerprint as t\n"
        "print(json.dumps({name: t.parts(make()[0]) for name, make in t.PAIRS.items()}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_default_dtype(torch.float64)\n" + program],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(run.stdout)
    for name, make in PAIRS.items():
        here = {key.replace(__name__, "t"): text.replace(__name__, "t") for key, text in parts(make()[0]).items()}
        there = {
            key.replace("test_fingerprint", "t"): text.replace("test_fingerprint", "t")
            for key, text in found[name].items()
        }
        assert here == there, name


def test_how_a_loader_does_its_work_makes_no_other_run() -> None:
    one, other = DataLoader(DATA, 2), DataLoader(DATA, 2, num_workers=2, pin_memory=True, timeout=5)
    iterated = DataLoader(DATA, 2)
    list(iterated)
    assert not differences(parts(one), parts(other)) and not differences(parts(one), parts(iterated))
    assert not differences(parts(Loader(1.0)), parts(Loader(1.0, workers=2)))


def test_what_cannot_be_compared_is_named_once_a_run_goes_on(tmp_path: Path) -> None:
    zero = torch.zeros(2)

    def run(handle: Any, **options: Any) -> None:
        def f(x: Tensor, y: Tensor) -> Tensor:
            return (y - 3).square().sum() + 0 * (handle is None)

        problem = BilevelProblem(f, lambda x, y: (y - x).square().sum() / 2)
        exact = AID(ClosedForm(lambda x: x), CG())
        minimize(problem, zero, zero, estimator=exact, outer=Adam(0.1), checkpoint=tmp_path / "a.pt", **options)

    with (tmp_path / "file").open("w") as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        run(file, max_steps=2)
        with pytest.warns(UserWarning, match=r"not compared for problem.f.handle \(_io.TextIOWrapper\)"):
            run(file, max_steps=4, resume=True)
        run(argparse.Namespace(a=1), max_steps=2)
        run(argparse.Namespace(a=1), max_steps=4, resume=True)
        with pytest.raises(ValueError, match=r"problem.f.handle.a was 1 and is 2"):
            run(argparse.Namespace(a=2), max_steps=5, resume=True)


def test_more_objects_than_are_looked_at_are_not_taken_for_the_same_unsaid() -> None:
    made = Fingerprint({}, {"value": [[[k]] for k in range(20_000)]})
    assert made.unread == ["value[9999][0] (and more objects after it)"]
    large = collections.deque([[[k]] for k in range(20_000)])  # leaves its share to what comes after it
    made = Fingerprint({}, {"value": [large, fractions.Fraction(1, 3)]})
    assert len(made.unread) == 1 and made.parts["value[1].value"] == "'1/3'"
