#!/bin/sh
# nvidia-cuda-nvrtc 13.2.86: one process gets other machine code from the same source, for sm_100.
#
# The program has five kernels with the same body: blocks of eight values, random numbers by seven rounds of Philox, and
# two ways to round. Compiled again and again in one process, with the same options and nothing else in between, some
# of its registers are others, and with them the file; for sm_90 all files are the same. On a larger source the first
# compilation of a process gave one file in three processes. Whoever compares machine code by its bytes cannot compile it
# twice in a process.
#
# Seen: 3 files and more of 12 compilations for sm_100, 1 for sm_90.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nvidia-cuda-nvrtc==13.2.86
"$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import sysconfig
from pathlib import Path

KERNEL = """
extern "C" __global__ void __launch_bounds__(256) draw@(const float *values, signed char *codes, long long count,
                                                        u64 seed, u64 offset) {
    for (long long block = blockIdx.x; block * 2048 < count; block += 2 * gridDim.x) {
        float held[2][8];
#pragma unroll
        for (int next = 0; next < 2; next++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                held[next][i] = values[(block + next * gridDim.x) * 2048 + threadIdx.x * 8 + i];
#pragma unroll
        for (int next = 0; next < 2; next++) {
            const long long at = (block + next * gridDim.x) * 2048 + threadIdx.x * 8;
            if (at < count) {
                u32 largest = 0;
                for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(held[next][i]) & 0x7fffffffu);
                const float scale = __uint_as_float(largest) / 127.0f, reciprocal = 1.0f / scale;
                bool near = scale > 1e-18f && scale < 1e6f;
                u32 words[8] = {};
#pragma unroll
                for (int four = 0; four < 8; four += 4) {
                    const u64 place = offset + (u64)(at + four) / 4;
                    u32 a = (u32)place, b = (u32)(place >> 32), c = 0, d = 0, k = (u32)seed, l = (u32)(seed >> 32);
#pragma unroll
                    for (int i = 0; i < 7; i++) {
                        const u64 x = (u64)a * 0xD2511F53u, y = (u64)c * 0xCD9E8D57u;
                        a = (u32)(y >> 32) ^ b ^ k, b = (u32)y, c = (u32)(x >> 32) ^ d ^ l, d = (u32)x;
                        k += 0x9E3779B9u, l += 0xBB67AE85u;
                    }
                    const u32 drawn[4] = {a, b, c, d};
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        words[four + i] = drawn[i];
                        near = near && drawn[i] >= 256;
                    }
                }
                if (near) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        const float moved = held[next][i] * reciprocal + (words[i] >> 8) * 5.9604645e-08f;
                        codes[at + i] = (signed char)(int)floorf(moved);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        const float moved = held[next][i] * scale + (words[i] >> 8) * 5.9604645e-08f;
                        codes[at + i] = (signed char)(int)fminf(fmaxf(floorf(moved), -127.0f), 127.0f);
                    }
                }
            }
        }
    }
}
"""
SOURCE = "typedef unsigned u32; typedef unsigned long long u64;\n" + "".join(
    KERNEL.replace("@", str(number)) for number in range(5)
)

folder = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "lib"
for other in folder.glob("libnvrtc-builtins.so.*"):
    ctypes.CDLL(str(other))
nvrtc = ctypes.CDLL(str(folder / "libnvrtc.so.13"))


def compiled(architecture):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * 1)(b"--gpu-architecture=" + architecture)
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.encode(), b"draw.cu", 0, None, None) == 0
    assert nvrtc.nvrtcCompileProgram(program, 1, options) == 0
    assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    cubin = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetCUBIN(program, cubin) == 0
    assert nvrtc.nvrtcDestroyProgram(ctypes.byref(program)) == 0
    return cubin.raw


found = {}
for architecture in (b"sm_90", b"sm_100"):
    found[architecture] = len({compiled(architecture) for _ in range(12)})
    print(architecture.decode(), "different files of 12:", found[architecture], flush=True)
assert found[b"sm_90"] == 1
assert found[b"sm_100"] > 1, "the same each time: fixed"
PYTHON
