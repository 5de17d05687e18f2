"""What y*(x) is: the kinds of inner problem, one a file.

Import them from here: `from bilevel.inner_problems import SmoothMinimization`.
"""

from bilevel._numerics.known_objective import AbstractKnownObjective as AbstractKnownObjective
from bilevel.inner_problems.composite import Composite as Composite
from bilevel.inner_problems.constrained import LinearlyConstrained as LinearlyConstrained
from bilevel.inner_problems.fixed_point import FixedPoint as FixedPoint
from bilevel.inner_problems.iteration import Iteration as Iteration
from bilevel.inner_problems.kind import AbstractInnerProblem as AbstractInnerProblem
from bilevel.inner_problems.kinds import inner_problem as inner_problem
from bilevel.inner_problems.linear_model import (
    Huber as Huber,
    LinearModel as LinearModel,
    LogLoss as LogLoss,
    Squared as Squared,
)
from bilevel.inner_problems.many_constraints import ManyConstraints as ManyConstraints
from bilevel.inner_problems.nonlinearly_constrained import NonlinearlyConstrained as NonlinearlyConstrained
from bilevel.inner_problems.polytope import Polytope as Polytope
from bilevel.inner_problems.proximal_fixed_point import ProximalFixedPoint as ProximalFixedPoint
from bilevel.inner_problems.smooth import SmoothMinimization as SmoothMinimization
from bilevel.inner_problems.supervised_training import SupervisedTraining as SupervisedTraining
from bilevel.requirements.properties import Property as Property
