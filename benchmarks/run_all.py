"""All the benchmarks, one after the other, each in a process of its own; and the tables of README.md from them.

`python benchmarks/run_all.py --out benchmarks/results --hypertorch PATH` makes everything that is committed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from _harness import machine, write

HERE = Path(__file__).parent
SCRIPTS = (
    "w1_logistic",
    "w2_hyper_cleaning",
    "w3_tasks",
    "w4_memory",
    "w6_parameters",
    "w7_by_hand",
    "esj",
    "import_time",
)
BEGIN, END = "<!-- results: written by run_all.py -->\n", "<!-- end of results -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the tables go (benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds: does it run?")
    parser.add_argument("--hypertorch", type=Path, help="a checkout of github.com/prolearner/hypertorch")
    parser.add_argument("--peers", help="as for each of the benchmarks")
    parser.add_argument("--only", default=",".join(SCRIPTS), help="which benchmarks")
    given = parser.parse_args()
    failed = []
    for name in given.only.split(","):
        command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(given.out)]
        command += ["--quick"] if given.quick else []
        command += ["--hypertorch", str(given.hypertorch)] if given.hypertorch else []
        command += ["--peers", given.peers] if given.peers is not None else []
        start = time.perf_counter()
        code = subprocess.run(command, check=False).returncode
        print(f"[{name}: {time.perf_counter() - start:.0f} s, exit status {code}]\n", flush=True)
        if code:
            failed.append(name)
    if given.out.resolve() == (HERE / "results").resolve() and not given.quick:
        write(HERE / "README.md", with_results((HERE / "README.md").read_text(encoding="utf-8"), given.out))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def with_results(readme: str, results: Path) -> str:
    """The text with the tables between its two marks replaced by those of a folder."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    tables = [path.read_text(encoding="utf-8") for name in SCRIPTS if (path := results / f"{name}.md").exists()]
    return before + BEGIN + f"\nMachine: {facts}.\n\n" + "\n".join(tables) + "\n" + END + after


if __name__ == "__main__":
    sys.exit(main())
