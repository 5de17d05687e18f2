"""Whole bilevel algorithms as values, run by `minimize(algorithm=...)`: one family a file, one interface, names."""

from bilevel.algorithms.accbio import HeavyBallSystem as HeavyBallSystem, accbio as accbio
from bilevel.algorithms.aid_bio import aid_bio as aid_bio, itd_bio as itd_bio
from bilevel.algorithms.algorithm import AbstractAlgorithm as AbstractAlgorithm, Evaluated as Evaluated
from bilevel.algorithms.amigo import AmIGO as AmIGO
from bilevel.algorithms.augmented_lagrangian import AugmentedLagrangian as AugmentedLagrangian
from bilevel.algorithms.bome import BOME as BOME
from bilevel.algorithms.bsa import BSA as BSA, TTSA as TTSA
from bilevel.algorithms.descent import Descent as Descent
from bilevel.algorithms.engine.direction import Coupled as Coupled
from bilevel.algorithms.engine.nested import Nested as Nested
from bilevel.algorithms.engine.neumann import Neumann as Neumann, RandomizedNeumann as RandomizedNeumann
from bilevel.algorithms.engine.recursive import Page as Page, Sarah as Sarah, Storm as Storm
from bilevel.algorithms.engine.reduction import MovingAverage as MovingAverage, Plain as Plain
from bilevel.algorithms.engine.saga import Saga as Saga
from bilevel.algorithms.engine.single_loop import SingleLoop as SingleLoop
from bilevel.algorithms.engine.turns import Turns as Turns
from bilevel.algorithms.esj_s import ESJS as ESJS
from bilevel.algorithms.f2sa import F2SA as F2SA
from bilevel.algorithms.fdehbo import FdeHBO as FdeHBO
from bilevel.algorithms.finite_sum import FiniteSum as FiniteSum
from bilevel.algorithms.fsla import FSLA as FSLA
from bilevel.algorithms.growth import Growth as Growth
from bilevel.algorithms.hoag import Tightening as Tightening, hoag as hoag
from bilevel.algorithms.ma_soba import MASOBA as MASOBA
from bilevel.algorithms.meha import MEHA as MEHA
from bilevel.algorithms.mrbo import MRBO as MRBO, SUSTAIN as SUSTAIN
from bilevel.algorithms.oracle import AbstractData as AbstractData, Draws as Draws, Oracle as Oracle
from bilevel.algorithms.outer_constraints import OuterConstraints as OuterConstraints
from bilevel.algorithms.pbgd import PBGD as PBGD
from bilevel.algorithms.registry import available as available, register_algorithm as register_algorithm
from bilevel.algorithms.saba import SABA as SABA
from bilevel.algorithms.sama import SAMA as SAMA
from bilevel.algorithms.scalebio import ScaleBiO as ScaleBiO
from bilevel.algorithms.schedule import Horizon as Horizon, Power as Power
from bilevel.algorithms.soba import SOBA as SOBA
from bilevel.algorithms.srba import SPABA as SPABA, SRBA as SRBA
from bilevel.algorithms.stocbio import StocBiO as StocBiO
from bilevel.algorithms.value_function import ValueFunction as ValueFunction
from bilevel.algorithms.vrbo import VRBO as VRBO
