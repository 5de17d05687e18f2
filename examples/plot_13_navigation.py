"""
A policy that finds its goal in three steps
===========================================

A point in the plane is to reach a goal that it does not see, and has twenty tries before
each policy gradient. MAML learns the policy from which these gradients lead to any goal:
the inner step is a policy gradient, and the hypergradient goes through it.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from bilevel.few_shot import OuterLoop, adapt, evaluate, train
from bilevel.reinforcement import (
    GaussianPolicy,
    GoalTasks,
    MetaPolicy,
    Navigation,
    TrustRegion,
    rollout,
)

plt.style.use("tableau-colorblind10")
torch.manual_seed(0)

# %%
# Environments are functions of tensors, so that all tries of all tasks run side by side.

horizon = 15
walker = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
with torch.no_grad():
    walker[-1].weight.mul_(0.1)
policy, environment = GaussianPolicy(walker, 2, -1.5), Navigation(horizon)
meta = MetaPolicy(policy, environment, step=1e-3, evaluation_steps=3, learn_steps=True)
learner, goals = meta.learner(), GoalTasks()

# %%
# The outer steps are natural gradients within a trust region.

loop = OuterLoop(algorithm=TrustRegion(meta, delta=0.02))
trained = train(learner, goals, max_steps=30, batch=20, outer=loop)
scores = {
    steps: evaluate(learner, trained.x, goals, episodes=40, steps=steps).score.mean
    for steps in range(4)
}
print("mean return after so many policy gradients:")
print({steps: round(score, 2) for steps, score in scores.items()})

# %%
# One path to each of six goals, before and after adapting.

batch = goals.sample(6, seed=5)
adapted = adapt(learner, trained.x, batch, steps=3).y["policy"]
before = meta.params_of(trained.x)
noise = torch.zeros(1, horizon, policy.noise + environment.step_noise)
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
for k in range(6):
    task = {"goal": batch["goal"][k]}
    after = {name: value[k] for name, value in adapted.items()}
    for params, style in ((before, ":"), (after, "-")):
        start = torch.zeros(1, environment.start_noise)
        made = rollout(environment, policy, params, task, start, noise)
        path = made.observations[0].detach()
        left.plot(*path.T.tolist(), style, color=f"C{k}", linewidth=1.5)
    left.plot(*task["goal"].tolist(), "*", color=f"C{k}", markersize=12)
left.set(title="mean actions: dotted before, solid after", aspect="equal")
right.plot(list(scores), list(scores.values()), "o-")
right.set(xlabel="policy gradients", ylabel="mean return of new goals", xticks=range(4))
plt.show()
