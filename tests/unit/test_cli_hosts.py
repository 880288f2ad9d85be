"""`zeroxide run --hostfile`: the commands of all hosts, and the one of this host."""

from __future__ import annotations

import json
import socket
import sys

import pytest
from forked_cli import run_cli

from zeroxide.cli.launching.hostfile import Host, commands, is_here, read_hosts
from zeroxide.cli.run import run
from zeroxide.errors import ConfigError


@pytest.fixture
def hosts(tmp_path):
    def write(text):
        path = tmp_path / "hosts"
        path.write_text(text)
        return str(path)

    return write


def test_a_hostfile_is_read_as_deepspeed_writes_it(hosts):
    text = "# two\nworker-1 slots=4\n\n  worker-2   slots = 2  # smaller\n10.0.0.3\tslots=1\n"
    assert read_hosts(hosts(text)) == [Host("worker-1", 4), Host("worker-2", 2), Host("10.0.0.3", 1)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("worker-1\n", ":1: expected a host and its ranks, such as \"worker-1 slots=4\", got 'worker-1'"),
        ("\nworker-1 slots=0\n", ":2: expected a host"),
        ("worker-1 slots=x\n", ":1: expected a host"),
        ("a slots=1\na slots=2\n", ":2: a stands there twice"),
        ("# nobody\n", "no host in it"),
        ("a..b slots=1\n", ":1: 'a..b' is no name of a host: expected parts of 1 to 63 characters"),
        (f"a slots=1\n{'b' * 64} slots=1\n", f":2: '{'b' * 64}' is no name of a host"),
        (f"{'.'.join(['c' * 60] * 5)} slots=1\n", "...' is no name of a host"),
        ("a\0b slots=1\n", "is no name of a host"),
        *(
            (f"a slots=1\n{name} slots=1\n", f"{name} is another host on each of the 2")
            for name in ("localhost", "LOCALHOST.", "x.localhost", "ip6-loopback", "127.0.0.1", "127.1", "127.9.9.9")
        ),
        ("::1 slots=1\na slots=1\nb slots=1\n", "::1 is another host on each of the 3"),
        ("::ffff:127.0.0.1 slots=1\na slots=1\n", "is another host on each of the 2"),
        ("0.0.0.0 slots=1\na slots=1\n", "0.0.0.0 is another host on each of the 2"),
    ],
)
def test_a_line_that_is_none_is_named(hosts, text, line):
    with pytest.raises(ConfigError) as caught:
        read_hosts(hosts(text))
    assert line in caught.value.message


def test_one_host_may_be_this_one_by_any_name(hosts):
    for name in ("localhost", "127.0.0.1", "::1"):
        assert read_hosts(hosts(f"{name} slots=2\n")) == [Host(name, 2)]


def test_names_and_addresses_of_all_kinds_are_read(hosts):
    names = ["a", f"{'b' * 63}.{'c' * 63}.example", "host.", "10.0.0.3", "fe80::1%eth0", "node_1", "bücher.example"]
    assert [each.name for each in read_hosts(hosts("".join(f"{name} slots=1\n" for name in names)))] == names


def test_no_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_hosts(str(tmp_path / "none"))


def test_every_host_has_its_number_and_its_ranks():
    found = commands([Host("a", 4), Host("b", 2)], ["train.py", "--x"], 1234)
    begin = ["torchrun", "--nnodes=2", "--master-addr=a", "--master-port=1234"]
    assert found == [
        [*begin, "--node-rank=0", "--nproc-per-node=4", "train.py", "--x"],
        [*begin, "--node-rank=1", "--nproc-per-node=2", "train.py", "--x"],
    ]


def test_this_host_is_known_by_name_and_by_address():
    assert is_here(socket.gethostname())
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    # RFC 5737: addresses that nobody has.
    assert not is_here("192.0.2.1")
    assert not is_here("no-such-host.invalid")
    # Names that cannot be asked for.
    assert not is_here("a..b")
    assert not is_here("b" * 64)


def test_a_dry_run_prints_every_command_and_runs_none(hosts, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(9)\n")
    own = socket.gethostname()
    path = hosts(f"{own} slots=2\n192.0.2.1 slots=3\n")
    ended = run_cli("run", "--hostfile", path, "--dry-run", script, "--lr", "1")
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.splitlines()
    assert first.startswith(f"{own}: ZEROXIDE_AS_DEEPSPEED=1 torchrun --nnodes=2 --master-addr={own}")
    assert "--master-port=29500" in first
    assert first.endswith(f"--node-rank=0 --nproc-per-node=2 {script} --lr 1  # this host")
    assert second.endswith(f"--node-rank=1 --nproc-per-node=3 {script} --lr 1")
    ended = run_cli("run", "--hostfile", path, "--dry-run", "--json", "--port", 1234, script)
    told = json.loads(ended.stdout)
    assert told["here"] == [own]
    assert [each["ranks"] for each in told["hosts"]] == [2, 3]
    assert "--master-port=1234" in told["hosts"][1]["command"]
    told = json.loads(run_cli("run", "--dry-run", "--json", "--ranks", 3, script).stdout)
    assert told["command"][1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(script)]
    assert told["environment"] == {"ZEROXIDE_AS_DEEPSPEED": "1"}


def test_the_command_of_this_host_is_run(hosts, tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.touch()
    ran = []
    monkeypatch.setattr("os.execve", lambda program, words, environment: ran.append((program, words, environment)))
    # The package's attribute of that name is the command.
    monkeypatch.setattr(sys.modules["zeroxide.cli.run"], "check_startup", lambda: None)
    run([str(script)], hostfile=hosts(f"192.0.2.1 slots=3\n{socket.gethostname()} slots=2\n"))
    ((program, words, environment),) = ran
    assert program == sys.executable
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--node-rank=1" in words
    assert "--nproc-per-node=2" in words
    assert "--master-addr=192.0.2.1" in words
    assert environment["ZEROXIDE_AS_DEEPSPEED"] == "1"
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--ranks", 2, "--hostfile", "HOSTS", __file__], "leave --ranks out"),
        (["--hostfile", "HOSTS", "true"], "--hostfile starts scripts, and true is a program"),
        (["--hostfile", "HOSTS", __file__], "this host is none of them; run the line of each host there"),
        (["--json", __file__], "--json is for --dry-run"),
        (["--port", 29500, "--dry-run", __file__], "--port 29500 is for --hostfile"),
        (["--ranks", 2, "--port", 1234, __file__], "--port 1234 is for --hostfile"),
        (["x" * 300], "File name too long"),
    ],
)
def test_what_does_not_go_together_is_one_line(hosts, words, line):
    path = hosts("192.0.2.1 slots=3\n")
    ended = run_cli("run", *(path if each == "HOSTS" else each for each in words))
    assert ended.returncode == 2
    assert line in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("echo said\n", "Exec format error: a script needs a first line such as #!/bin/bash"),
        ("#!/nowhere/interpreter\n", "No such file or directory: what its first line (#!) or its own header asks for"),
    ],
)
def test_a_program_that_the_system_does_not_start_is_told(tmp_path, text, line):
    program = tmp_path / "program"
    program.write_text(text)
    program.chmod(0o755)
    ended = run_cli("run", program)
    assert ended.returncode == 2
    told, error = ended.stderr.splitlines()
    assert told.startswith("zeroxide: deepspeed is zeroxide in: ")
    assert error.startswith(f"zeroxide: error: {program} cannot be started: {line}")
