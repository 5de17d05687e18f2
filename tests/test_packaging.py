"""What is installed is what is in the repository: an unlisted sub-package is missing from the wheel only."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bilevel

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = CONFIGURATION["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Where setuptools takes a package from: its own entry in package-dir, or that of its parent."""
    mapping = SETUPTOOLS["package-dir"]
    if package in mapping:
        return ROOT / str(mapping[package])
    parent, _, name = package.rpartition(".")
    return folder_of(parent) / name


def test_listed_packages_are_the_folders_that_hold_code() -> None:
    listed = {folder_of(package).resolve() for package in SETUPTOOLS["packages"]}
    roots = [ROOT / "bilevel", ROOT / "solvers", ROOT / "problems"]
    holding = {path.parent.resolve() for root in roots for path in root.rglob("*.py")}
    assert listed == holding


def test_every_package_has_an_init_file() -> None:
    assert all((folder_of(package) / "__init__.py").is_file() for package in SETUPTOOLS["packages"])


@pytest.mark.skipif((ROOT / "PKG-INFO").is_file(), reason="a source distribution holds no links, and needs none")
def test_links_show_the_mapped_folders_to_static_tools() -> None:
    for name in ("solvers", "problems"):
        link = ROOT / "bilevel" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert folder_of(f"bilevel.{name}").resolve() == link.resolve()


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "bilevel" / "py.typed").is_file()
    assert "py.typed" in SETUPTOOLS["package-data"]["bilevel"]


def test_the_version_is_written_once_and_that_of_what_is_installed() -> None:
    assert "version" not in CONFIGURATION["project"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "bilevel.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", bilevel.__version__)
    assert importlib.metadata.version("bilevel") == bilevel.__version__


def test_torch_is_the_only_requirement() -> None:
    assert [requirement.split(">")[0] for requirement in CONFIGURATION["project"]["dependencies"]] == ["torch"]


def test_lower_bounds_can_be_installed_as_they_are_and_are_one_a_package() -> None:
    run = subprocess.run([sys.executable, ROOT / ".ci" / "lowest_requirements.py"], capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    names = {line.split("==")[0] for line in lines}
    assert {"scipy", "numpy", "scikit-learn", "matplotlib", "pytest"} <= names
    assert "cvxpy" not in names  # whose own lower bounds need a newer numpy
    assert len({line.split("==")[0] for line in lines}) == len(lines)


def test_the_extra_all_holds_every_extra_for_users() -> None:
    extras = CONFIGURATION["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    inside = set(everything.removeprefix("bilevel[").removesuffix("]").split(","))
    other_torch = {"curvature"}  # what pip may bring another build of torch with is asked for by name
    assert inside == extras.keys() - {"all", "test", "dev", "docs"} - other_torch


def test_every_module_can_be_imported_without_an_extra() -> None:
    for package in SETUPTOOLS["packages"]:
        found = importlib.import_module(package)
        for module in pkgutil.iter_modules(found.__path__):
            if module.name != "__main__":
                importlib.import_module(f"{package}.{module.name}")


def test_what_the_package_exports_is_public_and_documented() -> None:
    exported = {
        name: value
        for name, value in vars(bilevel).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert {"BilevelProblem", "AID", "hypergradient", "functional"} <= exported.keys()
    assert all(value.__doc__ for value in exported.values())
