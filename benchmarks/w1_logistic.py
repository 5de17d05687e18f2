"""W1: CG and Neumann hypergradients of logistic regression with one penalty for each feature, n = 10 000."""

from __future__ import annotations

import _threads  # noqa: F401
from _harness import compare_implicit, options, save
from _workloads import logistic


def main() -> None:
    chosen = options(__doc__ or "", rounds=7)
    samples = 1000 if chosen.quick else 10_000
    shapes = [(50, 1), (50, 10)] if chosen.quick else [(500, 1), (500, 10), (2000, 1), (2000, 10)]
    tables = []
    for features, classes in shapes:
        workload = logistic(samples, features, classes)
        for method in ("cg", "neumann") if features < 2000 else ("cg",):
            tables.append(compare_implicit(workload, method, 20, chosen))
    save("w1_logistic", "W1. Logistic regression with one penalty for each feature", tables, chosen)


if __name__ == "__main__":
    main()
