"""What sums of terms cost beside the same steps written out in torch: deblurring by ADMM with total variation.

    python benchmarks/terms_by_hand.py

CPU time on one thread, both sides in turn in each round, medians of the rounds and of their ratios. The loop by hand
keeps the Fourier transforms of what does not change outside of its loop, and has no class and no check. The same
numbers come out of both: the program compares them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel import AID, BilevelProblem, hypergradient
from bilevel.solvers import GMRES, FixedPointIteration
from bilevel.terms import ADMM, Convolution, Gradient, Scheme, norm1, proximal_problem, sum_squares, variable

State = dict[str, Tensor]


class ByHand:
    """ADMM for |K y - b|^2 / 2 + w |D y|_1, images `(n, side, side)`."""

    def __init__(self, kernel: Tensor, b: Tensor) -> None:
        side, k = b.shape[-1], kernel.shape[-1]
        padded = torch.zeros(side, side, dtype=b.dtype)
        padded[:k, :k] = kernel
        transfer = torch.fft.rfft2(torch.roll(padded, (-(k // 2), -(k // 2)), (0, 1)))
        self.squares = transfer.abs().square()
        waves = 4 * (math.pi * torch.arange(side, dtype=b.dtype) / side).sin().square()
        self.differences = waves.unsqueeze(-1) + waves[: side // 2 + 1]
        self.right, self.side = transfer.conj() * torch.fft.rfft2(b), side

    def start(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, v, u."""
        v = differences(b)
        return b, v, torch.zeros_like(v)

    def step(
        self, state: tuple[Tensor, Tensor, Tensor], rho: Tensor | float, threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step."""
        _, v, u = state
        top = self.right + rho * torch.fft.rfft2(transposed(v - u))
        y = torch.fft.irfft2(top / (self.squares + rho * self.differences), s=(self.side, self.side))
        a = differences(y) + u
        v = a.sign() * (a.abs() - threshold).relu()
        return y, v, a - v


def differences(y: Tensor) -> Tensor:
    """D y."""
    return torch.stack([torch.roll(y, -1, -2) - y, torch.roll(y, -1, -1) - y], -3)


def transposed(z: Tensor) -> Tensor:
    """D' z."""
    down, right = z.unbind(-3)
    return torch.roll(down, 1, -2) - down + torch.roll(right, 1, -1) - right


def objective(kernel: Tensor, b: Tensor, w: Tensor | float) -> object:
    """The same as a sum of terms."""
    shape = tuple(b.shape[-2:])
    y = variable(*shape)
    return 0.5 * sum_squares(Convolution(kernel, shape) @ y - b) + w * norm1(Gradient(shape) @ y)


def unrolled(kernel: Tensor, b: Tensor, steps: int = 5) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The derivative of learned steps: forward and backward."""
    x = torch.cat([torch.full((steps,), -2.0), torch.full((steps,), -4.0)]).to(b).requires_grad_()

    def ours() -> Tensor:
        algorithm = ADMM(x[:steps].exp(), x[steps:].exp())
        y = algorithm.on(objective(kernel, b, 1.0)).run(b, steps)  # type: ignore[arg-type]
        return torch.autograd.grad(y.square().mean(), x)[0]

    def by_hand() -> Tensor:
        made, rho, threshold = ByHand(kernel, b), x[:steps].exp(), x[steps:].exp()
        state = made.start(b)
        for k in range(steps):
            state = made.step(state, rho[k], threshold[k])
        return torch.autograd.grad(state[0].square().mean(), x)[0]

    return ours, by_hand


def steps_alone(kernel: Tensor, b: Tensor, steps: int = 100) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Steps without a graph."""

    def ours() -> Tensor:
        with torch.no_grad():
            return ADMM(0.1).on(objective(kernel, b, 0.01)).run(b, steps)  # type: ignore[arg-type]

    def by_hand() -> Tensor:
        with torch.no_grad():
            made, threshold = ByHand(kernel, b), b.new_tensor(0.1)
            state = made.start(b)
            for _ in range(steps):
                state = made.step(state, 0.1, threshold)
            return state[0]

    return ours, by_hand


def implicit(kernel: Tensor, b: Tensor, steps: int = 60) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The hypergradient of the fixed point by the same solvers, its map by terms or by hand."""
    x = torch.tensor(-4.0, dtype=b.dtype)
    estimator = AID(FixedPointIteration(steps, tol=None), GMRES(0.0, max_steps=20))

    def scheme(x: Tensor) -> Scheme:
        return ADMM(0.1).on(objective(kernel, b, x.exp()))  # type: ignore[arg-type]

    def f(_: Tensor, y: Tensor) -> Tensor:
        return y.square().mean()

    made = ByHand(kernel, b)

    def image(x: Tensor, y: State) -> State:
        new = made.step((y["y"], y["v"], y["u"]), 0.1, x.exp() / 0.1)
        return dict(zip(("y", "v", "u"), new, strict=True))

    terms = proximal_problem(f, scheme)
    plain = BilevelProblem(lambda x, y: f(x, y["y"]), fixed_point=image)
    start = scheme(x).start(b)
    flat = dict(zip(("y", "v", "u"), made.start(b), strict=True))

    def ours() -> Tensor:
        return hypergradient(terms, x, start, estimator=estimator, throw=False).grad

    def by_hand() -> Tensor:
        return hypergradient(plain, x, flat, estimator=estimator, throw=False).grad

    return ours, by_hand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    kernel = torch.full((5, 5), 1 / 25, dtype=torch.float64)
    print("| what | images | terms, ms | by hand, ms | ratio |\n|---|---|---|---|---|")
    for name, make in (("5 learned steps", unrolled), ("100 steps", steps_alone), ("implicit", implicit)):
        for count, side in ((16, 32), (16, 64)):
            b = torch.rand(count, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            pair = make(kernel, b)
            torch.testing.assert_close(pair[0](), pair[1](), rtol=1e-6, atol=1e-12)
            spent = []
            for turn in range(rounds):
                row = {}
                for each in (0, 1) if turn % 2 else (1, 0):
                    began = time.process_time()
                    pair[each]()
                    row[each] = time.process_time() - began
                spent.append((row[0], row[1]))
            mine, other = (1000 * statistics.median(column) for column in zip(*spent, strict=True))
            ratio = statistics.median(a / b for a, b in spent)
            print(f"| {name} | {count} of {side} x {side} | {mine:.1f} | {other:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
