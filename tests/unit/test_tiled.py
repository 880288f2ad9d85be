"""Functions of a sequence that are computed a tile at a time: values, gradients, bytes, and engines around them.

Tolerances: in fp64 only sums of weight gradients over tokens are in another order; 1e-12 is some thousands of its unit
roundoff for numbers of about 1.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import zeroxide
from zeroxide.errors import ModelError, TensorError
from zeroxide.parallel.sequence import SequenceTiledCompute, TiledFusedLogitsLoss, TiledMLP, sequence_tiled_compute

WIDTH, WORDS = 8, 23


class Mlp(nn.Module):
    """`shards` of None computes it as a whole."""

    def __init__(self, shards: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.Dropout(dropout)
        self.shards = shards

    def once(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(functional.gelu(self.up(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.once(x) if self.shards is None else TiledMLP.apply(Mlp.once, self, x, self.shards)


def made(shards: int | None = None, dropout: float = 0.0) -> Mlp:
    torch.manual_seed(0)
    return Mlp(shards, dropout).double()


def inputs(tokens: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x, gradient = (torch.randn(2, tokens, WIDTH, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), gradient


def close(found: Any, expected: Any) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.shape == other.shape
            assert (mine - other).abs().max().item() <= 1e-12


@pytest.mark.parametrize("shards", [1, 3, 4, 10, 17])
def test_an_mlp_over_tiles_is_that_of_all_tokens(shards):
    """Catches: gradients of the last tile alone, a tile left out where tokens do not divide, more tiles than tokens."""
    x, gradient = inputs()
    whole, tiled = made(), made(shards)
    expected, output = whole(x).sin(), tiled(x).sin()
    close([output], [expected])
    close(
        torch.autograd.grad(output, [x, *tiled.parameters()], gradient),
        torch.autograd.grad(expected, [x, *whole.parameters()], gradient),
    )


def test_only_the_parameters_that_are_named_take_a_gradient():
    """Catches: compute_params without a say, and a gradient for what is frozen."""
    x, gradient = inputs()
    tiled = made()
    tiled.up.bias.requires_grad_(False)
    TiledMLP.apply(Mlp.once, tiled, x, 3, [tiled.up.weight, tiled.up.bias]).backward(gradient)
    whole = made()
    whole(x.detach()).backward(gradient)
    close([tiled.up.weight.grad], [whole.up.weight.grad])
    assert tiled.up.bias.grad is None
    assert tiled.down.weight.grad is None
    with pytest.raises(ModelError, match="give compute_params"):
        TiledMLP.apply(lambda _, x: x, object(), x, 3)


def test_random_numbers_are_those_of_forward_again():
    """Catches: dropout that drops others in backward, and random numbers that backward uses up."""
    x, gradient = inputs()
    tiled, whole = made(3, dropout=0.4), made(None, dropout=0.4)
    torch.manual_seed(5)
    output = tiled(x)
    output.backward(gradient)
    after = torch.rand(())
    mine, x.grad = x.grad, None
    torch.manual_seed(5)
    expected = torch.cat([whole(part) for part in x.chunk(3, 1)], 1)
    expected.backward(gradient)
    assert torch.equal(output, expected)
    assert torch.equal(after, torch.rand(()))
    close([mine], [x.grad])
    close([each.grad for each in tiled.parameters()], [each.grad for each in whole.parameters()])


def test_autocast_is_that_of_forward_again():
    """Catches: tiles that backward computes in another dtype."""
    x, gradient = inputs()
    tiled, whole = made(2).float(), made().float()
    low, x = x.detach().float().requires_grad_(), x.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, expected = tiled(low), torch.cat([whole(part) for part in x.chunk(2, 1)], 1)
    assert mine.dtype is torch.bfloat16
    assert torch.equal(mine, expected)
    mine.backward(gradient.bfloat16())
    expected.backward(gradient.bfloat16())
    assert torch.equal(low.grad, x.grad)


def test_gradients_of_bf16_are_summed_in_fp32():
    """Catches: a sum over tiles in bf16, which stands still where a tile adds less than half a unit of it."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    module = nn.Module()
    module.weight = weight
    x = torch.tensor([256.0] + [0.75] * 64, dtype=torch.bfloat16).view(1, 65, 1)
    TiledMLP.apply(lambda m, tile: tile * m.weight, module, x, 65).sum().backward()
    # 256 + 48; steps of bf16 are 2 there.
    assert weight.grad.item() == 304


def test_a_change_of_the_input_meanwhile_is_noticed():
    """Catches: tiles computed again from other values, without a word."""
    x, gradient = inputs()
    given = x * 1
    output = made(3)(given)
    with torch.no_grad():
        given.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(gradient)


def test_one_gradient_for_two_parameters_is_not_one_tensor():
    """Catches: a sum that is added to in place while autograd gave it for another parameter too."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(3)) for _ in range(2)])
    x = torch.arange(12.0).view(1, 4, 3)
    TiledMLP.apply(lambda both, tile: (both[0] + both[1]) * tile, module, x, 4).sum().backward()
    for each in module:
        assert torch.equal(each.grad, x.sum((0, 1)))


class Bytes(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.nbytes)
        return found


class Saved:
    """A tensor for as long as a graph has it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept(act: Any, module: nn.Module) -> tuple[torch.Tensor, int]:
    """What `act` gives, and bytes that autograd keeps for its backward; weights are there anyway."""
    there = {each.untyped_storage().data_ptr() for each in module.parameters()}
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = act()
    storages = [each.tensor.untyped_storage() for each in alive]
    return output, sum({each.data_ptr(): each.nbytes() for each in storages if each.data_ptr() not in there}.values())


def test_tiles_keep_their_input_alone_and_make_nothing_larger_than_a_tile():
    """Catches: activations of tiles that are kept, and hidden activations of all tokens, in forward or backward."""
    x, gradient = inputs(64)
    whole, tiled = made(), made(8)
    _, all_of_it = kept(lambda: whole(x), whole)
    _, of_tiles = kept(lambda: tiled(x), tiled)
    # The input; and of the whole the hidden activations before and after gelu as well.
    assert of_tiles == x.nbytes
    assert all_of_it == x.nbytes + 2 * 4 * x.nbytes
    with Bytes() as seen:
        tiled(x).backward(gradient)
    # An eighth of the hidden activations, 4 times as wide as the input, is half of the input's size.
    assert seen.largest == x.nbytes
    with Bytes() as seen:
        whole(x).backward(gradient)
    assert seen.largest == 4 * x.nbytes


def head() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(WIDTH, WORDS).double()


def loss_of(head: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(head(x).flatten(0, -2), y.flatten())


def labelled() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, _ = inputs()
    labels = (torch.arange(20) * 7 % WORDS).view(2, 10)
    labels[0, :6] = -100
    return x, labels, labels != -100


@pytest.mark.parametrize("shards", [1, 3, 40])
def test_a_loss_over_tiles_is_that_of_all_tokens(shards):
    """Catches: a mean of tiles that have differently many tokens, gradients without what comes from above, and a mask
    that leaves out others."""
    x, labels, mask = labelled()
    layer = head()
    expected = loss_of(layer, x, labels)
    loss = TiledFusedLogitsLoss.apply(loss_of, layer, x, labels, mask, shards)
    taking = [x, *layer.parameters()]
    close([loss], [expected])
    close(torch.autograd.grad(loss * 3, taking), torch.autograd.grad(expected * 3, taking))
    total = TiledFusedLogitsLoss.apply(
        lambda layer, x, y: functional.cross_entropy(layer(x), y, reduction="sum"),
        *(layer, x, labels, None, shards, None, "sum"),
    )
    summed = functional.cross_entropy(layer(x).flatten(0, 1), labels.flatten(), reduction="sum")
    close([total, *torch.autograd.grad(total, taking)], [summed, *torch.autograd.grad(summed, taking)])
    with torch.no_grad():
        close([TiledFusedLogitsLoss.apply(loss_of, layer, x, labels, mask, shards)], [expected])


def test_a_loss_over_tiles_makes_no_logits_of_all_tokens():
    """Catches: logits, or their gradient, of more than a tile; and logits that are kept until backward."""
    x, labels, _ = labelled()
    layer = head()
    loss, bytes_kept = kept(lambda: TiledFusedLogitsLoss.apply(loss_of, layer, x, labels, None, 5), layer)
    # Gradients of the input, the weight and the bias, which are there already.
    assert bytes_kept == x.nbytes + layer.weight.nbytes + layer.bias.nbytes
    with Bytes() as seen:
        TiledFusedLogitsLoss.apply(loss_of, layer, x, labels, None, 5).backward()
    # 4 tokens' logits, or the weight's gradient, which is larger here.
    assert seen.largest == max(4 * WORDS * 8, layer.weight.nbytes, x.nbytes)
    assert seen.largest < 20 * WORDS * 8
    assert loss.requires_grad


def test_no_label_at_all_is_no_loss():
    x, labels, mask = labelled()
    loss = TiledFusedLogitsLoss.apply(loss_of, head(), x, labels, mask & False, 3)
    loss.backward()
    assert (loss.item(), x.grad.abs().max().item()) == (0, 0)


@pytest.mark.parametrize("reduction", ["mean", "sum", None])
@pytest.mark.parametrize("shards", [1, 3, 4])
def test_any_function_over_tiles(reduction, shards):
    """Catches: arguments that are passed and take no gradient, a mean of unequal tiles, another output dimension."""
    x, labels, _ = labelled()
    layer, scale = head(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def wide(hidden: torch.Tensor, labels: torch.Tensor, layer: nn.Linear, scale: Any) -> torch.Tensor:
        return (layer(hidden) * scale).sin()

    given = {"hidden": x, "labels": labels}, {"layer": layer, "scale": scale}
    taking = [x, scale, *layer.parameters()]
    expected = wide(**given[0], **given[1])
    expected = expected if reduction is None else getattr(expected, reduction)()
    found = sequence_tiled_compute(wide, 10, shards, *given, "hidden", output_reduction=reduction)
    same = SequenceTiledCompute.apply(
        *(wide, 10, shards, ["hidden", "labels"], ["layer", "scale"], "hidden", [*layer.parameters()], 1, reduction),
        *(x, labels, layer, scale),
    )
    seed = torch.ones_like(expected) * 0.7
    for each in (found, same):
        close([each], [expected])
        close(torch.autograd.grad(each, taking, seed), torch.autograd.grad(expected, taking, seed, retain_graph=True))

    def mean(hidden: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return layer(hidden).sin().mean()

    if reduction == "mean":
        whole = mean(x, layer)
        found = sequence_tiled_compute(mean, 10, shards, {"hidden": x}, {"layer": layer}, "hidden", None, 0)
        close([found], [whole])
        close(torch.autograd.grad(found, [x]), torch.autograd.grad(whole, [x]))


def test_what_does_not_fit_is_refused():
    x, labels, _ = labelled()
    with pytest.raises(ValueError, match="shards: expected an integer of at least 1, got 0"):
        made(0)(x)
    with pytest.raises(TensorError, match=r"expected 9 tokens in dimension 1"):
        sequence_tiled_compute(lambda h: h, 9, 3, {"h": x}, {}, "h")
    with pytest.raises(ValueError, match="grad_requiring_tensor_key"):
        sequence_tiled_compute(lambda h: h, 10, 3, {"h": x}, {}, "x")
    with pytest.raises(ValueError, match="output_reduction"):
        sequence_tiled_compute(lambda h: h, 10, 3, {"h": x}, {}, "h", None, 1, "max")
    with pytest.raises(TensorError, match=r"y \(2, 9\)"):
        TiledFusedLogitsLoss.apply(loss_of, head(), x, labels[:, 1:], None, 3)
    with pytest.raises(TensorError, match="expected one number"):
        TiledFusedLogitsLoss.apply(lambda layer, x, y: layer(x), head(), x, labels, None, 3)
    with pytest.raises(ValueError, match="expected 2 arguments"):
        SequenceTiledCompute.apply(lambda h: h, 10, 3, ["h"], ["w"], "h", None, 1, None, x)


class Model(nn.Module):
    """Embedding, blocks with an MLP, head and loss, tiled or not."""

    def __init__(self, shards: int | None) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mlp": Mlp(shards), "norm": nn.LayerNorm(WIDTH)}) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.shards = shards

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(ids)
        for block in self.blocks:
            hidden = hidden + block["mlp"](block["norm"](hidden))
        if self.shards is None:
            return loss_of(self.head, hidden, ids)
        return TiledFusedLogitsLoss.apply(loss_of, self.head, hidden, ids, None, self.shards)


def trained(shards: int | None, folder: Any, stage: int, home: str) -> tuple[list[float], list[torch.Tensor]]:
    torch.manual_seed(3)
    model = Model(shards)
    where = {"device": home, **({"nvme_path": str(folder)} if home == "nvme" else {})}
    zero: dict[str, Any] = {"stage": stage, **({"offload_optimizer": where} if stage else {})}
    if stage == 3:
        zero["offload_param"] = where
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": zero,
        "gradient_accumulation_steps": 2,
        "steps_per_print": None,
        "zeroxide": {"threads": 1},
    }
    engine, *_ = zeroxide.initialize(model=model, config=config)
    losses = []
    for step in range(6):
        loss = engine(torch.arange(24).view(2, 12) * (step + 2) % WORDS)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = [each.clone() for each in engine.module.state_dict().values()]
    engine.destroy()
    return losses, weights


def test_an_engine_sees_one_gradient_of_a_tiled_module(tmp_path):
    """Catches: a gradient for each tile, a unit that is released after the first, and one that is never complete."""
    first = trained(3, tmp_path, 0, "none")
    for stage, home in ((1, "cpu"), (3, "none"), (3, "cpu"), (3, "nvme")):
        losses, weights = trained(3, tmp_path, stage, home)
        assert losses == first[0], (stage, home)
        assert all(torch.equal(mine, other) for mine, other in zip(weights, first[1], strict=True)), (stage, home)
    # Three steps of fp32 in another order of the sums; a step moves weights by 1e-2.
    losses, weights = trained(None, tmp_path, 3, "none")
    assert losses == pytest.approx(first[0], rel=2e-6)
    for mine, other in zip(weights, first[1], strict=True):
        assert (mine - other).abs().max().item() < 1e-5
