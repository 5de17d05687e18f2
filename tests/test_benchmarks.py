"""The benchmarks compare what they say they compare: tiny problems, numbers only, no times."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel
import bilevel.algorithms
from bilevel.solvers import CG, LBFGS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = (
    *("_threads", "_harness", "_workloads", "_tasks", "peers", "run_all", "esj", "w4_memory", "omniglot"),
    *("_stochastic", "stochastic", "stochastic_overhead", "stochastic_cleaning"),
)

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="an installed package comes without its benchmarks")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", "MPLBACKEND"):
        monkeypatch.setenv(name, "")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("method", ["cg", "neumann"])
@pytest.mark.parametrize("kind", ["binary", "multinomial", "network"])
def test_our_call_equals_the_reference(load: Any, method: str, kind: str) -> None:
    harness, workloads = load("_harness"), load("_workloads")
    if kind == "network":
        workload = workloads.weighted_network("tiny", [3, 4, 2], 12, ridge=1.0, steps=20, step=0.1)
    else:
        workload = workloads.logistic(40, 5, 1 if kind == "binary" else 3)
    workload = workload.double()
    truth = harness.reference(workload, method, 4)
    assert not truth.concave
    assert harness.relative_error(harness.ours(workload, method, 4)(), truth.grad) < 1e-9


def test_the_floor_makes_the_calls_that_it_names(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, workloads = load("_harness"), load("_workloads")
    workload = workloads.logistic(40, 5, 3).double()
    calls, grad = [], torch.autograd.grad

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    cross = harness.floor(workload, 3)()
    monkeypatch.undo()
    # The gradients of f and of g, the products, the cross product.
    assert calls == [{}, {"create_graph": True}, *([{"retain_graph": True}] * 3), {}]
    x, y = workload.x.requires_grad_(), workload.flat.requires_grad_()
    (fy,) = torch.autograd.grad(workload.f(x, workload.cut(y)), y)
    (gy,) = torch.autograd.grad(workload.g(x, workload.cut(y)), y, create_graph=True)
    torch.testing.assert_close(cross, torch.autograd.grad(gy @ fy, x)[0])


def test_reference_reports_negative_curvature(load: Any) -> None:
    harness, workloads = load("_harness"), load("_workloads")
    workload = workloads.weighted_network("concave", [3, 4, 2], 12, ridge=-1.0, steps=0, step=0.3)
    assert harness.reference(workload, "cg", 2).concave


def test_the_esj_loop_is_the_estimator(load: Any) -> None:
    esj, workloads = load("esj"), load("_workloads")
    w = workloads.weighted_network("tiny", [3, 4, 2], 12, ridge=1.0, steps=0, step=0.1).double()
    problem = esj.BilevelProblem(w.f, w.g)
    found = esj.hypergradient(problem, w.x, w.ys, estimator=esj.estimator(w, 3)).grad
    torch.testing.assert_close(found, esj.loop(w, 3)(), rtol=1e-9, atol=1e-12)


def test_unrolled_candidates_agree(load: Any) -> None:
    w4, workloads = load("w4_memory"), load("_workloads")
    w = replace(workloads.logistic(40, 5, 3, solved=False), step=0.5).double()
    truth = w4.loop(w, 7)()
    calls = w4.ours(w, 7)
    for name in ("bilevel ITD", "bilevel ITD(checkpoint=True)"):
        torch.testing.assert_close(calls[name](), truth, rtol=1e-10, atol=1e-14)


def test_each_round_runs_every_call_and_failures_are_kept(load: Any) -> None:
    harness = load("_harness")
    ran: list[str] = []

    def note(name: str) -> torch.Tensor:
        ran.append(name)
        return torch.zeros(())

    def fail() -> torch.Tensor:
        raise RuntimeError("no such thing")

    calls = {"a": lambda: note("a"), "b": lambda: note("b"), "c": fail}
    timings, failures = harness.interleave(calls, rounds=3, least=0.0)
    assert ran == ["a", "a", "b", "b", "a", "b", "b", "a", "a", "b"]  # twice before, then in rotation
    assert {name: len(timing.cpu) for name, timing in timings.items()} == {"a": 3, "b": 3}
    assert failures == {"c": "failed: RuntimeError: no such thing"}


def test_the_ratio_is_the_median_within_rounds(load: Any) -> None:
    harness = load("_harness")
    slow, quick = harness.Timing([2.0, 30.0, 4.0], []), harness.Timing([1.0, 10.0, 2.0], [])
    assert harness.against(slow, quick) == 2.0


def test_tables_are_written_whole(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness = load("_harness")
    row = harness.Row("a|b", ["1.0"], {"ratio": 1.0})
    table = harness.Table("Title", ["", "x", "y"], [row], ["A note."])
    chosen = harness.options("", rounds=3, arguments=["--out", str(tmp_path), "--peers", ""])
    harness.save("name", "Heading", [table], chosen)
    text = (tmp_path / "name.md").read_text()
    assert "| a\\|b | 1.0 |  |" in text
    assert "`python benchmarks/name.py --rounds 3`" in text
    assert text.strip() == capsys.readouterr().out.strip()
    record = json.loads((tmp_path / "name.json").read_text())
    assert record["tables"][0]["rows"][0]["numbers"] == {"ratio": 1.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name.json", "name.md"]


def test_a_failed_write_leaves_the_old_file(load: Any, tmp_path: Path) -> None:
    harness = load("_harness")
    path = tmp_path / "table.md"
    harness.write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        harness.write(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_absent_peer_is_a_reason(load: Any) -> None:
    harness = load("_harness")
    chosen = harness.options("", rounds=1, arguments=["--peers", "hypertorch"])
    calls, refusals = harness.candidates(chosen, lambda adapter: {})
    assert calls == {}
    assert refusals == {"hypertorch": "skipped: pass --hypertorch PATH"}


def test_results_replace_only_what_is_between_the_marks(load: Any, tmp_path: Path) -> None:
    run_all = load("run_all")
    (tmp_path / "esj.md").write_text("### ESJ\n")
    text = f"before\n{run_all.BEGIN}old\n{run_all.END}after\n"
    new = run_all.with_results(text, tmp_path)
    assert new.startswith(f"before\n{run_all.BEGIN}")
    assert new.endswith(f"### ESJ\n\n{run_all.END}after\n")
    assert "old" not in new


@pytest.mark.parametrize("weight", [0.0, 60.0])
def test_meta_gradients_in_one_batch_by_hand_and_one_by_one_are_the_same(load: Any, weight: float) -> None:
    tasks = load("_tasks")
    workload = tasks.sinusoids(3, 2, weight).double()
    truth = tasks.one_by_one(workload)()
    for found in (tasks.by_hand(workload)(), tasks.ours(workload)()):
        assert torch.linalg.vector_norm(found - truth) <= 1e-12 * torch.linalg.vector_norm(truth)


def test_the_table_of_omniglot_tells_what_the_runs_found(load: Any, tmp_path: Path) -> None:
    omniglot = load("omniglot")
    folder = tmp_path / omniglot.RUNS[0].name
    folder.mkdir()
    result = {
        "test": {"score": {"mean": 0.9694, "interval": 0.0034}},
        "calibration": {"ECE": 0.0052, "NLL": 0.0919},
        "steps": 6000,
        "training_seconds": 859.4,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    rows = [line for line in omniglot.table(tmp_path).splitlines() if line.startswith("| protonet")]
    assert rows == [f"| protonet | 96.9 \u00b1 0.3 | 0.52 | 0.092 | 6000 | 859 | {omniglot.RUNS[0].published} |"]
    page = omniglot.with_results(f"a\n{omniglot.BEGIN}old\n{omniglot.END}b\n", "new")
    assert page == f"a\n{omniglot.BEGIN}\nnew\n{omniglot.END}b\n"


# stochastic algorithms


def test_the_quadratic_sum_has_the_gradient_that_autograd_finds_through_its_minimizer(load: Any) -> None:
    w = load("_stochastic").quadratic_sum("tiny", 14, 9, 4, 3, batch=4)

    def phi(x: torch.Tensor) -> torch.Tensor:
        H = w.g[0].T @ w.g[0] / 14
        y = -torch.linalg.solve(H, w.g[3].T @ (w.g[2] @ x) / 14 + w.g[4].mean(0))
        return w.problem.f(x, y, w.f)  # type: ignore[no-any-return]

    x = w.x0.clone().requires_grad_()
    torch.testing.assert_close(w.gradient(w.x0), torch.autograd.grad(phi(x), x)[0], rtol=1e-10, atol=1e-12)


def test_the_logistic_sum_has_the_gradient_that_an_estimate_with_exact_solvers_has(load: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 30, 3, generator=generator, dtype=torch.float64)
    w = load("_stochastic").logistic_sum("tiny", rows[0], rows[1])
    data = bilevel.Split(f=w.f, g=w.g)
    exact = bilevel.AID(LBFGS(tol=1e-13), CG(rtol=1e-13))
    found = bilevel.hypergradient(w.problem, w.x0, w.y0, data=data, estimator=exact)
    torch.testing.assert_close(w.gradient(w.x0), found.grad, rtol=1e-9, atol=1e-12)


def test_a_grid_side_by_side_is_its_single_runs(load: Any) -> None:
    s = load("_stochastic")
    w = s.quadratic_sum("tiny", 12, 8, 4, 3, batch=4)
    grid = [(0.1, 0.1), (0.3, 0.05)]
    entry = s.Entry("SABA", bilevel.algorithms.SABA)
    together = s.traced(w, entry, grid, 1, [2, 5])
    for (rho, gamma), row in zip(grid, together, strict=True):
        alone = s._run(w, bilevel.algorithms.SABA(rho, gamma), 0, 1, [2, 5])[0]
        assert row.values == pytest.approx(alone.values, rel=1e-9)
        assert row.steps == alone.steps
        steps = round(5 * w.samples / 16)  # 4 calls a sample of a batch
        data = w.data(1)
        x = bilevel.minimize(
            w.problem,
            w.x0,
            w.y0,
            algorithm=bilevel.algorithms.SABA(rho, gamma),
            data=data,
            max_steps=steps,
            throw=False,
        ).x
        assert w.measure(x) == pytest.approx(alone.values[-1], rel=1e-9)


@pytest.mark.parametrize("algorithm", ["SABA", "SRBA"])
def test_on_q20_variance_reduction_is_linear(load: Any, algorithm: str) -> None:
    """|grad Phi|^2 of 6.2 falls below 1e-12 within 120 passes."""
    w = load("_stochastic").q20()
    steps, passes = ((0.3, 0.3), 8.0) if algorithm == "SABA" else ((1.0, 1.0), 2.7)
    chosen = getattr(bilevel.algorithms, algorithm)(*steps)
    found = bilevel.minimize(
        w.problem, w.x0, w.y0, algorithm=chosen, data=w.data(), max_steps=round(120 * passes), evaluate_every=10**6
    )
    assert found.stats.sample_calls <= 126 * w.samples  # two looks at all the data and a last step are 5 of them
    assert w.measure(found.x) < 1e-12 < 1e-12 * w.measure(w.x0)


def test_on_q20_soba_comes_to_the_noise_of_its_steps_and_further_by_reshuffling(load: Any) -> None:
    w = load("_stochastic").q20()
    soba = bilevel.algorithms.SOBA(1.0, 1.0, schedule=bilevel.algorithms.Power(0.5))

    def after(order: Any, seed: int) -> float:
        data = bilevel.Split(*(bilevel.FiniteSum(side, w.batch, order, seed) for side in (w.f, w.g)))
        given: dict[str, Any] = {"algorithm": soba, "data": data, "max_steps": 2400, "evaluate_every": 2400}
        found: float = w.measure(bilevel.minimize(w.problem, w.x0, w.y0, **given).x)
        return found

    shuffled = statistics.median(after("shuffle", seed) for seed in range(4))
    assert shuffled < 3e-5
    assert shuffled < min(after("iid", seed) for seed in range(2)) / 10


@pytest.mark.parametrize("steps", [10, 50, 100])
def test_auto_on_q20_does_not_go_uphill_where_its_steps_are_few(load: Any, steps: int) -> None:
    """The longest steps of x once looked best in a sweep that ended before they ran away, 50 steps in all."""
    w = load("_stochastic").q20()
    found = bilevel.minimize(w.problem, w.x0, w.y0, algorithm="auto", data=w.data(), max_steps=steps)
    assert found.status.ok and w.measure(found.x) < 2 * w.measure(w.x0)
    assert len(found.sweep) == (3 if steps == 100 else 0)


def test_the_loop_by_hand_is_soba(load: Any) -> None:
    overhead, s = load("stochastic_overhead"), load("_stochastic")
    w = s.quadratic_sum("tiny", 4, 4, 4, 3, batch=4)
    twice = [tuple(torch.cat([part, part]) for part in side) for side in (w.f, w.g)]  # two blocks alike, in any order
    clock = overhead.Clock()
    loops = overhead.quadratic_loops(replace(w, f=twice[0], g=twice[1]), clock)
    torch.testing.assert_close(loops["by hand"](7), loops["bilevel"](7), rtol=1e-10, atol=1e-12)
    assert len(clock.times) == 14


def test_results_of_other_algorithms_are_kept(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stochastic = load("stochastic")
    stochastic.run("tiny", ["SOBA"], tmp_path, tmp_path)
    stochastic.run("tiny", ["F2SA"], tmp_path, tmp_path)
    found = stochastic.read(tmp_path / "stochastic_tiny.json")
    assert set(found) == {"SOBA", "F2SA"}
    assert found["SOBA"].seconds(4) > 0
    text = (tmp_path / "stochastic_tiny.md").read_text()
    assert "rho in {.3}, gamma in {.1, .3}" in text
    page = f"a\n{stochastic.BEGIN.format('tiny')}old\n{stochastic.END}b\n"
    assert stochastic.with_table(page, "tiny", "new") == page.replace("old\n", "\nnew\n")
    assert "tiny SOBA" in capsys.readouterr().out


def test_cleaning_is_followed_by_the_time_to_the_accuracy_of_all_the_data(load: Any) -> None:
    cleaning = load("stochastic_cleaning")
    X = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    sizes = {"n_train": 40, "n_val": 20, "batch": 10, "steps": 4, "full_steps": 2, "every": 2}
    found = cleaning.curves((X, (X[:, 0] > 0).long()), **sizes, names=["full batch", "SABA"])
    assert [curve.name for curve in found] == ["full batch", "SABA"]
    assert [len(curve.points) for curve in found] == [3, 3]
    shown = cleaning.table(found)
    assert float(shown.rows[0].cells[1]) == 1.0 or shown.rows[0].cells[0] == "0.0"
