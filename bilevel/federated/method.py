"""What a federated method is."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.federated.server import Server


class At(NamedTuple):
    """Where a method is.

    Attributes:
        x: `(p,)`.
        y: `(q,)`.
        v: `(q,)`; of methods without a linear iterate what their latest step has made.
        h: what x was moved along; zero before the first step.
    """

    x: Tensor
    y: Tensor
    v: Tensor
    h: Tensor


class AbstractMethod(abc.ABC):
    """An outer step as a sequence of rounds."""

    @abc.abstractmethod
    def step(self, server: Server, at: At, number: int) -> At:
        """The point after outer step `number`; rounds are asked of the server."""

    @property
    def is_random(self) -> bool:
        """Whether h depends on draws of the method's own, whoever answers. No, unless said."""
        return False

    @abc.abstractmethod
    def arrival(self, at: At, then: At) -> Tensor:
        """A norm `()` that is zero where a step moves nothing: of h, and of the directions that y and v have gone."""

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings by name."""
        return dict(vars(self))
