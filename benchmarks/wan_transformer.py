"""A Wan2.1 transformer call and a whole generation, dense and sparse, with random weights.

    python benchmarks/wan_transformer.py --resolutions 480p 720p --generate 50

What is timed: one call of diffusers' `WanTransformer3DModel` (bfloat16, one sample, blocks compiled with
`compile_repeated_blocks(fullgraph=True)`, all arms with the same `--inductor` options), with dense self-attention by
the best SDPA backend of this machine, with SLA and VSA, and, as a bound, with no self-attention at all (its projections
stay). With `--generate N`, `WanPipeline` makes one video from given text embeddings in N steps with guidance, VAE
decode included. Speed does not depend on the values of weights; what the videos look like does, so nothing is said
about it.
Arms take turns, round by round; medians count. Memory is the peak of one call above the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

import foveal
from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import file_name, write_json
from foveal.models.families.table import family_of

SIZES = {
    "1.3b": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "14b": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "tiny": {"num_attention_heads": 2, "num_layers": 2, "ffn_dim": 512},
}
# Pixels: frames, height, width.
RESOLUTIONS = {"480p": (81, 480, 832), "720p": (81, 720, 1280), "tiny": (9, 64, 96)}
DENSE, BOUND = "dense", "no self-attention"
ARMS = {
    "SLA 64x64 marginal": foveal.SLAConfig(keep_ratio=0.05, drop_ratio=0.10),
    "SLA 128x64 all": foveal.SLAConfig(keep_ratio=0.05, drop_ratio=0.0, block_q=128, linear_scope="all"),
    "VSA 12.5 %": foveal.VSAConfig(keep_ratio=0.125, tile="auto"),
    "VSA 12.5 %, router": foveal.VSAConfig(keep_ratio=0.125, tile="auto", router="per_head"),
    "VSA 12.5 %, wide tile": foveal.VSAConfig(keep_ratio=0.125, tile="wide"),
}
TEXT_TOKENS = 512


@torch.library.custom_op("benchmark::values", mutates_args=())
def copied_values(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy of the values, where a compiler sees an attention: it neither drops the projections nor joins in."""
    return value.clone()


copied_values.register_fake(lambda query, key, value: torch.empty_like(value))


class ProjectionsAlone:
    """An attention processor that copies the values: what a layer costs without its attention."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        def method(query, key, value, hidden_states, kv_lengths, receive):
            return copied_values(query, key, value)

        from foveal.models.families.wan import self_attention
        from foveal.models.self_attention import LayerAttention

        sparse_attention = LayerAttention(method, None)
        return self_attention(attn, sparse_attention, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def build(size: str, device: torch.device) -> WanTransformer3DModel:
    """A transformer with random weights, bfloat16; the norms that diffusers keeps in float32 stay there."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(attention_head_dim=128, **SIZES[size])
    keep = tuple(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def inductor_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON has it."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def arm_model(arm: str, options: argparse.Namespace, device: torch.device) -> WanTransformer3DModel:
    model = build(options.size, device)
    if options.backend is not None:
        model.set_attention_backend(options.backend)
    if arm == BOUND:
        for layer in family_of(model).self_attention_layers(model).values():
            layer.set_processor(ProjectionsAlone())
    elif arm != DENSE:
        foveal.sparsify(model, ARMS[arm])
    if options.compile:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, options=dict(options.inductor))
    return model


def call_inputs(resolution: str, model: WanTransformer3DModel, device: torch.device) -> dict[str, torch.Tensor]:
    frames, height, width = RESOLUTIONS[resolution]
    latent = (1, model.config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    return {
        "hidden_states": torch.randn(latent, device=device, dtype=torch.bfloat16),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, model.config.text_dim, device=device).bfloat16(),
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def time_calls(resolution: str, arms: list[str], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    calls, results = {}, {}
    for arm in arms:
        model = arm_model(arm, options, device)
        fed = call_inputs(resolution, model, device)

        def call(model=model, fed=fed):
            with torch.no_grad():
                return model(**fed).sample

        start = time.perf_counter()
        call()
        synchronize(device)
        results[arm] = {"first_call_s": time.perf_counter() - start, "all_ms": []}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call()
            results[arm]["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        calls[arm] = call
        print(f"{resolution}: {arm}: ready in {results[arm]['first_call_s']:.0f} s", file=sys.stderr, flush=True)
    for _ in range(options.rounds):
        for arm, call in calls.items():
            results[arm]["all_ms"].append(milliseconds(call, device))
    for arm, result in results.items():
        result["ms"] = statistics.median(result["all_ms"])
        result["speedup"] = statistics.median(results[DENSE]["all_ms"]) / result["ms"]
        print(f"{resolution}: {arm}: {result['ms']:.1f} ms, {result['speedup']:.2f}x", file=sys.stderr, flush=True)
    return results


def time_generation(resolution: str, arms: list[str], options: argparse.Namespace, device: torch.device) -> dict:
    frames, height, width = RESOLUTIONS[resolution]
    torch.manual_seed(0)
    small = {"base_dim": 8, "num_res_blocks": 1} if options.size == "tiny" else {}
    vae = AutoencoderKLWan(**small).to(device, torch.bfloat16)
    results = {}
    for arm in arms:
        model = arm_model(arm, options, device)
        pipeline = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=model,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        pipeline.set_progress_bar_config(disable=True)
        embeds = torch.randn(2, TEXT_TOKENS, model.config.text_dim, device=device).bfloat16()
        ends: list[float] = []

        def step_ended(pipeline, step, timestep, values, ends=ends):
            synchronize(device)
            ends.append(time.perf_counter())
            return values

        def run(steps: int, pipeline=pipeline, embeds=embeds, step_ended=step_ended) -> None:
            pipeline(
                prompt_embeds=embeds[:1],
                negative_prompt_embeds=embeds[1:],
                height=height,
                width=width,
                num_frames=frames,
                num_inference_steps=steps,
                output_type="pt",
                callback_on_step_end=step_ended,
            )

        run(1)
        ends.clear()
        start = time.perf_counter()
        run(options.generate)
        synchronize(device)
        end = time.perf_counter()
        results[arm] = {"seconds": end - start, "denoising_s": ends[-1] - start, "decode_s": end - ends[-1]}
        results[arm]["speedup"] = results[DENSE]["seconds"] / results[arm]["seconds"]
        print(f"{resolution}: generation, {arm}: {results[arm]}", file=sys.stderr, flush=True)
        del model, pipeline
        gc.collect()
    return results


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="1.3b")
    parser.add_argument("--resolutions", nargs="+", choices=tuple(RESOLUTIONS), default=["480p"])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each arm")
    parser.add_argument("--generate", type=int, default=0, help="denoising steps of a generation; 0 for none")
    parser.add_argument("--generate-arms", nargs="+", choices=tuple(ARMS), default=["SLA 64x64 marginal"])
    parser.add_argument("--backend", help="diffusers' name for the dense backend; by default cuDNN's on CUDA")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--inductor", nargs="+", type=inductor_option, default=[], metavar="NAME=VALUE", help="options of torch.compile"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.backend is None and device.type == "cuda":
        options.backend = "_native_cudnn"
    # One entry an arm and a resolution: the arms share the block's code.
    torch._dynamo.config.recompile_limit = 64
    names = ("size", "rounds", "backend", "compile", "generate")
    results: dict[str, Any] = {
        "schema": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {name: getattr(options, name) for name in names} | {"inductor": dict(options.inductor)},
        "machine": machine(device, options.commit),
        "arms": {arm: ARMS[arm].to_dict() for arm in options.arms},
        "calls": {},
        "generation": {},
    }
    path = options.output / f"wan-{options.size}-{file_name(results)}"
    for resolution in options.resolutions:
        results["calls"][resolution] = time_calls(resolution, [DENSE, *options.arms, BOUND], options, device)
        write_json(path, results)
        gc.collect()
    if options.generate:
        resolution = options.resolutions[0]
        results["generation"][resolution] = time_generation(
            resolution, [DENSE, *options.generate_arms], options, device
        )
        write_json(path, results)
    print(path)
    return path


if __name__ == "__main__":
    main()
