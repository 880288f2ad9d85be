"""Matrices of a vocabulary cut by rows: the same model in blocks, under the names and in the shapes that it has.

The oracle is the model in plain torch, in one process and in double precision where numbers are compared. An engine in
fp32 differs from it by roundings: each of the two steps of SGD that are taken moves a weight by lr = 0.1 times a
gradient. A gradient here is a sum of at most 1000 products (the vocabulary, over which the head's input gradient is
summed) of numbers below 4, so its error is at most 1000 * 2^-24 * 4 * 4 < 1e-3 in the worst case and, as errors of
random sign add up, about sqrt(1000) * 2^-24 * 16 = 3e-5; the weights are compared to 1e-5, which is 0.1 times that over
two steps with a factor to spare, and what a mutation does is 1e-2 or more.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from running import Mode, config_of, started
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import zeroxide
from zeroxide.checkpoint.contents import param_records
from zeroxide.checkpoint.format.manifest import read_manifest
from zeroxide.config import load
from zeroxide.device.placement import spec
from zeroxide.engine import build
from zeroxide.engine.rows import cut_by_config
from zeroxide.errors import ConfigError, ModelError
from zeroxide.integrations.lightning.folder import exact_state_dict
from zeroxide.losses import linear_cross_entropy
from zeroxide.rows import blocks_of

VOCABULARY, WIDTH, PADDING = 1000, 16, 300
BLOCK = 256 * WIDTH * 4
"""Bytes of 256 rows in fp32: four blocks, of which the last has 232."""
TOLERANCE = {"rtol": 0, "atol": 1e-5}


class Model(nn.Module):
    def __init__(self, tied: bool = False, bias: bool = True, loss: str = "logits") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.wte = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.h = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = x + torch.tanh(block(x))
        if self.loss == "logits":
            return functional.cross_entropy(self.head(x).flatten(0, -2), targets.flatten())
        return linear_cross_entropy(x, self.head.weight, targets, linear_bias=self.head.bias, columns=100)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with the padding and one that comes twice; beside these, of the first block alone in the second batch."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (3, 7), generator=generator) % (VOCABULARY if step == 0 else 250)
    ids[0, 0], ids[0, 1], ids[1, 1] = PADDING, 5, 5
    return ids, torch.randint(0, VOCABULARY, (3, 7), generator=generator)


def cut(config: dict[str, Any], row_bytes: int | str | None = BLOCK) -> dict[str, Any]:
    return config | {"zeroxide": config.get("zeroxide", {}) | ({} if row_bytes is None else {"row_bytes": row_bytes})}


def train(engine: Any, first: int = 0, steps: int = 2) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = engine(*batch(step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def trained_plainly(model: nn.Module, steps: int = 2) -> dict[str, torch.Tensor]:
    plain = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(steps):
        plain(*batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain.state_dict()


@pytest.fixture(params=[Mode(), Mode("nvme", "nvme", prefetch=0)], ids=str)
def config(request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, Any]:
    found = config_of(request.param, tmp_path, "fp32")
    return found | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 0.0}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        assert found[name].shape == values.shape, name
        torch.testing.assert_close(found[name].double(), values, **TOLERANCE, msg=name)


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


@pytest.mark.parametrize("ways", [(BLOCK, None), (None, BLOCK), (BLOCK, 64 * WIDTH * 4)], ids=["cut", "back", "finer"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
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


@pytest.mark.parametrize("step", ["tensors", "plan", "units", "weights", "guard"])
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
