"""
A start that adapts in five steps: MAML
=======================================

Each task is a sinusoid of its own amplitude and phase, seen at ten points. MAML learns
the weights from which a few gradient steps on these ten points fit any of them. The
outer variable is the start of the inner steps, and the hypergradient goes through them.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import mse_loss

from bilevel.few_shot import OuterLoop, adapt, evaluate, predict, train
from bilevel.problems import maml
from bilevel.solvers import Adam
from bilevel.tasks import Sinusoid

plt.style.use("tableau-colorblind10")
torch.manual_seed(0)

# %%
# A method is a function from your module to a *learner*, and tasks come from a source.

module = nn.Sequential(
    nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
)
tasks = Sinusoid(shots=10, queries=10)
learner = maml(module, mse_loss, step=0.01, inner_steps=1)
trained = train(learner, tasks, max_steps=800, batch=25, outer=OuterLoop(Adam(2e-3)))
untrained = evaluate(learner, learner.x0, tasks, episodes=200)
found = evaluate(learner, trained.x, tasks, episodes=200)
print("untrained:", untrained.score, " trained:", found.score)

# %%
# One new task, and what five steps make of the start that was learned, and of one that
# was not.

task = Sinusoid(shots=10, queries=100).sample(1, seed=8)
many = maml(module, mse_loss, step=0.01, inner_steps=5)
at = task["query_x"][0].sort(0)
figure, all_axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
losses = {}
for axes, (name, x) in zip(all_axes, {"random": learner.x0, "MAML": trained.x}.items()):
    adapted = adapt(many, x, task)
    curve = predict(many, x, adapted)[0][at.indices[:, 0], 0]
    truth = task["query_y"][0][at.indices[:, 0], 0]
    losses[name] = float(mse_loss(curve, truth))
    axes.plot(at.values.tolist(), truth.tolist(), "k:", label="the task")
    axes.plot(at.values.tolist(), curve.tolist(), label="after five steps")
    axes.plot(
        task["support_x"][0].tolist(),
        task["support_y"][0].tolist(),
        "o",
        label="what is seen",
    )
    axes.set_title(f"{name} start: squared error {losses[name]:.2f}")
all_axes[0].legend(fontsize="small")
figure.tight_layout()
plt.show()
