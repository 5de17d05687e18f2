"""Inner problems that are strongly convex, without constraints or with bounds on y."""

from __future__ import annotations

from bilevel.problems.literature.statement import Point, Statement

STATEMENTS = (
    Statement(
        "HenrionSurowiec2011",
        "strict_unconstrained",
        sizes=(1, 1),
        f=lambda x, y: x[0] ** 2,
        g=lambda x, y: 0.5 * y[0] ** 2 - x[0] * y[0],
        best=Point((0.0,), (0.0,), f=0.0, g=0.0),
        source="R. Henrion, T. Surowiec, Applicable Analysis 90 (2011) 951-970",
    ),
    Statement(
        "HenrionSurowiec2011_c2",
        "strict_unconstrained",
        sizes=(1, 1),
        f=lambda x, y: x[0] ** 2 + 2 * y[0],
        g=lambda x, y: 0.5 * y[0] ** 2 - x[0] * y[0],
        best=Point((-1.0,), (-1.0,), f=-1.0, g=-0.5),
        source="R. Henrion, T. Surowiec, Applicable Analysis 90 (2011) 951-970",
    ),
    Statement(
        "MacalHurter1997",
        "strict_unconstrained",
        sizes=(1, 1),
        f=lambda x, y: (x[0] - 1) ** 2 + (y[0] - 1) ** 2,
        g=lambda x, y: 0.5 * y[0] ** 2 + 500 * y[0] - 50 * x[0] * y[0],
        best=Point((10.01639344262295,), (0.819672131147541,), f=81.327868852459, g=-0.3359312012900091),
        source="C.M. Macal, A.P. Hurter, Comput. Oper. Res. 24 (1997) 1129-1140",
    ),
    Statement(
        "DeSilva1978",
        "strict_box",
        sizes=(2, 2),
        f=lambda x, y: x[0] ** 2 - 2 * x[0] + x[1] ** 2 - 2 * x[1] + y[0] ** 2 + y[1] ** 2,
        g=lambda x, y: (y[0] - x[0]) ** 2 + (y[1] - x[1]) ** 2,
        inner=lambda x, y: (0.5 - y[0], 0.5 - y[1], y[0] - 1.5, y[1] - 1.5),
        best=Point((0.5, 0.5), (0.5, 0.5), f=-1.0, g=0.0),
        source="A.H. De Silva, PhD thesis, George Washington Univ. 1978",
    ),
    Statement(
        "FalkLiu1995",
        "strict_box",
        sizes=(2, 2),
        f=lambda x, y: x[0] ** 2 - 3 * x[0] + x[1] ** 2 - 3 * x[1] + y[0] ** 2 + y[1] ** 2,
        g=lambda x, y: (y[0] - x[0]) ** 2 + (y[1] - x[1]) ** 2,
        inner=lambda x, y: (0.5 - y[0], 0.5 - y[1], y[0] - 1.5, y[1] - 1.5),
        best=Point((0.75, 0.75), (0.75, 0.75), f=-2.25, g=0.0),
        source="J.E. Falk, J. Liu, Math. Program. 70 (1995) 47-72",
    ),
    Statement(
        "GumusFloudas2001Ex4",
        "strict_box",
        sizes=(1, 1),
        f=lambda x, y: (x[0] - 3) ** 2 + (y[0] - 2) ** 2,
        g=lambda x, y: (y[0] - 5) ** 2,
        outer=lambda x, y: (-x[0], x[0] - 8, -2 * x[0] + y[0] - 1, x[0] - 2 * y[0] + 2, x[0] + 2 * y[0] - 14),
        inner=lambda x, y: (-y[0], y[0] - 10),
        best=Point((3.0,), (5.0,), f=9.0, g=0.0),
        source="Z.H. Gumus, C.A. Floudas, J. Glob. Optim. 20 (2001) 1-31",
    ),
    Statement(
        "HendersonQuandt1958",
        "strict_box",
        sizes=(1, 1),
        f=lambda x, y: 0.5 * x[0] ** 2 + 0.5 * x[0] * y[0] - 95 * x[0],
        g=lambda x, y: y[0] ** 2 + (0.5 * x[0] - 100) * y[0],
        outer=lambda x, y: (x[0] - 200, -x[0]),
        inner=lambda x, y: (-y[0],),
        best=Point((93.33333333333333,), (26.666666666666668,), f=-3266.666666666667, g=-711.1111111111112),
        source=(
            "J.M. Henderson, R.E. Quandt, Microeconomic Theory 1958; F. Facchinei, H. Jiang, L. Qi, "
            "Math. Program. 85 (1999)"
        ),
    ),
)
