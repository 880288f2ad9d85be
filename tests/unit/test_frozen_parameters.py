"""Frozen parameters and buffers keep dtype and bits, of every dtype, wherever they go."""

from __future__ import annotations

import json

import pytest
import torch
from frozen_engines import MODES, PRECISIONS, differences, shown, started, train
from frozen_models import DTYPES, Mixed, Packed, bytes_by_name, drawn, expected_kept, raw_bytes
from safetensors import safe_open
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.checkpoint.convert.convert import convert
from zeroxide.checkpoint.format.manifest import VERSION
from zeroxide.checkpoint.format.stream import dtype_name
from zeroxide.errors import CheckpointError, ModelError


@pytest.mark.parametrize(("stage", "offload", "precision"), MODES, ids=str)
def test_every_dtype_keeps_its_bits_while_training(tmp_path, stage, offload, precision):
    model = Mixed(buffers=False)
    expected = expected_kept(model, PRECISIONS[precision])
    marks = {name: param.quant_state for name, param in model.kept() if isinstance(param, Packed)}
    assert len(expected) > 80
    with started(model, tmp_path, stage, offload, precision) as engine:
        train(engine)
        in_forward = {name: bytes(raw.tolist()) for name, raw in model.seen.items()}
        assert [name for name in in_forward if name in expected and expected[name][2] != in_forward[name]] == []
        assert len(in_forward) > 80
        assert differences(shown(model), expected) == []
        assert differences(bytes_by_name(engine.module_state_dict().items()), expected) == []
        for name, mark in marks.items():
            param = model.get_parameter(name)
            assert isinstance(param, Packed)
            assert param.quant_state is mark
    if stage < 3:
        assert differences(bytes_by_name(model.kept()), expected) == []


@pytest.mark.parametrize(("stage", "offload", "precision"), [MODES[0], MODES[2], *MODES[4:8]], ids=str)
def test_new_bits_are_taken_as_they_are(tmp_path, stage, offload, precision):
    model, other, third = (Mixed(seed, buffers=False) for seed in (0, 1, 2))
    compute = PRECISIONS[precision]
    with started(model, tmp_path, stage, offload, precision) as engine:
        train(engine, 1)
        with zero.GatheredParameters(model.parameters(), modifier_rank=0):
            for (name, param), (_, new) in zip(model.kept(), other.kept(), strict=True):
                if name in expected_kept(other, compute):
                    raw_bytes(param).copy_(raw_bytes(new))
        train(engine, 1)
        assert differences(shown(model), expected_kept(other, compute)) == []
        state = engine.module_state_dict()
        state.update({name: param.detach() for name, param in third.kept() if name in expected_kept(third, compute)})
        engine.load_module_state_dict(state)
        train(engine, 1)
        assert differences(shown(model), expected_kept(third, compute)) == []


@pytest.mark.parametrize(("there", "here"), [(MODES[0], MODES[6]), (MODES[7], MODES[1]), (MODES[8], MODES[2])], ids=str)
@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_keep_bits_of_parameters_and_buffers(tmp_path, there, here, background):
    model, other = Mixed(0), Mixed(1)
    compute = PRECISIONS[there[2]]
    expected, buffers = expected_kept(model, compute), bytes_by_name(model.named_buffers())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    tiny = {"tile_bytes": 8192, "staging_bytes": 1 << 20, "checkpoint_background": background}
    with started(model, scratch, *there, zeroxide=tiny) as engine:
        train(engine)
        path = engine.save_checkpoint(tmp_path)
        engine.wait_for_checkpoint()
    assert json.loads((path / "manifest.json").read_text())["version"] == VERSION
    with started(other, scratch, here[0], here[1], there[2]) as engine:
        engine.load_checkpoint(tmp_path)
        assert differences(shown(other), expected) == []
        assert bytes_by_name(other.named_buffers()) == buffers
        train(engine)
        assert differences(shown(other), expected) == []


@pytest.mark.parametrize(("stage", "offload", "precision"), [MODES[0], MODES[7]], ids=str)
def test_frozen_bits_that_a_checkpoint_leaves_out_stay(tmp_path, stage, offload, precision):
    model, other = Mixed(0), Mixed(1)
    expected = expected_kept(other, PRECISIONS[precision])
    with started(model, tmp_path, stage, offload, precision) as engine:
        engine.save_checkpoint(tmp_path / "saved", exclude_frozen_parameters=True)
        trained = engine.module_state_dict()["first.weight"]
    with started(other, tmp_path, stage, offload, precision) as engine:
        engine.load_checkpoint(tmp_path / "saved")
        assert torch.equal(engine.module_state_dict()["first.weight"], trained)
        assert differences(shown(other), expected) == []


def test_frozen_weights_of_ordinary_dtypes_are_not_opaque(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False))
    model.register_buffer("count", torch.arange(3))
    with started(model, tmp_path) as engine:
        path = engine.save_checkpoint(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert all("opaque" not in param for param in manifest["parameters"])


def test_another_dtype_is_refused_before_anything_changes(tmp_path):
    def build(dtype):
        model = nn.Sequential(nn.Linear(8, 8))
        model.frozen = nn.Parameter(drawn(dtype, (4, 4), torch.Generator().manual_seed(1)), requires_grad=False)
        return model

    with started(build(torch.int8), tmp_path) as engine:
        engine.save_checkpoint(tmp_path)
    for dtype in (torch.uint8, torch.float8_e5m2, torch.bfloat16):
        model = build(dtype)
        before = bytes(raw_bytes(model.frozen).tolist())
        with started(model, tmp_path) as engine:
            with pytest.raises(CheckpointError, match=r"another dtype for frozen \(int8 there, "):
                engine.load_checkpoint(tmp_path)
            # -29 and 115 have five and seven bits, more than any of these dtypes gives to a number of either sign.
            given = engine.module_state_dict() | {"frozen": torch.tensor([-29, 115] * 8, dtype=torch.int16).view(4, 4)}
            given["frozen"] *= 33
            with pytest.raises(ModelError, match=r"frozen: expected torch\.\w+, got torch.int16"):
                engine.load_module_state_dict(given)
        assert bytes(raw_bytes(model.frozen).tolist()) == before


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32], ids=str)
def test_without_a_section_nothing_frozen_is_cast(tmp_path, base, trained):
    model = nn.Sequential(nn.Linear(8, 8, dtype=trained))
    generator = torch.Generator().manual_seed(4)
    for dtype in (base, torch.float32):
        name = "base" if dtype is base else "wide"
        model.register_parameter(name, nn.Parameter(drawn(dtype, (50, 30), generator), requires_grad=False))
    expected = bytes_by_name([("base", model.base), ("wide", model.wide)])
    with started(model, tmp_path, 3, "nvme", None) as engine:
        engine.backward(engine(torch.ones(2, 8, dtype=trained)).float().square().mean())
        engine.step()
        assert differences(bytes_by_name(engine.module_state_dict().items()), expected) == []
        assert engine.module_state_dict()["0.weight"].dtype is trained


# Files for others ----------------------------------------------------------------------------------------------------


def exportable(dtype):
    return dtype_name(dtype) is not None


@pytest.mark.parametrize(("stage", "offload", "precision"), [MODES[0], MODES[6], MODES[7]], ids=str)
def test_exports_are_read_by_the_reference_library_with_the_same_bits(tmp_path, stage, offload, precision):
    model = Mixed(0, dtypes=[dtype for dtype in DTYPES if exportable(dtype)])
    for owner in model.modules():
        # A scalar of two numbers has no shape in a file.
        for name, each in list(owner._parameters.items()):
            if each is not None and each.dtype is torch.float4_e2m1fn_x2 and each.dim() == 0:
                del owner._parameters[name]
    expected = expected_kept(model, PRECISIONS[precision])
    with started(model, tmp_path, stage, offload, precision) as engine:
        expected |= bytes_by_name(model.named_buffers())
        path = engine.save_16bit_model(tmp_path / "model")
    with safe_open(path, "pt") as file:
        found = bytes_by_name((name, file.get_tensor(name)) for name in expected)
    assert differences(found, expected) == []


def test_converting_casts_numbers_and_leaves_bits_alone(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16).requires_grad_(False))
    generator = torch.Generator().manual_seed(5)
    model.fp8 = nn.Parameter(drawn(torch.float8_e4m3fn, (3, 5), generator), requires_grad=False)
    model.packed = Packed(drawn(torch.bfloat16, (4, 6), generator))
    model.empty = nn.Parameter(torch.empty(0, 3))
    model.register_buffer("wide", drawn(torch.complex64, (2, 3), generator))
    kept = bytes_by_name([("fp8", model.fp8), ("packed", model.packed), ("wide", model.wide)])
    numbers = model[1].weight.detach().clone()
    with started(model, tmp_path, 3, "nvme") as engine:
        engine.save_checkpoint(tmp_path / "saved")
    written, _ = convert(tmp_path / "saved", tmp_path / "model", "fp32", None, include_frozen=True)
    with safe_open(written, "pt") as file:
        assert differences(bytes_by_name((name, file.get_tensor(name)) for name in kept), kept) == []
        assert torch.equal(file.get_tensor("1.weight"), numbers.to(torch.float32))
        assert file.get_tensor("empty").shape == (0, 3)


def test_a_dtype_that_files_of_others_lack_is_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("wide", torch.zeros(3, dtype=torch.complex128))
    with started(model, tmp_path) as engine:
        with pytest.raises(ModelError, match=r"wide has dtype torch.complex128, which safetensors files cannot hold"):
            engine.save_16bit_model(tmp_path / "model")
        engine.save_checkpoint(tmp_path / "saved")
    with pytest.raises(ModelError, match=r"wide has dtype torch.complex128"):
        convert(tmp_path / "saved", tmp_path / "model", "fp32", None, include_frozen=True)


# What memory it takes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
def test_frozen_weights_take_the_bytes_that_they_have(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(8, 8))
    model.base = nn.Parameter(torch.zeros(1 << 20, dtype=dtype), requires_grad=False)
    with started(model, tmp_path) as engine:
        held = engine.parts.core().usage()["weights"][0]
        assert engine.parts.plan.buckets["weights"] == held
    # The layer, and padding of each part to 2048 elements of 4 bytes.
    most = (1 << 20) * dtype.itemsize + 2 * 8192
    assert (1 << 20) * dtype.itemsize <= held <= most


# Slices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("remote", ["cpu", "nvme"])
def test_slices_of_zero_init_keep_bits(tmp_path, dtype, remote):
    expected = expected_kept(Mixed(0, buffers=False), torch.float32 if dtype is None else torch.bfloat16)
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    with zero.Init(config_dict_or_path=config, remote_device=remote, dtype=dtype):
        model = Mixed(0, buffers=False)
    assert all(not param.numel() for param in model.parameters())
    assert differences(shown(model), expected) == []
    with zero.GatheredParameters(model.blocks[0].packed_0, modifier_rank=0):
        raw_bytes(model.blocks[0].packed_0).fill_(7)
    kind, shape, _ = expected["blocks.0.packed_0"]
    expected["blocks.0.packed_0"] = (kind, shape, b"\7" * (131072))
    with started(model, tmp_path, 3, "nvme", "fp32" if dtype is None else "bf16") as engine:
        train(engine)
        assert differences(shown(model), expected) == []


# Exact values --------------------------------------------------------------------------------------------------------


def test_exact_values_are_given_where_fp32_holds_them(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    given = {
        "byte": torch.arange(256).to(torch.uint8),
        "fp8": torch.arange(256).to(torch.uint8).view(torch.float8_e5m2),
        "halves": torch.tensor([1.5, -2.25], dtype=torch.float16),
        "wide": torch.tensor([0.1], dtype=torch.float64),
        "long": torch.tensor([1 << 40]),
        "pair": torch.tensor([1 + 2j]),
    }
    for name, values in given.items():
        model.register_parameter(name, nn.Parameter(values, requires_grad=False))
    with started(model, tmp_path) as engine:
        for name in ("byte", "fp8", "halves"):
            found = zeroxide.safe_get_full_fp32_param(model.get_parameter(name))
            assert torch.equal(found.nan_to_num(3.0), given[name].to(torch.float32).nan_to_num(3.0))
        for name in ("wide", "long", "pair"):
            param = model.get_parameter(name)
            for call in (zeroxide.safe_get_full_fp32_param, zeroxide.safe_get_local_fp32_param):
                with pytest.raises(ModelError, match=f"{name} has dtype torch.*fp32 cannot hold"):
                    call(param)
        for name in ("byte", "fp8", "wide", "long", "pair"):
            param = model.get_parameter(name)
            with pytest.raises(ModelError, match=f"{name} has dtype torch.*no fp32 value is rounded to"):
                zeroxide.safe_set_full_fp32_param(param, torch.zeros(given[name].shape))
        zeroxide.safe_set_full_fp32_param(model.halves, torch.tensor([0.1, 3.0]))
        assert torch.equal(engine.module_state_dict()["halves"], torch.tensor([0.1, 3.0]).to(torch.float16))


# Refused, or not -----------------------------------------------------------------------------------------------------


def sparse():
    return torch.eye(4).to_sparse()


def quantized():
    return torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8)


def wrapped():
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.rand(4), torch.rand(4))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    ("make", "what"),
    [(sparse, "has layout sparse_coo"), (quantized, "has the quantized dtype"), (wrapped, "is a TwoTensor")],
)
def test_tensors_that_are_not_plain_bytes_are_refused_by_name(tmp_path, stage, make, what):
    model = nn.Sequential(nn.Linear(4, 4))
    model.odd = nn.Parameter(make(), requires_grad=False)
    with pytest.raises(ModelError, match=f"odd {what}"), started(model, tmp_path, stage):
        pass
    assert model[0].weight.shape == (4, 4)

    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("odd", make())
    with started(model, tmp_path, stage) as engine:
        engine.backward(engine(torch.ones(2, 4)).square().mean())
        engine.step()
        with pytest.raises(CheckpointError, match=f"buffer odd {what}"):
            engine.save_checkpoint(tmp_path / "saved")
        with pytest.raises(ModelError, match=f"buffer odd {what}"):
            engine.save_16bit_model(tmp_path / "model")
    assert not list((tmp_path / "saved").glob("*"))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_trained_parameters_of_other_dtypes_are_refused_by_name(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(4, 4))
    model.odd = nn.Parameter(torch.zeros(4, dtype=dtype))
    with (
        pytest.raises(ModelError, match=f"odd is trained and has dtype {str(dtype)[6:]}: expected fp32, bf16 or fp16"),
        started(model, tmp_path),
    ):
        pass


def test_a_buffer_without_values_is_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("nowhere", torch.zeros(3, device="meta"))
    with pytest.raises(ModelError, match="buffer nowhere is on the meta device"), started(model, tmp_path):
        pass


def odd_buffers(seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("seconds", torch.tensor([1790000123.25], dtype=torch.float64))
    model.register_buffer("expanded", drawn(torch.float32, (1, 5), generator).expand(3, 5))
    model.register_buffer("turned", drawn(torch.int4, (3, 5), generator).t())
    model.register_buffer("mirrored", drawn(torch.complex64, (3,), generator).conj())
    model.register_buffer("sliding", torch.arange(seed, seed + 6).unfold(0, 3, 1))
    model.register_buffer("none", torch.empty(0, 3, dtype=torch.complex128))
    return model


def plain(model):
    found = {}
    for name, each in model.named_buffers():
        whole = each.resolve_conj() if each.is_complex() else each
        whole = whole if whole.dtype is not torch.int4 else whole.view(torch.uint8)
        found[name] = (each.dtype, tuple(each.shape), bytes(raw_bytes(whole).tolist()))
    return found


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (3, "nvme")])
def test_buffers_that_share_or_turn_their_elements_are_saved_and_loaded(tmp_path, stage, offload):
    model, other = odd_buffers(0), odd_buffers(9)
    expected = plain(model)
    turned = other.turned
    with started(model, tmp_path, stage, offload) as engine:
        state = engine.module_state_dict()
        engine.save_checkpoint(tmp_path / "saved")
    with started(other, tmp_path, stage, offload) as engine:
        engine.load_checkpoint(tmp_path / "saved")
        assert {**plain(other), "seconds": None} == {**expected, "seconds": None}
        assert other.turned is turned
        engine.load_module_state_dict({**state, "sliding": torch.zeros(4, 3, dtype=torch.int64)})
        assert other.sliding.sum() == 0


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "cpu"), (3, "none"), (3, "nvme")])
def test_parameters_without_elements_are_trained_beside_others(tmp_path, stage, offload):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 4))
        model[1].register_parameter("alone", nn.Parameter(torch.empty(3, 0)))
        return model

    model, oracle = build(), build()
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-2)
    x = torch.rand(3, 8)
    with started(model, tmp_path, stage, offload) as engine:
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(oracle(x), x[:, :4]).backward()
            optimizer.step()
            engine.backward(torch.nn.functional.mse_loss(engine(x), x[:, :4]))
            engine.step()
        path = engine.save_checkpoint(tmp_path / "saved")
        engine.load_checkpoint(tmp_path / "saved")
        state = engine.module_state_dict()
        engine.save_16bit_model(tmp_path / "model")
    assert path.exists()
    for name, param in oracle.named_parameters():
        # A step of 1e-2 in fp32, whose rounding torch's kernel orders otherwise: a few units of 2^-24 of the weight.
        torch.testing.assert_close(state[name], param.detach(), rtol=0, atol=3 * 4 * 2**-24)


def test_a_model_of_parameters_without_elements_alone(tmp_path):
    with started(nn.Linear(4, 0), tmp_path, 3) as engine:
        engine.backward(engine(torch.ones(2, 4)).sum())
        engine.step()
        assert engine(torch.ones(2, 4)).shape == (2, 0)


# Low-rank adapters over packed weights -------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen weight of 4-bit numbers, two in a byte, in words of `storage`; trained adapters beside it."""

    def __init__(self, width, storage):
        super().__init__()
        raw = torch.randint(0, 256, (width * width // 2,), dtype=torch.uint8)
        self.base = Packed(raw.view(storage).view(-1, 1), quant_state={"scale": 0.05 + 0.01 * torch.rand(width, 1)})
        self.down = nn.Linear(width, 4, bias=False)
        self.up = nn.Linear(4, width, bias=False)

    def forward(self, x):
        raw = self.base.detach().view(-1).view(torch.uint8)
        width = x.shape[-1]
        nibbles = torch.stack([raw & 15, raw >> 4], -1).view(width, width)
        weight = (nibbles.to(torch.float32) - 7.5) * self.base.quant_state["scale"] / width**0.5
        return x + torch.tanh(x @ weight.to(x.dtype).t() + self.up(self.down(x)))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (3, "nvme")])
def test_adapters_over_packed_weights_train_as_in_torch(tmp_path, storage, stage, offload):
    def build():
        torch.manual_seed(3)
        model = nn.Sequential()
        model.layers = nn.ModuleList(Adapted(64, storage) for _ in range(3))
        model.forward = lambda x: _through(model.layers, x)
        return model

    model, oracle = build(), build()
    packed = {name: bytes(raw_bytes(param).tolist()) for name, param in model.named_parameters() if "base" in name}
    optimizer = torch.optim.AdamW([each for each in oracle.parameters() if each.requires_grad], lr=1e-2)
    x = torch.rand(8, 64)
    losses = []
    with started(model, tmp_path, stage, offload) as engine:
        for _ in range(8):
            optimizer.zero_grad()
            expected = oracle(x).square().mean()
            expected.backward()
            optimizer.step()
            loss = engine(x).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append((loss.item(), expected.item()))
        with zero.GatheredParameters(model.parameters()):
            after = {
                name: bytes(raw_bytes(param).tolist()) for name, param in model.named_parameters() if name in packed
            }
    assert after == packed
    # fp32 forward on the same ops; after each of 8 steps weights of size 0.1 differ by a few ulp, 1e-8, which three
    # layers of width 64 and a slope of 1 turn into less than 64 * 1e-8 of a loss of about 0.3.
    for found, expected in losses:
        assert found == pytest.approx(expected, rel=5e-6)
    assert losses[-1][1] < 0.9 * losses[0][1]


def _through(layers, x):
    for layer in layers:
        x = layer(x)
    return x
