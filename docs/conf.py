"""How Sphinx builds these pages: `make docs`, where a warning is an error."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from sphinx_gallery.sorting import FileNameSortKey

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import bilevel  # noqa: E402


def repository() -> str:
    """Where the code is hosted: written down for a release, told by the CI, or known to git; else nowhere."""
    urls = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ].get("urls", {})
    if "Repository" in urls:
        return str(urls["Repository"])
    if "GITHUB_REPOSITORY" in os.environ:
        return f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{os.environ['GITHUB_REPOSITORY']}"
    command = ["git", "-C", str(HERE), "config", "--get", "remote.origin.url"]
    try:
        remote = subprocess.run(
            command, capture_output=True, text=True, check=False
        ).stdout.strip()
    except FileNotFoundError:  # no git
        return ""
    remote = re.sub(r"^(ssh://)?git@([^:/]+)[:/]", r"https://\2/", remote)
    return remote.removesuffix(".git") if re.match(r"https://[^/@]+/", remote) else ""


project = "bilevel"
author = "The bilevel authors"
version = release = bilevel.__version__
copyright = author
smartquotes = False  # a prime is a transpose
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
    "site_parts.docstrings",
    "site_parts.markdown",
    "site_parts.mathematics",
    "site_parts.versions",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["examples", "site_parts"]
suppress_warnings = ["config.cache"]  # the gallery's order is a function

# Markdown. Headings have the anchors that code hosts give them.
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
mathjax_path = "mathjax/tex-svg.js"
pygments_style = "friendly"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Docstrings.
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# The gallery: examples/ is what is run, tests/test_gallery.py what it must find.
sphinx_gallery_conf: dict[str, Any] = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "only_warn_on_example_error": False,
    "within_subsection_order": FileNameSortKey,
    "download_all_examples": True,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "backreferences_dir": None,
    "thumbnail_size": (400, 280),
    "capture_repr": (),
    "reset_modules": ("matplotlib", "site_parts.reset.torch_defaults"),
}

html_theme = "pydata_sphinx_theme"
html_title = "bilevel"
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
templates_path = ["site_parts/templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options: dict[str, Any] = {
    "logo": {"text": html_title},
    "show_prev_next": True,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "navbar_end": ["versions", "theme-switcher", "navbar-icon-links"],
    "secondary_sidebar_items": ["page-toc", "sg_download_links"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "icon_links": [],
}
if REPOSITORY := repository():
    html_theme_options["icon_links"] = [
        {"name": "Repository", "url": REPOSITORY, "icon": "fa-solid fa-code-branch"}
    ]
