"""
How fair is fair enough? A level that is learned
================================================

A logistic regression is fitted under a bound :math:`c` on the covariance of its scores
with a group. How tight should the bound be? The outer objective weighs loss and
unfairness on *other* data, and its derivative in :math:`c` comes from the optimality
conditions: a bound that holds has a multiplier.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import softplus

from bilevel import KKT, BilevelProblem, Box, Polytope, minimize, solution_path
from bilevel.solvers import InteriorPoint

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)

# %%
# Two classes in the plane. The group depends on the direction in which they differ.

draw = torch.Generator().manual_seed(0)


def people(n):
    t = torch.where(torch.rand(n, generator=draw) < 0.5, -1.0, 1.0)
    points = torch.randn(n, 2, generator=draw) + t[:, None] * torch.tensor([1.0, 0.6])
    group = (points[:, 0] + 0.7 * torch.randn(n, generator=draw) > 0).double()
    return torch.cat([points, torch.ones(n, 1)], 1), t, group


(U, t, group), (U_val, t_val, group_val), test = people(400), people(400), people(4000)
along = (group - group.mean()) @ U / len(U)


def unfairness(y, U, group):
    """The covariance of the probability of a yes with the group."""
    return (group - group.mean()) @ (U @ y).sigmoid() / len(U)


problem = BilevelProblem(
    f=lambda c, y: (
        softplus(-t_val * (U_val @ y)).mean()
        + 20 * unfairness(y, U_val, group_val) ** 2
    ),
    g=lambda c, y: softplus(-t * (U @ y)).mean() + 0.005 * y.square().sum(),
    constraints=lambda c: Polytope(G=torch.stack([along, -along]), h=c.expand(2)),
)

# %%
kkt, y0 = KKT(InteriorPoint()), torch.zeros(3)
found = minimize(
    problem, torch.tensor(0.5), y0, estimator=kkt, constraint=Box(1e-3), max_steps=15
)
levels = [torch.tensor(0.03 * k) for k in range(1, 31)]
path = solution_path(problem, levels, y0, inner=InteriorPoint())


def judged(y):
    U, t, group = test
    right = float(((U @ y).sign() == t).double().mean())
    return right, float(unfairness(y, U, group).abs())


curve = [judged(y) for y in path.y]
(accuracy, unfair), (accuracy_free, unfair_free) = judged(found.y), curve[-1]
level = float(found.x)
print(f"level {level:.3f}: accuracy {accuracy:.3f}, unfairness {unfair:.3f}")
print(f"no bound: accuracy {accuracy_free:.3f}, unfairness {unfair_free:.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
left.plot([float(c) for c in levels], path.values, label=r"$\Phi(c)$")
left.plot(level, found.value, "o", label="learned level")
left.set(xlabel="level c of the constraint", ylabel="loss and unfairness, other data")
left.legend()
right.plot([u for _, u in curve], [a for a, _ in curve], label="levels of a grid")
right.plot(unfair, accuracy, "o", label="learned level")
right.plot(unfair_free, accuracy_free, "s", label="no bound")
right.set(xlabel="unfairness on new data", ylabel="accuracy on new data")
right.legend()
plt.show()
