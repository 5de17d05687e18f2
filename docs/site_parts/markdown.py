"""What the pages write as code hosts read it, made what Sphinx reads."""

import re
from pathlib import Path

from sphinx.application import Sphinx

_TITLED = re.compile(
    r'^(?P<indent> *)```(?P<language>\w+) title="(?P<title>[^"]*)"$', re.MULTILINE
)
_FOLDER = re.compile(r"^(\w+)/\*$", re.MULTILINE)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}


def _read(app: Sphinx, _page: str, source: list[str]) -> None:
    """Titles of blocks become captions; of an empty folder there are no contents."""

    def kept(pattern: re.Match[str]) -> str:
        return pattern[0] if any((Path(app.srcdir) / pattern[1]).glob("*.md")) else ""

    source[0] = _TITLED.sub(
        r"\g<indent>```{code-block} \g<language>\n\g<indent>:caption: \g<title>",
        _FOLDER.sub(kept, source[0]),
    )
