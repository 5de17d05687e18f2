"""Non-smooth terms of inner problems, known by their proximal maps: `BilevelProblem(f, g, prox=...)`."""

from bilevel.prox.derivative import ProxDerivative as ProxDerivative
from bilevel.prox.l1 import L1 as L1, LInfBall as LInfBall
from bilevel.prox.term import AbstractProxTerm as AbstractProxTerm
