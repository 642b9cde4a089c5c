"""Imports run one way (the house's layers), and `import foveal` needs torch alone: held by reading the source."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import foveal

ROOT = Path(foveal.__file__).parent

# A module imports from lower layers and from its own package, never from higher layers or from a sibling on its layer.
LAYERS = [
    {"types"},
    {"video_grid", "testing"},
    {"block_sparse"},
    {"selection"},
    {"sla", "vsa"},
    {"methods", "cost"},
    {"integrations"},
    {"pipelines", "terminal"},
    {"inspect", "bench", "models", "training"},
    {"demo", "generate", "doctor"},
    {"evaluate", "ui"},
    {"media_commands"},
    {"cli"},
]
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
CORE = set().union(*LAYERS[:6])
# Kernels: loaded when named, so that what they need need not be there.
BACKENDS = {"triton", "gluon"}
# They choose the implementation, and reach for the oracle when it is asked for.
DISPATCHERS = {"block_sparse/api.py", "sla/attention.py", "vsa/attention.py"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its dotted name, and whether importing the file runs it."""

    target: str
    at_module_level: bool


def imports_of(path):
    return imports_in(path.read_text(), ["foveal", *path.relative_to(ROOT).parent.parts])


def imports_in(source, package):
    """Every module that source imports; `from package import name` counts as `package.name` where that is a module."""
    found = []

    def visit(node, top):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module
            for alias in node.names:
                whole = ROOT.parent.joinpath(*base.split("."), alias.name)
                is_module = whole.is_dir() or whole.with_suffix(".py").is_file()
                found.append(Import(f"{base}.{alias.name}" if is_module else base, top))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(ast.parse(source), True)
    return found


def part_of(path):
    """The first name below foveal: `sla` for sla/attention.py, `types` for types.py."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def in_backend(path):
    return bool(BACKENDS & {part.split("_")[0] for part in path.relative_to(ROOT).with_suffix("").parts})


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
each_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])


@each_file
def test_imports_run_one_way(path):
    part = part_of(path)
    assert part in LAYER_OF, f"{part} has no layer: give it one in this test"
    for imported in imports_of(path):
        names = imported.target.split(".")
        if names[0] != "foveal":
            continue
        if len(names) == 1:
            assert LAYER_OF[part] > LAYER_OF["methods"], f"{part} imports all of foveal, itself included"
            continue
        assert names[1] == part or LAYER_OF[names[1]] < LAYER_OF[part], f"{part} must not import {imported.target}"


@each_file
def test_only_the_tables_name_both_methods(path):
    """So that a new method is its folder and a line; the demo compares the two by name."""
    parts = {imported.target.split(".")[1] for imported in imports_of(path) if imported.target.startswith("foveal.")}
    assert not {"sla", "vsa"} <= parts or part_of(path) in {"methods", "cost", "demo"}


@each_file
def test_fast_code_never_needs_a_reference(path):
    if path.name == "reference.py":
        return
    for imported in imports_of(path):
        if imported.target.startswith("foveal.") and imported.target.endswith(".reference"):
            assert path.relative_to(ROOT).as_posix() in DISPATCHERS
            assert not imported.at_module_level


@each_file
def test_references_stand_alone(path):
    """An oracle that called the fast code would agree with its mistakes."""
    if path.name != "reference.py":
        return
    allowed = {"foveal.types", "foveal.video_grid", "foveal.block_sparse.reference", "foveal.sla.feature_maps"}
    assert {i.target for i in imports_of(path) if i.target.startswith("foveal")} <= allowed


@each_file
def test_core_needs_torch_alone(path):
    if part_of(path) not in CORE:
        return
    allowed = sys.stdlib_module_names | {"torch", "foveal"} | ({"triton"} if in_backend(path) else set())
    for imported in imports_of(path):
        if imported.at_module_level:
            assert imported.target.split(".")[0] in allowed, f"{imported.target} at module level"


@each_file
def test_backends_load_only_when_named(path):
    if in_backend(path):
        return
    for imported in imports_of(path):
        names = imported.target.split(".")
        assert not (names[0] == "foveal" and BACKENDS & set(names) and imported.at_module_level), imported.target


def test_the_reader_of_imports_reads_them():
    """The tests above are only as good as `imports_in`."""
    source = """
import torch
from foveal import selection
from foveal.types import SLAConfig
from . import methods
def late():
    import triton
    from foveal.sla.reference import sla_attention_reference
class Holder:
    import diffusers
try:
    import rich
except ImportError:
    pass
"""
    found = imports_in(source, ["foveal"])
    assert found == [
        Import("torch", True),
        Import("foveal.selection", True),
        Import("foveal.types", True),
        Import("foveal.methods", True),
        Import("triton", False),
        Import("foveal.sla.reference", False),
        Import("diffusers", True),
        Import("rich", True),
    ]


def test_import_is_light():
    """In a fresh process: no heavy package comes along, and foveal adds little to what torch itself takes."""
    script = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import foveal
seconds = time.process_time() - start
heavy = {"diffusers", "transformers", "accelerate", "rich", "av", "matplotlib", "triton", "tyro", "safetensors", "PIL"}
print(seconds, *sorted(heavy & (set(sys.modules) - before)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    seconds, *heavy = run.stdout.split()
    assert heavy == []
    assert float(seconds) < 2.0
