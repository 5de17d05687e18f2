"""Inner problems that are strictly convex under convex, nonlinear constraints."""

from __future__ import annotations

from bilevel.problems.literature.elementary import exp
from bilevel.problems.literature.statement import Point, Statement

STATEMENTS = (
    Statement(
        "AllendeStill2013",
        "strict_nonlinear",
        sizes=(2, 2),
        f=lambda x, y: (x[0] - 1) ** 2 + (x[1] - 1) ** 2 + y[0] ** 2 + y[1] ** 2,
        g=lambda x, y: y[0] ** 2 + y[1] ** 2 - 2 * x[0] * y[0] - 2 * x[1] * y[1],
        outer=lambda x, y: (-x[0], -x[1], x[0] - 2, -y[0], -y[1]),
        inner=lambda x, y: ((y[0] - 1) ** 2 - 0.25, (y[1] - 1) ** 2 - 0.25),
        best=Point((0.5, 0.5), (0.5, 0.5), f=1.0, g=-0.5),
        source="G.B. Allende, G. Still, Math. Program. 138 (2013) 309-332",
    ),
    Statement(
        "Colson2002BIPA5",
        "strict_nonlinear",
        sizes=(1, 2),
        f=lambda x, y: (x[0] - y[1]) ** 4 + (y[0] - 1) ** 2 + (y[0] - y[1]) ** 2,
        g=lambda x, y: 2 * x[0] + exp(y[0]) + y[0] ** 2 + 4 * y[0] + 2 * y[1] ** 2 - 6 * y[1],
        outer=lambda x, y: (-x[0],),
        inner=lambda x, y: (
            6 * x[0] + y[0] ** 2 + exp(y[1]) - 15,
            5 * x[0] + y[0] ** 4 - y[1] - 25,
            y[0] - 4,
            y[1] - 2,
            -y[0],
            -y[1],
        ),
        best=Point((1.9405290631821228,), (0.0, 1.2109955423476968), f=2.7497674357506527, g=0.5481052794500503),
        source="B. Colson, BIPA, tech. report 2002; B. Colson, P. Marcotte, G. Savard, COAP 30 (2005)",
    ),
    Statement(
        "LamparielloSagratella2017Ex23",
        "strict_nonlinear",
        sizes=(1, 2),
        f=lambda x, y: x[0],
        g=lambda x, y: (x[0] - y[0]) ** 2 + (y[1] + 1) ** 2,
        outer=lambda x, y: (-x[0] - 1, x[0] - 1),
        inner=lambda x, y: (y[0] ** 3 - y[1], -y[1]),
        best=Point((-1.0,), (-1.0, 0.0), f=-1.0, g=1.0),
        source="L. Lampariello, S. Sagratella, Numerically tractable optimistic bilevel problems, 2017",
    ),
    Statement(
        "Outrata1993Ex32",
        "strict_nonlinear",
        sizes=(1, 2),
        f=lambda x, y: 0.5 * ((y[0] - 3) ** 2 + (y[1] - 4) ** 2),
        g=lambda x, y: (
            0.5 * (1 + 0.2 * x[0]) * y[0] ** 2
            + 0.5 * (1 + 0.1 * x[0]) * y[1] ** 2
            - (3 + 1.333 * x[0]) * y[0]
            - x[0] * y[1]
        ),
        outer=lambda x, y: (-x[0],),
        inner=lambda x, y: (
            -0.333 * y[0] + y[1] + 0.1 * x[0] - 1,
            y[0] ** 2 + y[1] ** 2 - 0.1 * x[0] - 9,
            -y[0],
            -y[1],
        ),
        best=Point(
            (4.060406427902142,), (2.6822444295831516, 1.487146529562982), f=3.207700583209151, g=-20.52960518729374
        ),
        source="J.V. Outrata, JOTA 76 (1993) 305-320",
    ),
    Statement(
        "Outrata1994Ex31",
        "strict_nonlinear",
        sizes=(1, 2),
        f=lambda x, y: 0.5 * ((y[0] - 3) ** 2 + (y[1] - 4) ** 2),
        g=lambda x, y: (
            0.5 * (1 + 0.2 * x[0]) * y[0] ** 2
            + 0.5 * (1 + 0.1 * x[0]) * y[1] ** 2
            - (3 + 1.333 * x[0]) * y[0]
            - x[0] * y[1]
        ),
        outer=lambda x, y: (-x[0], x[0] - 10),
        inner=lambda x, y: (
            -0.333 * y[0] + y[1] + 0.1 * x[0] - 1,
            y[0] ** 2 + y[1] ** 2 - 0.1 * x[0] - 9,
            -y[0],
            -y[1],
        ),
        best=Point(
            (4.060406427888489,), (2.6822444295828007, 1.487146529562982), f=3.2077005832092627, g=-20.529605187234708
        ),
        source="J.V. Outrata, SIOPT 4 (1994) 340-357",
    ),
)
