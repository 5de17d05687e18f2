"""A tax on the firms of a Cournot game: the equilibrium of several players as a fixed point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, SEED, SIZE, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes


@final
@dataclass(frozen=True, eq=False)
class CournotGame:
    """n firms choose quantities y_i at once; the price is a - b sum_j y_j, and a tax x_i is due for each unit.

    Firm i has the profit y_i (a - b sum_j y_j) - (c_i + x_i) y_i - d y_i^2 / 2, and so the best response

        T_i(x, y) = (a - c_i - x_i - b sum_{j != i} y_j) / (2 b + d).

    dT/dy has the eigenvalue -(n - 1) b / (2 b + d), once, and b / (2 b + d): for d = 0 the responses of all at once
    contract for two firms, swing for three, and expand for four and more. The equilibrium, with k = c + x,

        sum_j y_j = (n a - sum_j k_j) / ((n + 1) b + d),   y_i = (a - k_i - b sum_j y_j) / (b + d),

    exists all the same. The outer objective is minus the welfare, where each unit does the damage e_i, and collecting
    a tax costs something: with Y = sum_j y_j,

        f = b Y^2 / 2 - a Y + sum_i [(c_i + e_i) y_i + d y_i^2 / 2] + collecting |x|^2 / 2.

    Args:
        a: the price at which nothing is sold.
        b: by how much it falls with a unit.
        c: unit costs `(n,)`.
        damage: e `(n,)`.
        d: growth of the unit costs.
        collecting: what collecting taxes costs.

    Raises:
        ValueError: if the shapes do not fit, or a number is out of range.

    Example:
        >>> game = CournotGame(10.0, 1.0, torch.tensor([1.0, 1.0]), torch.zeros(2))
        >>> game.solution(torch.zeros(2))  # (a - c) / (3 b) each
        tensor([3., 3.])
    """

    a: float
    b: float
    c: Tensor
    damage: Tensor
    d: float = 0.0
    collecting: float = 1.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, a=POSITIVE, b=POSITIVE, d=AT_LEAST_0, collecting=POSITIVE)
        demand_shapes("CournotGame", {"c": Shape("n"), "damage": Shape("n")}, vars(self))

    @fitting
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """Minus the welfare."""
        whole = y.sum()
        costs = ((self.c + self.damage) * y + self.d * y.square() / 2).sum()
        return self.b * whole.square() / 2 - self.a * whole + costs + self.collecting * x.square().sum() / 2

    @fitting
    def best_responses(self, x: Tensor, y: Tensor) -> Tensor:
        """T(x, y): what each firm would answer to the others."""
        others = y.sum() - y
        return (self.a - self.c - x - self.b * others) / (2 * self.b + self.d)

    @fitting
    def solution(self, x: Tensor) -> Tensor:
        """The equilibrium."""
        return self._solved(self.a - self.c - x)

    @fitting
    def gradient(self, x: Tensor) -> Tensor:
        """grad Phi = collecting x - M^-1 grad_y f, M = b 11' + (b + d) I."""
        y = self.solution(x)
        in_y = self.b * y.sum() - self.a + self.c + self.damage + self.d * y
        return self.collecting * x - self._solved(in_y)

    def minimizer(self) -> Tensor:
        """The taxes of largest welfare: Phi is a convex quadratic, or has none where its Hessian is not definite."""
        zero = torch.zeros_like(self.c)
        at = self.gradient(zero)
        units = torch.eye(len(self.c), dtype=self.c.dtype, device=self.c.device)
        hessian = torch.stack([self.gradient(unit) - at for unit in units], dim=-1)
        x: Tensor = -torch.linalg.solve(hessian, at)
        return x

    @fitting
    def metrics(self, x: Tensor, y: Tensor) -> Mapping[str, float]:
        """Price, quantity and welfare."""
        quantity = float(y.sum())
        return {"price": self.a - self.b * quantity, "quantity": quantity, "welfare": -float(self.f(x, y))}

    def radius(self) -> float:
        """The spectral radius of dT/dy."""
        return max(len(self.c) - 1, 1 if len(self.c) > 1 else 0) * self.b / (2 * self.b + self.d)

    def _solved(self, right: Tensor) -> Tensor:
        """M^-1 right."""
        whole = right.sum() / ((len(self.c) + 1) * self.b + self.d)
        return (right - self.b * whole) / (self.b + self.d)


@checked(players=SIZE, d=AT_LEAST_0, seed=SEED)
def cournot(*, players: int = 4, d: float = 0.0, seed: int = 0) -> Instance:
    """Taxes on the firms of a Cournot game, whose equilibrium is a fixed point: everything in closed form.

    The costs and damages are drawn. With four firms and more, and d = 0, best responses do not converge: `Anderson`,
    `Broyden` and GMRES are right there, and what rests on a contraction refuses.

    Args:
        players: the number of firms.
        d: growth of the unit costs.
        seed: of the draw.

    Example:
        >>> instance = cournot(players=5)
        >>> y = instance.solution(instance.x0)
        >>> bool((instance.problem.fixed_point(instance.x0, y) - y).abs().max() < 1e-12)
        True
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return torch.rand(players, generator=generator, dtype=torch.float64, device="cpu")

    game = CournotGame(10.0, 1.0, 1 + drawn(), 1 + 2 * drawn(), d)
    zero = torch.zeros_like(game.c)
    return Instance(
        problem=BilevelProblem(game.f, fixed_point=game.best_responses),
        x0=zero,
        y0=zero.clone(),
        description=f"Cournot game of {players}: best responses of spectral radius {game.radius():.3g}",
        solution=game.solution,
        gradient=game.gradient,
        minimizer=game.minimizer(),
        metrics=game.metrics,
        settings={"estimator": "implicit", "outer_step": 0.3, "max_steps": 200},
    )
