import json
import shutil

import numpy
import pytest
from tokenizers import Tokenizer

from zeroxide.cli.training.corpus import gather
from zeroxide.cli.training.dataset import open_dataset, prepare_dataset
from zeroxide.cli.training.prepare import _chunks
from zeroxide.errors import CheckpointError, DataError

TEXT = "def add(a, b):\n    return a + b\n\nclass Größe:\n    pass\n"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.py").write_text(f"# file {number} <|endoftext|>\n" + TEXT * (number + 1))
    return gather([str(folder)])


def prepare(folder, corpus, lines=None, **options):
    options = {"tokenizer": None, "vocabulary_size": 400, "threads": 1, **options}
    return prepare_dataset(folder, corpus, say=(lines if lines is not None else []).append, **options)


@pytest.fixture
def prepared(tmp_path, corpus):
    with prepare(tmp_path / "run" / "data", corpus) as data:
        yield data


def test_decoding_gives_the_text_back(corpus, prepared):
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_folder / "tokenizer.json"))
    for file, wanted in ((prepared.train, False), (prepared.held_out, True)):
        tokens = file.read(0, file.count)
        ends = numpy.flatnonzero(tokens == prepared.end_of_text)
        texts = [tokenizer.decode(part[part != prepared.end_of_text].tolist()) for part in numpy.split(tokens, ends)]
        expected = [d.path.read_text() for d in corpus.documents if d.held_out is wanted]
        # One end-of-text after each document and none for the text that spells it.
        assert [text for text in texts if text] == expected


def test_the_tokenizer_loads_in_transformers(prepared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    assert tokenizer.eos_token_id == prepared.end_of_text == 0
    assert len(tokenizer) == prepared.vocabulary_size <= 400


def test_tokens_are_made_once(tmp_path, corpus, prepared):
    lines = []
    with prepare(tmp_path / "run" / "data", corpus, lines) as again:
        assert again.train.count == prepared.train.count
    assert len(lines) == 1
    assert "tokens from" in lines[0]


def test_other_text_or_another_vocabulary_makes_them_anew(tmp_path, corpus, prepared):
    lines = []
    with prepare(tmp_path / "run" / "data", corpus, lines, vocabulary_size=300) as data:
        assert data.vocabulary_size <= 300
    assert any("training a byte-level BPE" in line for line in lines)
    corpus.documents[0].path.write_text("something else\n" * 30)
    with prepare(tmp_path / "run" / "data", corpus, vocabulary_size=300) as data:
        assert data.corpus_digest != prepared.corpus_digest


def test_large_files_come_through_in_pieces(tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("".join(f"line {number} of a large file\n" for number in range(60_000)))
    with prepare(tmp_path / "data", gather([str(path)])) as data:
        tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
        tokens = [*data.train.read(0, data.train.count), *data.held_out.read(0, data.held_out.count)]
        assert tokenizer.decode(tokens) == path.read_text()
        # A single document is cut near its end instead of being held out whole.
        assert 0.01 < data.held_out.count / len(tokens) < 0.03


def test_a_large_vocabulary_takes_wide_tokens(tmp_path, corpus, prepared):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(prepared.tokenizer_folder, tokenizer)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary.update({f"filler {number}": number for number in range(len(vocabulary), 70_000)})
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    with prepare(tmp_path / "wide", corpus, tokenizer=tokenizer) as data:
        assert data.vocabulary_size == 70_000
        assert data.train.count == prepared.train.count
        assert data.train.path.stat().st_size == 4 * data.train.count
        assert (data.train.read(0, 500) == prepared.train.read(0, 500)).all()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
def test_damage_is_noticed(tmp_path, prepared, damage):
    folder = tmp_path / "run" / "data"
    file = folder / "train.bin"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-2])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises((CheckpointError, DataError)) as caught:
        open_dataset(folder)
    assert str(folder) in caught.value.message


def test_a_tokenizer_that_cannot_be_loaded_is_an_error(tmp_path, corpus):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError):
        prepare(tmp_path / "data", corpus, tokenizer=broken)
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "data.making").exists()


def test_pieces_end_at_line_ends_where_there_are_any(tmp_path):
    path = tmp_path / "text"
    path.write_text("some words in a line\n" * 60_000 + "the last line")
    pieces = list(_chunks(str(path)))
    assert len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert "".join(pieces) == path.read_text()
    path.write_text("x" * 5_000_000)
    pieces = list(_chunks(str(path)))
    assert len(pieces) > 1
    assert "".join(pieces) == path.read_text()
