"""One adapter a library: `implicit(workload, method, products)` and `unrolled(workload, steps)`.

By its public interface, each returns a call without arguments that gives the hypergradient (`unrolled`: several, by
name); whatever can be built once is built outside it.
"""
