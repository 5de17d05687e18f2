"""Wrong arguments anywhere in the public interface give one clear error, and none is taken for another thing."""

from __future__ import annotations

import collections.abc
import functools
import math
import numbers
import os
import random
import re
import signal
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from valid_calls import (
    PROBLEM,
    WITHOUT_DATA,
    C,
    Public,
    X,
    Y,
    called,
    f,
    g,
    hints,
    leave_group,
    parameters,
    public,
    valid,
)

import bilevel
import bilevel.algorithms.registry
import bilevel.named.registry
from bilevel import Auto, BilevelError, BilevelProblem, Constants, minimize
from bilevel._tree import tree_leaves
from bilevel.few_shot import Reporting
from bilevel.problems import double_well, maml, quadratic
from bilevel.solvers import CG
from bilevel.tasks import Sinusoid

CALLS = int(os.environ.get("FUZZ_CALLS", "20000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 20  # after which a call counts as one that does not end


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """The group of one process that `Ranks` was called with does not outlast the module."""
    yield
    leave_group()


# Hostile values, made anew for each call


class Hostile:
    """Whose every question fails."""

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise OSError("hostile")

    __repr__ = __str__ = __bool__ = __len__ = __iter__ = __float__ = __int__ = __eq__ = _fail
    __hash__ = __index__ = __getitem__ = __lt__ = __add__ = __mul__ = _fail

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise OSError("called")  # of a function that was to be called, and leaves as it is


class Silent:
    """Which says nothing of itself, and compares as if it were anything."""

    def __repr__(self) -> str:
        return ""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __lt__(self, other: object) -> bool:
        return True

    __gt__ = __le__ = __ge__ = __lt__


def _cyclic_list() -> Any:
    found: list[Any] = [torch.ones(2, dtype=torch.float64)]
    found.append(found)
    return found


def _cyclic_dict() -> Any:
    found: dict[str, Any] = {"a": torch.ones(2, dtype=torch.float64)}
    found["b"] = found
    return found


@functools.cache  # it takes as long to make as fifty calls
def _deep(levels: int = 10_000) -> Any:
    found: Any = torch.ones(2, dtype=torch.float64)
    for _ in range(levels):
        found = [found]
    return found


@functools.cache
def _deep_dict(levels: int = 10_000) -> Any:
    found: Any = torch.ones(2, dtype=torch.float64)
    for _ in range(levels):
        found = {"a": found}
    return found


def _vector(*entries: Any, **options: Any) -> Tensor:
    return torch.tensor(entries, **{"dtype": torch.float64, **options})


NAN, INF = math.nan, math.inf
HOSTILE: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "text": lambda: "abc",
    "empty text": lambda: "",
    "number as text": lambda: "1",
    "long text": lambda: "x" * 10_000,
    "bytes": lambda: b"abc",
    "True": lambda: True,
    "False": lambda: False,
    "minus one": lambda: -1,
    "zero": lambda: 0,
    "one": lambda: 1,
    "zero float": lambda: 0.0,
    "minus": lambda: -1.5,
    "half": lambda: 0.5,
    "two point 0": lambda: 2.0,
    "tiny": lambda: 5e-324,
    "large": lambda: 1e308,
    "NaN": lambda: NAN,
    "inf": lambda: INF,
    "minus inf": lambda: -INF,
    "2^63": lambda: 2**63,
    "10^400": lambda: 10**400,
    "-10^5000": lambda: -(10**5000),
    "complex": lambda: 1j,
    "fraction": lambda: Fraction(1, 2),
    "float64": lambda: np.float64(0.5),
    "float32": lambda: np.float32(0.5),
    "numpy NaN": lambda: np.float64(NAN),
    "int64": lambda: np.int64(2),
    "numpy bool": lambda: np.bool_(True),
    "array": lambda: np.array([1.0, 2.0]),
    "array of text": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, {}], dtype=object),
    "0-d array": lambda: np.array(0.5),
    "0-d tensor": lambda: torch.tensor(0.5),
    "0-d integer": lambda: torch.tensor(2),
    "0-d bool": lambda: torch.tensor(True),
    "0-d NaN": lambda: torch.tensor(NAN),
    "0-d with a gradient": lambda: torch.tensor(0.5, requires_grad=True),
    "vector": lambda: _vector(1.0, 2.0),
    "negative vector": lambda: _vector(-1.0, -2.0),
    "longer vector": lambda: _vector(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    "matrix": lambda: torch.ones(2, 2, dtype=torch.float64),
    "4-d": lambda: torch.ones(1, 2, 1, 2, dtype=torch.float64),
    "float32 vector": lambda: _vector(1.0, 2.0, dtype=torch.float32),
    "float16 vector": lambda: _vector(1.0, 2.0, dtype=torch.float16),
    "integers": lambda: torch.tensor([1, 2]),
    "bools": lambda: torch.tensor([True, False]),
    "complex vector": lambda: _vector(1j, 2.0, dtype=torch.complex128),
    "NaN vector": lambda: _vector(NAN, 1.0),
    "inf vector": lambda: _vector(INF, 1.0),
    "empty": lambda: torch.zeros(0, dtype=torch.float64),
    "meta": lambda: torch.ones(2, dtype=torch.float64, device="meta"),
    "leaf": lambda: _vector(1.0, 2.0).requires_grad_(),
    "inside of a graph": lambda: _vector(1.0, 2.0).requires_grad_() * 2,
    "sparse": lambda: _vector(1.0, 2.0).to_sparse(),
    "empty list": list,
    "empty dict": dict,
    "list of one": lambda: [1],
    "list of NaN": lambda: [NAN],
    "list of None": lambda: [None],
    "tuple of text": lambda: ("a", "b"),
    "pair": lambda: (1.0, 2.0),
    "reversed pair": lambda: (2.0, -1.0),
    "dict": lambda: {"a": 1},
    "dict of None": lambda: {"a": None},
    "dict of keys": lambda: {1: 2, None: 3},
    "set": lambda: {"mu"},
    "cyclic list": _cyclic_list,
    "cyclic dict": _cyclic_dict,
    "deep": _deep,
    "deep dict": _deep_dict,
    "nullary": lambda: lambda: None,
    "of many": lambda: lambda a, b, c, d, e, f, g, h, i: None,
    "of one": lambda: lambda a: a,
    "print": lambda: print,
    "class": lambda: int,
    "own class": lambda: bilevel.AID,
    "object": object,
    "hostile": Hostile,
    "silent": Silent,
    "module": lambda: math,
    "network": lambda: nn.Linear(1, 1),
    "generator": lambda: (k for k in range(2)),
    "range": lambda: range(2),
    "path": lambda: Path("/nowhere/at/all"),
    "ellipsis": lambda: ...,
    "error": lambda: ValueError("a value"),
}
COUNTS = re.compile(r"steps|terms|max_models|patience|every|budget|max_iter|skip|exponent|max_halvings")


# The first judge: an error is clear, or opaque

CLEAR = (TypeError, ValueError, BilevelError, NotImplementedError, ImportError, OSError)
# Functions of the user's, which raise what they raise.
THE_USERS = (
    "bilevel.BilevelProblem.f",
    "bilevel.BilevelProblem.g",
    "bilevel.Instance.value",
    "bilevel.reinforcement.rollout",  # with an environment and a task that are anything
    "bilevel.extending.outer_gradients",  # of vectors, in every step of an estimator
)
# What is outside the room of properties and raises AssertionError where one does not hold.
CHECKS_OF_PROPERTIES = tuple(
    f"bilevel.testing.check_{what}" for what in ("algorithm", "composite", "estimator", "problem")
)


def opaque(entry: Public, changed: tuple[str, ...], error: BaseException) -> str:
    """Why an error is no clear one; empty if it is."""
    if isinstance(error, OSError) and str(error) == "called":
        return ""
    if (
        isinstance(error, AssertionError)
        and (entry.room == "bilevel.testing.properties" or entry.name in CHECKS_OF_PROPERTIES)
        and str(error)
    ):
        return ""  # that a property does not hold
    if entry.name == "bilevel.ravel" and "name" in changed and isinstance(error, TypeError | ValueError):
        return ""  # which says what it was told to
    notes = getattr(error, "__notes__", ())
    if not isinstance(error, CLEAR) or (isinstance(error, OSError) and "hostile" in str(error) and not notes):
        return f"{type(error).__name__}: {error}"
    text = "\n".join([str(error), *notes])
    if isinstance(error, BilevelError | NotImplementedError | ImportError):
        return ""
    if not any(re.search(rf"\b{re.escape(name)}\b", text) for name in changed):
        return f"names no argument: {text}"
    names = entry.name.split(".")
    if not any(re.search(rf"\b{name}\b", text) for name in (names[-1], names[-2] if entry.owner else names[-1])):
        return f"names no call: {text}"
    if len(text) > 2_000:
        return f"is {len(text)} characters long"
    return ""


# The second judge: what is no value of the annotated type is not taken


def belongs(value: Any, hint: Any) -> bool:
    """Whether a value is one of those that an annotation means, NaN apart; where it is not known, it is."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return belongs(value, options[0])
    if origin in (typing.Union, types.UnionType):
        return any(belongs(value, option) for option in options)
    if origin is typing.Literal:
        return isinstance(value, str | int | type(None)) and any(value is o or value == o for o in options)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint in (int, float):
        if isinstance(value, Tensor):
            return (
                not value.dim()
                and not value.is_complex()
                and value.dtype is not torch.bool
                and ((hint is float and not bool(value.isnan())) or not value.is_floating_point())
            )
        real = numbers.Real if hint is float else numbers.Integral
        return isinstance(value, real) and not isinstance(value, bool) and value == value
    if hint is type(None):
        return value is None
    if hint in (Any, object) or isinstance(hint, str | typing.TypeVar):
        return True
    if origin is tuple and options and options[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(options) and all(map(belongs, value, options))
    if origin is collections.abc.Callable:
        return callable(value)
    kind: Any = origin or hint
    if not isinstance(kind, type):
        return True
    if not isinstance(value, kind) or (isinstance(value, str) and kind is not str and not issubclass(kind, Path)):
        return False
    contents: Any = value
    if issubclass(kind, collections.abc.Mapping) and options:
        return all(belongs(a, options[0]) and belongs(b, options[1]) for a, b in contents.items())
    if issubclass(kind, collections.abc.Collection) and options:
        return all(belongs(part, options[0]) for part in contents)
    return True


# What is taken beyond the annotation, and why: classes whole, or the argument of a call.
NAN_IS_AN_ANSWER = (  # results say by NaN what could not be computed
    *("Adapted", "Assumption", "Best", "Bound", "Calibration", "Certificate", "Comparison", "Estimate", "Evaluated"),
    *(
        "Evaluation",
        "FlatEstimate",
        "Gram",
        "Influence",
        "Move",
        "OuterConstraints",
        "Progress",
        "Reached",
        "Record",
        "Report",
        "Row",
        "Score",
        "Solution",
        "Solved",
        "Substitute",
    ),
    *("Told", "Trained", "Validation"),
)
# None for an argument that is a group is its default; so it is for the scale of images, which then fits their dtype.
GROUPED = {"abml", "ibaml", "ibaml_head", "train", "ImageClasses"}
OLD_FORMS = {("Experiment", "settings"), ("Experiment", "evaluation"), ("ImageClasses", "names")}  # what is converted
DRAWN = {
    "composites",
    "programs",
    "fixed_points",
    "quadratics",
    "spd_matrices",
    "spectra",
    "structures",
    "smooth_problems",
    "logistics",
}  # by hypothesis


def may_be_taken(entry: Public, name: str, value: Any) -> bool:
    """Whether the second judge lets it pass."""
    last = entry.name.rpartition(".")[2]
    if last in NAN_IS_AN_ANSWER and isinstance(value, float | Tensor):
        return bool(value != value)
    return last in DRAWN or (last, name) in OLD_FORMS or (value is None and last in GROUPED)


class Call(NamedTuple):
    """What was called, with which changes."""

    entry: Public
    changed: dict[str, str]

    def __str__(self) -> str:
        return f"{self.entry.name}({', '.join(f'{name}=<{value}>' for name, value in self.changed.items())})"


def calls(count: int, seed: int) -> Iterator[Call]:
    draw = random.Random(seed)
    names = list(HOSTILE)
    without = (*THE_USERS, *(f"bilevel.tasks.{name}" for name in WITHOUT_DATA))
    entries = [entry for entry in public() if not entry.name.startswith(without)]
    weights = [_weight(entry) for entry in entries]
    for entry in draw.choices(entries, weights, k=count):
        own = list(parameters(entry.call, method=entry.owner is not None))
        if not own:
            continue
        some = draw.sample(own, min(len(own), draw.choice((1, 1, 1, 2))))
        changed = {name: draw.choice(names) for name in some}
        if not any(_endless(name, changed[name]) for name in some):
            yield Call(entry, changed)


# Of these a call that succeeds takes long.
HEAVY = re.compile(
    r"testing|digits$|compare|read_best|draw_reliability|hyper_cleaning$|Experiment\.|multinomial|breast|\.train$|language_sources$|python_texts$"
)


def _weight(entry: Public) -> float:
    count = len(parameters(entry.call, method=entry.owner is not None))
    return (0.05 if HEAVY.search(entry.name) else 1.0) * math.sqrt(count)


def _endless(name: str, value: str) -> bool:
    """Whether it is a valid number of steps that nobody lives to see the end of."""
    return value in ("2^63", "10^400", "large") and COUNTS.search(name) is not None


def judged(call: Call) -> tuple[str, str]:
    """("", "") where all is well; else which judge, and what it says."""
    arguments = valid(call.entry) | {name: HOSTILE[value]() for name, value in call.changed.items()}
    changed = {name: arguments[name] for name in call.changed}
    try:
        signal.alarm(SECONDS)
        called(call.entry, arguments)
    except _TooLongError:
        return "endless", "does not end"
    except Exception as error:
        why = opaque(call.entry, tuple(call.changed), error)
        return ("opaque", why) if why else ("", "")
    finally:
        signal.alarm(0)
    kinds = hints(call.entry.call)
    for name, value in changed.items():
        if name != "_" and not belongs(value, kinds.get(name, Any)) and not may_be_taken(call.entry, name, value):
            return "nonsense", f"takes {call.changed[name]} for {name}: {kinds[name]}"
    return "", ""


class _TooLongError(BaseException):
    pass


def _too_long(*_: Any) -> None:
    raise _TooLongError


def fuzzed(count: int, seed: int) -> tuple[Counter[str], Counter[tuple[str, str]], dict[str, list[str]]]:
    """Calls by room, findings by (room, judge), and what was found."""
    tried: Counter[str] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    texts: dict[str, list[str]] = {}
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        for call in calls(count, seed):
            room = call.entry.room
            tried[room] += 1
            judge, why = judged(call)
            if judge:
                found[room, judge] += 1
                texts.setdefault(f"{judge} {call.entry.name}({', '.join(call.changed)})", []).append(
                    f"{call}: {why[:300]}"
                )
    finally:
        signal.signal(signal.SIGALRM, before)
    return tried, found, texts


# The tests


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names that are registered on the way go with the test, and so do files that hostile paths name."""
    monkeypatch.chdir(tmp_path)
    for registry in (bilevel.named.registry, bilevel.algorithms.registry):
        monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


@pytest.mark.filterwarnings("ignore")
def test_every_public_name_has_a_valid_call() -> None:
    """A name without one is not fuzzed: put its arguments into tests/valid_calls.py."""
    assert len(public()) > 300
    for entry in public():
        arguments = valid(entry)
        if entry.name.rpartition(".")[2] not in WITHOUT_DATA and not HEAVY.search(entry.name):
            called(entry, arguments)


@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments_give_one_clear_error_and_none_is_taken(capfd: pytest.CaptureFixture[str]) -> None:
    tried, found, texts = fuzzed(CALLS, SEED)
    capfd.readouterr()  # what `print` was asked to
    lines = "\n".join(f"{what}\n    {each[0]}" for what, each in sorted(texts.items()))
    assert not found, f"{sum(found.values())} of {sum(tried.values())} calls (seed {SEED}):\n{lines}"


@pytest.mark.filterwarnings("ignore")
def test_a_judge_that_sees_nothing_would_be_seen() -> None:
    """Calls that are opaque, and nonsense that is taken, are found."""

    def halved(step: float, steps: int = 1) -> float:
        return float(step) / steps

    entry = Public("bilevel.halved", "bilevel", halved)
    with pytest.raises(ZeroDivisionError) as caught:
        halved(1.0, 0)
    assert "ZeroDivisionError" in opaque(entry, ("steps",), caught.value)
    assert "names no argument" in opaque(entry, ("steps",), ValueError("`halved` needs more."))
    assert "names no call" in opaque(entry, ("steps",), ValueError("`steps` must be positive."))
    assert not opaque(entry, ("steps",), ValueError("`halved(steps=...)` must be positive. Got 0."))
    assert not belongs("1", hints(halved)["step"]) and not belongs(True, hints(halved)["steps"])
    assert belongs(np.int64(1), hints(halved)["steps"]) and belongs(torch.tensor(0.5), hints(halved)["step"])


NUMBERS: list[Any] = [np.int64(2), np.int32(2), torch.tensor(2)]


@pytest.mark.parametrize("number", NUMBERS, ids=["int64", "int32", "0-d tensor"])
def test_numbers_of_numpy_and_torch_are_numbers(number: Any) -> None:
    """The same bits as from those of Python."""
    assert torch.equal(quadratic(p=number, q=number, seed=number).x0, quadratic(p=2, q=2, seed=2).x0)
    bound = bilevel.bounds.gradient_descent(C, step=float(np.float32(0.5)), steps=number, distance=number)
    assert bound == bilevel.bounds.gradient_descent(C, step=0.5, steps=2, distance=2.0)
    assert type(CG(max_steps=number).max_steps) is int
    assert Sinusoid(shots=number).sample(number, number)["support_x"].shape == (2, 2, 1)


NONSENSE: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (double_well, {"tilt": "abc"}),
    (double_well, {"tilt": NAN}),
    (quadratic, {"seed": 1.0}),
    (quadratic, {"p": True}),
    (maml, {"module": nn.Linear(1, 1), "loss": nn.functional.mse_loss, "inner_steps": 0.5}),
    (BilevelProblem, {"f": f, "g": g, "tasks": "no"}),
    (Reporting, {"tensorboard": object()}),
    (Auto, {"relative_error": INF}),
    (minimize, {"problem": PROBLEM, "x0": X, "y0": Y, "tol": INF}),
    (minimize, {"problem": PROBLEM, "x0": X, "y0": Y, "tol": NAN}),
    (Constants, {"mu": True}),
]


@pytest.mark.parametrize(
    ("call", "arguments"), NONSENSE, ids=lambda each: "-".join(each) if isinstance(each, dict) else each.__name__
)
def test_nonsense_is_refused_by_name(call: Callable[..., Any], arguments: dict[str, Any]) -> None:
    name = list(arguments)[-1]
    with pytest.raises((TypeError, ValueError), match=rf"`{call.__name__}\({name}=...\)` "):
        call(**arguments)


@pytest.mark.parametrize("tree", [_cyclic_list, _cyclic_dict, _deep, _deep_dict])
def test_structures_without_an_end_are_refused(tree: Callable[[], Any]) -> None:
    with_data = BilevelProblem(lambda x, y, d: f(x, y), lambda x, y, d: g(x, y))
    for arguments in ({"x": tree(), "y0": Y}, {"x": X, "y0": tree()}):
        with pytest.raises(ValueError, match="must not hold itself"):
            bilevel.hypergradient(PROBLEM, **arguments)
    with pytest.raises(ValueError, match="must not hold itself"):
        bilevel.hypergradient(with_data, X, Y, data=tree())
    nested: Any = X
    for _ in range(50):
        nested = [nested]
    found = bilevel.hypergradient(BilevelProblem(lambda x, y: f(X, y), lambda x, y: g(tree_leaves(x)[0], y)), nested, Y)
    assert torch.equal(tree_leaves(found.grad)[0], X - 3)
