"""Strong and weak scaling of SOBA with samples over ranks, the cost of a group of one, and a cost model fitted to them.

A step of SOBA on b samples of g and as many of f, with q weights and p penalties, over R ranks takes

    T(b, R) = fixed + sample b / R + message(2 q + p + 1, R)
    message(n, R) = latency ceil(log2 R) + float 2 n (R - 1) / R

`sample` and `fixed` are fitted to one process with several b, `latency` and `float` to all-reduces of several sizes
between two. The table compares T with what is measured for 1 and 2 processes (and 4, where asked for), each the least
of several rounds, with one thread a process; what is predicted beyond that is the model and no measurement.

    python benchmarks/scaling.py [--four]
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, distributed

from bilevel import BilevelProblem, FiniteSum, Split, minimize
from bilevel.algorithms import SOBA

Q = 256
SIZES = (2048, 8192, 32768)  # samples of a step
STEPS, ROUNDS = 20, 5
WIRELESS = 0.05, 8e-7  # assumed: seconds of latency, and seconds a float, which is 40 Mbit/s


def _misfit(y: Tensor, data: Any) -> Tensor:
    losses: Tensor = torch.nn.functional.softplus(-data[1] * (data[0] @ y))
    return losses.mean()


def _f(x: Tensor, y: Tensor, data: Any) -> Tensor:  # noqa: ARG001
    return _misfit(y, data)


def _g(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return _misfit(y, data) + (x.exp() * y.square()).sum() / 2


PROBLEM = BilevelProblem(_f, _g)


def _data(samples: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, samples, Q, generator=generator) / Q**0.5
    targets = torch.randn(2, samples, generator=generator).sign()
    f, g = (FiniteSum((inputs[k], targets[k]), samples, order="full") for k in range(2))
    return Split(f=f, g=g)


def seconds_a_step(samples: int, group: Any = None) -> float:
    """The least of several rounds: the difference of two runs, so that what is done once does not count."""
    data, x0 = _data(samples), torch.zeros(Q)
    algorithm, found = SOBA(0.1, 0.01), math.inf

    def run(steps: int) -> float:
        began = time.perf_counter()
        minimize(PROBLEM, x0, x0, algorithm=algorithm, data=data, max_steps=steps, group=group)
        return time.perf_counter() - began

    run(1)
    for _ in range(ROUNDS):
        short = run(2)
        found = min(found, (run(2 + STEPS) - short) / STEPS)
    return found


def seconds_a_message(floats: int, group: Any) -> float:
    """The least mean of several rounds of all-reduces."""
    message, found = torch.zeros(floats), math.inf
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(20):
            distributed.all_reduce(message, group=group)
        found = min(found, (time.perf_counter() - began) / 20)
    return found


def _worker() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    group, size = distributed.group.WORLD, distributed.get_world_size()
    found: dict[str, Any] = {"strong": seconds_a_step(SIZES[-1], group), "weak": seconds_a_step(SIZES[1] * size, group)}
    if size == 1:
        found["sizes"] = {samples: seconds_a_step(samples) for samples in SIZES}
        pairs = [(seconds_a_step(SIZES[0]), seconds_a_step(SIZES[0], group)) for _ in range(3)]
        found["alone"], found["group of one"] = (min(each) for each in zip(*pairs, strict=True))
    else:
        found["messages"] = {n: seconds_a_message(n, group) for n in (1, 1024, 2**17, 2**20)}
    if distributed.get_rank() == 0:
        print(json.dumps(found), flush=True)
    distributed.destroy_process_group()


def _measured(size: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, __file__, "--worker"]
    started = [
        subprocess.Popen(words, env={**own, "RANK": str(rank), "WORLD_SIZE": str(size)}, stdout=subprocess.PIPE)
        for rank in range(size)
    ]
    found: dict[str, Any] = json.loads(started[0].communicate()[0])
    for process in started[1:]:
        process.communicate()
    return found


def line(points: dict[Any, float]) -> tuple[float, float]:
    """The intercept and slope that are least off, relatively."""
    x, t = (torch.tensor([float(each) for each in side], dtype=torch.float64) for side in (points, points.values()))
    rows = torch.stack([torch.ones_like(x), x], 1) / t[:, None]
    a, b = torch.linalg.lstsq(rows, torch.ones_like(t)[:, None]).solution[:, 0].tolist()
    return max(a, 0.0), max(b, 0.0)


def model(samples: float, ranks: int, fixed: float, sample: float, latency: float, per_float: float) -> float:
    """T: seconds a step."""
    floats = 3 * Q + 1
    message = latency * math.ceil(math.log2(ranks)) + 2 * floats * (ranks - 1) / ranks * per_float if ranks > 1 else 0
    return fixed + sample * samples / ranks + message


def main() -> None:
    found = {size: _measured(size) for size in ((1, 2, 4) if "--four" in sys.argv else (1, 2))}
    one, two = found[1], found[2]
    fixed, sample = line(one["sizes"])
    latency, per_float = line(two["messages"])
    alone = one["alone"]
    print(f"a group of one: {one['group of one'] / alone - 1:+.1%} of {1e3 * alone:.2f} ms a step")
    print(f"fixed {1e3 * fixed:.2f} ms, {1e6 * sample:.3f} us a sample, latency {1e6 * latency:.0f} us", end="")
    print(f", {1e9 * per_float:.2f} ns a float")
    for kind in ("strong", "weak"):
        for size, each in found.items():
            samples = SIZES[-1] if kind == "strong" else SIZES[1] * size
            expected = model(samples, size, fixed, sample, latency, per_float)
            told = f"{1e3 * each[kind]:.2f} ms a step, by the model {1e3 * expected:.2f}"
            print(f"{kind}, {size} ranks, {samples} samples: {told}")
    for name, ranks, slow in (("8 ranks", 8, (latency, per_float)), ("10,000 devices", 10_000, WIRELESS)):
        for samples in (SIZES[-1], SIZES[-1] * ranks):
            step, before = (model(samples, count, fixed, sample, *slow) for count in (ranks, 1))
            share = model(samples, ranks, 0.0, 0.0, *slow) / step
            told = f"{1e3 * step:.1f} ms a step, {before / step:.1f} times as fast as one, messages {share:.0%}"
            print(f"predicted, {name}, {samples} samples: {told}")


if __name__ == "__main__":
    _worker() if "--worker" in sys.argv else main()
