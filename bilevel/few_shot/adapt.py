"""From what was learned to new tasks: adaptation on the support set, predictions of the queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem, not_side_by_side, takes_one
from bilevel._inner import AbstractInnerSolver
from bilevel._numerics.batched import batched, looped
from bilevel._result import Stats, Status
from bilevel._tree import Tree, ravel, tree_leaves, tree_map, tree_parts
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT, SEED
from bilevel.few_shot.learner import Learner
from bilevel.inner_problems.kinds import inner_objective
from bilevel.requirements.padding import Level, demand_padding_unseen, is_padded
from bilevel.tasks._random import seed_of_step
from bilevel.tasks.ragged import check_batch
from bilevel.tasks.source import AbstractTasks

_NOISE = 2**32  # the seeds of `prepare` and those of the tasks are unrelated


@final
@dataclass(frozen=True, eq=False)
class Adapted:
    """A batch of tasks, adapted.

    Attributes:
        y: each task's variable, stacked along a leading axis.
        statuses: why the solver stopped on each task.
        stats: the oracle calls.
        batch: the tasks as the learner sees them: on its device, in its dtype, prepared.
    """

    y: Tree = field(repr=False)
    statuses: tuple[Status, ...]
    stats: Stats
    batch: Any = field(repr=False)

    def __post_init__(self) -> None:
        demand_types(self)


@checked(steps=COUNT, seed=SEED)
def adapt(learner: Learner, x: Tree, batch: Any, *, steps: int | None = None, seed: int = 0) -> Adapted:
    """y_t = argmin_y g(x, y, task_t), as `learner.adapt` finds it, for every task of a batch; no derivative in x.

    Cost: that of the inner solver, on all tasks side by side. Query targets are never read.

    Args:
        learner: the method.
        x: what was learned.
        batch: tasks with a leading axis; the query targets may be missing where g does not ask for them.
        steps: how many steps the inner solver takes; None: its own number; 0: y stays at its start.
        seed: of what `learner.prepare` draws.

    Raises:
        ValueError: if `steps` is negative or given for a solver that is no iteration; if what pads tasks of different
            sizes changes g.

    Example:
        >>> from bilevel import ITD, BilevelProblem
        >>> from bilevel.extending import Learner
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     f=lambda x, y, task: (y - task["query_y"]).square().mean(),
        ...     g=lambda x, y, task: (y - task["support_y"]).square().mean() / 2,
        ...     init=lambda x, task: x,
        ...     tasks=True,
        ... )
        >>> inner, x0 = Iterate(GradientDescent(0.5), max_steps=1), torch.tensor(0.0)
        >>> predict = lambda x, y, task: y.expand(1)
        >>> learner = Learner("mean", problem, x0, x0, ITD(inner), inner, predict, lambda x: None)
        >>> adapt(learner, x0, {"support_y": torch.tensor([[1.0], [2.0]])}).y
        tensor([0.5000, 1.0000])
    """
    check_padding(learner, x, ready(learner, x, batch, seed), ("g",))
    return adapted(learner, x, batch, steps=steps, seed=seed)


def check_padding(learner: Learner, x: Tree, batch: Any, functions: Sequence[Level] = ("f", "g")) -> bool:
    """Whether a batch, as the learner sees it, is padded; refused where its padding changes what the functions give.

    Raises:
        ValueError: saying what changes by how much, and what to do.
    """
    if not is_padded(batch):
        return False
    vector, x_structure = ravel(x, "x")
    y0, y_structure = ravel(learner.y0, "y0")
    flat = FlatProblem(learner.problem, x_structure, y_structure, batch)
    demand_padding_unseen(flat, vector.detach(), y0.detach().to(vector.device), functions)
    return True


def adapted(
    learner: Learner, x: Tree, batch: Any, *, steps: int | None = None, seed: int = 0, rows: slice | None = None
) -> Adapted:
    """`adapt` without a look at the padding; of the tasks in `rows`, if they are given."""
    batch = tasks_of(ready(learner, x, batch, seed), rows)
    vector, flat, z, in_z = _at(learner, x, batch)
    start = in_z.start(z, vector).detach()
    if steps == 0:
        statuses: tuple[Status, ...] = (Status.successful,) * len(start)
        return Adapted(in_z.y.unravel(start), statuses, flat.tally.stats(), batch)
    solver = learner.adapt if steps is None else with_steps(learner.adapt, steps)
    solved = solver.solve(inner_objective(in_z, z), start)
    return Adapted(in_z.y.unravel(solved.value), solved.statuses, flat.tally.stats(), batch)


@checked()
def predict(learner: Learner, x: Tree, adapted: Adapted) -> Tensor:
    """The predictions of every task's queries, `(tasks, queries, ...)`: log-probabilities, or values."""

    def one(y: Tree, task: Any) -> Tensor:
        return learner.predict(x, y, task)

    return _of_tasks(learner, one, adapted)


def scored(learner: Learner, x: Tree, adapted: Adapted) -> Tensor:
    """What `learner.score` gives each task: `(tasks,)`.

    Raises:
        ValueError: if that is no number a task.
    """
    score = learner.score
    assert score is not None
    found = _of_tasks(learner, lambda y, task: score(x, y, task), adapted)
    if found.dim() != 1:
        raise ValueError(f"`learner.score` must return a scalar for each task. Got {tuple(found.shape[1:])}.")
    return found


def check_tasks(learner: Learner, batch: Any, tasks: int | None = None) -> None:
    """Refuse what is not a batch of tasks for this learner; with a score of its own it may be any tensors of tasks.

    Raises:
        TypeError: if it is not a mapping of tensors.
        ValueError: if an entry is missing, or shapes or masks do not fit.
    """
    if learner.score is None:
        check_batch(batch, tasks)
        return
    if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
        raise TypeError(f"a batch of tasks must be a mapping from names to tensors. Got {type(batch).__name__}.")
    counts = {len(value) if value.ndim else 0 for value in batch.values()}
    if len(counts) != 1 or not min(counts) or (tasks is not None and counts != {tasks}):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items()) or "nothing"
        raise ValueError(f"the first axis of every entry must be tasks, {tasks or 'at least 1'} of them. Got {shapes}.")


@checked()
def draws(learner: Learner, x: Tree, adapted: Adapted) -> Tensor:
    """What each draw of the tasks' posteriors predicts, `(tasks, samples, queries, ...)`; `predict` is their average.

    `GaussianLikelihood` makes predictive intervals and densities of those of a task.

    Raises:
        ValueError: if the learner has no posterior.
    """
    given = learner.draws
    if given is None:
        raise ValueError(
            f"`draws` needs a learner whose tasks have a posterior, such as `ibaml(module, loss)`. Got {learner.name}."
        )
    return _of_tasks(learner, lambda y, task: given(x, y, task), adapted)


def _of_tasks(learner: Learner, function: Callable[[Tree, Any], Tensor], adapted: Adapted) -> Tensor:
    """function(y, task) of each task, stacked: side by side, or one after the other as the problem says."""
    parts, build = tree_parts((adapted.y, adapted.batch))
    places = [k for k, leaf in enumerate(parts) if isinstance(leaf, Tensor)]

    def one(*tensors: Tensor) -> Tensor:
        whole = list(parts)
        for k, tensor in zip(places, tensors, strict=True):
            whole[k] = tensor
        return function(*build(whole))

    tensors = [parts[k] for k in places]
    each = looped if learner.problem.tasks == "loop" else batched
    with torch.no_grad():
        try:
            found: Tensor = each(one, len(tensors[0]), (0,) * len(tensors))(*tensors)
        except RuntimeError as error:
            if each is batched and takes_one(one, [(0,) * len(tensors)], tuple(tensors)):
                raise not_side_by_side(error) from error
            raise
    return found


def ready(learner: Learner, x: Tree, batch: Any, seed: int) -> Any:
    """The batch on the device and in the dtype of x, and with what the learner draws from the seed."""
    like = next(iter(tree_leaves(x)), None)
    if not isinstance(like, Tensor):
        raise TypeError(
            f"`x` must be of the structure of `learner.x0`, such as `trained.x`. Got {type(x).__name__}."
            " Of a module, `functional(module).params` are the parameters."
        )

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(like.device, like.dtype if leaf.is_floating_point() else None)

    moved = tree_map(move, batch)
    return moved if learner.prepare is None else learner.prepare(moved, seed)


def tasks_of(batch: Any, rows: slice | None) -> Any:
    """Some of the tasks of a batch; None: all."""
    return batch if rows is None else tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, batch)


def demand_tasks(call: str, learner: Learner, **sources: AbstractTasks | None) -> None:
    """Refuse a learner that is none, and sources of tasks that have no `sample`.

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(learner, Learner):
        raise TypeError(
            f"`{call}(learner=...)` must be a `Learner`, such as `maml(module, loss)`. Got {type(learner).__name__}."
        )
    for name, source in sources.items():
        if source is not None and not callable(getattr(source, "sample", None)):
            raise TypeError(
                f"`{call}({name}=...)` must be a source of tasks, with a method `sample(count, seed)`."
                f" Got {type(source).__name__}. Write a subclass of `bilevel.tasks.AbstractTasks`."
            )


def noise_seed(seed: int, step: int) -> int:
    """The seed of what `learner.prepare` draws at a step."""
    return seed_of_step(seed + _NOISE, step)


def with_steps(solver: AbstractInnerSolver, steps: int) -> AbstractInnerSolver:
    """The solver with another number of steps.

    Raises:
        ValueError: if the number is negative, or the solver has none.
    """
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0. Got {steps}.")
    changed = solver.with_steps(steps)
    if changed is None:
        raise ValueError(
            f"`steps` needs a learner that adapts by an iteration. This one uses {type(solver).__name__}, which has no"
            f" `with_steps`: leave it out."
        )
    return changed


def _at(learner: Learner, x: Tree, batch: Any) -> tuple[Tensor, FlatProblem, Tensor, FlatProblem]:
    """y0 as a vector, the problem, and its encoding at x with the problem in terms of it."""
    vector, x_structure = ravel(x, "x")
    y0, y_structure = ravel(learner.y0, "y0")
    flat = FlatProblem(learner.problem, x_structure, y_structure, batch)
    with torch.no_grad():
        z, in_z = flat.encode(vector.detach())
    return y0.detach().to(vector.device), flat, z, in_z
