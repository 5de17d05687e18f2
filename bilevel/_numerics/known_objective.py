"""Objectives that know their own derivatives: what such a g declares, and nothing that calls it."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bilevel.portable.pickling import AbstractPortable

if TYPE_CHECKING:
    from bilevel._tree import Tree


class AbstractKnownObjective(AbstractPortable, abc.ABC):
    """g(x, y) = G(c(x), y) with a G that is linear in c: a function like any other, and its derivatives in y.

    As g of a problem it is called like any g, and differentiated by autograd wherever somebody asks for what is not
    here. Where a gradient in y, Hessian products, cross products or a diagonal are asked for, the formulas below are
    taken instead. Estimators and solvers see no difference but in time, and oracle calls are counted as always: an
    expansion is a gradient.

    Since G is linear in its coefficients c, such as weights of samples and penalties, G v = (dc/dx)' s(v) with
    s_k(v) = d(grad_y g' v) / dc_k, which the formulas give; the chain rule through c(x) is autograd's.

    Formulas are evaluated without a graph, and by `torch.vmap` where tasks or several x are side by side: they must be
    functions of their arguments alone, in operations that it takes. `y`, `v` and gradients are in the structure of y.
    """

    @property
    def is_smooth(self) -> bool:
        """Whether g has all derivatives in y everywhere. False unless it says so: kinks at y* are then looked for."""
        return False

    @abc.abstractmethod
    def __call__(self, x: Tree, y: Tree, *data: Any) -> Tensor:
        """g(x, y): a scalar, twice differentiable by autograd."""

    @abc.abstractmethod
    def coefficients(self, x: Tree, *data: Any) -> tuple[Tensor, ...]:
        """c(x), differentiable by autograd; at least one."""

    @abc.abstractmethod
    def value_and_gradient(self, c: tuple[Tensor, ...], y: Tree, *data: Any) -> tuple[Tensor, Tree]:
        """g and grad_y g."""

    @abc.abstractmethod
    def expand(self, c: tuple[Tensor, ...], y: Tree, *data: Any) -> tuple[Tensor, Tree, tuple[Tensor, ...]]:
        """g, grad_y g, and whatever products at this point need: curvatures, computed once."""

    @abc.abstractmethod
    def product(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tree, *data: Any) -> Tree:
        """H v, from what was kept."""

    @abc.abstractmethod
    def products(
        self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tree, *data: Any
    ) -> tuple[Tree, tuple[Tensor, ...]]:
        """H v, and s(v) in the shapes of c."""

    @abc.abstractmethod
    def slopes(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], v: Tree, *data: Any) -> tuple[Tensor, ...]:
        """s(v) alone."""

    @abc.abstractmethod
    def diagonal(self, c: tuple[Tensor, ...], kept: tuple[Tensor, ...], *data: Any) -> Tree:
        """The diagonal of H."""
