"""What a kind of inner problem declares of itself, as data."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bilevel._linear import ANY, OperatorProperties
from bilevel.portable.pickling import AbstractPortable
from bilevel.requirements.properties import Feature, Property


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
