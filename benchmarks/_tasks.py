"""The meta-learning workload: sinusoid regressions with the network 1-40-40-1, in four ways of computing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi

import torch
from _harness import Call
from torch import Tensor, nn
from torch.nn.functional import mse_loss, relu

from bilevel import (
    AID,
    ITD,
    AbstractEstimator,
    BilevelProblem,
    CompiledITD,
    CompiledProducts,
    Estimate,
    Exact,
    Start,
    functional,
    hypergradient,
)
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate


@dataclass(frozen=True, eq=False)
class TaskLoad:
    """Tasks, the network, and the settings of the inner loop.

    Attributes:
        module: the network.
        X, t, U, c: support inputs and targets, query inputs and targets: `(tasks, samples, 1)`.
        steps: of the inner loop.
        step: their length.
        weight: of the proximal term weight |y - x|^2 / 2 (iMAML); 0 for MAML.
        products: of CG (iMAML).
    """

    module: nn.Sequential
    X: Tensor
    t: Tensor
    U: Tensor
    c: Tensor
    steps: int
    step: float = 0.01
    weight: float = 0.0
    products: int = 5

    @property
    def tasks(self) -> int:
        """How many."""
        return self.X.shape[0]

    def start(self) -> list[Tensor]:
        """x: fresh leaves."""
        return [parameter.detach().clone().requires_grad_() for parameter in self.module.parameters()]

    def g(self, x: Sequence[Tensor], y: Sequence[Tensor], k: int) -> Tensor:
        """The inner objective of task k, at lists of parameters."""
        value = mse_loss(forward(y, self.X[k]), self.t[k])
        if self.weight:
            value = value + self.weight / 2 * sum(((a - b) ** 2).sum() for a, b in zip(y, x, strict=True))
        return value

    def f(self, y: Sequence[Tensor], k: int) -> Tensor:
        """The outer objective of task k."""
        return mse_loss(forward(y, self.U[k]), self.c[k])

    def double(self) -> TaskLoad:
        """In float64."""
        module = nn.Sequential(
            *(type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else nn.ReLU() for m in self.module)
        )
        module.load_state_dict(self.module.state_dict())
        wide = [each.double() for each in (self.X, self.t, self.U, self.c)]
        return TaskLoad(module.double(), *wide, self.steps, self.step, self.weight, self.products)


def sinusoids(tasks: int, steps: int, weight: float = 0.0, shots: int = 10) -> TaskLoad:
    """y = A sin(x - phi), A in [0.1, 5], phi in [0, pi], x in [-5, 5]."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    A, phi = torch.empty(tasks, 1, 1).uniform_(0.1, 5), torch.empty(tasks, 1, 1).uniform_(0, pi)
    X, U = (torch.empty(tasks, shots, 1).uniform_(-5, 5) for _ in range(2))
    return TaskLoad(module, X, A * torch.sin(X - phi), U, A * torch.sin(U - phi), steps, weight=weight)


def forward(y: Sequence[Tensor], X: Tensor) -> Tensor:
    """The network with these parameters."""
    linear = torch.nn.functional.linear
    return linear(relu(linear(relu(linear(X, y[0], y[1])), y[2], y[3])), y[4], y[5])


def ravelled(grads: Sequence[Tensor]) -> Tensor:
    """One vector."""
    return torch.cat([grad.reshape(-1) for grad in grads])


def ours(load: TaskLoad, compiled: bool = False, later: bool = False) -> Call:
    """`bilevel.hypergradient`, as a user calls it; `compiled` by torch's compiler; `later` as within a run."""
    net = functional(load.module)

    def g(x: dict[str, Tensor], y: dict[str, Tensor], task: dict[str, Tensor]) -> Tensor:
        value = mse_loss(net(y, task["X"]), task["t"])
        if load.weight:
            value = value + load.weight / 2 * sum((y[name] - x[name]).square().sum() for name in x)
        return value

    problem = BilevelProblem(
        lambda _, y, task: mse_loss(net(y, task["U"]), task["c"]), g, init=lambda x, _: x, tasks=True
    )
    inner = Iterate(GradientDescent(load.step), max_steps=load.steps)
    estimator: AbstractEstimator = ITD(inner)
    if load.weight:
        products = CompiledProducts() if compiled else Exact()
        estimator = AID(inner, CG(rtol=0.0, max_steps=load.products, recompute=False), products=products)
    elif compiled:
        estimator = CompiledITD(inner)
    data = {"X": load.X, "t": load.t, "U": load.U, "c": load.c}

    def estimate(start: Start | None) -> Estimate:
        return hypergradient(problem, net.params, net.params, data=data, estimator=estimator, throw=False, start=start)

    start = Start(estimate(None).y, None, 3) if later else None

    def call() -> Tensor:
        return ravelled(list(estimate(start).grad.values()))

    return call


def by_hand(load: TaskLoad) -> Call:
    """Stacked parameters and `baddbmm`: what somebody writes for this one network."""

    def forward_all(y: Sequence[Tensor], X: Tensor) -> Tensor:
        for k in (0, 2, 4):
            X = torch.baddbmm(y[k + 1].unsqueeze(1), X, y[k].transpose(1, 2))
            X = relu(X) if k < 4 else X
        return X

    def inner(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        value = (forward_all(y, load.X) - load.t).square().mean((1, 2)).sum()
        if load.weight:
            value = value + load.weight / 2 * sum(((a - b) ** 2).sum() for a, b in zip(y, x, strict=True))
        return value

    def outer(y: Sequence[Tensor]) -> Tensor:
        return (forward_all(y, load.U) - load.c).square().mean((1, 2)).mean()

    def explicit() -> Tensor:
        x = load.start()
        y = [leaf.expand(load.tasks, *leaf.shape) for leaf in x]
        for _ in range(load.steps):
            grads = torch.autograd.grad(inner(x, y), y, create_graph=True)
            y = [a - load.step * b for a, b in zip(y, grads, strict=True)]
        return ravelled(torch.autograd.grad(outer(y), x))

    def implicit() -> Tensor:
        x = load.start()
        y = [leaf.detach().expand(load.tasks, *leaf.shape).contiguous() for leaf in x]
        fixed = [leaf.detach() for leaf in x]
        for _ in range(load.steps):
            y = [leaf.requires_grad_() for leaf in y]
            y = [a.detach() - load.step * b for a, b in zip(y, torch.autograd.grad(inner(fixed, y), y), strict=True)]
        y = [leaf.requires_grad_() for leaf in y]
        rhs = torch.autograd.grad(outer(y), y)
        gy = torch.autograd.grad(inner(x, y), y, create_graph=True)

        def dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
            return sum((p * q).flatten(1).sum(1) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]

        def scaled(a: Tensor, like: Tensor) -> Tensor:
            return a.reshape(-1, *(1,) * (like.dim() - 1))

        v, r = [torch.zeros_like(b) for b in rhs], list(rhs)
        p, rr = list(rhs), dots(rhs, rhs)
        for _ in range(load.products):
            Hp = torch.autograd.grad(gy, y, p, retain_graph=True)
            alpha = rr / dots(p, Hp)
            v = [a + scaled(alpha, b) * b for a, b in zip(v, p, strict=True)]
            r = [a - scaled(alpha, b) * b for a, b in zip(r, Hp, strict=True)]
            rr, before = dots(r, r), rr
            p = [a + scaled(rr / before, b) * b for a, b in zip(r, p, strict=True)]
        return ravelled([-each for each in torch.autograd.grad(gy, x, v)])

    return implicit if load.weight else explicit


def one_by_one(load: TaskLoad, gradient: Callable[[list[Tensor], int], Sequence[Tensor]] | None = None) -> Call:
    """A loop over tasks: plain autograd, or a peer's gradient of one task."""

    def plain(x: list[Tensor], k: int) -> Sequence[Tensor]:
        y = x if not load.weight else [leaf.detach().clone().requires_grad_() for leaf in x]
        fixed = [leaf.detach() for leaf in x]
        for _ in range(load.steps):
            grads = torch.autograd.grad(load.g(fixed, y, k), y, create_graph=not load.weight)
            y = [a - load.step * b for a, b in zip(y, grads, strict=True)]
            if load.weight:
                y = [leaf.detach().requires_grad_() for leaf in y]
        if not load.weight:
            return torch.autograd.grad(load.f(y, k), x)
        b = ravelled(torch.autograd.grad(load.f(y, k), y))
        gy = ravelled(torch.autograd.grad(load.g(x, y, k), y, create_graph=True))
        v, r, p = torch.zeros_like(b), b.clone(), b.clone()
        rr = r @ r
        for _ in range(load.products):
            Hp = ravelled(torch.autograd.grad(gy, y, p, retain_graph=True))
            alpha = rr / (p @ Hp)
            v, r = v + alpha * p, r - alpha * Hp
            rr, before = r @ r, rr
            p = r + rr / before * p
        return [-each for each in torch.autograd.grad(gy, x, v)]

    def call() -> Tensor:
        x = load.start()
        total = sum(ravelled((gradient or plain)(x, k)) for k in range(load.tasks))
        return total / load.tasks  # type: ignore[return-value, operator]

    return call
