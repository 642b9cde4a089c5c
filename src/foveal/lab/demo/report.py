"""The demo's report: videos side by side, figures, and one page that shows all of it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.lab.data.windows import to_frames, upscale, write_video
from foveal.lab.demo.settings import PICTURED, DemoSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"dense": "#33415c", "sparse only": "#c1666b", "SLA": "#2a7f8e", "SLA hedgehog": "#6a4c93", "VSA": "#d19a2e"}
PAGE, LOSS_FIGURE, SIDE_BY_SIDE = "index.html", "loss.png", "side-by-side.mp4"
FPS = 6
BRIGHTNESS = {1: 1.0, 0: 0.42, -1: 0.10}
# The page is this many pixels wide at most: what is drawn for it keeps its letters readable at that width.
PAGE_WIDTH = 1080
VIDEO_COLUMNS, FRAME_COLUMNS = 3, 4


def report_files(settings: DemoSettings) -> list[str]:
    """The names of all files that `write_report` writes."""
    videos = [_video_file(name) for name in ("clip", *settings.arms())]
    return [PAGE, LOSS_FIGURE, SIDE_BY_SIDE, *videos, *(_map_file(name) for name in PICTURED)]


def write_report(folder: Path, results: dict[str, Any], media: dict[str, Any], settings: DemoSettings) -> None:
    """Write every file of the report but results.json into `folder`.

    Args:
        results: as in results.json.
        media: "clip" [3, F, H, W] in [-1, 1], "videos" by arm, "maps" by arm (see `run_demo`).
    """
    videos = {"clip": media["clip"], **media["videos"]}
    factor = max(1, round(PAGE_WIDTH / VIDEO_COLUMNS / settings.width))
    titled = []
    for name, video in videos.items():
        frames = upscale(to_frames(video), factor)
        write_video(folder / _video_file(name), frames, fps=FPS)
        titled.append(_with_title(frames, name))
    write_video(folder / SIDE_BY_SIDE, _in_rows(titled), fps=FPS)
    loss_figure(results).savefig(folder / LOSS_FIGURE)
    for name, block_map in media["maps"].items():
        map_figure(name, block_map, media["clip"]).savefig(folder / _map_file(name))
    (folder / PAGE).write_text(_page(results, media), encoding="utf-8")


def _video_file(name: str) -> str:
    return f"{_slug(name)}.mp4"


def _map_file(name: str) -> str:
    return f"blocks-{_slug(name)}.png"


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _with_title(frames: Tensor, title: str) -> Tensor:
    """The frames [F, 3, H, W] under a bar with their title."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    bar = Image.new("RGB", (frames.shape[3], 28), "#14171c")
    ImageDraw.Draw(bar).text((8, 5), title, fill="#f2f2f2", font=ImageFont.load_default(size=16))
    bar = torch.from_numpy(np.asarray(bar).copy()).permute(2, 0, 1)
    return torch.cat((bar.expand(len(frames), -1, -1, -1), frames), 2)


def _in_rows(videos: list[Tensor]) -> Tensor:
    """The videos, each [F, 3, H, W], as one with `VIDEO_COLUMNS` of them in a row."""
    blank = torch.zeros_like(videos[0])
    videos = videos + [blank] * (-len(videos) % VIDEO_COLUMNS)
    rows = [videos[start : start + VIDEO_COLUMNS] for start in range(0, len(videos), VIDEO_COLUMNS)]
    return torch.cat([torch.cat(row, 3) for row in rows], 2)


def _figure(height: float) -> Figure:
    """A figure as wide as the page, where a point is 1.4 pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(PAGE_WIDTH / 100, height), dpi=150, layout="constrained", facecolor="white")


def loss_figure(results: dict[str, Any]) -> Figure:
    """Held-out loss against steps, of pretraining and of each arm."""
    from matplotlib.ticker import FormatStrFormatter

    figure = _figure(4.2)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.5]})
    steps, losses = zip(*results["pretraining"]["held_out_loss"], strict=True)
    left.plot(steps, losses, color=COLORS["dense"], marker="o", markersize=3)
    left.set(title="Pretraining, dense attention", xlabel="steps", ylabel="held-out loss", yscale="log")
    left.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    left.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    left.tick_params(which="minor", labelsize=9)
    for name, arm in results["arms"].items():
        steps, losses = zip(*arm["held_out_loss"], strict=True)
        right.plot(steps, losses, color=COLORS[name], marker="o", markersize=3, label=name)
    right.set(title="Fine-tuning after conversion", xlabel="steps", ylabel="held-out loss")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, which="both")
    return figure


def map_figure(name: str, block_map: dict[str, Any], clip: Tensor) -> Figure:
    """The frames as one query token sees them, for each head, beside the whole selection of the first head."""
    frames = to_frames(clip).permute(0, 2, 3, 1).float() / 255
    time, row, column = block_map["token"]
    heads = block_map["token_labels"]
    lines = -(-len(frames) // FRAME_COLUMNS)
    patch = frames.shape[1] // heads[0].shape[1]
    square = 2.6
    frame_height = (PAGE_WIDTH / 100 - square) / FRAME_COLUMNS * frames.shape[1] / frames.shape[2]
    figure = _figure((frame_height + 0.3) * lines * len(heads) + 0.5 * len(heads) + 0.6)
    pictures, matrix = figure.subfigures(1, 2, width_ratios=[PAGE_WIDTH / 100 - square, square])
    for head, part in enumerate(pictures.subfigures(len(heads), 1, squeeze=False)[:, 0]):
        part.suptitle(f"head {head}", fontsize=11)
        brightness = torch.zeros(heads[head].shape)
        for label, level in BRIGHTNESS.items():
            brightness[heads[head] == label] = level
        brightness = brightness.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        for index, axis in enumerate(part.subplots(lines, FRAME_COLUMNS, squeeze=False).flat):
            axis.set_axis_off()
            if index >= len(frames):
                continue
            axis.imshow((frames[index] * brightness[index, ..., None]).numpy(), interpolation="nearest")
            axis.set_title(f"frame {index}", fontsize=10)
            if index == time:
                center = ((column + 0.5) * patch - 0.5, (row + 0.5) * patch - 0.5)
                axis.plot(*center, marker="s", markersize=9, markerfacecolor="none", markeredgecolor="red")
    axis = matrix.subplots()
    axis.imshow(block_map["labels"].float().numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_title("all blocks, head 0", fontsize=11)
    axis.set_xlabel("key block", fontsize=10)
    axis.set_ylabel("query block", fontsize=10)
    axis.tick_params(labelsize=10)
    figure.suptitle(
        f"{name}: what the marked token sees. Bright: read exactly ({block_map['kept']} blocks); "
        "dim: through the global branch; dark: not at all",
        fontsize=11,
    )
    return figure


def conclusions(results: dict[str, Any]) -> list[str]:
    """What the figures of a run say, in sentences: what conversion costs, what fine-tuning repairs, who comes closest.

    Args:
        results: as in results.json.
    """
    arms, steps = results["arms"], results["settings"]["fine_tune_steps"]
    dense, sla = arms["dense"]["held_out_loss_fine_tuned"], arms["SLA"]
    before, after = sla["held_out_loss_converted"], sla["held_out_loss_fine_tuned"]
    start = arms["dense"]["held_out_loss_converted"]
    lines = [
        f"Leaving blocks out has a price at first: conversion to SLA takes the held-out loss from {start:.4f} to "
        f"{before:.4f} ({_percent(before, start)}), before any training.",
        f"After {steps} steps it is {after:.4f}, against {dense:.4f} for the dense model after the same steps "
        f"({_percent(after, dense)}), with {100 / sla['attention_flops_reduction']:.0f} % of the attention arithmetic.",
    ]
    losses = {name: arm["held_out_loss_fine_tuned"] for name, arm in arms.items() if name != "dense"}
    order = sorted(losses, key=losses.get)
    ranked = ", ".join(f"{name} {losses[name]:.4f} ({_percent(losses[name], dense)})" for name in order)
    lines.append(f"The sparse arms by held-out loss, the best first: {ranked}.")
    missed = [verdict["expected"] for verdict in results["expectations"] if not verdict["met"]]
    if missed:
        lines.append(
            f"This run does not show that {' or that '.join(missed)}. Train for more steps before you conclude "
            "anything about the methods from it."
        )
    else:
        gap = losses["sparse only"] - dense
        closed = 100 * (losses["sparse only"] - after) / gap if gap else 0.0
        lines.append(
            f"SLA's linear branch closes {closed:.0f} % of the gap that sparse only leaves to dense. What longer "
            f"training makes of the rest, {steps} steps do not tell."
        )
    return lines


def _percent(value: float, reference: float) -> str:
    return f"{100 * (value / reference - 1):+.1f} %"


def _page(results: dict[str, Any], media: dict[str, Any]) -> str:
    arms, clip, environment = results["arms"], results["clip"], results["environment"]
    dense = arms["dense"]
    columns = (
        ("arm", lambda name, arm: html.escape(name)),
        ("attention work, against dense", lambda name, arm: f"{100 / arm['attention_flops_reduction']:.1f} %"),
        ("held-out loss, converted", lambda name, arm: f"{arm['held_out_loss_converted']:.4f}"),
        ("held-out loss, fine-tuned", lambda name, arm: f"{arm['held_out_loss_fine_tuned']:.4f}"),
        ("output error, converted", lambda name, arm: f"{100 * arm['output_error_converted']:.1f} %"),
        ("output error, fine-tuned", lambda name, arm: f"{100 * arm['output_error_fine_tuned']:.1f} %"),
        ("PSNR to the clip", lambda name, arm: f"{arm['psnr_db']:.2f} dB"),
        ("fine-tuning step", lambda name, arm: f"{arm['seconds']['fine_tune_step']:.2f} s"),
        ("generation", lambda name, arm: f"{arm['seconds']['generation']:.1f} s"),
    )
    head = "".join(f"<th>{title}</th>" for title, _ in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(name, arm)}</td>" for _, cell in columns) + "</tr>" for name, arm in arms.items()
    )
    verdicts = "".join(
        f'<li class="{"met" if e["met"] else "missed"}"><b>{"As expected" if e["met"] else "Not as expected"}</b>: '
        f"{html.escape(e['expected'])} ({html.escape(e['figures'])}).</li>"
        for e in results["expectations"]
    )
    maps = "".join(
        f'<figure><a href="{file}"><img src="{file}" alt="blocks that {name} selects"></a></figure>'
        for name, file in ((name, _map_file(name)) for name in media["maps"])
    )
    concluded = "".join(f"<li>{html.escape(line)}</li>" for line in conclusions(results))
    settings = results["settings"]
    kept = 100 * settings["keep_ratio"]
    seconds = results["pretraining"]["seconds"]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>foveal demo</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: {PAGE_WIDTH}px;
       margin: 2.5rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.9rem; margin-bottom: .2rem; }} h2 {{ margin-top: 2.4rem; font-size: 1.25rem; }}
video, img {{ width: 100%; height: auto; border-radius: 6px; }}
figure {{ margin: 1rem 0; }} .lead {{ color: #4a5866; }}
.table {{ overflow-x: auto; }} table {{ border-collapse: collapse; width: 100%; font-size: .88rem; }}
th, td {{ text-align: right; padding: .45rem .6rem; border-bottom: 1px solid #dde3e8; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; font-weight: 600; }} td {{ font-variant-numeric: tabular-nums; }}
.met b {{ color: #22774b; }} .missed b {{ color: #b3372f; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem; }}
dt {{ color: #4a5866; }} dd {{ margin: 0; }}
</style>
</head>
<body>
<h1>A video transformer with {100 - kept:.0f} % of its attention blocks gone</h1>
<p class="lead">A small Wan transformer learned {html.escape(clip["file"])} with dense attention, was converted, and
fine-tuned for {settings["fine_tune_steps"]} steps. All videos below continue the same held-out frame from the same
noise; every arm, dense too, was fine-tuned on the same batches.</p>
<video src="side-by-side.mp4" autoplay loop muted playsinline controls></video>
<h2>What to conclude</h2>
<ul>{concluded}</ul>
<p>What not to conclude: anything about speed, since attention is a small part of the work at
{results["tokens"]:,} tokens, or about quality at scale, since the model is tiny and knows one clip. To look around in
this model, run <code>foveal ui --demo</code> with this folder. On a pretrained model, begin with
<code>foveal inspect</code>.</p>
<h2>Measured</h2>
<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<ul>{verdicts}</ul>
<p>Attention work counts every FLOP of the method, its global branch and its selection included. Output error is
|v - v_dense| / |v_dense| over the held-out windows: after conversion against the pretrained model, after fine-tuning
against the dense model after the same fine-tuning. PSNR leaves the given first frame out; one window, so read it as an
illustration. Dense held-out loss before fine-tuning: {dense["held_out_loss_converted"]:.4f}.</p>
<h2>Held-out loss</h2>
<figure><a href="loss.png"><img src="loss.png" alt="held-out loss against steps"></a></figure>
<h2>Where one token looks</h2>
{maps}
<p>SLA cuts the tokens into blocks in raster order, so that its blocks are strips of a frame; VSA cuts them into cubes
of space and time. Dim blocks reach the token through SLA's linear branch, or through VSA's coarse one.</p>
<h2>Run</h2>
<dl>
<dt>Tokens per clip</dt><dd>{results["tokens"]:,} ({settings["frames"]} frames of
{settings["height"] // settings["patch"]} x {settings["width"] // settings["patch"]})</dd>
<dt>Transformer</dt><dd>{results["parameters"] / 1e6:.2f} M parameters, {settings["num_layers"]} layers,
{settings["num_heads"]} heads of {settings["head_dim"]}</dd>
<dt>Pretraining</dt><dd>{settings["pretrain_steps"]} steps, {seconds["total"]:.0f} s</dd>
<dt>Seed</dt><dd>{settings["seed"]}</dd>
<dt>Device</dt><dd>{html.escape(str(environment["device"]))}, {environment["threads"]} threads</dd>
<dt>Versions</dt><dd>foveal {environment["foveal"]}, torch {environment["torch"]},
diffusers {environment["diffusers"]}, Python {environment["python"]}</dd>
</dl>
<p>All figures: <a href="results.json">results.json</a>.</p>
</body>
</html>
"""
