"""Whole bilevel algorithms as values, run by `minimize(algorithm=...)`: one a file, one interface, names."""

from bilevel.algorithms.algorithm import AbstractAlgorithm as AbstractAlgorithm, Evaluated as Evaluated
from bilevel.algorithms.descent import Descent as Descent
from bilevel.algorithms.oracle import AbstractData as AbstractData, Draws as Draws, Oracle as Oracle
from bilevel.algorithms.registry import available as available, register_algorithm as register_algorithm
from bilevel.algorithms.schedule import Power as Power
from bilevel.algorithms.soba import SOBA as SOBA
