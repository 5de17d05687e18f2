"""The documentation is true: every block of README.md and docs/ runs, and shows what it says it shows.

Conventions of the pages:

- Blocks marked ``python`` run in order, in one namespace a page, in an empty directory, with torch's default float32.
  A block with ``title="name.py"`` is also saved under that name.
- ``expression  # -> text`` at the end of a statement, or on the line below it: what the interpreter shows for it is
  exactly the text.
- ``statement  # raises Name: text``: it raises an exception of that name whose message contains the text.
- A page with a block that imports a package of ``OPTIONAL`` is skipped where that package is missing (`make
  test-integrations` has all), and may warn.
- Blocks marked ``bash``: every ``make`` target exists, and every ``bilevel`` command line is one that its parser
  accepts, of problems and estimators that exist; commands on a file that the page itself defines are carried out.
"""

import argparse
import ast
import contextlib
import importlib
import io
import operator
import re
import shlex
import sys
import textwrap
import tokenize
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import bilevel
from bilevel import cli
from bilevel.algorithms import registry as _algorithms
from bilevel.commands.arguments import takes
from bilevel.experiments.catalogue import experiments
from bilevel.named import registry as _registry
from bilevel.problems import catalogue, literature

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
COLUMNS = 88  # of code: what fits beside the navigation
OPTIONAL = ("lightning", "transformers", "peft", "accelerate", "optuna", "curvlinops")
COMMANDS = {"git", "pip", "python", "pytest", "cd", "source"}  # besides `make` and `bilevel`

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


def named(page: Path) -> str:
    """The path of a page from its folder of documentation."""
    return page.name if page.parent == ROOT else page.relative_to(ROOT / "docs").as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title, its text and the line on which the text begins."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    for match in _FENCE.finditer(page):
        title = re.search(r'title="([^"]*)"', match["info"])
        line = page[: match.start("text")].count("\n") + 1
        found.append(Block(match["language"], title.group(1) if title else "", textwrap.dedent(match["text"]), line))
    return found


def expectations(source: str) -> dict[int, tuple[str, str]]:
    """By line of a statement's end, what the comment there or on a line of its own below promises.

    It is ("->", text) or ("raises", text).
    """
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            match = re.match(r"# *(->|raises\b) *(.*)", token.string)
            if match:
                alone = token.line.strip() == token.string.strip()
                found[token.start[0] - alone] = (match[1], match[2].strip())
    return found


def run_block(source: str, namespace: dict[str, object], name: str, line: int = 1) -> None:
    """Run a block statement by statement, holding it to its comments."""
    promised = expectations(source)
    for statement in ast.parse(source).body:
        end = statement.end_lineno or statement.lineno
        kind, text = promised.pop(end, ("", ""))
        where = f"{name}:{line + end - 1}"
        ast.increment_lineno(statement, line - 1)
        if kind == "raises":
            expected, _, message = text.partition(":")
            error = raised(statement, namespace, name)
            assert type(error).__name__ == expected, f"{where} raised {error!r}, the page says {expected}"
            assert message.strip() in str(error), f"{where} raised the message {str(error)!r}"
        else:
            output = shown(statement, namespace, name)
            if kind == "->":
                assert output == text, f"{where} shows {output!r}, the page says {text!r}"
    assert not promised, f"{name}: comments that promise an output but do not end a statement: {promised}"


def shown(statement: ast.stmt, namespace: dict[str, object], name: str) -> str:
    """What the interpreter shows when it runs a statement."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), name, "eval"), namespace)
            if value is not None:
                print(repr(value))  # noqa: T201
        else:
            exec(compile(ast.Module([statement], []), name, "exec"), namespace)
    return printed.getvalue().strip()


def raised(statement: ast.stmt, namespace: dict[str, object], name: str) -> Exception | None:
    """The exception that a statement ends with, if it does."""
    try:
        shown(statement, namespace, name)
    except Exception as error:
        return error
    return None


@pytest.fixture
def as_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """An empty directory, torch's own default dtype, and a fresh main module's namespace."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for names in (_registry, _algorithms):  # a page may add a name
        monkeypatch.setattr(names, "_REGISTERED", dict(names._REGISTERED))
    yield vars(module)
    torch.set_default_dtype(dtype)


def demand_packages(page: Path) -> bool:
    """Skip a page whose packages are missing; whether there are any."""
    needed = [name for name in OPTIONAL if re.search(rf"^(import|from) {name}\b", page.read_text(), re.MULTILINE)]
    for name in needed:
        if find_spec(name) is None:
            pytest.skip(f"{named(page)} needs {name}: `make test-integrations`")
    return bool(needed)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_says_what_is_true(page: Path, as_a_user: dict[str, object]) -> None:
    if demand_packages(page):
        warnings.simplefilter("ignore")  # of these packages, about each other; pytest puts the filters back
    if "torch.compile(" in page.read_text():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about what its compiler imports
    for block in blocks(page.read_text()):
        if "import cvxpy" in block.text and find_spec("cvxpy") is None:  # an extra that the tests do without
            continue
        if block.language == "python":
            if block.title:
                Path(block.title).write_text(block.text)
            run_block(block.text, as_a_user, page.name, block.line)
        elif block.language == "bash":
            for command in block.text.replace("\\\n", " ").splitlines():
                check_command(shlex.split(command, comments=True))


def check_command(words: Sequence[str]) -> None:
    """Refuse a command line that a reader could not type as it stands."""
    if not words:
        return
    program, arguments = words[0], words[1:]
    if list(words[:3]) == ["python", "-m", "bilevel"]:
        program, arguments = "bilevel", words[3:]
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(arguments) <= targets, f"the Makefile has no target {set(arguments) - targets}"
    elif program == "bilevel":
        check_bilevel(arguments)
    else:
        assert program in COMMANDS, f"unknown command {program!r}"
        for word in arguments:
            if word.endswith((".py", ".txt", ".toml")):
                assert (ROOT / word).exists(), f"there is no file {word}"


def parsed(arguments: Sequence[str]) -> tuple[object, argparse.Namespace]:
    """The exit code of the parser, 0 if it went on, and what it read."""
    try:
        return 0, cli.parser().parse_args(arguments)
    except SystemExit as stop:  # also of `--help` and `--version`, with the code 0
        return stop.code, argparse.Namespace()


def check_bilevel(words: Sequence[str]) -> None:
    """The parser accepts it and every name in it exists; a command on the page's own file is carried out."""
    code, options = parsed(words)
    assert not code, f"`bilevel` does not accept {words}"
    problem = getattr(options, "problem", None)
    if problem is None:
        return
    if ".py:" in problem:
        quiet = ["--quiet"] if hasattr(options, "quiet") else []
        assert cli.main([*words, *quiet]) == 0, f"`bilevel {shlex.join(words)}` failed"
        return
    builds: dict[str, Callable[..., object]] = {name: entry.build for name, entry in catalogue().items()}
    builds |= {f"literature:{name}": lambda: None for name in literature.names()}  # they take no arguments
    builds |= {name: named.build for name, named in experiments().items()}
    assert problem in builds, f"there is no problem {problem!r}"
    named = getattr(options, "estimator", None) or []
    assert set([named] if isinstance(named, str) else named) <= set(bilevel.estimators())
    assert getattr(options, "algorithm", None) in (None, *_algorithms.available())
    for word in options.set:
        assert takes(builds[problem], word.partition("=")[0]), f"{problem} has no argument of {word}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_images_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}, and there is no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def test_the_guide_names_every_estimator_and_no_other() -> None:
    rows = re.findall(r'^\| `"([\w-]+)"` \| ([^|]*) \|', (ROOT / "docs" / "how_to_choose.md").read_text(), re.MULTILINE)
    assert {name: description.strip() for name, description in rows} == bilevel.estimators()
    assert len(rows) == len(bilevel.estimators())


def test_the_pages_name_every_problem_flag_and_exit_code_and_no_other() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]*) \|", (ROOT / "docs" / "problems.md").read_text(), re.MULTILINE)
    assert dict(rows) == {entry.name: entry.description for entry in catalogue().values()}
    page = (ROOT / "docs" / "command_line.md").read_text()
    listed = page.partition("## Few-shot experiments")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]*) \|", listed, re.MULTILINE)
    assert dict(rows) == {entry.name: entry.description for entry in experiments().values()}
    for command in ("run", "check", "compare"):
        section = re.search(rf"`bilevel {command} PROBLEM` takes\n\n((?:\|.*\n)+)", page)
        assert section, command
        flags = {flag for action in parser_of(command)._actions for flag in action.option_strings}
        named = set(re.findall(r"^\| `(--[\w-]+)[^|]* \|", section[1], re.MULTILINE))
        assert named == flags - {"--help", "-h"}, command
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes == {cli.SUCCESS, cli.FAILED, cli.USAGE, cli.MISSING, cli.INTERRUPTED, cli.TERMINATED, cli.HUNG_UP}


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    actions = [action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    found: argparse.ArgumentParser = actions[0].choices[command]
    return found


def test_the_table_of_statuses_is_complete() -> None:
    page = (ROOT / "docs" / "how_to_choose.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page.partition("## What to do on each status")[2], re.MULTILINE)
    assert rows == [status.name for status in bilevel.Status]


def listed(page: Path) -> Iterator[Path]:
    """The pages that a page's tables of contents list; a pattern lists the pages that match."""
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                yield from (found for found in page.parent.glob(f"{line}.md") if found != page)


def test_every_page_is_in_the_navigation_once() -> None:
    found, todo = [DOCS / "index.md"], [DOCS / "index.md"]
    while todo:
        below = list(listed(todo.pop()))
        found, todo = found + below, todo + below
    assert sorted(found) == sorted(set(PAGES) - {ROOT / "README.md"})


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.relative_to(DOCS).as_posix())
def test_code_is_narrow(page: Path) -> None:
    for block in blocks(page.read_text()):
        for number, line in enumerate(block.text.splitlines(), block.line):
            assert len(line) <= COLUMNS, f"{page.name}:{number} has {len(line)} columns, {COLUMNS} fit"


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs").rglob("*.png"))
    assert pictures
    assert all(picture.stat().st_size < 200_000 for picture in pictures)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("1 + 1  # -> 3", "says '3'"),
        ("x = 1  # -> 1", "says '1'"),
        ("print('a')  # -> b", "says 'b'"),
        ("# -> 1", "do not end a statement"),
        ("1 + 1\n# -> 3", "says '3'"),
        ("1 + 1\n\n# -> 2", "do not end a statement"),
        ("print(\n    # -> 1\n)", "do not end a statement"),
        ("(\n    1  # -> 1\n)", "do not end a statement"),
        ("1 / 0  # raises ValueError: zero", "ZeroDivisionError"),
        ("1 / 0  # raises ZeroDivisionError: nonsense", "the message"),
        ("1 / 1  # raises ZeroDivisionError: zero", "raised None"),
    ],
)
def test_a_page_that_says_something_wrong_fails(source: str, complaint: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=re.escape(complaint)):
        run_block(source, {}, "page")


def test_a_page_that_is_right_passes() -> None:
    namespace: dict[str, object] = {}
    source = "x = 2\nx + 1  # -> 3\nx * 2\n# -> 4\n"
    source += "print(x)  # -> 2\nx / 0  # raises ZeroDivisionError: division by zero"
    run_block(source, namespace, "page")
    assert namespace["x"] == 2


def test_a_command_that_does_not_exist_is_refused() -> None:
    for command in (
        "make tea",
        "curl x",
        "python no_such_file.py",
        "bilevel brew",
        "bilevel run ridge --sugar",
        "bilevel run tea",
        "bilevel run ridge --estimator tea",
        "bilevel compare ridge --estimator aid-cg --estimator tea",
        "bilevel check tea",
        "bilevel check ridge --budgets 10",
        "bilevel run ridge --set tea=1",
        "python -m bilevel run tea",
    ):
        with pytest.raises(AssertionError):
            check_command(command.split())


def test_the_api_pages_have_every_public_name_once() -> None:
    named = re.findall(r"^\.\. auto\w+:: (\S+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M)
    assert len(named) == len(set(named))
    for name in named:  # rooms are loaded when they are asked for
        importlib.import_module(".".join(part for part in name.split(".")[:-1] if part[0].islower()))
    shown = {id(operator.attrgetter(name.removeprefix("bilevel."))(bilevel)) for name in named}
    public = {name: getattr(bilevel, name) for name in bilevel.__all__}
    missing = {name for name, value in public.items() if id(value) not in shown}
    assert {name for name in missing if not isinstance(public[name], types.ModuleType)} == set()
