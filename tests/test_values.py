"""Results and configurations are values: pickled, copied, and written to files, with every bit of their numbers."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import importlib
import inspect
import math
import pickle
import pkgutil
import re
import sys
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import portable_cases
import pytest
import torch
from cases import ESTIMATORS, bits
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn

import bilevel
from bilevel import (
    AID,
    ITD,
    BilevelError,
    BilevelProblem,
    Certified,
    Constants,
    Estimate,
    Report,
    Solution,
    Start,
    Stats,
    Status,
    Truncated,
    certify,
    check,
    hypergradient,
    hyperobjective,
    minimize,
    ravel,
    reinforcement,
    terms,
)
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._tree import tree_map
from bilevel.algorithms import AugmentedLagrangian, Descent, FiniteSum, OuterConstraints
from bilevel.attribution import KFAC, Influence
from bilevel.compiled.estimator import Compiled
from bilevel.experiments.catalogue import experiments
from bilevel.extending import Joint, Reduced
from bilevel.federated import Clients, Server, Traffic
from bilevel.few_shot import Validating, adapt, calibration_of, evaluate, mlp, train
from bilevel.inner_problems import Iteration, ManyConstraints, NonlinearlyConstrained
from bilevel.outer.partial import attach
from bilevel.portable.pickling import AbstractPortable, obstacle
from bilevel.portable.plain import plain, restored
from bilevel.problems import (
    GaussianLikelihood,
    abml,
    anil,
    catalogue,
    ibaml,
    ibaml_head,
    imaml,
    literature,
    maml,
    no_inner_loop,
    proto_net,
    quadratic,
    reptile,
    ridge_head,
    shared_embedding,
    svm_head,
)
from bilevel.prox import L1, GroupBall, GroupLasso, Nonnegative, ProxDerivative, Sum
from bilevel.requirements.properties import DoesNotApply
from bilevel.solvers import CG, LBFGS, Clipped, Cosine, GradientDescent, Iterate, Jacobi, Scheduled, TorchOptim
from bilevel.tasks import Episodes, ImageClasses, ImageFiles, Sinusoid, Splits, batches
from bilevel.testing import FixedPointFamily, Logistic

cloudpickle: Any = pytest.importorskip("cloudpickle")  # which joblib brings
FLOAT = torch.float64
mse = nn.functional.mse_loss

# Every public class


def public_modules() -> Iterator[types.ModuleType]:
    """The packages of the library, whose names are public; not those of the command line."""
    yield bilevel
    for each in pkgutil.walk_packages(bilevel.__path__, "bilevel."):
        if each.ispkg and "._" not in each.name and not each.name.startswith("bilevel.commands"):
            yield importlib.import_module(each.name)
    yield importlib.import_module("bilevel.extending")


def public_classes() -> dict[str, Any]:
    found = {}
    for module in public_modules():
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__.startswith("bilevel") and not name.startswith("_")
            if own and not name.startswith("Abstract"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


PUBLIC = public_classes()
# What lives within one call, between the parts of an estimate, and holds functions made there.
WITHIN_A_CALL = {"Linearization", "Objective", "Oracle", "Move", "Told", "Evaluated", "LinearOperator", "Setting"}
WITHIN_A_CALL |= {"Drawn", "Ranks", "ClientsOnRanks", "Scheme"}  # and processes, which do not travel
WITHIN_A_CALL |= {"TensorBoard", "MLflow", "WandB"}  # and what is open: files, a tracker's run


def build_problem(name: str) -> Any:
    """A problem of the catalogue, small, on data of its own."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(24, 3, generator=generator), torch.arange(24) % 3
    data = {"data": (X, X.sum(1) if name.startswith("ridge") else y)}
    sizes: dict[str, dict[str, Any]] = {
        "hyper-cleaning": {**data, "n_train": 12, "n_val": 6},
        "language-sources": {"width": 8, "depth": 1, "heads": 2, "context": 4, "each": 2},
        "hyper-cleaning-synthetic": {"n_train": 12, "n_val": 6, "d": 3, "classes": 2},
        "mixed-operations": {"n_train": 12, "n_val": 6, "width": 2, "batch": 4},
        "distillation": {**data, "n_train": 12, "hidden": 2},
        "deblurring": {"side": 16, "train": 2, "test": 2, "pictures": "synthetic"},
        "compressed-sensing-mri": {"side": 16, "train": 2, "test": 2, "pictures": "synthetic"},
        "deraining": {"side": 16, "train": 2, "test": 2, "pictures": "synthetic"},
        "joint-optics": {"side": 16, "train": 2, "test": 2, "pictures": "synthetic"},
        "learned-prior": {"side": 16, "train": 2, "test": 2, "batch": 2, "pictures": "synthetic"},
        "energy-planning": {"hours": 24},
        "replay": {**data, "n_train": 12, "hidden": 2},
        "representation": {**data, "n_train": 12, "n_val": 6, "width": 2, "features": 2},
    }
    for recipe in ("noisy-labels", "learned-augmentation"):
        sizes[recipe] = {"n_train": 12, "n_val": 6, "channels": 2, "batch": 4, "data": (X[:, :1].expand(-1, 16), y)}
    own = data if name.endswith(("-diabetes", "-cancer", "-digits")) else {}
    return catalogue()[name].build(**sizes.get(name, own))


def learners() -> dict[str, Callable[[], Any]]:
    net, body, head = mlp((1, 4, 1)), nn.Sequential(nn.Linear(1, 4), nn.Tanh()), nn.Linear(4, 1)
    three = nn.Linear(4, 3)
    features = bilevel.functional(body)
    return {
        "maml": lambda: maml(net, mse, learn_steps=True),
        "reptile": lambda: reptile(net, mse),
        "imaml": lambda: imaml(net, mse, learn_regularization=True),
        "anil": lambda: anil(body, head, mse),
        "nil": lambda: no_inner_loop(anil(body, three, nn.functional.cross_entropy), of_body(features), 3),
        "shared": lambda: shared_embedding(body, head, mse),
        "ibaml": lambda: ibaml(net, mse),
        "ibaml_head": lambda: ibaml_head(body, head, mse),
        "abml": lambda: abml(net, mse),
        "proto": lambda: proto_net(body, 4, 3),
        "svm": lambda: svm_head(body, 4, 3, support=3),
        "ridge": lambda: ridge_head(body, 4, 1, mse),
    }


def of_body(features: Any) -> Any:
    return functools.partial(_of_body, features)


def _of_body(features: Any, x: Any, inputs: Tensor) -> Tensor:
    found: Tensor = features(x["body"], inputs)
    return found


def few_shot_results() -> list[Any]:
    learner, tasks = maml(mlp((1, 4, 1)), mse), Sinusoid(shots=3, queries=3)
    steps: list[Any] = []
    chosen_by = Validating(tasks, every=1, episodes=2)
    trained = train(learner, tasks, max_steps=2, batch=2, validation=chosen_by, callback=steps.append)
    images = ImageClasses(torch.zeros(9, 4, 4, 4, dtype=torch.uint8))
    classifier = proto_net(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), 2, 2)
    episodes = Episodes(images, way=2, shots=1, queries=1)
    return [
        trained,
        steps,
        chosen_by,
        calibration_of(evaluate(classifier, classifier.x0, episodes, episodes=2, batch=2)),
        evaluate(learner, learner.x0, tasks, episodes=2, batch=2),
        adapt(learner, learner.x0, batches(tasks, 2, 0)(0)),
        episodes,
        Splits(images.subset([0]), images.subset([1]), images.subset([2])),
        ImageFiles(((Path("a.png"),),), ("a",), 4),
        experiments()["maml-sinusoid"].build(),
        list(experiments().values()),
    ]


def core_results() -> list[Any]:
    instance = quadratic(p=2, q=3)
    problem, x, y = instance.problem, instance.x0, instance.y0
    found = hypergradient(problem, x, y, estimator="aid-cg")
    phi = hyperobjective(problem, y)
    phi(x)
    assert instance.constants is not None
    return [
        [build_problem(name) for name in catalogue()],
        list(catalogue().values()),
        [build() for build in learners().values()],
        [row.build(1e-8, 2) for row in ESTIMATORS],
        minimize(problem, x, y, max_steps=2),
        found,
        phi,
        check(problem, x, y),
        certify(problem, x, found, instance.constants(x)),
        LBFGS().solve(Objective(lambda v: v.square().sum()), torch.ones(3)),
        FlatProblem(problem, ravel(x)[1], ravel(y)[1]),
        [DoesNotApply("why"), BilevelError("what", Status.diverged, found)],
    ]


def harvested(value: Any, found: dict[type, Any], seen: set[int]) -> None:
    """An instance of each class of the library that a value holds, whichever way."""
    if id(value) in seen or isinstance(value, Tensor | str | type | types.ModuleType):
        return
    seen.add(id(value))
    if type(value).__module__.startswith("bilevel"):
        found.setdefault(type(value), value)
    parts: Any = ()
    if isinstance(value, list | tuple | set | frozenset):
        parts = value
    elif isinstance(value, dict | types.MappingProxyType):
        parts = value.values()
    elif isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        parts = (value.__self__,)
    elif hasattr(value, "__dict__") and not isinstance(value, types.FunctionType | nn.Module):
        parts = vars(value).values()
    for part in list(parts):
        harvested(part, found, seen)


def guess(kind: Any) -> Any:
    """An instance of a dataclass by the annotations of the fields that have no defaults."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if not field.init or field.default is not dataclasses.MISSING:
            continue
        if field.default_factory is not dataclasses.MISSING:
            continue
        kinds = {
            "int": 2,
            "float": 0.5,
            "Step": 0.5,
            "RowStep": 0.5,
            "Mapping[str": {"inner_step": 0.1},
            "Status": Status.successful,
            "str": "a",
            "bool": True,
            "AbstractInner": Iterate(GradientDescent(0.1), 2),
            "AbstractUnroll": Iterate(GradientDescent(0.1), 2),
            "AbstractImplicit": AID(LBFGS(), CG()),
            "AbstractLinear": CG(),
            "AbstractOptimizer": GradientDescent(0.1),
            "AbstractEstimator": AID(LBFGS(), CG()),
            "AbstractTasks": Sinusoid(),
            "AbstractProxTerm": L1(torch.ones(2)),
            "tuple": (),
            "Callable[[int]": portable_cases.number,
            "Schedule": portable_cases.number,
            "Callable": portable_cases.f,
            "Constants": Constants(mu=1.0),
            "Tensor": torch.ones(2),
            "Tree": torch.ones(2),
            "Traffic": Traffic(1, 8, 8),
            "Any": 1.0,
        }
        values[field.name] = next(value for text, value in kinds.items() if str(field.type).startswith(text))
    return kind(**values)


def federated_clients() -> Clients:
    """Two clients."""
    return Clients(BilevelProblem(portable_cases.f, portable_cases.f), torch.ones(2), torch.ones(2), torch.ones(2, 3))


def pulled() -> reinforcement.MetaPolicy:
    """A policy of one state and two arms."""
    return reinforcement.MetaPolicy(reinforcement.CategoricalPolicy(nn.Linear(1, 2)), reinforcement.GaussianBandit(2))


def instance_of(kind: Any, found: dict[type, Any]) -> Any:
    if kind in found:
        return found[kind]
    if issubclass(kind, enum.Enum):
        return list(kind)[-1]
    rows: dict[str, Callable[[], Any]] = {
        "ITD": lambda: ITD(Iterate(GradientDescent(0.1), 2), Truncated(1)),
        "ProxDerivative": lambda: ProxDerivative((torch.ones(2),), portable_cases.f, portable_cases.f),
        "GroupLasso": lambda: GroupLasso(1.0, [[0, 1]]),
        "GroupBall": lambda: GroupBall(1.0, [[0, 1]]),
        "Sum": lambda: Sum((L1(1.0), Nonnegative())),
        "Certified": lambda: Certified(AID(LBFGS(), CG()), target_error=0.1),
        "Clipped": lambda: Clipped(GradientDescent(0.1), max_norm=1.0),
        "Scheduled": lambda: Scheduled(GradientDescent(0.1), Cosine(3)),
        "KFAC": lambda: KFAC(torch.nn.Linear(1, 1), torch.nn.MSELoss(), [], damping=0.1),
        "Influence": lambda: Influence(torch.ones(3), torch.zeros(3), None, 0.5, 0.0, Status.successful, (), Stats()),
        "Descent": lambda: Descent(AID(LBFGS(), CG()), GradientDescent(0.1)),
        "AugmentedLagrangian": lambda: AugmentedLagrangian(
            Descent(AID(LBFGS(), CG()), GradientDescent(0.1)), portable_cases.f
        ),
        "OuterConstraints": lambda: OuterConstraints(0.5, 0.5, 10.0, (1.0,), (-2.0,)),
        "Iteration": lambda: Iteration(portable_cases.f),
        "Statement": lambda: literature.statement("Bard1988Ex1"),
        "TorchOptim": lambda: TorchOptim(torch.optim.SGD),
        "FiniteSum": lambda: FiniteSum(torch.ones(5), batch_size=2),
        "Joint": lambda: Joint(torch.ones(2), torch.ones(3), None),
        "Reduced": lambda: Reduced(Joint(torch.ones(2), torch.ones(3), None), torch.ones(()), None),
        "Jacobi": lambda: Jacobi(),
        "Compiled": lambda: Compiled(AID(Iterate(GradientDescent(0.1), 2), CG()), "eager"),
        "Trajectories": lambda: reinforcement.Trajectories(*(torch.ones(2, 3) for _ in range(5))),
        "CategoricalPolicy": lambda: reinforcement.CategoricalPolicy(nn.Linear(1, 2)),
        "GaussianPolicy": lambda: reinforcement.GaussianPolicy(nn.Linear(1, 2), 2),
        "MetaPolicy": pulled,
        "OfflinePolicy": lambda: reinforcement.OfflinePolicy(pulled().policy),
        "OfflineTasks": lambda: reinforcement.OfflineTasks({"goal": torch.ones(2, 3)}),
        "TrustRegion": lambda: reinforcement.TrustRegion(pulled()),
        "Interaction": lambda: reinforcement.Interaction(
            reinforcement.OfflinePolicy(pulled().policy), portable_cases.collected, GradientDescent(0.1)
        ),
        "Clients": federated_clients,
        "Server": lambda: Server(federated_clients(), (2, 2)),
        "GaussianLikelihood": lambda: GaussianLikelihood(0.5),
        "Convolution": lambda: terms.Convolution(torch.ones(1), (2,)),
        "Gradient": lambda: terms.Gradient((2,)),
        "Expression": lambda: terms.variable(2),
        "SumOfTerms": lambda: terms.SumOfTerms((terms.sum_squares(terms.variable(2)),)),
        "Term": lambda: terms.norm1(terms.variable(2) - 1.0),
        "Identity": lambda: terms.Identity((2,)),
        "LinearMap": lambda: terms.LinearMap(torch.relu, torch.relu, (2,), (2,)),
        "Stacked": lambda: terms.Stacked((terms.Gradient((2,)),)),
        "FourierSamples": lambda: terms.FourierSamples(torch.tensor([True, False])),
        "Matrix": lambda: terms.Matrix(torch.ones(1, 2)),
        "Mosaic": lambda: terms.Mosaic(terms.bayer(2, 2)),
        "Minimized": lambda: terms.Minimized(torch.ones(2), {"y": torch.ones(2)}, Status.successful, 0.0, 1),
        "Wavelets": lambda: terms.Wavelets((2, 2), 1),
        "ManyConstraints": lambda: ManyConstraints(portable_cases.f, portable_cases.f),
        "NonlinearlyConstrained": lambda: NonlinearlyConstrained(portable_cases.f, portable_cases.f),
        "FixedPointFamily": lambda: _fixed_points(),
        "Logistic": lambda: Logistic(torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), torch.ones(2)),
    }
    if kind.__name__ in rows:
        return rows[kind.__name__]()
    try:
        return kind()
    except (TypeError, ValueError):
        return guess(kind)


def _fixed_points() -> FixedPointFamily:
    y = torch.ones(2)
    return FixedPointFamily(torch.ones(2, 2), torch.ones(2, 3), y, y, torch.ones(3))


@functools.cache
def at_hand() -> dict[type, Any]:
    """An instance of each class that comes about by itself."""
    found: dict[type, Any] = {}
    harvested([core_results(), few_shot_results()], found, set())
    return found


def value_of(name: str) -> Any:
    """An instance of a public class: one that came about by itself, else by defaults and annotations."""
    return instance_of(PUBLIC[name], at_hand())


def octets(tensor: Tensor) -> list[int]:
    found: list[int] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    return found


def same(a: Any, b: Any, seen: dict[int, int]) -> bool:
    """Whether two values are of the same types and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if a is b or seen.get(id(a)) == id(b):
        return True
    seen[id(a)] = id(b)
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and octets(a) == octets(b)
    if isinstance(a, nn.Module):
        return same(dict(a.state_dict()), dict(b.state_dict()), seen) and str(a) == str(b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, seen) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key], seen) for key in a)
    if isinstance(a, functools.partial):
        return same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), seen)
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and same(a.__self__, b.__self__, seen)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, BaseException):
        return same((a.args, vars(a)), (b.args, vars(b)), seen)
    own: Any = type(a).__eq__
    if own is not object.__eq__ and not dataclasses.is_dataclass(a):
        return bool(a == b)
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a) if field.name not in DERIVED]
        return all(same(getattr(a, name), getattr(b, name), seen) for name in names)
    return all(same(part, vars(b).get(name), seen) for name, part in vars(a).items() if name not in DERIVED)


# Made when they are needed (working copies of modules, what a problem keeps to be asked for again, marks of an object),
# or of one tensor (how often it was written to).
DERIVED = {"_idle", "_outer", "_data", "given", "_made_of", "_each", "_original", "_left", "_decoded", "versions"}
NAMES = [name for name, kind in PUBLIC.items() if kind.__name__ not in WITHIN_A_CALL]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_value_survives_pickle_and_copy(name: str) -> None:
    value = value_of(name)
    assert type(value) is PUBLIC[name]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert same(value, pickle.loads(pickle.dumps(value, protocol)), {}), protocol
    assert same(value, copy.deepcopy(value), {})
    assert same(value, copy.copy(value), {})


# What stands in the way is named


def fields_of_functions() -> Iterator[tuple[str, str]]:
    """The public classes with the fields that hold a function of the user's."""
    for name, kind in PUBLIC.items():
        if dataclasses.is_dataclass(kind) and kind not in (Estimate,):
            for field in dataclasses.fields(kind):
                if "Callable" in str(field.type) or str(field.type) == "Callback | None":
                    yield name, field.name


HOLDERS = [*fields_of_functions()]


def test_there_are_fields_that_hold_functions() -> None:
    assert len(HOLDERS) > 20 and ("bilevel.solvers.closed_form.ClosedForm", "solution") in HOLDERS


@pytest.mark.parametrize(("name", "field"), HOLDERS)
def test_a_lambda_in_a_field_is_named_by_pickle_and_taken_by_copy(name: str, field: str) -> None:
    kind = PUBLIC[name]
    assert issubclass(kind, AbstractPortable)
    value = copy.copy(value_of(name)) if kind.__name__ not in WITHIN_A_CALL else object.__new__(kind)
    object.__setattr__(value, field, lambda x: x)
    with pytest.raises(pickle.PicklingError) as caught:
        pickle.dumps(value)
    line = (lambda: 0).__code__.co_firstlineno - 3
    assert str(caught.value).startswith(
        f"`pickle of {kind.__name__}`: field `{field.removeprefix('_')}` is a lambda defined at {__file__}:{line}."
        " Define it at the top of a module"
    )
    assert getattr(copy.deepcopy(value), field) is getattr(value, field)
    assert getattr(pickle.loads(cloudpickle.dumps(value)), field)(3) == 3


FUNCTIONS = ("f", "g", "init", "encode", "constraints", "prox")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_of_a_problem_is_named(name: str) -> None:
    def local(*_: Any) -> Any:
        return None

    class Local:
        def __call__(self, *_: Any) -> Any:
            return None

    given: dict[str, Any] = {"f": portable_cases.f, "g": portable_cases.g}
    assert pickle.loads(pickle.dumps(BilevelProblem(**given))).f is not None
    ways: dict[str, Any] = {
        "the local function `local`": local,
        "field `{}.func` is the local function `local`": functools.partial(local, 1),
        "field `{}.args[0]['a']` is a lambda": functools.partial(portable_cases.f, {"a": lambda: 0}),
        "an instance of the local class `Local`": Local(),
        "field `{}.__self__` is an instance of the local class `Local`": Local().__call__,
        "the local function `local` defined at": functools.cache(local),
    }
    for text, function in ways.items():
        with pytest.raises(pickle.PicklingError, match=re.escape(text.format(name))):
            pickle.dumps(BilevelProblem(**{**given, name: function}))
    method = portable_cases.PROBLEM.f
    assert pickle.loads(pickle.dumps(BilevelProblem(**{**given, name: functools.partial(method, 1)})))


def test_a_problem_of_ones_own_class_is_pickled_with_its_data() -> None:
    problem = pickle.loads(pickle.dumps(portable_cases.Own(torch.ones(2, dtype=FLOAT))))
    assert type(problem) is portable_cases.Own and torch.equal(problem.data, torch.ones(2, dtype=FLOAT))
    for own in (copy.copy(problem), copy.deepcopy(problem)):
        assert float(own.f(torch.zeros(2, dtype=FLOAT), torch.zeros(2, dtype=FLOAT))) == 2.0
    problem.hook = lambda: 0
    with pytest.raises(pickle.PicklingError, match=r"`pickle of Own`: field `hook` is a lambda"):
        pickle.dumps(problem)


# Errors arrive


def test_an_error_arrives_with_its_text_status_and_partial_result() -> None:
    error = BilevelError("what happened", Status.diverged, {"x": torch.ones(2)})
    error.add_note("a note")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert str(again) == "what happened" and again.status is Status.diverged and again.__notes__ == ["a note"]
        assert torch.equal(again.partial["x"], torch.ones(2))
    assert copy.copy(error).partial is error.partial


def test_an_error_arrives_without_a_partial_result_that_cannot() -> None:
    error = BilevelError("what happened", Status.diverged, {"hook": lambda: 0})
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "what happened" and again.status is Status.diverged and again.partial is None
    assert "Its `partial`, a dict, stayed where it was raised" in again.__notes__[0]
    assert error.partial is not None and not hasattr(error, "__notes__")
    assert copy.deepcopy(error).partial["hook"]() == 0


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, portable_cases.OwnError])
def test_any_error_arrives_with_what_can_be_pickled_of_its_partial_result(kind: type[BaseException]) -> None:
    error: Any = kind(3)
    error = attach(error, {"x": torch.ones(2)})
    error.add_note("a note")
    again: Any = pickle.loads(pickle.dumps(error))
    assert again.args == (3,) and torch.equal(again.partial["x"], torch.ones(2)) and again.__notes__ == ["a note"]
    attach(error, lambda: 7)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and again.args == (3,) and vars(again)["partial"] is None
    assert again.__notes__[0] == "a note" and "Its `partial`, a function, stayed where" in again.__notes__[1]
    assert vars(error)["partial"]() == 7 and error.__notes__ == ["a note"]
    assert vars(copy.copy(error))["partial"]() == 7
    assert not hasattr(pickle.loads(pickle.dumps(kind(4))), "partial")


def test_an_instance_of_a_class_that_its_module_has_not_is_named() -> None:
    kind = namedtuple("kind", ["a"])
    other = type("Made", (), {"__module__": __name__})
    for value, name in ((kind(1), "kind"), (other(), "Made")):
        start = Start(torch.ones(1), value)
        with pytest.raises(pickle.PicklingError, match=rf"field `v` is an instance of the class `{name}`"):
            pickle.dumps(start)
    assert obstacle([portable_cases.Inner(1, 2), slice(1), iter([]), object(), types.SimpleNamespace(a=1)]) is None


def test_a_refusal_arrives_with_its_reason_once() -> None:
    again = pickle.loads(pickle.dumps(DoesNotApply("it is so")))
    assert (str(again), again.reason) == (str(DoesNotApply("it is so")), "it is so")


# Estimates


def test_an_estimate_travels_with_f_and_g_where_they_can() -> None:
    found = portable_cases.estimate("implicit")
    again = pickle.loads(pickle.dumps(found))
    assert 0 < found.error_estimate < 1e-6 and again.error_estimate == found.error_estimate
    assert same(again.start, found.start, {}) and again.start.count == 1 and type(again.y) is portable_cases.Inner


def test_an_estimate_travels_without_f_and_g_where_they_cannot_and_says_so() -> None:
    problem = BilevelProblem(lambda x, y: portable_cases.f(x, y), portable_cases.g)
    found = hypergradient(problem, portable_cases.x0, portable_cases.y0)
    again = pickle.loads(pickle.dumps(found))
    assert same(again.grad, found.grad, {}) and same(again.start, found.start, {})
    with pytest.raises(ValueError, match=r"error_estimate` is computed from f and g, .*: field `f` is a lambda"):
        _ = again.error_estimate
    assert copy.deepcopy(found).error_estimate == found.error_estimate
    assert pickle.loads(cloudpickle.dumps(found)).error_estimate == found.error_estimate
    data = torch.zeros(2, dtype=FLOAT)
    own = BilevelProblem(portable_cases.with_data, portable_cases.with_data)
    kept = hypergradient(own, data, data, data={"d": data, "why": lambda: 0})
    with pytest.raises(ValueError, match=r"field `data\['why'\]` is a lambda"):
        _ = pickle.loads(pickle.dumps(kept)).error_estimate


def test_leaves_are_pickled_without_the_vector_that_they_are_cut_from() -> None:
    x = {str(k): torch.ones(100, dtype=FLOAT) for k in range(20)}
    problem = BilevelProblem(portable_cases.of_many, portable_cases.of_many)
    found = dataclasses.replace(
        hypergradient(problem, x, x, estimator="aid-cg"), second_level=None, warm=functools.partial(Start, None)
    )
    leaves = 4 * 20 * 100 * 8  # of grad, y, v and x
    assert leaves < len(pickle.dumps(found)) < 2 * leaves
    copied = copy.copy(found)
    assert copied.grad is found.grad


# Plain data


Pair = namedtuple("Pair", ["first", "second"])
STRUCTURES: list[Any] = [
    torch.tensor(1.5),
    {"a": torch.ones(2), "b": [torch.zeros(()), (torch.ones(1), {"c": torch.ones(0)})]},
    (torch.ones(1),),
    Pair(torch.ones(1), [torch.zeros(2)]),
    portable_cases.Inner(torch.ones(1), {"$": torch.ones(1), "$tensor": torch.zeros(1)}),
    {1: torch.ones(1), ("a", 2): torch.zeros(1), None: torch.ones(2)},
    {"$tensor": torch.ones(1)},
    OrderedDict(b=torch.ones(1), a=torch.zeros(1)),
    defaultdict(list, a=torch.ones(1)),
    deque([torch.ones(1), torch.zeros(1)], maxlen=3),
    [],
    None,
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def of_dtype(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) else leaf, tree)


def an_estimate(x: Any, y: Any) -> Estimate:
    return Estimate(
        grad=x,
        value=math.nan,
        y=y,
        v=None,
        status=Status.max_steps,
        reports=(Report("inner solver", Status.max_steps, math.inf, 3, (Status.successful, Status.max_steps)),),
        stats=Stats(hvps=3),
        standard_error=0.1,
        bias=-math.inf,
        note="é ∇",
        penalized=(y, 3.0),
        x=x,
        warm=functools.partial(Start, y, None, 4),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tree", STRUCTURES, ids=lambda tree: type(tree).__name__)
def test_plain_data_and_files_are_the_estimate_bit_for_bit(tmp_path: Path, tree: Any, dtype: torch.dtype) -> None:
    found = an_estimate(of_dtype(tree, dtype), of_dtype([tree, tree], dtype))
    torch.save(found.to_dict(), tmp_path / "a.pt")
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    is_plain(read)
    is_plain(found.to_dict())
    pytest.importorskip("safetensors")
    found.save(tmp_path / "new" / "a.safetensors")
    for again in (
        Estimate.from_dict(found.to_dict()),
        Estimate.from_dict(read),
        Estimate.load(tmp_path / "new" / "a.safetensors"),
    ):
        for field in dataclasses.fields(Estimate):
            if field.name not in ("warm", "second_level"):
                assert same(getattr(again, field.name), getattr(found, field.name), {}), field.name
        assert same(again.start, found.start, {})
        with pytest.raises(ValueError, match="it was read from a file, or made of plain data"):
            _ = again.error_estimate


def is_plain(value: Any) -> None:
    assert type(value) in (dict, list, str, int, float, bool, type(None), Tensor), type(value)
    if isinstance(value, dict | list):
        assert all(type(key) is str for key in (value if isinstance(value, dict) else ()))
        for part in value.values() if isinstance(value, dict) else value:
            is_plain(part)


def test_a_solution_is_read_back_bit_for_bit_with_its_history(tmp_path: Path) -> None:
    found = portable_cases.run("implicit")
    torch.save(found.to_dict(), tmp_path / "a.pt")
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    is_plain(read)
    pytest.importorskip("safetensors")
    found.save(tmp_path / "a.safetensors")
    for again in (Solution.from_dict(read), Solution.load(tmp_path / "a.safetensors")):
        for field in dataclasses.fields(Solution):
            if field.name != "estimate":
                assert same(getattr(again, field.name), getattr(found, field.name), {}), field.name
        assert same(again.estimate.to_dict(), found.estimate.to_dict(), {}) and len(again.history) == 4
        # a warm start from the file goes on as one from memory
        ways = [
            hypergradient(portable_cases.PROBLEM, each.x, portable_cases.y0, start=each.estimate.start)
            for each in (again, found)
        ]
        assert bits(ways[0].grad) == bits(ways[1].grad)


def test_a_named_tuple_that_the_program_has_not_is_made_and_nothing_is_imported() -> None:
    content = {"$": "named tuple", "name": "antigravity:Point", "fields": ["x", "y"], "items": [1, 2]}
    made = restored(content)
    assert (made.x, made.y, type(made).__name__) == (1, 2, "Point") and "antigravity" not in sys.modules
    for name in ("os:environ", "subprocess:Popen", "portable_cases:f", "torch:Size"):
        assert type(restored({**content, "name": name})).__name__ == name.partition(":")[2]
    assert type(restored(plain(Pair(1, 2)))) is Pair


@pytest.mark.parametrize(
    "content",
    [
        {"$": "module", "items": []},
        {"$": "tuple"},
        {"$": "named tuple", "name": "a:B", "fields": ["x"], "items": []},
        {"$": "named tuple", "name": "a:B", "fields": ["not a name!"], "items": [1]},
        {"$": "dict", "keys": [1], "items": []},
        {"$": "dict", "keys": [{"a": 1}], "items": [1]},
        {"$": "deque", "items": [], "longest": -1},
        {1: 2, "a": object()},
        set(),
    ],
)
def test_data_that_are_not_plain_are_one_error(content: Any) -> None:
    with pytest.raises(ValueError, match=r"`Start.from_dict\(content\)` needs what `Start.to_dict\(\)` makes"):
        Start.from_dict({"y": content, "v": None, "count": 1})


def test_each_entry_of_plain_data_is_looked_at() -> None:
    whole = portable_cases.run("itd").to_dict()

    def broken(content: Any) -> Iterator[Any]:
        for key in content:
            yield {name: part for name, part in content.items() if name != key}
            others: tuple[Any, ...] = ("text", 1.5, [], {"a": 1})
            for wrong in others:
                if type(wrong) is not type(content[key]) and key not in ("x", "y", "v", "grad", "penalized"):
                    yield {**content, key: wrong}

    refused = 0
    for content in broken(whole):
        try:
            Solution.from_dict(content)
        except ValueError as error:
            assert "from_dict(content)` needs what" in str(error)  # noqa: PT017
            refused += 1
    assert refused >= 40


# Files


@pytest.fixture
def written(tmp_path: Path) -> Path:
    pytest.importorskip("safetensors")
    portable_cases.run("itd").save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), other=st.binary(min_size=1, max_size=8), short=st.sampled_from([0, 0, 0, 1, 1000]))
def test_a_damaged_file_is_one_error(written: Path, place: float, other: bytes, short: int) -> None:
    content = bytearray(written.read_bytes())
    at = round(place * (len(content) - 1))
    changed = content[:at] + other + content[at + len(other) :]
    changed = changed[: len(content) - short]
    path = written.with_name("damaged")
    path.write_bytes(changed)
    if changed == content:
        assert Solution.load(path).status.ok
        return
    with pytest.raises(ValueError, match=r"`Solution.load\(path\)`: '.*damaged' is damaged, or was not written by"):
        Solution.load(path)


def test_a_file_of_something_else_is_refused_and_one_that_is_not_there(written: Path) -> None:
    with pytest.raises(ValueError, match=r"`Estimate.load\(path\)`: .* \(it holds Solution \(format 1\)\)"):
        Estimate.load(written)
    with pytest.raises(FileNotFoundError, match=r"`Solution.load\(path\)`: there is no file"):
        Solution.load(written.with_name("nowhere"))
    from safetensors.torch import load_file, save_file

    assert torch.equal(load_file(written)["x.b"], Solution.load(written).x["b"])
    save_file({"x": torch.ones(1)}, written)
    with pytest.raises(ValueError, match=r"it holds something else"):
        Solution.load(written)


def test_without_safetensors_it_says_what_to_install_and_what_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    found = portable_cases.estimate("itd")
    for call in (lambda: found.save(tmp_path / "a"), lambda: Estimate.load(tmp_path / "a")):
        with pytest.raises(ImportError, match=r'pip install "bilevel\[safetensors\]".*torch.save\(result.to_dict\(\)'):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_of_an_estimate_that_was_written_to_still_says_so(pickled: bool) -> None:
    def copied(found: Any) -> Any:
        return pickle.loads(pickle.dumps(found)) if pickled else copy.deepcopy(found)

    found = portable_cases.estimate("aid-dense")
    assert torch.equal(copied(found).start.y.u, found.y.u)
    found.y.u.add_(1.0)
    with pytest.raises(ValueError, match=r"`Estimate.start` is made of `estimate.y`"):
        copied(found).start  # noqa: B018
