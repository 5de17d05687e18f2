"""Make a checkout ready for the package index, which knows neither the repository nor relative links.

    python .ci/for_release.py https://HOST/OWNER/NAME v0.1.0

Relative links of README.md become absolute ones at that tag, and pyproject.toml gets the project's URLs. Where the
repository is hosted is known to the one who releases, and written down nowhere else.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def absolute(page: str, url: str, tag: str) -> str:
    """The page with absolute links; code, anchors of the page itself and links with a scheme stay as they are."""

    def rewritten(link: re.Match[str]) -> str:
        if re.match(r"[a-z]+:|#", link["target"]):
            return link[0]
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({url}/{kind}/{tag}/{link['target']})"

    parts = _FENCE.split(page)
    return "".join(part if part.startswith("```") else _LINK.sub(rewritten, part) for part in parts)


def with_urls(configuration: str, url: str, tag: str) -> str:
    """pyproject.toml with a table of URLs before that of the scripts."""
    table = (
        f'[project.urls]\nRepository = "{url}"\nDocumentation = "{url}/blob/{tag}/docs/index.md"\n'
        f'Changelog = "{url}/blob/{tag}/CHANGELOG.md"\nIssues = "{url}/issues"\n\n'
    )
    before, mark, after = configuration.partition("[project.scripts]")
    if not mark or "[project.urls]" in configuration:
        raise ValueError("pyproject.toml must have [project.scripts], and no [project.urls] yet")
    return before + table + mark + after


def main(url: str, tag: str) -> None:
    """Rewrite README.md and pyproject.toml."""
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", url):
        raise ValueError(f"the repository must be an address such as https://HOST/OWNER/NAME. Got {url!r}")
    version = re.search(r'__version__ = "(.*?)"', (ROOT / "bilevel" / "__init__.py").read_text(encoding="utf-8"))
    if version is None or tag != f"v{version[1]}":
        raise ValueError(f"the tag must be v and the version, v{version and version[1]}. Got {tag!r}")
    for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = ROOT / name
        path.write_text(change(path.read_text(encoding="utf-8"), url, tag), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python .ci/for_release.py https://HOST/OWNER/NAME TAG")
    main(*sys.argv[1:])
