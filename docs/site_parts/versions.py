"""The versions beside each other: a folder each, a page that lists them, and a start page that leads to the newest.

Files alone, so that it works wherever they are, from a disk too. `make docs` builds site/VERSION; what is in site/
from other versions stays, and is listed.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>bilevel: {title}</title>
<link rel="icon" href="data:,">{head}
<style>body {{ font: 1.1rem/1.6 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem }}</style>
</head>
<body>
<h1>bilevel</h1>
{body}
</body>
</html>
"""


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("build-finished", _listed)
    return {"parallel_read_safe": True}


def _number(version: str) -> list[tuple[bool, int, str]]:
    """What versions are sorted by: 0.10 is after 0.9, and 1.0rc1 before 1.0."""
    parts = re.findall(r"\d+|[a-z]+", version)
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts
    ] + [(True, -1, "")]


def _listed(app: Sphinx, failure: Exception | None) -> None:
    built = Path(app.outdir)
    if (
        failure is not None
        or app.builder.format != "html"
        or built.name != app.config.version
    ):
        return
    versions = sorted(
        (path.parent.name for path in built.parent.glob("*/objects.inv")),
        key=_number,
        reverse=True,
    )
    items = "\n".join(
        f'<li><a href="{name}/index.html">{name}</a></li>' for name in versions
    )
    page = _PAGE.format(
        title="versions",
        head="",
        body=f"<p>The documentation of</p>\n<ul>\n{items}\n</ul>",
    )
    (built.parent / "versions.html").write_text(page, encoding="utf-8")
    newest = f"{versions[0]}/index.html"
    head = f'\n<meta http-equiv="refresh" content="0; url={newest}">'
    page = _PAGE.format(
        title="documentation",
        head=head,
        body=f'<p><a href="{newest}">Documentation</a></p>',
    )
    (built.parent / "index.html").write_text(page, encoding="utf-8")
