"""Errors of the core come with every value that they name, so that nobody has to parse their line."""

from __future__ import annotations

import inspect
import os
import re
import resource
import signal

import pytest
import torch

from zeroxide import _core, errors
from zeroxide.device.placement import spec
from zeroxide.errors import BudgetError, CoreError, InvalidValueError, ModelError, RanksError, StorageError

ELEMENTS = 8192
ADAM = {
    "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "decoupled": True,
    "bias_correction": True,
}  # fmt: skip


def core(directory, **more):
    settings = {
        "limit": None, "threads": 1, "compute": "f32", "grad": "f32", "tile_elements": 2048,
        "staging_bytes": 1 << 20, "gathered_bytes": 4 << 20, "engine": _core.IoEngine.THREADS, "queue_depth": 4,
        "directories": [directory], "job": "job", **more,
    }  # fmt: skip
    unit = _core.UnitSpec(
        name="layer", params=[(ELEMENTS, True)], weights=_core.WeightHome.DISK, state=_core.StateHome.DISK,
        optimizer=_core.Adam(**ADAM), format="fp32",
    )  # fmt: skip
    return _core.Offload(_core.Settings(**settings), [unit])


def filled(directory, **more):
    made = core(directory, **more)
    made.fill_begin(0, "weights")
    made.fill_param(0, 0, 0, spec(torch.randn(ELEMENTS)))
    made.fill_commit(0)
    return made


def numbers(error: BaseException) -> list[int]:
    """Whole numbers in the line of an error."""
    return [int(each) for each in re.findall(r"\b\d+\b", str(error))]


def test_a_budget_that_is_too_small(tmp_path):
    """Catches: an error that crosses as text alone, or with numbers in each other's place."""
    with pytest.raises(BudgetError) as caught:
        core(tmp_path, limit=100_000)
    error = caught.value
    # The gradients, fp32, in whole pages.
    assert (error.bucket, error.limit) == ("gathered", 100_000)
    assert {error.need, error.used, error.limit} <= set(numbers(error))
    assert error.used + error.need > error.limit


def test_a_unit_that_is_larger_than_the_memory_for_gathered_ones(tmp_path):
    with pytest.raises(BudgetError) as caught:
        core(tmp_path, gathered_bytes=0)
    error = caught.value
    assert (error.unit, error.need, error.capacity, error.held) == ("layer", ELEMENTS * 4, 0, 0)
    assert (error.limit, error.bucket) == (0, "gathered")


def test_a_directory_that_is_missing(tmp_path):
    with pytest.raises(StorageError) as caught:
        core(tmp_path / "a" / "b")
    assert caught.value.path == str(tmp_path / "a" / "b")
    assert caught.value.missing == str(tmp_path / "a")


def test_a_directory_that_another_run_holds(tmp_path):
    first = core(tmp_path)
    with pytest.raises(StorageError) as caught:
        core(tmp_path)
    assert caught.value.pid == os.getpid()
    assert caught.value.path == str(tmp_path / "job")
    first.close()


def test_a_disk_that_takes_no_more(tmp_path):
    """A limit on the size of files stands for a full disk. Catches: an error without the system's code."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(StorageError) as caught:
            core(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    error = caught.value
    assert error.errno is not None
    assert os.strerror(error.errno) in error.reason
    assert error.path == str(tmp_path / "job" / "blocks.bin")


def test_a_tile_that_is_not_what_was_written(tmp_path):
    made = filled(tmp_path)
    made.accumulate(0, 0, 0, spec(torch.ones(ELEMENTS)), True)
    made.step([_core.Adam(**ADAM)], 1.0)
    made.finish()
    (file,) = tmp_path.glob("*/blocks.bin")
    noise = os.urandom(file.stat().st_size)
    with file.open("r+b") as handle:
        handle.write(noise)
    made.accumulate(0, 0, 0, spec(torch.ones(ELEMENTS)), True)
    made.step([_core.Adam(**ADAM)], 1.0)
    with pytest.raises(StorageError) as caught:
        made.finish()
    error = caught.value
    assert error.path == str(file)
    assert error.block is not None
    assert error.block.startswith("unit 0 ")
    assert 0 <= error.tile < ELEMENTS // 2048
    assert error.expected != error.got
    assert {f"{error.expected:016x}", f"{error.got:016x}"} <= set(re.findall(r"[0-9a-f]{16}", str(error)))
    # Every later call tells the step and the cause.
    with pytest.raises(StorageError) as caught:
        made.gather(0)
    assert caught.value.step == 2
    assert str(error) == caught.value.cause
    made.close()


def test_calls_that_the_state_does_not_allow(tmp_path):
    made = core(tmp_path)
    with pytest.raises(CoreError) as caught:
        made.fill_commit(0)
    assert (caught.value.call, caught.value.what) == ("fill_commit", "no fill has begun")
    made.close()
    with pytest.raises(CoreError, match="already closed") as caught:
        made.gather(0)
    assert caught.value.call == "gather"
    assert isinstance(caught.value, RuntimeError)


def test_values_out_of_their_range():
    with pytest.raises(InvalidValueError) as caught:
        _core.Adam(**{**ADAM, "lr": -1.0})
    assert (caught.value.name, caught.value.value) == ("lr", -1.0)
    assert str(caught.value).startswith("lr is -1.0")
    assert isinstance(caught.value, ValueError)
    with pytest.raises(InvalidValueError) as caught:
        _core.state_tensors(_core.Adam(**ADAM), "fp32", "int4")
    assert caught.value.text == "int4"


@pytest.mark.parametrize("name", _core.RULES)
def test_a_rule_takes_its_hyperparameters_by_name_and_no_others(name):
    rule = _core.RULES[name]
    usual = rule.hyperparameters
    assert getattr(_core, rule.__name__) is rule
    assert list(inspect.signature(rule).parameters) == list(usual)
    assert rule(**usual) == rule(**usual)
    for each, value in usual.items():
        assert each in rule.__doc__
        other = (not value) if isinstance(value, bool) else value / 2 + 1e-3
        if each != "nesterov":
            assert rule(**{**usual, each: other}) != rule(**usual)
        with pytest.raises(TypeError, match=f"^argument '{each}': "):
            rule(**{**usual, each: "fast"})
        fewer = {key: number for key, number in usual.items() if key != each}
        with pytest.raises(TypeError, match=rf"{rule.__name__}.__new__\(\) misses .* '{each}'$"):
            rule(**fewer)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        rule(**usual, rate=1.0)
    with pytest.raises(TypeError, match="keyword arguments only"):
        rule(1e-3, **usual)
    with pytest.raises(TypeError, match=r"cannot create 'zeroxide\._core\.Rule' instances"):
        _core.Rule(**usual)


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "got torch.float64 (2, 3) on cpu with strides (3, 1)"),
        (torch.zeros(2, 3).t(), "got torch.float32 (3, 2) on cpu with strides (1, 3)"),
        (torch.zeros(2, device="meta"), "got torch.float32 (2,) on meta with strides (1,)"),
        (torch.eye(2).to_sparse(), "got torch.float32 (2, 2) on cpu with layout torch.sparse_coo"),
    ],
)
def test_tensors_that_the_core_cannot_take_are_named(tensor, got):
    """Catches: an address taken of memory that is elsewhere, of another type, or in another order."""
    with pytest.raises(ModelError, match="contiguous fp32, bf16, fp16, int64 or uint8 tensor in host memory") as caught:
        spec(tensor)
    assert str(caught.value).endswith(got)


def test_settings_take_the_core_s_words_and_no_others():
    """Catches: a word that stands for another home, one that is taken for a default, a tuple where a spec is meant."""
    assert _core.WeightHome("shard") == _core.WeightHome.SHARD != _core.WeightHome.HOST
    assert _core.IoEngine("io_uring") == _core.IoEngine.IO_URING
    with pytest.raises(ValueError, match=r'^unknown transport "smoke": expected shared or collective$'):
        _core.Transport("smoke")
    with pytest.raises(TypeError):
        _core.MeshPosition(rank=0, shards=2, replicas=1, transport="shared")
    with pytest.raises(TypeError):
        _core.Offload(None, [])


def test_every_value_of_the_core_has_a_place_in_python():
    """Catches: a value that the core passes on under a name that no class of `zeroxide.errors` tells of."""
    kinds = {
        "Storage": StorageError, "Memory": CoreError, "Optim": InvalidValueError, "Layout": InvalidValueError,
        "Exchange": RanksError,
    }  # fmt: skip
    source = (errors.__file__.rpartition("/python/")[0] or ".") + "/crates/zeroxide-offload/src/facts.rs"
    if not os.path.exists(source):
        pytest.skip("the core's source is not here")
    with open(source) as handle:
        text = handle.read()
    for name, kind in kinds.items():
        (listed,) = re.findall(rf"facts_of!\(self, {name}Error:(.*?)\)\n", text, re.DOTALL)
        for variant, fields in re.findall(r"(\w+) \{([^}]*)\}", listed):
            names = {field for field, note in re.findall(r"(\w+): (\w+)", fields) if note not in ("system", "reason")}
            target = {"OverBudget": BudgetError, "Threads": CoreError, "Misuse": CoreError}.get(variant, kind)
            known = {*target.__annotations__, *target("x").__dict__}
            assert names <= known, (name, variant)
