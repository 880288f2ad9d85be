"""Who makes, touches or shares a matrix that is cut by rows: told by its own name, or refused by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from row_models import (
    BLOCK,
    VOCABULARY,
    WIDTH,
    Model,
    cut,
    train,
)
from running import Mode, config_of, started
from torch import nn
from torch.nn import functional

import zeroxide
from zeroxide.config import load
from zeroxide.engine.rows import cut_by_config
from zeroxide.errors import ConfigError, ModelError
from zeroxide.rows import blocks_of


@pytest.fixture
def config(tmp_path: Any) -> dict[str, Any]:
    found = config_of(Mode("nvme", "nvme", prefetch=0), tmp_path, "fp32")
    return found | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 0.0}


def test_what_cannot_be_cut_is_refused_by_name(tmp_path: Any) -> None:
    """Before anything has changed. Catches: a matrix cut whose other uses would go wrong in silence."""
    config = config_of(Mode(), tmp_path, "fp32")

    def norm(model: Any) -> None:
        model.wte.max_norm = 1.0

    def another(model: Any) -> None:
        model.mine = model.wte.weight

    def bilinear(model: Any) -> None:
        model.other = nn.Bilinear(2, 2, 2)
        model.other.weight = model.wte.weight

    def hooked(model: Any) -> None:
        model.head.weight.register_hook(lambda grad: grad)

    def leaf(model: Any) -> None:
        zeroxide.zero.set_z3_leaf_modules(model, [nn.Embedding])

    for change, line in (
        (norm, "wte.weight takes more.* max_norm"),
        (another, "mine takes more.* of a Model, which is neither"),
        (bilinear, "wte.weight takes more.* is other.weight as well, of a Bilinear"),
        (hooked, "head.weight takes more.* hooks of its own"),
        (leaf, "wte._weight_rows.0 is below a leaf module"),
    ):
        model = Model()
        change(model)
        before = [id(each) for each in model.parameters()]
        with pytest.raises(ModelError, match=f"zeroxide.row_bytes: {line}"):
            zeroxide.initialize(model=model, config=cut(config))
        assert [id(each) for each in model.parameters()] == before
    with zeroxide.zero.Init():
        model = Model()
    with pytest.raises(ModelError, match=r"made inside zeroxide\.zero\.Init"):
        zeroxide.initialize(model=model, config=cut(config))
    with pytest.raises(ConfigError, match=r"wte\.weight is the weight of 2 modules.*update_in_backward"):
        zeroxide.initialize(
            model=Model(tied=True), config=cut(config | {"zeroxide": {"update_in_backward": True}, "bf16": {}})
        )


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_parts_of_a_model_on_other_ranks_are_refused(axis: str) -> None:
    """Catches: rows of a part of a matrix taken for rows of all."""
    config = load({"zeroxide": {"row_bytes": BLOCK, "mesh": {axis: 2}}}, world_size=2)
    with pytest.raises(ConfigError, match=r"zeroxide\.row_bytes: cutting by rows .* is not built"):
        cut_by_config(Model(), config)


def test_who_touches_the_weight_is_told(config: dict[str, Any]) -> None:
    """Catches: values of a weight that has none taken in silence, shapes and dtypes that are not the matrix's, ids
    that are no rows."""
    with started(Model(), config=cut(config)) as engine:
        module = engine.module
        weight = module.wte.weight
        assert (weight.shape, weight.dtype, weight.device.type, weight.requires_grad, weight.numel(), len(weight)) == (
            (VOCABULARY, WIDTH), torch.float32, "cpu", True, VOCABULARY * WIDTH, VOCABULARY,
        )  # fmt: skip
        for act in (
            lambda: weight.data,
            lambda: weight.sum(),
            lambda: weight[3],
            lambda: torch.zeros(2, WIDTH) @ weight.t(),
            lambda: weight.copy_(torch.zeros(VOCABULARY, WIDTH)),
            lambda: nn.init.normal_(weight),
            lambda: weight.tolist(),
            lambda: functional.linear(weight, torch.zeros(3, WIDTH)),
            lambda: zeroxide.safe_get_full_fp32_param(weight),
            lambda: zeroxide.zero.GatheredParameters([weight]),
            lambda: module.wte.reset_parameters(),
        ):
            with pytest.raises(
                ModelError, match=r"wte\.weight \(1000, 16\) is cut by rows \(zeroxide\.row_bytes\), and "
            ):
                act()
        with zeroxide.zero.GatheredParameters(module.parameters(), modifier_rank=0):
            blocks_of(module.wte)[1].weight.data.fill_(7.0)
        assert set(engine.module_state_dict()["wte.weight"][256:512].flatten().tolist()) == {7.0}
        with torch.no_grad():
            assert functional.embedding(torch.tensor([300]), weight).tolist() == [[7.0] * WIDTH]
            assert module.wte(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, WIDTH)
            assert module.wte(torch.tensor(3)).shape == (WIDTH,)
        for ids in (VOCABULARY, -1):
            with pytest.raises(IndexError, match=r"wte\.weight has 1000 rows"):
                module.wte(torch.tensor([5, ids]))
        module.wte.weight = nn.Parameter(torch.zeros(VOCABULARY, WIDTH))
        with pytest.raises(ModelError, match=r"wte\.weight has appeared in the model"):
            train(engine)


def test_pieces_of_another_length_are_refused(config: dict[str, Any]) -> None:
    """Catches: a source with more rows than the matrix, or fewer, whose last rows are taken or left in silence."""
    for more, line in (
        (8, "wte.weight: expected 16000 elements, got more"),
        (-8, "expected [0-9]+ elements, got [0-9]+"),
    ):
        with torch.device("meta"):
            model = Model()
        source = InPieces(Model().state_dict())
        made, wrong = source.pieces, torch.zeros(VOCABULARY * WIDTH + more)

        def pieces(name: str, shape: torch.Size, made: Any = made, wrong: torch.Tensor = wrong) -> Any:
            return made(name, shape) if name != "wte.weight" else iter([(0, wrong)])

        source.pieces = pieces  # type: ignore[method-assign]
        with pytest.raises(ModelError, match=line):
            zeroxide.initialize(model=model, config=cut(config), weights=source)


class Made:
    """Makes weights for a model on the meta device: by their modules, as a library does, or by name."""

    def __init__(self, wanted: dict[str, torch.Tensor]) -> None:
        self.wanted = wanted
        self.filled: list[str] = []

    def fill(self, tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            for own, param in module.named_parameters(recurse=False):
                assert param.shape == self.wanted[f"{name}.{own}"].shape
                with torch.no_grad():
                    param.copy_(self.wanted[f"{name}.{own}"])
        for name, tensor in tensors.items():
            assert not modules or torch.equal(tensor, self.wanted[name]), name
            tensor.copy_(self.wanted[name])
            self.filled.append(name)


class InPieces(Made):
    """The same in pieces of 1000 elements, of which none outlives its turn."""

    def pieces(self, name: str, shape: torch.Size) -> Any:
        assert shape == self.wanted[name].shape
        self.filled.append(name)
        memory = torch.empty(1000)
        for start in range(0, shape.numel(), 1000):
            piece = memory[: min(1000, shape.numel() - start)].copy_(self.wanted[name].view(-1)[start : start + 1000])
            yield start, piece
            memory.fill_(torch.nan)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kind", [Made, InPieces])
def test_a_model_on_meta_is_made_by_its_own_names(
    config: dict[str, Any], kind: type[Made], tied: bool, frozen: bool
) -> None:
    """Catches: a source that is asked for blocks or once a block, pieces that reach over the end of a block lost or
    given to the next, modules that show no weight while they are made."""
    wanted = Model(tied).state_dict()
    with torch.device("meta"):
        model = Model(tied)
    model.wte.weight.requires_grad_(not frozen)
    source = kind(wanted)
    with started(model, config=cut(config), weights=source) as engine:
        found = engine.module_state_dict()
        assert len(source.filled) == len(set(source.filled))
        assert set(source.filled) == {name for name, _ in Model(tied).named_parameters()}
        assert set(found) == set(wanted)
        assert all(torch.equal(values, wanted[name]) for name, values in found.items())
        train(engine)
