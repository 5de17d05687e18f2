"""A decoder-only transformer over bytes, in plain torch."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from bilevel._numerics.batched import RANDOM
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import SEED, SIZE

BYTES = 256


@checked(width=SIZE, depth=SIZE, heads=SIZE, context=SIZE, seed=SEED)
def byte_gpt(*, width: int = 200, depth: int = 2, heads: int = 4, context: int = 32, seed: int = 0) -> ByteGPT:
    """Bytes `(n, t)`, t <= context, to the logits `(n, t, 256)` of the byte that follows each of them.

    Layer normalization before attention and before a hidden layer of 4 `width` GELU units, `depth` times; learned
    positions; the weights of the embedding are those of the output too. Attention is written out, as the fused one has
    no second derivative on most devices. About 12 depth width^2 + 256 width parameters: a million by default. It draws
    no random number and has no buffers that change: a function of its parameters.

    Args:
        width: of the residual stream; a multiple of `heads`.
        depth: how many blocks.
        heads: of attention.
        context: the longest input.
        seed: of the weights (normal of deviation 0.02, less where blocks add up); the global generator is left alone.

    Raises:
        ValueError: if a number is not positive, or `width` no multiple of `heads`.

    Example:
        >>> net = byte_gpt(width=8, depth=1, heads=2, context=5)
        >>> net(torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 256])
        >>> sum(p.numel() for p in byte_gpt().parameters())
        1023200
    """
    if width % heads:
        raise ValueError(f"`byte_gpt(width=...)` must be a multiple of heads={heads}. Got {width}.")
    with RANDOM, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = ByteGPT(width, depth, heads, context)
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if weight.dim() == 2:
                    adds = name.endswith(("project.weight", "shrink.weight"))  # to the residual stream
                    weight.normal_(0.0, 0.02 / math.sqrt(2 * depth) if adds else 0.02)
                elif name.endswith("bias"):
                    weight.zero_()
        return net


@final
class ByteGPT(nn.Module):
    """What `byte_gpt` makes."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        nn.Module.__init__(self)
        self.token = nn.Embedding(BYTES, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def features(self, tokens: Tensor) -> Tensor:
        """What the last layer is linear in: `(n, t, width)`."""
        h: Tensor = self.token(tokens) + self.place.weight[: tokens.shape[-1]]
        normed: Tensor = self.norm(self.blocks(h))
        return normed

    def forward(self, tokens: Tensor) -> Tensor:
        return linear(self.features(tokens), self.token.weight)


@final
class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        nn.Module.__init__(self)
        self.heads = heads
        self.before_attention, self.before_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.project(self._attention(self.attend(self.before_attention(h))))
        shrunk: Tensor = self.shrink(gelu(self.grow(self.before_hidden(h))))
        return h + shrunk

    def _attention(self, joint: Tensor) -> Tensor:
        n, t, _ = joint.shape
        query, key, value = joint.view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        later = torch.ones(t, t, dtype=torch.bool, device=joint.device).triu(1)
        mixed: Tensor = scores.masked_fill(later, -math.inf).softmax(-1) @ value
        return mixed.transpose(1, 2).reshape(n, t, -1)
