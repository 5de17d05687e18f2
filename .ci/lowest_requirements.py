"""The lower bounds in pyproject.toml as exact requirements: what `make test-lowest` installs, for users and tests."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("all", "test")
APART = {"convex"}  # cvxpy admits no numpy as old as the others do, and one environment has one numpy


def lowest(extra: str) -> Iterator[str]:
    """`scipy>=1.12` as `scipy==1.12`; `bilevel[a,b]` as what the extras a and b say."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        if inside := re.fullmatch(r"bilevel\[(.*)\]", requirement):
            for name in sorted(set(inside[1].split(",")) - APART):
                yield from lowest(name)
        elif bound := re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement):
            yield f"{bound[1]}=={bound[2]}"
        else:
            sys.exit(f"{requirement!r} of the extra {extra!r} must have the form `name>=version`, and nothing else.")


sys.stdout.write("".join(f"{line}\n" for line in sorted({line for extra in EXTRAS for line in lowest(extra)})))
