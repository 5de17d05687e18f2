"""The rule by which "auto" compiles products: fitted to the measurements that are committed, and to nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bilevel import AID, Auto, BilevelProblem, CompiledProducts, Exact, Split
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.hypergrad.product_costs import SMALL, Work, work_of
from bilevel.named.auto import Chosen
from bilevel.named.registry import resolve

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "compiled_products.json"


def _measured() -> list[dict[str, float]]:
    return [row["numbers"] for row in json.loads(RESULTS.read_text())["tables"][0]["rows"]]


def test_compiled_products_were_faster_wherever_the_rule_takes_them() -> None:
    taken = [row for row in _measured() if Work(int(row["calls"]), int(row["entries"])).is_small]
    assert len(taken) >= 4
    assert max(row["ratio"] for row in taken) < 0.9


def test_the_rule_is_as_wide_as_the_measurements_allow_up_to_a_factor_of_four() -> None:
    slow = min(row["entries"] / row["calls"] for row in _measured() if row["ratio"] > 1)
    assert slow / 4 <= SMALL < slow


def flat(samples: int, features: int) -> tuple[FlatProblem, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    t = torch.randn(samples, generator=generator, dtype=torch.float64).sign()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-t * (X @ y)).mean() + (x.exp() * y.square()).sum() / 2

    problem = BilevelProblem(lambda _, y: torch.nn.functional.softplus(-t * (X @ y)).mean(), g)
    (x, x_structure), (y, y_structure) = (ravel(torch.zeros(features, dtype=torch.float64)) for _ in range(2))
    return FlatProblem(problem, x_structure, y_structure), x, y


def test_the_work_of_a_product_is_counted_from_the_graph() -> None:
    small, large = (work_of(*flat(samples, 4)) for samples in (10, 10_000))
    assert small.calls == large.calls > 5
    assert large.entries >= 40_000  # X, once, whatever views of it are kept
    assert large.entries < 1000 * small.entries + 40_000
    assert work_of(*flat(10_000, 4)) == large  # and nothing of it by a clock
    assert flat(10, 4)[0].tally.stats().gradients == 0


@pytest.mark.parametrize(("samples", "kind"), [(20, CompiledProducts), (20_000, Exact)])
def test_auto_compiles_products_where_they_are_small_and_it_was_asked_to(samples: int, kind: type) -> None:
    found = resolve(Auto(compile=True), *flat(samples, 3))
    assert isinstance(found, Chosen)
    assert isinstance(found.estimator, AID)
    assert isinstance(found.estimator.products, kind)
    assert ("are compiled" in found.why) == (kind is CompiledProducts)
    plain = resolve(Auto(), *flat(samples, 3))
    assert isinstance(plain, Chosen)
    assert isinstance(plain.estimator, AID)
    assert isinstance(plain.estimator.products, Exact)


def test_auto_does_not_compile_where_f_and_g_have_data_of_their_own() -> None:
    problem = BilevelProblem(
        lambda x, y, b: (y - b).square().sum(), lambda x, y, b: (y - x * b).square().sum() + 0.1 * y.square().sum()
    )
    one, structure = ravel(torch.ones(3, dtype=torch.float64))
    data = Split(f=torch.ones(3, dtype=torch.float64), g=torch.ones(3, dtype=torch.float64))
    found = resolve(Auto(compile=True), FlatProblem(problem, structure, structure, data), one, torch.zeros_like(one))
    assert isinstance(found, Chosen)
    assert "compiled" in found.why
    assert not isinstance(found.estimator, AID) or isinstance(found.estimator.products, Exact)
