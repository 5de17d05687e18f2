"""How long `import bilevel` takes beyond `import torch`, each time in a fresh interpreter."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from _harness import Row, Table, options, save

CODE = """
import json, time
marks = [(time.process_time(), time.perf_counter())]
import torch
marks.append((time.process_time(), time.perf_counter()))
{second}
marks.append((time.process_time(), time.perf_counter()))
print(json.dumps([[b - a for a, b in zip(*pair)] for pair in zip(marks, marks[1:])]))
"""
SECONDS = {"import bilevel": "import bilevel", "import bilevel, bilevel.solvers": "import bilevel, bilevel.solvers"}


def main() -> None:
    chosen = options(__doc__ or "", rounds=9)
    first: list[list[float]] = []
    then: dict[str, list[list[float]]] = {name: [] for name in SECONDS}
    for _ in range(chosen.rounds):
        for name, second in SECONDS.items():
            command = [sys.executable, "-c", CODE.format(second=second)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            torch_time, ours = json.loads(output)
            first.append(torch_time)
            then[name].append(ours)
    rows = []
    for name, times in {"import torch": first, **{f"then {name}": times for name, times in then.items()}}.items():
        cpu, wall = (statistics.median(values) for values in zip(*times, strict=True))
        rows.append(Row(name, [f"{cpu:.3f}", f"{wall:.3f}"], {"cpu_s": cpu, "wall_s": wall}))
    table = Table("Medians over fresh interpreters", ["", "CPU s", "wall s"], rows)
    save("import_time", "Import time", [table], chosen)


if __name__ == "__main__":
    main()
