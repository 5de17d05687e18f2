"""What f and g are called with at each outer step: a fixed batch, a loader, or a callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

from torch import Tensor

from bilevel._problem import Split


def stream(data: Any) -> Callable[[int], Any]:
    """A function step -> batch, to be called with steps that never decrease.

    A tensor, a mapping or a tuple is one batch, used at every step. Any other iterable (a list of batches, a
    DataLoader) yields a batch a step and starts again at its end. A callable is called with the step. A `Split`
    treats its two sides so, each on its own.

    Raises:
        ValueError: (from the function) if an iterable yields nothing.
        TypeError: if `data` is none of these, is an iterator, which cannot be started again, or an array or a list of
            arrays or numbers, which torch functions do not take.
    """
    if isinstance(data, Split):
        f, g = stream(data.f), stream(data.g)
        return lambda step: Split(f(step), g(step))
    if data is None or isinstance(data, Tensor | Mapping | tuple):
        return lambda step: data  # noqa: ARG005
    if isinstance(data, Iterator):
        raise TypeError(
            f"`minimize(data=...)` must be something that can be started again. Got an iterator"
            f" ({type(data).__name__}). Pass a list of batches, a DataLoader or a callable `step -> batch`."
        )
    if isinstance(data, list):
        for i, batch in enumerate(data):
            _refuse_array(batch, f"data[{i}]", "A list is a loader, one entry a step; one batch of several is a tuple.")
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        _refuse_array(data, "data", "")
        return _Loader(data).at
    if callable(data):
        function: Callable[[int], Any] = data
        return function
    raise TypeError(
        f"`minimize(data=...)` must be a batch (tensor, dict or tuple), a loader, or a callable step -> batch."
        f" Got {type(data).__name__}."
    )


def _refuse_array(batch: Any, name: str, hint: str) -> None:
    if isinstance(batch, int | float | str | bytes) or type(batch).__module__ == "numpy":
        raise TypeError(
            f"`minimize(data=...)` must hold tensors. Got {type(batch).__name__} at {name}. Write"
            f" `torch.as_tensor(...)`. {hint}".strip()
        )


@final
class _Loader:
    """An iterable of batches by step: run forward as far as is asked for, the latest batch kept."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.reached, self.batch = _cycle(batches), -1, None

    def at(self, step: int) -> Any:
        while self.reached < step:
            self.batch = next(self.batches)
            self.reached += 1
        return self.batch


def _cycle(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("`minimize(data=...)` yields no batch: the loader is empty, or cannot be started again.")
