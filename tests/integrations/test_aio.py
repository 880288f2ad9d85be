"""DeepSpeed's handle for tensors and files, and what its builders say; the oracle is an ordinary read."""

from __future__ import annotations

import os

import pytest
import torch

from zeroxide import _core
from zeroxide.device.placement import spec
from zeroxide.errors import BudgetError, ConfigError, ModelError, StorageError
from zeroxide.integrations.deepspeed.aio import AsyncIO, aio_handle, aio_read, aio_write, deepspeed_memcpy
from zeroxide.integrations.deepspeed.op_builder import ALL_OPS, BUILDERS, COMPATIBLE, op_report

SIZES = [1, 4095, 4096, 3 * 4096, (1 << 20) + 4096, (2 << 20) + 13]


@pytest.fixture(params=["uring", "threads"])
def engine(request):
    try:
        return request.param, _core.FileQueue(request.param, 8, 2, 1 << 20).describe()
    except StorageError as refused:
        pytest.skip(f"the kernel refuses io_uring: {refused}")


def some(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [0, 4096, 77])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aligned", [True, False])
def test_what_is_written_is_read(engine, tmp_path, size, offset, aligned):
    """Every engine, size and place. Catches: pieces at wrong offsets, a tail left out, what was there before lost."""
    queue = _core.FileQueue(engine[0], 8, 2, 1 << 20)
    path = tmp_path / "file"
    path.write_bytes(b"x" * offset)
    room = torch.zeros(size + 8192, dtype=torch.uint8)
    first = -room.data_ptr() % 4096 + (0 if aligned else 1)
    values = room[first : first + size].copy_(some(size))
    queue.write(spec(values), path, offset)
    assert queue.pending == 1
    assert (queue.wait(), queue.pending) == (1, 0)
    assert path.read_bytes() == b"x" * offset + values.numpy().tobytes()
    found = room[first : first + size]
    found.zero_()
    queue.read(spec(found), path, offset)
    assert queue.wait() == 1
    assert torch.equal(found, some(size))


def test_many_at_a_time(engine, tmp_path):
    """Catches: completions of one transfer counted for another."""
    queue = _core.FileQueue(engine[0], 4, 2, 4096)
    given = [some(5 * 4096, seed) for seed in range(16)]
    for seed, values in enumerate(given):
        queue.write(spec(values), tmp_path / str(seed), 0)
    assert queue.wait() == 16
    found = [torch.empty_like(values) for values in given]
    for seed, values in enumerate(found):
        queue.read(spec(values), tmp_path / str(seed), 0)
    assert queue.wait() == 16
    assert all(map(torch.equal, found, given))


def test_nothing_fails_in_silence(engine, tmp_path):
    """Catches: a short read that counts, an error that the next transfer is blamed for."""
    queue = _core.FileQueue(engine[0], 8, 1, 4096)
    (tmp_path / "short").write_bytes(bytes(100))
    with pytest.raises(StorageError, match=r"short.*100"):
        queue.read(spec(torch.empty(101, dtype=torch.uint8)), tmp_path / "short", 0)
    with pytest.raises(StorageError, match="missing"):
        queue.read(spec(torch.empty(1, dtype=torch.uint8)), tmp_path / "missing", 0)
    with pytest.raises(StorageError, match="nowhere"):
        queue.write(spec(some(1)), tmp_path / "nowhere" / "file", 0)
    assert queue.wait() == 0
    with pytest.raises(ValueError, match="multiple of 4096"):
        _core.FileQueue(engine[0], 8, 1, 100)
    with pytest.raises(StorageError, match="depth"):
        _core.FileQueue(engine[0], 0, 1, 4096)


def test_what_is_no_file_is_refused(tmp_path):
    """Catches: a pipe that is waited for, a new file that is left behind where there was no room for it."""
    handle = aio_handle()
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/full", str(tmp_path / "pipe")):
        for call in (handle.async_pread, handle.async_pwrite):
            with pytest.raises(StorageError, match="it is no regular file"):
                call(torch.zeros(4096, dtype=torch.uint8), path)
    with pytest.raises(StorageError, match=r"huge"):
        handle.async_pwrite(torch.zeros(4096, dtype=torch.uint8), str(tmp_path / "huge"), 1 << 50)
    assert not (tmp_path / "huge").exists()
    assert handle._queue.pending == 0


def test_nothing_is_a_transfer_too(tmp_path):
    """Scripts assert how many there were. Catches: an empty tensor that counts for none, or reads from no file."""
    handle = aio_handle()
    assert handle.sync_pwrite(torch.empty(0), str(tmp_path / "file")) == 1
    assert (tmp_path / "file").read_bytes() == b""
    with pytest.raises(StorageError, match="missing"):
        handle.async_pread(torch.empty(0), str(tmp_path / "missing"))


def test_a_handle_that_goes_away_ends_its_transfers(tmp_path):
    """Catches: a file of full length with a part of the data."""
    values = some(64 << 20)
    handle = aio_handle(4096, 1)
    handle.async_pwrite(values, str(tmp_path / "file"))
    del handle
    assert (tmp_path / "file").read_bytes() == values.numpy().tobytes()


def test_memory_that_is_replaced_meanwhile_is_said(tmp_path):
    """Catches: somebody else's tensor that is overwritten, and nobody is told."""
    handle = aio_handle()
    handle.sync_pwrite(some(1 << 20), str(tmp_path / "file"))
    values = torch.empty(1 << 20, dtype=torch.uint8)
    handle.async_pread(values, str(tmp_path / "file"))
    values.set_(torch.empty(1 << 20, dtype=torch.uint8))
    with pytest.raises(ModelError, match="got other memory while a transfer of it was under way"):
        handle.wait()


def test_a_forked_child_has_no_transfers(tmp_path):
    """Catches: a child that waits for ever for what its parent's queue answers."""
    handle = aio_handle()
    handle.async_pwrite(some(1 << 20), str(tmp_path / "file"))
    child = os.fork()
    if child == 0:
        try:
            handle.wait()
        except StorageError as error:
            os._exit(7 if "forked child" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert handle.wait() == 1


def test_deepspeeds_handle(tmp_path):
    """Its signatures and answers. Catches: transfers that do not wait, dtypes moved by elements instead of bytes."""
    handle = AsyncIO.aio_handle(1 << 20, 8, False, True, 2)
    given = (handle.get_block_size(), handle.get_queue_depth(), handle.get_single_submit())
    assert given == (1 << 20, 8, False)
    assert (handle.get_overlap_events(), handle.get_intra_op_parallelism(), handle.get_alignment()) == (True, 2, 4096)
    values = torch.randn(3, 1000).to(torch.bfloat16)
    path = str(tmp_path / "file")
    assert handle.async_pwrite(values, path) == 0
    assert handle.async_pwrite(values, path, 6000) == 0
    assert handle.wait() == 2
    assert os.path.getsize(path) == 12000
    found = torch.empty_like(values)
    assert handle.sync_pread(found, path, 6000) == 1
    assert torch.equal(found, values)
    assert handle.pwrite(values, path, True, False) == 1
    assert handle.pread(found, path, True, True) == 0
    assert handle.wait() == 1
    assert (handle.write(values, path, True), handle.read(found, path, True)) == (0, 0)
    with open(path, "r+b") as file:
        assert handle.async_pwrite(torch.zeros(3, 1000, dtype=torch.bfloat16), file.fileno()) == 0
        assert handle.wait() == 1
    assert aio_read(found, path, 4096, 4, False, False, True) == 0
    assert not found.any()
    assert aio_write(values, path, 4096, 4, False, False, True) == 0
    for wrong in (values.t(), torch.ones(2, dtype=torch.complex64).conj()):
        with pytest.raises(ModelError, match="expected a contiguous tensor"):
            handle.sync_pwrite(wrong, path)
    with pytest.raises(ConfigError, match="block_size: expected a multiple of 4096 bytes, got 1000"):
        aio_handle(1000)
    with pytest.raises(ConfigError, match="file_offset: expected"):
        handle.async_pread(found, path, -1)
    deepspeed_memcpy(found, values)
    assert torch.equal(found, values)
    with pytest.raises(ModelError, match="1 elements of torch"):
        deepspeed_memcpy(found, torch.ones(1, dtype=torch.int64))


def test_a_comparison_finds_what_differs(tmp_path):
    """`validate`. Catches: comparing nothing."""
    handle = aio_handle()
    values = some(5000)
    handle.pwrite(values, str(tmp_path / "file"), True, True)
    handle._queue.wait()
    with (tmp_path / "file").open("r+b") as file:
        file.seek(4500)
        file.write(bytes([int(values[4500]) ^ 1]))
    handle.async_pread(torch.empty(1, dtype=torch.uint8), str(tmp_path / "file"))
    with pytest.raises(StorageError, match="differ from byte 4500 on"):
        handle.wait()


def test_locked_tensors():
    """Pages that the operating system counts as locked. Catches: memory that is not, or that stays so for ever."""
    handle = aio_handle()
    example = torch.zeros(1, dtype=torch.float16)
    before = locked()
    tensor = handle.new_cpu_locked_tensor(6000, example)
    assert (tensor.dtype, tensor.shape, tensor.data_ptr() % 4096) == (torch.float16, (6000,), 0)
    assert not tensor.any()
    assert locked() == before + 12
    assert handle.is_pinned(tensor[10:20])
    assert not handle.is_pinned(example)
    assert handle.free_cpu_locked_tensor(tensor)
    assert not handle.free_cpu_locked_tensor(tensor)
    del tensor
    assert locked() == before
    with pytest.raises(BudgetError, match="ulimit -l"):
        handle.new_cpu_locked_tensor(1 << 50, example)
    with pytest.raises(ModelError, match="above 0"):
        handle.new_cpu_locked_tensor(0, example)


def locked() -> int:
    """KiB that this process has locked."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmLck"))


def test_builders_say_what_there_is(capsys):
    """Catches: an operator that is said to be there and is not, or a function that does nothing."""
    assert set(COMPATIBLE) == {*ALL_OPS, "deepspeed_not_implemented"}
    assert BUILDERS["AsyncIOBuilder"]().load() is not None
    assert BUILDERS["AsyncIOBuilder"]().absolute_name() == "deepspeed.ops.async_io_op"
    for builder in ALL_OPS.values():
        assert builder.is_compatible() == COMPATIBLE[builder.name]
        if not builder.is_compatible():
            with pytest.raises(ModelError, match=f"the operator {builder.name} is not built"):
                builder.load()
    assert not hasattr(BUILDERS["CPUAdamBuilder"]().load(), "create_adam")
    with pytest.raises(ModelError, match=r"cpu_adam\.create_adam.*use ops\.adam\.DeepSpeedCPUAdam"):
        BUILDERS["CPUAdamBuilder"]().load().create_adam(0)
    flat = BUILDERS["UtilsBuilder"]().load().flatten([torch.ones(2), torch.zeros(3)])
    assert torch.equal(flat, torch.tensor([1.0, 1, 0, 0, 0]))
    op_report()
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert told["async_io"] == "in zeroxide"
    assert told["gds"] == "not built"
