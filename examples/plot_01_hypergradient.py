"""
A hypergradient, and what it is the slope of
============================================

The outer objective is a function of :math:`x` alone,

.. math:: \\Phi(x) = f(x, y^*(x)), \\qquad y^*(x) = \\operatorname{argmin}_y g(x, y),

and its derivative has to know how :math:`y^*` moves with :math:`x`. Here both are known
in closed form, so that one can see that the estimate is right.
"""

import matplotlib.pyplot as plt
import torch

from bilevel import BilevelProblem, certify, estimate_constants, hypergradient

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)

# %%
# A line through the origin is fitted to three points, and pulled towards zero by a
# penalty :math:`e^x`. The outer objective is its squared error at a fourth point.

a = torch.tensor([1.0, 2.0, 3.0])
b = torch.tensor([1.2, 1.9, 4.5])
problem = BilevelProblem(
    f=lambda x, y: (2.0 * y - 2.1) ** 2 / 2,
    g=lambda x, y: ((a * y - b).square().sum() + x.exp() * y**2) / 2,
)


def closed_form(x):
    """Phi(x) and its derivative, by hand."""
    y = (a @ b) / (a @ a + x.exp())
    slope = -(a @ b) * x.exp() / (a @ a + x.exp()) ** 2
    return (2 * y - 2.1) ** 2 / 2, 2 * (2 * y - 2.1) * slope


# %%
# One call. The answer says whether it succeeded, what it cost, and with `certify` how
# far from the truth it can be.

points = [torch.tensor(value) for value in (-1.0, 1.5, 4.0)]
estimates = [hypergradient(problem, x, torch.tensor(0.0)) for x in points]
errors = [abs(float(e.grad - closed_form(x)[1])) for e, x in zip(estimates, points)]
constants = estimate_constants(problem, points[0], estimates[0].y)
certificate = certify(problem, points[0], estimates[0], constants)
print(estimates[0].status, estimates[0].stats)
print("error", errors[0], "bound", certificate.bound)

# %%
# The estimates are the slopes of the curve, which nobody told them.

grid = [-2 + 0.04 * k for k in range(201)]
figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
curve = [float(closed_form(torch.tensor(x))[0]) for x in grid]
axes.plot(grid, curve, label=r"$\Phi$, in closed form")
for x, estimate in zip(points, estimates):
    at, slope = float(x), float(estimate.grad)
    tangent = [estimate.value + 0.8 * slope * side for side in (-1, 1)]
    (line,) = axes.plot([at - 0.8, at + 0.8], tangent, color="C1", linewidth=3)
    axes.plot(at, estimate.value, "o", color="C1")
line.set_label("hypergradients, estimated")
axes.set(xlabel="x, the logarithm of the penalty", ylabel=r"$\Phi(x)$")
axes.legend()
plt.show()
