"""Whole bilevel algorithms as values, run by `minimize(algorithm=...)`: one family a file, one interface, names."""

from bilevel.algorithms.algorithm import AbstractAlgorithm as AbstractAlgorithm, Evaluated as Evaluated
from bilevel.algorithms.descent import Descent as Descent
from bilevel.algorithms.direction import AbstractDirection as AbstractDirection, Coupled as Coupled, Joint as Joint
from bilevel.algorithms.fdehbo import FdeHBO as FdeHBO
from bilevel.algorithms.finite_sum import FiniteSum as FiniteSum
from bilevel.algorithms.ma_soba import MASOBA as MASOBA
from bilevel.algorithms.oracle import AbstractData as AbstractData, Block as Block, Draws as Draws, Oracle as Oracle
from bilevel.algorithms.reduction import (
    AbstractReduction as AbstractReduction,
    MovingAverage as MovingAverage,
    Page as Page,
    Plain as Plain,
    Reduced as Reduced,
    Sarah as Sarah,
    Storm as Storm,
)
from bilevel.algorithms.registry import available as available, register_algorithm as register_algorithm
from bilevel.algorithms.saba import SABA as SABA
from bilevel.algorithms.saga import Saga as Saga
from bilevel.algorithms.schedule import Power as Power
from bilevel.algorithms.single_loop import AbstractPreset as AbstractPreset, SingleLoop as SingleLoop
from bilevel.algorithms.soba import SOBA as SOBA
from bilevel.algorithms.srba import SPABA as SPABA, SRBA as SRBA
