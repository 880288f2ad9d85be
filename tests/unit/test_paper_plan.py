"""`zeroxide plan` of ranks on paper, beside numbers counted out here; and what it refuses."""

from __future__ import annotations

import json

import pytest

from zeroxide.cli import main
from zeroxide.parallel.pipe.schedule import make_schedule, most_kept

pytest.importorskip("transformers")

LAYERS, WIDTH, HEADS, KEYS, FEATURES, VOCABULARY, TOKENS = 6, 64, 8, 4, 96, 128, 32
BF16 = 2


@pytest.fixture
def model(tmp_path):
    """A Llama-like model."""
    shape = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FEATURES,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
        "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return str(tmp_path)


@pytest.fixture
def experts(tmp_path):
    """A Mixtral-like model of 8 experts, of which a token takes 2."""
    shape = {
        "model_type": "mixtral", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FEATURES,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
        "max_position_embeddings": 64, "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return str(tmp_path)


def planned(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--sequence", str(TOKENS), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def sent(rank: dict) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in rank["sent"]:
        found[each["kind"]] = found.get(each["kind"], 0) + each["nbytes"]
    return found


def test_a_thousand_ranks_hold_and_send_what_formulas_say(model, capsys):
    """Catches: a part of another rank, a micro-batch too few or too many, a sum of tensor ranks left out."""
    pp, tp, shard, count = 3, 4, 128, 5
    words = model, "--ranks", str(pp * tp * shard), "--mesh", f"pp={pp},tp={tp}", "--micro-batches"
    found, single = planned(capsys, *words, str(count)), planned(capsys, *words, "1")
    hidden = TOKENS * WIDTH * BF16
    block = (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH * KEYS // HEADS + 3 * WIDTH * FEATURES) // tp + 2 * WIDTH
    table = VOCABULARY * WIDTH // tp
    ring = 2 * (tp - 1) * hidden // tp
    for rank, each in enumerate(found["ranks"]):
        blocks = LAYERS // pp
        ends = table * (rank in (0, pp - 1)) + WIDTH * (rank == pp - 1)
        assert each["parameters"] == blocks * block + ends
        assert each["in_flight"] == min(count, pp - rank)
        moved = sent(each)
        neighbours = 2 - (rank in (0, pp - 1))
        assert moved["stages"] == count * neighbours * hidden
        # Two sums a layer each way, the lookup, and the gradient of what the head takes, whose logits are gathered.
        head = ring + (tp - 1) * TOKENS * (VOCABULARY // tp) * BF16
        assert moved["tensor"] == count * (4 * blocks * ring + ring * (rank == 0) + head * (rank == pp - 1))
        # Units are padded to equal slices; every micro-batch sends all of them.
        assert moved["gradients"] == count * sent(single["ranks"][rank])["gradients"]
        assert moved["weights"] == sent(single["ranks"][rank])["weights"]
    assert found["bubble"] == pytest.approx((pp - 1) / (count + pp - 1))
    assert found["tokens"] == TOKENS * count * shard


def test_tokens_travel_to_experts_and_back(experts, capsys):
    """Catches: one of the four ways left out, rows that stay on the rank counted with the others."""
    ep, count = 4, 2
    found = planned(capsys, experts, "--ranks", "16", "--mesh", f"ep={ep}", "--micro-batches", str(count))
    (each,) = found["ranks"]
    rows = TOKENS * 2 * (ep - 1) // ep
    assert sent(each)["tokens"] == count * LAYERS * 4 * rows * WIDTH * BF16
    alone = planned(capsys, experts, "--ranks", "16", "--mesh", "dp_shard=16", "--micro-batches", str(count))
    weights = LAYERS * 8 * 3 * WIDTH * FEATURES
    assert alone["ranks"][0]["parameters"] - each["parameters"] == weights * (ep - 1) // ep


def test_heads_travel_for_tokens(model, capsys):
    """Catches: keys and values counted as queries, one way alone."""
    sp = 4
    found = planned(capsys, model, "--ranks", "8", "--mesh", f"sp={sp}", "--stage", "1")
    tokens = TOKENS // sp
    there = tokens * (HEADS + 2 * KEYS) * (WIDTH // HEADS) * BF16 * (sp - 1) // sp
    back = tokens * HEADS * (WIDTH // HEADS) * BF16 * (sp - 1) // sp
    assert sent(found["ranks"][0])["sequences"] == LAYERS * 2 * (there + back)


def test_activations_are_those_of_all_micro_batches_in_flight(model, capsys):
    """GPipe keeps all, 1F1B as many as there are stages to come. Catches: one counted alone."""
    words = model, "--ranks", "2", "--mesh", "pp=2", "--micro-batches", "6"
    ordered = planned(capsys, *words, "--schedule", "1f1b")["ranks"][0]
    everything = planned(capsys, *words, "--schedule", "gpipe")["ranks"][0]
    assert (ordered["in_flight"], everything["in_flight"]) == (2, 6)
    one = (everything["activations"] - ordered["activations"]) / 4
    assert one == int(one)
    assert one > 0
    less = planned(capsys, *words, "--schedule", "gpipe", "--checkpointing")["ranks"][0]
    assert less["activations"] < everything["activations"] / 2


def test_bytes_in_flight_follow_the_order():
    """Catches: what is outstanding beside the peak left out, or counted twice."""
    order = make_schedule("gpipe", 2, 1, 3).orders[0]
    assert most_kept(order, {0: 10}, {0: 25}) == (3, 45)
    order = make_schedule("1f1b", 2, 1, 3).orders[1]
    assert most_kept(order, {1: 10}, {1: 25}) == (1, 25)


def test_the_table_says_the_same(model, capsys):
    words = ["plan", model, "--ranks", "32", "--mesh", "pp=2,tp=2,dp_replicate=2", "--sequence", str(TOKENS)]
    assert main([*words, "--micro-batches", "8"]) == 0
    out = capsys.readouterr().out
    assert "on 32 ranks: pp 2 x dp_replicate 2 x dp_shard 4 x tp 2" in out
    assert "schedule 1f1b: 11.1 % bubble" in out
    assert "held by a rank\n" in out
    assert "sent by a rank in a step\n" in out


REFUSED = [
    ("tp 3 does not divide the 8 ranks", "--ranks", "8", "--mesh", "tp=3"),
    ("dp_replicate 2 * dp_shard 2 = 4, and there are 8", "--ranks", "8", "--mesh", "dp_replicate=2,dp_shard=2"),
    ("6 layers cannot be cut into 8 stages: each needs at least one", "--ranks", "8", "--mesh", "pp=8"),
    ("4 heads of keys and values, which 8 tensor ranks cannot share", "--ranks", "8", "--mesh", "tp=8"),
    ("8 attention heads over 16 ranks", "--ranks", "16", "--mesh", "sp=16", "--stage", "1"),
    ("32 tokens over 3 ranks", "--ranks", "3", "--mesh", "sp=3", "--stage", "1"),
    ("expected axes once each with their sizes", "--ranks", "8", "--mesh", "pp:2"),
    ("--schedule 1f1b:x: expected a name", "--ranks", "8", "--mesh", "pp=2", "--schedule", "1f1b:x"),
    ("--host-memory is for ranks on this host", "--ranks", "8", "--mesh", "pp=2", "--host-memory", "4GiB"),
    ("--micro-batches is for ranks on paper", "--ranks", "8", "--micro-batches", "4"),
    ("--ranks 4096 on this host: at most 1024", "--ranks", "4096"),
    (
        "backward is in halves",
        *("--ranks", "8", "--mesh", "pp=2", "--stage", "3", "--schedule", "zbv_zero_bubble:2", "--micro-batches", "8"),
    ),
]


@pytest.mark.parametrize(("line", "words"), [(each[0], each[1:]) for each in REFUSED])
def test_what_cannot_be_cut_is_refused_in_one_line(line, words, model, capsys):
    assert main(["plan", model, "--sequence", str(TOKENS), *words]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_blocks_of_rows_over_axes_are_refused(model, tmp_path, capsys):
    """Catches: a plan of matrices in one piece for a run that has them in blocks."""
    config = tmp_path / "run.json"
    config.write_text('{"zeroxide": {"row_bytes": "1MiB"}}')
    words = ["--ranks", "2", "--mesh", "dp_shard=2", "--sequence", str(TOKENS), "--config", str(config)]
    assert main(["plan", model, *words]) == 2
    assert "zeroxide.row_bytes over several axes is not counted" in capsys.readouterr().err


def test_experts_that_do_not_divide_are_refused(experts, capsys):
    assert main(["plan", experts, "--ranks", "3", "--mesh", "ep=3", "--sequence", "32"]) == 2
    assert "has 8 experts, which 3 ranks cannot share alike" in capsys.readouterr().err
