"""A step of MiniMax-H3, dense and sparse, from a few layers of its full width with random weights.

On the device machine, from the repository's root, with the wheel of diffusers installed into /tmp/site:

    PYTHONPATH=/tmp/site:src python3 benchmarks/minimax_h3.py --output $OUT/minimax-h3.json \\
        --resume benchmarks/results/minimax-h3.json --budget-seconds 540 --commit COMMIT

What comes back goes to benchmarks/results/minimax-h3.json, and the same command then goes on where it ended.

What is timed: one call of diffusers' `MiniMaxH3Transformer3DModel`, bfloat16 but for the parts that diffusers keeps in
float32, with 1 and with 3 of its 50 blocks. One block takes the difference over 2, and a step of the whole model, of
which a request has one per denoising step, takes `first + 49 * block`. The sequences are packed as diffusers' pipeline
packs them, 16:9 at 768 lines: text, audio, and the video. All arms have the same weights, and take turns, round by
round; medians count.

    dense cuDNN, dense flash    diffusers' attention backends
    VSA 10 %, VSA 20 %          what FastH3 v1 and its 8-step V2 keep, the same at every timestep
    VSA ..., router             the same, and half of the cubes, chosen by a router in each head
    router 5 %                  blocks chosen so, without a linear branch
    SLA 15 %                    LightX2V's Turbo-SLA: block-sparse, without a linear branch
    SLA 5 %                     with the linear branch over marginal blocks, and its projection
    no attention                the projections stay: a bound

An arm counts only if its output is finite, and if its first attention gives text and audio what dense attention gives
them: they are protected, so their queries read every key. Sparse parameters are then filled with random values.

A block has 1.2 GiB of weights, the gates of VSA add 0.07 GiB to it. `--layers 1 50` times the whole model: 62 GiB of
weights, which all arms share. Eager, a call needs about 20 GiB more at 15 s.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3 import modular_pipeline as facts
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep, MiniMaxH3SetTimestepsStep
from torch import Tensor, nn
from wan_transformer import copied_values

import foveal
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import write_json
from foveal.lab.bench.timing import CpuTimer, CudaTimer, in_turns, peak_memory
from foveal.methods.base import Config
from foveal.models.families import minimax_h3
from foveal.models.files.formats import FORMATS
from foveal.models.self_attention import LayerAttention

WIDTH = 5376
FASTH3 = FORMATS["fasth3-vsa"].config_for(WIDTH)


class Arm(NamedTuple):
    """The backend of the dense attention, the method in its place, and whether there is any attention."""

    backend: str = "_native_cudnn"
    config: Config | None = None
    attention: bool = True


DENSE = "dense cuDNN"
ARMS = {
    DENSE: Arm(),
    "dense flash": Arm("_native_flash"),
    "VSA 10 %": Arm(config=FASTH3),
    "VSA 20 %": Arm(config=FASTH3.replace(keep_ratio=0.2)),
    "VSA 10 %, router": Arm(config=FASTH3.replace(router="per_head")),
    "VSA 5 %, router": Arm(config=FASTH3.replace(keep_ratio=0.05, router="per_head")),
    **{
        f"VSA {share:.0%}, router, no coarse branch".replace("%", " %"): Arm(
            config=FASTH3.replace(keep_ratio=share, router="per_head", coarse=False)
        )
        for share in (0.1, 0.05)
    },
    "SLA 15 %": Arm(config=FORMATS["lightx2v-h3-sla-lora"].config_for(WIDTH)),
    "SLA 5 %": Arm(config=foveal.SLAConfig(keep_ratio=0.05, drop_ratio=0.10)),
    "router 5 %": Arm(config=foveal.SLA2Config(keep_ratio=0.05, linear_scope="none", router="per_head")),
    "no attention": Arm(attention=False),
}
MODES = ("compiled", "eager")
# Seconds, which the pipeline rounds up to what its VAE can decode. 14.375 s is the longest clip that it makes. Others
# measure at 15.1 s: 109,318 tokens with a text of 256.
CLIPS = {"5 s": 5.0, "10 s": 10.0, "15 s": 14.375, "15.1 s": 15.0}
# The sizes of `--smoke`: a model that a CPU runs, its canvas in pixels, and what its clips are shortened by.
SMOKE = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "hidden_size": 48,
    "num_refiner_layers": 1,
    "ffn_dim": 64,
    "text_dim": 16,
    "freq_dim": 16,
    "time_embed_hidden_dim": 24,
    "time_embed_dim": 16,
    "rope_freq_dim": 4,
}
SMOKE_CANVAS, SMOKE_SHORTER = (64, 96), 5
# Of the norm: two kernels in bfloat16 that add up in different orders differ by a fraction of it.
SAME = 0.05


class Request(NamedTuple):
    """What the transformer gets for one clip, how its sequence is made up, and the sides of the video's latent."""

    inputs: dict[str, Tensor]
    shape: dict[str, Any]
    latent: tuple[int, int, int]


class ProjectionsOnly:
    """An attention processor that copies the values: what a layer costs without its attention."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        def method(query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor, kv_lengths: None) -> Tensor:
            return copied_values(query, key, value)

        return minimax_h3.self_attention(attn, LayerAttention(method, None), hidden_states, rotary_emb, attention_mask)


class Steps:
    """Calls of one arm's model with the first few of its blocks."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model, self.blocks, self.inputs = model, model.transformer_blocks, request.inputs

    @torch.no_grad()
    def __call__(self, layers: int) -> tuple[Tensor, Tensor]:
        """The velocities of video and audio."""
        self.model.transformer_blocks = self.blocks[:layers]
        try:
            return self.model(**self.inputs, return_dict=False)
        finally:
            self.model.transformer_blocks = self.blocks


def build(layers: int, device: torch.device, smoke: bool) -> MiniMaxH3Transformer3DModel:
    """A transformer with random weights in the dtypes that the released ones have; float32 on a CPU."""
    torch.manual_seed(0)
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = MiniMaxH3Transformer3DModel(num_layers=layers, **SMOKE if smoke else {})
    finally:
        torch.set_default_dtype(former)
    for name, parameter in model.named_parameters():
        if any(part in model._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def pack(seconds: float, text: int, model: MiniMaxH3Transformer3DModel, smoke: bool) -> Request:
    """A request for a clip of 16:9, as the blocks of diffusers' pipeline pack it, with random contents."""
    pipeline = facts.MiniMaxH3ModularPipeline
    ratio, chunk, latents = (
        prop.fget(None)
        for prop in (
            pipeline.vae_spatial_compression_ratio,
            pipeline.vae_frames_per_chunk,
            pipeline.vae_latents_per_chunk,
        )
    )
    patch = tuple(model.config.patch_size)
    canvas = {config.name: config.default for config in MiniMaxH3PrepareLayoutStep().expected_configs}
    short_edge, pixels = canvas["canvas_short_edge"], canvas["canvas_max_pixels"]
    height, width = SMOKE_CANVAS if smoke else facts.resolve_canvas_size(16, 9, ratio * patch[2], short_edge, pixels)
    frames = round(seconds * facts.MINIMAX_H3_FPS) // (SMOKE_SHORTER if smoke else 1)
    frames = facts.align_num_frames(frames, chunk, latents)
    latent_frames = facts.video_latent_num_frames(frames, chunk, latents)
    positions, tags, video, audio, words, *conditions = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.full((text,), facts.MINIMAX_H3_TEXT_TAG),
        latent_frames,
        height // ratio,
        width // ratio,
        facts.audio_latent_num_frames(frames),
        patch,
        facts.MINIMAX_H3_AUDIO_CHANNELS,
        facts.MINIMAX_H3_AUDIO_TAG,
        facts.MINIMAX_H3_VIDEO_TAG,
    )
    timesteps, indices = MiniMaxH3SetTimestepsStep.build_row_timesteps(
        video, audio, *conditions, len(words), 0.5, 0.4, 0.999, 1.0
    )
    device, dtype = model.device, model.dtype
    channels = model.config.in_channels * patch[0] * patch[1] * patch[2]
    sizes = {
        "hidden_states": (len(video), channels),
        "audio_hidden_states": (len(audio), model.config.audio_in_channels),
        "encoder_hidden_states": (len(words), model.config.text_dim),
    }
    generator = torch.Generator(device).manual_seed(1)
    inputs = {
        "position_ids": positions,
        "token_tags": tags,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": words,
        "timestep": timesteps,
        "timestep_indices": indices,
    }
    inputs = {name: value.to(device) for name, value in inputs.items()}
    for name, size in sizes.items():
        inputs[name] = torch.randn(1, *size, generator=generator, device=device).to(dtype)
    shape = {
        "frames": frames,
        "pixels": [height, width],
        "latent_frames": latent_frames,
        "video_tokens": len(video),
        "audio_tokens": len(audio),
        "text_tokens": len(words),
        "tokens": len(tags),
    }
    return Request(inputs, shape, (latent_frames, height // ratio, width // ratio))


def arm_model(arm: Arm, base: MiniMaxH3Transformer3DModel, smoke: bool) -> MiniMaxH3Transformer3DModel:
    """The model of an arm, with the weights of `base` itself."""
    model = copy.deepcopy(base, {id(x): x for x in (*base.parameters(), *base.buffers())})
    model.set_attention_backend(arm.backend if base.device.type == "cuda" else "native")
    if not arm.attention:
        for layer in minimax_h3.self_attention_layers(model).values():
            layer.set_processor(ProjectionsOnly())
    if arm.config is not None:
        foveal.sparsify(model, arm.config, impl="torch" if smoke else "auto")
    return model


def protected_attention(steps: Steps, rows: int) -> Tensor:
    """What the first block's attention gives the first rows of the sequence, [1, rows, C] in float32."""
    found: list[Tensor] = []
    handle = steps.blocks[0].attn.register_forward_hook(lambda attn, args, x: found.append(x[:, :rows].float()))
    steps(1)
    handle.remove()
    return found[0]


def by_operation(steps: Steps, rows: int = 25) -> dict[str, float]:
    """Milliseconds of a call with one block, by kernel on a GPU and by operator on a CPU; the slowest ones."""
    on_gpu = steps.model.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        steps(1)
    took = {
        x.key: (x.self_device_time_total if on_gpu else x.self_cpu_time_total) / 1e3 for x in profiler.key_averages()
    }
    return dict(sorted(took.items(), key=lambda pair: -pair[1])[:rows])


def prepare(
    arm: Arm, mode: str, request: Request, base: MiniMaxH3Transformer3DModel, dense: Tensor | None, smoke: bool
) -> tuple[Steps, dict[str, Any], Tensor]:
    """An arm that is ready to be timed, what is known about it, and its `protected_attention`.

    Args:
        dense: the dense arm's protected attention; None for that arm itself.

    Raises:
        RuntimeError: out of memory, a backend that cannot run, or an output that is wrong.
    """
    model = arm_model(arm, base, smoke)
    steps = Steps(model, request)
    attention = protected_attention(steps, request.shape["tokens"] - request.shape["video_tokens"])
    known: dict[str, Any] = {"ran": foveal.summary(model).rows[0].ran}
    if dense is not None and arm.attention:
        difference = known["protected_difference"] = float((attention - dense).norm() / dense.norm())
        if not difference < SAME:
            raise RuntimeError(
                f"the attention of text and audio differs from dense attention's by {difference:.3g} of its norm, "
                f"expected less than {SAME}"
            )
    with torch.no_grad():
        for parameter in foveal.sparse_parameters(model).values() if arm.config is not None else ():
            parameter.normal_(0, 0.02)
    if mode == "compiled":
        backend = "inductor" if base.device.type == "cuda" else "eager"
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
    known |= first_call(steps, len(model.transformer_blocks))
    return steps, known, attention


def first_call(steps: Callable[[int], tuple[Tensor, ...]], layers: int) -> dict[str, float]:
    """What the first call with so many blocks took; it compiles what is compiled.

    Raises:
        RuntimeError: out of memory, or what it returns is not finite.
    """
    start = time.perf_counter()
    if not all(bool(x.isfinite().all()) for x in steps(layers)):
        raise RuntimeError("the output is not finite")
    return {"first_call_seconds": time.perf_counter() - start}


class Figures:
    """The file of results: what it has already, and what is added."""

    def __init__(self, path: Path, former: Path, described: dict[str, Any]) -> None:
        self.path = path
        self.results = {"schema": 1, "started": datetime.now(UTC).isoformat(timespec="seconds"), **described}
        self.results["figures"] = {}
        if not former.is_file():
            return
        found = json.loads(former.read_text())
        for name, value in described.items():
            if found.get(name) != value:
                raise SystemExit(
                    f"{former} has other {name}: {found.get(name)}, now {value}; resume on the same machine with the "
                    "same settings, or write another file"
                )
        self.results = found

    def group(self, name: str, request: Request) -> dict[str, Any]:
        """The entry of one clip in one mode."""
        fresh = {"shape": request.shape, "rounds": 0, "arms": {}}
        return self.results["figures"].setdefault(name, fresh)

    def write(self) -> None:
        """Write the file; a reader finds the old one or the new one."""
        write_json(self.path, self.results)


def summarize(group: dict[str, Any], model_layers: int) -> None:
    """Put into every arm its block's milliseconds, a whole step's seconds, and the speed-up over dense."""
    for arm in group["arms"].values():
        if "error" in arm:
            continue
        medians = {int(layers): statistics.median(times) for layers, times in arm["milliseconds"].items()}
        few, many = min(medians), max(medians)
        block = (medians[many] - medians[few]) / (many - few)
        arm["block_milliseconds"] = block
        arm["step_seconds"] = (medians[few] + (model_layers - few) * block) / 1e3
    dense = group["arms"].get(DENSE, {})
    for arm in group["arms"].values():
        if "step_seconds" in arm and "step_seconds" in dense:
            arm["speedup"] = dense["step_seconds"] / arm["step_seconds"]


def table(name: str, group: dict[str, Any]) -> Iterator[str]:
    """The lines of one group's table."""
    yield f"{name}: {group['shape']['tokens']:,} tokens, {group['rounds']} rounds"
    for arm, found in group["arms"].items():
        if "error" in found:
            yield f"  {arm:14} FAILED: {found['error']}"
            continue
        speedup = f"{found['speedup']:6.2f}x" if "speedup" in found else ""
        memory = found["peak_bytes"]
        peak = "" if memory is None else f"{memory / 2**30:8.2f} GiB above the weights"
        yield f"  {arm:14} {found['block_milliseconds']:9.2f} ms a block {found['step_seconds']:8.2f} s a step" + (
            f" {speedup}{peak}"
        )


def time_group(
    name: str,
    mode: str,
    request: Request,
    base: MiniMaxH3Transformer3DModel,
    options: argparse.Namespace,
    figures: Figures,
    script: Script,
    in_time: Callable[[float], bool],
) -> None:
    """Time the rounds of one clip in one mode that the file lacks, as far as time allows."""
    group = figures.group(name, request)
    if group["rounds"] >= options.rounds:
        return
    device = base.device
    timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    ready, known, dense, warm = {}, {}, None, 0.0
    for arm in options.arms:
        if not in_time(0.0):
            return
        try:
            ready[arm], known[arm], found = script.prepare(script.arms[arm], mode, request, base, dense, options.smoke)
            dense = found if arm == DENSE else dense
            if options.profile:
                known[arm]["profile"] = by_operation(ready[arm])
            known[arm]["peak_bytes"] = None
            if device.type == "cuda":
                began = time.monotonic()
                known[arm]["peak_bytes"] = peak_memory(device, lambda arm=arm: ready[arm](max(options.layers)))
                warm += time.monotonic() - began
        except RuntimeError as error:
            ready.pop(arm, None)
            known[arm] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        facts = {key: value for key, value in known[arm].items() if key != "profile"}
        print(f"{name}: {arm}: {facts}", file=sys.stderr, flush=True)
    for arm, about in known.items():
        entry = group["arms"].setdefault(arm, {"milliseconds": {str(layers): [] for layers in options.layers}})
        entry.update(about)
    figures.write()  # peaks and failures, even if no round is in time
    functions = {
        (arm, layers): lambda steps=steps, layers=layers: steps(layers)
        for arm, steps in ready.items()
        for layers in options.layers
    }
    # Every arm's peak took a call with the most blocks; a round has calls with each count, and one that does not count.
    took = warm * (options.calls + 1) * sum(options.layers) / max(options.layers)
    while group["rounds"] < options.rounds and in_time(took):
        started = time.monotonic()
        for (arm, layers), times in in_turns(timer, functions, rounds=1, calls=options.calls).items():
            group["arms"][arm]["milliseconds"][str(layers)] += times
        took = time.monotonic() - started
        group["rounds"] += 1
        summarize(group, figures.results["settings"]["model_layers"])
        script.conclude(group)
        figures.write()
    if group["rounds"]:
        print("\n".join(table(name, group)), flush=True)


class Script(NamedTuple):
    """What is timed: the arms, what makes one of them ready (see `prepare`), and what is added to a group's figures."""

    description: str
    output: str
    arms: dict[str, Arm]
    prepare: Callable[..., tuple[Callable[[int], tuple[Tensor, ...]], dict[str, Any], Tensor | None]]
    conclude: Callable[[dict[str, Any]], None] = lambda group: None
    clips: tuple[str, ...] = ("5 s", "15 s", "10 s")
    facts: Mapping[str, Any] = MappingProxyType({})


def parse(script: Script, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=script.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", nargs="+", choices=tuple(CLIPS), default=list(script.clips))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--arms", nargs="+", choices=tuple(script.arms), default=list(script.arms))
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 3], help="blocks, two counts or more")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every arm")
    parser.add_argument("--calls", type=int, default=2, help="calls that count in a turn")
    parser.add_argument("--text-tokens", type=int, default=256, help="of the prompt, which has no fixed length")
    parser.add_argument("--profile", action="store_true", help="also where the time of a call with one block goes")
    parser.add_argument("--quick", action="store_true", help="the 5 s clip only, in two rounds of one call")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and canvas, for a test of this script")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="do not begin what would end later")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    parser.add_argument("--output", type=Path, default=Path(f"benchmarks/results/{script.output}.json"))
    parser.add_argument("--resume", type=Path, help="a file of earlier figures to add to; by default the output")
    options = parser.parse_args(arguments)
    if len(set(options.layers)) < 2 or min(options.layers) < 1:
        parser.error(f"--layers must be two or more different counts, got {options.layers}")
    # Every other arm is compared with it.
    options.arms = [DENSE, *(arm for arm in options.arms if arm != DENSE)]
    if options.quick:
        options.clips, options.rounds, options.calls = ["5 s"], 2, 1
    return options


def main(arguments: list[str] | None = None) -> None:
    run(Script(__doc__, "minimax-h3", ARMS, prepare), arguments)


def run(script: Script, arguments: list[str] | None) -> None:
    """Time every arm of every clip in every mode, as the options say, and write the figures after each round.

    Raises:
        SystemExit: with 1 if an arm failed; for options that do not fit the file of earlier figures.
    """
    started = time.monotonic()
    options = parse(script, arguments)
    device = torch.device(options.device)

    def in_time(more: float) -> bool:
        return time.monotonic() - started + more < options.budget_seconds

    default_layers = inspect.signature(MiniMaxH3Transformer3DModel.__init__).parameters["num_layers"].default
    described = {
        "settings": {
            "layers": options.layers,
            "model_layers": default_layers,
            "text_tokens": options.text_tokens,
            "smoke": options.smoke,
            **script.facts,
        },
        "machine": machine(device, options.commit),
        "arms": {
            name: {
                "backend": script.arms[name].backend,
                "config": None if script.arms[name].config is None else script.arms[name].config.to_dict(),
            }
            for name in options.arms
        },
    }
    figures = Figures(options.output, options.resume or options.output, json.loads(json.dumps(described)))
    base = build(max(options.layers), device, options.smoke)
    for mode in options.modes:
        for clip in options.clips:
            request = pack(CLIPS[clip], options.text_tokens, base, options.smoke)
            # The arms share the block's code, which has an entry for each of them.
            with torch._dynamo.config.patch(recompile_limit=64):
                time_group(f"{clip}, {mode}", mode, request, base, options, figures, script, in_time)
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    groups = figures.results["figures"]
    names = [f"{clip}, {mode}" for mode in options.modes for clip in options.clips]
    left = [name for name in names if groups.get(name, {}).get("rounds", 0) < options.rounds]
    if left:
        print(f"out of time before the end of: {'; '.join(left)}; the same command goes on from there", flush=True)
    if any("error" in arm for name in names for arm in groups.get(name, {}).get("arms", {}).values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
