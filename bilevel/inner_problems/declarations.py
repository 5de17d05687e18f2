"""What a kind of inner problem declares of itself, as data."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel._linear import ANY, OperatorProperties
from bilevel.portable.pickling import AbstractPortable
from bilevel.requirements.properties import Feature, Property


@final
@dataclass(frozen=True, eq=False)
class Composition:
    """g(x, y) = loss(x, outputs(x, y)) + regularizer(x, y), in the user's structures; data come last.

    Attributes:
        outputs: (x, y) -> the outputs z, a tensor.
        loss: (x, z) -> a number, convex in z.
        regularizer: (x, y) -> a number, convex in y; None: none.
    """

    outputs: Callable[..., Tensor]
    loss: Callable[..., Tensor]
    regularizer: Callable[..., Tensor] | None = None

    def demand_callable(self, call: str) -> None:
        """Refuse parts that are no functions.

        Raises:
            TypeError: naming the argument of the call.
        """
        parts = (("outputs", self.outputs), ("loss", self.loss), ("regularizer", self.regularizer))
        for name, function in parts:
            if not callable(function) and not (name == "regularizer" and function is None):
                raise TypeError(f"`{call}({name}=...)` must be a function. Got {type(function).__name__}.")


class AbstractDeclaredKind(AbstractPortable, abc.ABC):
    """The declarations of a kind of inner problem, which a problem holds and requirements are compared with.

    Kinds are written as subclasses of `AbstractInnerProblem`, which adds what they build.
    """

    @property
    @abc.abstractmethod
    def offers(self) -> frozenset[Property]:
        """What it has; an estimator that requires more is refused."""

    @property
    @abc.abstractmethod
    def refusal(self) -> str:
        """What it is, for an estimator that requires more, and what to use instead: a sentence or two."""

    @property
    def without_symmetry(self) -> str:
        """Why (dF/dy)' may lack a declared property where it is formed: what is said to a solver that needs it."""
        return "the optimality condition of the inner problem lacks a property here."

    @property
    def g(self) -> Callable[..., Tensor] | None:
        """The smooth objective g(x, y), where there is one; it becomes that of the problem."""
        return None

    @property
    def composition(self) -> Composition | None:
        """The parts of g, where it is declared to be a loss of outputs; None: it is not."""
        return None

    @property
    def functions(self) -> Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]:
        """Functions of its own beside g, by name, with the names of their arguments; data come after these."""
        return {}

    @property
    def features(self) -> frozenset[Feature]:
        """What an inner solver must heed beyond a smooth objective."""
        return frozenset()

    @property
    def operator(self) -> OperatorProperties:
        """What is declared of (dF/dy)', which linear solvers demand."""
        return ANY

    @property
    def implicit(self) -> str:
        """The name of the estimator that differentiates F implicitly, which "implicit" stands for; empty: none does."""
        return ""
