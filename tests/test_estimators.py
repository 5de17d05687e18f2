"""Every estimator of the table on every analytic problem: one battery for all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import AFFINE, ESTIMATORS, PROBLEMS, TABLE, Row, bits, distance, point, single, size

from bilevel import BilevelError, BilevelProblem, Start, Status, hypergradient, ravel
from bilevel._tree import tree_leaves, tree_map

TOL, TOL_SINGLE = 1e-11, 1e-4
UNROLLED = {"itd", "itd-forward", "itd-checkpointed"}
every_estimator = pytest.mark.parametrize("row", ESTIMATORS, ids=str)


def built(row: Row, x: Any, tol: float = TOL) -> Any:
    return row.build(tol, size(x))


@pytest.mark.parametrize(("row", "name"), TABLE, ids=[f"{row}-{name}" for row, name in TABLE])
def test_closed_form_is_met(row: Row, name: str) -> None:
    instance = PROBLEMS[name]()
    x = point(instance)
    assert instance.gradient is not None
    assert instance.solution is not None
    found = hypergradient(instance.problem, x, instance.y0, estimator=built(row, x))
    rtol = row.rtol if name in AFFINE or row.rtol_curved is None else row.rtol_curved
    assert distance(found.grad, instance.gradient(x)) <= rtol
    assert found.value == pytest.approx(instance.value(x), rel=1e-8)
    assert distance(found.y, instance.solution(x)) <= 1e-8
    assert found.status is Status.successful
    assert found.message == ""


@every_estimator
@pytest.mark.parametrize("name", ["quadratic", "nested", "asinh", "proximal_tasks"])
def test_float32_is_close_to_the_closed_form_and_stays_float32(row: Row, name: str) -> None:
    instance = PROBLEMS[name]()
    problem, x, y0 = single(instance)
    found = hypergradient(problem, x, y0, estimator=built(row, x, TOL_SINGLE))
    for tree, like in ((found.grad, x), (found.y, y0), (found.start.y, y0)):
        assert all(leaf.dtype == torch.float32 and leaf.device == torch.device("cpu") for leaf in tree_leaves(tree))
        assert ravel(tree)[1].spec == ravel(like)[1].spec
    assert instance.gradient is not None
    assert distance(found.grad, instance.gradient(tree_map(torch.Tensor.double, x))) <= row.rtol_single


@every_estimator
def test_gradient_has_the_structure_of_x(row: Row) -> None:
    instance = PROBLEMS["nested"]()
    x = point(instance)
    found = hypergradient(instance.problem, x, instance.y0, estimator=built(row, x))
    for tree, like in ((found.grad, x), (found.y, instance.y0), (found.start.y, instance.y0)):
        assert ravel(tree)[1].spec == ravel(like)[1].spec
        assert [leaf.shape for leaf in tree_leaves(tree)] == [leaf.shape for leaf in tree_leaves(like)]
        assert not any(leaf.requires_grad for leaf in tree_leaves(tree))


@every_estimator
def test_inputs_stay_untouched(row: Row) -> None:
    instance = PROBLEMS["nested"]()
    x, y0 = point(instance), point(instance, seed=2)
    y0 = tree_map(lambda leaf: leaf.clone() + 0.1, instance.y0)
    for leaf in tree_leaves((x, y0)):
        leaf.requires_grad_()
        leaf.grad = torch.full_like(leaf, 7.0)
    before = bits((x, y0))
    versions = [leaf._version for leaf in tree_leaves((x, y0))]
    found = hypergradient(instance.problem, x, y0, estimator=built(row, x))
    again = hypergradient(instance.problem, x, y0, estimator=built(row, x), start=found.start, throw=False)
    assert bits((x, y0)) == before
    assert versions == [leaf._version for leaf in tree_leaves((x, y0))]
    assert all(bool((leaf.grad == 7).all()) and leaf.requires_grad for leaf in tree_leaves((x, y0)))
    assert not any(leaf.requires_grad for leaf in tree_leaves((again.grad, again.y)))


@every_estimator
def test_warm_start_stays_untouched_and_is_no_alias_of_the_solution(row: Row) -> None:
    instance = PROBLEMS["nested"]()
    x = point(instance)
    found = hypergradient(instance.problem, x, instance.y0, estimator=built(row, x))
    before = bits((found.start.y, found.start.v))
    near = point(instance, 5)
    hypergradient(instance.problem, near, instance.y0, estimator=built(row, x), start=found.start, throw=False)
    assert bits((found.start.y, found.start.v)) == before
    for leaf in tree_leaves(found.y):
        leaf.fill_(math.nan)
    assert bits((found.start.y, found.start.v)) == before


@every_estimator
def test_same_arguments_give_the_same_bits(row: Row) -> None:
    instance = PROBLEMS["asinh"]()
    x = point(instance)
    first, second = (hypergradient(instance.problem, x, instance.y0, estimator=built(row, x)) for _ in range(2))
    assert bits((first.grad, first.y)) == bits((second.grad, second.y))
    assert (first.value, first.stats) == (second.value, second.stats)


@every_estimator
def test_global_random_state_is_neither_read_nor_advanced(row: Row) -> None:
    instance = PROBLEMS["quadratic"]()
    x = point(instance)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(bits(hypergradient(instance.problem, x, instance.y0, estimator=built(row, x)).grad))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]


@every_estimator
def test_grad_mode_of_the_caller_does_not_matter(row: Row) -> None:
    instance = PROBLEMS["nested"]()
    x = point(instance)
    outside = hypergradient(instance.problem, x, instance.y0, estimator=built(row, x))
    with torch.no_grad():
        inside = hypergradient(instance.problem, x, instance.y0, estimator=built(row, x))
    assert bits((inside.grad, inside.y)) == bits((outside.grad, outside.y))
    assert inside.stats == outside.stats


@every_estimator
@pytest.mark.parametrize("name", ["quadratic-coupled", "lambert"])
def test_warm_start_never_changes_the_answer_beyond_the_tolerance(row: Row, name: str) -> None:
    instance = PROBLEMS[name]()
    x, near = point(instance), point(instance, spread=0.12)
    estimator = built(row, x)
    start = hypergradient(instance.problem, near, instance.y0, estimator=estimator).start
    assert start.count == 1
    cold = hypergradient(instance.problem, x, instance.y0, estimator=estimator)
    warm = hypergradient(instance.problem, x, instance.y0, estimator=estimator, start=start, throw=False)
    rtol = row.rtol if name in AFFINE or row.rtol_curved is None else row.rtol_curved
    # ITD's derivative is that of its steps: it may take too few, but not without saying so
    if row.name not in UNROLLED:
        assert distance(warm.grad, cold.grad) <= 2 * rtol
    assert warm.status.ok or (row.name in UNROLLED and warm.status is Status.truncated)
    assert distance(warm.y, cold.y) <= 1e-8
    assert warm.start.count == 2


@every_estimator
def test_warm_start_at_the_solution_costs_less(row: Row) -> None:
    instance = PROBLEMS["quadratic"]()
    x = point(instance)
    cold = hypergradient(instance.problem, x, instance.y0, estimator=built(row, x))
    warm = hypergradient(instance.problem, x, instance.y0, estimator=built(row, x), start=cold.start, throw=False)
    assert warm.status is (Status.truncated if row.name in UNROLLED else Status.successful)
    assert warm.stats.inner_steps < cold.stats.inner_steps
    assert warm.stats.linear_steps <= cold.stats.linear_steps // 2 or row.name == "aid-dense"


@every_estimator
def test_warm_start_of_another_structure_is_refused(row: Row) -> None:
    instance = PROBLEMS["nested"]()
    x = point(instance)
    with pytest.raises(ValueError, match=r"start\.y must have the structure"):
        hypergradient(instance.problem, x, instance.y0, estimator=built(row, x), start=Start(y=torch.zeros(3)))


@every_estimator
def test_nan_is_reported_and_raised_with_what_was_computed(row: Row) -> None:
    instance = PROBLEMS["quadratic"]()
    problem = BilevelProblem(instance.problem.f, lambda x, y: instance.problem.g(x, y) * math.nan)
    x = point(instance)
    found = hypergradient(problem, x, instance.y0, estimator=built(row, x), throw=False)
    assert found.status is Status.nonfinite
    assert "NaN or Inf" in found.message
    with pytest.raises(BilevelError, match="NaN or Inf") as caught:
        hypergradient(problem, x, instance.y0, estimator=built(row, x))
    assert caught.value.status is Status.nonfinite
    assert caught.value.partial.reports[0].part == "inner solver"


@every_estimator
def test_nan_of_f_is_never_replaced(row: Row) -> None:
    instance = PROBLEMS["quadratic"]()
    problem = BilevelProblem(lambda x, y: instance.problem.f(x, y) * math.nan, instance.problem.g)
    x = point(instance)
    found = hypergradient(problem, x, instance.y0, estimator=built(row, x), throw=False)
    assert found.status is Status.nonfinite
    assert math.isnan(found.value)
    assert bool(found.grad.isnan().any())


@every_estimator
def test_non_contiguous_inputs_give_the_same_bits(row: Row) -> None:
    instance = PROBLEMS["quadratic"]()
    x, y0 = point(instance), instance.y0

    def strided(leaf: torch.Tensor) -> torch.Tensor:
        wide = torch.stack([leaf, leaf + 1], dim=-1)
        assert not wide[..., 0].is_contiguous()
        return wide[..., 0]

    plain = hypergradient(instance.problem, x, y0, estimator=built(row, x))
    odd = hypergradient(instance.problem, strided(x), strided(y0), estimator=built(row, x))
    assert bits((plain.grad, plain.y)) == bits((odd.grad, odd.y))


@every_estimator
def test_zero_dimensional_leaves_and_columns(row: Row) -> None:
    """Phi(x) = (3 a - b - 1)^2 / 2 for y = 3 a - b, one entry of y a 0-d tensor."""
    problem = BilevelProblem(
        lambda x, y: (y["s"] - 1).square() / 2 + y["u"].square().sum() / 2,
        lambda x, y: (y["s"] - 3 * x[0] + x[1][0, 0]).square() / 2 + y["u"].square().sum(),
    )
    x = [torch.tensor(2.0), torch.ones(1, 1)]
    found = hypergradient(problem, x, {"s": torch.tensor(0.0), "u": torch.zeros(1, 2)}, estimator=built(row, x))
    assert found.grad[0].shape == ()
    assert found.grad[1].shape == (1, 1)
    assert distance(found.grad, [torch.tensor(12.0), torch.full((1, 1), -4.0)]) <= 1e-5


@every_estimator
def test_inner_problem_that_does_not_see_x_leaves_the_direct_gradient(row: Row) -> None:
    problem = BilevelProblem(lambda x, y: (x * x).sum() * (1 + y.sum()), lambda x, y: (y - 2).square().sum())
    x = torch.tensor([1.0, -3.0])
    found = hypergradient(problem, x, torch.zeros(2), estimator=built(row, x))
    assert ravel(found.grad)[0].tolist() == pytest.approx([10.0, -30.0], rel=1e-6)


@every_estimator
def test_f_that_does_not_see_y_leaves_the_direct_gradient(row: Row) -> None:
    problem = BilevelProblem(lambda x, y: (x**3).sum(), lambda x, y: (y - x).square().sum())
    x = torch.tensor([1.0, -2.0])
    found = hypergradient(problem, x, torch.zeros(2), estimator=built(row, x))
    assert ravel(found.grad)[0].tolist() == pytest.approx([3.0, 12.0], rel=1e-6)


@every_estimator
def test_f_that_does_not_see_x_leaves_the_implicit_gradient(row: Row) -> None:
    problem = BilevelProblem(lambda x, y: (y**3).sum(), lambda x, y: (y - 2 * x).square().sum())
    x = torch.tensor([1.0, -0.5])
    found = hypergradient(problem, x, torch.zeros(2), estimator=built(row, x))
    assert ravel(found.grad)[0].tolist() == pytest.approx([24.0, 6.0], rel=1e-3)


@every_estimator
def test_f_that_sees_nothing_has_gradient_zero(row: Row) -> None:
    problem = BilevelProblem(lambda x, y: torch.tensor(4.0), lambda x, y: (y - 2 * x).square().sum())
    x = torch.tensor([1.0, -0.5])
    found = hypergradient(problem, x, torch.zeros(2), estimator=built(row, x))
    assert found.grad.tolist() == [0.0, 0.0]
    assert found.value == 4.0
