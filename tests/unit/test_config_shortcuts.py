"""The batch equation, the defaults, and keyword shortcuts beside a config."""

from __future__ import annotations

import inspect
import operator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zeroxide
from zeroxide.config import Config, LossScale, Offload, Optimizer, load
from zeroxide.config.shortcuts import Shortcuts
from zeroxide.engine import entry
from zeroxide.errors import ConfigError

GIB = 1 << 30


def complaint(config: object = None, **shortcuts: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(config, **shortcuts)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("batch", "micro", "steps", "world", "expected"),
    [
        (None, None, None, 1, (None, None, 1)),
        (None, None, 4, 1, (None, None, 4)),
        (None, 2, None, 3, (6, 2, 1)),
        (None, 2, 4, 3, (24, 2, 4)),
        (12, None, None, 3, (12, 4, 1)),
        (12, None, 2, 3, (12, 2, 2)),
        (12, 2, None, 3, (12, 2, 2)),
        (12, 2, 2, 3, (12, 2, 2)),
    ],
)
def test_batch_sizes_follow_from_one_another(batch, micro, steps, world, expected):
    given_config = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    config = load(given_config, world_size=world)
    assert (
        config.batch.train_batch_size,
        config.batch.train_micro_batch_size_per_gpu,
        config.batch.gradient_accumulation_steps,
    ) == expected


@given(st.integers(1, 64), st.none() | st.integers(1, 9), st.none() | st.integers(1, 9), st.integers(1, 5))
@settings(deadline=None)
def test_the_batch_equation_holds_or_is_refused(batch, micro, steps, world):
    given_config = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    solvable = any(
        each * other * world == batch
        for each in ([micro] if micro else range(1, batch + 1))
        for other in ([steps] if steps else range(1, batch + 1) if micro else [1])
    )
    if not solvable:
        assert str(batch) in str(complaint(given_config, world_size=world))
        return
    config = load(given_config, world_size=world)
    assert config.batch.train_micro_batch_size_per_gpu * config.batch.gradient_accumulation_steps * world == batch
    assert config.batch.train_batch_size == batch
    assert micro in (None, config.batch.train_micro_batch_size_per_gpu)
    assert steps in (None, config.batch.gradient_accumulation_steps)


def test_a_batch_equation_that_fails_names_all_its_terms():
    given_config = {
        "train_batch_size": 7,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
    }
    assert (
        str(complaint(given_config)) == "train_batch_size = 7 is not train_micro_batch_size_per_gpu 2 * "
        "gradient_accumulation_steps 3 * world size 1 = 6"
    )


def test_defaults():
    assert load() == Config()
    assert load({}).precision.dtype == "fp32"
    assert load(lr=0.1).precision.dtype == "fp32"
    bf16 = load(dtype="bf16")
    assert (bf16.precision.dtype, bf16.precision.format, bf16.precision.grad_dtype, bf16.precision.buffer_dtype) == (
        "bf16",
        "split",
        "bf16",
        None,
    )
    assert (bf16.precision.loss_scale, bf16.precision.check_overflow, bf16.precision.autocast) == (None, True, None)
    fp16 = load(dtype="fp16")
    assert (fp16.precision.dtype, fp16.precision.format, fp16.precision.grad_dtype, fp16.precision.buffer_dtype) == (
        "fp16",
        "fp32",
        "fp16",
        None,
    )
    assert (fp16.precision.loss_scale, fp16.precision.check_overflow, fp16.precision.cast_inputs) == (
        LossScale(),
        True,
        False,
    )
    assert load().zeroxide.trim_libraries is True
    assert load({"zeroxide": {"trim_libraries": False}}, host_memory=GIB).zeroxide.trim_libraries is False


@pytest.mark.parametrize(
    ("shortcuts", "name", "expected"),
    [
        ({"lr": 0.5}, "optimizer", Optimizer(lr=0.5)),
        ({"lr": 0}, "optimizer", Optimizer(lr=0.0)),
        ({"betas": (0.5, 0.6)}, "optimizer", Optimizer(betas=(0.5, 0.6))),
        ({"eps": 1e-4}, "optimizer", Optimizer(eps=1e-4)),
        ({"weight_decay": 0.5}, "optimizer", Optimizer(weight_decay=0.5)),
        ({"offload": "cpu"}, "zero.offload_param", Offload("cpu")),
        ({"offload": "cpu"}, "zero.offload_optimizer", Offload("cpu")),
        ({"offload": "nvme:/a:b"}, "zero.offload_optimizer", Offload("nvme", Path("/a:b"))),
        ({"offload": "cpu"}, "zero.stage", 3),
        ({"offload_param": "cpu"}, "zero.offload_param", Offload("cpu")),
        ({"offload_param": "cpu"}, "zero.offload_optimizer", Offload()),
        ({"offload_optimizer": "nvme:d"}, "zero.offload_optimizer", Offload("nvme", Path("d"))),
        ({"offload": "nvme:d", "offload_param": "none"}, "zero.offload_param", Offload()),
        ({"offload": "none"}, "zero.stage", 0),
        ({"host_memory": "1.5G"}, "zeroxide.host_memory", 3 * GIB // 2),
        ({"host_memory": GIB}, "zeroxide.host_memory", GIB),
        ({"dtype": "bf16"}, "precision.dtype", "bf16"),
        ({"dtype": "torch.bfloat16"}, "precision.dtype", "bf16"),
        ({"dtype": "float32"}, "precision.dtype", "fp32"),
        ({"dtype": "fp16"}, "precision.dtype", "fp16"),
        ({"dtype": "torch.float16"}, "precision.dtype", "fp16"),
        ({"dtype": "half"}, "precision.dtype", "fp16"),
        ({"dtype": "fp16"}, "precision.loss_scale", LossScale()),
        ({"gradient_clipping": 2}, "gradients.clipping", 2.0),
        ({"gradient_clipping": 0}, "gradients.clipping", None),
        ({"gradient_accumulation_steps": 4}, "batch.gradient_accumulation_steps", 4),
    ],
)
def test_shortcuts(shortcuts, name, expected):
    assert operator.attrgetter(name)(load(**shortcuts)) == expected


def test_shortcuts_take_torch_dtypes():
    assert load(dtype=torch.bfloat16).precision.dtype == "bf16"
    assert load(dtype=torch.float16).precision.dtype == "fp16"
    assert load(dtype=torch.float32).precision.dtype == "fp32"


@pytest.mark.parametrize(
    ("shortcuts", "line"),
    [
        ({"lr": -1}, "keyword arguments: lr: expected a finite number, 0 or more, got -1"),
        ({"lr": "1e-3"}, 'got "1e-3"'),
        ({"betas": 0.9}, "keyword arguments: betas: expected two numbers"),
        ({"offload": "disk"}, 'offload: expected "none", "cpu" or "nvme:DIRECTORY", got "disk"'),
        ({"offload": "nvme:"}, 'got "nvme:"'),
        ({"offload": "nvme"}, 'got "nvme"'),
        ({"offload_param": "cpu:/x"}, 'offload_param: expected "none"'),
        ({"host_memory": "2"}, "host_memory: expected a size from 1 MiB to 1 PiB"),
        ({"dtype": "fp8"}, 'dtype: expected "bf16", "fp16" or "fp32", got "fp8"'),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected an integer from 1"),
    ],
)
def test_a_wrong_shortcut_gets_one_line(shortcuts, line):
    assert line in str(complaint(**shortcuts))


def test_an_unknown_shortcut_is_named():
    assert str(complaint(hostmemory=1)) == (
        'keyword arguments: unknown key "hostmemory": the nearest known key is "host_memory"'
    )
    with pytest.raises(TypeError, match="hostmemory"):
        zeroxide.initialize(hostmemory=1)


def test_initialize_takes_all_shortcuts_and_passes_them_on(monkeypatch):
    """Catches: a shortcut that `initialize` does not take, or passes on under another one's name or not at all."""
    parameters = inspect.signature(zeroxide.initialize).parameters.values()
    keywords = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name != "weights"]
    assert keywords == list(Shortcuts.model_fields)
    asked = []
    monkeypatch.setattr(entry, "build", lambda request: asked.append(request) or mock.Mock())
    given = {name: object() for name in keywords}
    zeroxide.initialize(model=torch.nn.Linear(1, 1), **given)
    assert asked[0].shortcuts == given


FILE = {
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "gradient_accumulation_steps": 2,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 0.1, "betas": [0.5, 0.6], "eps": 1e-4, "weight_decay": 0.3},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "nvme", "nvme_path": "/a"},
    },
    "zeroxide": {"host_memory": "2GiB"},
}


@pytest.mark.parametrize(
    ("keyword", "same", "other", "key"),
    [
        ("lr", 0.1, 0.2, "optimizer.params.lr"),
        ("betas", (0.5, 0.6), (0.5, 0.7), "optimizer.params.betas"),
        ("eps", 1e-4, 0, "optimizer.params.eps"),
        ("weight_decay", 0.3, 0.0, "optimizer.params.weight_decay"),
        ("offload_param", "cpu", "none", "zero_optimization.offload_param.device"),
        ("offload_optimizer", "nvme:/a", "nvme:/b", "zero_optimization.offload_optimizer.device"),
        ("host_memory", 2 * GIB, GIB, "zeroxide.host_memory"),
        ("dtype", "bf16", "fp32", "bf16.enabled"),
        ("gradient_clipping", 1, 0, "gradient_clipping"),
        ("gradient_accumulation_steps", 2, 3, "gradient_accumulation_steps"),
    ],
)
def test_a_shortcut_may_repeat_the_config_but_not_contradict_it(keyword, same, other, key):
    assert load(FILE, **{keyword: same}) == load(FILE)
    error = complaint(FILE, **{keyword: other})
    assert f"{keyword}=" in str(error)
    assert f"contradicts {key}" in str(error)
    assert error.path == key


@pytest.mark.parametrize(
    ("config", "shortcuts", "line"),
    [
        (FILE, {"offload": "cpu"}, 'offload="cpu" contradicts zero_optimization.offload_optimizer.device = "nvme:/a"'),
        (
            {"zero_optimization": {"stage": 2}},
            {"offload": "cpu"},
            'offload="cpu" needs stage 3 and contradicts zero_optimization.stage = 2',
        ),
        (
            {"zero_optimization": {"stage": 0}},
            {"offload_optimizer": "cpu"},
            'offload_optimizer="cpu" needs stage 1 or more and contradicts zero_optimization.stage = 0',
        ),
        ({"bf16": {"enabled": False}}, {"dtype": "bf16"}, 'dtype="bf16" contradicts bf16.enabled = false'),
        ({"fp16": {"enabled": False}}, {"dtype": "fp16"}, 'dtype="fp16" contradicts fp16.enabled = false'),
        ({"fp16": {"enabled": True}}, {"dtype": "bf16"}, 'dtype="bf16" contradicts fp16.enabled = true'),
        ({"fp16": {"enabled": True}}, {"dtype": "fp32"}, 'dtype="fp32" contradicts fp16.enabled = true'),
        ({"bf16": {"enabled": True}}, {"dtype": "fp16"}, 'dtype="fp16" contradicts bf16.enabled = true'),
        ({"torch_autocast": {"enabled": True}}, {"dtype": "fp16"}, 'contradicts dtype="fp16"'),
        ({"zeroxide": {"format": "split"}}, {"dtype": "fp32"}, "needs bf16.enabled"),
    ],
)
def test_contradictions_between_sections(config, shortcuts, line):
    assert line in str(complaint(config, **shortcuts))


def test_a_shortcut_and_a_section_go_together():
    assert load({"fp16": {"loss_scale": 4}}, dtype="fp16").precision.loss_scale == LossScale(initial=4.0, dynamic=False)
    assert load({"bf16": {"enabled": False}}, dtype="fp16").precision.dtype == "fp16"
    assert load({"fp16": {"enabled": False}}, dtype="bf16").precision.dtype == "bf16"


def test_keys_of_scaling_that_is_not_done_are_listed():
    def idle(config: dict) -> dict:
        return dict(load(config).no_effect)

    settings = {"loss_scale_window": 5, "hysteresis": 3, "auto_cast": True}
    assert idle({"fp16": {"enabled": False, **settings}}) == {f"fp16.{name}": "fp16 is off" for name in settings}
    assert idle({"fp16": {"enabled": True, **settings}}) == {}
    assert set(idle({"fp16": {"enabled": True, "loss_scale": 8, **settings}})) == {
        "fp16.loss_scale_window",
        "fp16.hysteresis",
    }
    assert set(idle({"torch_autocast": {"dtype": "bf16"}})) == {"torch_autocast.dtype"}
    assert set(idle({"bf16": {"check_grad_overflow": False}})) == {"bf16.check_grad_overflow"}


def test_autocast_in_fp16_scales_the_loss():
    assert load({"torch_autocast": {"enabled": True}}).precision.loss_scale is None
    config = load({"torch_autocast": {"enabled": True, "dtype": "torch.float16"}})
    assert (config.precision.dtype, config.precision.autocast, config.precision.loss_scale) == (
        "fp32",
        "fp16",
        LossScale(),
    )
