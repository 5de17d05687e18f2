"""Property tests for your own estimators, algorithms and problems.

`check_estimator`, `check_algorithm`, `check_problem` and `check_composite` are one call each; the properties behind
them are functions of their own. Only `bilevel.testing.strategies` needs hypothesis: `pip install "bilevel[test]"`.
"""

from bilevel.testing import properties as properties, strategies as strategies
from bilevel.testing.algorithms import algorithm_checks as algorithm_checks, check_algorithm as check_algorithm
from bilevel.testing.composite import check_composite as check_composite
from bilevel.testing.estimators import (
    check_estimator as check_estimator,
    estimator_checks as estimator_checks,
    parametrize_with_checks as parametrize_with_checks,
)
from bilevel.testing.fixed_points import FixedPointFamily as FixedPointFamily
from bilevel.testing.instances import check_problem as check_problem
from bilevel.testing.logistic import Logistic as Logistic
