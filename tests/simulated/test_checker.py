"""The checker against an oracle that knows no clocks: whether one operation can be reached from another in a graph."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

STREAMS = 3
HOST = -1
PIECE = 100
"""Elements that each operand has; operands of one tensor begin half as many apart."""


def overlap(some, others):
    """Whether any two of these operands, which are a tensor and the first element, share an element."""
    return any(a[0] == b[0] and abs(a[1] - b[1]) < PIECE for a in some for b in others)


@dataclass
class Node:
    """An operation: where it runs, what it touches, and what is known to be over before it begins."""

    actor: int
    reads: set[tuple[str, int]]
    writes: set[tuple[str, int]]
    after: set[int]


@dataclass
class Program:
    """Runs on the device step by step, and remembers in a graph what must be before what."""

    sim: object
    streams: list[torch.Stream]
    tensors: dict[str, torch.Tensor]
    nodes: list[Node] = field(default_factory=list)
    last: dict[int, set[int]] = field(default_factory=dict)
    events: dict[int, torch.Event] = field(default_factory=dict)

    def add(self, actor, reads, writes):
        number = len(self.nodes)
        after = self.last.get(actor, set()) | self.last.get(HOST, set())
        self.nodes.append(Node(actor, reads, writes, after))
        self.last[actor] = {number}
        return number

    def piece(self, name, start):
        return self.tensors[name][start : start + PIECE]

    def run(self, actor, target, source):
        """A copy, or an addition of what lies on the device to what lies there."""
        adds = target[0][0] == source[0][0] == "d" and target < source
        there, here = self.piece(*target), self.piece(*source)
        with self.streams[actor]:
            if adds:
                there.add_(here)
            else:
                there.copy_(here, non_blocking=True)
            number = self.add(actor, {source, target} if adds else {source}, {target})
            self.events[number] = torch.Event("sim")
            self.events[number].record()

    def touch(self, operand, write):
        tensor = self.piece(*operand)
        self.add(HOST, set() if write else {operand}, {operand} if write else set())
        self.sim.host_access(tensor.data_ptr(), tensor.nbytes, write, "the test")

    def wait(self, actor, number):
        """For the actor: it has seen that operation, and what that had seen."""
        if actor == HOST:
            self.events[number].synchronize()
        else:
            self.streams[actor].wait_event(self.events[number])
        self.last[actor] = self.last.get(actor, set()) | {number}

    def before(self, number):
        """All from which the node is reached."""
        reached, front = set(), set(self.nodes[number].after)
        while front:
            each = front.pop()
            if each not in reached:
                reached.add(each)
                front |= self.nodes[each].after
        return reached

    def races(self):
        found = []
        for number, node in enumerate(self.nodes):
            before = self.before(number)
            for other in set(range(number)) - before:
                theirs = self.nodes[other]
                conflict = overlap(node.writes, theirs.reads | theirs.writes) or overlap(node.reads, theirs.writes)
                if conflict and theirs.actor != node.actor:
                    found.append((other, number))
        return found


def drawn(program, numbers):
    """Ten operations, each after the waits that its operands need; some of the waits are left out."""
    for _ in range(10):
        actor = numbers.choice([HOST, *range(STREAMS)])
        names = numbers.sample(sorted(program.tensors), 2)
        target, source = ((name, numbers.randrange(0, 250, PIECE // 2)) for name in names)
        reads, writes = {source}, {target}
        if actor == HOST:
            reads, writes = numbers.choice([(reads, set()), (set(), writes)])
        if all(name[0] == "h" for name, _ in reads | writes) != (actor == HOST):
            continue
        for number, node in enumerate(program.nodes):
            needed = overlap(writes, node.reads | node.writes) or overlap(reads, node.writes)
            if node.actor != HOST and needed and numbers.random() < 0.9:
                program.wait(actor, number)
        if actor == HOST:
            program.touch(*(reads | writes), bool(writes))
        else:
            program.run(actor, target, source)


def test_races_are_those_of_the_graph(sim):
    sim.set_delay(0, 0)
    streams = [torch.Stream("sim") for _ in range(STREAMS)]
    tensors = {f"d{i}": torch.ones(300, device="sim") for i in range(3)}
    tensors |= {f"h{i}": torch.ones(300, pin_memory=True) for i in range(2)}
    verdicts = []
    for seed in range(3000):
        torch.accelerator.synchronize()
        sim.reset()
        program = Program(sim, streams, tensors)
        drawn(program, random.Random(seed))
        expected = program.races()
        assert bool(sim.races()) == bool(expected), (seed, expected, [str(each) for each in sim.races()])
        verdicts.append(bool(expected))
    assert 600 < sum(verdicts) < 2400, "both verdicts are common"
