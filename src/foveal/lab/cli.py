"""The `foveal` command."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

import foveal
from foveal.lab.command_line import read_arguments
from foveal.lab.config_file import OPTION, Command, arguments_of, take_config
from foveal.lab.extras import how_to_install, need
from foveal.lab.media_commands import Calibrate, Eval, Generate, Precompute
from foveal.methods.base import METHODS
from foveal.models.record import FallbackError


@dataclass
class Demo(Command):
    """Generate with the model that comes with foveal, dense and sparse, fine-tune it, and write a report."""

    output: Path = Path("foveal-demo")
    """The folder to write."""
    device: str = "auto"
    """cpu, cuda, or auto, which takes a GPU if there is one."""
    seed: int = 0
    """The seed of batches and noise."""
    sampling_steps: int | None = None
    """Denoising steps of a video. The default depends on the device."""
    fine_tune_steps: int | None = None
    """Optimizer steps after conversion. The default depends on the device."""

    def run(self) -> None:
        need("demo", "rich", "diffusers", "transformers", "peft", "safetensors", "av", "matplotlib")
        import torch
        from rich.console import Console

        from foveal.lab.demo.run import run_demo
        from foveal.lab.demo.settings import DemoSettings

        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"unknown device {self.device!r}; expected one of ('auto', 'cpu', 'cuda')")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but torch finds no CUDA device")
        chosen = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        steps = {"sampling_steps": self.sampling_steps, "fine_tune_steps": self.fine_tune_steps}
        settings = dataclasses.replace(
            DemoSettings.for_device(chosen),
            seed=self.seed,
            **{name: value for name, value in steps.items() if value is not None},
        )
        console = Console(stderr=True)
        results = run_demo(
            settings,
            output=self.output,
            device=torch.device(chosen),
            console=console,
        )
        for verdict in results["expectations"]:
            mark = "as expected" if verdict["met"] else "NOT as expected"
            console.print(f"{mark}: {verdict['expected']} ({verdict['figures']})")
        print(self.output / "index.html")


@dataclass
class Bench(Command):
    """Check attention against the reference, then time it against dense and block-sparse peers on this GPU."""

    quick: bool = False
    """Only 480p, fewer repetitions, no FlexAttention, forward and backward apart."""
    shapes: tuple[str, ...] = ()
    """Some of 480p, 720p, paper, and d64 (the default, together `long`), and 4k, 8k, and 16k (together `short`)."""
    output: Path = Path("benchmarks/results")
    """The folder to write figures and plot into."""
    only: str | None = None
    """Run only kernels or only methods."""
    names: tuple[str, ...] = ()
    """Parts of names, such as SLA2: run what has one of them in its name, and dense attention."""
    impl: tuple[str, ...] = ()
    """foveal's implementations to run instead of the default ones."""
    seed: int = 0
    """The seed of tensors and random selections."""
    device: str = "cuda"
    """cuda, or cpu together with a length."""
    length: int | None = None
    """Run one small shape with this many tokens instead of the named ones."""
    commit: str | None = None
    """The commit of this tree, for the record, if git cannot say."""

    def run(self) -> None:
        from foveal.lab.bench.report import bench
        from foveal.lab.bench.run import BenchSettings

        settings = BenchSettings(
            shapes=self.shapes,
            quick=self.quick,
            only=self.only,
            names=self.names,
            impls=self.impl,
            seed=self.seed,
            device=self.device,
            length=self.length,
            commit=self.commit,
        )
        if bench(settings, self.output):
            raise SystemExit(1)


@dataclass
class Train:
    """Train or fine-tune from a recipe, with checkpoints to resume from: foveal train --help."""

    arguments: tuple[str, ...] = ()
    """The recipe and its settings."""

    def run(self) -> None:
        need("train", "rich", "safetensors", "accelerate", "diffusers")
        from foveal.lab.train.recipes import parse

        config = parse(list(self.arguments))

        from foveal.lab.train.checkpoint import CheckpointError
        from foveal.lab.train.faults import TrainingError
        from foveal.lab.train.trainer import run_training

        try:
            result = run_training(config)
        except (CheckpointError, TrainingError, ImportError) as error:
            print(f"foveal: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        except KeyboardInterrupt:
            print(f"foveal: interrupted; {config.output} has what was saved before", file=sys.stderr)
            raise SystemExit(130) from None
        if result.export is not None:
            print(result.export)


@dataclass
class Inspect(Command):
    """Look at a pipeline's attention while it generates: what a few blocks keep and cost, and what to try first."""

    model: str
    """The pipeline, a folder or a hub id."""
    prompt: str
    """The text to generate from."""
    sparse: Path | None = None
    """A folder that `foveal.save` wrote, to look at the converted model. The default is the dense model."""
    frames: int | None = None
    """Frames of the video. Give frames, height, and width together, or none of them for the pipeline's own size."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    steps: int = 20
    """Denoising steps."""
    look_at: tuple[int, ...] = ()
    """Which steps to look at, from 0. The default is the first, the middle, and the last."""
    guidance_scale: float | None = None
    """The guidance scale. The default is the pipeline's own."""
    layers: tuple[str, ...] = ()
    """Names of the layers to look at, such as blocks.0.attn1. The default is all of them."""
    tolerance: float = 0.1
    """The output error before fine-tuning that the recommendation allows the median layer."""
    query_blocks: int = 16
    """How many query blocks to sample in each head."""
    output: Path = Path("foveal-inspect")
    """The folder to write the report into."""
    device: str = "auto"
    """cpu, cuda, cuda:NUMBER, or auto, which takes a GPU if there is one."""
    dtype: str = "auto"
    """bfloat16, float16, float32, or auto."""
    seed: int = 0
    """The seed of the noise."""

    def run(self) -> None:
        need("generate", "rich", "safetensors", "diffusers", "transformers")
        from rich.console import Console

        from foveal.lab.inspect.probe import InspectSettings
        from foveal.lab.inspect.run import inspect_pipeline
        from foveal.lab.terminal import Progress

        size = (self.frames, self.height, self.width)
        if None in size and size != (None, None, None):
            raise ValueError(f"give frames, height and width together, or none of them, got {size}")
        console = Console(stderr=True)
        with Progress(console) as progress, progress.stage("inspect", self.steps, brief=True) as stage:
            page, advice, _ = inspect_pipeline(
                self.model,
                self.output,
                prompt=self.prompt,
                sparse=self.sparse,
                size=None if None in size else size,
                num_inference_steps=self.steps,
                steps=self.look_at or None,
                guidance_scale=self.guidance_scale,
                layers=self.layers or None,
                settings=InspectSettings(query_blocks=self.query_blocks),
                tolerance=self.tolerance,
                seed=self.seed,
                device=self.device,
                dtype=self.dtype,
                on_observation=lambda seen: progress.say(f"step {seen.step}: {seen.layer}", style="dim"),
                on_step=stage.advance,
            )
        console.print(f"to try first:\n{advice.code()}\n{advice.verdict()}", highlight=False, soft_wrap=True)
        print(page)


@dataclass
class Doctor(Command):
    """Say what is installed, which kernels run here, and what sparse attention gains for a model and a video size."""

    model: str = "wan-1.3b"
    """wan-1.3b, wan-14b, hunyuan-video, ltx-video, or another known name, or a diffusers folder with a config.json."""
    frames: int = 81
    """Frames of the video."""
    height: int = 480
    """In pixels."""
    width: int = 832
    """In pixels."""
    method: Annotated[str, Doc(f"{' or '.join(METHODS)}.")] = "sla"
    keep_ratio: float | None = None
    """The fraction of blocks or cubes kept, instead of the method's default."""
    measure: bool = True
    """Time attention if there is a GPU."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> None:
        from foveal.lab.doctor import examine, tables
        from foveal.lab.terminal import PlainConsole, Progress

        sizes = {"frames": self.frames, "height": self.height, "width": self.width}
        with Progress(PlainConsole(), bars=False) as progress, progress.stage("measure", brief=True):
            report = examine(self.model, **sizes, method=self.method, keep_ratio=self.keep_ratio, measured=self.measure)
        if self.json:
            import json

            print(json.dumps(report, indent=1))
            return
        from rich.console import Console

        console = Console()
        for part in tables(report):
            console.print(part)


@dataclass
class Ui(Command):
    """Open a page that shows where a token looks: click it, move the sliders, see what that keeps and costs."""

    model: str = "foveal/tiny"
    """The pipeline, a folder or a hub id. The default comes with foveal. A Wan model looks at clips."""
    prompt: str | None = None
    """Generate a video from this text instead, and show one step of it."""
    policy: Path | None = None
    """A policy file that foveal calibrate wrote: what a token sees under it."""
    frames: int | None = None
    """Frames of the video. This and the following default to foveal/tiny's own size, and to 17x240x416 elsewhere."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    steps: int = 20
    """Denoising steps with a prompt."""
    look_at: int = 10
    """Which of these steps to show, from 0."""
    seed: int = 0
    """The seed of the noise with a prompt."""
    device: str = "auto"
    """Where the model runs: cpu, cuda, cuda:1, or auto, which takes a GPU if there is one."""
    host: str = "127.0.0.1"
    """The address to serve at. 0.0.0.0 lets other machines in."""
    port: int = 7860
    """The port to serve at."""
    open_browser: bool = True
    """Open the page in the browser of this machine."""

    def run(self) -> None:
        need("ui", "gradio", "rich", "diffusers", "transformers", "safetensors", "av")
        from rich.console import Console

        from foveal.lab.pipelines import choose_device, choose_dtype, load_pipeline
        from foveal.lab.terminal import Progress
        from foveal.lab.ui.address import check_address
        from foveal.lab.ui.page import build_page
        from foveal.lab.ui.scene import check_request, pipeline_scene, scene_size
        from foveal.models.files.policy_file import read_policy

        policy = None if self.policy is None else next(iter(read_policy(self.policy).values())).layers
        # At once: a pipeline's video takes long.
        check_address(self.host, self.port)
        device = choose_device(self.device)
        asked = {"step": self.look_at, "num_inference_steps": self.steps}
        size, scene = (self.frames, self.height, self.width), None
        with Progress(Console(stderr=True)) as progress:
            with progress.stage(f"load {self.model}", brief=True):
                loaded = load_pipeline(
                    self.model,
                    device=device,
                    dtype=choose_dtype("auto", device),
                    check=lambda outline: check_request(outline, self.prompt, size=size, **asked),
                )
            size = scene_size(loaded, size)
            if self.prompt is not None:
                with progress.stage("generate", self.steps, brief=True) as stage:
                    scene = pipeline_scene(
                        loaded, self.prompt, size=size, **asked, seed=self.seed, on_step=stage.advance
                    )
        page = build_page(loaded, size, scene, policy)
        try:
            _, address, _ = page.launch(
                server_name=self.host,
                server_port=self.port,
                inbrowser=self.open_browser,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            # Taken since it was checked; gradio's own advice is about its arguments.
            raise ValueError(f"cannot serve at {self.host}:{self.port}; choose another --port") from error
        print(address, flush=True)
        page.block_thread()


COMMANDS = {
    "demo": Demo,
    "precompute": Precompute,
    "train": Train,
    "generate": Generate,
    "eval": Eval,
    "calibrate": Calibrate,
    "bench": Bench,
    "inspect": Inspect,
    "doctor": Doctor,
    "ui": Ui,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; user mistakes end with one line and exit status 2, Ctrl-C with 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"foveal {foveal.__version__}")
        return 0
    if importlib.util.find_spec("tyro") is None:
        print(f"foveal: the command line needs more packages: {how_to_install('demo')}", file=sys.stderr)
        return 2
    try:
        command = _command_of(arguments)
        command.run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("foveal: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who reads has seen enough; python would complain when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"foveal: {_reason(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"foveal: {_failure(error)}", file=sys.stderr)
        return 1
    return 0


def _reason(error: Exception) -> str:
    """What went wrong; of the system's own errors the file and the reason, without the number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _command_of(arguments: list[str]) -> Any:
    """The command that the arguments stand for, ready to run.

    Raises:
        ValueError: there is no such command or option, or a value is missing or wrong.
        SystemExit: with status 0, after --help and after completions were written.
    """
    name, *rest = arguments or [""]
    if name in ("-h", "--help") or name.startswith("--tyro-"):  # the latter write completions for shells
        import tyro

        description = "Trainable sparse attention for video transformers. foveal --version says which release this is."
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="foveal", description=description, args=arguments)
    if name not in COMMANDS:
        raise ValueError(
            (f"unknown command {name!r}" if name else "name a command") + f"; expected one of {tuple(COMMANDS)}"
        )
    if name == "train":
        # The recipe decides which settings there are, so that this command reads its arguments itself.
        return Train(tuple(rest))
    entries, rest, file = take_config(rest)
    given = [*([f"{OPTION}={file}"] if file else []), *arguments_of(entries, file, COMMANDS[name]), *rest]
    return read_arguments(COMMANDS[name], given, prog=f"foveal {name}")


def _failure(error: RuntimeError) -> str:
    """What PyTorch says in many lines, in one; of memory, with what to do about it; what was asked for as it is."""
    if isinstance(error, FallbackError):
        return str(error)
    text = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
    if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        return f"out of memory ({text.split('. ')[0]}): take fewer frames, a smaller size, or a smaller dtype"
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(where.filename).name}, line {where.lineno}: {text}"
