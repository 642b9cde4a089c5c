"""The hub's kernel: exported from this tree, it imports only itself and torch, stands beside foveal, and is the same.

With the package `kernels` installed, its own loader and checks run too, and the smoke test that goes with the kernel.
"""

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import foveal
from foveal.kernels.backend import FOLDERS
from foveal.testing import make_inputs, output_and_gradients

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "hub_kernel"


def module_at(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


export = module_at("foveal_hub_export", FOLDER / "export.py")
has_kernels = importlib.util.find_spec("kernels") is not None


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "foveal"
    export.export(folder)
    return folder


@pytest.fixture(scope="module")
def variant(project):
    return export.build(project, "cpu")


def load(variant):
    """As `kernels` does, under the name in the metadata."""
    return module_at(json.loads((variant / "metadata.json").read_text())["id"], variant / "__init__.py")


@pytest.fixture(scope="module")
def kernel(variant):
    return load(variant)


def test_the_files_import_only_each_other_and_what_torch_brings(variant):
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    files = sorted(variant.rglob("*.py"))
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, path
        # Neither does a name in a string, nor an operator of foveal's.
        assert not re.search(r'["\']foveal(\.|::)', path.read_text()), path


def test_every_backend_is_exported():
    folders = (folder.removeprefix("foveal.") for folder in FOLDERS.values())
    assert set(export.BACKENDS) == {f"{folder}.backend" for folder in folders}


def test_every_module_of_the_tree_that_it_needs_is_in_it(kernel, variant):
    """Also those that are loaded late, as a kernel's backend is."""
    pytest.importorskip("triton")
    for path in sorted(variant.rglob("*.py")):
        parts = path.relative_to(variant).with_suffix("").parts
        if "hopper" not in parts and parts[-1] != "__init__":
            importlib.import_module(".".join([kernel.__name__, *parts]))


def test_its_kernels_are_foveals(kernel):
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    compared = 0
    for module in ("forward", "backward", "select", "linear", "cubes", "lists", "tiles"):
        ours = importlib.import_module(f"foveal.kernels.triton.{module}")
        theirs = importlib.import_module(f"{kernel.__name__}.kernels.triton.{module}")
        for name, function in vars(ours).items():
            if isinstance(function, JITFunction):
                assert getattr(theirs, name).src == function.src
                assert getattr(theirs, name) is not function
                compared += 1
    assert compared > 20


def test_it_has_foveals_functions_and_operators_of_its_own(kernel, variant):
    names = [name for several in export.EXPORTS.values() for name in several]
    assert sorted(names) == kernel.__all__
    for name in names:
        assert getattr(kernel, name) is not getattr(foveal, name)
    operators = getattr(torch.ops, kernel.__name__)
    assert operators.block_sparse_torch_fwd is not torch.ops.foveal.block_sparse_torch_fwd


@pytest.mark.parametrize("method", ["block-sparse", "sla", "vsa"])
def test_it_computes_what_foveal_computes(kernel, method):
    inputs = make_inputs(query_length=192, key_length=192, head_dim=64, dtype=torch.float32)

    def run(package):
        grid = package.VideoGrid(3, 8, 8)
        sla = package.SLAConfig(keep_ratio=0.4, drop_ratio=0.2)
        vsa = package.VSAConfig(keep_ratio=0.4)
        attend = {
            "block-sparse": lambda q, k, v: package.block_sparse_attention(
                q, k, v, package.select_blocks(q, k, block_q=64, block_k=64, keep_ratio=0.4)
            ),
            "sla": lambda q, k, v: package.sla_attention(q, k, v, config=sla),
            "vsa": lambda q, k, v: package.vsa_attention(q, k, v, config=vsa, grid=grid),
        }[method]
        return output_and_gradients(attend, inputs)

    for ours, theirs in zip(run(foveal), run(kernel), strict=True):
        assert torch.equal(ours, theirs)


def test_two_versions_live_in_one_process(kernel, project, tmp_path):
    other = tmp_path / "other"
    export.export(other)
    changed = other / "torch-ext" / "foveal" / "symbols.py"
    changed.write_text(changed.read_text() + "\nCHANGED = True\n")
    second = load(export.build(other, "cpu"))
    assert second.__name__ != kernel.__name__
    query, key, value = make_inputs(query_length=128, key_length=128, head_dim=64, dtype=torch.float32)
    outputs = [
        package.sla_attention(query, key, value, config=package.SLAConfig(keep_ratio=0.5))
        for package in (kernel, second)
    ]
    assert torch.equal(*outputs)


def test_refusals(project):
    with pytest.raises(FileExistsError, match="must be new or empty"):
        export.export(project)
    with pytest.raises(ValueError, match="backend must be one of"):
        export.build(project, "tpu")


def test_the_license_and_the_card_are_foveals():
    general = tomllib.loads((FOLDER / "build.toml").read_text())["general"]
    assert general["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    card = (FOLDER / "CARD.md").read_text()
    for name in ("block_sparse_attention", "select_blocks", "sla_attention", "vsa_attention"):
        assert f"`{name}`" in card


@pytest.mark.skipif(not has_kernels, reason="needs the package kernels")
def test_the_hubs_own_code_accepts_it(project, variant):
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    assert len(Build.open(project).general.backends) == 2
    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def smoke_test(project):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_foveal.py"]
    result = subprocess.run(command, cwd=project / "tests", capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "6 passed" in result.stdout


@pytest.mark.skipif(not has_kernels or torch.cuda.is_available(), reason="needs the package kernels, and no GPU")
def test_its_smoke_test_passes(project, variant):
    smoke_test(project)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_its_gpu_kernels_give_the_same_bits(kernel, head_dim):
    inputs = make_inputs(query_length=1024, key_length=1024, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")

    def run(package):
        config = package.SLAConfig(keep_ratio=0.3, drop_ratio=0.1)
        module = package.SparseLinearAttention(head_dim, config).to("cuda")
        torch.nn.init.normal_(module.proj.weight, std=0.1, generator=torch.Generator("cuda").manual_seed(0))
        outputs = output_and_gradients(module, inputs)
        assert module.ran.impl in ("triton", "gluon")
        return outputs

    for ours, theirs in zip(run(foveal), run(kernel), strict=True):
        assert torch.equal(ours, theirs)
