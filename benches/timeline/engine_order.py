"""What zeroxide's engine submits in a step: recorded on the simulated device, with the sizes of the large model.

The simulated device is that of the tests (`tests/simulated`), which must have been loaded. Recorded are copies, the
events between streams and the host's waits as `zeroxide.device.transfers` makes them, products where modules compute
them, forward, recomputation and backward, gradients as they are added up, and updates as they are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from simulated import engines
from timeline import llama
from timeline.model import COMPUTE, Copy, Host, Mark, Work
from timeline.recorder import RecordedStream, Recorder

import zeroxide
from zeroxide.device import host_pool, transfers
from zeroxide.engine.engine import Engine
from zeroxide.plan import discover
from zeroxide.zero import saved_activations
from zeroxide.zero.gather.device_weights import memory_of
from zeroxide.zero.gather.weight_gather import SingleRankWeights
from zeroxide.zero.reduce import offload
from zeroxide.zero.reduce.offload import GradientOffload

MEASURE_BYTES, STORE_BYTES, ADD_BYTES = 2, 4, 6
"""That a bf16 gradient touches where it is measured in its place, copied there from a block, and added to others."""


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes that are others within."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def copies(recorder: Recorder) -> list[tuple[Any, str, Any]]:
    """Changes that have copies and the host's waits for them recorded."""
    copy, place_wait = torch.Tensor.copy_, transfers._Place.wait
    wait_up, send_up = transfers.Transfers.wait_up, transfers.Transfers.send_up
    stow, restore = transfers.Transfers.stow, transfers.Transfers.restore

    def copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if self.device != source.device and recorder.stream != COMPUTE:
            way = "down" if self.device.type == "cpu" else "up"
            recorder.add(Copy(recorder.stream, way, self.nbytes * recorder.scale))
        return copy(self, source, non_blocking)

    def wait(self: transfers._Place) -> None:
        recorder.wait(None, self.event)
        place_wait(self)

    def wait_all(self: transfers.Transfers) -> None:
        recorder.wait(None, self._last)
        wait_up(self)

    def send(self: Any, source: torch.Tensor, target: torch.Tensor, after: torch.Event | None) -> torch.Event:
        recorder.scale = recorder.sizes.get(source.data_ptr(), source.nbytes) / source.nbytes
        return send_up(self, source, target, after)

    def stow_(self: Any, source: torch.Tensor, *rest: Any) -> torch.Event:
        recorder.scale = llama.CHECKPOINT / source.numel()
        return stow(self, source, *rest)

    def restore_(self: Any, pieces: Any, target: torch.Tensor, *rest: Any) -> torch.Event:
        recorder.scale = llama.CHECKPOINT / target.numel()
        return restore(self, pieces, target, *rest)

    return [
        (torch.Tensor, "copy_", copy_),
        (transfers._Place, "wait", wait),
        (transfers._Block, "wait", wait),
        (transfers.Transfers, "wait_up", wait_all),
        (transfers.Transfers, "send_up", send),
        (transfers.Transfers, "stow", stow_),
        (transfers.Transfers, "restore", restore_),
    ]


def gradients_and_updates(recorder: Recorder) -> list[tuple[Any, str, Any]]:
    """Changes that have what the host does with its memory recorded, and backward."""
    take, add_first = GradientOffload.take, GradientOffload._add_first
    gather, after_step = SingleRankWeights._gather, SingleRankWeights.after_step

    def take_(self: GradientOffload, unit: Any, position: int, grad: torch.Tensor) -> None:
        name = unit.names[position]
        recorder.add(Work(COMPUTE, flop=recorder.costs.backward(name), what=f"backward {name}"))
        recorder.scale = recorder.costs.numel(name) / grad.numel()
        take(self, unit, position, grad)

    def add(self: GradientOffload) -> None:
        unit, position, start, download = self._under_way[0]
        scale = recorder.costs.numel(unit.names[position]) / torch.Size(unit.shapes[position]).numel()
        stored = STORE_BYTES if not self._core.has_gradient(unit.index, position) else ADD_BYTES
        elements = download.values.numel() * scale
        add_first(self)
        recorder.add(Host(nbytes=(MEASURE_BYTES if start is None else stored) * elements, what=f"add {unit.name}"))

    def gather_(self: SingleRankWeights, unit: Any) -> None:
        gather(self, unit)
        recorder.updated(unit.index)

    def after(self: SingleRankWeights) -> None:
        after_step(self)
        if self.params_always_full:
            recorder.updated()

    return [
        (GradientOffload, "take", take_),
        (GradientOffload, "_add_first", add),
        (SingleRankWeights, "_gather", gather_),
        (SingleRankWeights, "after_step", after),
    ]


def watch(engine: Engine, recorder: Recorder) -> None:
    """Has the streams of one engine and the products of its model recorded."""
    moved = engine.parts.transfers
    assert moved is not None, "it computes on the simulated device"
    current = moved.stream
    moved.stream = lambda: RecordedStream(current(), COMPUTE, recorder)  # type: ignore[method-assign]
    moved._up, moved._down = RecordedStream(moved._up, "up", recorder), RecordedStream(moved._down, "down", recorder)
    for unit in engine.parts.units:
        recorder.sizes[memory_of(unit).window.data_ptr()] = 2 * recorder.numel(unit.names)
    for name, module in engine.module.named_modules():
        if isinstance(module, torch.nn.Linear):
            # Recomputation calls them, too.
            work = Work(COMPUTE, flop=recorder.costs.forward(f"{name}.weight"), what=f"forward {name}")
            module.register_forward_pre_hook(lambda *_, work=work: recorder.add(work))


@contextmanager
def proportions() -> Iterator[None]:
    """Units, blocks and kept activations of 1/4096 of their bytes."""
    area = llama.SHRINK**2
    block = transfers.BLOCK_BYTES // area
    transfers.REGISTRIES["sim"] = engines.Registry
    with patched(
        (discover, "DEFAULT_UNIT_BYTES", discover.DEFAULT_UNIT_BYTES // area),
        (transfers, "BLOCK_BYTES", block),
        (transfers, "LEAVING_BYTES", transfers.LEAVING_BYTES // area),
        (offload, "BLOCK_BYTES", block),
        (saved_activations, "MIN_BYTES", 1024),
        (host_pool, "GRAIN", 2048),
    ):
        yield


def step(engine: Engine, recorder: Recorder, ids: torch.Tensor, micro_batches: int) -> None:
    """Forwards, backwards and an update."""
    for _ in range(micro_batches):
        logits = engine(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        engine.backward(loss)
        recorder.pending = [(unit.index, recorder.numel(unit.names)) for unit in engine.parts.units]
        engine.step()
    recorder.add(Mark())


def record(
    zero: dict[str, Any],
    steps: int,
    *,
    keep: bool = False,
    layers: int = llama.LAYERS,
    micro_batches: int = 1,
    delay: float = 0.0,
) -> Recorder:
    """The record of some steps after two that are not in it; `zero` is the config's section, `keep` whether activations
    wait in host memory, `delay` what every copy of these steps takes, in seconds."""
    recorder = Recorder(llama.Costs(llama.shapes(layers)))
    config = {
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, **zero},
        "activation_checkpointing": {"cpu_checkpointing": keep},
        "zeroxide": {"device": "sim", "threads": 1},
    }
    torch.manual_seed(0)
    model = llama.build(llama.SHRINK, layers)
    ids = torch.randint(0, llama.VOCABULARY // llama.SHRINK, (2, 8), device="sim")
    with proportions(), patched(*copies(recorder), *gradients_and_updates(recorder)):
        torch.sim.set_delay(0, 0)
        engine, *_ = zeroxide.initialize(model=model, config=config)
        watch(engine, recorder)
        for number in range(2 + steps):
            # What the checker of the device knows grows with every copy.
            torch.sim.reset()
            recorder.on = number >= 2
            if number == 2:
                torch.sim.set_delay(round(delay * 1e6), round(delay * 1e6))
            step(engine, recorder, ids, micro_batches)
        recorder.on = False
        torch.sim.set_delay(0, 0)
        engine.destroy()
    return recorder
