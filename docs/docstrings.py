"""Docstrings as they are in the code (plain text, one `Example:`), made fit for Markdown by mkdocs."""

import re
from typing import Any

import griffe


class PlainText(griffe.Extension):
    """Escapes what Markdown would read as markup, and marks the example as one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(map(_line, obj.docstring.value.splitlines()))


def _line(line: str) -> str:
    if line.lstrip().startswith((">>>", "...")):
        return line
    line = re.sub(r"^(\s*)Example:$", r"\1Examples:", line)
    line = re.sub(r":\w+:(`[^`]*`)", r"\1", line)
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"([*\[])", r"\\\1", text).replace("<", "&lt;")
