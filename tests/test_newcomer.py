"""A newcomer's mistakes, at the command as it is installed: each ends soon, in one line that says what is wrong.

These tests know the command and its options, and nothing else of the package, so they also run on other versions.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from tiny_media import diffusers, save_tiny_wan, tiny_text_encoder, tiny_tokenizer, tiny_vae, write_clip
from tiny_wan import tiny_transformer

for package in ("accelerate", "av", "rich", "tyro"):
    pytest.importorskip(package)

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULE, FUNCTION = PROJECT["scripts"]["foveal"].split(":")
SCRIPT = f"import sys; from {MODULE} import {FUNCTION} as main; sys.argv[0] = 'foveal'; sys.exit(main())"
SIZE = ("--frames", "9", "--height", "48", "--width", "64")
CAT = ("--prompt", "a cat", "--steps", "1", "--device", "cpu")


def start(*arguments, folder, script=SCRIPT, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, seconds=100, **options) -> tuple[int, str, str]:
    """The exit status, standard output, and standard error of a process of its own; `start` has the options."""
    process = start(*arguments, **options)
    try:
        output, error = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output, error


@pytest.fixture
def foveal(monkeypatch, tmp_path, capsys):
    """Runs the command in this process and in the test's folder, and returns its exit status and standard error."""
    monkeypatch.chdir(tmp_path)
    main = getattr(importlib.import_module(MODULE), FUNCTION)
    if importlib.util.find_spec("accelerate") is not None:
        from accelerate.state import AcceleratorState

        # A training of another test in this process would set the precision of this one.
        AcceleratorState._reset_state(reset_partial_state=True)

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["foveal", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A tiny Wan pipeline."""
    return save_tiny_wan(tmp_path_factory.mktemp("newcomer") / "wan")


@pytest.fixture(scope="module")
def outline(wan):
    """The same without weights: whatever is said of it was found before any are read."""
    folder = shutil.copytree(wan, wan.parent / "outline")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def is_one_line(error: str, message: str) -> bool:
    """Whether the last thing said is a line of ours, and nothing like a traceback came before it."""
    last = error.strip().splitlines()[-1]
    return last.startswith("foveal: ") and message in last and "Traceback" not in error


# torchvision


@pytest.fixture
def misfit(tmp_path):
    """An installed torchvision that was built for another torch, on a path for PYTHONPATH."""
    packages = tmp_path / "packages"
    for name in ("torchvision", "torchvision-0.1.dist-info"):
        (packages / name).mkdir(parents=True)
    (packages / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (packages / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    return os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


@pytest.mark.parametrize("command", [("demo",), ("train", "tiny")])
def test_a_torchvision_that_does_not_fit_torch(misfit, tmp_path, command):
    status, _, error = run(*command, "--output", "out", folder=tmp_path, PYTHONPATH=misfit)
    assert status == 2
    assert re.fullmatch(r"foveal: torchvision does not match torch .*nms does not exist.*\n", error)
    assert not (tmp_path / "out").exists()


def test_the_doctor_names_a_torchvision_that_does_not_fit_torch(misfit, tmp_path):
    status, output, _ = run("doctor", folder=tmp_path, PYTHONPATH=misfit, COLUMNS=200)
    assert status == 0
    assert "- torchvision does not match torch " in output


def test_no_extra_brings_a_torchvision_of_its_own():
    """From PyPI comes one for the CUDA build of torch; foveal needs none."""
    named = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    assert not [line for line in named if line.startswith(("torchvision", "lpips")) or "[image]" in line]


# Tracebacks


def save_pipeline(folder, *, transformer) -> None:
    """The tiny Wan with another transformer."""
    diffusers.WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    ).save_pretrained(folder)


def test_latents_that_do_not_fit_the_model(foveal, wan, tmp_path):
    for name in ("a", "b"):
        write_clip(tmp_path / "clips" / f"{name}.mp4")
    data = ("--videos", "clips", "--output", "data", "--bucket", "9x48x64", "--device", "cpu")
    assert foveal("precompute", *data, "--model", wan)[0] == 0
    save_pipeline(tmp_path / "model", transformer=tiny_transformer(in_channels=8, out_channels=8))
    options = ("--steps", "1", "--device", "cpu", "--precision", "no", "--tracker", "none", "--data.held-out", "1")
    recipe = ("train", "wan-1.3b-sla", "--data.folder", "data", "--model.path", "model", "--output", "out")
    status, error = foveal(*recipe, *options)
    assert status == 2
    assert is_one_line(error, "channels")
    assert error.count("\n") == 1


def test_a_full_disk_in_precompute(tmp_path):
    """A limit on the size of files stands for the disk: the system refuses the write in the same way."""
    write_clip(tmp_path / "clips" / "a.mp4", 200, 128, 128)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); {SCRIPT}"
    command = ("precompute", "--videos", "clips", "--pixels", "--bucket", "97x128x128", "--output", "data")
    status, _, error = run(*command, folder=tmp_path, script=limited)
    assert status != 0
    assert is_one_line(error, "File too large")


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_junk_checkpoint(foveal, outline, tmp_path, command):
    # A pickle's code for four bytes to come, of which there are three.
    (tmp_path / "junk.pth").write_bytes(b"Junk")
    status, error = foveal(command, "--model", outline, *CAT, "--sparse", "junk.pth")
    assert status == 2
    assert is_one_line(error, "junk.pth is corrupt")


def test_an_error_of_pytorch_outside_of_train(foveal, tmp_path):
    """A pipeline whose transformer and text encoder do not fit each other fails inside PyTorch."""
    save_pipeline(tmp_path / "model", transformer=tiny_transformer(text_dim=12))
    status, error = foveal("generate", "--model", "model", *CAT, *SIZE)
    assert status == 1
    assert is_one_line(error, "mat1 and mat2 shapes cannot be multiplied")


def test_more_memory_than_there_is(foveal, wan):
    frames = ("--frames", 4 * 10**13 + 1, "--height", "16", "--width", "16")
    status, error = foveal("generate", "--model", wan, *CAT, *frames)
    assert status == 1
    assert is_one_line(error, "out of memory")
    assert "take fewer frames, a smaller size, or a smaller dtype" in error


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc to see what a process has loaded")
@pytest.mark.parametrize("command", ["demo", "precompute", "train", "generate", "eval", "bench", "inspect", "ui"])
def test_an_interrupt_while_pytorch_is_imported(tmp_path, command):
    process = start(command, folder=tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    # The first library of PyTorch is being loaded; it takes seconds until all are.
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (130, "", "foveal: interrupted\n")


# Wrong answers, and answers that come late


def test_two_trainings_in_one_folder(tmp_path):
    train = ("train", "tiny", "--tracker", "none", "--output", "out", "--evaluation.sample-every", "0")
    first = start(*train, "--steps", "100000", folder=tmp_path)
    try:
        while not (tmp_path / "out" / "metrics.jsonl").exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.1)
        status, _, error = run(*train, folder=tmp_path)
        assert status == 2
        assert re.fullmatch(f"foveal: output out is in use by process {first.pid} .*choose another output\n", error)
    finally:
        first.kill()
        first.communicate()


@pytest.fixture
def hub(request):
    """The address of a hub that does not serve, and a list with an entry for each call that it took."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if request.param == "refuses":
            server.close()
            yield address, calls
            return

        def answer() -> None:
            with contextlib.suppress(OSError):  # when the server is closed
                while True:
                    calls.append(server.accept()[0].close())

        threading.Thread(target=answer, daemon=True).start()
        yield address, calls
        with contextlib.suppress(OSError):  # not every system shuts down a socket that only listens
            server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("hub", "command"), [("refuses", "generate"), ("refuses", "train"), ("hangs up", "inspect")], indirect=["hub"]
)
def test_without_a_network(hub, tmp_path, command):
    """The reason is said after one call, without retries, and it is the true one."""
    address, calls = hub
    options = ("--model", "someone/something", *CAT)
    if command == "train":
        write_clip(tmp_path / "clips" / "a.mp4", 60)
        recipe = ("wan-1.3b-sla", "--model.path", "someone/something", "--data.clip", "clips/a.mp4")
        options = (*recipe, "--data.frames", "5", "--device", "cpu", "--tracker", "none", "--output", "out")
    environment = {"HF_ENDPOINT": address, "HF_HOME": tmp_path / "hub", "HF_HUB_OFFLINE": "0"}
    status, _, error = run(command, *options, folder=tmp_path, **environment)
    assert (status, error.count("Traceback")) == (2, 0)
    assert is_one_line(error, f"someone/something cannot be downloaded: {address} cannot be reached")
    assert len(calls) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", *CAT, *SIZE[:2], "--height", "50", *SIZE[4:]), "height must be a positive multiple of 16"),
        (("generate", *CAT, *SIZE, "--output", "FILE"), "output FILE is a file; expected a folder"),
        (("eval", *CAT, *SIZE[2:], "--frames", "8", "--method", "sla"), "frames must be 1 more than a multiple of 4"),
        (("inspect", *CAT, *SIZE[:4], "--width", "50"), "width must be a positive multiple of 16"),
        (("inspect", *CAT, *SIZE, "--sparse", "NOWHERE"), "no such folder: NOWHERE"),
        (("precompute", "--videos", "CLIPS", "--output", "out", "--bucket", "9x50x64"), "height must be a positive"),
        (("precompute", "--videos", "NOWHERE", "--output", "out"), "no such folder or list of videos: NOWHERE"),
    ],
)
def test_sizes_and_paths_are_checked_before_the_model_loads(foveal, outline, tmp_path, arguments, message):
    (tmp_path / "FILE").write_text("theirs")
    write_clip(tmp_path / "CLIPS" / "a.mp4")
    status, error = foveal(*arguments, "--model", outline)
    assert status == 2
    assert is_one_line(error, message)


def test_a_demo_into_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    status, _, error = run("demo", "--output", "link", folder=tmp_path, seconds=60)
    assert (status, error) == (2, "foveal: output link is a link to nothing; expected a folder\n")


def pasted(error: str) -> list[str]:
    """The lines of Python that `inspect` offers to copy."""
    return [line for line in error.splitlines() if line.startswith("foveal.sparsify(")]


def test_inspect_converts_nothing_where_it_says_that_nothing_should_be(foveal, wan):
    status, error = foveal("inspect", "--model", wan, *CAT, *SIZE, "--tolerance", "1e-9")
    assert status == 0
    assert "keeps the median layer's error within the tolerance of 1e-09" in error
    assert "All 2 layers change by more than twice the tolerance, so none is converted" in error
    assert pasted(error) == []


def test_inspect_says_when_the_tolerance_is_kept(foveal, wan):
    status, error = foveal("inspect", "--model", wan, *CAT, *SIZE, "--tolerance", "10")
    assert status == 0
    assert "In all 2 layers: output error " in error
    assert "No ratio that was tried" not in error
    assert len(pasted(error)) == 1
    assert "layers=" not in pasted(error)[0]
