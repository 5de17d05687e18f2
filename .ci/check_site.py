"""Look at every page of the built site, as files and in headless Chromium.

    python .ci/check_site.py site [--screenshots FOLDER] [--pages index,theory] [--require-chromium]

As files: every link, anchor, picture, script and style sheet of the site's own leads somewhere, and nothing that a
page needs comes from elsewhere. In Chromium, which reaches no network, at three widths, light and dark: no error or
warning is written to the console, no picture is broken, all formulas are typeset, no page is wider than the window,
code fits at the full width, and text can be read on its ground. Then the search, and the toggle of light and dark, are
used.

Chromium and its driver are Debian's: `apt install chromium chromium-driver`. Without them the second part is skipped,
and says so. The exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

WIDTHS = {"phone": 390, "tablet": 820, "wide": 1400}
THEMES = ("light", "dark")
CONTRAST = 4.5  # of text: the level AA of the web's accessibility guidelines
LOADED = {"img": "src", "script": "src", "source": "src", "iframe": "src"}
ELSEWHERE = ("http:", "https:", "mailto:", "data:")

# What is wrong with a page as it is shown. `window.scrollX` moves only if the page itself is too wide.
LOOK = """
const [wide] = arguments, found = [];
const root = document.documentElement;
window.scrollTo(10000, 0);
if (window.scrollX > 0) {
  const of = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right
    + window.scrollX > root.clientWidth + 1 && getComputedStyle(e).position !== 'fixed');
  found.push(`is ${window.scrollX} px wider than the window, by ${of.slice(0, 3).map(e =>
    e.tagName.toLowerCase() + '.' + e.className + ' ' + e.textContent.trim().slice(0, 40)).join(' | ')}`);
}
window.scrollTo(0, 0);
for (const image of document.images) {
  if (image.complete && !image.naturalWidth) found.push('has a broken picture: ' + image.src);
}
for (const error of document.querySelectorAll('mjx-merror, .MathJax_Error')) {
  found.push('has a formula that is no TeX: ' + error.textContent.slice(0, 60));
}
const formulas = document.querySelectorAll('.math'), typeset = document.querySelectorAll('.math mjx-container');
if (typeset.length < formulas.length) {
  found.push(`has ${formulas.length} formulas, of which ${typeset.length} are typeset`);
}
if (wide) for (const code of document.querySelectorAll('article div.highlight pre')) {
  if (code.scrollWidth > code.clientWidth + 1) {
    found.push('has code that is cut: ' + code.textContent.split('\\n').sort((a, b) => b.length - a.length)[0]);
  }
}
return found;
"""

READABLE = """
const light = color => {
  const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
  const f = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return [0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b), a];
};
const found = new Map();
for (const e of document.querySelectorAll('article :is(p, li, td, th, h1, h2, h3, code, span, a, dt, figcaption)')) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
  const box = e.getBoundingClientRect();
  if (!box.width || !box.height || e.closest('mjx-container, .headerlink')) continue;
  let at = e, ground = [1, 0];
  while (at && ground[1] < 0.5) { ground = light(getComputedStyle(at).backgroundColor); at = at.parentElement; }
  if (ground[1] < 0.5) ground = [1, 1];
  const text = light(getComputedStyle(e).color)[0];
  const ratio = (Math.max(text, ground[0]) + 0.05) / (Math.min(text, ground[0]) + 0.05);
  const name = e.tagName.toLowerCase() + '.' + e.className;
  if (ratio < arguments[0] && !found.has(name)) found.set(name, [ratio, e.textContent.trim().slice(0, 40)]);
}
return [...found].map(([name, [ratio, text]]) => `has text of contrast ${ratio.toFixed(1)}: ${name} "${text}"`);
"""

TYPESET = """
const done = arguments[arguments.length - 1];
const ready = () => window.MathJax?.startup?.promise?.then(() => done(null)) ?? done(null);
document.readyState === 'complete' ? ready() : window.addEventListener('load', ready);
"""


class Page(HTMLParser):
    """What a page leads to, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One tag."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED and LOADED[tag] in given:
            self.loads.append(given[LOADED[tag]])
        if tag == "link" and given.get("rel") in {"stylesheet", "icon", "preload"}:
            self.loads.append(given["href"])


def as_files(site: Path) -> Iterator[str]:
    """What is wrong with links and with what pages load."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for target in page.loads:
            if target.startswith(ELSEWHERE[:2]) or target.startswith("//"):
                yield f"{name} loads {target}, which is elsewhere"
        for target in {*page.links, *page.loads}:
            if target.startswith(ELSEWHERE) or target.startswith("//"):
                continue
            address, anchor = urldefrag(target)
            found = (path.parent / unquote(urlsplit(address).path)).resolve() if address else path
            found = found / "index.html" if found.is_dir() else found
            if not found.is_file():
                yield f"{name} leads to {target}, which does not exist"
            elif anchor and found in pages and unquote(anchor) not in pages[found].anchors:
                yield f"{name} leads to {target}, and there is no such anchor"


def served(site: Path) -> http.server.ThreadingHTTPServer:
    """A server of the site's files at a free port of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def chromium() -> tuple[str, str] | None:
    """The browser and its driver, if both are there."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def started(browser: str, driver: str) -> Any:
    """A Chromium without a window and without a network, of which this program has the console."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "disable-gpu", "hide-scrollbars", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # the sandbox is not for root, who containers run as
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def sized(window: Any, width: int, height: int) -> None:
    """A window of that width, narrower than a desktop's may be."""
    measures = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", measures)


def themed(window: Any, theme: str) -> None:
    """Light or dark, as the toggle sets them."""
    script = "const d = document.documentElement.dataset; d.mode = d.theme = arguments[0]"
    window.execute_script(script, theme)


def in_chromium(window: Any, site: Path, address: str, only: list[str], screenshots: Path | None) -> Iterator[str]:
    """What is wrong with pages as they are shown."""
    pages = sorted(path.relative_to(site) for path in site.rglob("*.html") if "_static" not in path.parts)
    for page in pages:
        if only and page.stem not in only:
            continue
        sized(window, WIDTHS["wide"], 1000)
        window.get(f"{address}/{page.as_posix()}")
        window.execute_async_script(TYPESET)
        window.execute_script("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
        for theme in THEMES:
            themed(window, theme)
            yield from (f"{page} ({theme}) {found}" for found in window.execute_script(READABLE, CONTRAST))
            for name, width in WIDTHS.items():
                sized(window, width, 1000)
                for found in window.execute_script(LOOK, name == "wide"):
                    yield f"{page} ({theme}, {width} px) {found}"
                if screenshots is not None:
                    target = screenshots / f"{page.with_suffix('').as_posix().replace('/', '-')}-{name}-{theme}.png"
                    window.save_screenshot(str(target))
        for entry in window.get_log("browser"):
            if entry["level"] != "INFO":
                yield f"{page} writes to the console: {entry['level']} {entry['message']}"


def in_use(window: Any, site: Path, address: str) -> Iterator[str]:
    """The search finds, and the toggle toggles."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    home = next(path for path in sorted(site.glob("*/index.html"))).parent.name
    sized(window, WIDTHS["wide"], 1000)
    window.get(f"{address}/{home}/search.html?q=hypergradient")
    try:
        WebDriverWait(window, 20).until(lambda w: len(w.find_elements(By.CSS_SELECTOR, "ul.search li")) > 4)
    except Exception as error:
        yield f"the search finds nothing for `hypergradient` ({type(error).__name__})"
    window.get(f"{address}/{home}/index.html")
    seen = []
    for theme in THEMES:
        window.find_element(By.CSS_SELECTOR, ".theme-switch-button").click()
        window.find_element(By.CSS_SELECTOR, f".theme-change-button[data-mode={theme}]").click()
        seen.append(window.execute_script("return getComputedStyle(document.body).backgroundColor"))
    if len(set(seen)) < len(THEMES):
        yield f"the toggle of light and dark changes nothing: the ground is {seen}"


def main(arguments: list[str]) -> int:
    """Print what was found; 1 if there is anything."""
    parser = argparse.ArgumentParser(description="Look at every page of the built site.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    parser.add_argument("--pages", default="", metavar="NAMES", help="only these, by their names without a suffix")
    parser.add_argument("--require-chromium", action="store_true")
    options = parser.parse_args(arguments)
    if not list(options.site.glob("*/objects.inv")):
        parser.error(f"{options.site} holds no built site: `make docs` makes it")
    if options.screenshots is not None:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    wrong = list(as_files(options.site))
    programs = chromium()
    if programs is None:
        print("SKIPPED: how the pages look. There is no Chromium here: apt install chromium chromium-driver")
        wrong += ["there is no Chromium, and it was required"] if options.require_chromium else []
    else:
        server, window = served(options.site), started(*programs)
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            only = [name for name in options.pages.split(",") if name]
            wrong += in_chromium(window, options.site, address, only, options.screenshots)
            wrong += in_use(window, options.site, address)
        finally:
            window.quit()
            server.shutdown()
            server.server_close()
    for line in wrong:
        print(line)
    print(f"{len(wrong)} things are wrong with the site" if wrong else "The site is right.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
