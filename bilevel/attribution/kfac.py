"""Kronecker-factored curvature of a module, as a preconditioner; of the package curvlinops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from bilevel._linear import AbstractPreconditioner, LinearOperator
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges


@final
@dataclass(frozen=True, eq=False)
class KFAC(AbstractPreconditioner):
    """M = blockdiag(A_l (x) B_l) + damping I: K-FAC, a Kronecker product for each layer, inverted exactly.

    A_l is the second moment of the inputs of layer l, B_l that of the gradients at its outputs, which are taken from
    the Gauss-Newton matrix of the loss ("type-2" of curvlinops). For linear and convolutional layers; a module with
    other parameters is refused by curvlinops.

    Cost: two eigenvalue decompositions a layer and as many passes over the data as the loss has outputs, when it is
    made; two products with small matrices a layer at each step. No products with the operator.

    Source: Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015;
    Grosse et al., "Studying large language model generalization with influence functions", arXiv 2023, for influence.
    Computed by curvlinops (`pip install curvlinops-for-pytorch`), of which version 3.0.1 was tried, with torch 2.13.

    Args:
        module: with the parameters at which the system is solved, in the order of its named parameters:
            `net.load(params)` of `net = bilevel.functional(module)`.
        loss: `nn.CrossEntropyLoss()`, `nn.MSELoss()` or `nn.BCEWithLogitsLoss()`, with the mean over samples.
        data: batches of (inputs, targets), in a list.
        damping: of the system, with its l2: `l2 + damping`.

    Raises:
        ImportError: if curvlinops is missing: `pip install "bilevel[curvature]"`.
        ValueError: if the damping is not positive; from `build`, if the module has another number of parameters than
            the system.

    Example:
        >>> KFAC(nn.Linear(2, 1), nn.MSELoss(), [], damping=0.1).damping
        0.1
    """

    module: nn.Module
    loss: nn.MSELoss | nn.CrossEntropyLoss | nn.BCEWithLogitsLoss
    data: Iterable[tuple[Tensor, Tensor]]
    damping: float

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, damping=POSITIVE)

    def build(self, operator: LinearOperator, like: Tensor) -> Callable[[Tensor], Tensor]:
        try:
            from curvlinops import (  # pyright: ignore[reportMissingImports]
                KFACInverseLinearOperator,
                KFACLinearOperator,
            )
        except ImportError as error:
            raise ImportError(
                '`KFAC` needs the package curvlinops. Install it: `pip install "bilevel[curvature]"`.'
            ) from error
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        count = sum(p.numel() for p in parameters)
        if count != like.shape[-1]:
            raise ValueError(
                f"`KFAC(module=...)` must have the parameters of the system, {like.shape[-1]} of them. Got {count}."
            )
        factors = KFACLinearOperator(
            self.module, self.loss, parameters, self.data, fisher_type="type-2", check_deterministic=False
        )
        inverse = KFACInverseLinearOperator(factors, damping=self.damping, use_exact_damping=True)

        def apply(r: Tensor) -> Tensor:
            found: Tensor = inverse @ r if r.dim() == 1 else (inverse @ r.reshape(-1, count).T).T.reshape(r.shape)
            return found

        return apply
