"""`bilevel completion SHELL`: a script that completes commands, flags and names in a shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, flags: Mapping[str, Sequence[str]], names: Mapping[str, Sequence[str]]) -> str:
    """The script.

    Args:
        shell: bash, zsh or fish.
        flags: of each command.
        names: what may follow: "problem" after a command that takes one, and after the flags of these names.
    """
    if shell == "fish":
        return _fish(flags, names)
    bash = _bash(flags, names)
    return bash if shell == "bash" else f"autoload -Uz bashcompinit && bashcompinit\n{bash}"


def _bash(flags: Mapping[str, Sequence[str]], names: Mapping[str, Sequence[str]]) -> str:
    cases = "\n".join(
        f"    {command}) words={shlex.quote(' '.join([*own, *_after(command, names)]))} ;;"
        for command, own in flags.items()
    )
    values = "\n".join(
        f"    --{name}) words={shlex.quote(' '.join(words))} ;;" for name, words in names.items() if name != "problem"
    )
    return f"""\
# bash completion of bilevel: eval "$(bilevel completion bash)"
_bilevel() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  case "$before" in
{values}
    --out|--config|--from) COMPREPLY=($(compgen -f -- "$current")); return ;;
  esac
  if [ -z "$words" ]; then
    if [ "$COMP_CWORD" -eq 1 ]; then words={shlex.quote(" ".join(flags))}; else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac; fi
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _bilevel bilevel
"""


def _fish(flags: Mapping[str, Sequence[str]], names: Mapping[str, Sequence[str]]) -> str:
    first = "not __fish_seen_subcommand_from " + " ".join(flags)
    lines = ["# fish completion of bilevel: bilevel completion fish | source"]
    lines += [f"complete -c bilevel -f -n {shlex.quote(first)} -a {command}" for command in flags]
    for command, own in flags.items():
        seen = shlex.quote(f"__fish_seen_subcommand_from {command}")
        for flag in own:
            name = flag.removeprefix("--")
            values = f" -x -a {shlex.quote(' '.join(names[name]))}" if name in names else ""
            lines.append(f"complete -c bilevel -n {seen} -l {name}{values}")
        if _after(command, names):
            lines.append(f"complete -c bilevel -n {seen} -a {shlex.quote(' '.join(_after(command, names)))}")
    return "\n".join(lines) + "\n"


def _after(command: str, names: Mapping[str, Sequence[str]]) -> Sequence[str]:
    return names["problem"] if command in ("run", "check", "compare") else ()
