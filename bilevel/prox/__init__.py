"""Non-smooth terms of inner problems, known by their proximal maps: `BilevelProblem(f, g, prox=...)`."""

from bilevel.prox.affine import Affine as Affine
from bilevel.prox.bounded_l1 import BoundedL1 as BoundedL1
from bilevel.prox.box import Box as Box, Nonnegative as Nonnegative
from bilevel.prox.conjugate import Conjugate as Conjugate
from bilevel.prox.derivative import ProxDerivative as ProxDerivative
from bilevel.prox.elastic_net import ElasticNet as ElasticNet
from bilevel.prox.group_lasso import GroupBall as GroupBall, GroupLasso as GroupLasso
from bilevel.prox.l1 import L1 as L1, LInfBall as LInfBall
from bilevel.prox.l1_ball import L1Ball as L1Ball, LInf as LInf
from bilevel.prox.l2_ball import L2 as L2, L2Ball as L2Ball
from bilevel.prox.nuclear_norm import NuclearNorm as NuclearNorm, SpectralBall as SpectralBall
from bilevel.prox.quadratic import Quadratic as Quadratic
from bilevel.prox.simplex import Simplex as Simplex
from bilevel.prox.sums import Sum as Sum
from bilevel.prox.term import AbstractProxTerm as AbstractProxTerm
from bilevel.prox.total_variation import TV1D as TV1D
from bilevel.prox.total_variation_2d import TV2D as TV2D
