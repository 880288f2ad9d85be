#!/bin/sh
# nvidia-cuda-nvrtc 13.0.88: a compiler that is opened by its path compiles nothing.
#
# NVRTC is two libraries, and the first opens the second by name when it compiles. The wheel puts both into one folder
# that the loader does not know, and the first one of 13.0 has no path to where it lies itself. Whoever finds the wheel
# and opens libnvrtc.so.13 by its path gets a compiler that answers questions and refuses every source, unless somebody
# has loaded the second library before, as a program that has imported torch may have: so it works beside torch and
# fails without. The wheel of 13.2 has that path. Opening libnvrtc-builtins by its path first mends it.
#
# Seen: 13.0.88 gives NVRTC_ERROR_BUILTIN_OPERATION_FAILURE, and NVRTC_SUCCESS once the other library is loaded;
# 13.2.78 gives NVRTC_SUCCESS at once. Creating the program succeeds in every case.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 13.0.88 13.2.78; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "nvidia-cuda-nvrtc==$version"
    "$folder/$version/bin/python" - "$version" <<'PYTHON'
import ctypes
import sys
import sysconfig
from pathlib import Path

SOURCE = b'extern "C" __global__ void add(float *x) { x[threadIdx.x] += 1.0f; }'
OPTIONS = (ctypes.c_char_p * 1)(b"--gpu-architecture=sm_90")

folder = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "lib"
nvrtc = ctypes.CDLL(str(folder / "libnvrtc.so.13"))
nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p


def compiled():
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE, b"add.cu", 0, None, None) == 0
    result = nvrtc.nvrtcCompileProgram(program, 1, OPTIONS)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return nvrtc.nvrtcGetErrorString(result).decode()


alone = compiled()
for other in folder.glob("libnvrtc-builtins.so.*"):
    ctypes.CDLL(str(other))
beside = compiled()
print("NVRTC", sys.argv[1], "alone:", alone, "with its other library loaded:", beside)
expected = "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE" if sys.argv[1].startswith("13.0") else "NVRTC_SUCCESS"
assert (alone, beside) == (expected, "NVRTC_SUCCESS"), (alone, beside)
PYTHON
done
