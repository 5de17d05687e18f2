"""`bilevel report DIR...`: one HTML page of a run, or of several side by side, that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from bilevel._files import write_atomically
from bilevel.commands.contents import read_history, read_result
from bilevel.commands.folder import Folder

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460, 240, 62, 34
# Okabe and Ito's, which are told apart with color blindness too; lines differ in dashes as well.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
_POINTS = 400  # of a line, at most
_STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 90%; }
th, td { text-align: left; padding: 2px 10px 2px 0; vertical-align: top; border-bottom: 1px solid #8884; }
td { max-width: 26rem; overflow-wrap: anywhere; }
figure { margin: 0; } figcaption { font-size: 85%; }
img { max-width: 100%; background: white; }
svg text { fill: currentColor; font-size: 11px; } .bad { color: #D55E00; font-weight: bold; }
"""


@final
@dataclass(frozen=True)
class RunFiles:
    """What a folder says of its run."""

    name: str
    result: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    picture: bytes | None


def report(folders: Sequence[str], out: str | None) -> Path:
    """Write the page, and return where: `out`, or `report.html` in the first folder.

    Raises:
        ValueError: if a folder holds no run, or one that is damaged.
    """
    runs = [read(Path(folder)) for folder in folders]
    target = Path(out) if out is not None else Path(folders[0]) / "report.html"
    if target.is_dir():
        raise ValueError(f"`--out {out}` is a folder: name a file.")
    text = page(runs)
    try:
        write_atomically(target, lambda file: file.write(text.encode()))
    except OSError as error:
        raise ValueError(f"`--out {target}` cannot be written: {error}.") from error
    return target


def read(path: Path) -> RunFiles:
    """The files of a run."""
    folder = Folder(path)
    if not folder.result.is_file():
        raise ValueError(f"{str(path)!r} holds no run: there is no result.json in it.")
    history = tuple(read_history(folder)) if folder.history.is_file() else ()
    picture = folder.plot.read_bytes() if folder.plot.is_file() else None
    return RunFiles(path.resolve().name, read_result(folder), history, picture)


def page(runs: Sequence[RunFiles]) -> str:
    """The page: what was asked for and what came of it, curves, statuses, pictures."""
    names = ", ".join(run.name for run in runs)
    parts = [
        _table("Results", runs, _results),
        _table("Settings", runs, _settings),
        '<h2>History</h2><div class="side">',
        _figure("Phi over outer steps", runs, "value"),
        _figure("|h| over outer steps", runs, "grad_norm"),
        "</div>",
        _table("Statuses", runs, _statuses),
        _table("Oracle calls", runs, lambda run: dict(run.result.get("stats") or {})),
        _table("Versions", runs, lambda run: dict(run.result.get("versions") or {})),
        _pictures(runs),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(names)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{_text(names)}</h1>{''.join(parts)}</body></html>\n"
    )


def _table(title: str, runs: Sequence[RunFiles], entries: Callable[[RunFiles], Mapping[str, Any]]) -> str:
    columns = [entries(run) for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not keys:
        return ""
    head = "".join(f"<th>{_text(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th>{_text(key)}</th>{''.join(f'<td>{_cell(column.get(key))}</td>' for column in columns)}</tr>"
        for key in keys
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>{_text(title)}</h2><div class="scroll">{table}</div>'


def _results(run: RunFiles) -> dict[str, Any]:
    result = run.result
    status = str(result.get("status")) + ("" if result.get("converged") else ", not converged")
    found: dict[str, Any] = {"status": status, "message": result.get("message") or ""}
    for title, key in (("Phi", "value"), ("|h|", "grad_norm")):
        ends = [(result.get(when) or {}).get(key) for when in ("initial", "final")]
        found[title] = " → ".join(_number(end) for end in ends if end is not None)
    found |= {name.replace("_", " "): value for name, value in (result.get("metrics") or {}).items()}
    found |= {"outer steps": result.get("steps"), "seconds": result.get("seconds")}
    if result.get("notes"):
        found["notes"] = " ".join(map(str, result["notes"]))
    return found


def _settings(run: RunFiles) -> dict[str, Any]:
    settings = dict(run.result["settings"])
    chosen, arguments = settings.pop("chosen", None) or {}, settings.pop("set", None) or {}
    found = {name: value for name, value in settings.items() if value is not None}
    return found | {f"chosen {name}": value for name, value in chosen.items()} | arguments


def _statuses(run: RunFiles) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in run.history:
        counts[str(record.get("status"))] = counts.get(str(record.get("status")), 0) + 1
    return counts


def _figure(title: str, runs: Sequence[RunFiles], key: str) -> str:
    lines = [[point for point in _points(run.history, key) if point[1] is not None] for run in runs]
    values = [value for line in lines for _, value in line]
    if not values:
        return ""
    logarithmic = min(values) > 0 and max(values) > 20 * min(values)
    height: Callable[[float], float] = math.log10 if logarithmic else float
    low, high = height(min(values)), height(max(values))
    spread, last = (high - low) or 1.0, max(step for line in lines for step, _ in line) or 1
    across, down = _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM - 10

    def place(step: float, value: float) -> str:
        return f"{_LEFT + across * step / last:.1f},{10 + down * (1 - (height(value) - low) / spread):.1f}"

    drawn = []
    for index, (run, line) in enumerate(zip(runs, lines, strict=True)):
        color, dashes = _COLORS[index % len(_COLORS)], _DASHES[index // len(_COLORS) % len(_DASHES)]
        points = " ".join(place(*point) for point in line)
        drawn.append(
            f'<polyline fill="none" stroke="{color}" stroke-width="1.8" stroke-dasharray="{dashes}" points="{points}">'
            f"<title>{_text(run.name)}</title></polyline>"
        )
    ticks = []
    for share in (0.0, 0.5, 1.0):
        value = 10 ** (low + share * spread) if logarithmic else low + share * spread
        y = 10 + down * (1 - share)
        ticks.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>'
        )
        x = _LEFT + across * share
        ticks.append(f'<text x="{x:.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{last * share:.0f}</text>')
    legend = "; ".join(
        f'<span style="color:{_COLORS[i % len(_COLORS)]}">■</span> {_text(run.name)}' for i, run in enumerate(runs)
    )
    scale = " (logarithmic)" if logarithmic else ""
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{_text(title)}">'
        f'{"".join(ticks)}{"".join(drawn)}<text x="{_LEFT + across / 2:.0f}" y="{_HEIGHT - 2}" text-anchor="middle">'
        f"outer step</text></svg><figcaption>{_text(title)}{scale}. {legend}</figcaption></figure>"
    )


def _points(history: Sequence[Mapping[str, Any]], key: str) -> Iterator[tuple[int, float]]:
    """Steps and finite values, evenly thinned."""
    every = max(1, len(history) // _POINTS)
    for index, record in enumerate(history):
        value = record.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if number and not record.get("rejected") and (index % every == 0 or index == len(history) - 1):
            yield int(record.get("step", index)), float(value)  # type: ignore[arg-type]


def _pictures(runs: Sequence[RunFiles]) -> str:
    figures = [
        f'<figure><img alt="{_text(run.name)}" src="data:image/png;base64,{base64.b64encode(run.picture).decode()}">'
        f"<figcaption>{_text(run.name)}</figcaption></figure>"
        for run in runs
        if run.picture is not None
    ]
    return f'<h2>Pictures</h2><div class="side">{"".join(figures)}</div>' if figures else ""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = _text(_number(value) if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value))
    return f'<span class="bad">{text}</span>' if text.startswith(("failed", "diverged", "nonfinite")) else text


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)


def _text(text: str) -> str:
    return html.escape(str(text))
