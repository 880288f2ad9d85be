"""Manifests, headers of safetensors files and plans that somebody or something has changed.

Each mutant is refused with one line or says what can be gone on from. No panic of the core, no other error, no memory
beyond the input's size. The slow tests go on for ten minutes each (ZX_FUZZ_SECONDS).
"""

from __future__ import annotations

import itertools
import json
import os
from math import prod

import pytest
from fuzzing import CORPUS, SECONDS, as_json, bytes_mutated, fuzz, one_line, value_mutated
from safetensors import SafetensorError, deserialize

from zeroxide import _core
from zeroxide.checkpoint.format import manifest as manifests
from zeroxide.checkpoint.format.header import read_header
from zeroxide.checkpoint.load.regions import PieceMap
from zeroxide.errors import CheckpointError, CoreError, ZeroxideError


def mutated_manifest(original, draw):
    """Half of them get a checksum that fits, so that what is behind it is reached."""
    if draw.random() < 0.5:
        return bytes_mutated(original, draw)
    body = as_json(original)
    body.pop("digest", None)
    body = value_mutated(body, draw)
    return json.dumps({**body, "digest": manifests._digest_of(body)}).encode()


def look_at_manifest(folder, original, mutant):
    path = folder / manifests.MANIFEST
    path.write_bytes(original if mutant is None else mutant)
    try:
        found = manifests.read_manifest(folder)
    except CheckpointError as error:
        one_line(error)
        assert mutant is not None
        return
    for param in found.parameters:
        for part in param.parts():
            pieces, numel = param.part(part), prod(param.shape)
            first = list(itertools.islice(PieceMap(pieces, param.shape).find(0, numel), 100))
            assert [at for at, *_ in first] == list(itertools.accumulate((each[3] for each in first[:-1]), initial=0))
            assert all(
                piece in pieces and 0 <= inside < inside + left <= piece.count for _, piece, inside, left in first
            )
            assert len(first) == 100 or sum(left for *_, left in first) == numel
    # What is read is written as it was read, in a version that says it.
    path.write_text(found.text())
    again = manifests.read_manifest(folder)
    assert again.model_copy(update={"version": found.version}).checksum() == found.checksum()


def mutated_header(original, draw):
    """Half of them get the length of the header that they have."""
    if draw.random() < 0.5:
        return bytes_mutated(original, draw)
    length = int.from_bytes(original[:8], "little")
    text, data = original[8 : 8 + length], original[8 + length :]
    if draw.random() < 0.5 and (body := as_json(text)) is not None:
        text = json.dumps(value_mutated(body, draw)).encode()
    else:
        text = bytes_mutated(text, draw)
    return len(text).to_bytes(8, "little") + text + data


def look_at_header(folder, original, mutant):
    """The reference implementation, which is given the bytes themselves, says the same."""
    data = original if mutant is None else mutant
    path = folder / "f.safetensors"
    path.write_bytes(data)
    try:
        expected = {
            name: (each["dtype"], tuple(each["shape"]), bytes(each["data"])) for name, each in deserialize(data)
        }
    except SafetensorError:
        expected = None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = read_header(descriptor)
    except ValueError as error:
        one_line(error)
        assert expected is None
        return
    finally:
        os.close(descriptor)
    assert {name: (each.dtype, each.shape, data[each.begin : each.end]) for name, each in found.items()} == expected


def mutated_plan(original, draw):
    """Names in it are those of modules and of config words, which have no line breaks."""
    return json.dumps(value_mutated(as_json(original), draw)).replace("\\n", "n").encode()


def unit_of(unit):
    """A unit as the core takes it, where it has the form of one."""
    if not isinstance(unit, list) or len(unit) != 6:
        return unit
    name, params, held, rule, fmt, turn = unit
    if isinstance(params, list):
        params = [tuple(each) if isinstance(each, list) else each for each in params]
    kind = _core.RULES.get(rule) if isinstance(rule, str) else None
    return name, params, held, kind(**kind.hyperparameters) if kind else rule, fmt, turn


def plan_of(data):
    """(what was asked for, the plan)."""
    asked = as_json(data)
    if isinstance(asked.get("units"), list):
        asked["units"] = [unit_of(unit) for unit in asked["units"]]
    if isinstance(asked.get("apart"), list):
        asked["apart"] = [tuple(each) if isinstance(each, list) else each for each in asked["apart"]]
    return asked, _core.Plan(**asked)


def look_at_plan(original, mutant):
    try:
        asked, plan = plan_of(original if mutant is None else mutant)
    except (ZeroxideError, CoreError, ValueError, TypeError, OverflowError) as error:
        line = one_line(error)
        assert mutant is not None, line
        return
    # Sums that went round would be less than one of their parts.
    if asked["weights_on_disk"] and plan.weights == "disk":
        ranks = {unit: shards * replicas for unit, _, shards, replicas in asked.get("apart", [])}
        for at, unit in enumerate(asked["units"]):
            largest = max((numel for numel, _ in unit[1]), default=0)
            assert plan.disk_bytes >= 2 * largest // ranks.get(at, asked["shards"] * asked["replicas"])
    assert len(plan.padded) == len(asked["units"])
    plan.disk_traffic()
    plan.collectives()
    assert plan.sent_bytes() >= plan.across_bytes()


LOOKS = {
    "manifest": (mutated_manifest, look_at_manifest),
    "header": (mutated_header, look_at_header),
    "plan": (mutated_plan, lambda folder, *args: look_at_plan(*args)),
}


@pytest.mark.parametrize("kind", LOOKS)
def test_mutants_are_refused_in_one_line_or_can_be_used(kind, tmp_path):
    mutate, look = LOOKS[kind]
    assert fuzz(kind, 2, mutate, lambda *args: look(tmp_path, *args)) > 50


REFUSED = {
    "manifest": {
        "refused-no-version.json": 'there is no "version"',
        "refused-surrogate.json": r"its checksum should be \\ud800",
        "refused-long.json": "its checksum should be 0{270}",
    },
    "plan": {
        "refused-sum.json": "elements of all parameters: 9223372036854775808 is more",
        "refused-world.json": "ranks: 4294967296 is more",
        "refused-apart.json": "rank 0 of 0 shards x 4 replicas",
        "refused-tile.json": "zeroxide.tile_bytes: 9223372036854775808 is more",
        "refused-ring.json": "zeroxide.staging_bytes: 18446744073709551615 is more",
        "refused-resident.json": "bytes of the process: 18446744073709551615 is more",
        "refused-pinned.json": "zeroxide.state_in_memory: 18446744073709551615 is more",
        "refused-prefetch.json": "zeroxide.prefetch: 18446744073709551615 is more",
    },
}


def test_what_was_found_is_refused_by_name(tmp_path):
    """Catches: a limit that is not looked at."""
    for name, line in REFUSED["plan"].items():
        with pytest.raises(CoreError, match=line):
            plan_of((CORPUS / "plan" / name).read_bytes())
    for name, line in REFUSED["manifest"].items():
        (tmp_path / manifests.MANIFEST).write_bytes((CORPUS / "manifest" / name).read_bytes())
        with pytest.raises(CheckpointError, match=line) as refused:
            manifests.read_manifest(tmp_path)
        one_line(refused.value)


@pytest.mark.slow
@pytest.mark.timeout(int(2 * SECONDS) + 60)
@pytest.mark.parametrize("kind", LOOKS)
def test_many_mutants_are_refused_in_one_line_or_can_be_used(kind, tmp_path):
    mutate, look = LOOKS[kind]
    assert fuzz(kind, SECONDS, mutate, lambda *args: look(tmp_path, *args)) > 50
