"""
The cost of a support vector machine
====================================

The dual of a support vector machine is a quadratic program in a box, and its cost
:math:`C = e^x` is the size of the box. Samples sit on either side of the box, or move
with it: which they do is what the hypergradient is made of.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import softplus

from bilevel import BilevelProblem, Polytope, minimize, solution_path

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)

# %%
# Two clouds in the plane that overlap, 60 samples to train with and 200 held out.

draw = torch.Generator().manual_seed(2)


def clouds(n):
    t = torch.ones(n)
    t[::2] = -1
    points = torch.randn(n, 2, generator=draw) + 0.9 * t[:, None]
    return torch.cat([points, torch.ones(n, 1)], 1), t


(Z, t), (Z_val, t_val) = clouds(60), clouds(200)
K = (Z * t[:, None]) @ (Z * t[:, None]).T + 1e-6 * torch.eye(60)


def plane(y):
    """The weights of the primal problem, the last one for the intercept."""
    return (y * t) @ Z


problem = BilevelProblem(
    f=lambda x, y: softplus(-t_val * (Z_val @ plane(y))).mean(),
    g=lambda x, y: y @ K @ y / 2 - y.sum(),
    constraints=lambda x: Polytope(lower=torch.zeros(60), upper=x.exp().expand(60)),
)

# %%
# The default estimator sees the constraints and differentiates the optimality
# conditions of the program.

solution = minimize(problem, torch.tensor(1.0), torch.zeros(60), max_steps=15)
cost = float(solution.x.exp())
on_bounds = int((solution.y < 1e-9).sum() + (solution.y > cost - 1e-9).sum())
grid = [torch.tensor(-5 + 0.25 * k) for k in range(29)]
path = solution_path(problem, grid, torch.zeros(60))
print(f"C = {cost:.3f} after {len(solution.history)} evaluations of Phi")
print(
    f"held-out loss {solution.value:.4f}, the best of the grid {min(path.values):.4f}"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
w = plane(solution.y).tolist()
for sign, color in ((-1, "C0"), (1, "C1")):
    of = t == sign
    size = 15 + 60 * solution.y[of] / cost
    left.scatter(*Z[of, :2].T.tolist(), size.tolist(), color=color, alpha=0.7)
ends = [-3.0, 3.0]
for level, style in ((0, "-"), (1, ":"), (-1, ":")):
    line = [(level - w[2] - w[0] * end) / w[1] for end in ends]
    left.plot(ends, line, "k", linestyle=style, linewidth=1)
left.set(ylim=(-4, 4), title="larger: a larger multiplier", xticks=[], yticks=[])
right.plot([float(x) for x in grid], path.values, label="29 programs of a grid")
right.plot(float(solution.x), solution.value, "o", color="C1", label="found")
right.set(xlabel="x, the logarithm of the cost", ylabel="held-out loss")
right.legend()
plt.show()
