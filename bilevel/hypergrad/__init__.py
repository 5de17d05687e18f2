"""The hypergradient estimators, one family a file."""

from bilevel.hypergrad.aid import AID as AID
from bilevel.hypergrad.certified import Certified as Certified
from bilevel.hypergrad.compiled import CompiledITD as CompiledITD
from bilevel.hypergrad.compiled_products import CompiledProducts as CompiledProducts
from bilevel.hypergrad.esj import ESJ as ESJ
from bilevel.hypergrad.finite_difference import FiniteDifference as FiniteDifference
from bilevel.hypergrad.first_order import FirstOrder as FirstOrder, Reptile as Reptile
from bilevel.hypergrad.full_kkt import FullKKT as FullKKT
from bilevel.hypergrad.gauss_newton import GaussNewton as GaussNewton
from bilevel.hypergrad.itd import ITD as ITD
from bilevel.hypergrad.kkt import KKT as KKT
from bilevel.hypergrad.online import Online as Online
from bilevel.hypergrad.penalty import Penalty as Penalty
