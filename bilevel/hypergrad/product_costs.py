"""Whether a product H v is sooner done by a program, told from its graph: by a rule fitted to measurements.

Nothing is timed where it is asked, so that the same problem has the same products, and with them the same bits, on
every machine and at every call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import grad, total
from bilevel._flat import FlatProblem
from bilevel._numerics.graphs import ancestors

# Entries for each call, of products that programs are faster at. Of the twelve that were measured
# (`benchmarks/results/compiled_products.json`) those below took 0.12 to 0.67 of the eager time, those above 0.81 to 1.5
# in no order that the graph would tell: there it is matrix products that cost, and which kernel the BLAS has for them.
SMALL = 8192


@final
@dataclass(frozen=True)
class Work:
    """How much a product is, as far as the graph of grad_y g tells without running it.

    Attributes:
        calls: nodes of the graph: operations that eager torch calls one after the other.
        entries: of all the tensors that these operations are given and have kept, each counted once.
    """

    calls: int
    entries: int

    @property
    def is_small(self) -> bool:
        """Whether it is calls that cost, and a program, which makes few of them, is faster."""
        return 0 < self.entries <= SMALL * self.calls


def work_of(problem: FlatProblem, x: Tensor, y: Tensor) -> Work:
    """What a product takes, from one gradient with its graph, which nobody counts.

    Args:
        problem: in vectors.
        x: `(p,)`.
        y: `(*tasks, q)`.
    """
    with torch.enable_grad():
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        gradient = grad(total(problem.part_of_g(x, y)), y, create_graph=True)
    calls, entries, seen = 0, 0, set[int]()
    for node in ancestors(gradient.grad_fn):
        calls += 1
        entries += sum(math.prod(metadata.shape) for metadata in node._input_metadata)
        for name in dir(node):
            kept = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(kept, Tensor) and kept.layout is torch.strided and kept.data_ptr() not in seen:
                seen.add(kept.data_ptr())
                entries += kept.numel()
    return Work(calls, entries)
