"""`zeroxide train` as users run it: the real engine, a process of its own, signals from outside.

A command that a signal ends is a new interpreter; the others are forked (`forked_cli.py`).
"""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from forked_cli import run_cli
from page_reading import read, rows
from safetensors.torch import load_file
from trace_format import check
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("zeroxide._core")

COMMON = [
    "--model",
    "tiny",
    "--batch-size",
    "2",
    "--seq-len",
    "32",
    "--lr",
    "3e-3",
    "--threads",
    "1",
    "--eval-batches",
    "2",
]


FORTY = ["--steps", 40, "--accumulate", 2, "--sample-tokens", 0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        (folder / f"{number:02}.py").write_text(
            "".join(f"def function_{i}(a, b={number}):\n    return a * {i} + b\n\n\n" for i in range(20))
        )
    return folder


def command(*arguments):
    return [sys.executable, "-m", "zeroxide.cli", "train", *map(str, arguments)]


def train(*arguments):
    finished = run_cli("train", *arguments)
    assert "Traceback" not in finished.stderr, finished.stderr
    return finished


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text):
    """40 steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("straight")
    options = [*COMMON, *FORTY, "--data", text, "--offload", f"nvme:{out}"]
    assert train(*options, "--out", out / "run").returncode == 0
    return out / "run"


def losses(run):
    events = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def test_offload_modes_give_the_same_run_and_a_model_that_loads(tmp_path, text):
    runs = {}
    for name, options in {
        "none": ["--offload", "none"],
        "cpu": ["--offload", "cpu", "--format", "fp32"],
        "nvme": ["--offload", f"nvme:{tmp_path}", "--host-memory", "2GiB", "--io-engine", "threads"],
    }.items():
        runs[name] = tmp_path / name
        finished = train(*COMMON, "--data", text, "--steps", 10, "--out", runs[name], *options)
        assert finished.returncode == 0, finished.stderr
        page = read((runs[name] / "report.html").read_text())
        assert [float(row[1]) for row in rows(page, "Steps")[1:]] == [
            pytest.approx(loss, rel=1e-5) for loss in losses(runs[name]).values()
        ]
        done = {row[0] for row in rows(page, "What the core did")}
        assert done >= {"weights gathered", "gradients taken", "tiles updated"}
        assert ("disk reads" in done) == ("disk writes" in done) == (name == "nvme")
        assert {row[0] for row in rows(page, "Expected and reached")} >= {"whole process", "total"}
        check(runs[name] / "trace.json")
    first = losses(runs["none"])
    assert first[10] < first[1] - 0.3
    for name in ("cpu", "nvme"):
        assert losses(runs[name]) == first, name
        one, two = (load_file(runs[each] / "model" / "model.safetensors") for each in ("none", name))
        assert one.keys() == two.keys()
        assert all(tensor.equal(two[key]) for key, tensor in one.items())
    model = AutoModelForCausalLM.from_pretrained(runs["nvme"] / "model")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(runs["nvme"] / "model")
    batch = tokenizer((text / "00.py").read_text()[:400], return_tensors="pt").input_ids[:, :64]
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss
    # What was exported is what was trained: far below the ln(512) = 6.2 of an untrained model.
    assert float(loss) < first[1] - 0.3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_state_to_go_on_from_with_the_same_bits(tmp_path, text, straight, number):
    options = [*COMMON, *FORTY, "--data", text, "--offload", f"nvme:{tmp_path}"]
    halves = tmp_path / "halves"
    with subprocess.Popen(command(*options, "--out", halves), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step  5/"):
                process.send_signal(number)
        assert process.wait() == 128 + number
    done = max(losses(halves))
    assert 5 <= done < 40
    assert not (halves / "model").exists()
    assert train("--resume", "--out", halves).returncode == 0
    assert losses(halves) == losses(straight)
    one, two = (load_file(run / "model" / "model.safetensors") for run in (straight, halves))
    assert all(tensor.equal(two[key]) for key, tensor in one.items())
    # The scratch files of all three processes are gone.
    assert not [
        name for folder in (tmp_path, straight.parent) for name in os.listdir(folder) if name.startswith("zeroxide-")
    ]


def test_fp16_gives_the_same_run_in_memory_and_on_disk_and_a_model_that_loads(tmp_path, text):
    options = [*COMMON, "--data", text, "--steps", 12, "--warmup", 0, "--sample-tokens", 0, "--dtype", "fp16"]
    runs = {"none": ["--offload", "none"], "nvme": ["--offload", f"nvme:{tmp_path}"]}
    for name, extra in runs.items():
        finished = train(*options, "--out", tmp_path / name, *extra)
        assert finished.returncode == 0, finished.stderr
    first = losses(tmp_path / "none")
    assert losses(tmp_path / "nvme") == first
    assert first[12] < first[1] - 0.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nvme" / "model")
    assert model.dtype == torch.float16
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, text):
    options = [*COMMON, "--data", text, "--steps", 30, "--sample-tokens", 0, "--save-every", 4]
    options += ["--offload", f"nvme:{tmp_path}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(*options, "--out", whole).returncode == 0
    with subprocess.Popen(command(*options, "--out", killed), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 10/"):
                process.kill()
    finished = train("--resume", "--out", killed)
    assert finished.returncode == 0, finished.stderr
    assert losses(killed) == losses(whole)
    one, two = (load_file(run / "model" / "model.safetensors") for run in (whole, killed))
    assert all(tensor.equal(two[key]) for key, tensor in one.items())


def test_fine_tuning_through_the_real_engine(tmp_path, text):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(*COMMON, "--data", text, "--steps", 10, "--out", first).returncode == 0
    tuned = [*COMMON, "--model", first / "model", "--data", text, "--steps", 1, "--lr", "1e-9", "--warmup", 0]
    finished = train(*tuned, "--out", second, "--offload", f"nvme:{tmp_path}")
    assert finished.returncode == 0, finished.stderr
    assert "fine-tuned" in finished.stdout
    one, two = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    # At a rate of 1e-9 a step moves no bf16 weight of ordinary size.
    assert one.keys() == two.keys()
    assert all((tensor == two[key]).float().mean() > 0.99 for key, tensor in one.items())


def test_a_llama_with_activation_checkpointing(tmp_path, text):
    options = [*COMMON, "--model", "tiny-llama", "--data", text, "--steps", 6, "--offload", f"nvme:{tmp_path}"]
    for name, extra in (("plain", []), ("checkpointed", ["--activation-checkpointing"])):
        finished = train(*options, *extra, "--out", tmp_path / name)
        assert finished.returncode == 0, finished.stderr
    assert losses(tmp_path / "plain") == losses(tmp_path / "checkpointed")


@pytest.mark.parametrize(
    ("arguments", "status", "phrase"),
    [
        (["--offload", "nvme:{}/file"], 2, "is a file"),
        (["--offload", "nvme:/proc/nowhere"], None, "/proc/nowhere"),
        (["--host-memory", "100MiB"], 2, "too small"),
    ],
)
def test_mistakes_that_only_the_engine_can_see(tmp_path, text, arguments, status, phrase):
    (tmp_path / "file").write_text("")
    arguments = [argument.format(tmp_path) for argument in arguments]
    finished = train(*COMMON, "--data", text, "--steps", 2, "--out", tmp_path / "run", *arguments)
    assert finished.returncode in ((1, 2) if status is None else (status,))
    lines = finished.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("zeroxide: error: ")
    assert phrase in lines[0]
