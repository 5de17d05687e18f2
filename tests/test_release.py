"""What the package index gets: links that work there, addresses, and one version everywhere."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.findall(r'^__version__ = "(.*?)"', (ROOT / "bilevel" / "__init__.py").read_text("utf-8"), re.MULTILINE)[0]
URL, TAG = "https://host.example/owner/name", f"v{VERSION}"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("for_release", ROOT / ".ci" / "for_release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[a](docs/a.md#b)", f"[a]({URL}/blob/{TAG}/docs/a.md#b)"),
        ("![a](docs/a.png)", f"![a]({URL}/raw/{TAG}/docs/a.png)"),
        ("[a](https://b.example/c)", "[a](https://b.example/c)"),
        ("[a](#b)", "[a](#b)"),
        ("```python\nx = [f](a)\n```\n", "```python\nx = [f](a)\n```\n"),
    ],
)
def test_relative_links_become_absolute_and_nothing_else_changes(before: str, after: str) -> None:
    assert script().absolute(before, URL, TAG) == after


def test_every_link_of_the_readme_leads_to_a_file_of_that_tag() -> None:
    page = script().absolute((ROOT / "README.md").read_text(encoding="utf-8"), URL, TAG)
    targets = re.findall(rf"\]\({URL}/(?:blob|raw)/{TAG}/([^)#]*)", page)
    assert len(targets) > 10 and all((ROOT / target).is_file() for target in targets)
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)\s]+)\)", prose))


def test_addresses_are_added_and_the_rest_of_the_configuration_stays() -> None:
    before = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    after = tomllib.loads(script().with_urls(before, URL, TAG))
    assert after["project"].pop("urls")["Repository"] == URL
    assert after == tomllib.loads(before)
    with pytest.raises(ValueError, match=r"no \[project\.urls\] yet"):
        script().with_urls(script().with_urls(before, URL, TAG), URL, TAG)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the script reads and writes: a script that is wrong may not change this repository."""
    (tmp_path / "bilevel").mkdir()
    for name in ("README.md", "pyproject.toml", "bilevel/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_both_files_are_rewritten(checkout: Path) -> None:
    module: Any = script()
    module.ROOT = checkout
    module.main(URL, TAG)
    assert f"]({URL}/blob/{TAG}/docs/quickstart.md)" in (checkout / "README.md").read_text(encoding="utf-8")
    assert "urls" in tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(("url", "tag"), [("owner/name", TAG), (URL, "v9.9.9"), (URL, TAG[1:])])
def test_a_wrong_address_or_a_tag_of_another_version_changes_nothing(checkout: Path, url: str, tag: str) -> None:
    module: Any = script()
    module.ROOT = checkout
    with pytest.raises(ValueError, match="must be"):
        module.main(url, tag)
    for name in ("README.md", "pyproject.toml"):
        assert (checkout / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_citation_has_the_version_of_the_package() -> None:
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == VERSION
