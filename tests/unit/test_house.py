"""Rules of the repository that no compiler checks: who may know whom, and that documents and commands agree."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import zeroxide
from zeroxide import _core
from zeroxide.config import RULES, Config, Scheduler

ROOT = Path(__file__).parents[2]
MAX_LINES = 500
MAX_FUNCTION_LINES = 80


# Crate -> the crates of this workspace that it may depend on.
ALLOWED = {
    "zeroxide-layout": set(),
    "zeroxide-plan": {"zeroxide-layout"},
    "zeroxide-memory": {"zeroxide-layout"},
    "zeroxide-storage": {"zeroxide-layout", "zeroxide-memory"},
    "zeroxide-exchange": {"zeroxide-layout", "zeroxide-memory"},
    "zeroxide-device": {"zeroxide-layout", "zeroxide-memory"},
    "zeroxide-optim": {"zeroxide-layout", "zeroxide-memory"},
}
ALLOWED["zeroxide-offload"] = set(ALLOWED)
ALLOWED["zeroxide-python"] = set(ALLOWED)

WITHOUT_UNSAFE = ("zeroxide-layout", "zeroxide-offload")


def sources(pattern: str, *folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob(pattern))]
    return [path for path in found if not {"target", ".peers"} & set(path.parts)]


def misplaced(packages: list[dict]) -> list[str]:
    """One line for every crate that is not known, and for every dependency that points the wrong way."""
    names = {package["name"] for package in packages}
    lines = [f"{name} is not in the table" for name in sorted(names - set(ALLOWED))]
    for package in packages:
        used = {each["name"] for each in package["dependencies"]} & names
        wrong = used - ALLOWED.get(package["name"], set())
        lines += [f"{package['name']} depends on {each}" for each in sorted(wrong)]
    return lines


@pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not installed")
def test_crates_depend_in_one_direction():
    command = ["cargo", "metadata", "--format-version", "1", "--no-deps", "--offline"]
    metadata = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    assert {package["name"] for package in metadata["packages"]} >= {"zeroxide-layout", "zeroxide-python"}
    assert misplaced(metadata["packages"]) == []


def test_a_dependency_in_the_wrong_direction_is_found():
    upward = [
        {"name": "zeroxide-memory", "dependencies": [{"name": "zeroxide-storage"}, {"name": "libc"}]},
        {"name": "zeroxide-storage", "dependencies": [{"name": "zeroxide-memory"}]},
    ]
    assert misplaced(upward) == ["zeroxide-memory depends on zeroxide-storage"]
    assert misplaced([{"name": "zeroxide-extra", "dependencies": []}]) == ["zeroxide-extra is not in the table"]


@pytest.mark.parametrize("crate", WITHOUT_UNSAFE)
def test_crates_without_unsafe_say_so(crate):
    assert "#![forbid(unsafe_code)]" in (ROOT / "crates" / crate / "src" / "lib.rs").read_text()


def code() -> list[Path]:
    return [*sources("*.rs", "crates"), *sources("*.py", "python", "tests", "benches", "examples", "docs")]


def test_files_hold_one_concept():
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in code()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def python_functions(text: str) -> list[tuple[str, int]]:
    """Name and lines of every function, from `def` to its last statement."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in nodes]


# What may hold a brace that opens nothing: comments, strings, characters. A lifetime is not a character.
RUST_WORDS = re.compile(
    r'//[^\n]*|/\*.*?\*/|b?r(#*)".*?"\1|b?"(?:\\.|[^"\\])*"|b?\'(?:\\u\{[^}]*\}|\\.|[^\\\'])\'', re.DOTALL
)

RUST_MARKS = re.compile(r"[{}()\[\];]")


def rust_functions(text: str) -> list[tuple[str, int]]:
    """Name and lines of every function with a body, from `fn` to the brace that ends it."""
    bare = RUST_WORDS.sub(lambda match: "\n" * match[0].count("\n"), text)
    found = []
    for start in re.finditer(r"\bfn (\w+)", bare):
        depth = 0
        for mark in RUST_MARKS.finditer(bare, start.end()):
            depth += {"{": 1, "(": 1, "[": 1, ";": 0}.get(mark[0], -1)
            if depth == 0 and mark[0] in ";}":
                if mark[0] == "}":
                    found.append((start[1], bare.count("\n", start.start(), mark.end()) + 1))
                break
    return found


def test_functions_fit_on_a_page():
    too_long = []
    for path in code():
        functions = rust_functions if path.suffix == ".rs" else python_functions
        too_long += [
            f"{path.relative_to(ROOT)}: {name}, {lines} lines"
            for name, lines in functions(path.read_text())
            if lines > MAX_FUNCTION_LINES
        ]
    assert too_long == []


def test_functions_are_measured_whatever_they_contain():
    rust = """
        trait Named { fn name(&self) -> [u8; 2]; }
        fn first<'a>(text: &'a str) -> char {
            // {
            let _ = ("{", '{', b'{', r#"" {"#, '\\'', "\\"{");
            '}'
        }
        impl Some { fn second(&self) -> Result<[u8; 4], ()> where Self: Sized {
            fn inner() { {} }
            Ok([0; 4])
        } }
    """
    assert rust_functions(rust) == [("first", 5), ("second", 4), ("inner", 1)]
    assert python_functions("def f():\n    def g():\n        pass\n\nx = 1\n") == [("f", 3), ("g", 2)]


def test_files_are_named_after_what_they_hold():
    banned = {"util", "utils", "helper", "helpers", "common", "misc"}
    files = [*sources("*.rs", "crates"), *sources("*.py", "python", "tests", "benches")]
    paths = [path.relative_to(ROOT) for path in files]
    assert [str(path) for path in paths if banned & {part.removesuffix(path.suffix) for part in path.parts}] == []


# What only somebody writes who knows where compute memory is, or takes addresses.
PLACES = {
    "*.py": re.compile(
        r"data_ptr\(|torch\.frombuffer|from_address|from_buffer\(|\.cpu\(\)|\bis_(cuda|cpu)\b|\.is_pinned\(|\.pin_memory\("
        r"|device\.type\b|torch\.device\((?!\"meta\")|device=\"cpu\"|map_location=|autocast\(\"|\.to\(\"cpu\""
        r"|torch\.cuda|torch\.accelerator|DeviceMesh\.from_group\(|init_device_mesh\(|_device_types"
    ),
    "*.rs": re.compile(r"\b(cudarc|cuMem\w+|cuda\w*|CUdeviceptr|hipMem\w+)\b"),
}
PLACED = {
    "python/zeroxide/device/placement.py": "is the place",
    "python/zeroxide/device/transfers.py": "copies between the host and a device",
    "crates/zeroxide-device/build.rs": "finds the sources of kernels",
    "crates/zeroxide-device/src/cuda/": "is a device that computes elsewhere",
    "crates/zeroxide-device/src/error.rs": "passes errors of that device on",
    "crates/zeroxide-device/src/lib.rs": "exports that device",
    "crates/zeroxide-device/tests/cuda.rs": "tests that device",
    "crates/zeroxide-offload/src/facts.rs": "passes errors of that device on",
    "crates/zeroxide-python/src/cuda.rs": "passes that device to Python",
    "crates/zeroxide-python/src/lib.rs": "exports that device",
    "python/zeroxide/distributed/collectives.py": "turns JSON into bytes for a group that carries host memory",
    "python/zeroxide/distributed/process_group.py": "finds or makes a group that carries host memory",
    "python/zeroxide/distributed/mesh.py": "tells torch of the groups of ranks that carry host memory",
    "python/zeroxide/kernels/launchers.py": "chooses a launcher by the kind of device",
    "python/zeroxide/kernels/launch.py": "starts kernels on torch's current stream of a device",
    "python/zeroxide/integrations/deepspeed/accelerator.py": "answers scripts that ask for the device",
    "python/zeroxide/params/operations.py": "names attributes of torch that look at no value",
    "python/zeroxide/checkpoint/convert/deepspeed.py": "reads a file, with no model and no device at hand",
    "python/zeroxide/cli/training/sample.py": "is a user of the engine: takes logits to the host to draw from them",
    "python/zeroxide/cli/training/models.py": "is a user of the engine: makes buffers of the model that it gives to it",
}
"""Files, and folders as a whole, that may know it, and why."""


def test_one_place_knows_where_compute_memory_is():
    found = set()
    for pattern, words in PLACES.items():
        for path in sources(pattern, "python" if pattern == "*.py" else "crates"):
            lines = path.read_text().splitlines()
            if any(words.search(line) and not line.lstrip().startswith(("#", "//")) for line in lines):
                name = str(path.relative_to(ROOT))
                found.add(next((each for each in PLACED if each.endswith("/") and name.startswith(each)), name))
    assert found == PLACED.keys()


# What only somebody writes in Rust who holds a window, frames or a tensor's memory, or takes addresses.
HOST_MEMORY = re.compile(
    r"\b(Window|FramePool|Frame|Anchor|TensorSpec|PyWindow|HostMemory)\b|\bwindow\b|\bdata_ptr\b|\bas_(mut_)?ptr\(\)"
    r"|\*(const|mut) |\bptr::|\bNonNull\b|\bfrom_raw_parts|_provenance\b|\bLease::foreign\b|\.(base|addr)\(\)"
    r"|\b(address_of|is_moving)\("
)
HOLDERS = {
    "zeroxide-device/src/cuda/sys/cufile.rs": "gives cuFile a file and takes its handle: no compute memory",
    "zeroxide-device/src/cuda/sys/driver.rs": "gives the driver texts and numbers to fill in",
    "zeroxide-device/src/cuda/sys/kernel.rs": "gives the driver a kernel's argument",
    "zeroxide-device/src/cuda/sys/library.rs": "finds functions of the driver and the compiler: no compute memory",
    "zeroxide-device/src/cuda/sys/nvrtc.rs": "gives the compiler texts: no compute memory",
    "zeroxide-device/src/cuda/sys/owned.rs": "gives the driver the host's side of copies and of registrations",
    "zeroxide-device/src/host.rs": "is the host as a device",
    "zeroxide-device/src/lib.rs": "exports the host as a device",
    "zeroxide-exchange/src/futex.rs": "gives the system words that ranks sleep on: no compute memory",
    "zeroxide-offload/src/api/gradients.rs": "copies a gradient first that lies in a window",
    "zeroxide-offload/src/api/mod.rs": "compares addresses: copies a tensor first that lies in a window",
    "zeroxide-offload/src/api/weights.rs": "tells Python where a unit's window is",
    "zeroxide-offload/src/build.rs": "reserves the windows",
    "zeroxide-offload/src/durable/mod.rs": "copies what is in host memory to its mirror on disk and back",
    "zeroxide-offload/src/gradients/accumulate.rs": "finds where a gradient begins",
    "zeroxide-offload/src/gradients/reduce.rs": "tells Python where messages find and leave gradients",
    "zeroxide-offload/src/gradients/transport.rs": "puts memory that ranks share under windows",
    "zeroxide-offload/src/rooms.rs": "owns memory for messages, and tells where it is",
    "zeroxide-offload/src/state/edit.rs": "writes a changed weight into its window",
    "zeroxide-offload/src/state/fill.rs": "writes first weights into windows",
    "zeroxide-offload/src/state/raw.rs": "reads and writes bytes of frozen parameters in windows",
    "zeroxide-offload/src/state/read.rs": "reads weights from windows",
    "zeroxide-offload/src/step/stream.rs": "leases tiles of a window to an update",
    "zeroxide-offload/src/tile_io.rs": "leases tiles of a window to the disk",
    "zeroxide-offload/src/weights/cover.rs": "holds what is not complete beside its window",
    "zeroxide-offload/src/weights/gather.rs": "moves frames under windows and away",
    "zeroxide-offload/src/weights/mod.rs": "owns the pool of frames",
    "zeroxide-offload/src/weights/residence.rs": "owns the windows",
    "zeroxide-offload/src/weights/stray.rs": "gives memory to whoever reads an empty window",
    "zeroxide-optim/src/openmp.rs": "calls functions of the OpenMP runtime: no compute memory",
    "zeroxide-python/src/blocks.rs": "passes messages, which lie in host memory, to the kernels",
    "zeroxide-python/src/buffer.rs": "is memory of the core as a Python buffer",
    "zeroxide-python/src/codec.rs": "turns tensors in host memory into stored weights and back",
    "zeroxide-python/src/commits.rs": "reads the last commit into tensors in host memory",
    "zeroxide-python/src/cuda.rs": "is registered host memory as a Python buffer",
    "zeroxide-python/src/dlpack.rs": "asks torch where a tensor in host memory is",
    "zeroxide-python/src/file_checksum.rs": "takes in and copies tensors in host memory, whose ranges it compares",
    "zeroxide-python/src/file_queue.rs": "moves tensors in host memory from and to files",
    "zeroxide-python/src/gradient_hook.rs": "passes the gradients that autograd leaves to the core",
    "zeroxide-python/src/lib.rs": "exports the classes",
    "zeroxide-python/src/offload.rs": "passes tensors to the core and windows to Python",
    "zeroxide-python/src/process.rs": "has pages of a tensor in host memory leave the process",
    "zeroxide-python/src/spec.rs": "is a tensor's memory",
    "zeroxide-python/src/state.rs": "updates state in tensors of host memory, a device's reference",
    "zeroxide-python/src/window.rs": "is a window as a Python buffer",
    "zeroxide-storage/src/file.rs": "aligns staging memory: no compute memory",
    "zeroxide-storage/src/queue/operation.rs": "checks the alignment of what is read into and written from",
    "zeroxide-storage/src/queue/ring.rs": "gives the system what is read into and written from",
    "zeroxide-storage/src/syscall.rs": "gives the system names and numbers: no compute memory",
}
"""Files of the core outside of `zeroxide-memory`, which makes host memory, that may know it, and why."""


def holders(texts: dict[str, str]) -> set[str]:
    """Those of the Rust files, by their text, that hold compute memory as host memory, or take addresses."""
    return {
        name
        for name, text in texts.items()
        if any(HOST_MEMORY.search(line) for line in text.splitlines() if not line.lstrip().startswith("//"))
    }


def test_files_of_the_core_that_know_compute_memory_as_host_memory_are_known():
    """Catches: a file that learns it, and one that stays in the table after it has forgotten it."""
    folder = ROOT / "crates"
    known = (folder / "zeroxide-memory").parts
    files = [path for path in sources("*.rs", "crates") if path.relative_to(folder).parts[1] == "src"]
    texts = {str(path.relative_to(folder)): path.read_text() for path in files if path.parts[: len(known)] != known}
    assert holders(texts) == HOLDERS.keys()


@pytest.mark.parametrize(
    ("line", "held"),
    [
        ("use zeroxide_memory::{Lease, Window};", True),
        ("let bytes = this.weights.window()?.lease(range)?;", True),
        ("let frames = pool.take(FramePool::ALL);", True),
        ("fn evict(values: &TensorSpec) {", True),
        ("let start = values.as_ptr() as usize;", True),
        ("let start = std::ptr::from_ref(values);", True),
        ("let start = values.first().map(|each| each as *const f32);", True),
        ("    // A window of the weights.", False),
        ("for pair in values.windows(2) {", False),
        ("let lease = arena.lease(bytes, align)?;", False),
    ],
)
def test_what_holds_host_memory_is_told_by_its_lines(line, held):
    assert holders({"new.rs": f"//! A new file.\n{line}\n"}) == ({"new.rs"} if held else set())


def test_every_field_of_the_config_is_read():
    """A field that nothing reads is an option that does nothing: it stands somewhere as `section.field`."""
    read = set()
    for path in sources("*.py", "python"):
        if "config" not in path.relative_to(ROOT).parts:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                    read.add(f"{node.value.attr}.{node.attr}")
    config = Config(scheduler=Scheduler("WarmupLR", {}))
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    known = {
        f"{name}.{field.name}"
        for name, section in sections.items()
        if dataclasses.is_dataclass(section)
        for field in dataclasses.fields(section)
    }
    assert known - read == set()
    # The optimizer's fields become keys of parameter groups, and the core refuses a rule that misses one.
    for name, rule in RULES.items():
        fields = {each for field in rule.names() for each in (("beta1", "beta2") if field == "betas" else (field,))}
        assert fields == set(_core.RULES[name].hyperparameters), name


def test_the_installed_package_is_typed():
    installed = Path(zeroxide.__file__).parent
    assert [name for name in ("py.typed", "_core.pyi") if not (installed / name).is_file()] == []


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", ".ci/run"])
def test_commands_in_documents_exist(name):
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code_of((ROOT / name).read_text(), name)))
    assert named - targets() == set()


def code_of(text: str, name: str) -> str:
    """The code in a Markdown text: fenced blocks and `spans`. Any other file is code throughout."""
    if not name.endswith(".md"):
        return text
    fenced = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`[^`\n]+`", text)])


def test_make_has_its_commands_and_explains_them():
    expected = {
        "train",
        "test",
        "test-rust",
        "test-py",
        "test-slow",
        "sanitize",
        "lint",
        "bench",
        "bench-scale",
        "gpu",
        "fmt",
        "docs",
        "develop",
        "clean",
        "help",
    }
    assert expected == targets()
    if shutil.which("make"):
        shown = subprocess.run(
            ["make", "--no-print-directory", "help"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        assert {line.split()[0] for line in shown.splitlines()} == expected


def test_everything_that_make_installs_has_a_version():
    pinned, of_docs = pins("requirements-dev.txt"), pins("requirements-docs.txt")
    assert {"mkdocs-material", "mkdocstrings-python"} <= of_docs
    assert pinned & of_docs == set(), "one version of each"
    wanted = re.findall(r'"([A-Za-z0-9_-]+)>=', (ROOT / "pyproject.toml").read_text())
    assert {"torch", "pydantic", "transformers"} <= set(wanted)
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in wanted} <= pinned


def pins(name: str) -> set[str]:
    """The packages in a file of requirements, each of which has a version."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)] == []
    return {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
