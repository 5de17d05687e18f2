"""Bounds on the error of a hypergradient before it is computed, from constants of f and g alone.

Each states what it assumes and returns its terms apart. `bilevel.error_bound` asks an estimator for its own;
`bilevel.certify` bounds the error of a hypergradient that has been computed, and is far sharper.
"""

from bilevel.bounds.beforehand import Beforehand as Beforehand
from bilevel.bounds.bound import Bound as Bound
from bilevel.bounds.differences import finite_difference as finite_difference
from bilevel.bounds.directions import tracking as tracking, truncated_series as truncated_series
from bilevel.bounds.implicit import aid as aid, nystrom as nystrom
from bilevel.bounds.iterations import (
    cg as cg,
    contraction as contraction,
    gradient_descent as gradient_descent,
    neumann as neumann,
)
from bilevel.bounds.sampled import esj as esj
from bilevel.bounds.unrolled import itd as itd, one_step as one_step, truncated_itd as truncated_itd
from bilevel.bounds.value_function import penalty as penalty
from bilevel.bounds.weighted import f2sa as f2sa
