"""Results are freed by reference count, hold no graph, and cost no more memory on the way than a loop by hand."""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from live import Left, Live, left_by, without_collector
from torch import Tensor
from torch.nn.functional import mse_loss

import bilevel
from bilevel import (
    AID,
    ESJ,
    ITD,
    KKT,
    AbstractEstimator,
    AbstractInnerSolver,
    AbstractLinearSolver,
    AbstractPreconditioner,
    BilevelError,
    BilevelProblem,
    Certified,
    Checkpointed,
    CompiledITD,
    Constants,
    FiniteDifference,
    FiniteDifferences,
    FirstOrder,
    Forward,
    FullKKT,
    Penalty,
    Polytope,
    Reptile,
    Reverse,
    Start,
    Truncated,
    algorithms,
    certify,
    check,
    compare,
    estimate_constants,
    estimators,
    functional,
    hypergradient,
    hyperobjective,
    minimize,
    prox,
    solvers,
)
from bilevel._optimizer import AbstractMinimizer, AbstractOptimizer, AbstractOuterDriver
from bilevel.algorithms import (
    BOME,
    BSA,
    ESJS,
    F2SA,
    FSLA,
    MASOBA,
    MEHA,
    MRBO,
    PBGD,
    SABA,
    SAMA,
    SOBA,
    SPABA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AbstractAlgorithm,
    AmIGO,
    AugmentedLagrangian,
    Descent,
    FdeHBO,
    Nested,
    Power,
    ScaleBiO,
    SingleLoop,
    StocBiO,
    Storm,
    Turns,
    ValueFunction,
    available,
)
from bilevel.few_shot import Validating, adapt, evaluate, mlp, train
from bilevel.hypergrad.online import Online
from bilevel.hypergrad.unrolling.form import AbstractUnrolling
from bilevel.inner_problems import Iteration, ManyConstraints
from bilevel.problems import imaml, maml
from bilevel.solvers import (
    ADMM,
    CG,
    FISTA,
    GMRES,
    LBFGS,
    MINRES,
    SLSQP,
    ActiveSet,
    Adam,
    Anderson,
    Armijo,
    BiCGStab,
    Broyden,
    Clipped,
    ClosedForm,
    Cosine,
    Dense,
    FixedPointIteration,
    GradientDescent,
    HeavyBall,
    InteriorPoint,
    Iterate,
    Jacobi,
    JacobianFree,
    LinearAnderson,
    Nesterov,
    Neumann,
    Newton,
    NewtonPCG,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    OwnSteps,
    PrimalDual,
    ProximalGradient,
    ProximalMultipliers,
    QuadraticProgram,
    QuasiNewton,
    SaddleCholesky,
    Scheduled,
    Scipy,
    ScipyMinimize,
    SparseInteriorPoint,
    SparseSaddle,
    StepDecay,
    TorchOptim,
    TruncatedCG,
    TrustConstr,
    WeightDecay,
)
from bilevel.tasks import Sinusoid


@pytest.fixture(autouse=True, scope="module")
def _thawed() -> Iterator[None]:
    """What `without_collector` froze is looked at again."""
    yield
    gc.unfreeze()


D = torch.tensor([1.0, 2.0, 3.0])
X, Y0 = torch.tensor([0.3, -0.2, 0.1]), torch.zeros(3)
DATA = torch.tensor([[0.1, 0.5, -0.3], [1.0, 0.2, 0.4], [-0.5, 0.3, 0.2]])


def f(x: Tensor, y: Tensor, *data: Tensor) -> Tensor:
    return (y - 1).square().sum() / 2 + sum((y * d).sum() for d in data)


def g(x: Tensor, y: Tensor, *data: Tensor) -> Tensor:
    value: Tensor = (D * (y - x).square()).sum() / 2 + sum((y - d).square().sum() for d in data)
    return value


NET = functional(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)).double())
ROWS = torch.sparse_coo_tensor(torch.tensor([[0, 1], [0, 2]]), torch.ones(2), (2, 3), check_invariants=True)
PLAIN = BilevelProblem(f, g)
PROBLEMS: dict[str, tuple[BilevelProblem, Any, Any, dict[str, Any]]] = {
    "plain": (PLAIN, X, Y0, {}),
    "tasks": (BilevelProblem(f, g, tasks=True), X, Y0, {"data": DATA}),
    "chunks": (BilevelProblem(f, g, tasks=True), X, Y0, {"data": DATA, "chunk_size": 2}),
    "loop": (BilevelProblem(f, g, tasks="loop"), X, Y0, {"data": DATA}),
    "encode": (BilevelProblem(f, g, tasks=True, encode=lambda x, d: x.sinh()), X, Y0, {"data": DATA}),
    "start in x": (BilevelProblem(f, g, tasks=True, init=lambda x, d: x), X, Y0, {"data": DATA}),
    "iterative": (BilevelProblem(f, g, init=lambda x: x, iterative=True), X, Y0, {}),
    "constrained": (
        BilevelProblem(f, g, constraints=lambda x: Polytope(lower=torch.zeros(3), upper=0.5 * torch.ones(3))),
        X,
        Y0,
        {},
    ),
    "nonlinear": (BilevelProblem(f, g, inequalities=lambda x, y: y.square().sum() - 0.5), X, Y0, {}),
    "many": (BilevelProblem(f, inner=ManyConstraints(g, lambda x, y: y.square() - 0.05)), X, Y0, {}),
    "sparse": (
        BilevelProblem(f, inner=ManyConstraints(g, constraints=lambda x: Polytope(G=ROWS, h=0.1 + x[:2]))),
        X,
        Y0,
        {},
    ),
    "fixed point": (BilevelProblem(f, fixed_point=lambda x, y: 0.3 * y.sin() + x), X, Y0, {}),
    "composite": (BilevelProblem(f, g, prox=lambda x: prox.L1(0.1 * x.exp())), X, Y0, {}),
    "own steps": (BilevelProblem(f, inner=Iteration(lambda x, y, k: y + 0.5 * (x - y).tanh(), steps=4)), X, Y0, {}),
    "module": (
        BilevelProblem(
            lambda x, y: NET(y, DATA).square().mean(),
            lambda x, y: (NET(y, DATA) - 1).square().mean() + x.exp().sum() * sum(v.square().sum() for v in y.values()),
        ),
        X,
        NET.params,
        {},
    ),
}
STEPS = Iterate(GradientDescent(0.2), max_steps=4)
# Every estimator of the library, built by hand, and the problem that it is for.
BUILT: dict[str, tuple[AbstractEstimator, str]] = {
    "AID": (AID(LBFGS(), CG()), "plain"),
    "AID, tasks": (AID(LBFGS(), CG()), "tasks"),
    "AID, encode": (AID(LBFGS(), CG()), "encode"),
    "AID, damped": (AID(LBFGS(), CG(), damping=0.1), "plain"),
    "AID, differences": (AID(LBFGS(), CG(), products=FiniteDifferences()), "plain"),
    "AID, constrained": (AID(QuadraticProgram(), GMRES()), "constrained"),
    "AID, composite": (AID(ProximalGradient(tol=1e-8), CG()), "composite"),
    "Certified": (Certified(AID(LBFGS(), CG()), 0.1, None, Constants(1.0, 3.0, 1.0, 0.0, 0.0, 0.0, C_G=3.0)), "plain"),
    "ITD": (ITD(STEPS, Reverse()), "plain"),
    "ITD, to a tolerance": (ITD(Iterate(GradientDescent(), 500, tol=1e-8, min_steps=1)), "tasks"),
    "ITD, composite": (ITD(ProximalGradient(max_steps=4, tol=None)), "composite"),
    "Checkpointed": (ITD(STEPS, Checkpointed()), "tasks"),
    "Forward": (ITD(STEPS, Forward()), "tasks"),
    "Truncated": (ITD(STEPS, Truncated(2)), "tasks"),
    "ESJ": (ESJ(STEPS, directions=2), "tasks"),
    "FiniteDifference": (FiniteDifference(LBFGS()), "tasks"),
    "FirstOrder": (FirstOrder(STEPS), "start in x"),
    "Reptile": (Reptile(STEPS), "start in x"),
    "KKT": (KKT(QuadraticProgram()), "constrained"),
    "AID, many": (AID(ProximalMultipliers(), MINRES()), "many"),
    "AID, sparse": (AID(SparseInteriorPoint(), SparseSaddle()), "sparse"),
    "FullKKT": (FullKKT(QuadraticProgram()), "constrained"),
    "Online": (Online(AID(LBFGS(), CG()), AID(LBFGS(0.0, 2), TruncatedCG(2))), "plain"),
    "Penalty": (Penalty(LBFGS(), extrapolate=True), "tasks"),
}
# torch compiles, and keeps what it compiled
ELSEWHERE = {CompiledITD}
INNER: dict[str, tuple[AbstractInnerSolver, str]] = {
    "LBFGS": (LBFGS(), "plain"),
    "Newton": (Newton(), "plain"),
    "NewtonPCG": (NewtonPCG(), "plain"),
    "ClosedForm": (ClosedForm(lambda x: x), "plain"),
    "Iterate": (STEPS, "plain"),
    "Iterate, line search": (Iterate(GradientDescent(), 20, line_search=Armijo()), "plain"),
    "Scipy": (Scipy(), "plain"),
    "QuadraticProgram": (QuadraticProgram(), "constrained"),
    "ProximalGradient": (ProximalGradient(), "composite"),
    "FISTA": (FISTA(), "composite"),
    "ADMM": (ADMM(), "composite"),
    "PrimalDual": (PrimalDual(), "composite"),
    "OwnSteps": (OwnSteps(), "own steps"),
    "ActiveSet": (ActiveSet(), "constrained"),
    "InteriorPoint": (InteriorPoint(), "nonlinear"),
    "ProximalMultipliers": (ProximalMultipliers(), "many"),
    "SparseInteriorPoint": (SparseInteriorPoint(), "sparse"),
    "SLSQP": (SLSQP(), "nonlinear"),
    "TrustConstr": (TrustConstr(), "nonlinear"),
    "FixedPointIteration": (FixedPointIteration(), "fixed point"),
    "Anderson": (Anderson(), "fixed point"),
    "Broyden": (Broyden(), "fixed point"),
}
# Of fixed points alone
LINEAR_OF_MAPS: dict[str, AbstractLinearSolver] = {"JacobianFree": JacobianFree(), "LinearAnderson": LinearAnderson()}
LINEAR: dict[str, AbstractLinearSolver] = {
    "CG": CG(),
    "CG, Jacobi": CG(preconditioner=Jacobi()),
    "CG, Nystrom": CG(preconditioner=NystromPreconditioner(2)),
    "CG, trusting": CG(recompute=False),
    "MINRES": MINRES(),
    "GMRES": GMRES(),
    "Dense": Dense(),
    "Neumann": Neumann(None, 20),
    "Nystrom": Nystrom(2),
    "NormalCG": NormalCG(),
    "BiCGStab": BiCGStab(),
    "TruncatedCG": TruncatedCG(3),
}
OUTER: dict[str, AbstractOptimizer | AbstractMinimizer | AbstractOuterDriver] = {
    "GradientDescent": GradientDescent(0.1),
    "HeavyBall": HeavyBall(0.1),
    "Nesterov": Nesterov(0.1),
    "Adam": Adam(0.1),
    "Clipped": Clipped(Adam(0.1), 1.0),
    "WeightDecay": WeightDecay(Adam(0.1), 0.01),
    "Scheduled": Scheduled(Adam(0.1), Cosine(10)),
    "Scheduled, decay": Scheduled(Adam(0.1), StepDecay(3)),
    "QuasiNewton": QuasiNewton(),
    "ScipyMinimize": ScipyMinimize("L-BFGS-B"),
    "TorchOptim": TorchOptim(lambda p: torch.optim.Adam(p, lr=0.1)),
}


def whole(module: Any, kind: type | tuple[type, ...]) -> set[type]:
    """The final classes of a kind that a module makes public."""
    kinds = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, kind)]
    return {each for each in kinds if not inspect.isabstract(each)}


def estimate(estimator: Any, on: str) -> Callable[[], Any]:
    problem, x, y0, options = PROBLEMS[on]
    return lambda: hypergradient(problem, x, y0, estimator=estimator, throw=False, **options)


def solve(algorithm: Any = None, outer: Any = None, estimator: Any = "implicit", steps: int = 4) -> Callable[[], Any]:
    if algorithm is not None:
        return lambda: minimize(PLAIN, X, Y0, algorithm=algorithm, max_steps=steps, throw=False)
    return lambda: minimize(PLAIN, X, Y0, estimator=estimator, outer=outer, max_steps=steps, throw=False)


def leaves_nothing(call: Callable[[], Any], cycles: bool = True) -> None:
    """Nothing is alive after a call but its result, which has no graph; and nothing when that is gone."""
    call()  # what is made once in a process
    left = left_by(call, but=(PROBLEMS, X, Y0, DATA))
    assert left.strays == []
    assert left.graphs == 0
    assert left.after == 0
    assert not cycles or left.cycles == []


def test_every_public_class_that_computes_is_in_these_tables() -> None:
    """So that a new one is tested."""
    built = {type(estimator) for estimator, _ in BUILT.values()}
    assert built == whole(bilevel, AbstractEstimator) - ELSEWHERE
    forms = {type(each.unrolling) for each, _ in BUILT.values() if isinstance(each, ITD)}
    assert forms == whole(bilevel, AbstractUnrolling)
    assert {type(each) for each, _ in INNER.values()} == whole(solvers, AbstractInnerSolver) - {
        solvers.Clarabel,
        solvers.Cvxpy,
        solvers.CoordinateDescent,
    }
    others = {type(each) for each in (*LINEAR.values(), *LINEAR_OF_MAPS.values())} | {
        SaddleCholesky,
        SparseSaddle,
    }  # those of KKT
    assert others == whole(solvers, AbstractLinearSolver)
    preconditioners = {type(each.preconditioner) for each in LINEAR.values() if isinstance(each, CG)} - {type(None)}
    assert preconditioners == whole(solvers, AbstractPreconditioner)
    assert {type(each) for each in OUTER.values()} == whole(
        solvers, (AbstractOptimizer, AbstractMinimizer, AbstractOuterDriver)
    )
    assert {type(each) for each in ALGORITHMS.values()} == whole(algorithms, AbstractAlgorithm)


ALGORITHMS: dict[str, AbstractAlgorithm[Any]] = {
    "SOBA": SOBA(0.2, 0.02),
    "SingleLoop": SingleLoop(0.2, 0.02, reduction=Storm(Power(0.5))),
    "MA-SOBA": MASOBA(0.2, 0.02),
    "SABA": SABA(0.2, 0.02),
    "SRBA": SRBA(0.2, 0.02, period=3),
    "SPABA": SPABA(0.2, 0.02, probability=0.3),
    "FdeHBO": FdeHBO(0.2, 0.02),
    "Turns": Turns(0.2, 0.02, inner_steps=2, linear_steps=2, reduction=Storm(Power(0.5))),
    "Nested": Nested(0.2, 0.02, inner_steps=2, period=3),
    "FSLA": FSLA(0.2, 0.02),
    "AmIGO": AmIGO(0.2, 0.02, None, 2, 2),
    "StocBiO": StocBiO(0.2, 0.02, None, 2, 2),
    "BSA": BSA(0.2, 0.02, None, 2, 2),
    "TTSA": TTSA(0.2, 0.02, None, 2),
    "MRBO": MRBO(0.2, 0.02, None, 2),
    "SUSTAIN": SUSTAIN(0.2, 0.02, None, 2),
    "VRBO": VRBO(0.2, 0.02, None, 2, 2, period=3),
    "F2SA": F2SA(0.2, 0.02, order=1),
    "F2SA of order 2": F2SA(0.2, 0.02, weight=20.0),
    "PBGD": PBGD(0.2, 0.02),
    "PBGD by gradients": PBGD(0.2, 0.02, form="gradient"),
    "BOME": BOME(0.2, 0.02),
    "MEHA": MEHA(0.2, 0.02),
    "SAMA": SAMA(Adam(0.1), 0.02),
    "ESJ-S": ESJS(0.2, 0.02, inner_steps=2, directions=3),
    "ScaleBiO": ScaleBiO(0.1, 0.02),
    "Descent": Descent(AID(LBFGS(), CG()), GradientDescent(0.1)),
    "AugmentedLagrangian": AugmentedLagrangian(
        Descent(AID(LBFGS(), CG()), GradientDescent(0.1)), inequalities=lambda x, y: x.sum() - 1
    ),
    "ValueFunction": ValueFunction(),
}
NAMED = [
    *((name, "tasks") for name in estimators() if name not in ("first-order", "kkt")),
    *(("implicit", on) for on in PROBLEMS if on not in ("start in x", "iterative", "own steps")),
    *(("itd", on) for on in ("chunks", "loop", "encode", "start in x", "iterative", "composite", "module")),
    *(("penalty", on) for on in ("chunks", "loop", "encode", "module")),
    ("first-order", "start in x"),
    ("kkt", "constrained"),
    ("esj", "iterative"),
]


@pytest.mark.parametrize(("name", "on"), NAMED)
def test_an_estimate_by_name_is_all_that_is_left_of_it(name: str, on: str) -> None:
    leaves_nothing(estimate(name, on))


@pytest.mark.parametrize(("estimator", "on"), BUILT.values(), ids=BUILT)
def test_an_estimate_is_all_that_is_left_of_it(estimator: AbstractEstimator, on: str) -> None:
    leaves_nothing(estimate(estimator, on))


@pytest.mark.parametrize(("inner", "on"), INNER.values(), ids=INNER)
def test_an_inner_solver_leaves_nothing(inner: AbstractInnerSolver, on: str) -> None:
    if on == "own steps":
        leaves_nothing(estimate(ITD(inner), on))
    else:
        leaves_nothing(estimate(AID(inner, GMRES()), on))


@pytest.mark.parametrize("linear", LINEAR.values(), ids=LINEAR)
def test_a_linear_solver_leaves_nothing(linear: AbstractLinearSolver) -> None:
    leaves_nothing(estimate(AID(LBFGS(), linear), "tasks"))


@pytest.mark.parametrize("linear", LINEAR_OF_MAPS.values(), ids=LINEAR_OF_MAPS)
def test_a_linear_solver_of_fixed_points_leaves_nothing(linear: AbstractLinearSolver) -> None:
    leaves_nothing(estimate(AID(Anderson(), linear), "fixed point"))


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
def test_a_solution_is_all_that_is_left_of_a_run(outer: Any) -> None:
    # torch's optimizers leave a function without tensors in a cycle, whenever they load a state
    leaves_nothing(solve(outer=outer), cycles=not isinstance(outer, TorchOptim))


@pytest.mark.parametrize("algorithm", [*available(), *ALGORITHMS.values()], ids=[*available(), *ALGORITHMS])
def test_a_solution_is_all_that_is_left_of_an_algorithm(algorithm: Any) -> None:
    # AdamW of torch, and what scipy makes of functions
    others = algorithm == "scalebio" or isinstance(algorithm, ScaleBiO | ValueFunction)
    leaves_nothing(solve(algorithm), cycles=not others)


def test_what_is_asked_of_an_estimate_later_leaves_nothing() -> None:
    def asked() -> Any:
        found = estimate("implicit", "tasks")()
        return found, found.start, found.error_estimate

    leaves_nothing(asked)


KNOWN = Constants(mu=1.0, L=3.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=3.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: check(PLAIN, X, Y0),
        lambda: compare(PLAIN, X, Y0, estimators=["aid-cg", "itd"]),
        lambda: certify(PLAIN, X, estimate("implicit", "plain")(), KNOWN),
        lambda: estimate_constants(PLAIN, X, Y0),
    ],
    ids=["check", "compare", "certify", "estimate_constants"],
)
def test_diagnoses_and_certificates_leave_nothing(call: Callable[[], Any]) -> None:
    leaves_nothing(call)


def test_a_differentiable_hyperobjective_keeps_no_graph_beyond_its_value() -> None:
    def twice() -> Any:
        phi, x = hyperobjective(PLAIN, Y0), X.clone().requires_grad_()
        for _ in range(2):
            phi(x).backward()  # type: ignore[no-untyped-call]
        return phi, x.grad

    leaves_nothing(twice)


@pytest.mark.parametrize("make", [maml, imaml])
def test_few_shot_training_leaves_what_was_trained(make: Any) -> None:
    learner = make(mlp((1, 4, 1)), mse_loss, inner_steps=2)
    tasks = Sinusoid()

    def run() -> Any:
        trained = train(learner, tasks, max_steps=2, batch=3, validation=Validating(tasks, episodes=4))
        return trained, evaluate(learner, trained.x, tasks, episodes=4), adapt(learner, trained.x, tasks.sample(3, 0))

    run()
    left = left_by(run, but=(learner, tasks))
    assert (left.strays, left.graphs, left.after, left.cycles) == ([], 0, 0, [])


def test_an_error_keeps_its_partial_result_and_no_graph() -> None:
    """Its traceback holds the frames that it came through, and these their variables."""
    calls: list[Callable[[], Any]] = [
        lambda: hypergradient(PLAIN, X + torch.nan, Y0),
        lambda: minimize(PLAIN, X + torch.nan, Y0, max_steps=3),
    ]

    def partial(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BilevelError as error:
            return error.partial

    for call in calls:
        with pytest.raises(BilevelError) as caught:
            call()
        frames = [entry.frame.f_locals for entry in caught.traceback[1:]]
        tensors = [each for variables in frames for each in variables.values() if isinstance(each, Tensor)]
        assert tensors != [] and not any(each.grad_fn is not None for each in tensors)
        leaves_nothing(lambda call=call: partial(call))  # type: ignore[misc]


def test_the_collector_is_what_these_tests_see() -> None:
    """A guard of the guard: a graph that is kept in a cycle is found by each of the three."""

    def leaky() -> Any:
        x = X.clone().requires_grad_()
        node: list[Any] = [x.square()]
        node.append(node)
        return node[0].detach()

    left = left_by(leaky)
    assert left.strays != [] and left.after > 0 and "list" in left.cycles
    kept = left_by(lambda: (X.clone().requires_grad_() * 2.0,))
    assert kept.graphs == 1


# Estimates hold what they say, and may be written to


def test_an_estimate_holds_y_v_h_and_x_once() -> None:
    problem, unit = _wide(SIZE), 8 * SIZE
    found = left_by(lambda: hypergradient(problem, _x(SIZE), _y(SIZE), estimator=_aid()), least=unit // 2)
    assert found.kept == 4 * unit


@pytest.mark.parametrize("steps", [0, 1])
def test_a_solution_is_no_alias_of_the_start_though_no_step_was_taken(steps: int) -> None:
    y0 = Y0.clone()
    found = hypergradient(PLAIN, X, y0, estimator=ITD(Iterate(GradientDescent(0.1), steps)), throw=False)
    found.y.fill_(7.0)
    assert bool((y0 == 0).all())
    start = Start(y0, y0)
    again = hypergradient(PLAIN, X, Y0, estimator=AID(_Standing(), CG()), start=start, throw=False)
    again.y.fill_(7.0)
    assert bool((y0 == 0).all())


class _Standing(AbstractInnerSolver):
    """A solver that returns the very start."""

    def solve(self, objective: Any, y0: Tensor) -> Any:
        return bilevel.Solved(y0, (bilevel.Status.successful,), torch.linalg.vector_norm(objective.gradient(y0)), 0)


def test_what_is_made_of_an_estimate_later_is_refused_once_that_was_written_to() -> None:
    found = estimate("implicit", "plain")()
    found.y.add_(1.0)
    with pytest.raises(ValueError, match=r"`Estimate.start` is made of `estimate.y`.*written to"):
        _ = found.start
    with pytest.raises(ValueError, match=r"`Estimate.error_estimate` is made of `estimate.y`"):
        _ = found.error_estimate
    found = estimate("implicit", "plain")()
    found.grad.zero_()
    _ = found.start
    with pytest.raises(ValueError, match=r"estimate.grad"):
        _ = found.error_estimate


def test_a_start_that_was_read_stays_what_it_was() -> None:
    found = estimate("implicit", "plain")()
    start, error = found.start, found.error_estimate
    before = start.y.clone()
    found.y.add_(1.0)
    assert torch.equal(found.start.y, before)
    assert math.isfinite(error)


def test_an_x_of_inference_mode_is_taken() -> None:
    with torch.inference_mode():
        x, y0 = X + 0.0, Y0 + 0.0
    assert torch.equal(hypergradient(PLAIN, x, y0).grad, hypergradient(PLAIN, X, Y0).grad)


# Peaks: in vectors of the size of y, against loops by hand in the same run

SIZE = 1000


def _x(n: int) -> Tensor:
    return torch.linspace(-0.5, 0.5, n)


def _y(n: int) -> Tensor:
    return torch.full((n,), 0.1)


def _wide(n: int) -> BilevelProblem:
    """x as long as y; a g that is not quadratic."""
    d = torch.linspace(1.0, 3.0, n)
    return BilevelProblem(
        lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (d * (y - x).square()).sum() / 2 + y.cosh().log().sum()
    )


def _narrow(n: int) -> BilevelProblem:
    """Two outer variables."""
    d = torch.linspace(1.0, 3.0, n)
    return BilevelProblem(
        lambda x, y: (y - 3).square().sum() / 2,
        lambda x, y: (d * (y - x[0]).square()).sum() / 2 + x[1].exp() * y.square().sum() / 2,
    )


def _aid() -> AID:
    return AID(Iterate(GradientDescent(0.2), 5), CG(rtol=0.0, max_steps=8))


class Hand:
    """The same methods as loops by hand, as careful of memory as they can be written in plain torch."""

    def __init__(self, problem: BilevelProblem, x: Tensor, y: Tensor) -> None:
        self.f, self.g, self.x, self.y = problem.f, problem.g, x, y

    def descend(self, steps: int, objective: Any = None, y: Tensor | None = None) -> Tensor:
        objective = self.g if objective is None else objective
        y = self.y if y is None else y
        for _ in range(steps):
            leaf = y.detach().requires_grad_()
            y = leaf.detach() - 0.2 * torch.autograd.grad(objective(self.x, leaf), leaf)[0]
            del leaf
        return y

    def implicit(self, y: Tensor, linear: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Any:
        x, y = self.x.detach().requires_grad_(), y.detach().requires_grad_()
        fx, b = torch.autograd.grad(self.f(x, y), (x, y), materialize_grads=True, allow_unused=True)
        gy = torch.autograd.grad(self.g(x, y), y, create_graph=True)[0]
        v = linear(lambda p: torch.autograd.grad(gy, y, p, retain_graph=True)[0], b)
        return fx - torch.autograd.grad(gy, x, v)[0], y.detach(), v

    def aid_cg(self) -> Any:
        return self.implicit(self.descend(5), lambda H, b: _cg(H, b, 8))

    def aid_neumann(self) -> Any:
        def neumann(H: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
            v, p = 0.2 * b, 0.2 * b
            for _ in range(7):
                p.sub_(H(p), alpha=0.2)
                v.add_(p)
            return v

        return self.implicit(self.descend(5), neumann)

    def aid_nystrom(self) -> Any:
        def nystrom(H: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
            n, k, rho = len(b), 3, 0.1
            C = b.new_empty(n, k)
            for j in range(k):
                C[:, j] = H(torch.nn.functional.one_hot(torch.tensor(j), n).to(b))
            values, W = torch.linalg.eigh(C[:k])
            U, sigma, _ = torch.linalg.svd(C @ (W * values.rsqrt()), full_matrices=False)
            inside = U.mT @ b
            v: Tensor = U @ (inside / (sigma.square() + rho)) + (b - U @ inside) / rho
            return v

        return self.implicit(self.descend(5), nystrom)

    def aid_lbfgs(self) -> Any:
        y = self.y.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([y], history_size=10, max_iter=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value: Tensor = self.g(self.x, y)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        y.grad = None
        optimizer.state.clear()
        return self.implicit(y, lambda H, b: _cg(H, b, 8))

    def itd(self) -> Any:
        x = self.x.detach().requires_grad_()
        y = self.y.detach().requires_grad_()
        for _ in range(9):
            y = y - 0.2 * torch.autograd.grad(self.g(x, y), y, create_graph=True)[0]
        return torch.autograd.grad(self.f(x, y), x)[0], y.detach()

    def checkpointed(self) -> Any:
        kept, y = [], self.y
        for k in range(9):
            if k % 3 == 0:
                kept.append(y)
            y = self.descend(1, y=y)
        end, x = y, self.x.detach().requires_grad_()
        leaf = y.detach().requires_grad_()
        h, a = torch.autograd.grad(self.f(x, leaf), (x, leaf), materialize_grads=True, allow_unused=True)
        del leaf, y
        for _ in range(3):
            between = [kept.pop()]
            while len(between) < 3:
                between.append(self.descend(1, y=between[-1]))
            while between:
                y = between.pop().detach().requires_grad_()
                new = y - 0.2 * torch.autograd.grad(self.g(x, y), y, create_graph=True)[0]
                in_x, a = torch.autograd.grad(new, (x, y), a)
                h = h + in_x
                del new, y, in_x
        return h, end

    def forward(self) -> Any:
        x, y, Z = self.x, self.y, self.x.new_zeros(len(self.x), len(self.y))
        for _ in range(9):
            leaf, at = y.detach().requires_grad_(), x.detach().requires_grad_()
            gx, gy = torch.autograd.grad(self.g(at, leaf), (at, leaf), create_graph=True)
            for i in range(len(x)):
                unit = torch.zeros_like(x)
                unit[i] = 1.0
                Z[i] -= 0.2 * torch.autograd.grad((gx, gy), leaf, (unit, Z[i].clone()), retain_graph=True)[0]
            y = y - 0.2 * gy.detach()
            del leaf, at, gx, gy
        leaf, at = y.detach().requires_grad_(), x.detach().requires_grad_()
        fx, fy = torch.autograd.grad(self.f(at, leaf), (at, leaf), materialize_grads=True, allow_unused=True)
        return fx + Z @ fy, y

    def penalty(self) -> Any:
        w = 50.0
        y = self.descend(5)
        y_w = self.descend(5, lambda x, y: self.g(x, y) + self.f(x, y) / w, y)
        x = self.x.detach().requires_grad_()
        apart = torch.autograd.grad(self.g(x, y_w), x)[0] - torch.autograd.grad(self.g(x, y), x)[0]
        fx = torch.autograd.grad(self.f(x, y_w) + 0.0 * x.sum(), x)[0]
        return fx + w * apart, y, y_w


def _cg(H: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    v, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = float(r @ r)
    for _ in range(steps):
        Hp = H(p)
        alpha = rr / float(p @ Hp)
        v.add_(p, alpha=alpha)
        r.sub_(Hp, alpha=alpha)
        del Hp
        before, rr = rr, float(r @ r)
        p.mul_(rr / before).add_(r)
    return v


_INNER9 = Iterate(GradientDescent(0.2), 9)
# The estimator, the loop by hand, and by how many vectors it may peak above it: for few x at first and later, and for
# as many x as y. What is above: the iterate of least residual that Neumann may have to go back to; the trial point of
# L-BFGS, which torch writes over its y; the gradients of f and g at both points of a penalty, of which its bias is
# estimated, and at first the solve that measures it.
PEAKS: dict[str, tuple[AbstractEstimator, str, tuple[int, int, int, int]]] = {
    "AID-CG": (_aid(), "aid_cg", (0, 0, 0, 0)),
    "AID-Neumann": (AID(Iterate(GradientDescent(0.2), 5), Neumann(0.2, 8)), "aid_neumann", (1, 1, 0, 0)),
    "AID-Nystrom": (AID(Iterate(GradientDescent(0.2), 5), Nystrom(3, damping=0.1)), "aid_nystrom", (0, 0, 0, 0)),
    "AID-CG, L-BFGS": (AID(LBFGS(1e-9, 20), CG(rtol=0.0, max_steps=8)), "aid_lbfgs", (1, 1, 1, 1)),
    "ITD": (ITD(_INNER9), "itd", (0, 0, 0, 0)),
    "ITD, checkpointed": (ITD(_INNER9, Checkpointed()), "checkpointed", (0, 0, 0, 0)),
    "ITD, forward": (ITD(_INNER9, Forward()), "forward", (0, 0, 0, 0)),
    "penalty": (Penalty(Iterate(GradientDescent(0.2), 5), weight=50.0), "penalty", (8, 3, 15, 8)),
}


def vectors(call: Callable[[], Any]) -> tuple[float, float]:
    """How many vectors of y a call peaks at, and how many it leaves."""
    call()
    left: Left = left_by(call, least=4 * SIZE, peaks=True)
    return left.peak / (8 * SIZE), left.kept / (8 * SIZE)


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", PEAKS)
@pytest.mark.parametrize("wide", [False, True], ids=["few x", "as many x"])
def test_an_estimate_peaks_at_what_the_loop_by_hand_takes(name: str, wide: bool, later: bool) -> None:
    if wide and name == "ITD, forward":
        pytest.skip("as many tangents as x")
    estimator, loop, more = PEAKS[name]
    problem = _wide(SIZE) if wide else _narrow(SIZE)
    x, y0 = _x(SIZE) if wide else torch.tensor([0.5, -0.5]), _y(SIZE)
    start = Start(y0, None, 3) if later else None
    ours = vectors(lambda: hypergradient(problem, x, y0, estimator=estimator, start=start, throw=False))
    hand = vectors(getattr(Hand(problem, x, y0), loop))
    assert ours[0] <= hand[0] + more[2 * wide + later]


# Runs


def growth(algorithm: Any, steps: int, **options: Any) -> list[tuple[int, int]]:
    """The count and the bytes of storages that are alive at the steps of a run, with the collector off."""
    seen = []
    with without_collector(), Live(peaks=False) as live:

        def callback(record: Any, found: Any) -> None:
            if record.step % max(steps // 10, 1) == 0:
                seen.append((live.count, live.bytes))

        minimize(
            *(PLAIN, X, Y0), algorithm=algorithm, max_steps=steps, callback=callback, throw=False, tol=0.0, **options
        )
    return seen[2:]  # optimizers' states are made on the way


CHEAP: dict[str, AbstractEstimator] = {
    "AID": AID(STEPS, CG(rtol=0.0, max_steps=2)),
    "ITD": ITD(STEPS),
    "Checkpointed": ITD(STEPS, Checkpointed()),
    "Forward": ITD(STEPS, Forward()),
    "Truncated": ITD(STEPS, Truncated(1)),
    "ESJ": ESJ(STEPS, directions=1),
    "FiniteDifference": FiniteDifference(STEPS),
    "Penalty": Penalty(STEPS, weight=100.0),
}
FEWER = {"vrbo": VRBO(0.2, 0.02, None, 2, 2, period=2)}  # by name it takes 22 inner steps of ten products each


@pytest.mark.parametrize("steps", [20, pytest.param(10_000, marks=pytest.mark.slow)])
# "auto" is the default on data that are the same at every step, and ends where it has arrived
@pytest.mark.parametrize("name", [*(name for name in available() if name != "auto"), *CHEAP])
def test_a_run_holds_no_more_after_many_steps_than_after_few(name: str, steps: int) -> None:
    algorithm: Any = Descent(CHEAP[name], GradientDescent(1e-3)) if name in CHEAP else name
    if name == "descent":
        algorithm = Descent(CHEAP["AID"], Adam(1e-3))
    if steps < 100:
        algorithm = FEWER.get(name, algorithm)
    seen = growth(algorithm, steps)
    assert len(seen) >= 7
    assert len(set(seen)) == 1, seen
