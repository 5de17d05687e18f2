"""Runs on batches report all the data: values, norms, the best iterate, certified ends, and divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_single_loops import OF_F, OF_G, PROBLEM, X, Y, everywhere, objective, run, solution, split

from bilevel import AID, ITD, BilevelError, BilevelProblem, Constants, FiniteSum, Split, Status, minimize
from bilevel.algorithms import MASOBA, SABA, SOBA, SRBA, Descent, Power
from bilevel.solvers import CG, LBFGS, GradientDescent, Iterate

TRUTH = solution()


def hypergradient_at(x: torch.Tensor) -> torch.Tensor:
    """In closed form: Phi is quadratic, and its gradient linear with its zero at the solution."""
    zero = torch.zeros_like(Y)
    H = torch.stack([everywhere(x, row, zero).y - everywhere(x, zero, zero).y for row in torch.eye(len(Y)).double()])
    y = torch.linalg.solve(H, -everywhere(x, zero, zero).y)
    rest = everywhere(x, y, zero).v
    assert rest is not None
    return everywhere(x, y, torch.linalg.solve(H, -rest)).x


def test_what_is_recorded_is_of_all_the_data() -> None:
    seen: list[tuple[Any, Any]] = []
    soba = SOBA(0.1, 0.1, schedule=Power(0.5))
    found = run(soba, split(), 40, evaluate_every=10, callback=lambda record, estimate: seen.append((record, estimate)))
    assert [record.step for record in found.history] == [0, 10, 20, 30, 40] == [record.step for record, _ in seen]
    for record, estimate in seen:
        x, y, v = estimate.x, estimate.y, estimate.v
        assert record.value == pytest.approx(float(objective(x, y, OF_F)), rel=1e-12)
        d = everywhere(x, y, v)
        assert d.v is not None
        norm = torch.cat([d.x, d.y, d.v]).norm()
        assert record.grad_norm == pytest.approx(float(norm), rel=1e-9)
        torch.testing.assert_close(estimate.grad, d.x)
    assert found.best.grad_norm == min(record.grad_norm for record in found.history[1:]) and found.best.compared
    assert found.value == pytest.approx(float(objective(found.x, found.y, OF_F)), rel=1e-12)


@pytest.mark.parametrize("algorithm", [SOBA(0.05, 0.05), SRBA(0.05, 0.05)])
def test_looks_take_a_tenth_of_the_calls(algorithm: Any) -> None:
    found = run(algorithm, split(), 300)
    look = 3 * len(OF_G[0]) + len(OF_F[0])
    between = [record.stats.sample_calls for record in found.history[1:-1]]
    assert len(between) > 3 and all(calls <= 12 * look for calls in between)
    assert len(found.history) * look <= 0.1 * found.stats.sample_calls + 2 * look


@pytest.mark.parametrize("constants", [None, Constants(mu=0.9, L_fyy=9.0, L_fxy=9.0, M_yy=0.0, M_xy=0.0, C_G=9.0)])
def test_a_tolerance_is_met_by_a_certified_gradient(constants: Constants | None) -> None:
    found = run(SABA(0.15, 0.1), split(), 3000, tol=1e-6, constants=constants)
    assert found.status is Status.successful and found.converged
    h = hypergradient_at(found.x)
    assert found.estimate.bound is not None
    assert float((h - found.estimate.grad).norm()) <= found.estimate.bound
    assert float(h.norm()) <= float(found.estimate.grad.norm()) + found.estimate.bound <= 1e-6
    assert found.history[-1].step < 3000


def test_noise_does_not_pass_for_convergence() -> None:
    with pytest.raises(BilevelError) as failed:
        run(SOBA(0.1, 0.1), split(), 200, tol=1e-8)
    assert failed.value.status is Status.max_steps and not failed.value.partial.converged


def test_the_luckiest_batch_does_not_end_a_run() -> None:
    """Where batches alone are known nobody can tell a tolerance that is met from luck."""
    loader = [tuple(part[k : k + 6] for part in OF_G) for k in (0, 6)]
    for given in ({"algorithm": SOBA(0.1, 0.1)}, {"estimator": "aid-cg"}):
        for batches in (loader, lambda k: loader[k % 2]):
            with pytest.raises(ValueError, match=r"minimize\(tol=\.\.\.\).*only batches.*FiniteSum"):
                minimize(PROBLEM, X, Y, data=batches, max_steps=3, tol=1e-2, **given)
            assert len(minimize(PROBLEM, X, Y, data=batches, max_steps=3, **given).history) == 4
    assert minimize(PROBLEM, X, Y, estimator="aid-cg", data=OF_G, max_steps=30, tol=1e-5).converged


@pytest.mark.parametrize("throw", [True, False])
def test_a_run_that_diverges_ends_so_and_keeps_the_best(throw: bool) -> None:
    try:
        found = run(SOBA(0.1, 3.0), split(), 5000, throw=throw)
    except BilevelError as error:
        assert throw
        found = error.partial
    assert found.status in (Status.diverged, Status.nonfinite) and found.failed
    assert found.history[-1].step < 1000
    assert torch.isfinite(found.best.x).all()


def test_a_batch_that_is_no_number_ends_the_run_where_it_is_met() -> None:
    data = torch.ones(8, dtype=torch.float64)
    data[5] = torch.nan
    problem = BilevelProblem(lambda x, y, a: (y - 1).square(), lambda x, y, a: (y - a.mean() * x).square())
    one = torch.tensor(1.0, dtype=torch.float64)
    f = torch.ones(1, dtype=torch.float64)
    found = minimize(
        problem,
        one,
        one,
        algorithm=SOBA(0.1, 0.1),
        data=Split(g=FiniteSum(data, 1), f=f),
        max_steps=50,
        evaluate_every=50,
        throw=False,
    )
    assert found.status is Status.nonfinite and found.history[-1].step < 9


def test_a_sparse_history_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for algorithm in (SOBA(0.1, 0.1), SABA(0.1, 0.1)):
        whole = run(algorithm, split(), 90)
        for stop in (3, 31, 62):
            file = tmp_path / f"{type(algorithm).__name__}-{stop}.pt"
            run(algorithm, split(), stop, checkpoint=file)
            found = run(algorithm, split(), 90, checkpoint=file, resume=True)
            assert [(r.step, r.value, r.grad_norm, r.stats) for r in found.history] == [
                (r.step, r.value, r.grad_norm, r.stats) for r in whole.history
            ]
            assert torch.equal(found.x, whole.x) and found.best.value == whole.best.value


def test_a_descent_on_batches_is_recorded_by_its_own_estimator_on_all_the_data() -> None:
    descent = Descent(AID(LBFGS(1e-12), CG(1e-12)), GradientDescent(0.1))
    found = run(descent, split(), 12, evaluate_every=4)
    for record in found.history[-1:]:
        h = hypergradient_at(found.x)
        torch.testing.assert_close(found.estimate.grad, h, rtol=0, atol=1e-9)
        assert record.grad_norm == pytest.approx(float(h.norm()), rel=1e-8)


def test_looks_are_for_data_that_are_known() -> None:
    loader = [tuple(part[:4] for part in OF_G), tuple(part[4:8] for part in OF_G)]
    with pytest.raises(ValueError, match=r"evaluate_every=.*FiniteSum"):
        run(MASOBA(0.1, 0.1), loader, 3, evaluate_every=2)
    with pytest.raises(ValueError, match=r"`constants=` belongs to `Descent`"):
        run(MASOBA(0.1, 0.1), loader, 3, constants=Constants(mu=1.0))
    with pytest.raises(ValueError, match=r"`estimator=` belongs to `Descent`"):
        minimize(PROBLEM, X, Y, algorithm=SOBA(0.1, 0.1), data=split(), estimator="itd")


# What a short run, a lagging y or a failed certificate must not pass for


_NOTHING = FiniteSum(torch.zeros(8, dtype=torch.float64), 2)
_ZERO = torch.tensor(0.0, dtype=torch.float64)


def _outer(x: torch.Tensor, y: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = (y - 3 - d).square().mean() / 2
    return found


FLAT = BilevelProblem(_outer, lambda x, y, d: 1e-3 * (1 + (y - x - d).square()).sqrt().mean())
BOWL = BilevelProblem(lambda x, y, d: _outer(x, y, d) + x.square() / 2, lambda x, y, d: (y - x - d).square().mean() / 2)


@pytest.mark.parametrize("name", ["auto", "soba", "saba", "fdehbo", "aid-bio"])
def test_without_a_certificate_no_tolerance_is_met(name: str) -> None:
    found = minimize(FLAT, _ZERO, _ZERO + 3, algorithm=name, data=_NOTHING, max_steps=60, tol=2e-3, throw=False)
    assert not found.converged and found.failed


def test_a_step_of_y_alone_does_not_meet_a_tolerance() -> None:
    one = Descent(ITD(Iterate(GradientDescent(1e-3), max_steps=1)), GradientDescent(0.01))
    found = minimize(BOWL, _ZERO, _ZERO + 3, algorithm=one, data=_NOTHING, max_steps=20, tol=2e-3, throw=False)
    assert not found.converged


def test_the_best_iterate_is_not_that_of_the_luckiest_lag() -> None:
    found = minimize(BOWL, _ZERO, _ZERO + 3, algorithm=SABA(0.1, 0.05), data=_NOTHING, max_steps=1500)
    assert min(record.value for record in found.history) < 2.25 - 1e-3  # below Phi*, where y lags
    assert float(found.best.x) == pytest.approx(1.5, abs=1e-6)
    assert found.best.grad_norm == min(record.grad_norm for record in found.history[1:])
