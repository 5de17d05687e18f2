"""The command line: `bilevel`, or `python -m bilevel`."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, final

from bilevel import __version__
from bilevel.arguments.nearest import nearest
from bilevel.commands.signals import received

SUCCESS, FAILED, USAGE, MISSING = 0, 1, 2, 3
INTERRUPTED, TERMINATED, HUNG_UP = 130, 143, 129  # 128 and the number of the signal

_LONG = 2000  # characters of an error
_DIGITS = 8  # of a budget: what takes more calls does not end

_DEBUG = "show the traceback of an error"
_EPILOG = """\
exit codes:
  0    success
  1    the computation did not succeed (a solver missed its tolerance,
       diverged, met NaN, or f or g raised), or a test of `check` failed; what
       was computed until then is written all the same
  2    wrong usage or input: nothing was computed
  3    an optional package is missing; the message names the extra to install
  130  interrupted by Ctrl-C; 143 by SIGTERM, 129 by SIGHUP: a run has written
       its checkpoint and can be continued with --resume; a second signal ends
       it at once
"""


@final
class _Parser(argparse.ArgumentParser):
    """Errors in one line, with the name that a mistaken one comes nearest to."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        near = "" if choice is None else nearest(choice[1], re.findall(r"[\w-]+", choice[2]))
        self.exit(USAGE, f"bilevel: error: {_clipped(' '.join(message.split()))}. {near}See `{self.prog} --help`.\n")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Refuse words of the command line that mean nothing here."""
        near = nearest(words[0].partition("=")[0], re.findall(r"--[\w-]+", self.format_usage()))
        text = _clipped(" ".join(" ".join(words).split()))
        self.exit(USAGE, f"bilevel: error: unrecognized arguments: {text}. {near}See `{self.prog} --help`.\n")


def parser() -> _Parser:
    """The parser of all commands; each sets `command` to the function that carries it out."""
    top = _Parser(
        prog="bilevel",
        description="Bilevel optimization: min_x f(x, y*(x)) subject to y*(x) = argmin_y g(x, y).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"bilevel {__version__}", help="show the version and exit")
    commands = top.add_subparsers(metavar="COMMAND", title="commands")
    _add_list(commands.add_parser("list", help="what there is: problems, estimators, solvers, ...", allow_abbrev=False))
    _add_info(commands.add_parser("info", help="versions, threads, BLAS and devices: for reports", allow_abbrev=False))
    for name, add, purpose in (
        ("check", _add_check, "is a problem well posed, and which estimators apply to it"),
        ("compare", _add_compare, "the estimators on a problem: error, certificate, cost and time of each"),
        ("data", _add_data, "download a data set and convert it"),
        ("run", _add_run, "solve a problem and keep everything about the run in a folder"),
    ):
        add(
            commands.add_parser(
                name,
                help=purpose,
                epilog=_EPILOG,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )
    _add_report(commands.add_parser("report", help="one HTML page of a run, or of several", allow_abbrev=False))
    _add_completion(
        commands.add_parser("completion", help="a script that completes words in a shell", allow_abbrev=False)
    )
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return top


def _add_list(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument(
        "--literature",
        action="store_true",
        help="the test problems of the literature: class, name, sizes, best known value; run one by literature:NAME",
    )
    command.add_argument("--debug", action="store_true", help=_DEBUG)
    command.set_defaults(command=_list)


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", nargs="+", metavar="DIR", help="a folder of `bilevel run --out DIR`")
    command.add_argument("--out", metavar="FILE", help="the page; default: report.html in the first folder")
    command.add_argument("--debug", action="store_true", help=_DEBUG)
    command.set_defaults(command=_report)


def _add_completion(command: argparse.ArgumentParser) -> None:
    command.add_argument("shell", choices=("bash", "zsh", "fish"), help='bash: eval "$(bilevel completion bash)"')
    command.add_argument("--debug", action="store_true", help=_DEBUG)
    command.set_defaults(command=_completion)


def _add_info(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--debug", action="store_true", help=_DEBUG)
    command.set_defaults(command=_info)


def _add_problem(command: argparse.ArgumentParser, *, needed: bool = True) -> None:
    add = command.add_argument
    add(
        "problem",
        metavar="PROBLEM",
        nargs=None if needed else "?",
        help="a name from `bilevel list`, or literature:NAME (see `bilevel list --literature`), or my_file.py:NAME,"
        " where NAME is a BilevelProblem with x0 and y0 next to it, an Instance, an Experiment, or a function that"
        " returns (problem, x0, y0), an Instance or, annotated so, an Experiment",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the problem; repeatable")
    add(
        "--from",
        dest="source",
        metavar="FILE",
        help="data for the problem, an .npz file, or a picture for those that take images: `--set data=FILE`",
    )


def _add_check(command: argparse.ArgumentParser) -> None:
    _add_problem(command)
    add = command.add_argument
    add("--seed", type=_number(int, "an integer", lambda _: True), help="of the problem and of the random directions")
    add("--json", action="store_true", help="as JSON")
    add("--debug", action="store_true", help=_DEBUG)
    command.set_defaults(command=_check)


def _add_compare(command: argparse.ArgumentParser) -> None:
    _add_problem(command)
    add = command.add_argument
    add(
        "--estimator",
        action="append",
        default=[],
        metavar="NAME",
        help="one of those to compare (see `bilevel list`); repeatable; default: all that apply",
    )
    add(
        "--budgets",
        type=_budgets,
        default=(),
        metavar="N,N,...",
        help="oracle calls to spend, one row each; default: each estimator's own tolerances",
    )
    add(
        "--estimate-constants",
        action="store_true",
        help="heuristic certificates, where the problem does not come with its constants",
    )
    add("--seed", type=_number(int, "an integer", lambda _: True), help="of the problem")
    add("--out", metavar="DIR", help="write compare.json and compare.png there, replacing earlier ones")
    add("--json", action="store_true", help="as JSON")
    add("--debug", action="store_true", help=_DEBUG)
    command.set_defaults(command=_compare)


def _add_data(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "name",
        metavar="NAME",
        choices=("omniglot",),
        help="omniglot: 1,623 handwritten characters, 20 drawings of each",
    )
    add(
        "--out", default="data", metavar="DIR", help="the folder to download to and to write NAME.npz in; default: data"
    )
    add("--from", dest="source", metavar="DIR", help="a folder with the archives, zipped or unpacked: no download")
    add("--debug", action="store_true", help=_DEBUG)
    command.set_defaults(command=_data)


def _budgets(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) <= _DIGITS and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(
            f"must be positive integers of at most {_DIGITS} digits, separated by commas. Got {text!r}"
        )
    return tuple(map(int, words))


def _add_run(command: argparse.ArgumentParser) -> None:
    _add_problem(command, needed=False)
    add = command.add_argument
    add("--config", metavar="FILE", help="settings as TOML, as every run leaves them in config.toml; flags here win")
    add(
        "--seeds",
        metavar="SEEDS",
        help="a run for each of these, such as 0-9 or 1,5; the table has means and intervals",
    )
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,C",
        help="a run for each value of a flag (step, steps, tol, estimator, algorithm, outer), else of an argument of"
        " the problem; repeatable: all combinations",
    )
    add("--device", metavar="DEVICE", help="where tensors are made, such as cuda")
    add("--estimator", metavar="NAME", help="how hypergradients are estimated (see `bilevel list`)")
    add(
        "--algorithm",
        metavar="NAME",
        help="a whole algorithm with its own steps (see `bilevel list`), in the place of --estimator and --outer",
    )
    add(
        "--outer",
        metavar="NAME",
        help="the outer method (see `bilevel list`); default: the problem's, else quasi-newton or adam",
    )
    add("--step", type=_number(float, "a positive number", lambda step: step > 0), help="its step length")
    add("--steps", type=_number(int, "an integer >= 0", lambda steps: steps >= 0), help="how many outer steps")
    add("--tol", type=_number(float, "a number >= 0", lambda tol: tol >= 0), help="stop when |h| is at most this")
    add("--seed", type=_number(int, "an integer", lambda _: True), help="of the problem and of the estimator")
    add(
        "--seconds",
        type=_number(float, "a positive number", lambda seconds: seconds > 0),
        help="few-shot experiments: stop training in time for the final evaluation to end within so many seconds",
    )
    add("--out", metavar="DIR", help="the run's folder; default: runs/PROBLEM-DATE-TIME")
    add("--resume", action="store_true", help="continue the run in DIR from its checkpoint, bit for bit")
    add(
        "--force",
        action="store_true",
        help="with --resume: go on although the problem's file, functions or data are not those of the run's beginning",
    )
    add(
        "--checkpoint-seconds",
        type=_number(float, "a positive number", lambda seconds: seconds > 0),
        metavar="SECONDS",
        help="write a checkpoint at the latest after so many seconds, whatever the number of steps; default: 30",
    )
    add("--overwrite", action="store_true", help="replace the run in DIR")
    add("--keep-going", action="store_true", help="go on after an estimate that did not succeed, unless it is NaN")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help=_DEBUG)
    command.set_defaults(command=_run)


def _number(kind: Callable[[str], float], wanted: str, valid: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or not valid(number):
            raise argparse.ArgumentTypeError(f"must be {wanted}. Got {text!r}")
        return number

    return parse


def _list(options: argparse.Namespace) -> int:
    from bilevel.commands.listing import listing, literature

    print(literature(as_json=options.json) if options.literature else listing(as_json=options.json))
    return SUCCESS


def _info(options: argparse.Namespace) -> int:
    from bilevel.commands.info import info

    info(as_json=options.json)
    return SUCCESS


def _check(options: argparse.Namespace) -> int:
    from bilevel.commands.arguments import with_data
    from bilevel.commands.check import check

    check(options.problem, with_data(options.set, options.source), options.seed, as_json=options.json)
    return SUCCESS


def _compare(options: argparse.Namespace) -> int:
    from bilevel.commands.arguments import with_data
    from bilevel.commands.compare import Wish, compare

    wish = Wish(
        problem=options.problem,
        estimator=tuple(options.estimator),
        budgets=tuple(options.budgets),
        arguments=with_data(options.set, options.source),
        seed=options.seed,
        out=options.out,
        json=options.json,
        estimate_constants=options.estimate_constants,
    )
    compare(wish)
    return SUCCESS


def _data(options: argparse.Namespace) -> int:
    from bilevel.commands.data import data

    data(options.name, options.out, options.source)
    return SUCCESS


def _run(options: argparse.Namespace) -> int:
    from bilevel.commands.arguments import with_data
    from bilevel.commands.few_shot import run_experiment
    from bilevel.commands.loading import is_experiment
    from bilevel.commands.plan import Request
    from bilevel.commands.run import run

    if options.config is not None:
        _configure(options)
    if options.problem is None:
        raise ValueError("`bilevel run` needs a PROBLEM: a name from `bilevel list`, or an entry of `--config FILE`.")
    apart = ("command", "parser", "debug", "set", "source", "config", "seeds", "sweep")
    wanted = {name: value for name, value in vars(options).items() if name not in apart}
    request = Request(**wanted, arguments=with_data(options.set, options.source))
    carry_out = run_experiment if is_experiment(options.problem) else run
    if carry_out is run_experiment and request.device is not None:
        raise ValueError("`--device` is for problems; few-shot experiments are where their networks are made.")
    if options.seeds is None and not options.sweep:
        carry_out(request)
        return SUCCESS
    from bilevel.commands.many import run_many, seeds_of

    if options.seeds is not None and options.seed is not None:
        raise ValueError("the seed was given twice: by `--seed` and by `--seeds`. Leave one of them out.")
    try:
        seeds = () if options.seeds is None else seeds_of(options.seeds)
    except ValueError as error:
        raise ValueError(f"`--seeds` {error}.") from error
    run_many(request, seeds, options.sweep, carry_out, quiet=options.quiet)
    return SUCCESS


def _configure(options: argparse.Namespace) -> None:
    """Settings of the file where the command line says nothing."""
    from bilevel.commands.config import read

    found = read(options.config)
    arguments = found.pop("set", [])
    if options.seeds is not None:
        found.pop("seed", None)
    words = [f"--{name}={value}" for name, value in found.items() if name != "problem"]
    problem = [found["problem"]] if "problem" in found else []
    own: argparse.Namespace = options.parser.parse_args([*words, *map(str, problem)])
    for name in found:
        if getattr(options, name) is None:
            setattr(options, name, getattr(own, name))
    options.set = [*arguments, *options.set]


def _report(options: argparse.Namespace) -> int:
    from bilevel.commands.report import report

    print(report(options.folders, options.out))
    return SUCCESS


def _completion(options: argparse.Namespace) -> int:
    from bilevel.commands.completion import script
    from bilevel.commands.listing import contents

    top = parser()
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction)).choices
    flags = {
        name: sorted(word for action in command._actions for word in action.option_strings if word.startswith("--"))
        for name, command in commands.items()
    }
    known = contents()
    names = {
        "problem": [*known["problems"], *known["few-shot experiments"]],
        "estimator": list(known["estimators"]),
        "outer": list(known["outer methods"]),
        "algorithm": list(known["algorithms"]),
    }
    print(script(options.shell, flags, names), end="")
    return SUCCESS


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit code; errors are one line on stderr.

    Args:
        arguments: the words after `bilevel`; None: those of this process.

    Example:
        >>> main(["list", "--json"]) == SUCCESS  # doctest: +ELLIPSIS
        {...
        True
    """
    with received() as signals:
        try:
            return _carried_out(arguments)
        except KeyboardInterrupt as stop:
            print(f"bilevel: {_flat(stop) or 'interrupted'}", file=sys.stderr)
            return signals.code
        except BrokenPipeError:  # `bilevel list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return SUCCESS


def _carried_out(arguments: Sequence[str] | None) -> int:
    try:
        top = parser()
        options, unknown = top.parse_known_args(arguments)
        if unknown:
            chosen: _Parser = getattr(options, "parser", top)
            chosen.refuse(unknown)
        if not hasattr(options, "command"):
            top.error("a command is needed: `bilevel list` or `bilevel run PROBLEM`")
    except SystemExit as stop:  # argparse: --help, --version and wrong usage
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        return int(options.command(options))
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except BaseException as error:  # also what a file of the user's raises to leave: `sys.exit()`
        if options.debug:
            traceback.print_exc()
        print(f"bilevel: error: {_one_line(error, getattr(options, 'problem', ''))}", file=sys.stderr)
        return _exit_code(error)


def _exit_code(error: BaseException) -> int:
    from bilevel._result import BilevelError
    from bilevel.commands.raised import Failure, raised_by

    if isinstance(error, ImportError):
        return MISSING
    return FAILED if isinstance(error, Failure | BilevelError) or raised_by(error) else USAGE


def _one_line(error: BaseException, problem: str) -> str:
    from bilevel._result import BilevelError
    from bilevel.commands.raised import Failure, raised_by, told

    if isinstance(error, ImportError):
        return _flat(error)
    ours = isinstance(error, ValueError | TypeError | OSError | Failure | BilevelError) and str(error)
    if ours and not raised_by(error):
        return _flat(error)
    return _flat(error, f"{told(error, problem)}. `--debug` shows the traceback.")


def _flat(error: BaseException, text: str | None = None) -> str:
    """The text and notes of an error in one line."""
    line = " ".join(" ".join([str(error) if text is None else text, *getattr(error, "__notes__", ())]).split())
    return _clipped(line.replace('`resume="force"`', "`--force`"))  # what Python's way to say it is called here


def _clipped(line: str) -> str:
    """A line without the middle of a very long one, which is what somebody typed."""
    return line if len(line) <= _LONG else f"{line[: _LONG // 2]} ... {line[-_LONG // 2 :]}"
