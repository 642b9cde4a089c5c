"""foveal's functions as a kernel of the Hugging Face hub: a `torch-noarch` project, source only.

    python hub_kernel/export.py FOLDER              # what kernel-builder builds
    python hub_kernel/export.py FOLDER --build cpu  # and a build of it, as `kernels` loads it

A hub kernel is loaded under a name of its own, beside others of its versions. So its files import each other
relatively, and its operators have a namespace that the builder makes up. The files are those of `src/foveal` that the
functions need, and nothing else is changed in them.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src" / "foveal"
# What the kernel exports, by the module that has it.
EXPORTS = {
    "blocks": ["BlockSelection"],
    "layout": ["TokenLayout", "VideoGrid"],
    "kernels.api": ["block_sparse_attention", "select_blocks"],
    "methods.sla.config": ["SLAConfig"],
    "methods.sla.attention": ["SparseLinearAttention", "sla_attention"],
    "methods.vsa.config": ["VSAConfig"],
    "methods.vsa.attention": ["VideoSparseAttention", "vsa_attention"],
}
# Loaded by name.
BACKENDS = ["kernels.triton.backend", "kernels.triton_int8.backend", "kernels.hopper.backend"]
PROJECT_FILES = ["build.toml", "flake.nix", "CARD.md", "pytest.ini", "tests/test_foveal.py"]
IMPORT = re.compile(r"^(\s*)from foveal\.([\w.]+) import ", re.MULTILINE)
OPERATOR = re.compile(r'"foveal::(\w+)"')
OPS_IMPORT = "from {dots}_ops import add_op_namespace_prefix\n"


def file_of(module):
    """The file of a module by its name below foveal; None for a package, or for what is no module."""
    path = SOURCE.joinpath(*module.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def imported_by(source):
    """Names below foveal of the modules that a file imports, also inside functions, but not only for types."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "foveal" for alias in node.names):
            raise ValueError("a file imports foveal itself, and not a module of it")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "foveal":
            base = node.module.split(".")[1:]
            for alias in node.names:
                names = [".".join([*base, alias.name]), ".".join(base)]
                found.add(next(name for name in names if file_of(name)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def needed_modules():
    """The modules of foveal that the exported functions can reach."""
    waiting, needed = [*EXPORTS, *BACKENDS], set()
    while waiting:
        module = waiting.pop()
        if module not in needed:
            needed.add(module)
            waiting.extend(imported_by(file_of(module).read_text(encoding="utf-8")))
    return sorted(needed)


def relocated(source, depth):
    """A file's source for the kernel: relative imports, and operators in the builder's namespace.

    Args:
        depth: how many folders the file is below the package.
    """
    dots = "." * (depth + 1)
    source = IMPORT.sub(rf"\1from {dots}\2 import ", source)
    source, operators = OPERATOR.subn(r'add_op_namespace_prefix("\1")', source)
    if operators:
        first = re.search(rf"^from {re.escape(dots)}\w", source, re.MULTILINE).start()
        source = source[:first] + OPS_IMPORT.format(dots=dots) + source[first:]
    return source


def package_files():
    """The files of the Python package by their path in it, without `_ops.py`, which the builder adds."""
    files = {}
    for module in needed_modules():
        parts = module.split(".")
        files["/".join(parts) + ".py"] = relocated(file_of(module).read_text(encoding="utf-8"), len(parts) - 1)
        for depth in range(1, len(parts)):
            # foveal's own would register methods for models, which are not here.
            files.setdefault("/".join([*parts[:depth], "__init__.py"]), "")
    lines = ['"""Block-sparse, sparse-linear, and video sparse attention, forward and backward."""', ""]
    lines += [f"from .{module} import {', '.join(names)}" for module, names in EXPORTS.items()]
    names = sorted(name for several in EXPORTS.values() for name in several)
    lines += ["", "__all__ = [", *(f'    "{name}",' for name in names), "]"]
    files["__init__.py"] = "\n".join(lines) + "\n"
    return files


def write(folder, files):
    for name, text in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def export(folder):
    """Write the project that kernel-builder takes.

    Raises:
        FileExistsError: the folder has something in it.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} must be new or empty")
    write(folder / "torch-ext" / "foveal", package_files())
    for name in PROJECT_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(HERE / name, folder / name)


def build(folder, backend):
    """Build an exported project for one backend, as kernel-builder does for noarch kernels; returns the variant.

    The identifier comes from the files, where kernel-builder takes it from the commit.
    """
    folder = Path(folder)
    general = tomllib.loads((folder / "build.toml").read_text(encoding="utf-8"))["general"]
    if backend not in general["backends"]:
        raise ValueError(f"backend must be one of {general['backends']}, got {backend!r}")
    variant, source = folder / "build" / f"torch-{backend}", folder / "torch-ext" / "foveal"
    files = {str(path.relative_to(source)): path.read_text(encoding="utf-8") for path in sorted(source.rglob("*.py"))}
    content = hashlib.sha1("".join(f"{name}\0{text}\0" for name, text in files.items()).encode()).hexdigest()
    identifier = f"_foveal_{backend}_{content[:7]}"
    files["_ops.py"] = (
        f"import torch\n\nops = torch.ops.{identifier}\n\n\ndef add_op_namespace_prefix(op_name: str) -> str:\n"
        f'    return f"{identifier}::{{op_name}}"\n'
    )
    write(variant, files)
    metadata = {
        "id": identifier,
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {name: _digest(text) for name, text in sorted(files.items())}},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return variant


def _digest(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--build", metavar="BACKEND", help="also build it: cpu or cuda")
    options = parser.parse_args()
    export(options.folder)
    print(f"wrote {options.folder}")
    if options.build:
        print(f"built {build(options.folder, options.build)}")


if __name__ == "__main__":
    main()
