"""What is wrong with arguments is said in words: which function or argument, what arrived, what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.masked import masked_tensor

import bilevel
from bilevel import (
    AID,
    ITD,
    BilevelProblem,
    Split,
    check,
    compare,
    estimate_constants,
    hypergradient,
    hyperobjective,
    minimize,
)
from bilevel.few_shot import adapt, train
from bilevel.inner_problems import Iteration
from bilevel.problems.meta_learning import maml
from bilevel.solvers import CG, ClosedForm, OwnSteps

X, Y = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
A = torch.arange(15.0, dtype=torch.float64).reshape(5, 3) / 10
b = torch.ones(5, dtype=torch.float64)
ENTRIES: dict[str, Callable[..., Any]] = {
    "hypergradient": hypergradient,
    "minimize": lambda *args, **options: minimize(*args, max_steps=1, **options),
    "hyperobjective": lambda problem, x, y, data=None: hyperobjective(problem, y)(x, data),
    "check": check,
    "compare": compare,
    "estimate_constants": estimate_constants,
}


def f(x: Any, y: Any, *data: Any) -> Tensor:
    value: Tensor = ((y - 3) * (data[0] if data else 1)).square().sum() / 2
    return value


def g(x: Any, y: Any, *data: Any) -> Tensor:
    value: Tensor = ((y - x) * (data[0] if data else 1)).square().sum() / 2
    return value


WITH_DATA = BilevelProblem(lambda x, y, d: f(x, y, d), lambda x, y, d: g(x, y, d))
PLAIN = BilevelProblem(lambda x, y: f(x, y), lambda x, y: g(x, y))
RIDGE = BilevelProblem(
    lambda x, y: (A @ y - b).square().mean(), lambda x, y: (A @ y - b).square().mean() + x.exp() * y.square().sum()
)


# Data


def loader() -> Any:
    samples: Any = torch.ones(4, 2, dtype=torch.float64)
    return torch.utils.data.DataLoader(samples, batch_size=2)


@pytest.mark.parametrize("entry", [name for name in ENTRIES])
@pytest.mark.parametrize("make", [loader, lambda: iter([X])], ids=["loaders", "iterators"])
def test_loaders_in_a_tuple_are_told_to_be_a_split(entry: str, make: Callable[[], Any]) -> None:
    for data in ((make(), make()), {"f": make(), "g": make()}, [make(), make()]):
        if entry == "minimize" and isinstance(data, list):
            continue  # a list is a loader, whose entries are batches
        with pytest.raises(TypeError, match=r"of 2 loaders .*`minimize\(data=Split\(f=loader, g=loader\)\)`"):
            ENTRIES[entry](WITH_DATA, X, Y, data=data)


def test_two_lists_of_batches_in_a_tuple_hint_at_a_split_where_f_or_g_fail_on_them() -> None:
    with pytest.raises(
        TypeError, match=r"data: \(\[float64 \(2,\)\], \[float64 \(2,\)\]\).*`Split\(f=\.\.\., g=\.\.\.\)`"
    ):
        minimize(WITH_DATA, X, Y, data=([X], [X]), max_steps=1)
    with pytest.raises(TypeError, match=r"`Split\(f=\.\.\., g=\.\.\.\)`"):
        minimize(WITH_DATA, X, Y, data=(lambda k: X, lambda k: X), max_steps=1)


def test_a_tuple_of_two_lists_that_f_and_g_take_is_a_batch() -> None:
    problem = BilevelProblem(lambda x, y, d: f(x, y, d[0][0]), lambda x, y, d: g(x, y, d[1][0]))
    assert torch.equal(hypergradient(problem, X, Y, data=([X], [X])).grad, X - 3)
    assert torch.equal(minimize(problem, X, Y, data=([X], [X]), max_steps=0).x, X)
    assert minimize(WITH_DATA, X, Y, data=Split(f=loader(), g=loader()), max_steps=1).status.ok


def test_adaptation_and_training_to_tasks_refuse_loaders_by_name() -> None:
    learner = maml(nn.Linear(1, 1), nn.functional.mse_loss)
    with pytest.raises(TypeError, match=r"must be one batch: .*of 2 loaders"):
        adapt(learner, learner.x0, (loader(), loader()))
    with pytest.raises(TypeError, match=r"must be one batch here: .*`next\(iter\(loader\)\)`"):
        adapt(learner, learner.x0, loader())
    pair: Any = (loader(), loader())
    with pytest.raises(TypeError, match=r"`train\(tasks=...\)` must be a source of tasks.*Got tuple"):
        train(learner, pair, max_steps=1)


# Shapes, dtypes and other errors inside of the user's functions


@pytest.mark.parametrize("entry", ["hypergradient", "minimize", "hyperobjective", "compare", "estimate_constants"])
def test_a_y0_of_another_shape_is_told_with_the_function_and_all_shapes(entry: str) -> None:
    text = r"`problem.g\(x, y\)` met shapes .*mismatch.* Got x: float64 \(\), y: float64 \(4,\). y has the shapes of y0"
    with pytest.raises(ValueError, match=text) as caught:
        ENTRIES[entry](RIDGE, torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    assert type(caught.value.__cause__) is RuntimeError


@pytest.mark.parametrize("name", [name for name in bilevel.estimators() if name != "first-order"])
def test_every_named_estimator_tells_it_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"`problem.[fg]\(x, y\)` met shapes"):
        hypergradient(RIDGE, torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64), estimator=name)


def test_check_gives_the_same_as_a_verdict() -> None:
    found = str(check(RIDGE, torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)))
    found = " ".join(found.split())  # it has 80 columns
    assert "`problem.f(x, y)` met shapes that do not fit" in found


@pytest.mark.parametrize(
    "operation",
    [
        lambda y: A @ y,
        lambda y: y @ A,
        lambda y: nn.functional.linear(y, A),
        lambda y: torch.dot(y, b),
        lambda y: nn.functional.mse_loss(y.unsqueeze(0) @ A[:2].T, b[:3]),
        lambda y: torch.einsum("ij,j->i", A, y),
        lambda y: torch.cat([y.unsqueeze(0), A]),
        lambda y: y.reshape(3, 3),
        lambda y: y + b,
        lambda y: y.expand(5),
        lambda y: torch.stack([y, b]),
        lambda y: torch.linalg.solve(torch.eye(3, dtype=torch.float64), y),
    ],
)
def test_what_torch_cannot_put_together_is_a_misfit_of_shapes_whatever_the_operation(operation: Any) -> None:
    problem = BilevelProblem(f, lambda x, y: operation(y).square().sum() + g(x, y))
    with pytest.raises(ValueError, match=r"`problem.g\(x, y\)` met shapes"):
        hypergradient(problem, X, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("entry", ["hypergradient", "minimize", "hyperobjective", "estimate_constants"])
def test_data_of_another_dtype_are_told_with_all_dtypes(entry: str) -> None:
    problem = BilevelProblem(
        lambda x, y, d: (d @ y).square().mean(),
        lambda x, y, d: (d @ y - 1).square().mean() + x.exp() * y.square().sum(),
    )
    text = r"`problem.g\(x, y, data\)` met several dtypes: .*x: float32 \(\), y: float32 \(3,\), data: float64 \(5, 3\)"
    with pytest.raises(ValueError, match=text):
        ENTRIES[entry](problem, torch.zeros((), dtype=torch.float32), torch.zeros(3, dtype=torch.float32), data=A)


@pytest.mark.parametrize("layer", [nn.Linear(2, 1).float(), nn.Bilinear(2, 2, 1).float(), nn.GRU(2, 1).float()])
def test_a_module_of_another_dtype_is_told(layer: nn.Module) -> None:
    problem = BilevelProblem(
        f, lambda x, y: layer(*([y.unsqueeze(0)] * (2 if isinstance(layer, nn.Bilinear) else 1)))[0].sum()
    )
    with pytest.raises(ValueError, match="met several dtypes"):
        hypergradient(problem, X, Y)


def test_arithmetic_between_dtypes_that_torch_promotes_is_left_alone() -> None:
    problem = BilevelProblem(f, lambda x, y: (y - x - A[0, :2]).square().sum() / 2)
    assert torch.allclose(hypergradient(problem, X.float(), Y.float()).grad, (X + A[0, :2] - 3).float())


class OwnError(RuntimeError):
    """A user's."""


@pytest.mark.parametrize(
    "error",
    [OwnError("size"), RuntimeError("shapes and dtypes"), ValueError("dtype"), KeyError("size"), ZeroDivisionError()],
)
def test_an_error_of_the_users_making_keeps_its_type_and_says_with_what_it_was_met(error: Exception) -> None:
    def raises(x: Any, y: Any) -> Tensor:
        raise error

    with pytest.raises(type(error)) as caught:
        hypergradient(BilevelProblem(f, raises), X, {"a": Y, "b": [Y]})
    assert caught.value is error
    (note,) = error.__notes__
    assert note == "`problem.g(x, y)` was called with x: float64 (2,), y: {'a': float64 (2,), 'b': [float64 (2,)]}."


def _bad(*_: Any) -> Any:
    return torch.ones(2) @ torch.ones(3)


@pytest.mark.parametrize(
    ("problem", "call"),
    [
        (BilevelProblem(f, g, init=_bad), r"init\(x\)"),
        (BilevelProblem(f, g, encode=_bad), r"encode\(x\)"),
        (BilevelProblem(f, g, constraints=_bad), r"constraints\(x\)"),
        (BilevelProblem(f, g, prox=_bad), r"prox\(x\)"),
        (BilevelProblem(f, inner=Iteration(lambda x, y, k: _bad())), r"step\(x, y, k\)"),
    ],
)
def test_every_function_of_a_problem_is_named(problem: BilevelProblem, call: str) -> None:
    estimator: Any = ITD(OwnSteps()) if problem.inner is not None else "implicit"
    with pytest.raises(ValueError, match=rf"`problem.{call}` met shapes.*x: float64 \(2,\)"):
        hypergradient(problem, X, Y, estimator=estimator)


def test_a_closed_form_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match=r"`problem.solution\(x\)` met shapes"):
        hypergradient(PLAIN, X, Y, estimator=AID(ClosedForm(_bad), CG()))


# Leaves


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (X.to(torch.complex128), "torch.complex128 at x. Pass `torch.view_as_real"),
        (X.long(), r"torch.int64 at x. Convert it with `.double\(\)` if it is to be optimized"),
        (X.bool(), "torch.bool at x. .*numbers between 0 and 1"),
        (X.to(torch.float8_e4m3fn), "torch.float8_e4m3fn at x. Torch has no arithmetic in it"),
        (X.numpy(), "ndarray at x. Write `torch.as_tensor"),
        (1.5, r"float at x. Write `torch.tensor\(1.5, dtype=torch.float64\)`"),
        ([X, None], r"NoneType at x\[1\]. Leave it out"),
        (nn.Linear(1, 1), r"Linear at x. Write `net = bilevel.functional\(module\)`, pass `net.params`"),
        (nn.Linear(1, 1).parameters(), r"generator at x. .*`dict\(module.named_parameters\(\)\)`"),
        (nn.ParameterDict({"a": nn.Parameter(X)}), r"ParameterDict at x. Write `dict\(parameters\)`"),
        (nn.ParameterList([nn.Parameter(X)]), r"ParameterList at x. Write `list\(parameters\)`"),
        (torch.optim.SGD([nn.Parameter(X)]), "SGD at x. Pass the tensors"),
        (X.to_sparse(), r"sparse_coo at x. Write `.to_dense\(\)`"),
        (torch.nested.nested_tensor([X, X], layout=torch.jagged), r"a nested one at x. .*`list\(tensor.unbind\(\)\)`"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors", "ignore:.*nested")
def test_what_is_no_real_dense_tensor_is_told_what_to_be(leaf: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        hypergradient(PLAIN, leaf, Y)
    with pytest.raises(TypeError, match=text.replace(" at x", " at y0", 1)):
        hypergradient(PLAIN, X, leaf)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_a_subclass_with_operations_of_its_own_is_refused_and_one_without_passes() -> None:
    with pytest.raises(TypeError, match="MaskedTensor at x, a subclass with operations of its own"):
        hypergradient(PLAIN, masked_tensor(X, X.bool()), Y)
    marked = type("Marked", (Tensor,), {})
    assert torch.equal(hypergradient(PLAIN, X.as_subclass(marked), Y).grad.as_subclass(Tensor), X - 3)


@pytest.mark.parametrize("entry", ENTRIES)
def test_variables_without_entries_are_refused(entry: str) -> None:
    none = torch.zeros(0, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"`{entry}\(x0?=...\)` must have at least one entry. Got \(0,\). Without x"):
        ENTRIES[entry](PLAIN, none, Y)
    with pytest.raises(ValueError, match=rf"`{entry}\(y0?=...\)` must have at least one entry. Got \(0,\). Without y"):
        ENTRIES[entry](PLAIN, X, none)
    with pytest.raises(ValueError, match=rf"`{entry}\(x0?, y0?\)` must hold numbers. .*'meta'"):
        ENTRIES[entry](PLAIN, X.to("meta"), Y.to("meta"))
    with pytest.raises(ValueError, match=rf"`{entry}\(x0?, y0?\)` need one dtype"):
        ENTRIES[entry](PLAIN, X.float(), Y)


def test_an_empty_leaf_among_others_is_no_matter() -> None:
    problem = BilevelProblem(lambda x, y: f(x, y["a"]), lambda x, y: g(x, y["a"]) + y["none"].sum())
    found = hypergradient(problem, X, {"a": Y, "none": torch.zeros(0, dtype=torch.float64)})
    assert torch.equal(found.grad, X - 3)


# Half precision


HALF = [torch.bfloat16, torch.float16]


def curved(dtype: torch.dtype, **more: Any) -> BilevelProblem:
    curvature = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    return BilevelProblem(
        lambda x, y: (y - 1).square().sum() / 2, lambda x, y: curvature @ y.square() / 2 - x * y.sum(), **more
    )


@pytest.mark.parametrize("name", ["aid-cg", "aid-dense", "aid-gmres", "aid-minres", "aid-nystrom", "kkt"])
@pytest.mark.parametrize("dtype", HALF)
def test_estimators_that_factor_matrices_do_so_for_half_precision(name: str, dtype: torch.dtype) -> None:
    inverse = torch.tensor([1.0, 1 / 2, 1 / 3])
    h = float((inverse * 0.75 - 1) @ inverse)  # of y* = x / curvature
    found = hypergradient(
        curved(dtype), torch.tensor(0.75, dtype=dtype), torch.zeros(3, dtype=dtype), estimator=name, throw=False
    )
    assert found.grad.dtype == dtype
    assert abs(float(found.grad) - h) < (0.1 if name == "aid-nystrom" else 8 * torch.finfo(dtype).eps)  # it is damped


@pytest.mark.parametrize("dtype", HALF)
def test_bounds_on_y_hold_in_half_precision(dtype: torch.dtype) -> None:
    problem = curved(dtype, constraints=lambda x: bilevel.Polytope(lower=0.0, upper=0.25))
    found = hypergradient(problem, torch.tensor(0.6, dtype=dtype), torch.zeros(3, dtype=dtype), throw=False)
    assert float(found.grad) == pytest.approx((0.2 - 1) / 3, rel=8 * torch.finfo(dtype).eps)  # two bounds hold


@pytest.mark.parametrize("dtype", HALF)
def test_check_looks_at_the_spectrum_in_half_precision(dtype: torch.dtype) -> None:
    assert "condition number 3" in str(
        check(curved(dtype), torch.tensor(0.75, dtype=dtype), torch.zeros(3, dtype=dtype))
    )


# Transforms of torch


FORWARD_MODE = "ignore:`torch.jit.script` is deprecated"  # which torch itself calls, where it first needs forward mode


def products() -> BilevelProblem:
    return BilevelProblem(lambda x, y, d: (y - d).square().sum() / 2, lambda x, y, d: (y - x * d).square().sum() / 2)


@pytest.mark.filterwarnings(FORWARD_MODE)
def test_torch_func_differentiates_a_hyperobjective() -> None:
    x, d = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    h = (x * d - d) * d

    def phi() -> Any:
        return hyperobjective(products(), Y)

    for derivative in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(derivative(phi())(x, d), h)
    forward: Any = torch.func.jvp(lambda x: phi()(x, d), (x,), (X,))
    assert torch.allclose(forward[0], (x * d - d).square().sum() / 2)
    assert torch.allclose(forward[1], h.sum())
    assert torch.allclose(torch.func.grad(lambda z: phi()(z.sin() * 2, d))(x), 2 * x.cos() * (2 * x.sin() * d - d) * d)
    named = BilevelProblem(f, lambda x, y: g(x["a"] * x["b"], y))
    found = torch.func.grad(hyperobjective(named, Y))({"a": X, "b": 2 * X})
    assert torch.allclose(found["a"], -2 * X)
    assert torch.allclose(found["b"], -X)


def test_vmap_goes_over_x_and_data_of_a_hyperobjective_one_after_the_other() -> None:
    xs, ds = torch.arange(6.0, dtype=torch.float64).reshape(3, 2), torch.ones(3, 2, dtype=torch.float64) * 2
    h = (xs * ds - ds) * ds
    phi = hyperobjective(products(), Y)
    assert torch.allclose(torch.func.vmap(torch.func.grad(phi))(xs, ds), h)
    assert torch.allclose(torch.func.vmap(phi, in_dims=(1, None))(xs.T, ds[0]), (xs * 2 - 2).square().sum(1) / 2)
    weight = nn.Parameter(X)  # of a module that f and g close over: no transform is about it
    closed = BilevelProblem(lambda x, y: f(x, y * weight), lambda x, y: g(x, y * weight))
    assert torch.allclose(torch.func.vmap(torch.func.grad(hyperobjective(closed, Y)))(xs), xs - 3)


@pytest.mark.filterwarnings(FORWARD_MODE)
def test_what_a_hyperobjective_is_not_differentiable_in_is_refused_and_never_zero() -> None:
    def over(d: Tensor) -> Any:
        return hyperobjective(BilevelProblem(lambda x, y: f(x, y, d), lambda x, y: g(x, y, d)), Y)(X)

    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(ValueError, match="hold a tensor that the transform is about"):
            transform(over)(X)
        with pytest.raises(NotImplementedError, match="differentiable in x only, and its data require a gradient"):
            transform(lambda d: hyperobjective(WITH_DATA, Y)(X, d))(X)
    with pytest.raises(ValueError, match="hold a tensor that the transform is about"):
        torch.func.vmap(over)(torch.stack([X, X]))
    with pytest.raises(NotImplementedError, match="its data require a gradient"):
        torch.autograd.grad(
            hyperobjective(WITH_DATA, Y)(x := X.clone().requires_grad_(), X.clone().requires_grad_()), x
        )
    with pytest.raises(NotImplementedError, match="has a first derivative only"):
        torch.func.hessian(hyperobjective(PLAIN, Y))(X)


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name != "hyperobjective"])
def test_entry_points_refuse_to_run_inside_of_a_transform_and_in_inference_mode(entry: str) -> None:
    def inside(x: Tensor) -> Tensor:
        ENTRIES[entry](PLAIN, x, Y)
        return x.sum()

    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(ValueError, match=rf"`{entry}` differentiates f and g itself.*`hyperobjective"):
            transform(inside)(X)
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=rf"`{entry}` differentiates f and g, which `torch.infer"),
    ):
        inside(X)
    with torch.no_grad():
        inside(X)


def test_a_hyperobjective_is_refused_in_inference_mode_and_has_no_graph_without_gradients() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="`hyperobjective` differentiates"):
        hyperobjective(PLAIN, Y)(X)
    with torch.no_grad():
        assert not hyperobjective(PLAIN, Y)(X.clone().requires_grad_()).requires_grad


# Words


def test_no_docstring_calls_the_hypergradient_by_the_name_of_the_hessian() -> None:
    root = Path(bilevel.__file__).parent.parent
    files = [path for folder in ("bilevel", "solvers", "problems", "docs") for path in (root / folder).rglob("*.*")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md")}
    wrong = r"\bH(?:\([^)]*\))? (?:~|=) (?:grad Phi|cut h|P h)|\"\"\"H (?:is the same|for|of|from|about)\b"
    assert (hypergradient.__doc__ or "").startswith("h ~ grad Phi(x)")
    assert [path for path, text in texts.items() if re.search(wrong, text)] == []
