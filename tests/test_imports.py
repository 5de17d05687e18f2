"""Who may import whom, and what a class may be."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
STANDARD = set(sys.stdlib_module_names)
# The face of the library may see both the core and what is built on it: names, entry points, the command line.
FACE: tuple[str, ...] = ("bilevel.cli", "bilevel.__main__", "bilevel.named.", "bilevel.diagnostics.")
FACE += ("bilevel.commands", "bilevel.experiments", "bilevel.few_shot", "bilevel.testing", "bilevel.extending")
PARTS_OF_ESTIMATORS = {"bilevel.hypergrad.compiled_programs"}
PARTS_OF_ESTIMATORS |= {"bilevel.hypergrad.implicit", "bilevel.hypergrad.aid", "bilevel.solvers.saddle_cholesky"}
PARTS_OF_ESTIMATORS |= {"bilevel.hypergrad.abstract_implicit", "bilevel.hypergrad.implicit_point"}
PARTS_OF_ESTIMATORS |= {"bilevel.hypergrad.certified"}  # a wrapper, which an estimator offers to put around itself
UNROLLING = "bilevel.hypergrad.unrolling."  # the forms that ITD is given, and the walk that CompiledITD traces too
LENT = "bilevel.solvers.cg"  # to certificates, which solve linear systems by it where no solver is given
MAY_BE_SUBCLASSED = {"BilevelProblem"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for package in SETUPTOOLS["packages"]:
        folder = SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        for path in sorted((ROOT / folder).glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(tree: ast.AST, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that are imported; `from a import b` gives a.b where that is a module, else a.

    At the top level only what runs on import: not what functions import, nor what is for type checkers.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are banned"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif top_level and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _typing(node)):
            continue
        else:
            yield from imports(node, top_level=top_level)


def _typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def side(name: str) -> str:
    """Where a module belongs: to solvers, problems, hypergrad, methods, the face or the core.

    A method is a problem over tasks together with the estimator and the inner solver that it is published with.
    """
    if name in ("bilevel.few_shot.learner", "bilevel.few_shot.likelihood"):
        return "core"
    if name == "bilevel" or name.startswith(FACE):
        return "face"
    if f"{name}.".startswith("bilevel.problems.meta_learning."):
        return "methods"
    sub_package = name.split(".")[1]
    return sub_package if sub_package in ("solvers", "problems", "hypergrad") else "core"


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 20
    assert {"bilevel._calculus", "bilevel.solvers.cg", "bilevel.hypergrad.aid"} <= MODULES.keys()
    assert "torch" in set(imports(MODULES["bilevel._calculus"]))
    assert "bilevel.solvers.lbfgs" in set(imports(MODULES["bilevel.named.setting"]))
    assert "bilevel.solvers.lbfgs" not in set(imports(MODULES["bilevel.named.setting"], top_level=True))


@pytest.mark.parametrize("name", MODULES)
def test_on_import_a_module_needs_torch_and_the_standard_library_only(name: str) -> None:
    roots = {imported.split(".")[0] for imported in imports(MODULES[name], top_level=True)}
    assert roots <= STANDARD | {"torch", "bilevel"}


@pytest.mark.parametrize("name", MODULES)
def test_sub_packages_are_imported_by_their_full_name(name: str) -> None:
    assert not {"solvers", "problems"} & {imported.split(".")[0] for imported in imports(MODULES[name])}


def test_tests_and_scripts_import_sub_packages_by_their_full_name_too() -> None:
    for folder in ("tests", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            roots = {imported.split(".")[0] for imported in imports(ast.parse(path.read_text(encoding="utf-8")))}
            assert not {"solvers", "problems"} & roots, path.name


@pytest.mark.parametrize("name", [name for name in MODULES if side(name) in ("solvers", "problems")])
def test_problems_and_solvers_import_the_core_and_never_each_other(name: str) -> None:
    allowed = {side(name), "core"} | ({"methods"} if name == "bilevel.problems" else set())
    for imported in imports(MODULES[name]):
        if imported.split(".")[0] == "bilevel" and imported != "bilevel":
            assert side(imported) in allowed, imported


@pytest.mark.parametrize("name", [name for name in MODULES if side(name) == "methods"])
def test_methods_import_the_core_and_what_they_are_made_of(name: str) -> None:
    for imported in imports(MODULES[name]):
        if imported.split(".")[0] == "bilevel":
            assert side(imported) in ("core", "problems", "solvers", "hypergrad", "methods"), imported


@pytest.mark.parametrize("name", [name for name in MODULES if side(name) == "hypergrad"])
def test_estimators_import_the_core_only_and_never_each_other(name: str) -> None:
    for imported in imports(MODULES[name]):
        if imported.split(".")[0] == "bilevel" and name != "bilevel.hypergrad":
            assert side(imported) == "core" or imported in PARTS_OF_ESTIMATORS or imported.startswith(UNROLLING), (
                imported
            )


@pytest.mark.parametrize("name", [name for name in MODULES if side(name) == "core"])
def test_the_core_imports_neither_solvers_nor_problems_nor_estimators(name: str) -> None:
    for imported in imports(MODULES[name]):
        if imported.split(".")[0] == "bilevel":
            lent = imported == LENT and name.startswith("bilevel.certificates.")
            assert side(imported) == "core" or imported.startswith("bilevel.named.") or lent, imported


def test_there_is_no_cycle_among_imports_that_run_on_import() -> None:
    graph = {name: {i for i in imports(tree, top_level=True) if i in MODULES} for name, tree in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_importing_bilevel_loads_nothing_that_torch_does_not_load() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import bilevel;"
        " print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(run.stdout.split())
    assert "bilevel" in loaded
    assert loaded <= STANDARD | {"torch", "bilevel"}


# Classes


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for name, tree in MODULES.items():
        yield from ((name, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def is_abstract(node: ast.ClassDef) -> bool:
    return node.name.lstrip("_").startswith("Abstract")


def base_names(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]


FINAL_BY_NATURE = {"Enum", "IntEnum", "NamedTuple", "Protocol", "RuntimeError", "Exception", "Function"}
OWN = {node.name for _, node in classes()}


@pytest.mark.parametrize(("module", "node"), [pytest.param(*c, id=f"{c[0]}.{c[1].name}") for c in classes()])
def test_every_class_is_abstract_or_final(module: str, node: ast.ClassDef) -> None:
    if node.name in MAY_BE_SUBCLASSED or FINAL_BY_NATURE & set(base_names(node)):
        return
    final = any(ast.unparse(decorator).split(".")[-1] == "final" for decorator in node.decorator_list)
    assert final != is_abstract(node), "a class is either `Abstract...` or marked @final"
    for base in OWN & set(base_names(node)):
        assert base in MAY_BE_SUBCLASSED or base.lstrip("_").startswith("Abstract"), base


@pytest.mark.parametrize(("module", "node"), [pytest.param(*c, id=f"{c[0]}.{c[1].name}") for c in classes()])
def test_a_dataclass_is_frozen(module: str, node: ast.ClassDef) -> None:
    for decorator in node.decorator_list:
        text = ast.unparse(decorator)
        if text.split("(")[0].split(".")[-1] == "dataclass" and node.name != "Linearization":
            assert "frozen=True" in text


@pytest.mark.parametrize("name", MODULES)
def test_there_is_no_super(name: str) -> None:
    calls = [node for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "super"]
