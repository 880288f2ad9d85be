"""Operators of the device: the bits of the host's, through views, in place and into what is given; what is refused."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from simulated.programs import trained


def same(result, expected):
    """Whether all tensors, which are on the device in `result`, have the bits, the sizes and the strides."""
    results, expecteds = ([each] if isinstance(each, torch.Tensor) else [*each] for each in (result, expected))
    assert len(results) == len(expecteds)
    for ours, theirs in zip(results, expecteds, strict=True):
        assert ours.device.type == "sim"
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert ours.cpu().flatten().view(torch.uint8).equal(theirs.contiguous().flatten().view(torch.uint8))
    return True


SQUARE = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
COUNTS = torch.tensor([[3, 1, 2], [0, 5, 4]])

OPERATORS = {
    "add": lambda x: x + x.t(),
    "scalar": lambda x: 2 * x - 1,
    "matmul": lambda x: x @ x,
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.double().mean(),
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: functional.layer_norm(x, (6,)),
    "group_norm": lambda x: functional.group_norm(x.view(1, 6, 6), 2),
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "linear": lambda x: functional.linear(x.view(2, 3, 6), x, x[0]),
    "bf16 linear": lambda x: functional.linear(x.bfloat16(), x.bfloat16()),
    "attention": lambda x: functional.scaled_dot_product_attention(*[x.view(1, 2, 3, 6)] * 3, is_causal=True),
    "masked attention": lambda x: functional.scaled_dot_product_attention(
        *[x.view(1, 2, 3, 6)] * 3, attn_mask=torch.ones(3, 3, dtype=torch.bool, device=x.device).tril()
    ),
    "attention in three dimensions": lambda x: functional.scaled_dot_product_attention(*[x.view(2, 3, 6)] * 3),
    "convolution": lambda x: functional.conv2d(x.view(1, 1, 6, 6), x[:2, :2].reshape(1, 1, 2, 2)),
    "several results": lambda x: x.topk(2),
    "sort": lambda x: x.sort(stable=True),
    "strided": lambda x: x.t()[::2, 1:].exp(),
    "expanded": lambda x: x[:1].expand(3, 6) * 2,
    "permuted result": lambda x: torch.empty_like(x.t()).copy_(x),
    "cat": lambda x: torch.cat([x, x.t()]),
    "chunks": lambda x: x.chunk(3),
    "embedding": lambda x: functional.embedding(COUNTS.to(x.device), x),
    "indices": lambda x: x[COUNTS.to(x.device)],
    "indices of the host": lambda x: x[COUNTS],
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "clamp": lambda x: x.clamp(-1, 1),
    "norm": lambda x: torch.linalg.vector_norm(x),
    "foreach": lambda x: torch._foreach_mul([x, x.t()], 2.0),
    "complex": lambda x: torch.view_as_complex(x.view(6, 3, 2)) * 1j,
    "real view": lambda x: torch.view_as_real(torch.view_as_complex(x.view(6, 3, 2))),
    "bits": lambda x: x.view(torch.int32),
    "windows": lambda x: x.unfold(1, 3, 2),
    "inverse": lambda x: torch.linalg.inv(x),
    "int8": lambda x: (x * 10).to(torch.int8),
    "scalar of the host": lambda x: x + torch.tensor(2.0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_the_bits_of_the_host(sim, name):
    assert same(OPERATORS[name](SQUARE.to("sim")), OPERATORS[name](SQUARE))
    assert sim.races() == []


def test_what_is_written_in_place_and_out(sim):
    def program(device):
        x = SQUARE.to(device).clone()
        row = x[1]
        row.add_(1)
        x[:, 2].copy_(row)
        x[0, 0] = 7
        x.index_put_((torch.tensor([3], device=device),), torch.zeros(6, device=device))
        torch.mul(x, 2, out=x)
        grown = torch.empty(0, device=device)
        torch.sub(x, row, out=grown)
        values, indices = torch.empty(6, device=device), torch.empty(6, dtype=torch.int64, device=device)
        torch.max(x, 1, out=(values, indices))
        torch._foreach_add_([values, row], 1)
        return x, row, grown, values, indices

    assert same(program("sim"), program("cpu"))
    assert sim.races() == []


def test_views_share_memory(sim):
    x = SQUARE.to("sim")
    views = [x.t(), x[2:], x.view(36), x.unfold(0, 2, 2), x.diagonal(), x.view(torch.int32), x.detach(), *x.split(2)]
    views += [torch.view_as_complex(x.view(18, 2)), x.data, x.unsqueeze(0).squeeze(0), x.expand(2, 6, 6)]
    assert {each.untyped_storage().data_ptr() for each in views} == {x.data_ptr()}
    x.untyped_storage().resize_(0)
    assert {each.untyped_storage().nbytes() for each in views} == {0}


def test_tensors_of_the_host_are_refused(sim):
    x = SQUARE.to("sim")
    for use in (
        lambda: x + SQUARE,
        lambda: SQUARE.add_(x),
        lambda: torch.cat([x, SQUARE]),
        lambda: functional.linear(x, SQUARE),
        lambda: torch.mul(x, 2, out=SQUARE),
        lambda: torch.where(x > 0, x, SQUARE),
        lambda: SQUARE[COUNTS.to("sim")].add_(x[0]),
    ):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device, but found at least two"):
            use()
    with pytest.raises(TypeError, match="can't convert sim:0 device type tensor to numpy"):
        x.numpy()


def test_a_parameter_moves_with_its_module(sim):
    """It stays the object that it was, as on a GPU, and its gradient goes where it is."""
    layer, x = nn.Linear(6, 6), SQUARE
    weight = layer.weight
    kept = layer(x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.to("sim")
    assert layer.weight is weight
    assert (weight.device.type, weight.is_leaf, weight.requires_grad) == ("sim", True, True)
    layer(x.to("sim")).sum().backward()
    optimizer.step()
    weight.data = weight.data.cpu()
    assert weight.device.type == "cpu"
    weight.data = torch.zeros(2, 2, dtype=torch.bfloat16, device="sim")
    assert (weight.shape, weight.dtype) == ((2, 2), torch.bfloat16)
    assert kept.grad_fn is not None


LAYOUTS = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.t(),
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "double": lambda x: x.double(),
    "bf16": lambda x: x.bfloat16(),
    "a row": lambda x: x[:1].expand(6, 6),
    "conjugated": lambda x: torch.complex(x, x).conj(),
    "negated": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_copies_between_layouts_and_types(sim, non_blocking, pinned):
    """Each kind of source into each kind of target that is no expanded row, all three ways."""
    for source in LAYOUTS.values():
        for name, target in LAYOUTS.items():
            if name == "a row" or (source(SQUARE).is_complex() and not target(SQUARE).is_complex()):
                continue
            expected = target(torch.zeros(6, 6)).copy_(source(SQUARE))
            for first, second in (("cpu", "sim"), ("sim", "sim"), ("sim", "cpu")):
                base = SQUARE.pin_memory() if pinned and first == "cpu" else SQUARE.to(first)
                result = target(torch.zeros(6, 6, pin_memory=pinned and second == "cpu", device=second))
                result.copy_(source(base), non_blocking=non_blocking)
                torch.accelerator.synchronize()
                assert result.cpu().equal(expected), (name, first, second)
    assert sim.races() == []


def test_the_host_reads_values(sim):
    x = SQUARE.to("sim")
    assert (x[0, 0].item(), x[0].tolist()) == (SQUARE[0, 0].item(), SQUARE[0].tolist())
    assert torch.equal(x, x.clone())
    assert bool((x == x).all())
    assert str(x.cpu()) == str(SQUARE)
    assert "device='sim:0'" in repr(x)


def test_values_go_through_files(sim):
    x, file = SQUARE.to("sim")[1:, ::2], io.BytesIO()
    layer = nn.Linear(3, 3).to("sim")
    torch.save({"x": x, "layer": layer.state_dict()}, file)
    for where in ("sim:0", "cpu"):
        file.seek(0)
        loaded = torch.load(file, map_location=None if where == "sim:0" else where)
        assert str(loaded["x"].device) == where
        assert loaded["x"].cpu().equal(SQUARE[1:, ::2])
    layer.load_state_dict(loaded["layer"])


RANDOM = {
    "normal": lambda device, g: torch.randn(5, device=device, generator=g),
    "in place": lambda device, g: torch.empty(5, device=device).uniform_(generator=g),
    "permutation": lambda device, g: torch.randperm(9, device=device, generator=g),
    "bernoulli": lambda device, g: torch.full((9,), 0.5, device=device).bernoulli(generator=g),
    "multinomial": lambda device, g: torch.ones(9, device=device).multinomial(4, generator=g),
    "dropout": lambda device, g: torch.native_dropout(torch.ones(9, device=device), 0.5, True)[0],
}


@pytest.mark.parametrize("name", RANDOM)
def test_generators(sim, name):
    """The device's generator gives the host's numbers for its seed; neither moves the other."""
    draw = RANDOM[name]
    torch.manual_seed(5)
    expected = [draw("cpu", None), draw("cpu", None)]
    torch.manual_seed(5)
    untouched = torch.get_rng_state()
    state = sim.get_rng_state()
    assert same([draw("sim", None), draw("sim", None)], expected)
    assert torch.get_rng_state().equal(untouched)
    sim.set_rng_state(state)
    assert same(draw("sim", None), expected[0])
    if name != "dropout":
        own = torch.Generator("sim").manual_seed(5)
        assert same(draw("sim", own), expected[0])
        own.set_state(state)
        assert same(draw("sim", own), expected[0])


def test_dropout_of_modules(sim):
    x = torch.ones(1000, device="sim", requires_grad=True)
    y = nn.Dropout(0.25)(x)
    y.sum().backward()
    assert set(y.tolist()) == {0.0, (torch.ones(1) / 0.75).item()}
    assert x.grad.equal(y.detach())


def test_autocast_computes_in_lower_precision(sim):
    layer, x = nn.Linear(6, 6), SQUARE
    expected = functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    layer = layer.to("sim")
    with torch.autocast("sim", torch.bfloat16):
        assert torch.get_autocast_dtype("sim") == torch.bfloat16
        y = layer(x.to("sim"))
        assert same(y.detach(), expected.detach())
        assert functional.layer_norm(y, (6,)).dtype == torch.float32
        assert y.sum().dtype == torch.float32
        assert torch.dot(y[0], y[0].float()).dtype == torch.float32
        with torch.autocast("sim", enabled=False):
            assert layer(x.to("sim")).dtype == torch.float32
    assert layer(x.to("sim")).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_model_trains_to_the_bits_of_the_host(sim, dtype, checkpointed):
    assert_trained(trained("sim", dtype, checkpointed=checkpointed), trained("cpu", dtype, checkpointed=checkpointed))
    assert sim.races() == []
    assert sim.wait_list() == []


def test_a_model_trains_under_autocast(sim):
    losses, weights = trained("sim", torch.float32, autocast=True)
    assert_trained((losses, weights), trained("sim", torch.float32, autocast=True, checkpointed=True))
    assert losses[2] < losses[0]
    assert losses != trained("sim", torch.float32)[0]


def assert_trained(result, expected):
    assert result[0] == expected[0]
    assert all(one.equal(other) for one, other in zip(result[1], expected[1], strict=True))


def test_backward_is_on_the_stream_of_forward(sim):
    """A copy that is under way on that stream is waited for by its own order, without an event."""
    sim.set_delay(100_000, 100_000)
    side = torch.Stream("sim")
    with side:
        weight = torch.ones(1000, device="sim", requires_grad=True)
        factor = torch.empty(1000, device="sim")
        loss = (weight * factor).sum()
        factor.data.copy_(torch.full((1000,), 3.0).pin_memory(), non_blocking=True)
    loss.backward()
    side.synchronize()
    assert weight.grad.cpu().equal(torch.full((1000,), 3.0))
    assert sim.races() == []


def test_modules_compile_to_the_same(sim):
    layer, x = nn.Sequential(nn.Linear(6, 6), nn.GELU()).to("sim"), SQUARE.to("sim")
    assert torch.compile(layer, backend="aot_eager")(x).equal(layer(x))
