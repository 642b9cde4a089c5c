"""The wheel, built from the sdist, installs in a new environment outside the checkout, and its command runs there."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import foveal

ROOT = Path(__file__).parent.parent
# The package comes from where it was installed, and from nowhere else.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
# Python 3.11 has it from 3.11.4 on.
SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def run(*command, folder, environment=ENVIRONMENT):
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    tools = folder / "tools"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tools), "hatchling"]
    fetched = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if fetched.returncode:
        pytest.skip(f"hatchling, which builds the package, could not be installed: {fetched.stderr.strip()[-300:]}")
    build = (sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tools)}
    run(*build, "sdist", folder=ROOT, environment=environment)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", **SAFELY)
    (source,) = (folder / "source").iterdir()
    run(*build, "wheel", folder=source, environment=environment)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder of programs of a new environment: the wheel, and this environment's other packages."""
    folder = tmp_path_factory.mktemp("new")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = str(programs / "python")
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    # Folders named in a .pth file are searched last, and .pth files in them, such as this checkout's, are not read.
    (packages / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    run(*pip, str(built[1]), folder=folder)
    return programs


def test_the_wheel_has_every_module_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    shipped = {path for path in (ROOT / "src/foveal/models/shipped_files").rglob("*") if path.is_file()}
    data = {"foveal/py.typed", *(path.relative_to(ROOT / "src").as_posix() for path in shipped)}
    assert {name for name in names if not name.endswith(".py") and ".dist-info/" not in name} == data
    with tarfile.open(built[0]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "src/foveal/py.typed"} <= files


def test_the_installed_package_computes_outside_the_checkout(installed, tmp_path):
    script = """
import foveal, foveal_command, torch
query, key, value = (torch.randn(1, 2, 200, 16) for _ in range(3))
selection = foveal.select_blocks(query, key, block_q=64, block_k=64, keep_ratio=1.0)
sparse = foveal.block_sparse_attention(query, key, value, selection)
torch.testing.assert_close(sparse, torch.nn.functional.scaled_dot_product_attention(query, key, value))
print(foveal.__file__, foveal_command.__file__, sep="\\n")
"""
    files = run(str(installed / "python"), "-c", script, folder=tmp_path).split()
    assert [Path(file).is_relative_to(installed.parent) for file in files] == [True, True]


def test_the_installed_command_runs_and_completes_its_own_commands(installed, tmp_path):
    pytest.importorskip("tyro")
    command = str(installed / "foveal")
    assert run(command, "--version", folder=tmp_path) == f"foveal {foveal.__version__}\n"
    # As docs/faq.md has it.
    run(command, "--tyro-write-completion", "bash", "foveal.bash", folder=tmp_path)
    run(command, "--tyro-write-completion", "zsh", "_foveal", folder=tmp_path)
    typed = 'source foveal.bash; COMP_WORDS=(foveal be) COMP_CWORD=1; _tyro_foveal; echo "${COMPREPLY[@]}"'
    assert run("bash", "-c", typed, folder=tmp_path).split() == ["bench"]
    assert "bench" in (tmp_path / "_foveal").read_text(encoding="utf-8")


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == foveal.__version__
