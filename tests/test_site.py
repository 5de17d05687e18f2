"""What looks at the built site finds what is wrong with it, and the versions are in order."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "check_site.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="an installed package comes without its documentation")

HEAD = '<!doctype html><html lang="en"><head><title>t</title>'
HEAD += '<link rel="icon" href="data:,"></head><body style="margin: 0; color: #222"><article>'
RIGHT = {
    "1.0/index.html": '<p id="top">Words <a href="other.html#there">other</a> <img src="a.png" alt=""></p>',
    "1.0/other.html": '<h1 id="there">There</h1><p><a href="index.html#top">back</a> <a href="https://x.example">x</a></p>',
}
WRONG = {
    "a link": ('<a href="nowhere.html">x</a>', "leads to nowhere.html, which does not exist"),
    "an anchor": ('<a href="other.html#here">x</a>', "there is no such anchor"),
    "a picture": ('<img src="no.png" alt="">', "leads to no.png"),
    "something from elsewhere": ('<script src="https://cdn.example/a.js"></script>', "which is elsewhere"),
}
SHOWN = {
    "a page that is too wide": ('<div style="width: 3000px">wide</div>', "px wider than the window"),
    "text that cannot be read": ('<p style="color: #bbb">pale</p>', "has text of contrast"),
    "code that is cut": (
        f'<div class="highlight"><pre style="overflow: auto">{"x" * 400}</pre></div>',
        "has code that is cut",
    ),
    "an error": ("<script>throw new Error('oh')</script>", "writes to the console"),
    "a formula that is not typeset": ('<span class="math">x</span>', "of which 0 are typeset"),
}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63606060f80f0001040100"
    "5fe5c34b0000000049454e44ae426082"
)


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def site(folder: Path, extra: str = "") -> Path:
    """A small site, with something more on its first page."""
    for name, body in RIGHT.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{HEAD}{body}{extra if name.endswith('index.html') else ''}</article></body></html>")
    (folder / "1.0/a.png").write_bytes(PNG)
    (folder / "1.0/objects.inv").write_text("")
    return folder


def test_a_site_that_is_right_passes(tmp_path: Path) -> None:
    assert list(loaded(SCRIPT).as_files(site(tmp_path))) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_files_is_found(tmp_path: Path, name: str) -> None:
    extra, complaint = WRONG[name]
    (found,) = loaded(SCRIPT).as_files(site(tmp_path, extra))
    assert found.startswith("1.0/index.html") and complaint in found


@pytest.fixture(scope="module")
def window() -> Any:
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("there is no selenium")
    script: Any = loaded(SCRIPT)
    programs = script.chromium()
    if programs is None:
        pytest.skip("there is no Chromium")
    opened = script.started(*programs)
    yield opened
    opened.quit()


@pytest.mark.parametrize("name", ["nothing", *SHOWN])
def test_what_is_wrong_with_a_page_as_it_is_shown_is_found(tmp_path: Path, window: Any, name: str) -> None:
    script: Any = loaded(SCRIPT)
    extra, complaint = SHOWN.get(name, ("", ""))
    folder = site(tmp_path, extra)
    server = script.served(folder)
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        found = list(script.in_chromium(window, folder, address, ["index"], None))
    finally:
        server.shutdown()
        server.server_close()
    assert all(complaint in line for line in found) and bool(found) == bool(complaint), found


def test_without_chromium_it_says_that_it_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script: Any = loaded(SCRIPT)
    monkeypatch.setattr(script, "chromium", lambda: None)
    assert script.main([str(site(tmp_path))]) == 0
    assert "SKIPPED" in capsys.readouterr().out
    assert script.main([str(tmp_path), "--require-chromium"]) == 1
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "1.0")])


def test_a_newer_version_is_after_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("sphinx") is None:
        monkeypatch.setitem(sys.modules, "sphinx", ModuleType("sphinx"))
        application: Any = ModuleType("sphinx.application")
        application.Sphinx = object
        monkeypatch.setitem(sys.modules, "sphinx.application", application)
    number = loaded(ROOT / "docs/site_parts/versions.py")._number
    versions = ["0.1.0", "0.2.0rc1", "0.2.0", "0.9.1", "0.10.0", "1.0"]
    assert sorted(reversed(versions), key=number) == versions


def test_docstrings_become_restructuredtext(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("sphinx") is None:
        monkeypatch.setitem(sys.modules, "sphinx", ModuleType("sphinx"))
        application: Any = ModuleType("sphinx.application")
        application.Sphinx = object
        monkeypatch.setitem(sys.modules, "sphinx.application", application)
    plain = loaded(ROOT / "docs/site_parts/docstrings.py").plain_text
    assert plain(["y*(x) of `f`s, h_ |a|"]) == [r"y\*(x) of ``f``\ s, h\_ \|a\|"]
    assert plain(["A:", "", "    y* = x", "", "b*"])[2:] == [
        ".. code-block:: none",
        "    :class: formula",
        "",
        "    y* = x",
        "",
        r"b\*",
    ]
    example = ["Example:", "    >>> x * y", "    y*"]
    assert plain(example) == example
    assert plain(["`a", "b` c*"]) == ["``a", r"b`` c\*"]
