"""Torch's errors about second derivatives, in words that say what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from torch import Tensor

_REMEDIES = {
    "scaled_dot_product": "wrap the call in `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`",
    "ctc_loss": "use a loss that is twice differentiable",
    "embedding_bag": "use `torch.nn.functional.embedding` followed by `.sum` or `.mean`",
    "cudnn": "disable it with `torch.backends.cudnn.flags(enabled=False)`",
}


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn torch's error about a missing second derivative into one that names the operation and a remedy.

    Raises:
        NotImplementedError: if an operation of f or g has no second derivative.
    """
    try:
        yield
    except RuntimeError as error:
        operation = _missing_derivative(str(error))
        if operation is None:
            raise
        remedy = next((text for key, text in _REMEDIES.items() if key in operation), None)
        ways = [remedy] if remedy else []
        ways += [
            "pass `AID(..., products=bilevel.FiniteDifferences())`, which needs gradients only",
            "use `ESJ` or `Penalty`, which need no second derivative",
        ]
        raise NotImplementedError(
            f"The operation `{operation}` in g has no second derivative in torch, which this estimator needs."
            f" Either {', or '.join(ways)}."
        ) from error


def _missing_derivative(message: str) -> str | None:
    patterns = (
        r"derivative for ['`]?(?:aten::)?_?([\w.]+?)(?:_backward)?['`]? is not implemented",
        r"(once_differentiable)",
    )
    for pattern in patterns:
        match = re.search(pattern, message)
        if match:
            return match.group(1)
    return None


def refuse_dropped_terms(gradient: Tensor) -> None:
    """Refuse a gradient whose second derivative torch would silently take as zero.

    The backward of a custom `autograd.Function` marked `once_differentiable` leaves a node that raises when it
    is executed; but it lies on no path to the variables, so that a derivative with respect to them skips it and
    is wrong without a word. One walk over the graph, some 0.5 microseconds a node.

    Raises:
        NotImplementedError: if the graph holds such a node.
    """
    stack, seen = [gradient.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise NotImplementedError(
                "A custom `torch.autograd.Function` in g is marked `once_differentiable`: it has no second"
                " derivative, which this estimator needs. Write its backward in differentiable torch operations,"
                " pass `AID(..., products=bilevel.FiniteDifferences())`, which needs gradients only, or use `ESJ` or"
                " `Penalty`, which need no second derivative."
            )
        stack.extend(parent for parent, _ in node.next_functions)
