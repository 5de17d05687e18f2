"""What is public, and one valid call of each: where the fuzzer of arguments starts from.

Arguments without a default are made from their annotations; the tables say what no annotation tells.
"""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.util
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bilevel
import bilevel.algorithms
import bilevel.extending
import bilevel.federated
import bilevel.few_shot
import bilevel.inner_problems
import bilevel.problems
import bilevel.problems.glm
import bilevel.problems.literature
import bilevel.ranks
import bilevel.reinforcement
import bilevel.terms
import bilevel.testing
import bilevel.tracking
from bilevel import AID, BilevelProblem, Constants, Polytope, Report, Solved, Stats, Status
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.federated.method import At
from bilevel.few_shot import Evaluating, Learner, Score, Training, Validation
from bilevel.problems import maml, quadratic
from bilevel.problems.inverse_link import Sinh
from bilevel.solvers import CG, LBFGS, Cosine, GradientDescent, Iterate
from bilevel.tasks import Episodes, ImageClasses, LinearTasks, Sinusoid

ROOMS = (
    "bilevel",
    "bilevel.bounds",
    "bilevel.prox",
    "bilevel.solvers",
    "bilevel.hypergrad",
    "bilevel.problems",
    "bilevel.problems.glm",
    "bilevel.problems.meta_learning",
    "bilevel.tasks",
    "bilevel.terms",
    "bilevel.few_shot",
    "bilevel.inner_problems",
    "bilevel.algorithms",
    "bilevel.extending",
    "bilevel.federated",
    "bilevel.ranks",
    "bilevel.problems.literature",
    "bilevel.reinforcement",
    "bilevel.testing",
    "bilevel.testing.properties",
    "bilevel.testing.strategies",
    "bilevel.tracking",
    *(("bilevel.sklearn",) if importlib.util.find_spec("sklearn") else ()),
)


GATHERED = {room for room in ROOMS if room not in ("bilevel.testing.properties", "bilevel.testing.strategies")}


class Public(NamedTuple):
    """A public function, class, or method of one."""

    name: str  # as one writes it: "bilevel.solvers.CG", "bilevel.Box.project"
    room: str
    call: Callable[..., Any]  # unbound, for a method
    owner: Any = None  # the class whose method it is


def objects() -> Iterator[tuple[str, str, Any]]:
    """(room, name, object) of the public functions and classes, each once."""
    seen: set[int] = set()
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]:
            found = getattr(module, name)
            if not (inspect.isclass(found) or isinstance(found, FunctionType)) or id(found) in seen:
                continue
            if inspect.isclass(found) and issubclass(found, tuple):
                continue  # parts of a step, as loose as any tuple: made by the library many times a step
            own = found.__module__.startswith("bilevel") and (room in GATHERED or found.__module__ == room)
            if own and name == found.__name__:
                seen.add(id(found))
                yield room, name, found


# What the library calls itself, with vectors that it has made and millions of times: an extension writes them, and a
# user of it calls none.
PROTOCOLS: tuple[Any, ...] = (
    bilevel.AbstractEstimator,
    bilevel.AbstractInnerSolver,
    bilevel.AbstractLinearSolver,
    bilevel.AbstractPreconditioner,
    bilevel.AbstractOptimizer,
    bilevel.AbstractOuterDriver,
    bilevel.AbstractInnerProblem,
    bilevel.extending.AbstractMinimizer,
    bilevel.extending.AbstractProducts,
    bilevel.extending.AbstractAlgorithm,
    bilevel.extending.AbstractData,
    bilevel.extending.AbstractDirection,
    bilevel.extending.AbstractReduction,
    bilevel.inner_problems.AbstractKnownObjective,
    bilevel.problems.glm.AbstractRowLoss,
    bilevel.prox.AbstractProxTerm,
    bilevel.terms.AbstractLinearMap,
    bilevel.terms.AbstractAlgorithm,
    bilevel.terms.Gram,
    bilevel.terms.Scheme,
    bilevel.terms.Expression,
    bilevel.terms.Term,
    bilevel.prox.ProxDerivative,
    FlatProblem,
    bilevel.LinearOperator,
    bilevel.extending.Objective,
    bilevel.extending.Linearization,
    bilevel.extending.Tally,
    bilevel.extending.Setting,
    bilevel.algorithms.Oracle,
    bilevel.federated.AbstractClients,
    bilevel.federated.AbstractMethod,
    bilevel.federated.Server,
    bilevel.reinforcement.AbstractEnvironment,
    bilevel.reinforcement.AbstractPolicy,
    bilevel.reinforcement.AbstractSurrogate,
    bilevel.reinforcement.AbstractBaseline,
    bilevel.tracking.AbstractTracker,
    bilevel.reinforcement.Advantages,
    bilevel.reinforcement.MetaPolicy,
    bilevel.reinforcement.OfflinePolicy,
    bilevel.reinforcement.Trajectories,
    type(bilevel.Reverse()).__base__,
    type(bilevel.extending.Exact()),
)
# What pytest and hypothesis call.
OTHERS_CALL = {"DrawFn"}


@functools.cache
def public() -> tuple[Public, ...]:
    """All that a user may call: functions, constructors, methods."""
    found = []
    for room, name, thing in objects():
        if not inspect.isclass(thing):
            found.append(Public(f"{room}.{name}", room, thing))
            continue
        abstract = name.startswith("Abstract") or inspect.isabstract(thing)
        if issubclass(thing, enum.Enum) or abstract:
            continue
        found.append(Public(f"{room}.{name}", room, thing))
        if not issubclass(thing, (*PROTOCOLS, BaseException)) and name != "Armijo":  # which takes flat vectors as well
            for method, body in vars(thing).items():
                owner_ = None if isinstance(body, staticmethod) else thing
                body = body.__func__ if isinstance(body, staticmethod | classmethod) else body
                if (
                    not method.startswith("_")
                    and isinstance(body, FunctionType)
                    and parameters(body, method=owner_ is not None)
                ):
                    found.append(Public(f"{room}.{name}.{method}", room, body, owner_))
    return tuple(found)


def parameters(call: Callable[..., Any], *, method: bool = False) -> dict[str, inspect.Parameter]:
    """The parameters by name, without the first one of a method."""
    found = dict(inspect.signature(call).parameters)
    if method and found:  # a static method without arguments has none
        del found[next(iter(found))]
    return {
        name: each
        for name, each in found.items()
        if each.kind is not each.VAR_KEYWORD and (each.kind is not each.VAR_POSITIONAL or name == "shape")
    }


@functools.cache
def hints(call: Callable[..., Any]) -> dict[str, Any]:
    """The annotations, resolved; those that are for type checkers only are `Any`."""
    function = call.__init__ if inspect.isclass(call) else inspect.unwrap(call)
    function = inspect.unwrap(function)
    names = {**vars(importlib.import_module(function.__module__)), **{"Self": Any}}
    if inspect.isclass(call):
        names |= vars(importlib.import_module(call.__module__))
    found = {}
    for name, text in function.__annotations__.items():
        try:
            found[name] = eval(text, names) if isinstance(text, str) else text
        except NameError:
            found[name] = Any
    return found


# Valid arguments


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 3).square().sum() / 2


def g(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum() / 2


D: Any = {"dtype": torch.float64}
X, Y = torch.ones(2, **D), torch.zeros(2, **D)
C = Constants(mu=1.0, L=2.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=3.0)
PROBLEM = BilevelProblem(f, g)


@functools.cache
def net(inputs: int = 1, outputs: int = 1) -> nn.Module:
    return nn.Linear(inputs, outputs)


@functools.cache
def learner() -> Learner:
    return maml(net(), nn.functional.mse_loss, step=0.1)


@functools.cache
def classifier() -> Learner:
    return maml(nn.Linear(4, 2), nn.functional.cross_entropy, step=0.1)


@functools.cache
def flat() -> FlatProblem:
    return FlatProblem(PROBLEM, ravel(X)[1], ravel(Y)[1])


def client(x: Tensor, y: Tensor, data: Tensor) -> Tensor:
    """f or g of a client."""
    return (y - x).square().sum() + (y - data).square().sum()


@functools.cache
def vector_environment() -> Any:
    if importlib.util.find_spec("gymnasium") is None:
        return object()
    return importlib.import_module("gymnasium").make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")


def pulled() -> bilevel.reinforcement.MetaPolicy:
    return bilevel.reinforcement.MetaPolicy(
        bilevel.reinforcement.CategoricalPolicy(net(1, 2)), bilevel.reinforcement.GaussianBandit(2)
    )


def clients() -> bilevel.federated.Clients:
    return bilevel.federated.Clients(BilevelProblem(client, client), X, Y, torch.ones(3, 2, **D))


@functools.cache
def group() -> Any:
    """A process group of one, until `leave_group`."""
    store = f"file://{folder() / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    return torch.distributed.group.WORLD


def leave_group() -> None:
    """Leave it, if it was asked for."""
    if group.cache_info().currsize:
        torch.distributed.destroy_process_group()
        group.cache_clear()


@functools.cache
def estimate() -> bilevel.Estimate:
    return bilevel.hypergradient(PROBLEM, X, Y)


@functools.cache
def adapted() -> Any:
    return bilevel.few_shot.adapt(learner(), learner().x0, Sinusoid(2, 2).sample(2, 0))


@functools.cache
def evaluation() -> Any:
    tasks = LinearTasks(1, shots=2, queries=2)
    return bilevel.few_shot.evaluate(learner(), learner().x0, tasks, episodes=2, batch=2)


@functools.cache
def posterior() -> Learner:
    draws = bilevel.problems.MonteCarlo(2, 2)
    found: Learner = bilevel.problems.abml(net(), nn.functional.mse_loss, draws=draws)
    return found


@functools.cache
def of_classes() -> Any:
    return bilevel.few_shot.evaluate(
        classifier_of_images(), classifier_of_images().x0, Episodes(images(), 2, 1, 1), episodes=2, batch=2
    )


@functools.cache
def classifier_of_images() -> Learner:
    return maml(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), nn.functional.cross_entropy, step=0.1)


@functools.cache
def images() -> ImageClasses:
    return ImageClasses(torch.rand(6, 4, 2, 2, generator=torch.Generator().manual_seed(0)))


@functools.cache
def calibrated() -> Any:
    return bilevel.few_shot.calibration(torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log(), torch.tensor([0, 1]), bins=2)


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="bilevel-fuzz-"))


def training_data() -> dict[str, Any]:
    return {"support_x": torch.ones(2, 1), "support_y": torch.ones(2), "query_x": torch.ones(2, 1)} | {
        "query_y": torch.ones(2)
    }


def matrix(rows: int, columns: int) -> Tensor:
    found: Tensor = torch.eye(rows, columns, **D) + 0.1
    return found


def dataset_parts() -> Any:
    return (*[matrix(2, 2), X] * 3, matrix(2, 2), 2)


def anil_learner() -> Learner:
    return bilevel.problems.anil(net(4, 4), net(4, 2), nn.functional.cross_entropy)


@functools.cache
def of_posterior() -> Any:
    return bilevel.few_shot.adapt(posterior(), posterior().x0, Sinusoid(2, 2).sample(2, 0))


@functools.cache
def functional() -> Any:
    return bilevel.functional(net())


@functools.cache
def picture() -> Path:
    from PIL import Image

    path = folder() / "pictures" / "class" / "image.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(path)
    return path


@functools.cache
def mini() -> Path:
    from PIL import Image

    for part in ("train", "val", "test"):
        path = folder() / "mini" / part / f"class of {part}" / "image.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(path)
    return folder() / "mini"


@functools.cache
def best() -> Path:
    tasks = LinearTasks(1, shots=2, queries=2)
    options = bilevel.few_shot.Validating(tasks, episodes=2)
    bilevel.few_shot.train(learner(), tasks, max_steps=1, batch=2, validation=options, out=folder() / "run")
    return folder() / "run" / "best.pt"


class Figure:
    """What is drawn on."""

    def subplots(self, *_: Any, **__: Any) -> Any:
        return Axes()


class Axes:
    """Where pictures are drawn."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


NUMBERS = itertools.count()


@functools.cache
def solution() -> Any:
    """A short run."""
    return bilevel.minimize(PROBLEM, X, Y, max_steps=1, outer=GradientDescent(0.1))


def saved(value: Any) -> Path:
    """A file that holds it."""
    value.save(folder() / "held.safetensors")
    return folder() / "held.safetensors"


def linear_model() -> Any:
    """A regression."""
    return bilevel.inner_problems.LinearModel(matrix(3, 2), torch.ones(3, **D))


def known_model() -> Any:
    """A generalized linear model, which knows its derivatives."""
    return bilevel.problems.glm.GeneralizedLinearModel(matrix(3, 2), torch.ones(3, **D), penalty=torch.exp)


@functools.cache
def samples() -> tuple[Any, Any]:
    """Inputs and classes, for estimators of scikit-learn."""
    X = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), **D)
    return X.numpy(), [0, 1] * 4


# By the annotation, as it is written; what is not here has no example.
BY_ANNOTATION: dict[str, Callable[[], Any]] = {
    "float": lambda: 0.5,
    "int": lambda: 2,
    "str": lambda: "name",
    "bool": lambda: False,
    "Tree": lambda: X,
    "Any": lambda: X,
    "Step": lambda: 0.1,
    "RowStep": lambda: 0.1,
    "Mapping[str, Any]": lambda: {"inner_step": 0.1},
    "Step | AbstractMinimizer": lambda: 0.1,
    "AbstractDirection": lambda: bilevel.algorithms.Coupled(),
    "AbstractReduction": lambda: bilevel.algorithms.Plain(),
    "Tensor": lambda: X,
    "float | None": lambda: 1.0,
    "BilevelProblem": lambda: PROBLEM,
    "Constants": lambda: C,
    "Estimate": estimate,
    "Stats": Stats,
    "Status": lambda: Status.successful,
    "tuple[Status, ...]": lambda: (Status.successful,),
    "tuple[Report, ...]": lambda: (Report("inner solver", Status.successful, 0.0, 1),),
    "AbstractEstimator": lambda: AID(LBFGS(), CG()),
    "AbstractRequiring": lambda: AID(LBFGS(), CG()),
    "AbstractImplicit": lambda: AID(LBFGS(), CG()),
    "AbstractInnerSolver": lambda: Iterate(GradientDescent(0.5), 3),
    "AbstractLinearSolver": CG,
    "AbstractOptimizer": lambda: GradientDescent(0.5),
    "AbstractOptimizer | AbstractMinimizer": lambda: GradientDescent(0.5),
    "Learner": learner,
    "AbstractTasks": lambda: Sinusoid(2, 2),
    "AbstractTasks | Validating": lambda: Sinusoid(2, 2),
    "AbstractImages": images,
    "nn.Module": net,
    "nn.Module | Functional": net,
    "Loss": lambda: nn.functional.mse_loss,
    "FlatProblem": flat,
    "FlatEstimate": lambda: bilevel.extending.FlatEstimate(X, torch.zeros((), **D), Y, ()),
    "float | Tensor": lambda: 0.1,
    "float | OfX": lambda: 0.1,
    "float | Tensor | OfX": lambda: 0.1,
    "Objective": lambda: bilevel.extending.Objective(lambda y: y.square().sum()),
    "OperatorProperties": bilevel.extending.OperatorProperties,
    "Gaussian": lambda: {"mean": X, "log_variance": Y},
    "Prior": lambda: {"mean": X, "log_precision": Y},
    "Penalties": lambda: X,
    "Validation | None": lambda: None,
    "Mapping[str, Tensor]": lambda: {name: matrix(2, 2) if name.endswith("x") else X for name in training_data()},
    "Score": lambda: Score(0.5, 0.1),
    "Callable[..., Tensor]": lambda: g,
    "Callable[[Tensor], Tensor]": lambda: torch.clone,
    "Callable[..., Tree]": lambda: lambda x: x,
    "Callable[..., Polytope]": lambda: lambda x: Polytope(lower=0.0),
    "AbstractProxTerm": lambda: bilevel.prox.L1(1.0),
    "AbstractLinearMap": lambda: bilevel.terms.Gradient((2,)),
    "Expression": lambda: bilevel.terms.variable(2),
    "AbstractBlock": lambda: bilevel.terms.norm1(bilevel.terms.variable(2)).block,
    "Size": lambda: (2,),
    "SumOfTerms": lambda: bilevel.terms.SumOfTerms((bilevel.terms.sum_squares(bilevel.terms.variable(2)),)),
    "Callable[..., AbstractProxTerm]": lambda: lambda x: bilevel.prox.L1(1.0),
    "Callable[[int], float]": lambda: Cosine(10),
    "Instance": lambda: quadratic(p=2, q=2),
    "Record": lambda: bilevel.Record(0, 1.0, 1.0, Status.successful, Stats(), 0.0),
    "Validation": lambda: Validation(0, "accuracy", 0.5, 0.1, 0.4, 1.0, 0, 0.1, 0.1),
    "Structure": lambda: ravel(X)[1],
    "str | Path": lambda: folder() / "file",
    "str | os.PathLike[str]": lambda: folder() / "folder",
    "Evaluation": evaluation,
    "Adapted": adapted,
    "Calibration": calibrated,
    "Dataset": lambda: bilevel.problems.Dataset(*dataset_parts()),
    "Algorithm": lambda: bilevel.algorithms.SOBA(0.1, 0.01),
    "Tree | None": lambda: X,
    "torch.dtype": lambda: torch.float64,
    "Metric": lambda: "accuracy",
    "Batch": lambda: LinearTasks(1, shots=2, queries=2).sample(2, 0),
    "Form": lambda: "autograd",
}

# By name: arguments that no annotation tells. Keys are public names, or the last part of one.
BY_NAME: dict[str, dict[str, Any]] = {
    "hypergradient": {"x": lambda: X, "y0": lambda: Y},
    "hyperobjective": {"y0": lambda: Y},
    "HyperObjective": {"y0": lambda: Y, "estimator": lambda: "implicit", "warm_start": lambda: None}
    | {"chunk_size": lambda: None, "throw": lambda: True},
    "minimize": {"y0": lambda: Y, "max_steps": lambda: 1, "outer": lambda: GradientDescent(0.1)},
    "check": {"y0": lambda: Y},
    "compare": {"y0": lambda: Y, "estimators": lambda: ["first-order"], "memory": lambda: False},
    "estimate_constants": {"samples": lambda: 1, "shift_steps": lambda: 3},
    "BilevelProblem": {"f": lambda: f, "g": lambda: g},
    "BilevelProblem.f": {"y": lambda: Y},
    "BilevelProblem.g": {"y": lambda: Y},
    "Instance": {"solution": lambda: torch.clone},
    "Certified": {"target_error": lambda: 0.1},
    "Estimate.load": {"path": lambda: saved(estimate()), "device": lambda: "cpu"},
    "Solution.load": {"path": lambda: saved(solution()), "device": lambda: "cpu"},
    "Estimate.save": {"path": lambda: folder() / "saved.safetensors"},
    "Solution.save": {"path": lambda: folder() / "saved.safetensors"},
    "Estimate.from_dict": {"content": lambda: estimate().to_dict()},
    "Solution.from_dict": {"content": lambda: solution().to_dict()},
    "Start.from_dict": {"content": lambda: bilevel.Start(X).to_dict()},
    "Best.from_dict": {"content": lambda: solution().best.to_dict()},
    "Trial.from_dict": {"content": lambda: bilevel.Trial({"outer_step": 0.1}, 1.0, Status.successful, True).to_dict()},
    "Report.from_dict": {"content": lambda: Report("inner solver", Status.successful, 0.0, 1).as_dict()},
    "bounds.penalty": {"weight": lambda: 10.0},
    "bounds.f2sa": {"weight": lambda: 10.0},
    "bilevel.federated.FederatedMAML": {"inner_step": lambda: 0.1, "outer_step": lambda: 0.1},
    "FederatedMAML.step": {
        "server": lambda: bilevel.federated.Server(clients(), (2, 2)),
        "at": lambda: At(X, X, X, X),
        "number": lambda: 0,
    },
    "bilevel.federated.OverClients": {
        "clients": clients,
        "method": lambda: bilevel.federated.FederatedSOBA(0.1, 0.05),
    },
    "bilevel.federated.Clients": {
        **{"problem": lambda: BilevelProblem(client, client), "x0": lambda: X, "y0": lambda: Y},
        "data": lambda: torch.ones(3, 2, **D),
    },
    **{
        f"Clients.{name}": {
            **{"who": lambda: torch.tensor([0, 2]), "x": lambda: X},
            **{"y": lambda: torch.zeros(2, 2, **D), "v": lambda: torch.ones(2, 2, **D)},
        }
        for name in ("inner_gradients", "outer_gradients", "products")
    },
    "ClientsOnRanks": {"own": clients, "group": group},
    **{
        f"ClientsOnRanks.{name}": {
            **{"who": lambda: torch.tensor([0, 2]), "x": lambda: X},
            **{"y": lambda: torch.zeros(2, 2, **D), "v": lambda: torch.ones(2, 2, **D)},
        }
        for name in ("inner_gradients", "outer_gradients", "products")
    },
    **{
        f"{owner}.means": {
            "who": lambda: torch.tensor([0, 2]),
            "weights": lambda: torch.ones(2, **D),
            "answers": lambda: torch.ones(2, 2, **D),
        }
        for owner in ("Clients", "ClientsOnRanks")
    },
    "federate": {
        **{"clients": clients, "x0": lambda: X, "y0": lambda: Y, "steps": lambda: 2},
        "method": lambda: bilevel.federated.FederatedSOBA(0.1, 0.05),
    },
    "Federated": {"traffic": lambda: bilevel.federated.Traffic(), "history": lambda: ()},
    "Reached": {"traffic": lambda: bilevel.federated.Traffic()},
    "bilevel.federated.Server": {"clients": clients, "sizes": lambda: (2, 2)},
    "local_steps": {
        **{"server": lambda: bilevel.federated.Server(clients(), (2, 2)), "x": lambda: X, "y": lambda: Y},
        **{"step": lambda: 0.1, "steps": lambda: 2},
    },
    "bilevel.ranks.Ranks": {"group": group},
    "Ranks.total": {"tensors": lambda: torch.ones(2)},
    "Ranks.gathered": {"value": lambda: [1, "a"]},
    "bilevel.ranks.Shard": {"data": lambda: torch.ones(3, 2)},
    "Shard.count": {"batch": lambda: torch.ones(3, 2)},
    "bilevel.ranks.Rows": {"batches": lambda: lambda role, number: torch.ones(3, 2)},
    "Rows.of_rank": {"batch": lambda: torch.ones(3, 2), "rank": lambda: 1, "ranks": lambda: 2},
    **{
        f"bilevel.reinforcement.{name}": {
            "policy": lambda: bilevel.reinforcement.CategoricalPolicy(net(1, 2)),
            "environment": lambda: bilevel.reinforcement.GaussianBandit(2),
            "params": lambda: dict(net(1, 2).named_parameters()),
            "tasks": lambda: {"means": torch.zeros(3, 2)},
            "task": lambda: {"means": torch.zeros(2)},
            "start": lambda: torch.zeros(4, 0),
            "noise": lambda: torch.zeros(4, 1, 2),
        }
        for name in ("MetaPolicy", "OfflinePolicy", "maml_policy", "rollout", "collect")
    },
    "TrustRegion": {"meta": lambda: pulled()},
    "Interaction": {
        "policy": lambda: bilevel.reinforcement.OfflinePolicy(bilevel.reinforcement.CategoricalPolicy(net(1, 2))),
        "collect": lambda: lambda task, params, seed: None,
        "outer": lambda: GradientDescent(0.1),
    },
    "OfflineTasks": {"data": lambda: {"goal": torch.zeros(3, 2)}},
    "CategoricalPolicy": {"module": net},
    "GaussianPolicy": {"module": net, "actions": lambda: 1},
    "Coverage": {name: lambda: torch.ones(2) for name in ("before", "after", "clipped")} | {"episodes": lambda: 3},
    "vector_episodes": {
        "environment": lambda: vector_environment(),
        "policy": lambda: bilevel.reinforcement.CategoricalPolicy(net(4, 2)),
        "params": lambda: dict(net(4, 2).named_parameters()),
        "horizon": lambda: 2,
    },
    "Participation.answered": {"asked": lambda: torch.tensor([0, 1])},
    "dirichlet_split": {"labels": lambda: torch.tensor([0, 1, 0, 1, 2, 2])},
    "stacked": {"tensors": lambda: [X], "parts": lambda: [torch.tensor([0]), torch.tensor([1])]},
    **{f"literature.{name}": {"name": lambda: "Bard1988Ex1"} for name in ("statement", "references", "load", "solve")},
    "literature.Reference": {name: lambda: (1.0,) for name in ("x", "y", "grad")},
    "literature.Point": {name: lambda: (1.0,) for name in ("x", "y")},
    "literature.Statement": {
        **{
            "kind": lambda: "lp",
            "sizes": lambda: (1, 1),
            "f": lambda: lambda x, y: x[0],
            "g": lambda: lambda x, y: y[0],
        },
        "best": lambda: bilevel.problems.literature.Point((1.0,), (1.0,), 1.0, 1.0),
    },
    "NonlinearlyConstrained": {"inequalities": lambda: lambda x, y: y},
    "ManyConstraints": {"inequalities": lambda: lambda x, y: y},
    "Iteration": {"step": lambda: lambda x, y, k: y},
    "Constants": {"mu": lambda: 1.0},
    "register_algorithm": {
        "name": lambda: f"name-{next(NUMBERS)}",
        "build": lambda: lambda setting: bilevel.algorithms.SOBA(0.1, 0.1),
    },
    "register_estimator": {
        "name": lambda: f"name-{next(NUMBERS)}",
        "build": lambda: lambda setting: AID(LBFGS(), CG()),
    },
    "Certificate": {"terms": lambda: {"inner": 0.0}, "assumed": lambda: ()},
    "Certificate.norm_interval": {},
    "Comparison": {"rows": lambda: (bilevel.Row("aid-cg", None),)},
    "Comparison.plot": {"figure": lambda: Figure()},
    "Calibration.plot": {"axes": lambda: Axes()},
    "Row": {"budget": lambda: None},
    "Check": {"verdicts": lambda: (), "estimators": dict},
    "Verdict": {"outcome": lambda: bilevel.Outcome.passed},
    "Functional": {"params": lambda: {"weight": X[None, :1]}, "seed": lambda: 0, "_calls": lambda: functional()._calls},
    "Functional.load": {"params": lambda: {"weight": X[None, :1]}},
    "functional": {"module": net},
    "AugmentedLagrangian": {
        "descent": lambda: bilevel.algorithms.Descent(AID(LBFGS(), CG()), GradientDescent(0.5)),
        "inequalities": lambda: lambda x, y: y,
    },
    "OuterConstraints": {"inequalities": lambda: (1.0,), "equalities": lambda: ()},
    "OuterConstraints.from_dict": {
        "content": lambda: bilevel.algorithms.OuterConstraints(0.0, 0.0, 10.0, (1.0,), ()).as_dict(),
    },
    "Record.from_dict": {
        "content": lambda: bilevel.Record(0, 1.0, 1.0, Status.successful, Stats(), 0.0).as_dict(),
    },
    "Solution": {"history": lambda: (), "best": lambda: bilevel.Best(0, X, Y, 1.0, 1.0, True)},
    "Solved": {"residual": lambda: torch.zeros((), **D)},
    "BilevelError": {},
    "Polytope.flat": {"y": lambda: ravel(X)[1]},
    "Polytope.parts": {"y": lambda: ravel(X)[1]},
    "Polytope.sparse_parts": {"y": lambda: ravel(X)[1]},
    "Multipliers.from_dict": {"content": lambda: bilevel.Multipliers().to_dict()},
    "Cosine": {"steps": lambda: 10},
    "StepDecay": {"milestones": lambda: 3},
    "TorchOptim": {"factory": lambda: lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
    "ClosedForm": {"solution": lambda: lambda x: x},
    "Clipped": {"max_norm": lambda: 1.0},
    "Scheduled": {"schedule": lambda: Cosine(10)},
    "influence": {"loss": lambda: lambda y, batch: (y - batch).square(), "params": lambda: X.mean()}
    | {"train": lambda: X, "test": lambda: Y},
    "Influence": {"bound": lambda: None},
    "Nystrom": {"damping": lambda: 0.1},
    "Neumann": {"step": lambda: 0.5},
    "Batches": {"size": lambda: 2},
    "Bound": {},
    "check_composite": {
        "problem": lambda: bilevel.BilevelProblem(lambda x, y: y.sum(), g, prox=lambda x: bilevel.prox.L1(0.1))
    },
    "LInfBall": {"radius": lambda: 1.0},
    "L1": {"weight": lambda: 1.0},
    "ElasticNet": {"l1": lambda: 1.0, "l2": lambda: 1.0},
    "prox.Box": {"lower": lambda: 0.0, "upper": lambda: 1.0},
    "GroupLasso": {"groups": lambda: "all"},
    "GroupBall": {"groups": lambda: "all"},
    "ProxDerivative": {
        "parts": lambda: (X,),
        "times": lambda: lambda parts, w: parts[0] * w,
        "inverse": lambda: lambda parts, w: w / parts[0],
    },
    "SpectralBall": {"radius": lambda: 1.0},
    "prox.Quadratic": {"Q": lambda: 1.0},
    "Affine": {"b": lambda: 0.0},
    "Expression": {"map": lambda: bilevel.terms.Identity((2,))},
    "Convolution": {"kernel": lambda: torch.ones(1, **D)},
    "FourierSamples": {"mask": lambda: torch.tensor([True, False])},
    "Mosaic": {"colors": lambda: torch.tensor([[0, 1]])},
    "terms.Matrix": {"matrix": lambda: matrix(2, 2)},
    "LinearMap": {
        **{"function": lambda: torch.clone, "transposed": lambda: torch.clone},
        **{"domain": lambda: (2,), "codomain": lambda: (2,)},
    },
    "Stacked": {"maps": lambda: (bilevel.terms.Gradient((2,)),)},
    "Wavelets": {"shape": lambda: (2, 2), "levels": lambda: 1},
    "terms.SumOfTerms": {"terms": lambda: (bilevel.terms.sum_squares(bilevel.terms.variable(2)),)},
    "Minimized": {"state": dict},
    "variable": {"shape": lambda: 2},
    "Scheme": {"begin": lambda: lambda y0: {"y": y0}, "advance": lambda: lambda state, k: state},
    "prior": {"denoise": lambda: lambda v, sigma: v},
    "denoised": {"x": lambda: bilevel.terms.denoiser_start(2, 3), "v": lambda: matrix(4, 4)},
    "proximal_problem": {
        "scheme": lambda: (
            lambda x: bilevel.terms.ADMM().on(
                bilevel.terms.SumOfTerms((bilevel.terms.sum_squares(bilevel.terms.variable(2)),))
            )
        )
    },
    "prox.Sum": {"terms": lambda: (bilevel.prox.L1(1.0),)},
    # problems
    "InverseLink": {"potential": Sinh, "B": lambda: matrix(2, 2)},
    "InverseLink.instance": {"description": lambda: "links"},
    "HyperCleaning": {"X": lambda: matrix(3, 2), "labels": lambda: torch.tensor([0, 1, 0])}
    | {"X_val": lambda: matrix(2, 2), "labels_val": lambda: torch.tensor([0, 1]), "outputs": lambda: 1},
    "HyperCleaning.f": {"y": lambda: torch.zeros(1, 2, **D)},
    "HyperCleaning.g": {"x": lambda: torch.zeros(3, **D), "y": lambda: torch.zeros(1, 2, **D)},
    "HyperCleaning.weighted": {"weights": lambda: torch.ones(3, **D), "y": lambda: torch.zeros(1, 2, **D)},
    "HyperCleaning.constants": {"x": lambda: torch.zeros(3, **D)},
    "bilevel.problems.Logistic": {"X": lambda: matrix(3, 2), "labels": lambda: torch.tensor([0, 1, 0])}
    | {"X_val": lambda: matrix(2, 2), "labels_val": lambda: torch.tensor([0, 1]), "outputs": lambda: 1},
    "bilevel.problems.Logistic.f": {"y": lambda: torch.zeros(1, 2, **D)},
    "bilevel.problems.Logistic.g": {"y": lambda: torch.zeros(1, 2, **D)},
    "bilevel.problems.Logistic.instance": {"data": lambda: None},
    "bilevel.testing.Logistic": {"Z": lambda: matrix(3, 2), "b": lambda: torch.tensor([1.0, -1.0, 1.0], **D)}
    | {"U": lambda: matrix(2, 2), "c": lambda: torch.tensor([1.0, -1.0], **D)},
    "bilevel.testing.Logistic.f": {"x": lambda: torch.zeros(5, **D)},
    "bilevel.testing.Logistic.g": {"x": lambda: torch.zeros(5, **D)},
    "bilevel.testing.Logistic.constants": {"x": lambda: torch.zeros(5, **D)},
    "LogSumExp": {"t": lambda: X},
    "FixedPoint": {"map": lambda: lambda x, y: 0.5 * y},
    "FixedPointFamily": {"A": lambda: matrix(2, 2), "B": lambda: matrix(2, 2)},
    "TabularMDP": {"P": lambda: torch.full((2, 2, 2), 0.5, **D), "r": lambda: matrix(2, 2)},
    **{
        f"TabularMDP.{name}": {"x": lambda: matrix(2, 2)}
        for name in ("f", "bellman", "solution", "gradient", "metrics")
    },
    "ProximalTasks.f": {"y": lambda: matrix(2, 2)},
    "ProximalTasks.g": {"y": lambda: matrix(2, 2)},
    "ProximalTasks": {name: lambda: torch.ones(2, 3, 2, **D) for name in "XU"}
    | {name: lambda: torch.ones(2, 3, **D) for name in "bc"},
    "QuadraticFamily": {"A": lambda: matrix(2, 2), "C": lambda: matrix(2, 2), "R": lambda: matrix(2, 2)}
    | {"B": lambda: matrix(2, 2), "E": lambda: matrix(2, 2)},
    "Ridge": {"X": lambda: matrix(3, 2), "b": lambda: torch.ones(3, **D), "U": lambda: matrix(2, 2), "c": lambda: X},
    "Ridge.instance": {"description": lambda: "ridge"},
    "WeightedLogit": {"labels": lambda: torch.tensor([1.0, -1.0], **D)},
    "WeightedLogit.f": {"y": lambda: torch.zeros((), **D)},
    "WeightedLogit.g": {"y": lambda: torch.zeros((), **D)},
    "GaussianLikelihood.interval": {"draws": lambda: torch.ones(4, 3, 1), "level": lambda: 0.9},
    "GaussianLikelihood.moments": {"draws": lambda: torch.ones(4, 3, 1)},
    "GaussianLikelihood.predictive_nll": {"draws": lambda: torch.ones(4, 3, 1), "targets": lambda: torch.ones(3, 1)},
    "KLProducts": {"expectation": lambda: g},
    **{
        name: {"data": lambda: (torch.rand(8, 2), torch.tensor([0, 1] * 4))}
        for name in ("ridge_diabetes", "ridge_per_feature_diabetes", "logistic_breast_cancer", "multinomial_digits")
    },
    "no_inner_loop": {
        "learner": lambda: anil_learner(),
        "features": lambda: lambda x, images: images,
        "classes": lambda: 2,
    },
    "solution_path": {"x": lambda: [X], "y0": lambda: Y},
    "SolutionPath": {"x": lambda: (X,), "y": lambda: (Y,), "values": lambda: (1.0,), "steps": lambda: (1,)},
    "CoordinateDescent": {"max_steps": lambda: 5},
    "BoundedL1": {"radius": lambda: 0.5},
    "LinearModel": {"X": lambda: matrix(3, 2), "targets": lambda: torch.ones(3, **D)},
    "GeneralizedLinearModel": {"features": lambda: matrix(3, 2), "targets": lambda: torch.ones(3, **D)},
    "declare": {"g": lambda: lambda x, y: known_model()(x, y), "known": lambda: known_model(), "data": lambda: None}
    | {"x0": lambda: torch.ones(2, **D), "y0": lambda: torch.ones(2, **D)},
    "Softmax.value": {"z": lambda: matrix(2, 3), "b": lambda: torch.tensor([0, 1, 0])},
    "SparseData": dict.fromkeys(("train", "held", "test"), lambda: linear_model()),
    "highest_penalty": {"model": lambda: linear_model()},
    "lasso": {"folds": lambda: 2, "n": lambda: 4, "d": lambda: 3},
    "weighted_lasso": {"folds": lambda: 2, "n": lambda: 4, "d": lambda: 3},
    "elastic_net": {"folds": lambda: 2, "n": lambda: 4, "d": lambda: 3},
    "group_lasso": {"folds": lambda: 2, "n": lambda: 4, "groups": lambda: 2, "size": lambda: 2},
    **{
        name: {"data": lambda: (torch.rand(12, 2), torch.tensor([0, 1] * 6))} | folds
        for name, folds in {
            "lasso_diabetes": dict[str, Any](),
            **{key: {"folds": lambda: 2} for key in ("elastic_net_diabetes", "sparse_logistic", "svm", "svr")},
        }.items()
    },
    "random_quadratic": {"eigenvalues": lambda: [1.0, 2.0]},
    "svm_head": {"support": lambda: 2},
    "matching_net": {"support": lambda: 2},
    "learning_to_optimize": {"steps": lambda: 2},
    "mislabelled_tasks": {"tasks": lambda: 2, "validation": lambda: 2, "filters": lambda: 2},
    "outlier_sinusoids": {"tasks": lambda: 4, "validation": lambda: 2},
    "fair_meta_learning": {"shots": lambda: 2, "queries": lambda: 2, "steps": lambda: 2},
    "fair_classifier": {"samples": lambda: 20},
    "semi_supervised": {"queries": lambda: 2, "unlabeled": lambda: 2, "steps": lambda: 2, "filters": lambda: 2},
    "active_cells": {"shots": lambda: 2, "queries": lambda: 2, "filters": lambda: 2},
    "task_weights": {
        "module": lambda: nn.Linear(1, 1),
        "loss": lambda: nn.functional.mse_loss,
        "tasks": lambda: Sinusoid(shots=2, queries=2).sample(4, 0),
        "validation": lambda: Sinusoid(shots=2, queries=2).sample(2, 1),
    },
    "GaussNewton": {"outputs": lambda: lambda x, y: y, "loss": lambda: lambda x, z: z.sum()},
    "TruncatedCG": {"max_steps": lambda: 3},
    "small_network": {
        "network": lambda: "mlp",
        "n_train": lambda: 4,
        "n_val": lambda: 4,
        "width": lambda: 1,
        "data": lambda: (torch.rand(10, 64), torch.tensor([0, 1] * 5)),
    },
    # tasks and few-shot learning
    "ImageClasses": {"images": lambda: torch.rand(6, 4, 2, 2)},
    "ImageFiles": {"files": lambda: ((picture(),),), "names": lambda: ("class",), "size": lambda: 2},
    "pixels": {"classes": lambda: torch.tensor([0]), "members": lambda: torch.tensor([0])},
    "subset": {"classes": lambda: [0]},
    "Episodes": {"way": lambda: 2, "queries": lambda: 1},
    "Splits": {name: lambda k=k: images().subset([k]) for k, name in enumerate(("train", "validation", "test"))},
    "hyper_cleaning": {
        "n_train": lambda: 3,
        "n_val": lambda: 3,
        "data": lambda: (torch.rand(8, 4), torch.tensor([0, 1] * 4)),
    },
    **{
        name: {
            "n_train": lambda: 4,
            "n_val": lambda: 3,
            "channels": lambda: 1,
            "data": lambda: (torch.rand(9, 16), torch.arange(9) % 3),
        }
        for name in ("noisy_labels", "learned_augmentation")
    },
    "mixed_operations": {"n_train": lambda: 4, "n_val": lambda: 3, "width": lambda: 2, "vocabulary": lambda: 3},
    "hyper_cleaning_batches": {
        "n_train": lambda: 3,
        "n_val": lambda: 3,
        "data": lambda: (torch.rand(8, 4), torch.tensor([0, 1] * 4)),
    },
    "distillation": {
        "n_train": lambda: 8,
        "hidden": lambda: 2,
        "data": lambda: (torch.rand(12, 4), torch.arange(12) % 3),
    },
    "replay": {
        "n_train": lambda: 8,
        "hidden": lambda: 2,
        "data": lambda: (torch.rand(12, 4), torch.arange(12) % 3),
    },
    "representation": {
        "n_train": lambda: 6,
        "n_val": lambda: 3,
        "width": lambda: 2,
        "features": lambda: 2,
        "data": lambda: (torch.rand(12, 4), torch.arange(12) % 3),
    },
    "byte_gpt": {"width": lambda: 4, "depth": lambda: 1, "heads": lambda: 2, "context": lambda: 2},
    "federated_cleaning": {"clients": lambda: 3, "n_train": lambda: 30, "n_val": lambda: 20},
    "federated_representation": {"clients": lambda: 3, "n_train": lambda: 30, "n_val": lambda: 20, "width": lambda: 3},
    "federated_maml": {"devices": lambda: 4, "width": lambda: 3},
    "language_sources": {"width": lambda: 4, "depth": lambda: 1, "heads": lambda: 2, "context": lambda: 2}
    | {"each": lambda: 2, "max_steps": lambda: 1},
    "hyper_cleaning_synthetic": {"n_train": lambda: 4, "n_val": lambda: 4, "d": lambda: 2, "classes": lambda: 2},
    **{
        f"BayesianRegression.{name}": {"y": lambda: {"mean": X, "log_variance": Y}}
        for name in ("divergence", "expectation", "f", "g")
    },
    "BayesianRegression.expectation": {"y": lambda: {"mean": X, "log_variance": Y}, "side": lambda: "support"},
    "image_folder": {"path": lambda: picture().parent.parent, "size": lambda: 2},
    "mini_imagenet": {"path": lambda: mini(), "size": lambda: 2},
    "omniglot": {"path": folder},
    "convert_omniglot": {"folder": folder},
    "check_batch": {"batch": lambda: LinearTasks(1, shots=2, queries=2).sample(2, 0)},
    "pad": {"tasks": lambda: [training_data(), training_data()]},
    "split": {"validation": lambda: 1, "test": lambda: 1},
    "adapt": {"x": lambda: learner().x0, "batch": lambda: Sinusoid(2, 2).sample(2, 0)},
    "Adapted": {"y": lambda: adapted().y, "batch": lambda: adapted().batch},
    "predict": {"x": lambda: learner().x0},
    "draws": {"learner": posterior, "x": lambda: posterior().x0, "adapted": lambda: of_posterior()},
    "evaluate": {"x": lambda: learner().x0, "episodes": lambda: 2, "batch": lambda: 2},
    "calibration": {"log_probabilities": lambda: torch.tensor([[0.9, 0.1]] * 2).log()}
    | {"targets": lambda: torch.tensor([0, 1]), "bins": lambda: 2},
    "Calibration": {name: lambda: torch.tensor([1.0]) for name in ("counts", "accuracies", "confidences")}
    | {"edges": lambda: torch.tensor([0.0, 1.0])},
    "calibration_of": {"evaluation": of_classes},
    "draw_reliability": {"found": lambda: {"a": calibrated()}},
    "Evaluation": {"curve": dict, "failed": dict, "scores": lambda: X},
    "Experiment": {"test": lambda: Sinusoid(2, 2)}
    | {"settings": lambda: Training(max_steps=1, batch=2), "evaluation": lambda: Evaluating(2, 2)},
    "Experiment.evaluate": {"x": lambda: learner().x0},
    "Evaluating.evaluate": {"x": lambda: learner().x0},
    "Evaluating": {"episodes": lambda: 2, "batch": lambda: 2},
    "NamedExperiment": {"build": lambda: lambda: None},
    "Entry": {"build": lambda: quadratic},
    "Learner": {"predict": lambda: lambda x, y, task: y, "export": lambda: lambda x: net()},
    "Progress": {"score": lambda: None, "validation": lambda: None, "best": lambda: None},
    "Trained": {"validations": lambda: (), "history": lambda: (), "failed": dict, "ended": lambda: "max_steps"}
    | {"x": lambda: learner().x0},
    "train": {"max_steps": lambda: 1, "batch": lambda: 2},
    "read_best": {"path": lambda: best()},
    # scikit-learn: quick ones
    **{
        f"bilevel.sklearn.{name}": {"cv": lambda: 2, "max_iter": lambda: 1, "penalties": lambda: "one"}
        for name in ("ElasticNetHO", "LassoHO", "LogisticRegressionHO", "RidgeHO", "SVCHO")
    },
    "SampleReweightingClassifier": {"cv": lambda: 2, "max_iter": lambda: 1},
    "InfluenceScorer": {"cv": lambda: 2},
    **{
        f"{name}.{method}": {"X": lambda: samples()[0], "y": lambda: samples()[1]}
        for name in (
            *("ElasticNetHO", "LassoHO", "LogisticRegressionHO", "RidgeHO", "SVCHO"),
            *("SampleReweightingClassifier", "InfluenceScorer"),
        )
        for method in ("fit", "predict", "decision_function", "predict_proba", "predict_log_proba")
    },
    "numbers_of": {"record": lambda: bilevel.Record(0, 1.0, 1.0, Status.successful, Stats(), 0.0)},
    "TensorBoard": {"folder": lambda: folder() / "board"},
    "MLflow": {"uri": lambda: f"sqlite:///{folder() / 'mlflow.db'}", "experiment": lambda: "name"},
    # extending
    "outer_gradients": {},
    "report": {"solved": lambda: Solved(X, (Status.successful,), torch.zeros((), **D), 1)},
    "Told": {"failed": lambda: None, "grad": lambda: X},
    "Move": {"state": dict, "stands": lambda: X, "ended": lambda: None, "tol": lambda: None},
    "FlatEstimate": {"value": lambda: torch.zeros((), **D)},
    "Linearization": {"mv": lambda: torch.clone, "products": lambda: lambda v: (v, v)},
    "Oracle": {"data": lambda: bilevel.Split(None, None)},
    "Setting": {"problem": flat},
    "FlatProblem": {"problem": lambda: PROBLEM},
    "Beforehand": {},
    # testing
    "algorithm_checks": {},
    "parametrize_with_checks": {"estimators": lambda: [AID(LBFGS(), CG())]},
    "gaussian": {"shape": lambda: 2},
    "close": {"found": lambda: X, "expected": lambda: X, "tol": lambda: 0.1},
    "exact": {"gradient": lambda: X - 3},
    "exact_or_reported": {"gradient": lambda: X - 3},
    "spd": {"eigenvalues": lambda: X},
}


@functools.cache
def cone_program() -> tuple[Any, Any, Any]:
    """A problem of cvxpy with its parameter and its variable."""
    cp = importlib.import_module("cvxpy")
    parameter, variable = cp.Parameter(2), cp.Variable(2)
    return cp.Problem(cp.Minimize(cp.sum_squares(variable - parameter)), [variable >= 0]), parameter, variable


# Not called with what is valid: the data, or the package that it belongs to, are not there.
WITHOUT_DATA = {"omniglot", "convert_omniglot"}
if importlib.util.find_spec("cvxpy") is None:
    WITHOUT_DATA.add("from_cvxpy")
else:
    BY_NAME["from_cvxpy"] = {
        "problem": lambda: cone_program()[0],
        "parameters": lambda: cone_program()[1],
        "variables": lambda: cone_program()[2],
    }
if importlib.util.find_spec("gymnasium") is None:
    WITHOUT_DATA.add("vector_episodes")
WITHOUT_DATA.add("WandB")  # which would open a connection
WITHOUT_DATA |= {name for name in ("TensorBoard", "MLflow") if importlib.util.find_spec(name.lower()) is None}


def valid(entry: Public) -> dict[str, Any]:
    """Arguments with which the call succeeds: those that have no default, and those that the tables name."""
    told = table(entry)
    found = {}
    for name, parameter in parameters(entry.call, method=entry.owner is not None).items():
        if name in told:
            found[name] = told[name]()
        elif parameter.default is parameter.empty and str(parameter.annotation) not in OTHERS_CALL:
            text = str(parameter.annotation)
            assert text in BY_ANNOTATION, f"{entry.name}({name}: {text}) has no valid example in tests/valid_calls.py"
            found[name] = BY_ANNOTATION[text]()
    return found


def table(entry: Public) -> dict[str, Callable[[], Any]]:
    parts = entry.name.split(".")
    own = entry.name, ".".join(parts[-2:]), parts[-1]
    return next((BY_NAME[name] for name in own if name in BY_NAME), {})


@functools.cache
def owner(entry: Public) -> Any:
    """An instance whose method is called; for a method of the class, the class."""
    constructor = Public(entry.name.rpartition(".")[0], entry.room, entry.owner)
    return called(constructor, valid(constructor))


def called(entry: Public, arguments: dict[str, Any]) -> Any:
    if entry.room == "bilevel.sklearn" and inspect.isclass(entry.call):
        made: Any = entry.call(**arguments)
        return made.fit(*samples())  # which looks at what the constructor keeps
    if entry.owner is None:
        if entry.name.endswith((".gaussian", ".variable")):
            shape = arguments.pop("shape")
            return entry.call(shape, **arguments)
        return entry.call(**arguments)
    return getattr(owner(entry), entry.name.rpartition(".")[2])(**arguments)
