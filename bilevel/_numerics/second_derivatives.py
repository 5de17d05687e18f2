"""Torch's errors about second derivatives, in words that say what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel._numerics.graphs import ancestors, end_of

_REMEDIES = {
    "scaled_dot_product": "wrap the call in `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`",
    "ctc_loss": "use a loss that is twice differentiable",
    "embedding_bag": "use `torch.nn.functional.embedding` followed by `.sum` or `.mean`",
    "cdist": "write the distances out: `(a[:, None] - b).square().sum(-1)`, and `.sqrt()` where they are positive",
    "pdist": "write the distances out: `(a[:, None] - b).square().sum(-1)`, and `.sqrt()` where they are positive",
    "segment_reduce": "use `Tensor.index_add`",
    "margin_loss": "write the loss out in elementary operations",
    "cudnn": "disable it with `torch.backends.cudnn.flags(enabled=False)`",
    "torch.compile": "pass the eager function, the one that was given to `torch.compile`",
    "once_differentiable": "write the backward of that custom function in differentiable torch operations",
    "numpy": "write the backward of the custom function that calls it in differentiable torch operations",
}


@final
class explained:  # noqa: N801
    """Turn torch's error about a missing second derivative into one that names the operation and a remedy.

    A context manager; written out as a class, since it is entered at every product.

    Raises:
        NotImplementedError: if an operation of f or g has no second derivative.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        operation = _missing_derivative(str(error))
        if operation is not None:
            raise NotImplementedError(_refusal(operation)) from error


def _refusal(operation: str) -> str:
    remedy = next((text for key, text in _REMEDIES.items() if key in operation), None)
    ways = [remedy] if remedy else []
    ways += [
        "pass `AID(..., products=bilevel.FiniteDifferences())`, which needs gradients only",
        "use `ESJ` or `Penalty`, which need no second derivative",
    ]
    return (
        f"The operation `{operation}` in g has no second derivative in torch, which this estimator needs."
        f" Either {', or '.join(ways)}."
    )


def _missing_derivative(message: str) -> str | None:
    patterns = (
        r"derivative for ['`]?(?:aten::)?_?([\w.]+?)(?:_backward)?['`]? is not implemented",
        r"(once_differentiable)",
        r"(torch\.compile) with aot_autograd does not",
        r"Can't call (numpy)\(\) on Tensor that requires grad",
    )
    for pattern in patterns:
        match = re.search(pattern, message)
        if match:
            return match.group(1)
    return None


_ONCE = once_differentiable(lambda *_: None).__code__  # the code that every function so marked is wrapped in


def refuse_dropped_terms(value: Tensor, leaf: Tensor | None = None) -> None:
    """Refuse a g(x, y) whose second derivative torch would silently take as zero.

    The backward of a compiled function, and of a custom `autograd.Function` marked `once_differentiable`, leaves no
    graph, or a node that raises when it is executed but lies on no path to the variables: a derivative of the
    gradient skips it, and is wrong without a word. The node of its *forward* tells. One walk over the graph of the
    value, which ends at the leaf, some 0.5 microseconds a node.

    Args:
        value: g(x, y), with its graph.
        leaf: y; functions that do not depend on it are differentiated once only, and pass. None: none passes.

    Raises:
        NotImplementedError: if the graph holds such a node.
    """
    end = None if leaf is None else end_of(leaf)
    for node in ancestors(value.grad_fn, end):
        operation = _differentiable_once_only(node)
        if operation and (end is None or any(ancestor is end for ancestor in ancestors(node, end))):
            raise NotImplementedError(_refusal(operation))


def _differentiable_once_only(node: Any) -> str | None:
    """What the node of a forward stands for, if it has no second derivative and torch would not say so."""
    function = getattr(node, "_forward_cls", None)  # of custom functions only
    if function is None:
        return None
    if function.__name__ == "CompiledFunction" and function.__module__.startswith("torch."):
        return "torch.compile"
    return f"{function.__name__} (marked once_differentiable)" if _marks_once(function) else None


def _marks_once(function: Any) -> bool:
    for backward in (function.backward, function.vjp):
        while backward is not None:  # through decorators
            if getattr(backward, "__code__", None) is _ONCE:
                return True
            if any(_marks_once(inner) for inner in _wrapped_functions(backward) if inner is not function):
                return True
            backward = getattr(backward, "__wrapped__", None)
    return False


def _wrapped_functions(backward: Any) -> Iterator[Any]:
    """The custom functions in a closure: `torch.vmap` wraps a function in another in this way."""
    for cell in getattr(backward, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            inner = cell.cell_contents
            if isinstance(inner, type) and issubclass(inner, torch.autograd.Function):
                yield inner
