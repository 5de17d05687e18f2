"""Why semi-supervised adaptation loses to MAML on digits, or gains: what the start, the choices and their labels do.

    python benchmarks/unlabelled.py
    python benchmarks/unlabelled.py --distractors 0 --step 0.4

Starts are learned by MAML and by PLATINUM (choices guided by the support set, by the query set, and the latter without
unlabelled samples in f). Each is adapted on the same 600 test tasks without unlabelled samples, with those that FL2MI
chooses, and with the same samples under their right labels, distractors left out: an oracle. The differences are to
MAML on the same tasks, with half the width of their 95 % intervals.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import _threads  # noqa: F401
import torch
from torch import Tensor

from bilevel import Instance, minimize
from bilevel.problems.networks.platinum import SELECTIONS, semi_supervised
from bilevel.problems.networks.semi_supervised import SemiSupervised, ramp
from bilevel.problems.networks.unlabelled_episodes import UnlabelledEpisodes
from bilevel.tasks.digits import digits
from bilevel.tasks.images import Subset

STEPS, TASKS, AT_ONCE = 10, 600, 100
STARTS: dict[str, tuple[dict[str, Any], bool]] = {  # settings, and whether unlabelled samples are in f
    "MAML": ({"selection": "none"}, True),
    "guided by the support set": ({"guide": "support"}, True),
    "guided by the query set": ({}, True),
    "the same, none in f": ({}, False),
}


def without_outer(draw: Callable[[int], dict[str, Tensor]]) -> Callable[[int], dict[str, Tensor]]:
    def drawn(step: int) -> dict[str, Tensor]:
        found = draw(step)
        return found | {"outer_weight": torch.zeros_like(found["outer_weight"])}

    return drawn


def learned(instance: Instance, outer: bool) -> tuple[SemiSupervised, Any]:
    settings = dict(instance.settings)
    if not outer:
        settings["data"] = without_outer(settings["data"])
    shown: Any = instance.metrics.__self__  # type: ignore[union-attr]
    return shown.own, minimize(instance.problem, instance.x0, instance.y0, throw=False, **settings).x


def accuracy(own: SemiSupervised, x: Any, tasks: dict[str, Tensor]) -> Tensor:
    y = own.adapted(x, tasks, STEPS)
    with torch.no_grad():
        logits = torch.vmap(own.logits)(y["params"], tasks["query_x"])
    return (logits.argmax(-1) == tasks["query_y"]).double().mean(1)


def with_right_labels(tasks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Held choices: the same samples, under the classes that they are of."""
    chosen, truth = tasks["selection"], tasks["unlabeled_y"].unsqueeze(1)
    classes = torch.arange(chosen.shape[2]).reshape(1, -1, 1)
    right = (truth == classes).to(chosen).unsqueeze(1)
    return tasks | {"selection": right * chosen.amax(2, keepdim=True)}


def tested(own: SemiSupervised, x: Any, source: UnlabelledEpisodes) -> dict[str, Tensor]:
    plain, chosen = (
        replace(own, selection=SELECTIONS[name], guide="support", steps=STEPS, weight=lambda k, T: ramp(k / T))
        for name in ("none", "fl2mi")
    )
    found: dict[str, list[Tensor]] = {"none": [], "chosen": [], "right labels": []}
    for k in range(TASKS // AT_ONCE):
        tasks = source.sample(AT_ONCE, 2**21 + k)
        held = chosen.frozen(x, tasks)
        for name, by, data in (
            ("none", plain, tasks),
            ("chosen", chosen, held),
            ("right labels", chosen, with_right_labels(held)),
        ):
            found[name].append(accuracy(by, x, data))
    return {name: torch.cat(parts) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distractors", type=int, default=1)
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train = digits().train
    assert isinstance(train, Subset)
    source = UnlabelledEpisodes(train.images.subset(range(6, 10)), 3, 1, 5, 20, given.distractors, steps=STEPS)
    print("| start | no unlabelled samples | those that are chosen | the same, right labels |\n|---|---|---|---|")
    base = None
    for name, (settings, outer) in STARTS.items():
        made = semi_supervised(
            distractors=given.distractors,
            unlabeled=20,
            step=given.step,
            max_steps=given.max_steps,
            seed=given.seed,
            **settings,
        )
        found = tested(*learned(made, outer), source)
        base = found["none"] if base is None else base
        cells = []
        for each in found.values():
            apart = each - base
            within = 1.96 * float(apart.std()) / TASKS**0.5
            cells.append(f"{float(each.mean()):.3f} ({float(apart.mean()):+.3f} ± {within:.3f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
