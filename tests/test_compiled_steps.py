"""Steps that are one program do what those by hand do; what cannot be one is refused, and nothing stale is reused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from torch import Tensor
from torch.nn.functional import softplus

from bilevel import AID, ITD, BilevelProblem, Box, FiniteSum, Polytope, Split, hypergradient, hyperobjective, minimize
from bilevel._result import BilevelError, Status
from bilevel.algorithms import F2SA, MASOBA, SABA, SOBA, Power
from bilevel.compiled import single_loop
from bilevel.compiled.code import Code
from bilevel.compiled.estimator import Compiled
from bilevel.compiled.programs import _KNOWN, folder, forget
from bilevel.compiled.refused import NotCompilableError
from bilevel.compiled.single_loop import compiled_loop
from bilevel.compiled.torch_inside import demand_compiler, loop
from bilevel.hypergrad.unrolling.forward import Forward
from bilevel.hypergrad.unrolling.truncated import Truncated
from bilevel.solvers import (
    CG,
    GMRES,
    LBFGS,
    Adam,
    Armijo,
    GradientDescent,
    HeavyBall,
    Iterate,
    Jacobi,
    Neumann,
    TorchOptim,
)

X, T = normal(12, 3, seed=1), normal(12, seed=2).sign()
x0, y0 = torch.full((3,), -1.0, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
GD = GradientDescent(0.5)


def g(x: Tensor, y: Tensor) -> Tensor:
    value: Tensor = softplus(-T * (X @ y)).mean() + (x.exp() * y.square()).sum() / 2
    return value


def f(x: Tensor, y: Tensor) -> Tensor:
    value: Tensor = softplus(-T * (X @ y)).mean() + 0.1 * x.square().sum()
    return value


logistic = BilevelProblem(f, g)
ESTIMATORS = [
    AID(Iterate(GD, 5), CG(rtol=0.0, max_steps=3)),
    AID(Iterate(GD, 200, tol=1e-9), CG(rtol=1e-8), damping=0.01),
    AID(Iterate(Adam(0.05), 5), CG(rtol=1e-3, recompute=False)),
    AID(Iterate(GD, 5), Neumann(0.5, 6)),
    AID(Iterate(GD, 5), Neumann(0.5, 60, rtol=1e-3)),
    ITD(Iterate(HeavyBall(0.2, 0.5), 5)),
    ITD(Iterate(Adam(0.05), 4), Truncated(2)),
]


def eager(estimator: Any) -> Compiled:
    return Compiled(estimator, backend="eager")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_estimate_by_a_program_is_the_estimate(estimator: Any) -> None:
    own = hypergradient(logistic, x0, y0, estimator=estimator)
    found = hypergradient(logistic, x0, y0, estimator=eager(estimator))
    assert distance(found.grad, own.grad) <= 1e-12
    assert found.value == pytest.approx(own.value, rel=1e-12)
    assert distance(found.y, own.y) <= 1e-12
    assert [(r.part, r.status, r.steps) for r in found.reports] == [(r.part, r.status, r.steps) for r in own.reports]
    assert (found.stats, found.substitute is None) == (own.stats, own.substitute is None)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_loop_of_a_program_hands_back_what_it_is_given(estimator: Any, monkeypatch: Any) -> None:
    """As the compiler asks of conditions and bodies, which running a graph as it is does not."""
    seen: list[int] = []

    def watched(going: Any, body: Any, carried: Any, fixed: Any) -> Any:
        def apart(part: Any, *inputs: Tensor) -> Any:
            found = part(*inputs)
            outputs = [found] if isinstance(found, Tensor) else list(found)
            assert not {id(each) for each in outputs} & {id(each) for each in inputs}
            assert len({id(each) for each in outputs}) == len(outputs)
            seen.append(len(outputs))
            return found

        return loop(functools.partial(apart, going), functools.partial(apart, body), carried, fixed)

    monkeypatch.setattr("bilevel.compiled.tracing.loop", watched)
    forget()
    hypergradient(logistic, x0, y0, estimator=eager(estimator))
    assert len(seen) >= 2


@pytest.mark.parametrize(("estimator", "outer"), [(ESTIMATORS[0], Adam(0.1)), (ESTIMATORS[5], GradientDescent(0.5))])
def test_a_run_by_programs_is_the_run(estimator: Any, outer: Any) -> None:
    box = Box(-1.2, 0.5)
    given: dict[str, Any] = {"outer": outer, "max_steps": 4, "constraint": box}
    own = minimize(logistic, x0, y0, estimator=estimator, **given)
    found = minimize(logistic, x0, y0, estimator=eager(estimator), compile=True, **given)
    assert distance(found.x, own.x) <= 1e-12
    assert found.best.step == own.best.step
    for ours, theirs in zip(found.history, own.history, strict=True):
        assert (ours.step, ours.status, ours.stats) == (theirs.step, theirs.status, theirs.stats)
        assert ours.value == pytest.approx(theirs.value, rel=1e-12)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-10)
    assert (found.status, found.converged) == (own.status, own.converged)


def test_a_watched_run_takes_the_same_steps_as_one_that_nobody_watches() -> None:
    seen: list[int] = []
    given: dict[str, Any] = {"estimator": eager(ESTIMATORS[1]), "outer": GD, "max_steps": 3, "compile": True}
    watched = minimize(logistic, x0, y0, callback=lambda record, _: seen.append(record.step), **given)
    assert seen == [0, 1, 2, 3]
    assert distance(watched.x, minimize(logistic, x0, y0, **given).x) <= 1e-12


def test_a_run_ends_at_its_tolerance() -> None:
    quadratic = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
    aid = eager(AID(Iterate(GradientDescent(1.0), 1), CG(rtol=0.0, max_steps=1)))
    found = minimize(quadratic, x0, y0, estimator=aid, outer=GD, max_steps=99, tol=1e-6, compile=True)
    assert found.converged
    assert distance(found.x, torch.full_like(x0, 3.0)) <= 1e-6
    assert len(found.history) < 40


@pytest.mark.parametrize(
    "estimator",
    [AID(Iterate(GradientDescent(0.1), 200, tol=1e-9), CG(rtol=1e-8)), ITD(Iterate(GradientDescent(0.1), 4))],
)
def test_with_tasks_each_row_stops_where_it_does_alone(estimator: Any) -> None:
    data = {"X": normal(3, 8, 2, seed=3), "t": normal(3, 8, seed=4) * torch.tensor([[1e-3], [1.0], [9.0]])}

    def loss(x: Any, y: Any, task: Any) -> Tensor:
        value: Tensor = (task["X"] @ y - task["t"]).square().mean() + (y - x).square().sum()
        return value

    of = BilevelProblem(lambda x, y, task: (task["X"] @ y - task["t"]).square().mean(), loss, tasks=True)
    x = normal(2, seed=5)
    own = hypergradient(of, x, x, estimator=estimator, data=data)
    found = hypergradient(of, x, x, estimator=eager(estimator), data=data)
    assert distance(found.grad, own.grad) <= 1e-12
    assert found.stats.inner_steps == own.stats.inner_steps
    assert [r.statuses for r in found.reports] == [r.statuses for r in own.reports]


def test_the_start_of_meta_learning_is_differentiated_through() -> None:
    maml = BilevelProblem(f, lambda x, y: softplus(-T * (X @ y)).mean(), init=lambda x: x)
    own = hypergradient(maml, x0, estimator=ITD(Iterate(GD, 3)))
    found = hypergradient(maml, x0, estimator=eager(ITD(Iterate(GD, 3))))
    assert distance(found.grad, own.grad) <= 1e-12
    assert found.stats == own.stats


def test_other_data_at_every_step_are_inputs() -> None:
    of = BilevelProblem(lambda x, y, b: f(x, y) * b.mean(), lambda x, y, b: g(x, y) + b.square().mean() * y.sum())
    given: dict[str, Any] = {"outer": GD, "max_steps": 3, "data": lambda k: normal(2, seed=k)}
    own = minimize(of, x0, y0, estimator=ESTIMATORS[0], **given)
    found = minimize(of, x0, y0, estimator=eager(ESTIMATORS[0]), compile=True, **given)
    assert distance(found.x, own.x) <= 1e-12


def test_phi_is_differentiable() -> None:
    x = x0.clone().requires_grad_()
    phi = hyperobjective(logistic, y0, estimator=eager(ESTIMATORS[0]), compile=True)(x)
    torch.autograd.backward(phi)
    assert x.grad is not None
    assert distance(x.grad, hypergradient(logistic, x0, y0, estimator=ESTIMATORS[0]).grad) <= 1e-12


@pytest.mark.parametrize(
    "algorithm",
    [
        SOBA(0.3, 0.05, schedule=Power()),
        MASOBA(0.3, 0.05, theta=0.2),
        SOBA(Adam(0.05), HeavyBall(0.05, 0.5), linear_step=0.3),
    ],
)
def test_a_single_loop_by_programs_is_the_loop(algorithm: Any) -> None:
    """On blocks of two sizes, whose last one weighs less, in a box."""

    def loss(x: Tensor, y: Tensor, b: Any) -> Tensor:
        value: Tensor = softplus(-b[1] * (b[0] @ y)).mean() + (x.exp() * y.square()).sum() / 2
        return value

    of = BilevelProblem(lambda x, y, b: softplus(-b[1] * (b[0] @ y)).mean() + 0.1 * x.square().sum(), loss)
    data = FiniteSum((X[:11], T[:11]), batch_size=4)
    given: dict[str, Any] = {"data": data, "max_steps": 7, "evaluate_every": 3, "constraint": Box(-1.1, 0.5)}
    own = minimize(of, x0, y0, algorithm=algorithm, **given)
    found = minimize(of, x0, y0, algorithm=compiled_loop(algorithm, "eager"), compile=True, **given)
    assert distance(found.x, own.x) <= 1e-12
    assert (found.stats, found.status) == (own.stats, own.status)
    assert [record.step for record in found.history] == [record.step for record in own.history]
    norms = [[record.grad_norm for record in run.history] for run in (found, own)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


def scaled(by: float, target: Tensor) -> BilevelProblem:
    return BilevelProblem(lambda x, y: by * (y - target).square().sum(), lambda x, y: (y - x).square().sum() / 2)


SWEEPS: list[dict[str, list[Any]]] = [
    {"outer_step": [0.02, 0.05, 0.3]},
    {"ratio": [1.0, 4.0], "inner_step": [0.1, 0.4]},
    {"linear_step": [0.05, 0.1], "outer_step": [0.02, 0.05]},  # two batches of two
]


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
@pytest.mark.parametrize("algorithm", [SOBA(0.1, 0.1), MASOBA(0.1, 0.1)], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("constraint", [None, Box(-1.05, -0.95)], ids=["free", "box"])
def test_a_sweep_by_programs_is_the_sweep(algorithm: Any, sweep: Any, constraint: Any, monkeypatch: Any) -> None:
    if type(algorithm).__name__ == "MASOBA" and "linear_step" in sweep:
        sweep = {"inner_step": [0.1, 0.2], "outer_step": [0.02, 0.05]}
    monkeypatch.setattr(single_loop, "compiled_loop", functools.partial(compiled_loop, backend="eager"))
    rows, evaluate = list[int](), single_loop.CompiledLoop.evaluate

    def noted(self: Any, oracle: Any, state: Any) -> Any:
        rows.append(len(state.x) if state.x.dim() > 1 else 1)
        return evaluate(self, oracle, state)

    monkeypatch.setattr(single_loop.CompiledLoop, "evaluate", noted)
    batch = {"X": X, "t": T}

    def loss(y: Tensor, b: Any) -> Tensor:
        value: Tensor = softplus(-b["t"] * (b["X"] @ y)).mean()
        return value

    of = BilevelProblem(lambda _, y, b: loss(y, b), lambda x, y, b: loss(y, b) + (x.exp() * y.square()).sum() / 2)

    def run(**more: Any) -> Any:
        data = Split(f=FiniteSum(batch, batch_size=4), g=FiniteSum(batch, batch_size=3))
        given = {"data": data, "max_steps": 12, "sweep": sweep, "sweep_steps": 5, "constraint": constraint}
        return minimize(of, x0, y0, algorithm=algorithm, **given, **more)

    eager = run()
    assert not rows
    found = run(compile=True)
    assert max(rows) > 1 and rows[-1] == 1  # rows of the sweep, and then the one that goes on
    assert distance(found.x, eager.x) <= 1e-12 and distance(found.y, eager.y) <= 1e-12
    assert [trial.chosen for trial in found.sweep] == [trial.chosen for trial in eager.sweep]
    for one, other in zip(found.sweep, eager.sweep, strict=True):
        assert one.settings == other.settings and one.value == pytest.approx(other.value, rel=1e-12)
    assert found.stats == eager.stats and found.status is eager.status


def test_a_sweep_over_tasks_by_programs_is_the_sweep(monkeypatch: Any) -> None:
    monkeypatch.setattr(single_loop, "compiled_loop", functools.partial(compiled_loop, backend="eager"))
    centers = normal(4, 3, seed=7)
    of = BilevelProblem(
        lambda _, y, c: (y - c).square().sum(), lambda x, y, c: (y - x - c).square().sum() / 2, tasks=True
    )

    def run(**more: Any) -> Any:
        return minimize(
            of, x0, y0, algorithm=SOBA(0.2, 0.1), data=centers, max_steps=8, sweep={"outer_step": [0.05, 0.2]}, **more
        )

    eager, found = run(), run(compile=True)
    assert distance(found.x, eager.x) <= 1e-12 and distance(found.y, eager.y) <= 1e-12
    assert found.stats == eager.stats


@pytest.mark.parametrize(
    ("algorithm", "sweep", "named"),
    [
        (SOBA(0.1, 0.1), {"outer_step": [0.02, 0.05], "seed": [0, 1]}, "seed"),
        (SOBA(0.1, Adam(0.1)), {"outer_step": [Adam(0.1), Adam(0.2)]}, "optimizer"),
        (SABA(0.1, 0.1), {"outer_step": [0.02, 0.05]}, "memory"),
    ],
)
def test_sweeps_that_are_no_programs_are_refused_by_name(algorithm: Any, sweep: Any, named: str) -> None:
    of = BilevelProblem(lambda _, y, b: (y - b).square().mean(), lambda x, y, b: (y - x - b).square().mean())
    data = FiniteSum(T, batch_size=4)
    one = torch.zeros((), dtype=torch.float64)
    with pytest.raises(NotCompilableError, match=named):
        minimize(of, one, one, algorithm=algorithm, data=data, max_steps=4, sweep=sweep, compile=True)


def test_another_captured_number_is_another_program_and_equal_code_the_same() -> None:
    forget()
    aid, target = eager(AID(Iterate(GradientDescent(1.0), 1), CG(rtol=0.0, max_steps=1))), torch.ones_like(x0)
    for by, programs in ((1.0, 1), (2.0, 2), (1.0, 2)):  # each a new closure of the same lambda
        found = hypergradient(scaled(by, target.clone()), x0, y0, estimator=aid)
        assert distance(found.grad, by * 2 * (x0 - target)) <= 1e-14
        assert len(_KNOWN) == programs


def test_what_is_written_to_a_captured_tensor_is_seen() -> None:
    aid, target = eager(AID(Iterate(GradientDescent(1.0), 1), CG(rtol=0.0, max_steps=1))), torch.ones_like(x0)
    of, number = scaled(1.0, target), torch.tensor(1.0)
    baked = BilevelProblem(lambda x, y: float(number) * y.square().sum(), lambda x, y: (y - x).square().sum() / 2)
    for value in (1.0, 5.0):
        target.fill_(value)
        number.fill_(value)
        assert distance(hypergradient(of, x0, y0, estimator=aid).grad, 2 * (x0 - value)) <= 1e-14
        assert distance(hypergradient(baked, x0, y0, estimator=aid).grad, value * 2 * x0) <= 1e-14


def test_arguments_that_are_the_same_tensor_are_arguments_of_their_own() -> None:
    """The program of one that was traced at x = y, and with the same tensor in two places of the data."""
    of = BilevelProblem(
        lambda x, y, d: ((y - d["a"]) * d["b"]).square().sum(), lambda x, y, d: (y - x * d["b"]).square().sum() / 2
    )
    aid = AID(Iterate(GD, 2), CG(rtol=0.0, max_steps=1))
    same = x0.clone()
    for x, y, data in ((same, same, {"a": same, "b": same}), (x0, y0, {"a": x0 + 1, "b": x0 * 2})):
        own = hypergradient(of, x, y, estimator=aid, data=data)
        assert distance(hypergradient(of, x, y, estimator=eager(aid), data=data).grad, own.grad) <= 1e-13


def test_a_program_that_is_not_its_estimator_is_no_success() -> None:
    """As of an f that looks at something which no key can tell."""
    count = iter(range(1, 9))
    fickle = BilevelProblem(lambda x, y: next(count) * f(x, y), g)
    with pytest.raises(BilevelError, match=r"compiled program|f, which gave"):
        hypergradient(fickle, x0, y0, estimator=eager(ESTIMATORS[0]))


def test_failures_are_told_of_as_ever() -> None:
    diverging = AID(Iterate(GradientDescent(1e3), 20), CG(rtol=0.0, max_steps=2))
    concave = BilevelProblem(lambda x, y: y.sum(), lambda x, y: -(y - x).square().sum() / 2)
    slow = AID(Iterate(GradientDescent(1e-3), 2, tol=1e-6), CG(rtol=1e-12, max_steps=1))
    for of, aid in ((logistic, diverging), (concave, ESTIMATORS[0]), (logistic, slow)):
        own = hypergradient(of, x0, y0, estimator=aid, throw=False)
        found = hypergradient(of, x0, y0, estimator=eager(aid), throw=False)
        assert [r.status for r in found.reports] == [r.status for r in own.reports]
        assert not found.status.ok
        run = minimize(of, x0, y0, estimator=eager(aid), outer=GD, max_steps=0, throw=False, compile=True)
        assert run.history[0].status is found.status
        with pytest.raises(BilevelError):
            minimize(of, x0, y0, estimator=eager(aid), outer=GD, max_steps=2, compile=True)


def test_a_value_that_is_not_finite_ends_the_run() -> None:
    lost = BilevelProblem(lambda x, y: f(x, y) / (x.sum() > -2.5), g)  # divided by zero at the start
    found = minimize(lost, x0, y0, estimator=eager(ESTIMATORS[0]), outer=GD, max_steps=2, throw=False, compile=True)
    assert found.status is Status.nonfinite
    assert len(found.history) == 1


REFUSED: list[tuple[Any, str]] = [
    (AID(LBFGS(), CG()), "inner=LBFGS"),
    (AID(Iterate(GradientDescent(), 3), CG()), "derived from the curvature"),
    (AID(Iterate(GD, 3, line_search=Armijo()), CG()), "line search"),
    (AID(Iterate(TorchOptim(lambda p: torch.optim.SGD(p, lr=0.1)), 3), CG()), "no tensor"),
    (AID(Iterate(GD, 3), GMRES()), "linear=GMRES"),
    (AID(Iterate(GD, 3), CG(preconditioner=Jacobi(torch.ones(3)))), "preconditioner"),
    (AID(Iterate(GD, 3), Neumann(None, 3)), "its step is derived"),
    (AID(Iterate(GD, 3), CG(), target_error=1e-3), "target_error"),
    (ITD(Iterate(GD, 3, tol=1e-3)), "what the derivative lacks"),
    (ITD(Iterate(GD, 3), Forward()), "Forward"),
    ("esj", "only `AID` and `ITD`"),
]


@pytest.mark.parametrize(("estimator", "reason"), REFUSED)
def test_what_is_no_fixed_program_is_refused_by_name(estimator: Any, reason: str) -> None:
    with pytest.raises(NotCompilableError, match=reason):
        hypergradient(logistic, x0, y0, estimator=estimator, compile=True)


def test_what_looks_at_values_is_refused_with_the_reason() -> None:
    branching = BilevelProblem(f, lambda x, y: g(x, y) if float(y.sum()) < 9 else 2 * g(x, y))
    dropping = BilevelProblem(f, lambda x, y: g(x, y) + 0 * torch.rand(()))
    bounded = BilevelProblem(f, g, constraints=lambda x: Polytope(lower=-0.5))
    for of, reason in ((branching, "value of a tensor"), (dropping, "random"), (bounded, "y is constrained")):
        estimator = eager(ESTIMATORS[0])
        with pytest.raises(ValueError, match=reason):
            hypergradient(of, x0, y0, estimator=estimator)
    for algorithm in (SABA(0.1, 0.1), F2SA(0.1, 0.1)):
        with pytest.raises(NotCompilableError, match=f"algorithm={type(algorithm).__name__}"):
            minimize(logistic, x0, y0, algorithm=algorithm, compile=True)
    outer = TorchOptim(lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(NotCompilableError, match="outer"):
        minimize(logistic, x0, y0, estimator=eager(ESTIMATORS[0]), outer=outer, compile=True)


def test_a_key_tells_code_and_values_and_not_objects() -> None:
    def key(by: float, size: int = 3) -> Any:
        of, at = scaled(by, torch.ones(3)), torch.zeros(size)
        from bilevel._flat import FlatProblem
        from bilevel._tree import ravel

        structure = ravel(at)[1]
        return Code.of(FlatProblem(of, structure, structure)).key(1.0)

    assert key(1.0) == key(1.0)
    assert len({str(each) for each in (key(1.0), key(2.0), key(1.0, 4))}) == 3


def test_data_of_two_levels_are_inputs_as_well() -> None:
    of = BilevelProblem(lambda x, y, b: f(x, y) * b.sum(), lambda x, y, b: g(x, y) + b.sum() * y.sum())
    data = Split(f=torch.ones(2), g=torch.full((3,), 0.1, dtype=torch.float64))
    own = hypergradient(of, x0, y0, estimator=ESTIMATORS[0], data=data)
    found = hypergradient(of, x0, y0, estimator=eager(ESTIMATORS[0]), data=data)
    assert distance(found.grad, own.grad) <= 1e-12


def test_programs_are_kept_where_no_one_else_writes(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("BILEVEL_CACHE_DIR", str(tmp_path))
    assert folder() == tmp_path / "programs"
    folder().chmod(0o777)
    with pytest.raises(NotCompilableError, match="others may write"):
        folder()


def test_where_there_is_no_compiler_the_error_names_what_is_missing(monkeypatch: Any) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(NotCompilableError, match=r"needs a compiler of C\+\+.*g\+\+"):
        demand_compiler()


@pytest.mark.slow  # some 20 seconds of compiling: pytest -m slow tests/test_compiled_steps.py
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("estimator", [*ESTIMATORS[:2], *ESTIMATORS[3:6]])
def test_a_step_by_the_compiler_is_the_step(
    estimator: Any, dtype: torch.dtype, limit: float, tmp_path: Any, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setenv("BILEVEL_CACHE_DIR", str(tmp_path))
    forget()
    features, signs = X.to(dtype), T.to(dtype)

    def loss(y: Tensor) -> Tensor:
        return softplus(-signs * (features @ y)).mean()

    of = BilevelProblem(lambda x, y: loss(y), lambda x, y: loss(y) + (x.exp() * y.square()).sum() / 2)
    x, y = x0.to(dtype), y0.to(dtype)
    if dtype == torch.float32 and isinstance(estimator, AID):
        estimator = AID(Iterate(GD, 20), estimator.linear if not isinstance(estimator.linear, CG) else CG(1e-4))
    if isinstance(estimator, AID) and isinstance(estimator.linear, Neumann):  # 60 terms are too few for this problem
        estimator = AID(estimator.inner, Neumann(0.5, 5000, rtol=1e-3))
    given: dict[str, Any] = {"estimator": estimator, "outer": Adam(0.1), "max_steps": 1}
    own, found = minimize(of, x, y, **given), minimize(of, x, y, compile=True, **given)
    assert float((found.x - own.x).norm() / own.x.norm()) <= limit
    assert float((found.estimate.grad - own.estimate.grad).norm() / own.estimate.grad.norm()) <= limit
    assert [record.status for record in found.history] == [record.status for record in own.history]
    assert any("has compiled" in message for message in caplog.messages)
    caplog.clear()
    forget()  # as another process: from the disk
    again = minimize(of, x, y, compile=True, **given)
    assert torch.equal(again.x, found.x)
    assert not any("compile" in message and "bilevel" in message for message in caplog.messages)
