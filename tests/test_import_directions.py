"""Imports run one way (the house's layers), and `import foveal` needs only torch: held by reading the source."""

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
    {"checks", "output_folder", "symbols"},
    {"token_order"},
    {"layout", "rules"},
    {"blocks", "fixed_blocks"},
    {"testing", "kernels"},
    {"methods"},
    {"models"},
    {"integrations", "hosts"},
    {"lab"},
]
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
CORE = set().union(*LAYERS[:5]) | {"hosts"}  # whose hosts load when they are patched
# The same inside the lab.
LAB_LAYERS = [
    {"hub", "ltx2", "modular"},
    {"pipelines", "terminal", "config_file", "command_line", "extras"},
    {"encoding"},
    {"data"},
    {"inspect", "bench", "train"},
    {"demo", "generate", "doctor"},
    {"calibrate", "evaluate", "ui"},
    {"media_commands"},
    {"cli"},
]
LAB_LAYER_OF = {name: layer for layer, names in enumerate(LAB_LAYERS) for name in names}
# Kernels: loaded when named, so that what they need need not be there.
BACKENDS = {"triton", "triton_int8", "hopper", "gpu"}
# Classes derived from a host's: loaded by functions, and by the host.
HOST_CLASSES = {"hosts/vllm_omni/backend.py": {"vllm_omni"}}
# They choose the implementation, and reach for the oracle when it is asked for.
DISPATCHERS = {"kernels/api.py", *(f"methods/{name}/attention.py" for name in ("sla", "sla2", "sla_vsa", "vsa"))}
# Methods that others may build on, and those that do. The first know no other, and nobody knows the second.
BUILT_ON = {"sla", "vsa"}
BUILDS_ON = {"sla2": {"sla"}, "sla_vsa": {"sla", "vsa"}}


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


def name_of(path):
    """The dotted name of a file below foveal: `kernels.api`, and `models` for models/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(path):
    """The first name below foveal: `kernels` for kernels/api.py, `checks` for checks.py."""
    return name_of(path).split(".")[0]


def in_backend(path):
    return bool(BACKENDS & {part.split("_")[0] for part in name_of(path).split(".")})


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
            assert part == "lab", f"{part} imports all of foveal, itself included"
            continue
        assert names[1] == part or LAYER_OF[names[1]] < LAYER_OF[part], f"{part} must not import {imported.target}"


@each_file
def test_the_labs_imports_run_one_way(path):
    if part_of(path) != "lab" or name_of(path) == "lab":
        return
    part = name_of(path).split(".")[1]
    assert part in LAB_LAYER_OF, f"lab/{part} has no layer: give it one in this test"
    for imported in imports_of(path):
        names = imported.target.split(".")
        if names[:2] == ["foveal", "lab"]:
            other = names[2]
            assert other == part or LAB_LAYER_OF[other] < LAB_LAYER_OF[part], f"{part} must not import lab.{other}"


@each_file
def test_methods_do_not_know_each_other(path):
    """So that a new method is its folder and a registration."""
    names = name_of(path).split(".")
    if names[0] != "methods" or len(names) < 3:
        return
    others = (BUILT_ON | set(BUILDS_ON)) - {names[1]} - BUILDS_ON.get(names[1], set())
    for imported in imports_of(path):
        assert imported.target.split(".")[:3] not in [["foveal", "methods", other] for other in others], imported.target


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
    allowed = {
        "foveal.blocks",
        "foveal.layout",
        "foveal.kernels.int8",  # the rounding itself, which test_int8.py compares with loops
        "foveal.kernels.reference",
        "foveal.methods.sla.config",
        "foveal.methods.sla.feature_maps",
        "foveal.methods.sla2.config",
        "foveal.methods.sla_vsa.config",
        "foveal.methods.vsa.config",
    }
    assert {i.target for i in imports_of(path) if i.target.startswith("foveal")} <= allowed


@each_file
def test_core_needs_torch_alone(path):
    if part_of(path) not in CORE:
        return
    allowed = sys.stdlib_module_names | {"torch", "foveal"} | ({"triton"} if in_backend(path) else set())
    allowed |= HOST_CLASSES.get(path.relative_to(ROOT).as_posix(), set())
    classes = {"foveal." + name.removesuffix(".py").replace("/", ".") for name in HOST_CLASSES}
    for imported in imports_of(path):
        if imported.at_module_level:
            assert imported.target.split(".")[0] in allowed, f"{imported.target} at module level"
            assert imported.target not in classes, f"{imported.target} at module level"


@each_file
def test_backends_load_only_when_named(path):
    if in_backend(path):
        return
    for imported in imports_of(path):
        names = imported.target.split(".")
        assert not (names[0] == "foveal" and BACKENDS & set(names) and imported.at_module_level), imported.target


def cycles_in(imports):
    """Groups of modules that import each other in a circle, of {module: modules that it imports}."""
    groups, open_modules, depth, lowest = [], [], {}, {}

    def visit(module):
        depth[module] = lowest[module] = len(depth)
        open_modules.append(module)
        for target in imports[module]:
            if target not in depth:
                visit(target)
            if target in open_modules:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == depth[module]:
            start = open_modules.index(module)
            group = open_modules[start:]
            del open_modules[start:]
            if len(group) > 1 or module in imports[module]:
                groups.append(sorted(group))

    for module in imports:
        if module not in depth:
            visit(module)
    return groups


def test_no_files_import_each_other_in_a_circle():
    """An import inside a function counts: it closes the circle all the same, when the function is called."""
    modules = {"foveal": ROOT / "__init__.py"} | {f"foveal.{name_of(path)}": path for path in FILES}
    imports = {
        module: {imported.target for imported in imports_of(path)} & modules.keys() for module, path in modules.items()
    }
    assert sum(map(len, imports.values())) > len(modules)
    assert cycles_in(imports) == []


def test_the_finder_of_circles_finds_them():
    chain = {"a": {"b"}, "b": {"c"}, "c": set()}
    assert cycles_in(chain) == []
    assert cycles_in({**chain, "c": {"b"}}) == [["b", "c"]]
    assert cycles_in({**chain, "c": {"a"}}) == [["a", "b", "c"]]
    assert cycles_in({**chain, "c": {"c"}}) == [["c"]]
    assert cycles_in({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def test_the_reader_of_imports_reads_them():
    """The tests above are only as good as `imports_in`."""
    source = """
import torch
from foveal import blocks
from foveal.checks import check_choice
from . import methods
def late():
    import triton
    from foveal.methods.sla.reference import sla_attention_reference
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
        Import("foveal.blocks", True),
        Import("foveal.checks", True),
        Import("foveal.methods", True),
        Import("triton", False),
        Import("foveal.methods.sla.reference", False),
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
