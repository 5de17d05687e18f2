"""Whether what a checkpoint holds is what this library writes: a file may have been cut short, edited, or made up."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from bilevel._result import BilevelError, Status
from bilevel.arguments.fits import UnfitError, fields as annotated
from bilevel.outer.best import Candidate
from bilevel.outer.entries import MISREAD, is_calls, is_count
from bilevel.outer.origin import origin_of_file
from bilevel.outer.solution import Record
from bilevel.portable.plain import same_bits


def sound_records(entries: Sequence[Any], steps: int, kept: int | None = None) -> list[Record]:
    """The records of a run of that many steps, in order: one of each, or fewer.

    Raises:
        ValueError: saying which is none, or how many there are.
    """
    kept = steps if kept is None else kept
    if len(entries) != kept or kept > steps:
        raise ValueError(f"it has {len(entries)} records, and its 'step' is {steps}, its 'kept' {kept}")
    found: list[Record] = []
    for i, entry in enumerate(entries):
        own: Any = entry.get("step") if isinstance(entry, dict) and kept < steps else i
        before = found[-1].step if found else -1
        if not is_count(own) or not before < own < steps:
            raise ValueError(f"its record after that of step {before} is of no later step")
        found.append(sound_record(entry, own))
    return found


def sound_record(entry: Any, step: int) -> Record:
    """A record from plain data.

    Raises:
        ValueError: saying what is wrong with it.
    """
    where = f"its record of step {step}"
    try:
        if (
            not isinstance(entry, dict)
            or not isinstance(entry["status"], str)
            or entry["status"] not in Status.__members__
        ):
            raise ValueError("there is no such status")
        record = Record.from_dict(entry)
        numbers: tuple[Any, ...] = record.value, record.grad_norm, record.seconds
        if not all(isinstance(each, int | float) for each in numbers) or not all(map(_is_float, numbers)):
            raise ValueError("a number is none")
        if not is_calls(record.stats.as_dict()) or not 0 <= record.seconds < math.inf:
            raise ValueError("a count, or its seconds, make no sense")
    except MISREAD as error:
        raise ValueError(f"{where} makes no sense: {_short(error)}") from error
    if record.step != step:
        raise ValueError(f"{where} says that it is of step {record.step}")
    return record


def sound_candidate(what: str, content: Any, x: Tensor, y: Tensor, records: Sequence[Record]) -> Candidate:
    """The `best` iterate, or that of the `least` measure, from plain data, for a run that begins at x and y.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(content, dict) or not isinstance(content.get("counts"), bool):
        raise ValueError(f"its {what!r} makes no sense")
    for name, like in (("x", x), ("y", y)):
        demand_alike(content.get(name), like, f"its '{what}.{name}'")
    step: Any = content["record"].get("step") if isinstance(content.get("record"), dict) else None
    of_step = next((known for known in records if known.step == step), None)
    if not is_count(step) or of_step is None:
        raise ValueError(f"its '{what}.record' is of no step of the run")
    record = sound_record(content["record"], step)
    if repr(record) != repr(of_step):  # NaN is no other than NaN
        raise ValueError(f"its '{what}.record' is not that of its step")
    return Candidate(content["x"], content["y"], record, content["counts"])


def demand_alike(saved: Any, like: Tensor, what: str) -> None:
    """Refuse what is no tensor of the dtype of another one with its last axis; what comes before may be tasks.

    Raises:
        ValueError: saying what it is.
    """
    if not isinstance(saved, Tensor):
        raise ValueError(f"{what} is a {type(saved).__name__}, not a tensor")
    if saved.dtype != like.dtype or saved.shape[-1:] != like.shape[-1:]:
        raise ValueError(
            f"{what} has the shape {tuple(saved.shape)} and the dtype {saved.dtype}, and not {tuple(like.shape)} and"
            f" {like.dtype}"
        )


def demand_state(saved: Any, like: Any, sizes: tuple[int, int], what: str = "its 'state'") -> None:
    """Refuse a state with entries of other kinds than the one that the run began with.

    Where that one has a tensor as long as x or y, the same is asked for; where it has None, anything may have come.

    Args:
        saved: the state.
        like: the initial state.
        sizes: of x and y.
        what: how errors call it.

    Raises:
        ValueError: naming the entry.
    """
    if isinstance(like, Tensor):
        if not isinstance(saved, Tensor) or saved.dtype != like.dtype or (like.dim() == 0) != (saved.dim() == 0):
            raise ValueError(f"{what} is no tensor of {like.dtype} with {'no' if like.dim() == 0 else 'its'} axes")
        if like.dim() and (like.shape[-1] in sizes or saved.dim() < like.dim()):
            demand_alike(saved, like, what)
            if saved.dim() < like.dim():
                raise ValueError(f"{what} has the shape {tuple(saved.shape)}, and not {tuple(like.shape)}")
    elif is_dataclass(like) and type(saved) is type(like):
        for field in fields(like):
            demand_state(getattr(saved, field.name), getattr(like, field.name), sizes, f"{what}.{field.name}")
        _demand_annotated(saved, what)
    elif isinstance(like, dict) and isinstance(saved, dict):
        for key in like.keys() & saved.keys():
            demand_state(saved[key], like[key], sizes, f"{what}[{key!r}]")
    elif isinstance(like, tuple) and isinstance(saved, tuple) and len(like) == len(saved):
        for i, (own, old) in enumerate(zip(saved, like, strict=True)):
            demand_state(own, old, sizes, f"{what}[{i}]")
    elif isinstance(like, bool | str | list | tuple | dict) or is_dataclass(like):
        if type(saved) is not type(like):
            raise ValueError(f"{what} is a {type(saved).__name__}, not a {type(like).__name__}")
    elif isinstance(like, int | float) and not (_is_number(saved) and _is_float(saved)):
        raise ValueError(f"{what} is no number")


def _demand_annotated(saved: Any, what: str) -> None:
    """Refuse entries that a dataclass does not admit, as far as its annotations can be read."""
    try:
        kind: Any = type(saved)
        known = annotated(kind)
    except (NameError, TypeError, AttributeError):
        return
    for name, _, fit in known:
        try:
            fit.take(getattr(saved, name))
        except UnfitError as error:
            raise ValueError(f"{what}.{name} is a {type(getattr(saved, name)).__name__}") from error


def demand_point(point: tuple[Any, Any], content: Mapping[str, Any], start: tuple[Tensor, Tensor]) -> None:
    """Refuse a state whose x and y are not those that the file names beside it.

    Raises:
        ValueError: naming the one.
    """
    for name, own, like in zip(("x", "y"), point, start, strict=True):
        demand_alike(own, like, f"its 'state.{name}'")
        if content.get("format") != 1 and not same_bits(own.detach(), content[name].to(own.device)):
            raise ValueError(f"its 'state.{name}' is another {name} than the one beside it")


def suspect(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Note that an error of the first step of a run that goes on, if not the user's, may be of what its file holds."""
    if isinstance(error, MISREAD) and not isinstance(error, BilevelError):
        frames = traceback.extract_tb(error.__traceback__)
        if frames and origin_of_file(frames[-1].filename) != "user":
            error.add_note(f"It is of the first step from {str(path)!r}, whose state may be damaged.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_float(value: Any) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200].splitlines()[0]
