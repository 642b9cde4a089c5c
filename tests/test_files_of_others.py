"""Every command that writes a folder, pointed at a folder of a user's files: it leaves each byte as it was, or refuses.

What a command writes is not listed here: it is run once in an empty folder, and the names that it leaves there are
those that the user's files have afterwards.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_media import save_tiny_wan, write_clip
from tiny_wan import SPARSE_SLA, tiny_transformer

import foveal
from foveal.lab import cli
from foveal.lab.bench import report as bench_report
from foveal.lab.bench.candidates import candidates_for
from foveal.lab.bench.run import run_bench
from foveal.lab.data.dataset import write_latent_dataset
from foveal.lab.demo.settings import DemoSettings
from foveal.layout import VideoGrid
from foveal.output_folder import LIST_FILE

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("skvideo")
pytest.importorskip("torchmetrics")
pytest.importorskip("tyro")

from accelerate.state import AcceleratorState
from tiny_training import small_tiny

TINY_DEMO = DemoSettings(
    frames=17,
    height=96,
    width=128,
    sampling_steps=1,
    fine_tune_steps=1,
    batch=1,
    evaluations=1,
    held_out_clips=1,
    training_clips=1,
    sigmas=(0.7,),
)
SIZE = ("--frames", 5, "--height", 96, "--width", 96, "--steps", 1)
SLA = ("--method", "sla", "--keep-ratio", 0.4, "--drop-ratio", 0.4)
# Names that versions before the list gave to files on their way, which they then removed.
ASIDES = (
    ".new-index.json",
    ".new-evaluation.json",
    ".index.html.tmp",
    ".foveal.safetensors.new",
    ".model.safetensors.new",
    ".export.new/mine",
    "checkpoints/.step-00000001.partial/mine",
    "checkpoints/.step-00000001.removed/mine",
    "metrics.new",
)


@dataclass(frozen=True)
class Command:
    """What to run: `run(folder, False)`, and `run(folder, True)` to do it again over what the first one left."""

    run: Callable[[Path, bool], object]
    # Files of a former result that are ours whatever they hold, as a log that grows is.
    growing: tuple[str, ...] = ()


def call(*arguments: object) -> None:
    """The command line; a refusal is what it would be in Python."""
    if status := cli.main([str(argument) for argument in arguments]):
        raise FileExistsError(status)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline, clips and a demo's report to work with."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny_wan(folder / "wan")
    write_clip(folder / "clips" / "a.mp4", 12, 48, 64)
    return folder


@pytest.fixture
def commands(made, monkeypatch) -> dict[str, Command]:
    monkeypatch.setattr(DemoSettings, "for_device", lambda device_type: TINY_DEMO)
    # The same name at any time.
    monkeypatch.setattr(bench_report, "file_name", lambda results: "results.json")
    chosen = [candidate for candidate in candidates_for("cpu") if candidate.name.startswith("SDPA")]
    monkeypatch.setattr(
        bench_report, "run_bench", lambda settings, **rest: run_bench(settings, candidates=chosen, **rest)
    )
    monkeypatch.setattr("foveal.lab.bench.run.GATE_GRID", VideoGrid(1, 8, 9))
    wan = ("--model", made / "wan", "--prompt", "a cat")

    def train(folder: Path, again: bool) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        options = ("--resume", "--steps", 4) if again else ("--steps", 2)
        options += ("--checkpoint.every", 1, "--checkpoint.keep", 1, "--evaluation.sample-every", 1)
        call("train", *small_tiny("--output", folder, *options))

    return {
        "demo": Command(lambda folder, again: call("demo", "--output", folder, "--seed", int(again))),
        "precompute": Command(
            lambda folder, again: call(
                "precompute", "--videos", made / "clips", "--output", folder, "--pixels", "--bucket", "8x48x64"
            )
        ),
        "train": Command(train, growing=("metrics.jsonl",)),
        "generate": Command(
            lambda folder, again: call(
                "generate", *wan, "--output", folder, *SIZE[:-1], 1 + again, *SLA, "--exact", "--compare", "dense"
            )
        ),
        "eval": Command(lambda folder, again: call("eval", *wan, "--output", folder, *SIZE[:-1], 1 + again, *SLA)),
        "inspect": Command(
            lambda folder, again: call("inspect", *wan, "--output", folder, *SIZE, "--seed", int(again))
        ),
        "bench": Command(
            lambda folder, again: call("bench", "--output", folder, "--device", "cpu", "--length", 64, "--quick")
        ),
        "save": Command(lambda folder, again: foveal.save(foveal.sparsify(tiny_transformer(), SPARSE_SLA), folder)),
        "export_checkpoint": Command(
            lambda folder, again: foveal.export_checkpoint(
                foveal.sparsify(tiny_transformer(), SPARSE_SLA.replace(linear_scope="all")),
                folder / "model.safetensors",
                format="turbodiffusion-sla",
            )
        ),
        "write_latent_dataset": Command(
            lambda folder, again: write_latent_dataset(
                folder, [{"id": "a#0", "caption": "", "latents": torch.zeros(3, 1, 2, 2)}]
            )
        ),
    }


NAMES = (
    "demo",
    "precompute",
    "train",
    "generate",
    "eval",
    "inspect",
    "bench",
    "save",
    "export_checkpoint",
    "write_latent_dataset",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def result(request, commands, results) -> tuple[Command, Path]:
    """A command, and what it leaves in an empty folder; not to be changed."""
    name = request.node.callspec.params["name"]
    folder = results / name
    if not folder.exists():
        commands[name].run(folder, False)
    return commands[name], folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, names) -> dict[str, bytes]:
    """A user's files under these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"the user's {name}".encode())
    return content(folder)


def refused(command: Command, folder: Path, again: bool = False) -> None:
    """The command says no, and nothing in the folder is other than it was."""
    former = content(folder)
    with pytest.raises((FileExistsError, ValueError)):
        command.run(folder, again)
    assert content(folder) == former


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_a_user_s_files_is_refused(name, result, tmp_path):
    command, made = result
    names = sorted(content(made))
    put(tmp_path / "all", names)
    refused(command, tmp_path / "all")
    put(tmp_path / "all but the list", [name for name in names if name != LIST_FILE])
    refused(command, tmp_path / "all but the list")


@pytest.mark.parametrize("name", NAMES)
def test_each_file_of_a_user_s_is_refused(name, result, tmp_path):
    command, made = result
    names = sorted(content(made))
    for place, file in enumerate(names):
        put(tmp_path / str(place), [file])
        refused(command, tmp_path / str(place))


@pytest.mark.parametrize("name", NAMES)
def test_folders_where_files_would_go_are_refused(name, result, tmp_path):
    command, made = result
    tops = sorted({file.split("/")[0] for file in content(made)} - {LIST_FILE})
    for place, top in enumerate(tops):
        put(tmp_path / str(place), [f"{top}/mine/notes.txt" if (made / top).is_file() else top])
        refused(command, tmp_path / str(place))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "write_latent_dataset"])
def test_what_a_user_adds_to_a_result_stays(name, result, tmp_path):
    """In each folder, and under the names that files had on their way."""
    command, made = result
    folder = shutil.copytree(made, tmp_path / "result")
    folders = {path.relative_to(made) for path in made.rglob("*") if path.is_dir()} | {Path()}
    added = [(place / "notes.txt").as_posix() for place in folders]
    added += [file for file in ASIDES if name == "train" or not file.startswith("checkpoints/")]
    before = put(folder, added)
    command.run(folder, True)
    after = content(folder)
    assert {file: after.get(file) for file in added} == {file: before[file] for file in added}
    renewed = {file for file in before if after.get(file) != before[file]}
    # Nothing is left to do where all is done, and a save of the same weights is the same.
    assert renewed or name in ("precompute", "save", "export_checkpoint")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("export_checkpoint", "save")])
def test_a_result_that_a_user_changed_is_refused(name, result, tmp_path):
    """But for checkpoints, which have sums of their own, and samples that are not made again."""
    command, made = result
    folder = shutil.copytree(made, tmp_path / "result")
    for file, data in content(made).items():
        ours = Path(file).name == LIST_FILE or file in command.growing
        if ours or file.startswith(("checkpoints/", "samples/")):
            continue
        (folder / file).write_bytes(data + b"\nand a user's line")
        refused(command, folder, again=True)
        (folder / file).write_bytes(data)
