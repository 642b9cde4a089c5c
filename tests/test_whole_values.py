"""Values travel whole through the core: no function takes a wall of arguments. Held by reading the source.

What users and methods call by name keeps its signature. So do kernels, custom operators, and what stands for them in a
graph: their compilers take flat arguments.
"""

import ast
from pathlib import Path

import pytest

import foveal

ROOT = Path(foveal.__file__).parent
CORE = [ROOT / f"{name}.py" for name in ("blocks", "fixed_blocks", "layout", "rules", "token_order")]
CORE += sorted(path for name in ("kernels", "methods") for path in (ROOT / name).rglob("*.py"))
CORE = [path for path in CORE if path.name != "reference.py"]  # written out as in the papers
MOST = 8
# By name: the functions and modules of the contract.
PUBLIC = {"attention_cost", "pick_blocks", "select_blocks", "forward"}
PUBLIC |= {f"{name}_attention" for name in ("sla", "sla2", "sla_vsa", "vsa")}
FLAT = ("triton.jit", "gluon.jit", "gluon.constexpr_function", "custom_op", "register_fake")


def parameters(function):
    given = function.args
    names = [x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if x]
    return names[names[:1] in (["self"], ["cls"], ["ctx"]) :]


def walls_in(source):
    """Functions with more than `MOST` parameters, by name, and how many they have."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name in PUBLIC:
            continue
        flat = any(word in ast.unparse(decorator) for decorator in node.decorator_list for word in FLAT)
        if not flat and len(parameters(node)) > MOST:
            found[node.name] = len(parameters(node))
    return found


@pytest.mark.parametrize("path", CORE, ids=[str(path.relative_to(ROOT)) for path in CORE])
def test_no_wall_of_parameters(path):
    assert walls_in(path.read_text()) == {}


def test_walls_are_found():
    names = [f"x{i}" for i in range(MOST)]
    short, long = ", ".join(names), ", ".join([*names, "more"])
    assert walls_in(f"def f({short}): pass") == {}
    assert walls_in(f"class A:\n    def f(self, {short}): pass") == {}
    assert walls_in(f"def f({long}): pass") == {"f": MOST + 1}
    assert walls_in(f"def f({short}, *, more=1): pass") == {"f": MOST + 1}
    assert walls_in(f"@triton.jit(noinline=True)\ndef f({long}): pass") == {}


def test_the_formatter_formats_all_of_it():
    """A wall that is kept from it is one that should have been a value."""
    assert [str(path) for path in sorted(ROOT.rglob("*.py")) if "fmt: " in path.read_text()] == []
