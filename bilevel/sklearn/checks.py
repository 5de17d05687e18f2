"""What `fit` and its siblings look at before they compute: scikit-learn's constructors keep what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from bilevel.arguments.fits import demand_type, fit as admitted
from bilevel.arguments.ranges import Range, demand_range
from bilevel.arguments.words import got

LONGEST = 1_000  # characters of a message, which may show a value of any length


def number(estimator: Any, name: str, kind: type, allowed: Range | None = None) -> Any:
    """A parameter of an estimator as Python's own number or truth value.

    Args:
        estimator: whose parameter it is.
        name: of the parameter.
        kind: int, float or bool.
        allowed: its range.

    Raises:
        TypeError: naming the parameter, what is required and what arrived.
        ValueError: likewise, if it is out of range.
    """
    call, value = type(estimator).__name__, getattr(estimator, name)
    demand_type(call, name, value, kind)
    value = admitted(kind).take(value)
    if allowed is not None:
        demand_range(call, name, value, allowed)
    return value


@contextmanager
def named(call: str, **given: Any) -> Iterator[None]:
    """Have an error of scikit-learn or numpy say which arguments it is of.

    Their messages stay, with a note. What is no TypeError or ValueError, as an object raises that cannot be made an
    array, becomes a TypeError.
    """
    text = f"`{call}({', '.join(f'{name}=...' for name in given)})`"
    try:
        yield
    except (TypeError, ValueError) as error:
        if len(str(error)) > LONGEST:
            short = TypeError if isinstance(error, TypeError) else ValueError
            raise short(f"{str(error)[:LONGEST]}... This is of {text}.") from None
        error.add_note(f"This is of {text}.")
        raise
    except Exception as error:
        arrived = " and ".join(got(value) for value in given.values())
        raise TypeError(f"{text} cannot be made arrays. Got {arrived}: {type(error).__name__}.") from error


def training_inputs(estimator: Any, X: Any, y: Any, **options: Any) -> tuple[Any, Any]:
    """X and y of `fit` as arrays, or X as a CSR matrix; X may be anything that scikit-learn takes."""
    with named(f"{type(estimator).__name__}.fit", X=X, y=y):
        X, y = validate_data(estimator, X, y, accept_sparse="csr", dtype=np.float64, ensure_min_samples=2, **options)
        return X, y


def held_out_inputs(estimator: Any, X_val: Any, y_val: Any) -> tuple[Any, Any]:
    """X_val and y_val of `fit` likewise, with the features of X."""
    with named(f"{type(estimator).__name__}.fit", X_val=X_val, y_val=y_val):
        X, y = validate_data(estimator, X_val, y_val, accept_sparse="csr", dtype=np.float64, reset=False)
        return X, y


def new_inputs(estimator: Any, X: Any, call: str = "predict") -> Any:
    """X of a method of a fitted estimator."""
    check_is_fitted(estimator)
    with named(f"{type(estimator).__name__}.{call}", X=X):
        return validate_data(estimator, X, accept_sparse="csr", dtype=np.float64, reset=False)


def check_seed(estimator: Any) -> None:
    """Refuse a `random_state` that is none, whether it is used or not."""
    with named(type(estimator).__name__, random_state=estimator.random_state):
        check_random_state(estimator.random_state)
