"""Handwritten digits that come with scikit-learn: nothing to download."""

from __future__ import annotations

import torch

from bilevel.tasks.images import ImageClasses, Splits


def digits() -> Splits:
    """The ten digits in 8 by 8 pixels, ink = 1, some 180 of each: 0 to 3 for training, 4 to 6, and 7 to 9 for testing.

    Few classes for few-shot learning (3-way tasks in every part; 16 training classes with `Episodes(rotations=True)`),
    but enough to see that everything runs. The data: Optical Recognition of Handwritten Digits, UCI machine learning
    repository, from scikit-learn.

    Raises:
        ImportError: if scikit-learn is missing.

    Example:
        >>> from bilevel.tasks import Episodes, digits
        >>> splits = digits()
        >>> splits.train.names, splits.test.names
        (('0', '1', '2', '3'), ('7', '8', '9'))
        >>> Episodes(splits.train, way=3, shots=1, queries=5).sample(4, seed=0)["query_x"].shape
        torch.Size([4, 15, 1, 8, 8])
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: `pip install "bilevel[sklearn]"`.') from error
    pixels, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = pixels.to(torch.uint8).reshape(-1, 8, 8)
    classes = ImageClasses(tuple(images[labels == k] for k in range(10)), tuple(map(str, range(10))), scale=1 / 16)
    return Splits(*(classes.subset(part) for part in (range(4), range(4, 7), range(7, 10))))
