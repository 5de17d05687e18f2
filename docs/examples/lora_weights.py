"""Weights of training samples for LoRA adapters and the head of a language model: `python lora_weights.py OUT`.

The model is built from a configuration, without a download. A third of the training texts is replaced by noise; every
sample has a weight sigmoid(x_i), and f is the loss on clean text. Prints how well small weights find the noise (AUC),
and saves the trained adapters in OUT. Needs `pip install "bilevel[huggingface]"`.
"""

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from bilevel import BilevelProblem, FiniteSum, Split, functional, minimize
from bilevel.algorithms import SAMA
from bilevel.problems import python_texts
from bilevel.solvers import Adam

CLEAN, NOISE, CONTEXT = 64, 32, 32


def texts(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training samples `(n, CONTEXT)`, which of them are noise, and clean ones for validation."""
    generator = torch.Generator().manual_seed(seed)
    text = python_texts()["help"].long()
    begins = torch.randint(len(text) - CONTEXT, (2 * CLEAN, 1), generator=generator)
    clean = text[begins + torch.arange(CONTEXT)]
    noise = torch.randint(256, (NOISE, CONTEXT), generator=generator)
    return torch.cat([clean[:CLEAN], noise]), torch.arange(CLEAN + NOISE) >= CLEAN, clean[CLEAN:]


def adapted(seed: int, **settings: Any) -> Any:
    """A small GPT-2 whose adapters and head are to be trained; the rest is constant."""
    torch.manual_seed(seed)
    size = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 2}
    quiet = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    base = GPT2LMHeadModel(GPT2Config(**(size | quiet | settings)))
    lora = LoraConfig(
        r=8, lora_dropout=0.1, target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True
    )
    return get_peft_model(base, lora).train()


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of each sample `(n,)`."""
    return cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def auc(score: Tensor, bad: Tensor) -> float:
    """The share of pairs (bad, good) whose bad one has the smaller score."""
    return float((score[bad][:, None] < score[~bad]).float().mean())


def main(out: str, seed: int = 0, steps: int = 100) -> float:
    train, bad, validation = texts(seed)
    net = functional(adapted(seed))

    def f(_: Tensor, y: Any, tokens: Tensor) -> Tensor:
        return losses(net(y, input_ids=tokens).logits, tokens).mean()

    def g(x: Tensor, y: Any, batch: Any) -> Tensor:
        tokens, index = batch
        return (torch.sigmoid(x[index]) * losses(net(y, input_ids=tokens).logits, tokens)).mean()

    data = Split(f=FiniteSum(validation, 16), g=FiniteSum((train, torch.arange(len(train))), 24))
    algorithm = SAMA(Adam(1e-3), Adam(0.1))  # first derivatives only: any attention will do
    solution = minimize(
        BilevelProblem(f, g), torch.zeros(len(train)), net.params, algorithm=algorithm, data=data, max_steps=steps
    )
    net.load(solution.y).save_pretrained(out)
    found = auc(solution.x, bad)
    print(f"AUC of small weights on noise: {found:.3f}")
    return found


if __name__ == "__main__":
    main(sys.argv[1])
