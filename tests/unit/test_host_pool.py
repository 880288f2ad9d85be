"""Host memory that is lent in grains."""

from __future__ import annotations

from zeroxide.device.host_pool import GRAIN, SLAB, HostPool


def pool(room: int | None = None) -> HostPool:
    return HostPool(lambda memory: False, lambda taken: None if room is None else room - taken)


def test_what_comes_back_is_whole_again():
    """In any order. Catches: ranges that stay as small as they were lent, and a tensor in more and more pieces."""
    made = pool()
    grains = SLAB // GRAIN
    lent = [made.take(GRAIN) for _ in range(grains)]
    for each in (*lent[::2], *lent[1::2]):
        made.give_back(each)
    whole = made.take(SLAB)
    assert [each.nbytes for each in whole.pieces] == [SLAB]
    assert made.nbytes == SLAB
    made.close()


def test_a_tensor_lies_in_what_there_is():
    """Catches: memory beyond the room, pieces that overlap or do not add up, a last piece of whole grains."""
    made = pool(SLAB)
    lent = [made.take(GRAIN) for _ in range(SLAB // GRAIN)]
    assert made.take(1) is None
    for each in lent[::3]:
        made.give_back(each)
    scattered = made.take(4 * GRAIN - 7)
    assert [each.nbytes for each in scattered.pieces] == [GRAIN, GRAIN, GRAIN, GRAIN - 7]
    for number, each in enumerate(scattered.pieces):
        each.fill_(number)
    assert [int(each.max()) for each in scattered.pieces] == [0, 1, 2, 3]
    assert made.used == (SLAB // GRAIN - len(lent[::3]) + 4) * GRAIN
    made.close()
