"""The code uses the field's words: those that it once had of its own do not come back."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The project's own word, as a whole identifier or word -> what it is called.
OWN_WORDS = {
    "House": "ParameterContext",
    "house": "the parameter context",
    "Seat": "ShardedParam, or SegmentHandle in shared memory",
    "seat": "a sharded parameter, or a segment's handle",
    "Keeper": "ParamHandle",
    "keeper": "a parameter's handle",
    "Post": "SharedMemoryReducer",
    "PostPlan": "ReducerPlan",
    "Mail": "GradientTransport",
    "mail": "the gradient transport",
    "bell": "futex, or eventfd",
    "call_off": "cancel",
    "called off": "cancelled",
    "Judge": "FailureDetector",
    "Side": "Endpoint",
    "Hub": "Coordinator",
    "hub": "the coordinator",
    "Spoke": "Worker",
    "Verdict": "Failure",
    "verdict": "the failure",
    "Wire": "Transport, or Connection",
    "wire": "transport, comm_dtype, or connection",
    "land": "accumulate",
    "lands": "is accumulated",
    "landed": "accumulated",
    "landing": "accumulation",
    "Land": "Accumulate",
    "settle": "drain, wait_reads, cut_all, ... by what it does",
    "settles": "drains, ... by what it does",
    "settled": "drained, ... by what was done",
    "span": "held_through_backward, or a range",
    "visible": "params_always_full",
    "Flight": "Work",
    "Answers": "Accessors",
    "Alone": "SingleRank",
    "_Carrier": "WeightGather or GradientReduction",
    "Part": "StateKey, or ThreadChunk",
    "Share": "LocalShard, or ShardedIterable",
    "Held": "ParamRecord",
    "Run": "ElementRange",
    "Keeping": "SpillFile",
    "Place": "MeshPosition, or LaunchInfo",
}
IN_RUST_FIELDS = {"long": "held_through_backward", "whole": "all_shards_valid", "place": "mesh"}
"""Fields of Rust structs; elsewhere these are English words."""

# (file, word) -> why it may stand there.
EXCEPTIONS = {
    ("crates/zeroxide-memory/src/map.rs", "land"): "a mapping that another thread makes, not a gradient",
    ("crates/zeroxide-storage/src/queue/inbox.rs", "Answers"): "a verb",
    ("crates/zeroxide-storage/src/queue/transfer.rs", "Answers"): "a verb",
    ("crates/zeroxide-storage/src/store/lock.rs", "Held"): "a lock that somebody holds",
    ("crates/zeroxide-storage/src/store/lock.rs", "Run"): "a run of a program, which holds a lock",
    ("crates/zeroxide-offload/src/facts.rs", "Run"): "a run of a program, which holds a lock",
    ("crates/zeroxide-storage/src/error.rs", "Run"): "a run of a program, which holds a lock",
    ("crates/zeroxide-exchange/src/shm_reduce.rs", "Place"): "where in a segment a gradient lies",
    ("python/zeroxide/plan/parameters.py", "span"): "a range of addresses",
    ("python/zeroxide/cli/training/report.py", "Share"): "a ratio",
    ("python/zeroxide/cli/training/options.py", "Held"): "held-out data",
    ("python/zeroxide/cli/train.py", "Held"): "held-out data",
    ("python/zeroxide/cli/train.py", "Run"): "the folder of a run",
    ("python/zeroxide/cli/__init__.py", "Run"): "a verb",
    ("python/zeroxide/cli/training/plot.py", "Run"): "a verb",
}


def sources() -> list[Path]:
    rust = (path for crate in (ROOT / "crates").iterdir() for path in (crate / "src").rglob("*.rs"))
    return [*rust, *(ROOT / "python").rglob("*.py"), *(ROOT / "python").rglob("*.pyi")]


def own_words(text: str, *, rust: bool) -> set[str]:
    """Those of the project's own words that stand in a source text."""
    found = {word for word in OWN_WORDS if re.search(rf"\b{re.escape(word)}\b", text)}
    if rust:
        fields = r"^\s+pub(?:\(crate\))? ({}): ".format("|".join(IN_RUST_FIELDS))
        found |= set(re.findall(fields, text, re.MULTILINE))
    return found


def test_own_words_do_not_come_back():
    """Catches: a name or a comment with a word of the left column."""
    found, used = [], set()
    for path in sources():
        name = str(path.relative_to(ROOT))
        for word in own_words(path.read_text(), rust=path.suffix == ".rs"):
            if (name, word) in EXCEPTIONS:
                used.add((name, word))
            else:
                found.append(f"{name}: {word} is called {(OWN_WORDS | IN_RUST_FIELDS)[word]}")
    assert found == []
    assert set(EXCEPTIONS) - used == set(), "these exceptions are not needed any more"


def test_an_own_word_is_found():
    assert own_words("class Seat:\n    pass\n", rust=False) == {"Seat"}
    assert own_words("pub struct Spec {\n    pub long: bool,\n}\n", rust=True) == {"long"}
    assert own_words("as long as a seated landlord is visiting", rust=False) == set()


def test_every_own_word_is_explained_in_the_glossary():
    """Catches: a word of the field that a newcomer cannot look up."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    names = {
        name for meaning in OWN_WORDS.values() for name in re.findall(r"\b[A-Z]\w+[A-Z]\w+|[a-z]+_[a-z_]+\b", meaning)
    }
    assert {name for name in names if name not in text} - NOT_IN_THE_GLOSSARY == set()


NOT_IN_THE_GLOSSARY = {"wait_reads", "cut_all"}
"""Functions that are found where they are called."""
