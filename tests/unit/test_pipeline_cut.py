"""Models that are cut into stages where they are, and those that cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.errors import ConfigError, DataError, ModelError, PipelineError
from zeroxide.parallel.pipe import PipelineModule
from zeroxide.parallel.pipe.row import find_row
from zeroxide.plan.discover import STAND_IN

WIDTH = 4


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in (
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "x"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)


class Model(nn.Module):
    """Blocks with something before, after and around them."""

    def __init__(self, blocks=4, gives_tuple=False):
        super().__init__()
        self.embed = nn.Embedding(8, WIDTH)
        self.final = nn.LayerNorm(WIDTH)  # before the blocks in the module, and after them in forward
        self.blocks = nn.ModuleList(Block(gives_tuple) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 8, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def begin(self, ids):
        return self.embed(ids)

    def between(self, hidden, at):
        return hidden

    def extra(self, ids, hidden):
        return ids.ne(0)

    def forward(self, ids):
        hidden = self.begin(ids)
        extra = self.extra(ids, hidden)
        for at, block in enumerate(self.blocks):
            given = block(self.between(hidden, at), extra)
            hidden = given[0] if isinstance(given, tuple) else given
        return self.head(self.final(hidden))


class Block(nn.Module):
    def __init__(self, gives_tuple=False):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.gives_tuple = gives_tuple

    def forward(self, hidden, extra):
        made = hidden + torch.tanh(self.inner(hidden))
        return (made, None) if self.gives_tuple else made


IDS = torch.tensor([[1, 2, 3]])


def test_a_row_is_found_with_what_runs_around_it():
    row = find_row(Model(gives_tuple=True), IDS)
    assert (row.name, row.count, row.gives, row.keyword) == ("blocks", 4, 2, None)
    assert {name: sorted(runs) for name, runs in row.runs.items()} == {
        "embed": ["before"],
        "final": ["after"],
        "head": ["after"],
        "unused": [],
    }


class Between(Model):
    def between(self, hidden, at):
        return 2 * hidden


class Learned(Model):
    def extra(self, ids, hidden):
        return hidden.mean()


class Backwards(Model):
    def forward(self, ids):
        hidden = self.begin(ids)
        for block in reversed(self.blocks):
            hidden = block(hidden, None)
        return hidden


class Some(Model):
    def forward(self, ids):
        return self.blocks[0](self.begin(ids), None)


class Adapter(Model):
    def between(self, hidden, at):
        return self.unused(hidden[..., :2]) if at == 2 else hidden


class Beside(Model):
    def forward(self, ids):
        return super().forward(ids), self.blocks[1].inner.weight.square().sum()


def without_list():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def shared():
    model = Model()
    model.blocks[3].inner.weight = model.blocks[0].inner.weight
    return model


REFUSED = {
    "no list": (without_list, "has no nn.ModuleList of two blocks"),
    "another value between blocks": (Between, "a block, number 1, that is not given what the one before gave"),
    "an argument that is learned": (Learned, "whose argument 1 is made of parameters"),
    "another order": (Backwards, "blocks that do not run once each in their order: number 3 after -1"),
    "blocks that do not run": (Some, "has 4 blocks and runs 1 of them"),
    "parameters between blocks": (Adapter, "unused between its blocks"),
    "a loss of each block": (Beside, "depend on blocks.1.inner.weight otherwise than through its last block"),
    "a model that fails": (lambda: nn.ModuleDict({"a": Model()}), "could not be rehearsed"),
    "weights shared by stages": (shared, "is shared by a block and something on another stage"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_stages_could_not_run_is_refused_in_one_line(second_of_two, case):
    make, line = REFUSED[case]
    with pytest.raises(ModelError, match=line) as refused:
        PipelineModule.from_model(make(), 2, example=IDS)
    assert "\n" not in str(refused.value)


def test_what_a_model_takes_must_be_known(second_of_two):
    with pytest.raises(ModelError, match="what it takes is not known: give example"):
        PipelineModule.from_model(Model(), 2)


@pytest.mark.parametrize("gives_tuple", [False, True])
def test_stages_of_one_model_are_the_model(monkeypatch, gives_tuple):
    """Catches: a block that runs twice or not at all, blocks that give something else than they did, and parameters
    that no stage, or one too many, has."""
    torch.manual_seed(0)
    whole = Model(5, gives_tuple)
    expected = whole(IDS)
    names = {}
    hidden = None
    for rank in range(3):
        for name, value in (("RANK", str(rank)), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        model = Model(5, gives_tuple)
        model.load_state_dict(whole.state_dict())
        cut = PipelineModule.from_model(model, 3, example=IDS, partition_method="uniform")
        names[rank] = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        args, kwargs = cut.arguments(rank, hidden, IDS)
        hidden = cut.module(*args, **kwargs)
        assert sum(bool(block.__dict__.get(STAND_IN)) for block in model.blocks) == 5 - len(cut.blocks_of(rank))
    assert torch.equal(hidden, expected)
    assert cut.ties() == {"embed.weight": (0, 2)}
    blocks = [
        {f"blocks.{at}.inner.{name}" for at in own for name in ("weight", "bias")} for own in ((0, 1), (2, 3), (4,))
    ]
    table = {"embed.weight", "head.weight"}
    assert names[0] == blocks[0] | table | {"unused.weight", "unused.bias"}
    assert names[1] == blocks[1]
    assert names[2] == blocks[2] | table | {"final.weight", "final.bias"}


def test_a_part_of_a_model_does_not_run_by_itself(second_of_two):
    cut = PipelineModule.from_model(Model(), 2, example=IDS)
    with pytest.raises(PipelineError, match="is cut into stages, and this rank has a part of it"):
        cut.module(IDS)
    with pytest.raises(DataError, match="the same batches as all others"):
        cut.arguments(1, torch.zeros(1, 3, WIDTH), None)
    with pytest.raises(ModelError, match="gave no loss"):
        cut.loss_of({"logits": IDS}, IDS)


def test_a_cut_is_undone(second_of_two):
    """Catches: blocks, parameters or forwards that a failed construction leaves out."""
    from zeroxide.parallel.pipe.cut import cut_model

    model = Model()
    before = [*map(id, model.modules())], [*model.state_dict()], model(IDS)
    cut = cut_model(model, 2, example=IDS)
    assert [*model.state_dict()] != before[1]
    cut.restore()
    assert ([*map(id, model.modules())], [*model.state_dict()]) == before[:2]
    assert torch.equal(model(IDS), before[2])


# --- engines of one rank ---------------------------------------------------------------------------------------------

CONFIG = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 3, "optimizer": {"type": "AdamW"}}


def engine_of(**more):
    layers = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    module = PipelineModule(layers, num_stages=1, loss_fn=nn.functional.mse_loss)
    return zeroxide.initialize(model=module, config={**CONFIG, **more})[0]


def pairs(count):
    return iter([(torch.randn(1, WIDTH), torch.randn(1, WIDTH)) for _ in range(count)])


def test_a_pipeline_runs_steps_as_a_whole():
    engine = engine_of()
    for call in (lambda: engine(IDS), lambda: engine.backward(torch.zeros(())), engine.step):
        with pytest.raises(PipelineError, match="a pipeline runs steps as a whole"):
            call()
    with torch.no_grad(), pytest.raises(PipelineError, match=r"inside torch.no_grad\(\)"):
        engine.train_batch(pairs(3))
    with pytest.raises(DataError, match="rank 0 has no data"):
        engine.train_batch()
    engine.destroy()


def test_data_that_ends_inside_a_step_ends_training():
    """Catches: a step over what was left, and a line that does not say how much that was."""
    engine = engine_of()
    engine.set_dataiterator(pairs(5))
    engine.train_batch()
    with pytest.raises(
        StopIteration, match="the data of rank 0 ended before step 2: 2 of 3 micro-batches were left over"
    ):
        engine.train_batch()
    with pytest.raises(StopIteration, match="no micro-batch was left"):
        engine.train_batch()
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (1, 3, 3)
    engine.destroy()


def test_a_loader_begins_again_and_an_evaluation_leaves_it_where_it_is():
    """Catches: data of training that an evaluation takes, and a mode that it leaves behind."""
    engine = engine_of()
    data = [*pairs(4)]
    seen = []
    engine.set_batch_fn(lambda pair: seen.append(pair[0]) or pair)
    engine.set_dataloader(data)
    engine.train_batch()
    loss, logits = engine.eval_batch(pairs(2), return_logits=True, num_micro_batches=2)
    assert loss.dim() == 0
    assert [each.shape for each in logits] == [(1, WIDTH)] * 2
    assert engine.module.training
    each = engine.eval_batch(iter(data), reduce_output=None)
    assert torch.stack(each).mean().item() == pytest.approx(engine.eval_batch(iter(data)).item())
    assert len(engine.eval_batch(iter(data), compute_loss=False)) == 3
    del seen[:]
    engine.train_batch()
    assert [*map(id, seen)] == [id(data[at][0]) for at in (3, 0, 1)]
    engine.destroy()


def test_a_changed_batch_size_changes_the_schedule():
    engine = engine_of()
    engine.set_train_batch_size(2)
    engine.train_batch(pairs(2))
    assert engine.pipeline_schedule().micro_batches == engine.micro_batches == 2
    assert (engine.is_first_stage(), engine.is_last_stage(), engine.num_stages, engine.stage_id) == (True, True, 1, 0)
    engine.destroy()


CONTRADICTIONS = {
    "stages": ({"pipeline": {"stages": 2}}, "2 in pipeline.stages and 1 in the PipelineModule"),
    "partition": ({"pipeline": {"partition": "uniform"}}, "the model is cut already by 'parameters'"),
    "schedule": ({"pipeline": {"schedule": "gpipe"}}, "the model is cut already by '1f1b'"),
    "durable": ({"zeroxide": {"durable_every": 1}, "zero_optimization": {"stage": 1}}, "commits of a pipeline"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_that_contradicts_the_model_is_refused(case):
    config, line = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=line):
        engine_of(**config)


def test_a_config_says_nothing_of_stages_where_there_are_none():
    with pytest.raises(ConfigError, match="and there is no pipeline"):
        zeroxide.initialize(model=nn.Linear(2, 2), config={**CONFIG, "pipeline": {"schedule": "gpipe"}})


def test_layers_are_recomputed_as_the_config_says():
    engine = engine_of(pipeline={"activation_checkpoint_interval": 1})
    assert engine.module.activation_checkpoint_interval == 1
    engine.train_batch(pairs(3))
    engine.destroy()
