"""
Learning what a decision needs: a quadratic program as a layer
==============================================================

A linear model predicts the returns of five assets, and a quadratic program turns the
prediction into a portfolio. Fitted by least squares the model is as close as it can be
to the returns on average; learned *through* the program it is right where decisions
depend on it.
"""

import matplotlib.pyplot as plt
import torch

from bilevel import BilevelProblem, Polytope, hypergradient, minimize

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)

# %%
# Returns fall steeply where the first signal is bad, and hardly rise where it is good. A
# linear model can follow one side only, and decisions are made on the other.

draw = torch.Generator().manual_seed(0)


def days(n):
    signals = torch.randn(n, 5, 2, generator=draw)
    first, second = signals.unbind(-1)
    returns = 3 * first.clamp(max=0) + 0.2 * first.clamp(min=0) + 0.8 * second
    return {"signals": signals, "returns": returns}


past, future = days(150), days(1000)
risk = 0.3 * torch.eye(5) + 0.1

# %%
# A day is a task: all programs of a batch are solved side by side. The outer objective
# is what the portfolio really costs.


def cost(y, returns):
    return 0.5 * y @ risk @ y - returns @ y


def predicted(x, day):
    return day["signals"] @ x["weights"] + x["bias"]


problem = BilevelProblem(
    f=lambda x, y, day: cost(y, day["returns"]),
    g=lambda x, y, day: cost(y, predicted(x, day)),
    constraints=lambda x, day: Polytope(A=torch.ones(1, 5), b=1.0, lower=0.0),
    tasks=True,
)

# %%
# Least squares first, and from there along hypergradients.

design = torch.cat([past["signals"], torch.ones(150, 5, 1)], 2).reshape(-1, 3)
fitted = torch.linalg.lstsq(design, past["returns"].reshape(-1, 1)).solution[:, 0]
squares = {"weights": fitted[:2], "bias": fitted[2]}
y0 = torch.full((5,), 0.2)
learned = minimize(problem, squares, y0, data=past, max_steps=20, throw=False).x


def judged(x):
    """Cost and error on days that were not seen."""
    with torch.no_grad():
        error = (predicted(x, future) - future["returns"]).square().mean()
    value = hypergradient(problem, x, y0, data=future, throw=False).value
    return {"cost of the decisions": value, "squared error": float(error)}


by_squares, by_decisions = judged(squares), judged(learned)
print("least squares:", by_squares)
print("through the program:", by_decisions)

# %%
figure, all_axes = plt.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
for axes, name in zip(all_axes, by_squares):
    axes.bar(
        ["least squares", "through\nthe program"],
        [by_squares[name], by_decisions[name]],
        color=["C2", "C0"],
        width=0.5,
    )
    axes.set_title(f"{name} (lower is better)", fontsize=10)
    axes.axhline(0, color="black", linewidth=0.8)
plt.show()
