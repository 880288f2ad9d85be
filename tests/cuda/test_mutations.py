"""The tests of kernels can fail: each mistake here, made in the sources, is caught by the cases that everything else is
shown by."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulated import CUDA, FORWARD, RANDOM, REVERSE, Emulator, run_guarded, special

import zeroxide.kernels
from zeroxide.kernels import arguments

CASES = {case.name: case for case in zeroxide.kernels.ALL}
SECONDS = 20


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in a file; the named case must notice it in the source that it runs."""

    kind: str
    path: str
    old: str
    new: str
    case: str

    @property
    def source(self) -> str:
        """The source that the case runs: the file itself, or one that includes it."""
        return Path(self.path).stem if self.path.startswith("kernels/") else RUNS[self.case]

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.path}: {self.old.strip()[:60]}"


NORM, UPDATE, PACK, INDEX = "kernels/norm.cu", "include/zx/update.cuh", "include/zx/pack.cuh", "include/zx/index.cuh"
CODEC, CONVERT, QUANTISE = "include/zx/codec.cuh", "include/zx/convert.cuh", "kernels/quantise.cu"
ADAM, CAST, ACCUMULATE, PHILOX = "kernels/adam.cu", "kernels/cast.cu", "kernels/accumulate.cu", "include/zx/philox.cuh"

ROUNDING, MOMENTS = "include/zx/rounding.cuh", "include/zx/moments.cuh"
PERMUTE, ENTROPY = "kernels/permute.cu", "kernels/cross_entropy.cu"
FIRST_BARRIER = "        __syncthreads();\n        if (threadIdx.x == 0) {"
SECOND_BARRIER = "were read.\n        __syncthreads();\n"

RUNS = {
    "accumulate_f32_bf16": "accumulate",
    "accumulate_f32_f32": "accumulate",
    "norm_f16": "norm",
    "pack_f32_bf16": "cast",
    "pack_f32_f32": "cast",
    "quantise_int8_f32_at_random": "quantise",
    "store_bf16_bf16": "accumulate",
    "unpack_bf16_f32": "cast",
    "update_adagrad_compact_bf16": "adagrad",
    "update_adamw_compact_bf16": "adam",
    "update_adamw_fp32_f32": "adam",
    "update_adamw_split_bf16_bf16": "adam",
    "update_lion_compact_bf16": "lion",
    "update_lion_split_bf16_bf16": "lion",
    "update_sgd_compact_bf16": "sgd",
    "update_sgd_master_bf16_bf16": "sgd",
    "update_lion_fp32_f32": "lion",
}
"""The source that runs a case whose mutation is in a header."""

MUTATIONS = [
    Mutation("barrier", NORM, "    __syncthreads();\n", "", "norm_f32"),
    Mutation("barrier", NORM, "    __syncthreads();\n", "    __syncwarp();\n", "norm_f32"),
    Mutation(
        "divergent barrier", NORM, "    __syncthreads();\n", "    if (threadIdx.x < 40) __syncthreads();\n", "norm_f32"
    ),
    Mutation(
        "barrier", NORM, "            __syncwarp();\n            if (number", "            if (number", "norm_f16"
    ),
    Mutation("barrier", NORM, "            __syncwarp();\n        }\n", "        }\n", "norm_f32"),
    Mutation("mask", NORM, "__shfl_down_sync(ALL_LANES,", "__shfl_down_sync(0x7fffffffu,", "norm_f32"),
    Mutation("mask", QUANTISE, "__reduce_max_sync(ALL_LANES,", "__reduce_max_sync(1u << lane,", "quantise_int8_f32"),
    Mutation("early exit", NORM, "if (chunk < args.chunks) {", "if (chunk >= args.chunks) return; {", "norm_f32"),
    Mutation("bound", NORM, "if (chunk < args.chunks && sums.part == 0)", "if (sums.part == 0)", "norm_bf16"),
    Mutation("bound", NORM, "least(CHUNK, segment.elements - start)", "CHUNK", "norm_f32"),
    Mutation("bound", NORM, "least(end, first + PIECE_CHUNKS)", "first + PIECE_CHUNKS", "norm_f32"),
    Mutation("bound", PACK, "        if (at < left) {", "        {", "accumulate_f32_bf16"),
    Mutation("bound", PACK, "at < left ? from[at] : T{}", "from[at]", "norm_f16"),
    Mutation("bound", UPDATE, "aligned && left >= EACH", "aligned", "update_lion_fp32_f32"),
    Mutation("bound", QUANTISE, "return (elements + 1) / 2;", "return elements / 2;", "quantise_int4_f32"),
    Mutation("alignment", UPDATE, "second_tensor.aligned() && ", "", "update_adamw_fp32_f32"),
    Mutation("alignment", ACCUMULATE, "left, aligned && left", "left, left", "accumulate_f16_f16"),
    Mutation("alignment", NORM, "is_aligned<Bits, WIDE>(data)", "true", "norm_bf16"),
    Mutation(
        "stride", INDEX, "return static_cast<i64>(blocks) * threads * each;", "return 1 << 30;", "store_bf16_bf16"
    ),
    Mutation("bound", CAST, "first + TILE + EACH <= segment.elements", "first < segment.elements", "pack_bf16_bf16"),
    Mutation("alignment", CAST, "if (whole && shift == 0)", "if (whole)", "unpack_bf16_f32"),
    Mutation("alignment", CAST, "TILE - before;", "TILE;", "pack_f32_bf16"),
    Mutation("alignment", PACK, "parts[at] = moves ? parts[at + step] : parts[at];", "", "pack_f32_f32"),
    Mutation("stride", INDEX, "* threads + lane) * each", "* threads + lane)", "accumulate_f32_f32"),
    Mutation("search", INDEX, ".*first <= item", ".*first < item", "unpack_bf16_f32"),
    Mutation(
        "order",
        NORM,
        "tile[row * TEAM + part]",
        "tile[(ROWS - 1 - row) * TEAM + part]",
        "norm_f32",
    ),
    Mutation(
        "order",
        NORM,
        "for (u32 step = TEAM / 2; step > 0; step /= 2)",
        "for (u32 step = 1; step < TEAM; step *= 2)",
        "norm_f32",
    ),
    Mutation("rounding", CONVERT, "0x7fffu + ((bits >> 16) & 1u)", "0x8000u", "pack_f32_bf16"),
    Mutation(
        "rounding",
        CODEC,
        "live = half_up_of_canonical(master);\n    }\n};\n\n/// The same",
        "live = bf16_nearest_even(master);\n    }\n};\n\n/// The same",
        "update_sgd_master_bf16_bf16",
    ),
    Mutation(
        "rounding", ADAM, "fmaf(-root, root, square.head)", "(square.head - root * root)", "update_adamw_fp32_f32"
    ),
    Mutation("rounding", QUANTISE, "small_nearest_even(moved)", "small_floor(moved + 0.5f)", "quantise_int4_bf16"),
    Mutation("NaN", CONVERT, "return is_nan(value) ? BF16_NAN : rounded;", "return rounded;", "pack_f32_bf16"),
    Mutation("NaN", QUANTISE, "if (!(scale.value > 0.0f)) {", "if (scale.value == 0.0f) {", "quantise_int8_f16"),
    Mutation("overflow", ADAM, "finite ? square_tail : 0.0f", "square_tail", "update_adamw_fp32_f32"),
    Mutation("mask", PERMUTE, "source < 0 ? 0 : args.width - at", "args.width - at", "gather_rows_64_f32"),
    Mutation("mask", PERMUTE, "if (position < 0) {", "if (false) {", "combine_rows_64_f32"),
    Mutation("alignment", PERMUTE, "width % EACH == 0", "width > 0", "combine_rows_37_bf16"),
    Mutation(
        "barrier",
        ENTROPY,
        FIRST_BARRIER,
        "        if (threadIdx.x == 0) {",
        "cross_entropy_forward_f32",
    ),
    Mutation("barrier", ENTROPY, SECOND_BARRIER, "were read.\n", "cross_entropy_forward_f32"),
    Mutation(
        "bound",
        ENTROPY,
        "each < left ? E::load(pack.at[each]) : minus_infinity()",
        "E::load(pack.at[each])",
        "cross_entropy_forward_bf16",
    ),
    Mutation(
        "bound", ENTROPY, "target >= 0 && target < args.width", "target < args.width", "cross_entropy_forward_f32"
    ),
    Mutation("random", PHILOX, "key1 += 0xBB67AE85u;", "", "quantise_int8_f32_at_random"),
    Mutation(
        "random", QUANTISE, "static_cast<u64>(at + four) / 4", "static_cast<u64>(at) / 4", "quantise_int4_f32_at_random"
    ),
    Mutation("random", ROUNDING, "2 * row + own;", "2 * row;", "update_lion_split_bf16_bf16"),
    Mutation(
        "random", ROUNDING, "static_cast<u32>(updates >> 32) << 16 | counter", "counter", "update_lion_compact_bf16"
    ),
    Mutation("random", ROUNDING, "static_cast<u32>(stream >> 32)", "0", "update_adamw_split_bf16_bf16"),
    Mutation("random", ROUNDING, "drawn.at[2 + at], 4);", "drawn.at[2 + at], 2);", "update_adamw_compact_bf16"),
    Mutation("random", ROUNDING, "row & 1 ? got : drawn.at[at];", "got;", "update_lion_split_bf16_bf16"),
    Mutation("random", ROUNDING, "at / STATE_BLOCK, place", "at / 32, place", "update_sgd_compact_bf16"),
    Mutation("mask", ROUNDING, "ALL_LANES, row & 1", "0xfu << (threadIdx.x & 28), row & 1", "update_lion_compact_bf16"),
    Mutation(
        "early exit",
        ROUNDING,
        "at - threadIdx.x % WARP * EACH < args.elements",
        "at < args.elements",
        "update_lion_split_bf16_bf16",
    ),
    Mutation("bound", ROUNDING, "aligned && left >= EACH", "aligned", "update_lion_split_bf16_bf16"),
    Mutation("alignment", ROUNDING, "exact_tensor.aligned() && ", "", "update_lion_compact_bf16"),
    Mutation(
        "alignment",
        ROUNDING,
        "                         second_tensor.aligned() && is",
        "                         is",
        "update_adamw_split_bf16_bf16",
    ),
    Mutation("random", MOMENTS, "SECOND ? words[each] >> 16 : ", "", "update_adamw_split_bf16_bf16"),
    Mutation("random", MOMENTS, "SECOND ? words[each] * 0x9e3779b1u : ", "", "update_adamw_compact_bf16"),
    Mutation(
        "bound",
        MOMENTS,
        "const i64 count = place.in_block() ? EACH / 2 : 0;",
        "const i64 count = EACH / 2;",
        "update_sgd_compact_bf16",
    ),
    Mutation("mask", MOMENTS, "u32 step = TEAM / 2;", "u32 step = TEAM / 4;", "update_lion_compact_bf16"),
    Mutation("mask", MOMENTS, "u32 step = TEAM / 2;", "u32 step = TEAM;", "update_sgd_compact_bf16"),
    Mutation("mask", MOMENTS, "__shfl_xor_sync(ALL_LANES,", "__shfl_xor_sync(0x7fffffffu,", "update_lion_compact_bf16"),
    Mutation("sign", MOMENTS, "value < 0.0f ? -found : found", "found", "update_lion_compact_bf16"),
    Mutation(
        "sign", "kernels/adagrad.cu", "FIRST_IS_SIGNED = false", "FIRST_IS_SIGNED = true", "update_adagrad_compact_bf16"
    ),
    Mutation("rounding", MOMENTS, "!SIGNED && magnitude > 0.0f ? 1.0f", "false ? 1.0f", "update_adamw_compact_bf16"),
    Mutation("rounding", MOMENTS, "root - 0.5f + ALIGN", "root + ALIGN", "update_lion_compact_bf16"),
    Mutation("rounding", MOMENTS, "word >> 9", "(word & 0x7fffffu)", "update_adamw_compact_bf16"),
    Mutation("rounding", CODEC, "word & 0xffu, 0xffu", "word >> 8 & 0xffu, 0xffu", "update_sgd_compact_bf16"),
    Mutation("NaN", MOMENTS, "unit == BF16_NAN ? static_cast<u8>(0) : code", "code", "update_lion_compact_bf16"),
]


def check(mutation: Mutation, libraries) -> str | None:
    """What the cases say of a library, or None where they notice nothing."""
    case = CASES[mutation.case]
    arguments.LARGEST_GRID = 2
    runs = [(n, order, 0, None, None) for n in (1, 33, 500, 1500, 5003) for order in (FORWARD, REVERSE, RANDOM)]
    runs += [(700, RANDOM, 1, only, None) for only in (None, 0, 1, 2, 3)]
    runs += [(2000, FORWARD, 0, None, special), (40_003, FORWARD, 0, None, None)]
    for n, order, shift, only, change in runs:
        found = run_guarded(case, n, Emulator(libraries, order, seed=n), shift, only, change)
        if found:
            return f"{found[:200]} ({n} elements)"
    return None


def noticed(mutation: Mutation, libraries) -> str | None:
    """`check` in a process of its own, which a mistake may bring down or keep for ever."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        # Whoever runs the tests may have a handler, which a kernel that never ends would not let run.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        try:
            found = check(mutation, libraries)
        except BaseException:
            found = traceback.format_exc()
        os.write(writing, (found or "").encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    _, status = os.waitpid(child, 0)
    return "brought the process down" if status else found or None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that a mistake may bring down is forked")
def test_every_mutation_is_caught(builds, libraries):
    """All of them are applied, compiled and counted; those that nothing notices are listed."""

    def build(mutation: Mutation):
        text = (CUDA / mutation.path).read_text()
        assert text.count(mutation.old) >= 1, f"nothing to change: {mutation.name}"
        return builds.build(mutation.source, {mutation.path: text.replace(mutation.old, mutation.new)})

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(build, MUTATIONS))
    sys.stdout.flush()
    reports = {
        mutation.name + f" [{at}]": noticed(mutation, {**libraries, mutation.source: path})
        for at, (mutation, path) in enumerate(zip(MUTATIONS, made, strict=True))
    }
    for name, report in reports.items():
        print(f"{name}: {report}")
    assert [name for name, report in reports.items() if report is None] == []
    assert not [report for report in reports.values() if "Traceback" in report]
    assert len(reports) == len(MUTATIONS) >= 67
