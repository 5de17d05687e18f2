"""Inner problems under a curved constraint in which each constant of certificates is needed, and their true errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from strategies import gaussian
from torch import Tensor

from bilevel import BilevelProblem, Constants

CONSTANTS = ("L_cyy", "M_cyy", "L_cxy", "M_cxy", "M_yy", "M_xy", "L_fyy", "L_fxy")
REACH = 0.02  # all constants hold within this of y


@final
@dataclass(frozen=True)
class Bent:
    """g = |y - B x|^2 / 2 + M_yy sum y_i^3 / 6 + M_xy x_1 y_1^2 / 2 - w y_3, y = (y_1, y_2, y_3), under

        c = y_3 - x_2 + L_cyy (y_1^2 + y_2^2) / 2 + M_cyy (y_1^3 + y_2^3) / 6 + L_cxy x_1 y_1 + M_cxy x_1 y_1^2 / 2 <= 0

    and f = a'y + L_fyy |y|^2 / 2 + L_fxy x_1 y_2. With y_3 from c = 0 that is a smooth problem in (y_1, y_2).
    """

    sizes: dict[str, float]
    a: Tensor
    B: Tensor
    w: float
    x: Tensor

    @staticmethod
    def drawn(seed: int, sizes: dict[str, float]) -> Bent:
        noise = gaussian(13, seed=seed)
        return Bent(sizes, noise[7:10], noise[:6].reshape(3, 2), float(3 * noise[6].exp()), 0.01 * noise[10:12])

    def size(self, name: str) -> float:
        return self.sizes.get(name, 0.0)

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a @ y + self.size("L_fyy") * y.square().sum() / 2 + self.size("L_fxy") * x[0] * y[1]

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        cubic = self.size("M_yy") * y.pow(3).sum() / 6 + self.size("M_xy") * x[0] * y[0].square() / 2
        return (y - self.B @ x).square().sum() / 2 + cubic - self.w * y[2]

    def limit(self, x: Tensor, y: Tensor) -> Tensor:
        """-c without its y_3."""
        bent = self.size("L_cyy") * y[:2].square().sum() / 2 + self.size("M_cyy") * y[:2].pow(3).sum() / 6
        return x[1] - bent - self.size("L_cxy") * x[0] * y[0] - self.size("M_cxy") * x[0] * y[0].square() / 2

    def problem(self) -> BilevelProblem:
        return BilevelProblem(self.f, self.g, inequalities=lambda x, y: y[2] - self.limit(x, y))

    def constants(self, y: Tensor) -> Constants:
        """Within REACH of y."""
        far, x = float(y.abs().max()) + REACH, float(self.x[0].abs())
        names = ("M_cyy", "M_cxy", "M_yy", "M_xy", "L_fyy", "L_fxy")
        plain: dict[str, Any] = {name: self.size(name) for name in names}
        L_cyy = self.size("L_cyy") + self.size("M_cyy") * far + self.size("M_cxy") * x
        L_cxy = self.size("L_cxy") + self.size("M_cxy") * far
        return Constants(mu=None, **plain, L_cyy=L_cyy, L_cxy=L_cxy, radius=REACH)

    def lifted(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.cat([u, self.limit(x, u).unsqueeze(0)])

    def exact(self) -> tuple[Tensor, Tensor]:
        """(y*, h), by Newton's method and the implicit function theorem in (y_1, y_2)."""
        x, u = self.x, torch.zeros(2)

        def slope(x: Tensor, u: Tensor) -> Tensor:
            return gradient(lambda u: self.g(x, self.lifted(x, u)), u)

        for _ in range(6):
            u = (u - torch.linalg.solve(jacobian(lambda u: slope(x, u), u), slope(x, u))).detach()
        fx = gradient(lambda x: self.f(x, self.lifted(x, u)), x)
        fu = gradient(lambda u: self.f(x, self.lifted(x, u)), u)
        v = torch.linalg.solve(jacobian(lambda u: slope(x, u), u), fu)
        return self.lifted(x, u), (fx - jacobian(lambda x: slope(x, u), x).T @ v).detach()

    def implicit(self, y: Tensor) -> Tensor:
        """The implicit gradient at any y, from the whole system in (y, w), w by least squares."""
        x = self.x

        def c(x: Tensor, y: Tensor) -> Tensor:
            return y[2] - self.limit(x, y)

        J = gradient(lambda y: c(x, y), y).detach()
        w = (-(J @ gradient(lambda y: self.g(x, y), y)) / J.square().sum()).detach()

        def top(x: Tensor, y: Tensor) -> Tensor:
            return gradient(lambda y: self.g(x, y) + w * c(x, y), y)

        K = torch.zeros(4, 4)
        K[:3, :3], K[:3, 3], K[3, :3] = jacobian(lambda y: top(x, y), y), J, J
        c_x = gradient(lambda x: c(x, y), x).unsqueeze(0)
        cross = torch.cat([jacobian(lambda x: top(x, y), x), c_x])
        fx, fy = gradient(lambda x: self.f(x, y), x), gradient(lambda y: self.f(x, y), y)
        v: Tensor = torch.linalg.solve(K, torch.cat([fy, torch.zeros(1)]))
        return torch.sub(fx, cross.T @ v).detach()


def gradient(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Of a number; with a graph, whatever `at` hangs on."""
    leaf = at if at.requires_grad else at.detach().requires_grad_()
    found: Tensor = torch.autograd.grad(of(leaf), leaf, create_graph=True)[0]
    return found


def jacobian(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Row by row, without a graph."""
    leaf = at.detach().requires_grad_()
    values = of(leaf)
    if not values.requires_grad:
        return torch.zeros(len(values), len(leaf))
    rows = [torch.autograd.grad(v, leaf, retain_graph=True, materialize_grads=True, allow_unused=True) for v in values]
    return torch.stack([row[0] for row in rows])
