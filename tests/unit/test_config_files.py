"""Config files as people write them: comments, trailing commas, sizes with units, and what is wrong with them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroxide.config import format_bytes, jsonc, load, parse_bytes
from zeroxide.errors import ConfigError

GIB = 1 << 30


def complaint(config: object = None, **shortcuts: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(config, **shortcuts)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_file_with_comments(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        """\ufeff// a DeepSpeed config
        {
          "train_batch_size": 8, # hash
          /* block
             "stage": 9 */
          "zero_optimization": { "stage": 3, },
          "zeroxide": {"host_memory": "2GiB"},
          "optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.9,], "lr": 1e-3 /* , */, }}, // end
        }
        # trailer """,
        encoding="utf-8",
    )
    config = load(file)
    assert config == load(str(file))
    assert (config.batch.train_batch_size, config.zero.stage, config.zeroxide.host_memory) == (8, 3, 2 * GIB)
    assert config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' appears twice in one object"),
        ('{"x": {"stage": 1, // one\n "stage": 2}}', "the key 'stage' appears twice"),
        ('{"a": 1\n "b": 2}', "line 2 column 2"),
        ('{\n\n /* open\n\n"a": 1}', "line 3: a /* comment is never closed"),
        ('{ /* two\n lines */ "a": ]}', "line 2 column 16"),
        ("[1]", "expected one object in braces, got list"),
        ("", "line 1 column 1"),
        ('{"a": ,}', "line 1"),
        ("{,}", "line 1 column 2"),
        ('{"a": 1,,}', "line 1 column 9"),
        ('{"a": "\n"}', "line 1"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "too many digits"),
    ],
)
def test_a_broken_file_says_where(tmp_path, text, line):
    file = tmp_path / "broken.json"
    file.write_text(text)
    error = complaint(file)
    assert line in str(error)
    assert "broken.json" in str(error)


def test_files_that_are_none(tmp_path):
    assert "No such file" in str(complaint(tmp_path / "missing.json"))
    assert "Is a directory" in str(complaint(str(tmp_path)))
    (tmp_path / "latin.json").write_bytes(b'{"\xff": 1}')
    assert "utf-8" in str(complaint(tmp_path / "latin.json"))
    (tmp_path / "big.json").write_bytes(b" " * (9 << 20))
    assert "at most 8 MiB" in str(complaint(tmp_path / "big.json"))
    assert "null byte" in str(complaint("a\0b"))


def test_an_error_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"stagee": 1}')
    assert str(complaint(file)).startswith(f'{file}: unknown key "stagee"')


@given(
    st.dictionaries(
        st.text(max_size=6),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(alphabet='/*#",{}[]\\ab\n', max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    ),
    st.sampled_from([None, 1, "\t"]),
)
@settings(deadline=None, max_examples=300)
def test_plain_json_passes_unchanged_whatever_its_strings_hold(document, indent):
    assert jsonc.parse(json.dumps(document, indent=indent)) == document


@given(
    st.recursive(
        st.integers(0, 9) | st.text(alphabet='/*#",', max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    st.lists(st.sampled_from([" ", "\n", "//x,\n", "# }\n", "/* ] \n */", "/**/"]), min_size=64, max_size=64),
)
@settings(deadline=None, max_examples=200)
def test_comments_and_trailing_commas_change_nothing(value, fillers):
    """Write JSON with a filler between any two tokens and a comma after every last item."""
    remaining = list(fillers)

    def gap() -> str:
        return remaining.pop() if remaining else ""

    def write(item: object) -> str:
        if isinstance(item, dict):
            inner = "".join(
                f"{gap()}{json.dumps(key)}{gap()}:{gap()}{write(each)}{gap()}," for key, each in item.items()
            )
            return "{" + inner + gap() + "}"
        if isinstance(item, list):
            return "[" + "".join(f"{gap()}{write(each)}{gap()}," for each in item) + gap() + "]"
        return json.dumps(item)

    assert jsonc.parse(f'{gap()}{{"root":{write(value)}}}{gap()}') == {"root": value}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1024, 1024),
        ("1024", 1024),
        ("2GiB", 2 * GIB),
        ("2 GiB", 2 * GIB),
        ("2gib", 2 * GIB),
        ("2G", 2 * GIB),
        ("2GB", 2 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5G", 3 * GIB // 2),
        (".5K", 512),
        ("1.0001KiB", 1024),
        ("7B", 7),
        ("1PiB", 1 << 50),
        (2e9, 2_000_000_000),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "1 2", "1iB", "-1", "1e9", "0x10", "2GiBs", "٣GiB", "1" * 99, None, True, 1.5]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="a size in bytes"):
        parse_bytes(text)


@given(st.integers(0, 1 << 60))
def test_a_size_survives_being_written_in_any_exact_unit(count):
    assert parse_bytes(str(count)) == count
    assert parse_bytes(f"{count}KiB") == count * 1024
    assert parse_bytes(f"{count}MB") == count * 10**6
    assert float(format_bytes(count).split()[0]) >= 1 or count == 0


def test_sizes_are_shown_in_the_unit_that_fits():
    assert [format_bytes(count) for count in (0, 1023, 1024, 1536, GIB, 5 * GIB // 4)] == [
        "0 bytes",
        "1023 bytes",
        "1 KiB",
        "1.5 KiB",
        "1 GiB",
        "1.25 GiB",
    ]
