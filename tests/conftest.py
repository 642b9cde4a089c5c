"""What all tests share: GPU tests are skipped in sight where there is no GPU, and generated examples are repeatable."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("foveal", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("foveal")


def pytest_addoption(parser):
    parser.addoption("--comfyui", metavar="FOLDER", help="a ComfyUI to run its tests in, if none can be imported")
    for host in ("vllm-omni", "sglang"):
        parser.addoption(f"--{host}", metavar="FOLDER", help=f"site-packages with {host}, if it cannot be imported")


def pytest_configure(config):
    # As many workers as cores: one thread each, or they fight over the cores.
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
