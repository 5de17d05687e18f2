"""Influence of training samples: one hypergradient in their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver, LinearOperator
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.transforms import demand_autograd
from bilevel._problem import BilevelProblem
from bilevel._result import BilevelError, Report, Status, Tally
from bilevel._tree import Structure, Tree, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, SIZE
from bilevel.attribution.samples import Samples
from bilevel.attribution.scores import Influence
from bilevel.solvers.cg import CG

_CORRECTED = CG(rtol=0.1)  # a digit of the error is enough


@checked(l2=AT_LEAST_0, damping=AT_LEAST_0, block=SIZE, tol=AT_LEAST_0, mu=POSITIVE)
def influence(
    loss: Callable[[Any, Any], Tensor],
    params: Tree,
    train: Any,
    test: Any,
    *,
    l2: float = 0.0,
    damping: float = 0.0,
    solver: AbstractLinearSolver = CG(),
    products: AbstractProducts = Exact(),
    per_test: bool = False,
    block: int = 16,
    tol: float = 0.1,
    certify: bool = False,
    mu: float | None = None,
    throw: bool = True,
) -> Influence:
    """score_i = grad loss_i' v / n with (H + damping I) v = grad Phi: to first order Phi(without i) - Phi.

    Phi(w) is the mean of the test losses at y(w) = argmin_y g(w, y), the training objective with a weight for each
    sample, g(w, y) = (1/n) sum_i w_i loss_i(y) + l2/2 |y|^2, of Hessian H at w = 1, and `params` is y(1). So the scores
    are minus the hypergradient in the weights, dPhi/dw_i = -grad loss_i' H^-1 grad Phi / n. "Without i" means w_i = 0
    while n stays: the mean over those that are left, with l2 n / (n - 1).

    What is exact and what is not: `Influence.errors` and `bound` are about the linear system. The first order itself
    misses terms of the order of the sample's leverage grad loss_i' H^-1 grad loss_i / n, relative to the score, which
    nothing here measures; damping replaces H by H + damping I, another number by intent. Where g is not convex, H may
    be indefinite: `solver=MINRES()`, damping, or Gauss-Newton products.

    Cost: two passes over the training samples and one over the test samples for gradients; for each linear step a pass
    with one gradient and one Hessian product for each batch (of one batch, whose graph is kept, only the product), and
    about a sixth as many for `errors`. With `per_test` that for each `block` of test samples, a product for each.
    Memory: the graph of one batch and, times `block`, some vectors of the size of the parameters.

    Source: Koh, Liang, "Understanding black-box predictions via influence functions", ICML 2017, equation (2).

    Args:
        loss: (params, batch) -> the losses of its samples `(n,)`, without the l2 term: `reduction="none"`.
        params: what training has ended with, a minimizer of g: a tensor or nested structure of tensors, such as
            `bilevel.functional(module).params`.
        train: a batch (a tensor, dict or tuple), or batches in one order: a list, a `DataLoader` that does not shuffle.
        test: alike.
        l2: of the training objective, as above. Of `torch.optim`'s `weight_decay` (SGD's, on the mean loss) it is that.
        damping: added to H in the linear system alone.
        solver: of the linear system; `CG(preconditioner=KFAC(...))` for networks.
        products: how H is multiplied by. They are products of g(x, y, batch) = x * sum of the losses of the batch, with
            x = 1 / n, batch by batch.
        per_test: a row of scores for each test sample, in place of those of their mean.
        block: how many test samples to treat at a time.
        tol: up to which `Influence.stationarity` the parameters count as a minimizer.
        certify: bound the error of the scores by |grad loss_i| |residual| / (n mu); a backward pass a training sample.
        mu: a lower bound on the eigenvalues of H + damping I; None: l2 + damping, which is one where all losses are
            convex in the parameters, and with Gauss-Newton products.
        throw: raise if any part did not succeed: the linear solver, or the parameters are no minimizer.

    Returns:
        The scores, and what is known about them.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range, there are no samples, or the losses are not one for each sample; with
            `certify` if no mu is known.
        BilevelError: with `throw`, if a part failed; `partial` is what there is.

    Example:
        >>> def loss(y, batch):
        ...     return (y - batch).square() / 2  # y is the mean of the samples
        >>> train, test = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0.5])
        >>> influence(loss, torch.tensor(2.0), train, test).scores  # (y - train_i)(y - test) / 3
        tensor([ 1.0000,  0.5000, -1.5000])
    """
    demand_autograd("influence")
    y, structure = ravel(params, "params")
    if y.device.type == "meta":
        raise ValueError(
            "`influence(params=...)` must hold numbers. Got tensors on the device 'meta', which have none."
        )
    y = y.detach()
    if certify and mu is None and not l2 + damping > 0:
        raise ValueError(
            "`influence(certify=True)` needs a lower bound on the eigenvalues of H + damping I. Pass `mu=`, or `l2=` or"
            " `damping=` where the losses are convex in the parameters."
        )
    trained, tested = (Samples.of(loss, structure, data, name) for data, name in ((train, "train"), (test, "test")))
    tally = Tally()
    first, total, squares = trained.gradients(y)
    n = len(first)
    gradient = total / n + l2 * y
    scale = (squares / n) ** 0.5
    size = float(torch.linalg.vector_norm(gradient))
    stationarity = size / scale if scale > 0 else 0.0 if size == 0 else float("inf")
    tally.gradients += 1
    hessian = _Hessian(trained, structure, y, n, l2, products, tally)
    operator = hessian.operator.shifted(damping)
    parts, values, solved = list[_Part](), list[Tensor](), list[Report]()
    sides = tested.rows(y, block) if per_test else _mean(tested, y)
    for losses, b in sides:
        tally.outer_gradients += len(b)
        values.append(losses)
        found = solver.solve(operator, b if per_test else b[0])
        v = found.value.reshape(b.shape)
        tally.linear_steps += found.steps
        solved.append(Report("linear solver", Status.worst(found.statuses), float(found.residual.max()), found.steps))
        r = b - hessian.product(v) - damping * v
        d = torch.zeros_like(v)
        if bool(r.any()) and bool(r.isfinite().all()):
            d = _CORRECTED.solve(operator, r if per_test else r[0]).value.reshape(b.shape)
        again, slopes, norms = trained.along(y, torch.cat([v, d]), norms=certify)
        tally.gradients += 1
        k = len(b)
        within = None
        if norms is not None:
            within = safe_row_norms(r).unsqueeze(-1) * norms / (n * (l2 + damping if mu is None else mu))
        parts.append(_Part(slopes[:k] / n, slopes[k:].abs() / n, within, _apart(first, again)))
    if not values:
        raise ValueError("`influence(test=...)` must hold at least one sample. Got none.")
    reports = (
        _worst(solved),
        Report("params", Status.successful if stationarity <= tol else Status.not_stationary, stationarity, 0),
        *hessian.reports,
    )
    if any(part.apart for part in parts):
        what = "loss, which gave other values in another pass over train (dropout, a loader that shuffles)"
        reports = (Report(what, Status.not_repeatable, float("nan"), 0), *reports)
    joined = torch.cat([part.scores for part in parts]), torch.cat([part.errors for part in parts])
    bounds = [part.bound for part in parts if part.bound is not None]
    scores, errors, bound = (
        rows if rows is None or per_test else rows[0] for rows in (*joined, torch.cat(bounds) if bounds else None)
    )
    assert scores is not None and errors is not None
    result = Influence(
        scores=scores,
        errors=errors,
        bound=bound,
        value=float(torch.cat(values).mean()),
        stationarity=stationarity,
        status=Status.worst(report.status for report in reports),
        reports=reports,
        stats=tally.stats(),
    )
    if throw and not result.status.ok:
        raise BilevelError(f"influence: {result.message}", result.status, result)
    return result


@final
@dataclass(frozen=True, eq=False)
class _Part:
    """What one block of right-hand sides has given: `(k, n)` each; and whether the losses were others this time."""

    scores: Tensor
    errors: Tensor
    bound: Tensor | None
    apart: bool


def _mean(tested: Samples, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    losses, total, _ = tested.gradients(y)
    yield losses, (total / len(losses)).unsqueeze(0)


def _apart(first: Tensor, again: Tensor) -> bool:
    """Whether two passes saw other losses, by more than rounding."""
    if first.shape != again.shape:
        return True
    size = first.abs().max()
    return bool((first - again).abs().max() > 1e3 * torch.finfo(first.dtype).eps * size)


def _worst(solved: list[Report]) -> Report:
    status = Status.worst(report.status for report in solved)
    residual = max((report.residual for report in solved), key=lambda r: (r != r, r))
    return Report("linear solver", status, residual, max(report.steps for report in solved))


@final
class _Hessian:
    """The Hessian of g at y, by passes over the training samples; of one batch the graph is kept."""

    def __init__(
        self,
        trained: Samples,
        structure: Structure,
        y: Tensor,
        n: int,
        l2: float,
        products: AbstractProducts,
        tally: Tally,
    ) -> None:
        def g(x: Tensor, params: Tree, batch: Any) -> Tensor:
            return x * trained.losses(structure.ravel(params, "params"), batch).sum()

        self.trained, self.y, self.l2, self.products = trained, y, l2, products
        self.x, alone = ravel(torch.tensor(1.0 / n, dtype=y.dtype, device=y.device))
        self.flat = FlatProblem(BilevelProblem(g, g), alone, structure, None, tally)
        first = next(iter(trained))
        linearized = products.curvature(self.flat.on(first, tally), self.x, y)
        self.reports = linearized.reports
        self._kept = linearized.operator if trained.is_one else None
        self.operator = LinearOperator(self.product, y.numel(), positive_definite=True)

    def product(self, v: Tensor) -> Tensor:
        """H v for v `(q,)`, or `(k, q)`."""
        found = self.l2 * v
        for part in self._parts():
            found = found + (part.mv(v) if v.dim() == 1 else torch.stack([part.mv(row) for row in v]))
        return found

    def _parts(self) -> Iterator[LinearOperator]:
        if self._kept is not None:
            yield self._kept
            return
        for batch in self.trained:
            at = self.flat.on(batch, self.flat.tally)
            yield self.products.curvature(at, self.x, self.y).operator
