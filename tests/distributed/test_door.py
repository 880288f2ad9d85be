"""What strangers at rank 0's port cost it. They connect, send harmless things and wait; ranks get in all the while."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import selectors
import socket
import time

import pytest
from launching import LIGHT, Job

from zeroxide.distributed.health import door as door_module
from zeroxide.distributed.health.activity import Activity
from zeroxide.distributed.health.connection import Connection, connect
from zeroxide.distributed.health.door import TOKEN_BYTES, Door, introduction, listen
from zeroxide.distributed.health.endpoint import Coordinator
from zeroxide.distributed.health.failure_detector import FailureDetector, Member
from zeroxide.distributed.host import Process, host_identity
from zeroxide.errors import RanksError

TOKEN = bytes(range(TOKEN_BYTES))
FRAME = 8 + TOKEN_BYTES + 4
NESTED = b"[" * 200_000


@pytest.fixture
def world():
    """A coordinator that expects two ranks, a function that connects, and one that lets the coordinator work for a
    while."""
    members = [Member(rank, host_identity(), Process.current()) for rank in range(3)]
    listener, (address,) = listen(True)
    place = (address, listener.getsockname()[1])
    coordinator = Coordinator(FailureDetector(members, 0, 10.0, 0.5), listener, TOKEN)
    guests = []

    def visit(words=b""):
        guest = socket.create_connection(place)
        guest.settimeout(10)
        guests.append(guest)
        if words:
            guest.sendall(words)
        return guest

    def work(until=lambda: False, seconds=0.3):
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            coordinator.wait(0.02)

    yield coordinator, visit, work
    coordinator.close()
    for guest in guests:
        guest.close()


@contextlib.contextmanager
def pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


def received(connection):
    """What arrives, once something has."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection.socket, selectors.EVENT_READ)
        assert selector.select(10)
    return connection.receive()


def turned_away(guest):
    try:
        return guest.recv(1) == b""
    except ConnectionResetError:
        return True


def arrived(coordinator):
    return sorted(coordinator._arrived)


def test_a_rank_gets_in_by_its_token_and_nobody_else_does(world, monkeypatch):
    coordinator, visit, work = world
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    wrong = TOKEN[:-1] + b"?"
    guests = [visit(introduction(wrong, 1)), visit(introduction(TOKEN, 0)), visit(introduction(TOKEN, 3))]
    guests.append(visit(b"GET / HTTP/1.0\r\n\r\n" + b"x" * FRAME))
    work()
    assert arrived(coordinator) == [0]
    assert all(turned_away(guest) for guest in guests)
    assert (wrong, TOKEN) in compared, "compared in a time that does not depend on where they differ"
    visit(introduction(TOKEN, 2) + json.dumps({"failed": "x"}).encode() + b"\n")
    work(lambda: coordinator._detector.members[2].status == "failed")
    assert arrived(coordinator) == [0, 2]
    assert coordinator._detector.members[2].line == "x", "what follows the frame is heard"
    second = visit(introduction(TOKEN, 2))
    work()
    assert turned_away(second), "a rank comes once"
    assert not coordinator.complete.is_set()
    visit(introduction(TOKEN, 1))
    work(coordinator.complete.is_set)
    assert coordinator.complete.is_set()


def test_a_stranger_may_send_one_frame_and_no_more(world):
    coordinator, visit, work = world
    for words in (b"\n", b"x" * (FRAME - 1)):
        visit(words)
    work(seconds=0.1)
    assert [len(each.received) for each in coordinator._door.strangers] == [1, FRAME - 1]
    flood = visit()
    flood.setblocking(False)
    sent = 0
    for _ in range(50):
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            sent += flood.send(b"x" * 1_000_000)
        coordinator.wait(0.0)
        assert all(len(each.received) <= FRAME for each in coordinator._door.strangers)
    assert len(coordinator._door.strangers) == 2, f"turned away after its first {FRAME} bytes, not after {sent}"


@pytest.mark.parametrize("words", [b"", b"z"], ids=["idle", "dripping"])
def test_who_does_not_show_the_token_in_time_is_turned_away(words, world, monkeypatch):
    coordinator, visit, work = world
    monkeypatch.setattr(door_module, "_SECONDS", 0.5)
    guest = visit()
    end = time.monotonic() + 5
    work(seconds=0.1)
    assert len(coordinator._door.strangers) == 1
    while coordinator._door.strangers and time.monotonic() < end:
        if words:
            guest.send(words)
        work(seconds=0.05)
    assert not coordinator._door.strangers
    assert turned_away(guest)


def test_few_strangers_are_kept_and_a_rank_gets_in_between_them(world):
    coordinator, visit, work = world
    most = door_module._MOST_STRANGERS + 2
    for count in range(3):
        for _ in range(60):
            visit()
        if count:
            visit(introduction(TOKEN, count))
            for _ in range(20):
                visit()
        work(seconds=0.5)
        assert len(coordinator._door.strangers) <= most
    assert arrived(coordinator) == [0, 1, 2]
    # Nobody is expected any more.
    late = visit()
    work()
    assert turned_away(late)
    assert not coordinator._door.strangers


def test_at_the_descriptor_limit_the_door_rests_and_gives_back_what_strangers_hold():
    """An `accept` that fails leaves the listener readable: a loop that went on would take a whole processor."""

    class Full:
        calls = 0
        full = True

        def __init__(self, listener):
            self.listener = listener

        def accept(self):
            Full.calls += 1
            if Full.full:
                raise OSError(24, "Too many open files")
            return self.listener.accept()

        def __getattr__(self, name):
            return getattr(self.listener, name)

    listener, (address,) = listen(True)
    with selectors.DefaultSelector() as selector:
        door = Door(Full(listener), TOKEN, 1, selector)
        place = (address, listener.getsockname()[1])
        with socket.create_connection(place), socket.create_connection(place) as guest:
            Full.full = False
            list(door.accept())
            assert len(door.strangers) == 2
            with socket.create_connection(place):
                Full.full, Full.calls = True, 0
                end = time.monotonic() + 0.5
                while time.monotonic() < end:
                    for key, _ in selector.select(0.01):
                        if key.data is door:
                            list(door.accept())
                    door.pass_time()
                assert Full.calls == 1
                assert not door.strangers
                assert turned_away(guest)
                Full.full = False
                guest = socket.create_connection(place)
                guest.sendall(introduction(TOKEN, 1))
                end = time.monotonic() + 5
                rank = None
                while rank is None and time.monotonic() < end:
                    for key, _ in selector.select(0.01):
                        for each in list(door.accept()) if key.data is door else [key.data]:
                            found = door.hear(each)
                            rank = rank if found is None else found
                    door.pass_time()
                assert rank == 1, "who comes afterwards gets in"
                guest.close()
        door.close()


@pytest.mark.parametrize(
    "line",
    [
        NESTED,
        b'{"a":' * 10_000,
        b'{"doing": ' + NESTED[:5000] + b"]" * 5000 + b"}",
        b'{"failed": "\\"", "x": ' + NESTED[:5000],
        "[".encode("utf-16") + "[".encode("utf-16-le") * 5000,
        b"7",
        b"\xff",
        b'"unfinished',
    ],
    ids=["lists", "objects", "inside", "after a string", "utf-16", "a number", "no text", "no end"],
)
def test_no_line_makes_the_parser_recurse(line):
    with pair() as (ours, theirs):
        theirs.sendall(line[:60_000] + b"\n")
        assert received(Connection(ours)) == ([], False)


def test_brackets_in_words_are_words():
    with pair() as (ours, theirs):
        said = {"failed": 'index [[[[[3]]]]] of {{{{{{"x"}}}}}} \\ is wrong', "seconds": 1.5}
        Connection(theirs).send(said)
        assert received(Connection(ours)) == ([said], True)


@pytest.mark.parametrize(
    "message",
    [{"doing": 3, "seconds": 0}, {"doing": [None] * 3, "seconds": 0}, {"doing": [None] * 4, "seconds": 10**400}],
)
def test_a_rank_that_speaks_nonsense_is_taken_for_gone(message, world):
    coordinator, visit, work = world
    visit(introduction(TOKEN, 1) + json.dumps(message).encode() + b"\n")
    work(lambda: coordinator._detector.members[1].status == "gone")
    assert coordinator._detector.members[1].status == "gone"


def test_a_rank_that_talks_without_end_leaves_the_others_their_turn(world):
    coordinator, visit, work = world
    talker = visit(introduction(TOKEN, 1))
    work(lambda: 1 in arrived(coordinator))
    line = json.dumps({"doing": [None] * 4, "seconds": 0}).encode() + b"\n"
    talker.setblocking(False)

    class Endless:
        calls = 0

        def __init__(self, sock):
            self.sock = sock

        def recv(self, count):
            self.calls += 1
            assert self.calls < 20, "it never ends"
            return line * (count // len(line))

        def __getattr__(self, name):
            return getattr(self.sock, name)

    (visitor,) = coordinator._visitors
    visitor.connection.socket = Endless(visitor.connection.socket)
    messages, stands = visitor.connection.receive()
    assert stands
    assert 0 < len(messages) * len(line) <= 2 * 4 * (1 << 16)


# Where rank 0 listens ------------------------------------------------------------------------------------------------


def test_ranks_of_one_network_listen_on_loopback_alone():
    listener, addresses = listen(True)
    with listener:
        assert (listener.getsockname()[0], addresses) == ("127.0.0.1", ["127.0.0.1"])


@pytest.mark.parametrize("told_by", ["GLOO_SOCKET_IFNAME", "store", "name", "name that is loopback here"])
def test_across_hosts_one_interface_is_listened_on(told_by, monkeypatch):
    """127.0.0.2 stands for the address of another interface: on this host as well, and not on others."""
    monkeypatch.setattr(door_module, "store_host", lambda: [])
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(door_module, "_resolve", lambda host: {"192.0.2.7": ["192.0.2.7"]}.get(host, ["127.0.0.2"]))
    expected = "127.0.0.2"
    if told_by == "GLOO_SOCKET_IFNAME":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere,lo")
        expected = "127.0.0.1"
    elif told_by == "store":
        # The first is no address of this host: it is passed over.
        monkeypatch.setattr(door_module, "store_host", lambda: ["192.0.2.7", "127.0.0.2"])
    else:
        monkeypatch.setattr(door_module, "_is_loopback", lambda address: address == "127.0.0.1")
        if told_by != "name":
            monkeypatch.setattr(door_module, "store_host", lambda: ["rank0"])
            names = {"rank0": ["127.0.0.1"], socket.gethostname(): ["127.0.0.2"]}
            monkeypatch.setattr(door_module, "_resolve", names.__getitem__)
    listener, addresses = listen(False)
    with listener:
        assert listener.getsockname()[0] == expected
        assert addresses == [expected]


def test_without_an_interface_it_says_what_to_set(monkeypatch):
    monkeypatch.setattr(door_module, "_addresses", lambda: iter(["192.0.2.7"]))
    with pytest.raises(RanksError, match=r"192\.0\.2\.7.*set GLOO_SOCKET_IFNAME"):
        listen(False)


# A whole job ---------------------------------------------------------------------------------------------------------

JOB = """
import resource, socket, threading
from zeroxide.errors import RanksError
from zeroxide.distributed import Watch

watch = Watch(ranks, timeout=3.0, interval=0.2, grace=0.5, cleanup=20.0)
ranks.barrier()
if ranks.rank == 0:
    say(watch._endpoint._door._listener.getsockname()[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    while not os.path.exists(f"{os.environ['JOB_FOLDER']}/strangers"):
        time.sleep(0.05)
    started, cpu = time.monotonic(), time.process_time()
    most = 0
    while time.monotonic() - started < 4.0:
        # As a checkpoint needs them.
        files = [open(os.devnull) for _ in range(20)]
        most = max(most, len(os.listdir("/proc/self/fd")))
        for file in files:
            file.close()
        time.sleep(0.05)
    used = time.process_time() - cpu
    assert used < 2.0, f"{used:.1f} of 4 s of a processor"
    say(f"descriptors {most}")
with watch.waiting("all-gather"):
    ranks.barrier()
watch.check()
watch.close()
say("done")
"""


def test_a_job_under_strangers_goes_on():
    """Nested lines, floods and 300 idle connections against a rank that may open 64 files."""
    with Job(2, JOB, preamble=LIGHT) as job:
        job.until(0, "\n")
        port = int(job.out(0))
        guests = []
        for number in range(300):
            guest = socket.create_connection(("127.0.0.1", port), timeout=10)
            guest.setblocking(False)
            guests.append(guest)
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                guest.send([b"", NESTED, b"x" * 1_000_000, b'{"token": "guess", "rank": 1}\n'][number % 4])
        (job.folder / "strangers").touch()
        results = job.wait()
        for guest in guests:
            guest.close()
    for result in results:
        assert result.code == 0, result.err
        assert result.out.endswith("done\n")
        assert result.err == ""


def test_a_rank_cannot_be_played_by_who_guesses(world):
    coordinator, visit, work = world
    visit(introduction(os.urandom(TOKEN_BYTES), 1))
    work(seconds=0.1)
    assert arrived(coordinator) == [0]
    assert isinstance(connect(["127.0.0.1"], coordinator._door._listener.getsockname()[1], 1.0), Connection)
    assert coordinator._detector.members[1].activity == Activity()
