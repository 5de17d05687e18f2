"""What goes wrong with a file, said of the argument that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def of_argument(call: str, name: str) -> Iterator[None]:
    """Have an error of the system say which argument named the file.

    Raises:
        OSError: of the same type, naming the call and the argument.

    Example:
        >>> with of_argument("load", "path"):
        ...     open("/no/such/file")
        Traceback (most recent call last):
        FileNotFoundError: `load(path=...)`: [Errno 2] No such file or directory: '/no/such/file'
    """
    try:
        yield
    except OSError as error:
        raise type(error)(f"`{call}({name}=...)`: {str(error)[:300]}") from error
