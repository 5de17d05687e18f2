"""
Five steps that deblur: a learned schedule
==========================================

Total variation and five steps of ADMM make a blurred picture sharper. How much, depends
on ten numbers: a penalty and a threshold for each step. They are learned on parts of
one photograph and used on another.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image

from bilevel import ITD, minimize
from bilevel.solvers import Adam, OwnSteps
from bilevel.terms import (
    ADMM,
    Convolution,
    Gradient,
    norm1,
    proximal_problem,
    sum_squares,
    variable,
)

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)

# %%
# Two photographs that come with scikit-learn, in gray and at half the size, cut into
# pieces of 32 by 32 pixels.


def pieces(name):
    photo = torch.tensor(load_sample_image(name)).double().mean(-1)[::2, ::2] / 255
    cut = photo[:192, :320].unfold(0, 32, 32).unfold(1, 32, 32).reshape(-1, 32, 32)
    return cut[torch.argsort(cut.var((1, 2)), descending=True)[:16]]


truth, new_truth = pieces("china.jpg"), pieces("flower.jpg")
profile = torch.exp(-((torch.arange(9) - 4.0) ** 2) / (2 * 1.5**2))
blur = Convolution(profile.outer(profile) / profile.sum() ** 2, (32, 32))
draw = torch.Generator().manual_seed(0)


def photographed(pictures):
    return blur.forward(pictures) + 0.01 * torch.randn(pictures.shape, generator=draw)


seen, new_seen = photographed(truth), photographed(new_truth)

# %%
# The scheme is written as the sum that it minimizes. With `steps=5` the inner variable
# is what five steps make of the blurred pictures, and the hypergradient goes through
# them.


def scheme(x, b):
    y = variable(32, 32)
    objective = 0.5 * sum_squares(blur @ y - b) + norm1(Gradient((32, 32)) @ y)
    return ADMM(x["log_rho"].exp(), x["log_threshold"].exp()).on(objective)


problem = proximal_problem(
    lambda x, y: (y - truth).square().mean(), lambda x: scheme(x, seen), steps=5
)
x0 = {"log_rho": torch.full((5,), -3.0), "log_threshold": torch.full((5,), -4.0)}
start = scheme(x0, seen).start(seen)
solution = minimize(
    problem, x0, start, estimator=ITD(OwnSteps()), outer=Adam(0.1), max_steps=60
)

# %%


def quality(pictures):
    """The peak signal-to-noise ratio in decibels."""
    return -10 * math.log10(float((pictures - new_truth).square().mean()))


with torch.no_grad():
    constant = scheme(x0, new_seen).run(new_seen, 5)
    learned = scheme(solution.x, new_seen).run(new_seen, 5)
decibels = {
    "blurred": quality(new_seen),
    "as it began": quality(constant),
    "learned": quality(learned),
}
print(decibels)

# %%
figure, rows = plt.subplots(4, 5, figsize=(7.6, 6.4), layout="constrained")
shown = zip([*decibels, "truth"], [new_seen, constant, learned, new_truth])
for row, (name, pictures) in zip(rows, shown):
    for axes, picture in zip(row, pictures):
        axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
    label = f"{name}\n{decibels[name]:.1f} dB" if name in decibels else name
    row[0].set_ylabel(label)
plt.show()
