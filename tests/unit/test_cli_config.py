"""`zeroxide config`: explain, check and schema."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked_cli import run_cli

import zeroxide
from zeroxide.cli import main
from zeroxide.cli.configs.check import check
from zeroxide.config.schema import schema
from zeroxide.errors import ConfigError

GOOD = """{
  "train_micro_batch_size_per_gpu": 2,
  "gradient_accumulation_steps": "auto",
  "bf16": {"enabled": true},
  "zero_optimization": {"stage": 3, "overlap_comm": true}
}"""

WRONG = """{
  "train_batch_size": 10, "train_micro_batch_size_per_gpu": 3,
  "gradient_cliping": 1,
  "bf16": {"enabled": true}, "fp16": {"enabled": true},
  "optimizer": {"type": "Adam", "params": {"lrr": 1,
     "betas": [2]}},
  "scheduler": {"type": "WarmupDecayLR", "params": {}},
  "zero_optimization": {"stage": 2,
    "offload_param": {"device": "cpu"}},
  "amp": {"enabled": true},
  "zeroxide": {"tile_bytes": "8MiB", "staging_bytes": "4MiB"}
}"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="ds.json"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GPT-2 of 4 layers of 512, without weights."""
    folder = tmp_path_factory.mktemp("model")
    shapes = {"n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 1}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **shapes})
    )
    return folder


def keys(found):
    return [each.key for each in found.problems]


# --- check -----------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_found_at_once(written):
    path = written(WRONG)
    found = check(path, None, 4, 4)
    assert not found.ok
    assert {each.key: each.line for each in found.problems} == {
        "gradient_cliping": 3,
        "amp": 10,
        "train_batch_size": 2,
        "fp16.enabled": 4,
        "optimizer.params.lrr": 5,
        "optimizer.params.betas": 6,
        "scheduler.params.total_num_steps": 7,
        "zero_optimization.stage": 8,
        "zeroxide.tile_bytes": 11,
    }
    assert all(each.where == f"{path}:{each.line}" for each in found.problems)
    assert all("\n" not in each.what and not each.what.startswith(path) for each in found.problems)
    by_key = {each.key: each for each in found.problems}
    assert '"gradient_clipping"' in by_key["gradient_cliping"].what
    assert '"torch_autocast"' in by_key["amp"].what
    assert by_key["train_batch_size"].expected == "a multiple of 12"


def test_a_section_with_a_wrong_key_is_not_guessed_about(written):
    """What else a section says depends on the key that was meant."""
    path = written('{"zero_optimization": {"stge": 3, "offload_param": {"device": "cpu"}}, "aio": {"queue_depth": 0}}')
    assert keys(check(path, None, 1, 1)) == ["zero_optimization.stge", "aio.queue_depth"]
    # At the stage that the section would have by default the second key could not be either.
    home = {"device": "nvme"}
    path = written(json.dumps({"zero_optimization": {"stage": 3, "offload_param": home, "zero_hpz_partition_size": 2}}))
    assert keys(check(path, None, 2, 2)) == ["zero_optimization.offload_param.nvme_path"]


def test_a_value_of_a_list_and_a_missing_one_are_found_beside_others(written):
    text = '{"zero_optimization": {"leaf_module": {"classes": "x"}}, "optimizer": {}, "scheduler": 3, "a": {"b": 1}}'
    assert keys(check(written(text), None, 1, 1)) == [
        "optimizer.type",
        "scheduler",
        "zero_optimization.leaf_module.classes",
        "a",
    ]


def test_the_batch_on_the_ranks_is_told_or_refused(written):
    found = check(written(GOOD), None, 8, 8)
    assert found.ok
    assert found.facts == ["batch: 16 samples a step = 2 a micro-batch * 1 micro-batches * 8 ranks"]
    (note,) = found.notes
    assert "gradient_accumulation_steps (line 3)" in note
    found = check(written('{"train_batch_size": 8, "gradient_accumulation_steps": 1}'), None, 3, 3)
    assert "world size 3" in found.problems[0].what
    nothing = check(written("{}"), None, 1, 1)
    assert "no size is given" in nothing.facts[0]


def test_a_text_that_is_no_json_is_a_problem_and_no_file_an_error(written, tmp_path):
    found = check(written('{"a": }'), None, 1, 1)
    assert "line 1 column 7" in found.problems[0].what
    with pytest.raises(ConfigError, match="No such file"):
        check(str(tmp_path / "none.json"), None, 1, 1)


def test_a_plan_that_fits_is_described(written, model):
    found = check(written(GOOD), str(model), 2, 2)
    assert found.ok, found.problems
    assert any("13.4 M parameters" in line for line in found.facts)
    assert any("rank 0 of 2, ZeRO stage 3, gradients through shared memory" in line for line in found.facts)
    assert any("a process beside activations" in line for line in found.facts)
    apart = check(written(GOOD), str(model / "config.json"), 4, 2)
    assert any("gradients through collectives" in line for line in apart.facts)


def test_a_budget_that_is_too_small_is_a_problem(written, model):
    """The process alone takes more than 100 MiB."""
    path = written(GOOD.replace("}\n}", '},\n  "zeroxide": {"host_memory": "100MiB"}\n}'))
    found = check(path, str(model), 1, 1)
    assert not found.ok
    assert "host_memory 100 MiB is too small" in found.problems[0].what


def test_a_disk_that_is_too_small_or_away_is_told(written, model, tmp_path, monkeypatch):
    where = json.dumps({"device": "nvme", "nvme_path": str(tmp_path / "disk")})
    path = written(GOOD.replace('"stage": 3', f'"stage": 3, "offload_optimizer": {where}'))
    found = check(path, str(model), 2, 2)
    assert found.ok
    assert any("is not on this machine" in line for line in found.notes)
    assert any(line.startswith("disk: ") for line in found.facts)
    (tmp_path / "disk").mkdir()
    assert check(path, str(model), 2, 2).notes == found.notes[:1]
    usage = os.statvfs(tmp_path)
    free = type("Usage", (), {"free": 1 << 20, "total": usage.f_blocks, "used": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    found = check(path, str(model), 2, 2)
    assert keys(found) == ["zero_optimization.offload_optimizer.nvme_path"]
    assert "1 MiB free" in found.problems[0].what
    (tmp_path / "disk").rmdir()
    (tmp_path / "disk").write_text("")
    assert "no directory that can be written to" in check(path, str(model), 2, 2).problems[0].what


def test_a_model_that_is_none_is_a_problem(written, tmp_path):
    found = check(written(GOOD), str(tmp_path), 1, 1)
    assert "no config.json" in found.problems[0].what
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    assert "cannot be built" in check(written(GOOD), str(tmp_path), 1, 1).problems[0].what


def test_without_transformers_one_line_says_so(written, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = check(written(GOOD), str(model), 1, 1)
    assert found.ok
    assert "transformers is not installed" in found.notes[-1]


def asking(folder, monkeypatch, **config):
    """A model in `folder` with Python of its own beside it, a user who says yes, and the file it would leave."""
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Model: ...\nclass Config: ...\n")
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return ran


OWN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}


@pytest.mark.parametrize("kind", ["own config", "own model", "inner model"])
def test_python_of_the_model_does_not_run_and_nobody_is_asked(written, tmp_path, monkeypatch, capsys, kind):
    """Also not that of a model inside another, which transformers looks up by itself, and asks of."""
    config = {"model_type": "own" if kind == "own config" else "vit", "auto_map": OWN}
    if kind != "inner model":
        # A yes by another way than the terminal.
        monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    else:
        decoder = {"model_type": "vit", "auto_map": OWN, "_name_or_path": str(tmp_path)}
        config = {"model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"}, "decoder": decoder}
        config["architectures"] = ["VisionEncoderDecoderModel"]
    ran = asking(tmp_path, monkeypatch, **config)
    assert main(["config", "check", written(GOOD), "--model", str(tmp_path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    (problem,) = told["problems"]
    assert "it needs Python code of its own, which is not run" in problem["what"]
    assert not ran.exists()


def test_a_model_that_transformers_has_is_looked_at_without_its_own_python(written, model, tmp_path, monkeypatch):
    shapes = json.loads((model / "config.json").read_text())
    ran = asking(tmp_path, monkeypatch, **shapes, auto_map=OWN)
    assert check(written(GOOD), str(tmp_path), 1, 1).ok
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"n_head": 0}, "ZeroDivisionError"),
        ({"n_embd": "abc"}, "n_embd"),
        ({"n_embd": -8}, ""),
        ({"architectures": 3}, ""),
    ],
)
def test_a_model_that_cannot_be_is_one_line(written, model, tmp_path, change, line):
    shapes = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**shapes, **change}))
    (problem,) = check(written(GOOD), str(tmp_path), 1, 1).problems
    assert problem.what.startswith(f"--model {tmp_path} cannot be built: ")
    assert line in problem.what
    assert "\n" not in problem.what


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("~nosuchuser/x", "no such user"),
        ("x" * 300, "File name too long"),
        ("x/" * 2045 + "y", "File name too long"),
        ("none", "no config.json there"),
    ],
)
def test_a_path_that_nothing_can_have_is_one_line(written, name, line):
    (problem,) = check(written(GOOD), name, 1, 1).problems
    assert problem.what == f"--model {name}: {line}"


def test_a_directory_for_state_that_nothing_can_be_is_a_problem(written, model):
    for name, line in (("~nosuchuser/x", "expected the path of a directory"), ("x" * 300, "File name too long")):
        where = json.dumps({"device": "nvme", "nvme_path": name})
        path = written(GOOD.replace('"stage": 3', f'"stage": 3, "offload_optimizer": {where}'))
        (problem,) = check(path, str(model), 1, 1).problems
        assert problem.key == "zero_optimization.offload_optimizer.nvme_path"
        assert line in problem.what


# --- disks -----------------------------------------------------------------------------------------------------------


def on_two(param, optimizer):
    homes = {"offload_param": param, "offload_optimizer": optimizer}
    zero = {name: {"device": "nvme", "nvme_path": str(path)} for name, path in homes.items()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, **zero},
    }


def free_on(monkeypatch, found):
    """Makes directories have so many bytes free."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=found[path], total=1 << 50, used=0))


def bytes_on_disk(found):
    (line,) = [each for each in found.facts if each.startswith("disk: ")]
    return line


def test_two_directories_share_what_is_on_disk(written, model, tmp_path, monkeypatch):
    """What each has to hold, weights or state, is its part of all; what lies on one disk is added up.

    13.4 M parameters of 2 bytes of weights and 10 of split state each: 26 MiB and 128 MiB.
    """
    param, optimizer = tmp_path / "param", tmp_path / "optimizer"
    for each in (param, optimizer):
        each.mkdir()
    path = written(json.dumps(on_two(param, optimizer)))
    found = check(path, str(model), 1, 1)
    assert found.ok, found.problems
    both = re.fullmatch(
        r"disk: (153\.\d) MiB on each host, (76\.\d) MiB in each of 2 directories", bytes_on_disk(found)
    )
    assert both is not None, bytes_on_disk(found)
    # One disk: enough for either, not for both.
    free_on(monkeypatch, {param: 120 << 20, optimizer: 120 << 20})
    (problem,) = check(path, str(model), 1, 1).problems
    assert f"{param} and {optimizer} are on one disk, which has 120 MiB free, and {both[1]}" in problem.what
    # Two disks: enough on both for a part.
    other = tmp_path.stat().st_dev + 1
    real = Path.stat

    def moved(self, **more):
        found = real(self, **more)
        return os.stat_result((*found[:2], other, *found[3:])) if self == optimizer else found

    monkeypatch.setattr(Path, "stat", moved)
    assert check(path, str(model), 1, 1).ok
    # One of them is too small.
    free_on(monkeypatch, {param: 120 << 20, optimizer: 50 << 20})
    (problem,) = check(path, str(model), 1, 1).problems
    assert problem.key == "zero_optimization.offload_optimizer.nvme_path"
    assert f"{optimizer} has 50 MiB free, and {both[2]}" in problem.what


def test_the_same_directory_twice_is_one(written, model, tmp_path, monkeypatch):
    path = written(json.dumps(on_two(tmp_path, tmp_path)))
    free_on(monkeypatch, {tmp_path: 1 << 20})
    found = check(path, str(model), 1, 1)
    assert keys(found) == ["zero_optimization.offload_param.nvme_path"]
    assert bytes_on_disk(found).endswith("on each host")


def test_an_engines_files_are_divided_as_check_says(tmp_path):
    """The store gives each tile to the emptier file, so the two differ by a tile at most: of a state tensor in fp32,
    which has four bytes an element. A file may have its header beside, which is a page."""
    param, optimizer = tmp_path / "param", tmp_path / "optimizer"
    for each in (param, optimizer):
        each.mkdir()
    config = on_two(param, optimizer) | {"optimizer": {"type": "Adam"}, "zeroxide": {"tile_bytes": "64KiB"}}
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
    engine = zeroxide.initialize(model=model, config=config)[0]
    try:
        sizes = [sum(file.stat().st_size for file in each.rglob("blocks*")) for each in (param, optimizer)]
        total, tile = engine.plan().disk_bytes, 4 * engine.plan().tile_elements
    finally:
        engine.destroy()
    assert total > 20 * tile
    assert all(abs(size - total / 2) <= tile / 2 + 4096 for size in sizes), (sizes, total, tile)


# --- the commands ----------------------------------------------------------------------------------------------------


def test_check_exits_with_what_it_found(written):
    path = written(WRONG)
    ended = run_cli("config", "check", path, "--world-size", 4)
    assert ended.returncode == 1, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[-1] == "9 problems"
    assert f'{path}:3: unknown key "gradient_cliping": the nearest known key is "gradient_clipping"' in lines
    told = json.loads(run_cli("config", "check", path, "--world-size", 4, "--json").stdout)
    assert (told["ok"], len(told["problems"])) == (False, 9)
    assert {"where", "key", "line", "expected", "got", "what"} == told["problems"][0].keys()
    ended = run_cli("config", "check", written(GOOD), "--json")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["ok"] is True
    ended = run_cli("config", "check", "none.json")
    assert ended.returncode == 2
    assert "No such file" in ended.stderr


def test_explain_prints_each_key_with_its_origin(written):
    path = written(GOOD)
    ended = run_cli("config", "explain", path, "--world-size", 4)
    assert ended.returncode == 0, ended.stderr
    rows = {" ".join(line.split()) for line in ended.stdout.splitlines()}
    assert f"{path} on 4 ranks (--world-size)" in rows
    assert f"train_micro_batch_size_per_gpu 2 {path}:2" in rows
    assert f"train_batch_size 8 from train_micro_batch_size_per_gpu ({path}:2) and 4 ranks" in rows
    assert "gradient_clipping 1.0 default, as DeepSpeed 0.19.8" in rows
    assert "zero_optimization.overlap_comm true when to communicate is not left to a switch" in rows
    told = json.loads(run_cli("config", "explain", path, "--json").stdout)
    assert (told["world_size"], told["world_size_from"], told["auto"]) == (
        1,
        "no launcher",
        ["gradient_accumulation_steps"],
    )
    assert {each["key"] for each in told["values"]} >= {"zero_optimization.stage", "zeroxide.format"}


def test_the_ranks_are_those_of_the_launcher(written, monkeypatch):
    path = written(GOOD)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    told = json.loads(run_cli("config", "explain", path, "--json").stdout)
    assert (told["world_size"], told["world_size_from"]) == (4, "the variables of torchrun")
    monkeypatch.delenv("RANK")
    ended = run_cli("config", "explain", path)
    assert ended.returncode != 0
    assert (
        "RANK: expected this process's rank, since WORLD_SIZE is set, got nothing; set both or neither" in ended.stderr
    )


def test_a_config_that_is_refused_is_one_line(written):
    ended = run_cli("config", "explain", written(WRONG))
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("zeroxide: error: ")


def test_schema_prints_the_schema():
    ended = run_cli("config", "schema")
    assert json.loads(ended.stdout) == json.loads(json.dumps(schema()))


def test_ranks_of_a_host_are_for_a_model(written):
    """Catches: an option without effect."""
    ended = run_cli("config", "check", written(GOOD), "--ranks-per-host", 2)
    assert ended.returncode == 2
    assert (
        ended.stderr
        == "zeroxide: error: --ranks-per-host 2 is for --model: without a model nothing is planned for a host\n"
    )
