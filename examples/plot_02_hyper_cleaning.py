"""
Finding wrong labels: hyper-cleaning
====================================

A weight for each training sample is learned so that the model that is trained with these
weights does well on a few samples whose labels are known to be right. Samples whose
labels are wrong lose their weight:

.. math:: \\min_x \\; \\text{loss}_{\\text{clean}}(y^*(x)), \\qquad
    y^*(x) = \\operatorname{argmin}_y \\sum_i \\sigma(x_i) \\, \\text{loss}_i(y) + c |y|^2.

There are as many outer variables as there are samples, and one hypergradient costs
about as much as two fits of the model.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from bilevel import BilevelProblem, minimize

plt.style.use("tableau-colorblind10")

# %%
# 400 handwritten digits to train with, of which 30 % get a wrong label, and 200 with
# labels that are right.

pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
draw = torch.Generator().manual_seed(0)
order = torch.randperm(len(labels), generator=draw)
pixels, labels = pixels[order].float() / 16, labels[order]
n = 400
wrong = torch.rand(n, generator=draw) < 0.3
given = torch.where(wrong, (labels[:n] + 1 + torch.arange(n) % 9) % 10, labels[:n])
train, clean, test = pixels[:n], slice(n, n + 200), slice(n + 200, None)

# %%
# The two objectives are written down as they are.


def f(x, y):
    return cross_entropy(pixels[clean] @ y, labels[clean])


def g(x, y):
    losses = cross_entropy(train @ y, given, reduction="none")
    return (x.sigmoid() * losses).mean() + 1e-3 * y.square().sum()


problem, y0 = BilevelProblem(f, g), torch.zeros(64, 10)
solution = minimize(problem, torch.zeros(n), y0, max_steps=6)
weights = solution.x.sigmoid()

# %%
# How often does a wrong label get less weight than a right one, and what is gained?

below = weights[wrong, None] < weights[None, ~wrong]
auc = float(below.float().mean())


def accuracy(y):
    return float(((pixels[test] @ y).argmax(1) == labels[test]).float().mean())


plain = minimize(problem, torch.full((n,), 20.0), y0, max_steps=0)
before, after = accuracy(plain.y), accuracy(solution.y)
print(f"AUC {auc:.3f}, test accuracy {before:.3f} before and {after:.3f} after")

# %%
figure = plt.figure(figsize=(8, 3.2), layout="constrained")
left, right = figure.subfigures(1, 2)
axes = left.subplots()
bins = torch.linspace(0, 1, 21).numpy()
axes.hist(weights[~wrong].numpy(), bins, label="right label")
axes.hist(weights[wrong].numpy(), bins, label="wrong label", alpha=0.8)
axes.set(xlabel="learned weight", ylabel="samples", title=f"AUC {auc:.3f}")
axes.legend()
for cell, k in zip(right.subplots(3, 6).flat, weights.argsort().tolist()):
    cell.imshow(train[k].reshape(8, 8).numpy(), cmap="gray_r")
    cell.set_title(int(given[k]), color="C1" if wrong[k] else "black", fontsize=9)
    cell.axis("off")
right.suptitle("least weight, with the given labels", fontsize=10)
plt.show()
