"""What DeepSpeed 0.19.8 submits in a step, on one GPU, written down from its source.

Lines are those of the released source, `deepspeed/runtime/zero/`:

- Weights in host memory (stage 3, `offload_param`): `partitioned_param_coordinator.py:310` fetches what a module needs,
  waits, and prefetches at least `stage3_prefetch_bucket_size` elements (5e7) more, while no more than
  `stage3_max_live_parameters` (1e9) are on the device. On one rank a fetch is a copy on the all-gather stream, and
  waiting lets the host wait for that whole stream (`partition_parameters.py:61`), then the model's stream for it.
  Released is what no module uses again within `stage3_max_reuse_distance` (1e9) elements (`634`).
- Gradients, stage 3 (`stage3.py:1618`, `1632`, `2006`, `1443`): copied into a bucket of `reduce_bucket_size` elements
  (5e8) on a stream of their own; when it is full, each goes down in bf16, up again, and down in fp32. The host waits
  while more than two buckets are under way, and for all of it at the end of backward (`1407`).
- Gradients, stage 2 (`stage_1_and_2.py:2239`, `1888`, `1600`): a bucket goes down in fp32, on the model's own stream,
  or with `overlap_comm`, false unless it is set, on one of its own, for which the model's stream waits when the next
  bucket is full, and the host at the end of backward (`1026`).
- Step (`stage3.py:2873`, `2979`, `1235`, `2854`; `stage_1_and_2.py:3075`): by groups of 1e9 elements at stage 3, all at
  once at stage 2: gradients are scaled (8 bytes a parameter), parameters updated (28) and rounded to bf16 (6), all by
  the CPU. Weights that are at home on the device then go up: at stage 3 after each group, from memory that is not
  page-locked, for which the host waits.

Left out in its favour: norms, the host's time in hooks, small parameters one by one, what its copies on the device take
of the device's memory bandwidth, weights that it fetches for the backward of an embedding, and that what is released is
only free for fetches once the device has passed it.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline import llama
from timeline.model import COMPUTE, Action, Copy, Event, Host, Mark, Wait, Work

LIVE, REUSE, GROUP = 1e9, 1e9, 1e9
SCALE_BYTES, UPDATE_BYTES, ROUND_BYTES = 8, 28, 6
FETCH, REDUCE = "all-gather", "reduce"


@dataclass(frozen=True)
class Settings:
    """What a config says. weights_on_device: no `offload_param`."""

    stage: int
    weights_on_device: bool
    overlap: bool
    bucket: float = 5e8
    prefetch: float = 5e7

    @property
    def card_bytes(self) -> float:
        """Bytes of weights in use and of buckets."""
        buckets = 2 if self.stage == 2 and self.overlap else 1
        return 2 * buckets * self.bucket + (0 if self.weights_on_device else 2 * LIVE)


class Order:
    """Writes the record of some steps."""

    def __init__(self, costs: llama.Costs, settings: Settings) -> None:
        self.costs, self.settings = costs, settings
        self.record: list[Action] = []
        self.events = 0
        # Vectors are below the threshold from which parameters leave the GPU.
        matrices = [name for name, shape in costs.shapes.items() if len(shape) > 1]
        self.embedding = [name for name in matrices if "embed" in name]
        self.head = [name for name in matrices if "lm_head" in name]
        layers = [name for name in matrices if "layers." in name]
        numbers = sorted({int(name.split(".")[2]) for name in layers})
        self.layers = [[name for name in layers if int(name.split(".")[2]) == number] for number in numbers]
        self.trace: list[str] = []
        """Parameters in the order in which modules use them in a step."""
        self.at = 0
        self.queued = 0
        """How far of it has been fetched or prefetched."""
        self.live: set[str] = set()
        self.coming: set[str] = set()
        self.bucket: list[str] = []
        self.under_way: list[int] = []

    def steps(self, count: int) -> list[Action]:
        """The record of so many steps."""
        forward = [*self.embedding, *(name for layer in self.layers for name in layer), *self.head]
        again = [name for layer in reversed(self.layers) for name in (*layer, *reversed(layer))]
        for _ in range(count):
            self.trace, self.at, self.queued = [*forward, *self.head, *again], 0, 0
            self.live.clear()
            self.coming.clear()
            for name in forward:
                self.compute(name, self.costs.forward(name))
            for name in self.head:
                self.differentiate(name)
            for layer in reversed(self.layers):
                for name in layer:
                    self.compute(name, self.costs.forward(name))
                for name in reversed(layer):
                    self.differentiate(name)
            for name in self.embedding:
                self.gradient(name)
            self.end_backward()
            self.update()
            self.record.append(Mark())
        return self.record

    def event(self, stream: str) -> int:
        self.events += 1
        self.record.append(Event(stream, self.events))
        return self.events

    def differentiate(self, name: str) -> None:
        self.compute(name, self.costs.backward(name))
        self.gradient(name)

    def compute(self, name: str, flop: float) -> None:
        if not self.settings.weights_on_device:
            self.fetch(name)
        self.record.append(Work(COMPUTE, flop=flop, what=name))
        self.at += 1
        if not self.settings.weights_on_device:
            self.release(name)

    # Weights --------------------------------------------------------------------------------------------------------

    def fetch(self, name: str) -> None:
        self.queued = max(self.queued, self.at + 1)
        if name not in self.live:
            self.send_up(name)
        arrived = self.event(FETCH)
        if name in self.coming:
            self.coming.discard(name)
            self.record.append(Wait(None, arrived))
        self.record.append(Wait(COMPUTE, arrived))
        most = min(LIVE - sum(map(self.costs.numel, self.live)), self.settings.prefetch)
        ahead = 0
        while self.queued < len(self.trace) and ahead < most:
            following = self.trace[self.queued]
            self.queued += 1
            if following not in self.live:
                ahead += self.costs.numel(following)
                self.send_up(following)

    def send_up(self, name: str) -> None:
        self.live.add(name)
        self.coming.add(name)
        self.record.append(Copy(FETCH, "up", 2 * self.costs.numel(name), name))

    def release(self, name: str) -> None:
        if name in self.trace[self.at : self.queued]:
            # What was prefetched for a later use stays for it.
            return
        passed = 0
        for following in self.trace[self.at :]:
            if passed >= REUSE:
                break
            if following == name:
                return
            passed += self.costs.numel(following)
        self.live.discard(name)

    # Gradients ------------------------------------------------------------------------------------------------------

    def gradient(self, name: str) -> None:
        if self.settings.stage == 3:
            self.record.append(Wait(REDUCE, self.event(COMPUTE)))
        full = sum(map(self.costs.numel, self.bucket)) + self.costs.numel(name) > self.settings.bucket
        if full and self.bucket:
            self.reduce()
        self.bucket.append(name)

    def reduce(self) -> None:
        if self.settings.stage == 3:
            if len(self.under_way) > 2:
                self.record.append(Wait(None, self.under_way.pop(0)))
            for name in self.bucket:
                size = self.costs.numel(name)
                ways = Copy(REDUCE, "down", 2 * size), Copy(REDUCE, "up", 2 * size), Copy(REDUCE, "down", 4 * size)
                self.record += ways
            self.under_way.append(self.event(REDUCE))
        else:
            stream = REDUCE if self.settings.overlap else COMPUTE
            if self.settings.overlap:
                self.record += [Wait(REDUCE, self.event(COMPUTE)), Wait(COMPUTE, self.event(REDUCE))]
            self.record += [Copy(stream, "down", 4 * self.costs.numel(name), name) for name in self.bucket]
        self.bucket = []

    def end_backward(self) -> None:
        self.reduce()
        overlaps = self.settings.stage == 3 or self.settings.overlap
        self.record += [Wait(None, self.event(stream)) for stream in ((REDUCE, COMPUTE) if overlaps else (COMPUTE,))]
        self.under_way.clear()

    # Step -----------------------------------------------------------------------------------------------------------

    def update(self) -> None:
        total, done = float(self.costs.total), 0.0
        while done < total:
            size = min(GROUP if self.settings.stage == 3 else total, total - done)
            self.record.append(Host((SCALE_BYTES + UPDATE_BYTES + ROUND_BYTES) * size, what="update"))
            done += size
            if self.settings.weights_on_device:
                self.record.append(Copy(COMPUTE, "up", 2 * size))
                if self.settings.stage == 3:
                    self.record.append(Wait(None, self.event(COMPUTE)))
