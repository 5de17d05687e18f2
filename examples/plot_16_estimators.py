"""
Estimators compared: error against cost
=======================================

Every estimator sees the same two functions. They differ in what they need of them, in
what they cost, and in how wrong they are, and here the truth is known in closed form.
"""

import matplotlib.pyplot as plt

from bilevel import AID, ESJ, ITD, Penalty, Truncated, hypergradient
from bilevel.problems.quadratic import quadratic
from bilevel.solvers import CG, GradientDescent, Iterate, Neumann

plt.style.use("tableau-colorblind10")

# %%
# A quadratic problem with 6 outer and 20 inner variables of condition number 30. Each
# estimator is given more and more inner steps.

instance = quadratic(p=6, q=20, kappa=30.0)
x = instance.x0 + 1.0
truth = instance.gradient(x)


def descent(steps):
    return Iterate(GradientDescent(1 / 30), max_steps=steps)


families = {
    "AID, CG": lambda n: AID(descent(n), CG(rtol=0.0, max_steps=max(2, n // 8))),
    "AID, Neumann": lambda n: AID(descent(n), Neumann(1 / 30, terms=n)),
    "ITD": lambda n: ITD(descent(n)),
    "ITD, last 10 steps": lambda n: ITD(descent(n), Truncated(10)),
    "ESJ": lambda n: ESJ(descent(n), directions=6, distribution="orthonormal"),
    "penalty": lambda n: Penalty(descent(n), weight=1e4),
}
curves = {}
for name, family in families.items():
    curve = []
    for n in (16, 32, 64, 128, 256, 512):
        found = hypergradient(
            instance.problem, x, instance.y0, estimator=family(n), throw=False
        )
        s = found.stats
        calls = s.gradients + s.outer_gradients + s.hvps + s.cross_products
        error = float((found.grad - truth).norm() / truth.norm())
        curve.append((calls, max(error, 1e-15)))
    curves[name] = curve
    print(f"{name}: {curve[-1][1]:.1e} after {curve[-1][0]} oracle calls")

# %%
# Implicit differentiation and full unrolling end at the truth. What is cut off or
# penalized keeps a bias, however long it runs.

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for (name, curve), marker in zip(curves.items(), "os^Dvp"):
    axes.loglog(*zip(*curve), marker=marker, markersize=5, label=name)
axes.set(xlabel="oracle calls", ylabel="relative error of the hypergradient")
axes.legend(fontsize="small")
plt.show()
