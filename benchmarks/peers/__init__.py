"""One adapter a library: `implicit(workload, method, products)` and `unrolled(workload, steps)`, by its public interface.

Each returns a call without arguments that gives the hypergradient; whatever can be built once is built outside it.
"""
