"""A prior learned by implicit differentiation, against total variation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, SEED, SIZE
from bilevel.hypergrad.aid import AID
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems.proximal._pictures import Pictures, draw_images, gaussian, images, noise, psnr
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.gmres import GMRES
from bilevel.terms import (
    ADMM,
    Convolution,
    Gradient,
    ProximalGradient,
    Scheme,
    denoised,
    denoiser_start,
    norm2_sum,
    prior,
    proximal_problem,
    sum_squares,
    variable,
)

_WEIGHTS = (0.001, 0.0015, 0.002, 0.003, 0.0045, 0.006, 0.008, 0.011, 0.015, 0.02)  # of total variation


@final
@dataclass(frozen=True, eq=False)
class LearnedPrior(AbstractPortable):
    """y = D_x(y - K'(K y - b)): deblurring with a denoiser D_x that contracts by construction; see `denoised`.

    x is its filters and scales. f is the mean over training images of the logarithm of the mean squared error, which is
    PSNR. `metrics` compares with isotropic total variation, whose weight is the best of ten on the training images.

    Args:
        truth: training images `(n, side, side)`.
        seen: the same, blurred and noisy.
        test_truth: other images.
        test_seen: the same, blurred and noisy.
        kernel: of the blur K, of sum one and positive, so that |K| = 1.
    """

    truth: Tensor
    seen: Tensor
    test_truth: Tensor
    test_seen: Tensor
    kernel: Tensor

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def blur(self) -> Convolution:
        """K."""
        return Convolution(self.kernel, tuple(self.truth.shape[-2:]))

    def scheme(self, x: Mapping[str, Tensor], b: Tensor) -> Scheme:
        """The steps for images b."""
        y = variable(*b.shape[-2:])
        learned = prior(lambda v, _: denoised(x, v), y)
        return ProximalGradient(step=1.0).on(0.5 * sum_squares(self.blur @ y - b) + learned)

    def training(self, x: Mapping[str, Tensor]) -> Scheme:
        """Those for the training images."""
        return self.scheme(x, self.seen)

    def f(self, x: Mapping[str, Tensor], y: Tensor) -> Tensor:
        """mean_i log |y_i - truth_i|^2 / pixels."""
        return (y - self.truth).square().mean((-1, -2)).log().mean()

    def restored(self, x: Mapping[str, Tensor], b: Tensor) -> Tensor:
        """y."""
        fixed = {name: value.detach() for name, value in x.items()}
        return self.scheme(fixed, b).solve(b, tol=1e-5, max_steps=1500).y

    def total_variation(self, b: Tensor, w: float) -> Tensor:
        """The minimizer of |K y - b|^2 / 2 + w TV(y)."""
        y, shape = variable(*b.shape[-2:]), tuple(b.shape[-2:])
        objective = 0.5 * sum_squares(self.blur @ y - b) + w * norm2_sum(Gradient(shape) @ y)
        with torch.no_grad():
            return ADMM(20 * w, relaxation=1.6).on(objective).run(b, 120)

    def best_weight(self) -> float:
        """That of total variation on the training images."""
        return max((psnr(self.total_variation(self.seen, w), self.truth), w) for w in _WEIGHTS)[1]

    def metrics(self, x: Mapping[str, Tensor], y: Any) -> Mapping[str, float]:
        """PSNR on test images; of the training images for comparison."""
        w = self.best_weight()
        return {
            "PSNR blurred": psnr(self.test_seen, self.test_truth),
            "PSNR total variation": psnr(self.total_variation(self.test_seen, w), self.test_truth),
            "PSNR learned": psnr(self.restored(x, self.test_seen), self.test_truth),
            "PSNR total variation, training": psnr(self.total_variation(self.seen, w), self.truth),
            "PSNR learned, training": psnr(self.restored(x, self.seen), self.truth),
            "weight of total variation": w,
        }

    def plot(self, figure: Any, x: Mapping[str, Tensor], y: Any) -> None:
        """Test images before and after."""
        rows = {
            "blurred": self.test_seen,
            "total variation": self.total_variation(self.test_seen, self.best_weight()),
            "learned": self.restored(x, self.test_seen),
        }
        draw_images(figure, rows, self.test_truth)
        figure.tight_layout()


@checked(side=SIZE, train=SIZE, test=SIZE, filters=SIZE, size=SIZE, blur=POSITIVE, level=AT_LEAST_0, seed=SEED)
def learned_prior(
    *,
    side: int = 32,
    train: int = 48,
    test: int = 32,
    filters: int = 8,
    size: int = 7,
    blur: float = 1.6,
    level: float = 0.03,
    pictures: Pictures = "auto",
    data: str = "",
    seed: int = 0,
) -> Instance:
    """Learn a denoiser as a prior for deblurring; see :class:`LearnedPrior`.

    Args:
        side: of an image.
        train: images for training.
        test: images for testing.
        filters: of the denoiser.
        size: of each.
        blur: the standard deviation of the Gaussian blur in pixels.
        level: the standard deviation of the noise.
        pictures: as for `deblurring`.
        data: as for `deblurring`.
        seed: of parts, noise and filters.

    Example:
        >>> instance = learned_prior(train=2, test=2, side=16, filters=2, pictures="synthetic")
        >>> instance.x0["filters"].shape
        torch.Size([2, 7, 7])
    """
    origin = ""
    made, kernel = [], gaussian(blur, max(1, round(min(4 * blur, (side - 1) // 2))))
    for number, count in enumerate((train, test)):
        truth, origin = images(count, side, test=bool(number), pictures=pictures, data=data, seed=seed)
        seen = Convolution(kernel, (side, side)).forward(truth)
        made += [truth, seen + noise(seen, level, 100 + 2 * seed + number)]
    own = LearnedPrior(made[0], made[1], made[2], made[3], kernel)
    start = denoiser_start(filters, size, 0.01, seed)
    x0 = {"filters": 0.3 * start["filters"], "log_scales": start["log_scales"]}
    return Instance(
        problem=proximal_problem(own.f, own.training),
        x0=x0,
        y0=own.training(x0).start(own.seen),
        description=f"a denoiser of {filters} filters as a prior for deblurring, {origin}",
        metrics=own.metrics,
        plot=own.plot,
        settings={
            "estimator": AID(Anderson(2e-4, max_steps=300), GMRES(1e-2, max_steps=100)),
            "outer_step": 0.04,
            "max_steps": 150,
        },
    )
