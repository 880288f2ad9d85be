#!/bin/sh
# nvidia-cufile 1.17.1.22: opening it never returns where /proc/modules cannot be read.
#
# A kernel without loadable modules has no /proc/modules. cuFileDriverOpen looks there for what it can use, asks for lines
# until one comes, and does not look whether the file could be opened: it spins in std::getline for ever. Containers
# of some virtual machines run on such kernels. With compatible mode off it returns before it gets there.
#
# Seen: with an empty list in its place the call succeeds at once, though there is no GPU, no CUDA driver and no nvidia-fs:
# compatible mode takes all of that for no problem. Without a list, here by a library that hides it, 10 seconds are not
# enough.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet nvidia-cufile==1.17.1.22
cat > list.c <<'C'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef FILE *opens(const char *, const char *);
static const char *other(const char *path) { return strcmp(path, "/proc/modules") ? path : getenv("LIST"); }
FILE *fopen(const char *path, const char *mode) { return ((opens *)dlsym(RTLD_NEXT, "fopen"))(other(path), mode); }
FILE *fopen64(const char *path, const char *mode) { return ((opens *)dlsym(RTLD_NEXT, "fopen64"))(other(path), mode); }
C
cc -shared -fPIC -o list.so list.c -ldl
cat > open.py <<'PYTHON'
import ctypes
import glob


class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("driver", ctypes.c_int)]


library = ctypes.CDLL(glob.glob("venv/lib/python*/site-packages/nvidia/cu*/lib/libcufile.so.0")[0])
library.cuFileGetVersion.restype = library.cuFileDriverOpen.restype = Status
version = ctypes.c_int()
library.cuFileGetVersion(ctypes.byref(version))
print("cuFile", version.value, flush=True)
print("cuFileDriverOpen says", library.cuFileDriverOpen().code)
PYTHON
export CUFILE_LOGFILE_PATH=/dev/null
LIST=/dev/null LD_PRELOAD="$folder/list.so" timeout 10 venv/bin/python open.py
if LIST=/nonexistent LD_PRELOAD="$folder/list.so" timeout 10 venv/bin/python open.py; then
    echo "it returns without a list: fixed"
    exit 1
fi
echo "it does not return without a list"
