"""Activations that wait for backward on disk: the bits of those in memory, what memory they leave, and disks that fail.

The oracle is the same engine without them, which other tests hold against plain PyTorch, and PyTorch itself for what it
refuses.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroxide
from zeroxide.config import Activations, load
from zeroxide.errors import ConfigError, ModelError, StorageError
from zeroxide.plan.checks import check_activations
from zeroxide.zero import activations_on_disk
from zeroxide.zero.activation_file import BUFFERS

WIDTH, LAYERS, BATCH = 32, 12, 64
ROW = BATCH * WIDTH * 4
"""Bytes of what a block takes and gives: half of a segment."""
MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch) -> Iterator[None]:
    """Tensors of 1 KiB and more are kept, and no hook stays."""
    monkeypatch.setattr(activations_on_disk, "MIN_BYTES", 1024)
    yield
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.up(x).chunk(2, dim=-1)
        return x + functional.dropout(self.down(torch.cat((functional.gelu(first), second), -1)), 0.25)


class Model(nn.Module):
    """how: "plain", or the kind of checkpointing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.how == "plain" else checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.head(x).square().mean()


def started(folder: Path, how: str | nn.Module = "plain", stage: int = 3, home: str = "disk", **own: Any):
    torch.manual_seed(0)
    if home != "memory":
        own = {"activation_path": str(folder / "activations"), "activation_buffers": 4 * max(ROW, 16384)} | own
    disk = {"device": "nvme", "nvme_path": str(folder / "state")}
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": own.pop("micro_batches", 1),
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage, **({"offload_param": disk} if stage == 3 else {})},
        "zeroxide": {"threads": 1, "activations": home, **own},
    }
    model = how if isinstance(how, nn.Module) else Model(how)
    return zeroxide.initialize(model=model, config=config)[0]


def data(seed: int) -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed))


def outcome(engine: Any, micro_batches: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for seed in range(3 * micro_batches):
        torch.manual_seed(seed)
        loss = engine(data(seed))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = dict(engine.module_state_dict())
    engine.destroy()
    return losses, weights


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("how", ["plain", "reentrant", "other"])
def test_the_bits_are_those_in_memory(how, stage, tmp_path):
    """Catches: a piece read from the wrong place, a view at the wrong offset, what is saved again after a change."""
    plain = outcome(started(tmp_path, how, stage, "memory"))
    engine = started(tmp_path, how, stage)
    file = engine.parts.activations.file
    found = outcome(engine)
    assert_same(found, plain)
    assert len(set(found[0])) == 3, "training does something"
    assert file.written > 0
    assert file.read > 0
    assert list((tmp_path / "activations").iterdir()) == []
    if how != "plain":
        # Inputs of blocks and of the head alone, two of which fill a segment.
        assert file.written <= 3 * (LAYERS + 2) * ROW


def test_checkpoints_alone_go_to_the_disk_and_come_back_once(tmp_path):
    """The inputs of the first layer, the blocks and the head, two of which fill a segment, and 4 segments stay in the
    buffers. Catches: what is read twice, and what checkpointing computes again and saves."""
    engine = started(tmp_path, "other")
    file = engine.parts.activations.file
    outcome(engine)
    segments = (LAYERS + 2) // 2
    assert file.written in (3 * segments * file.size, 3 * (segments - 1) * file.size)
    assert file.read == 3 * (segments - BUFFERS) * file.size


def test_several_micro_batches(tmp_path):
    """Catches: places of the file that are given away while a further micro-batch needs them."""
    found = [outcome(started(tmp_path, home=home, micro_batches=3), 3) for home in ("disk", "memory")]
    assert_same(*found)


def test_micro_batches_that_are_under_way_together(tmp_path):
    """Two forwards, and their backwards in either order. Catches: a segment that the other's backward gives away."""
    found = []
    for home in ("memory", "disk"):
        for order in ((0, 1), (1, 0)):
            engine = started(tmp_path, home=home)
            torch.manual_seed(3)
            losses = [engine(data(0)), engine(data(1))]
            for at in order:
                losses[at].backward()
            grads = [zeroxide.safe_get_full_grad(each) for each in engine.module.parameters()]
            engine.destroy()
            found.append(grads)
    for plain, kept in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))


def test_layer_by_layer(tmp_path):
    """A thread for each micro-batch. Catches: hooks that only the first of them has."""
    engine = started(tmp_path)
    engine.backward(engine(data(0)))
    alone = engine.parts.activations.file.most
    engine.destroy()
    found = []
    for home in ("memory", "disk"):
        engine = started(tmp_path, home=home, micro_batches=3, accumulation_order="layers", micro_batch_seeds=True)
        torch.manual_seed(1)
        losses = [float(engine.train_batch(iter([data(0), data(1), data(2)]))) for _ in range(2)]
        if home == "disk":
            assert engine.parts.activations.file.most > 2 * alone
        weights = dict(engine.module_state_dict())
        engine.destroy()
        found.append((losses, weights))
    assert_same(*found)


class Square(torch.autograd.Function):
    """Saves its input and its output."""

    @staticmethod
    def forward(ctx, x):
        result = x * x
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, grad):
        x, result = ctx.saved_tensors
        assert torch.equal(x * x, result)
        return 2 * x * grad


class Odd(nn.Module):
    """What is not the whole of a storage, not contiguous, not floating point, an output, or the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.randn(BATCH, WIDTH))
        self.act = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x) * self.scale
        y = Square.apply(y.t()[3:29]) + torch.exp(y.t()[4:30])
        kept = y.sort(dim=1).values[:, ::2]
        return kept.to(torch.bfloat16).float().square().mean() + y.expand(3, *y.shape).square().mean()


def test_views_and_outputs(tmp_path):
    """Catches: an offset counted from the storage's start, a stride that is lost, a buffer that is copied."""
    found = []
    for home in ("memory", "disk"):
        torch.manual_seed(0)
        engine = started(tmp_path, Odd(), home=home)
        found.append(outcome(engine))
    assert_same(*found)


def test_a_slice_of_a_large_tensor_is_copied_alone(tmp_path):
    """Catches: a data set that goes to the disk with every batch of it."""
    engine = started(tmp_path)
    large = torch.randn(64 * BATCH, WIDTH)
    store = engine.parts.activations
    view = store.keep(large[BATCH : 2 * BATCH])
    assert view.stowed.nbytes == ROW
    assert torch.equal(store.bring(view), large[BATCH : 2 * BATCH])
    shared = torch.frombuffer(bytearray(8 * ROW), dtype=torch.float32)
    assert store.keep(shared) is None, "memory that is not torch's is not free afterwards"
    del view
    engine.destroy()


def test_what_is_saved_again_after_a_change_is_what_it_is_then(tmp_path):
    """Catches: a storage that is known, and has other values by now."""
    engine = started(tmp_path)
    store, values = engine.parts.activations, torch.randn(BATCH, WIDTH)
    before, first = values.clone(), store.keep(values)
    values.add_(1.0)
    second = store.keep(values)
    assert torch.equal(store.bring(first), before)
    assert torch.equal(store.bring(second), values)
    del first, second
    engine.destroy()


def test_what_was_changed_in_place_is_refused_as_torch_does(tmp_path):
    """Catches: values of another moment than autograd asks for."""

    class Changing(Model):
        def forward(self, x):
            y = self.first(x)
            z = y.sigmoid()
            loss = (z * z).mean()
            z.add_(1.0)
            return loss

    engine = started(tmp_path, Changing("plain"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.backward(engine(data(0)))
    engine.destroy()


def test_a_graph_that_is_kept_has_its_backward_twice(tmp_path):
    """Catches: what is given away with the first backward."""
    found = []
    for home in ("memory", "disk"):
        engine = started(tmp_path, home=home)
        torch.manual_seed(3)
        loss = engine(data(0))
        loss.backward(retain_graph=True)
        other = engine(data(1))
        other.backward()
        loss.backward()
        found.append([zeroxide.safe_get_full_grad(each) for each in engine.module.parameters()])
        del loss, other
        engine.destroy()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_backward_after_the_end_is_refused(tmp_path):
    engine = started(tmp_path)
    loss = engine(data(0))
    store = engine.parts.activations
    engine.destroy()
    with pytest.raises(ModelError, match="destroyed"):
        loss.backward()
    store.close()


# Disks that fail ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own that has room for two segments."""
    target = tmp_path / "small"
    target.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "none", target], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs rights that this process lacks: {mounted.stderr.decode()}")
    yield target
    subprocess.run(["umount", "-l", target], check=True)


def test_a_full_disk_ends_forward_with_one_line_and_training_goes_on(small_disk, tmp_path):
    """Catches: an error that hangs, that comes without the directory, or that leaves the engine of no use."""
    engine = started(tmp_path, "other", activation_path=str(small_disk))
    with pytest.raises(
        StorageError, match=r"(?s)activations in .*small could not be written: .*(space|free)"
    ) as caught:
        engine(data(0))
    assert "\n" not in str(caught.value)
    assert caught.value.path == str(small_disk)
    loss = engine(data(0)[:4])
    engine.backward(loss)
    engine.step()
    engine.destroy()


def test_a_reservation_that_does_not_fit_is_refused_at_the_start(small_disk, tmp_path):
    with pytest.raises(StorageError, match=r"1048576 bytes cannot be reserved: No space") as caught:
        started(tmp_path, activation_path=str(small_disk), activation_disk="1MiB")
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("kept")
    for name, said in (("file/below", "Not a directory"), ("no/where", "No such file")):
        with pytest.raises(StorageError, match=said):
            started(tmp_path, activation_path=str(tmp_path / name))


def test_an_error_in_backward_is_one_line(tmp_path):
    """Catches: a backward that hangs, or goes on with other values."""
    engine = started(tmp_path)
    loss = engine(data(0))
    os.ftruncate(engine.parts.activations.file._descriptor, 0)
    with pytest.raises(StorageError, match=r"activations in .* (could not be read|another checksum)") as caught:
        engine.backward(loss)
    assert "\n" not in str(caught.value)
    engine.destroy()


def test_a_file_that_is_full_leaves_the_rest_in_memory(tmp_path, caplog):
    """Catches: a limit that is exceeded, or that ends training."""
    found = []
    for home, own in (("memory", {}), ("disk", {"activation_disk": "1MiB", "activation_buffers": "1MiB"})):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(12)))
        engine = started(tmp_path, model, home=home, **own)
        x = torch.randn(BATCH, 512, generator=torch.Generator().manual_seed(0))
        losses = []
        for _ in range(2):
            loss = engine(x).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if home == "disk":
            file = engine.parts.activations.file
            assert file.most <= file.limit * file.size == 1 << 20
        engine.destroy()
        found.append(losses)
    assert found[0] == found[1]
    assert sum("activation_disk" in each for each in caplog.messages) == 1


# The config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"activations": "disk"}, "activation_path: required"),
        (
            {"activations": "memory", "activation_path": "/a"},
            'activation_path: needs zeroxide.activations "disk" or',
        ),
        (
            {"activation_disk": "1GiB"},
            'activation_disk: needs zeroxide.activations "disk", or zeroxide.act',
        ),
        ({"activation_buffers": "1MiB"}, "activation_buffers: needs"),
        ({"activation_path": "/a"}, 'activation_path: with zeroxide.activations "auto" it needs zeroxide.host_memory'),
        (
            {"activations": "disk", "activation_path": "/a", "activation_buffers": 4096},
            "at least 65536 bytes, got",
        ),
        ({"activations": "disk", "activation_path": "/a", "activation_disk": "1MiB"}, "at least activation_buffers"),
    ],
)
def test_keys_that_do_not_go_together(own, said):
    with pytest.raises(ConfigError, match=said):
        load({"zeroxide": own})


def test_a_device_has_the_other_key():
    with pytest.raises(ConfigError, match="cpu_checkpointing true"):
        load(
            {
                "zeroxide": {"activations": "disk", "activation_path": "/a"},
                "activation_checkpointing": {"cpu_checkpointing": True},
            }
        )
    config = load({"zeroxide": {"activations": "disk", "activation_path": "/a"}})
    with pytest.raises(ConfigError, match="computes on cuda"):
        check_activations(config, torch.device("cuda"))
    check_activations(config, torch.device("cpu"))


def test_the_directory_is_that_of_the_state_where_none_is_named():
    disk = {"device": "nvme", "nvme_path": "/there"}
    zero = {"stage": 3, "offload_optimizer": disk}
    found = load({"zeroxide": {"activations": "disk"}, "zero_optimization": zero})
    assert found.activations == Activations("disk", Path("/there"), None, 64 * MIB)


def test_the_plan_counts_the_buffers_and_says_where(tmp_path):
    """Catches: memory that the budget does not know of."""
    plans = []
    for home in ("memory", "disk"):
        own = {} if home == "memory" else {"activation_buffers": "32MiB", "activation_disk": "128MiB"}
        engine = started(tmp_path, home=home, **own)
        plans.append(engine.plan())
        if home == "disk":
            assert engine.memory()["activations"]["current"] == 32 * MIB
        engine.destroy()
    line = f"activations on disk in {tmp_path / 'activations'}, 128 MiB reserved, through 32 MiB of buffers"
    assert line in plans[1].describe()
    assert not any("activations on disk" in each for each in plans[0].describe())
    assert abs(plans[1].resident_before - plans[0].resident_before - 32 * MIB) < 24 * MIB
