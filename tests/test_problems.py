"""Every formula that a problem states about itself is checked against its own f and g."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import bilevel
from bilevel import problems
from bilevel._instance import Instance
from bilevel._result import Status
from bilevel._tree import Structure, ravel, tree_leaves
from bilevel.certificates.certificate import Constants
from bilevel.problems import catalogue
from bilevel.problems._data import load
from bilevel.problems._fit import fit
from bilevel.problems.hyper_cleaning import auc, corrupt
from bilevel.problems.quadratic import random_quadratic
from bilevel.solvers import Adam

SOLVED: dict[str, Callable[[], Instance]] = {
    "quadratic": lambda: problems.quadratic(),
    "quadratic-cross": lambda: problems.quadratic(p=3, q=5, cross=2.0, kappa=100.0),
    "nested": lambda: problems.nested(cross=0.3),
    "minimax": lambda: problems.minimax(),
    "asinh": lambda: problems.asinh(),
    "lambert": lambda: problems.lambert(),
    "cardano": lambda: problems.cardano(),
    "atanh": lambda: problems.atanh(),
    "log-sum-exp": lambda: problems.log_sum_exp(),
    "log-sum-exp-of-two": lambda: problems.log_sum_exp(q=2),
    "weighted-logit": lambda: problems.weighted_logit(),
    "proximal-tasks": lambda: problems.proximal_tasks(),
    "proximal-tasks-scalar": lambda: problems.proximal_tasks(per_weight=False),
    "ridge": lambda: problems.ridge(),
    "ridge-scalar": lambda: problems.ridge(per_feature=False),
    "ridge-underdetermined": lambda: problems.ridge(n=3, q=6),
    "ridge-orthonormal": lambda: problems.ridge_orthonormal(),
    "ridge-diabetes": lambda: problems.ridge_diabetes(),
    "ridge-per-feature-diabetes": lambda: problems.ridge_per_feature_diabetes(),
}
BOUNDED: dict[str, Callable[[], Instance]] = SOLVED | {
    "logistic": lambda: problems.logistic(n=40, d=4),
    "logistic-scalar": lambda: problems.logistic(n=40, d=4, per_feature=False),
    "logistic-one-sample": lambda: problems.logistic(n=4, d=1, seed=3),
    "logistic-multinomial": lambda: problems.logistic(n=40, d=3, classes=3),
    "logistic-smoothed-l1": lambda: problems.logistic(n=40, d=3, smoothed_l1=True),
    "hyper-cleaning": lambda: problems.hyper_cleaning_synthetic(n_train=12, n_val=6, d=3, classes=3, double=True),
    "hyper-cleaning-binary": lambda: problems.hyper_cleaning_synthetic(
        n_train=12, n_val=6, d=3, classes=2, double=True
    ),
}
# Which constants are attained (to a factor of less than 2), so that a wrong formula cannot hide behind slack.
SHARP = {
    "quadratic": "mu L L_fyy C_G",
    "quadratic-cross": "mu L L_fyy L_fxy C_G",
    "nested": "mu L L_fyy L_fxy C_G",
    "minimax": "mu L L_fyy L_fxy C_G L_f_minus",
    "asinh": "mu L L_fyy M_yy C_G",
    "lambert": "mu L L_fyy M_yy C_G",
    "cardano": "mu L L_fyy M_yy C_G",
    "atanh": "mu L L_fyy M_yy C_G",
    "log-sum-exp": "L L_fyy C_G",
    "log-sum-exp-of-two": "L L_fyy M_yy C_G",
    "weighted-logit": "mu L L_fyy M_yy M_xy C_G",
    "proximal-tasks": "mu L L_fyy M_xy C_G",
    "proximal-tasks-scalar": "mu L L_fyy M_xy C_G",
    **dict.fromkeys(("ridge", "ridge-scalar", "ridge-underdetermined", "ridge-orthonormal"), "mu L L_fyy M_xy C_G"),
    **dict.fromkeys(("ridge-diabetes", "ridge-per-feature-diabetes"), "mu L L_fyy M_xy C_G"),
    "logistic": "L L_fyy M_xy",
    "logistic-scalar": "L L_fyy M_xy",
    "logistic-one-sample": "mu L_fyy M_yy M_xy",
    "logistic-multinomial": "mu L L_fyy M_xy",
    "logistic-smoothed-l1": "L L_fyy",
    "hyper-cleaning": "mu L L_fyy C_G",
    "hyper-cleaning-binary": "mu L L_fyy M_xy C_G",
}


@dataclass(frozen=True)
class Vectors:
    """An instance in vectors."""

    instance: Instance
    x_structure: Structure
    y_structure: Structure

    @staticmethod
    def of(instance: Instance) -> Vectors:
        return Vectors(instance, ravel(instance.x0)[1], ravel(instance.y0)[1])

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return self.instance.problem.f(self.x_structure.unravel(x), self.y_structure.unravel(y))

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return self.instance.problem.g(self.x_structure.unravel(x), self.y_structure.unravel(y))

    def phi(self, x: Tensor) -> float:
        return self.instance.value(self.x_structure.unravel(x))

    def gradient(self, x: Tensor) -> Tensor:
        assert self.instance.gradient is not None
        return ravel(self.instance.gradient(self.x_structure.unravel(x)))[0]

    def solution(self, x: Tensor) -> Tensor:
        if self.instance.solution is None:  # a strongly convex problem without a formula
            return fit(lambda y: self.g(x, y), ravel(self.instance.y0)[0], tol=1e-9)
        return ravel(self.instance.solution(self.x_structure.unravel(x)))[0]

    def constants(self, x: Tensor) -> Constants:
        assert self.instance.constants is not None
        return self.instance.constants(self.x_structure.unravel(x))

    def points(self, count: int, scale: float = 0.2) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        x0 = ravel(self.instance.x0)[0]
        # log-sum-exp is defined near the simplex only, atanh for |x| < 1
        return [x0 + scale * torch.rand(len(x0), generator=generator) * x0.abs().clamp(0.05, 1) for _ in range(count)]


def derivatives(v: Vectors, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients and second derivatives of f and g at (x, y), by reverse mode twice."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    (gy,) = torch.autograd.grad(v.g(x, y), y, create_graph=True)
    fx, fy = torch.autograd.grad(v.f(x, y), (x, y), create_graph=True, allow_unused=True)
    H, G = torch.autograd.grad(gy, (y, x), torch.eye(len(y)), is_grads_batched=True)
    return {"H": H, "G": G, "fy": fy.detach(), "fx": torch.zeros_like(x) if fx is None else fx.detach()}


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2) if matrix.dim() == 2 else matrix.norm())


def steep_directions(v: Vectors, x: Tensor, y: Tensor) -> Tensor:
    """Where grad_y f and grad_x f change most with y, and where f is most concave in y."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    (fy,) = torch.autograd.grad(v.f(x, y), y, create_graph=True)
    rows = [torch.autograd.grad(fy, (y, x), u, retain_graph=True, materialize_grads=True) for u in torch.eye(len(y))]
    f_yy, f_yx = (torch.stack(block) for block in zip(*rows, strict=True))
    singular = torch.linalg.svd(f_yx.T)[2][:1]
    eigenvectors = torch.linalg.eigh(f_yy)[1].T
    return torch.cat([singular, eigenvectors[:1], eigenvectors[-1:]])


def worst_ratios(v: Vectors, x: Tensor) -> dict[str, float]:
    """How much of each constant is used up, at most, over pairs of points where it is claimed to hold."""
    constants, center = v.constants(x), v.solution(x)
    assert constants.mu is not None
    radius = min(constants.radius, 3.0)
    generator = torch.Generator().manual_seed(3)
    random = torch.nn.functional.normalize(torch.randn(3, len(center), generator=generator), dim=1)
    axes = torch.eye(len(center))[torch.randperm(len(center), generator=generator)[:6]]
    units = torch.cat([steep_directions(v, x, center), random, axes])
    ends = [center + sign * radius * u for u in units for sign in (1, -1)]
    pairs = [(center, end) for end in ends] + [(center, center + 1e-3 * u) for u in units]
    pairs += [(center + 0.99 * (end - center), end) for end in ends]
    if constants.radius == math.inf:  # far from y* as well
        pairs += [(0 * u, 1e-3 * u) for u in units] + [(-5 * u, 5 * u) for u in units]
    used: dict[str, float] = dict.fromkeys(("mu", "L", "L_fyy", "L_fxy", "M_yy", "M_xy", "C_G", "L_f_minus"), 0.0)

    def use(name: str, amount: float) -> None:
        bound = getattr(constants, name)
        assert bound is not None
        if amount > 1e-9 * (1 + bound):  # else rounding
            used[name] = max(used[name], amount / bound if bound > 0 else math.inf)

    for a, b in pairs:
        da, db, distance = derivatives(v, x, a), derivatives(v, x, b), float((a - b).norm())
        eigenvalues = torch.linalg.eigvalsh((db["H"] + db["H"].T) / 2)
        used["mu"] = max(used["mu"], constants.mu / float(eigenvalues[0]) if eigenvalues[0] > 0 else math.inf)
        use("L", float(eigenvalues[-1]))
        use("C_G", norm(db["G"]))
        for name, part in (("L_fyy", "fy"), ("L_fxy", "fx"), ("M_yy", "H"), ("M_xy", "G")):
            use(name, norm(da[part] - db[part]) / distance)
        use("L_f_minus", float(-(db["fy"] - da["fy"]) @ (b - a)) / distance**2)
    return used


@pytest.mark.parametrize("name", SOLVED)
def test_closed_form_solution_is_stationary(name: str) -> None:
    v = Vectors.of(SOLVED[name]())
    for x in v.points(3):
        y = v.solution(x).requires_grad_()
        (gy,) = torch.autograd.grad(v.g(x, y), y)
        assert float(gy.norm()) <= 1e-9


@pytest.mark.parametrize("name", SOLVED)
def test_closed_form_hypergradient_is_the_derivative_of_the_value(name: str) -> None:
    v = Vectors.of(SOLVED[name]())
    for x in v.points(2):
        h, t = v.gradient(x), 1e-3
        differences = torch.tensor(
            [
                (8 * (v.phi(x + t * u) - v.phi(x - t * u)) - v.phi(x + 2 * t * u) + v.phi(x - 2 * t * u)) / (12 * t)
                for u in torch.eye(len(x))
            ]
        )
        torch.testing.assert_close(h, differences, rtol=1e-7, atol=1e-7 * float(h.norm()))


@pytest.mark.parametrize("name", [name for name, build in SOLVED.items() if build().minimizer is not None])
def test_minimizer_is_stationary_and_lowest_nearby(name: str) -> None:
    v = Vectors.of(SOLVED[name]())
    x = ravel(v.instance.minimizer)[0]
    assert float(v.gradient(x).norm()) <= 1e-10
    for u in torch.eye(len(x)):
        assert min(v.phi(x + 0.01 * u), v.phi(x - 0.01 * u)) > v.phi(x)


@pytest.mark.parametrize("name", BOUNDED)
def test_constants_hold_and_are_attained_where_they_are_sharp(name: str) -> None:
    v = Vectors.of(BOUNDED[name]())
    used = [worst_ratios(v, x) for x in v.points(1)]
    worst = {constant: max(u[constant] for u in used) for constant in used[0]}
    assert {k: r for k, r in worst.items() if r > 1} == {}
    assert {k: r for k, r in worst.items() if r <= 0.5 and k in SHARP[name].split()} == {}


def test_spectrum_is_the_prescribed_one() -> None:
    family = random_quadratic(2, 4, eigenvalues=[0.5, 1.0, 3.0, 8.0], cross=0.7)
    torch.testing.assert_close(torch.linalg.eigvalsh(family.A), torch.tensor([0.5, 1.0, 3.0, 8.0]))
    assert float(torch.linalg.matrix_norm(family.E, 2)) == pytest.approx(0.7)
    assert not bool((family.A - torch.diag(torch.diag(family.A))).abs().max() < 0.1)  # dense


def test_outer_hessian_is_the_jacobian_of_the_hypergradient() -> None:
    family = random_quadratic(3, 4, eigenvalues=[0.5, 1.0, 3.0, 8.0], cross=0.7)
    x = torch.ones(3)
    columns = [family.gradient(x + u) - family.gradient(x) for u in torch.eye(3)]  # linear: exact
    torch.testing.assert_close(family.outer_hessian(), torch.stack(columns, 1), rtol=1e-11, atol=1e-12)
    jacobian = [family.solution(x + u) - family.solution(x) for u in torch.eye(3)]
    torch.testing.assert_close(family.jacobian(), torch.stack(jacobian, 1), rtol=1e-11, atol=1e-12)


def test_implicit_term_of_a_saddle_point_vanishes() -> None:
    instance = problems.minimax()
    assert instance.solution is not None
    assert instance.gradient is not None
    x = torch.ones_like(instance.x0).requires_grad_()
    (direct,) = torch.autograd.grad(instance.problem.f(x, instance.solution(x).detach()), x)
    torch.testing.assert_close(direct, instance.gradient(x.detach()))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: problems.quadratic(kappa=0.5), r"kappa=...\)` must be at least 1"),
        (lambda: random_quadratic(2, 3, eigenvalues=[1.0, -1.0, 2.0]), r"eigenvalues=...\)` must be positive"),
        (lambda: problems.QuadraticFamily(*(torch.eye(2) for _ in range(8))), "must be of shape"),
        (lambda: problems.hyper_cleaning(corrupted=1.5), r"corrupted=...\)` must be positive and below 1"),
        (lambda: problems.logistic(classes=1), r"classes=...\)` must be at least 2"),
        (lambda: problems.ridge_orthonormal(q=9, n=3), "1 <= q <= n"),
    ],
)
def test_arguments_out_of_range_are_refused(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


# --- inner problems that break an assumption


def test_singular_inner_hessian_is_reported_unless_the_system_is_consistent() -> None:
    x, y0 = torch.tensor(3.0), torch.zeros(2)
    broken = bilevel.hypergradient(problems.rank_deficient().problem, x, y0, estimator="aid-cg", throw=False)
    assert not broken.status.ok
    whole = problems.rank_deficient(consistent=True)
    assert whole.gradient is not None
    found = bilevel.hypergradient(whole.problem, x, y0, estimator="aid-cg", throw=False)
    assert found.status.ok
    torch.testing.assert_close(found.grad, whole.gradient(x), rtol=1e-8, atol=0)


def test_stationary_point_between_two_wells_is_reported_and_a_well_is_followed() -> None:
    instance = problems.double_well()
    top = bilevel.hypergradient(instance.problem, instance.x0, instance.y0, estimator="aid-cg", throw=False)
    assert top.status is Status.negative_curvature
    inside = problems.double_well(start=-1.2, tilt=0.1)
    found = bilevel.hypergradient(inside.problem, inside.x0, inside.y0, estimator="aid-cg")
    y = found.y
    assert float(y) < 0
    torch.testing.assert_close(found.grad, (y - 1) / (3 * y.square() - 1), rtol=1e-8, atol=0)


# --- real data


@pytest.mark.parametrize(
    "build",
    [
        lambda: problems.logistic_breast_cancer(),
        lambda: problems.logistic_breast_cancer(smoothed_l1=True),
        lambda: problems.logistic(n=60, d=4, classes=3),
    ],
)
def test_hypergradient_of_logistic_regression_is_the_derivative_of_the_value(build: Callable[[], Instance]) -> None:
    instance = build()
    v = Vectors.of(instance)
    x = ravel(instance.x0)[0]
    found = ravel(bilevel.hypergradient(instance.problem, instance.x0, instance.y0, estimator="aid-cg").grad)[0]
    u, t = torch.ones(len(x)) / len(x) ** 0.5, 1e-2
    difference = (8 * (v.phi(x + t * u) - v.phi(x - t * u)) - v.phi(x + 2 * t * u) + v.phi(x - 2 * t * u)) / (12 * t)
    assert float(found @ u) == pytest.approx(difference, rel=1e-6)


def test_metrics_of_ridge_are_the_losses_of_the_stated_weights() -> None:
    instance = problems.ridge_diabetes()
    assert instance.metrics is not None
    assert instance.solution is not None
    parts = load(None, "diabetes", sizes=(0.5, 0.25), seed=0, regression=True)
    found = instance.metrics(instance.x0, instance.solution(instance.x0))
    assert found["validation_loss"] == pytest.approx(instance.value(instance.x0))
    free = torch.linalg.pinv(parts.X_train) @ parts.y_train
    loss = float((parts.X_test @ free - parts.y_test).square().mean() / 2)
    assert found["test_loss_unregularized"] == pytest.approx(loss)
    assert (
        found["validation_loss_grid_search"]
        <= min(found["validation_loss"], found["validation_loss_unregularized"]) + 1e-4
    )


def test_metrics_of_logistic_regression_include_a_grid_search_that_is_no_worse_on_validation() -> None:
    instance = problems.logistic_breast_cancer()
    assert instance.metrics is not None
    assert instance.solution is not None
    found = instance.metrics(instance.x0, instance.solution(instance.x0))
    assert found["test_accuracy"] > 0.9
    assert found["validation_loss_grid_search"] <= found["validation_loss_almost_unregularized"]
    assert found["validation_loss"] == pytest.approx(instance.value(instance.x0))


def _samples(n: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = 5 + 3 * torch.randn(n, 3, generator=generator)
    X[:, 2] = 7.0  # constant
    return X, torch.arange(n) % 3 + 4


def test_split_is_a_reproducible_partition() -> None:
    X, y = _samples()
    data = load((X, y), "", sizes=(10, 0.25), seed=1, bias=False)
    again = load((X, y), "", sizes=(10, 5), seed=1, bias=False)
    other = load((X, y), "", sizes=(10, 5), seed=2, bias=False)
    assert [len(part) for part in (data.X_train, data.X_val, data.X_test)] == [10, 5, 5]
    assert torch.equal(data.X_test, again.X_test)
    assert not torch.equal(data.raw_train, other.raw_train)
    shift, scale = data.raw_train.mean(0), data.raw_train.std(0, correction=0).clamp_min(1e-300)
    whole = torch.cat([data.X_train, data.X_val, data.X_test])[:, 0] * scale[0] + shift[0]
    torch.testing.assert_close(whole.sort().values, X[:, 0].sort().values)
    assert torch.equal(torch.cat([data.y_train, data.y_val, data.y_test]).bincount(), (y - 4).bincount())


def test_scaling_uses_the_training_part_only() -> None:
    X, y = _samples()
    parts = {
        "X_train": X[:10],
        "y_train": y[:10],
        "X_val": X[10:15],
        "y_val": y[10:15],
        "X_test": X[15:],
        "y_test": y[15:],
    }
    data = load(parts, "", sizes=(10, 5), seed=0, bias=False)
    moved = load({**parts, "X_test": 100 * X[15:], "X_val": X[10:15] + 9}, "", sizes=(10, 5), seed=0, bias=False)
    assert torch.equal(data.X_train, moved.X_train)
    torch.testing.assert_close(data.X_train.mean(0), torch.zeros(3), atol=1e-12, rtol=0)
    torch.testing.assert_close(data.X_train[:, :2].std(0, correction=0), torch.ones(2))
    assert torch.equal(data.X_train[:, 2], torch.zeros(10))  # a constant feature is not divided by zero
    scale = X[:10, 0].std(correction=0)
    torch.testing.assert_close(moved.X_val[:, 0] - data.X_val[:, 0], (9 / scale).expand(5))


def test_common_scale_keeps_the_ratios_of_features() -> None:
    X, y = _samples()
    data = load((X * torch.tensor([1.0, 4.0, 1.0]), y), "", sizes=(10, 5), seed=0, bias=False, per_feature=False)
    raw, scaled = data.raw_train.std(0), data.X_train.std(0)
    assert float(scaled[1] / scaled[0]) == pytest.approx(float(raw[1] / raw[0]))


def test_arrays_tensors_and_npz_files_give_the_same_data(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    X, y = _samples()
    numpy.savez(tmp_path / "mine.npz", X=X.numpy(), y=y.numpy(), note=numpy.array(1))
    ways: list[Any] = [(X, y), {"X": X.numpy(), "y": y.numpy()}, tmp_path / "mine.npz", str(tmp_path / "mine.npz")]
    first, *others = [load(way, "", sizes=(0.5, 0.25), seed=0) for way in ways]
    for other in others:
        assert torch.equal(first.X_val, other.X_val)
        assert torch.equal(first.y_test, other.y_test)
    instance = problems.hyper_cleaning(data=str(tmp_path / "mine.npz"), n_train=10, n_val=5)
    assert instance.x0.shape == (10,)
    assert instance.y0.shape == (3, 4)


def test_given_parts_are_kept_and_missing_ones_are_split_off() -> None:
    X, y = _samples()
    data = load(
        {"X_train": X[:15], "y_train": y[:15], "X_test": X[15:], "y_test": y[15:]},
        "",
        sizes=(0.6, 0.4),
        seed=0,
        bias=False,
    )
    assert [len(part) for part in (data.X_train, data.X_val, data.X_test)] == [9, 6, 5]
    assert torch.equal(data.y_test, y[15:] - 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"features": torch.ones(4, 2)}, "needs the keys X and y"),
        ((torch.full((9, 2), math.nan), torch.arange(9) % 2), "NaN or infinite"),
        ((torch.ones(9, 2), torch.ones(9)), "at least 2 classes"),
        ((torch.ones(9, 2), torch.arange(8) % 2), "as many inputs as targets"),
        (
            (torch.ones(4, 2), torch.arange(4) % 2),
            "into the 4 samples of `data=`: 5 for train and 2 for val were asked",
        ),
        ((torch.ones(7, 2), torch.arange(7) % 2), "which leaves none for test"),
        (
            (torch.ones(9, 2), torch.arange(9) / 2),
            "labels that are integers. Got [0-9].5 among those of the train part",
        ),
        (
            {
                "X_train": torch.ones(9, 2),
                "y_train": torch.arange(9),
                "X_val": torch.ones(3, 1),
                "y_val": torch.ones(3),
            },
            "the same features in every part. Got 2 in the training part and 1 in the val part",
        ),
        ("nowhere.npz", "existing .npz file"),
    ],
)
def test_data_that_do_not_fit_are_refused(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(data, "", sizes=(5, 2), seed=0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([torch.ones(9, 2), torch.arange(9)], "must be a pair \\(X, y\\), a mapping .* Got a list of 2"),
        ((torch.ones(9, 2), torch.arange(9), torch.arange(9)), "Got a tuple of 3"),
        (torch.ones(9, 2), "Got Tensor"),
        (3, "Got int"),
        ((torch.ones(4, 2), ["a", "b", "a", "b"]), "an array of numbers in y. Got list .*Number the classes"),
        (([[1.0, 2.0], [3.0]], [0, 1]), "an array of numbers in X. Got list"),
        ((torch.ones(4, 2, dtype=torch.complex128), torch.arange(4)), "real numbers in X.* Got complex numbers"),
        ((torch.ones(4, 2), 3), "in y, one row a sample. Got a single number"),
    ],
)
def test_data_of_another_kind_are_refused(data: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        load(data, "", sizes=(5, 2), seed=0)


def test_labels_of_texts_are_refused_and_labels_that_are_whole_numbers_are_taken() -> None:
    numpy = pytest.importorskip("numpy")
    X, y = _samples()
    with pytest.raises(
        TypeError, match=r"in y. Got ndarray of <U1 .*`numpy.unique\(labels, return_inverse=True\)\[1\]`"
    ):
        load((X, numpy.array(["a", "b"] * 10)), "", sizes=(5, 2), seed=0)
    whole, floats = (load((X, labels), "", sizes=(10, 5), seed=0) for labels in (y, y.double()))
    assert torch.equal(whole.y_train, floats.y_train)
    assert load((X, y + 0.5), "", sizes=(10, 5), seed=0, regression=True).classes == 0


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "bilevel\[sklearn\]"'):
        problems.ridge_diabetes()


def test_unreached_tolerance_of_a_baseline_is_an_error() -> None:
    A = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="did not converge"):
        fit(lambda y: (A @ y - 1 / 3).square().sum().cosh(), torch.ones(5, dtype=torch.float32), tol=1e-30)


# --- hyper-cleaning


@given(n=st.integers(4, 60), share=st.floats(0.05, 0.95), classes=st.integers(2, 6), seed=st.integers(0, 99))
def test_corruption_replaces_exactly_the_asked_share_by_other_classes(
    n: int, share: float, classes: int, seed: int
) -> None:
    labels = torch.arange(n) % classes
    noisy, wrong = corrupt(labels, share, classes, torch.Generator().manual_seed(seed))
    assert int(wrong.sum()) == round(share * n)
    assert torch.equal(noisy != labels, wrong)
    assert 0 <= int(noisy.min()) <= int(noisy.max()) < classes


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=12))
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    positive, negative = [s for s, p in rows if p], [s for s, p in rows if not p]
    if not positive or not negative:
        return
    wins = sum((a > b) + 0.5 * (a == b) for a in positive for b in negative)
    score, label = torch.tensor([float(s) for s, _ in rows]), torch.tensor([p for _, p in rows])
    assert auc(score, label) == pytest.approx(wins / len(positive) / len(negative))


def test_learned_weights_find_wrong_labels_and_close_most_of_the_gap_to_the_oracle() -> None:
    instance = problems.hyper_cleaning(n_train=400, n_val=300, max_steps=15)
    assert instance.metrics is not None
    assert instance.plot is not None
    sol = bilevel.minimize(
        instance.problem,
        instance.x0,
        instance.y0,
        estimator=instance.settings["estimator"],
        outer=Adam(0.3),
        max_steps=instance.settings["max_steps"],
    )
    before, found = instance.metrics(instance.x0, instance.y0), instance.metrics(sol.x, sol.y)
    assert before["auc"] == pytest.approx(0.5)
    assert found["auc"] > 0.9
    assert found["precision_at_true_count"] > 0.8
    everything, oracle = found["test_accuracy_everything"], found["test_accuracy_oracle"]
    assert everything + 0.05 < found["test_accuracy_learned"]
    assert found["test_accuracy_learned"] > everything + 0.6 * (oracle - everything)

    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(9, 6))
    instance.plot(figure, sol.x, sol.y)
    histogram, bars, *pictures = figure.axes
    assert sum(patch.get_height() for patch in histogram.patches) == 400
    assert [bar.get_width() for bar in bars.patches] == [everything, found["test_accuracy_learned"], oracle]
    assert len(pictures) == 10


def test_perfect_weights_rank_perfectly_and_train_like_the_oracle() -> None:
    instance = problems.hyper_cleaning(n_train=200, n_val=100)
    assert instance.metrics is not None
    flipped = _wrong_labels(200)
    x = torch.where(flipped, -40.0, 40.0)
    y = fit(lambda y: instance.problem.g(x, y.reshape(10, 65)), torch.zeros(650), tol=1e-8).reshape(10, 65)
    found = instance.metrics(x, y)
    assert found["auc"] == 1.0
    assert found["precision_at_true_count"] == 1.0
    assert found["test_accuracy_learned"] == found["test_accuracy_oracle"]


def _wrong_labels(n: int) -> Tensor:
    """Which labels the default seed corrupts."""
    data = load(None, "digits", sizes=(n, 100), seed=0, per_feature=False)
    return corrupt(data.y_train, 0.4, 10, torch.Generator().manual_seed(1))[1]


def test_network_has_no_constants_and_the_stated_shapes() -> None:
    instance = problems.hyper_cleaning_synthetic(n_train=12, n_val=6, d=4, classes=3, hidden=5)
    assert instance.constants is None
    assert {name: tuple(leaf.shape) for name, leaf in instance.y0.items()} == {
        "hidden": (5, 5),
        "weight": (3, 5),
        "bias": (3,),
    }
    shifted = {**instance.y0, "bias": instance.y0["bias"] + 2.0}
    no_data = torch.full_like(instance.x0, -80.0)  # all weights vanish: only the regularizer is left
    difference = instance.problem.g(no_data, shifted) - instance.problem.g(no_data, instance.y0)
    assert float(difference) == pytest.approx(5e-3 * 3 * 4.0, rel=1e-5)


@pytest.mark.parametrize("hidden", [0, 3])
def test_hyper_cleaning_as_sums_is_hyper_cleaning(hidden: int) -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    options: dict[str, Any] = {"n_train": 14, "n_val": 9, "hidden": hidden, "data": arrays, "seed": 2}
    whole = problems.hyper_cleaning(**options)
    instance, samples = problems.hyper_cleaning_batches(**options)
    assert len(samples.f[0]) == 9
    assert len(samples.g[0]) == 14
    x = torch.randn(14, generator=generator, dtype=torch.float64)
    y, structure = ravel(instance.y0)
    tree = structure.unravel(y + 0.3)
    for name, level in (("f", samples.f), ("g", samples.g)):
        of_sum, of_all = getattr(instance.problem, name), getattr(whole.problem, name)
        torch.testing.assert_close(of_sum(x, tree, level), of_all(x, tree), rtol=1e-13, atol=1e-15)
        size = len(level[0])
        batches = [tuple(part[k : k + 4] for part in level) for k in range(0, size, 4)]
        mean = sum(len(batch[0]) / size * of_sum(x, tree, batch) for batch in batches)
        torch.testing.assert_close(mean, of_all(x, tree), rtol=1e-13, atol=1e-15)
    assert instance.metrics is not None
    assert whole.metrics is not None
    assert instance.metrics(x, tree) == whole.metrics(x, tree)


# --- all of them

SMALL: dict[str, dict[str, Any]] = {
    "hyper-cleaning": {"n_train": 40, "n_val": 20, "hidden": 3},
    "hyper-cleaning-synthetic": {"n_train": 20, "n_val": 10, "d": 5, "classes": 3, "double": True},
    "multinomial-digits": {"per_feature": True},
    "small-network": {"n_train": 20, "n_val": 10, "width": 2, "double": True},
    "logistic-breast-cancer": {"smoothed_l1": True},
}
# Recipes for networks take batches, those of proximal algorithms solvers of their own; both have tests of their own.
RECIPES = (".networks.", ".proximal.")
PLAIN = [name for name, entry in catalogue().items() if not any(each in entry.build.__module__ for each in RECIPES)]


@pytest.mark.parametrize("name", PLAIN)
def test_objectives_of_a_batch_are_those_of_its_rows(name: str) -> None:
    v = Vectors.of(catalogue()[name].build(**SMALL.get(name, {})))
    generator = torch.Generator().manual_seed(1)
    x, y = (
        ravel(start)[0] + 0.1 * torch.randn(3, structure.size, generator=generator)
        for start, structure in ((v.instance.x0, v.x_structure), (v.instance.y0, v.y_structure))
    )
    for function in (v.f, v.g) if v.instance.problem.fixed_point is None else (v.f,):
        rows = torch.stack([function(a, b) for a, b in zip(x, y, strict=True)])
        assert rows.shape == (3,)
        torch.testing.assert_close(torch.vmap(function)(x, y), rows, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", PLAIN)
def test_settings_are_plain_and_known(name: str) -> None:
    instance = catalogue()[name].build(**SMALL.get(name, {}))
    assert "max_steps" in instance.settings
    assert set(instance.settings) <= {"estimator", "outer_step", "max_steps", "constraint", "data"}
    assert instance.settings.get("estimator", "implicit") in bilevel.estimators()
    assert instance.description
    assert catalogue()[name].name == name


@pytest.mark.parametrize(
    "build",
    [
        lambda: problems.quadratic(double=False),
        lambda: problems.ridge(double=False),
        lambda: problems.logistic(double=False, smoothed_l1=True),
        lambda: problems.hyper_cleaning_synthetic(n_train=20, n_val=10, d=5, hidden=2),
    ],
)
def test_single_precision_is_kept_throughout(build: Callable[[], Instance]) -> None:
    instance = build()
    f, g = (function(instance.x0, instance.y0) for function in (instance.problem.f, instance.problem.g))
    leaves = [*tree_leaves(instance.x0), *tree_leaves(instance.y0), f, g]
    leaves += [] if instance.solution is None else tree_leaves(instance.solution(instance.x0))
    leaves += [] if instance.gradient is None else tree_leaves(instance.gradient(instance.x0))
    assert {leaf.dtype for leaf in leaves} == {torch.float32}


def test_same_seed_gives_the_same_problem_and_another_seed_another() -> None:
    def phi(seed: int) -> float:
        return float(
            problems.hyper_cleaning(n_train=50, n_val=30, seed=seed).problem.f(None, torch.ones(10, 65).cumsum(0))
        )

    assert phi(0) == phi(0)
    assert phi(0) != phi(1)


def test_importing_the_problems_imports_torch_only() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import bilevel.problems;"
        " print([m for m in ('sklearn', 'scipy', 'matplotlib', 'numpy') if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
