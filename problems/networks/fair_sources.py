"""Tasks with a binary group: Gaussians whose group is correlated with the label, and rows of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED, SIZE, demand_ranges
from bilevel.outside.arrays import read_arrays
from bilevel.problems.networks._batches import generator
from bilevel.tasks.source import AbstractTasks, Batch

_MEANS = ((-2.0, -2.0), (2.0, 2.0))
_COVARIANCES = (((10.0, 1.0), (1.0, 3.0)), ((5.0, 1.0), (1.0, 5.0)))


@final
@dataclass(frozen=True)
class GaussianGroups(AbstractTasks):
    """Two Gaussian classes in the plane; z = 1 with probability p_1 / (p_0 + p_1) at the point turned by an angle.

    p_0 and p_1 are the densities of the classes: with an angle of 0 the group says as much of the label as the point
    does, and with pi / 2 almost nothing. Each task has one of the angles, at random.

    Source: Zafar, Valera, Gomez Rodriguez, Gummadi, "Fairness constraints: mechanisms for fair classification", AISTATS
    2017, section 4.1.

    Args:
        angles: in radians.
        shots: points of a support set.
        queries: points of a query set.

    Example:
        >>> batch = GaussianGroups(shots=5, queries=9).sample(3, seed=0)
        >>> batch["support_x"].shape, batch["query_z"].shape, batch["query_y"].dtype
        (torch.Size([3, 5, 2]), torch.Size([3, 9]), torch.float32)
    """

    angles: tuple[float, ...] = (math.pi / 8, math.pi / 16)
    shots: int = 50
    queries: int = 100

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, shots=SIZE, queries=SIZE)
        if not self.angles:
            raise ValueError("`GaussianGroups(angles=...)` must have at least one angle. Got none.")

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        draws, size = generator(seed, 0), self.shots + self.queries
        labels = torch.randint(2, (count, size), generator=draws, device="cpu")
        factors = torch.linalg.cholesky(torch.tensor(_COVARIANCES, dtype=torch.float64, device="cpu"))
        means = torch.tensor(_MEANS, dtype=torch.float64, device="cpu")
        noise = torch.randn(count, size, 2, 1, generator=draws, dtype=torch.float64, device="cpu")
        x = means[labels] + (factors[labels] @ noise).squeeze(-1)
        chosen = torch.randint(len(self.angles), (count,), generator=draws, device="cpu")
        angle = torch.tensor(self.angles, dtype=torch.float64, device="cpu")[chosen]
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(count, 1, 2, 2)
        turned = (turn @ x.unsqueeze(-1)).squeeze(-1)
        logits = _log_density(turned, 1) - _log_density(turned, 0)
        z = torch.rand(logits.shape, generator=draws, dtype=torch.float64, device="cpu") < logits.sigmoid()
        parts = {"x": x.float(), "y": labels.float(), "z": z.float()}
        return {
            f"{side}_{name}": part[:, slice(*ends)].contiguous()
            for side, ends in (("support", (0, self.shots)), ("query", (self.shots, size)))
            for name, part in parts.items()
        }


def _log_density(x: Tensor, kind: int) -> Tensor:
    """Up to the constant that both have."""
    mean, C = (torch.tensor(part[kind], dtype=x.dtype, device="cpu") for part in (_MEANS, _COVARIANCES))
    off = x - mean
    found: Tensor = -(off @ torch.linalg.inv(C) * off).sum(-1) / 2 - torch.logdet(C) / 2
    return found


@final
@dataclass(frozen=True, eq=False)
class TableTasks(AbstractTasks):
    """Tasks that are groups of rows of a table: in each, `shots` random rows to adapt to, and `queries` others.

    A task of fewer rows takes half of them for either set (and no more than asked for); masks say what is padding.

    Args:
        x: `(n, d)`.
        y: `(n,)` of zeros and ones.
        z: `(n,)` of zeros and ones, the group.
        task: `(n,)` integers, the task of a row.
        shots: rows of a support set.
        queries: rows of a query set, at most.

    Raises:
        ValueError: if the four do not have one length, or a task has a single row.

    Example:
        >>> rows = TableTasks(
        ...     torch.rand(9, 2),
        ...     torch.ones(9),
        ...     torch.zeros(9),
        ...     torch.arange(9) // 5,
        ...     shots=3,
        ...     queries=4,
        ... )
        >>> rows.every(seed=0)["query_mask"].sum(1)
        tensor([3., 2.])
    """

    x: Tensor
    y: Tensor
    z: Tensor
    task: Tensor
    shots: int = 50
    queries: int = 100

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, shots=SIZE, queries=SIZE)
        if not len(self.x) == len(self.y) == len(self.z) == len(self.task):
            sizes = ", ".join(str(len(each)) for each in (self.x, self.y, self.z, self.task))
            raise ValueError(f"`TableTasks(x, y, z, task)` must have as many rows each. Got {sizes}.")
        if not len(self.task) or int(_counts(self.task).min()) < 2:
            raise ValueError("`TableTasks(task=...)` must have two rows of every task or more. Leave the others out.")

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        draws, names = generator(seed, 0), numbers(self.task)
        each = torch.randint(len(names), (count,), generator=draws, device="cpu")
        return self._batch([names[k] for k in each], draws)

    @checked(seed=SEED)
    def every(self, seed: int) -> Batch:
        """All tasks, each once."""
        return self._batch(list(numbers(self.task)), generator(seed, 0))

    def _batch(self, names: list[Tensor], draws: torch.Generator) -> Batch:
        made = []
        for name in names:
            rows = (self.task == name).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=draws, device="cpu")]
            first = min(self.shots, len(rows) // 2)
            made.append(self._side("support", rows[:first], self.shots))
            made[-1] |= self._side("query", rows[first:][: self.queries], self.queries)
        return {key: torch.stack([task[key] for task in made]) for key in made[0]}

    def _side(self, side: str, rows: Tensor, size: int) -> dict[str, Tensor]:
        padded = torch.cat([rows, rows[:1].expand(size - len(rows))])
        mask = (torch.arange(size, device="cpu") < len(rows)).to(self.x)
        parts = {"x": self.x[padded], "y": self.y[padded].to(self.x), "z": self.z[padded].to(self.x), "mask": mask}
        return {f"{side}_{name}": part for name, part in parts.items()}


@checked()
def read_groups(path: str | Path) -> dict[str, Tensor]:
    """x `(n, d)`, y, z and task `(n,)` of an `.npz` file of people or places, in one of three forms.

    - `X`, `y`, `z` and `task`, as they are (y of numbers is cut at its median);
    - communities and crime (UCI, "Communities and Crime Unnormalized"): `X`, `y` violent crimes for 100,000 people, `z`
      and `state`; rows with y = 0, whose target is missing, are left out, and y = 1 is above the median;
    - Adult (UCI): `num` `(n, 6)`, `cat` `(n, 8)` codes with `cat_names`, and `y`; z is the sex, the task the
      occupation, and neither is among the inputs.

    Missing inputs (NaN) are replaced by the mean of their column. Nothing is scaled.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it has none of the three forms.
    """
    wanted = {"X", "y", "z", "task", "state", "num", "cat", "cat_names"}
    arrays = read_arrays(path, wanted.__contains__, "plot")
    found = {name: torch.as_tensor(array) for name, array in arrays.items() if name != "cat_names"}
    if {"num", "cat", "y"} <= found.keys() and "cat_names" in arrays:
        return _adult(found, [str(name) for name in arrays["cat_names"].tolist()])
    key = "task" if "task" in found else "state"
    if not {"X", "y", "z", key} <= found.keys():
        raise ValueError(
            "`read_groups(path=...)` must have `X`, `y`, `z` and `task` (or `state`), or `num`, `cat`,"
            " `cat_names` and `y`."
            f" Got {str(path)!r} with {', '.join(sorted(arrays)) or 'none of them'}. See its documentation."
        )
    y = found["y"].double()
    kept = y > 0 if key == "state" else torch.ones(len(y), dtype=torch.bool, device="cpu")
    rows = {name: found[name][kept] for name in ("X", "z", key)} | {"y": y[kept]}
    if not bool(((rows["y"] == 0) | (rows["y"] == 1)).all()):
        rows["y"] = (rows["y"] > rows["y"].median()).double()
    return {"x": _filled(rows["X"].float()), "y": rows["y"].float(), "z": rows["z"].float(), "task": rows[key].long()}


def _adult(found: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    codes = {name: found["cat"][:, k].long() for k, name in enumerate(names)}
    own = [torch.nn.functional.one_hot(codes[name]) for name in names if name not in ("sex", "occupation")]
    x = torch.cat([found["num"].double(), *own], 1).float()
    return {"x": _filled(x), "y": found["y"].float(), "z": codes["sex"].float(), "task": codes["occupation"]}


def numbers(task: Tensor) -> Tensor:
    """The different numbers, in order."""
    return torch.tensor(sorted(set(task.tolist())), device=task.device)


def _counts(task: Tensor) -> Tensor:
    return (task.unsqueeze(0) == numbers(task).unsqueeze(1)).sum(1)


def _filled(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x.nanmean(0), x)


def scaled(rows: Mapping[str, Tensor], fitted: Tensor) -> dict[str, Any]:
    """The rows with inputs of mean 0 and variance 1 over those of `fitted`, within 5 of it."""
    mean, deviation = rows["x"][fitted].mean(0), rows["x"][fitted].std(0).clamp_min(1e-6)
    return {**rows, "x": ((rows["x"] - mean) / deviation).clamp(-5, 5)}
