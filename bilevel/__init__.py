"""Bilevel optimization in PyTorch: min_x f(x, y*(x)) subject to y*(x) = argmin_y g(x, y)."""

from bilevel._calculus import Exact as Exact, FiniteDifferences as FiniteDifferences
from bilevel._certificate import Constants as Constants
from bilevel._estimate import AbstractEstimator as AbstractEstimator, Estimate as Estimate, Start as Start
from bilevel._hypergradient import hypergradient as hypergradient
from bilevel._inner import AbstractInnerSolver as AbstractInnerSolver, AbstractUnrollable as AbstractUnrollable
from bilevel._instance import Instance as Instance
from bilevel._linear import (
    AbstractLinearSolver as AbstractLinearSolver,
    AbstractPreconditioner as AbstractPreconditioner,
    LinearOperator as LinearOperator,
)
from bilevel._optimizer import AbstractOptimizer as AbstractOptimizer
from bilevel._problem import BilevelProblem as BilevelProblem, Split as Split
from bilevel._registry import estimators as estimators
from bilevel._result import (
    BilevelError as BilevelError,
    Report as Report,
    Solved as Solved,
    Stats as Stats,
    Status as Status,
)
from bilevel._tree import ravel as ravel
from bilevel.hypergrad.aid import AID as AID
