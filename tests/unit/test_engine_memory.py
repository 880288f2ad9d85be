"""What the engine holds: released weights, constant buckets, and nothing at all after `destroy`."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import FAMILIES, Gpt, batches, build, loss_of, next_token_loss
from running import COVERING, Mode, assert_released, config_of, started, weights_of
from torch import nn
from untrimmed import trimming

from zeroxide import _core
from zeroxide.errors import BudgetError

DISK = Mode("nvme", "nvme", "split", 2, "io_uring", 8192, 1 << 20)


@pytest.mark.parametrize("family", ["gpt", "gpt-reentrant", "hf-llama", "hf-t5", "used-twice", "block-lists"])
@pytest.mark.parametrize("mode", COVERING[1:4], ids=str)
def test_evaluation_gives_the_plain_results_and_releases_everything(family, mode, tmp_path):
    (batch,) = batches(family, 1)
    plain = build(family).eval()
    with torch.no_grad():
        expected = loss_of(plain(**batch))
    with started(build(family), config=config_of(mode, tmp_path, "fp32")) as engine:
        engine.eval()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert torch.equal(loss_of(engine(**batch)), expected)
            assert_released(engine)
        engine.train()
        engine.backward(loss_of(engine(**batch)))
        engine.step()
        assert_released(engine)


def test_evaluation_between_forward_and_backward_changes_nothing(tmp_path):
    first, second = batches("gpt", 2)
    norms = []
    for between in (False, True):
        with started(build("gpt"), config=config_of(DISK, tmp_path)) as engine:
            loss = engine(**first)
            if between:
                with torch.no_grad():
                    engine(**second)
            engine.backward(loss)
            engine.step()
            norms.append((loss.item(), float(engine.get_global_grad_norm())))
    assert norms[0] == norms[1]


def test_a_graph_can_be_used_twice(tmp_path):
    (batch,) = batches("gpt", 1)
    norms = []
    for times in (1, 2):
        with started(build("gpt"), config=config_of(DISK, tmp_path, "fp32")) as engine:
            loss = engine(**batch)
            for _ in range(times):
                loss.backward(retain_graph=True)
                assert_released(engine)
            engine.step()
            norms.append(float(engine.get_global_grad_norm()))
    assert norms[1] == 2 * norms[0], "twice the same gradient: a power of two is exact"


def test_generation_works_under_no_grad(tmp_path):
    plain = build("hf-gpt2").eval()
    prompt = torch.tensor([[3, 1, 4]])
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(prompt, **arguments)
    with started(build("hf-gpt2"), config=config_of(DISK, tmp_path, "fp32")) as engine:
        engine.eval()
        assert torch.equal(engine.module.generate(prompt, **arguments), expected)
        assert_released(engine)


@dataclass
class Opaque:
    """An output whose tensors no hook can find."""

    loss: torch.Tensor


class OpaqueOutput(Gpt):
    def forward(self, input_ids):
        return Opaque(next_token_loss(self.logits(input_ids), input_ids))


def test_an_output_of_an_unknown_kind_trains(tmp_path):
    (batch,) = batches("gpt", 1)
    found = []
    for kind in (Gpt, OpaqueOutput):
        torch.manual_seed(0)
        with started(kind(), config=config_of(DISK, tmp_path)) as engine:
            loss = loss_of(engine(**batch))
            engine.backward(loss)
            engine.step()
            assert_released(engine)
            found.append((loss.item(), float(engine.get_global_grad_norm())))
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", [Mode("cpu", "cpu", "split", 2), *COVERING[1:]], ids=str)
def test_no_payload_is_allocated_after_warm_up(mode, tmp_path):
    feed = batches("gpt", 24)
    with started(build("gpt"), config=config_of(mode, tmp_path, gradient_accumulation_steps=2)) as engine:
        after = []
        for batch in feed:
            engine.backward(engine(**batch))
            engine.step()
            usage = engine.memory()
            after.append({name: usage[name] for name in ("weights", "gradients", "optimizer", "staging", "gathered")})
        assert all(usage == after[3] for usage in after[3:])
        assert sum(bucket["current"] for bucket in after[-1].values()) == engine.memory()["total"]["current"]
        expected = engine.plan().buckets
        assert {name: bucket["current"] for name, bucket in after[-1].items()} == expected


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return sorted(found)


def eventually(condition, seconds: float = 10.0) -> bool:
    """Threads end a little after they are told to: wait for the fact, not for a time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("mode", [Mode("cpu", "cpu", "split", 2), *COVERING[1:]], ids=str)
@pytest.mark.parametrize("when", ["after steps", "between forward and backward", "at once"])
def test_destroy_leaves_nothing_behind(mode, when, tmp_path):
    def live():
        (batch,) = batches("gpt", 1)
        model = build("gpt")
        with started(model, config=config_of(mode, tmp_path)) as engine:
            if when != "at once":
                loss = engine(**batch)
                if when == "after steps":
                    engine.backward(loss)
                    engine.step()
            if "nvme" in (mode.param, mode.optimizer):
                assert list(tmp_path.iterdir()) != []
        assert list(tmp_path.iterdir()) == [], "the engine still exists; destroy does not wait for its end"
        engine.destroy()  # a second time does nothing
        with pytest.raises(RuntimeError, match="destroyed: make another one"):
            engine(**batch)
        assert all(param.numel() == 0 for param in model.parameters())

    live()  # torch starts threads and opens files of its own the first time
    gc.collect()
    threads, files = tasks(), descriptors()
    live()
    gc.collect()
    assert eventually(lambda: tasks() <= threads), f"{tasks()} threads, {threads} before"
    assert descriptors() == files
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == 1 or all(thread.daemon for thread in threading.enumerate()[1:])


def test_a_failed_start_leaves_nothing_behind(tmp_path):
    files = descriptors()
    with (
        pytest.raises(ValueError, match="lr_scheduler"),
        started(
            build("gpt"),
            config=config_of(DISK, tmp_path),
            optimizer=None,
            lr_scheduler=torch.optim.lr_scheduler.StepLR(
                torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(3)]), 1
            ),
        ),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == files


class Copied:
    """Weights of a model on the meta device, from a real one. Notes what it was asked for."""

    def __init__(self, real: nn.Module) -> None:
        self.real = real
        self.names: list[str] = []

    def fill(self, tensors, modules):
        weights, buffers = dict(self.real.named_parameters()), dict(self.real.named_buffers())
        with torch.no_grad():
            for name, tensor in tensors.items():
                assert tensor.dtype == torch.float32
                assert tensor.device.type == "cpu"
                tensor.copy_(weights[name])
                self.names.append(name)
            for prefix, module in modules.items():
                for name, buffer in module.named_buffers(recurse=False):
                    buffer.copy_(buffers[f"{prefix}.{name}" if prefix else name])


@pytest.mark.parametrize("family", ["gpt", "partly-frozen", "used-twice", "hf-llama", "hf-gpt2", "conv"])
@pytest.mark.parametrize("mode", COVERING[1:4:2], ids=str)
def test_a_model_on_the_meta_device_is_the_real_one(family, mode, tmp_path):
    real = build(family)
    with torch.device("meta"):
        empty = FAMILIES[family].build()
    source = Copied(real)
    config = config_of(mode, tmp_path, "fp32")
    (batch,) = batches(family, 1)
    found = []
    for model, weights in ((build(family), None), (empty, source)):
        with started(model, config=config, weights=weights) as engine:
            loss = loss_of(engine(**batch))
            engine.backward(loss)
            engine.step()
            found.append((loss.item(), engine.get_global_grad_norm(), weights_of(engine)))
    assert sorted(source.names) == sorted(name for name, _ in real.named_parameters())
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(value, found[1][2][name]) for name, value in found[0][2].items())


def test_files_hold_what_the_plan_says(tmp_path):
    with started(build("gpt"), config=config_of(DISK, tmp_path)) as engine:
        size = sum(path.stat().st_size for path in Path(tmp_path).rglob("blocks*"))
        assert size >= engine.plan().disk_bytes
        assert engine.io()["write_bytes"] > 0


def test_slots_between_ranks_are_within_the_budget():
    """They are reserved last: one byte less than everything takes is refused for them, with the user's exception."""

    def core(limit):
        adam = _core.Adam(
            lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True, bias_correction=True
        )
        unit = _core.UnitSpec(
            name="only", params=[(1000, True)], weights=_core.WeightHome.HOST, state=_core.StateHome.HOST,
            optimizer=adam, format="fp32",
        )  # fmt: skip
        settings = _core.Settings(
            limit=limit, threads=1, compute="f32", grad="f32", tile_elements=4096, staging_bytes=0, gathered_bytes=0,
            engine=_core.IoEngine.AUTO, queue_depth=16, directories=[], job="slots",
            mesh=_core.MeshPosition(rank=0, shards=2, replicas=1, transport=_core.Transport.SHARED),
        )  # fmt: skip
        return _core.Offload(settings, [unit])

    whole = core(None)
    total = whole.usage()["total"][0]
    whole.close()
    core(total).close()
    with pytest.raises(BudgetError, match=rf"bytes for gradients do not fit, .* of {total - 1} bytes"):
        core(total - 1)


@pytest.mark.parametrize("times", [2, 0])
def test_pages_of_libraries_are_dropped_twice_while_an_engine_is_made_or_never(times, tmp_path):
    # Catches: a key that is not read, a peak that has what importing touched, pages that an engine cannot do without.
    config = config_of(DISK, tmp_path, "fp32")
    config["zeroxide"]["trim_libraries"] = times > 0
    (batch,) = batches("gpt", 1)
    with trimming() as dropped, started(build("gpt"), config=config) as engine:
        engine.backward(engine(**batch))
        engine.step()
    assert len(dropped) == times
    # torch alone has more than that in pages that hold what its file holds.
    assert sum(dropped) >= times * (1 << 20)


def test_a_budget_that_has_room_without_pages_of_libraries_is_no_mistake(tmp_path):
    """The budget lacks 8 MiB for what is resident when the engine is made; pages that only importing has touched are
    more. Catches: a budget that is refused for what goes in a moment."""
    config = config_of(DISK, tmp_path, "fp32")
    with started(build("gpt"), config=config) as engine:
        payload = engine.plan().expected_peaks()["total"]
    config["zeroxide"]["host_memory"] = _core.resident()["rss"] + payload - (8 << 20)
    with pytest.raises(BudgetError, match="the process already uses"), started(build("gpt"), config=config):
        pass
    with trimming() as dropped, started(build("gpt"), config=config) as engine:
        # A pass would take some of those pages back, for which this budget is not made.
        assert engine.plan().resident_before + payload <= config["zeroxide"]["host_memory"]
    assert len(dropped) == 3
