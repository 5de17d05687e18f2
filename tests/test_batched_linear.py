"""Layers side by side are the layers one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bilevel_strategies import normal
from torch import Tensor
from torch.nn import functional as F

from bilevel._numerics.batched import batched, linear

x, w, b = normal(5, 7, 3, seed=1), normal(5, 4, 3, seed=2), normal(5, 4, seed=3)


def kinds(found: Tensor) -> set[str]:
    """The names of the operations that a tensor was made by."""
    names, stack = set(), [found.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            names.add(node.name())
            stack += [before for before, _ in node.next_functions]
    return names


def test_a_weight_for_each_problem_is_one_product() -> None:
    leaves = [leaf.clone().requires_grad_() for leaf in (x, w, b)]
    found = batched(linear, 5, (0, 0, 0))(*leaves)
    expected = torch.stack([F.linear(x[k], w[k], b[k]) for k in range(5)])
    assert torch.allclose(found, expected, atol=1e-14)
    assert kinds(found) <= {
        "BaddbmmBackward0",
        "UnsqueezeBackward0",
        "TransposeBackward0",
        "torch::autograd::AccumulateGrad",
    }
    v = normal(5, 7, 4, seed=4)
    slow = torch.stack([F.linear(*(leaf[k] for leaf in leaves)) for k in range(5)])
    for ours, theirs in zip(torch.autograd.grad(found, leaves, v), torch.autograd.grad(slow, leaves, v), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-13)


CASES: dict[str, tuple[Callable[..., Tensor], tuple[int | None, ...], tuple[Tensor, ...]]] = {
    "axis elsewhere": (linear, (1, 2, 1), (x.movedim(0, 1), w.movedim(0, 2), b.T)),
    "shared inputs": (linear, (None, 0, 0), (x[0], w, b)),
    "shared weight": (linear, (0, None, None), (x, w[0], b[0])),
    "shared bias": (linear, (0, 0, None), (x, w, b[0])),
    "one sample": (linear, (0, 0, 0), (x[:, 0], w, b)),
    "several axes": (linear, (0, 0, 0), (normal(5, 2, 7, 3, seed=5), w, b)),
}


@pytest.mark.parametrize("name", CASES)
def test_other_arrangements_are_those_of_torch(name: str) -> None:
    function, in_dims, args = CASES[name]
    expected = torch.vmap(F.linear, in_dims=in_dims)(*args)
    assert torch.allclose(batched(function, 5, in_dims)(*args), expected, atol=1e-13)


def test_no_bias_and_no_batch_are_those_of_torch() -> None:
    assert torch.allclose(linear(x[0], w[0], b[0]), F.linear(x[0], w[0], b[0]), atol=1e-14)
    found = batched(lambda x, w: linear(x, w, None), 5, (0, 0))(x, w)
    assert torch.allclose(found, torch.einsum("kni,koi->kno", x, w), atol=1e-13)


def test_two_levels_are_those_of_torch() -> None:
    X, W, B = normal(2, 5, 7, 3, seed=6), normal(2, 5, 4, 3, seed=7), normal(2, 5, 4, seed=8)
    found = batched(batched(linear, 5, (0, 0, 0)), 2, (0, 0, 0))(X, W, B)
    assert torch.allclose(found, torch.einsum("jkni,jkoi->jkno", X, W) + B.unsqueeze(2), atol=1e-13)
    outer = batched(lambda x: batched(lambda w, b: linear(x, w, b), 5, (0, 0))(w, b), 2, (0,))(X[:, 0])
    assert torch.allclose(outer, torch.einsum("jni,koi->jkno", X[:, 0], w) + b.unsqueeze(1), atol=1e-13)
