"""In 40 threads, in pools of processes and in workers of a loader the bits are those of one thread."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import portable_cases
import pytest
import torch
from cases import ESTIMATORS, bits, point
from torch import nn

from bilevel import AID, BilevelError, BilevelProblem, Estimate, Solution, Status, functional, hypergradient, minimize
from bilevel.few_shot import conv_net, mlp
from bilevel.problems import quadratic
from bilevel.requirements.properties import DoesNotApply
from bilevel.solvers import CG, LBFGS

THREADS = 40
Job = Callable[[], Any]


def octets(result: Any) -> bytes:
    """Every bit of a result."""
    if isinstance(result, Solution):
        trail = str([(r.value, r.grad_norm, r.status, r.stats) for r in result.history]).encode()
        return bits(result.x) + bits(result.y) + octets(result.estimate) + trail
    if isinstance(result, Estimate):
        return bits(result.grad) + bits(result.y) + str((result.value, result.status, result.stats)).encode()
    return bits(result)


def side_by_side(jobs: dict[str, Job], repeats: int = 1) -> list[str]:
    """Those jobs whose result in some of 40 threads, all begun at once, is another than in this one."""
    serial = {name: octets(job()) for name, job in jobs.items()}
    names = (list(jobs) * -(-THREADS * repeats // len(jobs)))[: THREADS * repeats]
    begin, each = threading.Barrier(THREADS), repeats

    def work(k: int) -> list[str]:
        begin.wait()
        return [name for name in names[k * each : (k + 1) * each] if octets(jobs[name]()) != serial[name]]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return [name for wrong in pool.map(work, range(THREADS)) for name in wrong]
    finally:
        sys.setswitchinterval(interval)


def test_forty_threads_give_the_hypergradients_of_one() -> None:
    instance = quadratic(p=2, q=3)  # one problem for all of them
    x = point(instance)
    jobs: dict[str, Job] = {}
    for row in ESTIMATORS:
        estimator = row.build(1e-2, 2)
        jobs[row.name] = lambda estimator=estimator: hypergradient(  # type: ignore[misc]
            instance.problem, x, instance.y0, estimator=estimator, throw=False
        )
    for name in portable_cases.NAMES[:3]:
        jobs[f"structures, {name}"] = lambda name=name: portable_cases.estimate(name)  # type: ignore[misc]
    assert side_by_side(jobs) == []


def test_forty_threads_give_the_runs_of_one() -> None:
    instance = quadratic(p=2, q=3)
    jobs: dict[str, Job] = {
        name: lambda name=name: minimize(  # type: ignore[misc]
            instance.problem, instance.x0, instance.y0, estimator=name, max_steps=2, throw=False
        )
        for name in ("aid-cg", "esj")
    }
    assert side_by_side(jobs) == []


def test_threads_do_not_see_each_others_random_numbers() -> None:
    """Networks with a seed, fixed dropout and tasks one after the other set torch's own generator back and forth."""
    net = functional(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)))
    inputs, data = torch.ones(5, 3), torch.arange(12.0).reshape(4, 3)

    def f(x: torch.Tensor, y: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return (y - d).square().sum() + x.sum()

    def g(x: torch.Tensor, y: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return (y - x).square().sum() + (y - d).square().sum()

    looped = BilevelProblem(f, g, tasks="loop")
    estimator = AID(LBFGS(1e-6), CG())
    jobs: dict[str, Job] = {
        "mlp": lambda: mlp((3, 30, 1), seed=1)[0].weight,
        "another mlp": lambda: mlp((3, 30, 1), seed=2)[0].weight,
        "conv_net": lambda: conv_net(2, blocks=1, size=4, seed=3)[0].weight,
        "dropout": lambda: torch.stack([net(net.params, inputs) for _ in range(5)]),
        "loop": lambda: hypergradient(looped, torch.zeros(3), torch.zeros(3), estimator=estimator, data=data),
    }
    state = torch.get_rng_state()
    assert side_by_side(jobs, repeats=3) == []
    assert torch.equal(torch.get_rng_state(), state)


# Processes


@pytest.fixture(scope="module", params=["fork", "spawn"])
def pool(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor]:
    """A pool of one process: what crosses is the same for more."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(request.param)) as made:
        yield made


def test_a_pool_gives_the_bits_of_this_process(pool: ProcessPoolExecutor) -> None:
    own_names = ("implicit", "itd", "esj", "penalty")
    for work, names in ((portable_cases.estimate, own_names), (portable_cases.run, ("implicit", "esj"))):
        for name, found in zip(names, pool.map(work, names), strict=True):
            here = work(name)
            assert octets(found) == octets(here), name
            own = found.estimate if isinstance(found, Solution) else found
            assert type(own.y) is portable_cases.Inner and own.reports == getattr(here, "estimate", here).reports


def test_problems_and_estimators_go_into_a_pool(pool: ProcessPoolExecutor) -> None:
    instance = quadratic(p=2, q=3)
    estimator = AID(LBFGS(1e-10), CG())
    there = pool.submit(hypergradient, instance.problem, instance.x0, instance.y0, estimator=estimator).result()
    here = hypergradient(instance.problem, instance.x0, instance.y0, estimator=estimator)
    assert octets(there) == octets(here) and there.error_estimate == here.error_estimate


def test_errors_of_workers_arrive(pool: ProcessPoolExecutor) -> None:
    with pytest.raises(BilevelError, match=r"did not succeed. inner solver: The maximum number of steps") as caught:
        pool.submit(portable_cases.fail, 0).result()
    assert caught.value.status is Status.max_steps and isinstance(caught.value.partial, Estimate)
    assert caught.value.partial.reports[0].status is Status.max_steps
    with pytest.raises(BilevelError, match="it failed") as caught:
        pool.submit(portable_cases.fail_of_lambdas, 0).result()
    assert caught.value.status is Status.diverged and caught.value.partial is None
    assert "stayed where it was raised" in caught.value.__notes__[0]
    with pytest.raises(DoesNotApply, match="it is what it is") as refused:
        pool.submit(portable_cases.does_not_apply, 0).result()
    assert refused.value.reason == "it is what it is"
    lost = pool.submit(portable_cases.lost, 0).result()
    with pytest.raises(ValueError, match=r"field `f` is a lambda defined at .*portable_cases.py"):
        _ = lost.error_estimate


def test_errors_of_runs_arrive_with_what_can_be_pickled_of_what_was_computed(pool: ProcessPoolExecutor) -> None:
    with pytest.raises(portable_cases.OwnError) as left:
        pool.submit(portable_cases.training_that_is_left, 0).result()
    partial, notes = left.value.partial, left.value.__notes__  # type: ignore[attr-defined]
    assert len(partial.history) == 3 and partial.x.shape == () and not hasattr(partial, "learner")
    assert "the rest stayed where it was raised" in notes[0] and "field `predict` is a lambda" in notes[0]
    with pytest.raises(BilevelError) as failed:
        pool.submit(portable_cases.training_that_fails, 0).result()
    assert failed.value.partial.ended == "failed" and "came along" in failed.value.__notes__[0]
    with pytest.raises(KeyError) as of_a_key:
        pool.submit(portable_cases.run_that_is_left, 0).result()
    partial = of_a_key.value.partial  # type: ignore[attr-defined]
    assert len(partial.history) == 3 and not hasattr(partial, "y")
    assert pool.submit(portable_cases.estimate, "itd").result().status.ok


def test_what_a_pool_cannot_take_is_named(pool: ProcessPoolExecutor) -> None:
    problem = BilevelProblem(lambda x, y: portable_cases.f(x, y), portable_cases.g)
    with pytest.raises(pickle.PicklingError, match=r"`pickle of BilevelProblem`: field `f` is a lambda defined at"):
        pool.submit(hypergradient, problem, portable_cases.x0, portable_cases.y0).result()
    assert pool.submit(portable_cases.estimate, "itd").result().status.ok  # the pool is as it was


def test_a_process_that_is_forked_while_a_thread_draws_is_not_stuck() -> None:
    from bilevel._numerics.batched import RANDOM

    held, done = threading.Event(), threading.Event()

    def draw() -> None:
        with RANDOM:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=draw)
    thread.start()
    held.wait()
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as made:
            assert made.submit(portable_cases.weights, 1).result(timeout=20).shape == (4, 3)
    finally:
        done.set()
        thread.join()


def test_workers_of_a_loader_give_the_batches_and_hypergradients_of_this_process() -> None:
    tasks = portable_cases.Tasks()
    loader = torch.utils.data.DataLoader(tasks, batch_size=None, num_workers=2)
    found = list(loader)
    assert len(found) == len(tasks)
    for step, each in enumerate(found):
        assert bits(list(each)) == bits(list(tasks[step]))


def test_joblib_gives_the_bits_of_this_process() -> None:
    joblib: Any = pytest.importorskip("joblib")
    names = portable_cases.NAMES[:3]
    for backend in ("threading", "multiprocessing"):
        calls = (joblib.delayed(portable_cases.estimate)(name) for name in names)
        for name, found in zip(names, joblib.Parallel(2, backend=backend)(calls), strict=True):
            assert octets(found) == octets(portable_cases.estimate(name))


@pytest.mark.slow
def test_the_processes_of_joblib_take_lambdas_and_give_the_bits_of_this_process() -> None:
    joblib: Any = pytest.importorskip("joblib")
    problem = BilevelProblem(lambda x, y: (y - 1).square().sum(), lambda x, y: (y - x).square().sum())
    zero = torch.zeros(2)
    calls = (joblib.delayed(hypergradient)(problem, zero, zero, estimator=name) for name in ("aid-cg", "itd"))
    for name, found in zip(("aid-cg", "itd"), joblib.Parallel(2)(calls), strict=True):
        assert octets(found) == octets(hypergradient(problem, zero, zero, estimator=name))
