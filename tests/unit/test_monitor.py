"""Monitors and the log of steps: what reaches a reader of each, and what training does when one fails."""

from __future__ import annotations

import csv
import json
import logging
import math
import shutil
import sys
import threading
import time
from collections import defaultdict

import pytest
import torch
from running import started, state_of
from torch import nn

from zeroxide.config import Config, load
from zeroxide.distributed import Ranks
from zeroxide.engine.observers import open_observers
from zeroxide.errors import ConfigError
from zeroxide.integrations.deepspeed.monitor import MonitorMaster, get_monitor_config
from zeroxide.monitor import Monitor
from zeroxide.monitor.step_log import StepLog

STEPS, ACCUMULATION, MICRO_BATCH = 3, 2, 4
TRAINING = {
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 4, "warmup_type": "linear"}},
    "train_micro_batch_size_per_gpu": MICRO_BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
}
TAGS = ("train_loss", "lr")


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def inputs(step, micro):
    return torch.full((MICRO_BATCH, 3), 0.1 * (1 + step * ACCUMULATION + micro))


def train(engine, *, divided=False, before_step=lambda step: None):
    """Trains; returns the rows that are expected: for each optimizer step (samples, mean loss, rate of the next)."""
    expected = []
    for step in range(STEPS):
        before_step(step)
        losses = []
        for micro in range(ACCUMULATION):
            loss = engine(inputs(step, micro)).square().mean()
            losses.append(loss.item())
            if divided:
                engine.backward(loss / ACCUMULATION, scale_wrt_gas=False)
            else:
                engine.backward(loss)
            engine.step()
        # The linear warm-up from 0 to 0.1 in 4 steps, whose iterations count from 0.
        rate = 0.1 * step / 4
        expected.append(((step + 1) * ACCUMULATION * MICRO_BATCH, sum(losses) / ACCUMULATION, rate))
    return expected


def csv_rows(folder):
    """{file name: [header, rows...]}, every row as text."""
    return {path.name: list(csv.reader(path.open(newline=""))) for path in sorted(folder.glob("*.csv"))}


def tensorboard_scalars(folder):
    """{tag: [(step, value)]}, by TensorBoard's own reader; values are fp32 there."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(found, expected):
    """fp32 rounds each number once, and the mean of two losses once more."""
    return abs(found - expected) <= 4 * 2.0**-24 * abs(expected)


@pytest.mark.parametrize("divided", [False, True])
def test_csv_files_have_deepspeeds_layout_and_the_numbers_of_training(tmp_path, divided):
    """Catches: another x axis, a loss that is a sum or the last micro-batch's, a rate of the step before."""
    config = TRAINING | {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    with started(make(), config=config) as engine:
        expected = train(engine, divided=divided)
        assert engine.monitor.enabled
    rows = csv_rows(tmp_path / "job")
    assert rows.keys() == {"Train_Samples_train_loss.csv", "Train_Samples_lr.csv"}
    assert rows["Train_Samples_lr.csv"][0] == ["step", "lr"]
    assert rows["Train_Samples_train_loss.csv"][0] == ["step", "train_loss"]
    for at, (samples, loss, rate) in enumerate(expected, start=1):
        x, found = rows["Train_Samples_train_loss.csv"][at]
        assert int(x) == samples
        assert close(float(found), loss)
        x, found = rows["Train_Samples_lr.csv"][at]
        assert (int(x), float(found)) == (samples, pytest.approx(rate, rel=1e-12))
    assert {len(each) for each in rows.values()} == {STEPS + 1}


def test_a_run_that_goes_on_makes_one_table(tmp_path):
    config = load({"csv_monitor": {"enabled": True, "output_path": str(tmp_path)}})
    for x in (1, 2):
        monitor = open_observers(config, Ranks()).monitor
        monitor.write_events([("a b/c", 0.5 * x, x)])
        monitor.close()
    assert csv_rows(tmp_path / "DeepSpeedJobName") == {"a_b_c.csv": [["step", "c"], ["1", "0.5"], ["2", "1.0"]]}


def test_tensorboard_reads_what_was_written(tmp_path):
    config = TRAINING | {"tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    pytest.importorskip("tensorboard")
    with started(make(), config=config) as engine:
        expected = train(engine)
        engine.monitor.write_events([("own/tag", 7, 3)])
        # While it runs: everything is there at once.
        found = tensorboard_scalars(tmp_path / "job")
    assert found["own/tag"] == [(3, 7.0)]
    assert found.keys() == {"own/tag", *(f"Train/Samples/{tag}" for tag in TAGS)}
    for (samples, loss, rate), mine, lr in zip(
        expected, found["Train/Samples/train_loss"], found["Train/Samples/lr"], strict=True
    ):
        assert mine[0] == lr[0] == samples
        assert close(mine[1], loss)
        assert close(lr[1], rate)


def wandb_rows(folder):
    """The run, and the history of an offline run: one dict a row. W&B's service writes the file in its own time."""
    for _ in range(600):
        run, rows, ended = wandb_records(folder)
        if ended:
            return run, rows
        time.sleep(0.1)
    raise AssertionError("the file never ended")


def wandb_records(folder):
    """What an offline run's file has so far, by W&B's own reader: the run, its rows, and whether the run has ended."""
    datastore = pytest.importorskip("wandb.sdk.internal.datastore")
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    store = datastore.DataStore()
    store.open_for_scan(str(path))
    rows, run, ended = [], None, False
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        ended = ended or record.WhichOneof("record_type") == "exit"
        if record.WhichOneof("record_type") == "run":
            run = record.run
        if record.WhichOneof("record_type") == "history":
            rows.append({each.key or each.nested_key[0]: json.loads(each.value_json) for each in record.history.item})
    return run, rows, ended


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Runs of W&B that stay in a folder, and in this process."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    import wandb

    yield tmp_path
    wandb.teardown()


def test_an_offline_run_of_wandb_has_a_row_a_step(offline):
    config = TRAINING | {"wandb": {"enabled": True, "project": "p", "group": "g", "team": "t"}}
    with started(make(), config=config) as engine:
        expected = train(engine)
    run, rows = wandb_rows(offline)
    assert (run.project, run.run_group, run.entity) == ("p", "g", "t")
    rows = [row for row in rows if "Train/Samples/lr" in row]
    assert [row["_step"] for row in rows] == [samples for samples, _, _ in expected]
    for row, (_, loss, rate) in zip(rows, expected, strict=True):
        assert close(row["Train/Samples/train_loss"], loss)
        assert row["Train/Samples/lr"] == pytest.approx(rate, rel=1e-12)


def test_a_run_that_the_script_has_begun_stays_the_scripts(offline):
    import wandb

    run = wandb.init(project="mine")
    with started(make(), config=TRAINING | {"wandb": {"enabled": True}}) as engine:
        train(engine)
    assert wandb.run is run
    assert run.project == "mine"
    assert "Train/Samples/lr" in dict(run.summary)
    run.finish()


def test_the_log_of_steps_has_a_line_for_each(tmp_path):
    path = tmp_path / "logs" / "steps.jsonl"
    config = TRAINING | {"zeroxide": {"log": str(path)}, "wall_clock_breakdown": True}
    with started(make(), config=config) as engine:
        expected = train(engine)
        norm = float(engine.get_global_grad_norm())
        engine.monitor.write_events([("mine", 0.5, 9)])
    *steps, own = lines(path)
    assert own == {"tag": "mine", "value": 0.5, "x": 9}
    assert [each["step"] for each in steps] == [1, 2, 3]
    assert [each["samples"] for each in steps] == [samples for samples, _, _ in expected]
    assert all(close(each["loss"], loss) for each, (_, loss, _) in zip(steps, expected, strict=True))
    assert steps[-1]["grad_norm"] == norm
    assert all(each["applied"] is True and each["skipped_steps"] == 0 for each in steps)
    assert all(each["milliseconds"]["fwd"] > 0 for each in steps)
    assert "loss_scale" not in steps[0]


def test_a_step_that_is_left_out_is_in_the_log_with_the_scale_that_follows(tmp_path):
    own = {"zeroxide": {"log": str(tmp_path / "a.jsonl")}, "csv_monitor": {"enabled": True}}
    own["csv_monitor"]["output_path"] = str(tmp_path)
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}}
    with started(make().half(), config=TRAINING | own | fp16 | {"gradient_accumulation_steps": 1}) as engine:
        engine.backward(engine(torch.full((4, 3), 1.0, dtype=torch.float16)).sum() * math.inf)
        engine.step()
        assert engine.loss_scale() == 8
    (step,) = lines(tmp_path / "a.jsonl")
    assert (step["applied"], step["skipped_steps"], step["loss_scale"]) == (False, 1, 8)
    assert (step["grad_norm"], step["loss"]) == ("inf", "inf") or step["loss"] in ("-inf", "nan")
    scale = csv_rows(tmp_path / "DeepSpeedJobName")["Train_Samples_loss_scale.csv"]
    assert scale == [["step", "loss_scale"], ["4", "8.0"]]


def test_backward_of_torchs_own_has_no_loss_to_tell(tmp_path):
    config = TRAINING | {"zeroxide": {"log": str(tmp_path / "a.jsonl")}, "gradient_accumulation_steps": 1}
    with started(make(), config=config) as engine:
        engine(inputs(0, 0)).sum().backward()
        engine.step()
        engine.backward(engine(inputs(0, 0)).sum())
        engine.step()
    first, second = lines(tmp_path / "a.jsonl")
    assert "loss" not in first
    assert "loss" in second


def test_a_line_that_was_cut_off_stays_a_line_of_its_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"st')
    log = StepLog(path)
    log.add({"step": 2})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'


# --- what fails ------------------------------------------------------------------------------------------------------


def weights(engine):
    return state_of(engine)


def test_a_writer_that_fails_is_named_once_and_the_others_go_on(tmp_path, caplog):
    """Catches: a step that fails of a full disk, and a warning at every step after."""
    config = TRAINING | {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv")}}
    config |= {"zeroxide": {"log": str(tmp_path / "a.jsonl")}}

    def lose_folder(step):
        if step == 1:
            shutil.rmtree(tmp_path / "csv")
            (tmp_path / "csv").write_text("in the way")

    with started(make(), config=config) as engine, caplog.at_level(logging.WARNING, "zeroxide"):
        train(engine, before_step=lose_folder)
        after = weights(engine)
    with started(make(), config=TRAINING) as engine:
        train(engine)
        plain = weights(engine)
    said = [each for each in caplog.messages if "csv_monitor" in each]
    assert len(said) == 1
    assert said[0].startswith("csv_monitor failed, and nothing more is written there: NotADirectoryError")
    assert len(lines(tmp_path / "a.jsonl")) == STEPS
    for name, values in plain.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(after[name], values, strict=True))


@pytest.mark.parametrize(
    ("package", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")],
    ids=["tensorboard", "wandb"],
)
def test_a_package_that_is_not_there_is_one_line_at_initialize(monkeypatch, tmp_path, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monitors = {package: {"enabled": True}, "csv_monitor": {"enabled": True, "output_path": str(tmp_path)}}
    with pytest.raises(
        ConfigError, match=f"^{package}.enabled needs the package {package}: pip install {package}"
    ) as e:
        load_engine(model, monitors)
    assert e.value.path == f"{package}.enabled"
    assert "\n" not in str(e.value)
    # The model is as it was, and can be trained without.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with started(model, config=TRAINING) as engine:
        train(engine)


def load_engine(model, more):
    with started(model, config=TRAINING | more):
        pass


@pytest.mark.parametrize("key", ["csv_monitor", "tensorboard", "zeroxide.log"])
def test_a_place_that_cannot_be_written_to_is_one_line_at_initialize(tmp_path, key):
    if key == "tensorboard":
        pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "x")
    more = {"zeroxide": {"log": place}} if key == "zeroxide.log" else {key: {"enabled": True, "output_path": place}}
    with pytest.raises(
        ConfigError, match=f"^{key}: (it cannot be written to|cannot write to).*(Not a directory|File exists)"
    ) as e:
        load_engine(make(), more)
    assert e.value.path == key


class Broken:
    key = "broken"

    def __init__(self):
        self.calls = []

    def write(self, events):
        self.calls.append("write")
        raise RuntimeError("of its\nown")

    def close(self):
        self.calls.append("close")
        raise OSError("again")


def test_a_writer_that_fails_is_closed_and_whatever_it_raises_is_not_raised_again(caplog):
    writer = Broken()
    monitor = Monitor([writer], enabled=True)
    for _ in range(3):
        monitor.write_events([("a", 1, 1)])
    monitor.close()
    assert writer.calls == ["write", "close"]
    assert [each for each in caplog.messages if "broken" in each] == [
        "broken failed, and nothing more is written there: RuntimeError: of its own"
    ]


# --- ranks, and no monitor -------------------------------------------------------------------------------------------


class SecondOfTwo(Ranks):
    def gather_objects(self, value):
        return [self.first, value]


def test_rank_0_alone_writes(tmp_path):
    """Catches: a second rank that opens files, or passes over what rank 0 could not open."""
    config = load({"csv_monitor": {"enabled": True, "output_path": str(tmp_path)}, "zeroxide": {"log": "/none/a"}})
    ranks = SecondOfTwo(rank=1, world=2, backend="gloo")
    SecondOfTwo.first = None
    monitor = open_observers(config, ranks).monitor
    assert monitor.enabled
    assert not monitor.writes
    monitor.write_events([("a", 1, 1)])
    assert list(tmp_path.iterdir()) == []
    SecondOfTwo.first = ["zeroxide.log: cannot write", "zeroxide.log"]
    with pytest.raises(ConfigError, match=r"^zeroxide\.log: cannot write$"):
        open_observers(Config(), ranks)


def test_without_a_monitor_nothing_is_kept_and_no_package_is_imported():
    threads = threading.active_count()
    with started(make(), config=TRAINING) as engine:
        assert not engine.monitor.enabled
        engine.backward(engine(inputs(0, 0)).sum())
        assert engine.parts.observers._loss is None
    assert threading.active_count() == threads


def test_deepspeeds_names_write_without_an_engine(tmp_path):
    config = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path)}, "train_batch_size": 8, "else": 1}
    master = MonitorMaster(get_monitor_config(config))
    assert master.enabled
    master.write_events([("Time per step", 0.25, 1), ("Time per step", 0.5, 2)])
    rows = defaultdict(list, csv_rows(tmp_path / "DeepSpeedJobName"))
    assert rows["Time_per_step.csv"] == [["step", "Time per step"], ["1", "0.25"], ["2", "0.5"]]
    assert not MonitorMaster(get_monitor_config({})).enabled
