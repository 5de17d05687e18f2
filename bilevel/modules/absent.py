"""What stands in the place of a tensor that is known inside of a call only."""

from __future__ import annotations

from typing import Any, NoReturn, final

from torch import Tensor


@final
class Absent(Tensor):
    """A tensor in a place whose value is known inside of a call only; whoever reads it is told so."""

    reason: str

    @staticmethod
    def like(tensor: Tensor, reason: str) -> Absent:
        """In the place of a tensor, for a reason."""
        made = tensor.detach().as_subclass(Absent)
        made.reason = reason
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        values = [*args, *(kwargs or {}).values()]
        values += [part for value in values if isinstance(value, list | tuple) for part in value]
        raise RuntimeError(next(value.reason for value in values if isinstance(value, Absent)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Absent:
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return "Absent()"
