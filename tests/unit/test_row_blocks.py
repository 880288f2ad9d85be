"""Matrices of a vocabulary cut by rows: the same model in blocks, under the names and in the shapes that it has."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from row_models import (
    BLOCK,
    TOLERANCE,
    VOCABULARY,
    WIDTH,
    Model,
    assert_close,
    batch,
    cut,
    train,
    trained_plainly,
)
from running import Mode, config_of, started
from safetensors.torch import load_file
from torch import nn

import zeroxide
from zeroxide.checkpoint.contents import param_records
from zeroxide.checkpoint.format.manifest import read_manifest
from zeroxide.device.placement import spec
from zeroxide.engine import build
from zeroxide.errors import ConfigError, ModelError
from zeroxide.integrations.lightning.folder import exact_state_dict
from zeroxide.rows import blocks_of


@pytest.fixture(params=[Mode(), Mode("nvme", "nvme", prefetch=0)], ids=str)
def config(request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, Any]:
    found = config_of(request.param, tmp_path, "fp32")
    return found | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 0.0}


@pytest.mark.parametrize("loss", ["logits", "chunks"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_step_is_that_of_the_model_in_one_piece(config: dict[str, Any], tied: bool, loss: str) -> None:
    """Catches: rows looked up in another block, logits in another order, a block's gradient left out or given to
    another use of the matrix, padding that is trained, blocks without tokens that keep their last gradient."""
    model = Model(tied, loss=loss)
    wanted = trained_plainly(model)
    with started(model, config=cut(config)) as engine:
        assert [len(blocks_of(each)) for each in (engine.module.wte, engine.module.head)] == [4, 4]
        assert (blocks_of(engine.module.wte) is blocks_of(engine.module.head)) is tied
        train(engine)
        found = engine.module_state_dict()
        own = engine.module.state_dict()
    assert_close(found, {name: wanted[name] for name in found})
    assert set(found) == set(wanted) == set(own)
    assert all(torch.equal(own[name], found[name]) for name in found)
    assert (own["wte.weight"] is own["head.weight"]) is tied


@pytest.mark.parametrize(
    ("tied", "ways"),
    [(False, (BLOCK, None)), (True, (None, BLOCK)), (False, (BLOCK, 64 * WIDTH * 4)), (True, (BLOCK, None))],
    ids=["cut", "back", "finer", "tied"],
)
def test_checkpoints_have_the_matrix_however_it_is_cut(tmp_path: Any, tied: bool, ways: tuple[Any, Any]) -> None:
    """What one run saved another goes on from, with the bits of weights, moments and counts of updates. Catches: a
    block's rows written or read at another's place, moments left out, a name of blocks in the manifest."""
    config = config_of(Mode("nvme", "nvme"), tmp_path, "fp32")
    with started(Model(tied), config=cut(config, ways[0])) as engine:
        train(engine)
        engine.save_checkpoint(tmp_path / "saved")
        wanted = engine.module_state_dict()
        exact = moments(engine)
    manifest = read_manifest(tmp_path / "saved" / "global_step2")
    shapes = {name: tuple(each.shape) for each in manifest.parameters for name in each.names}
    assert shapes == {name: tuple(each.shape) for name, each in Model(tied).named_parameters(remove_duplicate=False)}
    assert all(piece.region is None for each in manifest.parameters for piece in each.weights)
    with started(Model(tied), config=cut(config, ways[1])) as engine:
        engine.load_checkpoint(tmp_path / "saved")
        found, own = engine.module_state_dict(), moments(engine)
        assert all(torch.equal(found[name], values) for name, values in wanted.items())
        assert set(own) == set(exact)
        assert all(torch.equal(values, exact[name]) for name, values in own.items())
        assert all(engine.parts.core().updates(held.unit, held.position) == 2 for held in records(engine))


def records(engine: Any) -> list[Any]:
    return param_records(engine.training_state)


def moments(engine: Any, part: str = "exp_avg_sq") -> dict[str, torch.Tensor]:
    """The second moments, or another part of the state, by name, blocks of rows put together."""
    found: dict[str, torch.Tensor] = {}
    for held in records(engine):
        values = torch.empty(held.numel)
        engine.parts.core().read_param(held.unit, held.position, part, 0, spec(values))
        full = found.setdefault(held.name, torch.full((math.prod(held.full_shape),), torch.nan))
        full[held.first : held.first + held.numel] = values
    return found


def test_an_export_has_the_matrix(config: dict[str, Any], tmp_path: Any) -> None:
    """Catches: blocks written to one another's place, or as tensors of their own."""
    with started(Model(), config=cut(config)) as engine:
        train(engine)
        engine.save_16bit_model(str(tmp_path / "out"), "model.safetensors")
        wanted = engine.module_state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_state_dict_loads_by_the_names_of_the_model(config: dict[str, Any], tied: bool) -> None:
    """Catches: rows of one block loaded into all, a matrix of another shape or without a name taken in silence."""
    other = Model(tied)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(torch.arange(param.numel()).view(param.shape) / param.numel())
    wanted = other.state_dict()
    with started(Model(tied), config=cut(config)) as engine:
        engine.load_module_state_dict(wanted)
        found = engine.module_state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        for wrong, line in (
            (
                wanted | {"wte.weight": torch.zeros(VOCABULARY - 1, WIDTH)},
                r"wte.weight: expected shape \(1000, 16\), got",
            ),
            ({name: each for name, each in wanted.items() if name != "wte.weight"}, "wte.weight is missing"),
        ):
            with pytest.raises(ModelError, match=f"^load_module_state_dict: {line}") as refused:
                engine.load_module_state_dict(wrong)
            assert "more)" not in str(refused.value)
        with pytest.raises(ModelError, match=r"load_state_dict: wte\.\S*weight has its values in an engine"):
            engine.module.load_state_dict(wanted)
        with pytest.raises(ModelError, match=r"keep_vars=True.*cut by rows"):
            engine.module.wte.state_dict(keep_vars=True)
        again = engine.module_state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("step", ["tensors", "weights", "guard"])
@pytest.mark.parametrize("stage", [1, 3])
def test_the_model_is_whole_again_after_any_step_that_fails(
    tmp_path: Any, stage: int, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: blocks left in the model, parameters that are others than before or in another order, values lost or
    copied where they had not moved, a caller's optimizer with blocks."""
    model = Model(tied=True)
    before = copy.deepcopy(model.state_dict())
    names = {name: id(each) for name, each in model.named_parameters(remove_duplicate=False)}
    where = model.wte.weight.data_ptr()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    listed = [id(each) for each in optimizer.param_groups[0]["params"]]
    config = config_of(Mode(), tmp_path, "fp32") | {"zero_optimization": {"stage": stage}}
    del config["optimizer"]
    number = [name for name, _ in build.STEPS].index(step)
    monkeypatch.setattr(build, "STEPS", (*build.STEPS[: number + 1], ("stop", _fail)))
    with pytest.raises(RuntimeError, match="on purpose"):
        zeroxide.initialize(model=model, optimizer=optimizer, config=cut(config))
    assert [id(each) for each in optimizer.param_groups[0]["params"]] == listed
    assert {name: id(each) for name, each in model.named_parameters(remove_duplicate=False)} == names
    assert list(names) == list(model.state_dict()) == list(before)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert step in ("weights", "guard") or model.wte.weight.data_ptr() == where
    model(*batch(0)).backward()


@pytest.mark.parametrize("stage", [1, 3])
def test_the_model_gets_its_matrices_back(tmp_path: Any, stage: int) -> None:
    """At the end of an engine whose parameters show their values; others are told that theirs are gone. Catches: blocks
    left in the model, parameters that are others than before, lost values, groups of a caller's optimizer left out."""
    model = Model(tied=True)
    before, params = copy.deepcopy(model.state_dict()), dict(model.named_parameters(remove_duplicate=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = config_of(Mode(), tmp_path, "fp32") | {"zero_optimization": {"stage": stage}}
    with pytest.raises(ConfigError, match=r"row_bytes = 100 is less than 64 rows of wte\.weight, which take 4096"):
        zeroxide.initialize(model=model, optimizer=optimizer, config=cut(config, 100))
    wanted = trained_plainly(model)
    with started(model, optimizer=optimizer, config=cut(config)) as engine:
        train(engine)
        found = engine.module_state_dict()
        with pytest.raises(ModelError, match="has its values in an engine"):
            model.load_state_dict(before)
    assert_close({name: found[name] for name in wanted}, wanted)
    if stage == 3:
        with pytest.raises(ModelError, match="lost its weights when its engine was destroyed"):
            model(*batch(0))
        return
    assert {name: id(each) for name, each in model.named_parameters(remove_duplicate=False)} == {
        name: id(each) for name, each in params.items()
    }
    assert all(torch.equal(values, found[name]) for name, values in model.state_dict().items())
    model(*batch(0)).backward()


def _fail(self: Any) -> None:
    raise RuntimeError("on purpose")


class Rows(nn.Module):
    """An embedding alone, whose gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.wte(ids).view(-1, WIDTH)
        return (found * torch.arange(found.numel(), dtype=found.dtype).view(-1, WIDTH)).sum()


@pytest.mark.parametrize("more", [{}, {"update_in_backward": True}, {"accumulation_order": "layers"}], ids=str)
def test_blocks_without_tokens_are_updated_and_not_read(tmp_path: Any, more: dict[str, Any]) -> None:
    """AdamW moves and decays rows that a batch does not have. Catches: blocks left out of a step, or of the first after
    none of their rows has come; all blocks gathered in forward where some would do. fp32 against double: 3 steps of
    lr 1e-2 with at most ten roundings of numbers below 4 each, 3 * 10 * 2^-24 * 4 < 1e-5."""
    config = config_of(Mode("nvme", "nvme", prefetch=0), tmp_path, "fp32")
    config["optimizer"]["params"] = {"lr": 1e-2, "weight_decay": 0.1}
    config["zeroxide"] |= more
    plain = Rows().double()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    with started(Rows(), config=cut(config)) as engine:
        used: list[int] = []
        for number, block in enumerate(blocks_of(engine.module.wte)):
            block.register_forward_hook(lambda *_, number=number: used.append(number))
        for ids in (torch.tensor([300, 301]), torch.tensor([5, 999, 5]), torch.tensor([300, 0])):
            engine.train_batch(iter([(ids,)])) if "accumulation_order" in more else _step(engine, ids)
            plain(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert used == ([*range(4)] * 3 if more else [1, 0, 3, 0, 1])
        found = engine.module_state_dict()["wte.weight"]
    torch.testing.assert_close(found.double(), plain.wte.weight.detach(), **TOLERANCE)


def _step(engine: Any, ids: torch.Tensor) -> None:
    engine.backward(engine(ids))
    engine.step()


class Nested(nn.Module):
    """An embedding in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"rows": nn.Embedding(VOCABULARY, WIDTH), "mix": nn.Linear(WIDTH, WIDTH)}) for _ in range(2)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return sum(torch.tanh(each["mix"](each["rows"](ids))).square().sum() for each in self.layers)


def test_blocks_of_rows_inside_of_a_layer_are_units_of_their_own(config: dict[str, Any]) -> None:
    """Catches: blocks that are gathered with the layer that they are in, and so all together."""
    with started(Nested(), config=cut(config)) as engine:
        units = [unit.names for unit in engine.parts.units]
        engine.backward(engine(batch(0)[0]))
        engine.step()
    assert len(units) == 10
    assert [names for names in units if len(names) > 1] == [
        [f"layers.{layer}.mix.weight", f"layers.{layer}.mix.bias"] for layer in range(2)
    ]


def test_exact_weights_for_lightning_have_the_matrix(tmp_path: Any) -> None:
    """Masters of bf16 weights, which a step of 1e-5 moves by less than bf16 shows. Catches: the last block alone, or
    live weights in place of exact ones."""
    config = config_of(Mode("cpu", "cpu"), tmp_path, "bf16")
    config["optimizer"]["params"] = {"lr": 1e-5}
    with started(Model(tied=True), config=cut(config, BLOCK // 2)) as engine:
        train(engine)
        found, wanted = exact_state_dict(engine), moments(engine, "weights")
    assert set(found) == set(Model(tied=True).state_dict())
    assert found["wte.weight"] is found["head.weight"]
    assert all(torch.equal(found[name].flatten(), values) for name, values in wanted.items())
    assert not torch.equal(found["wte.weight"], found["wte.weight"].bfloat16().float())
