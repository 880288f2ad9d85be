import os

import pytest

from zeroxide.cli.training.corpus import gather
from zeroxide.errors import DataError


def make(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def names(corpus):
    return [document.name for document in corpus.documents]


def test_default_is_the_standard_library():
    corpus = gather(())
    assert corpus.num_bytes > 8_000_000
    assert names(corpus) == sorted(names(corpus))
    assert "argparse.py" in names(corpus)
    assert not [name for name in names(corpus) if "site-packages" in name or name.startswith("test/")]
    held_out = [document for document in corpus.documents if document.held_out]
    assert 0.005 < sum(d.num_bytes for d in held_out) / corpus.num_bytes < 0.06


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder that stands for the standard library."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    return tmp_path


TABLE = "".join(f"    0x{code:04X}: '\\u{code:04x}',  # LATIN CAPITAL LETTER\n" for code in range(200))


def test_tables_are_left_out_of_the_standard_library_alone(library):
    code = "def function(argument):\n    return argument + 1\n"
    make(library, {"code.py": code, "both.py": code * 400 + TABLE, "table.py": TABLE, "charset/table.py": TABLE})
    assert names(gather(())) == ["both.py", "code.py"]
    assert names(gather([str(library)])) == ["both.py", "charset/table.py", "code.py", "table.py"]


@pytest.mark.parametrize(("upper", "kept"), [(49, True), (50, True), (51, False)])
def test_half_of_the_characters_make_a_table_white_space_aside(library, upper, kept):
    make(library, {"code.py": "code", "text.py": "a" * (100 - upper) + " \n\t" * 1000 + "A" * upper})
    assert names(gather(())) == (["code.py", "text.py"] if kept else ["code.py"])


def test_the_codecs_tables_are_left_out_and_their_code_is_not():
    found = names(gather(()))
    assert "encodings/cp1252.py" not in found
    assert "html/entities.py" not in found
    assert {"encodings/utf_8.py", "encodings/idna.py", "_pydecimal.py", "pydoc_data/topics.py"} <= set(found)


def test_folders_files_and_globs(tmp_path):
    make(
        tmp_path,
        {"b.txt": "b", "a/x.txt": "x", "a/.hidden": "no", "a/.git/config": "no", "binary": b"\0\1", "z.md": "z"},
    )
    corpus = gather([str(tmp_path)])
    assert names(corpus) == ["a/x.txt", "b.txt", "z.md"]
    assert corpus.num_skipped == 1
    assert names(gather([str(tmp_path / "b.txt")])) == ["b.txt"]
    assert len(gather([str(tmp_path / "**/*.txt")]).documents) == 2


def test_a_file_named_twice_counts_once(tmp_path):
    make(tmp_path, {"a.txt": "a", "b.txt": "b"})
    assert len(gather([str(tmp_path), str(tmp_path / "a.txt"), str(tmp_path / "*.txt")]).documents) == 2


def test_the_order_and_the_split_do_not_depend_on_the_place(tmp_path):
    files = {f"{i:03}.txt": f"text {i}" for i in range(200)}
    one, two = (gather([str(make(tmp_path / name, files))]) for name in ("one", "two"))
    assert one.digest() == two.digest()
    assert [d.held_out for d in one.documents] == [d.held_out for d in two.documents]
    assert 1 <= sum(d.held_out for d in one.documents) <= 12


def test_two_documents_hold_one_out_and_one_holds_none(tmp_path):
    make(tmp_path, {"a.txt": "a", "b.txt": "b"})
    assert sum(d.held_out for d in gather([str(tmp_path)]).documents) == 1
    assert sum(d.held_out for d in gather([str(tmp_path / "a.txt")]).documents) == 0


def test_the_digest_sees_every_byte_and_name(tmp_path):
    base = gather([str(make(tmp_path / "1", {"a": "x", "b": "y"}))]).digest()
    assert gather([str(make(tmp_path / "2", {"a": "x", "b": "z"}))]).digest() != base
    assert gather([str(make(tmp_path / "3", {"a": "x", "c": "y"}))]).digest() != base


def test_a_character_cut_by_the_probe_is_still_text(tmp_path):
    make(tmp_path, {"wide.txt": "a" * 8191 + "é" * 100})
    assert len(gather([str(tmp_path / "wide.txt")]).documents) == 1


@pytest.mark.parametrize(
    ("files", "specification", "phrase"),
    [
        ({}, "none.txt", "no such file or folder"),
        ({}, "*.txt", "no file matches"),
        ({"d/bin": b"\0"}, "d", "no text files in the folder"),
        ({"bin": b"\xff\xfe\x00"}, "bin", "is not UTF-8 text"),
        ({"latin": "\xe9tat".encode("latin-1")}, "latin", "is not UTF-8 text"),
        ({"empty": ""}, "empty", "the data is empty"),
        ({"a.bin": b"\0"}, "*.bin", "no text files match"),
    ],
)
def test_nothing_to_read_is_an_error(tmp_path, files, specification, phrase):
    make(tmp_path, files)
    with pytest.raises(DataError) as caught:
        gather([str(tmp_path / specification)])
    assert phrase in caught.value.message


def test_a_device_is_not_data(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        gather([str(tmp_path / "pipe")])
