"""What a bilevel problem is: two objectives, and how the inner iteration starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

from torch import Tensor

from bilevel._tree import Tree
from bilevel.arguments.fits import demand_type
from bilevel.arguments.uncompiled import uncompiled
from bilevel.arguments.words import got
from bilevel.requirements.properties import DoesNotApply

if TYPE_CHECKING:
    from bilevel.inner_problems.declarations import AbstractDeclaredKind
    from bilevel.inner_problems.polytope import Polytope
    from bilevel.prox.term import AbstractProxTerm
from bilevel.arguments.batch import demand_batch
from bilevel.portable.pickling import AbstractPortable

Tasks: TypeAlias = bool | Literal["loop"]

# Functions that a problem may do without, and what they are called with.
_OPTIONAL = {
    "init": ("x",),
    "encode": ("x",),
    "constraints": ("x",),
    "prox": ("x",),
    "inequalities": ("x", "y"),
    "equalities": ("x", "y"),
    "fixed_point": ("x", "y"),
}


class BilevelProblem(AbstractPortable):
    """min_x Phi(x) = f(x, y*(x))  s.t.  y*(x) = argmin_y g(x, y).

    x and y are tensors or nested dicts, lists or tuples of tensors, of any shapes, 0-d included. f and g return
    a scalar tensor and are differentiated by autograd, so they are written in torch operations and may close
    over any data. For data that change from call to call (mini-batches), f and g take a third argument, which
    `hypergradient(data=...)` and `minimize(data=...)` supply.

    Subclass it for a problem that carries data: define the methods `f` and `g` (and `init`) there; the base
    constructor need not be called. This is the one class of the library that is meant to be subclassed freely.

    Args:
        f: the outer objective: `f(x, y) -> scalar`, or `f(x, y, data)`.
        g: the inner objective: `g(x, y) -> scalar`, or `g(x, y, data)`, with a minimizer in y for each x.
        init: where the inner iteration starts, if that depends on x (MAML: `init=lambda x: x`): `init(x) -> y`,
            or `init(x, data)`. `ITD` and `ESJ` differentiate through it; the implicit estimators, for which the
            start does not matter, refuse a problem in which y depends on x only in this way.
        encode: what f, g and init need of x, where that is costly and does not change with y: they are called with
            z = encode(x), or encode(x, data), in the place of x. The features of a body that all tasks share, for
            example: they are then computed once for each hypergradient, whatever the number of inner steps, and the
            chain rule through them is applied once. The mathematics is that of f(encode(x), y) and g(encode(x), y).
        constraints: linear constraints on y, if there are any: `constraints(x) -> Polytope`, or `constraints(x, data)`.
            `KKT` differentiates the constrained minimizer; estimators that assume grad_y g = 0 refuse.
        inequalities: c, convex in y entry by entry, of c(x, y) <= 0: `inequalities(x, y) -> tensors`, a number, vector
            or structure, or `inequalities(x, y, data)`. Beside it there may be equalities and linear `constraints`.
        equalities: e, affine in y, of e(x, y) = 0, likewise.
        prox: a non-smooth term h of the inner objective, y*(x) = argmin_y g(x, y) + h_x(y): `prox(x) -> term`, such as
            `lambda x: bilevel.prox.L1(x.exp())`, or `prox(x, data)`.
        fixed_point: T in y*(x) = T(x, y*(x)), in the place of g: `fixed_point(x, y) -> y`, or `fixed_point(x, y,
            data)`. "implicit" differentiates it; there is no g, and estimators that need one refuse.
        iterative: y is what so many steps make of their start, not a minimizer of g, although g depends on x (MAML with
            learned step sizes). `ITD` and `ESJ` are right then; estimators that assume grad_y g = 0 refuse.
        tasks: reserve the leading axis of y and data for independent inner problems, y_i = argmin g(x, ., task_i),
            with Phi(x) the mean of f(x, y_i, task_i) over the tasks. True evaluates all of them at once, by
            `torch.vmap`; "loop" one after the other, to the same numbers: for functions that `torch.vmap` cannot take
            (recurrent layers, `if`s and asserts on values, `.item()`, boolean masks), at the cost of a call a task.
        inner: a kind of inner problem of `bilevel.inner_problems`, or one of your own, in the place of g, constraints,
            inequalities, equalities, prox, fixed_point and iterative.
        allow_unused: Phi may be a constant of x. Otherwise a hypergradient that is zero because x occurs nowhere, in no
            graph of f, g and the rest, is refused as the mistake that it mostly is. A zero of numbers never is.

    An f or g that went through `torch.compile` is used as it was written, since torch's compiled functions have no
    second derivative; `compile=True` of the entry points compiles the step as a whole. To keep a compiled one all the
    same, for an estimator that needs first derivatives alone, call it: `g=lambda x, y: compiled(x, y)`.

    Raises:
        TypeError: if f, g, init, encode, constraints, inequalities, equalities, prox or fixed_point cannot be called.
        ValueError: if more than one of constraints (of all sorts), prox, fixed_point, iterative and inner is given, or
            g beside inner or fixed_point; if tasks is something else than True, False and "loop".

    Example:
        >>> import torch
        >>> problem = BilevelProblem(
        ...     f=lambda x, y: (y - 1).square().sum(),
        ...     g=lambda x, y: (y - 2).square().sum() + x * y.square().sum(),
        ... )
        >>> float(problem.g(torch.tensor(1.0), torch.zeros(3)))
        12.0
    """

    init: Callable[..., Tree] | None = None
    encode: Callable[..., Tree] | None = None
    constraints: Callable[..., Polytope] | None = None
    prox: Callable[..., AbstractProxTerm] | None = None
    inequalities: Callable[..., Tree] | None = None
    equalities: Callable[..., Tree] | None = None
    fixed_point: Callable[..., Tree] | None = None
    iterative: bool = False
    tasks: Tasks = False
    inner: AbstractDeclaredKind | None = None
    allow_unused: bool = False
    _f: Callable[..., Tensor] | None = None
    _g: Callable[..., Tensor] | None = None

    def __init__(
        self,
        f: Callable[..., Tensor] | None = None,
        g: Callable[..., Tensor] | None = None,
        *,
        init: Callable[..., Tree] | None = None,
        encode: Callable[..., Tree] | None = None,
        constraints: Callable[..., Polytope] | None = None,
        inequalities: Callable[..., Tree] | None = None,
        equalities: Callable[..., Tree] | None = None,
        prox: Callable[..., AbstractProxTerm] | None = None,
        fixed_point: Callable[..., Tree] | None = None,
        iterative: bool = False,
        tasks: Tasks = False,
        inner: AbstractDeclaredKind | None = None,
        allow_unused: bool = False,
    ) -> None:
        optional = (
            *(("init", init), ("encode", encode), ("constraints", constraints), ("prox", prox)),
            *(("inequalities", inequalities), ("equalities", equalities), ("fixed_point", fixed_point)),
        )
        without_g = not (inner is None and self.inner is None and fixed_point is None and self.fixed_point is None)
        for name, function in (("f", f), ("g", g), *optional):
            without = name in _OPTIONAL or _overridden(self, name) or (name == "g" and without_g)
            if function is None and without:
                continue
            if not callable(function):
                raise TypeError(
                    f"`BilevelProblem({name}=...)` must be a callable. Got {type(function).__name__}."
                    f" Pass a function such as `lambda x, y: ...`."
                )
        for name, given in (("iterative", iterative), ("allow_unused", allow_unused)):
            demand_type("BilevelProblem", name, given, bool)
        if inner is not None:
            _demand_kind(inner)
        if inner is not None:
            self.inner = inner
        self._f, self._g = uncompiled(f), uncompiled(g)
        if init is not None:
            self.init = init
        if encode is not None:
            self.encode = encode
        if constraints is not None:
            self.constraints = constraints
        if prox is not None:
            self.prox = prox
        if inequalities is not None:
            self.inequalities = inequalities
        if equalities is not None:
            self.equalities = equalities
        if fixed_point is not None:
            self.fixed_point = fixed_point
        if iterative:
            self.iterative = iterative
        if tasks is not False:
            self.tasks = tasks
        if allow_unused:
            self.allow_unused = allow_unused
        _demand_tasks(self)
        _demand_one_kind(self)

    def f(self, x: Tree, y: Tree, *data: Any) -> Tensor:
        """The outer objective: a scalar."""
        assert self._f is not None
        return self._f(x, y, *data)

    def g(self, x: Tree, y: Tree, *data: Any) -> Tensor:
        """The inner objective: a scalar.

        Raises:
            DoesNotApply: if the inner problem has none.
        """
        g = self._g if self.inner is None else self.inner.g
        if g is None:
            raise DoesNotApply(
                "the inner problem has no objective g. Use `ITD`, `ESJ` or `FiniteDifference`, and for a fixed point"
                " `AID` with `GMRES`."
            )
        return g(x, y, *data)

    @property
    def g_as_given(self) -> Callable[..., Tensor]:
        """The value that was given as g, of which more than values may be known; the method of a class that has one."""
        return self.g if self._g is None or _overridden(self, "g") else self._g

    def __repr__(self) -> str:
        given = "".join(f", {name}=..." for name in _OPTIONAL if getattr(self, name) is not None)
        given += "".join(f", {name}={getattr(self, name)!r}" for name in ("iterative", "tasks") if getattr(self, name))
        g = ", g" if self.inner is None else f", inner={type(self.inner).__name__}(...)"
        return f"{type(self).__name__}(f{'' if self.fixed_point is not None else g}{given})"


@final
@dataclass(frozen=True)
class Split:
    """Separate data for the two levels: f is called with `Split.f` and g with `Split.g`.

    Give it to `hypergradient(data=...)` with one batch for each, or to `minimize(data=...)` with one loader for
    each (a re-iterable of batches, or a callable `step -> batch`).

    Example:
        >>> Split(f="validation batch", g="training batch").g
        'training batch'
    """

    f: Any
    g: Any


def check_signature(problem: BilevelProblem, data: Any) -> None:
    """Refuse, before any work, objectives that do not take the arguments that they will be called with.

    Raises:
        TypeError: naming the function, how it will be called and what to do; also for a loader instead of a batch.
    """
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            f"`problem` must be a BilevelProblem. Got {type(problem).__name__}. Write `BilevelProblem(f, g)`."
        )
    if data is None:
        given = vars(problem)
        two = type(problem) is BilevelProblem and len(given) == 2
        if two and _is_plain(given.get("_f"), 2) and _is_plain(given.get("_g"), 2):  # there is no more to see
            return
    else:
        for batch in (data.f, data.g) if isinstance(data, Split) else (data,):
            demand_batch(batch)
    _demand_tasks(problem)  # a subclass need not call the constructor
    _demand_one_kind(problem)
    first = "x" if problem.encode is None else "z"
    for name in ("f", "g", *_OPTIONAL):
        own = name in _OPTIONAL or _overridden(problem, name)
        function = getattr(problem, name if own else f"_{name}")
        if function is None and (name in _OPTIONAL or (name == "g" and _lacks_g(problem))):
            continue
        if function is None:
            raise TypeError(
                f"`{type(problem).__name__}` must define the method {name}(self, x, y), or be given `{name}=`."
            )
        names = _OPTIONAL.get(name, ("x", "y"))
        names = names if name == "encode" else (first, *names[1:])
        demand_arguments(name, function, names, data)
    if problem.inner is not None:
        for name, (function, names) in problem.inner.functions.items():
            demand_arguments(name, function, names, data)


def demand_arguments(
    name: str, function: Callable[..., Any], names: tuple[str, ...], data: Any, call: str = "problem.{}"
) -> None:
    """Refuse a function that does not take these arguments, and data after them where there are any."""
    names += () if data is None else ("data",)
    if _is_plain(function, len(names)):
        return
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        wants_data = "missing" in str(error) and data is None
        hint = "Pass `data=...`." if wants_data else f"Write `def {name}({', '.join(names)}): ...`."
        raise TypeError(
            f"`{call.format(name)}` will be called as {name}({', '.join(names)}), which it does not accept"
            f" ({error}). {hint}"
        ) from error
    except Exception:  # a builtin without a signature, an object that cannot be asked: let the call itself tell
        return


def _demand_one_kind(problem: BilevelProblem) -> None:
    """Refuse a problem with more than one kind of inner problem, as arguments or as members of its class.

    Raises:
        ValueError: naming them.
    """
    given = [name for name in ("prox", "fixed_point", "inner") if getattr(problem, name) is not None]
    sorts = ("constraints", "inequalities", "equalities")  # which are one kind together
    given = [name for name in sorts if getattr(problem, name) is not None][:1] + given
    given += ["iterative"] if problem.iterative else []
    beside = _lacks_g(problem) and (problem._g is not None or _overridden(problem, "g"))
    if len(given) > 1 or beside:
        raise ValueError(
            f"`{type(problem).__name__}` must have one kind of inner problem. Got {' and '.join(given)}"
            f"{' beside g' if beside else ''}. Give one of constraints, prox, fixed_point and iterative, or an `inner=`"
            f" that holds all of it."
        )


def _lacks_g(problem: BilevelProblem) -> bool:
    """Whether y is told by something else than a g of the problem's own."""
    return problem.inner is not None or problem.fixed_point is not None


def _demand_tasks(problem: BilevelProblem) -> None:
    """Refuse a way to treat tasks that there is not.

    Raises:
        ValueError: naming those that there are.
    """
    if not isinstance(problem.tasks, bool) and not (isinstance(problem.tasks, str) and problem.tasks == "loop"):
        raise ValueError(
            f'`{type(problem).__name__}(tasks=...)` must be True (all tasks at once), "loop" (one after the other) or'
            f" False (no tasks). Got {got(problem.tasks)}."
        )


def _demand_kind(inner: Any) -> None:
    from bilevel.inner_problems.declarations import AbstractDeclaredKind

    if not isinstance(inner, AbstractDeclaredKind):
        raise TypeError(
            f"`BilevelProblem(inner=...)` must be a kind of inner problem such as `SmoothMinimization(g)`."
            f" Got {type(inner).__name__}. A function g goes to `BilevelProblem(f, g)`."
        )


def _overridden(problem: BilevelProblem, name: str) -> bool:
    """Whether a subclass defines this objective as a method."""
    return getattr(type(problem), name) is not getattr(BilevelProblem, name)


def _is_plain(function: object, count: int) -> bool:
    """Whether this is a function or method of exactly so many arguments, no defaults; `inspect` takes far longer."""
    if isinstance(function, MethodType):
        function, count = function.__func__, count + 1
    code = function.__code__ if isinstance(function, FunctionType) else None
    return code is not None and code.co_argcount == count and not code.co_kwonlyargcount
