"""Objectives as sums of terms, and the proximal algorithms that minimize them: images, signals, linear programs."""

from bilevel.terms.admm import ADMM as ADMM, HQS as HQS
from bilevel.terms.convolution import Convolution as Convolution, Gradient as Gradient
from bilevel.terms.denoiser import denoised as denoised, denoiser_start as denoiser_start
from bilevel.terms.expression import Expression as Expression, SumOfTerms as SumOfTerms, Term as Term
from bilevel.terms.functions import (
    box as box,
    equal as equal,
    inner as inner,
    nonnegative as nonnegative,
    norm1 as norm1,
    norm2_sum as norm2_sum,
    penalty as penalty,
    prior as prior,
    sum_squares as sum_squares,
    variable as variable,
)
from bilevel.terms.gram import Gram as Gram
from bilevel.terms.linear_map import (
    AbstractLinearMap as AbstractLinearMap,
    Identity as Identity,
    LinearMap as LinearMap,
    Stacked as Stacked,
    adjoint_gap as adjoint_gap,
)
from bilevel.terms.linearized import (
    PDHG as PDHG,
    LinearizedADMM as LinearizedADMM,
    ProximalGradient as ProximalGradient,
)
from bilevel.terms.problem import proximal_problem as proximal_problem
from bilevel.terms.sampling import (
    Diagonal as Diagonal,
    FourierSamples as FourierSamples,
    Matrix as Matrix,
    Mosaic as Mosaic,
    bayer as bayer,
)
from bilevel.terms.scheme import AbstractAlgorithm as AbstractAlgorithm, Minimized as Minimized, Scheme as Scheme
from bilevel.terms.wavelets import Wavelets as Wavelets
