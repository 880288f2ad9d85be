"""`MoE` against the dense one-hot in float64: outputs, losses, counts and all gradients."""

from __future__ import annotations

import math

import pytest
import torch
from moe_oracle import balance, dense_moe
from torch import nn

from zeroxide.errors import ModelError
from zeroxide.moe import MoE, has_moe_layers, is_moe_param, topkgating
from zeroxide.moe.gating import capacity_of, top1gating, top2gating, z_loss

WIDTH, TOKENS, EXPERTS = 16, 40, 5
# fp32 against float64 over sums of at most 40 terms of size 1: 40 * 2**-24 of the largest, with what follows of it.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def made(k: int, seed: int = 0, **options: object) -> tuple[MoE, torch.Tensor]:
    torch.manual_seed(seed)
    expert = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
    layer = MoE(WIDTH, expert, EXPERTS, k=k, **options)
    for param in layer.parameters():
        # Copies of an expert begin alike, and a gate that knows no expert sends all to the first.
        nn.init.normal_(param, std=0.3)
    return layer, torch.randn(2, TOKENS // 2, WIDTH)


def in_float64(layer: MoE, given: torch.Tensor):
    """The layer's parameters and tokens in float64, and its experts as a function of their number."""
    params = {name: param.detach().double().requires_grad_() for name, param in layer.named_parameters()}
    tokens = given.double().view(-1, WIDTH).requires_grad_()

    def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
        prefix = f"deepspeed_moe.experts.deepspeed_experts.{number}."
        hidden = rows @ params[f"{prefix}0.weight"].t() + params[f"{prefix}0.bias"]
        return nn.functional.gelu(hidden) @ params[f"{prefix}2.weight"].t() + params[f"{prefix}2.bias"]

    return params, tokens, expert


def choices(tokens: torch.Tensor, gate: torch.Tensor, k: int) -> list[list[int]]:
    return (tokens.detach() @ gate.detach().t()).topk(k, 1).indices.tolist()


CASES = {
    "top-1, room for all": (1, {"capacity_factor": 100.0, "use_rts": False}),
    "top-1, the last are dropped": (1, {"capacity_factor": 0.7, "min_capacity": 0, "use_rts": False}),
    "top-1, nothing dropped": (1, {"drop_tokens": False}),
    "top-1, at least": (1, {"capacity_factor": 0.1, "min_capacity": 3, "use_rts": False}),
    "top-2": (2, {"capacity_factor": 0.8, "min_capacity": 0, "top2_2nd_expert_sampling": False}),
    "top-2, nothing dropped": (2, {"drop_tokens": False, "top2_2nd_expert_sampling": False}),
    "top-3 by probability": (3, {"capacity_factor": 0.6, "min_capacity": 0}),
    "top-3 by position": (3, {"capacity_factor": 0.6, "min_capacity": 0, "drop_policy": "position"}),
    "all": (5, {"drop_tokens": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_the_dense_one(name):
    k, options = CASES[name]
    layer, given = made(k, **options)
    given.requires_grad_()
    output, l_aux, counts = layer(given)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    ((output * weight).sum() + 3 * l_aux).backward()

    params, tokens, expert = in_float64(layer, given.detach())
    gate = params["deepspeed_moe.gate.wg.weight"]
    chosen = choices(tokens, gate, k)
    probabilities = torch.softmax(tokens @ gate.t(), 1)
    drops = options.get("drop_tokens", True)
    factor, least = options.get("capacity_factor", 1.0), options.get("min_capacity", 4)
    capacity = max(math.ceil(TOKENS / EXPERTS * factor * k), least) if drops else math.inf

    def priority(token: int, choice: int, number: int) -> float:
        if k == 2:
            return choice * TOKENS + token
        if k > 2 and options.get("drop_policy", "probs") == "probs":
            return -float(probabilities[token, number].detach())
        return token

    expected = dense_moe(tokens, gate, expert, chosen, capacity, priority, normalise=k > 1)
    loss = balance(probabilities, chosen, 1 if k == 2 else k)
    ((expected * weight.double().view(-1, WIDTH)).sum() + 3 * loss).backward()

    assert counts.tolist() == [sum(each.count(number) for each in chosen) for number in range(EXPERTS)]
    torch.testing.assert_close(output.view(-1, WIDTH).double(), expected, **TOLERANCE)
    torch.testing.assert_close(l_aux.double(), loss, **TOLERANCE)
    torch.testing.assert_close(given.grad.double().view(-1, WIDTH), tokens.grad, **TOLERANCE)
    for label, param in layer.named_parameters():
        torch.testing.assert_close(
            param.grad.double(), params[label].grad, msg=lambda m, label=label: f"{label}: {m}", **TOLERANCE
        )
    if drops and "room" not in name:
        assert (output.view(-1, WIDTH) == 0).all(1).any() or k > 1, "a case in which nothing is dropped shows nothing"


def test_the_residual_is_weighed_by_the_coefficient():
    layer, given = made(1, use_residual=True, drop_tokens=False)
    with torch.no_grad():
        output = layer(given)[0]
        shares = torch.softmax(layer.coefficient(given), -1)
        expected = layer.deepspeed_moe(given) * shares[..., :1] + layer.mlp(given) * shares[..., 1:]
        assert not torch.allclose(output, layer.deepspeed_moe(given))
    torch.testing.assert_close(output, expected)


def test_capacity_is_that_of_training_or_of_evaluation():
    layer, given = made(1, capacity_factor=0.5, eval_capacity_factor=2.0, min_capacity=0)
    layer(given)
    assert layer.deepspeed_moe.capacity == math.ceil(TOKENS / EXPERTS * 0.5)
    layer.eval()
    layer(given)
    assert layer.deepspeed_moe.capacity == math.ceil(TOKENS / EXPERTS * 2.0)
    assert capacity_of(41, 5, 1.0, 4) == 9
    assert capacity_of(10, 5, 1.0, 4) == 4


def test_random_token_selection_drops_any_and_keeps_as_many():
    logits = torch.zeros(64, 4)
    logits[:, 2] = 1
    kept = []
    for seed in range(40):
        torch.manual_seed(seed)
        routes = top1gating(logits, 0.25, 0)
        kept.append(routes.experts.view(-1) >= 0)
        assert int(kept[-1].sum()) == 4 == routes.capacity
        assert sorted(routes.locations[kept[-1]].view(-1).tolist()) == [0, 1, 2, 3]
    # Each token stays in 1 of 16 draws: 40 draws leave the last quarter out with a chance of 1e-5 ** 16.
    assert torch.stack(kept)[:, 48:].any()
    assert torch.equal(top1gating(logits, 0.25, 0, use_rts=False).experts.view(-1)[:4], torch.full((4,), 2))


def test_padding_goes_nowhere():
    layer, given = made(1, drop_tokens=False)
    used = torch.ones(TOKENS)
    used[::3] = 0
    output, _, counts = layer(given, used)
    assert int(counts.sum()) == int(used.sum())
    assert ((output.view(-1, WIDTH) == 0).all(1) == (used == 0)).all()
    with pytest.raises(ModelError, match="used_token has 3 elements: expected one for each of the 40 tokens"):
        layer(given, torch.ones(3))


@pytest.mark.parametrize("policy", ["Jitter", "RSample"])
def test_noise_changes_routes_in_training_alone(policy):
    layer, given = made(1, noisy_gate_policy=policy, drop_tokens=False)
    with torch.no_grad():
        gate = layer.deepspeed_moe.gate
        noisy = [gate(given.view(-1, WIDTH)) for _ in range(8)]
        # Jitter multiplies what the gate is given, so the weights move; Gumbel noise is in the choice alone.
        assert any(not torch.equal(noisy[0].experts, each.experts) for each in noisy) or policy == "Jitter"
        assert any(not torch.equal(noisy[0].gates, each.gates) for each in noisy)
        layer.eval()
        quiet = [gate(given.view(-1, WIDTH)) for _ in range(4)]
        assert all(torch.equal(quiet[0].gates, each.gates) for each in quiet)
    # A hundredth on each of 16 inputs.
    change = (noisy[0].gates - quiet[0].gates).abs().max()
    assert policy == "RSample" or 0 < change < 0.05


def test_the_second_expert_is_drawn_as_often_as_it_is_likely():
    """GShard draws the second by its probability among the others: Gumbel noise does."""
    logits = torch.tensor([[4.0, 1.0, 0.0, 0.0]]).repeat(4000, 1)
    torch.manual_seed(0)
    second = top2gating(logits, 1.0, 0, drop_tokens=False).experts[:, 1]
    expected = torch.softmax(torch.tensor([1.0, 0.0, 0.0]), 0)
    seen = torch.bincount(second, minlength=4)[1:] / 4000
    # Five standard deviations of a share of 4,000 draws.
    assert (seen - expected).abs().max() < 5 * 0.5 / 4000**0.5
    assert (top2gating(logits, 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=False).experts[:, 1] == 1).all()


def test_z_loss_is_added_with_its_coefficient():
    plain, given = made(2, top2_2nd_expert_sampling=False)
    with_z, _ = made(2, top2_2nd_expert_sampling=False, z_loss_coefficient=0.25)
    logits = given.view(-1, WIDTH).double() @ plain.deepspeed_moe.gate.wg.weight.double().t()
    expected = plain(given)[1].double() + 0.25 * logits.exp().sum(1).log().pow(2).mean()
    torch.testing.assert_close(with_z(given)[1].double(), expected, **TOLERANCE)
    torch.testing.assert_close(z_loss(torch.zeros(3, 8)), torch.tensor(math.log(8) ** 2))


def test_routes_stay_sparse():
    """A tensor of tokens x experts x capacity would have 2**31 elements here."""
    torch.manual_seed(0)
    routes = topkgating(torch.randn(4096, 64), 2, 4.0, 4)
    assert routes.capacity == 512
    assert routes.experts.shape == routes.gates.shape == (4096, 2)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_gate_is_fp32_under_autocast_and_in_bf16(k):
    layer, given = made(k, drop_tokens=False, top2_2nd_expert_sampling=False)
    with torch.no_grad():
        counts = layer(given)[2]
        with torch.autocast("cpu", torch.bfloat16):
            cast, l_aux, under = layer(given)
    assert torch.equal(counts, under)
    assert l_aux.dtype is torch.float32
    assert cast.dtype is torch.float32
    low = layer.to(torch.bfloat16)(given.to(torch.bfloat16))
    assert low[0].dtype is torch.bfloat16
    assert low[1].dtype is torch.float32


def test_experts_without_tokens_have_gradients_and_an_empty_batch_passes():
    layer, given = made(1, drop_tokens=False)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.zero_()
    layer(given)[0].sum().backward()
    assert all(param.grad is not None for param in layer.deepspeed_moe.experts.parameters())
    assert layer(given[:, :0])[0].shape == (2, 0, WIDTH)


def test_names_and_marks_are_deepspeeds():
    layer, _ = made(2)
    names = [name for name, _ in layer.named_parameters()]
    assert "deepspeed_moe.gate.wg.weight" in names
    assert "deepspeed_moe.experts.deepspeed_experts.4.2.bias" in names
    for name, param in layer.named_parameters():
        assert is_moe_param(param) == ("deepspeed_experts" in name)
    assert layer.deepspeed_moe.experts.deepspeed_experts["0"][0].weight.group_name == "ep_size_1"
    assert has_moe_layers(nn.Sequential(layer)) == (True, 5)
    assert has_moe_layers(nn.Linear(1, 1)) == (False, 0)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_experts": 0}, "MoE: num_experts: expected at least 1, got 0"),
        ({"num_experts": 6, "ep_size": 4}, "MoE: ep_size: expected a divisor of num_experts = 6, got 4"),
        ({"num_experts": 2, "k": 3}, "MoE: k: expected 1 to num_experts = 2, got 3"),
        ({"capacity_factor": 0.0}, "MoE: capacity_factor: expected a positive number, got 0.0"),
        ({"eval_capacity_factor": math.nan}, "MoE: eval_capacity_factor: expected a positive number, got nan"),
        ({"min_capacity": -1}, "MoE: min_capacity: expected at least 0, got -1"),
        ({"noisy_gate_policy": "jitter"}, 'noisy_gate_policy: expected None, "Jitter" or "RSample", got \'jitter\''),
        ({"num_experts": 4, "k": 2, "noisy_gate_policy": "RSample"}, "where k is over 1, got 'RSample'"),
        ({"drop_policy": "first"}, 'MoE: drop_policy: expected "probs" or "position", got \'first\''),
        ({"z_loss_coefficient": -1.0}, "MoE: z_loss_coefficient: expected a number from 0 on, got -1.0"),
        ({"use_tutel": True}, "MoE: use_tutel: expected False"),
        ({"enable_expert_tensor_parallelism": True}, "MoE: enable_expert_tensor_parallelism: expected False"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, line):
    with pytest.raises(ModelError) as caught:
        MoE(8, nn.Linear(8, 8), **options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
