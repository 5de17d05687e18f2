"""A lens and the deconvolution behind it, designed together for depth: extended depth of field."""

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
from bilevel.hypergrad.itd import ITD
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems.proximal._pictures import Pictures, draw_images, images, noise, psnr
from bilevel.solvers.own_steps import OwnSteps
from bilevel.terms import ADMM, Convolution, Gradient, Scheme, norm1, proximal_problem, sum_squares, variable

_PUPIL = 15  # samples across, of a kernel of as many pixels
_SIDE = Range(least=float(_PUPIL))
_DEPTHS = (0.0, 0.5, 1.0)  # of the largest defocus


@final
@dataclass(frozen=True, eq=False)
class JointOptics(AbstractPortable):
    """The kernel of a lens with phase p(x) at defocus d is |F[pupil exp(i (p(x) + d r^2))]|^2, of sum one.

    Images of several unknown depths d are seen through it and restored by N steps of ADMM for the mean kernel, without
    knowing d. x: the coefficients of p, u^3, v^3, u v^2 and u^2 v in the pupil's coordinates (a cubic phase makes the
    blur alike at all depths), and the logarithms of the schedule (rho_k, threshold_k). So what is learned is in the
    image that is seen, in the algorithm, and in its operator. f is the mean squared error.

    Args:
        truth: training images `(n, side, side)`.
        test_truth: other images.
        noise: of training and of test images, `(depths, n, side, side)` each.
        test_noise: see there.
        defocus: the largest d, in radians at the rim.
        steps: N.
        learn_phase: False: the lens stays as it is, and the schedule alone is learned.
    """

    truth: Tensor
    test_truth: Tensor
    noise: Tensor
    test_noise: Tensor
    defocus: float
    steps: int
    learn_phase: bool = True

    def __post_init__(self) -> None:
        demand_types(self)

    def kernels(self, phase: Tensor) -> Tensor:
        """One for each depth: `(depths, k, k)`."""
        at = torch.linspace(-1, 1, _PUPIL, dtype=phase.dtype, device=phase.device)
        u, v = at.unsqueeze(-1), at
        r = u.square() + v.square()
        own = phase[0] * u**3 + phase[1] * v**3 + phase[2] * u * v**2 + phase[3] * u**2 * v
        kernels = []
        for share in _DEPTHS:
            angle = own + share * self.defocus * r
            field = torch.where(r <= 1, torch.polar(torch.ones_like(angle), angle), 0)
            padded = torch.nn.functional.pad(field, (0, _PUPIL, 0, _PUPIL))  # two pixels a diffraction limit
            spectrum = torch.fft.fft2(padded)
            power = torch.fft.fftshift(spectrum.real.square() + spectrum.imag.square())
            start = _PUPIL - _PUPIL // 2
            kernel = power[start : start + _PUPIL, start : start + _PUPIL]
            kernels.append(kernel / kernel.sum())
        return torch.stack(kernels)

    def seen(self, x: Mapping[str, Tensor], truth: Tensor, noise: Tensor) -> Tensor:
        """What the sensor sees: `(depths, n, side, side)`."""
        shape = tuple(truth.shape[-2:])
        kernels = self.kernels(self._phase(x))
        return torch.stack([Convolution(kernel, shape).forward(truth) for kernel in kernels]) + noise

    def _phase(self, x: Mapping[str, Tensor]) -> Tensor:
        return x["phase"] if self.learn_phase else x["phase"].detach()

    def scheme(self, x: Mapping[str, Tensor], truth: Tensor, noise: Tensor) -> Scheme:
        """The reconstruction."""
        shape, b = tuple(truth.shape[-2:]), self.seen(x, truth, noise)
        y, blur = variable(*shape), Convolution(self.kernels(self._phase(x)).mean(0), shape)
        objective = 0.5 * sum_squares(blur @ y - b) + norm1(Gradient(shape) @ y)
        return ADMM(x["log_rho"].exp(), x["log_threshold"].exp()).on(objective)

    def training(self, x: Mapping[str, Tensor]) -> Scheme:
        """That of the training images."""
        return self.scheme(x, self.truth, self.noise)

    def f(self, x: Mapping[str, Tensor], y: Tensor) -> Tensor:
        """The mean squared error, times 1000."""
        return 1000 * (y - self.truth).square().mean()

    def restored(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The test images as they are seen, and restored."""
        with torch.no_grad():
            b = self.seen(x, self.test_truth, self.test_noise)
            return b, self.scheme(x, self.test_truth, self.test_noise).run(b, self.steps)

    def metrics(self, x: Mapping[str, Tensor], y: Any) -> Mapping[str, float]:
        """PSNR on test images, of all depths and of each."""
        b, found = self.restored(x)
        each = {
            f"PSNR at defocus {share * self.defocus:.3g}": psnr(image, self.test_truth)
            for share, image in zip(_DEPTHS, found, strict=True)
        }
        return {"PSNR seen": psnr(b, self.test_truth), "PSNR restored": psnr(found, self.test_truth), **each}

    def plot(self, figure: Any, x: Mapping[str, Tensor], y: Any) -> None:
        """Test images at the largest defocus, and the kernels below."""
        above, below = figure.subfigures(2, 1, height_ratios=(3, 1.3))
        b, found = self.restored(x)
        draw_images(above, {"seen out of focus": b[-1], "restored": found[-1]}, self.test_truth, 2)
        axes = below.subplots(1, len(_DEPTHS))
        for axis, share, kernel in zip(axes, _DEPTHS, self.kernels(x["phase"]).detach(), strict=True):
            axis.imshow(kernel.tolist(), cmap="gray")
            axis.set_title(f"kernel at defocus {share * self.defocus:.3g}", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])


@checked(
    side=Range(least=float(_PUPIL)), train=SIZE, test=SIZE, steps=SIZE, level=AT_LEAST_0, defocus=AT_LEAST_0, seed=SEED
)
def joint_optics(
    *,
    side: int = 32,
    train: int = 8,
    test: int = 16,
    steps: int = 5,
    defocus: float = 8.0,
    level: float = 0.01,
    learn_phase: bool = True,
    pictures: Pictures = "auto",
    data: str = "",
    seed: int = 0,
) -> Instance:
    """Learn the phase of a lens and the reconstruction behind it; see :class:`JointOptics`.

    Args:
        side: of an image, at least 15.
        train: images for training.
        test: images for testing.
        steps: of ADMM.
        defocus: the largest, in radians at the rim of the pupil.
        level: the standard deviation of the noise.
        learn_phase: False: the lens stays as it is, for comparison.
        pictures: as for `deblurring`.
        data: as for `deblurring`.
        seed: of parts and noise.

    Example:
        >>> instance = joint_optics(train=2, test=2, side=16, pictures="synthetic")
        >>> instance.x0["phase"].tolist()
        [0.5, 0.5, 0.0, 0.0]
    """
    made, origin = [], ""
    for number, count in enumerate((train, test)):
        truth, origin = images(count, side, test=bool(number), pictures=pictures, data=data, seed=seed)
        like = truth.expand(len(_DEPTHS), *truth.shape)
        made.append((truth, noise(like, level, 100 + 2 * seed + number)))
    (truth, own), (test_truth, other) = made
    optics = JointOptics(truth, test_truth, own, other, defocus, steps, learn_phase)
    one = truth.new_ones(steps)
    x0 = {
        "phase": truth.new_tensor([0.5, 0.5, 0.0, 0.0]),  # not quite flat: a flat one is a saddle by symmetry
        "log_rho": math.log(0.05) * one,
        "log_threshold": math.log(0.03) * one,
    }
    return Instance(
        problem=proximal_problem(optics.f, optics.training, steps=steps),
        x0=x0,
        y0=optics.training(x0).start(optics.seen(x0, truth, own)),
        description=f"a lens and its deconvolution for defocus up to {defocus:g}, {origin}",
        metrics=optics.metrics,
        plot=optics.plot,
        settings={"estimator": ITD(OwnSteps()), "outer_step": 0.1, "max_steps": 150},
    )
