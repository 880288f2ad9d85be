"""zero.Init over parameters that are no dense floating-point numbers, or have no values or shape yet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zeroxide import zero


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        with torch.device("meta"):
            self.nowhere = nn.Linear(4, 4)
        self.lazy = nn.LazyLinear(3)
        self.whole = nn.Parameter(torch.arange(6), requires_grad=False)
        self.pair = nn.Parameter(torch.tensor([1 + 2j, 3j]), requires_grad=False)
        self.sparse = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
        self.none = nn.Parameter(torch.empty(0, 2))


def test_what_cannot_be_sliced_stays_as_it_is_and_the_rest_is_sliced():
    with zero.Init():
        model = Odd()
    assert {name for name, param in model.named_parameters() if hasattr(param, "ds_shape")} == {
        *("first.weight", "first.bias", "whole", "pair", "none")
    }
    assert model.nowhere.weight.is_meta
    assert isinstance(model.lazy.weight, nn.UninitializedParameter)
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))
    with zero.GatheredParameters(model.parameters()):
        assert torch.equal(model.whole, torch.arange(6))
        assert torch.equal(model.pair, torch.tensor([1 + 2j, 3j]))
        assert model.none.shape == (0, 2)


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Bert"])
def test_from_pretrained_inside_init_has_the_weights_of_the_files(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 61, "hidden_size": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=32)
    make = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM", "Bert": "BertForMaskedLM"}[kind]
    plain = getattr(transformers, make)(config)
    plain.save_pretrained(tmp_path)
    with zero.Init():
        model = getattr(transformers, make).from_pretrained(tmp_path)
    with zero.GatheredParameters(model.parameters()):
        found = dict(model.named_parameters())
        assert [name for name, param in plain.named_parameters() if not torch.equal(found[name], param)] == []
