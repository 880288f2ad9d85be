"""Layers, partitions, topologies and schedules of pipelines."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from zeroxide.errors import ConfigError, DataError, ModelError, RanksError
from zeroxide.parallel.pipe import (
    LayerSpec,
    PipeDataParallelTopology,
    PipelineModule,
    PipeModelDataParallelTopology,
    ProcessTopology,
    TiedLayerSpec,
    profile,
)
from zeroxide.parallel.pipe.halves import Halves
from zeroxide.parallel.pipe.nesting import flatten, rebuild
from zeroxide.parallel.pipe.partition import balanced, cut_by, uniform
from zeroxide.parallel.pipe.schedule import SCHEDULES, Action, Kind, make_schedule, rank_of_stage, simulate, stages_of


def ranks(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")


# --- partitions ------------------------------------------------------------------------------------------------------


def every_cut(count, parts):
    for inner in itertools.combinations(range(1, count), parts - 1):
        yield [0, *inner, count]


def heaviest(weights, bounds):
    return max(sum(weights[first:last]) for first, last in itertools.pairwise(bounds))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "weights", [[1] * 7, [9, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7], [0, 0, 3, 0, 3, 0, 0], [5, 0, 0, 0]]
)
def test_the_heaviest_part_is_as_light_as_any_cut_makes_it(weights, parts):
    """Catches: a cut that is not the best of all, which are tried, an empty part, and a layer that is left out."""
    found = balanced(weights, parts)
    assert found[0] == 0
    assert found[-1] == len(weights)
    assert all(first < last for first, last in itertools.pairwise(found))
    assert heaviest(weights, found) == min(heaviest(weights, each) for each in every_cut(len(weights), parts))


def test_parts_of_layers_by_each_method():
    names = ["Embedding", "Block", "Block", "Norm", "Block", "Block", "Head"]
    sizes = [40, 10, 10, 0, 10, 10, 0]
    assert uniform(7, 3) == [0, 3, 5, 7]
    assert cut_by("uniform", names, sizes, 2) == [0, 4, 7]
    assert cut_by("parameters", names, sizes, 2) == [0, 1, 7]
    # Each part has two of the four blocks, whatever else there is.
    first, last = cut_by("type:bLOCK", names, sizes, 2)[1], 7
    assert 3 <= first <= 4 < last
    assert cut_by("profile", names, sizes, 2, [1, 1, 1, 1, 1, 1, 6]) == [0, 6, 7]


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("halves", "expected 'parameters'"),
        ("type:Conv", "matches no layer; the layers are of A, B"),
        ("type:(", "regular"),
    ],
)
def test_a_partition_that_cannot_be_is_refused(method, line):
    with pytest.raises(ConfigError, match=line.replace("(", r"\(")):
        cut_by(method, ["A", "B"], [1, 1], 2)
    with pytest.raises(ConfigError, match="2 layers cannot be cut into 3 stages"):
        cut_by("uniform", ["A", "B"], [1, 1], 3)


# --- schedules -------------------------------------------------------------------------------------------------------

FORMULAS = {
    # (ranks - 1) turns of forward and backward are waited for, of 3 units each where forward takes 1 and backward 2; a
    # rank works for 3 units a micro-batch. GPipe: Huang et al. 2019, section 2.3; 1F1B: Narayanan et al. 2021, 2.2.1.
    "gpipe": lambda p, m, v: (p - 1) / (m + p - 1),
    "1f1b": lambda p, m, v: (p - 1) / (m + p - 1),
    # A turn is of one of v stages: Narayanan et al. 2021, section 2.2.2.
    "looped_bfs": lambda p, m, v: (p - 1) / (v * m + p - 1),
    "interleaved_1f1b": lambda p, m, v: (p - 1) / (v * m + p - 1),
    # Of a turn, backward of weights is filled in: (p - 1)(F + I - W) is left. Qi et al. 2024, table 2 (ZB-H1).
    "interleaved_zero_bubble": lambda p, m, v: (p - 1) / (3 * v * m + p - 1),
    "zbv_zero_bubble": lambda p, m, v: (p - 1) / (3 * v * m + p - 1),
    "dualpipe_v": lambda p, m, v: (p - 1) / (3 * v * m + p - 1),
}


@pytest.mark.parametrize("micro_batches", [8, 16, 32])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bubble_of_every_schedule_is_that_of_its_formula(name, micro_batches):
    """Catches: an order of another schedule, stages on other ranks, and a timeline that waits for nothing."""
    chunks = SCHEDULES[name].chunks or 2
    found = simulate(make_schedule(name, 4, chunks, micro_batches)).bubble
    assert found == pytest.approx(FORMULAS[name](4, micro_batches, chunks), rel=0.05)


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches"), list(itertools.product(["gpipe", "1f1b"], [1, 2, 3, 5], [1, 2, 7]))
)
def test_simple_schedules_take_any_number_of_micro_batches(name, ranks, micro_batches):
    """Catches torch 2.15's own order of 1F1B, which leaves out the last rank's first forward."""
    made = make_schedule(name, ranks, 1, micro_batches)
    wanted = {(kind, each) for kind in (Kind.FORWARD, Kind.BACKWARD) for each in range(micro_batches)}
    for rank, order in enumerate(made.orders):
        assert {(action.kind, action.micro_batch) for action in order} == wanted
        assert {action.stage for action in order} == {rank}
    most = {"gpipe": micro_batches, "1f1b": min(ranks, micro_batches)}[name]
    assert simulate(made).waiting[0] == most


def test_stages_of_ranks():
    assert [stages_of("interleaved_1f1b", rank, 3, 2) for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]
    assert [stages_of("dualpipe_v", rank, 3, 2) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    for name, count in (("interleaved_1f1b", 6), ("dualpipe_v", 6), ("1f1b", 3)):
        for stage in range(count):
            assert stage in stages_of(name, rank_of_stage(name, stage, 3), 3, count // 3)


def test_an_order_that_waits_for_ever_is_refused():
    made = make_schedule("1f1b", 2, 1, 2)
    turned = type(made)(made.name, 2, 1, 2, (made.orders[0], tuple(reversed(made.orders[1]))))
    with pytest.raises(ValueError, match="rank 0 waits for ever before B of micro-batch 0 in stage 0"):
        simulate(turned)
    short = type(made)(made.name, 2, 1, 2, (made.orders[0], made.orders[1][:-1]))
    with pytest.raises(ValueError, match="rank 0 waits for ever"):
        simulate(short)
    assert str(Action(Kind.FORWARD, 1, 2)) == "F of micro-batch 2 in stage 1"


def test_schedules_that_cannot_be_are_refused_by_name():
    with pytest.raises(ConfigError, match="expected one of gpipe, 1f1b"):
        make_schedule("2f2b", 2, 1, 2)
    with pytest.raises(ConfigError, match=r"1f1b has 1 stages a rank, and pipeline.stages_per_rank is 2"):
        make_schedule("1f1b", 2, 2, 2)
    with pytest.raises(ConfigError, match="does not take 3 micro-batches over 2 ranks: DualPipeV requires"):
        make_schedule("dualpipe_v", 2, 2, 3)


# --- what travels ----------------------------------------------------------------------------------------------------


def test_what_is_flattened_lives_no_longer_than_its_owners():
    """Catches: a cycle in flatten, which keeps activations and gradients until the collector comes by."""
    tensor = torch.ones(2)
    held = weakref.ref(tensor)
    gc.disable()
    try:
        structure, tensors = flatten({"a": (tensor, [1, None])}, "it")
        assert structure[0] == "dict"
        del tensor, tensors
        assert held() is None
    finally:
        gc.enable()


def test_containers_come_back_as_they_were():
    first, second = torch.zeros(2), torch.ones(3)
    given = {"a": (first, [second, None, 1.5]), "b": True, "c": ("x", {"d": first})}
    structure, tensors = flatten(given, "it")
    found = rebuild(structure, tensors)
    assert [id(each) for each in tensors] == [id(first), id(second), id(first)]
    assert repr(found) == repr(given)
    with pytest.raises(ModelError, match="what stage 1 gives has a set in it"):
        flatten((first, {1}), "what stage 1 gives")
    with pytest.raises(ModelError, match="sparse"):
        flatten(torch.eye(2).to_sparse(), "it")


# --- topologies ------------------------------------------------------------------------------------------------------


def test_a_topology_counts_through_the_last_axis_first():
    made = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    assert (made.get_axis_names(), made.world_size()) == (["pipe", "data", "model"], 12)
    assert made.get_rank(pipe=1, data=0, model=1) == 7
    assert made.get_coord(7) == (1, 0, 1)
    assert made.get_coord(7).data == 0
    assert made.get_axis_comm_lists("model") == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert made.get_axis_comm_lists("pipe")[0] == [0, 6]
    assert made.filter_match(pipe=0, model=1) == [1, 3, 5]
    assert made.get_axis_list("data", 2) == [4, 5, 10, 11]
    assert made.get_rank_repr(7) == "model_01"
    assert made.get_dim("pipe") == 2
    assert made.get_dim("other") == 0
    assert PipeDataParallelTopology(2, 2).get_axis_comm_lists("pipe") == [[0, 2], [1, 3]]


def test_a_topology_refuses_what_it_does_not_have():
    made = PipeDataParallelTopology(2, 2)
    for ask in (lambda: made.get_rank(pipe=2, data=0), lambda: made.get_rank(pipe=0), lambda: made.get_coord(4)):
        with pytest.raises(RanksError):
            ask()
    with pytest.raises(RanksError, match="a size of at least 1"):
        ProcessTopology(["a"], [0])


# --- modules of layers -----------------------------------------------------------------------------------------------


class Counted(nn.Linear):
    made = 0

    def __init__(self, width):
        super().__init__(width, width)
        Counted.made += not self.weight.is_meta


def test_a_rank_builds_its_own_layers_alone(monkeypatch):
    """Catches: layers of other stages that take memory, and names that count from the stage."""
    Counted.made = 0
    ranks(monkeypatch, 1, 2)
    made = PipelineModule([LayerSpec(Counted, 4) for _ in range(5)], num_stages=2, partition_method="uniform")
    assert Counted.made == 2
    assert [name for name, _ in made.named_parameters()] == ["3.weight", "3.bias", "4.weight", "4.bias"]
    assert (made.own_stages, made.stage_owner(2), made.stage_owner(3)) == ((1,), 0, 1)


def test_seeds_are_those_of_the_layer_in_the_whole_row(monkeypatch):
    specs = [LayerSpec(nn.Linear, 3, 3) for _ in range(4)]
    ranks(monkeypatch, 0, 1)
    whole = PipelineModule(specs, num_stages=1, seed_layers=True).state_dict()
    ranks(monkeypatch, 1, 2)
    part = PipelineModule(specs, num_stages=2, seed_layers=True).state_dict()
    assert part
    assert all(torch.equal(whole[name], values) for name, values in part.items())


def test_layers_run_one_after_the_other(monkeypatch):
    ranks(monkeypatch, 0, 1)
    first, last = nn.Linear(2, 3), nn.Linear(3, 2)
    made = PipelineModule([first, torch.relu, lambda x: (x, x), lambda pair: pair[0] + pair[1], last], num_stages=1)
    given = torch.randn(4, 2)
    assert torch.equal(made(0, given), last(2 * torch.relu(first(given))))


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_layers_are_recomputed_with_the_same_gradients(monkeypatch, interval):
    """Catches: a piece that is left out or runs twice."""
    ranks(monkeypatch, 0, 1)
    runs = []

    class Noted(nn.Linear):
        def forward(self, value):
            runs.append(self)
            return functional.gelu(super().forward(value))

    layers = [Noted(3, 3) for _ in range(5)]
    made = PipelineModule(layers, num_stages=1, activation_checkpoint_interval=interval)
    given = torch.randn(2, 3)
    made(0, given).sum().backward()
    assert len(runs) == 10
    gradients = [layer.weight.grad.clone() for layer in layers]
    made.zero_grad()
    made.activation_checkpoint_interval = 0
    made(0, given).sum().backward()
    assert all(torch.equal(layer.weight.grad, was) for layer, was in zip(layers, gradients, strict=True))


def tied(**more):
    return TiedLayerSpec(
        "e", nn.Embedding, 5, 3, forward_fn=lambda module, x: functional.linear(x, module.weight), **more
    )


def test_a_tied_layer_is_one_module(monkeypatch):
    ranks(monkeypatch, 0, 1)
    layers = [TiedLayerSpec("e", nn.Embedding, 5, 3), LayerSpec(nn.Linear, 3, 3), tied()]
    made = PipelineModule(layers, num_stages=1)
    assert [name for name, _ in made.named_parameters()] == ["1.weight", "1.bias", "tied_modules.e.weight"]
    assert made.ties() == {}
    ranks(monkeypatch, 1, 2)
    assert PipelineModule(layers, num_stages=2).ties() == {"tied_modules.e.weight": (0, 1)}


def test_all_of_a_tied_module_is_tied(monkeypatch):
    """Catches: parameters that tied_weight_attr does not name left to drift apart, and ranks that have no copy of a
    tied module reckoning with fewer ties than the others, which number them alike."""
    layers = [TiedLayerSpec("l", nn.Linear, 2, 2), nn.Linear(2, 2), TiedLayerSpec("l", nn.Linear, 2, 2)]
    for rank in range(3):
        ranks(monkeypatch, rank, 3)
        made = PipelineModule(layers, num_stages=3, partition_method="uniform")
        assert made.ties() == {"tied_modules.l.weight": (0, 2), "tied_modules.l.bias": (0, 2)}


class Table(nn.Embedding):
    @property
    def values(self):
        return self.weight


def test_a_tied_name_may_be_a_property(monkeypatch):
    ranks(monkeypatch, 0, 2)
    named = {"tied_weight_attr": "values"}
    layers = [TiedLayerSpec("e", Table, 5, 3, **named), nn.Linear(3, 3), TiedLayerSpec("e", Table, 5, 3, **named)]
    assert PipelineModule(layers, num_stages=2).ties() == {"tied_modules.e.weight": (0, 1)}


REFUSED = {
    "nothing says how many": (lambda: PipelineModule([nn.Linear(2, 2)]), ConfigError, "needs num_stages or topology"),
    "stages that do not divide": (
        lambda: PipelineModule([nn.Linear(2, 2)], 3),
        RanksError,
        "does not divide the 2 ranks",
    ),
    "another topology": (
        lambda: PipelineModule([nn.Linear(2, 2)], topology=PipeDataParallelTopology(2, 2)),
        RanksError,
        "is of 4 ranks, and there are 2",
    ),
    "no layer": (lambda: PipelineModule([3, nn.Linear(2, 2)], 2), ModelError, "layer 0 is 3: expected a module"),
    "no module class": (lambda: LayerSpec(torch.relu), ModelError, "expected a class of torch.nn.Module"),
    "nothing to do": (
        lambda: PipelineModule([LayerSpec(nn.Linear, 2, 2), torch.relu], 2),
        ModelError,
        "rank 1 of 2 of the pipeline has no parameter",
    ),
    "a tie that is not declared": (
        lambda: PipelineModule([(each := nn.Linear(2, 2)), each], 2),
        ModelError,
        "layers 0 and 1 share a parameter",
    ),
    "a tied name that is not there": (
        lambda: PipelineModule([LayerSpec(nn.Linear, 2, 2), tied(tied_weight_attr="table")], 2),
        ModelError,
        "names 'table', and Embedding has weight",
    ),
    "nothing to measure": (
        lambda: PipelineModule([nn.Linear(2, 2)] * 1 + [nn.Linear(2, 2)], 2, partition_method="profile"),
        ConfigError,
        "give profile_input",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_module_that_cannot_be_is_refused_in_one_line(monkeypatch, case):
    ranks(monkeypatch, 1, 2)
    make, kind, line = REFUSED[case]
    with pytest.raises(kind, match=line) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_measured_layers_are_cut_by_what_they_take(monkeypatch):
    """Catches: seconds of another layer, of the slowest round, and what a layer is given that is not from before it."""
    clock = [0.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: clock[0])

    class Timed(nn.Linear):
        def __init__(self, seconds):
            super().__init__(2, 2)
            self.seconds = seconds

        def forward(self, value):
            clock[0] += self.seconds.pop(0)
            return super().forward(value)

    times = [[3.0, 1.0, 2.0], [9.0, 8.0, 5.0], [1.0, 1.0, 1.0]]
    found = profile.measure_layers([lambda each=each: Timed(each) for each in times], torch.randn(1, 2))
    assert found == [1.0, 5.0, 1.0]


def test_a_batch_that_is_no_pair_is_refused(monkeypatch):
    ranks(monkeypatch, 0, 1)
    made = PipelineModule([nn.Linear(2, 2)], num_stages=1, loss_fn=functional.mse_loss)
    with pytest.raises(DataError, match=r"is a pair.*got 3 items"):
        made.arguments(0, None, (1, 2, 3))


# --- backward in halves ----------------------------------------------------------------------------------------------


class Crossed(nn.Module):
    """Used twice, beside what depends on no input, with outputs that meet."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.apart = nn.Parameter(torch.ones(2))
        self.normed = nn.LayerNorm(3)

    def forward(self, first, second):
        hidden = self.twice(self.normed(first)) * self.scale
        return torch.tanh(self.twice(hidden)) + second, hidden * second, self.apart * 2


@pytest.mark.parametrize("given", [0, 1, 2])
def test_halves_of_a_backward_are_the_whole(given):
    """Catches: a parameter that is accumulated in the first half, twice, or not at all, and what flows through others.

    given: how many of the inputs require a gradient.
    """
    torch.manual_seed(0)
    model = Crossed()
    values = torch.randn(2, 2, 3)
    seen = []
    for name, param in model.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))

    def run(halves):
        leaves = [value.clone().requires_grad_(at < given) for at, value in enumerate(values)]
        outputs = model(*leaves)
        gradients = [torch.full_like(each, 0.5) for each in outputs]
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        del seen[:]
        if halves:
            made = Halves(outputs, gradients, leaves)
            found = made.inputs()
            assert seen == []
            assert all(leaf.grad is None for leaf in leaves)
            made.weights()
        else:
            torch.autograd.backward(outputs, gradients)
            found = [leaf.grad for leaf in leaves]
        assert sorted(seen) == sorted(name for name, _ in model.named_parameters())
        taken = {name: param.grad for name, param in model.named_parameters()}
        model.zero_grad()
        return found, taken

    (inputs, params), (whole_inputs, whole_params) = run(True), run(False)
    assert all(torch.equal(one, other) for one, other in zip(inputs, whole_inputs, strict=True))
    for name, values_of in whole_params.items():
        # Sums of two uses, in another order.
        torch.testing.assert_close(params[name], values_of, rtol=4 * 2.0**-24, atol=2.0**-24)


def test_halves_of_a_loss_begin_with_one():
    weight = torch.tensor([2.0], requires_grad=True)
    leaf = torch.tensor([3.0], requires_grad=True)
    halves = Halves([(weight * leaf).sum()], [None], [leaf])
    assert halves.inputs() == [torch.tensor([2.0])]
    halves.weights()
    assert weight.grad == torch.tensor([3.0])


def test_nobody_pays_for_a_backward_that_is_not_split():
    """torch.distributed.pipelining imports torch's compiler and sympy, 80 MB. Catches: an import of it at the top."""
    said = "import sys, zeroxide; zeroxide.initialize; print('sympy' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "False"
