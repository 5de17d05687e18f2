"""Inner problems that are convex, with more than one minimizer or without a Slater point."""

from __future__ import annotations

from bilevel.problems.literature.statement import Point, Statement

STATEMENTS = (
    Statement(
        "Bard1988Ex3",
        "convex_poly",
        sizes=(2, 2),
        f=lambda x, y: -(x[0] ** 2) - 3 * x[1] - 4 * y[0] + y[1] ** 2,
        g=lambda x, y: 2 * x[0] ** 2 + y[0] ** 2 - 5 * y[1],
        outer=lambda x, y: (x[0] ** 2 + 2 * x[1] - 4, -x[0], -x[1]),
        inner=lambda x, y: (
            -(x[0] ** 2) + 2 * x[0] - x[1] ** 2 + 2 * y[0] - y[1] - 3,
            -x[1] - 3 * y[0] + 4 * y[1] + 4,
            -y[0],
            -y[1],
        ),
        best=Point((0.0, 2.0), (1.875, 0.90625), f=-12.6787109375, g=-1.015625),
        source="J.F. Bard, Math. Program. 40 (1988) 15-27",
    ),
    Statement(
        "SinhaMaloDeb2014TP3",
        "convex_poly",
        sizes=(2, 2),
        f=lambda x, y: -(x[0] ** 2) - 3 * x[1] ** 2 - 4 * y[0] + y[1] ** 2,
        g=lambda x, y: 2 * x[0] ** 2 + y[0] ** 2 - 5 * y[1],
        outer=lambda x, y: (x[0] ** 2 + 2 * x[1] - 4, -x[0], -x[1]),
        inner=lambda x, y: (
            -(x[0] ** 2) + 2 * x[0] - x[1] ** 2 + 2 * y[0] - y[1] - 3,
            -x[1] - 3 * y[0] + 4 * y[1] + 4,
            -y[0],
            -y[1],
        ),
        best=Point((0.0, 2.0), (1.875, 0.90625), f=-18.6787109375, g=-1.015625),
        source="A. Sinha, P. Malo, K. Deb, CEC 2014, 1870-1877",
    ),
    Statement(
        "DempeDutta2012Ex24",
        "convex_nonlinear",
        sizes=(1, 1),
        f=lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2,
        g=lambda x, y: x[0] ** 2 * y[0],
        inner=lambda x, y: (y[0] ** 2,),
        best=Point((1.0,), (0.0,), f=0.0, g=0.0),
        source="S. Dempe, J. Dutta, Math. Program. 131 (2012) 37-48",
    ),
    Statement(
        "FloudasZlobec1998",
        "convex_nonlinear",
        sizes=(1, 2),
        f=lambda x, y: x[0] ** 3 * y[0] + y[1],
        g=lambda x, y: -y[1],
        outer=lambda x, y: (x[0] - 1, -x[0]),
        inner=lambda x, y: (-y[0] - 1, y[0] - 1, -y[1], y[1] - 100, x[0] * y[0] - 10, y[0] ** 2 + x[0] * y[1] - 1),
        best=Point((1.0,), (0.0, 1.0), f=1.0, g=-1.0),
        source="C.A. Floudas, S. Zlobec, in Multilevel Optimization, Springer 1998",
    ),
)
