"""Every property of an estimator at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bilevel._estimate import AbstractEstimator
from bilevel._problem import BilevelProblem
from bilevel._tree import tree_map
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0
from bilevel.problems.inverse_link import asinh
from bilevel.problems.nested import nested
from bilevel.problems.quadratic import quadratic
from bilevel.testing import properties

if TYPE_CHECKING:
    import pytest


@checked(tol=AT_LEAST_0)
def check_estimator(estimator: AbstractEstimator, *, exact: bool = True, tol: float = 1e-5) -> None:
    """Assert that h has every property of `bilevel.testing.properties`, on problems in closed form.

    The problems have eigenvalues of d2g/dy2 from 0.2 to 1 (fixed steps up to 2 converge) and few variables.

    Args:
        estimator: as it would be used, solving to a tolerance well below `tol`.
        exact: whether it tends to grad Phi. False for one-step, truncated and other biased estimators and for a fixed
            number of steps: leaves out exactness, warm starts, the scale of g, rotations of y and hard problems.
        tol: relative to max(1, |h|).

    Raises:
        AssertionError: naming the failed property, what was found and what was expected.

    Example:
        >>> from bilevel import AID
        >>> from bilevel.solvers import CG, LBFGS
        >>> check_estimator(AID(LBFGS(1e-10), CG(1e-10)))
    """
    for _, check in estimator_checks(estimator, exact=exact, tol=tol):
        check()


@checked(tol=AT_LEAST_0)
def estimator_checks(
    estimator: AbstractEstimator, *, exact: bool = True, tol: float = 1e-5
) -> list[tuple[str, Callable[[], None]]]:
    """The properties that `check_estimator` asserts, by name, each a function without arguments.

    Raises:
        TypeError: if it is not an estimator.
    """
    if not isinstance(estimator, AbstractEstimator):
        raise TypeError(
            f"`check_estimator(estimator)` must be an estimator. Got {type(estimator).__name__}. Pass an instance of"
            f" a subclass of `AbstractEstimator`."
        )
    known = quadratic(p=3, q=4, kappa=5.0, mu=0.2, cross=0.5)
    x = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64, device="cpu")
    at = (estimator, known.problem, x, known.y0 + 0.2)
    found: list[tuple[str, Callable[[], None]]] = [
        ("inputs_untouched", partial(properties.inputs_untouched, *at)),
        ("same_seed_same_bits", partial(properties.same_seed_same_bits, *at)),
        ("term_in_x_of_f", partial(properties.term_in_x_of_f, *at, tol=tol)),
        ("term_in_x_of_g", partial(properties.term_in_x_of_g, *at, tol=tol)),
        ("same_on_leaves", partial(properties.same_on_leaves, *at, tol=tol)),
        ("linear_in_f", partial(properties.linear_in_f, *at, tol=tol)),
        ("float32_near_float64", partial(properties.float32_near_float64, *at, tol=max(1e-2, tol))),
    ]
    if not exact:
        return found
    for name, instance in (("quadratic", known), ("nested", nested()), ("asinh", asinh())):
        point = tree_map(lambda leaf: leaf + 0.1, instance.x0)
        assert instance.gradient is not None
        args = (estimator, instance.problem, point, instance.y0, instance.gradient(point))
        found.append((f"exact on {name}", partial(properties.exact, *args, tol=tol)))
    hard = quadratic(p=3, q=20, kappa=1e4, mu=1e-4)
    assert hard.gradient is not None
    line = BilevelProblem(lambda x, y: y.sum() + x.sum(), lambda x, y: (y * x[0]).sum())
    return [
        *found,
        ("permuting_leaves", partial(properties.permuting_leaves, *at, tol=tol)),
        ("scaling_g", partial(properties.scaling_g, *at, tol=tol)),
        ("orthogonal_change_of_y", partial(properties.orthogonal_change_of_y, *at, tol=tol)),
        ("warm_start_changes_nothing", partial(properties.warm_start_changes_nothing, *at, tol=tol)),
        (
            "hard problem",
            partial(properties.exact_or_reported, estimator, hard.problem, x, hard.y0, hard.gradient(x), tol=100 * tol),
        ),
        ("no minimizer", partial(properties.exact_or_reported, estimator, line, x, known.y0, None)),
    ]


@checked(tol=AT_LEAST_0)
def parametrize_with_checks(
    estimators: Sequence[AbstractEstimator], *, exact: bool = True, tol: float = 1e-5
) -> pytest.MarkDecorator:
    """A decorator: the test gets an argument `check`, one property of one estimator, and calls it.

    Raises:
        ImportError: if pytest is missing.
    """
    try:
        import pytest
    except ImportError as error:
        raise ImportError(
            '`parametrize_with_checks` needs pytest. Install it with `pip install "bilevel[test]"`.'
        ) from error
    rows: list[Any] = [
        pytest.param(check, id=f"{type(estimator).__name__}{i}-{name}")
        for i, estimator in enumerate(estimators)
        for name, check in estimator_checks(estimator, exact=exact, tol=tol)
    ]
    return pytest.mark.parametrize("check", rows)
