"""The config: the line that a mistake gets."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from given_configs import ADAM, BF16, DECAY, FP16, WARMUP, complaint, merged, nested
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zeroxide.config import RULES, Config, load
from zeroxide.config.check import all_keys
from zeroxide.config.document import Document
from zeroxide.errors import BudgetError, ConfigError, StorageError, ZeroxideError

BUILT = [kind for rule in RULES.values() for kind in rule.types]


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"gradient_cliping": 1}, 'unknown key "gradient_cliping": the nearest known key is "gradient_clipping"'),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            'unknown key "zero_optimization.offload_param.devise": the nearest known key is '
            '"zero_optimization.offload_param.device"',
        ),
        ({"offload_param": {}}, 'the nearest known key is "zero_optimization.offload_param"'),
        ({"host_memory": 1}, 'the nearest known key is "zeroxide.host_memory"'),
        ({"Stage": 1}, '"zero_optimization.stage"'),
        ({"qqqqqqqq": 1}, 'unknown key "qqqqqqqq": no known key is like it'),
        (
            {"optimizer": {"type": "Adam", "params": {"weight_decy": 0}}},
            'unknown key "optimizer.params.weight_decy": the nearest known key is "optimizer.params.weight_decay"',
        ),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}}, 'set "gradient_clipping" instead'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}},
            'unknown key "scheduler.params.total_num_steps"',
        ),
        (
            {"optimizer": {"type": "Lamb"}},
            f'optimizer.type: "Lamb": not built yet; {", ".join(BUILT[:-1])} and {BUILT[-1]} are',
        ),
        (
            {"optimizer": {"type": "AdemW"}},
            f'expected {", ".join(BUILT[:-1])} or {BUILT[-1]}, got "AdemW"; the nearest known name is "AdamW"',
        ),
        (
            {"optimizer": {"type": "Lion", "params": {"eps": 1e-8}}},
            'unknown key "optimizer.params.eps"',
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"nesterov": True}}},
            "optimizer.params.nesterov = true needs optimizer.params.momentum above 0",
        ),
        ({"optimizer": {}}, "optimizer.type: required, and not given"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.params.cycle_min_lr"),
        ({"scheduler": {"type": "WarmupLr"}}, 'got "WarmupLr"; the nearest known name is "WarmupLR"'),
        ({"scheduler": DECAY | {"params": {}}}, "scheduler.params.total_num_steps: required, and not given"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.2, "warmup_max_lr": 0.1}}},
            "scheduler.params.warmup_min_lr = 0.2 is above scheduler.params.warmup_max_lr = 0.1",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}},
            'optimizer.params.adam_w_mode = false contradicts optimizer.type = "AdamW"',
        ),
        (nested("zero_optimization.offload_param.device", "nvme"), "offload_param.nvme_path: required when"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            'zero_optimization.offload_param.device = "cpu" needs zero_optimization.stage 3, got 2',
        ),
        (
            nested("zero_optimization.offload_optimizer.device", "cpu"),
            "needs zero_optimization.stage 1 or more, got none",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none", "ratio": 0.5}}},
            'zero_optimization.offload_optimizer.ratio = 0.5 needs offload_optimizer.device "cpu", got "none"',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.5}}},
            "zero_optimization.offload_optimizer.ratio: expected a number from 0 to 1, got 1.5",
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload": True, "offload_optimizer": {"device": "none"}}},
            'zero_optimization.cpu_offload = true contradicts zero_optimization.offload_optimizer.device = "none"',
        ),
        ({"bf16": {}, "bfloat16": {}}, "two names of one section"),
        ({"zeroxide": {"format": "split"}}, 'zeroxide.format: "split" keeps a weight as two bf16 halves'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, '"bf16" gradients under fp32 training: not built yet'),
        ({"data_types": {"grad_accum_dtype": "fp16"}, "bf16": {"enabled": True}}, '"fp16" gradients under bf16'),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}, "fp16": {"enabled": True}},
            'data_types.grad_accum_dtype: "bf16" gradients under fp16 training: not built yet',
        ),
        (
            {"communication_data_type": "bf16", "fp16": {"enabled": True}},
            'communication_data_type: "bf16" for gradients of fp16 training: not built yet',
        ),
        (merged(BF16, FP16), "bf16.enabled and fp16.enabled are both true: weights have one dtype"),
        (merged({"bfloat16": {"enabled": True}}, FP16), "bfloat16.enabled and fp16.enabled are both true"),
        (
            merged(FP16, {"zeroxide": {"format": "split"}}),
            'zeroxide.format: "split" keeps a weight as two bf16 halves and needs bf16.enabled, got fp16 training',
        ),
        (
            merged(FP16, {"torch_autocast": {"enabled": True}}),
            "torch_autocast.enabled keeps fp32 weights and contradicts fp16.enabled; switch one of them off",
        ),
        (merged(BF16, {"torch_autocast": {"enabled": True}}), "contradicts bf16.enabled"),
        (
            {"fp16": {"enabled": True, "initial_scale_power": 2, "min_loss_scale": 8}},
            "fp16.min_loss_scale = 8 is above the first scale, 2 to the power of fp16.initial_scale_power = 4",
        ),
        ({"zeroxide": {"tile_bytes": "8MiB", "staging_bytes": "4MiB"}}, "is larger than zeroxide.staging_bytes"),
        ({"zeroxide": {"host_memory": "1GiB", "staging_bytes": "1GiB"}}, "leaves nothing of host_memory"),
        ({1: 2}, "expected a key that is a string, got 1"),
        ({"bf16": True}, "bf16: expected an object, got true"),
        ({"zero_optimization": []}, "zero_optimization: expected an object, got []"),
        ({"optimizer": {"type": "Adam", "params": [1]}}, "optimizer.params: expected an object, got [1]"),
        ({"optimizer": {"type": 5}}, "optimizer.type: expected the name of an optimizer, got 5"),
        (7, "expected a mapping or the path of a JSON file, got int"),
    ],
)
def test_a_mistake_gets_one_line(config, line):
    assert line in str(complaint(config))


COUNTS = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"]
RATES = ["gradient_clipping", "optimizer.params.lr", "optimizer.params.eps", "optimizer.params.weight_decay"]
SIZES = [f"zeroxide.{name}" for name in ("host_memory", "unit_bytes", "row_bytes", "tile_bytes", "staging_bytes")]
FLAGS = ["wall_clock_breakdown", "dataloader_drop_last", "bf16.enabled", "optimizer.params.bias_correction"]
FLAGS += ["bf16.check_grad_overflow", "fp16.enabled", "fp16.auto_cast", "fp16.consecutive_hysteresis"]
FLAGS += ["managed_gradient_accumulation", "torch_autocast.enabled", "zeroxide.micro_batch_seeds"]
FLAGS += ["zeroxide.update_in_backward"]
NAN, INF = math.nan, math.inf
WRONG = [
    *((key, value) for key in COUNTS for value in (0, -1, 1.5, "8", True, [8], 1 << 40, NAN, INF)),
    *((key, value) for key in RATES for value in (-1e-9, "0.1", True, NAN, INF, [0.1])),
    *((key, value) for key in SIZES for value in (0, -1, "2 gigs", "GiB", True, 1 << 60, "-1GiB", NAN, 1.5, "", {})),
    *((key, value) for key in FLAGS for value in (1, 0, "yes", [], {})),
    *(("zeroxide.host_memory", value) for value in (2, "2", "2KiB")),
    *(("zero_optimization.stage", value) for value in (4, -1, "4", "3.0", " 3", 1.5, True)),
    *(("steps_per_print", value) for value in (0, -1, "10", True, NAN, -INF, 2.5)),
    *(("optimizer.params.betas", value) for value in (0.9, [0.9], [0.9, 1], [-0.1, 0.9], [False, 0.9], [0.9, "0.9"])),
    *(("aio.queue_depth", value) for value in (0, -1, 5000, True, "8")),
    *(("zeroxide.threads", value) for value in (0, -1, 5000, True, "8")),
    *(("zeroxide.prefetch", value) for value in (-1, 1.5, 5000, True, "1")),
    *(("zeroxide.rank_timeout", value) for value in (0, 0.5, -1, "10", True, NAN, INF, 1e6)),
    *(("zeroxide.durable_every", value) for value in (-1, 1.5, True, "1")),
    *(("zeroxide.durable_name", value) for value in ("", ".", "..", "a/b", "a b", "-a", "a" * 101, 1, True)),
    *(("zeroxide.device", value) for value in (0, "", "GPU", "cuda:", "cuda:x", "cuda:1:2", " cuda", True, ["cpu"])),
    *(("zeroxide.transport", value) for value in ("tcp", 1)),
    *(("zeroxide.format", value) for value in ("fp16", 1, None.__class__, "")),
    *(("zeroxide.io_engine", value) for value in ("libaio", 1)),
    *(("zeroxide.unrouted_experts", value) for value in ("drop", "", 1, True)),
    *(("zeroxide.accumulation_order", value) for value in ("layer", "", 1, True)),
    *(("zero_optimization.offload_param.device", value) for value in ("disk", 1, True)),
    *(("zero_optimization.offload_param.nvme_path", value) for value in ("", "  ", 1, "a\0b")),
    *(("data_types.grad_accum_dtype", value) for value in ("float", 16)),
    *(("fp16.loss_scale", value) for value in (-1, "128", True, INF, NAN)),
    *(("fp16.initial_scale_power", value) for value in (-1, 128, 1.5, "16", True)),
    *(("fp16.min_loss_scale", value) for value in (0, -1, "1", True, INF)),
    *((f"fp16.{key}", value) for key in ("loss_scale_window", "hysteresis") for value in (0, -1, 1.5, "2", True)),
    *(("torch_autocast.dtype", value) for value in ("fp32", "float", 16)),
    *(("scheduler.params.warmup_num_steps", value) for value in (0, -1, "5", 1.5)),
    *(("scheduler.params.warmup_type", value) for value in ("cubic", 1)),
    *(("scheduler.params.warmup_max_lr", value) for value in (-1, "1", [], ["1"], [-1], [True], [NAN])),
    *(("scheduler.params.last_batch_iteration", value) for value in (-2, 1.5, "1", True)),
    *(("data_types.keep_in_fp32_modules", value) for value in ("gate", [1], {})),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}={value!r}" for key, value in WRONG])
def test_a_value_that_does_not_fit_is_named_with_what_was_expected(key, value):
    beside = merged(ADAM, {"scheduler": {"type": "WarmupLR"}})
    error = complaint(merged(beside, nested(key, value)))
    assert error.path == key
    assert f"{key}: expected {error.expected}, got {error.got}" in str(error)
    assert error.expected
    assert len(error.got) <= 60


@given(value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
), key=st.sampled_from(sorted(".".join(path) for path in all_keys(Document))))  # fmt: skip
@settings(deadline=None, max_examples=400)
@example(value={"enabled": True}, key="fp16")
def test_no_value_anywhere_escapes_as_another_exception(value, key):
    try:
        config = load(merged(merged(ADAM, {"scheduler": WARMUP}), nested(key, value)))
    except ConfigError as error:
        outcome = str(error)
    else:
        assert isinstance(config, Config)
        outcome = "accepted"
    assert "\n" not in outcome


def test_every_problem_is_reported_and_the_first_is_shown():
    error = complaint({"train_batch_size": 0, "bf16": {"enabld": True}, "zeroxide": {"threads": -1}})
    assert "(and 2 more: bf16.enabld, zeroxide.threads)" in str(error)
    assert len(error.problems) == 3
    assert error.problems[0].startswith("train_batch_size: expected")


def test_json_integers_written_as_floats_are_integers():
    config = load(json.loads('{"train_batch_size": 1.6e1, "zeroxide": {"host_memory": 2e9}}'))
    assert (config.batch.train_batch_size, type(config.batch.train_batch_size)) == (16, int)
    assert config.zeroxide.host_memory == 2_000_000_000


def test_steps_per_print_may_be_never():
    assert load({"steps_per_print": INF}).report.steps_per_print is None
    assert load({"steps_per_print": None}).report.steps_per_print is None


def test_the_config_given_is_not_changed_and_is_kept():
    given_config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "gradient_clipping": None}
    before = copy.deepcopy(given_config)
    config = load(given_config)
    assert given_config == before
    assert config.source == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.zero.stage = 1


def test_importing_the_config_imports_nothing_heavy():
    script = (
        "import sys, zeroxide.config, zeroxide.errors\n"
        "assert not {'torch', 'numpy', 'pydantic', 'zeroxide._core'} & set(sys.modules), 'import'\n"
        "zeroxide.config.load({'gradient_clipping': 1}, lr=0.1)\n"
        "assert not {'torch', 'numpy', 'zeroxide._core'} & set(sys.modules), 'load'\n"
    )
    path = Path(sys.modules["zeroxide.config"].__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": str(path)})


def test_errors_are_one_line_and_keep_their_numbers():
    error = BudgetError("needs\n  more", need=3, limit=2, bucket="staging")
    assert (str(error), error.message) == ("needs more", "needs more")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.need, again.limit, again.bucket) == ("needs more", 3, 2, "staging")
    assert isinstance(error, ZeroxideError)
    assert isinstance(ConfigError("x"), ValueError)
    assert ConfigError("x").problems == ("x",)
    assert (ConfigError.exit_code, StorageError.exit_code) == (2, 1)
    assert StorageError("x", path=Path("/a"), errno=28).path == "/a"
