"""What tensor ranks exchange, draw and refuse: real processes over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import run_ranks
from tensor_models import LENGTH, ROWS, VOCABULARY

ENGINE = (
    f"sys.path.insert(0, {str(Path(__file__).parent)!r})"
    + """
import json
import torch.distributed as dist
from tensor_models import batch, build
import zeroxide
from zeroxide.parallel.tensor import group as exchange

def engine_of(model, tp=2, **more):
    config = {"tensor_parallel": {"autotp_size": tp}, "zero_optimization": {"stage": 3}, "steps_per_print": None}
    config |= more
    return zeroxide.initialize(model=model, config=config, lr=1e-3)[0]
"""
)

BYTES = (
    ENGINE
    + """
sent = {"all_reduce": [], "all_gather": []}
reduce, gather = dist.all_reduce, exchange.all_gather_single

def spied_reduce(tensor, *given, **named):
    sent["all_reduce"].append(tensor.nbytes)
    return reduce(tensor, *given, **named)

def spied_gather(output, tensor, **named):
    sent["all_gather"].append(tensor.nbytes)
    return gather(output, tensor, **named)

dist.all_reduce, exchange.all_gather_single = spied_reduce, spied_gather
rows = {}
for family in ("gpt2", "llama", "t5"):
    engine = engine_of(build(family))
    for step in range(2):
        sent["all_reduce"].clear(); sent["all_gather"].clear()
        before = engine.parts.tensor.group.sent
        engine.backward(engine(**batch(step)).loss)
        engine.step()
    rows[family] = [sum(sent["all_reduce"]), sum(sent["all_gather"]), engine.parts.tensor.group.sent - before]
    engine.destroy()
say(json.dumps(rows))
"""
)


def test_what_a_step_sends_is_what_the_formula_says():
    """With n bytes of activations, a layer sums n twice in forward and n twice in backward (Megatron-LM, arXiv
    1909.08053, section 3); queries, keys and values share one sum. A layer of T5's decoder has one pair more, of which
    keys and values sum over the encoder's tokens apart from queries. Embedding and head add a sum each, and the head a
    gather of logits, to the widest part.

    Catches: a sum for each of queries, keys and values, a gradient that is summed where none is needed, a gather that
    is padded to more than the widest part.
    """
    hidden = ROWS * LENGTH * 4
    layers, halves = 2, -(-VOCABULARY // 2)
    logits = hidden * halves
    expected = {
        "gpt2": hidden * 32 * (4 * layers + 2),
        "llama": hidden * 32 * (4 * layers + 2),
        # Encoder: 4 a layer. Decoder: 6 a layer, and one for keys and values of what the encoder gives. Two embeddings.
        "t5": hidden * 32 * (4 * layers + 7 * layers + 3),
    }
    for result in run_ranks(2, BYTES):
        assert result.code == 0, result.err[-3000:]
        for family, (reduced, gathered, counted) in json.loads(result.out).items():
            assert (family, reduced, gathered) == (family, expected[family], logits)
            # Between two ranks a ring sends a tensor's bytes once in all.
            assert counted == reduced + gathered


DROPOUT = (
    ENGINE
    + """
import zlib
from torch.nn import functional
drawn = []
real = functional.dropout

def spied(input, p=0.5, training=True, inplace=False):
    if training and p:
        drawn.append(zlib.crc32(torch.get_rng_state().numpy().data))
    return real(input, p, training, inplace)

functional.dropout = torch.nn.functional.dropout = spied
torch.manual_seed(7 + ranks.rank)
found = []
for checkpointed in (False, True):
    model = build("gpt2", dropout=0.2)
    model.set_attn_implementation("eager")
    if checkpointed:
        model.gradient_checkpointing_enable()
    model.train()
    torch.manual_seed(7 + ranks.rank)
    engine = engine_of(model)
    drawn.clear()
    losses = []
    for step in range(3):
        loss = engine(**batch(step), use_cache=False).loss
        if step == 0:
            found.append(list(drawn))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    found.append(losses)
    engine.destroy()
say(json.dumps(found))
"""
)


def test_what_is_cut_drops_apart_and_all_else_alike():
    """Attention probabilities are dropped within what is cut, the rest outside. Ranks come with different seeds.

    Catches: seeds that are left as they come, ranks that drop the same of different heads, a forward repeated by
    activation checkpointing that drops otherwise than the first.
    """
    results = run_ranks(2, DROPOUT)
    for result in results:
        assert result.code == 0, result.err[-3000:]
    (first, losses, again, repeated), (other, *rest) = (json.loads(result.out) for result in results)
    assert rest == [losses, rest[1], repeated]
    assert first == again
    assert losses == repeated
    # Embeddings, then for each of two layers attention (within), its output, and the feed-forward layer's.
    assert [mine == theirs for mine, theirs in zip(first, other, strict=True)] == [True] + 2 * [False, True, True]


APART = (
    ENGINE
    + """
engine = engine_of(build("llama"))
try:
    engine(**batch(ranks.rank))
except Exception as error:
    say(type(error).__name__, error)
engine.destroy()
# Dropout alone makes different random numbers matter.
engine = engine_of(build("gpt2", dropout=0.1))
torch.manual_seed(ranks.rank)
try:
    engine(**batch(0))
except Exception as error:
    say(type(error).__name__, error)
engine.destroy()
engine = engine_of(build("gpt2"))
torch.manual_seed(ranks.rank)
engine(**batch(0))
engine.destroy()
try:
    engine_of(build("llama" if ranks.rank else "gpt2"))
except Exception as error:
    say(type(error).__name__, error)
"""
)


def test_ranks_that_differ_are_refused_on_both():
    """Catches: a batch of each rank's own, which trains on nothing sensible in silence; replicas that drift apart since
    they drop differently; two models in one."""
    for result in run_ranks(2, APART):
        assert result.code == 0, result.err[-3000:]
        lines = result.out.splitlines()
        assert lines[0].startswith("RanksError ranks 0 and 1, which share every matrix, were given different samples")
        assert lines[1].startswith("RanksError ranks 0 and 1, which share every matrix, would draw different random")
        assert lines[2].startswith("RanksError ranks do not agree on model")
        assert len(lines) == 3


REFUSED = (
    ENGINE
    + """
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.up.weight

    def forward(self, x):
        return self.other(self.down(self.up(x)))

def rules(*specs, **more):
    return {"tensor_parallel": {"autotp_size": ranks.world, "partition_config": {"layer_specs": list(specs)}, **more}}

UP, DOWN = {"patterns": ["up"]}, {"patterns": ["down"], "partition_type": "row"}
before = build("llama").state_dict()
model, other = build("llama"), build("t5")
for make, more in (
    (lambda: model, {"tensor_parallel": {"autotp_size": ranks.world}}),
    (lambda: nn.Sequential(nn.Linear(4, 4)), {"tensor_parallel": {"autotp_size": ranks.world}}),
    (Tied, rules(UP, DOWN)),
    (lambda: nn.Sequential(nn.Conv1d(4, 4, 1)), rules({"patterns": ["0"]})),
    (Tied, rules({**UP, "shape": [3, -1]}, DOWN)),
    (Tied, rules({**UP, "partition_dim": 1}, DOWN)),
    (lambda: other, {"tensor_parallel": {"autotp_size": ranks.world, "vocab_parallel_lm_head": True}}),
):
    try:
        engine_of(make(), **more)
    except Exception as error:
        say(type(error).__name__, error)
# Also where it is refused after it was cut.
try:
    engine_of(model, tensor_parallel={"autotp_size": 2}, zeroxide={"host_memory": "1MiB"})
except Exception as error:
    say(type(error).__name__)
# What was refused is as it was.
say(all(torch.equal(before[name], each) for name, each in model.state_dict().items()), type(model.lm_head).__name__)
before = build("t5").state_dict()
say(all(torch.equal(before[name], each) for name, each in other.state_dict().items()), other.shared.num_embeddings)
"""
)


def test_what_cannot_be_cut_is_refused_by_name():
    """Catches: heads that are cut through, a model that trains uncut where nobody said how, a shared weight of which
    one user has a part, a model that is left half cut."""
    for result in run_ranks(4, REFUSED):
        assert result.code == 0, result.err[-3000:]
        lines = result.out.splitlines()
        expected = [
            "ModelError model.layers.0.self_attn.q_proj has 2 heads of keys and values, which 4 tensor ranks cannot",
            "ModelError Sequential has no tp_plan, and no rule cuts any of its layers: give tensor_parallel.partit",
            "ModelError other.weight is shared with a layer that is cut, and other has no rule",
            "ModelError 0 is a Conv1d, which partition_config.layer_specs asks to cut: expected nn.Linear",
            "ModelError up: 8 does not divide into 3 weights",
            "ModelError up.weight: partition_dim 1 contradicts its layer, a Linear",
            "ModelError tensor_parallel.vocab_parallel_lm_head: T5ForConditionalGeneration computes its loss",
        ]
        for line, start in zip(lines, expected, strict=False):
            assert line.startswith(start)
        assert lines[len(expected) :] == ["BudgetError", "True Linear", f"True {VOCABULARY}"]


@pytest.mark.timeout(120)
def test_rules_of_ones_own_train_a_model_without_a_plan():
    """A model of plain layers, cut as its config says, has the loss and the weights that it has in one process.

    Catches: fused weights that are cut as one, a rule that is not found, what `tp_model_init` was told forgotten.
    """
    for result in run_ranks(2, OWN):
        assert result.code == 0, result.err[-3000:]
        assert max(json.loads(result.out)) < 1e-6


OWN = (
    ENGINE
    + """
from torch import nn
from torch.nn import functional

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.both, self.down = nn.Linear(6, 20), nn.Linear(10, 4)

    def forward(self, x):
        gate, value = self.both(x).chunk(2, -1)
        return self.down(functional.silu(gate) * value)

specs = [{"patterns": ["both"], "shape": [2, -1]}, {"patterns": ["down"], "partition_type": "row"}]
x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
plain, model = Gated(), Gated()
zeroxide.tp_model_init(model, 2, torch.float32, {"partition_config": {"layer_specs": specs}})
config = {"zero_optimization": {"stage": 1}, "steps_per_print": None}
engine = zeroxide.initialize(model=model, config=config, lr=1e-3)[0]
optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
far = []
for step in range(3):
    loss, own = plain(x).square().mean(), engine(x).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    engine.backward(own)
    engine.step()
    far.append(abs(loss.item() - own.item()))
for name, param in engine.module.named_parameters():
    far.append((zeroxide.safe_get_full_fp32_param(param) - plain.get_parameter(name)).abs().max().item())
say(json.dumps(far))
engine.destroy()
"""
)


META = (
    ENGINE
    + """
FAMILY = sys.argv[1]

class Whole:
    # Of each unit, all of its tensors; rank 0's count.
    def fill(self, tensors, modules):
        model = build(FAMILY)
        for name, each in tensors.items():
            each.copy_(model.get_parameter(name).detach() + ranks.rank)
        for name, module in modules.items():
            for key, buffer in module._buffers.items():
                buffer.copy_(model.get_submodule(name)._buffers[key])

class Pieces(Whole):
    def pieces(self, name, shape):
        values = build(FAMILY).get_parameter(name).detach().view(-1) + ranks.rank
        assert values.numel() == shape.numel(), name
        for start in range(0, values.numel(), 100):
            yield start, values[start : start + 100]

found = []
for source in (None, Whole(), Pieces()):
    if source is None:
        engine = engine_of(build(FAMILY))
    else:
        with torch.device("meta"):
            model = build(FAMILY)
        config = {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 3}, "steps_per_print": None}
        engine = zeroxide.initialize(model=model, config=config, lr=1e-3, weights=source)[0]
    losses = []
    for step in range(2):
        loss = engine(**batch(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append([loss.item(), float(engine.get_global_grad_norm())])
    found.append(losses)
    engine.destroy()
say(json.dumps(found))
"""
)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_weights_that_are_made_are_cut(family):
    """A model on the meta device trains as one with weights.

    Catches: a part asked of a source that makes all, a weight of another rank than the first, norms within what is cut
    whose gradients nobody sums.
    """
    for result in run_ranks(2, META, [family]):
        assert result.code == 0, result.err[-3000:]
        plain, made, pieces = json.loads(result.out)
        assert plain == made == pieces


GENERATES = (
    ENGINE
    + """
for family in ("llama", "t5"):
    plain, engine = build(family).eval(), engine_of(build(family)).eval()
    asked = {"input_ids": batch(0)["input_ids"][:, :5], "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    asked["attention_mask"] = torch.ones_like(asked["input_ids"])
    assert torch.equal(plain.generate(**asked), engine.module.generate(**asked)), family
    engine.destroy()
"""
)


def test_generation_has_the_tokens_of_one_process():
    """Catches: caches of keys and values with all heads, logits that are this rank's part."""
    for result in run_ranks(2, GENERATES):
        assert result.code == 0, result.err[-3000:]
