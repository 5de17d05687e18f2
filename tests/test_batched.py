"""The light forms of torch's vmap and functional call agree with torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import functional
from bilevel._numerics import batched as _batched
from bilevel._numerics.batched import batched
from bilevel.modules.module_call import Slots


def several(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a @ b, (a + b).logsumexp(-1), torch.ones(2, 3)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0)])
def test_it_is_vmap(in_dims: tuple[int | None, int | None]) -> None:
    torch.manual_seed(0)
    a = torch.randn({0: (4, 3), None: (3,), 1: (3, 4)}[in_dims[0]])
    b = torch.randn((4, 3) if in_dims[1] == 0 else (3,))
    expected = torch.vmap(several, in_dims=in_dims)(a, b)
    for found, other in zip(batched(several, 4, in_dims)(a, b), expected, strict=True):
        assert torch.equal(found, other)


def test_it_nests_and_is_differentiable() -> None:
    a, b = torch.randn(2, 5, 3, requires_grad=True), torch.randn(5, 3)

    def inside(wrap: Callable[..., Any]) -> Tensor:
        one = wrap(lambda a, b: (a * b).sin().sum(), 5, (0, 0))
        value: Tensor = wrap(one, 2, (0, None))(a, b)
        return value

    ours = inside(batched)
    theirs = inside(lambda function, _, in_dims: torch.vmap(function, in_dims=in_dims))
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(ours)
    assert torch.equal(torch.autograd.grad(ours, a, weights)[0], torch.autograd.grad(theirs, a, weights)[0])


def test_an_error_leaves_no_level_behind() -> None:
    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        batched(fails, 3, (0,))(torch.ones(3))
    assert torch.equal(batched(torch.sin, 3, (0,))(torch.ones(3)), torch.ones(3).sin())


def test_without_the_primitives_it_calls_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_batched, "_primitives", lambda: None)
    assert torch.equal(batched(torch.sin, 3, (0,))(torch.arange(3.0)), torch.arange(3.0).sin())


class Scaled(nn.Linear):
    """A layer whose forward anybody may have written."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    return {
        "plain": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        "tied": tied,
        "buffers": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval()),
        "parametrized": nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Tanh()),
        "subclass": Scaled(3, 2),
    }


@pytest.mark.parametrize("name", modules())
def test_a_call_with_other_parameters_is_torchs_functional_call(name: str) -> None:
    module = modules()[name]
    kept = {key: value.clone() for key, value in module.state_dict().items()}
    params = {key: torch.randn_like(p) for key, p in module.named_parameters()}
    X = torch.randn(5, 3)
    expected = torch.func.functional_call(module, params, (X,))
    assert torch.equal(Slots(module).call(params, (X,), {}), expected)
    assert all(torch.equal(value, kept[key]) for key, value in module.state_dict().items())


def test_recurrent_layers_take_other_parameters_too() -> None:
    """They keep references of their own to their weights."""
    module = nn.GRU(3, 2)
    params = {key: torch.randn_like(p) for key, p in module.named_parameters()}
    X = torch.randn(4, 1, 3)
    expected = torch.func.functional_call(module, params, (X,))[0]
    assert torch.equal(Slots(module).call(params, (X,), {})[0], expected)


def test_an_error_inside_gives_the_parameters_back() -> None:
    module = nn.Linear(3, 2)
    own = module.weight
    with pytest.raises(RuntimeError):
        Slots(module).call({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, (torch.ones(1, 3),), {})
    assert module.weight is own


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Sequential(nn.Linear(1, 1), nn.ReLU()), True),
        (nn.Sequential(nn.Linear(1, 1), nn.Dropout()), False),
        (Scaled(1, 1), False),
        (nn.Sequential(nn.Linear(1, 1), nn.FractionalMaxPool2d(2, output_size=1)), False),
    ],
)
def test_only_what_is_known_to_draw_nothing_runs_without_a_fixed_seed(module: nn.Module, expected: bool) -> None:
    assert Slots(module).is_deterministic is expected


def test_a_hook_may_draw() -> None:
    layer = nn.Linear(1, 1)

    def noisy(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output + torch.randn(())

    layer.register_forward_hook(noisy)
    assert not Slots(layer).is_deterministic
    net = functional(layer)
    assert torch.equal(net(net.params, torch.ones(1, 1)), net(net.params, torch.ones(1, 1)))
