"""What every hypergradient estimator satisfies: each property a function that raises AssertionError where it fails.

x and y0 are vectors; `tol` is relative to max(1, |h|).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel._estimate import AbstractEstimator, Estimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._hypergradient import hypergradient
from bilevel._numerics.misfits import called
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree, ravel, tree_leaves
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0
from bilevel.arguments.shapes import Shape

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
_X, _Y = Shape("p"), Shape("q")


@checked()
def estimate(estimator: AbstractEstimator, problem: BilevelProblem, x: Tree, y0: Tree) -> Estimate:
    """The estimate, whatever its status."""
    return hypergradient(problem, x, y0, estimator=estimator, throw=False)


@checked(tol=AT_LEAST_0)
def close(name: str, found: Tree, expected: Tree, tol: float, more: str = "") -> None:
    """Assert |found - expected| <= tol max(1, |expected|) for structures.

    Raises:
        AssertionError: naming the property, what was found and what was expected.
    """
    a, b = ravel(found, "found")[0].detach().double(), ravel(expected, "expected")[0].detach().double()
    if a.shape != b.shape or a.device != b.device:
        got = f"{tuple(a.shape)} on {a.device} and {tuple(b.shape)} on {b.device}"
        raise ValueError(f"`close(found=..., expected=...)` must have equally many entries on one device. Got {got}.")
    error = float(torch.linalg.vector_norm(a - b))
    bound = tol * max(1.0, float(torch.linalg.vector_norm(b)))
    if not error <= bound:
        raise AssertionError(
            f"{name}: found {a.tolist()}, expected {b.tolist()}; they differ by {error:.3g} > {bound:.3g}.{more}"
        )


@checked(tol=AT_LEAST_0, x=_X, y0=_Y)
def same_on_leaves(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor, *, tol: float = 1e-6,
    cut_x: Callable[[Tensor], Tree] | None = None, cut_y: Callable[[Tensor], Tree] | None = None,
) -> None:  # fmt: skip
    """h(cut x, cut y) = cut h(x, y): one leaf or several, of any shapes, are the same variables."""

    def halves(vector: Tensor) -> Tree:
        half = (len(vector) + 1) // 2
        return {"a": vector[:half], "b": [vector[half:].reshape(-1, 1)]} if len(vector) > 1 else {"a": vector}

    cut_x, cut_y = cut_x or halves, cut_y or halves
    split = BilevelProblem(
        lambda x, y: problem.f(ravel(x)[0], ravel(y)[0]), lambda x, y: problem.g(ravel(x)[0], ravel(y)[0])
    )
    pieces = called("same_on_leaves(cut_x=...)(x)", cut_x, x), called("same_on_leaves(cut_y=...)(y0)", cut_y, y0)
    found = estimate(estimator, split, *pieces).grad
    close("one leaf or several", found, estimate(estimator, problem, x, y0).grad, tol)
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(found)]
    expected = [tuple(leaf.shape) for leaf in tree_leaves(pieces[0])]
    assert shapes == expected, f"one leaf or several: found leaves of the shapes {shapes}, expected {expected}."


@checked(tol=AT_LEAST_0, x=_X, y0=_Y)
def permuting_leaves(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor, *, tol: float = 1e-6,
    order: Sequence[int] | None = None, inner_order: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """h(P x, Q y) = P h(x, y) for permutations P and Q of the leaves."""
    order = list(reversed(range(len(x)))) if order is None else order
    inner_order = list(reversed(range(len(y0)))) if inner_order is None else inner_order
    back = sorted(range(len(x)), key=lambda i: order[i])
    inner_back = sorted(range(len(y0)), key=lambda i: inner_order[i])

    def permuted(function: Objective) -> Callable[[Tree, Tree], Tensor]:
        return lambda x, y: function(torch.stack([x[i] for i in back]), torch.stack([y[i] for i in inner_back]))

    other = BilevelProblem(permuted(problem.f), permuted(problem.g))
    found = estimate(estimator, other, [x[i] for i in order], [y0[i] for i in inner_order]).grad
    close("permuting leaves", [found[i] for i in back], estimate(estimator, problem, x, y0).grad, tol)


@checked(tol=AT_LEAST_0, x=_X, y0=_Y)
def scaling_g(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor, *, tol: float = 1e-6,
    c: float = 2.0, scaled: AbstractEstimator | None = None,
) -> None:  # fmt: skip
    """h is the same for c g, c > 0; `scaled` is the estimator with steps and tolerances in the unit of c g."""
    other = BilevelProblem(problem.f, lambda x, y: c * problem.g(x, y))
    found = estimate(scaled or estimator, other, x, y0).grad
    close(f"scaling g by {c:g}", found, estimate(estimator, problem, x, y0).grad, tol)


@checked(tol=AT_LEAST_0, x=_X, y0=_Y)
def term_in_x_of_g(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor, *, tol: float = 1e-6
) -> None:
    """h is the same for g(x, y) + k(x), here k = sum sin x + x^3: y*(x) does not move."""
    other = BilevelProblem(problem.f, lambda x, y: problem.g(x, y) + (x.sin() + x**3).sum())
    found = estimate(estimator, other, x, y0).grad
    close("a term in x only of g", found, estimate(estimator, problem, x, y0).grad, tol)


@checked(tol=AT_LEAST_0, x=_X, y0=_Y)
def term_in_x_of_f(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor, *, tol: float = 1e-6
) -> None:
    """h for f(x, y) + k(x) is h + grad k(x), here k = sum sin x + x^2: catches a dropped grad_x f."""
    other = BilevelProblem(lambda x, y: problem.f(x, y) + (x.sin() + x**2).sum(), problem.g)
    found = estimate(estimator, other, x, y0).grad
    expected = estimate(estimator, problem, x, y0).grad + x.cos() + 2 * x
    close("a term in x only of f", found, expected, tol, " Is grad_x f part of it?")


@checked(tol=AT_LEAST_0, x=_X, y0=_Y)
def orthogonal_change_of_y(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor, *, tol: float = 1e-6, seed: int = 0
) -> None:
    """h is the same for f(x, V z), g(x, V z) started at V'y0, V orthogonal."""
    draw = torch.randn(
        len(y0), len(y0), generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    V = torch.linalg.qr(draw)[0].to(y0)
    other = BilevelProblem(lambda x, z: problem.f(x, V @ z), lambda x, z: problem.g(x, V @ z))
    found = estimate(estimator, other, x, V.T @ y0).grad
    close("an orthogonal change of y", found, estimate(estimator, problem, x, y0).grad, tol)


@checked(tol=AT_LEAST_0, x=_X, y0=_Y)
def linear_in_f(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor, *, tol: float = 1e-6,
    a: float = 2.0, b: float = -1.5,
) -> None:  # fmt: skip
    """h for a f + b k is a h_f + b h_k, here k = sum (y + 0.3)^2 + y_0 sum x."""

    def other(x: Tensor, y: Tensor) -> Tensor:
        return (y + 0.3).pow(2).sum() + x.sum() * y.reshape(-1)[0]

    both = BilevelProblem(lambda x, y: a * problem.f(x, y) + b * other(x, y), problem.g)
    first = estimate(estimator, problem, x, y0).grad
    second = estimate(estimator, BilevelProblem(other, problem.g), x, y0).grad
    slack = max(1.0, float(torch.linalg.vector_norm(second)))
    close("linearity in f", estimate(estimator, both, x, y0).grad, a * first + b * second, slack * tol)


@checked(tol=AT_LEAST_0, x=_X, y0=_Y)
def float32_near_float64(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor, *, tol: float = 1e-2,
    single: AbstractEstimator | None = None,
) -> None:  # fmt: skip
    """h of float32 arguments is of float32, and near that of float64; `single` is the estimator for float32."""

    def cast(function: Objective) -> Objective:
        return lambda x, y: function(x.double(), y.double()).float()

    other = BilevelProblem(cast(problem.f), cast(problem.g))
    found = estimate(single or estimator, other, x.float(), y0.float()).grad
    assert found.dtype == torch.float32, f"float32 near float64: found {found.dtype}, expected torch.float32."
    close("float32 near float64", found, estimate(estimator, problem, x, y0).grad, tol)


@checked(x=_X, y0=_Y)
def inputs_untouched(estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor) -> None:
    """The vectors that an estimator is given keep their bits, and their `.grad` stays None."""
    x, start = x.detach().clone().requires_grad_(), ravel(y0)[0].detach().clone()
    kept = {"x": x, "start.y": start}
    before = {name: tensor.detach().clone() for name, tensor in kept.items()}
    hypergradient(problem, x, y0, estimator=estimator, throw=False)
    flat = FlatProblem(problem, ravel(x)[1], ravel(y0)[1])
    estimator.estimate(flat, ravel(x)[0].detach(), FlatStart(start))
    for name, tensor in kept.items():
        same = torch.equal(tensor.detach(), before[name])
        assert same, f"inputs untouched: {name} was modified: {before[name].tolist()} became {tensor.tolist()}."
    assert x.grad is None, f"inputs untouched: `.grad` of x became {x.grad}, expected None."


@checked(x=_X, y0=_Y)
def same_seed_same_bits(estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor) -> None:
    """Two calls give the same bits, whatever torch's global generator; its state is not advanced."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = ravel(estimate(estimator, problem, x, y0).grad)[0]
        used = not torch.equal(before, torch.get_rng_state())
        torch.manual_seed(2)
        second = ravel(estimate(estimator, problem, x, y0).grad)[0]
    finally:
        torch.set_rng_state(state)
    same = torch.equal(first, second)
    assert same, f"same seed, same bits: found {first.tolist()} and then {second.tolist()}. Draw from a `seed` field."
    assert not used, "same seed, same bits: torch's global generator was advanced. Draw from a generator of your own."


@checked(tol=AT_LEAST_0, x=_X, y0=_Y)
def warm_start_changes_nothing(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tensor, y0: Tensor, *, tol: float = 1e-5
) -> None:
    """h from the solution at a nearby x is h from y0: for estimators that solve to a tolerance."""
    start = estimate(estimator, problem, x + 0.1, y0).start
    warm = hypergradient(problem, x, y0, estimator=estimator, start=start, throw=False).grad
    close("a warm start changes nothing", warm, estimate(estimator, problem, x, y0).grad, tol)


@checked(tol=AT_LEAST_0)
def exact(
    estimator: AbstractEstimator, problem: BilevelProblem, x: Tree, y0: Tree, gradient: Tree, *, tol: float = 1e-5
) -> None:
    """h = grad Phi(x), known in closed form."""
    found = estimate(estimator, problem, x, y0)
    close("exactness", found.grad, gradient, tol, f" The status says {found.status!r}.")


@checked(tol=AT_LEAST_0)
def exact_or_reported(
    estimator: AbstractEstimator,
    problem: BilevelProblem,
    x: Tree,
    y0: Tree,
    gradient: Tree | None,
    *,
    tol: float = 1e-3,
) -> None:
    """Where a problem is too hard, the status says so: an estimate is right or not successful.

    Without a gradient (there is none to be right about) it must not be successful; a ValueError is a report too.
    """
    try:
        found = estimate(estimator, problem, x, y0)
    except ValueError:
        return
    if not found.status.ok:
        return
    if gradient is None:
        raise AssertionError(
            "failure is reported: found Status.successful where no minimizer exists, expected another."
        )
    close("failure is reported", found.grad, gradient, tol, " The status is Status.successful, expected another.")
