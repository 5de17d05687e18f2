"""First-order algorithms on parameters of FSDP2 modules: the run of one process, whose y is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import on_ranks
from torch import Tensor, nn

from bilevel import BilevelProblem, FiniteDifferences, FiniteSum, Split, functional, hypergradient, minimize
from bilevel._tree import tree_leaves
from bilevel.algorithms import F2SA, SAMA, SOBA, ScaleBiO
from bilevel.ranks import Shard
from bilevel.solvers import Adam, Clipped

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

_gen = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_gen, dtype=torch.float64)


N, M = 9, 7
TRAIN, VAL = (_normal(N, 4), _normal(N, 2)), (_normal(M, 4), _normal(M, 2))
DATA = Split(f=FiniteSum(VAL, 3), g=FiniteSum(TRAIN, 4))  # blocks of unequal parts
X0 = torch.zeros(2, dtype=torch.float64)
ALGORITHMS: dict[str, Any] = {
    "f2sa-1": F2SA(0.1, 0.05, order=1),
    "f2sa-2": F2SA(Adam(0.01), 0.05, order=2, weight=50.0, inner_steps=2),
    "sama": SAMA(Adam(0.01), 0.05),
    "soba": SOBA(0.1, 0.05, products=FiniteDifferences()),
    "scalebio": ScaleBiO(0.01, 0.05),
}


def _network(name: str = "") -> nn.Sequential:
    """A network; for order 2, which needs a convex g, a linear one."""
    torch.manual_seed(0)
    if name == "f2sa-2":
        return nn.Sequential(nn.Linear(4, 2)).double()
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def _misfit(out: Tensor, data: Any) -> Tensor:
    found: Tensor = (out - data[1]).square().mean(0)
    return found


def _problem(net: Any) -> BilevelProblem:
    def f(x: Tensor, y: Any, data: Any) -> Tensor:
        return ((1 + x / 4) * _misfit(net(y, data[0]), data)).sum()  # else h begins as rounding, which AdamW scales

    def g(x: Tensor, y: Any, data: Any) -> Tensor:
        return (x.exp() * _misfit(net(y, data[0]), data)).sum()

    return BilevelProblem(f, g)


def _run(problem: BilevelProblem, y0: Any, name: str, group: Any = None, **more: Any) -> Any:
    given = {"algorithm": ALGORITHMS[name], "data": DATA, "max_steps": 4, "evaluate_every": 2, **more}
    return minimize(problem, X0, y0, group=group, **given)


def _alone(name: str) -> Any:
    net = functional(_network(name))
    return _run(_problem(net), net.params, name)


def _whole(leaf: Any) -> Tensor:
    found: Tensor = leaf.detach().full_tensor()
    return found


def _flat(y: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(y)])


def _fully_sharded(group: Any, name: str = "") -> nn.Sequential:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    module, mesh = _network(name), DeviceMesh.from_group(group, "cpu")
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def _sharded(group: Any, rank: int) -> dict[str, Any]:
    module, linear = _fully_sharded(group), _fully_sharded(group, "f2sa-2")
    params = dict(module.named_parameters())
    before = {name: _whole(param).clone() for name, param in params.items()}
    marks = {name: torch.full_like(param, 7.0) for name, param in params.items()}
    for name, param in params.items():
        param.grad = marks[name]
    problem = _problem(lambda y, inputs: module(inputs))
    found: dict[str, Any] = {}
    for name in ALGORITHMS:
        its = (problem, params)
        if name == "f2sa-2":
            its = (_problem(lambda y, inputs: linear(inputs)), dict(linear.named_parameters()))
        solution = _run(*its, name, group)
        y = {name: _whole(leaf) for name, leaf in solution.y.items()}
        norms = [record.grad_norm for record in solution.history]
        found[name] = solution.x, y, [record.value for record in solution.history], norms
    found["grads"] = all(param.grad is marks[name] for name, param in params.items())
    found["values"] = all(torch.equal(before[name], _whole(param)) for name, param in params.items())
    own = Split(f=Shard(tuple(part[rank::2] for part in VAL)), g=Shard(tuple(part[rank::2] for part in TRAIN)))
    found["shard"] = _run(problem, params, "f2sa-1", group, data=own, evaluate_every=None).x

    def raised(call: Any) -> tuple[str, str]:
        try:
            call()
        except Exception as error:
            return type(error).__name__, str(error)
        raise AssertionError

    options: dict[str, dict[str, Any]] = {
        "implicit": {"algorithm": None, "estimator": "aid-cg"},
        "exact": {"algorithm": SOBA(0.1, 0.05)},
        "open order": {"algorithm": F2SA(0.1, 0.05)},
        "norms": {"algorithm": F2SA(Clipped(Adam(0.01), 1.0), 0.05, order=1)},
        "sweep": {"sweep": {"outer_step": [0.1, 0.2]}},
    }
    for name, more in options.items():
        more = {"evaluate_every": None, **more}
        found[name] = raised(lambda more=more: _run(problem, params, "f2sa-1", group, **more))
    found["alone"] = raised(lambda: minimize(problem, X0, params, algorithm=F2SA(0.1, 0.05), data=DATA))
    found["hypergradient"] = raised(lambda: hypergradient(problem, X0, params, data=own, group=group))

    from bilevel.ranks.sharded import shards_of

    shards = shards_of("minimize", params, type("R", (), {"size": 2})())
    assert shards is not None
    moved = [part + 0.1 for part in tree_leaves(shards.local())]
    x, batch = X0, VAL
    here = problem.f(x, params, batch)
    with shards.at(moved):
        there = problem.f(x, params, batch)
    of_parts = shards.problem(problem).f(x, dict(zip(params, moved, strict=True)), batch)
    found["perturbed"] = here.item(), there.item(), of_parts.item()
    return found


def test_first_order_algorithms_on_shared_out_parameters_are_those_of_whole_ones_and_others_are_refused() -> None:
    first, second = on_ranks(2, _sharded)
    for found in (first, second):
        if isinstance(found, Exception):
            raise found
    for name in ALGORITHMS:
        alone = _alone(name)
        x, y, values, norms = first[name]
        tolerance = 1e-7 if name in ("soba", "sama") else 1e-11  # differences: rounding over their step
        assert torch.equal(x, second[name][0]) and values == second[name][2], name
        assert torch.allclose(x, alone.x, rtol=0, atol=tolerance), (name, x, alone.x)
        assert torch.allclose(_flat(y), _flat(alone.y), rtol=0, atol=tolerance), name
        assert values == pytest.approx([record.value for record in alone.history], abs=tolerance), name
        assert norms == second[name][3], name
        assert float((x - X0).abs().max()) > 1e-4
    net = functional(_network())
    whole = _run(_problem(net), net.params, "f2sa-1", data=Split(f=VAL, g=TRAIN), evaluate_every=None)
    for found in (first, second):
        assert found["grads"] and found["values"]
        assert torch.allclose(found["shard"], whole.x, rtol=0, atol=1e-12)
        here, there, of_parts = found["perturbed"]
        assert abs(there - here) > 1e-3 and of_parts == there
        for name, text in (
            ("implicit", "gradients by `backward()` alone"),
            ("exact", "asks for second derivatives"),
            ("open order", "Pass `order=1`"),
            ("norms", "norms and products of all of y"),
            ("sweep", "Call `minimize` for each setting"),
            ("alone", "`group=`"),
        ):
            assert found[name][0] == "ValueError" and text in found[name][1], (name, found[name])
        assert found["hypergradient"][0] == "TypeError" and "DTensor" in found["hypergradient"][1]


def _resumable(group: Any, rank: int, folder: Path, steps: dict[str, int], name: str) -> dict[str, Any]:
    """Runs of some algorithms with a checkpoint, up to so many steps, from where the file is if there is one."""
    ranks = torch.distributed.get_world_size(group)
    found: dict[str, Any] = {}
    for each, most in steps.items():
        module = _fully_sharded(group, each)
        path = folder / f"{each}-{name}"
        more: dict[str, Any] = {"max_steps": most, "checkpoint": path, "checkpoint_every": 2, "resume": path.exists()}
        solution = _run(
            _problem(lambda y, inputs, net=module: net(inputs)), dict(module.named_parameters()), each, group, **more
        )
        y, best = ({name: _whole(leaf) for name, leaf in tree.items()} for tree in (solution.y, solution.best.y))
        found[each] = solution.x, _flat(y), _flat(best), [record.value for record in solution.history], ranks
    return found


def _stopped(group: Any, rank: int) -> tuple[str, bool, bool]:
    """What an error in a callback keeps: a y that is shared out as the parameters are."""
    from torch.distributed.tensor import DTensor

    module = _fully_sharded(group)
    params = dict(module.named_parameters())

    def callback(record: Any, estimate: Any) -> None:
        if record.step == 2:
            raise RuntimeError("on the way")

    try:
        _run(_problem(lambda y, inputs: module(inputs)), params, "f2sa-1", group, callback=callback)
    except Exception as error:
        partial: Any = getattr(error, "partial", None)
        kinds = all(isinstance(leaf, DTensor) for leaf in (*partial.y.values(), *partial.best.y.values()))
        return str(error), kinds, all(leaf.shape == params[name].shape for name, leaf in partial.y.items())
    raise AssertionError


RESUMED = ["f2sa-1", "f2sa-2", "soba"]  # plain steps, Adam's, and those of a vector v
STEPS, HALF = dict.fromkeys(RESUMED, 6), dict.fromkeys(RESUMED, 3)


def test_checkpoints_of_shared_out_parameters_resume_bit_for_bit_and_on_other_ranks(tmp_path: Path) -> None:
    def on(size: int, steps: dict[str, int], name: str) -> dict[str, Any]:
        every = on_ranks(size, lambda group, rank: _resumable(group, rank, tmp_path, steps, name))
        for found in every:
            if isinstance(found, Exception):
                raise found
        return dict(every[0])

    undisturbed = on(2, STEPS, "whole")
    on(2, HALF, "two")
    files = {each: torch.load(tmp_path / f"{each}-two", weights_only=True) for each in RESUMED}
    again = on(2, STEPS, "two")
    on(2, HALF, "one")
    alone = on(1, STEPS, "one")
    for each in RESUMED:
        x, y, best, values, _ = undisturbed[each]
        assert files[each]["y"].shape == y.shape  # the file holds all of y
        assert torch.equal(again[each][0], x) and torch.equal(again[each][1], y), each
        assert torch.equal(again[each][2], best) and again[each][3] == values, each
        tolerance = 1e-6 if each == "soba" else 1e-11
        assert alone[each][4] == 1
        assert torch.allclose(alone[each][0], x, rtol=0, atol=tolerance), each
        assert torch.allclose(alone[each][1], y, rtol=0, atol=tolerance), each
        assert not torch.equal(y, torch.zeros_like(y)) and len(values) == len(alone[each][3])


def test_what_an_error_keeps_is_shared_out_as_the_parameters_are() -> None:
    first, second = on_ranks(2, _stopped)
    assert first == ("on the way", True, True), first
    assert second[0].startswith("rank 0 has been ended") and second[1:] == (True, True), second


def _as_long(group: Any, rank: int, path: Path) -> str:
    """x with as many entries as rank 0 has of y."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    module = nn.Linear(2, 2, bias=False).double()
    fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"))
    params = dict(module.named_parameters())
    data = FiniteSum((torch.ones(2, 2, dtype=torch.float64),), 2)
    problem = BilevelProblem(
        lambda x, y, data: x.sum() + module(data[0]).mean(),
        lambda x, y, data: module(data[0]).square().mean() * x.exp().sum(),
    )
    its: dict[str, Any] = {"algorithm": ALGORITHMS["f2sa-1"], "data": Split(f=data, g=data), "max_steps": 1}
    try:
        minimize(problem, X0, params, group=group, checkpoint=path, **its)
    except ValueError as error:
        return str(error)
    raise AssertionError


def test_an_x_that_could_be_taken_for_a_part_of_y_is_refused(tmp_path: Path) -> None:
    for text in on_ranks(2, lambda group, rank: _as_long(group, rank, tmp_path / "file")):
        assert "`minimize(checkpoint=...)` tells x from parts of y" in text and not (tmp_path / "file").exists()
