"""The loss of a projection without its logits, against torch's over all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from running import Mode, config_of, started
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zeroxide
from zeroxide.cli.training.loss import causal_lm_loss, without_logits
from zeroxide.cli.training.models import build_model, choose_model
from zeroxide.errors import ModelError, TensorError
from zeroxide.losses import linear_cross_entropy
from zeroxide.zero.reduce import large_weights as large

ROWS, FEATURES, VOCABULARY = 24, 16, 103


def inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    found = {"input": draw(ROWS, FEATURES), "weight": draw(VOCABULARY, FEATURES)}
    if bias:
        found["bias"] = draw(VOCABULARY)
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    target[::5] = -100
    target[1], target[2] = 0, VOCABULARY - 1
    return found, target


def ours(given: dict[str, torch.Tensor], target: torch.Tensor, columns: int, reduction: str = "mean") -> torch.Tensor:
    return linear_cross_entropy(
        given["input"], given["weight"], target, linear_bias=given.get("bias"), columns=columns, reduction=reduction
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("columns", [1, 2, 10, 51, 102, 103, 5000])
def test_losses_and_gradients_are_torchs(columns: int, reduction: str) -> None:
    """Catches: a target looked up in another chunk, a sum not rescaled when a larger logit comes, what is ignored and
    counts, a bias or a chunk left out. The oracle is torch's in double precision; products are in double, and sums over
    the vocabulary in fp32: of 103 terms of one sign, at most 103 roundings of 2^-24 each, 7e-6, and as much again for
    exp and log, which have a few."""
    given, target = inputs()
    plain = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    logits = functional.linear(plain["input"], plain["weight"], plain["bias"])
    wanted = functional.cross_entropy(logits, target, reduction=reduction)
    found = ours(given, target, columns, reduction)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)
    direction = torch.linspace(0.5, 1.5, wanted.numel(), dtype=torch.float64).view(wanted.shape)
    (wanted * direction).sum().backward()
    (found * direction.float()).sum().backward()
    for name, tensor in plain.items():
        # 24 rows or 103 columns of terms below 10, each 2e-5 off relative to the softmax.
        torch.testing.assert_close(given[name].grad, tensor.grad, rtol=5e-5, atol=5e-5, msg=name)


def test_large_logits_do_not_overflow() -> None:
    """Catches: exponentials of logits as they are. exp(200) is no fp32 number."""
    given, target = inputs(torch.float32, bias=False)
    with torch.no_grad():
        given["weight"].mul_(40)
    wanted = functional.cross_entropy(given["input"] @ given["weight"].t(), target)
    found = ours(given, target, 10)
    assert wanted > 200
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)


def test_gradients_of_a_bf16_weight_have_the_bits_of_the_whole_projection() -> None:
    """Catches: rows of the weight's gradient summed in parts. Their logits' gradients are those of one chunk of all."""
    results = []
    for columns in (VOCABULARY, 20):
        given, target = inputs(torch.bfloat16)
        ours(given, target, columns).backward()
        results.append(given)
    whole, parts = results
    # A last bit of an fp32 log-sum rarely turns a bf16 rounding of a logit's gradient: nearly all are the same bits.
    same = (whole["weight"].grad == parts["weight"].grad).double().mean()
    assert same > 0.98
    # One more rounding to bf16, 2^-9, for each of 6 chunks, of partial sums not larger than what they add up from.
    scale = whole["input"].grad.abs().max()
    assert (whole["input"].grad - parts["input"].grad).abs().max() <= 7 * 2**-8 * scale


class _Largest(TorchDispatchMode):
    """Notes the most elements of any result."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_tensor_has_all_logits() -> None:
    """Catches: logits of more than a chunk at a time, in forward or backward."""
    rows, vocabulary, columns = 200, 3000, 100
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    target = torch.randint(0, vocabulary, (rows,))
    with _Largest() as largest:
        linear_cross_entropy(hidden, weight, target, columns=columns).backward()
    assert largest.elements == max(rows * columns, weight.numel())
    with _Largest() as largest:
        functional.cross_entropy(hidden @ weight.t(), target)
    assert largest.elements == rows * vocabulary, "what it is compared with does"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weight": torch.zeros(7, 5)}, r"linear_weight has shape \(7, 5\): expected \(7, 16\)"),
        ({"bias": torch.zeros(7)}, r"linear_bias has shape \(7,\): expected \(103,\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target has shape \(3,\): expected \(24,\)"),
        ({"target": torch.zeros(24)}, "target is torch.float32: expected torch.int64"),
    ],
)
def test_what_does_not_go_together_is_named(change: dict[str, torch.Tensor], line: str) -> None:
    """Catches: a loss of broadcast shapes."""
    given, target = inputs()
    given |= {name: value for name, value in change.items() if name != "target"}
    with pytest.raises(TensorError, match=line):
        ours(given, change.get("target", target), 10)


class Model(nn.Module):
    """An embedding, and a projection that may be the same weight, used by hand."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(60, 24)
        self.mix = nn.Linear(24, 24)
        self.head = nn.Linear(24, 60, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.mix(self.table(tokens)))
        return linear_cross_entropy(hidden[:, :-1], self.head.weight, tokens[:, 1:], columns=7)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", "nvme", prefetch=0)], ids=str)
def test_an_engine_has_the_gradients_of_plain_torch(tmp_path, monkeypatch, mode: Mode, tied: bool) -> None:
    """Catches: parts of a large weight's gradient at another's rows, or none at all where its unit is not gathered."""
    monkeypatch.setattr(large, "LARGE", 60 * 24)
    model = Model(tied)
    plain = copy.deepcopy(model)
    tokens = torch.randint(0, 60, (3, 17), generator=torch.Generator().manual_seed(1))
    seen: list[int] = []
    accumulate = large.LargeWeight.accumulate_part
    monkeypatch.setattr(
        large.LargeWeight,
        "accumulate_part",
        lambda self, start, part: (seen.append(start // 24), accumulate(self, start, part))[1],
    )
    with started(model, config=config_of(mode, tmp_path, "fp32")) as engine:
        loss = engine(tokens)
        wanted = plain(tokens)
        assert torch.equal(loss, wanted)
        engine.backward(loss)
        wanted.backward()
        for (name, mine), param in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(zeroxide.safe_get_full_grad(mine), param.grad), name
    assert seen == [60 * number // 9 for number in range(9)], "in parts"


@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_a_model_of_transformers_has_the_loss_of_its_logits(name: str) -> None:
    """Catches: labels that are not those of the next token, a mean over what is ignored, a head that keeps labels for
    the next forward, or gives a loss where logits are wanted."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(choose_model(name).config).float()
    plain = copy.deepcopy(model)
    plain.loss_function = causal_lm_loss
    without_logits(model, 100)
    tokens = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    labels[0, :6] = -100
    found, wanted = model(input_ids=tokens, labels=labels).loss, plain(input_ids=tokens, labels=labels).loss
    # fp32 on both sides: sums over 512 columns and 33 targets.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)
    found.backward()
    wanted.backward()
    for (key, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=key)
    assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    model(input_ids=tokens, labels=labels)
    hidden = torch.randn(3, model.lm_head.in_features)
    assert torch.equal(model.lm_head(hidden), plain.lm_head(hidden)), "its labels were those of that forward"


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    """Catches: a head of another class whose forward is lost."""

    class Head(nn.Linear):
        pass

    model = build_model(choose_model("tiny"), torch.float32)
    model.lm_head.__class__ = Head
    with pytest.raises(ModelError, match="GPT2LMHeadModel has Head as output projection: --loss-chunk needs a linear"):
        without_logits(model, 100)
