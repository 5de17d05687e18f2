"""Who may import whom, and what a class may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
STANDARD = set(sys.stdlib_module_names)
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
# The layers of docs/design.md, from the bottom up: a module imports from its own line and from those above it. Rooms
# stand for their modules; a module that is named stands where it is named, wherever its room does.
_LINES = re.sub(r"\n +", " ", DESIGN.split("## Layers")[1].split("```")[1])  # a long one goes on below, indented
LAYERS = tuple(re.findall(r"^\d+ +(.*?)(?: {2,}.*)?$", _LINES, re.MULTILINE))
FLOORS = 10  # of imports at import time, of what is not on top of the library
ON_TOP = tuple(
    f"bilevel.{r}" for r in ("cli", "__main__", "commands", "experiments", "few_shot", "sklearn", "tasks", "testing")
)
AT_THE_ROOT = 20  # modules
# An estimator that is another one with settings of its own, and a wrapper that an estimator puts around itself.
ESTIMATORS_IN_ESTIMATORS = {("kkt", "aid"), ("aid", "certified")}
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
PACKAGES = set(SETUPTOOLS["packages"])


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


def layer(name: str) -> int:
    """On which line of the layers a module stands: the one that names it, or else its room."""
    lines = {f"bilevel.{each}": line for line, text in enumerate(LAYERS) for each in text.split()}
    while name not in lines:
        name = name.rpartition(".")[0]
        assert name, "a room without a line in docs/design.md"
    return lines[name]


def floors() -> dict[str, int]:
    """Modules above each other at import time; what is imported through a package counts from its own module."""
    found: dict[str, int] = {}

    def defining(module: str, name: str) -> str:
        for node in MODULES[module].body:
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return defining(node.module, alias.name)
        return module

    def of(name: str) -> int:
        if name not in found:
            below = {defining(*each) for each in names_at_import(MODULES[name])}
            found[name] = 1 + max((of(other) for other in below if other not in PACKAGES), default=0)
        return found[name]

    for name in MODULES.keys() - PACKAGES:
        of(name)
    return found


def names_at_import(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module of the library, name) for every `from module import name` that runs on import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in PACKAGES:
                    yield from names_at_import(MODULES[inner])
                elif inner in MODULES or node.module in MODULES:
                    yield (inner, "") if inner in MODULES else (node.module, alias.name)
        elif not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _typing(node)):
            yield from names_at_import(node)


def defines_an_estimator(name: str) -> bool:
    """Whether one of its classes is an estimator, and not an abstract kind of estimators."""
    bases = {"AbstractEstimator", "AbstractImplicit"}
    return any(
        bases & set(base_names(node)) and not is_abstract(node)
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.ClassDef)
    )


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 100 and len(LAYERS) > 10
    assert {"bilevel._calculus", "bilevel.solvers.cg", "bilevel.hypergrad.aid"} <= MODULES.keys()
    assert "torch" in set(imports(MODULES["bilevel._calculus"]))
    assert "bilevel.solvers.lbfgs" in set(imports(MODULES["bilevel.named.setting"]))
    assert "bilevel.solvers.lbfgs" not in set(imports(MODULES["bilevel.named.setting"], top_level=True))
    assert layer("bilevel._calculus") < layer("bilevel.solvers.cg") < layer("bilevel.hypergrad.aid")
    assert defines_an_estimator("bilevel.hypergrad.aid") and not defines_an_estimator("bilevel.hypergrad.implicit")


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"bilevel"}))
def test_a_module_imports_from_its_own_layer_and_from_those_below(name: str) -> None:
    if name in PACKAGES:
        return
    for imported in imports_that_run(MODULES[name]):
        if imported in MODULES and imported not in PACKAGES:
            assert layer(imported) <= layer(name), imported


def test_the_root_holds_few_modules() -> None:
    root = [path.name for path in (ROOT / "bilevel").glob("*.py")]
    assert len(root) <= AT_THE_ROOT, root


def test_there_are_few_floors_of_imports() -> None:
    found = {name: floor for name, floor in floors().items() if not name.startswith(ON_TOP)}
    assert found["bilevel.arguments.fits"] == 1 and found["bilevel._linear"] == 2
    too_high = {name: floor for name, floor in found.items() if floor > FLOORS}
    assert not too_high


# Rooms whose classes are those of another library: what they need beyond torch, once they are imported by name.
OF_ANOTHER = {"bilevel.sklearn": {"sklearn", "numpy"}}


@pytest.mark.parametrize("name", MODULES)
def test_on_import_a_module_needs_torch_and_the_standard_library_only(name: str) -> None:
    roots = {imported.split(".")[0] for imported in imports(MODULES[name], top_level=True)}
    room = ".".join(name.split(".")[:2])
    assert roots <= STANDARD | {"torch", "bilevel"} | OF_ANOTHER.get(room, set())


@pytest.mark.parametrize("name", MODULES)
def test_no_other_room_imports_one_that_needs_another_library(name: str) -> None:
    if not name.startswith(tuple(OF_ANOTHER)):
        assert not [imported for imported in imports(MODULES[name]) if imported.startswith(tuple(OF_ANOTHER))]


@pytest.mark.parametrize("name", MODULES)
def test_sub_packages_are_imported_by_their_full_name(name: str) -> None:
    assert not {"solvers", "problems"} & {imported.split(".")[0] for imported in imports(MODULES[name])}


def test_tests_and_scripts_import_sub_packages_by_their_full_name_too() -> None:
    for folder in ("tests", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            roots = {imported.split(".")[0] for imported in imports(ast.parse(path.read_text(encoding="utf-8")))}
            assert not {"solvers", "problems"} & roots, path.name


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("bilevel.problems.")])
def test_only_methods_over_tasks_and_recipes_know_solvers_and_estimators(name: str) -> None:
    """A method is a problem over tasks with the estimator and the solvers that it is published with, a recipe one for
    networks or for proximal algorithms with those that work on it."""
    if not {"meta_learning", "networks", "proximal"} & set(name.split(".")):
        rooms = {imported.split(".")[1] for imported in imports(MODULES[name]) if imported.startswith("bilevel.")}
        assert not rooms & {"solvers", "hypergrad"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("bilevel.hypergrad.")])
def test_estimators_never_import_each_other(name: str) -> None:
    for imported in imports(MODULES[name]):
        if imported in MODULES and imported != name and imported.startswith("bilevel.hypergrad."):
            pair = (name.split(".")[-1], imported.split(".")[-1])
            assert (
                not (defines_an_estimator(name) and defines_an_estimator(imported)) or pair in ESTIMATORS_IN_ESTIMATORS
            )


def test_there_is_no_circle_among_imports_those_inside_functions_included() -> None:
    graph = {
        name: {i for i in imports_that_run(tree) if i in MODULES and i not in PACKAGES}
        for name, tree in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph.keys() - PACKAGES:
        visit(name, ())


def imports_that_run(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported at any time; not what is for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.Module([node], []))
        elif not _typing(node):
            yield from imports_that_run(node)


def test_importing_bilevel_loads_nothing_that_torch_does_not_load() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import bilevel;"
        " print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(run.stdout.split())
    assert "bilevel" in loaded
    assert loaded <= STANDARD | {"torch", "bilevel"}


# What is private to torch may go in any release. Each use has a fallback, or is of a name that others rely on as well.
PRIVATE = {
    "bilevel._numerics.nesting": {"torch.utils._pytree"},  # looked up; without it, types registered there are leaves
    "bilevel._numerics.batched": {"torch._C", "torch._C._functorch"},  # looked up: without it, torch.vmap is called
    # the compiler and its loops, for what is asked for by name: refused where torch is older
    "bilevel.compiled.torch_inside": {
        "torch._C",
        "torch._higher_order_ops.while_loop.while_loop_op",
        "torch._inductor",
        "torch._inductor.config",
    },
    # base classes that have no public name: an import that fails says so at once
    "bilevel.modules.layers": {
        "torch.nn.modules.batchnorm._BatchNorm",
        "torch.nn.modules.batchnorm._NormBase",
        "torch.nn.modules.dropout._DropoutNd",
    },
}


def private_names(tree: ast.Module) -> Iterator[str]:
    """Names with a part that begins with one underscore, of what is imported from torch or looked up there."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names = [f"{ast.unparse(node.args[0])}.{ast.unparse(node.args[1])[1:-1]}"]
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts):
                yield name


def test_few_private_names_of_torch_are_used_and_none_without_need() -> None:
    assert list(private_names(ast.parse("from torch.utils._pytree import tree_map"))) == [
        "torch.utils._pytree.tree_map"
    ]
    found = {name: set(private_names(tree)) for name, tree in MODULES.items()}
    assert {name: names for name, names in found.items() if names} == PRIVATE


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
