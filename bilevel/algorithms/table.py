"""The algorithms of the library by name, with step lengths derived where the problem is first met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from bilevel._calculus import FiniteDifferences
from bilevel._optimizer import AbstractMinimizer
from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.algorithms.amigo import AmIGO
from bilevel.algorithms.bome import BOME
from bilevel.algorithms.bsa import BSA, TTSA
from bilevel.algorithms.esj_s import ESJS
from bilevel.algorithms.f2sa import F2SA
from bilevel.algorithms.fdehbo import FdeHBO
from bilevel.algorithms.fsla import FSLA
from bilevel.algorithms.ma_soba import MASOBA
from bilevel.algorithms.meha import MEHA
from bilevel.algorithms.mrbo import MRBO, SUSTAIN
from bilevel.algorithms.pbgd import PBGD
from bilevel.algorithms.saba import SABA
from bilevel.algorithms.sama import SAMA
from bilevel.algorithms.scalebio import ScaleBiO
from bilevel.algorithms.schedule import Power
from bilevel.algorithms.sign_steps import adam_rates
from bilevel.algorithms.soba import SOBA
from bilevel.algorithms.srba import SPABA, SRBA
from bilevel.algorithms.step_lengths import REDUCED, inner_step, least_curvature, outer_curvature, outer_step
from bilevel.algorithms.stocbio import StocBiO
from bilevel.algorithms.vrbo import VRBO
from bilevel.named.setting import Setting
from bilevel.requirements.why_not import why_not

Build: TypeAlias = Callable[[Setting], AbstractAlgorithm[Any]]
Made: TypeAlias = Callable[[float, float], AbstractAlgorithm[Any]]

_CONSTANT_FOR = 1000  # steps before the default schedule has much effect: a transient, which needs long steps
_WEIGHED = 11.0  # 1 + weight: x descends on f + weight (g - min g) at a y that lags, and not on Phi


def stepped(make: Made, share: float = 1.0) -> Build:
    """A builder of what is made of rho and gamma, derived from the problem; rho is so much of the longest step."""

    def build(s: Setting) -> AbstractAlgorithm[Any]:
        _demand(make(1.0, 1.0), s)
        rho = share * inner_step(s)
        return make(rho, _outer(s, rho))

    return build


def _demand(algorithm: AbstractAlgorithm[Any], s: Setting) -> None:
    """Refuse a problem to which an algorithm does not apply, before curvatures are looked for that may not exist."""
    why = why_not(algorithm, s.problem.problem)
    if why:
        raise ValueError(why)


def _outer(s: Setting, rho: float) -> float:
    try:
        return outer_step(s, rho)
    except NotImplementedError:  # no second derivatives to tell a curvature of Phi from
        return rho


def _soba(rho: float, gamma: float) -> SOBA:
    return SOBA(rho, gamma, schedule=Power(0.5, after=_CONSTANT_FOR))


def _weighed(kind: Callable[..., AbstractAlgorithm[Any]]) -> Build:
    return stepped(lambda rho, gamma: kind(rho, gamma / _WEIGHED))


def _meha(rho: float, gamma: float) -> MEHA:
    """Its proximal copy descends on g + |theta - y|^2 / 2, whose curvature is L + 1; its weight grows as k^1/4."""
    return MEHA(rho / (1 + rho), gamma / _WEIGHED, outer_schedule=Power(0.25))


def _differences(kind: Callable[..., AbstractAlgorithm[Any]]) -> Build:
    return stepped(lambda rho, gamma: kind(rho, gamma, products=FiniteDifferences()), REDUCED)


def _bome(s: Setting) -> AbstractAlgorithm[Any]:
    """One step moves x and y, and y along f as well: it is no longer than curvatures in y allow."""
    _demand(BOME(1.0, 1.0), s)
    rho = inner_step(s)
    return BOME(rho, min(_outer(s, rho), 1 / (1 / rho + outer_curvature(s))))


# Descents, whose estimators say what they require at the first estimate only. Imported where they are asked for: they
# stand on estimators, and so would every run by a name.


def _aid_bio(s: Setting) -> AbstractAlgorithm[Any]:
    from bilevel.algorithms.aid_bio import aid_bio

    _demand(SOBA(1.0, 1.0), s)
    rho = inner_step(s)
    return aid_bio(rho, outer_step(s, rho))


def _itd_bio(s: Setting) -> AbstractAlgorithm[Any]:
    from bilevel.algorithms.aid_bio import itd_bio

    _demand(SOBA(1.0, 1.0), s)
    rho = inner_step(s)
    return itd_bio(rho, outer_step(s, rho))


def _accbio(s: Setting) -> AbstractAlgorithm[Any]:
    from bilevel.algorithms.accbio import accbio

    _demand(SOBA(1.0, 1.0), s)
    rho = inner_step(s)
    return accbio(least_curvature(s), 1 / rho, outer_step(s, rho))


def _hoag(s: Setting) -> AbstractAlgorithm[Any]:
    from bilevel.algorithms.hoag import hoag

    _demand(SOBA(1.0, 1.0), s)
    step: float | AbstractMinimizer = outer_step(s, inner_step(s))
    return hoag(s.inner(), s.linear(), step)


def _scalebio(s: Setting) -> AbstractAlgorithm[Any]:
    algorithm = ScaleBiO(1.0, 1.0, schedule=Power(0.5, after=_CONSTANT_FOR))
    _demand(algorithm, s)
    inner, outer = adam_rates(s, algorithm.weight)
    return replace(algorithm, inner_step=inner, outer_step=outer)


ROWS: tuple[tuple[str, Build, str], ...] = (
    ("soba", stepped(_soba), "one loop: y, v and x step together, each along a batch; no inner or linear solves"),
    ("saba", stepped(SABA, REDUCED), "soba with tables of what blocks said: constant steps converge"),
    ("ma-soba", stepped(MASOBA), "soba whose outer direction is a moving average"),
    ("srba", stepped(SRBA, REDUCED), "recursive differences, all the data now and then: converges without tables"),
    ("srba-fd", _differences(SRBA), "srba from first derivatives only"),
    ("spaba", stepped(SPABA, REDUCED), "srba that decides by a coin when to see all the data"),
    ("spaba-fd", _differences(SPABA), "spaba from first derivatives only"),
    ("fsla", stepped(FSLA), "y, v and x in turns, with recursive momentum on x"),
    ("amigo", stepped(AmIGO), "ten steps of y, ten of v, one of x, all started warm"),
    ("stocbio", stepped(StocBiO), "ten steps of y, then a Neumann series over batches, one step of x"),
    ("bsa", stepped(BSA), "ten steps of y, then a Neumann series of random length"),
    ("ttsa", stepped(TTSA), "one step of y, a Neumann series of random length, and two time scales"),
    ("sustain", stepped(SUSTAIN), "recursive momentum on y and x, with a Neumann series of random length"),
    ("mrbo", stepped(MRBO), "recursive momentum on y and x, with a Neumann series"),
    ("vrbo", stepped(VRBO), "recursive differences in an inner loop, with a Neumann series"),
    ("fdehbo", stepped(FdeHBO), "recursive momentum on y, v and x, from first derivatives only"),
    ("accbio", _accbio, "Nesterov steps of y and x, heavy ball for v: for problems without noise"),
    ("hoag", _hoag, "inexact hypergradients that become more accurate from step to step, without noise"),
    ("aid-bio", _aid_bio, "ten steps of y, ten of conjugate gradients, one of x, all started warm"),
    ("itd-bio", _itd_bio, "ten steps of y, differentiated in reverse, one of x"),
    ("esj-s", stepped(ESJS), "dy/dx by random perturbations of ten steps of y on the same batches"),
    ("f2sa", stepped(lambda rho, gamma: F2SA(rho, gamma, order=1)), "two copies of y, first derivatives only"),
    ("f2sa-2", stepped(lambda rho, gamma: F2SA(rho, gamma, order=2)), "the same, central: bias of 1 / weight^2"),
    (
        "pbgd",
        _weighed(PBGD),
        "descent on f + weight (g - min g), first derivatives only",
    ),
    (
        "g-pbgd",
        _weighed(partial(PBGD, form="gradient")),
        "descent on f + weight |grad g|^2",
    ),
    ("bome", _bome, "descent on f as far as g - min g falls too, first derivatives only"),
    (
        "meha",
        stepped(_meha),
        "Moreau envelope of g, first derivatives only, also with a prox term",
    ),
    ("sama", stepped(SAMA), "one difference of gradients with the identity in the place of the inverse Hessian"),
    ("scalebio", _scalebio, "f2sa by AdamW on x and both copies of y: for large networks"),
)
