"""How sub-problems are solved: linear systems, inner minimizations, outer steps; one algorithm a file."""

from bilevel.solvers.active_set import ActiveSet as ActiveSet
from bilevel.solvers.adam import Adam as Adam
from bilevel.solvers.admm import ADMM as ADMM
from bilevel.solvers.anderson import Anderson as Anderson
from bilevel.solvers.armijo import Armijo as Armijo
from bilevel.solvers.bicgstab import BiCGStab as BiCGStab
from bilevel.solvers.broyden import Broyden as Broyden
from bilevel.solvers.cg import CG as CG
from bilevel.solvers.clarabel import Clarabel as Clarabel
from bilevel.solvers.clipped import Clipped as Clipped
from bilevel.solvers.closed_form import ClosedForm as ClosedForm
from bilevel.solvers.coordinate_descent import CoordinateDescent as CoordinateDescent
from bilevel.solvers.cvxpy_program import Cvxpy as Cvxpy
from bilevel.solvers.dense import Dense as Dense
from bilevel.solvers.fista import FISTA as FISTA
from bilevel.solvers.fixed_point_iteration import FixedPointIteration as FixedPointIteration
from bilevel.solvers.gmres import GMRES as GMRES
from bilevel.solvers.gradient_descent import GradientDescent as GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall as HeavyBall
from bilevel.solvers.interior_point import InteriorPoint as InteriorPoint
from bilevel.solvers.iterate import Iterate as Iterate
from bilevel.solvers.jacobi import Jacobi as Jacobi
from bilevel.solvers.jacobian_free import JacobianFree as JacobianFree
from bilevel.solvers.lbfgs import LBFGS as LBFGS
from bilevel.solvers.linear_anderson import LinearAnderson as LinearAnderson
from bilevel.solvers.minres import MINRES as MINRES
from bilevel.solvers.nesterov import Nesterov as Nesterov
from bilevel.solvers.neumann import Neumann as Neumann
from bilevel.solvers.newton import Newton as Newton
from bilevel.solvers.newton_pcg import NewtonPCG as NewtonPCG
from bilevel.solvers.normal_cg import NormalCG as NormalCG
from bilevel.solvers.nystrom import Nystrom as Nystrom, NystromPreconditioner as NystromPreconditioner
from bilevel.solvers.own_steps import OwnSteps as OwnSteps
from bilevel.solvers.primal_dual import PrimalDual as PrimalDual
from bilevel.solvers.proximal_gradient import ProximalGradient as ProximalGradient
from bilevel.solvers.quadratic_program import QuadraticProgram as QuadraticProgram
from bilevel.solvers.quasi_newton import QuasiNewton as QuasiNewton
from bilevel.solvers.saddle_cholesky import SaddleCholesky as SaddleCholesky
from bilevel.solvers.scheduled import Cosine as Cosine, Scheduled as Scheduled, StepDecay as StepDecay
from bilevel.solvers.scipy_inner import Scipy as Scipy
from bilevel.solvers.scipy_minimize import ScipyMinimize as ScipyMinimize
from bilevel.solvers.slsqp import SLSQP as SLSQP
from bilevel.solvers.torch_optim import TorchOptim as TorchOptim
from bilevel.solvers.truncated_cg import TruncatedCG as TruncatedCG
from bilevel.solvers.trust_constr import TrustConstr as TrustConstr
from bilevel.solvers.weight_decay import WeightDecay as WeightDecay
