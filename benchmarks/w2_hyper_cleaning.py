"""W2: CG(20) hypergradients of data hyper-cleaning, 5000 sample weights, 784 features, linear model and network."""

from __future__ import annotations

import _threads  # noqa: F401
from _harness import compare_implicit, options, save
from _workloads import weighted_network


def main() -> None:
    chosen = options(__doc__ or "", rounds=5)
    samples = 500 if chosen.quick else 5000
    tables = []
    for name, widths in (("linear model", [784, 10]), ("network 784-128-10", [784, 128, 10])):
        workload = weighted_network(
            f"hyper-cleaning, {name}, n={samples}", widths, samples, ridge=1e-2, steps=100, step=0.5
        )
        tables.append(compare_implicit(workload, "cg", 20, chosen))
    save("w2_hyper_cleaning", "W2. Data hyper-cleaning", tables, chosen)


if __name__ == "__main__":
    main()
