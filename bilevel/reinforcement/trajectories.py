"""Episodes: what was seen, done and earned, and how likely it was."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.reinforcement.environment import AbstractEnvironment
from bilevel.reinforcement.policy import AbstractPolicy, Params


class Trajectories(NamedTuple):
    """Episodes of equal length side by side, all of them constants.

    Attributes:
        observations: `(episodes, horizon, o)`.
        actions: `(episodes, horizon)` or `(episodes, horizon, a)`.
        rewards: `(episodes, horizon)`, zero after the end of an episode.
        alive: `(episodes, horizon)`, 1 up to the end of an episode and 0 after it.
        log_probs: of each action under the policy that chose it, `(episodes, horizon)`.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor
    log_probs: Tensor

    def returns(self) -> Tensor:
        """The sum of the rewards of each episode: `(episodes,)`."""
        return self.rewards.sum(1)


@checked()
def rollout(
    environment: AbstractEnvironment, policy: AbstractPolicy, params: Params, task: Any, start: Tensor, noise: Tensor
) -> Trajectories:
    """The episodes that a policy makes of a task and of noise.

    Cost: horizon forward passes of the policy on all episodes, and one on all that they saw. No graph is built.

    Args:
        environment: where.
        policy: whose actions.
        params: its parameters.
        task: what the environment's functions are given.
        start: standard normal numbers `(episodes, environment.start_noise)`.
        noise: standard normal numbers `(episodes, horizon, policy.noise + environment.step_noise)`.

    Raises:
        ValueError: if the noise does not fit, or rewards and ends are not one number for each episode.

    Example:
        >>> from torch import nn
        >>> from bilevel.reinforcement import CategoricalPolicy, GaussianBandit
        >>> bandit, policy = GaussianBandit(3), CategoricalPolicy(nn.Linear(1, 3))
        >>> task, noise = {"means": torch.arange(3.0)}, torch.randn(10, 1, 2)
        >>> rollout(bandit, policy, policy.params, task, torch.zeros(10, 0), noise).returns().shape
        torch.Size([10])
    """
    wide = policy.noise + environment.step_noise
    fits = noise.shape[1:] == (environment.horizon, wide) and start.shape == (*noise.shape[:1], environment.start_noise)
    if not fits:
        raise ValueError(
            f"`rollout(start=..., noise=...)` must be of shapes (episodes, {environment.start_noise}) and (episodes,"
            f" {environment.horizon}, {wide}). Got {tuple(start.shape)} and {tuple(noise.shape)}."
        )
    with torch.no_grad():
        params = {name: leaf.detach() for name, leaf in params.items()}
        state = environment.start(task, start)
        seen, done, earned, lived = [], [], [], []
        alive = torch.ones_like(noise[:, 0, 0])
        for t in range(environment.horizon):
            chance = noise[:, t]
            observation = environment.observe(task, state)
            action = policy.sample(params, observation, chance[:, : policy.noise])
            state, reward, goes_on = environment.step(task, state, action, chance[:, policy.noise :])
            for name, found in (("rewards", reward), ("whether episodes go on", goes_on)):
                if found.shape != alive.shape:
                    raise ValueError(
                        f"`{type(environment).__name__}.step` must return {name} `(*b,)`, one number for each of"
                        f" {len(alive)} episodes. Got axes {tuple(found.shape)}."
                    )
            seen.append(observation)
            done.append(action)
            earned.append(reward * alive)
            lived.append(alive)
            alive = alive * goes_on
        observations, actions, lives = torch.stack(seen, 1), torch.stack(done, 1), torch.stack(lived, 1)
        log_probs = policy.log_prob(params, observations, actions) * lives
    return Trajectories(observations, actions, torch.stack(earned, 1), lives, log_probs)
