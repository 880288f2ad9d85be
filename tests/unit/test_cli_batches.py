import itertools
from collections import Counter

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroxide.cli.training.batches import HeldOutBatches, Permutation, TrainingBatches
from zeroxide.cli.training.dataset import TokenFile
from zeroxide.errors import DataError


@pytest.fixture
def tokens(tmp_path):
    def make(count):
        path = tmp_path / f"{count}.bin"
        numpy.arange(count, dtype="<u2").tofile(path)
        return TokenFile(path, "<u2", count)

    return make


@given(st.integers(1, 3000), st.binary(min_size=1, max_size=32))
def test_a_permutation_meets_every_element_once(count, key):
    permutation = Permutation(count, key)
    assert sorted(permutation(position) for position in range(count)) == list(range(count))


def test_a_permutation_is_not_the_identity_and_depends_on_the_key():
    one, two = Permutation(1000, b"a"), Permutation(1000, b"b")
    first = [one(i) for i in range(1000)]
    assert sum(i == value for i, value in enumerate(first)) < 20
    assert sum(one(i) == two(i) for i in range(1000)) < 20
    steps = [abs(a - b) for a, b in itertools.pairwise(first)]
    assert sum(steps) / len(steps) > 200  # neighbours land far apart: a third of the range on average


def test_an_epoch_visits_each_window_once_and_the_next_in_another_order(tokens):
    batches = TrainingBatches(tokens(1000), batch_size=5, seq_len=10, seed=3)
    assert batches.num_windows == 100
    first = [window for number in range(20) for window in batches.windows(number)]
    second = [window for number in range(20, 40) for window in batches.windows(number)]
    assert Counter(first) == Counter(range(100)) == Counter(second)
    assert first != second


def test_a_batch_depends_on_its_number_alone(tokens):
    file = tokens(1000)
    straight = TrainingBatches(file, batch_size=3, seq_len=10, seed=3)
    expected = [straight.batch(number) for number in range(80)]
    jumping = TrainingBatches(file, batch_size=3, seq_len=10, seed=3)
    for number in (79, 0, 33, 34, 32, 66, 1):
        assert jumping.batch(number).equal(expected[number])
    other = TrainingBatches(file, batch_size=3, seq_len=10, seed=4)
    assert not all(other.batch(number).equal(expected[number]) for number in range(5))


def test_a_batch_holds_whole_windows(tokens):
    batch = TrainingBatches(tokens(1000), batch_size=4, seq_len=10, seed=0).batch(0)
    assert batch.shape == (4, 10)
    for row in batch.tolist():
        assert row == list(range(row[0], row[0] + 10))
        assert row[0] % 10 == 0


def test_too_little_data_says_how_much_is_needed(tokens):
    with pytest.raises(DataError) as caught:
        TrainingBatches(tokens(79), batch_size=8, seq_len=10, seed=0)
    assert "needs 80 tokens, the corpus has 79" in caught.value.message
    TrainingBatches(tokens(80), batch_size=8, seq_len=10, seed=0)


def test_held_out_windows_are_spread_and_limited(tokens):
    batches = HeldOutBatches(tokens(1000), batch_size=4, seq_len=10, limit=5)
    assert len(batches) == 5
    starts = [row[0] for number in range(5) for row in batches.batch(number).tolist()]
    assert starts == [index * 50 for index in range(20)]


def test_short_held_out_text_makes_what_it_can(tokens):
    batches = HeldOutBatches(tokens(7), batch_size=4, seq_len=10, limit=5)
    assert len(batches) == 1
    assert batches.batch(0).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert len(HeldOutBatches(tokens(1), batch_size=4, seq_len=10, limit=5)) == 0
    assert len(HeldOutBatches(tokens(0), batch_size=4, seq_len=10, limit=5)) == 0


def test_a_truncated_token_file_is_an_error(tokens):
    file = tokens(100)
    with file.path.open("r+b") as raw:
        raw.truncate(150)
    with pytest.raises(DataError, match="cut short: expected 50 tokens at 50, got 25"):
        file.read(50, 50)
