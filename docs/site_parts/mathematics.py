"""MathJax beside the pages, so that the site works without a network.

The package has MathJax's own files. The one that is taken draws formulas as SVG, and so it needs no fonts.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx

_FILE = "tex-svg.js"


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("build-finished", _copied)
    return {"parallel_read_safe": True}


def _copied(app: Sphinx, failure: Exception | None) -> None:
    if failure is None and app.builder.format == "html":
        found = find_spec("sphinx-mathjax-offline")
        if found is None or found.origin is None:
            raise ImportError(
                "the site's mathematics needs MathJax: `pip install sphinx-mathjax-offline`"
            )
        target = Path(app.outdir) / "_static" / "mathjax"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(
            Path(found.origin).parent / "static" / "mathjax" / _FILE, target / _FILE
        )
