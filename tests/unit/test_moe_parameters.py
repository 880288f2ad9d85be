"""Optimizer groups in which experts are apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zeroxide.errors import ModelError
from zeroxide.moe import MoE, configure_moe_param_groups, split_params_into_different_moe_groups_for_optimizer
from zeroxide.moe.parameters import (
    is_moe_param,
    is_moe_param_group,
    split_params_grads_into_shared_and_expert_params,
    split_params_into_shared_and_expert_params,
)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), MoE(8, nn.Linear(8, 8), 4, ep_size=2), MoE(8, nn.Linear(8, 8), 2, k=2))


def test_experts_have_groups_of_their_own_with_the_same_options():
    made = model()
    given = {"params": list(made.parameters()), "name": "all", "lr": 0.5, "weight_decay": 0.1}
    shared, *experts = split_params_into_different_moe_groups_for_optimizer(given)
    assert [group["name"] for group in experts] == ["ep_size_2", "ep_size_1"]
    assert all(group["lr"] == 0.5 and group["weight_decay"] == 0.1 and group["moe"] is True for group in experts)
    assert shared["name"] == "all"
    assert not is_moe_param_group(shared)
    assert is_moe_param_group(experts[0])
    assert not any(map(is_moe_param, shared["params"]))
    assert [len(group["params"]) for group in experts] == [8, 4]
    every = [id(param) for group in (shared, *experts) for param in group["params"]]
    assert sorted(every) == sorted(map(id, made.parameters()))
    torch.optim.AdamW([{key: value for key, value in group.items() if key != "name"} for group in (shared, *experts)])


def test_groups_have_at_most_so_many_elements():
    # A bias has 8 elements and a weight 64: each pair is 72, and with another weight 136.
    given = {"params": list(model()[1].parameters()), "name": "all"}
    sizes = [
        sum(param.numel() for param in group["params"])
        for group in split_params_into_different_moe_groups_for_optimizer(given, max_group_size=80)[1:]
    ]
    assert sizes == [72, 72, 72, 72]
    assert len(split_params_into_different_moe_groups_for_optimizer(given, max_group_size=None)) == 2
    assert len(split_params_into_different_moe_groups_for_optimizer(given, max_group_size=10)[1:]) == 8


def test_a_group_without_a_name_is_named():
    given = [{"params": [], "name": "first"}, {"params": list(model().parameters())}]
    with pytest.raises(ModelError, match='moe: optimizer group 1 has no "name": give every group'):
        split_params_into_different_moe_groups_for_optimizer(given)
    with pytest.raises(ModelError, match="two optimizer groups have the name 'a'"):
        split_params_into_different_moe_groups_for_optimizer([{"params": [], "name": "a"}] * 2)


def test_parameters_and_groups_are_configured():
    made = model()
    assert [group["name"] for group in configure_moe_param_groups(made.parameters())] == [
        "parameters",
        "ep_size_2",
        "ep_size_1",
    ]
    groups = configure_moe_param_groups([{"params": made[0].parameters()}, {"params": made[1].parameters()}])
    assert [group["name"] for group in groups] == ["group0", "group1", "ep_size_2"]
    with pytest.raises(ModelError, match="there are no parameters"):
        configure_moe_param_groups([])


def test_parameters_and_gradients_are_split():
    made = model()
    made[0].weight.grad = torch.ones(8, 8)
    made[1].deepspeed_moe.experts.deepspeed_experts["1"].bias.grad = torch.full((8,), 2.0)
    shared, experts = split_params_into_shared_and_expert_params(made.parameters())
    assert len(shared) == 4
    assert len(experts) == 12
    of_shared, of_experts = split_params_grads_into_shared_and_expert_params(made.parameters())
    assert [float(each.mean()) for each in of_shared + of_experts] == [1.0, 2.0]
