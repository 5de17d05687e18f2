"""Generalized linear models: their formulas are the derivatives of the plain function."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

from bilevel import AID, BilevelProblem, FiniteSum, Split, hypergradient, minimize
from bilevel._flat import FlatProblem
from bilevel._numerics.known_objective import AbstractKnownObjective
from bilevel._numerics.known_point import KnownObjective
from bilevel._tree import Tree, ravel
from bilevel.hypergrad.certified import Certified
from bilevel.inner_problems import Huber, LogLoss, Squared
from bilevel.problems.glm import GeneralizedLinearModel, Poisson, Softmax, declare
from bilevel.problems.hyper_cleaning import hyper_cleaning_batches, hyper_cleaning_synthetic
from bilevel.problems.logistic import logistic
from bilevel.problems.ridge import ridge
from bilevel.solvers import CG, LBFGS, Jacobi, NewtonPCG

D = torch.float64
LOSSES: dict[str, Any] = {
    "squared": Squared(),
    "logistic": LogLoss(),
    "huber": Huber(0.7),
    "poisson": Poisson(),
    "softmax": Softmax(),
}
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda z, b: (z - b).square() / 2,
    "logistic": lambda z, b: (1 + (-b * z).exp()).log(),
    "huber": lambda z, b: F.huber_loss(z, b, reduction="none", delta=0.7),
    "poisson": lambda z, b: F.poisson_nll_loss(z, b, reduction="none"),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def setting(
    name: str, n: int, d: int, outputs: int, weights: str, penalty: str, sparse: bool, seed: int
) -> tuple[GeneralizedLinearModel, Callable[..., Tensor], Tree, Tensor]:
    """A model, the same function written out, an outer point and an inner one."""
    X, shape = normal(n, d, seed=seed), (outputs, d) if name == "softmax" or outputs > 1 else (d,)
    X = X * (normal(n, d, seed=seed + 5) > 0) if sparse else X
    if name == "softmax":
        b = torch.randint(0, outputs, (n,), generator=torch.Generator().manual_seed(seed))
    else:
        b = normal(n, outputs, seed=seed + 1) if outputs > 1 else normal(n, seed=seed + 1)
        b = b.sign() if name == "logistic" else b.abs().round() if name == "poisson" else b
    x: dict[str, Tensor] = {"w": normal(n, seed=seed + 2), "scale": normal(1, seed=seed + 7)[0]}
    group = torch.arange(d) % 2
    sizes: dict[str, tuple[int, ...]] = {"one": (), "feature": (d,), "entry": shape, "group": (2,), "none": ()}
    x["p"] = normal(*sizes[penalty], seed=seed + 3) if sizes[penalty] else normal(1, seed=seed + 3)[0]
    w: Any = {
        "mean": None,
        "fixed": normal(n, seed=seed + 4).abs(),
        "of x": lambda x: x["w"].sigmoid(),
        "one of x": lambda x: x["scale"].exp(),
    }[weights]
    a: Any = None if penalty == "none" else (lambda x: x["p"].exp()[group] if penalty == "group" else x["p"].exp())
    model = GeneralizedLinearModel(csr(X) if sparse else X, b, LOSSES[name], w, a, lambda x: x["scale"].exp(), 0.3)

    def plain(x: Any, y: Tensor) -> Tensor:
        z = X @ y.mT if y.dim() == 2 else X @ y
        losses = F.cross_entropy(z, b, reduction="none") if name == "softmax" else PLAIN[name](z, b)
        losses = losses.sum(1) if losses.dim() == 2 else losses
        scale = 1 / n if w is None else w if isinstance(w, Tensor) else w(x)
        total: Tensor = (scale * losses).sum() + x["scale"].exp() * ((y.square() + 0.09).sqrt() - 0.3).sum()
        penalty: Tensor = total if a is None else total + (a(x) * y.square()).sum() / 2
        return penalty

    return model, plain, x, 0.3 * normal(*shape, seed=seed + 6)


def csr(X: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return X.to_sparse_csr()


def flat(g: Any, x: Tree, y: Tree) -> tuple[FlatProblem, Tensor, Tensor]:
    (x_flat, outer), (y_flat, inner) = ravel(x), ravel(y)
    return FlatProblem(BilevelProblem(lambda x, y: y.sum(), g), outer, inner), x_flat, y_flat


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> bool:
    return float((a - b).abs().max()) <= tol * (1 + float(b.abs().max()))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(LOSSES)),
    n=st.sampled_from([1, 7, 1500]),
    d=st.integers(1, 4),
    outputs=st.integers(1, 3),
    weights=st.sampled_from(["mean", "fixed", "of x", "one of x"]),
    penalty=st.sampled_from(["one", "feature", "entry", "group", "none"]),
    sparse=st.booleans(),
    seed=st.integers(0, 20),
)
def test_formulas_are_the_derivatives_of_the_plain_function(
    name: str, n: int, d: int, outputs: int, weights: str, penalty: str, sparse: bool, seed: int
) -> None:
    model, plain, x_tree, y_tree = setting(name, n, d, outputs, weights, penalty, sparse, seed)
    known, x, y = flat(model, x_tree, y_tree)
    other = flat(plain, x_tree, y_tree)[0]
    v = normal(y.numel(), seed=seed + 9)
    point = KnownObjective(model, known, x).at(y)
    for each in (known, other):  # the model is a function like any other, and so is differentiable by autograd
        x_leaf, y_leaf = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = each.g(x_leaf, y_leaf)
        (gradient,) = torch.autograd.grad(value, y_leaf, create_graph=True)
        hv, gv = torch.autograd.grad(
            gradient, (y_leaf, x_leaf), v, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows = [torch.autograd.grad(gradient, y_leaf, e, retain_graph=True)[0] for e in torch.eye(y.numel(), dtype=D)]
        assert close(point.value, value.detach()) and close(point.gradient, gradient.detach())
        found, cross = point.products(v)
        assert cross is not None
        assert close(found, hv) and close(cross, gv)
        assert close(point.mv(v), hv)
        again = point.cross(v)
        assert again is not None and close(again, gv)
        assert close(point.diagonal(), torch.stack(rows).diagonal())


def test_float32_comes_out_as_float32_and_pickles() -> None:
    model = GeneralizedLinearModel(normal(50, 3).float(), normal(50).float().sign(), LogLoss(), penalty=torch.exp)
    problem = BilevelProblem(squares, pickle.loads(pickle.dumps(model)))
    x = torch.zeros(3, dtype=torch.float32)
    found = hypergradient(problem, x, x, estimator=AID(NewtonPCG(1e-5), CG(1e-5)))
    assert found.grad.dtype == torch.float32 and found.status.ok


def squares(x: Any, y: Tensor, *data: Any) -> Tensor:
    return (y - 1).square().sum()


EXACT = ("implicit", "aid-cg", "aid-dense", "aid-minres", "aid-gmres", "aid-neumann", "aid-nystrom", "network")
OTHERS = ("itd", "itd-forward", "itd-checkpointed", "itd-truncated", "one-step", "esj", "penalty", "finite-difference")


@pytest.mark.parametrize("name", EXACT + OTHERS)
def test_estimators_cannot_tell_who_differentiates(name: str) -> None:
    model, _, _, y = setting("softmax", 40, 3, 2, "mean", "feature", False, 1)
    model = GeneralizedLinearModel(model.features, model.targets, model.loss, penalty=torch.exp)
    x = torch.full((3,), -1.0, dtype=D)
    one, other = (BilevelProblem(squares, g) for g in (model, lambda x, y: model(x, y)))
    found, wanted = (hypergradient(each, x, y, estimator=name, throw=False) for each in (one, other))
    assert found.status is wanted.status
    assert close(found.grad, wanted.grad, 1e-6)


def test_oracle_calls_are_those_without_structure() -> None:
    model, plain, x, y = setting("logistic", 60, 4, 1, "of x", "feature", False, 2)
    aid = AID(LBFGS(1e-8), CG(1e-8))
    found, wanted = (hypergradient(BilevelProblem(squares, g), x, y, estimator=aid) for g in (model, plain))
    assert found.stats == wanted.stats
    assert close(ravel(found.grad)[0], ravel(wanted.grad)[0], 1e-9)


def by_task(task: Any) -> Tensor:
    found: Tensor = task["X"]
    return found


def targets(task: Any) -> Tensor:
    found: Tensor = task["b"]
    return found


@pytest.mark.parametrize("tasks", [True, "loop"])
@pytest.mark.parametrize("shared", [True, False])
def test_tasks_have_the_formulas_too(tasks: Any, shared: bool) -> None:
    X, labels = normal(5, 20, 3), torch.randint(0, 3, (5, 20), generator=torch.Generator().manual_seed(1))
    features = X[0] if shared else by_task
    model = GeneralizedLinearModel(
        features, targets, Softmax(), lambda x, task: x["w"].sigmoid() / 20, lambda x, task: x["p"].exp()
    )
    data = {"X": X, "b": labels}
    x = {"w": normal(20, seed=3), "p": normal(3, seed=4)}
    aid = AID(NewtonPCG(1e-11), CG(1e-11, preconditioner=Jacobi()))
    found, wanted = (
        hypergradient(BilevelProblem(squares, g, tasks=tasks), x, torch.zeros(3, 3, dtype=D), estimator=each, data=data)
        for g, each in ((model, aid), (lambda x, y, task: model(x, y, task), AID(LBFGS(1e-11), CG(1e-11))))
    )
    assert found.status.ok
    assert close(ravel(found.grad)[0], ravel(wanted.grad)[0], 1e-9)


def test_sparse_features_serve_several_tasks() -> None:
    X = normal(30, 4) * (normal(30, 4, seed=1) > 0)
    model = GeneralizedLinearModel(csr(X), targets, LogLoss(), penalty=lambda x, task: x.exp())
    data = {"b": normal(3, 30, seed=2).sign()}
    x, y0 = torch.zeros(4, dtype=D), torch.zeros(4, dtype=D)
    for name in ("aid-cg", "esj"):
        found, wanted = (
            hypergradient(BilevelProblem(squares, g, tasks=True), x, y0, estimator=name, data=data, throw=False)
            for g in (model, GeneralizedLinearModel(X, targets, LogLoss(), penalty=lambda x, task: x.exp()))
        )
        assert close(found.grad, wanted.grad, 1e-8)


def test_an_inner_solution_is_expanded_once_a_step() -> None:
    model, _, x, y = setting("logistic", 200, 5, 1, "mean", "feature", False, 3)
    found = hypergradient(BilevelProblem(squares, model), x, y, estimator=AID(NewtonPCG(1e-9), CG(1e-9)))
    assert found.stats.gradients == found.stats.inner_steps + 1
    assert found.stats.values == 0


def test_jacobi_takes_the_known_diagonal_for_no_product() -> None:
    model, _, x_tree, y_tree = setting("poisson", 30, 4, 1, "mean", "feature", False, 4)
    problem, x, y = flat(model, x_tree, y_tree)
    from bilevel._calculus import Exact

    at = Exact().linearize(problem, x, y)
    inverse = Jacobi().build(at.operator, y)(torch.ones_like(y))
    assert problem.tally.hvps == 0
    assert close(inverse.reciprocal(), at.operator.dense(y).diagonal())
    shifted = at.operator.shifted(0.5).known_diagonal
    assert shifted is not None and close(shifted - 0.5, inverse.reciprocal())


def test_certificates_hold_with_the_formulas() -> None:
    instance = logistic(n=60, d=4, per_feature=True)
    assert instance.constants is not None
    certified = Certified(AID(NewtonPCG(), CG()), target_error=1e-6, constants=instance.constants)
    found = hypergradient(instance.problem, instance.x0, instance.y0, estimator=certified)
    exact = hypergradient(instance.problem, instance.x0, instance.y0, estimator=AID(NewtonPCG(1e-12), CG(1e-12)))
    assert found.bound is not None
    assert float((found.grad - exact.grad).norm()) <= found.bound <= 1e-6


SHIPPED: dict[str, Callable[[], Any]] = {
    "logistic": lambda: logistic(n=40, d=3),
    "logistic, one penalty": lambda: logistic(n=40, d=3, per_feature=False),
    "softmax": lambda: logistic(n=40, d=3, classes=3),
    "smoothed l1": lambda: logistic(n=40, d=3, classes=3, smoothed_l1=True),
    "ridge": lambda: ridge(),
    "ridge, one penalty": lambda: ridge(per_feature=False),
    "cleaning": lambda: hyper_cleaning_synthetic(n_train=30, n_val=10, d=4, classes=3, double=True),
    "cleaning, two classes": lambda: hyper_cleaning_synthetic(n_train=30, n_val=10, d=4, classes=2, double=True),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_problems_declare_what_they_are(name: str) -> None:
    instance = SHIPPED[name]()
    g = instance.problem.g_as_given
    assert isinstance(g, AbstractKnownObjective)
    declare(instance.problem.g, g, instance.x0, instance.y0)


@pytest.mark.parametrize("classes", [2, 3])
def test_batches_have_the_formulas_too(classes: int) -> None:
    data = (normal(90, 3), torch.arange(90) % classes)
    instance, samples = hyper_cleaning_batches(n_train=60, n_val=20, data=data)
    split = Split(f=FiniteSum(samples.f, 10), g=FiniteSum(samples.g, 20))
    plain = BilevelProblem(instance.problem.f, lambda x, y, batch: instance.problem.g(x, y, batch))
    ends = [
        minimize(each, instance.x0, instance.y0, algorithm=algorithm, data=split, max_steps=3).x
        for algorithm in ("saba", "stocbio")
        for each in (instance.problem, plain)
    ]
    assert close(ends[0], ends[1], 1e-10) and close(ends[2], ends[3], 1e-10)
    assert float((ends[0] - instance.x0).abs().max()) > 0


def test_a_declaration_that_is_the_function_is_taken() -> None:
    X, b = normal(20, 3), normal(20, seed=1)
    good: dict[str, Any] = {"loss": Squared(), "penalty": torch.exp}
    declare(mine(X, b), GeneralizedLinearModel(X, b, **good), torch.zeros(3, dtype=D), torch.zeros(3, dtype=D))


def mine(X: Tensor, b: Tensor) -> Callable[..., Tensor]:
    return lambda x, y: (X @ y - b).square().mean() / 2 + (x.exp() * y.square()).sum() / 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"weights": torch.ones(20, dtype=D)}, "values"),
        ({"penalty": lambda x: 2 * x.exp()}, "values"),
        ({"loss": Huber(0.5)}, "values"),
        ({"penalty": lambda x: x.exp().detach()}, "cross products"),
    ],
)
def test_a_declaration_of_another_function_is_refused(change: dict[str, Any], what: str) -> None:
    X, b = normal(20, 3), normal(20, seed=1)
    given: dict[str, Any] = {"penalty": torch.exp} | change
    model = GeneralizedLinearModel(X, b, **given)
    with pytest.raises(ValueError, match=f"two forms of one function. Got {what} that differ"):
        declare(mine(X, b), model, torch.zeros(3, dtype=D), torch.zeros(3, dtype=D))


def test_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a target for each row. Got 20 rows and 19 targets"):
        GeneralizedLinearModel(normal(20, 3), normal(19))


def test_a_model_with_a_kink_is_looked_at() -> None:
    """Huber's curvature jumps at an edge; of the smooth losses nobody asks."""
    assert not GeneralizedLinearModel(normal(3, 1), normal(3), Huber(1.0)).is_smooth
    assert all(GeneralizedLinearModel(normal(3, 1), normal(3), LOSSES[k]).is_smooth for k in ("squared", "softmax"))
