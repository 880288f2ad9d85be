"""`zeroxide.optim.AdamW` in a plain PyTorch loop, beside `torch.optim.AdamW`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zeroxide.errors import ConfigError, ModelError
from zeroxide.optim import AdamW


def problem(dtype: torch.dtype = torch.float32):
    """Logistic regression with a hidden layer: (model, loss function)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, generator=generator)
    y = (x @ torch.randn(20, generator=generator) > 0).float()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)

    def loss():
        return nn.functional.binary_cross_entropy_with_logits(model(x.to(dtype)).float().squeeze(1), y)

    return model, loss


def run(model, loss, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def test_follows_torch_for_a_thousand_steps():
    """The same gradients on both sides: torch drives, and zeroxide updates a copy from torch's gradients.

    Per step both sides round the weight, by u = 2^-24 of it each, and the update, by at most 8 u of it on torch's side
    and 2 ulp on this one; the moments carry at most 7 u / (1 - beta1) and, after t steps, min(t, 1000) 10 u / 2.
    An update is at most about lr. Over 1,000 steps: 1000 (2 u |w| + lr (70 + 5000 + 10) u), and |w| < 8.
    """
    model, loss = problem()
    mirror = copy.deepcopy(model)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    mine = AdamW(mirror.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(1000):
        theirs.zero_grad()
        loss().backward()
        for ours, other in zip(mirror.parameters(), model.parameters(), strict=True):
            ours.grad = other.grad.clone()
        theirs.step()
        mine.step()
    bound = 1000 * 2.0**-24 * (2 * 8 + 1e-3 * 5080)
    for ours, other in zip(mirror.parameters(), model.parameters(), strict=True):
        assert other.abs().max() < 8
        assert (ours - other).abs().max().item() <= bound
        assert (ours - other).abs().max().item() <= 1e-5, "in practice far below the worst case"
    mine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_and_format_do_not_change_a_bit(dtype, tmp_path):
    outcomes = []
    for offload, format, threads in [
        ("none", "fp32", 1),
        ("cpu", "split", 2),
        (f"nvme:{tmp_path}", "split", 2),
        (f"nvme:{tmp_path}", "fp32", 1),
    ]:
        model, loss = problem(dtype)
        optimizer = AdamW(model.parameters(), lr=1e-2, offload=offload, format=format, threads=threads)
        losses = run(model, loss, optimizer, 100)
        outcomes.append((losses, [p.detach().clone() for p in model.parameters()]))
        optimizer.close()
    assert outcomes[0][0][-1] < outcomes[0][0][0] / 2
    for losses, params in outcomes[1:]:
        assert losses == outcomes[0][0]
        assert all(torch.equal(a, b) for a, b in zip(params, outcomes[0][1], strict=True))
    assert list(tmp_path.iterdir()) == []


def test_bf16_parameters_have_an_exact_master():
    """Steps far below a bf16 ulp add up: 1,000 steps of 1e-5 move a weight of 1, whose ulp is 2^-7, by about 1e-2."""
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = AdamW([weight], lr=1e-5, weight_decay=0.0)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.all((weight.float() - 0.99).abs() < 2.0**-8)
    optimizer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("home", ["none", "nvme"])
def test_state_dict_round_trip(dtype, home, tmp_path):
    offload = "none" if home == "none" else f"nvme:{tmp_path}"
    model, loss = problem(dtype)
    first = AdamW(model.parameters(), lr=1e-2, offload=offload)
    run(model, loss, first, 20)
    saved, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict())
    expected = run(model, loss, first, 20)
    other, other_loss = problem(dtype)
    second = AdamW(other.parameters(), lr=5.0, offload="none", format="fp32")
    other.load_state_dict(weights)
    second.load_state_dict(saved)
    assert second.param_groups[0]["lr"] == 1e-2
    assert run(other, other_loss, second, 20) == expected
    first.close()
    second.close()


def test_loads_the_state_of_torch_adamw():
    model, loss = problem()
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    run(model, loss, theirs, 20)
    other, other_loss = problem()
    other.load_state_dict(model.state_dict())
    mine = AdamW(other.parameters(), lr=1e-3)
    mine.load_state_dict(theirs.state_dict())
    packed = mine.state_dict()
    for number, entry in theirs.state_dict()["state"].items():
        assert packed["state"][number]["step"] == entry["step"] == 20
        assert torch.equal(packed["state"][number]["exp_avg"], entry["exp_avg"])
        assert torch.equal(packed["state"][number]["exp_avg_sq"], entry["exp_avg_sq"])
    assert run(other, other_loss, mine, 5) == pytest.approx(run(model, loss, theirs, 5), rel=1e-5)
    mine.close()


def test_torch_loads_our_state():
    model, loss = problem()
    mine = AdamW(model.parameters(), lr=1e-2)
    run(model, loss, mine, 20)
    other, other_loss = problem()
    other.load_state_dict(model.state_dict())
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
    packed = mine.state_dict()
    theirs.load_state_dict(packed)
    assert run(other, other_loss, theirs, 5) == pytest.approx(run(model, loss, mine, 5), rel=1e-5)
    mine.close()


def test_parameters_without_a_gradient_are_left_alone():
    a, b = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    optimizer = AdamW([a, b], lr=0.1)
    a.grad = torch.ones(8)
    optimizer.step()
    assert torch.equal(b, torch.ones(8))
    assert not torch.equal(a, torch.ones(8))
    a.grad, b.grad = None, torch.ones(8)
    before = a.detach().clone()
    optimizer.step()
    assert torch.equal(a, before)
    assert torch.equal(b, before), "the first update of b is that of a"
    optimizer.close()


def test_groups_schedulers_and_closures_work():
    a, b = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    optimizer = AdamW([{"params": [a], "lr": 0.0}, {"params": [b]}], lr=0.5, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (a + b).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 16
    assert torch.equal(a, torch.ones(8))
    assert torch.allclose(b, torch.full((8,), 0.5))
    scheduler.step()
    optimizer.step(closure)
    assert torch.allclose(b, torch.full((8,), 0.45))
    c = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [c], "lr": 0.25})
    c.grad = torch.ones(1)
    optimizer.step()
    assert torch.allclose(c, torch.full((1,), 0.75))
    with pytest.raises(ModelError, match="float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 3
    optimizer.close()


def test_wrong_parameters_are_refused():
    with pytest.raises(ModelError, match="float64"):
        AdamW([nn.Parameter(torch.ones(3, dtype=torch.float64))])
    with pytest.raises(ModelError, match="contiguous"):
        AdamW([nn.Parameter(torch.ones(4, 3).T)])
    with pytest.raises(ConfigError, match="format"):
        AdamW([nn.Parameter(torch.ones(3))], format="compacted")


CHANGES = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "shape": lambda model: setattr(model[0].weight, "data", model[0].weight.data[:8].contiguous()),
    "strides": lambda model: setattr(model[0].weight, "data", model[0].weight.data.T.contiguous().T),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_parameter_that_became_something_else_is_refused(name):
    """Named, and before anything is updated; also in a state dict that would read its exact weight."""
    model, _ = problem(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    CHANGES[name](model)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(ModelError, match=r"^0\.weight is "):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.close()


def test_data_that_is_replaced_alike_is_followed():
    """A new tensor of the same dtype and shape, contiguous or made so: one step from there is torch's."""
    param, other = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.full((4, 3), 2.0))
    mine = AdamW([param], lr=0.1, weight_decay=0.0)
    theirs = torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
    param.data = torch.full((4, 3), 2.0)
    param.grad = torch.arange(12.0).view(3, 4).T
    other.grad = param.grad.clone()
    mine.step()
    theirs.step()
    # An update of 0.1 rounded a few times on each side.
    torch.testing.assert_close(param, other, rtol=0.0, atol=1e-6)
    mine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", ["none", "nvme"])
def test_a_parameter_unfrozen_later_trains_from_then_on(dtype, offload, tmp_path):
    """Beside an optimizer that only begins then: the first update of a parameter is its first."""
    home = "none" if offload == "none" else f"nvme:{tmp_path}"
    late, first = nn.Parameter(torch.ones(64, dtype=dtype), requires_grad=False), nn.Parameter(torch.ones(8))
    optimizer = AdamW([first, late], lr=1e-2, offload=home)
    first.grad = torch.ones(8)
    optimizer.step()
    assert torch.all(late == 1)
    late.requires_grad_(True)
    alone = nn.Parameter(late.detach().clone())
    fresh = AdamW([alone], lr=1e-2)
    for step in range(3):
        late.grad = torch.full_like(late, 0.5 + step)
        alone.grad = late.grad.clone()
        optimizer.step()
        fresh.step()
        assert torch.equal(late, alone)
        assert optimizer.state[late]["step"] == step + 1
    packed = copy.deepcopy(optimizer.state_dict())
    assert [int(packed["state"][number]["step"]) for number in (0, 1)] == [4, 3]
    again = AdamW([nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(64, dtype=dtype), requires_grad=False)])
    again.load_state_dict(packed)
    assert torch.equal(again.state_dict()["state"][1]["exp_avg"], packed["state"][1]["exp_avg"])
    for each in (optimizer, fresh, again):
        each.close()
    assert list(tmp_path.iterdir()) == []


def test_frozen_parameters_may_have_any_dtype():
    frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    optimizer = AdamW([frozen, nn.Parameter(torch.ones(3))])
    frozen.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"parameter 0 .*float64"):
        optimizer.step()
    optimizer.close()


def test_gradients_that_do_not_fit_are_named():
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW(table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ModelError, match=r"gradient of weight is sparse"):
        optimizer.step()
    with torch.no_grad():
        before = table.weight.clone()
    table.weight.grad = None
    optimizer.step()
    assert torch.equal(table.weight, before)
    optimizer.close()


def test_values_of_the_state_are_copies_and_say_so():
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].tolist() == pytest.approx([0.1] * 3)
    for change in (
        lambda: optimizer.state[param]["exp_avg"].zero_(),
        lambda: optimizer.state.clear(),
        lambda: setattr(optimizer, "state", {}),
    ):
        with pytest.raises(ModelError, match="load_state_dict"):
            change()
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()


@pytest.mark.parametrize(
    ("line", "change"),
    [
        (r"exp_avg of parameter 0", lambda s: s["state"][0].__setitem__("exp_avg", torch.ones(2))),
        (r"has no 'exp_avg'", lambda s: s["state"][0].pop("exp_avg")),
        (r"momentum_buffer", lambda s: s["state"][1].__setitem__("momentum_buffer", torch.ones(1))),
        (r"groups of \[2\]", lambda s: s["param_groups"][0]["params"].pop()),
        (r"an entry 7", lambda s: s["state"].__setitem__(7, s["state"][0])),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(line, change):
    params = [nn.Parameter(torch.ones(size)) for size in (3, 4, 5)]
    optimizer = AdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before, wrong = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    wrong["state"][2]["exp_avg"].fill_(7)
    wrong["param_groups"][0]["lr"] = 5.0
    change(wrong)
    with pytest.raises(ConfigError, match=line):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number in range(3):
        assert all(torch.equal(after["state"][number][key], value) for key, value in before["state"][number].items())
    optimizer.close()
