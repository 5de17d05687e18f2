"""Omniglot, 5 ways, 1 shot: every method trained by its documented command, tested once on classes never seen.

    python benchmarks/omniglot.py --data omniglot.npz --runs runs/omniglot

runs the commands one after the other (an hour or less each), and writes the table into docs/omniglot.md and the figure
to docs/images/omniglot.png. Methods whose folder holds a finished run are not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _harness import machine, write

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by benchmarks/omniglot.py -->\n", "<!-- end of results -->\n"


@dataclass(frozen=True)
class Run:
    """A command, and what was published for the method on this data set.

    Attributes:
        name: of the experiment.
        arguments: of `bilevel run`, but for the data and the folder.
        published: test accuracy in per cent with its source, 5 ways and 1 shot unless it says otherwise.
        variant: what tells it from another run of the experiment.
    """

    name: str
    arguments: str
    published: str
    variant: str = ""

    @property
    def folder(self) -> str:
        """Of its files, among those of the other runs."""
        return self.name + self.variant

    @property
    def label(self) -> str:
        """In the table and the figure."""
        return self.name.removesuffix("-omniglot") + self.variant


FINN = "98.7 ± 0.4 (Finn et al. 2017)"
WIDE = "--set filters=64 --set rate=2e-3"
RUNS = (
    Run(
        "protonet-omniglot",
        f"--steps 6000 {WIDE} --set train_way=20 --set batch=2 --set cosine=6000",
        "98.8 (Snell et al. 2017)",
    ),
    Run("maml-omniglot", f"--steps 6000 {WIDE} --set batch=8 --set cosine=6000", FINN, "-6000"),
    Run("maml-omniglot", f"--steps 10000 {WIDE} --set batch=8 --set cosine=10000", FINN),
    Run(
        "anil-omniglot",
        "--steps 10000 --set filters=64 --set rate=3e-3 --set batch=8 --set cosine=10000",
        "96.2 ± 0.5 with 20 ways (Raghu et al. 2020)",
    ),
    Run(
        "imaml-omniglot",
        "--steps 5000 --set batch=4 --set inner_steps=8 --set step=0.4 --set regularization=0.2 --set damping=10"
        " --set linear_steps=3 --set cosine=5000",
        "99.16 ± 0.35 (Rajeswaran et al. 2019)",
    ),
    Run(
        "ibaml-omniglot",
        "--steps 6000 --set filters=64 --set rate=3e-3 --set batch=8 --set cosine=6000 --set test_kl_weight=3e-8",
        "",
    ),
)


def command(run: Run, data: str, out: str) -> list[str]:
    """The words after `bilevel`."""
    return ["run", run.name, "--set", f"data={data}", *shlex.split(run.arguments), "--out", out]


def finished(folder: Path) -> dict[str, Any] | None:
    """What a finished run has left."""
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result if result.get("test") else None


def table(runs: Path) -> str:
    """The runs that have finished, as Markdown."""
    lines = [
        "| method | test accuracy, % | ECE, % | NLL | steps | training, s | published, % |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    commands = []
    for run in RUNS:
        result = finished(runs / run.folder)
        if result is None:
            continue
        score, calibration = result["test"]["score"], result["calibration"]
        lines.append(
            f"| {run.label} | {100 * score['mean']:.1f} ± {100 * score['interval']:.1f} |"
            f" {100 * calibration['ECE']:.2f} | {calibration['NLL']:.3f} | {result['steps']} |"
            f" {result['training_seconds']:.0f} | {run.published} |"
        )
        commands.append(f"bilevel {shlex.join(command(run, 'data/omniglot.npz', f'runs/omniglot/{run.folder}'))}")
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    return "\n".join([*lines, "", "```bash", *commands, "```", "", f"Machine: {facts}.", ""])


def with_results(page: str, results: str) -> str:
    """The page with what stands between its two marks replaced."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + results + "\n" + END + rest.split(END)[1]


def figure(runs: Path, path: Path) -> None:
    """Validation accuracy against seconds, all methods in one picture."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 4.2), layout="constrained")
    axes = drawing.add_subplot()
    for run in RUNS:
        history = runs / run.folder / "history.jsonl"
        if finished(runs / run.folder) is None:
            continue
        records = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
        points = [(r["elapsed"], 100 * r["validation"]["score"]) for r in records if r["validation"]]
        axes.plot(*zip(*points, strict=True), label=run.label)
    axes.set(xlabel="seconds", ylabel="validation accuracy, %", xscale="log", ylim=(20, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="omniglot.npz, made by `bilevel data omniglot`; without it: only the table")
    parser.add_argument("--runs", type=Path, default=Path("runs/omniglot"), help="folder of the runs")
    parser.add_argument("--only", default=",".join(run.name for run in RUNS), help="which experiments to run")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs/omniglot.md", help="where the table goes")
    given = parser.parse_args()
    failed = []
    for run in RUNS:
        if given.data is None or run.name not in given.only.split(",") or finished(given.runs / run.folder):
            continue
        words = command(run, given.data, str(given.runs / run.folder))
        if subprocess.run([sys.executable, "-m", "bilevel", *words], check=False).returncode:
            failed.append(run.name)
    write(given.page, with_results(given.page.read_text(encoding="utf-8"), table(given.runs)))
    figure(given.runs, given.page.parent / "images/omniglot.png")
    print(table(given.runs))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
