"""What the pages write as code hosts read it, made what Sphinx reads."""

import re

from sphinx.application import Sphinx

_TITLED = re.compile(
    r'^(?P<indent> *)```(?P<language>\w+) title="(?P<title>[^"]*)"$', re.MULTILINE
)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}


def _read(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Blocks with a title get it as a caption."""
    source[0] = _TITLED.sub(
        r"\g<indent>```{code-block} \g<language>\n\g<indent>:caption: \g<title>",
        source[0],
    )
