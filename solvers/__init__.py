"""How sub-problems are solved: linear systems, inner minimizations, outer steps; one algorithm a file."""

from bilevel.solvers.adam import Adam as Adam
from bilevel.solvers.cg import CG as CG
from bilevel.solvers.closed_form import ClosedForm as ClosedForm
from bilevel.solvers.gradient_descent import GradientDescent as GradientDescent
from bilevel.solvers.iterate import Iterate as Iterate
from bilevel.solvers.lbfgs import LBFGS as LBFGS
