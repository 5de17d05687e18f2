"""Episodes of vector environments that are no functions: those of gymnasium."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SEED, SIZE
from bilevel.arguments.words import got
from bilevel.reinforcement.policy import AbstractPolicy, Params
from bilevel.reinforcement.trajectories import Trajectories


@checked(horizon=SIZE, seed=SEED)
def vector_episodes(
    environment: Any, policy: AbstractPolicy, params: Params, *, horizon: int, seed: int = 0
) -> Trajectories:
    """One episode in each of the environments of a `gymnasium.vector.VectorEnv`, side by side.

    Episodes that end before the horizon, or are truncated by the environment, have rewards and scores of zero from
    then on. The environment is reset with the seed, and the policy's noise is drawn from it: equal seeds give equal
    episodes, as far as the environment keeps to its seed. Observations that are no vectors are flattened.

    Cost: horizon forward passes of the policy and steps of the environment.

    Args:
        environment: observations in a `Box` (or `Discrete`: unit vectors), and actions in a `Box` or `Discrete`;
            one that resets by itself what has ended, as those of `make_vec` do.
        policy: whose actions; a `Box` of actions clips them, and the score is that of the action before that.
        params: its parameters.
        horizon: the greatest number of steps.
        seed: of the environment and of the noise.

    Raises:
        ImportError: if gymnasium is missing.
        TypeError: if the environment is no vector environment of it, or has other spaces.
        ValueError: if the policy's actions are none of the environment's.

    Example:
        >>> from torch import nn
        >>> from bilevel.reinforcement import CategoricalPolicy
        >>> from bilevel.reinforcement.vector_episodes import with_gymnasium
        >>> environment = with_gymnasium().make_vec(
        ...     "CartPole-v1", num_envs=4, vectorization_mode="sync"
        ... )
        >>> policy = CategoricalPolicy(nn.Linear(4, 2))
        >>> vector_episodes(environment, policy, policy.params, horizon=20).rewards.shape
        torch.Size([4, 20])
    """
    spaces = _spaces(environment)
    like = next(iter(params.values()))
    count = int(environment.num_envs)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(horizon, count, policy.noise, generator=generator, dtype=torch.float64, device="cpu").to(like)
    seen, done, earned, lived = [], [], [], []
    alive = like.new_ones(count)
    observation, _ = environment.reset(seed=seed % 2**31)
    with torch.no_grad():
        params = {name: leaf.detach() for name, leaf in params.items()}
        for t in range(horizon):
            at = _vectors(observation, spaces[0], like)
            action = policy.sample(params, at, noise[t])
            observation, reward, terminated, truncated, _ = environment.step(_taken(action, spaces[1]))
            seen.append(at)
            done.append(action)
            earned.append(torch.as_tensor(reward).to(like) * alive)
            lived.append(alive)
            ended = torch.as_tensor(terminated) | torch.as_tensor(truncated)
            alive = alive * (~ended).to(like)
        observations, actions, lives = torch.stack(seen, 1), torch.stack(done, 1), torch.stack(lived, 1)
        log_probs = policy.log_prob(params, observations, actions) * lives
    return Trajectories(observations, actions, torch.stack(earned, 1), lives, log_probs)


def with_gymnasium() -> Any:
    """The module `gymnasium`.

    Raises:
        ImportError: if it is missing, naming the extra to install.
    """
    try:
        return importlib.import_module("gymnasium")
    except ImportError as error:
        raise ImportError(
            'episodes of vector environments need gymnasium: `pip install "bilevel[gymnasium]"`.'
        ) from error


def _spaces(environment: Any) -> tuple[Any, Any]:
    """The spaces of one observation and of one action.

    Raises:
        ImportError: if gymnasium is missing.
        TypeError: if there are none.
    """
    gymnasium = with_gymnasium()
    if not isinstance(environment, gymnasium.vector.VectorEnv | gymnasium.vector.VectorWrapper):
        raise TypeError(
            f"`vector_episodes(environment=...)` must be a `gymnasium.vector.VectorEnv`. Got"
            f" {type(environment).__name__}. Write `gymnasium.make_vec(name, num_envs=20)`."
        )
    spaces = environment.single_observation_space, environment.single_action_space
    for name, space in zip(("observations", "actions"), spaces, strict=True):
        if not isinstance(space, gymnasium.spaces.Box | gymnasium.spaces.Discrete):
            raise TypeError(
                f"`vector_episodes(environment=...)` must have {name} in a `Box` or a `Discrete` space. Got {space}."
                " Wrap it, such as by `gymnasium.wrappers.vector.FlattenObservation`."
            )
    if str(environment.metadata.get("autoreset_mode", "")).endswith("DISABLED"):
        raise ValueError(
            "`vector_episodes(environment=...)` must reset by itself what has ended. Got one whose autoreset is"
            " disabled. Leave out `autoreset_mode`."
        )
    return spaces


def _unfit(wanted: str, action: Tensor) -> str:
    most = f", up to {int(action.max())}" if not action.is_floating_point() and action.numel() else ""
    return f"an action of this environment must be {wanted}. Got {got(action)}{most}."


def _vectors(observation: Any, space: Any, like: Tensor) -> Tensor:
    gymnasium = with_gymnasium()
    found = torch.as_tensor(observation)
    if isinstance(space, gymnasium.spaces.Discrete):
        return torch.nn.functional.one_hot((found - int(space.start)).long(), int(space.n)).to(like)
    return found.reshape(len(found), -1).to(like)


def _taken(action: Tensor, space: Any) -> Any:
    gymnasium = with_gymnasium()
    found = action.cpu().numpy()
    if isinstance(space, gymnasium.spaces.Discrete):
        if found.ndim != 1 or found.dtype.kind != "i" or not bool((found < int(space.n)).all()):
            raise ValueError(_unfit(f"one of {int(space.n)} integers, as those of `CategoricalPolicy`", action))
        return found + int(space.start)
    size = math.prod(space.shape)
    if found.dtype.kind != "f" or found[0].size != size:
        raise ValueError(_unfit(f"a vector of {size} numbers, as those of `GaussianPolicy`", action))
    return found.astype(space.dtype).reshape(len(found), *space.shape).clip(space.low, space.high)
