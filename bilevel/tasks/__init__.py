"""Where tasks come from: sinusoids, linear regressions, images by class, and your own."""

from bilevel.tasks.digits import digits
from bilevel.tasks.episodes import Episodes
from bilevel.tasks.folders import image_folder, mini_imagenet, split
from bilevel.tasks.image_files import ImageFiles
from bilevel.tasks.images import AbstractImages, ImageClasses, Splits
from bilevel.tasks.linear import LinearTasks
from bilevel.tasks.omniglot import omniglot
from bilevel.tasks.omniglot_files import convert_omniglot
from bilevel.tasks.ragged import check_batch, pad
from bilevel.tasks.sinusoid import Sinusoid
from bilevel.tasks.source import AbstractTasks, Batch, Batches, batches

__all__ = [
    "AbstractImages",
    "AbstractTasks",
    "Batch",
    "Batches",
    "Episodes",
    "ImageClasses",
    "ImageFiles",
    "LinearTasks",
    "Sinusoid",
    "Splits",
    "batches",
    "check_batch",
    "convert_omniglot",
    "digits",
    "image_folder",
    "mini_imagenet",
    "omniglot",
    "pad",
    "split",
]
