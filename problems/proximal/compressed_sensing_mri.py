"""Magnetic resonance images from a part of their frequencies, the weights of the priors learned implicitly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, SEED, SIZE, Range
from bilevel.hypergrad.aid import AID
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems.proximal._pictures import Pictures, draw_images, images, noise, psnr
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.gmres import GMRES
from bilevel.terms import (
    ADMM,
    FourierSamples,
    Gradient,
    Scheme,
    Wavelets,
    norm1,
    norm2_sum,
    proximal_problem,
    sum_squares,
    variable,
)

_RHO = 0.05
_SHARE = Range(open=True, below=1.0, closed=True)


@final
@dataclass(frozen=True, eq=False)
class CompressedSensing(AbstractPortable):
    """y*(x) = argmin |M F y - b|^2 / 2 + exp(x_0) TV(y) + exp(x_1) |W y|_1, W a wavelet transform.

    A is the sampled part of the unitary Fourier transform. Minimized by `ADMM`, whose systems are solved by two
    transforms, and differentiated as its fixed point. f is the mean squared error on training images.

    Args:
        truth: training images `(n, side, side)`.
        seen: their samples.
        test_truth: other images.
        test_seen: their samples.
        mask: M.
    """

    truth: Tensor
    seen: Tensor
    test_truth: Tensor
    test_seen: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        demand_types(self)

    def scheme(self, x: Tensor, b: Tensor) -> Scheme:
        """The algorithm for samples b."""
        shape = tuple(self.mask.shape)
        y, weights = variable(*shape), x.exp()
        objective = (
            0.5 * sum_squares(FourierSamples(self.mask) @ y - b)
            + weights[0] * norm2_sum(Gradient(shape) @ y)
            + weights[1] * norm1(Wavelets(shape, 2) @ y)
        )
        return ADMM(_RHO).on(objective)

    def training(self, x: Tensor) -> Scheme:
        """That for the training images."""
        return self.scheme(x, self.seen)

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean squared error, times 1000."""
        return 1000 * (y - self.truth).square().mean()

    def filled(self, b: Tensor) -> Tensor:
        """Zeros for what was not sampled: A' b."""
        return FourierSamples(self.mask).adjoint(b)

    def restored(self, x: Tensor, b: Tensor) -> Tensor:
        """y*."""
        return self.scheme(x, b).solve(self.filled(b), tol=1e-4, max_steps=500).y

    def metrics(self, x: Tensor, y: Any) -> Mapping[str, float]:
        """PSNR on the test images, and the weights."""
        return {
            "PSNR zeros filled in": psnr(self.filled(self.test_seen), self.test_truth),
            "PSNR learned": psnr(self.restored(x.detach(), self.test_seen), self.test_truth),
            "weight of total variation": float(x[0].exp()),
            "weight of wavelets": float(x[1].exp()),
        }

    def plot(self, figure: Any, x: Tensor, y: Any) -> None:
        """Test images before and after."""
        rows = {
            "zeros filled in": self.filled(self.test_seen),
            "learned": self.restored(x.detach(), self.test_seen),
        }
        draw_images(figure, rows, self.test_truth)
        figure.tight_layout()


@checked(side=SIZE, train=SIZE, test=SIZE, share=_SHARE, level=AT_LEAST_0, seed=SEED)
def compressed_sensing_mri(
    *,
    side: int = 32,
    train: int = 6,
    test: int = 16,
    share: float = 0.35,
    level: float = 0.01,
    pictures: Pictures = "auto",
    data: str = "",
    seed: int = 0,
) -> Instance:
    """Learn the weights of total variation and wavelets; see :class:`CompressedSensing`.

    Args:
        side: of an image, divisible by 4.
        train: images for training.
        test: images for testing.
        share: of the frequencies that are sampled, low ones more often; at most 1.
        level: the standard deviation of the noise of a sample.
        pictures: as for `deblurring`.
        data: as for `deblurring`.
        seed: of parts, noise and mask.

    Example:
        >>> instance = compressed_sensing_mri(train=2, test=2, side=16, pictures="synthetic")
        >>> instance.x0.shape
        torch.Size([2])
    """
    mask = _mask(side, share, seed)
    made, origin = [], ""
    for number, count in enumerate((train, test)):
        truth, origin = images(count, side, test=bool(number), pictures=pictures, data=data, seed=seed)
        seen = FourierSamples(mask).forward(truth)
        made += [truth, seen + noise(seen, level, 100 + 2 * seed + number)]
    own = CompressedSensing(made[0], made[1], made[2], made[3], mask)
    x0 = torch.full((2,), math.log(3e-3), dtype=torch.float64, device="cpu")
    return Instance(
        problem=proximal_problem(own.f, own.training),
        x0=x0,
        y0=own.training(x0).start(own.filled(own.seen)),
        description=f"{share:.0%} of the frequencies, learned weights of two priors, {origin}",
        metrics=own.metrics,
        plot=own.plot,
        settings={
            "estimator": AID(Anderson(1e-3, max_steps=500), GMRES(1e-3, max_steps=200)),
            "outer_step": 0.2,
            "max_steps": 25,
        },
    )


def _mask(side: int, share: float, seed: int) -> Tensor:
    """Frequencies drawn with a probability that falls with their distance from zero; the lowest ones all."""
    at = torch.fft.fftfreq(side, dtype=torch.float64, device="cpu")
    distance = (at.unsqueeze(-1).square() + at.square()).sqrt()
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(side, side, generator=generator, dtype=torch.float64, device="cpu").log() * (0.1 + distance) ** 2
    keys = torch.where(distance < 0.08, 1.0, keys)
    count = max(1, min(side * side, round(share * side * side)))
    chosen = keys.reshape(-1).topk(count).indices
    mask = torch.zeros(side * side, dtype=torch.bool, device="cpu")
    mask[chosen] = True
    return mask.reshape(side, side)
