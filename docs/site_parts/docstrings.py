"""Docstrings as they are in the code (plain text, one `Example:`), made fit for reStructuredText."""

import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from sphinx.application import Sphinx

_SECTION = re.compile(
    r"(Args|Raises|Returns|Yields|Attributes|Example|Examples|Note|Warns|Warning):$"
)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this. Napoleon, at 500, makes lists of the sections in between."""
    app.connect("autodoc-process-docstring", _read, priority=400)
    app.connect("autodoc-process-docstring", _read_again, priority=600)
    return {"parallel_read_safe": True}


def _read(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    lines[:] = plain_text(lines)


def _read_again(
    _app: Sphinx, what: str, _name: str, obj: Any, _options: Any, lines: list[str]
) -> None:
    """Napoleon takes what precedes a colon for the type of a property: here it is a sentence."""
    if what == "property" and lines:
        lines[:] = plain_text((inspect.getdoc(obj) or "").splitlines())


def plain_text(lines: list[str]) -> list[str]:
    """The same text, with formulas as blocks, `code` as code, and what would be markup escaped."""
    text: list[str] = []
    for verbatim, group in groupby(_marked(lines), key=lambda item: item[1]):
        part = [line for line, _ in group]
        text += part if verbatim else _escaped("\n".join(part)).split("\n")
    return text


def _marked(lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it stays as it is: examples, and indented blocks outside of sections."""
    section = block = prompt = False
    before = ""
    for line in lines:
        if line and not line.startswith(" "):
            section, block = bool(_SECTION.match(line)), False
        elif (
            line.startswith("    ") and not section and not block and not before.strip()
        ):
            block = True
            yield from (
                (".. code-block:: none", True),
                ("    :class: formula", True),
                ("", True),
            )
        prompt = line.lstrip().startswith((">>>", "...")) or (
            prompt and bool(line.strip())
        )
        yield line, block or prompt
        before = line


def _escaped(text: str) -> str:
    text = re.sub(r":\w+:(`[^`]*`)", r"\1", text)
    parts = re.split(r"(`+[^`]*`+)", text)
    for i, part in enumerate(parts):
        if i % 2:
            ended = "" if not re.match(r"\w", parts[i + 1]) else "\\ "  # the s of `if`s
            parts[i] = f"``{part.strip('`')}``{ended}"
        else:
            parts[i] = re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part)
    return "".join(parts)
