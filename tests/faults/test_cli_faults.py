"""What a user can get wrong on the command line, and what can go wrong in a run: one line, the right status."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from cli_fake_engine import FakeInitialize

import zeroxide.cli
from zeroxide.cli.training import job
from zeroxide.cli.training.run_folder import RunFolder
from zeroxide.errors import BudgetError, StorageError


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number}: the quick brown fox\n" for number in range(2000)))
    return path


@pytest.fixture
def train(monkeypatch, capsys, tmp_path, text):
    """Run the command in this process over the fake engine; return status and the lines of the standard error."""

    def call(*arguments, fake=None, defaults=True):
        original = job.make_engine
        stand_in = fake or FakeInitialize()
        monkeypatch.setattr(
            job, "make_engine", lambda options, choice, model, _, name: original(options, choice, model, stand_in, name)
        )
        base = ["train", "--model", "tiny", "--data", str(text), "--steps", "6", "--batch-size", "2", "--seq-len", "16"]
        base += ["--dtype", "fp32", "--threads", "1", "--sample-tokens", "0", "--out", str(tmp_path / "run")]
        status = zeroxide.cli.main([*(base if defaults else ["train"]), *arguments])
        monkeypatch.setattr(job, "make_engine", original)
        return status, capsys.readouterr().err.splitlines()

    return call


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def one_line(outcome, status, *phrases):
    got, lines = outcome
    assert got == status, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("zeroxide: error: ")
    for phrase in phrases:
        assert phrase in lines[0]


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--stps", "5"], ["No such option", "--stps", "--steps"]),
        (["--steps", "many"], ["--steps", "valid integer"]),
        (["--steps"], ["--steps"]),
        (["--steps", "-3"], ["--steps must be at least 1, got -3"]),
        (["--lr", "nan"], ["--lr"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--batch-size", "1000000"], ["too little data", "needs 16,000,000 tokens"]),
        (["--seq-len", "100000"], ["--seq-len 100000 is longer than tiny can take"]),
        (["--host-memory", "lots"], ["--host-memory", "lots"]),
        (["--offload", "floppy"], ["--offload"]),
        (["--model", "tinny"], ["did you mean tiny?"]),
        (["--model", "/does/not/exist"], ["/does/not/exist", "presets:"]),
        (["--data", "/does/not/exist"], ["no such file or folder: /does/not/exist"]),
        (["/also/missing"], ["no such file or folder: /also/missing"]),
        (["--resume"], ["holds no run"]),
        (["--sample-prompt", ""], ["--sample-prompt"]),
    ],
)
def test_a_users_mistake_is_one_line(train, arguments, phrases):
    one_line(train(*arguments), 2, *phrases)


def test_a_rank_whose_first_rank_never_comes_is_one_line(train, tmp_path, monkeypatch):
    """Several ranks train together (test_cli_ranks.py). Catches: a rank that trains on its own where the others are
    missing, and writes the same files; a limit that is not kept."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(job, "start", functools.partial(job.start, 1.0))
    one_line(train(), 1, "rank 1 of 2", "could not meet the others at tcp://127.0.0.1:1 within 1 s")
    assert not (tmp_path / "run").exists()


def test_an_unknown_command_is_one_line(capsys):
    assert zeroxide.cli.main(["trian"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "trian" in lines[0]


def test_empty_data(train, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line(train("--data", str(empty), defaults=False), 2, "no text files in the folder")
    (empty / "nothing.txt").write_text("")
    one_line(train("--data", str(empty / "nothing.txt"), defaults=False), 2, "the data is empty")


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_user_that_is_unknown_is_one_line(train, more):
    """Catches: the error of Python's own, with its traceback."""
    one_line(train("--out", "~nosuchuser/run", *more), 1, "--out ~nosuchuser/run: no such user")


def test_out_is_a_file(train, tmp_path, text):
    one_line(train("--out", str(text)), 2, "is a file or lies below one")
    one_line(train("--out", str(text / "below")), 2, "is a file or lies below one")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_out_is_read_only(train, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    one_line(train("--out", str(folder / "run")), 1, "cannot write to", "Permission denied")


def test_out_is_in_use(train, tmp_path):
    folder = RunFolder(tmp_path / "run")
    try:
        one_line(train(), 2, "in use by a live run", f"pid {os.getpid()}")
    finally:
        folder.close()
    assert train()[0] == 0


def test_a_mistake_leaves_nothing_behind(train, tmp_path):
    train("--data", "/does/not/exist")
    train("--model", "tinny")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(train, tmp_path, value):
    def poison(step):
        if step == 4:
            fake.engine.module.transformer.ln_f.weight.data.fill_(value)

    fake = FakeInitialize(poison)
    outcome = train("--save-every", "3", fake=fake)
    one_line(outcome, 1, "the loss is nan at step 5", "the checkpoint of step 3 is intact")
    assert fake.engine.destroyed
    assert checkpoints(tmp_path / "run") == ["step-3"]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "error"
    assert "the loss is nan" in events[-1]["message"]


def test_a_gradient_that_is_not_finite_is_named(train):
    def poison(step):
        if step == 2:
            fake.engine.module.transformer.ln_f.bias.grad.fill_(math.nan)

    fake = FakeInitialize(poison)
    one_line(train(fake=fake), 1, "the gradient norm is nan at step 2", "there is no checkpoint yet")


def test_an_overflow_in_fp16_does_not_end_the_run(train, tmp_path):
    def overflow(step):
        fake.engine.get_global_grad_norm = lambda: math.nan if step == 2 else 1.0

    fake = FakeInitialize(overflow)
    assert train("--dtype", "fp16", fake=fake) == (0, [])
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    norms = [event["grad_norm"] for event in events if event["event"] == "step"]
    assert norms == [1.0, None, 1.0, 1.0, 1.0, 1.0]


def test_an_input_output_error_in_the_middle_of_a_step(train, tmp_path):
    def fail(step):
        if step == 4:
            raise StorageError("read of 4194304 bytes at 8192 in /x/blocks.bin failed: Input/output error")

    one_line(train("--save-every", "2", fake=FakeInitialize(fail)), 1, "/x/blocks.bin", "Input/output error")
    assert checkpoints(tmp_path / "run") == ["step-2"]
    assert train("--resume", "--out", str(tmp_path / "run"), defaults=False) == (0, [])


def test_a_budget_that_is_too_small_is_one_line(train):
    def refuse(**arguments):
        raise BudgetError("host_memory 64 MiB is too small by 900 MiB", need=1, limit=1)

    one_line(train(fake=refuse), 2, "host_memory 64 MiB is too small by 900 MiB")


def test_a_defect_is_not_dressed_up_as_a_users_mistake(train):
    def defect(step):
        raise AssertionError("a broken invariant")

    with pytest.raises(AssertionError, match="a broken invariant"):
        train(fake=FakeInitialize(defect))


def test_a_damaged_record_is_one_line(train, tmp_path):
    assert train("--save-every", "2")[0] == 0
    record = tmp_path / "run" / "run.json"
    good = record.read_text()
    for damaged in (
        "{",
        "[]",
        good.replace('"steps": 6', '"steps": "six"'),
        good.replace('"version": 1', '"version": 9'),
    ):
        record.write_text(damaged)
        status, lines = train("--resume", "--out", str(tmp_path / "run"), defaults=False)
        assert status in (1, 2)
        assert len(lines) == 1
        assert lines[0].startswith("zeroxide: error: ")


def test_damaged_tokens_stop_a_resume(train, tmp_path):
    from zeroxide.errors import NumericsError

    def fail(step):
        if step == 4:
            raise NumericsError("enough")

    train("--save-every", "2", fake=FakeInitialize(fail))
    file = tmp_path / "run" / "data" / "train.bin"
    data = bytearray(file.read_bytes())
    data[77] ^= 4
    file.write_bytes(data)
    one_line(train("--resume", "--out", str(tmp_path / "run"), defaults=False), 1, "train.bin is damaged")


def test_a_full_disk_while_logging_is_one_line(train, tmp_path, monkeypatch):
    original = job.RunFolder.log
    monkeypatch.setattr(job.RunFolder, "log", property(lambda self: Path("/dev/full")))
    one_line(train(), 1, "cannot write the log: No space left on device")
    monkeypatch.setattr(job.RunFolder, "log", original)


def test_help_and_mistakes_do_not_import_torch():
    program = (
        "import sys, zeroxide.cli as cli\n"
        "assert cli.main(['train', '--help']) == 0\n"
        "assert cli.main(['train', '--lr', 'x']) == 2\n"
        "assert cli.main(['train', '--lr', '-1']) == 2\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "--host-memory" in finished.stdout
