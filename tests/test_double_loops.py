"""Loops in turns, nested loops and Neumann directions: unbiased, the iterations of their papers, counted, resumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor

from bilevel import (
    BilevelProblem,
    Box,
    Constants,
    FiniteDifferences,
    FiniteSum,
    LinearOperator,
    Split,
    Status,
    bounds,
    error_bound,
    minimize,
)
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.algorithms import (
    BSA,
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AbstractAlgorithm,
    AmIGO,
    Coupled,
    Evaluated,
    HeavyBallSystem,
    MovingAverage,
    Neumann,
    Oracle,
    Power,
    RandomizedNeumann,
    Sarah,
    SingleLoop,
    StocBiO,
    Storm,
    Turns,
    accbio,
    aid_bio,
    hoag,
    itd_bio,
)
from bilevel.algorithms.engine.direction import Drawn
from bilevel.algorithms.engine.recursive import Past
from bilevel.extending import AbstractData, AbstractDirection, Block, Draws, Joint
from bilevel.outer.batches import sources
from bilevel.solvers import CG, LBFGS, Adam, Dense, GradientDescent, Iterate, TorchOptim
from bilevel.testing import check_algorithm

P, Q = 2, 3
LOOSE: Any = lambda value: value  # noqa: E731
X, Y = torch.full((P,), 0.5, dtype=torch.float64), torch.zeros(Q, dtype=torch.float64)


def samples(n: int, seed: int) -> tuple[Tensor, ...]:
    """Of sums of rank-one quadratics: u, w, c, e, a, b of g_i = (u y)^2/2 + (w x)^2/2 + (c x)(e y) + a y + b x."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, size, generator=generator, dtype=torch.float64) * 0.7 for size in (Q, P, P, Q, Q, P))


def objective(x: Tensor, y: Tensor, data: tuple[Tensor, ...]) -> Tensor:
    u, w, c, e, a, b = data
    terms: Tensor = (u @ y).square() / 2 + (w @ x).square() / 2 + 0.3 * (c @ x) * (e @ y) + a @ y + b @ x
    found: Tensor = terms.mean() + (y.square().sum() + x.square().sum()) / 2
    return found


PROBLEM = BilevelProblem(objective, objective)
OF_G, OF_F = samples(5, 0), samples(3, 1)  # a block of 3 and one of 2; one of 2 and one of 1


def split(order: Any = "shuffle") -> Split:
    return Split(g=FiniteSum(OF_G, 3, order), f=FiniteSum(OF_F, 2, order))


@dataclass(frozen=True)
class Parts:
    """Second derivatives and gradients of a mean over samples, times a factor, in closed form."""

    data: tuple[Tensor, ...]
    scale: float = 1.0

    @property
    def H(self) -> Tensor:  # noqa: N802
        return self.scale * (self.data[0].T @ self.data[0] / len(self.data[0]) + torch.eye(Q).double())

    @property
    def C(self) -> Tensor:  # noqa: N802
        return self.scale * 0.3 * self.data[2].T @ self.data[3] / len(self.data[2])

    def in_y(self, x: Tensor, y: Tensor) -> Tensor:
        return self.H @ y + self.C.T @ x + self.scale * self.data[4].mean(0)

    def in_x(self, x: Tensor, y: Tensor) -> Tensor:
        w, b = self.data[1], self.data[5]
        return self.C @ y + self.scale * (w.T @ (w @ x) / len(w) + x + b.mean(0))


G, F = Parts(OF_G), Parts(OF_F)


def series(terms: int, step: float, fy: Tensor) -> Tensor:
    """step sum_{k < terms} (I - step H)^k fy."""
    factor = torch.eye(Q).double() - step * G.H
    found: Tensor = torch.stack([torch.linalg.matrix_power(factor, k) @ fy for k in range(terms)]).sum(0)
    return step * found


def neumann(terms: int, step: float, at: Joint) -> Joint:
    """The direction of `Neumann` on all the data."""
    v = series(terms, step, F.in_y(at.x, at.y))
    return Joint(F.in_x(at.x, at.y) - G.C @ v, G.in_y(at.x, at.y), None)


def everywhere(at: Joint) -> Tensor:
    """D_x on all the data at (x, y, v)."""
    assert at.v is not None
    return F.in_x(at.x, at.y) - G.C @ at.v


def oracle(data: Any, algorithm: Any = None, step: int = 0) -> Oracle:
    flat = FlatProblem(PROBLEM, ravel(X, "x")[1], ravel(Y, "y")[1])
    return Oracle(flat, sources(data), Draws() if algorithm is None else algorithm.draws, step=step)


def point(seed: int) -> Joint:
    generator = torch.Generator().manual_seed(seed)
    return Joint(*(torch.randn(size, generator=generator, dtype=torch.float64) for size in (P, Q, Q)))


def close(one: Any, other: Any, tolerance: float = 1e-11) -> None:
    for left, right in zip(one, other, strict=True):
        if left is not None or right is not None:
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def mean(directions: list[Joint]) -> Joint:
    x, y = (torch.stack([d[k] for d in directions]).mean(0) for k in (0, 1))  # type: ignore[misc]
    return Joint(x, y, None)


@final
@dataclass(frozen=True, eq=False)
class Scripted(AbstractData):
    """The blocks of a sum in an order that is written down."""

    of: FiniteSum
    numbers: tuple[int, ...]

    def batch(self, index: int, first: int) -> Any:
        return self.block(index, first).data

    def block(self, index: int, first: int) -> Block:
        return self.of.block_number(self.numbers[index - first])

    def whole(self) -> Any:
        return self.of.whole()


@final
@dataclass(frozen=True)
class Always:
    """A coin that falls on one number."""

    number: int

    def __call__(self, seed: int, below: int) -> int:
        assert 0 <= self.number < below
        return self.number


def sequences(direction: AbstractDirection) -> list[Oracle]:
    """An oracle for every sequence of blocks that a direction may be formed from."""
    f, g = split().f, split().g
    return [
        oracle(Split(f=Scripted(f, (i,)), g=Scripted(g, numbers)), direction)
        for i in range(f.blocks)
        for numbers in itertools.product(range(g.blocks), repeat=direction.draws.g)
    ]


# ---------------------------------------------------------------------------------------------------------- directions


def test_the_mean_of_a_neumann_direction_over_all_sequences_of_blocks_is_that_of_the_series() -> None:
    at, direction = point(0), Neumann(3, 0.4)
    found = [direction.on_batches(each, at)[0] for each in sequences(direction)]
    assert len(found) == 2 * 8
    close(mean(found), neumann(3, 0.4, at))
    close(direction.on_everything(oracle(split()), at)[0], neumann(3, 0.4, at))
    alone = [direction.outer(Drawn.batches(each), at)[0] for each in sequences(direction)]
    close(alone, [d.x for d in found])


def test_a_random_term_over_all_numbers_and_sequences_of_blocks_has_the_mean_of_the_series() -> None:
    at, direction, found = point(1), RandomizedNeumann(3, 0.4), []
    for k in range(3):
        for each in sequences(direction):
            drawn = Drawn.batches(each)._replace(chance=Always(k))
            found.append(direction.joint(drawn, at)[0])
    close(mean(found), neumann(3, 0.4, at))
    close(direction.on_everything(oracle(split()), at)[0], neumann(3, 0.4, at))


def test_the_random_term_is_uniform_a_function_of_seed_and_step_and_the_same_at_every_point() -> None:
    direction = RandomizedNeumann(4, 0.4, seed=5)
    drawn = [chance(Drawn.batches(oracle(split(), direction, step)))(5, 4) for step in range(100)]
    assert all(15 <= drawn.count(k) <= 35 for k in range(4))
    assert drawn == [chance(Drawn.batches(oracle(split(), direction, step)))(5, 4) for step in range(100)]
    assert drawn != [chance(Drawn.batches(oracle(split(), direction, step)))(6, 4) for step in range(100)]
    later = [chance(Drawn.batches(oracle(split(), direction, step), g=3))(5, 4) for step in range(100)]
    assert drawn != later and all(15 <= later.count(k) <= 35 for k in range(4))
    linear = [direction.on_batches(oracle(split("full"), direction), at)[0] for at in (point(2), point(3))]
    k = chance(Drawn.batches(oracle(split("full"), direction)))(5, 4)
    factor = torch.linalg.matrix_power(torch.eye(Q).double() - 0.4 * G.H, k)
    for d, at in zip(linear, (point(2), point(3)), strict=True):
        v = 4 * 0.4 * factor @ F.in_y(at.x, at.y)
        close((d.x,), (F.in_x(at.x, at.y) - G.C @ v,))


def chance(drawn: Drawn) -> Callable[[int, int], int]:
    assert drawn.chance is not None
    return drawn.chance


@pytest.mark.parametrize("make", [Neumann, RandomizedNeumann])
def test_by_differences_a_direction_is_itself_on_a_quadratic(make: Any) -> None:
    at = point(4)
    for step in range(3):
        exact, differences = (
            make(3, 0.4, products=products).on_batches(oracle(split(), make(3, 0.4), step), at)[0]
            for products in (Coupled().products, FiniteDifferences())
        )
        close(exact, differences, 1e-7)


@pytest.mark.parametrize("e", [0.0, 0.3, 1.0])
def test_the_error_of_recursive_momenta_shrinks_by_one_minus_e_in_the_mean(e: float) -> None:
    direction, at, old, d = Neumann(3, 0.4), point(5), point(6), point(7)
    memory = Past.of(old._replace(v=None), d._replace(v=None))
    storm = Storm(lambda step: e)
    found = [storm.reduce(each, direction, at, memory).joint for each in sequences(direction)]
    then, now = neumann(3, 0.4, old), neumann(3, 0.4, at)
    expected = (now.x + (1 - e) * (d.x - then.x), now.y + (1 - e) * (d.y - then.y))
    close(mean(found)[:2], expected)


# ---------------------------------------------------------------------------------------------------------- iterations


@dataclass
class Hand:
    """An algorithm by hand, in closed form, on the blocks that it draws."""

    algorithm: Any
    data: Any
    step: int = 0

    def g(self, number: int) -> Parts:
        block = oracle(self.data, self.algorithm, self.step).block("g", number)
        return Parts(block.data, float(block.scale))

    def f(self, number: int = 0) -> Parts:
        block = oracle(self.data, self.algorithm, self.step).block("f", number)
        return Parts(block.data, float(block.scale))

    def whole_series(self, first: int, terms: int, eta: float, fy: Tensor) -> Tensor:
        v = r = eta * fy
        for k in range(1, terms):
            r = r - eta * self.g(first + k).H @ r
            v = v + r
        return v

    def one_term(self, first: int, terms: int, eta: float, fy: Tensor) -> Tensor:
        drawn = Drawn.batches(oracle(self.data, self.algorithm, self.step), g=first)
        v = terms * eta * fy
        for k in range(1, 1 + chance(drawn)(0, terms)):
            v = v - eta * self.g(first + k).H @ v
        return v


def fsla(hand: Hand, steps: int) -> Joint:
    x, y, v = X, Y, torch.zeros(Q).double()
    old, d = (x, y, v), x
    for t in range(steps):
        hand.step, factor = t, (1 + t) ** -0.5
        y = y - factor * 0.2 * hand.g(0).in_y(x, y)
        v = v - factor * 0.15 * (hand.g(1).H @ v - hand.f(0).in_y(x, y))
        new, then = (hand.f(1).in_x(x_, y_) - hand.g(2).C @ v_ for x_, y_, v_ in ((x, y, v), old))
        d = new if t == 0 else new + (1 - factor) * (d - then)
        old = (x, y, v)
        x = x - factor * 0.1 * d
    return Joint(x, y, v)


def amigo(hand: Hand, steps: int) -> Joint:
    x, y, v = X, Y, torch.zeros(Q).double()
    for t in range(steps):
        hand.step = t
        for k in range(3):
            y = y - 0.2 * hand.g(k).in_y(x, y)
        for k in range(2):
            v = v - 0.15 * (hand.g(3 + k).H @ v - hand.f().in_y(x, y))
        x = x - 0.1 * (hand.f().in_x(x, y) - hand.g(5).C @ v)
    return Joint(x, y, v)


def stocbio(hand: Hand, steps: int) -> Joint:
    x, y = X, Y
    for t in range(steps):
        hand.step = t
        for k in range(3):
            y = y - 0.2 * hand.g(k).in_y(x, y)
        v = hand.whole_series(3, 3, 0.15, hand.f().in_y(x, y))
        x = x - 0.1 * (hand.f().in_x(x, y) - hand.g(3).C @ v)
    return Joint(x, y, None)


def bsa(hand: Hand, steps: int, inner_steps: int = 3, rho: float = 0.5, gamma: float = 0.5) -> Joint:
    x, y = X, Y
    for t in range(steps):
        hand.step = t
        for k in range(inner_steps):
            y = y - 0.2 * (1 + t) ** -rho * hand.g(k).in_y(x, y)
        v = hand.one_term(inner_steps, 3, 0.15, hand.f().in_y(x, y))
        x = x - 0.1 * (1 + t) ** -gamma * (hand.f().in_x(x, y) - hand.g(inner_steps).C @ v)
    return Joint(x, y, None)


def ttsa(hand: Hand, steps: int) -> Joint:
    return bsa(hand, steps, 1, 0.4, 0.6)


def mrbo(hand: Hand, steps: int) -> Joint:
    one = isinstance(hand.algorithm, SUSTAIN)
    x, y = X, Y
    old, u, w = (x, y), y, x
    for t in range(steps):
        hand.step, factor, e = t, (1 + t) ** (-1 / 3), (1 + t) ** (-2 / 3)

        def plain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            fy = hand.f().in_y(x, y)
            v = hand.one_term(0, 3, 0.15, fy) if one else hand.whole_series(0, 3, 0.15, fy)
            return hand.g(0).in_y(x, y), hand.f().in_x(x, y) - hand.g(0).C @ v

        new, then = plain(x, y), plain(*old)
        u = new[0] if t == 0 else new[0] + (1 - e) * (u - then[0])
        w = new[1] if t == 0 else new[1] + (1 - e) * (w - then[1])
        old = (x, y)
        x, y = x - factor * 0.1 * w, y - factor * 0.2 * u
    return Joint(x, y, None)


def vrbo(hand: Hand, steps: int) -> Joint:
    x, y = X, Y
    u, w = y, x
    for t in range(steps):
        hand.step = t
        if t % 3 == 0:
            d = neumann(3, 0.15, Joint(x, y, None))
            u, w = d.y, d.x
        old, x = (x, y), x - 0.1 * w
        for k in range(3):
            new, then = (
                (
                    hand.g(3 * k).in_y(x_, y_),
                    hand.f(k).in_x(x_, y_)
                    - hand.g(3 * k).C @ hand.whole_series(3 * k, 3, 0.15, hand.f(k).in_y(x_, y_)),
                )
                for x_, y_ in ((x, y), old)
            )
            u, w, old = u + new[0] - then[0], w + new[1] - then[1], (x, y)
            if k < 2:
                y = y - 0.2 * u
    return Joint(x, y, None)


HANDS: dict[str, tuple[AbstractAlgorithm[Any], Callable[[Hand, int], Joint]]] = {
    "fsla": (FSLA(0.2, 0.1, 0.15), fsla),
    "amigo": (AmIGO(0.2, 0.1, 0.15, 3, 2), amigo),
    "stocbio": (StocBiO(0.2, 0.1, 0.15, 3, 2), stocbio),
    "bsa": (BSA(0.2, 0.1, 0.15, 3, 3), bsa),
    "ttsa": (TTSA(0.2, 0.1, 0.15, 3), ttsa),
    "mrbo": (MRBO(0.2, 0.1, 0.15, 2), mrbo),
    "sustain": (SUSTAIN(0.2, 0.1, 0.15, 3), mrbo),
    "vrbo": (VRBO(0.2, 0.1, 0.15, 2, 2, period=3), vrbo),
}


def driven(algorithm: AbstractAlgorithm[Any], data: Any, steps: int) -> tuple[Any, list[int]]:
    """The state after some steps, without a run around it, and the calls for single samples that each took."""
    at = oracle(data, algorithm)
    state, calls = algorithm.init(at, X, Y), []
    for step in range(steps):
        each = at.at(step)
        before = at.like.tally.stats().sample_calls
        state = algorithm.step(each, state, algorithm.evaluate(each, state))
        calls.append(each.like.tally.stats().sample_calls - before)
    return state, calls


@pytest.mark.parametrize("order", ["shuffle", "full"])
@pytest.mark.parametrize("name", HANDS)
def test_each_is_the_iteration_of_its_paper_on_the_blocks_that_it_draws(name: str, order: str) -> None:
    algorithm, by_hand = HANDS[name]
    found, _ = driven(algorithm, split(order), 5)
    expected = by_hand(Hand(algorithm, split(order)), 5)
    close((found.x, found.y), (expected.x, expected.y))
    if expected.v is not None:
        close((found.v,), (expected.v,))


def test_on_all_the_data_momenta_and_differences_are_plain_estimates() -> None:
    for steps in (1, 2, 5):
        state, _ = driven(MRBO(0.2, 0.1, 0.15, 2), split("full"), steps)
        last = state.memory.point()
        close(state.memory.direction(), neumann(3, 0.15, last))
        state, _ = driven(SUSTAIN(0.2, 0.1, 0.15, 3), split("full"), steps)
        close((state.memory.d_y,), (G.in_y(state.memory.x, state.memory.y),))
        state, _ = driven(VRBO(0.2, 0.1, 0.15, 2, 2, period=100), split("full"), steps)
        expected = neumann(3, 0.15, Joint(state.x, state.y, None))
        close((state.memory.d_x, state.memory.d_y), (expected.x, expected.y))


def test_a_run_ends_where_the_iteration_does() -> None:
    algorithm, by_hand = HANDS["amigo"]
    found = minimize(PROBLEM, X, Y, algorithm=algorithm, data=split(), max_steps=4)
    expected = by_hand(Hand(algorithm, split()), 4)
    close((found.x,), (expected.x,))


def solution(terms: int | None = None, step: float = 0.0) -> Tensor:
    """Where the hypergradient vanishes, or the mean of the Neumann direction at y*(x), by linear algebra."""

    def h(x: Tensor) -> Tensor:
        y = torch.linalg.solve(G.H, -G.in_y(x, Y))
        fy = F.in_y(x, y)
        v = torch.linalg.solve(G.H, fy) if terms is None else series(terms, step, fy)
        return F.in_x(x, y) - G.C @ v

    zero = torch.zeros(P).double()
    slopes = torch.stack([h(row) - h(zero) for row in torch.eye(P).double()], dim=1)
    found: Tensor = torch.linalg.solve(slopes, -h(zero))
    return found


def test_linear_iterates_that_go_on_have_no_bias_and_a_series_has_that_of_its_terms() -> None:
    unbiased = minimize(PROBLEM, X, Y, algorithm=AmIGO(0.5, 0.5, None, 3, 3), data=split("full"), max_steps=32)
    torch.testing.assert_close(unbiased.x, solution(), rtol=0, atol=1e-11)
    for algorithm in (StocBiO(0.5, 0.5, 0.1, 3, 3), VRBO(0.5, 0.4, 0.1, 1, 3, period=100)):
        biased = minimize(PROBLEM, X, Y, algorithm=algorithm, data=split("full"), max_steps=40)
        torch.testing.assert_close(biased.x, solution(4, 0.1), rtol=0, atol=1e-11)
    assert float((solution(4, 0.1) - solution()).norm()) > 1e-3


# --------------------------------------------------------------------------------------------------------------- calls

EVEN = Split(g=FiniteSum(samples(12, 0), 4), f=FiniteSum(samples(8, 1), 4))
B = 4
PER_STEP = {
    "fsla": 7,
    "amigo": 3 + 2 + 2,
    "stocbio": 3 + 2 + 2,
    "mrbo": 2 * (2 + 3),
}


@pytest.mark.parametrize("name", PER_STEP)
def test_calls_are_those_of_the_table(name: str) -> None:
    _, calls = driven(HANDS[name][0], EVEN, 4)
    assert calls[1:] == [PER_STEP[name] * B] * 3


def test_calls_of_random_terms_are_those_of_the_table_in_the_mean() -> None:
    steps, terms = 30, 3
    for name, fixed, factor, first in (("bsa", 3 + 2, 1, 3), ("ttsa", 1 + 2, 1, 1), ("sustain", 3, 2, 0)):
        algorithm = HANDS[name][0]
        _, calls = driven(algorithm, EVEN, steps)
        drawn = [chance(Drawn.batches(oracle(EVEN, algorithm, step), g=first))(0, terms) for step in range(steps)]
        assert calls[1:] == [factor * (fixed + k) * B for k in drawn[1:]]
        assert abs(sum(drawn) / steps - (terms - 1) / 2) < 0.25


def test_calls_of_nested_loops_are_those_of_the_table() -> None:
    T, q = 2, 2
    _, calls = driven(VRBO(0.2, 0.1, 0.15, T, q, period=3), EVEN, 6)
    steady, full = 2 * (T + 1) * (q + 3) * B, 12 * (q + 2) + 8
    assert calls == [full + steady, steady, steady] * 2


def test_only_what_is_asked_for_is_counted() -> None:
    """By differences no product comes through a gradient that is evaluated and not read."""
    exact, by_differences = (
        Neumann(3, 0.4, products).on_batches(each, point(0)) and each.like.tally.stats()
        for products in (Coupled().products, FiniteDifferences())
        for each in (oracle(EVEN, Neumann(3, 0.4)),)
    )
    assert (exact.gradients, exact.hvps, exact.cross_products, exact.outer_gradients) == (1, 2, 1, 1)
    assert by_differences.gradients == 1 + 2 * 3  # grad_y g, and two gradients for each of three products


# ---------------------------------------------------------------------------------------------------------------- runs

RUNS: dict[str, AbstractAlgorithm[Any]] = {name: algorithm for name, (algorithm, _) in HANDS.items()} | {
    "turns with optimizers": Turns(Adam(0.05), TorchOptim(lambda p: torch.optim.Adam(p, lr=0.05)), 0.2, 2, 2),
    "turns with an average": Turns(0.2, 0.1, reduction=MovingAverage(lambda step: 0.5)),
    "turns with differences": Turns(0.2, 0.1, reduction=Sarah(3), direction=Neumann(3, 0.2)),
    "vrbo with an optimizer": VRBO(Adam(0.05), Adam(0.05), 0.2, 2, 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = minimize(PROBLEM, X, Y, algorithm=RUNS[name], data=split(), max_steps=5)
    for stop in (1, 3):
        file = tmp_path / f"{stop}.pt"
        minimize(PROBLEM, X, Y, algorithm=RUNS[name], data=split(), max_steps=stop, checkpoint=file)
        found = minimize(PROBLEM, X, Y, algorithm=RUNS[name], data=split(), max_steps=5, checkpoint=file, resume=True)
        assert torch.equal(found.x, whole.x) and torch.equal(found.y, whole.y)
        assert found.stats == whole.stats


@pytest.mark.parametrize("name", HANDS)
def test_gradient_descent_in_the_place_of_a_step_is_that_step(name: str) -> None:
    algorithm, by_hand = HANDS[name]
    sgd = TorchOptim(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    found, _ = driven(replace(LOOSE(algorithm), inner_step=GradientDescent(0.2), outer_step=sgd), split(), 4)
    close((found.x, found.y), by_hand(Hand(algorithm, split()), 4)[:2])


@pytest.mark.parametrize(
    "algorithm", [AmIGO(0.5, 0.5, None, 3, 3), StocBiO(0.5, 0.5, None, 3, 12), VRBO(0.5, 0.5, None, 1, 12, period=100)]
)
def test_x_stays_in_its_constraint_and_arrives_there(algorithm: AbstractAlgorithm[Any]) -> None:
    low = float(solution()[0]) + 0.2
    box = Box(torch.tensor([low, -10.0]).double(), 10.0)
    found = minimize(PROBLEM, X - 5, Y, algorithm=algorithm, data=split("full"), constraint=box, max_steps=60, tol=1e-5)
    assert found.converged and float(found.x[0]) == low
    y = torch.linalg.solve(G.H, -G.in_y(found.x, Y))
    h = F.in_x(found.x, y) - G.C @ torch.linalg.solve(G.H, F.in_y(found.x, y))
    assert float(h[0]) > 0 and abs(float(h[1])) < 1e-4


def test_a_tolerance_is_met_at_the_solution_and_not_where_x_alone_has_come_to_rest() -> None:
    loop = Turns(1e-3, 0.1)
    flat = BilevelProblem(
        lambda x, y: (y.square().sum() + 0 * x.sum()) / 2, lambda x, y: (y - x - 1).square().sum() / 2
    )
    # At the start grad_x f = 0 and v is still nearly zero: d_x is small, and nothing has arrived.
    x0 = torch.zeros(1).double()
    found = minimize(flat, x0, x0, algorithm=loop, max_steps=1, tol=1e-2, throw=False)
    assert not found.converged
    assert minimize(flat, x0, x0, algorithm=Turns(0.5, 0.3), max_steps=80, tol=1e-3).converged


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: AmIGO(0.0, 0.1), r"AmIGO\(inner_step="),
        (lambda: AmIGO(0.1, 0.1, inner_steps=0), r"AmIGO\(inner_steps="),
        (lambda: StocBiO(0.1, 0.1, linear_steps=0), r"StocBiO\(linear_steps="),
        (lambda: StocBiO(Adam(0.1), 0.1), r"StocBiO\(inner_step=<an optimizer>\)` needs `linear_step="),
        (lambda: VRBO(0.1, 0.1, period=0), r"VRBO\(period="),
        (lambda: Neumann(0, 0.1), r"Neumann\(terms="),
        (lambda: RandomizedNeumann(2, 0.0), r"RandomizedNeumann\(step="),
    ],
)
def test_settings_that_are_none_are_refused_by_name(make: Callable[[], Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()


def test_a_loop_without_a_linear_iterate_needs_no_step_for_it() -> None:
    SingleLoop(Adam(0.1), 0.1, direction=Neumann(2, 0.1))
    Turns(Adam(0.1), 0.1, direction=Neumann(2, 0.1))
    for make in (SingleLoop, Turns):
        with pytest.raises(ValueError, match="needs `linear_step="):
            make(Adam(0.1), 0.1)


@pytest.mark.parametrize("algorithm", [VRBO(0.5, 0.03, 0.9, 1, 2), SRBA(0.5, 0.03)])
def test_what_needs_the_whole_data_passes_the_checks_without_batches(algorithm: AbstractAlgorithm[Any]) -> None:
    check_algorithm(algorithm, exact=False, whole=True)


def test_what_needs_batches_only_passes_all_the_checks() -> None:
    check_algorithm(AmIGO(0.5, 0.3, inner_steps=2, linear_steps=2), max_steps=60)


# ------------------------------------------------------------------------------------------------------- deterministic

WHOLE = BilevelProblem(lambda x, y: objective(x, y, OF_F), lambda x, y: objective(x, y, OF_G))


def whole(algorithm: AbstractAlgorithm[Any], steps: int, **given: Any) -> Any:
    return minimize(WHOLE, X, Y, algorithm=algorithm, max_steps=steps, **given)


def test_aid_bio_is_gradient_steps_and_conjugate_gradients_that_go_on() -> None:
    x, y, v = X, Y, torch.zeros(Q).double()
    for _ in range(4):
        for _ in range(2):
            y = y - 0.3 * G.in_y(x, y)
        r = F.in_y(x, y) - G.H @ v
        v = v + (r @ r) / (r @ G.H @ r) * r  # the first step of conjugate gradients
        x = x - 0.2 * (F.in_x(x, y) - G.C @ v)
    close((whole(aid_bio(0.3, 0.2, inner_steps=2, linear_steps=1), 4).x,), (x,))


def test_aid_bio_with_one_step_of_each_has_no_bias_and_itd_bio_has_that_of_its_steps() -> None:
    aid = whole(aid_bio(0.5, 0.4, inner_steps=1, linear_steps=1), 60)
    torch.testing.assert_close(aid.x, solution(), rtol=0, atol=1e-11)
    itd = whole(itd_bio(0.5, 0.4, inner_steps=2), 40)
    torch.testing.assert_close(itd.x, solution(2, 0.5), rtol=0, atol=1e-11)  # (I - P^N) H^-1 = the series of N terms


def test_itd_bio_is_the_derivative_through_its_steps_from_where_y_was() -> None:
    x, y = X, Y
    for _ in range(4):
        for _ in range(3):
            y = y - 0.3 * G.in_y(x, y)
        x = x - 0.2 * (F.in_x(x, y) - G.C @ series(3, 0.3, F.in_y(x, y)))
    close((whole(itd_bio(0.3, 0.2, inner_steps=3), 4).x,), (x,))


def test_accbio_is_nesterov_for_y_the_heavy_ball_for_v_and_nesterov_for_x() -> None:
    mu, top = (float(torch.linalg.eigvalsh(G.H)[k]) for k in (0, -1))
    root = (top**0.5 - mu**0.5) / (top**0.5 + mu**0.5)
    x = z = X
    for _ in range(4):
        y = u = Y
        for _ in range(3):
            after = y - G.in_y(x, y) / top
            y, u = after + root * (after - u), after
        b, v, before = F.in_y(x, y), torch.zeros(Q).double(), torch.zeros(Q).double()
        for _ in range(4):
            step = 4 / (top**0.5 + mu**0.5) ** 2
            v, before = v - step * (G.H @ v - b) + root**2 * (v - before), v
        new = x - 0.2 * (F.in_x(x, y) - G.C @ v)
        x, z = new + 0.3 * (new - z), new
    found = whole(accbio(mu, top, 0.2, 0.3, inner_steps=3, linear_steps=4), 4)
    close((found.x,), (x,))
    assert found.stats.gradients == 5 * (3 + 1)


def test_heavy_ball_converges_like_its_rate_and_says_where_it_does_not() -> None:
    mu, top = (float(torch.linalg.eigvalsh(G.H)[k]) for k in (0, -1))
    root = (top**0.5 - mu**0.5) / (top**0.5 + mu**0.5)
    operator, b = LinearOperator(lambda v: v @ G.H, Q, positive_definite=True), torch.ones(Q).double()
    exact = torch.linalg.solve(G.H, b)
    for guess in (None, 2 * b):
        start = torch.zeros(Q).double() if guess is None else guess
        for steps in (1, 5, 20, 60):
            found = HeavyBallSystem(4 / (top**0.5 + mu**0.5) ** 2, root**2, steps).solve(operator, b, guess)
            rate = (1 + 2 * steps) * root**steps
            assert float((found.value - exact).norm()) <= rate * float((start - exact).norm()) + 1e-14
            close((found.residual,), ((b - G.H @ found.value).norm(),))
            assert found.statuses == (Status.successful,)
    assert HeavyBallSystem(9.0, 0.9, 30).solve(operator, b).statuses == (Status.diverged,)
    assert HeavyBallSystem(9.0, 0.9, 3).solve(operator, b * torch.nan).statuses == (Status.nonfinite,)
    close((HeavyBallSystem(0.1, 0.0, 3).solve(operator, 0 * b, b).value,), (0 * b,))


def test_hoag_solves_as_accurately_as_its_schedule_says_and_arrives() -> None:
    seen: list[tuple[float, float]] = []

    def note(record: Any, estimate: Any) -> None:
        x, y, v = estimate.x, estimate.y, estimate.v
        seen.append((float(G.in_y(x, y).norm()), float((G.H @ v - F.in_y(x, y)).norm())))

    algorithm = hoag(Iterate(GradientDescent(0.3), 500), CG(), 0.3, first_tolerance=0.1, schedule=Power(2.0))
    found = whole(algorithm, 60, callback=note)
    for k, (inner, linear) in enumerate(seen):
        assert inner <= 0.1 * (1 + k) ** -2 and linear <= 0.1 * (1 + k) ** -2
    assert seen[0][0] > 1e-3  # no more accurate than need be
    torch.testing.assert_close(found.x, solution(), rtol=0, atol=1e-3)
    late = whole(hoag(LBFGS(), CG(), 0.3, schedule=lambda k: 0.7**k), 120)
    torch.testing.assert_close(late.x, solution(), rtol=0, atol=1e-9)


def test_descents_refuse_settings_that_are_none() -> None:
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: aid_bio(0.0, 0.1), r"aid_bio\(inner_step="),
        (lambda: itd_bio(0.1, 0.1, 0), r"itd_bio\(inner_steps="),
        (lambda: accbio(2.0, 1.0, 0.1), r"accbio\(mu=...\)` must be at most L=1"),
        (lambda: accbio(1.0, 2.0, 0.1, 1.0), r"accbio\(outer_momentum="),
        (
            lambda: hoag(LBFGS(), Dense(), 0.1),
            r"hoag\(linear=...\)` must be a solver that takes a tolerance",
        ),
    ]
    for make, expected in refused:
        with pytest.raises(ValueError, match=expected):
            make()


# -------------------------------------------------------------------------------------------------------------- bounds


def constants() -> Constants:
    eigenvalues = torch.linalg.eigvalsh(G.H)
    return Constants(
        mu=float(eigenvalues[0]),
        L=float(eigenvalues[-1]),
        L_fyy=float(torch.linalg.eigvalsh(F.H)[-1]),
        L_fxy=float(torch.linalg.matrix_norm(F.C, 2)),
        M_yy=0.0,
        M_xy=0.0,
        C_G=float(torch.linalg.matrix_norm(G.C, 2)),
    )


BOUNDED: dict[str, AbstractAlgorithm[Any]] = {
    "soba": SOBA(0.2, 0.1),
    "saba": SABA(0.2, 0.1),
    "srba": SRBA(0.2, 0.1),
    "amigo": AmIGO(0.2, 0.1, 0.15, 3, 2),
    "fsla": FSLA(0.2, 0.1),
    "stocbio": StocBiO(0.2, 0.1, 0.15, 3, 2),
    "bsa": BSA(0.2, 0.1, 0.15, 3, 3),
    "mrbo": MRBO(0.2, 0.1, 0.15, 2),
    "vrbo": VRBO(0.2, 0.1, 0.15, 2, 2),
    "aid-bio": aid_bio(0.2, 0.1, 3, 2),
    "itd-bio": itd_bio(0.2, 0.1, 3),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_the_first_direction_on_all_the_data_is_within_its_bound(name: str) -> None:
    algorithm, ratios = BOUNDED[name], []
    for seed in range(12):
        at = point(seed)
        y = torch.linalg.solve(G.H, -G.in_y(at.x, Y))
        fy = F.in_y(at.x, y)
        v = torch.linalg.solve(G.H, fy)
        known = oracle(Split(f=OF_F, g=OF_G), algorithm)
        state = algorithm.init(known, at.x, y + 0.3 * (at.y - y))
        if name == "bsa":  # the mean over k
            direction = Neumann(3, 0.15)
            turned = y + torch.linalg.matrix_power(torch.eye(Q).double() - 0.2 * G.H, 3) @ (state.y - y)
            h = direction.on_everything(known, Joint(at.x, turned, None))[0].x
        else:
            h = algorithm.evaluate(known, state).estimate.grad
        bound = error_bound(
            algorithm,
            constants(),
            distance=float((state.y - y).norm()),
            outer_gradient_norm=float(fy.norm()),
            linear_distance=float(v.norm()),
        )
        error = float((h - (F.in_x(at.x, y) - G.C @ v)).norm())
        assert error <= bound.total * (1 + 1e-12)
        ratios.append(error / bound.total)
    assert max(ratios) > 0.1  # within a factor of ten at the worst of a dozen points


def test_the_bounds_are_attained_in_one_dimension() -> None:
    """f = 2 x y + y^2 / 2, g = y^2 / 2 - 3 x y at x = 1: y* = 3, v* = 5, h = 2 y* + 3 v* = 21."""
    scalar = BilevelProblem(
        lambda x, y: (2 * x * y + y.square() / 2).sum(), lambda x, y: (y.square() / 2 - 3 * x * y).sum()
    )
    one = torch.ones(1).double()
    flat = FlatProblem(scalar, ravel(one, "x")[1], ravel(one, "y")[1])
    given = Constants(mu=1.0, L=1.0, L_fyy=1.0, L_fxy=2.0, M_yy=0.0, M_xy=0.0, C_G=3.0)
    at = Joint(one, 3.5 * one, 5.25 * one)
    d = Coupled().on_everything(Oracle(flat, sources(None)), at)[0]
    found = error_bound(SOBA(0.1, 0.1), given, distance=0.5, outer_gradient_norm=5.0, linear_distance=0.25)
    assert float(d.x) - 21 == pytest.approx(found.total) == pytest.approx(2 * 0.5 + 3 * 0.25)
    series_d = Neumann(3, 0.5).on_everything(Oracle(flat, sources(None)), Joint(one, 3 * one, None))[0]
    bias = error_bound(MRBO(0.5, 0.1, linear_steps=2), given, distance=0.0, outer_gradient_norm=5.0)
    assert 21 - float(series_d.x) == pytest.approx(bias.bias) == pytest.approx(3 * 0.5**3 * 5)
    assert bias.total == bias.bias


def test_the_tracking_bound_counts_a_cross_derivative_that_changes() -> None:
    """g = y^2 / 2 - x y - m x y^2 / 2, f = y at x = 0: y* = 0, v* = 1, h = 1, and D_x = (1 + m y) v."""
    m, zero = 2.0, torch.zeros(1).double()
    bent = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y.square() / 2 - x * y - m * x * y.square() / 2).sum())
    flat = FlatProblem(bent, ravel(zero, "x")[1], ravel(zero, "y")[1])
    given = Constants(mu=1.0, L_fxy=0.0, M_xy=m, C_G=1.0)
    d = Coupled().on_everything(Oracle(flat, sources(None)), Joint(zero, zero + 0.5, zero + 1.25))[0]
    bound = bounds.tracking(given, distance=0.5, linear_distance=0.25, outer_gradient_norm=1.0)
    assert float(d.x) - 1 == pytest.approx(bound.total) == pytest.approx(2 * 0.5 * 1.25 + 0.25)


def test_bounds_that_are_not_known_are_refused_by_name() -> None:
    about: dict[str, Any] = {"distance": 0.1, "outer_gradient_norm": 1.0}
    for algorithm, expected in (
        (SOBA(0.1, 0.1), r"`error_bound\(linear_distance=...\)` is needed"),
        (MASOBA(0.1, 0.1), "MovingAverage"),
        (SOBA(0.1, 0.1, products=FiniteDifferences()), "products by `FiniteDifferences`"),
        (StocBiO(Adam(0.1), 0.1, 0.1), "an optimizer as `inner_step`"),
        (HANDLESS, "no bound is known for Silent"),
    ):
        with pytest.raises(ValueError, match=expected):
            error_bound(algorithm, constants(), **about)


@final
@dataclass(frozen=True)
class Silent(AbstractAlgorithm[Any]):
    """One that says nothing of its error."""

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Any:
        return x, y

    def evaluate(self, oracle: Oracle, state: Any) -> Evaluated:
        raise NotImplementedError

    def step(self, oracle: Oracle, state: Any, found: Evaluated) -> Any:
        return state

    def stationarity(self, oracle: Oracle, state: Any, found: Evaluated) -> Tensor:
        raise NotImplementedError

    def point(self, state: Any) -> tuple[Tensor, Tensor]:
        x, y = state
        return x, y


HANDLESS = Silent()
