"""The commands that read and make videos: precompute, generate, eval."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from foveal.lab.config_file import Command
from foveal.lab.extras import need
from foveal.methods.base import METHODS


@contextlib.contextmanager
def _kept_when_interrupted() -> Iterator[None]:
    """Turns an interrupt into a line that says how to go on, and status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("foveal: interrupted; what is done is kept, run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass
class Precompute(Command):
    """Encode videos and captions with a pipeline's VAE and text encoder, once, for foveal train."""

    videos: Path
    """A folder of videos (captions in .txt files of the same names), one video, or a CSV, JSON lines or JSON list."""
    output: Path
    """The folder to write. An interrupted run there continues."""
    model: str | None = None
    """The pipeline, a folder or a hub id."""
    pixels: bool = False
    """Store pixels instead, without a pipeline and without text."""
    bucket: tuple[str, ...] = ()
    """FRAMESxHEIGHTxWIDTH, such as 81x480x832. A file goes to the nearest in shape that it is long enough for."""
    fps: float | None = None
    """Frames per second. The default is the pipeline's rate, or in pixel space each file's own."""
    clips_per_video: int = 1
    """At most this many clips of a file, which do not overlap."""
    store: str = "auto"
    """The dtype on disk: bfloat16, float16, float32, or auto (bfloat16, or float32 for pixels)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto, which takes a GPU if there is one."""
    dtype: str = "auto"
    """The dtype of the text encoder: bfloat16, float16, float32, or auto (bfloat16 on a GPU). The VAE is float32."""
    revision: str | None = None
    """The revision of the hub repository."""
    tiling: bool = False
    """Encode in tiles, which takes less memory."""

    def run(self) -> None:
        need("train", "rich", "safetensors", "av", *(() if self.pixels else ("diffusers", "transformers")))
        from rich.console import Console

        from foveal.lab.data.clips import Bucket
        from foveal.lab.data.precompute import PrecomputeSettings, check_request, precompute
        from foveal.lab.pipelines import DTYPES, choose_device, choose_dtype, load_pipeline
        from foveal.lab.terminal import FileProgress, Progress

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
        console = Console(stderr=True)
        with _kept_when_interrupted(), Progress(console) as progress:
            if self.model is not None:
                dtype = choose_dtype(self.dtype, device)
                with progress.stage(f"load {self.model}", brief=True):
                    loaded = load_pipeline(
                        self.model,
                        device=device,
                        dtype=dtype,
                        revision=self.revision,
                        without_transformer=True,
                        check=lambda outline: check_request(self.videos, self.output, settings, outline),
                    )
                if self.tiling:
                    loaded.pipe.vae.enable_tiling()
            index = precompute(self.videos, self.output, settings, loaded=loaded, progress=FileProgress(progress))
        console.print(f"{index.samples} samples: " + ", ".join(f"{n} of {s}" for s, n in index.latent_shapes.items()))
        if index.skipped:
            console.print(f"{len(index.skipped)} files left out; {self.output / 'index.json'} lists them all")
        print(self.output)


@dataclass
class _Generation(Command):
    model: str
    """The pipeline, a folder or a hub id."""
    prompt: tuple[str, ...] = ()
    """One or several prompts."""
    prompt_file: Path | None = None
    """A text file with a prompt on each line."""
    seed: tuple[int, ...] = (0,)
    """One or several seeds. Each prompt is generated with each seed."""
    sparse: Path | None = None
    """Trained sparse weights: what foveal.save or foveal train wrote, or a released checkpoint."""
    policy: Path | None = None
    """A policy file that foveal calibrate wrote, without trained weights."""
    method: Annotated[str | None, Doc(f"Without trained weights: {' or '.join(METHODS)}.")] = None
    keep_ratio: float | None = None
    """The share of key blocks that --method reads exactly."""
    drop_ratio: float | None = None
    """The share of key blocks that --method does not read at all, if it drops any."""
    score: str | None = None
    """What --method ranks blocks by: mean, mean_spread, or log_sum_exp over their quarters."""
    keep_mass: float | None = None
    """Keep further blocks, until those kept have this share of the softmax of their row's scores."""
    max_keep_ratio: float | None = None
    """The most that --keep-mass may keep."""
    impl: str = "auto"
    """The implementation of the sparse attention."""
    on_fallback: str = "allow"
    """Where a sparse layer falls back, to slower code or to dense attention: allow, warn, or raise."""
    frames: int | None = None
    """Frames of the video. This and the following default to the pipeline's own."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """The scale of classifier-free guidance, or the guidance that the model embeds."""
    negative_prompt: str | None = None
    """The text that guidance leads away from."""
    fps: float | None = None
    """Frames per second of the MP4."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto, which takes a GPU if there is one."""
    dtype: str = "auto"
    """The dtype: bfloat16, float16, float32, or auto (bfloat16 on a GPU)."""
    revision: str | None = None
    """The revision of the hub repository."""

    def prepare(self, progress: Any, *, exact: bool, check: Callable[..., object]) -> dict[str, Any]:
        """The arguments that `generate` and `evaluate` share; `check`, the command's own, comes before any weights."""
        need("generate", "rich", "safetensors", "av", "diffusers", "transformers")
        from foveal.lab.generate.run import GenerationSettings, read_prompts
        from foveal.lab.generate.sparse import choose_sparse
        from foveal.lab.pipelines import choose_device, choose_dtype, load_pipeline

        if bool(self.prompt) == (self.prompt_file is not None):
            raise ValueError("give --prompt or --prompt-file, one of them")
        prompts = list(self.prompt) or read_prompts(self.prompt_file)
        sparse = choose_sparse(
            self.sparse,
            self.method,
            policy=self.policy,
            impl=self.impl,
            keep_ratio=self.keep_ratio,
            drop_ratio=self.drop_ratio,
            score=self.score,
            keep_mass=self.keep_mass,
            max_keep_ratio=self.max_keep_ratio,
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
            on_fallback=self.on_fallback,
        )
        with progress.stage(f"load {self.model}", brief=True):
            loaded = load_pipeline(
                self.model,
                device=device,
                dtype=dtype,
                revision=self.revision,
                check=lambda outline: check(outline, self.output, settings, sparse),
            )
        return {
            "loaded": loaded,
            "prompts": prompts,
            "seeds": list(self.seed),
            "settings": settings,
            "sparse": sparse,
        }


@dataclass
class Generate(_Generation):
    """Generate videos or images with a pipeline, dense or sparse, and record how each was made."""

    compare: str | None = None
    """With dense, also generate dense, and write each pair side by side."""
    exact: bool = False
    """Also keep each video bit for bit, as a Matroska file beside the MP4."""
    output: Path = Path("foveal-generate")
    """The folder to write. Outputs there that match are kept."""

    def run(self) -> None:
        need("generate", "rich")
        from rich.console import Console

        from foveal.lab.generate.run import check_request, generate
        from foveal.lab.generate.sparse import say_what_ran
        from foveal.lab.terminal import Progress, StepProgress

        if self.compare not in (None, "dense"):
            raise ValueError(f"unknown comparison {self.compare!r}; expected dense")
        with _kept_when_interrupted(), Progress(Console(stderr=True)) as progress:
            prepared = self.prepare(progress, exact=self.exact, check=check_request)
            dense_too = self.compare == "dense"
            generate(**prepared, output=self.output, compare_dense=dense_too, progress=StepProgress(progress))
            say_what_ran(prepared["loaded"].pipe, progress)
        print(self.output)


@dataclass
class Eval(_Generation):
    """Compare sparse with dense on the same prompts and seeds: likeness, flicker, speed and memory, with intervals."""

    output: Path = Path("foveal-eval")
    """The folder to write. Outputs there that match are used."""

    def run(self) -> None:
        need("eval", "rich", "torchmetrics")
        from rich.console import Console

        from foveal.lab.evaluate.run import TABLE_FILE, check_request, evaluate
        from foveal.lab.generate.sparse import say_what_ran
        from foveal.lab.terminal import Progress, StepProgress

        console = Console(stderr=True)
        with _kept_when_interrupted(), Progress(console) as progress:
            prepared = self.prepare(progress, exact=True, check=check_request)
            report = evaluate(**prepared, output=self.output, progress=StepProgress(progress))
            say_what_ran(prepared["loaded"].pipe, progress)
        console.print(report)
        print(self.output / TABLE_FILE)


@dataclass
class Calibrate(Command):
    """Measure what sparse attention costs each layer and step without training, and write a policy that keeps to it."""

    model: str
    """The pipeline, a folder or a hub id. It must be dense."""
    prompt: tuple[str, ...] = ()
    """One or several prompts to measure on."""
    prompt_file: Path | None = None
    """A text file with a prompt on each line."""
    error: float = 0.05
    """The largest relative error of a layer's output in a step where it is sparse."""
    method: Annotated[str, Doc(f"{' or '.join(METHODS)}.")] = "sla"
    by: str = "ratio"
    """What is chosen for each layer: ratio, a share of the blocks; head, one for each of its heads; or mass, so that
    heads and rows keep what they need."""
    score: str | None = None
    """What the method ranks blocks by: mean, mean_spread, or log_sum_exp over their quarters."""
    token_order: str | None = None
    """The order that blocks are cut from, raster or tile, if the method has a choice."""
    linear_scope: str | None = None
    """What SLA's linear branch sums over, such as marginal: it adds nothing before the model is fine-tuned with it."""
    min_tokens: int | None = None
    """Videos of fewer tokens stay dense. The default is where sparse attention begins to be less work."""
    frames: int | None = None
    """Frames of the video. This and the following default to the pipeline's own."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    steps: int | None = None
    """Denoising steps. The policy counts dense steps in a generation of as many."""
    guidance_scale: float | None = None
    """The scale of classifier-free guidance, or the guidance that the model embeds."""
    seed: int = 0
    """The seed of the first prompt's noise; the others follow."""
    output: Path = Path("foveal-calibrate")
    """The folder to write policy.json into."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto, which takes a GPU if there is one."""
    dtype: str = "auto"
    """The dtype: bfloat16, float16, float32, or auto (bfloat16 on a GPU)."""
    revision: str | None = None
    """The revision of the hub repository."""

    def run(self) -> None:
        need("generate", "rich", "safetensors", "diffusers", "transformers")
        from rich.console import Console

        from foveal.lab.calibrate.run import CalibrationSettings, calibrate, check_request, table, training_free
        from foveal.lab.generate.run import GenerationSettings, read_prompts
        from foveal.lab.pipelines import choose_device, choose_dtype, load_pipeline
        from foveal.lab.terminal import Progress

        if bool(self.prompt) == (self.prompt_file is not None):
            raise ValueError("give --prompt or --prompt-file, one of them")
        prompts = list(self.prompt) or read_prompts(self.prompt_file)
        fields = {"score": self.score, "token_order": self.token_order, "linear_scope": self.linear_scope}
        config = training_free(self.method, **fields)
        settings = CalibrationSettings(self.error, config, self.by, self.min_tokens)
        generation = GenerationSettings(
            frames=self.frames,
            height=self.height,
            width=self.width,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
        )
        device = choose_device(self.device)
        with Progress(Console(stderr=True)) as progress:
            with progress.stage(f"load {self.model}", brief=True):
                loaded = load_pipeline(
                    self.model,
                    device=device,
                    dtype=choose_dtype(self.dtype, device),
                    revision=self.revision,
                    check=lambda outline: check_request(outline, self.output, generation),
                )
            steps = generation.call_arguments(loaded)["num_inference_steps"]
            with progress.stage("measure", steps * len(prompts)) as stage:
                file, chosen, layers = calibrate(
                    loaded, prompts, self.output, generation, settings, seed=self.seed, on_step=stage.advance
                )
            progress.say(table(layers, chosen, settings))
        print(file)
