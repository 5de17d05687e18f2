"""
A deep equilibrium network
==========================

The features of a sample are the fixed point :math:`z^* = \\tanh(W z^* + U u + b)` of one
layer, which is a network of infinitely many layers that share their weights. No step
towards the fixed point is kept: the hypergradient solves one linear system there.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from bilevel import BilevelProblem, functional, minimize
from bilevel.problems.deep_equilibrium import EquilibriumLayer
from bilevel.solvers import Adam

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

# %%
# Two interleaved spirals, 60 points to train with and as many to test.


def spirals(n):
    labels = torch.arange(n) % 2
    turn = 3.5 * torch.rand(n) + 0.5
    angle = turn + math.pi * labels
    points = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) / 2
    return points + 0.05 * torch.randn(n, 2), labels


(points, labels), (test_points, test_labels) = spirals(60), spirals(60)

# %%
# `fixed_point=` takes the place of an inner objective: the features are what the layer
# leaves where it is, and they minimize nothing. This layer contracts by construction.

layer = functional(EquilibriumLayer(inputs=2, width=8))
problem = BilevelProblem(
    f=lambda x, z: cross_entropy(z @ x["head"].T, labels),
    fixed_point=lambda x, z: layer(x["layer"], z, points),
)
x0 = {"layer": dict(layer.params), "head": torch.randn(2, 8) / 8**0.5}
solution = minimize(problem, x0, torch.zeros(60, 8), outer=Adam(0.1), max_steps=80)

# %%
# What was learned, at other points: their features are found by plain iteration.


def scores(inputs):
    z = torch.zeros(len(inputs), 8)
    with torch.no_grad():
        for _ in range(200):
            z = layer(solution.x["layer"], z, inputs)
    return z @ solution.x["head"].detach().T


accuracy = float((scores(test_points).argmax(1) == test_labels).double().mean())
print(f"training loss {solution.value:.4f}, test accuracy {accuracy:.3f}")

# %%
span = torch.linspace(-2.4, 2.4, 80)
found = scores(torch.cartesian_prod(span, span))
sure = (found[:, 1] - found[:, 0]).sigmoid().reshape(80, 80).T
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
left.semilogy([record.value for record in solution.history])
left.set(xlabel="outer step", ylabel="training loss")
shown = right.contourf(span.tolist(), span.tolist(), sure.tolist(), 20, cmap="cividis")
figure.colorbar(shown, label="probability of the second spiral")
for label, marker in ((0, "o"), (1, "^")):
    of = test_points[test_labels == label].T.tolist()
    right.plot(*of, marker, color="w", markeredgecolor="k", markersize=5)
right.set(title=f"test accuracy {accuracy:.2f}", xticks=[], yticks=[])
plt.show()
