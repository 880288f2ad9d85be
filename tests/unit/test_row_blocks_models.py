"""Models of transformers, and models that were compiled, whose matrices are cut by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from running import Mode, config_of, started
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from zeroxide.cli.training.from_scratch import FromScratch
from zeroxide.cli.training.loss import without_logits
from zeroxide.cli.training.models import build_model, choose_model
from zeroxide.errors import ModelError
from zeroxide.rows import CutWeight, blocks_of

VOCABULARY, WIDTH = 500, 16
BLOCK = 128 * WIDTH * 4


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def config_for(directory: Path, rows: int | None = BLOCK) -> dict[str, Any]:
    config = config_of(Mode("nvme", "nvme"), directory, "fp32") | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    config["zeroxide"] |= {} if rows is None else {"row_bytes": rows}
    return config


def ids(step: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("way", ["plain", "checkpointing", "loss in chunks"])
def test_a_model_of_transformers_trains_and_is_saved(way: str, tmp_path: Path) -> None:
    """GPT-2, whose projection is its embedding: against the same in double. Two steps of SGD move weights by 0.1 times
    sums of at most 500 products of numbers below 1: 2 * 0.1 * 500 * 2^-24 < 1e-5. Catches: activations computed again
    without the block, a projection that is told its labels and sees no weight, a folder without the matrix."""
    model, plain = gpt2(), gpt2().double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    if way == "checkpointing":
        model.gradient_checkpointing_enable()
    elif way == "loss in chunks":
        without_logits(model, 100)
    with started(model.train(), config=config_for(tmp_path)) as engine:
        for step in range(2):
            engine.backward(engine(input_ids=ids(step), labels=ids(step)).loss)
            engine.step()
            optimizer.zero_grad()
            plain(input_ids=ids(step), labels=ids(step)).loss.backward()
            optimizer.step()
        assert blocks_of(model.lm_head) is blocks_of(model.transformer.wte)
        found = engine.module_state_dict()
        for name, values in plain.state_dict().items():
            torch.testing.assert_close(found[name].double(), values, rtol=0, atol=1e-5, msg=name)
        model.save_pretrained(tmp_path / "saved")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(values, found[name]) for name, values in again.state_dict().items())


def test_what_transformers_does_to_embeddings_works_or_is_refused(tmp_path: Path) -> None:
    """Catches: an embedding that is resized, or no longer shared, beside an engine that knows nothing of it."""
    model = gpt2()
    with started(model, config=config_for(tmp_path)) as engine:
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, CutWeight)
        assert model.get_output_embeddings().weight is weight
        model.tie_weights()
        assert model.get_output_embeddings().weight is weight
        model.config.tie_word_embeddings = False
        with pytest.raises(ModelError, match=r"tie_weights: tie_word_embeddings is False now.*wte.*cut by rows"):
            model.tie_weights()
        model.config.tie_word_embeddings = True
        with pytest.raises(ModelError, match=r"wte\.weight \(500, 16\) is cut by rows"):
            model.resize_token_embeddings(VOCABULARY + 8)
        tokens = model.generate(ids(0)[:, :3], max_new_tokens=2, do_sample=False)
        assert tokens.shape == (2, 5)
        engine.backward(engine(input_ids=ids(0), labels=ids(0)).loss)
        engine.step()


def test_weights_drawn_by_modules_are_those_of_the_model_in_one_piece(tmp_path: Path) -> None:
    """`zeroxide train` draws each parameter by the initialiser of its module, which looks at the weight there. Catches:
    a module that shows a source no parameter, a matrix drawn a block at a time."""
    found = []
    for rows in (None, 128 * 64 * 4):
        model = build_model(choose_model("tiny"), torch.float32)
        with started(model, config=config_for(tmp_path, rows), weights=FromScratch(model, 3)) as engine:
            assert (blocks_of(model.lm_head) is None) is (rows is None)
            found.append(engine.module_state_dict())
    assert set(found[0]) == set(found[1])
    assert all(torch.equal(values, found[1][name]) for name, values in found[0].items())


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = Scaled(VOCABULARY, WIDTH)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.head(torch.tanh(self.mid(self.wte(given)))).flatten(0, 1), given.flatten())


def test_a_compiled_model_ends_its_graphs_at_the_matrices(tmp_path: Path) -> None:
    """The bits of the same model that is not compiled. Catches: a graph of a weight that is never there."""
    found = []
    for compiled in (True, False):
        model = torch.compile(Net(), backend="eager") if compiled else Net()
        with started(model, config=config_for(tmp_path)) as engine:
            engine.backward(engine(ids(0)))
            engine.step()
            found.append(engine.module_state_dict())
    assert set(found[0]) == set(found[1])
    assert all(torch.equal(values, found[1][name]) for name, values in found[0].items())
