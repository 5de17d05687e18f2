"""
Step lengths that are learned
=============================

Twenty steps of training have a step length for each layer, a momentum, and a factor for
each step. All of them are outer variables: what is minimized is the loss on held-out
samples where the twenty steps end, by a derivative through them.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from bilevel import ITD, BilevelProblem, functional, minimize
from bilevel.solvers import Adam, Clipped, HeavyBall, Iterate, Scheduled

plt.style.use("tableau-colorblind10")
torch.manual_seed(0)
steps = 20

# %%
pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(labels))
pixels, labels = pixels[order].float() / 16, labels[order]
train, held, test = slice(300), slice(300, 600), slice(600, None)
net = functional(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))


def loss(y, part):
    return cross_entropy(net(y, pixels[part]), labels[part])


# %%
# An optimizer is a value, and its settings may be functions of x.

optimizer = Scheduled(
    HeavyBall(
        step=lambda x: {name: log.exp() for name, log in x["log_steps"].items()},
        momentum=lambda x: x["raw_momentum"].sigmoid(),
    ),
    factors=lambda x: x["log_factors"].exp(),
)
problem = BilevelProblem(lambda x, y: loss(y, held), lambda x, y: loss(y, train))
itd = ITD(Iterate(optimizer, max_steps=steps))
x0 = {
    "log_steps": {name: torch.tensor(0.3).log() for name in net.params},
    "raw_momentum": torch.tensor(0.8).logit(),
    "log_factors": torch.zeros(steps),
}
solution = minimize(
    problem,
    x0,
    dict(net.params),
    estimator=itd,
    outer=Clipped(Adam(0.05), max_norm=0.1),
    max_steps=60,
    throw=False,
)
best = solution.best.x

# %%
# The steps are taken again, and the loss on other digits is looked at after each.


def curve(x):
    y, move = dict(net.params), {name: 0.0 for name in net.params}
    found = [float(loss(y, test).detach())]
    for k in range(steps):
        y = {name: value.detach().requires_grad_() for name, value in y.items()}
        slopes = torch.autograd.grad(loss(y, train), list(y.values()))
        for (name, value), slope in zip(y.items(), slopes):
            step, momentum = x["log_steps"][name].exp(), x["raw_momentum"].sigmoid()
            move[name] = momentum * move[name] - step * slope
            y[name] = value.detach() + x["log_factors"][k].exp() * move[name]
        found.append(float(loss(y, test).detach()))
    return found


before, after = curve(x0), curve(best)
print(
    f"test loss after {steps} steps: {before[-1]:.3f} before, {after[-1]:.3f} learned"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
left.semilogy(before, ":", label="step 0.3, momentum 0.8")
left.semilogy(after, label="learned")
left.set(xlabel="step of training", ylabel="loss on other digits")
left.legend()
for name, log_step in best["log_steps"].items():
    lengths = (best["log_factors"] + log_step).exp().tolist()
    right.plot(range(1, steps + 1), lengths, label=name)
right.axhline(0.3, color="black", linestyle=":")
right.set(xlabel="step of training", ylabel="learned step length", yscale="log")
right.legend(fontsize="small")
plt.show()
