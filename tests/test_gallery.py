"""The examples of the gallery find what their text says they find; each runs in a few seconds."""

import runpy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
matplotlib = pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {path.stem.removeprefix("plot_"): path for path in sorted((ROOT / "examples").glob("plot_*.py"))}

pytestmark = pytest.mark.skipif(not EXAMPLES, reason="an installed package comes without its examples")


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A process as the gallery gives one to an example, and the figures that it draws."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    monkeypatch.chdir(tmp_path)
    dtype, style = torch.get_default_dtype(), dict(plt.rcParams)
    torch.set_default_dtype(torch.float32)
    yield plt
    plt.close("all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that matplotlib retires
        plt.rcParams.update(style)
    torch.set_default_dtype(dtype)


def closed_form(found: dict[str, Any]) -> None:
    assert max(found["errors"]) <= 1e-8
    assert found["errors"][0] <= found["certificate"].bound < 1e-8


def wrong_labels(found: dict[str, Any]) -> None:
    assert found["auc"] >= 0.9
    assert found["after"] >= found["before"] + 0.05


def penalties(found: dict[str, Any]) -> None:
    assert found["found"]["a penalty each"] <= 0.6 * found["found"]["one penalty"]
    learned = found["each"].x
    assert learned[:8].median() < learned[8:].median() - 4


def lasso(found: dict[str, Any]) -> None:
    assert found["solution"].value <= found["best"] * (1 + 1e-3)
    assert found["evaluations"] <= 16 < len(found["grid"])


def machine(found: dict[str, Any]) -> None:
    assert found["solution"].value <= min(found["path"].values) * (1 + 2e-3)
    assert 0 < found["on_bounds"] < 60


def maml(found: dict[str, Any]) -> None:
    assert found["found"].score.mean <= found["untrained"].score.mean / 2.5
    assert found["losses"]["MAML"] <= found["losses"]["random"] / 2.5


def stochastic(found: dict[str, Any]) -> None:
    last = {name: curve[-1][1] for name, curve in found["curves"].items()}
    assert max(last["SABA"], last["SRBA"]) <= 1e-6
    assert min(last["SOBA"], last["StocBiO"]) >= 1e-3
    assert all(curve[-1][0] <= 200_000 for curve in found["curves"].values())


def equilibrium(found: dict[str, Any]) -> None:
    assert found["accuracy"] >= 0.95 and found["solution"].value <= 0.02


def decisions(found: dict[str, Any]) -> None:
    squares, learned = found["by_squares"], found["by_decisions"]
    assert learned["cost of the decisions"] <= squares["cost of the decisions"] - 0.04
    assert learned["squared error"] > squares["squared error"]


def fair(found: dict[str, Any]) -> None:
    assert found["found"].value <= min(found["path"].values) * (1 + 1e-3)
    assert found["unfair"] <= 0.6 * found["unfair_free"]
    assert found["accuracy"] >= found["accuracy_free"] - 0.03


def deblurring(found: dict[str, Any]) -> None:
    decibels = found["decibels"]
    assert decibels["learned"] >= decibels["as it began"] + 0.5 >= decibels["blurred"] + 1.5


def federated(found: dict[str, Any]) -> None:
    assert found["auc"] >= 0.88 and found["accuracy"] >= 0.88
    assert found["found"].traffic.rounds == 400


def navigation(found: dict[str, Any]) -> None:
    scores = found["scores"]
    assert scores[1] >= scores[0] / 3 and scores[3] >= scores[1]


def influences(found: dict[str, Any]) -> None:
    assert found["correlation"] >= 0.97


def steps(found: dict[str, Any]) -> None:
    assert found["after"][-1] <= 0.6 * found["before"][-1]
    assert found["before"][0] == found["after"][0]


def estimators(found: dict[str, Any]) -> None:
    last = {name: curve[-1][1] for name, curve in found["curves"].items()}
    exact = {"AID, CG", "AID, Neumann", "ITD", "ESJ"}
    assert all((error <= 1e-7) == (name in exact) for name, error in last.items())
    assert last["ITD, last 10 steps"] >= 0.1


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "01_hypergradient": closed_form,
    "02_hyper_cleaning": wrong_labels,
    "03_penalty_for_each_feature": penalties,
    "04_lasso_path": lasso,
    "05_support_vectors": machine,
    "06_maml_sinusoids": maml,
    "07_stochastic_algorithms": stochastic,
    "08_equilibrium_network": equilibrium,
    "09_decisions": decisions,
    "10_fair_classification": fair,
    "11_deblurring": deblurring,
    "12_federated_cleaning": federated,
    "13_navigation": navigation,
    "14_influence": influences,
    "15_learned_steps": steps,
    "16_estimators": estimators,
}
SLOW = {"07_stochastic_algorithms", "13_navigation"}


def test_every_example_is_checked() -> None:
    assert CHECKS.keys() == EXAMPLES.keys() and len(CHECKS) >= 12


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CHECKS])
def test_an_example_finds_what_it_says(name: str, pictures: Any) -> None:
    found = runpy.run_path(str(EXAMPLES[name]))
    CHECKS[name](found)
    assert pictures.get_fignums(), "it draws nothing"
    assert all(axes.has_data() or not axes.axison for n in pictures.get_fignums() for axes in pictures.figure(n).axes)


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_begins_with_a_title_and_a_text(name: str) -> None:
    title, line, blank, *text = EXAMPLES[name].read_text(encoding="utf-8").removeprefix('"""\n').splitlines()
    assert line == "=" * len(title) and not blank and len(text) > 10
