"""Weights of training samples from the Trainer of Hugging Face: `python trainer_weights.py OUT`.

The Trainer trains; a callback owns the logits x of the weights sigmoid(x_i). Every few steps it lets `minimize` take
some steps of SAMA from the weights of the model as they are, on the samples and on clean text, keeps the x that come
out and throws the y away: the model is changed by the Trainer alone. The Trainer's loss multiplies each sample by its
weight. Needs `pip install "bilevel[huggingface]"`.
"""

import sys
from typing import Any

import torch
from lora_weights import CONTEXT, adapted, auc, losses, texts
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from bilevel import BilevelProblem, FiniteSum, Functional, Split, functional, minimize
from bilevel.algorithms import SAMA
from bilevel.solvers import Adam


class SampleWeights(TrainerCallback):
    """Learns a weight for each sample, `(n,)`, while a Trainer trains."""

    def __init__(self, train: Tensor, validation: Tensor, every: int = 5, steps: int = 5) -> None:
        self.x = torch.zeros(len(train))
        self.f, self.g = validation, (train, torch.arange(len(train)))
        self.every, self.steps = every, steps
        self.net: Functional | None = None

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """`Trainer(compute_loss_func=...)`: it is not told which samples these are, so labels[:, 0] tells.

        A causal model never predicts the first token, so that its label is free to hold the sample's number.
        """
        return (torch.sigmoid(self.x[labels[:, 0]]) * losses(outputs.logits, labels)).mean()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every:
            return
        net = self.net = self.net or functional(model)  # once: a copy, into which any weights can be put

        def f(_: Tensor, y: Any, tokens: Tensor) -> Tensor:
            return losses(net(y, input_ids=tokens).logits, tokens).mean()

        def g(x: Tensor, y: Any, batch: Any) -> Tensor:
            tokens, index = batch
            return (torch.sigmoid(x[index]) * losses(net(y, input_ids=tokens).logits, tokens)).mean()

        here = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        seed = state.global_step
        data = Split(f=FiniteSum(self.f, 16, seed=seed), g=FiniteSum(self.g, 24, seed=seed))
        algorithm = SAMA(Adam(1e-3), Adam(0.1))
        found = minimize(BilevelProblem(f, g), self.x, here, algorithm=algorithm, data=data, max_steps=self.steps)
        self.x = found.x


def main(out: str, seed: int = 0, steps: int = 100) -> float:
    train, bad, validation = texts(seed)
    labels = torch.cat([torch.arange(len(train))[:, None], train[:, 1:]], 1)  # the number, then what is predicted
    weights = SampleWeights(train, validation)
    trainer = Trainer(
        model=adapted(seed),
        args=TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=24, learning_rate=1e-3, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=seed,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": ids, "labels": own} for ids, own in zip(train, labels, strict=True)],
        compute_loss_func=weights.loss,
        callbacks=[weights],
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(out)
    found = auc(weights.x, bad)
    print(f"AUC of small weights on noise: {found:.3f}, windows of {CONTEXT} bytes")
    return found


if __name__ == "__main__":
    main(sys.argv[1])
