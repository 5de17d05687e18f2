"""Inner problems that are not convex, of one variable at each level."""

from __future__ import annotations

import torch

from bilevel.problems.literature.statement import Point, Statement

STATEMENTS = (
    Statement(
        "KleniatiAdjiman2014Ex3",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: x[0] - y[0],
        g=lambda x, y: 0.5 * x[0] * y[0] ** 2 - x[0] * y[0] ** 3,
        outer=lambda x, y: (-1 - x[0], x[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((0.0,), (1.0,), f=-1.0, g=0.0),
        source="P.-M. Kleniati, C.S. Adjiman, J. Glob. Optim. 60 (2014) 459-481",
    ),
    Statement(
        "Mirrlees1999",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: (x[0] - 2) ** 2 + (y[0] - 1) ** 2,
        g=lambda x, y: -x[0] * torch.exp(-((y[0] + 1) ** 2)) - torch.exp(-((y[0] - 1) ** 2)),
        inner=lambda x, y: (-2 - y[0], y[0] - 2),
        best=Point((1.0,), (0.9575040240772688,), f=1.0018059079696253, g=-1.0198658183311207),
        source="J.A. Mirrlees, Rev. Econ. Stud. 66 (1999) 3-21 (box added by Ye & Zhu 2010)",
    ),
    Statement(
        "MitsosBarton2006Ex310",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: y[0],
        g=lambda x, y: x[0] * (16 * y[0] ** 4 + 2 * y[0] ** 3 - 8 * y[0] ** 2 - 1.5 * y[0] + 0.5),
        outer=lambda x, y: (0.1 - x[0], x[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((0.5,), (0.5,), f=0.5, g=-0.5),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex311",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: y[0],
        g=lambda x, y: x[0] * (16 * y[0] ** 4 + 2 * y[0] ** 3 - 8 * y[0] ** 2 - 1.5 * y[0] + 0.5),
        outer=lambda x, y: (-1 - x[0], x[0] - 1),
        inner=lambda x, y: (-y[0] - 0.8, y[0] - 1),
        best=Point((0.0,), (-0.8,), f=-0.8, g=0.0),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex313",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: x[0] - y[0],
        g=lambda x, y: 0.5 * x[0] * y[0] ** 2 - x[0] ** 3 * y[0],
        outer=lambda x, y: (-1 - x[0], x[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((0.0,), (1.0,), f=-1.0, g=0.0),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex314",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
        g=lambda x, y: y[0] ** 3 / 3 - x[0] * y[0],
        outer=lambda x, y: (-1 - x[0], x[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((0.25,), (0.5,), f=0.25, g=-0.08333333333333334),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex316",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: 2 * x[0] + y[0],
        g=lambda x, y: -0.5 * x[0] * y[0] ** 2 - 0.25 * y[0] ** 4,
        outer=lambda x, y: (-1 - x[0], x[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((-1.0,), (0.0,), f=-2.0, g=0.0),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex317",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: (x[0] + 0.5) ** 2 + 0.5 * y[0] ** 2,
        g=lambda x, y: 0.5 * x[0] * y[0] ** 2 + 0.25 * y[0] ** 4,
        outer=lambda x, y: (-1 - x[0], x[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((-0.25,), (0.5,), f=0.1875, g=-0.015625),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex320",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
        g=lambda x, y: y[0] ** 3 / 3 - x[0] ** 2 * y[0],
        outer=lambda x, y: (-1 - x[0], x[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((0.5,), (0.5,), f=0.3125, g=-0.08333333333333334),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex321",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: (x[0] + 0.6) ** 2 + y[0] ** 2,
        g=lambda x, y: (
            y[0] ** 4
            + 2 / 15 * (1 - x[0]) * y[0] ** 3
            + (-0.02 * x[0] ** 2 + 0.16 * x[0] - 0.4) * y[0] ** 2
            + (0.004 * x[0] ** 3 - 0.036 * x[0] ** 2 + 0.08 * x[0]) * y[0]
        ),
        outer=lambda x, y: (-1 - x[0], x[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((-0.5544581784386734,), (0.45544554455445546,), f=0.2095047015656282, g=-0.06559447874347919),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex322",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: (x[0] + 0.6) ** 2 + y[0] ** 2,
        g=lambda x, y: (
            y[0] ** 4
            + 2 / 15 * (1 - x[0]) * y[0] ** 3
            + (-0.02 * x[0] ** 2 + 0.16 * x[0] - 0.4) * y[0] ** 2
            + (0.004 * x[0] ** 3 - 0.036 * x[0] ** 2 + 0.08 * x[0]) * y[0]
        ),
        outer=lambda x, y: (-1 - x[0], x[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1, 0.01 * (1 + x[0] ** 2) - y[0] ** 2),
        best=Point((-0.5544581784386734,), (0.45544554455445546,), f=0.2095047015656282, g=-0.06559447874347919),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex324",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: x[0] ** 2 - y[0],
        g=lambda x, y: ((y[0] - 1 - 0.1 * x[0]) ** 2 - 0.5 - 0.5 * x[0]) ** 2,
        outer=lambda x, y: (-x[0], x[0] - 1),
        inner=lambda x, y: (-y[0], y[0] - 3),
        best=Point((0.21066213402341266,), (1.7990964615365037,), f=-1.7547179268252053, g=4.930380657631324e-32),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "MitsosBarton2006Ex39",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: x[0],
        g=lambda x, y: y[0] ** 3,
        outer=lambda x, y: (-x[0] + y[0], -x[0] - 10, x[0] - 10),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((-1.0,), (-1.0,), f=-1.0, g=-1.0),
        source="A. Mitsos, P.I. Barton, A Test Set for Bilevel Programs, MIT report 2006",
    ),
    Statement(
        "PaulaviciusAdjiman2017b",
        "nonconvex",
        sizes=(1, 1),
        f=lambda x, y: x[0] + y[0],
        g=lambda x, y: 0.5 * x[0] * y[0] ** 2 - x[0] ** 3 * y[0],
        outer=lambda x, y: (-1 - x[0], x[0] - 1, -1 - y[0], y[0] - 1),
        inner=lambda x, y: (-1 - y[0], y[0] - 1),
        best=Point((-1.0,), (-1.0,), f=-2.0, g=-1.5),
        source="R. Paulavicius, P.-M. Kleniati, C.S. Adjiman, BASBL Part II, 2017",
    ),
)
