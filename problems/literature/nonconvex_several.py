"""Inner problems that are not convex, of several variables."""

from __future__ import annotations

from bilevel.problems.literature.elementary import exp
from bilevel.problems.literature.statement import Point, Statement

STATEMENTS = (
    Statement(
        "GumusFloudas2001Ex5",
        "nonconvex",
        sizes=(1, 2),
        f=lambda x, y: x[0],
        g=lambda x, y: -y[0] + 0.5864 * y[0] ** 0.67,
        outer=lambda x, y: (-x[0] + 0.1, x[0] - 10),
        inner=lambda x, y: (
            -y[0] + 0.1,
            -y[1] + 0.1,
            y[0] - 10,
            y[1] - 10,
            0.0332333 / y[1] + 0.1 * y[0] - 1,
            (4 * x[0] + 2 * x[0] ** (-0.71)) / y[1] + 0.0332333 * x[0] ** (-1.3) - 1,
        ),
        best=Point((0.19361609660800708,), (9.966766699999999, 10.0), f=0.19361609660800708, g=-7.230078386577609),
        source="Z.H. Gumus, C.A. Floudas, J. Glob. Optim. 20 (2001) 1-31",
    ),
    Statement(
        "KleniatiAdjiman2014Ex4",
        "nonconvex",
        sizes=(5, 5),
        f=lambda x, y: (
            -(
                x[0] ** 2
                + x[1] ** 2
                + x[2] ** 2
                + x[3] ** 2
                + x[4] ** 2
                + y[0] ** 2
                + y[1] ** 2
                + y[2] ** 2
                + y[3] ** 2
                + y[4] ** 2
            )
        ),
        g=lambda x, y: (
            y[0] ** 3 + y[1] ** 2 * x[0] + y[1] ** 2 * x[1] + 0.1 * y[2] + (y[3] ** 2 + y[4] ** 2) * x[2] * x[3] * x[4]
        ),
        outer=lambda x, y: (
            y[0] * y[1] - x[0],
            x[1] * y[0] ** 2,
            x[0] - exp(x[1]) + y[2],
            -1 - x[0],
            x[0] - 1,
            -1 - x[1],
            x[1] - 1,
            -1 - x[2],
            x[2] - 1,
            -1 - x[3],
            x[3] - 1,
            -1 - x[4],
            x[4] - 1,
        ),
        inner=lambda x, y: (
            x[0] - y[2] ** 2 - 0.2,
            -1 - y[0],
            y[0] - 1,
            -1 - y[1],
            y[1] - 1,
            -1 - y[2],
            y[2] - 1,
            -1 - y[3],
            y[3] - 1,
            -1 - y[4],
            y[4] - 1,
        ),
        best=Point((1.0, -1.0, -1.0, -1.0, -1.0), (-1.0, -1.0, -1.0, -1.0, -1.0), f=-10.0, g=-3.1),
        certain=False,
        source="P.-M. Kleniati, C.S. Adjiman, J. Glob. Optim. 60 (2014) 459-481",
    ),
    Statement(
        "MitsosBarton2006Ex325",
        "nonconvex",
        sizes=(2, 3),
        f=lambda x, y: x[0] * y[0] + x[1] * y[0] ** 2 - x[0] * x[1] * y[2],
        g=lambda x, y: x[0] * y[0] ** 2 + x[1] * y[1] * y[2],
        outer=lambda x, y: (-1 - x[0], x[0] - 1, -1 - x[1], x[1] - 1, 0.1 * y[0] * y[1] - x[0] ** 2, x[1] * y[0] ** 2),
        inner=lambda x, y: (
            -1 - y[0],
            y[0] - 1,
            -1 - y[1],
            y[1] - 1,
            -1 - y[2],
            y[2] - 1,
            y[0] ** 2 - y[1] * y[2],
            y[1] ** 2 * y[2] - y[0] * x[0],
            -(y[2] ** 2) + 0.1,
        ),
        best=Point((-1.0, -1.0), (-1.0, 1.0, 1.0), f=-1.0, g=-2.0),
        certain=False,
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex326",
        "nonconvex",
        sizes=(2, 3),
        f=lambda x, y: x[0] * y[0] + x[1] * y[1] ** 2 + x[0] * x[1] * y[2] ** 3,
        g=lambda x, y: x[0] * y[0] ** 2 + x[1] * y[1] ** 2 + (x[0] - x[1]) * y[2] ** 2,
        outer=lambda x, y: (
            -1 - x[0],
            x[0] - 1,
            -1 - x[1],
            x[1] - 1,
            0.1 - x[0] ** 2,
            1.5 - y[0] ** 2 - y[1] ** 2 - y[2] ** 2,
            -2.5 + y[0] ** 2 + y[1] ** 2 + y[2] ** 2,
        ),
        inner=lambda x, y: (-1 - y[0], y[0] - 1, -1 - y[1], y[1] - 1, -1 - y[2], y[2] - 1),
        best=Point((-1.0, -1.0), (1.0, 1.0, -0.7071067811865475), f=-2.353553390593274, g=-2.0),
        certain=False,
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex327",
        "nonconvex",
        sizes=(5, 5),
        f=lambda x, y: (
            x[0] ** 2
            + x[1] ** 2
            + x[2] ** 2
            + x[3] ** 2
            + x[4] ** 2
            + y[0] ** 2
            + y[1] ** 2
            + y[2] ** 2
            + y[3] ** 2
            + y[4] ** 2
        ),
        g=lambda x, y: (
            y[0] ** 3 + y[1] ** 2 * x[0] + y[1] ** 2 * x[1] + 0.1 * y[2] + (y[3] ** 2 + y[4] ** 2) * x[2] * x[3] * x[4]
        ),
        outer=lambda x, y: (
            y[0] * y[1] - x[0],
            x[1] * y[0] ** 2,
            x[0] - exp(x[1]) + y[2],
            -1 - x[0],
            x[0] - 1,
            -1 - x[1],
            x[1] - 1,
            -1 - x[2],
            x[2] - 1,
            -1 - x[3],
            x[3] - 1,
            -1 - x[4],
            x[4] - 1,
        ),
        inner=lambda x, y: (
            -1 - y[0],
            y[0] - 1,
            -1 - y[1],
            y[1] - 1,
            -1 - y[2],
            y[2] - 1,
            -1 - y[3],
            y[3] - 1,
            -1 - y[4],
            y[4] - 1,
            y[0] * y[1] - 0.3,
            x[0] - y[2] ** 2 - 0.2,
            -exp(y[2]) + y[3] * y[4] - 0.1,
        ),
        best=Point((0.0, 0.0, 0.0, 0.0, 0.0), (-1.0, 0.0, -1.0, 0.0, 0.0), f=2.0, g=-1.1),
        certain=False,
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex328",
        "nonconvex",
        sizes=(5, 5),
        f=lambda x, y: (
            -(
                x[0] ** 2
                + x[1] ** 2
                + x[2] ** 2
                + x[3] ** 2
                + x[4] ** 2
                + y[0] ** 2
                + y[1] ** 2
                + y[2] ** 2
                + y[3] ** 2
                + y[4] ** 2
            )
        ),
        g=lambda x, y: (
            y[0] ** 3 + y[1] ** 2 * x[0] + y[1] ** 2 * x[1] + 0.1 * y[2] + (y[3] ** 2 + y[4] ** 2) * x[2] * x[3] * x[4]
        ),
        outer=lambda x, y: (
            y[0] * y[1] - x[0],
            x[1] * y[0] ** 2,
            x[0] - exp(x[1]) + y[2],
            -1 - x[0],
            x[0] - 1,
            -1 - x[1],
            x[1] - 1,
            -1 - x[2],
            x[2] - 1,
            -1 - x[3],
            x[3] - 1,
            -1 - x[4],
            x[4] - 1,
        ),
        inner=lambda x, y: (
            -1 - y[0],
            y[0] - 1,
            -1 - y[1],
            y[1] - 1,
            -1 - y[2],
            y[2] - 1,
            -1 - y[3],
            y[3] - 1,
            -1 - y[4],
            y[4] - 1,
            y[0] * y[1] - 0.3,
            x[0] - y[2] ** 2 - 0.2,
            -exp(y[2]) + y[3] * y[4] - 0.1,
        ),
        best=Point((1.0, -1.0, -1.0, -1.0, -1.0), (-1.0, 1.0, -1.0, -1.0, 1.0), f=-10.0, g=-3.1),
        certain=False,
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "NieWangYe2017Ex52",
        "nonconvex",
        sizes=(2, 3),
        f=lambda x, y: x[0] * y[0] + x[1] * y[1] + x[0] * x[1] * y[0] * y[1] * y[2],
        g=lambda x, y: x[0] * y[0] ** 2 + x[1] ** 2 * y[1] * y[2] - y[0] * y[2] ** 2,
        outer=lambda x, y: (-1 - x[0], x[0] - 1, -1 - x[1], x[1] - 1, y[0] * y[1] - x[0] ** 2),
        inner=lambda x, y: (1 - y[0] ** 2 - y[1] ** 2 - y[2] ** 2, y[0] ** 2 + y[1] ** 2 + y[2] ** 2 - 2),
        best=Point(
            (-1.0, -1.0),
            (1.1097122302158273, 0.3143330791290866, -0.8183724269693375),
            f=-1.7095093755832425,
            g=-2.2319141361281085,
        ),
        certain=False,
        source="J. Nie, L. Wang, J.J. Ye, SIOPT 27 (2017) 1728-1757",
    ),
    Statement(
        "NieWangYe2017Ex57",
        "nonconvex",
        sizes=(2, 3),
        f=lambda x, y: 0.5 * x[0] ** 2 * y[0] + x[1] * y[1] ** 2 - (x[0] + x[1] ** 2) * y[2],
        g=lambda x, y: x[1] * (y[0] * y[1] * y[2] + y[1] ** 2 - y[2] ** 3),
        outer=lambda x, y: (-1 - x[0], x[0] - 1, -1 - x[1], x[1] - 1, -x[0] - x[1] + x[0] ** 2 + y[0] ** 2 + y[1] ** 2),
        inner=lambda x, y: (-x[0] + y[0] ** 2 + y[1] ** 2 + y[2] ** 2, -1 + 2 * y[1] * y[2]),
        best=Point((1.0, 1.0), (0.0, 0.0, 1.0), f=-2.0, g=-1.0),
        certain=False,
        source="J. Nie, L. Wang, J.J. Ye, SIOPT 27 (2017) 1728-1757",
    ),
    Statement(
        "NieWangYe2017Ex58",
        "nonconvex",
        sizes=(4, 4),
        f=lambda x, y: (x[0] + x[1] + x[2] + x[3]) * (y[0] + y[1] + y[2] + y[3]),
        g=lambda x, y: x[0] * y[0] + x[1] * y[1] + 0.1 * y[2] + 0.5 * y[3] - y[2] * y[3],
        outer=lambda x, y: (x[0] ** 2 + x[1] ** 2 + x[2] ** 2 + x[3] ** 2 - 1, y[2] ** 2 - x[3], y[1] * y[3] - x[0]),
        inner=lambda x, y: (
            y[0] ** 2 + 2 * y[1] ** 2 + 3 * y[2] ** 2 + 4 * y[3] ** 2 - x[0] ** 2 - x[2] ** 2 - x[1] - x[3],
            y[1] * y[2] - y[0] * y[3],
        ),
        best=Point(
            (0.5135467980295566, 0.5049900199600799, 0.4882051282051282, 0.4928594631963147),
            (-0.8346441768779662, -0.4103684374610279, -0.2105911330049261, -0.2887226366652496),
            f=-3.4879574959027813,
            g=-0.8620836687667476,
        ),
        certain=False,
        source="J. Nie, L. Wang, J.J. Ye, SIOPT 27 (2017) 1728-1757",
    ),
    Statement(
        "NieWangYe2017Ex61",
        "nonconvex",
        sizes=(2, 2),
        f=lambda x, y: y[0] ** 3 * (x[0] ** 2 - 3 * x[0] * x[1]) - y[0] ** 2 * y[1] + y[1] * x[1] ** 3,
        g=lambda x, y: y[0] * y[1] ** 2 - y[1] ** 3 - y[0] ** 2 * (x[1] - x[0] ** 2),
        outer=lambda x, y: (-1 - x[0], x[0] - 1, -1 - x[1], x[1] - 1, -y[1] - y[0] * (1 - x[0] ** 2)),
        inner=lambda x, y: (y[0] ** 2 + y[1] ** 2 - 1,),
        best=Point(
            (0.5712187958883994, -1.0),
            (-0.1638388245374343, 0.9864871208354385),
            f=-1.0219391428840063,
            g=-1.083845721736318,
        ),
        certain=False,
        source="J. Nie, L. Wang, J.J. Ye, SIOPT 27 (2017) 1728-1757",
    ),
    Statement(
        "SinhaMaloDeb2014TP7",
        "nonconvex",
        sizes=(2, 2),
        f=lambda x, y: -(x[0] + y[0]) * (x[1] + y[1]) / (1 + x[0] * y[0] + x[1] * y[1]),
        g=lambda x, y: (x[0] + y[0]) * (x[1] + y[1]) / (1 + x[0] * y[0] + x[1] * y[1]),
        outer=lambda x, y: (x[0] ** 2 + x[1] ** 2 - 100, x[0] - x[1], -x[0], -x[1]),
        inner=lambda x, y: (y[0] - x[0], y[1] - x[1], -y[0], -y[1]),
        best=Point(
            (7.0710678118654755, 7.0710678118654755),
            (7.0710678118654755, 0.0),
            f=-1.9607843137254901,
            g=1.9607843137254901,
        ),
        source="A. Sinha, P. Malo, K. Deb, CEC 2014, 1870-1877",
    ),
)
