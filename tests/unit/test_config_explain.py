"""Where the values of a config come from, and what a config is written out in full."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from given_configs import BF16, FP16, complaint, merged, nested
from test_config import EFFECTS

from zeroxide.config import RULES, load
from zeroxide.config.check import all_keys
from zeroxide.config.document import Document
from zeroxide.config.explain import OTHER_DEFAULTS, explain, left_auto
from zeroxide.config.jsonc import lines
from zeroxide.config.sections.scheduler import DEFAULTS, SCHEDULES
from zeroxide.config.source import Source, read
from zeroxide.optim import schedules


def whole(flat: dict) -> dict:
    document: dict = {}
    for key, value in flat.items():
        document = merged(document, nested(key, value))
    return document


def comparable(config):
    """A config without what says only that the user's words were there, and with a schedule's arguments in full."""
    schedule = config.scheduler
    if schedule is not None:
        said = {**DEFAULTS[schedule.name], **schedule.params}
        params = {name: value for name, value in said.items() if value is not None}
        schedule = dataclasses.replace(schedule, params=params)
    return dataclasses.replace(
        config,
        gradients=dataclasses.replace(config.gradients, clipping_is_default=False),
        scheduler=schedule,
        no_effect=[],
        source={},
    )


@pytest.mark.parametrize(
    ("key", "value", "beside", "name"), [each[:4] for each in EFFECTS], ids=[e[0] for e in EFFECTS]
)
def test_a_config_that_is_written_out_in_full_is_the_same(key, value, beside, name):
    """Catches: a key that is left out, or written otherwise than it is read."""
    ranks = _ranks(name)
    found = load(merged(beside, nested(key, value)), world_size=ranks)
    again = load(whole(found.written()), world_size=ranks)
    assert comparable(again) == comparable(found)
    assert again.no_effect == []


@pytest.mark.parametrize("axis", ["pp", "tp", "sp", "ep"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_axes_that_are_written_out_are_the_same(axis, stage):
    """Catches: sizes that follow from the others at a stage that refuses them when they are said."""
    found = load({"zero_optimization": {"stage": stage}, "zeroxide": {"mesh": {axis: 2}}}, world_size=4)
    assert load(whole(found.written()), world_size=4).mesh == found.mesh


def _ranks(name: str) -> int:
    return 4 if name.split(".")[0] in ("mesh", "pipeline", "tensor_parallel") else 1


def test_nothing_is_written_that_is_no_key():
    known = {".".join(path) for path in all_keys(Document)}
    for key, value, beside, name, _ in EFFECTS:
        said = load(merged(beside, nested(key, value)), world_size=_ranks(name)).written()
        assert {each for each in said if ".params." not in each} <= known


def test_every_field_of_a_section_can_be_told_from_what_is_written():
    """Catches: a section that writes one key for two fields."""
    plain = load(BF16 | {"zero_optimization": {"stage": 3}})
    said = plain.written()
    assert said["zero_optimization.stage"] == 3
    assert said["bf16.enabled"] is True
    assert said["zeroxide.format"] == "split"
    assert said["zeroxide.host_memory"] is None


# --- DeepSpeed's defaults --------------------------------------------------------------------------------------------

# Key, its default in DeepSpeed 0.19.8, where that stands below deepspeed/ of its source, and what is needed beside it.
ADAM = {"optimizer": {"type": "Adam"}}
DEEPSPEED = [
    ("train_batch_size", None, "runtime/constants.py:20", {}),
    ("train_micro_batch_size_per_gpu", None, "runtime/constants.py:60", {}),
    ("gradient_accumulation_steps", 1, "runtime/config.py:645", {"train_micro_batch_size_per_gpu": 1}),
    ("managed_gradient_accumulation", True, "runtime/constants.py:79", {}),
    ("dataloader_drop_last", False, "runtime/constants.py:403", {}),
    ("gradient_clipping", 1.0, "runtime/constants.py:203", {}),
    ("gradient_allreduce_op", "mean", "runtime/constants.py:264", {}),
    ("steps_per_print", None, "runtime/constants.py:46", {}),
    ("wall_clock_breakdown", False, "runtime/constants.py:325", {}),
    *(
        row
        for name, line in (("tensorboard", 20), ("csv_monitor", 52))
        for row in (
            (f"{name}.enabled", False, f"monitor/config.py:{line}", {}),
            (f"{name}.output_path", "", f"monitor/config.py:{line + 3}", {name: {"enabled": True}}),
            (f"{name}.job_name", "DeepSpeedJobName", f"monitor/config.py:{line + 9}", {name: {"enabled": True}}),
        )
    ),
    ("wandb.enabled", False, "monitor/config.py:36", {}),
    ("wandb.group", None, "monitor/config.py:39", {"wandb": {"enabled": True}}),
    ("wandb.team", None, "monitor/config.py:42", {"wandb": {"enabled": True}}),
    ("wandb.project", "deepspeed", "monitor/config.py:45", {"wandb": {"enabled": True}}),
    ("flops_profiler.enabled", False, "profiling/constants.py:29", {}),
    *(
        (f"flops_profiler.{name}", value, f"profiling/constants.py:{line}", {"flops_profiler": {"enabled": True}})
        for name, value, line in (
            ("recompute_fwd_factor", 0.0, 32),
            ("profile_step", 1, 35),
            ("module_depth", -1, 38),
            ("top_modules", 1, 41),
            ("detailed", True, 44),
            ("output_file", None, 47),
        )
    ),
    *(
        (f"comms_logger.{name}", value, f"comm/constants.py:{line}", {"comms_logger": {"enabled": True}})
        for name, value, line in (("verbose", False, 39), ("prof_all", True, 43), ("debug", False, 47))
    ),
    ("comms_logger.enabled", False, "comm/constants.py:35", {}),
    ("comms_logger.prof_ops", [], "comm/constants.py:51", {"comms_logger": {"enabled": True, "prof_all": False}}),
    ("communication_data_type", None, "runtime/constants.py:216", {}),
    ("bf16.enabled", False, "runtime/precision_config.py:46", {}),
    ("bf16.check_grad_overflow", True, "runtime/precision_config.py:56", BF16),
    ("fp16.enabled", False, "runtime/precision_config.py:105", {}),
    ("fp16.auto_cast", False, "runtime/precision_config.py:110", FP16),
    ("fp16.loss_scale", 0, "runtime/precision_config.py:115", FP16),
    ("fp16.initial_scale_power", 16, "runtime/precision_config.py:135", FP16),
    ("fp16.loss_scale_window", 1000, "runtime/precision_config.py:140", FP16),
    ("fp16.hysteresis", 2, "runtime/precision_config.py:145", FP16),
    ("fp16.consecutive_hysteresis", False, "runtime/precision_config.py:150", FP16),
    ("fp16.min_loss_scale", 1, "runtime/precision_config.py:155", FP16),
    ("torch_autocast.enabled", False, "runtime/constants.py:189", {}),
    ("data_types.grad_accum_dtype", None, "runtime/constants.py:385", {}),
    ("data_types.param_dtype", None, "runtime/constants.py:387", {}),
    ("data_types.buffer_dtype", None, "runtime/constants.py:389", {}),
    ("optimizer.params.adam_w_mode", True, "runtime/config.py:73", ADAM),
    ("optimizer.params.lr", 1e-3, "ops/adam/cpu_adam.py:17", ADAM),
    ("optimizer.params.bias_correction", True, "ops/adam/cpu_adam.py:18", ADAM),
    ("optimizer.params.betas", (0.9, 0.999), "ops/adam/cpu_adam.py:19", ADAM),
    ("optimizer.params.eps", 1e-8, "ops/adam/cpu_adam.py:20", ADAM),
    ("optimizer.params.weight_decay", 0, "ops/adam/cpu_adam.py:21", ADAM),
    ("optimizer.params.lr", 1e-3, "ops/lion/fused_lion.py:36", {"optimizer": {"type": "Lion"}}),
    ("optimizer.params.betas", (0.9, 0.999), "ops/lion/fused_lion.py:36", {"optimizer": {"type": "Lion"}}),
    ("optimizer.params.weight_decay", 0, "ops/lion/fused_lion.py:36", {"optimizer": {"type": "Lion"}}),
    ("optimizer.params.lr", 1e-2, "ops/adagrad/cpu_adagrad.py:14", {"optimizer": {"type": "Adagrad"}}),
    ("optimizer.params.eps", 1e-10, "ops/adagrad/cpu_adagrad.py:14", {"optimizer": {"type": "Adagrad"}}),
    ("zero_optimization.stage", 0, "runtime/zero/config.py:95", {}),
    ("zero_optimization.compute_grad_norm", True, "runtime/zero/config.py:143", {}),
    ("zero_optimization.zero_hpz_partition_size", 1, "runtime/zero/config.py:324", {}),
    ("zero_optimization.zero_quantized_weights", False, "runtime/zero/config.py:328", {}),
    ("zero_optimization.zero_quantized_nontrainable_weights", False, "runtime/zero/config.py:333", {}),
    ("zero_optimization.zero_quantized_gradients", False, "runtime/zero/config.py:340", {}),
    ("zero_optimization.offload_param.device", "none", "runtime/zero/offload_config.py:24", {}),
    ("zero_optimization.offload_optimizer.device", "none", "runtime/zero/offload_config.py:58", {}),
    ("zero_optimization.offload_optimizer.ratio", 1.0, "runtime/zero/offload_config.py:99", {}),
    ("zero_optimization.leaf_module.names", [], "runtime/zero/leaf_module_config.py:15", {}),
    ("zero_optimization.leaf_module.name_suffixes", [], "runtime/zero/leaf_module_config.py:16", {}),
    ("activation_checkpointing.cpu_checkpointing", False, "runtime/activation_checkpointing/config.py:36", {}),
    ("aio.use_gds", False, "runtime/swap_tensor/constants.py:30", {}),
]


@pytest.mark.parametrize(("key", "value", "where", "beside"), DEEPSPEED, ids=[f"{e[0]}-{e[2]}" for e in DEEPSPEED])
def test_a_key_that_is_not_given_has_deepspeeds_default(key, value, where, beside):
    found = load(beside).written()
    assert key in found
    assert found[key] == value, where
    assert key not in OTHER_DEFAULTS


OTHER = {
    "aio.queue_depth": (8, "runtime/swap_tensor/constants.py:22"),
    "torch_autocast.dtype": (None, "runtime/config.py:194"),
    "zero_optimization.leaf_module.classes": (3, "runtime/zero/leaf_module_config.py:10"),
}


def test_defaults_that_are_not_deepspeeds_are_named():
    """Every key with an effect has DeepSpeed's default, another that is said, or no meaning in DeepSpeed."""
    said = set()
    for beside in ({}, BF16, FP16, ADAM, {"torch_autocast": {"enabled": True}}):
        said |= load(beside).written().keys()
    said -= {"optimizer.type", "data_types.keep_in_fp32_modules"}
    own = {key for key in said if key.startswith("zeroxide.")}
    assert said - own == {each[0] for each in DEEPSPEED} | OTHER.keys()
    assert OTHER.keys() == OTHER_DEFAULTS.keys()
    assert OTHER_DEFAULTS["aio.queue_depth"] == OTHER["aio.queue_depth"][0]


def test_schedules_have_the_defaults_of_their_classes():
    """DeepSpeed's are in runtime/lr_schedules.py: line 725 for WarmupLR, 814 for WarmupDecayLR, 866 for the cosine."""
    for name in SCHEDULES:
        parameters = inspect.signature(getattr(schedules, name)).parameters
        taken = {
            key: each.default
            for key, each in parameters.items()
            if key != "optimizer" and each.default is not inspect.Parameter.empty
        }
        assert taken == DEFAULTS[name]
    assert DEFAULTS["WarmupLR"]["warmup_max_lr"] is None
    assert DEFAULTS["WarmupDecayLR"]["warmup_max_lr"] == 0.001
    assert DEFAULTS["WarmupCosineLR"]["cos_min_ratio"] == 0.0001


# What is given of (train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps), the ranks, and what
# DeepSpeed 0.19.8's DeepSpeedConfig makes of it; None where it raises.
BATCHES = [
    ((64, 4, None), 4, (64, 4, 4)),
    ((64, None, 2), 4, (64, 8, 2)),
    ((None, 4, None), 4, (16, 4, 1)),
    ((None, 4, 3), 2, (24, 4, 3)),
    ((64, None, None), 4, (64, 16, 1)),
    ((10, 3, None), 2, None),
    ((64, 4, 5), 4, None),
    ((7, None, None), 2, None),
]
KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.mark.parametrize(("given", "ranks", "expected"), BATCHES)
@pytest.mark.parametrize("unset", [None, "auto", "left out"])
def test_the_batch_is_deepspeeds(given, ranks, expected, unset):
    """Also where "auto" was left over, which stops DeepSpeed 0.19.8 with a TypeError."""
    document = {key: unset if value is None else value for key, value in zip(KEYS, given, strict=True)}
    document = {key: value for key, value in document.items() if value != "left out"}
    if expected is None:
        assert complaint(document, world_size=ranks).path == "train_batch_size"
    else:
        said = load(document, world_size=ranks).written()
        assert tuple(said[key] for key in KEYS) == expected


# --- origins ---------------------------------------------------------------------------------------------------------

FILE = """{
  // comments count as lines
  "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4,
  "gradient_accumulation_steps": "auto",
  "bf16": {
    "enabled": true
  },
  "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": [0.9,
    0.95]}},
  "zero_optimization": {"stage": 3,
    "cpu_offload": true, "overlap_comm": true},
}"""


@pytest.fixture
def explained(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(FILE)
    return explain(read(path), world_size=4)


def value(explained, key):
    return next(each for each in explained.values if each.key == key)


def test_a_key_of_the_file_has_its_line(explained):
    for key, line, shown in [
        ("train_batch_size", 3, 64),
        ("train_micro_batch_size_per_gpu", 3, 4),
        ("bf16.enabled", 6, True),
        ("optimizer.params.betas", 8, [0.9, 0.95]),
        ("zero_optimization.stage", 10, 3),
    ]:
        found = value(explained, key)
        assert (found.origin, found.line, found.value) == ("file", line, shown)
        assert found.why == f"{explained.source.origin}:{line}"


def test_an_older_name_of_a_key_is_where_it_stands(explained):
    found = value(explained, "zero_optimization.offload_optimizer.device")
    assert (found.value, found.origin, found.line) == ("cpu", "file", 11)
    old = explain(Source({"zero_optimization": True, "bfloat16": {"enabled": True}}))
    assert value(old, "zero_optimization.stage").origin == "file"
    assert (value(old, "bf16.enabled").value, value(old, "bf16.enabled").origin) == (True, "file")


def test_a_derived_value_names_what_decides_it(explained):
    steps = value(explained, "gradient_accumulation_steps")
    assert (steps.value, steps.origin, steps.line) == (4, "derived", 4)
    path = explained.source.origin
    assert steps.why == (
        f"from train_batch_size ({path}:3) and train_micro_batch_size_per_gpu ({path}:3) and 4 ranks "
        f'("auto" in {path}:4 was left over)'
    )
    layout = value(explained, "zeroxide.format")
    assert (layout.value, layout.origin, layout.why) == ("split", "derived", f"from bf16.enabled ({path}:6)")


def test_a_default_says_whose_it_is(explained):
    assert value(explained, "gradient_clipping").why == "default, as DeepSpeed 0.19.8"
    assert value(explained, "gradient_clipping").value == 1.0
    assert value(explained, "aio.queue_depth").why == "default; DeepSpeed 0.19.8 has 8"
    assert value(explained, "zeroxide.prefetch").why == "default"
    rate = value(explained, "optimizer.params.lr")
    assert (rate.value, rate.origin, rate.line) == (0.001, "default", 8)
    assert '"auto"' in rate.why
    # What only one precision has is no consequence of it.
    assert value(explained, "bf16.check_grad_overflow").origin == "default"


def test_an_explicit_zero_turns_clipping_off_and_is_the_files():
    found = value(explain(Source({"gradient_clipping": 0})), "gradient_clipping")
    assert (found.value, found.origin) == (0, "file")


def test_keys_without_effect_have_their_value_reason_and_line(explained):
    (only,) = explained.no_effect
    assert (only.key, only.value, only.line) == ("zero_optimization.overlap_comm", True, 11)
    assert "switch" in only.why


def test_what_was_left_auto_is_listed(explained):
    assert left_auto(explained.source) == ["gradient_accumulation_steps", "optimizer.params.lr"]


def test_a_config_that_is_refused_is_not_explained():
    error = complaint({"stge": 1})
    with pytest.raises(type(error), match="stge"):
        explain(Source({"stge": 1}))


def test_lines_of_keys():
    assert lines('{"a": 1,\n\n "b": {"c":\n 2, "d": [{"e": 1}, 2],\n"f\\"g": {}}, // x\n "h": "}"}') == {
        "a": 1,
        "b": 3,
        "b.c": 3,
        "b.d": 4,
        'b.f"g': 5,
        "h": 6,
    }
    assert lines("{}") == {}
    found = Source({}, "f.json", None, {"a": 1, "a.b": 2})
    assert (found.line("a.b.c.d"), found.line("a.x"), found.line("z")) == (2, 1, None)
    assert (found.where("a.b"), found.where("z")) == ("f.json:2", "f.json")


def test_every_rule_writes_its_own_type():
    for rule in RULES.values():
        for kind in rule.types:
            again = load(whole(load({"optimizer": {"type": kind}}).written())).optimizer
            assert again == load({"optimizer": {"type": kind}}).optimizer
