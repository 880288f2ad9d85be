"""When speculating pays, by how many of the last steps clipped."""

from __future__ import annotations

import math

from zeroxide.engine.clip_share import MEMORY, ClipShare


def noted(share: ClipShare, *steps: bool) -> ClipShare:
    for clips in steps:
        share.note(clips)
    return share


def test_nothing_known_is_one_in_two() -> None:
    assert ClipShare(1, 1).expected == 0.5
    assert not ClipShare(4, 49).pays()
    assert ClipShare(50, 49).pays()


def test_it_speculates_once_few_enough_clip() -> None:
    """4 bytes saved and 49 lost: less than one step in 12.25 may clip, and 1 / (n + 2) is below that for n above 10.25.
    k steps weigh 64 (1 - (63/64)^k): 11 of them 10.18, and 12 of them 11.02. Catches: the first step speculates, and
    weights that do not fall."""
    share = ClipShare(4, 49)
    waited = 0
    while not share.pays():
        share.note(False)
        waited += 1
    assert waited == 12


def test_a_phase_in_which_all_clip_is_forgotten() -> None:
    """Many steps weigh 64 together: (64 + 1) / (64 + 2) is expected where all clip. m later ones that do not leave
    (64 (63/64)^m + 1) / 66, below 4 / 49 from m = 171 on. Catches: an average over all steps."""
    share = noted(ClipShare(4, 49), *[True] * 2000)
    assert math.isclose(share.expected, 65 / 66)
    assert not noted(share, *[False] * 170).pays()
    assert noted(share, False).pays()


def test_one_that_clips_among_many_changes_nothing() -> None:
    share = noted(ClipShare(4, 49), *[False] * MEMORY)
    assert noted(share, True).pays()
    assert not noted(share, *[True] * 5).pays()
