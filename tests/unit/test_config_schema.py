"""The published JSON schema: up to date, and of one mind with what reads configs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from given_configs import merged, nested
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import EFFECTS, NOT_BUILT, REMOVED

from zeroxide.config import load
from zeroxide.config.check import all_keys, section_of
from zeroxide.config.document import Document
from zeroxide.config.fields import NoEffect, NotBuilt, asks_for_nothing
from zeroxide.config.schema import attribute_docs, schema
from zeroxide.errors import ConfigError

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "config.schema.json"
SCHEMA = schema()

KINDS = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value == int(value),
}


def same(left: object, right: object) -> bool:
    """Equality as JSON has it: true is not 1."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def fits(value: object, rule: dict | bool) -> bool:
    """Whether a value is as the schema says, of JSON Schema 2020-12 as far as this schema uses it."""
    if isinstance(rule, bool):
        return rule
    if "$ref" in rule:
        assert rule["$ref"] == "#/$defs/off"
        return fits(value, SCHEMA["$defs"]["off"])
    known = {"$schema", "$defs", "title", "description", "default", "deprecated"}
    checks = {
        "type": lambda each: KINDS[each](value),
        "enum": lambda each: any(same(value, one) for one in each),
        "const": lambda each: same(value, each),
        "anyOf": lambda each: any(fits(value, one) for one in each),
        "allOf": lambda each: all(fits(value, one) for one in each),
        "if": lambda each: not fits(value, each) or fits(value, rule["then"]),
        "then": lambda each: True,
        "pattern": lambda each: not isinstance(value, str) or re.search(each, value) is not None,
        "minimum": lambda each: not KINDS["number"](value) or value >= each,
        "maximum": lambda each: not KINDS["number"](value) or value <= each,
        "exclusiveMinimum": lambda each: not KINDS["number"](value) or value > each,
        "exclusiveMaximum": lambda each: not KINDS["number"](value) or value < each,
        "minItems": lambda each: not isinstance(value, list) or len(value) >= each,
        "maxItems": lambda each: not isinstance(value, list) or len(value) <= each,
        "items": lambda each: not isinstance(value, list) or all(fits(one, each) for one in value),
        "required": lambda each: not isinstance(value, dict) or set(each) <= value.keys(),
        "properties": lambda each: (
            not isinstance(value, dict) or all(fits(value[name], each[name]) for name in value if name in each)
        ),
        "additionalProperties": lambda each: (
            not isinstance(value, dict)
            or all(fits(value[name], each) for name in value if name not in rule.get("properties", {}))
        ),
    }
    return all(checks[name](each) for name, each in rule.items() if name not in known)


def accepted(document: dict) -> bool:
    return fits(json.loads(json.dumps(document)), SCHEMA)


def test_the_published_schema_is_up_to_date():
    """`zeroxide config schema > docs/config.schema.json` makes it so."""
    assert json.loads(PUBLISHED.read_text()) == json.loads(json.dumps(SCHEMA))


@pytest.mark.parametrize(("key", "value", "beside"), [each[:3] for each in EFFECTS], ids=[each[0] for each in EFFECTS])
def test_a_config_with_an_effect_fits(key, value, beside):
    assert accepted(merged(beside, nested(key, value)))
    if not key.endswith(".type"):
        assert accepted(merged(beside, nested(key, "auto"))) is (key != "zeroxide.recompute")


@pytest.mark.parametrize(("key", "value"), [each[:2] for each in (*NOT_BUILT, *REMOVED)])
def test_what_is_refused_does_not_fit(key, value):
    assert not accepted(nested(key, value))


WRONG = [
    ("train_batch_size", 0),
    ("train_batch_size", 1.5),
    ("train_batch_size", True),
    ("train_batch_size", "8"),
    ("train_batch_size", 2**31),
    ("gradient_clipping", -1),
    ("gradient_clipping", "1"),
    ("gradient_allreduce_op", "max"),
    ("bf16", True),
    ("bf16.enabled", "maybe"),
    ("bf16.enabled", 1),
    ("fp16.initial_scale_power", 128),
    ("fp16.min_loss_scale", 0),
    ("torch_autocast.dtype", "fp32"),
    ("zero_optimization.stage", 4),
    ("zero_optimization.stage", "4"),
    ("zero_optimization.offload_param.device", "disk"),
    ("zero_optimization.offload_param.nvme_path", " "),
    ("zero_optimization.offload_optimizer.ratio", 1.5),
    ("zero_optimization.leaf_module.classes", "Moe"),
    ("zero_optimization.zeropp_loco_param.err_beta", 1),
    ("aio.queue_depth", 4097),
    ("zeroxide.host_memory", "2 GiBs"),
    ("zeroxide.host_memory", 1000),
    ("zeroxide.prefetch", -1),
    ("zeroxide.rank_timeout", 0),
    ("zeroxide.durable_every", -1),
    ("zeroxide.durable_name", "a/b"),
    ("zeroxide.io_engine", "uring"),
    ("gradient_cliping", 1),
    ("zero_optimization.stge", 3),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_value_neither_fits_nor_is_read(key, value):
    assert not accepted(nested(key, value))
    with pytest.raises(ConfigError):
        load(nested(key, value))


@pytest.mark.parametrize(
    "section",
    [
        {"optimizer": {}},
        {"optimizer": {"type": "Lamb"}},
        {"optimizer": {"type": "adamw", "params": {"lr": -1}}},
        {"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}},
        {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1]}}},
        {"optimizer": {"type": "Lion", "params": {"eps": 1e-8}}},
        {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}},
        {"scheduler": {"type": "WarmupDecayLR"}},
        {"scheduler": {"type": "warmuplr"}},
        {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 5}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": []}}},
    ],
)
def test_params_fit_the_type_beside_them(section):
    assert not accepted(section)
    with pytest.raises(ConfigError):
        load(section)


# The three configs that the documentation of Hugging Face's Trainer starts from, "auto" included.
LOW = {
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
    "enabled": "auto",
}
TRAINER = {
    "fp16": LOW,
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
STAGE_2 = {
    "stage": 2,
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": "auto",
    "contiguous_gradients": True,
}
STAGE_3 = {
    "stage": 3,
    "offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 4, "fast_init": False},
    "offload_param": {"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 5, "buffer_size": 1e8},
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}


@pytest.mark.parametrize("zero", [STAGE_2, STAGE_3, {"stage": 0}])
def test_configs_of_hugging_faces_documentation_fit_and_are_read(zero):
    document = copy.deepcopy(TRAINER) | {"zero_optimization": zero}
    assert accepted(document)
    assert load(document).zero.stage == zero["stage"]
    decay = merged(document, {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}})
    assert accepted(decay)


def test_every_key_says_what_it_is():
    """Catches: a key without a string below it, and a model that the schema forgets."""
    found = {path for path, _ in described(SCHEMA, ())}
    assert found == set(all_keys(Document))
    assert all(text.rstrip().endswith((".", '"')) for _, text in described(SCHEMA, ()))


def described(rule: dict, prefix: tuple[str, ...]):
    for name, each in rule.get("properties", {}).items():
        yield (*prefix, name), each["description"]
        yield from described(next((one for one in each.get("anyOf", []) if "properties" in one), {}), (*prefix, name))


def test_marks_and_defaults_are_in_the_schema():
    properties = SCHEMA["properties"]
    assert "Without effect" in properties["prescale_gradients"]["description"]
    assert "not built yet" in properties["autotuning"]["description"]
    assert properties["amp"]["deprecated"] is True
    assert '"torch_autocast"' in properties["amp"]["description"]
    assert properties["gradient_clipping"]["default"] == 1.0
    zero = properties["zero_optimization"]["anyOf"][0]["properties"]
    assert zero["stage"]["default"] == 0
    assert "DeepSpeed's default: 8" in properties["aio"]["anyOf"][0]["properties"]["queue_depth"]["description"]
    assert attribute_docs(Document)["train_batch_size"].startswith("Samples in an optimizer step")


# What a section that is not built may be: nested switches of all kinds.
leaves = st.sampled_from([None, False, True, 0, 1, 0.0, 2, "auto", "false", "FALSE", "true", "x", [], [0]])
switches = st.recursive(
    leaves,
    lambda inner: st.dictionaries(st.sampled_from(["enabled", "a", "autotp_size", "tp_size"]), inner, max_size=3),
)


@settings(deadline=None, max_examples=300)
@given(switches)
def test_off_is_off_in_the_schema_as_when_read(value):
    """The schema's `off` is `asks_for_nothing`, decided by another program."""
    value = json.loads(json.dumps(value))
    assert fits(value, SCHEMA["$defs"]["off"]) == asks_for_nothing(value)


def test_every_marked_key_has_its_state():
    """Catches: a mark that the schema does not show."""
    for path in all_keys(Document):
        owner: object = Document
        rule: dict = SCHEMA
        info = None
        for name in path:
            info = owner.model_fields[name]
            owner = section_of(info.annotation) or owner
            rule = next((one for one in (rule, *rule.get("anyOf", [])) if "properties" in one), {})["properties"][name]
        for mark in info.metadata:
            if isinstance(mark, NoEffect):
                assert mark.reason in rule["description"]
            if isinstance(mark, NotBuilt):
                assert mark.what in rule["description"]
