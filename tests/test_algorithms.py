"""Whole algorithms: the interface, its data by role and number, names, and SOBA against its formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import pytest
import torch
from cases import bits, distance
from torch import Tensor

from bilevel import (
    AID,
    AbstractOuterDriver,
    BilevelError,
    BilevelProblem,
    Box,
    Polytope,
    Split,
    Stats,
    Status,
    hypergradient,
    hyperobjective,
    minimize,
    prox,
    register_algorithm,
)
from bilevel._calculus import inner_gradient_in_x, outer_gradients
from bilevel._estimate import FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.algorithms import (
    SABA,
    SOBA,
    AbstractAlgorithm,
    Descent,
    Draws,
    Evaluated,
    Oracle,
    Power,
    available,
    registry as registry_module,
)
from bilevel.inner_problems.kinds import inner_objective
from bilevel.outer.batches import sources
from bilevel.outer.encoding import decoded, encoded
from bilevel.problems.nested import nested
from bilevel.problems.quadratic import quadratic, random_quadratic
from bilevel.solvers.adam import Adam
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.scipy_minimize import ScipyMinimize
from bilevel.solvers.torch_optim import TorchOptim
from bilevel.testing import check_algorithm
from bilevel.testing.algorithms import algorithm_checks

AID_CG = AID(LBFGS(1e-10), CG(1e-10))
SQUARE = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)  # x* = 3
ZERO = torch.zeros(2)
LOOSE: Any = lambda kind: kind  # noqa: E731  (what a type checker would refuse is what is tried)
SINGLE_LOOP = SOBA(inner_step=0.5, outer_step=0.03)


def content(solution: Any) -> list[tuple[Any, ...]]:
    """The records without the wall-clock time."""
    return [(r.step, r.value, r.grad_norm, r.status, r.stats) for r in solution.history]


# A new algorithm in one file


@final
@dataclass(frozen=True, eq=False)
class Alternating(AbstractAlgorithm[tuple[Tensor, Tensor, float]]):
    """x <- x - s (grad_x f + grad_x g), then twice y <- y - r grad_y g: first order and biased, two batches of g."""

    inner_step: float
    outer_step: float

    @property
    def draws(self) -> Draws:
        return Draws(f=1, g=2)

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
        return x, y, 0.0

    def evaluate(self, oracle: Oracle, state: tuple[Tensor, Tensor, float]) -> Evaluated:
        x, y, _ = state
        value, fx, _ = outer_gradients(oracle.problem(), x, y)
        gx = inner_gradient_in_x(oracle.problem(), x, y)
        assert gx is not None
        return Evaluated(FlatEstimate(fx + gx, value, y, ()))

    def step(self, oracle: Oracle, state: tuple[Tensor, Tensor, float], found: Evaluated) -> Any:
        x, y, travelled = state
        x = x - self.outer_step * found.estimate.grad  # moves first; then both batches at the new x
        for number in range(2):
            y = y - self.inner_step * inner_objective(oracle.problem(g=number), x).gradient(y)
        return x, y, travelled + float(found.estimate.grad.norm())

    def stationarity(self, oracle: Oracle, state: Any, found: Evaluated) -> Tensor:
        return oracle.residual(state[0], found.estimate.grad)

    def point(self, state: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor]:
        return state[0], state[1]


NOISY = BilevelProblem(
    lambda x, y, b: ((y - b).square() + (x - b).square()).sum() / 2, lambda x, y, b: (y - x - b).square().sum() / 2
)


def test_an_algorithm_in_one_file_draws_its_batches_by_role_and_number_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    asked: list[int] = []

    def batch(index: int) -> Tensor:
        asked.append(index)
        return torch.tensor(float(index % 7))

    of_f = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]
    toy, steps = Alternating(0.3, 0.1), 9
    arguments: dict[str, Any] = {"algorithm": toy, "data": Split(f=of_f, g=batch)}
    whole = minimize(NOISY, ZERO, ZERO, **arguments, max_steps=steps)
    assert sorted(set(asked)) == list(range(2 * steps + 1))  # the last evaluation draws one
    x, y = ZERO, ZERO
    for k in range(steps):  # by hand
        x = x - 0.1 * (x - of_f[k % 3] - (y - x - 2 * k % 7))
        for number in range(2):
            y = y - 0.3 * (y - x - (2 * k + number) % 7)
    assert torch.allclose(whole.x, x, atol=1e-14)
    assert torch.allclose(whole.y, y, atol=1e-14)
    assert [record.stats.gradients for record in whole.history] == [1] + [3] * steps
    assert [record.stats.outer_gradients for record in whole.history] == [1] * (steps + 1)
    loader = [torch.tensor(float(k % 7)) for k in range(2 * steps + 2)]
    from_loader = minimize(NOISY, ZERO, ZERO, algorithm=toy, data=Split(f=of_f, g=loader), max_steps=steps)
    assert torch.equal(from_loader.x, whole.x)
    for stopped in (0, 1, 4):
        file = tmp_path / f"{stopped}.pt"
        minimize(NOISY, ZERO, ZERO, **arguments, max_steps=stopped, checkpoint=file)
        for data in (arguments["data"], Split(f=of_f, g=loader)):
            own: Any = True if data is arguments["data"] else "force"  # the same numbers, which nothing tells
            again = minimize(NOISY, ZERO, ZERO, algorithm=toy, data=data, max_steps=steps, checkpoint=file, resume=own)
            assert bits((again.x, again.y)) == bits((whole.x, whole.y))
            assert content(again) == content(whole)


def test_calls_of_a_step_count_for_the_next_record_also_across_an_interruption(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"

    def stop(record: Any, _: Any) -> None:
        if record.step == 3:
            raise KeyboardInterrupt

    toy = Alternating(0.3, 0.1)
    data = torch.tensor(1.0)
    whole = minimize(NOISY, ZERO, ZERO, algorithm=toy, data=data, max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        minimize(NOISY, ZERO, ZERO, algorithm=toy, data=data, max_steps=6, checkpoint=file, callback=stop)
    again = minimize(NOISY, ZERO, ZERO, algorithm=toy, data=data, max_steps=6, checkpoint=file, resume=True)
    assert content(again) == content(whole)
    assert again.stats == whole.stats == Stats(gradients=19, outer_gradients=7)


def test_an_algorithm_that_declares_nothing_is_refused_where_y_is_no_plain_minimizer() -> None:
    for options, why in (
        ({"constraints": lambda x: Polytope(upper=torch.ones(2))}, "y is constrained"),
        ({"iterative": True}, "declared `iterative`"),
        ({"prox": lambda x: prox.L1(x.exp().sum())}, "non-smooth"),
    ):
        problem = BilevelProblem(SQUARE.f, SQUARE.g, **LOOSE(options))
        with pytest.raises(ValueError, match=f"`Alternating` does not apply: .*{why}"):
            minimize(problem, ZERO, ZERO, algorithm=Alternating(0.3, 0.1))


# The oracle


def oracle_of(data: Any, draws: Draws, step: int = 0) -> Oracle:
    structure = ravel(torch.zeros(1))[1]
    return Oracle(FlatProblem(NOISY, structure, structure), sources(data), draws).at(step)


def test_batches_of_one_step_are_independent_of_the_order_in_which_they_are_drawn() -> None:
    loader = [torch.tensor(float(k)) for k in range(10)]
    for order in itertools.permutations(range(3)):
        oracle = oracle_of(loader, Draws(f=1, g=3), step=2)
        assert {number: float(oracle.draw("g", number)) for number in order} == {0: 6.0, 1: 7.0, 2: 8.0}
        assert float(oracle.draw("g", 0)) == 6.0
        assert float(oracle.at(3).draw("f", 0)) == 9.0


def test_a_batch_is_drawn_once_a_step_and_can_be_evaluated_anywhere() -> None:
    calls: list[int] = []

    def batch(index: int) -> Tensor:
        calls.append(index)
        return torch.tensor(float(index))

    oracle = oracle_of(batch, Draws(), step=4)
    assert oracle.draw("f") is oracle.draw("g")
    problem = oracle.problem()
    assert problem is oracle.problem()
    one = torch.ones(1)
    assert float(problem.g(one, 2 * one)) == float(problem.g(2 * one, 3 * one)) == 4.5
    assert calls == [4]


def test_numbers_that_are_not_declared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`Oracle.draw\('g', 2\)` needs a number below 2"):
        oracle_of(torch.ones(1), Draws(f=1, g=2)).draw("g", 2)


def test_the_whole_data_are_given_where_they_are_known_and_refused_where_not() -> None:
    both = torch.tensor([1.0, 2.0])
    assert torch.equal(oracle_of(both, Draws()).whole().data, both)
    split = oracle_of(Split(f=both, g=both + 1), Draws()).whole().data
    assert torch.equal(split.g, both + 1)
    for data, kind in (([both], "a loader"), (lambda step: both, "a callable"), (Split(f=both, g=[both]), "a loader")):
        with pytest.raises(ValueError, match=f"asks for the whole data.*{kind}.*or all samples as one batch"):
            oracle_of(data, Draws()).whole()


def test_different_numbers_of_shared_data_reach_f_and_g() -> None:
    problem = oracle_of([torch.tensor(1.0), torch.tensor(20.0)], Draws(f=1, g=2)).problem(f=0, g=1)
    zero = torch.zeros(1)
    assert (float(problem.f(zero, zero)), float(problem.g(zero, zero))) == (1.0, 200.0)
    plain = FlatProblem(SQUARE, problem.x, problem.y)
    without = Oracle(plain, sources(None), Draws(f=1, g=2)).problem(f=0, g=1)
    assert float(without.f(zero, zero)) == 4.5  # f and g take two arguments then


# States as plain data


class Pair(NamedTuple):
    """A named tuple."""

    a: Any
    b: Any


def test_a_state_of_any_structure_survives_a_file(tmp_path: Path) -> None:
    like = (Pair(Draws(), None), {"m": [torch.zeros(2), None], "deep": {}}, 0)
    state = (Pair(Draws(2, 3), torch.ones(2)), {"m": [torch.ones(2), 1.5], "deep": {3: "x"}}, 7)
    torch.save(encoded(state, like), tmp_path / "state.pt")
    read = decoded(torch.load(tmp_path / "state.pt", weights_only=True), like)
    assert read[0].a == Draws(2, 3)
    assert isinstance(read[0], Pair)
    assert torch.equal(read[0].b, torch.ones(2))
    assert (read[1]["m"][1], read[1]["deep"], read[2]) == (1.5, {3: "x"}, 7)


def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_written() -> None:
    with pytest.raises(TypeError, match=r"state\[0\] is a Draws where the algorithm's initial state has a NoneType"):
        encoded((Draws(),), (None,))
    with pytest.raises(TypeError, match=r"state\['a'\] is a Generator, which a checkpoint cannot hold"):
        encoded({"a": torch.Generator()}, {"a": None})
    with pytest.raises(ValueError, match=r"its state has \['a'\], this one \['b'\]"):
        decoded({"a": 1}, {"b": 1})


# `Descent` as a value


def test_descent_as_a_value_is_what_its_arguments_describe() -> None:
    instance = nested()
    sugar = minimize(instance.problem, instance.x0, instance.y0, estimator=AID_CG, outer=Adam(0.1), max_steps=6)
    value = minimize(instance.problem, instance.x0, instance.y0, algorithm=Descent(AID_CG, Adam(0.1)), max_steps=6)
    named = minimize(
        instance.problem, instance.x0, instance.y0, algorithm="descent", estimator=AID_CG, outer=Adam(0.1), max_steps=6
    )
    for other in (value, named):
        assert bits((other.x, other.y)) == bits((sugar.x, sugar.y))
        assert content(other) == content(sugar)


@pytest.mark.parametrize(
    "given",
    [
        {"estimator": "itd"},
        {"outer": Adam(0.1)},
        {"warm_start": True},
        {"accuracy": "fixed"},
        {"constants": lambda x: None},
        {"chunk_size": 2},
    ],
    ids=lambda given: next(iter(given)),
)
def test_arguments_of_descent_are_refused_beside_another_algorithm(given: dict[str, Any]) -> None:
    name = next(iter(given))
    for algorithm, shown in ((SOBA(0.5, 0.1), r"SOBA\(...\)"), ("soba", "'soba'")):
        with pytest.raises(
            ValueError, match=rf"`minimize\(algorithm={shown}\)` is a whole algorithm: `{name}=`.*`Descent`"
        ):
            minimize(SQUARE, ZERO, ZERO, algorithm=algorithm, **given)


def test_what_is_no_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no algorithm 'sobba'. Did you mean 'soba'\? Names: descent, soba"):
        minimize(SQUARE, ZERO, ZERO, algorithm="sobba")
    for wrong in (SOBA, Adam(0.1), 3):
        with pytest.raises(TypeError, match=r"must be an algorithm such as `SOBA\(0.1, 0.01\)` or a string"):
            minimize(SQUARE, ZERO, ZERO, algorithm=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`Descent\(estimator=...\)` must be an estimator such as"):
        Descent("aid-cg", Adam(0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`Descent\(outer=GradientDescent\(\)\)` needs a step size"):
        Descent(AID_CG, GradientDescent())


# Checkpoints


def test_checkpoints_of_the_first_format_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Its file held a descent's x, y, v and memory side by side, and no word of the algorithm."""
    file, instance = tmp_path / "state.pt", quadratic()
    for outer in (Adam(0.1), TorchOptim(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))):
        arguments: dict[str, Any] = {"estimator": AID_CG, "outer": outer}
        whole = minimize(instance.problem, instance.x0, instance.y0, **arguments, max_steps=8)
        minimize(instance.problem, instance.x0, instance.y0, **arguments, max_steps=3, checkpoint=file)
        now = torch.load(file, weights_only=True)
        settings = {name: now["settings"][name] for name in ("estimator", "outer", "constraint", "x", "y")}
        state = now["state"]
        old = {"format": 1, "settings": settings, "step": 3, "x": state["x"], "y": state["y"], "v": state["v"]}
        torch.save({**old, "count": 3, "memory": state["memory"], "history": now["history"]}, file)
        again = minimize(
            instance.problem, instance.x0, instance.y0, **arguments, max_steps=8, checkpoint=file, resume=True
        )
        assert bits((again.x, again.y)) == bits((whole.x, whole.y))
        assert content(again) == content(whole)
        torch.save({**old, "count": 3, "memory": state["memory"], "history": now["history"]}, file)
        with pytest.raises(ValueError, match="written with another outer optimizer or algorithm: its state has"):
            minimize(instance.problem, instance.x0, instance.y0, algorithm=SOBA(0.1, 0.1), checkpoint=file, resume=True)


def test_the_checkpoint_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    minimize(SQUARE, ZERO, ZERO, algorithm=SOBA(0.5, 0.1), max_steps=2, checkpoint=file)
    with pytest.raises(ValueError, match=r"algorithm was SOBA\(inner_step=0.5, .* and is descent\. Resume"):
        minimize(SQUARE, ZERO, ZERO, checkpoint=file, resume=True)
    with pytest.raises(ValueError, match=r"algorithm was SOBA\(.*0.1.*\) and is SOBA\(.*0.2.*\)"):
        minimize(SQUARE, ZERO, ZERO, algorithm=SOBA(0.5, 0.2), checkpoint=file, resume=True)
    minimize(SQUARE, ZERO, ZERO, max_steps=2, checkpoint=file)
    with pytest.raises(ValueError, match=r"algorithm was descent and is SOBA\("):
        minimize(SQUARE, ZERO, ZERO, algorithm=SOBA(0.5, 0.2), checkpoint=file, resume=True)


def test_warm_starts_of_tasks_are_resumed(tmp_path: Path) -> None:
    """y has a row for each task in the file, and is one task's at the start."""
    file = tmp_path / "state.pt"
    problem = BilevelProblem(
        lambda x, y, t: (y - t).square().sum(), lambda x, y, t: (y - x * t).square().sum(), tasks=True
    )
    arguments: dict[str, Any] = {"estimator": AID_CG, "data": torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.5, 0.2]])}
    whole = minimize(problem, ZERO, ZERO, **arguments, max_steps=6)
    minimize(problem, ZERO, ZERO, **arguments, max_steps=3, checkpoint=file)
    again = minimize(problem, ZERO, ZERO, **arguments, max_steps=6, checkpoint=file, resume=True)
    assert bits((again.x, again.y)) == bits((whole.x, whole.y))


# Drivers


def rosenbrock() -> BilevelProblem:
    return BilevelProblem(
        lambda x, y: (1 - y[0]).square() + 10 * (y[1] - y[0].square()).square(),
        lambda x, y: (y - x).square().sum() / 2 + (y - x).pow(4).sum(),
    )


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG", "SLSQP", "TNC", "trust-constr"])
def test_a_driver_is_resumed_bit_for_bit_by_replaying_its_evaluations(method: str, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    start, calls = torch.tensor([-1.2, 1.0]), [0]
    problem = rosenbrock()

    def f(x: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return problem.f(x, y)

    counted = BilevelProblem(f, problem.g)
    arguments: dict[str, Any] = {"estimator": AID_CG, "outer": ScipyMinimize(method), "tol": 1e-5, "throw": False}
    whole = minimize(counted, start, ZERO, **arguments)
    look = 4  # evaluations of f beside the first estimate
    most, told = calls[0] - look, list[int]()
    for stopped in (0, 1, 6):
        file = tmp_path / f"{stopped}.pt"

        def interrupt(record: Any, _: Any, stopped: int = stopped) -> None:
            if record.step == stopped:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            minimize(counted, start, ZERO, **arguments, callback=interrupt, checkpoint=file)
        calls[0] = 0
        told.clear()
        again = minimize(
            counted, start, ZERO, **arguments, checkpoint=file, resume=True,
            callback=lambda record, _: told.append(record.step),
        )  # fmt: skip
        assert told[0] == stopped
        assert calls[0] == most - stopped + (0 if stopped else look)
        assert bits((again.x, again.y, again.estimate.grad)) == bits((whole.x, whole.y, whole.estimate.grad))
        assert content(again) == content(whole)
        calls[0] = 0
        finished = minimize(counted, start, ZERO, **arguments, checkpoint=file, resume=True)
        assert calls[0] == 0
        assert content(finished) == content(whole)
        assert bits((finished.x, finished.y, finished.estimate.grad)) == bits((whole.x, whole.y, whole.estimate.grad))


@final
@dataclass(frozen=True)
class Averaging(AbstractOuterDriver):
    """Gradient descent that ends at the mean of its iterates: a point for which a longer run does not ask."""

    def drive(
        self, evaluate: Callable[[Tensor], tuple[float, Tensor]], x0: Tensor, *, bounds: Any, max_steps: int, tol: Any
    ) -> tuple[Tensor, Status]:
        x, total = x0, x0
        for _ in range(max_steps):
            x = x - 0.02 * evaluate(x)[1]
            total = total + x
        return total / (max_steps + 1), Status.successful


@pytest.mark.parametrize("outer", [ScipyMinimize(), Averaging()], ids=lambda outer: type(outer).__name__)
def test_a_driver_that_is_given_more_steps_goes_on_as_if_it_had_had_them(
    outer: AbstractOuterDriver, tmp_path: Path
) -> None:
    pytest.importorskip("scipy")
    start, file = torch.tensor([-1.2, 1.0]), tmp_path / "state.pt"
    arguments: dict[str, Any] = {"estimator": AID_CG, "outer": outer}
    whole = minimize(rosenbrock(), start, ZERO, **arguments, max_steps=20)
    minimize(rosenbrock(), start, ZERO, **arguments, max_steps=4, checkpoint=file)
    again = minimize(rosenbrock(), start, ZERO, **arguments, max_steps=20, checkpoint=file, resume=True)
    assert bits((again.x, again.y)) == bits((whole.x, whole.y))
    assert content(again) == content(whole)


def test_the_file_of_a_driver_and_that_of_an_algorithm_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    file = tmp_path / "state.pt"
    minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, outer=ScipyMinimize(), checkpoint=file)
    with pytest.raises(ValueError, match="it holds the evaluations of a method that runs its own loop"):
        minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, checkpoint=file, resume=True)
    minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, max_steps=1, checkpoint=file)
    with pytest.raises(ValueError, match="it holds a state, and this method runs its own loop"):
        minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, outer=ScipyMinimize(), checkpoint=file, resume=True)


def test_a_failed_driver_fails_again_when_it_is_resumed(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    problem = BilevelProblem(lambda x, y: -y.sum() + 0 * (1 - x).sqrt().sum(), SQUARE.g)
    arguments: dict[str, Any] = {"estimator": AID_CG, "outer": ScipyMinimize(), "checkpoint": tmp_path / "state.pt"}
    with pytest.raises(BilevelError) as first:
        minimize(problem, ZERO, ZERO, **arguments)
    with pytest.raises(BilevelError) as second:
        minimize(problem, ZERO, ZERO, **arguments, resume=True)
    assert first.value.status is second.value.status is Status.nonfinite
    assert str(first.value) == str(second.value)


# SOBA


def directions(problem: BilevelProblem, x: Tensor, y: Tensor, v: Tensor, data: Any = None) -> tuple[Tensor, ...]:
    """(d_y, d_v, d_x) of SOBA at a point."""
    flat = FlatProblem(problem, ravel(x)[1], ravel(y)[1])
    soba, oracle = SOBA(0.1, 0.1), Oracle(flat, sources(data))
    state = soba.init(oracle, x, y)
    found = soba.evaluate(oracle, type(state)(x, y, v))
    joint = found.kept.joint
    return joint.y, joint.v, joint.x


def test_the_directions_of_soba_at_the_solutions_are_zero_and_the_hypergradient() -> None:
    family = random_quadratic(3, 5, eigenvalues=[0.5, 1.0, 1.5, 2.0, 4.0], cross=0.4, seed=2)
    x = torch.tensor([0.3, -0.7, 1.1])
    y = family.solution(x)
    v = torch.linalg.solve(family.A, family.C @ (y - family.t) + family.E.T @ x)
    d_y, d_v, d_x = directions(BilevelProblem(family.f, family.g), x, y, v)
    assert float(d_y.norm()) <= 1e-14
    assert float(d_v.norm()) <= 1e-14
    assert float((d_x - family.gradient(x)).norm()) <= 1e-13


def test_the_mean_of_the_directions_over_all_pairs_of_samples_is_that_of_the_whole_data() -> None:
    generator = torch.Generator().manual_seed(3)
    Z, c = torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)
    U, d = torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator)
    problem = BilevelProblem(
        lambda x, y, batch: (batch[0] @ y - batch[1] * x.sum()).square().mean() / 2 + x.sum() * y.sum(),
        lambda x, y, batch: (batch[0] @ (x * y) - batch[1]).tanh().square().mean() + (x.exp() * y.square()).sum() / 2,
    )
    x, y, v = (torch.randn(3, generator=generator) for _ in range(3))

    def at(i: slice, j: slice) -> tuple[Tensor, ...]:
        return directions(problem, x, y, v, Split(f=(U[j], d[j]), g=(Z[i], c[i])))

    singles = [at(slice(i, i + 1), slice(j, j + 1)) for i in range(4) for j in range(5)]
    whole = at(slice(4), slice(5))
    for one, parts, all_of_them in zip(singles[0], zip(*singles, strict=True), whole, strict=True):
        assert float((torch.stack(parts).mean(0) - all_of_them).norm()) <= 1e-13
        assert float((one - all_of_them).norm()) > 1e-3  # one pair alone is not


def test_one_step_of_soba_moves_all_three_at_once() -> None:
    """By hand, with g = y^2 - x y and f = x y at x = 1, y = 2, v = 0, then a second step.

    d_y = 2 y - x, d_v = 2 v - x, d_x = y + v (G = -1). First: d = (3, -1, 2): y = 2 - .1 3 = 1.7, v = .1, x = 1 - .2 2.
    Second, at (.6, 1.7, .1): d = (2.8, -.4, 1.8).
    """
    problem = BilevelProblem(lambda x, y: x * y, lambda x, y: y.square() - x * y)
    seen: list[float] = []
    solution = minimize(
        problem, torch.tensor(1.0), torch.tensor(2.0), algorithm=SOBA(0.1, 0.2), max_steps=2,
        callback=lambda record, estimate: seen.append(float(estimate.grad)),
    )  # fmt: skip
    assert seen[:2] == pytest.approx([2.0, 1.8])
    assert float(solution.x) == pytest.approx(0.6 - 0.2 * 1.8)
    assert float(solution.y) == pytest.approx(1.7 - 0.1 * 2.8)
    assert float(ravel(solution.estimate.v)[0]) == pytest.approx(0.1 + 0.1 * 0.4)
    assert solution.history[0].grad_norm == pytest.approx((9 + 1 + 4) ** 0.5)


def test_soba_on_the_whole_data_reaches_the_minimizer_and_says_so() -> None:
    instance = quadratic()
    solution = minimize(instance.problem, instance.x0, instance.y0, algorithm=SOBA(0.1, 0.03), max_steps=3000, tol=1e-6)
    assert solution.status is Status.successful
    assert distance(solution.x, instance.minimizer) <= 1e-4
    assert instance.solution is not None
    assert distance(solution.y, instance.solution(solution.x)) <= 1e-6
    exact = hypergradient(instance.problem, solution.x, instance.y0, estimator=AID_CG)
    assert distance(solution.estimate.v, exact.v) <= 1e-5
    steps = len(solution.history)
    assert solution.stats == Stats(gradients=steps, hvps=steps, cross_products=steps, outer_gradients=steps)


def test_soba_does_not_call_the_start_stationary_where_only_d_x_vanishes() -> None:
    """v begins at zero, so that d_x = grad_x f = 0 although Phi(x) = (x - 3)^2 / 2."""
    solution = minimize(SQUARE, ZERO, ZERO, algorithm=SOBA(0.5, 0.1), max_steps=500, tol=1e-6)
    assert len(solution.history) > 10
    assert distance(solution.x, torch.full((2,), 3.0)) <= 1e-5


def test_soba_by_name_has_safe_steps_and_is_near_the_minimizer() -> None:
    for kappa in (1.5, 30.0):
        instance = quadratic(kappa=kappa)
        solution = minimize(instance.problem, instance.x0, instance.y0, algorithm="soba", max_steps=1500)
        assert solution.status is Status.steps_used_up
        assert distance(solution.x, instance.minimizer) < 0.02 * float(ravel(instance.minimizer)[0].norm())


def test_soba_keeps_x_in_its_constraint() -> None:
    box = Box(-1.0, 2.0)
    seen: list[Tensor] = []
    solution = minimize(
        SQUARE, ZERO + 9, ZERO, algorithm=SOBA(0.5, 0.1), constraint=box, max_steps=500, tol=1e-7,
        callback=lambda record, estimate: seen.append(estimate.x),
    )  # fmt: skip
    assert torch.equal(seen[0], ZERO + 2)
    assert all(float(x.max()) <= 2 for x in seen)
    assert torch.equal(solution.x, ZERO + 2)
    assert solution.status is Status.successful


def test_soba_takes_structures_tasks_and_schedules() -> None:
    instance = nested()
    solution = minimize(instance.problem, instance.x0, instance.y0, algorithm=SOBA(0.1, 0.05), max_steps=1500)
    estimate = hypergradient(instance.problem, solution.x, instance.y0, estimator=AID_CG)
    assert float(ravel(estimate.grad)[0].norm()) <= 1e-4
    problem = BilevelProblem(
        lambda x, y, t: (y - t).square().sum() / 2, lambda x, y, t: (y - x).square().sum() / 2, tasks=True
    )
    data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tasks = minimize(problem, ZERO, ZERO, algorithm=SOBA(0.5, 0.1), data=data, max_steps=400)
    assert distance(tasks.x, torch.tensor([2.0, 3.0])) <= 1e-6
    assert tasks.y.shape == (2, 2)
    once = SOBA(0.5, 0.1, schedule=lambda step: float(step == 0))
    moved, frozen = (minimize(SQUARE, ZERO, ZERO + 1, algorithm=once, max_steps=n) for n in (1, 5))
    assert bits((moved.x, moved.y, moved.estimate.v)) == bits((frozen.x, frozen.y, frozen.estimate.v))
    assert [Power(0.5, after=100)(step) for step in (0, 300)] == [1.0, 0.5]


def test_soba_refuses_what_it_would_get_wrong() -> None:
    for step in (0.0, -1.0, float("nan")):
        for name in ("inner_step", "outer_step", "linear_step"):
            with pytest.raises(ValueError, match=rf"`SOBA\({name}=...\)` must be positive"):
                SOBA(**LOOSE({"inner_step": 0.1, "outer_step": 0.1, name: step}))
    with pytest.raises(TypeError, match=r"`SOBA\(inner_step=...\)` must be a number"):
        SOBA("a", 0.1)  # type: ignore[arg-type]
    boxed = BilevelProblem(SQUARE.f, SQUARE.g, constraints=lambda x: Polytope(upper=torch.ones(2)))
    steps = BilevelProblem(SQUARE.f, SQUARE.g, iterative=True)
    start = BilevelProblem(SQUARE.f, lambda x, y: y.square().sum(), init=lambda x: x)
    for problem, why in (
        (boxed, "y is constrained"),
        (steps, "declared `iterative`"),
        (start, "only through its start"),
    ):
        for algorithm in (SOBA(0.1, 0.1), "soba"):
            with pytest.raises(ValueError, match=f"(`SOBA`|'soba') does not apply: .*{why}"):
                minimize(problem, ZERO, ZERO, algorithm=algorithm)


@pytest.mark.parametrize("throw", [True, False])
def test_divergence_of_soba_is_never_silent(throw: bool) -> None:
    arguments: dict[str, Any] = {"algorithm": SOBA(3.0, 0.1), "max_steps": 3000}
    if throw:
        with pytest.raises(BilevelError, match="the iterates: The iteration diverged") as caught:
            minimize(SQUARE, ZERO, ZERO, **arguments)
        assert caught.value.status is Status.diverged
    else:
        found = minimize(SQUARE, ZERO, ZERO, **arguments, throw=False)
        assert found.status is Status.diverged and found.history[-1].step < 100


def test_soba_reports_an_iterate_that_is_lost_where_neither_f_nor_d_x_sees_it() -> None:
    problem = BilevelProblem(
        lambda x, y: (y[0] - 3).square(), lambda x, y: (y[0] - x[0]).square() / 2 + 20 * (y[1] - x[1]).square()
    )
    solution = minimize(problem, ZERO + 1, ZERO, algorithm=SOBA(0.5, 0.01), max_steps=3000, throw=False)
    assert solution.status is Status.diverged
    assert solution.value < 10
    assert "the iterates" in solution.message


# Names


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_REGISTERED", dict(registry_module._REGISTERED))


@pytest.mark.usefixtures("names")
def test_an_algorithm_of_ones_own_has_a_name() -> None:
    assert {"descent", "soba"} <= available().keys()
    register_algorithm("mine", lambda setting: SOBA(0.5, 0.1 / len(setting.x)), "SOBA again")
    assert available()["mine"] == "SOBA again"
    by_name = minimize(SQUARE, ZERO, ZERO, algorithm="mine", max_steps=3)
    assert torch.equal(by_name.x, minimize(SQUARE, ZERO, ZERO, algorithm=SOBA(0.5, 0.05), max_steps=3).x)
    for name in ("mine", "soba", "descent", "auto", "implicit"):
        with pytest.raises(ValueError, match=f"`register_algorithm` has no name twice: '{name}' is"):
            register_algorithm(name, lambda setting: SOBA(0.1, 0.1), "another")
    with pytest.raises(TypeError, match=r"`register_algorithm\(build=...\)` must be a function of a setting. Got SOBA"):
        register_algorithm("other", LOOSE(SOBA(0.1, 0.1)), "a value")
    with pytest.raises(TypeError, match=r"must be a function of a setting\. Got the class SOBA itself"):
        register_algorithm("other", LOOSE(SOBA), "a class")
    with pytest.raises(TypeError, match=r"Got a function of the arguments \(\)"):
        register_algorithm("other", LOOSE(lambda: SOBA(0.1, 0.1)), "of nothing")
    for wrong in ("two words", ""):
        with pytest.raises(ValueError, match=r"`register_algorithm\(name=...\)` must be one word"):
            register_algorithm(wrong, lambda setting: SOBA(0.1, 0.1), "another")
    with pytest.raises(ValueError, match=r"`register_algorithm\(description=...\)` must be one line"):
        register_algorithm("other", lambda setting: SOBA(0.1, 0.1), "two\nlines")
    register_algorithm("other", lambda setting: LOOSE(3), "no algorithm")
    with pytest.raises(TypeError, match="'other' was registered with must return an algorithm"):
        minimize(SQUARE, ZERO, ZERO, algorithm="other")


def test_one_setting_of_descent_belongs_and_two_belong_to_it() -> None:
    given: dict[str, Any] = {"estimator": "aid-cg"}
    with pytest.raises(ValueError, match=r"`estimator=` belongs to `Descent`\. Leave it out"):
        minimize(SQUARE, ZERO, ZERO, algorithm=SOBA(0.1, 0.1), **given)
    with pytest.raises(ValueError, match=r"`estimator=`, `chunk_size=` belong to `Descent`\. Leave them out"):
        minimize(SQUARE, ZERO, ZERO, algorithm=SOBA(0.1, 0.1), chunk_size=1, **given)


# The start of y


def test_y0_may_be_left_out_where_the_problem_has_init() -> None:
    problem = BilevelProblem(SQUARE.f, SQUARE.g, init=lambda x: 2 * x)
    given = minimize(problem, ZERO + 1, ZERO, estimator="itd", max_steps=3)
    assert torch.equal(minimize(problem, ZERO + 1, estimator="itd", max_steps=3).x, given.x)
    tasks = BilevelProblem(
        lambda x, y, t: (y["a"] - t).square().sum(),
        lambda x, y, t: (y["a"] - x).square().sum(),
        init=lambda x, t: {"a": x + 0 * t},
        tasks=True,
    )
    data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = minimize(tasks, ZERO, estimator="itd", data=data, max_steps=2)
    assert found.y["a"].shape == (3, 2)
    assert torch.equal(found.x, minimize(tasks, ZERO, {"a": ZERO}, estimator="itd", data=data, max_steps=2).x)
    with pytest.raises(ValueError, match=r"`minimize\(y0=...\)` may be left out only where the problem has `init`"):
        minimize(SQUARE, ZERO)


def test_one_hypergradient_starts_at_init_too() -> None:
    problem = BilevelProblem(SQUARE.f, SQUARE.g, init=lambda x: 2 * x)
    found = hypergradient(problem, ZERO + 1, estimator="one-step")
    assert torch.equal(found.grad, hypergradient(problem, ZERO + 1, ZERO, estimator="one-step").grad)
    x = (ZERO + 1).requires_grad_()
    hyperobjective(problem, estimator="one-step")(x).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, found.grad)
    tasks = BilevelProblem(
        lambda x, y, t: (y["a"] - t).square().sum(),
        lambda x, y, t: (y["a"] - x["b"] - t.mean()).square().sum(),
        init=lambda x, t: {"a": x["b"] + 0 * t},
        encode=lambda x, t: {"b": 2 * x},
        tasks=True,
    )
    data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    for batch in (data, Split(f=data, g=data + 1)):
        found = hypergradient(tasks, ZERO, data=batch)
        assert found.y["a"].shape == (3, 2)
        assert torch.equal(found.grad, hypergradient(tasks, ZERO, {"a": ZERO}, data=batch).grad)
    with pytest.raises(
        ValueError, match=r"`hypergradient\(y0=...\)` may be left out only where the problem has `init`"
    ):
        hypergradient(SQUARE, ZERO)
    with pytest.raises(
        ValueError, match=r"`hyperobjective\(y0=...\)` may be left out only where the problem has `init`"
    ):
        hyperobjective(SQUARE)(ZERO)


# The testing kit


CHECKED: dict[str, tuple[AbstractAlgorithm[Any], int]] = {
    "soba": (SINGLE_LOOP, 600),
    "saba": (SABA(0.5, 0.02), 600),
    "descent": (Descent(AID_CG, GradientDescent(0.2)), 60),
}
PER_SAMPLE = {"soba": 4, "saba": 4}


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{name}-{part}")
        for name, (algorithm, steps) in CHECKED.items()
        for part, check in algorithm_checks(
            algorithm, max_steps=steps, whole=name == "saba", calls=PER_SAMPLE.get(name)
        )
    ],
)
def test_algorithms_pass_the_kit(check: Callable[[], None]) -> None:
    check()


def test_an_algorithm_without_the_implicit_term_passes_as_a_biased_one() -> None:
    check_algorithm(Alternating(0.3, 0.1), exact=False)
    with pytest.raises(AssertionError, match="convergence: found"):
        check_algorithm(Alternating(0.3, 0.1), max_steps=50)
    with pytest.raises(TypeError, match="must be an algorithm"):
        check_algorithm("soba")  # type: ignore[arg-type]


@final
@dataclass(frozen=True, eq=False)
class Wrong(AbstractAlgorithm[Any]):
    """SOBA, with `wrong` with it."""

    wrong: str
    memory: list[int]

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Any:
        if self.wrong == "in place":
            y = y.add_(1)
        return SINGLE_LOOP.init(oracle, x, y)

    def evaluate(self, oracle: Oracle, state: Any) -> Evaluated:
        found = SINGLE_LOOP.evaluate(oracle, state)
        h = found.estimate
        if self.wrong == "random":
            h = FlatEstimate(h.grad + torch.randn(h.grad.shape), h.value, h.y, h.reports, h.v)
        if self.wrong == "hides NaN":
            h = FlatEstimate(h.grad.nan_to_num(), h.value.nan_to_num(), h.y, (), h.v)
        if self.wrong == "counts nothing":
            oracle.like.tally.clear()
        return Evaluated(h, found.kept)

    def step(self, oracle: Oracle, state: Any, found: Evaluated) -> Any:
        after = SINGLE_LOOP.step(oracle, state, found)
        if self.wrong == "in place state":
            state.x.add_(0.1)
        if self.wrong == "heeds the number of blocks":
            late = oracle.block("g").samples == 7 and oracle.step > 2
            return type(after)(after.x, 0.9 * after.y if late else after.y, after.v)
        if self.wrong == "one call more":
            oracle.problem().tally.gradients += 1
        if self.wrong == "memory of its own":
            self.memory.append(1)
            return type(after)(after.x, after.y * 0.9 ** (len(self.memory) % 5), after.v)
        return after

    def stationarity(self, oracle: Oracle, state: Any, found: Evaluated) -> Tensor:
        return oracle.residual(state.x, found.estimate.grad)

    def point(self, state: Any) -> tuple[Tensor, Tensor]:
        return state.x, state.y


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("random", "same bits: found|one state, one step"),
        ("in place state", "one state, one step: found"),
        ("memory of its own", "same bits: found|one state, one step"),
        ("hides NaN", "NaN is reported: found the status steps_used_up"),
        ("counts nothing", "counts: found"),
        ("heeds the number of blocks", "one block: x: found"),
        ("one call more", "calls by sample: found 15 for 3 samples, expected 4"),
    ],
)
def test_a_wrong_algorithm_is_caught_by_name(wrong: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_algorithm(Wrong(wrong, []), exact=False, calls=4)
