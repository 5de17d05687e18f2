"""The examples in docstrings say what happens: in torch's default dtype, float32, as a reader would run them."""

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import bilevel
from bilevel.named import registry

NAMES = [
    "bilevel",
    *(
        module.name
        for module in pkgutil.walk_packages(bilevel.__path__, "bilevel.")
        if not module.name.endswith("__main__")
    ),
]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    """The docstrings of a module that have examples; those of what it imports belong to where that is defined."""
    finder, found = doctest.DocTestFinder(), doctest.DocTestFinder().find(module)
    for name, own in vars(module).items():  # doctest passes over what a decorator of another module returns
        if inspect.isfunction(own) and hasattr(own, "__wrapped__") and own.__module__ == module.__name__:
            found += finder.find(inspect.unwrap(own), f"{module.__name__}.{name}", module)
    return [test for test in {test.name: test for test in found}.values() if test.examples]


WITH_EXAMPLES = [name for name in NAMES if examples(importlib.import_module(name))]


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch as it is before anybody sets its default dtype, and names as they are before anybody registers one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))  # an example may add a name
    yield
    torch.set_default_dtype(before)


def run(tests: list[doctest.DocTest]) -> None:
    """Run examples; skip where an optional package that they need is missing."""
    runner = doctest.DebugRunner(verbose=False)  # raises at the first difference
    for test in tests:
        complaint = missing = ""
        try:
            runner.run(test)
        except doctest.UnexpectedException as error:
            complaint = f"{_where(test, error.example)} raised {error.exc_info[1]!r}\n{error.example.source}"
            if isinstance(error.exc_info[1], ImportError) and 'pip install "bilevel[' in str(error.exc_info[1]):
                missing = f"{_where(test, error.example)}: {error.exc_info[1]}"
        except doctest.DocTestFailure as error:
            wanted = f"expected:\n{error.example.want}got:\n{error.got}"
            complaint = f"{_where(test, error.example)}\n{error.example.source}{wanted}"
        if missing:
            pytest.skip(missing)
        if complaint:
            pytest.fail(complaint)


def _where(test: doctest.DocTest, example: doctest.Example) -> str:
    return f"{test.name}, line {(test.lineno or 0) + example.lineno + 1}"


@pytest.mark.parametrize("name", WITH_EXAMPLES)
@pytest.mark.usefixtures("float32")
def test_examples_show_what_happens(name: str) -> None:
    run(examples(importlib.import_module(name)))


def test_every_part_of_the_package_is_looked_at() -> None:
    for name in ("bilevel.outer.minimize", "bilevel.hypergrad.aid", "bilevel.solvers.cg", "bilevel.problems.quadratic"):
        assert name in WITH_EXAMPLES


def _test_of(text: str) -> list[doctest.DocTest]:
    return [doctest.DocTestParser().get_doctest(text, {}, "page", None, 0)]


@pytest.mark.parametrize(
    ("text", "complaint"), [(">>> 1 + 1\n3\n", "expected:"), (">>> 1 / 0\n", "raised ZeroDivisionError")]
)
def test_an_example_that_is_wrong_fails(text: str, complaint: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=complaint):
        run(_test_of(text))


def test_an_example_without_its_extra_is_skipped_and_one_with_a_missing_module_is_not() -> None:
    with pytest.raises(pytest.skip.Exception, match="convex"):
        run(_test_of(">>> raise ImportError('it needs `pip install \"bilevel[convex]\"`')\n"))
    with pytest.raises(pytest.fail.Exception, match="no_such_module"):
        run(_test_of(">>> import no_such_module\n"))


@pytest.mark.usefixtures("float32")
def test_examples_run_in_single_precision() -> None:
    run(_test_of(">>> import torch\n>>> torch.zeros(1).dtype\ntorch.float32\n"))
