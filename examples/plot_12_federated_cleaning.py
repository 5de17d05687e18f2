"""
Wrong labels of clients whose samples stay with them
====================================================

Ten clients have digits of few classes each, and 30 % of the labels are wrong. A weight
for each sample is learned, without a sample ever leaving its client: what a client sends
are sums of derivatives, at a point that it was given.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from bilevel import BilevelProblem
from bilevel.federated import (
    Clients,
    FederatedSOBA,
    Participation,
    dirichlet_split,
    federate,
    stacked,
)

plt.style.use("tableau-colorblind10")

# %%
# 400 digits to train with and 200 clean ones. `dirichlet_split` gives each client few
# classes, and `stacked` pads their samples to one shape, with a weight of zero for what
# is padding.

pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
draw = torch.Generator().manual_seed(0)
order = torch.randperm(len(labels), generator=draw)
pixels, labels = pixels[order].float() / 16, labels[order]
n = 400
wrong = torch.rand(n, generator=draw) < 0.3
given = torch.where(wrong, (labels[:n] + 1 + torch.arange(n) % 9) % 10, labels[:n])
parts = dirichlet_split(given, clients=10, concentration=0.3)
clean = dirichlet_split(labels[n : n + 200], clients=10, concentration=0.3, seed=1)
train = stacked([pixels[:n], given, torch.arange(n)], parts)
held = stacked([pixels[n : n + 200], labels[n : n + 200]], clean)
counts = torch.stack([torch.bincount(given[part], minlength=10) for part in parts])

# %%
# The objectives of one client are means over its samples, whatever their number: its
# weights of samples sum to one.


def f(x, y, own):
    inputs, targets, real = own["held"]
    losses = cross_entropy(inputs @ y, targets, reduction="none")
    return (real * losses).sum()


def g(x, y, own):
    inputs, targets, which, real = own["train"]
    losses = cross_entropy(inputs @ y, targets, reduction="none")
    weighted = (real * x[which].sigmoid() * losses).sum()
    return weighted + 5e-3 * y.square().sum()


x0, y0 = torch.zeros(n), torch.zeros(64, 10)
data = {"train": train, "held": held}
clients = Clients(BilevelProblem(f, g), x0, y0, data)

# %%
# Half of the clients are asked in a round, and some do not answer.

found = federate(
    clients,
    x0,
    y0,
    method=FederatedSOBA(inner_step=0.2, outer_step=20.0),
    steps=400,
    participation=Participation(share=0.5, dropout=0.05),
)
weights = found.x.sigmoid()
auc = float((weights[wrong, None] < weights[None, ~wrong]).float().mean())
test = slice(n + 200, None)
accuracy = float(((pixels[test] @ found.y).argmax(1) == labels[test]).float().mean())
print(f"AUC {auc:.3f}, test accuracy {accuracy:.3f}, {found.traffic}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
bottom = torch.zeros(10)
for digit in range(10):
    height = counts[:, digit]
    color = plt.get_cmap("cividis")(digit / 9)
    left.bar(range(10), height.tolist(), bottom=bottom.tolist(), color=color)
    bottom = bottom + height
left.set(xlabel="client", ylabel="samples (a color for each class)")
bins = [k / 20 for k in range(21)]
right.hist(weights[~wrong].tolist(), bins, label="right label")
right.hist(weights[wrong].tolist(), bins, label="wrong label", alpha=0.8)
right.set(xlabel="learned weight", ylabel="samples", title=f"AUC {auc:.3f}")
right.legend()
plt.show()
