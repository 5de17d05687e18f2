"""
A penalty for each feature
==========================

A grid of ten values for each of 40 penalties has :math:`10^{40}` points. A hypergradient
in all 40 costs as much as one in a single penalty.
"""

import matplotlib.pyplot as plt
import torch

from bilevel import BilevelProblem, Box, minimize

plt.style.use("tableau-colorblind10")
torch.set_default_dtype(torch.float64)

# %%
# Of 40 features the first eight matter.

draw = torch.Generator().manual_seed(1)
truth = torch.zeros(40)
truth[:8] = torch.tensor([3.0, -2.0, 1.5, -1.0, 2.5, -3.0, 1.0, -1.5])


def samples(n):
    A = torch.randn(n, 40, generator=draw)
    return A, A @ truth + 2.0 * torch.randn(n, generator=draw)


(A, b), (A_val, b_val), (A_test, b_test) = samples(60), samples(60), samples(2000)


def error(y, A=A_test, b=b_test):
    return (A @ y - b).square().mean()


# %%
# The same problem with one penalty for all, and with one for each. Logarithms of
# penalties are learned, within bounds that keep `g` well conditioned.


def g(x, y):
    return error(y, A, b) + (x.exp() * y.square()).mean()


problem = BilevelProblem(lambda x, y: error(y, A_val, b_val), g)
settings = {"constraint": Box(-6.0, 8.0), "max_steps": 60}
one = minimize(problem, torch.zeros(1), torch.zeros(40), **settings)
each = minimize(problem, torch.zeros(40), torch.zeros(40), **settings)
found = {"one penalty": float(error(one.y)), "a penalty each": float(error(each.y))}
print(found, "the noise alone has 4.0")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
learned = each.x.tolist()
left.bar(range(8), learned[:8], label="features that matter")
left.bar(range(8, 40), learned[8:], label="all others")
left.set(xlabel="feature", ylabel="log penalty that was learned")
left.legend(loc="lower right")
right.bar(found.keys(), found.values(), color=["C2", "C0"], width=0.5)
right.axhline(4.0, color="black", linestyle=":", label="the noise alone")
right.set_ylabel("squared error on 2000 new samples")
right.legend()
plt.show()
