"""The demo's report: videos side by side, figures, and one page that shows all of it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.lab.data.windows import write_video
from foveal.lab.demo.settings import (
    ARMS,
    DENSE,
    PICTURED,
    ROUTER_ADAPTER,
    SLA_ADAPTER,
    SLA_CONVERTED,
    VSA_ADAPTER,
    VSA_CONVERTED,
    VSA_ROUTER_ADAPTER,
    VSA_TRAINED,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    DENSE: "#33415c",
    SLA_CONVERTED: "#c1666b",
    SLA_ADAPTER: "#2a7f8e",
    ROUTER_ADAPTER: "#5fa84f",
    VSA_CONVERTED: "#6a4c93",
    VSA_ADAPTER: "#a06cd5",
    VSA_ROUTER_ADAPTER: "#c94f9b",
    VSA_TRAINED: "#d19a2e",
}
PAGE, LOSS_FIGURE, SIDE_BY_SIDE, REAL = "index.html", "loss.png", "side-by-side.mp4", "the real clip"
FPS = 16
BRIGHTNESS = {1: 1.0, 0: 0.42, -1: 0.10}
# The page is this many pixels wide at most: what is drawn for it keeps its letters readable at that width.
PAGE_WIDTH = 1080
VIDEO_COLUMNS, FRAME_COLUMNS = 3, 3


def report_files() -> list[str]:
    """The names of all files that `write_report` writes."""
    videos = [_video_file(name) for name in (REAL, *ARMS)]
    return [PAGE, LOSS_FIGURE, SIDE_BY_SIDE, *videos, *(_map_file(name) for name in PICTURED)]


def write_report(folder: Path, results: dict[str, Any], media: dict[str, Any]) -> None:
    """Write every file of the report but results.json into `folder`.

    Args:
        results: as in results.json.
        media: "real" uint8 [F, 3, H, W], "videos" by arm, "maps" by arm (see `run_demo`).
    """
    videos = {REAL: media["real"], **media["videos"]}
    for name, frames in videos.items():
        write_video(folder / _video_file(name), frames, fps=FPS)
    write_video(folder / SIDE_BY_SIDE, _in_rows([_with_title(f, name) for name, f in videos.items()]), fps=FPS)
    loss_figure(results).savefig(folder / LOSS_FIGURE)
    for name, block_map in media["maps"].items():
        map_figure(name, block_map, media["real"]).savefig(folder / _map_file(name))
    (folder / PAGE).write_text(_page(results, media), encoding="utf-8")


def _video_file(name: str) -> str:
    return f"{_slug(name)}.mp4"


def _map_file(name: str) -> str:
    return f"blocks-{_slug(name)}.png"


def _slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


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
    """Held-out loss against steps of the fine-tuning, with the other arms as lines."""
    figure = _figure(3.6)
    axis = figure.subplots()
    steps, losses = zip(*results["fine_tuning"]["held_out_loss"], strict=True)
    for name, arm in results["arms"].items():
        if name != VSA_TRAINED:
            axis.axhline(arm["held_out_loss"], color=COLORS[name], linestyle="--", label=name)
    axis.plot(steps, losses, color=COLORS[VSA_TRAINED], marker="o", markersize=4, label=VSA_TRAINED)
    axis.set(title="Held-out loss, while VSA is fine-tuned here", xlabel="steps", ylabel="held-out loss")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    return figure


def map_figure(name: str, block_map: dict[str, Any], clip: Tensor) -> Figure:
    """Three frames as one query token sees them, for two heads, beside the whole selection of the first head.

    Args:
        name: of the arm.
        block_map: the token's labels and the selection.
        clip: uint8 [F, 3, H, W].
    """
    time, row, column = block_map["token"]
    heads = block_map["token_labels"]
    latent_frames = heads[0].shape[0]
    # A token's frame stands for several frames of the clip, and their middle is shown.
    places = ((torch.arange(latent_frames) + 0.5) * len(clip) / latent_frames).long()
    # Brighter than they are, since the rest of the figure darkens them.
    frames = (clip[places].permute(0, 2, 3, 1).float() / 255) ** 0.6
    shown = (time - 2, time, time + 2)
    patch = frames.shape[1] // heads[0].shape[1]
    square = 2.6
    frame_height = (PAGE_WIDTH / 100 - square) / FRAME_COLUMNS * frames.shape[1] / frames.shape[2]
    figure = _figure((frame_height + 0.8) * len(heads) + 0.6)
    pictures, matrix = figure.subfigures(1, 2, width_ratios=[PAGE_WIDTH / 100 - square, square])
    for head, part in enumerate(pictures.subfigures(len(heads), 1, squeeze=False)[:, 0]):
        part.suptitle(f"head {head}", fontsize=11)
        brightness = torch.zeros(heads[head].shape)
        for label, level in BRIGHTNESS.items():
            brightness[heads[head] == label] = level
        brightness = brightness.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        for index, axis in zip(shown, part.subplots(1, FRAME_COLUMNS, squeeze=False).flat, strict=True):
            axis.set_axis_off()
            axis.imshow((frames[index] * brightness[index, ..., None]).numpy(), interpolation="nearest")
            axis.set_title(f"frame {index} of {latent_frames}", fontsize=10)
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
    """What the figures of a run say, in sentences.

    Args:
        results: as in results.json.
    """
    arms, tuning = results["arms"], results["fine_tuning"]["held_out_loss"]
    loss = {name: arm["held_out_loss"] for name, arm in arms.items()}
    dense = loss[DENSE]

    def against(name: str) -> str:
        return f"{loss[name]:.4f} ({_percent(loss[name], dense)})"

    work = {name: f"{100 / arms[name]['attention_flops_reduction']:.0f} %" for name in arms}
    lines = [
        f"Leaving blocks out has a price at first. The dense model has a held-out loss of {dense:.4f}. Untrained, "
        f"SLA has {against(SLA_CONVERTED)} with {work[SLA_CONVERTED]} of the attention arithmetic, and VSA "
        f"{against(VSA_CONVERTED)} with {work[VSA_CONVERTED]}.",
        f"The adapters that come with foveal bring SLA to {against(SLA_ADAPTER)} and VSA to {against(VSA_ADAPTER)}. "
        "Where a router in each head learns which blocks to read, as many as SLA, the loss is "
        f"{against(ROUTER_ADAPTER)}; where it learns which cubes VSA reads, {against(VSA_ROUTER_ADAPTER)}.",
        f"{tuning[-1][0]} steps here, with a few clips, bring VSA to {against(VSA_TRAINED)}.",
    ]
    missed = [verdict["expected"] for verdict in results["expectations"] if not verdict["met"]]
    if missed:
        lines.append(f"This run does not show that {' or that '.join(missed)}.")
    return lines


def _percent(value: float, reference: float) -> str:
    return f"{100 * (value / reference - 1):+.1f} %"


def _psnr(arm: dict[str, Any]) -> str:
    return "" if arm["psnr_to_dense_db"] is None else f"{arm['psnr_to_dense_db']:.1f} dB"


def _page(results: dict[str, Any], media: dict[str, Any]) -> str:
    arms, clip, environment = results["arms"], results["clip"], results["environment"]
    columns = (
        ("", lambda name, arm: html.escape(name)),
        ("attention arithmetic", lambda name, arm: f"{100 / arm['attention_flops_reduction']:.1f} %"),
        ("held-out loss", lambda name, arm: f"{arm['held_out_loss']:.4f}"),
        ("against dense", lambda name, arm: _percent(arm["held_out_loss"], arms[DENSE]["held_out_loss"])),
        ("PSNR to the dense video", lambda name, arm: _psnr(arm)),
        ("generation", lambda name, arm: f"{arm['generation_seconds']:.1f} s"),
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
        f'<figure><a href="{file}"><img src="{file}" alt="blocks that the {name} selects"></a></figure>'
        for name, file in ((name, _map_file(name)) for name in media["maps"])
    )
    concluded = "".join(f"<li>{html.escape(line)}</li>" for line in conclusions(results))
    settings = results["settings"]
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
<h1>A video transformer, dense and sparse</h1>
<p class="lead">A small video model continues the first frame of a clip of a game, a walk that it never saw in
training: “{html.escape(clip["caption"])}”. All videos but the real one start from that frame and from the same
noise.</p>
<video src="{SIDE_BY_SIDE}" autoplay loop muted playsinline controls></video>
<h2>What to conclude</h2>
<ul>{concluded}</ul>
<p>What not to conclude: anything about speed, since attention is a small part of the work at
{results["tokens"]:,} tokens, or about quality at scale, since the model is tiny. Videos of the same quality may differ
much in PSNR, because a continuation is free to go elsewhere.</p>
<p>To go on with this model: <code>foveal ui</code> shows where its tokens look,
<code>foveal inspect --model foveal/tiny --prompt "first-person view of a brown stone corridor"</code> measures what
sparsity costs it, and
<code>foveal generate --model foveal/tiny --sparse foveal/tiny-vsa-router --compare dense --prompt "..."</code> makes
videos. On a pretrained model, begin with <code>foveal inspect</code>.</p>
<h2>Measured</h2>
<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<ul>{verdicts}</ul>
<p>Attention arithmetic counts every FLOP of the method, its global branch and its selection included. The held-out loss
is over {settings["held_out_clips"]} clips with fixed noise.</p>
<h2>Fine-tuning</h2>
<figure><a href="{LOSS_FIGURE}"><img src="{LOSS_FIGURE}" alt="held-out loss against steps"></a></figure>
<h2>Where one token looks</h2>
{maps}
<p>Both methods cut the video into cubes of 4 x 4 x 4 tokens here. Dim blocks reach the token through SLA's linear
branch, or through VSA's coarse stage.</p>
<h2>Run</h2>
<dl>
<dt>Model</dt><dd>{results["model"]}, a Wan transformer of {results["parameters"] / 1e6:.1f} M parameters with its VAE;
{results["tokens"]:,} tokens a video</dd>
<dt>Steps</dt><dd>{settings["sampling_steps"]} of denoising, {settings["fine_tune_steps"]} of fine-tuning with
{settings["batch"]} clips each, {results["fine_tuning"]["step_seconds"]:.2f} s a step</dd>
<dt>Seed</dt><dd>{settings["seed"]}</dd>
<dt>Time</dt><dd>{results["seconds"]:.0f} s before this page was written</dd>
<dt>Device</dt><dd>{html.escape(str(environment["device"]))}, {environment["threads"]} threads</dd>
<dt>Versions</dt><dd>foveal {environment["foveal"]}, torch {environment["torch"]},
diffusers {environment["diffusers"]}, Python {environment["python"]}</dd>
</dl>
<p>All figures: <a href="results.json">results.json</a>.</p>
</body>
</html>
"""
