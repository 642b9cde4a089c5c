"""The `foveal` command."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Demo:
    """Train a small Wan on a real clip, convert it to SLA and VSA, fine-tune, generate, and write a report."""

    video: Path | None = None
    """A video file of your own; the sample clip otherwise."""
    clip: str = "bigbuckbunny"
    """The sample clip: bigbuckbunny or bikes."""
    output: Path = Path("foveal-demo")
    """The folder to write."""
    device: str = "auto"
    """cpu, cuda or auto (a GPU where there is one)."""
    seed: int = 0
    """Of weights, batches and noise."""
    pretrain_steps: int | None = None
    """Dense optimiser steps; the device's default otherwise."""
    fine_tune_steps: int | None = None
    """Optimiser steps after conversion; the device's default otherwise."""

    def run(self) -> None:
        import torch
        from rich.console import Console

        from foveal.demo.run import run_demo
        from foveal.demo.settings import DemoSettings

        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"unknown device {self.device!r}; expected one of ('auto', 'cpu', 'cuda')")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but torch finds no CUDA device")
        chosen = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        steps = {"pretrain_steps": self.pretrain_steps, "fine_tune_steps": self.fine_tune_steps}
        settings = dataclasses.replace(
            DemoSettings.for_device(chosen),
            seed=self.seed,
            **{name: value for name, value in steps.items() if value is not None},
        )
        console = Console(stderr=True)
        results = run_demo(
            settings,
            output=self.output,
            video=self.video,
            clip=self.clip,
            device=torch.device(chosen),
            console=console,
        )
        for verdict in results["expectations"]:
            mark = "as expected" if verdict["met"] else "NOT as expected"
            console.print(f"{mark}: {verdict['expected']} ({verdict['figures']})")
        print(self.output / "index.html")


@dataclass
class Bench:
    """Check attention against the reference, then time it against dense and block-sparse peers on this GPU."""

    quick: bool = False
    """480p alone, fewer repetitions, no FlexAttention, forward and backward apart."""
    shapes: tuple[str, ...] = ()
    """Some of 480p, 720p, paper and d64; all of them otherwise."""
    output: Path = Path("benchmarks/results")
    """The folder to write figures and plot into."""
    only: str | None = None
    """kernels or methods."""
    impl: tuple[str, ...] = ()
    """Implementations of ours to run instead of the default ones."""
    seed: int = 0
    """Of tensors and random selections."""
    device: str = "cuda"
    """cuda, or cpu with a length."""
    length: int | None = None
    """One small shape of so many tokens instead of the named ones."""
    commit: str | None = None
    """Of this tree, for the record, where there is no git to ask."""

    def run(self) -> None:
        from foveal.bench.report import bench
        from foveal.bench.run import BenchSettings

        settings = BenchSettings(
            shapes=self.shapes,
            quick=self.quick,
            only=self.only,
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
    """Train or fine-tune by a recipe, with checkpoints to go on from: foveal train --help."""

    arguments: tuple[str, ...] = ()
    """The recipe and its settings."""

    def run(self) -> None:
        from foveal.training.recipes import parse

        config = parse(list(self.arguments))

        from foveal.training.checkpoint import CheckpointError
        from foveal.training.faults import TrainingError
        from foveal.training.trainer import run_training

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
class Precompute:
    """Encode videos and captions with a pipeline's VAE and text encoder, once, for foveal train."""

    videos: Path
    """A folder of videos (captions in .txt files of the same names), one video, or a CSV, JSON lines or JSON list."""
    output: Path
    """The folder to write; a run that was interrupted there goes on."""
    model: str | None = None
    """The pipeline: a folder or a hub id."""
    pixels: bool = False
    """Store pixels instead, without a pipeline and without text."""
    bucket: tuple[str, ...] = ()
    """FRAMESxHEIGHTxWIDTH, like 81x480x832; each file goes to the nearest in shape that it is long enough for."""
    fps: float | None = None
    """Frames a second; the pipeline's otherwise, or in pixel space each file's own frames."""
    clips_per_video: int = 1
    """Clips of a file at most; they do not overlap."""
    store: str = "auto"
    """Dtype on the disk: bfloat16, float16, float32, or auto (bfloat16; float32 for pixels)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto (a GPU where there is one)."""
    dtype: str = "auto"
    """Of the text encoder: bfloat16, float16, float32, or auto (bfloat16 on a GPU). The VAE runs in float32."""
    revision: str | None = None
    """Of the hub repository."""
    tiling: bool = False
    """Encode in tiles, which takes less memory."""

    def run(self) -> None:
        from rich.console import Console

        from foveal.pipelines import DTYPES, choose_device, choose_dtype, load_pipeline
        from foveal.terminal import FileProgress, progress_bar
        from foveal.training.clips import Bucket
        from foveal.training.precompute import PrecomputeSettings, precompute

        if self.pixels == (self.model is not None):
            raise ValueError("give --model, the pipeline to encode with, or --pixels, one of them")
        if self.store not in ("auto", *DTYPES):
            raise ValueError(f"unknown dtype {self.store!r}; expected auto or one of {', '.join(DTYPES)}")
        stored = ("float32" if self.pixels else "bfloat16") if self.store == "auto" else self.store
        settings = PrecomputeSettings(
            buckets=tuple(Bucket.parse(text) for text in self.bucket),
            fps=self.fps,
            clips_per_video=self.clips_per_video,
            dtype=DTYPES[stored],
        )
        device = choose_device(self.device)
        loaded = None
        if self.model is not None:
            dtype = choose_dtype(self.dtype, device)
            loaded = load_pipeline(
                self.model, device=device, dtype=dtype, revision=self.revision, without_transformer=True
            )
            if self.tiling:
                loaded.pipe.vae.enable_tiling()
        console = Console(stderr=True)
        try:
            with progress_bar(console) as bar:
                index = precompute(self.videos, self.output, settings, loaded=loaded, progress=FileProgress(bar))
        except KeyboardInterrupt:
            print("foveal: interrupted; what is done is kept, run the same command again to go on", file=sys.stderr)
            raise SystemExit(130) from None
        console.print(f"{index.samples} samples: " + ", ".join(f"{n} of {s}" for s, n in index.latent_shapes.items()))
        if index.skipped:
            console.print(f"{len(index.skipped)} files left out; {self.output / 'index.json'} lists them all")
        print(self.output)


@dataclass
class _Generation:
    model: str
    """The pipeline: a folder or a hub id."""
    prompt: tuple[str, ...] = ()
    """One or several."""
    prompt_file: Path | None = None
    """A text file with a prompt on each line."""
    seed: tuple[int, ...] = (0,)
    """One or several; each prompt is generated with each."""
    sparse: Path | None = None
    """Trained sparse weights: what foveal.save or foveal train wrote, or a released checkpoint."""
    method: str | None = None
    """Without trained weights: sla or vsa."""
    keep_ratio: float | None = None
    """Of --method: the share of key blocks that are read exactly."""
    drop_ratio: float | None = None
    """Of --method sla: the share that is not read at all."""
    impl: str = "auto"
    """Implementation of the sparse attention."""
    frames: int | None = None
    """Of the video; the pipeline's own otherwise, as below."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Of classifier-free guidance, or as the model's embedding."""
    negative_prompt: str | None = None
    """What guidance leads away from."""
    fps: float | None = None
    """Of the MP4."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto (a GPU where there is one)."""
    dtype: str = "auto"
    """bfloat16, float16, float32, or auto (bfloat16 on a GPU)."""
    revision: str | None = None
    """Of the hub repository."""

    def prepare(self, *, exact: bool) -> dict[str, Any]:
        """The arguments that `generate` and `evaluate` share; what costs nothing is checked first."""
        from foveal.generate.run import GenerationSettings, read_prompts
        from foveal.generate.sparse import choose_sparse
        from foveal.pipelines import choose_device, choose_dtype, load_pipeline

        if bool(self.prompt) == (self.prompt_file is not None):
            raise ValueError("give --prompt or --prompt-file, one of them")
        prompts = list(self.prompt) or read_prompts(self.prompt_file)
        sparse = choose_sparse(
            self.sparse, self.method, keep_ratio=self.keep_ratio, drop_ratio=self.drop_ratio, impl=self.impl
        )
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        settings = GenerationSettings(
            frames=self.frames,
            height=self.height,
            width=self.width,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            fps=self.fps,
            exact=exact,
        )
        return {
            "loaded": load_pipeline(self.model, device=device, dtype=dtype, revision=self.revision),
            "prompts": prompts,
            "seeds": list(self.seed),
            "settings": settings,
            "sparse": sparse,
        }


@dataclass
class Generate(_Generation):
    """Generate videos or images with a pipeline, dense or sparse, and record how each was made."""

    compare: str | None = None
    """dense: generate dense too, and write each pair side by side."""
    exact: bool = False
    """Keep each video bit for bit too, as a Matroska file beside the MP4."""
    output: Path = Path("foveal-generate")
    """The folder to write; outputs that are there and match are left as they are."""

    def run(self) -> None:
        from rich.console import Console

        from foveal.generate.run import generate
        from foveal.terminal import StepProgress, progress_bar

        if self.compare not in (None, "dense"):
            raise ValueError(f"unknown comparison {self.compare!r}; expected dense")
        prepared = self.prepare(exact=self.exact)
        try:
            with progress_bar(Console(stderr=True)) as bar:
                progress = StepProgress(bar)
                generate(**prepared, output=self.output, compare_dense=self.compare == "dense", progress=progress)
        except KeyboardInterrupt:
            print("foveal: interrupted; what is done is kept, run the same command again to go on", file=sys.stderr)
            raise SystemExit(130) from None
        print(self.output)


@dataclass
class Eval(_Generation):
    """Compare sparse with dense on the same prompts and seeds: likeness, flicker, speed and memory, with intervals."""

    output: Path = Path("foveal-eval")
    """The folder to write; outputs that are there and match are used."""

    def run(self) -> None:
        from rich.console import Console

        from foveal.evaluate.run import TABLE_FILE, evaluate
        from foveal.terminal import StepProgress, progress_bar

        prepared = self.prepare(exact=True)
        console = Console(stderr=True)
        try:
            with progress_bar(console) as bar:
                report = evaluate(**prepared, output=self.output, progress=StepProgress(bar))
        except KeyboardInterrupt:
            print("foveal: interrupted; what is done is kept, run the same command again to go on", file=sys.stderr)
            raise SystemExit(130) from None
        console.print(report)
        print(self.output / TABLE_FILE)


@dataclass
class Inspect:
    """Look at a pipeline's attention while it generates: what few blocks keep, what that costs, what to try first."""

    model: str
    """The pipeline: a folder or a hub id."""
    prompt: str
    """The text to generate from."""
    sparse: Path | None = None
    """A folder that `foveal.save` wrote, to look at the converted model; dense otherwise."""
    frames: int | None = None
    """Pixel frames; frames, height and width together, or none for the pipeline's own size."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    steps: int = 20
    """Denoising steps."""
    look_at: tuple[int, ...] = ()
    """Which of them to look at, from 0; the first, the middle and the last otherwise."""
    guidance_scale: float | None = None
    """The pipeline's own otherwise."""
    layers: tuple[str, ...] = ()
    """Names of the layers to look at (blocks.0.attn1); all of them otherwise."""
    tolerance: float = 0.1
    """Output error before fine-tuning that the recommendation allows the median layer."""
    query_blocks: int = 16
    """Query blocks to sample in every head."""
    output: Path = Path("foveal-inspect")
    """The folder to write the report into."""
    device: str = "auto"
    """cpu, cuda, cuda:NUMBER or auto (a GPU where there is one)."""
    dtype: str = "auto"
    """bfloat16, float16, float32 or auto."""
    seed: int = 0
    """Of the noise."""

    def run(self) -> None:
        from rich.console import Console

        from foveal.inspect.probe import InspectSettings
        from foveal.inspect.run import inspect_pipeline

        size = (self.frames, self.height, self.width)
        if None in size and size != (None, None, None):
            raise ValueError(f"give frames, height and width together, or none of them, got {size}")
        console = Console(stderr=True)
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
            on_observation=lambda seen: console.print(f"step {seen.step}: {seen.layer}", style="dim", highlight=False),
        )
        console.print(f"to try first: {advice.config}; output error {advice.error:.3f}, recall {advice.recall:.3f}")
        print(page)


@dataclass
class Doctor:
    """Say what is installed, which kernels run here, and what sparse attention gains for a model and a video size."""

    model: str = "wan-1.3b"
    """wan-1.3b, wan-14b, hunyuan-video, ltx-video and so on, or a local folder of diffusers with a config.json."""
    frames: int = 81
    """Of the video."""
    height: int = 480
    """In pixels."""
    width: int = 832
    """In pixels."""
    method: str = "sla"
    """sla or vsa."""
    keep_ratio: float | None = None
    """The fraction of blocks or cubes kept, instead of the method's default."""
    measure: bool = True
    """Time attention where there is a GPU."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> None:
        from foveal.doctor import examine, tables

        sizes = {"frames": self.frames, "height": self.height, "width": self.width}
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
class Ui:
    """Open a page that shows where a token looks: click it, move the sliders, see what that keeps and costs."""

    demo: Path = Path("foveal-demo")
    """What `foveal demo` wrote: its model looks at the clips."""
    model: str | None = None
    """A pipeline instead, a folder or a hub id, that generates a video once and shows one step of it."""
    prompt: str = ""
    """Of --model."""
    frames: int = 17
    """Of --model's video."""
    height: int = 240
    """In pixels."""
    width: int = 416
    """In pixels."""
    steps: int = 20
    """Denoising steps of --model."""
    look_at: int = 10
    """Which of them to show, from 0."""
    seed: int = 0
    """Of --model's noise."""
    device: str = "auto"
    """Of --model: cpu, cuda, cuda:1, or auto (a GPU where there is one)."""
    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """To serve at."""
    open_browser: bool = True
    """Open the page in the browser of this machine."""

    def run(self) -> None:
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ValueError('the page needs gradio: pip install "foveal[ui]"') from error
        from foveal.ui.page import build_page
        from foveal.ui.scene import pipeline_scene

        scene = None
        if self.model is not None:
            from foveal.pipelines import choose_device, choose_dtype, load_pipeline

            device = choose_device(self.device)
            loaded = load_pipeline(self.model, device=device, dtype=choose_dtype("auto", device))
            scene = pipeline_scene(
                loaded,
                self.prompt,
                step=self.look_at,
                size=(self.frames, self.height, self.width),
                num_inference_steps=self.steps,
                seed=self.seed,
            )
        page = build_page(self.demo, scene)
        try:
            page.launch(server_name=self.host, server_port=self.port, inbrowser=self.open_browser, quiet=True)
        except OSError as error:
            raise ValueError(f"cannot serve at {self.host}:{self.port}: {error}") from error


COMMANDS = {
    "demo": Demo,
    "precompute": Precompute,
    "train": Train,
    "generate": Generate,
    "eval": Eval,
    "bench": Bench,
    "inspect": Inspect,
    "doctor": Doctor,
    "ui": Ui,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; user mistakes end with one line and exit status 2, Ctrl-C with 130."""
    try:
        import tyro
    except ImportError:
        print('foveal: the command line needs more packages: pip install "foveal[demo]"', file=sys.stderr)
        return 2
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["train"]:
            # The recipe decides which settings there are, so that this command reads its arguments itself.
            command = Train(tuple(arguments[1:]))
        else:
            description = "Trainable sparse attention for video transformers."
            command = tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="foveal", description=description, args=arguments
            )
        command.run()
    except KeyboardInterrupt:
        print("foveal: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, TypeError, FileNotFoundError, FloatingPointError) as error:
        print(f"foveal: {error}", file=sys.stderr)
        return 2
    return 0
