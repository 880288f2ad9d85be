"""`zeroxide completion`: scripts that know every command and option."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
import typer
from forked_cli import run_cli

from zeroxide.checkpoint.convert.convert import TARGETS
from zeroxide.cli import application, main
from zeroxide.cli.completion import CHOICES, Shell, script

COMMAND = typer.main.get_command(application())


def bash(*words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    text = script(Shell.BASH, COMMAND)
    array = " ".join(f"'{word}'" for word in words)
    run = f'{text}\nCOMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _zeroxide; printf "%s\\n" "${{COMPREPLY[@]}}"'
    ended = subprocess.run(["bash", "--norc", "-c", run], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return ended.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["zeroxide", "con"], ["convert", "config"]),
        (["zeroxide", "config", ""], ["explain", "check", "schema"]),
        (["zeroxide", "config", "check", "--w"], ["--world-size"]),
        (["zeroxide", "config", "check", "file.json", "--ranks"], ["--ranks-per-host"]),
        (["zeroxide", "train", "--he"], ["--help"]),
        (["zeroxide", "completion", "z"], ["zsh"]),
        (["zeroxide", "convert", "a", "--to", ""], [*TARGETS]),
        (["zeroxide", "convert", "--to", "u"], ["universal"]),
        (["zeroxide", "convert", "--to", "=", "fp"], ["fp32", "fp16"]),
        (["zeroxide", "convert", "--to", "="], [*TARGETS]),
        (["zeroxide", "train", "--schedule", "co"], ["cosine", "constant"]),
        # A value that is written, and an option of that name that another command has.
        (["zeroxide", "convert", "--to", "bf16", "f"], []),
        (["zeroxide", "convert", "--format", ""], []),
        # Files, which the shell itself completes where nothing is offered.
        (["zeroxide", "doctor", "/t"], []),
        # A value that is called like a command.
        (["zeroxide", "run", "config", "--r"], ["--ranks"]),
    ],
)
def test_bash_offers_what_fits(words, offered):
    assert bash(*words) == offered


def test_every_option_of_every_command_is_in_every_script():
    texts = {shell: script(shell, COMMAND) for shell in Shell}
    for command in (COMMAND, *COMMAND.commands.values(), *COMMAND.commands["config"].commands.values()):
        for option in (word for each in command.params for word in each.opts if word.startswith("--")):
            assert option in texts[Shell.BASH]
            assert option in texts[Shell.ZSH]
            assert f"-l {option[2:]} " in texts[Shell.FISH]
    for name in (*COMMAND.commands, *COMMAND.commands["config"].commands):
        assert all(name in text for text in texts.values())


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_offers_values_of_options(tmp_path):
    text = script(Shell.FISH, COMMAND)
    ended = subprocess.run(
        ["fish", "--no-config", "-c", f"{text}\ncomplete -C 'zeroxide convert --to '"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert {line.split("\t")[0] for line in ended.stdout.splitlines()} == set(TARGETS)


def test_every_script_has_the_values_of_options():
    texts = {shell: script(shell, COMMAND) for shell in Shell}
    for (command, option), values in CHOICES.items():
        assert f'"{command} {option}") plain="{" ".join(values)}"' in texts[Shell.BASH]
        assert f'("{command} {option}") plain=({" ".join(values)})' in texts[Shell.ZSH]
        assert f"-l {option[2:]} -x -a '{' '.join(values)}'" in texts[Shell.FISH]


@pytest.mark.parametrize(("command", "option"), CHOICES)
def test_the_values_of_an_option_are_those_that_its_command_takes(command, option, tmp_path, capsys):
    """A command that is given another value names what it takes, all of it."""
    paths = [str(tmp_path), str(tmp_path)] if command == "zeroxide convert" else []
    assert main([*command.split()[1:], *paths, option, "nonesuch"]) == 2
    listed = ", ".join(CHOICES[command, option])
    assert f" one of {listed}" in capsys.readouterr().err


@pytest.mark.parametrize("shell", [each.value for each in Shell])
def test_the_command_prints_a_script_that_its_shell_can_read(shell):
    ended = run_cli("completion", shell)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.rstrip("\n") == script(Shell(shell), COMMAND)
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=ended.stdout, text=True, check=True)


def test_another_shell_is_refused_in_one_line():
    ended = run_cli("completion", "tcsh")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1


def test_help_of_all_commands_is_of_one_kind():
    """A command says in one sentence what it does, an option in one with a full stop; --json is --json everywhere."""
    for name, command in (*COMMAND.commands.items(), *COMMAND.commands["config"].commands.items()):
        assert (command.help or "").split("\n")[0].rstrip().endswith("."), name
        for each in command.params:
            if each.param_type_name == "option" and each.name != "help":
                assert (each.help or "").endswith("."), (name, each.opts)
    with_json = {
        name
        for name, command in (*COMMAND.commands.items(), *COMMAND.commands["config"].commands.items())
        if any("--json" in each.opts for each in command.params)
    }
    assert with_json == {"train", "convert", "run", "plan", "doctor", "bench", "explain", "check"}
