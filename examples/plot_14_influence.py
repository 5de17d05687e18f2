"""
What a training sample does to a prediction
===========================================

What would the test loss be without a sample? The influence of all samples is one
hypergradient in their weights. Here it is compared with what it predicts: the model is
trained again, without the sample.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from torch.nn.functional import softplus

from bilevel import influence

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)

# %%
# A logistic regression on 150 samples.

A, t = (torch.as_tensor(part) for part in load_breast_cancer(return_X_y=True))
A = (A - A.mean(0)) / A.std(0)
t = 2.0 * t - 1
order = torch.randperm(len(t), generator=torch.Generator().manual_seed(1))
train, test = ((A[part], t[part]) for part in (order[:150], order[150:]))
l2 = 0.1


def losses(y, batch):
    return softplus(-batch[1] * (batch[0] @ y))


def fitted(keep):
    """The minimizer of the mean loss over 150 samples, of those that are kept."""
    y = torch.zeros(30)
    for _ in range(30):
        margins = train[1] * (train[0] @ y)
        slopes = -torch.sigmoid(-margins) * train[1] * keep / 150
        bends = torch.sigmoid(margins) * torch.sigmoid(-margins) * keep / 150
        gradient = train[0].T @ slopes + l2 * y
        hessian = (train[0].T * bends) @ train[0] + l2 * torch.eye(30)
        y = y - torch.linalg.solve(hessian, gradient)
    return y


# %%
# The scores of all samples at once, and those of 40 of them by training again.

y = fitted(torch.ones(150))
found = influence(losses, y, train, test, l2=l2)
ranked = found.scores.argsort()
tried = torch.cat([ranked[:20], ranked[-20:]])
actual = []
for k in tried.tolist():
    keep = torch.ones(150)
    keep[k] = 0
    actual.append(float((losses(fitted(keep), test) - losses(y, test)).mean()))
actual = torch.tensor(actual)
correlation = float(torch.corrcoef(torch.stack([found.scores[tried], actual]))[0, 1])
print(f"correlation of 40 predictions with 40 fits: {correlation:.4f}")

# %%
figure, axes = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
axes.scatter((1e3 * actual).tolist(), (1e3 * found.scores[tried]).tolist(), s=18)
reach = 1e3 * float(actual.abs().max())
axes.plot([-reach, reach], [-reach, reach], "k:", linewidth=1, label="equal")
axes.set_xlabel("change of the test loss, trained again (1e-3)")
axes.set_ylabel("predicted by influence (1e-3)")
axes.legend()
plt.show()
