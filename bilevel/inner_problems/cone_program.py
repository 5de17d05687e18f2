"""Cone programs with parameters as inner problems: what `from_cvxpy` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._linear import SYMMETRIC, OperatorProperties
from bilevel._numerics.misfits import called
from bilevel._result import Solved
from bilevel._tree import Structure, Tree
from bilevel.inner_problems.cone_adjoint import AdjointCones
from bilevel.inner_problems.cone_form import AffineMap, ConeForm, FlatConeProgram
from bilevel.inner_problems.cone_parameters import Parameter, demand_domains
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.requirements.properties import DoesNotApply, Feature, Property


@final
@dataclass(frozen=True, eq=False)
class ConicProgram(AbstractInnerProblem):
    """y*(x) = E z* + e, z* = argmin_z {z'Pz / 2 + c'z : A z + s = b, s in K}, with P, A, b, c affine in p = values(x).

    K is a product of {0}, nonnegative half-lines, second-order, exponential and positive semidefinite cones. With the
    multipliers w of the rows and v = s - t w, any t > 0, the optimality conditions are an equation,

        F(z, v) = (P z + c + A'(Pi(v) - v) / t,  A z + Pi(v) - b) = 0,  s = Pi(v),  w = (Pi(v) - v) / t,

    Pi the projection onto K. D = D Pi(v) = Q diag(d) Q' has eigenvalues between 0 and 1, known in closed form for each
    cone. Multipliers in directions with 0 < d < 1 are eliminated, and the adjoint of F is

        [[M, B'], [B, 0]] (u, s) = (E'grad_y f, 0),  M = P + A'Q diag((1 - d) / (t d)) Q'A,  B = rows of Q'A with d = 0,
        h = grad_x f - d/dx [u'(P z + c + A'w) + r'(A z - b)],  r = Q (diag((1 - d) / (t d)) Q'A u + s):

    symmetric, indefinite, for `KKT`, `MINRES`, `GMRES` and `Dense`. Variables that are not unique and do not show in y
    (a bound of an inactive norm, say) are no obstacle: the directions in which neither M nor B acts are left out.

    Reports: `weakly_active` where v is on a kink of Pi, and y*(x) so has one; `dependent_constraints` where what holds
    depend on each other, and not alike at other x: y*(x) then is not differentiable; `not_positive_definite`, of the
    linear solver, where y* is not unique.

    Cost: n products with M, a factorization of n equations, and eigenvalues of as many; memory n^2 + n m a problem.

    Source: Agrawal, Barratt, Boyd, Busseti, Moursi, "Differentiating through a cone program", J. Appl. Numer. Optim. 1
    (2019), for P = 0, where the system is not reduced, nor symmetric.

    Args:
        form: the program in standard form, as a function of all parameters p.
        placing: the parameters that x gives, as one vector, -> p; the others are numbers.
        parameters: what the entries of that vector stand for.
        tree: the nesting of parameters in which x, or what `values` returns, comes.
        variables: the structure of y, for one problem.
        values: x -> parameters, `values(x)`, or `values(x, data)`; None: x are the parameters.
    """

    form: ConeForm
    placing: AffineMap
    parameters: tuple[Parameter, ...]
    tree: Structure
    variables: Structure
    values: Callable[..., Tree] | None = None

    @property
    def offers(self) -> frozenset[Property]:
        return frozenset({Property.stationary})

    @property
    def refusal(self) -> str:
        return (
            "y are variables of a cone program, which has no g(x, y) to be differentiated. Use `KKT(Clarabel())`, which"
            " differentiates its optimality conditions, or `ESJ` or `FiniteDifference` with `Clarabel()`."
        )

    @property
    def functions(self) -> Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]:
        return {} if self.values is None else {"values": (self.values, ("x",))}

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset({Feature.cones})

    @property
    def operator(self) -> OperatorProperties:
        return SYMMETRIC

    @property
    def implicit(self) -> str:
        return "kkt"

    def start(self, like: Tensor | None = None) -> Tree:
        """A y0: zeros of the structure of the variables, in the dtype and on the device of a tensor; None: float64."""
        like = torch.zeros((), dtype=torch.float64) if like is None else like
        return self.variables.unravel(torch.zeros(self.variables.size, dtype=like.dtype, device=like.device))

    def given(self, problem: FlatProblem, x: Tensor) -> Tensor:
        """The parameters that x gives as one vector, `(*batch, k)`, in float64; differentiable."""
        structure = replace(self.tree, dtype=problem.x.dtype, device=problem.x.device)

        def one(x: Tree, *data: Any) -> Tensor:
            tree = x if self.values is None else called("values(x, data)", self.values, x, *data)
            return structure.ravel(tree, f"`from_cvxpy`: {'x' if self.values is None else 'values(x)'}")

        return problem.map(one, "g", x).to(_wide(problem.x.device))

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        given = self.given(problem, x)
        demand_domains(self.parameters, given.detach().reshape(-1, given.shape[-1]))
        p = self.placing(given)
        program = self.form.at(p.detach().reshape(-1, p.shape[-1]))
        cones = FlatConeProgram(program, self._recover(problem), p)
        return Objective(lambda y: problem.g(x, y), problem.tally, cones=cones)

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Callable[[], Linearization], margin: float | None
    ) -> Linearization:
        if solved.multipliers is None:
            raise DoesNotApply("the inner solver returned no multipliers of the cone program. Use `Clarabel`.")
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            moving = self.placing(self.given(problem, leaf))
        program, recover = self.form.at(moving.detach().reshape(-1, moving.shape[-1])), self._recover(problem)
        return AdjointCones(self.form, program, recover, leaf, moving, solved, problem.tally).linearization(margin)

    def _recover(self, problem: FlatProblem) -> AffineMap:
        """z -> y in the order of y0, whose dicts may have another one."""
        own, y = self.variables, problem.y
        count = torch.arange(own.size, dtype=y.dtype, device=y.device)
        moved = y.ravel(replace(own, dtype=y.dtype, device=y.device).unravel(count), "the variables of `from_cvxpy`")
        place = torch.empty(own.size, dtype=torch.long)
        place[moved.long().cpu()] = torch.arange(own.size)
        E = self.form.y
        return AffineMap(place[E.i], E.j, E.values, E.offset[moved.long().cpu()])


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
