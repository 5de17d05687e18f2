"""
Stochastic algorithms, compared by the samples they look at
===========================================================

Where both objectives are means over many samples, nothing needs to be solved at each
step: the model, the linear system and the hyperparameters move together, each along a
mini-batch. What reduces the noise of the batches makes the difference.
"""

import matplotlib.pyplot as plt
import torch

from bilevel import BilevelProblem, FiniteSum, Split, minimize
from bilevel.algorithms import SABA, SOBA, SRBA, StocBiO

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)

# %%
# A regression is pulled towards :math:`x`, which is learned on held-out samples: 512
# samples to train with and 256 held out, in batches of 32.

draw = torch.Generator().manual_seed(0)
A = torch.randn(768, 10, generator=draw)
b = A @ torch.linspace(-2, 2, 10) + 2 * torch.randn(768, generator=draw)


def loss(y, data):
    return (data[0] @ y - data[1]).square().mean() / 2


problem = BilevelProblem(
    f=lambda x, y, data: loss(y, data) + 0.05 * x.square().sum(),
    g=lambda x, y, data: loss(y, data) + (y - x).square().sum() / 2,
)
train, held = (A[:512], b[:512]), (A[512:], b[512:])
data = Split(g=FiniteSum(train, batch_size=32), f=FiniteSum(held, batch_size=32))
x0, y0 = torch.zeros(10), torch.zeros(10)

# %%
# Here the solution is known: with all the data it is a linear system.

H = train[0].T @ train[0] / 512 + torch.eye(10)
J, shift = torch.linalg.inv(H), torch.linalg.solve(H, train[0].T @ train[1] / 512)
M = held[0] @ J
solution = torch.linalg.solve(
    M.T @ M / 256 + 0.1 * torch.eye(10), M.T @ (held[1] - held[0] @ shift) / 256
)

# %%
# Each algorithm may ask 200,000 times for a derivative of one sample.

algorithms = {
    "SOBA": (SOBA(inner_step=0.2, outer_step=0.2), 4 * 32),
    "StocBiO": (
        StocBiO(inner_step=0.2, outer_step=0.2, inner_steps=5, linear_steps=5),
        12 * 32,
    ),
    "SABA": (SABA(inner_step=0.2, outer_step=0.2), 4 * 32),
    "SRBA": (SRBA(inner_step=0.2, outer_step=0.2), 8 * 32 + (3 * 512 + 256) // 16),
}
curves = {}
for name, (algorithm, calls) in algorithms.items():
    curve = []

    def distance(record, estimate):
        gap = float((estimate.x - solution).norm() / solution.norm())
        curve.append((record.step * calls, max(gap, 1e-15)))

    minimize(
        problem,
        x0,
        y0,
        algorithm=algorithm,
        data=data,
        max_steps=200_000 // calls,
        callback=distance,
    )
    curves[name] = curve
    print(f"{name}: {curve[-1][1]:.1e} from the solution")

# %%
# Without anything that reduces the noise, a constant step stops at the noise of a batch.
# A table of what each block said last (SABA) takes the noise away, and so do differences
# along the way with a look at all the data now and then (SRBA).

figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for (name, curve), style in zip(curves.items(), ("-", "--", "-.", ":")):
    axes.semilogy(*zip(*curve), style, label=name)
axes.set(
    xlabel="derivatives of one sample", ylabel="relative distance from the solution"
)
axes.legend()
plt.show()
