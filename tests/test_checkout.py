"""A checkout without symbolic links: `make` says what to do, and what it says helps."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("bilevel/problems", "bilevel/solvers")

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None or shutil.which("make") is None,
    reason="needs a git checkout, git and make",
)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(params=["true", "false"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bool]:
    """The two links and the Makefile, checked out with and without symbolic links; and whether with them."""
    source = tmp_path / "source"
    (source / "bilevel").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", source)
    shutil.copy(ROOT / "constraints.txt", source)
    for link in LINKS:
        folder = source / Path(link).name
        folder.mkdir()
        (folder / "__init__.py").touch()
        (source / link).symlink_to(Path("..") / folder.name)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    for words in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-q", "-m", "links")):
        assert run("git", *words, cwd=source).returncode == 0
    cloned = run("git", "clone", "-q", "-c", f"core.symlinks={request.param}", source, tmp_path / "clone", cwd=tmp_path)
    assert cloned.returncode == 0, cloned.stderr
    return tmp_path / "clone", request.param == "true"


def test_make_refuses_a_checkout_without_links_and_its_remedy_makes_them(checkout: tuple[Path, bool]) -> None:
    clone, linked = checkout
    assert all((clone / link).is_symlink() == linked for link in LINKS)
    told = run("make", "links", cwd=clone)
    assert (told.returncode == 0) == linked, told.stderr
    if not linked:
        remedy = re.search(r"git config.*", told.stderr)
        assert remedy is not None and "should be a link to ../problems" in told.stderr
        assert run("sh", "-c", remedy[0], cwd=clone).returncode == 0
        assert all((clone / link).is_symlink() for link in LINKS)
        assert run("make", "links", cwd=clone).returncode == 0
