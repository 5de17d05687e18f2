"""Clients with objectives of their own: what they can be asked, and many of them simulated in one process."""

from __future__ import annotations

import abc
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import Exact
from bilevel._flat import FlatProblem
from bilevel._problem import BilevelProblem, Split
from bilevel._result import Tally
from bilevel._tree import Tree, ravel, tree_leaves, tree_map
from bilevel.algorithms.engine.direction import rows_of_inner_gradients, rows_of_outer_gradients
from bilevel.arguments.checked import checked


class AbstractClients(abc.ABC):
    """M clients, each with its own f_m and g_m; f = sum_m w_m f_m, g = sum_m w_m g_m.

    Each answers with vectors of p or q floats at points that it is given, and with nothing else. A method is a sequence
    of rounds in which some of them do so; a row of each argument and of each answer belongs to one of them.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.weights)})"

    @property
    @abc.abstractmethod
    def weights(self) -> Tensor:
        """w `(M,)`, which sum to 1."""

    @abc.abstractmethod
    def inner_gradients(self, who: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """grad_y g_m `(k, q)` at x `(p,)` and y `(k, q)`, of the clients with these numbers `(k,)`."""

    @abc.abstractmethod
    def outer_gradients(self, who: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """grad_x f_m `(k, p)` and grad_y f_m `(k, q)`."""

    @abc.abstractmethod
    def products(self, who: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """grad_y g_m `(k, q)`, H_m v `(k, q)` and G_m v `(k, p)` at v `(k, q)`, in one pass."""

    def means(self, who: Tensor, weights: Tensor, *answers: Tensor) -> tuple[Tensor, ...]:
        """sum_m weights_m a_m of what those clients have answered, a row of each `(k, p)` or `(k, q)` for a client."""
        return tuple(weights.to(each.dtype) @ each for each in answers)


@final
class Clients(AbstractClients):
    """M clients simulated in one process, all of those that are asked in one batch.

    The functions are evaluated by one `torch.vmap` over clients, the data of all of which are stacked; those with
    fewer samples are padded, and have weights of zero for what is padded (see `stacked`).

    Args:
        problem: f and g of one client, each a function of (x, y, data).
        x0: a start for x, which says what its structure is.
        y0: the same of y.
        data: of all clients: every tensor has a leading axis of clients; a `Split` where f and g have data of their
            own.
        weights: w_m `(M,)`, such as how many samples each has; they are divided by their sum. None: equal ones.

    Raises:
        ValueError: if the tensors do not share a leading axis, weights are none, or the problem has tasks.

    Example:
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square(), lambda x, y, a: (y - a * x).square() / 2
        ... )
        >>> clients = Clients(problem, torch.ones(()), torch.zeros(()), torch.arange(4.0))
        >>> clients.inner_gradients(torch.tensor([1, 3]), torch.ones(1), torch.zeros(2, 1))
        tensor([[-1.],
                [-3.]])
    """

    @checked()
    def __init__(self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, weights: Tensor | None = None) -> None:
        if problem.tasks or problem.inner is not None or problem.init is not None or problem.encode is not None:
            raise ValueError(
                "`Clients(problem=...)` must be f and g of one client, without tasks, init, encode or another kind of"
                " inner problem: write `BilevelProblem(f, g)`."
            )
        self._x, self._y = ravel(x0, "x0")[1], ravel(y0, "y0")[1]
        both = (data.f, data.g) if isinstance(data, Split) else data
        leaves = [leaf for leaf in tree_leaves(both) if isinstance(leaf, Tensor)]
        counts = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
        if any(leaf.is_meta for leaf in leaves):
            raise ValueError(
                "`Clients(data=...)` must hold numbers. Got tensors on the device 'meta', which have none."
            )
        if len(counts) != 1 or not all(counts):
            raise ValueError(
                f"`Clients(data=...)` must be tensors that share a leading axis of clients. Got leading sizes"
                f" {sorted(map(str, counts))}. Stack what they have by `stacked`."
            )
        (count,) = counts
        found = leaves[0].new_ones(count, dtype=self._y.dtype) if weights is None else weights.to(self._y.dtype)
        if found.shape != (count,) or not bool((found >= 0).all() and found.sum() > 0):
            raise ValueError(f"`Clients(weights=...)` must be {count} numbers at least 0, not all 0. Got {weights}.")
        self._weights, self._data = found / found.sum(), data
        self._like = FlatProblem(problem, self._x, self._y, self._of(torch.tensor([0])), Tally())

    @property
    def weights(self) -> Tensor:
        return self._weights

    def inner_gradients(self, who: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return rows_of_inner_gradients(self._at(who, x, y), x.expand(len(who), -1), y)

    def outer_gradients(self, who: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        _, fx, fy = rows_of_outer_gradients(self._at(who, x, y), x.expand(len(who), -1), y)
        return fx, fy

    def products(self, who: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gy, hv, gv = Exact().at_once(self._at(who, x, y), x.expand(len(who), -1), y, v)
        return gy, hv, x.new_zeros(len(who), len(x)) if gv is None else gv

    def _at(self, who: Tensor, x: Tensor, y: Tensor) -> FlatProblem:
        p, q = self._x.size, self._y.size
        if x.shape[-1:] != (p,) or y.shape[-1:] != (q,):
            raise ValueError(
                f"these `Clients` have {p} entries of x and {q} of y, as their `x0` and `y0` said. Got vectors of shape"
                f" {tuple(x.shape)} and {tuple(y.shape)}. Start from x0 and y0 of those sizes."
            )
        return self._like.on(self._of(who), Tally(), frozenset({"f", "g"}))

    def _of(self, who: Tensor) -> Any:
        def some(leaf: Any) -> Any:
            return leaf[who.to(leaf.device)] if isinstance(leaf, Tensor) else leaf

        if isinstance(self._data, Split):
            return Split(f=tree_map(some, self._data.f), g=tree_map(some, self._data.g))
        return tree_map(some, self._data)


def repeated(y: Tensor, who: Tensor) -> Tensor:
    """A vector `(q,)` for each of several clients `(k, q)`."""
    return y.expand(len(who), -1)


def joint_norm(*directions: Tensor) -> Tensor:
    """The norm of several vectors as one `()`."""
    found: Tensor = torch.linalg.vector_norm(torch.cat(directions))
    return found
