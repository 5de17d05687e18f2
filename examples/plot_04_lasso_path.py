"""
The penalty of a lasso, without a grid
======================================

The minimizer of :math:`|A y - b|^2 / 2n + e^x |y|_1` has a kink wherever a coefficient
enters or leaves. In between it moves smoothly, and so does what is made of it: the
hypergradient is that of the manifold that the minimizer is on.
"""

import matplotlib.pyplot as plt
import torch

from bilevel import BilevelProblem, minimize, solution_path
from bilevel.prox import L1

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)

# %%
draw = torch.Generator().manual_seed(3)
A = torch.randn(120, 60, generator=draw)
truth = torch.zeros(60)
truth[:6] = torch.tensor([2.0, -1.5, 1.0, -1.0, 0.8, 1.2])
b = A @ truth + torch.randn(120, generator=draw)
train, held = slice(0, 70), slice(70, None)


def squares(y, part):
    return (A[part] @ y - b[part]).square().mean() / 2


problem = BilevelProblem(
    f=lambda x, y: squares(y, held),
    g=lambda x, y: squares(y, train),
    prox=lambda x: L1(x.exp()),
)

# %%
# Where all coefficients are zero is known, and a search along hypergradients begins
# nearby. The path is drawn for comparison: the search does not need it.

top = (A[train].T @ b[train]).abs().max().div(70).log()
solution = minimize(problem, top - 0.3, torch.zeros(60), max_steps=15)
grid = list(top - torch.linspace(0, 6, 60))
path = solution_path(problem, grid, torch.zeros(60))
best = min(path.values)
evaluations = len(solution.history)
print(f"{solution.value:.4f} in {evaluations} evaluations, the grid of 60: {best:.4f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
over, coefficients = [float(x) for x in grid], torch.stack(list(path.y)).numpy()
left.plot(over, coefficients[:, 6:], color="lightgray", linewidth=1)
left.plot(over, coefficients[:, :6], linewidth=2)
left.axvline(float(solution.x), color="black", linestyle=":")
left.set(xlabel="log penalty", ylabel="coefficients (gray: truly zero)")
right.plot(over, path.values, label="60 fits of a grid")
right.plot(
    float(solution.x), solution.value, "o", color="C1", label="found by hypergradients"
)
right.set(xlabel="log penalty", ylabel="held-out loss", yscale="log")
right.legend()
plt.show()
