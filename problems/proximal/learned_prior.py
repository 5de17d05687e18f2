"""A prior learned by implicit differentiation, against total variation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, SEED, SIZE
from bilevel.hypergrad.aid import AID
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems.proximal._pictures import Draws, Pictures, draw_images, gaussian, images, noise, psnr
from bilevel.solvers.adam import Adam
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.gmres import GMRES
from bilevel.solvers.scheduled import Cosine, Scheduled
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

    x is its filters and scales. f is the mean over a batch of images of the logarithm of the mean squared error, which
    is PSNR; a batch is a truth and what was seen of it. `metrics` compares with isotropic total variation, whose weight
    is the best of ten on training images.

    Args:
        truth: training images `(n, side, side)`, of which numbers are shown.
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

    def training(self, x: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Scheme:
        """Those for a batch."""
        return self.scheme(x, batch[1])

    def f(self, x: Mapping[str, Tensor], y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """mean_i log |y_i - truth_i|^2 / pixels."""
        return (y - batch[0]).square().mean((-1, -2)).log().mean()

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


@checked(
    side=SIZE,
    train=SIZE,
    test=SIZE,
    batch=SIZE,
    filters=SIZE,
    size=SIZE,
    blur=POSITIVE,
    level=AT_LEAST_0,
    max_steps=SIZE,
    seed=SEED,
)
def learned_prior(
    *,
    side: int = 32,
    train: int = 48,
    test: int = 32,
    batch: int = 24,
    filters: int = 16,
    size: int = 7,
    blur: float = 1.6,
    level: float = 0.03,
    pictures: Pictures = "auto",
    data: str = "",
    held_out: Literal["test", "validation"] = "test",
    max_steps: int = 200,
    seed: int = 0,
) -> Instance:
    """Learn a denoiser as a prior for deblurring; see :class:`LearnedPrior`.

    Args:
        side: of an image.
        train: training images of which numbers are shown, and on which the weight of total variation is chosen.
        test: images for testing.
        batch: parts of the training images that are drawn for each step.
        filters: of the denoiser.
        size: of each.
        blur: the standard deviation of the Gaussian blur in pixels.
        level: the standard deviation of the noise.
        pictures: as for `deblurring`.
        data: as for `deblurring`.
        held_out: the images for testing. Settings were chosen on those for "validation"; those for "test" are of
            photographs that nothing was chosen on.
        max_steps: the outer steps in which the step size falls to zero.
        seed: of parts, noise and filters.

    Example:
        >>> instance = learned_prior(
        ...     train=2, test=2, batch=2, side=16, filters=2, pictures="synthetic"
        ... )
        >>> instance.x0["filters"].shape
        torch.Size([2, 7, 7])
    """
    origin = ""
    made, kernel = [], gaussian(blur, max(1, round(min(4 * blur, (side - 1) // 2))))
    draws = Draws.of(batch, side, kernel, level, pictures=pictures, data=data, seed=seed)
    for number, count in enumerate((train, test)):
        new = bool(number) and held_out == "test"
        truth, origin = images(count, side, test=bool(number), pictures=pictures, data=data, seed=seed, new=new)
        seen = Convolution(kernel, (side, side)).forward(truth)
        made += [truth, seen + noise(seen, level, 100 + 2 * seed + number)]
    own = LearnedPrior(made[0], made[1], made[2], made[3], kernel)
    start = denoiser_start(filters, size, 0.01, seed)
    x0 = {"filters": 0.3 * start["filters"], "log_scales": start["log_scales"]}
    return Instance(
        problem=proximal_problem(own.f, own.training),
        x0=x0,
        y0=own.training(x0, draws(0)).start(draws(0)[1]),
        description=f"a denoiser of {filters} filters as a prior for deblurring, {origin}",
        metrics=own.metrics,
        plot=own.plot,
        settings={
            "estimator": AID(Anderson(2e-4, max_steps=300), GMRES(1e-2, max_steps=100)),
            "outer": Scheduled(Adam(0.04), Cosine(max_steps)),
            "data": draws,
            "max_steps": max_steps,
        },
    )
