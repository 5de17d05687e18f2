"""W6: CG(20) against the number of inner variables, on networks with a batch of 64 samples.

With so few samples a Hessian product is cheap, and what a library does besides products is seen best.
"""

from __future__ import annotations

import _threads  # noqa: F401
from _harness import compare_implicit, options, save
from _workloads import weighted_network

HIDDEN = {"1e3": [16, 16], "1e4": [80, 80], "1e5": [295, 295], "1e6": [978, 978], "deep, 82 tensors": [64] * 40}

RIDGE = {"deep, 82 tensors": 5.0}  # 0.3 for the others: enough that 20 steps meet no negative curvature


def main() -> None:
    chosen = options(__doc__ or "", rounds=15)
    sizes = ["1e3", "deep, 82 tensors"] if chosen.quick else list(HIDDEN)
    tables = []
    for size in sizes:
        features = 64 if size.startswith("deep") else 32
        workload = weighted_network(
            f"network of {size}", [features, *HIDDEN[size], 10], 64, ridge=RIDGE.get(size, 0.3), steps=200, step=0.01
        )
        tables.append(compare_implicit(workload, "cg", 20, chosen))
    save("w6_parameters", "W6. CG(20) against the number of inner variables, batch of 64", tables, chosen)


if __name__ == "__main__":
    main()
