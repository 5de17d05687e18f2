"""Products with second derivatives of a negative evidence bound, its divergence in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization, grad
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractPreconditioner, LinearOperator
from bilevel._numerics.second_derivatives import explained
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, FINITE, demand_ranges
from bilevel.problems._variational import rows

Form: TypeAlias = Literal["autograd", "substituted"]


@final
@dataclass(frozen=True)
class KLDiagonal(AbstractPreconditioner):
    """M = the diagonal that the owner of A knows: with `KLProducts`, w (1/d, 1/2).

    That is the divergence's Hessian (1/d, 1/(2 d_t^2)) in mean and variance, in units of l_t = log d_t. Prior variances
    span orders of magnitude, and the first block with them; the second is the whole of A at y* for linear models, whose
    expected loss is linear in d_t. Cost: n flops a step.

    Raises:
        ValueError: from `build`, if the operator comes without a diagonal.

    Example:
        >>> A = LinearOperator(
        ...     lambda v: 2 * v, size=1, positive_definite=True, diagonal=torch.tensor([2.0])
        ... )
        >>> KLDiagonal().build(A, torch.zeros(1))(torch.ones(1))
        tensor([0.5000])
    """

    def build(self, operator: LinearOperator, like: Tensor) -> Callable[[Tensor], Tensor]:
        if (diagonal := operator.known_diagonal) is None:
            raise ValueError(
                "`KLDiagonal` needs an operator that comes with a diagonal. Got one without."
                " Use `AID(products=KLProducts(...))`, or `Jacobi()`, which estimates it."
            )
        inverse = diagonal.reciprocal()
        return lambda r: inverse * r


@final
@dataclass(frozen=True, eq=False)
class KLProducts(AbstractProducts):
    """Second derivatives of g = E_q[loss] + w KL(q || p), those of the divergence in closed form.

    With x = (m, l), y = (m_t, l_t), d = exp l, r = exp(l_t - l),

        H = grad^2 E + w diag(1/d, r/2),    G v = -w (v_m / d,  (m_t - m) v_m / d + r v_l / 2),

    G being d2g/dxdy, summed over the tasks. That is the form "autograd": the derivatives of g where y is, however far
    from y*. At y*, where grad_y g = 0, s = grad E tells r and m_t - m. The form "substituted" puts it in their place,
    in the derivatives with respect to the variance d_t: 1/d_t is replaced by 1/d + 2 s_l / (w d_t), and
    w (m_t - m) / d by -s_m. In l_t, in which y is given, this reads

        H = grad^2 E - diag(0, s_l) + w diag(1/d, (r + 2 s_l / w)^2 / 2),    G v = (-w v_m / d,  s_m v_m - w r v_l / 2).

    At y* both are the same. Elsewhere they differ by O(|y - y*|); the second is the better one near y*, and often the
    worse one further away, where its H may be indefinite.

    Cost: that of `Exact`; only the expected loss is differentiated twice, also with respect to x (features of a shared
    body).

    Source: Zhang, Li, Gao, Giannakis, "Scalable Bayesian meta-learning through generalized implicit gradients",
    AAAI 2023; the weight w and the derivatives in l are worked out here.

    Args:
        expectation: (x, y, task) -> E_q[loss], g without its divergence; (z, y, task) where there is an `encode`.
        weight: w.
        form: "autograd" or "substituted".
        log_variance: that of the prior, and of the posterior too, where it is fixed: x and y then are means alone.

    Raises:
        ValueError: if the weight is not positive, or the form is not known.

    Example:
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.problems._variational import divergence
        >>> from bilevel.solvers import CG, LBFGS
        >>> def expectation(x, y, task):
        ...     return ((y["mean"] - task["t"]).square() + y["log_variance"].exp()).sum() / 2
        >>> def g(x, y, task):
        ...     return expectation(x, y, task) + 0.5 * divergence(x, y)
        >>> problem = BilevelProblem(lambda x, y, task: y["mean"].sum(), g, tasks=True)
        >>> aid = AID(
        ...     LBFGS(1e-6),
        ...     CG(preconditioner=KLDiagonal()),
        ...     products=KLProducts(expectation, weight=0.5),
        ... )
        >>> prior = {"mean": torch.zeros(1), "log_variance": torch.zeros(1)}
        >>> hypergradient(problem, prior, prior, estimator=aid, data={"t": torch.ones(4, 1)}).grad[
        ...     "mean"
        ... ]
        tensor([0.3333])
    """

    expectation: Callable[..., Tensor]
    weight: float
    form: Form = "autograd"
    log_variance: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, weight=AT_LEAST_0, log_variance=FINITE)
        if not self.weight > 0:
            raise ValueError(
                f"`KLProducts(weight=...)` must be positive. Got {self.weight}. Without a prior y does not depend on x."
            )
        if self.form not in get_args(Form):
            raise ValueError(f"`KLProducts(form=...)` must be one of {', '.join(get_args(Form))}. Got {self.form!r}.")

    def linearize(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Linearization:
        tally, count = problem.tally, y.shape[:-1].numel()
        tally.gradients += count
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()

            def expected(x: Tree, y: Tensor, *data: Any) -> Tensor:
                return self.expectation(x, problem.y.unravel(y), *data).reshape(())

            s = grad(problem.map(expected, "g", x, y).sum(), y, create_graph=True)
            posterior = self._blocks(problem.y.unravel(y), y.dim() - 1)
            own = problem.is_encoded and problem.tasks is not None  # each task has its own copy of the prior
            prior = self._blocks(problem.x.unravel(x.reshape(problem.tasks or 1, -1) if own else x), int(own))
            prior = [block.expand_as(posterior[0]) for block in prior]
        kl = self._divergence(
            [block.detach() for block in prior],
            [block.detach() for block in posterior],
            self._blocks(problem.y.unravel(s.detach()), y.dim() - 1),
        )

        def pull(leaves: Sequence[Tensor], v: Tensor) -> tuple[Tensor, ...]:
            """(H v, G v), or one of them: the closed forms enter as what m_t, l_t, m and l are pulled back with."""
            parts = self._blocks(problem.y.unravel(v), y.dim() - 1)
            outputs = [*posterior, *prior]
            vectors = [*(c * part for c, part in zip(kl.curvatures, parts, strict=True)), *kl.cross(parts)]
            if s.requires_grad:
                outputs, vectors = [*outputs, s], [*vectors, v]
            with explained():
                return torch.autograd.grad(
                    outputs, leaves, vectors, retain_graph=True, allow_unused=True, materialize_grads=True
                )

        def place(blocks: Sequence[Tensor]) -> Tensor:
            return torch.autograd.grad(posterior, y, blocks, retain_graph=True)[0]

        def mv(v: Tensor) -> Tensor:
            tally.hvps += count
            return pull((y,), v)[0]

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            tally.hvps += count
            tally.cross_products += count
            hv, gv = pull((y, x), v)
            return hv, gv

        def cross_alone(v: Tensor) -> Tensor | None:
            tally.cross_products += count
            return pull((x,), v)[0]

        return Linearization(
            y.detach(),
            s.detach() + place(kl.gradient),
            mv,
            products,
            cross_alone,
            operator=LinearOperator(mv, y.shape[-1], positive_definite=True, diagonal=place(kl.diagonal)),
            start_in_x=problem.problem.init is not None,
        )

    def _blocks(self, tree: Mapping[str, Tree], batch: int) -> list[Tensor]:
        """The mean and, unless it is fixed, the log-variance, as rows `(*batch, n)`."""
        keys = ("mean", "log_variance") if self.log_variance is None else ("mean",)
        return [rows(tree[key], batch) for key in keys]

    def _divergence(self, prior: Sequence[Tensor], posterior: Sequence[Tensor], s: Sequence[Tensor]) -> _Divergence:
        w = self.weight
        if self.log_variance is not None:
            precision = torch.full_like(prior[0], w * math.exp(-self.log_variance))
            gradient = [precision * (posterior[0] - prior[0])]
            return _Divergence(gradient, [precision], [precision], lambda v: [-precision * v[0]])
        (m, log_d), (m_t, log_dt) = prior, posterior
        precision, r = w * (-log_d).exp(), (log_dt - log_d).exp()
        pull, curvature = precision * (m_t - m), w * r / 2
        mixed, bent = pull, curvature
        if self.form == "substituted":
            mixed, bent = -s[0], w * (r + 2 * s[1] / w).square() / 2 - s[1]
        return _Divergence(
            gradient=[pull, w * (r - 1) / 2],
            diagonal=[precision, torch.full_like(r, w / 2)],
            curvatures=[precision, bent],
            cross=lambda v: [-precision * v[0], -mixed * v[0] - curvature * v[1]],
        )


@final
@dataclass(frozen=True, eq=False)
class _Divergence:
    """Derivatives of w KL at a point, by blocks of rows: mean, log-variance.

    Attributes:
        gradient: in y.
        diagonal: of its Hessian in the variance d_t, in units of l_t: all positive.
        curvatures: the same in the form asked for.
        cross: v -> G v of each task, by blocks of x.
    """

    gradient: list[Tensor]
    diagonal: list[Tensor]
    curvatures: list[Tensor]
    cross: Callable[[Sequence[Tensor]], list[Tensor]]
