"""Other tools, loaded into this process from the site-packages of an environment of their own."""

import importlib
import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest
import torch

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def require(pytestconfig, package, module):
    """Make a host's module importable, from the folder of its option; skip the test if there is none."""
    folder = pytestconfig.getoption(f"--{package}")
    if folder is not None:
        assert Path(folder).is_dir(), f"--{package} must be a folder, got {folder}"
        sys.path.append(folder)
    if importlib.util.find_spec(module) is None:
        pytest.skip(
            f"needs {package}: --{package} FOLDER, its site-packages (docs/{package}.md), or one that can be imported"
        )
    if importlib.util.find_spec("torchvision") is not None:
        _declare_operators_of_torchvision()


def _declare_operators_of_torchvision():
    """Its wheel loads its operators from CUDA's libraries, and fails where these are not. The hosts only import it."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)  # its operators live as long as it


_LIBRARIES = []


def entry_points():
    """{group: {name: object}}, as pyproject.toml has them."""
    return tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]


def entry_point(group):
    """What foveal's entry point in a group is."""
    module, name = entry_points()[group]["foveal"].split(":")
    return getattr(importlib.import_module(module), name)


def install_entry_points(folder):
    """Describe foveal's entry points as an installed wheel would. Returns the folder to put on sys.path."""
    info = folder / "foveal-0.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foveal\nVersion: 0.0.0\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in names.items()) for group, names in entry_points().items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return str(folder)
