"""Rain taken out of images: an image and its streaks, told apart by what their differences look like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED, SIZE
from bilevel.hypergrad.itd import ITD
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems.proximal._pictures import Pictures, draw_images, images, noise, psnr
from bilevel.solvers.own_steps import OwnSteps
from bilevel.terms import (
    ADMM,
    Gradient,
    LinearMap,
    Scheme,
    nonnegative,
    norm1,
    proximal_problem,
    sum_squares,
    variable,
)


@final
@dataclass(frozen=True, eq=False)
class Deraining(AbstractPortable):
    """N steps of ADMM for |i + r - b|^2 / 2 + w_0 |D i|_1 + w_1 |D_v r|_1 + w_2 |r|_1, r >= 0: y = (i, r).

    i is the image and r the streaks, bright and nearly vertical: their differences D_v along columns are few. x is the
    logarithms of the weights and of rho. The systems of y couple both, and are solved by conjugate gradients, through
    whose solution the derivative goes analytically. f is the mean squared error of i on training images.

    Args:
        truth: training images `(n, side, side)`.
        seen: the same with rain.
        test_truth: other images.
        test_seen: the same with rain.
        steps: N.
    """

    truth: Tensor
    seen: Tensor
    test_truth: Tensor
    test_seen: Tensor
    steps: int

    def __post_init__(self) -> None:
        demand_types(self)

    def scheme(self, x: Tensor, b: Tensor) -> Scheme:
        """The steps for images b."""
        shape = tuple(b.shape[-2:])
        y, w = variable(2, *shape), x.exp()
        image, streaks, both = (LinearMap(*_maps(k), (2, *shape), shape) for k in ("image", "streaks", "both"))
        columns = Gradient((shape[1], shape[0]), axes=1) @ LinearMap(_turned, _turned, shape, (shape[1], shape[0]))
        objective = (
            0.5 * sum_squares(both @ y - b)
            + w[0] * norm1(Gradient(shape) @ image @ y)
            + w[1] * norm1(columns @ streaks @ y)
            + w[2] * norm1(streaks @ y)
            + nonnegative(streaks @ y)
        )
        return ADMM(w[3], rtol=1e-6, linear_steps=60).on(objective)

    def training(self, x: Tensor) -> Scheme:
        """Those for the training images."""
        return self.scheme(x, self.seen)

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean squared error of the image, times 1000."""
        return 1000 * (y[..., 0, :, :] - self.truth).square().mean()

    def restored(self, x: Tensor, b: Tensor) -> Tensor:
        """The image."""
        with torch.no_grad():
            return self.scheme(x, b).run(_begun(b), self.steps)[..., 0, :, :]

    def metrics(self, x: Tensor, y: Any) -> Mapping[str, float]:
        """PSNR on the test images, and the weights."""
        names = ("of total variation", "of differences of streaks", "of streaks")
        return {
            "PSNR with rain": psnr(self.test_seen, self.test_truth),
            "PSNR learned": psnr(self.restored(x, self.test_seen), self.test_truth),
            **{f"weight {name}": float(w) for name, w in zip(names, x.exp(), strict=False)},
        }

    def plot(self, figure: Any, x: Tensor, y: Any) -> None:
        """Test images before and after."""
        rows = {"with rain": self.test_seen, "learned": self.restored(x, self.test_seen)}
        draw_images(figure, rows, self.test_truth)
        figure.tight_layout()


def _maps(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return {"image": (_image, _of_image), "streaks": (_streaks, _of_streaks), "both": (_both, _of_both)}[name]


def _image(y: Tensor) -> Tensor:
    return y[..., 0, :, :]


def _of_image(z: Tensor) -> Tensor:
    return torch.stack([z, torch.zeros_like(z)], -3)


def _streaks(y: Tensor) -> Tensor:
    return y[..., 1, :, :]


def _of_streaks(z: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(z), z], -3)


def _both(y: Tensor) -> Tensor:
    return y.sum(-3)


def _of_both(z: Tensor) -> Tensor:
    return torch.stack([z, z], -3)


def _turned(y: Tensor) -> Tensor:
    return y.mT


def _begun(b: Tensor) -> Tensor:
    return torch.stack([b, torch.zeros_like(b)], -3)


@checked(side=SIZE, train=SIZE, test=SIZE, steps=SIZE, seed=SEED)
def deraining(
    *,
    side: int = 32,
    train: int = 8,
    test: int = 16,
    steps: int = 15,
    pictures: Pictures = "auto",
    data: str = "",
    seed: int = 0,
) -> Instance:
    """Learn the weights that tell rain from images; see :class:`Deraining`. The streaks are synthetic.

    Args:
        side: of an image.
        train: images for training.
        test: images for testing.
        steps: of ADMM.
        pictures: as for `deblurring`.
        data: as for `deblurring`.
        seed: of parts and rain.

    Example:
        >>> instance = deraining(train=2, test=2, side=16, pictures="synthetic")
        >>> instance.y0["y"].shape
        torch.Size([2, 2, 16, 16])
    """
    made, origin = [], ""
    for number, count in enumerate((train, test)):
        truth, origin = images(count, side, test=bool(number), pictures=pictures, data=data, seed=seed)
        seen = truth + _rain(truth, 200 + 2 * seed + number)
        made += [truth, seen + noise(seen, 0.01, 100 + 2 * seed + number)]
    own = Deraining(made[0], made[1], made[2], made[3], steps)
    x0 = torch.tensor([0.02, 0.02, 0.02, 0.3], dtype=torch.float64, device="cpu").log()
    return Instance(
        problem=proximal_problem(own.f, own.training, steps=steps),
        x0=x0,
        y0=own.training(x0).start(_begun(own.seen)),
        description=f"image and rain told apart by {steps} steps with learned weights, {origin}",
        metrics=own.metrics,
        plot=own.plot,
        settings={"estimator": ITD(OwnSteps()), "outer_step": 0.1, "max_steps": 40},
    )


def _rain(like: Tensor, seed: int) -> Tensor:
    """Streaks: a pixel wide, a third of the image long, a little slanted, of brightness 0.1 to 0.4."""
    generator = torch.Generator().manual_seed(seed)
    side, rain = like.shape[-1], torch.zeros_like(like)

    def draw() -> float:
        return float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))

    for image in rain:
        for _ in range(max(1, round(0.6 * side))):
            top, left = draw() * side, draw() * side
            length, slant, level = side * (0.2 + 0.3 * draw()), 0.2 * (draw() - 0.5), 0.1 + 0.3 * draw()
            for k in range(math.ceil(length)):
                row, column = int(top + k) % side, int(left + slant * k) % side
                image[row, column] = level
    return rain
