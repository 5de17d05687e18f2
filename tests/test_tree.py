"""Nested structures of tensors as vectors, and what may be a variable at all."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from bilevel import AID, BilevelProblem, Constants, Start, certify, hypergradient, ravel
from bilevel._tree import tree_leaves, tree_map
from bilevel.solvers.cg import CG
from bilevel.solvers.closed_form import ClosedForm
from bilevel.solvers.lbfgs import LBFGS


class Pair(NamedTuple):
    w: Tensor
    b: Tensor


@dataclass
class Record:
    w: Tensor


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
LEAVES = SHAPES.map(lambda shape: torch.arange(float(torch.Size(shape).numel())).reshape(shape))
TREES = st.recursive(
    LEAVES,
    lambda child: st.one_of(
        st.lists(child, min_size=1, max_size=3),
        st.lists(child, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), child, min_size=1),
        st.tuples(child, child).map(lambda two: Pair(*two)),
        st.lists(child, min_size=1, max_size=3).map(lambda several: deque(several, maxlen=3)),
        st.dictionaries(st.sampled_from("abc"), child, min_size=1).map(OrderedDict),
    ),
    max_leaves=6,
)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


class Point:
    """A container of somebody else's, which torch's transformations know."""

    def __init__(self, u: Any, v: Any) -> None:
        self.u, self.v = u, v


getattr(torch.utils, "_pytree").register_pytree_node(  # noqa: B009  (type checkers take it for private)
    Point, lambda point: ([point.u, point.v], None), lambda parts, _: Point(*parts)
)


@given(TREES)
def test_unravel_undoes_ravel(tree: Any) -> None:
    vector, structure = ravel(tree)
    assert vector.shape == (structure.size,)
    assert_same(structure.unravel(vector), tree)
    assert torch.equal(structure.ravel(structure.unravel(vector), "tree"), vector)


@given(TREES, st.integers(0, 3), st.integers(0, 2))
def test_leading_axes_of_the_vector_become_leading_axes_of_every_leaf(tree: Any, rows: int, columns: int) -> None:
    vector, structure = ravel(tree)
    scale = 1 + torch.arange(float(rows * columns)).reshape(rows, columns)
    stacked = structure.unravel(scale.unsqueeze(-1) * vector)
    for whole, leaf in zip(tree_leaves(stacked), tree_leaves(tree), strict=True):
        assert whole.shape == (rows, columns, *leaf.shape)
        for i in range(rows):
            for j in range(columns):
                assert torch.equal(whole[i, j], scale[i, j] * leaf)


def test_ravel_and_unravel_are_differentiable() -> None:
    leaves = {"a": torch.ones(2, 2, requires_grad=True), "b": torch.tensor(2.0, requires_grad=True)}
    vector, structure = ravel(leaves)
    parts = structure.unravel(vector)
    loss = (parts["a"] * torch.arange(4.0).reshape(2, 2)).sum() + 3 * parts["b"]
    in_a, in_b = torch.autograd.grad(loss, (leaves["a"], leaves["b"]))
    assert torch.equal(in_a, torch.arange(4.0).reshape(2, 2))
    assert float(in_b) == 3.0


def reordered(tree: Any, seed: int) -> Any:
    """The same tree with the entries of every dict inserted in another order."""
    if isinstance(tree, dict):
        keys = random.Random(seed).sample(list(tree), len(tree))
        return type(tree)((key, reordered(tree[key], seed)) for key in keys)
    if isinstance(tree, Pair):
        return Pair(*(reordered(child, seed) for child in tree))
    if isinstance(tree, deque):
        return deque((reordered(child, seed) for child in tree), tree.maxlen)
    return type(tree)(reordered(child, seed) for child in tree) if isinstance(tree, list | tuple) else tree


def labelled(tree: Any) -> Any:
    """Every leaf of its shape, with entries that no other leaf has."""
    count = iter(range(1000))
    return tree_map(lambda leaf: leaf + 100.0 * next(count), tree)


@given(TREES.map(labelled), st.integers(0, 5))
def test_dicts_are_matched_by_their_keys(tree: Any, seed: int) -> None:
    vector, structure = ravel(tree)
    other = reordered(tree, seed)
    assert torch.equal(structure.ravel(other, "y"), vector)
    assert_same(structure.unravel(structure.ravel(other, "y")), tree)
    assert_same(structure.aligned(other), tree)


def test_ordered_and_default_dicts_are_matched_by_their_keys() -> None:
    for kind in (OrderedDict, lambda pairs: defaultdict(list, pairs)):
        vector, structure = ravel(kind([("a", torch.zeros(2)), ("b", torch.ones(2))]))
        assert torch.equal(structure.ravel(kind([("b", torch.ones(2)), ("a", torch.zeros(2))]), "y"), vector)


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2), "c": torch.ones(1)},
        {"b": torch.zeros(2), "a": torch.ones(2)},
        {"b": torch.zeros(2)},
        OrderedDict(b=torch.zeros(2), a=torch.ones(1)),
        [torch.ones(1), torch.zeros(2)],
    ],
)
def test_other_keys_shapes_or_kinds_are_still_refused(other: Any) -> None:
    _, structure = ravel({"a": torch.zeros(1), "b": torch.ones(2)})
    with pytest.raises(ValueError, match="y must have the structure"):
        structure.ravel(other, "y")


def test_an_estimate_does_not_depend_on_the_order_of_keys() -> None:
    """Of the warm start, of a closed form's result, of y in task mode, and of x in a certificate."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]])

    def g(x: Any, y: Any, t: Any) -> Any:
        return t * ((y["a"] - x["a"]).square().sum() + 2 * (y["b"] - x["b"]).square().sum())

    problem = BilevelProblem(lambda x, y, t: (t * (y["a"] - 1)).square().sum() + (y["b"] * t).sum(), g, tasks=True)
    aid, data = AID(LBFGS(tol=1e-10), CG(rtol=1e-10)), torch.tensor([1.0, 2.0, 3.0])
    x, y0 = {"a": a, "b": b}, {"a": torch.zeros(2), "b": torch.zeros(2, 1)}
    first = hypergradient(problem, x, y0, estimator=aid, data=data)
    y, v = first.start.y, first.start.v
    assert v is not None
    start = Start({"b": y["b"], "a": y["a"]}, {"b": v["b"], "a": v["a"]})
    again = hypergradient(problem, x, y0, estimator=aid, data=data, start=start)
    assert again.stats.inner_steps == again.stats.linear_steps == 0
    assert_same(again.grad, first.grad)
    solution = ClosedForm(lambda x, t: {"b": x["b"], "a": x["a"]})
    closed = hypergradient(problem, x, y0, estimator=AID(solution, CG(rtol=1e-10)), data=data)
    torch.testing.assert_close(closed.grad, first.grad)
    constants = Constants(mu=2.0, L_fyy=20.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=20.0)
    swapped = {"b": b, "a": a}
    assert certify(problem, swapped, first, constants, data=data).bound < 1e-8


def test_what_makes_a_container_is_kept() -> None:
    by_name: defaultdict[str, Any] = defaultdict(list, a=torch.ones(2))
    vector, structure = ravel(by_name)
    built = structure.unravel(vector)
    assert type(built) is defaultdict and built["missing"] == []
    vector, structure = ravel(deque([torch.ones(1)], maxlen=4))
    assert structure.unravel(vector).maxlen == 4


def test_kinds_of_nodes_that_torch_was_told_of_are_nodes() -> None:
    tree = {"p": Point(torch.ones(2), [torch.zeros(1)])}
    vector, structure = ravel(tree)
    assert vector.tolist() == [1.0, 1.0, 0.0]
    built = structure.unravel(vector + 1)["p"]
    assert isinstance(built, Point)
    assert built.u.tolist() == [2.0, 2.0] and built.v[0].tolist() == [1.0]
    with pytest.raises(TypeError, match=r"Got str at x\['p'\]\[1\]"):
        ravel({"p": Point(torch.ones(2), "v")}, "x")


def test_leaves_come_as_from_torch() -> None:
    """In the same order, with the same types as leaves: a subclass of a container is one, named tuples aside."""
    torchs = getattr(torch.utils, "_pytree")  # noqa: B009  (type checkers take it for private)

    class Sub(dict[str, Any]):
        pass

    trees: list[Any] = [{"b": 1, "a": [2, (3, None)]}, torch.Size([1, 2]), Sub(a=1), OrderedDict(b=1, a=2), Pair(1, 2)]  # type: ignore[arg-type]
    trees += [torch.max(torch.ones(2, 2), 0), deque([1, {"z": 2, "y": 3}]), defaultdict(list, b=1), range(3), "ab", {}]
    for tree in trees:
        ours, theirs = tree_leaves(tree), torchs.tree_leaves(tree)
        assert len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
        assert type(tree_map(str, tree)) is type(torchs.tree_map(str, tree))


def test_tree_map_reaches_every_leaf() -> None:
    tree = {"a": [torch.ones(2), (torch.zeros(()),)]}
    assert_same(tree_map(lambda leaf: leaf + 1, tree), {"a": [torch.full((2,), 2.0), (torch.ones(()),)]})


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (torch.zeros(2), r"must have the structure \{'a': \(2,\)\}. Got \(2,\)"),
        ({"a": torch.zeros(3)}, r"Got \{'a': \(3,\)\}"),
        ({"b": torch.zeros(2)}, r"Got \{'b': \(2,\)\}"),
        ({"a": torch.zeros(2, dtype=torch.float32)}, "must be torch.float64 on cpu. Got torch.float32"),
        ({"a": torch.zeros(2, device="meta")}, "on cpu. Got torch.float64 on meta"),
    ],
)
def test_another_structure_is_refused_and_described(other: Any, text: str) -> None:
    _, structure = ravel({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=text):
        structure.ravel(other, "y")


@pytest.mark.parametrize(
    ("tree", "error", "text"),
    [
        (None, TypeError, "Got NoneType at x"),
        ({"a": [None]}, TypeError, r"Got NoneType at x\['a'\]\[0\]"),
        (1.0, TypeError, r"Got float at x. Write `torch.tensor"),
        (nn.Linear(1, 1), TypeError, "Got Linear at x"),
        (Record(torch.zeros(1)), TypeError, "Got Record at x"),
        ({}, TypeError, "at least one tensor"),
        ([], TypeError, "at least one tensor"),
        (torch.ones(2, dtype=torch.int64), TypeError, "Got torch.int64 at x. Convert"),
        (torch.ones(2, dtype=torch.bool), TypeError, "Got torch.bool at x"),
        ((torch.ones(2), torch.ones(2, dtype=torch.complex128)), TypeError, r"Got torch.complex128 at x\[1\]"),
        (Pair(torch.ones(2), torch.ones(2, dtype=torch.int64)), TypeError, r"Got torch.int64 at x\.b"),
        (torch.ones(2).to_sparse(), TypeError, "Got torch.sparse_coo at x. Write `.to_dense"),
        ([torch.ones(2), torch.ones(2, dtype=torch.float32)], ValueError, "one dtype. Got .*float32.*float64"),
        ([torch.ones(2), torch.ones(2, device="meta")], ValueError, "one device. Got .*cpu.*meta"),
    ],
)
def test_what_is_no_structure_of_real_tensors_is_refused_with_its_place(
    tree: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ravel(tree, "x")


# As variables of a problem: h = y - 1 for f = |y - 1|^2 / 2, g = |y - x|^2 / 2.


def total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum()


PROBLEM = BilevelProblem(
    lambda x, y: total((b - 1).square().sum() for b in tree_leaves(y)) / 2,
    lambda x, y: total((b - a).square().sum() for a, b in zip(tree_leaves(x), tree_leaves(y), strict=True)) / 2,
)
PROJECTION = AID(ClosedForm(lambda x: x), CG(rtol=1e-12))


def solve(x: Any) -> Any:
    return hypergradient(PROBLEM, x, x, estimator=PROJECTION)


VARIABLES: dict[str, Any] = {
    "0-d": torch.tensor(3.0),
    "matrix": torch.arange(6.0).reshape(2, 3),
    "non-contiguous": torch.arange(6.0).reshape(2, 3).T,
    "expanded": torch.tensor(3.0).expand(2, 2),
    "strided view": torch.arange(6.0)[::2],
    "empty leaf": {"a": torch.ones(2), "none": torch.ones(0, 3)},
    "parameter": nn.Parameter(torch.ones(2)),
    "requires grad": torch.full((2,), 2.0, requires_grad=True),
    "not a leaf": torch.full((2,), 2.0, requires_grad=True) * 2,
    "named tuple": Pair(torch.ones(2), torch.tensor(0.0)),
    "ordered dict": OrderedDict(b=torch.ones(2), a=torch.zeros(3)),
    "nested": [{"a": (torch.ones(2), torch.zeros(()))}, torch.full((1, 2), 3.0)],
    "float32": torch.arange(4, dtype=torch.float32),
    "float16": torch.arange(4, dtype=torch.float16),
    "bfloat16": torch.arange(4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("x", VARIABLES.values(), ids=VARIABLES.keys())
def test_any_structure_of_real_tensors_is_a_variable_and_gets_its_hypergradient_alike(x: Any) -> None:
    found = solve(x).grad
    assert_same(found, tree_map(lambda leaf: leaf.detach().clone().contiguous() - 1, x))
    assert not any(leaf.requires_grad for leaf in tree_leaves(found))


@pytest.mark.parametrize("x", VARIABLES.values(), ids=VARIABLES.keys())
def test_variables_are_not_modified(x: Any) -> None:
    leaves = tree_leaves(x)
    before = [(leaf.detach().clone(), leaf._version, leaf.requires_grad) for leaf in leaves]
    found = solve(x)
    for leaf in tree_leaves(found.grad) + tree_leaves(found.y) + tree_leaves(found.start.y):
        leaf.add_(1.0)  # what comes back is no alias of what was given
    for leaf, (value, version, requires_grad) in zip(leaves, before, strict=True):
        assert torch.equal(leaf, value)
        assert (leaf._version, leaf.requires_grad) == (version, requires_grad)
        assert not leaf.is_leaf or leaf.grad is None


def test_gradients_are_taken_under_no_grad_too() -> None:
    x = torch.arange(3.0)
    with torch.no_grad():
        inside = solve(x).grad
        assert not torch.is_grad_enabled()
    assert torch.equal(inside, x - 1)


def test_inference_mode_is_refused_in_words() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode.*Call it outside"):
        solve(torch.ones(2))


def test_tensors_made_in_inference_mode_may_be_variables() -> None:
    with torch.inference_mode():
        x = torch.arange(3.0)
    assert torch.equal(solve(x).grad, torch.arange(3.0) - 1)


def test_tensors_made_in_inference_mode_may_not_be_data() -> None:
    with torch.inference_mode():
        data = torch.ones(3)
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (data * (y - x)).square().sum())
    with pytest.raises(RuntimeError, match=r"Inference tensors.*make a clone"):
        hypergradient(problem, torch.ones(3), torch.ones(3), estimator=PROJECTION)
