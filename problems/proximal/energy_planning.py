"""Planning a power system: the week's cheapest dispatch is a linear program, what to build is decided above it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED, SIZE
from bilevel.hypergrad.aid import AID
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems._plots import COLORS
from bilevel.solvers.fixed_point_iteration import FixedPointIteration
from bilevel.solvers.gmres import GMRES
from bilevel.terms import PDHG, LinearMap, Scheme, SumOfTerms, box, equal, inner, proximal_problem, variable
from bilevel.terms.least_squares import norm_squared

ROWS = ("coal", "gas", "oil", "wind", "sun", "discharge", "charge", "stored")
"""Of y: what is generated, given back, taken in each hour (MW), and what is in store at its end (MWh)."""
_COST = (30.0, 50.0, 120.0, 0.0, 0.0, 0.5, 0.5, 0.0)  # per MWh
_LIMIT = (30.0, 35.0, 60.0)  # MW of coal, gas, oil
_KEPT = 0.9  # of what is charged, and of what is discharged
_HOURS = 4.0  # in which a store can be filled or emptied
_BUILD = (300.0, 900.0)  # for a week: per MWh of storage, per MW of sun
_RHO = 0.01
_MONEY = 100.0  # the unit of costs in which the algorithm works


@final
@dataclass(frozen=True, eq=False)
class EnergyPlanning(AbstractPortable):
    """min_x build' exp(x) + c'y*(x),  y*(x) = argmin c'y  s.t.  supply = demand and storage balance, 0 <= y <= u(x).

    x is the logarithms of the storage (MWh) and the sun (MW) that are built; y `(8, hours)` is in the order of `ROWS`.
    The store ends as it began. The linear program is minimized by `PDHG`, matrix-free, and differentiated as its fixed
    point.

    Args:
        demand: MW in each hour.
        wind: what is there, MW.
        sun: per MW built.
    """

    demand: Tensor
    wind: Tensor
    sun: Tensor

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def hours(self) -> int:
        """Of the plan."""
        return len(self.demand)

    @property
    def cost(self) -> Tensor:
        """c `(8, hours)`."""
        return self.demand.new_tensor(_COST).unsqueeze(-1).expand(-1, self.hours)

    def upper(self, x: Tensor) -> Tensor:
        """u(x)."""
        storage, sun = x.exp()
        one = torch.ones_like(self.demand)
        limits = [level * one for level in _LIMIT]
        flow = storage / _HOURS * one
        return torch.stack([*limits, self.wind, sun * self.sun, flow, flow, storage * one])

    def balances(self) -> LinearMap:
        """y -> (supply, stored - stored an hour ago - charged + discharged), `(8, hours)` -> `(2, hours)`."""
        shape = (len(ROWS), self.hours)
        return LinearMap(_balances, _balances_transposed, shape, (2, self.hours))

    def objective(self, x: Tensor) -> SumOfTerms:
        """The linear program."""
        y = variable(len(ROWS), self.hours)
        wanted = torch.stack([self.demand, torch.zeros_like(self.demand)])
        upper = self.upper(x)
        return (
            inner(self.cost / _MONEY, y) + box(y, torch.zeros_like(upper), upper) + equal(self.balances() @ y - wanted)
        )

    def scheme(self, x: Tensor) -> Scheme:
        """The algorithm for it."""
        return PDHG(_RHO, _step(self.hours)).on(self.objective(x))

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """What building and running costs, in thousands."""
        return (self.demand.new_tensor(_BUILD) @ x.exp() + (self.cost * y).sum()) / 1000

    def highs(self, x: Tensor) -> float:
        """c'y*(x) by HiGHS.

        Raises:
            ImportError: if scipy is missing.
        """
        try:
            from scipy.optimize import linprog
            from scipy.sparse import csr_matrix
        except ImportError as error:
            raise ImportError('HiGHS comes with scipy: `pip install "bilevel[scipy]"`.') from error
        count = len(ROWS) * self.hours
        columns = torch.eye(count, dtype=self.demand.dtype, device="cpu").reshape(count, len(ROWS), self.hours)
        rows = csr_matrix(_balances(columns).reshape(count, -1).mT.numpy())
        wanted = torch.cat([self.demand, torch.zeros_like(self.demand)]).numpy()
        bounds = torch.stack([torch.zeros(count), self.upper(x).reshape(-1)], 1).numpy()
        solve: Any = linprog  # whose stubs know no sparse matrices
        found = solve(self.cost.reshape(-1).numpy(), A_eq=rows, b_eq=wanted, bounds=bounds, method="highs")
        return float(found.fun)

    def metrics(self, x: Tensor, y: Any) -> Mapping[str, float]:
        """What is built, what the week costs, and by how much the balance is violated at most."""
        plan = y["y"]
        wanted = torch.stack([self.demand, torch.zeros_like(self.demand)])
        own = float((self.cost * plan).sum())
        found = {
            "storage built, MWh": float(x[0].exp()),
            "sun built, MW": float(x[1].exp()),
            "cost of the week, thousands": own / 1000,
            "largest violation, MW": float((_balances(plan) - wanted).abs().max()),
        }
        try:
            return found | {"cost over that of HiGHS - 1": own / self.highs(x.detach()) - 1}
        except ImportError:
            return found

    def plot(self, figure: Any, x: Tensor, y: Any) -> None:
        """Who supplies when, and the store."""
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        plan, colors = y["y"].detach(), (*COLORS, "#e69f00", "#56b4e9")
        above.stackplot(range(self.hours), plan[:6].tolist(), labels=ROWS[:6], colors=colors, step="post")
        above.plot(range(self.hours), self.demand.tolist(), color="black", linewidth=0.8, label="demand")
        above.set_ylabel("MW")
        above.legend(ncols=7, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.15))
        below.plot(range(self.hours), plan[7].tolist(), color=COLORS[0])
        below.set_ylabel("stored, MWh")
        below.set_xlabel("hour")
        figure.tight_layout()


@functools.lru_cache(maxsize=8)
def _step(hours: int) -> float:
    """The longest primal step, from |K|: computed once, for the scheme is made anew in every step."""
    K = LinearMap(_balances, _balances_transposed, (len(ROWS), hours), (2, hours))
    like = torch.zeros((), dtype=torch.float64, device="cpu")
    return 0.99 / (_RHO * float(norm_squared(K, like)))


def _balances(y: Tensor) -> Tensor:
    supply = y[..., :6, :].sum(-2) - y[..., 6, :]
    stored = y[..., 7, :] - torch.roll(y[..., 7, :], 1, -1) - _KEPT * y[..., 6, :] + y[..., 5, :] / _KEPT
    return torch.stack([supply, stored], -2)


def _balances_transposed(z: Tensor) -> Tensor:
    supply, stored = z.unbind(-2)
    rows = [supply] * 5 + [supply + stored / _KEPT, -supply - _KEPT * stored, stored - torch.roll(stored, -1, -1)]
    return torch.stack(rows, -2)


@checked(hours=SIZE, seed=SEED)
def energy_planning(*, hours: int = 168, seed: int = 0) -> Instance:
    """Decide how much storage and sun to build; see :class:`EnergyPlanning`.

    Args:
        hours: of the plan; 168 are a week.
        seed: of the weather and the demand.

    Example:
        >>> instance = energy_planning(hours=24)
        >>> instance.y0["y"].shape
        torch.Size([8, 24])
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    t = torch.arange(hours, dtype=torch.float64, device="cpu")
    daily = 20 * (2 * math.pi * (t - 8) / 24).sin() + 8 * (4 * math.pi * (t - 6) / 24).sin()
    demand = 60 + daily + 3 * drawn(hours)
    clouds = 0.6 + 0.4 * torch.rand(hours, generator=generator, dtype=torch.float64, device="cpu")
    sun = (math.pi * (t % 24 - 6) / 12).sin().clamp_min(0) * clouds
    wind = 15 * (1 + drawn(hours).cumsum(0) / 8).clamp(0, 2)
    made = EnergyPlanning(demand, wind, sun)
    x0 = torch.tensor([20.0, 20.0], dtype=torch.float64, device="cpu").log()
    return Instance(
        problem=proximal_problem(made.f, made.scheme),
        x0=x0,
        y0=made.scheme(x0).start(torch.zeros(len(ROWS), hours, dtype=torch.float64, device="cpu")),
        description=f"storage and sun for {hours} hours, the dispatch a linear program",
        metrics=made.metrics,
        plot=made.plot,
        settings={
            "estimator": AID(FixedPointIteration(1000, tol=None), GMRES(1e-6, max_steps=400)),
            "outer_step": 0.1,
            "max_steps": 20,
        },
    )
