"""Models of `transformers` with adapters of `peft`, built from a configuration: as functions, weighted, saved."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bilevel import ITD, BilevelProblem, functional, hypergradient  # noqa: E402
from bilevel.solvers import GradientDescent, Iterate  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.exists(), reason="an installed package comes without its documentation"),
    pytest.mark.filterwarnings("ignore"),  # of the two packages, about each other
]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports an example by name, as if run from its folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in ("lora_weights", "trainer_weights"):
        sys.modules.pop(name, None)


def test_adapters_and_the_head_are_the_parameters_and_dropout_in_them_is_fixed(examples: Any) -> None:
    net = functional(examples("lora_weights").adapted(0, n_embd=16))
    kinds = {name.rpartition("c_attn.")[2].split(".")[0] for name in net.params}
    assert {"lora_A", "lora_B"} < kinds
    assert sum("lm_head.modules_to_save" in name for name in net.params) == 1
    tokens = torch.arange(12).view(2, 6)
    moved = {name: p + 0.1 for name, p in net.params.items()}
    assert torch.equal(net(moved, input_ids=tokens).logits, net(moved, input_ids=tokens).logits)
    other = functional(examples("lora_weights").adapted(0, n_embd=16), seed=1)
    assert not torch.equal(other(moved, input_ids=tokens).logits, net(moved, input_ids=tokens).logits)


def test_a_head_tied_to_the_embedding_is_one_parameter(examples: Any) -> None:
    from transformers import GPT2LMHeadModel  # pyright: ignore[reportMissingImports]

    example = examples("lora_weights")
    config = example.adapted(0, n_embd=16, tie_word_embeddings=True).config
    net = functional(GPT2LMHeadModel(config))
    assert sum(p.shape == (256, 16) for p in net.params.values()) == 1
    exported: Any = net.load(net.params)
    assert exported.lm_head.weight is exported.transformer.wte.weight


def test_with_attention_written_out_second_derivatives_are_those_of_differences(examples: Any) -> None:
    example = examples("lora_weights")
    module = example.adapted(0, n_embd=16, attn_implementation="eager").double()
    net, tokens = functional(module), torch.arange(24).view(3, 8) % 7
    start = {name: p + 0.05 for name, p in net.params.items()}  # lora_B begins at zero

    def f(x: Any, y: Any) -> Any:
        return example.losses(net(y, input_ids=tokens).logits, tokens).mean()

    def step(x: Any, y: Any) -> Any:
        loss = (x.sigmoid() * example.losses(net(y, input_ids=tokens).logits, tokens)).mean()
        return loss + sum(p.square().sum() for p in y.values())

    x, itd = torch.zeros(3, dtype=torch.float64), ITD(Iterate(GradientDescent(0.1), max_steps=2))
    problem = BilevelProblem(f, step)
    h = hypergradient(problem, x, start, estimator=itd).grad
    for k in range(3):
        e = 1e-4 * torch.eye(3, dtype=torch.float64)[k]
        up, down = (hypergradient(problem, x + s * e, start, estimator=itd).value for s in (1, -1))
        assert (up - down) / 2e-4 == pytest.approx(float(h[k]), rel=1e-5)


@pytest.mark.slow
def test_noise_gets_the_smaller_weights_and_what_was_trained_is_saved(examples: Any, tmp_path: Path) -> None:
    example = examples("lora_weights")
    assert example.main(str(tmp_path)) > 0.9
    from transformers import GPT2LMHeadModel  # pyright: ignore[reportMissingImports]

    base = GPT2LMHeadModel(example.adapted(0).get_base_model().config)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path))
    names = {name for name, _ in again.named_parameters() if "lora_B" in name}
    assert names
    assert all(float(p.abs().max()) > 0 for name, p in again.named_parameters() if name in names)


@pytest.mark.slow
def test_a_callback_of_the_trainer_finds_noise_as_well(examples: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    assert examples("trainer_weights").main(str(tmp_path)) > 0.9
    assert (tmp_path / "adapter_model.safetensors").exists()
