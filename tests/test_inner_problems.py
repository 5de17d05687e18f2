"""Kinds of inner problem: what they declare is compared before every estimate, and what they offer is right."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    KKT,
    BilevelProblem,
    Checkpointed,
    FiniteDifference,
    Forward,
    Penalty,
    Polytope,
    Reverse,
    Status,
    hypergradient,
)
from bilevel._calculus import Linearization
from bilevel._linear import ANY, LinearOperator, OperatorProperties
from bilevel.extending import (
    AbstractEstimator,
    AbstractInnerProblem,
    AbstractInnerSolver,
    AbstractLinearSolver,
    Exact,
    Feature,
    FlatEstimate,
    FlatProblem,
    FlatStart,
    Objective,
    Property,
    Solved,
    inner_objective,
    outer_gradients,
    report,
)
from bilevel.hypergrad.unrolling.form import AbstractUnrolling
from bilevel.inner_problems import Composite, Iteration, LinearlyConstrained, SmoothMinimization, inner_problem
from bilevel.prox import L1, AbstractProxTerm, LInfBall
from bilevel.solvers import (
    CG,
    GMRES,
    LBFGS,
    ClosedForm,
    Dense,
    GradientDescent,
    Iterate,
    OwnSteps,
    ProximalGradient,
    QuadraticProgram,
)

DOUBLE = torch.float64


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 1).square().sum() / 2 + x.sum()


def g(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum() / 2


def halved(x: Tensor, y: Tensor, k: int) -> Tensor:
    return (y + x) / 2


CONSTRAINED = BilevelProblem(f, g, constraints=lambda x: Polytope(upper=0.5))
ITERATIVE = BilevelProblem(f, g, iterative=True)
COMPOSITE = BilevelProblem(f, g, prox=lambda x: L1(x.exp()))
OWN = BilevelProblem(f, inner=Iteration(halved, steps=3))
SMOOTH = BilevelProblem(f, g)
X, Y0 = torch.tensor([1.0, -2.0], dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)


# Requirements


@final
@dataclass(frozen=True)
class Undeclared(AbstractEstimator):
    """The implicit gradient of a smooth inner problem, as a user would write it: it declares nothing."""

    inner: AbstractInnerSolver
    linear: AbstractLinearSolver

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        solved = self.inner.solve(inner_objective(problem, x), problem.start(x, start.y).detach())
        at = Exact().linearize(problem, x, solved.value)
        value, fx, fy = outer_gradients(problem, x, solved.value)
        system = self.linear.solve(at.operator, fy)
        cross = at.cross(system.value)
        reports = (report("inner solver", solved), report("linear solver", system))
        return FlatEstimate(fx if cross is None else fx - cross, value, solved.value, reports)


UNDECLARED = Undeclared(LBFGS(1e-10), CG(rtol=1e-10))


def test_an_estimator_that_declares_nothing_is_right_on_a_smooth_problem() -> None:
    found = hypergradient(SMOOTH, X, Y0, estimator=UNDECLARED)
    torch.testing.assert_close(found.grad, X - 1 + 1)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (CONSTRAINED, "y is constrained"),
        (ITERATIVE, "declared `iterative`"),
        (COMPOSITE, "non-smooth term"),
        (OWN, "the inner problem is an iteration"),
    ],
    ids=["constrained", "iterative", "composite", "own steps"],
)
@pytest.mark.parametrize("estimator", [UNDECLARED, Penalty(LBFGS()), AID(LBFGS(), CG(), target_error=1e-3)])
def test_what_needs_a_smooth_minimization_is_refused_by_name(
    problem: BilevelProblem, words: str, estimator: AbstractEstimator
) -> None:
    why = f"`{type(estimator).__name__}` does not apply: .*{words}"
    if problem is COMPOSITE and isinstance(estimator, Penalty):  # which takes a term that its inner solver heeds
        why = r"`Penalty\(inner=...\)` must heed the non-smooth term"
    with pytest.raises(ValueError, match=why):
        hypergradient(problem, X, Y0, estimator=estimator)


@final
@dataclass(frozen=True)
class ByHand(AbstractEstimator):
    """The same without this library's derivatives; it declares nothing either."""

    inner: AbstractInnerSolver

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        solved = self.inner.solve(inner_objective(problem, x), problem.start(x, start.y).detach())
        value, fx, _ = outer_gradients(problem, x, solved.value)
        return FlatEstimate(fx, value, solved.value, (report("inner solver", solved),))


@pytest.mark.parametrize("g", [lambda x, y: (y - 2).square().sum(), lambda x, y: (y - 2).square().sum() + x.sum()])
def test_whether_grad_g_sees_x_is_looked_for_where_nothing_is_declared(g: Any) -> None:
    problem = BilevelProblem(f, g, init=lambda x: x)
    with pytest.raises(ValueError, match="`ByHand` does not apply: g does not depend on x"):
        hypergradient(problem, X, Y0, estimator=ByHand(LBFGS()))


def test_a_start_that_alone_depends_on_x_is_refused_for_an_estimator_that_declares_nothing() -> None:
    problem = BilevelProblem(f, lambda x, y: y.square().sum(), init=lambda x: x)
    with pytest.raises(ValueError, match="`Undeclared` does not apply: g does not depend on x"):
        hypergradient(problem, X, Y0, estimator=UNDECLARED)
    proximal = BilevelProblem(f, lambda x, y: (y - x).square().sum(), init=lambda x: x)
    assert hypergradient(proximal, X, Y0, estimator=UNDECLARED).status.ok


@pytest.mark.parametrize("estimator", [ESJ(LBFGS()), FiniteDifference(LBFGS()), AID(LBFGS(), GMRES())])
def test_an_inner_solver_that_would_ignore_the_term_is_refused(estimator: AbstractEstimator) -> None:
    with pytest.raises(
        ValueError, match=r"must heed the non-smooth term.*`LBFGS`, which ignores it\. Use `ProximalGradient`"
    ):
        hypergradient(COMPOSITE, X, Y0, estimator=estimator)


def test_a_linear_solver_gets_no_system_without_the_properties_that_it_demands() -> None:
    with pytest.raises(ValueError, match=r"`AID` does not apply: y is constrained.*`linear=`: `CG` requires"):
        hypergradient(CONSTRAINED, X, Y0, estimator=AID(QuadraticProgram(), CG()))
    for linear in (GMRES(1e-10), Dense()):
        found = hypergradient(CONSTRAINED, X, Y0, estimator=AID(QuadraticProgram(), linear))
        torch.testing.assert_close(
            found.grad, hypergradient(CONSTRAINED, X, Y0, estimator=KKT(QuadraticProgram())).grad
        )


# Kinds as values


@pytest.mark.parametrize(
    ("face", "kind", "estimator"),
    [
        (SMOOTH, SmoothMinimization(g), AID(LBFGS(1e-10), CG())),
        (CONSTRAINED, LinearlyConstrained(g, lambda x: Polytope(upper=0.5)), KKT(QuadraticProgram())),
        (COMPOSITE, Composite(g, lambda x: L1(x.exp())), AID(ProximalGradient(step=1.0), CG())),
    ],
    ids=["smooth", "constrained", "composite"],
)
def test_a_kind_given_as_a_value_is_the_same_problem(
    face: BilevelProblem, kind: AbstractInnerProblem, estimator: AbstractEstimator
) -> None:
    assert type(inner_problem(face)) is type(kind)
    a = hypergradient(face, X, Y0, estimator=estimator)
    b = hypergradient(BilevelProblem(f, inner=kind), X, Y0, estimator=estimator)
    assert torch.equal(a.grad, b.grad) and a.stats == b.stats


def test_a_problem_has_one_kind_of_inner_problem() -> None:
    with pytest.raises(ValueError, match="Got constraints and prox"):
        BilevelProblem(f, g, constraints=lambda x: Polytope(), prox=lambda x: L1(1.0))
    with pytest.raises(ValueError, match="beside g"):
        BilevelProblem(f, g, inner=SmoothMinimization(g))
    with pytest.raises(TypeError, match=r"must be a kind of inner problem such as `SmoothMinimization\(g\)`"):
        BilevelProblem(f, inner=g)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`problem.prox` will be called as prox\(x\)"):
        hypergradient(BilevelProblem(f, g, prox=lambda: L1(1.0)), X, Y0)


class Subclass(BilevelProblem):
    def f(self, x: Any, y: Any, *data: Any) -> Tensor:
        return f(x, y)

    def g(self, x: Any, y: Any, *data: Any) -> Tensor:
        return g(x, y)


class Bounded(Subclass):
    def constraints(self, x: Any) -> Polytope:
        return Polytope(upper=0.5)


class Both(Bounded):
    def prox(self, x: Any) -> AbstractProxTerm:
        return L1(1.0)


class Adapted(Bounded):
    iterative = True


class WithoutConstructor(Both):
    def __init__(self) -> None:
        pass


class Held(BilevelProblem):
    inner = Composite(g, lambda x: L1(x.exp()))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Subclass(inner=SmoothMinimization(g)),
        lambda: Bounded(prox=lambda x: L1(1.0)),
        lambda: Both(),
        lambda: Adapted(),
        lambda: hypergradient(WithoutConstructor(), X, Y0),
    ],
    ids=["inner beside g", "keyword beside method", "two methods", "attribute beside method", "no constructor"],
)
def test_members_of_a_class_count_as_kinds_too(build: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="must have one kind of inner problem"):
        build()


def test_a_class_may_hold_its_kind() -> None:
    expected = hypergradient(COMPOSITE, X, Y0, estimator=AID(PROXIMAL, CG()))
    assert torch.equal(hypergradient(Held(f), X, Y0, estimator=AID(PROXIMAL, CG())).grad, expected.grad)
    assert type(inner_problem(Bounded())) is LinearlyConstrained


# A kind of one's own in one class: y = T(x, y), which is not symmetric


@final
@dataclass(frozen=True, eq=False)
class FixedPoint(AbstractInnerProblem):
    """y*(x) = T(x, y*(x)): (dF/dy)' w = w - (dT/dy)' w and (dF/dx)' w = -(dT/dx)' w."""

    T: Callable[..., Any]

    @property
    def offers(self) -> frozenset[Property]:
        return frozenset({Property.stationary})

    @property
    def refusal(self) -> str:
        return "y is a fixed point, not a minimizer. Use `AID` with `GMRES`."

    @property
    def operator(self) -> OperatorProperties:
        return ANY

    def objective(self, problem: FlatProblem, x: Tensor, products: Any) -> Objective:
        return Objective(lambda y: (self.flat(problem, x, y) - y).square().sum(-1) / 2, problem.tally)

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Any, margin: float | None
    ) -> Linearization:
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), solved.value.detach().requires_grad_()
            image = self.flat(problem, x, y)

        def products(w: Tensor) -> tuple[Tensor, Tensor | None]:
            in_y, in_x = torch.autograd.grad(image, (y, x), w, retain_graph=True)
            return w - in_y, -in_x

        operator = LinearOperator(lambda w: products(w)[0], y.shape[-1], symmetric=False)
        return Linearization(y.detach(), y.detach(), operator.mv, products, operator=operator)

    def flat(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
        def one(x: Any, y: Tensor, *data: Any) -> Tensor:
            return problem.y.ravel(self.T(x, problem.y.unravel(y), *data), "T(x, y)")

        return problem.map(one, "g", x, y)


ROTATION = torch.tensor([[0.0, 0.5], [-0.4, 0.1]], dtype=DOUBLE)


def test_a_kind_of_ones_own_is_differentiated_by_an_estimator_that_does_not_know_it() -> None:
    problem = BilevelProblem(f, inner=FixedPoint(lambda x, y: ROTATION @ y + x.sin()))
    inverse = torch.linalg.inv(torch.eye(2, dtype=DOUBLE) - ROTATION)
    y = inverse @ X.sin()
    expected = X.cos() * (inverse.T @ (y - 1)) + 1
    found = hypergradient(problem, X, Y0, estimator=AID(LBFGS(1e-12), GMRES(1e-12)))
    torch.testing.assert_close(found.grad, expected)
    with pytest.raises(ValueError, match=r"`AID` does not apply: y is a fixed point.*`CG` requires"):
        hypergradient(problem, X, Y0, estimator=AID(LBFGS(1e-12), CG()))
    with pytest.raises(ValueError, match="`Penalty` does not apply: y is a fixed point"):
        hypergradient(problem, X, Y0, estimator=Penalty(LBFGS()))


# Composite problems


def lasso(seed: int, n: int = 12, q: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, q, generator=generator, dtype=DOUBLE)
    return (
        A,
        A @ torch.tensor([2.0, 0.0, -1.0, 0.0, 0.1], dtype=DOUBLE)[:q],
        torch.randn(q, generator=generator).double(),
    )


PROXIMAL = ProximalGradient(tol=1e-12, max_steps=20_000)


@given(st.integers(0, 1000), st.booleans())
def test_the_lasso_hypergradient_is_that_of_the_support(seed: int, weighted: bool) -> None:
    """dy_S/dx_j = -(A_S'A_S)^-1 (e_j sign(y_j) w_j), w = exp(x): by the formula, dense."""
    A, b, c = lasso(seed)
    x = torch.linspace(-1, 0.5, 5, dtype=DOUBLE) if weighted else torch.tensor(0.0, dtype=DOUBLE)
    problem = BilevelProblem(
        lambda x, y: c @ y + y.square().sum() / 2,
        lambda x, y: (A @ y - b).square().sum() / 2 + (x.sum() * y).sum(),
        prox=lambda x: L1(x.exp()),
    )
    found = hypergradient(problem, x, torch.zeros(5, dtype=DOUBLE), estimator=AID(PROXIMAL, CG(1e-12)))
    y, w = found.y, x.exp().expand(5)
    S = y != 0
    u = torch.zeros(5, dtype=DOUBLE)
    u[S] = torch.linalg.solve(A[:, S].T @ A[:, S], (c + y)[S])
    through_weight = -u * y.sign() * w
    expected = (through_weight if weighted else through_weight.sum()) - u.sum()
    torch.testing.assert_close(found.grad, expected, rtol=1e-7, atol=1e-7)


def test_the_composite_hypergradient_is_the_difference_of_phi() -> None:
    A, b, c = lasso(3)
    problem = BilevelProblem(
        lambda x, y: c @ y["w"] + x["a"].sum(),
        lambda x, y: (A @ y["w"] - b).square().sum() / 2 + x["a"].exp() * y["b"].square().sum() / 2 - y["b"].sum(),
        prox=lambda x: L1({"w": x["l"].exp(), "b": 0.1}),
    )
    x = {"l": torch.tensor(0.3, dtype=DOUBLE), "a": torch.tensor(-0.2, dtype=DOUBLE)}
    y0 = {"w": torch.zeros(5, dtype=DOUBLE), "b": torch.zeros((), dtype=DOUBLE)}
    exact = hypergradient(problem, x, y0, estimator=AID(PROXIMAL, Dense()))
    differences = hypergradient(problem, x, y0, estimator=FiniteDifference(PROXIMAL, step=1e-5))
    for name in x:
        torch.testing.assert_close(exact.grad[name], differences.grad[name], rtol=1e-6, atol=1e-7)
    by_steps = hypergradient(problem, x, y0, estimator=ESJ(PROXIMAL, directions=2, radius=1e-6))
    torch.testing.assert_close(by_steps.grad["l"], exact.grad["l"], rtol=1e-4, atol=1e-5)


def test_by_name_the_default_differentiates_each_kind_of_inner_problem() -> None:
    for problem, estimator in (
        (SMOOTH, AID(LBFGS(1e-10), CG())),
        (CONSTRAINED, KKT(QuadraticProgram())),
        (COMPOSITE, AID(PROXIMAL, CG())),
    ):
        expected = hypergradient(problem, X, Y0, estimator=estimator)
        torch.testing.assert_close(hypergradient(problem, X, Y0).grad, expected.grad, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="does not apply: the inner problem is an iteration"):
        hypergradient(OWN, X, Y0)


def test_entries_off_the_support_move_as_the_proximal_map_does() -> None:
    """A box whose size is x: both entries are on its boundary, and move with it."""
    H = torch.tensor([[2.0, 0.5, 0.3], [0.5, 1.0, -0.2], [0.3, -0.2, 3.0]], dtype=DOUBLE)
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum() + y.prod(),
        lambda x, y: y @ H @ y / 2 - y @ torch.tensor([3.0, 2.0, 0.5], dtype=DOUBLE) * x.exp(),
        prox=lambda x: LInfBall(x),
    )
    x, y0 = torch.tensor(0.9, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    differences = hypergradient(problem, x, y0, estimator=FiniteDifference(PROXIMAL)).grad
    for linear in (CG(1e-12), Dense()):
        found = hypergradient(problem, x, y0, estimator=AID(PROXIMAL, linear))
        assert 0 < int((found.y.abs() == x).sum()) < 3
        torch.testing.assert_close(found.grad, differences, rtol=1e-7, atol=1e-8)


@final
@dataclass(frozen=True, eq=False)
class ElasticNet(AbstractProxTerm):
    """h(y) = |y|_1 + c |y|^2 / 2: curved on its support, where the derivative of the map is below one."""

    curvature: Tensor

    def value(self, y: Any) -> Tensor:
        return y.abs().sum() + self.curvature * y.square().sum() / 2  # type: ignore[no-any-return]

    def prox(self, v: Any, step: Tensor | float) -> Tensor:
        return v.sign() * (v.abs() - step).relu() / (1 + step * self.curvature)  # type: ignore[no-any-return]

    def margin(self, v: Any, step: Tensor | float) -> Tensor:
        return ((v.abs() - step).abs() / v.abs()).min()  # type: ignore[no-any-return]

    def conjugate(self) -> AbstractProxTerm:
        raise AssertionError("not needed here")

    @property
    def separable(self) -> bool:
        return True


def test_the_curvature_of_the_term_itself_counts_on_the_support() -> None:
    A, b, c = lasso(3)
    problem = BilevelProblem(
        lambda x, y: c @ y,
        lambda x, y: (A @ y - b).square().sum() / 2,
        prox=lambda x: ElasticNet(x.exp()),
    )
    x, y0 = torch.tensor(0.7, dtype=DOUBLE), torch.zeros(5, dtype=DOUBLE)
    found = hypergradient(problem, x, y0, estimator=AID(PROXIMAL, CG(1e-12)))
    S = found.y != 0  # on it (A'A + e^x I) dy/dx = -e^x y, in closed form
    assert int(S.sum()) > 0
    inverse = torch.linalg.inv((A.T @ A)[S][:, S] + x.exp() * torch.eye(int(S.sum()), dtype=DOUBLE))
    torch.testing.assert_close(found.grad, -x.exp() * c[S] @ inverse @ found.y[S], rtol=1e-7, atol=1e-9)


def test_weights_are_matched_with_y_by_their_keys() -> None:
    def problem(weights: dict[str, float]) -> BilevelProblem:
        return BilevelProblem(
            lambda x, y: y["a"] + y["b"],
            lambda x, y: (y["a"] - 3 * x).square() / 2 + (y["b"] - 3 * x).square() / 2,
            prox=lambda x: L1(weights),
        )

    one, y0 = torch.tensor(1.0, dtype=DOUBLE), {name: torch.zeros((), dtype=DOUBLE) for name in "ab"}
    for weights in ({"a": 1.0, "b": 0.0}, {"b": 0.0, "a": 1.0}):
        found = hypergradient(problem(weights), one, y0, estimator=AID(PROXIMAL, CG())).y
        assert (float(found["a"]), float(found["b"])) == pytest.approx((2.0, 3.0))
    with pytest.raises(ValueError, match=r"a parameter of a proximal term must be .* a structure like y"):
        hypergradient(problem({"b": 0.0, "c": 1.0}), one, y0, estimator=AID(PROXIMAL, CG()))


def test_a_negative_weight_is_no_success() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - 2).square().sum() / 2, prox=lambda x: L1(x))
    at = torch.tensor(-0.5, dtype=DOUBLE)
    found = hypergradient(problem, at, Y0, estimator=AID(ProximalGradient(step=1.0), CG()), throw=False)
    assert found.status is Status.nonfinite


def test_composite_tasks_are_a_loop_over_tasks() -> None:
    targets = torch.tensor([[3.0, 0.2], [0.1, -4.0], [1.5, 1.6]], dtype=DOUBLE)

    def problem(tasks: bool) -> BilevelProblem:
        return BilevelProblem(
            lambda x, y, task: (y - task).square().sum(),
            lambda x, y, task: (y - task).square().sum() / 2,
            prox=lambda x, task: L1(x.exp()),
            tasks=tasks,
        )

    x, aid = torch.tensor(0.1, dtype=DOUBLE), AID(ProximalGradient(step=1.0), CG())
    whole = hypergradient(problem(True), x, torch.zeros(2, dtype=DOUBLE), data=targets, estimator=aid)
    each = [hypergradient(problem(False), x, torch.zeros(2, dtype=DOUBLE), data=t, estimator=aid) for t in targets]
    torch.testing.assert_close(whole.grad, torch.stack([e.grad for e in each]).mean(0))
    torch.testing.assert_close(whole.y, torch.stack([e.y for e in each]))


def soft(x: float) -> Any:
    """y = soft(2, x): its kink is at x = 2."""
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - 2).square().sum() / 2, prox=lambda x: L1(x))
    at = torch.tensor(x, dtype=DOUBLE)
    aid = AID(ProximalGradient(step=1.0), CG())
    return hypergradient(problem, at, torch.zeros(1, dtype=DOUBLE), estimator=aid, throw=False)


def test_a_kink_of_the_solution_is_reported_and_a_neighbour_passes() -> None:
    assert soft(2.0).status is Status.weakly_active
    assert soft(2.001).status.ok and float(soft(2.001).grad) == 0.0  # the dead zone
    assert soft(1.999).status.ok and float(soft(1.999).grad) == -1.0


@final
@dataclass(frozen=True, eq=False)
class Entangled(AbstractProxTerm):
    """L1 that does not say that it is separable."""

    weight: Any

    def value(self, y: Any) -> Tensor:
        return L1(self.weight).value(y)

    def prox(self, v: Any, step: Tensor | float) -> Any:
        return L1(self.weight).prox(v, step)

    def margin(self, v: Any, step: Tensor | float) -> Tensor:
        return L1(self.weight).margin(v, step)

    def conjugate(self) -> AbstractProxTerm:
        return LInfBall(self.weight)


def test_a_term_without_a_derivative_is_differentiated_as_a_fixed_point_and_not_by_conjugate_gradients() -> None:
    problem = BilevelProblem(f, g, prox=lambda x: Entangled(x.exp()))
    expected = hypergradient(COMPOSITE, X, Y0, estimator=AID(PROXIMAL, CG()))
    with pytest.raises(ValueError, match=r"`AID` does not apply: .*no derivative in closed form.*`CG` requires"):
        hypergradient(problem, X, Y0, estimator=AID(PROXIMAL, CG()))
    for estimator in (AID(PROXIMAL, GMRES()), FiniteDifference(PROXIMAL), ITD(PROXIMAL)):
        found = hypergradient(problem, X, Y0, estimator=estimator)
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-6)


FORMS = [Reverse(), Checkpointed(), Forward()]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_unrolled_proximal_steps_tend_to_the_implicit_gradient(form: AbstractUnrolling) -> None:
    A, b, c = lasso(4)
    problem = BilevelProblem(
        lambda x, y: c @ y, lambda x, y: (A @ y - b).square().sum() / 2, prox=lambda x: L1(x.exp())
    )
    x, y0 = torch.zeros(5, dtype=DOUBLE), torch.zeros(5, dtype=DOUBLE)
    exact = hypergradient(problem, x, y0, estimator=AID(PROXIMAL, CG(1e-12)))
    itd = ITD(ProximalGradient(max_steps=2000, tol=None), unrolling=form)
    torch.testing.assert_close(hypergradient(problem, x, y0, estimator=itd).grad, exact.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("with_g", [True, False])
def test_a_step_of_ones_own_knows_its_number_and_a_length_that_depends_on_x(
    form: AbstractUnrolling, with_g: bool
) -> None:
    """y_{k+1} = y_k - exp(x_0) (k + 1) / 20 grad g, with a momentum that y carries along, against differences."""

    def step(x: Any, y: Any, *rest: Any) -> Any:
        gradient, k = rest if with_g else ({"a": y["a"] - x, "m": 0 * y["m"]}, *rest)
        m = 0.5 * y["m"] + gradient["a"]
        return {"a": y["a"] - x[0].exp() * (k + 1) / 20 * m, "m": m}

    inner = Iteration(step, steps=5, objective_function=(lambda x, y: g(x, y["a"])) if with_g else None)
    problem = BilevelProblem(lambda x, y: f(x, y["a"]), inner=inner)
    y0 = {"a": Y0, "m": Y0}
    exact = hypergradient(problem, X, y0, estimator=ITD(OwnSteps(), unrolling=form))
    differences = hypergradient(problem, X, y0, estimator=FiniteDifference(OwnSteps()))
    torch.testing.assert_close(exact.grad, differences.grad, rtol=1e-7, atol=1e-8)
    assert exact.status.ok and exact.stats.inner_steps == 5
    assert exact.stats.gradients == (0 if not with_g else exact.stats.gradients)
    with pytest.raises(ValueError, match=r"must heed the steps that the inner problem consists of.*Use `OwnSteps`"):
        hypergradient(problem, X, y0, estimator=ITD(Iterate(GradientDescent(0.1), 5), unrolling=form))
    by_name = hypergradient(problem, X, y0, estimator="itd")
    torch.testing.assert_close(by_name.grad, exact.grad)


def test_own_steps_are_for_iterations_only() -> None:
    with pytest.raises(ValueError, match="takes the steps of an inner problem that is an iteration"):
        hypergradient(SMOOTH, X, Y0, estimator=AID(OwnSteps(), CG()))


# Proximal terms

VECTORS = st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3).map(lambda v: torch.tensor(v, dtype=DOUBLE))


@given(VECTORS, st.floats(0.1, 3), st.floats(0.1, 3))
def test_moreau(v: Tensor, weight: float, step: float) -> None:
    """prox_{t h}(v) + t prox_{h*/t}(v / t) = v, and the conjugate of the conjugate is the term."""
    for term in (L1(weight), LInfBall(weight)):
        whole = term.prox(v, step) + step * term.conjugate().prox(v / step, 1 / step)
        torch.testing.assert_close(whole, v)
        assert type(term.conjugate().conjugate()) is type(term)


@given(VECTORS, VECTORS, st.floats(0.1, 3))
def test_proximal_maps_are_firmly_nonexpansive(v: Tensor, w: Tensor, weight: float) -> None:
    for term in (L1(weight), LInfBall(weight)):
        a, b = term.prox(v, 0.7), term.prox(w, 0.7)
        assert float((a - b) @ (a - b)) <= float((a - b) @ (v - w)) + 1e-12


@given(VECTORS, st.floats(0.1, 3))
def test_a_prox_minimizes_what_it_says(v: Tensor, weight: float) -> None:
    at = L1(weight).prox(v, 0.5)

    def value(y: Tensor) -> float:
        return float(L1(weight).value(y) + (y - v).square().sum() / (2 * 0.5))

    for move in (*torch.eye(3, dtype=DOUBLE), *-torch.eye(3, dtype=DOUBLE)):
        assert value(at) <= value(at + 1e-3 * move)
    assert float(LInfBall(weight).value(LInfBall(weight).prox(v, 0.5))) == 0.0
    assert float(LInfBall(weight).value(at * 0 + 2 * weight)) == float("inf")


# Memory


@pytest.mark.parametrize(
    ("problem", "estimator"),
    [
        (SMOOTH, AID(LBFGS(1e-10), CG())),
        (CONSTRAINED, KKT(QuadraticProgram())),
        (COMPOSITE, AID(ProximalGradient(step=1.0), CG())),
    ],
    ids=["smooth", "constrained", "composite"],
)
def test_a_linearization_goes_by_reference_count_alone(problem: BilevelProblem, estimator: Any) -> None:
    seen: list[weakref.ref[Any]] = []

    def remembered(self: Linearization, name: str) -> Any:  # whoever has made it, asks it for something
        seen.append(weakref.ref(self))
        return object.__getattribute__(self, name)

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Linearization, "__getattribute__", remembered)
            hypergradient(problem, X, Y0, estimator=estimator)
        assert seen and all(ref() is None for ref in seen)
    finally:
        gc.enable()


def test_a_closed_form_heeds_whatever_there_is() -> None:
    found = hypergradient(COMPOSITE, X, Y0, estimator=AID(ClosedForm(lambda x: L1(x.exp()).prox(x, 1.0)), CG()))
    expected = hypergradient(COMPOSITE, X, Y0, estimator=AID(PROXIMAL, CG()))
    torch.testing.assert_close(found.grad, expected.grad)
    assert Feature.prox in ClosedForm(lambda x: x).heeds


@pytest.mark.parametrize("form", [Reverse(), Checkpointed(), Forward()], ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("start", [0.0, 5.0])
def test_one_step_to_a_solution_under_a_term_that_is_not_separable_is_not_its_derivative(
    start: float, form: AbstractUnrolling
) -> None:
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum(),
        lambda x, y: x.exp() * y.square().sum() / 2 - x * y.sum(),
        prox=lambda x: Entangled(0.1 * x),
    )
    x, y0 = torch.tensor(0.3, dtype=DOUBLE), torch.full((1,), start, dtype=DOUBLE)
    once = ITD(ProximalGradient(tol=1e-9), form)  # the step is 1 / curvature: it lands on y*, from wherever it began
    assert hypergradient(problem, x, y0, estimator=once, throw=False).status is Status.truncated
    further = ITD(ProximalGradient(tol=1e-9, min_steps=1), form)  # until the derivative is right, too
    y = 0.9 * 0.3 * math.exp(-0.3)  # x (1 - 0.1) e^-x
    expected = 2 * (y - 1) * (0.9 * math.exp(-0.3) - y)
    assert float(hypergradient(problem, x, y0, estimator=further).grad) == pytest.approx(expected, rel=1e-9)
