"""`zeroxide completion`: a script by which a shell completes the command's words, made from the commands themselves.

The script is plain: pressing Tab starts no Python. Options, commands and fixed choices are completed, and files for
the rest.
"""

from __future__ import annotations

import enum
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from zeroxide.cli.training.options import DTYPES, IO_ENGINES, SCHEDULES
from zeroxide.config.state_formats import FORMATS

__all__ = ["Shell", "completion", "script"]


CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("zeroxide bench", "--dtype"): DTYPES,
    ("zeroxide convert", "--to"): ("checkpoint", "universal", "fp32", "bf16", "fp16"),
    ("zeroxide train", "--dtype"): DTYPES,
    ("zeroxide train", "--format"): FORMATS,
    ("zeroxide train", "--io-engine"): IO_ENGINES,
    ("zeroxide train", "--schedule"): SCHEDULES,
}
"""(Command, option) -> all values that it takes: commands check them, with a message of their own, and typer does not
know them. Those of `convert` stand beside its code too, which imports torch."""


class Shell(enum.StrEnum):
    """The shells that there are scripts for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(help="Which shell the script is for.", show_default=False)],
) -> None:
    """Print a script that completes this command's words.

    \b
    bash: eval "$(zeroxide completion bash)" in ~/.bashrc
    zsh:  zeroxide completion zsh > ~/.zfunc/_zeroxide, with ~/.zfunc in fpath before compinit
    fish: zeroxide completion fish > ~/.config/fish/completions/zeroxide.fish
    """
    from zeroxide.cli import application

    print(script(shell, typer.main.get_command(application())))


@dataclass(frozen=True)
class _Words:
    """What may follow some words: (word, help) of commands and of options, the fixed choices of arguments, and those of
    options by their words."""

    path: tuple[str, ...]
    commands: list[tuple[str, str]]
    options: list[tuple[str, str]]
    choices: list[tuple[str, str]]
    values: dict[str, tuple[str, ...]]

    @property
    def command(self) -> str:
        """The words as they are typed."""
        return " ".join(self.path)


def _tree(command: Any, path: tuple[str, ...]) -> Iterator[_Words]:
    inner = getattr(command, "commands", {})
    options = []
    for each in command.params:
        if each.param_type_name == "option":
            options += [(word, _line(each.help)) for word in (*each.opts, *each.secondary_opts) if word[:2] == "--"]
    choices = [(shell.value, "") for shell in Shell] if path[-1] == "completion" else []
    options.append(("--help", "Show this message and exit."))
    named = [(name, _line(each.get_short_help_str(120))) for name, each in inner.items()]
    values = {word: CHOICES[" ".join(path), word] for word, _ in options if (" ".join(path), word) in CHOICES}
    yield _Words(path, named, list(dict(options).items()), choices, values)
    for name, each in inner.items():
        yield from _tree(each, (*path, name))


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def script(shell: Shell, command: Any) -> str:
    """The script for a shell that completes the words of `command`, which click or typer has made."""
    tree = list(_tree(command, ("zeroxide",)))
    return {Shell.BASH: _bash, Shell.ZSH: _zsh, Shell.FISH: _fish}[shell](tree)


def _patterns(tree: list[_Words]) -> str:
    return " | ".join(f'"{each.command}"' for each in tree[1:])


def _values(tree: list[_Words]) -> list[tuple[str, tuple[str, ...]]]:
    """(command and option, what it takes) of all options with fixed choices."""
    return [(f"{each.command} {word}", taken) for each in tree for word, taken in each.values.items()]


def _bash(tree: list[_Words]) -> str:
    cases = []
    for each in tree:
        plain = " ".join(name for name, _ in (*each.commands, *each.choices))
        dashed = " ".join(name for name, _ in each.options)
        cases.append(f'        "{each.command}") plain="{plain}" dashed="{dashed}" ;;')
    values = [f'        "{words}") plain="{" ".join(taken)}" dashed="" ;;' for words, taken in _values(tree)]
    return f"""\
_zeroxide() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} path=zeroxide plain="" dashed="" option=$((COMP_CWORD - 1)) word index
    # "--to=fp" are three words: "--to", "=" and "fp".
    if [[ $current == = ]]; then
        current=""
    elif [[ ${{COMP_WORDS[option]}} == = ]]; then
        option=$((option - 1))
    fi
    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${{COMP_WORDS[index]}}
        case "$path $word" in
            {_patterns(tree)}) path="$path $word" ;;
        esac
    done
    case $path in
{chr(10).join(cases)}
    esac
    case "$path ${{COMP_WORDS[option]}}" in
{chr(10).join(values)}
    esac
    COMPREPLY=()
    case $current in
        -*) COMPREPLY=($(compgen -W "$dashed" -- "$current")) ;;
        *) COMPREPLY=($(compgen -W "$plain" -- "$current")) ;;
    esac
}}
complete -o default -F _zeroxide zeroxide"""


def _zsh(tree: list[_Words]) -> str:
    def described(words: list[tuple[str, str]]) -> str:
        return " ".join(shlex.quote(f"{name}:{text}" if text else name) for name, text in words)

    cases = []
    for each in tree:
        plain, dashed = described([*each.commands, *each.choices]), described(each.options)
        cases.append(f'        ("{each.command}") plain=({plain}) dashed=({dashed}) ;;')
    values = [f'        ("{words}") plain=({" ".join(taken)}) dashed=() ;;' for words, taken in _values(tree)]
    return f"""\
#compdef zeroxide
_zeroxide() {{
    local at=zeroxide option=$words[CURRENT-1] word
    if [[ $words[CURRENT] == --*=* ]]; then
        option=${{words[CURRENT]%%=*}}
        compset -P '*='
    fi
    local -a plain dashed
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "$at $word" in
            ({_patterns(tree)}) at="$at $word" ;;
        esac
    done
    case $at in
{chr(10).join(cases)}
    esac
    case "$at $option" in
{chr(10).join(values)}
    esac
    if [[ $PREFIX == -* ]]; then
        _describe option dashed
    elif (( $#plain )); then
        _describe command plain
    else
        _files
    fi
}}
if [[ $funcstack[1] == _zeroxide ]]; then
    _zeroxide "$@"
else
    compdef _zeroxide zeroxide
fi"""


def _fish(tree: list[_Words]) -> str:
    lines = ["complete -c zeroxide -f -n __fish_use_subcommand"]
    for each in tree:
        inside = each.path[1:]
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in inside) or "__fish_use_subcommand"
        others = " ".join(name for name, _ in each.commands)
        unseen = f"{seen}; and not __fish_seen_subcommand_from {others}" if inside and others else seen
        for name, text in (*each.commands, *each.choices):
            lines.append(f"complete -c zeroxide -n {shlex.quote(unseen)} -f -a {name} -d {shlex.quote(text)}")
        for name, text in each.options:
            taken = f" -x -a {shlex.quote(' '.join(each.values[name]))}" if name in each.values else ""
            lines.append(f"complete -c zeroxide -n {shlex.quote(seen)} -l {name[2:]}{taken} -d {shlex.quote(text)}")
    return "\n".join(lines)
