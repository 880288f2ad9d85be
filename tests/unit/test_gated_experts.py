"""Fused experts in one pass against a loop over tokens in float64, and against transformers' own experts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from zeroxide.moe.fused import gated_experts

WIDTH, FEATURES, EXPERTS, TOKENS, WAYS = 12, 20, 5, 30, 2
# fp32 against float64, sums of at most 40 terms of size 1.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    experts = torch.stack([torch.randperm(EXPERTS - 1)[:WAYS] for _ in range(TOKENS)])
    return {
        "tokens": torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_(),
        # Expert 4 has no tokens.
        "experts": experts,
        "weights": torch.rand(TOKENS, WAYS).requires_grad_(),
        "gate_up": torch.randn(EXPERTS, 2 * FEATURES, WIDTH).mul(0.3).to(dtype).requires_grad_(),
        "down": torch.randn(EXPERTS, WIDTH, FEATURES).mul(0.3).to(dtype).requires_grad_(),
    }


def in_float64(
    given: dict[str, torch.Tensor], activation=functional.silu
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    wide = {
        name: value if name == "experts" else value.detach().double().requires_grad_() for name, value in given.items()
    }
    made = []
    for token in range(TOKENS):
        total = torch.zeros(WIDTH, dtype=torch.float64)
        for way in range(WAYS):
            expert = int(wide["experts"][token, way])
            if 0 <= expert < EXPERTS:
                gate, up = (wide["gate_up"][expert] @ wide["tokens"][token]).chunk(2)
                total = total + wide["weights"][token, way] * (wide["down"][expert] @ (activation(gate) * up))
        made.append(total)
    return torch.stack(made), wide


@pytest.mark.parametrize(
    "activation", [functional.silu, functional.gelu, functional.relu], ids=["silu", "gelu", "relu"]
)
def test_results_and_all_gradients(activation):
    given = inputs()
    given["experts"][3, 1], given["experts"][7, 0] = -1, EXPERTS
    made = gated_experts(**given, activation=activation)
    expected, wide = in_float64(given, activation)
    weight = torch.randn(TOKENS, WIDTH)
    (made * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(made.double(), expected, **TOLERANCE)
    for name in ("tokens", "weights", "gate_up", "down"):
        torch.testing.assert_close(given[name].grad.double(), wide[name].grad, **TOLERANCE)
    assert (given["gate_up"].grad[4] == 0).all()
    assert (given["down"].grad[4] == 0).all()


def test_frozen_weights_have_no_gradient():
    given = inputs()
    given["gate_up"].requires_grad_(False)
    gated_experts(**given).sum().backward()
    _, wide = in_float64(given)
    in_float64_sum = in_float64(given)[0].sum()
    assert given["gate_up"].grad is None
    assert given["down"].grad is not None
    assert in_float64_sum.isfinite()
    assert wide


def test_under_autocast_products_are_bf16_and_gradients_are_fp32():
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        made = gated_experts(**given)
    made.sum().backward()
    expected, wide = in_float64(given)
    expected.sum().backward()
    # Three products rounded to 8 bits, each of sums of up to 20 terms: 1 % of the largest.
    for name, found, wanted in (
        ("made", made, expected),
        *((name, given[name].grad, wide[name].grad) for name in ("tokens", "weights", "gate_up", "down")),
    ):
        assert found.dtype is torch.float32, name
        assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < 0.02, name


def test_in_bf16_it_is_within_rounding_of_float64():
    given = inputs(torch.bfloat16)
    made = gated_experts(**given)
    expected, _ = in_float64(given)
    assert made.dtype is torch.bfloat16
    assert float((made.double() - expected).abs().max() / expected.abs().max()) < 0.02


def test_it_is_what_transformers_experts_are():
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=FEATURES, num_local_experts=EXPERTS, num_experts_per_tok=WAYS
    )
    config._experts_implementation = "eager"
    given = inputs()
    theirs = MixtralExperts(config)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(given["gate_up"])
        theirs.down_proj.copy_(given["down"])
    tokens, weights = given["tokens"].detach().requires_grad_(), given["weights"].detach().requires_grad_()
    expected = theirs(tokens, given["experts"], weights)
    expected.sum().backward()
    gated_experts(**given).sum().backward()
    torch.testing.assert_close(gated_experts(**given), expected, **TOLERANCE)
    for found, wanted in (
        (given["tokens"], tokens),
        (given["weights"], weights),
        (given["gate_up"], theirs.gate_up_proj),
        (given["down"], theirs.down_proj),
    ):
        torch.testing.assert_close(found.grad, wanted.grad, **TOLERANCE)


def test_no_tokens():
    given = inputs()
    given |= {"tokens": torch.randn(0, WIDTH), "experts": given["experts"][:0], "weights": torch.rand(0, WAYS)}
    made = gated_experts(**given)
    made.sum().backward()
    assert made.shape == (0, WIDTH)
    assert (given["down"].grad == 0).all()
