"""zero.Init on one rank: what is cut when, and that code which sets initial values need not know of it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Block, build
from running import Mode, config_of, started
from torch import nn
from torch.nn import functional

import zeroxide
from zeroxide import zero
from zeroxide.errors import ConfigError, ModelError, StorageError
from zeroxide.zero.init import context as init


def made_alike(make, **options):
    """The values that `make` gives a model, outside of the context and inside it."""
    torch.manual_seed(3)
    plain = make()
    torch.manual_seed(3)
    with zero.Init(**options):
        model = make()
    assert all(param.numel() == 0 for param in model.parameters())
    expected = dict(plain.named_parameters())
    with zero.GatheredParameters(model):
        got = dict(model.named_parameters())
        assert got.keys() == expected.keys()
        assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    assert all(param.numel() == 0 for param in model.parameters())
    return model, plain


class Careless(nn.Module):
    """Sets initial values in every way that models do, long after the layers were made."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.zeros(4, 8))
        self.rest = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.first.weight
        self.block = Block(8)
        nn.init.xavier_uniform_(self.first.weight)
        nn.init.trunc_normal_(self.table, std=0.02)
        self.first.bias.data.fill_(2.0)
        with torch.no_grad():
            self.rest[0].weight[1:3] = 7
            self.rest[1].weight.copy_(self.rest[0].weight)
            self.rest[2].weight.data = torch.full((8, 8), 5.0)
            self.block.up.weight.mul_(1.0 / self.block.up.weight.size(0) + self.block.up.weight.dim())
        weight, bias = self.block.down.weight.data, self.block.down.bias.data
        weight.zero_()
        bias.add_(1)
        self.apply(self.set_norms)
        self.rows, self.fan = len(self.table), nn.init._calculate_fan_in_and_fan_out(self.first.weight)

    @staticmethod
    def set_norms(module):
        if isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, 0.5)
        for param in module.parameters(recurse=False):
            assert param.shape.numel() == param.numel() > 0

    def forward(self, x):
        return self.twin(self.first(x)) + self.table.sum() + self.block(x)


def test_values_set_anywhere_in_the_constructor_count():
    model, plain = made_alike(Careless)
    assert model.twin.weight is model.first.weight
    assert (model.rows, model.fan) == (plain.rows, plain.fan) == (4, (8, 8))


def test_values_count_when_little_may_be_whole_at_once(monkeypatch):
    monkeypatch.setattr(init, "KEPT_BYTES", 300)
    made_alike(Careless)


def whole_among(layers):
    with torch._C.DisableTorchFunction():
        return sum(layer.weight.numel() > 0 for layer in layers)


def test_little_is_whole_at_once(monkeypatch):
    monkeypatch.setattr(init, "KEPT_BYTES", 2 * 32 * 32 * 4)
    with zero.Init():
        layers = []
        for _ in range(12):
            layers.append(nn.Linear(32, 32, bias=False))
            assert whole_among(layers) <= 3
        assert layers[0].weight.sum().item() != 0
        assert whole_among(layers) <= 3
        block = nn.Sequential(nn.Linear(32, 32))
        assert whole_among(block) == 0


def test_what_happens_inside_the_context():
    def make():
        layer = nn.Linear(8, 8)
        copies = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
        copies[0].scale = nn.Parameter(copies[1](torch.ones(1, 8)).detach().abs())
        copies.append(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
        copies.append(nn.MultiheadAttention(8, 2))
        copies.append(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False))
        copies.append(nn.LSTM(4, 4))
        return copies

    made_alike(make)


def test_hugging_face_models_are_built_as_outside():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=61
    )
    made_alike(lambda: LlamaForCausalLM(config))


def test_contexts_inside_one_another_are_one():
    with zero.Init(), zero.Init(dtype=torch.bfloat16):
        model = nn.Sequential(nn.Linear(4, 4))
        with zero.Init(enabled=False):
            pass
    assert not init.is_building()
    assert model[0].weight.ds_tensor.dtype is torch.float32
    with zero.Init(enabled=False):
        assert nn.Sequential(nn.Linear(4, 4))[0].weight.shape == (4, 4)


def test_an_exception_ends_the_context():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            raise KeyError("no")

    with pytest.raises(KeyError), zero.Init():
        Fails()
    assert not init.is_building()
    after = nn.Sequential(nn.Linear(4, 4))
    assert after[0].weight.shape == (4, 4)
    assert type(after[0].weight) is nn.Parameter
    made_alike(lambda: nn.Sequential(nn.Linear(4, 4)))


def test_a_model_that_exists_is_cut():
    plain = Careless()
    model = copy.deepcopy(plain)
    zero.Init(module=model)
    assert all(param.numel() == 0 and param.ds_numel for param in model.parameters())
    with zero.GatheredParameters(model.parameters()):
        assert torch.equal(model(torch.ones(1, 8, 8)), plain(torch.ones(1, 8, 8)))


def test_slices_change_only_by_the_modifier():
    with zero.Init():
        model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.ds_tensor.clone()
    with pytest.raises(ModelError, match="was changed"), zero.GatheredParameters(model):
        model[0].weight.data.fill_(3)
    with pytest.raises(ModelError, match="was changed"), zero.GatheredParameters(model), torch.no_grad():
        model[0].weight.fill_(3)
    assert torch.equal(model[0].weight.ds_tensor, before)
    with zero.GatheredParameters(model, modifier_rank=0), zero.GatheredParameters(model[0].weight):
        model[0].weight.data.fill_(3)
    assert bool((model[0].weight.ds_tensor == 3).all())
    with pytest.raises(ModelError, match=r"is torch.float32 \(5,"), zero.GatheredParameters(model, modifier_rank=0):
        model[0].weight.data = torch.ones(5, 4)


def test_slices_have_the_dtype_asked_for():
    with zero.Init(dtype=torch.bfloat16):
        model = build("gpt")
    assert {param.ds_tensor.dtype for param in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("chosen", [{}, {"remote_device": "cpu"}, {"remote_device": "nvme"}, {"remote_device": None}])
def test_slices_are_where_they_were_asked_to_be(chosen, tmp_path):
    config = config_of(Mode("nvme", "nvme"), tmp_path)
    model, _ = made_alike(lambda: build("gpt"), config_dict_or_path=config, **chosen)
    mapped = model.wte.weight._handle.mapped is not None
    assert mapped == (chosen.get("remote_device") != "cpu")
    # The file has no name: nothing is left behind, whatever happens.
    assert list(tmp_path.iterdir()) == []
    # A directory is made where there is none, as an engine does; and again where the end of another has removed it.
    for _ in range(2):
        with zero.Init(config_dict_or_path=config_of(Mode("nvme"), tmp_path / "a/b")):
            model = nn.Sequential(nn.Linear(2, 2))
        assert model[0].weight._handle.mapped is not None
        (tmp_path / "a/b").rmdir()
    (tmp_path / "a/b").touch()
    with (
        pytest.raises(StorageError, match=r"a/b: slices of parameters cannot be kept there: "),
        zero.Init(config_dict_or_path=config_of(Mode("nvme"), tmp_path / "a/b")),
    ):
        nn.Sequential(nn.Linear(2, 2))


@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", "nvme")], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_training_goes_on_from_slices(mode, dtype, tmp_path):
    torch.manual_seed(3)
    plain = build("gpt")
    torch.manual_seed(3)
    with zero.Init(config_dict_or_path=config_of(mode, tmp_path)):
        model = build("gpt")
    ids, handles = torch.arange(24).view(2, 12), [param._handle for param in model.parameters()]
    outcomes = []
    for each in (plain, model):
        with started(each, config=config_of(mode, tmp_path, dtype)) as engine:
            assert each is plain or not any(handle.nbytes for handle in handles)
            losses = []
            for _ in range(3):
                losses.append(engine(ids))
                engine.backward(losses[-1])
                engine.step()
            exact = [zeroxide.safe_get_full_fp32_param(param) for param in each.parameters()]
            outcomes.append((losses, exact))
    for one, other in zip(*outcomes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_not_built_is_refused(tmp_path):
    for name in ("data_parallel_group", "mpu", "zero_param_parallel_group", "param_swapper"):
        with pytest.raises(ConfigError, match=name):
            zero.Init(**{name: True})
    with pytest.raises(ConfigError, match="zero_quantized_weights in the config of"):
        zero.Init(zero_quantized_weights=True)
    with pytest.raises(ConfigError, match=r"got torch\.int8"):
        zero.Init(dtype=torch.int8)
    with pytest.raises(ConfigError, match="remote_device"):
        zero.Init(remote_device="tape")
    with pytest.raises(ConfigError, match="nvme_path"), zero.Init(remote_device="nvme"):
        pass
    with zero.Init(), pytest.raises(ModelError, match="leave the context"):
        zeroxide.initialize(model=nn.Linear(2, 2), lr=1e-3)
    with zero.Init():
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4)})
    with pytest.raises(ModelError, match="is empty, and copying needs its values"):
        copy.deepcopy(model)


def test_functions_of_torch_are_left_alone():
    linear, reset, apply = functional.linear, nn.Linear.__init__, nn.Module.apply
    with zero.Init():
        assert (functional.linear, nn.Linear.__init__, nn.Module.apply) == (linear, reset, apply)


MEMORY = """
import sys, threading, time, torch
from torch import nn
import zeroxide
from zeroxide import zero
torch.set_num_threads(1)
def rss():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, rss())
        time.sleep(0.002)
width, layers = 2048, 16  # 256 MiB of fp32
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
    def forward(self, x):
        for layer in self.h:
            x = layer(x)
        return x.float().sum()
config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": sys.argv[1]},
          "offload_optimizer": {"device": "nvme", "nvme_path": sys.argv[1]}}, "bf16": {"enabled": True}}
zero.Init(module=nn.Linear(width, width, bias=False), config_dict_or_path=config)
before = rss()
threading.Thread(target=watch, daemon=True).start()
with zero.Init(config_dict_or_path=config):
    model = Model()
print(peak - before)
peak = 0
engine, *_ = zeroxide.initialize(model=model, config=config, lr=1e-3)
print(peak - before)
engine.backward(engine(torch.ones(1, width, dtype=torch.bfloat16)))
engine.step()
engine.destroy()
"""


def test_a_model_on_disk_is_never_whole_in_memory(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(zeroxide.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    construction, takeover = map(int, done.stdout.split())
    # 16 MiB a layer: one being made, one as it is cut, and what importing and drawing random numbers takes.
    assert construction < 80
    # One as slice, as parameter and in the core; the ring has 48 MiB. The model has 256.
    assert takeover < 160


FILE = """
import sys, threading, time, torch
from safetensors import safe_open
from torch import nn
from zeroxide import zero
torch.set_num_threads(1)
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssFile")))
    return [int(fields[name].split()[0]) >> 10 for name in ("RssAnon", "RssFile")]
peaks = [0, 0]
def watch():
    global peaks
    while True:
        peaks = [max(pair) for pair in zip(peaks, resident())]
        time.sleep(0.001)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Embedding(32 * 1024, 1024)  # 128 MiB in fp32
        self.h = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(8))  # as many
config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": sys.argv[1]}}}
zero.Init(module=nn.Linear(2048, 2048, bias=False), config_dict_or_path=config)
before = resident()
with zero.Init(config_dict_or_path=config):
    model = Model()
with safe_open(sys.argv[2], framework="pt") as opened:
    given = {name: opened.get_tensor(name) for name in opened.keys()}
    threading.Thread(target=watch, daemon=True).start()
    with torch.no_grad():
        for name, param in model.named_parameters():
            with zero.GatheredParameters([param], modifier_rank=0):
                param.copy_(given[name])
    print(*(peak - was for peak, was in zip(peaks, before)))
    for name, param in model.named_parameters():
        with zero.GatheredParameters([param]):
            assert torch.equal(param, given[name]), name
"""


def test_a_file_that_parameters_are_filled_from_does_not_stay_resident(tmp_path):
    """Catches: pages of the mapped file left in the process, or slices of it (256 MiB each); rows that are left out."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    values = {f"h.{at}.weight": torch.randn(2048, 2048) for at in range(8)}
    save_file(values | {"wide.weight": torch.randn(32 * 1024, 1024)}, tmp_path / "model.safetensors")
    env = {**os.environ, "PYTHONPATH": str(Path(zeroxide.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FILE, str(tmp_path), str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    own, of_files = map(int, done.stdout.split())
    # The largest parameter and what importing takes; 16 MiB of the file, 4 of a slice, and libraries that come back.
    assert own < 128 + 40
    assert of_files < 16 + 4 + 40
