import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zeroxide.cli.planning.passes import meta_model
from zeroxide.cli.training.from_safetensors import FromSafetensors
from zeroxide.cli.training.from_scratch import FromScratch
from zeroxide.cli.training.models import PRESETS, build_model, choose_model, num_parameters
from zeroxide.errors import ModelError, StorageError


def build(name="tiny", dtype=torch.float32):
    return build_model(choose_model(name), dtype)


def fill(model, source, names=None):
    """What the engine does: one fp32 tensor per parameter, here one unit per call."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    result = {name: torch.zeros(shapes[name]) for name in (names or shapes)}
    source.fill(result, {})
    return result


@pytest.mark.parametrize(
    ("name", "count"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080)]
)
def test_presets_have_the_published_sizes(name, count):
    model = build(name, torch.bfloat16)
    assert num_parameters(model) == count
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_models_that_are_built_leave_the_choice_as_it_was():
    """A run is found again by its model's digest. Catches: a config that is handed to transformers itself."""
    choice = choose_model("tiny")
    before = choice.digest()
    build_model(choice, torch.bfloat16)
    meta_model(choice, torch.float32)
    assert choice.digest() == before == choose_model("tiny").digest()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_buffers_are_real_and_as_in_a_model_built_outright(name):
    model = build(name, torch.bfloat16)
    buffers = dict(model.named_buffers())
    assert not any(buffer.is_meta for buffer in buffers.values())
    if name == "tiny-llama":
        plain = dict(AutoModelForCausalLM.from_config(choose_model(name).config).named_buffers())
        assert buffers.keys() == plain.keys() != set()
        for key, buffer in buffers.items():
            assert buffer.dtype == torch.float32
            assert buffer.equal(plain[key])


@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_initial_weights_do_not_depend_on_grouping_or_order(name):
    model = build(name)
    whole = fill(model, FromScratch(model, 5))
    source = FromScratch(build(name), 5)
    for parameter in reversed(list(whole)):
        assert fill(model, source, [parameter])[parameter].equal(whole[parameter]), parameter
    other = fill(model, FromScratch(model, 6))
    assert any(not other[key].equal(whole[key]) for key in whole)


@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_initial_weights_have_the_distribution_of_the_model_class(name):
    model = build(name)
    ours = fill(model, FromScratch(model, 5))
    theirs = dict(AutoModelForCausalLM.from_config(choose_model(name).config).named_parameters())
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        want = theirs[key].detach()
        if float(want.std()) == 0:
            assert tensor.equal(want), key
        else:
            # The spread of n draws is known to about 1 / sqrt(2 n); five of those on either side.
            slack = 5 * 2 / (2 * tensor.numel()) ** 0.5
            assert float(tensor.std()) == pytest.approx(float(want.std()), rel=slack), key
            assert abs(float(tensor.mean())) < 5 * float(want.std()) / tensor.numel() ** 0.5, key


def test_no_two_matrices_start_alike():
    model = build()
    weights = fill(model, FromScratch(model, 5))
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        one, two = (weights[f"transformer.h.{block}.{name}.weight"].flatten() for block in (0, 1))
        assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.1, name


def test_a_buffer_that_nobody_initialises_is_an_error(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ModelError, match=r"the buffer model\.rotary_emb\.\w+ is not set"):
        build("tiny-llama")


def test_initial_weights_leave_the_global_generator_and_the_model_alone():
    model = build()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    fill(model, FromScratch(model, 5))
    assert torch.get_rng_state().equal(state)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(hasattr(parameter, "_is_hf_initialized") for parameter in model.parameters())


def test_a_parameter_that_nobody_initialises_is_an_error():
    model = build()
    model.transformer.extra = torch.nn.Module()
    model.transformer.extra.scale = torch.nn.Parameter(torch.empty(4, device="meta"))
    with pytest.raises(ModelError, match=r"transformer\.extra\.scale is not set"):
        fill(model, FromScratch(model, 0), ["transformer.extra.scale"])


@pytest.fixture
def directory(tmp_path):
    """A model directory with weights, several shards of them."""

    def make(name, **options):
        model = AutoModelForCausalLM.from_config(choose_model(name).config)
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name, dict(model.named_parameters())

    return make


@pytest.mark.parametrize(("name", "options"), [("tiny", {}), ("tiny-llama", {"max_shard_size": "100KB"})])
def test_weights_come_from_safetensors(directory, name, options):
    path, theirs = directory(name, **options)
    choice = choose_model(str(path))
    assert choice.has_weights
    assert not choice.has_tokenizer
    assert len(list(path.glob("*.safetensors"))) > bool(options)
    model = build_model(choice, torch.bfloat16)
    source = FromSafetensors(model, path)
    assert source.unexpected == ()
    ours = fill(model, source)
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[key]) for key, tensor in ours.items())


def test_weights_are_read_in_pieces(directory, monkeypatch):
    from zeroxide.cli.training import from_safetensors

    monkeypatch.setattr(from_safetensors, "_PIECE_BYTES", 1000)
    path, theirs = directory("tiny")
    model = build()
    assert all(tensor.equal(theirs[key]) for key, tensor in fill(model, FromSafetensors(model, path)).items())


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_names_of_the_base_model_and_low_precision_are_understood(directory):
    path, theirs = directory("tiny")

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key).to(torch.float16)

    rewrite(path, strip)
    model = build()
    for key, tensor in fill(model, FromSafetensors(model, path)).items():
        assert tensor.equal(theirs[key].to(torch.float16).float()), key


def test_tied_weights_may_be_stored_under_either_name(directory):
    path, theirs = directory("tiny")
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}))
    model = build()
    ours = fill(model, FromSafetensors(model, path), ["transformer.wte.weight"])
    assert ours["transformer.wte.weight"].equal(theirs["transformer.wte.weight"])


def test_missing_and_unexpected_weights_are_named(directory):
    path, _ = directory("tiny")
    rewrite(
        path, lambda tensors: tensors.update({"value_head.weight": torch.zeros(3), "h.0.attn.bias": torch.zeros(3)})
    )
    assert FromSafetensors(build(), path).unexpected == ("value_head.weight",)
    rewrite(path, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))
    with pytest.raises(ModelError, match=r"lacks weights for transformer\.h\.1\.mlp\.c_fc\.weight"):
        FromSafetensors(build(), path)


def test_another_shape_is_refused(directory):
    path, _ = directory("tiny")
    rewrite(path, lambda tensors: tensors.update({"transformer.ln_f.weight": torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"ln_f\.weight has shape \[3\], the model wants \[64\]"):
        FromSafetensors(build(), path)


@pytest.mark.parametrize("damage", ["short", "header", "length", "empty", "offsets", "trailing", "hole"])
def test_a_damaged_file_is_refused(directory, damage):
    path, _ = directory("tiny")
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if damage == "short":
        file.write_bytes(data[:-10])
    elif damage == "header":
        file.write_bytes(data[:8] + b"x" * length + data[8 + length :])
    elif damage == "length":
        file.write_bytes((1 << 62).to_bytes(8, "little") + data[8:])
    elif damage == "trailing":
        file.write_bytes(data + b"1234")
    elif damage == "hole":
        for entry in (entry for key, entry in header.items() if key != "__metadata__"):
            entry["data_offsets"] = [at + 8 for at in entry["data_offsets"]]
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8) + data[8 + length :])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        name = next(key for key in header if key != "__metadata__")
        header[name]["data_offsets"][0] += 4
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises((ModelError, StorageError)) as caught:
        FromSafetensors(build(), path)
    assert "model.safetensors" in caught.value.message


def test_a_dtype_that_no_weight_is_read_from_is_named(directory):
    """Catches: such a weight passed over, which is then said to be lacking."""
    path, _ = directory("tiny")
    name = "transformer.h.1.mlp.c_fc.weight"
    rewrite(path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=r"model\.safetensors: transformer\.h\.1\.mlp\.c_fc\.weight has dtype F8_E4M3"):
        FromSafetensors(build(), path)


def test_an_index_cannot_point_outside(directory):
    path, _ = directory("tiny")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ModelError, match="outside the model directory"):
        FromSafetensors(build(), path)


@pytest.mark.parametrize(
    ("content", "phrase"),
    [(None, "no config.json"), ("{", "config.json"), ('{"model_type": "nonsense"}', "config.json")],
)
def test_a_directory_that_is_no_model(tmp_path, content, phrase):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=phrase):
        choose_model(str(tmp_path))


def test_a_model_that_is_no_language_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="cannot be built as a language model"):
        build_model(choose_model(str(tmp_path)), torch.float32)


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ModelError, match="did you mean gpt2-medium"):
        choose_model("gpt2-medum")


def test_pickled_weights_are_refused(directory):
    path, _ = directory("tiny")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not safetensors"):
        choose_model(str(path))


def test_python_of_a_model_folder_does_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Model: ...\nclass Config: ...\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    with pytest.raises(ModelError, match="contains custom code"):
        choose_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "auto_map": own}))
    with pytest.raises(ModelError, match="contains custom code"):
        build_model(choose_model(str(tmp_path)), torch.float32)
    assert not ran.exists()


def test_names_and_configs_that_can_be_of_no_model_are_one_line(tmp_path):
    for name, line in (("~nosuchuser/x", "no such user"), ("x" * 300, "File name too long")):
        with pytest.raises(ModelError, match=f"^--model {name}: {line}$"):
            choose_model(name)
    for change in ({"n_head": 0}, {"n_embd": "abc"}):
        fields = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, **change}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ModelError):
            build_model(choose_model(str(tmp_path)), torch.float32)


def test_pieces_of_either_source_are_what_fill_gives(tmp_path, monkeypatch):
    """Catches: a piece from another place of a file, or in the dtype of the file."""
    model = build("tiny", torch.bfloat16)
    monkeypatch.setattr("zeroxide.cli.training.from_safetensors._PIECE_BYTES", 6000)
    drawn = FromScratch(model, 3)
    for stored in (torch.float32, torch.bfloat16, torch.float64):
        save_file(
            {name: tensor.to(stored) for name, tensor in fill(model, drawn).items()}, tmp_path / "model.safetensors"
        )
        for source in (drawn, FromSafetensors(model, tmp_path)):
            for name, expected in fill(model, source).items():
                end = 0
                for start, piece in source.pieces(name, expected.shape):
                    assert (start, piece.dtype) == (end, torch.float32)
                    end += piece.numel()
                    assert piece.equal(expected.flatten()[start:end]), name
                assert end == expected.numel()
