"""Bilevel optimization in PyTorch: min_x f(x, y*(x)) subject to y*(x) = argmin_y g(x, y)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # the only place: setuptools and the command line read it here

if TYPE_CHECKING:
    from bilevel.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """All names at once, when the first is asked for: `bilevel --help` is to answer before torch is loaded."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'bilevel' has no attribute {name!r}")
    import importlib
    import importlib.util

    if importlib.util.find_spec(f"bilevel.{name}") is not None:  # a room
        return importlib.import_module(f"bilevel.{name}")
    public = vars(importlib.import_module("bilevel.public"))
    names = {key: value for key, value in public.items() if not key.startswith("_")}
    globals().update(names, __all__=sorted(names))
    if name not in globals():
        raise AttributeError(f"module 'bilevel' has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    __getattr__("__all__")
    return sorted(globals())
