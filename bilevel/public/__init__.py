"""The names of `bilevel` itself, which are loaded when the first of them is asked for."""

from bilevel import bounds as bounds, prox as prox
from bilevel._calculus import Exact as Exact, FiniteDifferences as FiniteDifferences
from bilevel._estimate import AbstractEstimator as AbstractEstimator, Estimate as Estimate, Start as Start
from bilevel._hypergradient import hypergradient as hypergradient
from bilevel._hyperobjective import HyperObjective as HyperObjective, hyperobjective as hyperobjective
from bilevel._inner import AbstractInnerSolver as AbstractInnerSolver, AbstractUnrollable as AbstractUnrollable
from bilevel._instance import Instance as Instance
from bilevel._linear import (
    AbstractLinearSolver as AbstractLinearSolver,
    AbstractPreconditioner as AbstractPreconditioner,
    LinearOperator as LinearOperator,
)
from bilevel._optimizer import AbstractOptimizer as AbstractOptimizer, AbstractOuterDriver as AbstractOuterDriver
from bilevel._problem import BilevelProblem as BilevelProblem, Split as Split
from bilevel._result import (
    BilevelError as BilevelError,
    Report as Report,
    Solved as Solved,
    Stats as Stats,
    Status as Status,
    Substitute as Substitute,
)
from bilevel._sets import AbstractSet as AbstractSet, Box as Box, Simplex as Simplex
from bilevel._tree import ravel as ravel
from bilevel.algorithms.finite_sum import FiniteSum as FiniteSum
from bilevel.algorithms.registry import register_algorithm as register_algorithm
from bilevel.attribution.influence import influence as influence
from bilevel.attribution.scores import Influence as Influence
from bilevel.certificates.certificate import (
    Assumption as Assumption,
    Certificate as Certificate,
    Constants as Constants,
)
from bilevel.certificates.certify import certify as certify
from bilevel.certificates.error_bound import error_bound as error_bound
from bilevel.certificates.estimate_constants import estimate_constants as estimate_constants
from bilevel.diagnostics.check import check as check
from bilevel.diagnostics.compare import compare as compare
from bilevel.diagnostics.comparison import Comparison as Comparison, Row as Row
from bilevel.diagnostics.path import SolutionPath as SolutionPath, solution_path as solution_path
from bilevel.diagnostics.verdict import Check as Check, Outcome as Outcome, Verdict as Verdict
from bilevel.hypergrad.aid import AID as AID
from bilevel.hypergrad.certified import Certified as Certified
from bilevel.hypergrad.compiled import CompiledITD as CompiledITD
from bilevel.hypergrad.compiled_products import CompiledProducts as CompiledProducts
from bilevel.hypergrad.esj import ESJ as ESJ
from bilevel.hypergrad.finite_difference import FiniteDifference as FiniteDifference
from bilevel.hypergrad.first_order import FirstOrder as FirstOrder, Reptile as Reptile
from bilevel.hypergrad.full_kkt import FullKKT as FullKKT
from bilevel.hypergrad.gauss_newton import GaussNewton as GaussNewton
from bilevel.hypergrad.itd import ITD as ITD
from bilevel.hypergrad.kkt import KKT as KKT
from bilevel.hypergrad.online import Online as Online
from bilevel.hypergrad.penalty import Penalty as Penalty
from bilevel.hypergrad.unrolling.checkpointed import Checkpointed as Checkpointed
from bilevel.hypergrad.unrolling.forward import Forward as Forward
from bilevel.hypergrad.unrolling.reverse import Reverse as Reverse
from bilevel.hypergrad.unrolling.truncated import Truncated as Truncated
from bilevel.inner_problems.from_cvxpy import from_cvxpy as from_cvxpy
from bilevel.inner_problems.kind import AbstractInnerProblem as AbstractInnerProblem
from bilevel.inner_problems.multipliers import Multipliers as Multipliers
from bilevel.inner_problems.polytope import Polytope as Polytope
from bilevel.modules.functional import Functional as Functional, functional as functional
from bilevel.named.auto import Auto as Auto
from bilevel.named.registry import estimators as estimators, register_estimator as register_estimator
from bilevel.outer.minimize import minimize as minimize
from bilevel.outer.solution import Best as Best, Record as Record, Solution as Solution
from bilevel.outer.trial import Trial as Trial
