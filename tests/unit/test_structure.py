"""How the package is put together: who may look into whom, and names that submodules must not take."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zeroxide

PACKAGE = Path(zeroxide.__file__).parent

FOREIGN = {
    # torch's C extension: what autograd, functorch and storages know is told nowhere else.
    "_C": "torch",
    "_scaled_dot_product_flash_attention_for_cpu": "torch: the attention whose sums of exponentials are known",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "torch: its gradient by those",
    "_current_graph_task_id": "torch: which backward is under way",
    "_distributed_c10d": "torch: classes of process groups",
    "_functorch": "torch: whether a transform of torch.func is on",
    "_increment_version": "torch: to make a graph that saved old weights refuse to run",
    "_storage_Use_Count": "torch: whether somebody else has views of a storage",
    "_will_engine_execute_node": "torch: whether a backward fills .grad",
    # What modules, tensors and optimizers of torch have no public name for.
    "_backward_hooks": "torch: hooks of a tensor, to be kept or looked for",
    "_buffers": "torch: a module's own buffers, also those that are shared",
    "_autograd": "torch: hooks for saved tensors, which cannot be a context between two module hooks",
    "_pop_saved_tensors_default_hooks": "torch: ends hooks for saved tensors",
    "_push_saved_tensors_default_hooks": "torch: begins hooks for saved tensors",
    "_push_on_torch_dispatch_stack": "torch: gives a thread the modes of another",
    "_push_on_torch_function_stack": "torch: gives a thread the modes of another",
    "_top_saved_tensors_default_hooks": "torch: hooks for saved tensors of the caller's",
    "_make_wrapper_subclass": "torch: how a tensor without memory of its own is made",
    "_compiled_call_impl": "torch: whether a module has been compiled in place",
    "_cdata": "torch: the address of a storage, which C functions take",
    "_device_types": "torch: what a process group can carry",
    "_execution_engine": "torch: the only way to be called when a backward ends",
    "_default_apply_gate": "transformers: the usual one",
    "_indices": "torch: of a sparse tensor as it is, not coalesced",
    "_modules": "torch: a module's own children",
    "_non_persistent_buffers_set": "torch: which buffers are not state",
    "_new_with_weak_ptr": "torch: a storage that may be gone, as torch.multiprocessing shares one",
    "_opt_called": "torch: what schedulers warn by",
    "_optimizer_load_state_dict_post_hooks": "torch: hooks of users, to be called as torch calls them",
    "_optimizer_load_state_dict_pre_hooks": "torch: hooks of users, to be called as torch calls them",
    "_optimizer_state_dict_post_hooks": "torch: hooks of users, to be called as torch calls them",
    "_optimizer_state_dict_pre_hooks": "torch: hooks of users, to be called as torch calls them",
    "_get_1f1b_rank_ops": "torch: the order of one stage a rank, which has no public way to it",
    "_get_pipeline_order": "torch: the order of all forwards, then all backwards",
    "_parameters": "torch: a module's own parameters, also those that are shared",
    "_post_accumulate_grad_hooks": "torch: whether the engine's hook is the last",
    "_register_hook_dict": "torch: lets a gradient function call the hooks of a tensor",
    "_rebuild_parameter": "torch: how a parameter is unpickled",
    "_utils": "torch: where _rebuild_parameter is",
    "_values": "torch: of a sparse tensor as it is, not coalesced",
    "_version": "torch: how often a tensor was changed in place",
    # Others.
    "_exit": "os: to end a process whose other threads hold locks",
    "_attn_implementation": "transformers: which attention a model was made with",
    "_global_mapping": "transformers: an attention that was registered has no other way out",
    "_local_mapping": "transformers: whether an attention was replaced before",
    "_init_weights": "transformers: how a model of theirs draws initial weights",
    "_keys_to_ignore_on_load_unexpected": "transformers: which names in a file are not the model's",
}
"""Underscore names of other projects that are used, each with the reason."""


def defined(tree: ast.AST) -> set[str]:
    """Names that a module gives itself: functions, classes, variables, and attributes of its own objects."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
    return found


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def looks_inside(text: str) -> list[tuple[int, str]]:
    """(line, code) of every use of an underscore attribute of an object of another module."""
    tree = ast.parse(text)
    own = defined(tree)
    return [
        (node.lineno, ast.unparse(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not is_own(node.value)
        and node.attr not in own
        and node.attr not in FOREIGN
    ]


def test_nobody_uses_underscore_attributes_of_another_module():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {code}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, code in looks_inside(path.read_text())
    ]
    assert found == []


def test_a_look_inside_is_found():
    assert looks_inside("def f(engine):\n    return engine._core, self._mine") == [(2, "engine._core")]
    assert looks_inside("class A:\n    def g(self, other):\n        self._x = other._x") == []
    assert looks_inside("param._version, owner._buffers") == []


def test_every_foreign_name_is_used():
    used = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert set(FOREIGN) - used == set()


MAKES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"}
"""Functions of torch whose result is on a script's default device where they are not told."""


def made_anywhere(text: str) -> list[tuple[int, str]]:
    """(line, code) of every tensor that is made without a word of where."""
    return [
        (node.lineno, ast.unparse(node))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in MAKES
        and not any(each.arg == "device" for each in node.keywords)
    ]


def test_memory_of_the_package_is_not_where_a_scripts_default_device_is():
    """The command line has no script around it, and cases of kernels are for tests and benchmarks."""
    apart = {PACKAGE / "cli", PACKAGE / "kernels"}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {code}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not apart & set(path.parents)
        for line, code in made_anywhere(path.read_text())
    ]
    assert found == []


def test_a_tensor_that_is_made_anywhere_is_found():
    assert made_anywhere("x = torch.empty(3)\ny = torch.empty(3, device=HOST)") == [(1, "torch.empty(3)")]


ENGINE_OF_CHECKPOINTS = {"zeroxide.engine.training_state"}


def test_checkpoints_know_the_training_state_and_no_engine():
    """Also not for the sake of types."""
    known = set()
    for path in (PACKAGE / "checkpoint").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                known |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
            elif isinstance(node, ast.Import):
                known |= {each.name for each in node.names}
    engine = {name for name in known if name.startswith("zeroxide.engine")}
    assert engine == {*ENGINE_OF_CHECKPOINTS, "zeroxide.engine.training_state.TrainingState"}


IMPORTS = """
import importlib, pkgutil, sys, types
import zeroxide, zeroxide.zero

def names():
    for package in (zeroxide, zeroxide.zero):
        for name in package.__all__:
            found = getattr(package, name)
            assert isinstance(found, types.ModuleType) == (name in ("errors", "optim", "zero")), (name, found)
    assert isinstance(zeroxide.Engine, type) and isinstance(zeroxide.zero.Init, type)
    assert zeroxide.initialize.__name__ == "initialize" and zeroxide.initialize.__code__.co_argcount == 13

modules = [each.name for each in pkgutil.walk_packages(zeroxide.__path__, "zeroxide.")]
modules = [name for name in modules if not name.endswith(("__main__", "._core"))]
assert "zeroxide.engine.entry" in modules and len(modules) > 100
if sys.argv[1] == "names first":
    names()
for name in reversed(modules) if sys.argv[1] == "backwards" else modules:
    importlib.import_module(name)
names()
taken = [name for name in modules if name.rpartition(".")[0] in ("zeroxide", "zeroxide.zero")]
taken = {name.rpartition(".")[2] for name in taken} & {*zeroxide.__all__, *zeroxide.zero.__all__}
assert taken <= {"errors", "optim", "zero"}, taken
"""


@pytest.mark.parametrize("order", ["forwards", "backwards", "names first"])
def test_no_submodule_takes_a_public_name(order):
    """Python makes every imported submodule an attribute of its package, whatever was there."""
    command = [sys.executable, "-c", IMPORTS, order]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
