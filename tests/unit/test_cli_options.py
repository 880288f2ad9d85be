import dataclasses
import inspect
import os

import pytest

from zeroxide.cli.train import train
from zeroxide.cli.training.options import FLAGS, TrainOptions, conflicts
from zeroxide.errors import ConfigError


def test_defaults_resolve():
    options = TrainOptions(steps=60).checked()
    assert options.warmup == 20
    assert options.format == "split"
    assert options.threads == len(os.sched_getaffinity(0))
    assert TrainOptions(steps=10_000).checked().warmup == 100
    assert TrainOptions(dtype="fp32").checked().format == "fp32"
    assert TrainOptions(dtype="fp16").checked().format == "fp32"


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"steps": 1 << 60}, "--steps must be at most"),
        ({"batch_size": -1}, "--batch-size must be at least 1"),
        ({"seq_len": 1}, "--seq-len must be at least 2"),
        ({"seq_len": 1 << 30}, "--seq-len must be at most 1048576"),
        ({"accumulate": 0}, "--accumulate"),
        ({"lr": 0.0}, "--lr must be a number above 0"),
        ({"lr": float("nan")}, "--lr"),
        ({"lr": float("inf")}, "--lr"),
        ({"bias_lr": 0.0}, "--bias-lr must be a number above 0"),
        ({"clip": -1.0}, "--clip"),
        ({"weight_decay": float("nan")}, "--weight-decay"),
        ({"seed": -1}, "--seed"),
        ({"threads": 5000}, "--threads"),
        ({"warmup": 100, "steps": 100}, "--warmup 100 leaves no step"),
        ({"warmup": -1}, "--warmup"),
        ({"schedule": "cosin"}, "did you mean cosine?"),
        ({"dtype": "fp8"}, "--dtype must be one of bf16, fp16, fp32"),
        ({"format": "split", "dtype": "fp16"}, "--format split needs --dtype bf16"),
        ({"format": "compacted"}, "--format"),
        ({"format": "split", "dtype": "fp32"}, "--format split needs --dtype bf16"),
        ({"io_engine": "aio"}, "--io-engine"),
        ({"offload": "disk"}, "--offload must be none, cpu or nvme:DIR, got 'disk'"),
        ({"offload": "nvme"}, "--offload"),
        ({"offload": "nvme:"}, "--offload"),
        ({"offload": "cpu:/x"}, "--offload"),
        ({"host_memory": "two"}, "--host-memory: expected a size"),
        ({"host_memory": "0"}, "not a usable size"),
        ({"host_memory": "99999PiB"}, "not a usable size"),
        ({"host_memory": "-1GiB"}, "--host-memory"),
        ({"row_bytes": "some"}, "--row-bytes: expected a size"),
        ({"row_bytes": "0"}, "--row-bytes 0 is not a usable size: give 1 byte to 1 EiB"),
        ({"eval_batches": 0}, "--eval-batches"),
        ({"save_every": -5}, "--save-every"),
        ({"trace": "3"}, "--trace: expected FIRST:LAST, two steps of the run counted from 1, or none, got '3'"),
        ({"trace": "0:2"}, "--trace: expected FIRST:LAST"),
        ({"trace": "4:3"}, "--trace: expected FIRST:LAST"),
        ({"trace": "1:2:3"}, "--trace: expected FIRST:LAST"),
        ({"trace": "-1:3"}, "--trace: expected FIRST:LAST"),
        ({"trace": "61:62", "steps": 60}, "--trace 61:62 begins after the last step, --steps 60"),
    ],
)
def test_nonsense_is_named(change, phrase):
    with pytest.raises(ConfigError) as caught:
        TrainOptions(**change).checked()
    assert phrase in caught.value.message
    assert caught.value.exit_code == 2


def test_offload_to_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is a file, a folder is needed"):
        TrainOptions(offload=f"nvme:{file}").checked()


def test_json_round_trip_keeps_everything():
    options = TrainOptions(model="tiny", data=("a", "b"), host_memory="2GiB", lr=1e-5, sample_prompt="x").checked()
    assert TrainOptions.from_json(options.as_json()) == options
    as_read_back = {**options.as_json(), "data": ["a", "b"]}
    assert TrainOptions.from_json(as_read_back) == options


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        ({"step": 1}, "did you mean 'steps'"),
        ({"steps": "many"}, "'steps'"),
        ({"lr": None}, "'lr'"),
        ({"data": "a"}, "data"),
    ],
)
def test_a_damaged_record_is_named(value, phrase):
    with pytest.raises(ConfigError) as caught:
        TrainOptions.from_json(value)
    assert phrase in caught.value.message


FREE = {
    "data", "offload", "host_memory", "eval_every", "eval_batches", "save_every", "out", "sample_prompt",
    "sample_tokens", "threads", "format", "durable_every", "activation_checkpointing", "io_engine", "trace",
    "activation_path", "recompute", "update_in_backward",
}  # fmt: skip


def test_every_option_either_conflicts_or_is_known_to_change_no_number():
    """A new option must be sorted into one of the two, or this fails."""
    other = TrainOptions(
        model="tiny", data=("x",), offload="cpu", host_memory="1GiB", steps=7, batch_size=7, seq_len=7, lr=7.0,
        bias_lr=7.0, warmup=2, schedule="linear", weight_decay=7.0, clip=7.0, accumulate=7, dtype="fp32", seed=7,
        eval_every=7, eval_batches=7, save_every=7, out="x", sample_prompt="x", sample_tokens=7, threads=7,
        format="fp32", activation_checkpointing=True, io_engine="threads", trace="1:2", loss_chunk=7, durable_every=7,
        activation_path="x", row_bytes="1MiB", recompute="all", update_in_backward="always",
    )  # fmt: skip
    base = TrainOptions()
    for field in dataclasses.fields(TrainOptions):
        changed = dataclasses.replace(base, **{field.name: getattr(other, field.name)})
        assert changed != base, f"the test does not change {field.name}"
        named = any(text.startswith(FLAGS[field.name] + " ") for text in conflicts(base, changed))
        assert named == (field.name not in FREE), field.name


def test_steps_may_grow_where_the_rate_does_not_depend_on_them():
    constant = TrainOptions(schedule="constant", steps=10)
    assert conflicts(constant, dataclasses.replace(constant, steps=20)) == []
    cosine = TrainOptions(steps=10)
    assert conflicts(cosine, dataclasses.replace(cosine, steps=20)) == ["--steps (run: 10, now: 20)"]


def test_the_command_offers_every_option_with_its_default():
    offered = inspect.signature(train).parameters
    assert offered.keys() - {"context", "paths", "resume", "as_json"} == {
        field.name for field in dataclasses.fields(TrainOptions)
    }
    for field in dataclasses.fields(TrainOptions):
        default = offered[field.name].default
        assert default == (None if field.name == "data" else field.default), field.name
