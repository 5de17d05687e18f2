"""A bilevel problem seen as functions of vectors: ravelled once, evaluated in batches, its calls counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel._numerics.batched import RANDOM, batched, looped, random_state, set_random_state
from bilevel._numerics.known_objective import AbstractKnownObjective
from bilevel._numerics.misfits import Misfit, called, explain_call
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.uneven import Uneven
from bilevel._problem import BilevelProblem, Split
from bilevel._result import Tally
from bilevel._tree import Structure, Tree, ravel, tree_leaves, tree_map, tree_parts
from bilevel.arguments.batch import demand_batch
from bilevel.arguments.checked import checked
from bilevel.requirements.properties import DoesNotApply

if TYPE_CHECKING:
    from bilevel.ranks.across import Across
    from bilevel.ranks.ranks import Ranks


_FUNCTIONS = frozenset({FunctionType, MethodType})


@final
class FlatProblem:
    """f(x, y) and g(x, y) for vectors x `(p,)` and y `(q,)`, at fixed data.

    Leading axes stand for independent problems evaluated in one batch, outermost first: *directions* (several
    x, each with its own y: x `(k, p)`, y `(k, q)`) and *tasks* (one x, several y, each with its own data: y
    `(tasks, q)`); both together are x `(k, p)`, y `(k, tasks, q)`. Values have the leading shape of y. Only the
    evaluation is vectorized (`torch.vmap` of the forward pass); derivatives are taken outside by
    `torch.autograd.grad` of the sum, because `grad` inside `vmap` is wrong through affine BatchNorm. With
    `tasks="loop"` tasks and directions are evaluated one after the other instead, and stacked; so are directions
    alone where `torch.vmap` cannot take the function.

    Where the problem has an `encode`, `encode` gives z and `encoded` the same problem as a function of z in the place
    of x: one z for each task, all of them side by side in one vector.

    Args:
        problem: the problem in the user's structures.
        x: the structure of x.
        y: the structure of y (of one task).
        data: what f and g take as their third argument; None if they take two.
        tally: where oracle calls are counted.
        is_encoded: whether x stands for encode(x, data) already.
        given: what the user passed as x, where that is known: for messages.
    """

    @checked()
    def __init__(
        self,
        problem: BilevelProblem,
        x: Structure,
        y: Structure,
        data: Any = None,
        tally: Tally | None = None,
        *,
        is_encoded: bool = False,
        given: Tree = None,
    ) -> None:
        self.problem, self.x, self.y, self.data, self.is_encoded = problem, x, y, data, is_encoded
        self.given = given
        self.across: Across | None = None  # where samples are over ranks: `f` and `g` are then those of all of them
        self.tasks_over: Ranks | None = None  # where tasks are
        self.own_data = frozenset[str]()  # the levels whose data have an axis of directions, a batch for each
        self.tally = Tally() if tally is None else tally
        self.tasks = _task_count(data) if problem.tasks else None
        self._each = looped if problem.tasks == "loop" else batched
        self._outer: tuple[tuple[Tensor, int, bool], Tree] | None = None
        self._data: dict[str, tuple[list[Any], Callable[[Sequence[Any]], tuple[Any, ...]]]] = {}

    def __reduce__(self) -> Any:
        """What it was made of; not what the user passed as x, nor what is kept to be asked for again."""
        return _made, (self.problem, self.x, self.y, self.data, self.tally, self.is_encoded)

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """Phi's integrand: f(x, y) `(directions,)`, the mean over tasks; a scalar without leading axes."""
        values = self.f_each(x, y)
        return values.mean(-1) if self.tasks is not None else values

    def f_each(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer objective of each problem in the batch, with the leading shape of y: no mean over tasks."""
        return self._f(x, y) if self.across is None else self.across.whole("f", self._f, x, y)

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective of each problem in the batch, with the leading shape of y."""
        return self._g(x, y) if self.across is None else self.across.whole("g", self._g, x, y)

    @property
    def known(self) -> AbstractKnownObjective | None:
        """g, where it knows its own derivatives and they are those of this problem; None: autograd is asked.

        Samples over ranks are each rank's part, and an encoding that is not taken yet is autograd's.
        """
        inner = self.problem.inner
        given = self.problem.g_as_given if inner is None else inner.g
        if type(given) in _FUNCTIONS or not isinstance(given, AbstractKnownObjective):  # as most are
            return None
        if self.across is not None or (self.problem.encode is not None and not self.is_encoded):
            return None
        # Coefficients may have the sizes of batches, of which there are several.
        return given if self._uneven("g") is None else None

    def g_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """y -> g(x, y) at one x, of which what does not change with y is made once: asked for at every inner step."""
        plain = self.tasks is None and self.across is None and x.shape == (self.x.size,) and not x.requires_grad
        if not plain or (self.problem.encode is not None and not self.is_encoded):
            return partial(self.g, x)
        form = "g(x, y, data)" if self.problem.encode is None else "g(z, y, data)"
        g = self.problem.g  # and not what was given: an error is told by this frame to be one of g
        outer, cut, given = self._unravelled(x), self.y.unravel, self._given

        def at(y: Tensor) -> Tensor:
            arguments = (outer, cut(y), *given("g"))
            try:
                value = g(*arguments)
            except Exception as error:
                explain_call(error, form, arguments)
                raise
            return _scalar("g", value)

        def at_vector(y: Tensor) -> Tensor:
            try:
                value = g(outer, y)
            except Exception as error:
                explain_call(error, form, (outer, y))
                raise
            return _scalar("g", value)

        is_vector = self.y.spec is None and len(self.y.shapes[0]) == 1
        return at_vector if is_vector and self.data is None else at

    def part_of_g(self, x: Tensor, y: Tensor) -> Tensor:
        """`g` for its derivatives alone: with samples over ranks its value is this rank's part, and no message."""
        return self._g(x, y) if self.across is None else self.across.part("g", self._g, x, y)

    def over(self, ranks: Ranks | None, shares: tuple[float, float], *, sharded: bool = False) -> None:
        """Have the tasks, or else the samples, be over ranks; one rank alone has them all.

        Args:
            ranks: the processes; None: this one alone.
            shares: of f and of g, what this rank's samples are of all.
            sharded: whether y is this rank's part of one that is shared out.
        """
        if ranks is None or ranks.size == 1:
            return
        if self.tasks is not None:
            self.tasks_over = ranks
        else:
            from bilevel.ranks.across import Across

            self.across = Across(ranks, *shares, sharded=sharded)

    def by_itself(self) -> FlatProblem:
        """The problem with this rank's parts of f and g, whose derivatives :meth:`total` sums; itself where it is one.

        For what is linear in f and g, so that much can go into one message.
        """
        if self.across is None or self.across.alone or self.across.sharded:
            return self
        found = FlatProblem.__new__(FlatProblem)
        vars(found).update(vars(self), across=self.across.by_itself(), _outer=None)
        return found

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """What the ranks have found :meth:`by_itself`, in sum, as one message; as it is where there are no ranks."""
        if self.across is None or self.across.alone or self.across.sharded:
            return parts
        return self.across.ranks.total(*parts)

    @property
    def sharded(self) -> bool:
        """Whether y is this rank's part of one that is shared out."""
        return self.across is not None and self.across.sharded

    def row_norms(self, y: Tensor) -> Tensor:
        """Euclidean norms of rows that are as y is: of all parts, where it is shared out (one message)."""
        norms = safe_row_norms(y)
        if self.across is None or not self.across.sharded:
            return norms
        return self.across.ranks.total(norms.square())[0].sqrt()

    def _f(self, x: Tensor, y: Tensor) -> Tensor:
        return self._value("f", self.problem.f, x, y)

    def _g(self, x: Tensor, y: Tensor) -> Tensor:
        return self._value("g", self.problem.g, x, y)

    def _value(self, name: str, function: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        form = f"{name}(x, y, data)" if self.problem.encode is None else f"{name}(z, y, data)"
        if self.tasks is None and x.dim() <= 1:  # what `_map` does where nothing is side by side, at every step
            outer, given = self._unravelled(x), self._given(name)
            if self.problem.encode is not None and not self.is_encoded:
                outer = called("encode(x, data)", self.problem.encode, outer, *given)
            return _scalar(name, called(form, function, outer, self.y.unravel(y), *given))
        return self._map(
            lambda x, y, *data: _scalar(name, called(form, function, x, self.y.unravel(y), *data)), name, x, y
        )

    def start(self, x: Tensor, y0: Tensor) -> Tensor:
        """The start of the inner iteration: init(x) where the problem has it, else `y0`; one row for each task."""
        init = self.problem.init
        if init is None:
            return self.spread(y0)
        return self.map(lambda x, *data: self.y.ravel(called("init(x, data)", init, x, *data), "init(x)"), "g", x)

    def spread(self, y: Tensor) -> Tensor:
        """One task's vector `(q,)` for every task `(tasks, q)`; as it is where there are none or it has been."""
        return y.expand(self.tasks, -1).clone() if self.tasks is not None and y.dim() == 1 else y

    def map(self, function: Callable[..., Tensor], level: str, x: Tensor, *rows: Tensor) -> Tensor:
        """function(x or encode(x), *rows, data) of each problem of the batch; x in the user's structure.

        Args:
            function: of the x of one problem, its rows and its data.
            level: whose data, "f" or "g".
            x: the outer variable, or several.
            rows: one for each problem, such as y.

        Raises:
            DoesNotApply: if samples are over ranks, of which such a function would see other ones on each.
        """
        if self.across is not None:
            raise DoesNotApply(
                "with samples over ranks (`group=`) f and g are means over all of them, and this needs another function"
                " of x and the data (init, constraints, a proximal map, a formula or a setting), which each rank would"
                " evaluate at its own samples. Use a smooth problem of f and g, with solvers that have a start, or"
                " tasks over ranks"
            )
        return self._map(function, level, x, *rows)

    def _map(self, function: Callable[..., Tensor], level: str, x: Tensor, *rows: Tensor) -> Tensor:
        uneven = self._uneven(level)
        if uneven is not None:
            every: Tensor = uneven.each(
                lambda data, *given: self._of_group(data)._map(function, level, *given), x, *rows
            )
            return every
        encode, count = None if self.is_encoded else self.problem.encode, len(rows)
        own, several = self.is_encoded and self.tasks is not None, x.dim() > 1  # own: each task has its part of x
        if self.tasks is None and not several:  # nothing is side by side
            outer, given = self._unravelled(x), self._given(level)
            if encode is not None:
                outer = called("encode(x, data)", encode, outer, *given)
            return function(outer, *rows, *given)
        leaves, build = self._parts(level)
        shared = None if own or several else self._unravelled(x)

        def one(*args: Tensor) -> Tensor:
            outer, rest = (shared, args) if shared is not None else (self.x.unravel(args[0]), args[1:])
            data = build(rest[count:])
            seen = outer if encode is None else called("encode(x, data)", encode, outer, *data)
            return function(seen, *rest[:count], *data)

        inputs: tuple[Tensor, ...] = (*rows, *leaves)
        run: Callable[..., Any] = one
        if shared is None:
            inputs = (x.reshape(*x.shape[:-1], self.tasks or 1, -1) if own else x, *inputs)
        dims: list[tuple[int | None, ...]] = []
        if self.tasks is not None:
            in_x = () if shared is not None else (0 if own else None,)
            dims.append(in_x + (0,) * (count + len(leaves)))
            run = self._each(one, self.tasks, dims[-1])
        if several:
            dims.append((0,) * (1 + count) + (0 if level in self.own_data else None,) * len(leaves))
            run = self._each(run, x.shape[0], dims[-1])
        try:
            found: Tensor = run(*inputs)
        except Exception as error:
            found = self._otherwise(error, one, dims, inputs)
        return found

    def _uneven(self, level: str) -> Uneven | None:
        """The data of a level, where several runs have batches of several sizes."""
        if level not in self.own_data or not isinstance(self.data, Split):
            return None
        data = getattr(self.data, level)
        return data if isinstance(data, Uneven) else None

    def _of_group(self, data: Any) -> FlatProblem:
        """The same for runs with batches of one size."""
        return self.on(Split(f=data, g=data), self.tally, self.own_data)

    def _otherwise(
        self, error: Exception, one: Callable[..., Any], dims: list[tuple[int | None, ...]], inputs: tuple[Tensor, ...]
    ) -> Any:
        """What failed for a batch: by a loop, where it is over directions alone; else the reason, and what to do.

        The first problem of the batch, evaluated by itself, tells whether `torch.vmap` is the reason: its errors are
        `RuntimeError`s.
        """
        is_vmaps = bool(dims) and self._each is batched and isinstance(error, RuntimeError | Misfit)
        if not is_vmaps or not takes_one(one, dims, inputs):
            self._refuse_stacked(error)
            raise error
        if self.tasks is not None:
            raise not_side_by_side(error) from error
        self._each = looped
        return looped(one, inputs[0].shape[0], dims[0])(*inputs)

    def _refuse_stacked(self, error: Exception) -> None:
        """Say so where y seems to be the start of all tasks."""
        if self.tasks is not None and all(shape[:1] == (self.tasks,) for shape in self.y.shapes):
            shapes = ", ".join(str(tuple(shape)) for shape in self.y.shapes)
            raise ValueError(
                f"with tasks `y0` must be the start of one task, which all share; est.y comes back stacked. Got shape"
                f" {shapes}, whose first axis is the number of tasks, {self.tasks}, and the functions of the problem"
                f" fail on it ({_first_line(error)}). Pass the start of one task, such as `y0[0]`, and starts that"
                f" differ by `init=` or `start=`."
            ) from error

    def _unravelled(self, x: Tensor) -> Tree:
        """The x of all problems in the user's structure: kept, as the steps of an iteration ask for the same one."""
        key = (x, x._version, torch.is_grad_enabled())
        if self._outer is None or self._outer[0][0] is not x or self._outer[0][1:] != key[1:]:
            self._outer = key, self.x.unravel(x)
        return self._outer[1]

    def _given(self, level: str) -> tuple[Any, ...]:
        """The arguments after y: none, or the data of a level, of which what a function might change is a copy."""
        if self.data is None:
            return ()
        data = getattr(self.data, level) if isinstance(self.data, Split) and level in ("f", "g") else self.data
        if isinstance(data, Tensor) or (type(data) is tuple and all(isinstance(part, Tensor) for part in data)):
            return (data,)
        leaves, build = self._parts(level)
        return build(leaves)

    def _parts(self, level: str) -> tuple[list[Any], Callable[[Sequence[Any]], tuple[Any, ...]]]:
        """The tensors of f's or g's data, and what makes of such tensors the arguments after y: none, or the data."""
        level = level if isinstance(self.data, Split) else "both"
        if level not in self._data:
            if self.data is None:
                self._data[level] = [], lambda _: ()
            else:
                leaves, build = tree_parts(getattr(self.data, level) if level in ("f", "g") else self.data)
                places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

                def place(tensors: Sequence[Any]) -> tuple[Any, ...]:
                    if len(places) == len(leaves):
                        return (build(tensors),)
                    whole = list(leaves)  # what is not a tensor is the same for all tasks
                    for k, tensor in zip(places, tensors, strict=True):
                        whole[k] = tensor
                    return (build(whole),)

                self._data[level] = [leaves[k] for k in places], place
        return self._data[level]

    def encode(self, x: Tensor, *, only_g: bool = False) -> tuple[Tensor, FlatProblem]:
        """The encodings z of all tasks side by side, differentiable, and the problem as a function of them.

        With separate data for f and g each has a z of its own, and there is no such function; `only_g`: z is that of
        g, and the problem is asked for g, init and the like alone.
        """
        encode = self.problem.encode
        found: list[Structure] = []
        if encode is None or self.is_encoded or (isinstance(self.data, Split) and not only_g):
            return x, self

        outer = self.x.unravel(x)

        def one(*tensors: Tensor) -> Tensor:
            vector, structure = ravel(called("encode(x, data)", encode, outer, *build(tensors)), "encode(x)")
            found.append(structure)
            return vector

        leaves, build = self._parts("g")
        dims: list[tuple[int | None, ...]] = [] if self.tasks is None else [(0,) * len(leaves)]
        try:
            z = (one if self.tasks is None else self._each(one, self.tasks, dims[0]))(*leaves)
        except Exception as error:
            z = self._otherwise(error, one, dims, tuple(leaves))
        return z.reshape(-1), FlatProblem(self.problem, found[0], self.y, self.data, self.tally, is_encoded=True)

    def part(self, tasks: slice) -> FlatProblem:
        """The problem of some of the tasks, counting at the same place."""

        def cut(leaf: Any) -> Any:
            return leaf[tasks] if isinstance(leaf, Tensor) else leaf

        both = isinstance(self.data, Split)
        data = Split(tree_map(cut, self.data.f), tree_map(cut, self.data.g)) if both else tree_map(cut, self.data)
        return FlatProblem(self.problem, self.x, self.y, data, self.tally, given=self.given)

    def alone(self, tally: Tally) -> FlatProblem:
        """The same problem counting elsewhere, to be kept: it holds nothing of the x that it was met at."""
        found = FlatProblem.__new__(FlatProblem)
        vars(found).update(vars(self), tally=tally, given=None, own_data=frozenset(), tasks_over=None, _outer=None)
        found._data = {}
        return found

    def on(
        self, data: Any, tally: Tally, own_data: frozenset[str] = frozenset(), shares: tuple[float, float] = (1.0, 1.0)
    ) -> FlatProblem:
        """The same problem with other data, counting elsewhere: what a loop makes at every step, without a check.

        Args:
            data: the data.
            tally: where.
            own_data: the levels whose data have an axis of directions.
            shares: of f and of g, what this rank's samples are of all, where they are over ranks.
        """
        found = FlatProblem.__new__(FlatProblem)
        vars(found).update(vars(self), data=data, tally=tally, own_data=own_data, _outer=None, _data={})
        if self.problem.tasks:
            found.tasks = _task_count(data)
        if self.across is not None:
            found.across = self.across.on(*shares)
        return found

    def with_tally(self, tally: Tally) -> FlatProblem:
        """The same problem counting elsewhere."""
        given, own_data = self.given, self.own_data
        found = FlatProblem(self.problem, self.x, self.y, self.data, tally, is_encoded=self.is_encoded, given=given)
        found.own_data, found.across, found.tasks_over = own_data, self.across, self.tasks_over
        return found


def _made(
    problem: BilevelProblem, x: Structure, y: Structure, data: Any, tally: Tally, is_encoded: bool
) -> FlatProblem:
    return FlatProblem(problem, x, y, data, tally, is_encoded=is_encoded)


def takes_one(function: Callable[..., Any], dims: list[tuple[int | None, ...]], inputs: tuple[Any, ...]) -> bool:
    """Whether a function takes the first problem of a batch, all axes of which are listed from the inside out."""
    for in_dims in reversed(dims):
        inputs = tuple(a if dim is None else a.select(dim, 0) for a, dim in zip(inputs, in_dims, strict=True))
    with RANDOM:
        state = random_state(*(a for a in inputs if isinstance(a, Tensor)))
        try:
            function(*inputs)
        except Exception:
            return False
        finally:
            set_random_state(state)
    return True


def not_side_by_side(error: Exception) -> ValueError:
    """What to say where all tasks at once are the reason of an error."""
    return ValueError(
        f"`BilevelProblem(tasks=True)` evaluates all tasks at once by `torch.vmap`, which cannot take a function of"
        f" this problem ({_first_line(error)}). Write `BilevelProblem(..., tasks='loop')`, which takes one task after"
        f" the other and returns the same numbers; of a few-shot learner take `learner.looped()`."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:200]


def _task_count(data: Any) -> int:
    both = (data.f, data.g) if isinstance(data, Split) else data
    leaves = [leaf for leaf in tree_leaves(both) if isinstance(leaf, Tensor)]
    if not leaves:
        for batch in both if isinstance(data, Split) else (data,):
            demand_batch(batch)
    counts = {leaf.shape[0] if leaf.dim() else None for leaf in leaves}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"`BilevelProblem(tasks=...)` needs `data=` whose tensors all have one leading axis of tasks."
            f" Got leading sizes {sorted(map(str, counts))}. Stack the tasks with `torch.stack`."
        )
    (count,) = counts
    if not count:
        raise ValueError("`BilevelProblem(tasks=...)` needs `data=` of at least one task. Got none.")
    return count


_USUAL = frozenset({torch.float64, torch.float32})


def _scalar(name: str, value: Tree) -> Tensor:
    if type(value) is Tensor and value.dtype in _USUAL and not value.dim() and not value.is_meta:
        return value  # without a further look, as it is asked at every step
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"`problem.{name}` must return a scalar tensor. Got {got}. Reduce it with `.mean()` or `.sum()`."
        )
    if value.is_complex():
        raise ValueError(f"`problem.{name}` must return a real number. Got {value.dtype}. Take `.real` or `.abs()`.")
    if value.is_meta:
        raise ValueError(f"`problem.{name}` must return a number. Got a tensor on the device 'meta', which holds none.")
    return value.reshape(()) if value.dim() else value


def row_structure(tree: Tree, name: str, *, several: bool) -> Structure:
    """The structure of one task's y, from it or, of `several`, from those of all tasks stacked."""
    vector, structure = ravel(tree, name)
    if not several:
        return structure
    shapes = tuple(shape[1:] for shape in structure.shapes)
    return Structure(structure.spec, shapes, vector.dtype, vector.device)


def ravel_rows(problem: FlatProblem, tree: Tree, name: str) -> Tensor:
    """A structure of y as a vector `(q,)`; stacked ones, in task mode, as `(tasks, q)`. Not to be written to."""
    if problem.tasks is None:
        return problem.y.ravel(tree, name).detach()
    stacked = Structure(
        problem.y.spec,
        tuple(torch.Size((problem.tasks, *shape)) for shape in problem.y.shapes),
        problem.y.dtype,
        problem.y.device,
    )
    leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in stacked.leaves(tree, name)]
    return (leaves[0] if len(leaves) == 1 else torch.cat(leaves, dim=-1)).detach()
