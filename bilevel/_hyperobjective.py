"""Phi as a differentiable function, for any torch optimizer, scheduler or logger."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator, check_chunks
from bilevel._estimate import AbstractEstimator, Estimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._hypergradient import own_start, structured
from bilevel._numerics.transforms import demand_autograd, inside_transform, is_transformed, plain
from bilevel._problem import BilevelProblem, Split, check_signature
from bilevel._result import BilevelError, Report, Status
from bilevel._tree import Tree, demand_alike, ravel, tree_parts
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_type
from bilevel.arguments.ranges import SIZE
from bilevel.named.auto import Auto
from bilevel.named.registry import resolve
from bilevel.requirements.properties import DoesNotApply
from bilevel.requirements.starts import starts_warm

# What only a first estimate is looked at for, and is no matter of where x is.
_STANDING = frozenset({Status.not_repeatable, Status.imprecise, Status.biased})


@final
class HyperObjective:
    """x -> Phi(x) = f(x, y*(x)), whose backward is a hypergradient estimate; see :func:`hyperobjective`.

    Attributes:
        last: the estimate of the latest call; None before the first.
    """

    @checked(chunk_size=SIZE)
    def __init__(
        self,
        problem: BilevelProblem,
        y0: Tree,
        estimator: AbstractEstimator | Auto | str,
        warm_start: bool | None,
        chunk_size: int | None,
        throw: bool,
        compile: bool = False,
    ) -> None:
        self.last: Estimate | None = None
        self._problem, self._y0, self._estimator = problem, y0, estimator
        self._warm_start, self._chunk_size, self._throw, self._compile = warm_start, chunk_size, throw, compile
        self._chosen: AbstractEstimator | None = None
        self._start: FlatStart | None = None
        self._standing: tuple[Report, ...] = ()

    def __call__(self, x: Tree, data: Any = None) -> Tensor:
        """Phi(x) `()`, differentiable in the leaves of x that require grad.

        Args:
            x: the outer variable.
            data: the third argument of f and g, if they take one; Phi has no derivative in them, and `backward` refuses
                data that require one.
        """
        check_signature(self._problem, data)
        x_vector, structure = ravel(x, "x")
        y0 = self._y0
        if y0 is None:
            y0 = own_start("hyperobjective", self._problem, x, data)
        y_vector, y_structure = ravel(y0, "y0")
        demand_alike("hyperobjective(x, y0)", structure, y_structure)
        # all that an estimate is made of is handed to torch, whose transforms unwrap it
        leaves, build = tree_parts((data.f, data.g) if isinstance(data, Split) else data)
        seen = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]

        def flat(tensors: Sequence[Tensor | None]) -> FlatProblem:
            own = build([old if new is None else new for old, new in zip(leaves, tensors, strict=True)])
            own = Split(*own) if isinstance(data, Split) else own
            return FlatProblem(self._problem, structure, y_structure, own, given=x)

        def evaluate(at: Tensor, y0: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
            return self._at(flat(tensors), at.detach().clone(), y0.detach().clone())

        if inside_transform():
            _demand_plain(flat([plain(each) for each in seen]), plain(x_vector), plain(y_vector))
        phi: Tensor = _Phi.apply(evaluate, x_vector, y_vector.detach(), *seen)[0]  # type: ignore[no-untyped-call]
        return phi

    def _at(self, problem: FlatProblem, x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        """Phi and h at tensors that no transform wraps; `last` and the start of the next call are kept."""
        demand_autograd("hyperobjective")
        if self._chosen is None:
            self._chosen = resolve(self._estimator, problem, x, y0)
            if self._compile:
                from bilevel.compiled.estimator import compiled

                self._chosen = compiled(self._chosen)
        start = self._start if self._start is not None else FlatStart(y0)
        found = apply_estimator(self._chosen, problem, x, start, self._chunk_size)
        if start.count:  # f and g are looked at once: what was found of them then holds
            found = replace(found, reports=self._standing + found.reports)
        else:
            self._standing = tuple(each for each in found.reports if each.status in _STANDING)
        self.last = structured(problem, x, found, start.count)
        if self._throw and not self.last.status.ok:
            raise BilevelError(f"`hyperobjective` did not succeed. {self.last.message}", self.last.status, self.last)
        count = start.count + 1
        warm = starts_warm(self._warm_start, self._chosen, self._problem, run=False)
        self._start = FlatStart(found.y, found.v, count) if warm else FlatStart(y0, None, count)
        return found.value.detach(), found.grad.detach()


def _demand_plain(problem: FlatProblem, x: Tensor, y0: Tensor) -> None:
    """Refuse f and g that hold tensors which a transform is about: an estimate, made outside of it, does not see that.

    Args:
        problem: f and g, with data that no transform wraps.
        x: where, likewise.
        y0: the start, likewise.

    Raises:
        ValueError: saying how such tensors are passed.
    """
    y = problem.start(x, y0)
    values = [problem.f(x, y)]
    with contextlib.suppress(DoesNotApply):  # an inner problem without a g
        values.append(problem.g(x, y))
    if any(map(is_transformed, values)):
        raise ValueError(
            "`hyperobjective` inside of a `torch.func` transform is differentiable in x, and f or g hold a tensor that"
            " the transform is about. Make it a part of x, or pass it as `data`, over which `vmap` may go."
        )


@checked(chunk_size=SIZE)
def hyperobjective(
    problem: BilevelProblem,
    y0: Tree = None,
    *,
    estimator: AbstractEstimator | Auto | str = "implicit",
    warm_start: bool | None = None,
    chunk_size: int | None = None,
    throw: bool = True,
    compile: bool = False,
) -> HyperObjective:
    """phi(x) = f(x, y*(x)) as a differentiable function of x, once: phi(x).backward() puts h into x.grad.

    Each call solves the inner problem and estimates the hypergradient at once; `backward` only multiplies. `torch.func`
    transforms it (`grad`, `vjp`, `jvp`, and `vmap`, which takes one x after the other), with respect to x. The
    returned object may remember the inner and linear solutions as warm starts for its next call (`warm_start`); make a
    new one for an independent sequence. A second derivative is refused.

    Args:
        problem: f and g.
        y0: where the inner solver starts; its structure is that of y. None where the problem has `init`: init(x).
        estimator: an estimator or a name; a name's defaults are fixed at the first call.
        warm_start: whether a call starts from the solutions of the one before. None: where the estimate forgets its
            start, so that phi is a function of x alone; see `minimize`.
        chunk_size: in task mode, how many tasks to treat at a time; None: all.
        throw: raise if a part of an estimate did not succeed; otherwise see `phi.last.status`.
        compile: whether estimates are to be one compiled program each; see `Compiled`.

    Returns:
        phi, with phi.last the latest `Estimate`.

    Raises:
        ValueError: from a call, if there is neither y0 nor `init`.
        BilevelError: from a call, if `throw` and the estimate did not succeed.
        NotImplementedError: where a second derivative is asked for.

    Example:
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> phi = hyperobjective(problem, torch.tensor(0.0))
        >>> phi(x).backward()
        >>> x.grad
        tensor(-2.)
    """
    check_chunks("hyperobjective", problem, chunk_size)
    demand_type("hyperobjective", "warm_start", warm_start, bool | None)
    return HyperObjective(problem, y0, estimator, warm_start, chunk_size, throw, compile)


class _Phi(torch.autograd.Function):
    """x -> Phi(x) and h, from a function that gives both; the derivative of Phi is h, and h has none.

    Inside of `torch.func` transforms torch calls `forward` with all tensors unwrapped.
    """

    @staticmethod
    def forward(evaluate: Evaluate, x: Tensor, y0: Tensor, *data: Tensor | None) -> tuple[Tensor, Tensor]:
        value, h = evaluate(x, y0, data)
        return value.clone(), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, h = inputs[1], output[1]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h)
        ctx.save_for_forward(x, h)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        if any(ctx.needs_input_grad[2:]):
            raise NotImplementedError(_IN_DATA)
        x, grad = ctx.saved_tensors
        h: Tensor = _Once.apply(weights[0] * grad, x)  # type: ignore[no-untyped-call]
        return None, h, *(None for _ in ctx.needs_input_grad[2:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        if any(tangent is not None for tangent in tangents[2:]):
            raise NotImplementedError(_IN_DATA)
        x, h = ctx.saved_tensors
        moved: Tensor = _Once.apply(h @ tangents[1], x)  # type: ignore[no-untyped-call]
        return moved, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        """One problem after the other: estimates adapt to theirs, and are not themselves operations on a batch."""
        rows = []
        for k in range(info.batch_size):
            own = [_row(part, dim, k) for part, dim in zip(arguments, in_dims, strict=True)]
            rows.append(_Phi.apply(*own))  # type: ignore[no-untyped-call]
        return tuple(map(torch.stack, zip(*rows, strict=True))), (0, 0)


def _row(argument: Any, dim: int | None, k: int) -> Any:
    return argument if dim is None else argument.select(dim, k)


Evaluate: TypeAlias = Callable[[Tensor, Tensor, Sequence[Tensor | None]], tuple[Tensor, Tensor]]

_IN_DATA = (
    "`hyperobjective` is differentiable in x only, and its data require a gradient. Make them a part of x, or pass"
    " `data.detach()`."
)


class _Once(torch.autograd.Function):
    """h(x) -> h(x), with a derivative that is refused: without this, autograd would take h for a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, x: Tensor) -> Tensor:  # noqa: ARG004
        return h.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        raise NotImplementedError(_SECOND)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_SECOND)


_SECOND = (
    "`hyperobjective` has a first derivative only, and a second one was asked for. Take differences of hypergradients,"
    " or drop `create_graph=True`."
)
