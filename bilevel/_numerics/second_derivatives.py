"""Torch's errors about second derivatives, in words that say what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    "hardsigmoid": "write it as `torch.nn.functional.relu6(t + 3) / 6`",
    "sparse_sum": "use `.to_dense()`",
    "sparse_mask": "use `.to_dense()`",
    "standard_gamma": "keep the shape parameters of what is drawn constant",
    "Dirichlet": "keep the shape parameters of what is drawn constant",
    "margin_loss": "write the loss out in elementary operations",
    "cudnn": "disable it with `torch.backends.cudnn.flags(enabled=False)`",
    "torch.cond": "write an `if`, or `torch.where`",
    "while_loop": "write a loop of Python",
    "scan": "write a loop of Python",
    "torch.compile": "call the eager function in its place, the one that was given to `torch.compile`",
    "once_differentiable": "write the backward of that custom function in differentiable torch operations",
    "numpy": "write the backward of the custom function that calls it in differentiable torch operations",
}


@final
class explained:  # noqa: N801
    """Turn torch's error about a missing second derivative into one that names the operation and a remedy.

    A context manager; written out as a class, since it is entered at every product.

    Raises:
        NotImplementedError: if an operation of f or g has no second derivative, or a first one that is sparse.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            explain(error)


def explain(error: RuntimeError) -> None:
    """What :class:`explained` does with an error: for products, which are so many that they do without entering one.

    Raises:
        NotImplementedError: from the error, where it is about a derivative that torch does not have.
    """
    if any(text in str(error) for text in _SPARSE):
        raise NotImplementedError(
            "A gradient of f or g is a sparse tensor, which one vector of all variables cannot take. Leave out"
            " `sparse=True` of embeddings (`bilevel.functional` does, in layers), or make sparse matrices whose"
            " values depend on x or y dense."
        ) from error
    operation = _missing_derivative(str(error))
    if operation is not None:
        raise NotImplementedError(_refusal(operation)) from error


def _refusal(operation: str) -> str:
    remedy = next((text for key, text in _REMEDIES.items() if key in operation), None)
    return (
        f"The operation `{operation}` in g has no second derivative in torch, which this estimator needs."
        f" Either {', or '.join([*([remedy] if remedy else []), *_WITHOUT])}."
    )


_WITHOUT = (
    "pass `AID(..., products=bilevel.FiniteDifferences())`, which needs gradients only",
    "use `ESJ` or `Penalty`, which need no second derivative",
)


@final
@dataclass(frozen=True)
class _Wrong:
    """An operation whose second derivative in torch is wrong without a word, found by the survey in the tests.

    Attributes:
        name: of the operation, for the message.
        reason: what is wrong.
        remedy: what to write instead.
        has_gradient: whether its first derivative is right, so that estimators that need no second one may be used.
        holds: whether it is wrong at this node; a survey's finding may need a value.
    """

    name: str
    reason: str
    remedy: str
    has_gradient: bool = True
    holds: Callable[[Any], bool] = lambda _: True

    def message(self) -> str:
        ways = [self.remedy, *(_WITHOUT if self.has_gradient else ())]
        return (
            f"The operation `{self.name}` in g has no right second derivative in torch, which this estimator needs:"
            f" {self.reason}. {'Either ' if len(ways) > 1 else ''}{', or '.join(ways)}."
        )


def _has_zero(node: Any) -> bool:
    saved = node._saved_result
    return bool((saved == 0).any())


_STD = _Wrong(
    "std",
    "where the standard deviation is zero, it is taken to be zero nearby",
    "use `var`, whose second derivative is right, or `(var + eps).sqrt()`",
    holds=_has_zero,
)
# By the name of the node of the graph.
_WRONG = {
    "EmbeddingBackward0": _Wrong(
        "embedding(scale_grad_by_freq=True)",
        "its gradient is scaled, and so is no derivative of its values",
        "Leave out `scale_grad_by_freq`; `bilevel.functional` does, in layers",
        has_gradient=False,
        holds=lambda node: bool(node._saved_scale_grad_by_freq),
    ),
    "WeightNormInterfaceBackward0": _Wrong(
        "_weight_norm",
        "the norm is taken for a constant",
        "write `v * (g / torch.norm_except_dim(v, 2, dim))`, as `bilevel.functional` does in layers with `weight_norm`",
    ),
    "SparseCooTensorWithDimsAndTensorsBackward0": _Wrong(
        "sparse_coo_tensor",
        "the derivative of its values is cut off from the graph",
        "build a dense matrix, by `torch.zeros(shape).index_put((rows, columns), values)`, or gather rows, multiply and"
        " `index_add` them",
    ),
    "LinalgDetBackward0": _Wrong(
        "linalg.det",
        "at a singular matrix its derivatives are wrong",
        "Write the determinant out, or keep the matrix regular",
        has_gradient=False,
        holds=_has_zero,
    ),
    "StdBackward0": _STD,
}
_RIGHT: set[type] = set()  # the types of nodes of torch's that were met and are none of these: most of every graph
# By the name of the class, of torch's operators that take functions.
_HIGHER_ORDER = {"CondAutogradOp": "torch.cond", "WhileLoopAutogradOp": "while_loop", "ScanAutogradOp": "scan"}


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


_SPARSE = ("not implemented for sparse", "SparseCPU", "SparseCUDA", "expected sparse coordinate tensor layout")

_ONCE = once_differentiable(lambda *_: None).__code__  # the code that every function so marked is wrapped in


def refuse_dropped_terms(value: Tensor, leaf: Tensor | None = None) -> None:
    """Refuse a g(x, y) whose second derivative torch would silently take as zero.

    The backward of a compiled function, and of a custom `autograd.Function` marked `once_differentiable`, leaves no
    graph, or a node that raises when it is executed but lies on no path to the variables: a derivative of the
    gradient skips it, and is wrong without a word. Of some operations of torch the second derivative is wrong; those
    that a survey of some 800 operations found are refused alike (`tests/test_second_derivatives.py`). The node of the
    *forward* tells. One walk over the graph of the value, which ends at the leaf, some 0.5 microseconds a node.

    Args:
        value: g(x, y), with its graph.
        leaf: y; functions that do not depend on it are differentiated once only, and pass. None: none passes.

    Raises:
        NotImplementedError: if the graph holds such a node.
    """
    end = None if leaf is None or leaf.is_leaf else end_of(leaf)  # every graph ends in a leaf by itself
    for node in ancestors(value.grad_fn, end):
        kind = type(node)
        if kind in _RIGHT:
            continue
        function = getattr(node, "_forward_cls", None)  # of custom functions only
        if function is None:
            wrong = _WRONG.get(kind.__name__)
            if wrong is None:
                _RIGHT.add(kind)
            if wrong is not None and wrong.holds(node) and (not wrong.has_gradient or _leads_to(node, leaf)):
                raise NotImplementedError(wrong.message())
            continue
        operation = _differentiable_once_only(function)
        if operation and _leads_to(node, leaf):
            raise NotImplementedError(_refusal(operation))


def _leads_to(node: Any, leaf: Tensor | None) -> bool:
    end = None if leaf is None else end_of(leaf)
    return end is None or any(ancestor is end for ancestor in ancestors(node, end))


def _differentiable_once_only(function: Any) -> str | None:
    """What a custom function stands for, if it has no second derivative and torch would not say so."""
    if function.__name__ == "CompiledFunction" and function.__module__.startswith("torch."):
        return "torch.compile"
    if function.__module__.startswith("torch._higher_order_ops."):
        return _HIGHER_ORDER.get(function.__name__)
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
