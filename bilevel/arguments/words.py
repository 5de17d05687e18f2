"""Types and values in the words of an error message."""

from __future__ import annotations

import collections.abc
import numbers
import types
import typing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LONG = 100  # characters of a value, beyond which it hides what the message says
_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
    Tensor: "a tensor",
    Path: "a path",
}
_EXAMPLES = {
    "PathLike": "a path",
    "AbstractInnerSolver": "an inner solver such as `LBFGS()`",
    "AbstractUnrollable": "an iteration of differentiable steps such as `Iterate(GradientDescent(0.1), 100)`",
    "AbstractLinearSolver": "a linear solver such as `CG()`",
    "AbstractPreconditioner": "a preconditioner such as `Jacobi()`",
    "AbstractOptimizer": "an optimizer such as `GradientDescent(0.1)`",
    "AbstractUnrolling": "a form of unrolling such as `Checkpointed()`",
    "AbstractProducts": "`bilevel.FiniteDifferences()` or the like",
    "AbstractAlgorithm": "an algorithm such as `SOBA(0.1, 0.01)`",
    "BilevelProblem": "a BilevelProblem: write `BilevelProblem(f, g)`",
    "Start": "a Start, such as `estimate.start` or `Start(y=...)`",
    "Estimate": "what `hypergradient` returned",
    "Auto": "`Auto()`",
    "AbstractEstimator": "an estimator such as `AID(LBFGS(), CG())`",
    "AbstractRequiring": "an estimator such as `AID(LBFGS(), CG())`, or an algorithm such as `SOBA(0.1, 0.01)`",
    "AbstractTasks": "a source of tasks, with a method `sample(count, seed)`",
    "AbstractImages": "classes of images such as `ImageClasses(...)`",
    "Module": "a torch.nn.Module",
    "AbstractSet": "a set such as `Box(0, 1)`",
    "Learner": "a `Learner`, such as `maml(module, loss)`",
    "Constants": "`Constants(...)`",
}


def described(hint: Any) -> str:
    """What an annotation demands."""
    texts = list(dict.fromkeys(_described(hint)))
    if "a path" in texts and "a string" in texts:
        texts.remove("a string")
    return " or ".join(texts)


def _described(hint: Any) -> list[str]:
    origin, options = typing.get_origin(hint), list(typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return [text for option in options for text in _described(option)]
    if origin is typing.Literal:
        return [f"one of {', '.join(map(str, options))}" if len(options) > 1 else repr(options[0])]
    if origin is collections.abc.Callable:
        arguments = options[0] if options else ...
        if not isinstance(arguments, list):
            return ["a function"]
        return [f"a function of {len(arguments)} argument{'s' * (len(arguments) != 1)}"]
    name = getattr(hint if origin is None else origin, "__name__", str(hint))
    if origin is not None and options and isinstance(origin, type):
        if issubclass(origin, tuple) and options[-1] is not Ellipsis:
            return [f"a tuple of {len(options)} ({', '.join(map(described, options))})"]
        if issubclass(origin, collections.abc.Mapping):
            return [f"a mapping from {described(options[0])} to {described(options[1])}"]
        if issubclass(origin, collections.abc.Collection):
            kind = "sequence" if origin is collections.abc.Sequence else name
            return [f"a {kind} of which each is {described(options[0])}"]
    return [_WORDS.get(hint) or _EXAMPLES.get(name) or f"a `{name}`"]


def got(value: Any) -> str:
    """What arrived: short, and without a question to an object that may not answer."""
    kind = type(value).__name__
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
        return f"the class {value.__name__}. Wrap a torch optimizer as `TorchOptim(lambda parameters: ...)`"
    if isinstance(value, type):
        return f"the class {value.__name__} itself: write `{value.__name__}(...)`"
    if isinstance(value, torch.optim.Optimizer):
        return f"{kind}. Wrap a torch optimizer as `TorchOptim(lambda parameters: ...)`"
    if isinstance(value, Tensor):
        shape = f"tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return f"a {shape}" + (" that requires a gradient: write `.item()`" if value.requires_grad else "")
    if isinstance(value, int) and value.bit_length() > 63:
        return f"one of {value.bit_length()} bits, which 64 do not hold"
    if isinstance(value, numbers.Number | str | bytes | Path):
        return f"{_cut(repr(value))} ({kind})"
    if isinstance(value, types.FunctionType | types.MethodType):
        count = value.__code__.co_argcount - isinstance(value, types.MethodType)
        return f"a function of {count} argument{'s' * (count != 1)}"
    if isinstance(value, tuple | list | dict | set | frozenset) and type(value).__module__ == "builtins":
        return f"{kind} of {len(value)}" if value else f"an empty {kind}"
    return kind


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."
