"""The test problems of the literature on bilevel optimization, with their best known solutions."""

from bilevel.problems.literature.collection import (
    Reference as Reference,
    names as names,
    references as references,
    statement as statement,
)
from bilevel.problems.literature.instances import load as load
from bilevel.problems.literature.solve import solve as solve
from bilevel.problems.literature.statement import KINDS as KINDS, Point as Point, Statement as Statement
