"""Deblurring by a few steps of ADMM whose schedule is learned."""

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
from bilevel.hypergrad.itd import ITD
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems.proximal._pictures import Pictures, draw_images, gaussian, images, noise, psnr
from bilevel.solvers.own_steps import OwnSteps
from bilevel.terms import ADMM, Convolution, Gradient, Scheme, norm1, proximal_problem, sum_squares, variable

Schedule = Mapping[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Deblurring(AbstractPortable):
    """y_N(x): N steps of ADMM for |K y - b|^2 / 2 + w TV(y) from b, x = the logarithms of (rho_k, threshold_k).

    f is the mean squared error on training images; `metrics` compares on others, with the best constant setting.

    Args:
        truth: training images `(n, side, side)`.
        seen: the same, blurred and noisy.
        test_truth: other images.
        test_seen: the same, blurred and noisy.
        kernel: of the blur K.
        steps: N.
    """

    truth: Tensor
    seen: Tensor
    test_truth: Tensor
    test_seen: Tensor
    kernel: Tensor
    steps: int

    def __post_init__(self) -> None:
        demand_types(self)

    def scheme(self, x: Schedule, b: Tensor) -> Scheme:
        """The steps for images b."""
        shape = tuple(b.shape[-2:])
        y = variable(*shape)
        objective = 0.5 * sum_squares(Convolution(self.kernel, shape) @ y - b) + norm1(Gradient(shape) @ y)
        return ADMM(x["log_rho"].exp(), x["log_threshold"].exp()).on(objective)

    def training(self, x: Schedule) -> Scheme:
        """Those for the training images."""
        return self.scheme(x, self.seen)

    def f(self, x: Schedule, y: Tensor) -> Tensor:
        """The mean squared error."""
        return (y - self.truth).square().mean()

    def restored(self, x: Schedule, b: Tensor) -> Tensor:
        """y_N."""
        return self.scheme(x, b).run(b, self.steps)

    def constant(self, rho: float, threshold: float) -> dict[str, Tensor]:
        """The schedule that does not change."""
        one = self.truth.new_ones(self.steps)
        return {"log_rho": one * rho, "log_threshold": one * threshold}

    def best_constant(self, points: int = 9) -> dict[str, Tensor]:
        """That of least f on a grid of two scales."""
        centers, width, best = (-1.5, -4.0), 4.0, (float("inf"), (0.0, 0.0))
        for _ in range(2):
            offsets = torch.linspace(-width, width, points).tolist()
            for a in offsets:
                for b in offsets:
                    at = (centers[0] + a, centers[1] + b)
                    with torch.no_grad():
                        value = float(self.f({}, self.restored(self.constant(*at), self.seen)))
                    best = min(best, (value, at))
            centers, width = best[1], 2 * width / (points - 1)
        return self.constant(*best[1])

    def metrics(self, x: Schedule, y: Any) -> Mapping[str, float]:
        """PSNR on the test images: as seen, by the best constant setting, by the schedule x."""
        with torch.no_grad():
            constant = self.restored(self.best_constant(), self.test_seen)
            learned = self.restored(x, self.test_seen)
        return {
            "PSNR blurred": psnr(self.test_seen, self.test_truth),
            "PSNR best constant": psnr(constant, self.test_truth),
            "PSNR learned": psnr(learned, self.test_truth),
        }

    def plot(self, figure: Any, x: Schedule, y: Any) -> None:
        """Test images before and after."""
        with torch.no_grad():
            rows = {
                "blurred": self.test_seen,
                "best constant": self.restored(self.best_constant(), self.test_seen),
                "learned": self.restored(x, self.test_seen),
            }
        draw_images(figure, rows, self.test_truth)
        figure.tight_layout()

    def instance(self, description: str = "") -> Instance:
        """The bilevel problem, from a constant schedule."""
        x0 = self.constant(-2.0, -4.0)
        return Instance(
            problem=proximal_problem(self.f, self.training, steps=self.steps),
            x0=x0,
            y0=self.training(x0).start(self.seen),
            description=description,
            metrics=self.metrics,
            plot=self.plot,
            settings={"estimator": ITD(OwnSteps()), "outer_step": 0.1, "max_steps": 150},
        )


@checked(side=SIZE, train=SIZE, test=SIZE, steps=SIZE, blur=POSITIVE, level=AT_LEAST_0, seed=SEED)
def deblurring(
    *,
    side: int = 32,
    train: int = 16,
    test: int = 32,
    steps: int = 5,
    blur: float = 1.6,
    level: float = 0.01,
    pictures: Pictures = "auto",
    data: str = "",
    seed: int = 0,
) -> Instance:
    """Learn the schedule of a few steps of deblurring; see :class:`Deblurring`.

    Args:
        side: of an image.
        train: images for training.
        test: images for testing.
        steps: of ADMM.
        blur: the standard deviation of the Gaussian blur in pixels.
        level: the standard deviation of the noise.
        pictures: where images are from: "scikit-image", "synthetic", or the first where it is installed, "auto".
        data: your own: a PNG, JPEG or .npz file.
        seed: of parts and noise.

    Example:
        >>> instance = deblurring(train=2, test=2, side=16, pictures="synthetic")
        >>> instance.x0["log_rho"].shape
        torch.Size([5])
    """
    origin = ""
    made, kernel = [], gaussian(blur, max(1, round(min(4 * blur, (side - 1) // 2))))
    for number, count in enumerate((train, test)):
        truth, origin = images(count, side, test=bool(number), pictures=pictures, data=data, seed=seed)
        seen = Convolution(kernel, (side, side)).forward(truth)
        made += [truth, seen + noise(seen, level, 100 + 2 * seed + number)]
    return Deblurring(made[0], made[1], made[2], made[3], kernel, steps).instance(
        f"deblurring by {steps} learned steps, {origin}"
    )
