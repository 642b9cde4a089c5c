"""The `foveal` command as a whole: how it ends when it is interrupted, and what it says of models it cannot train."""

import importlib
import json
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")

import foveal
from foveal.lab import cli


def test_an_interrupted_command_claims_nothing_of_its_files(monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Doctor, "run", interrupt)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "foveal: interrupted\n"


def test_the_installed_command_is_the_command_line(monkeypatch):
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    module, function = project["project"]["scripts"]["foveal"].split(":")
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "main", lambda: 7)
    assert getattr(importlib.import_module(module), function)() == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_of_the_system_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(cli.Doctor, "run", lambda self: (tmp_path / "file" / "run").mkdir())
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == f"foveal: {tmp_path}/file/run: Not a directory\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
            r"out of memory \(CUDA out of memory\): take fewer frames, a smaller size, or a smaller dtype",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:98] DefaultCPUAllocator: can't allocate memory: you\nat 2"),
            r"out of memory \(.*can't allocate memory: you\): take fewer frames.*",
        ),
        (
            RuntimeError("The size of tensor a (3) must match\nmore"),
            r"RuntimeError in test_cli\.py, line \d+: The size of tensor a \(3\) must match",
        ),
    ],
)
def test_errors_of_pytorch_are_one_line(monkeypatch, capsys, error, message):
    def fail(self):
        raise error

    monkeypatch.setattr(cli.Doctor, "run", fail)
    assert cli.main(["doctor"]) == 1
    assert re.fullmatch(f"foveal: {message}\n", capsys.readouterr().err)


def test_a_reader_that_leaves_early_hears_nothing():
    script = (
        "import sys; from foveal.lab import cli; cli.Doctor.run = lambda self: print('x' * 100000); "
        "sys.exit(cli.main(['doctor']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_an_interrupted_training_says_where_its_checkpoints_are(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    from foveal.lab.train import trainer

    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "run_training", interrupt)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "tiny", "--output", str(tmp_path)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == f"foveal: interrupted; {tmp_path} has what was saved before\n"


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path):
    """accelerate has warnings of its own about that, so it is said before."""
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    script = (
        "import importlib.util, sys; found = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *rest: None if name == 'wandb' else found(name, *rest); "
        "from foveal.lab import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["train", "tiny", "--tracker", "wandb", "--output", str(tmp_path / "run")]
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr == f"foveal: tracker='wandb' is not installed: {sys.executable} -m pip install wandb\n"
    assert not (tmp_path / "run").exists()


NOT_TRAINED = ", of family {!r}, which converts but is not trained yet"


@pytest.mark.parametrize(
    ("transformer", "message"),
    [
        ("LTXVideoTransformer3DModel", NOT_TRAINED.format("ltx_video")),
        ("FluxTransformer2DModel", NOT_TRAINED.format("flux")),
        ("CogVideoXTransformer3DModel", NOT_TRAINED.format("cogvideox")),
        ("WanVACETransformer3DModel", NOT_TRAINED.format("wan_vace")),
        ("MochiTransformer3DModel", ", of no family that foveal knows"),
    ],
)
@pytest.mark.parametrize("around", ["a pipeline", "nothing"])
def test_models_that_cannot_be_trained_are_named_at_once(tmp_path, capsys, transformer, message, around):
    """It needs only the configuration: neither weights nor data are there."""
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    base = tmp_path / "base"
    place = base / "transformer" if around == "a pipeline" else base
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"_class_name": transformer}))
    output = tmp_path / "run"
    assert cli.main(["train", "wan-1.3b-sla", "--model.path", str(base), "--output", str(output)]) == 2
    trained = "'wan' or 'hunyuan_video' or 'ltx2' or 'minimax_h3'"
    expected = f"training takes transformers of family {trained}; {place} has a {transformer}{message}"
    assert capsys.readouterr().err == f"foveal: {expected}\n"
    assert not output.exists()


@pytest.mark.parametrize("fields", [{"in_channels": 36}, {"in_channels": 16, "image_dim": 1280}])
def test_image_to_video_models_cannot_be_trained(tmp_path, capsys, fields):
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    place = tmp_path / "base" / "transformer"
    place.mkdir(parents=True)
    fields = {"_class_name": "WanTransformer3DModel", "out_channels": 16, **fields}
    (place / "config.json").write_text(json.dumps(fields))
    arguments = ["train", "wan-1.3b-sla", "--model.path", str(tmp_path / "base"), "--output", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"foveal: training takes text-to-video transformers; {place} takes {fields['in_channels']} "
    )
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_folders_without_a_pipelines_transformer(tmp_path, capsys):
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    arguments = ["train", "wan-1.3b-sla", "--model.path", str(tmp_path), "--output", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"model.path: no config.json of {tmp_path}/transformer" in error
    assert error.count("\n") == 1
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    assert cli.main(arguments) == 2
    expected = f"model.path must be a pipeline's folder with 'transformer' in it, {tmp_path} is a transformer's own"
    assert capsys.readouterr().err == f"foveal: {expected}\n"


def test_the_version_needs_no_other_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"foveal {foveal.__version__}\n"


def test_types_are_for_users_too():
    """Type checkers read annotations only of packages that carry this file."""
    assert Path(foveal.__file__).with_name("py.typed").is_file()
