"""What an estimator, a solver or a method of your own is written with; see the page "Extending"."""

from bilevel._calculus import (
    AbstractProducts as AbstractProducts,
    Exact as Exact,
    Linearization as Linearization,
    outer_gradients as outer_gradients,
)
from bilevel._estimate import (
    AbstractEstimator as AbstractEstimator,
    FlatEstimate as FlatEstimate,
    FlatStart as FlatStart,
)
from bilevel._flat import FlatProblem as FlatProblem
from bilevel._inner import (
    AbstractInnerSolver as AbstractInnerSolver,
    AbstractUnrollable as AbstractUnrollable,
    Objective as Objective,
    State as State,
)
from bilevel._linear import (
    AbstractLinearSolver as AbstractLinearSolver,
    AbstractPreconditioner as AbstractPreconditioner,
    LinearOperator as LinearOperator,
    OperatorProperties as OperatorProperties,
)
from bilevel._optimizer import (
    AbstractMinimizer as AbstractMinimizer,
    AbstractOptimizer as AbstractOptimizer,
    Move as Move,
    OptimizerState as OptimizerState,
    Told as Told,
)
from bilevel._result import Report as Report, Solved as Solved, Status as Status, Tally as Tally, report as report
from bilevel.algorithms.algorithm import AbstractAlgorithm as AbstractAlgorithm, Evaluated as Evaluated
from bilevel.algorithms.engine.direction import AbstractDirection as AbstractDirection, Drawn as Drawn, Joint as Joint
from bilevel.algorithms.engine.preset import AbstractPreset as AbstractPreset
from bilevel.algorithms.engine.reduction import AbstractReduction as AbstractReduction, Reduced as Reduced
from bilevel.algorithms.oracle import AbstractData as AbstractData, Block as Block, Draws as Draws, Oracle as Oracle
from bilevel.bounds.beforehand import Beforehand as Beforehand
from bilevel.bounds.bound import Bound as Bound
from bilevel.few_shot.learner import Learner as Learner
from bilevel.few_shot.likelihood import AbstractLikelihood as AbstractLikelihood
from bilevel.inner_problems.kind import AbstractInnerProblem as AbstractInnerProblem
from bilevel.inner_problems.kinds import inner_objective as inner_objective, inner_problem as inner_problem
from bilevel.named.setting import Setting as Setting
from bilevel.requirements.properties import DoesNotApply as DoesNotApply, Feature as Feature, Property as Property
