"""Draw the figures of the pages from foveal's own code: `python docs/figures.py` writes them to docs/assets.

The pictures that need queries and keys take the pixels of a real clip for both, so that whoever has the clip gets the
same picture without training a model; the pages say so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from foveal import BlockSelection, SLAConfig, VideoGrid, VSAConfig, attention_cost, select_blocks
from foveal.blocks import pool_blocks, pooled_scores
from foveal.lab.bench.plot import write_plot
from foveal.lab.data.windows import read_video, sample_clip
from foveal.methods.vsa.attention import select_cubes, slot_size
from foveal.token_order import tile_indices

sys.path.insert(0, str(Path(__file__).parent))
from tables import RESULTS, bench_run, latest

ASSETS = Path(__file__).parent / "assets"
PATCH = 8
STRIDE = 3
GRID = VideoGrid(8, 16, 28)
TILE = (4, 4, 4)
TOKEN = (3, 11, 17)
KEEP_RATIO = 0.1
DROP_RATIO = 0.3
# Inches, of about 100 pixels of the page each, so that letters of 9 points are 12 pixels high or more.
PAGE_WIDTH = 9.4
BRIGHTNESS = {1: 1.0, 0: 0.42, -1: 0.10}
WAN_480P = {"grid": VideoGrid(21, 30, 52), "heads": 12, "head_dim": 128}


def clip_frames() -> Tensor:
    """uint8 [frames, 3, H, W] of the sample clip, one grid of tokens large."""
    frames = read_video(sample_clip("bigbuckbunny"), height=GRID.height * PATCH, width=GRID.width * PATCH)
    return frames[20::STRIDE][: GRID.frames]


def pixel_tokens(frames: Tensor) -> Tensor:
    """[1, 1, L, 3 * PATCH * PATCH]: each token's own pixels, mean over tokens removed, unit length."""
    patches = frames.float().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    tokens = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    return torch.nn.functional.normalize(tokens - tokens.mean(0), dim=-1)[None, None]


def token_labels(selection: BlockSelection, places: Tensor) -> Tensor:
    """int8 [frames, height, width]: what TOKEN sees; places[i] is where raster token i stands in the block order."""
    index = (TOKEN[0] * GRID.height + TOKEN[1]) * GRID.width + TOKEN[2]
    row = selection.labels()[0, 0, places[index] // selection.block_q]
    return row[places // selection.block_k].view(GRID.shape)


def shade(frames: Tensor, labels: Tensor) -> Tensor:
    """float [F, H, W, 3] in [0, 1]: the frames, darkened by label."""
    brightness = torch.zeros(labels.shape)
    for label, level in BRIGHTNESS.items():
        brightness[labels == label] = level
    brightness = brightness.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    return frames.permute(0, 2, 3, 1).float() / 255 * brightness[..., None]


def figure_of(height: float, width: float = PAGE_WIDTH) -> Figure:
    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")


def draw_frames(row, pictures: Tensor, title: str, *, count: int = 5, mark: bool = True, **options) -> None:
    """Draw the first frames side by side in one subfigure, with the query token marked in its frame."""
    row.suptitle(title, fontsize=11, x=0.01, ha="left")
    for index, axis in enumerate(row.subplots(1, count)):
        axis.imshow(pictures[index].numpy(), interpolation="nearest", **options)
        axis.set(xticks=[], yticks=[])
        if mark and index == TOKEN[0]:
            scale = pictures.shape[1] // GRID.height
            center = ((TOKEN[2] + 0.5) * scale - 0.5, (TOKEN[1] + 0.5) * scale - 0.5)
            axis.plot(*center, marker="s", markersize=6, markerfacecolor="none", markeredgecolor="red")
        axis.set_xlabel(f"frame {index}", fontsize=9)


def draw_token_orders(path: Path) -> None:
    """Which tokens share a block: raster order against tile order."""
    figure = figure_of(3.6)
    rows = figure.subfigures(2, 1)
    colors = matplotlib.colormaps["tab20"]
    titles = (
        "raster order: a block of 64 tokens is a strip of one frame",
        "tile order, 4x4x4: a block is a cube of four frames",
    )
    for row, tile, title in zip(rows, (None, TILE), titles, strict=True):
        places = torch.arange(GRID.num_tokens)
        if tile is not None:
            places = tile_indices(GRID.shape, tile, None, torch.device("cpu"))[1]
        # Steps of seven through the palette: neighbors differ.
        block = (places // 64 * 7 % 20).view(GRID.shape)
        pictures = torch.tensor([colors(i)[:3] for i in range(20)])[block]
        draw_frames(row, pictures, title, mark=False)
    figure.savefig(path)


def draw_selection(path: Path) -> None:
    """What one token sees under SLA, in raster and in tile order, and the whole selection."""
    frames = clip_frames()
    tokens = pixel_tokens(frames)
    figure = figure_of(4.2)
    pictures, matrices = figure.subfigures(1, 2, width_ratios=[7.2, 2.2])
    rows, squares = pictures.subfigures(2, 1), matrices.subplots(2, 1)
    for row, square, order in zip(rows, squares, ("raster", "tile"), strict=True):
        config = SLAConfig(keep_ratio=KEEP_RATIO, drop_ratio=DROP_RATIO, token_order=order)
        places, ordered = torch.arange(GRID.num_tokens), tokens
        if order == "tile":
            places = tile_indices(GRID.shape, config.tile_for(GRID), None, torch.device("cpu"))[1]
            ordered = GRID.to_tile_order(tokens, config.tile_for(GRID))
        selection = select_blocks(
            ordered, ordered, block_q=64, block_k=64, keep_ratio=KEEP_RATIO, drop_ratio=DROP_RATIO
        )
        draw_frames(row, shade(frames, token_labels(selection, places)), f"{order} order", count=4)
        labels = selection.labels()[0, 0]
        square.imshow(labels.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        square.set_title(f"labels, {labels.shape[0]} x {labels.shape[1]} blocks", fontsize=9)
        square.set_xlabel("key block", fontsize=9)
        square.set_ylabel("query block", fontsize=9)
        square.tick_params(labelsize=9)
    figure.savefig(path)


def draw_stages(path: Path) -> None:
    """VSA's two stages for the cube of one token: the coarse weights over cubes, and the cubes that are read."""
    frames = clip_frames()
    # Unit-length tokens make the pooled softmax flat; a trained layer's are longer. The choice of cubes is the same.
    tokens = pixel_tokens(frames) * 8
    config = VSAConfig(keep_ratio=KEEP_RATIO, tile=TILE)
    selection = select_cubes(tokens, tokens, config=config, grid=GRID)
    slot = slot_size(TILE)
    places = tile_indices(GRID.shape, TILE, slot, torch.device("cpu"))[1]
    pooled = pool_blocks(GRID.to_tile_order(tokens, TILE, slot=slot), slot, GRID.cube_sizes(TILE)[None])
    weights = pooled_scores(pooled, pooled, tokens.shape[-1] ** -0.5).softmax(-1)
    index = (TOKEN[0] * GRID.height + TOKEN[1]) * GRID.width + TOKEN[2]
    coarse = weights[0, 0, places[index] // slot]
    heat = coarse[places // slot].view(GRID.shape)
    labels = token_labels(selection, places)

    figure = figure_of(4.9)
    rows = figure.subfigures(3, 1)
    draw_frames(rows[0], frames.permute(0, 2, 3, 1), "the clip, and the query token")
    draw_frames(
        rows[1],
        heat.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2),
        "coarse stage: the query cube's softmax weight on every cube (brighter is more)",
        cmap="viridis",
        vmin=0,
        vmax=coarse.max().item(),
    )
    kept = int(selection.critical_count[0, 0, 0])
    title = f"fine stage: the tokens of the top {kept} of {selection.num_key_blocks} cubes"
    draw_frames(rows[2], shade(frames, labels), title)
    figure.savefig(path)


def draw_cost(path: Path) -> None:
    """Where the FLOPs go for Wan2.1 at 480p."""
    configs = {
        "SLA 64x64, marginal": SLAConfig(),
        "SLA 128x64, marginal": SLAConfig(block_q=128),
        "SLA 128x128, marginal": SLAConfig(block_q=128, block_k=128),
        "SLA 64x64, all": SLAConfig(linear_scope="all"),
        "SLA 64x64, none": SLAConfig(linear_scope="none"),
        "VSA 5 %, 4x4x4": VSAConfig(keep_ratio=0.05),
        "VSA 5 %, auto": VSAConfig(keep_ratio=0.05, tile="auto"),
    }
    figure = figure_of(3.8)
    axis = figure.subplots()
    colors: dict[str, tuple] = {}
    for position, config in enumerate(configs.values()):
        cost = attention_cost(config, **WAN_480P)
        left = 0.0
        for part in cost.parts:
            share = 100 * part.flops / cost.dense.flops
            name = part.name if share >= 0.05 else "parts below 0.05 %"
            label = None if name in colors else name
            color = colors.setdefault(name, matplotlib.colormaps["tab10"](len(colors)))
            axis.barh(position, share, left=left, color=color, label=label, height=0.7)
            left += share
        axis.text(left + 0.08, position, f"{left:.1f} %", va="center", fontsize=9)
    axis.axvline(5, color="#888", linewidth=1, linestyle=":")
    axis.set_yticks(range(len(configs)), configs)
    axis.invert_yaxis()
    axis.set_xlabel("forward FLOPs, % of dense attention, at 21 x 30 x 52 tokens (all configurations keep 5 %)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_xlim(0, 11.5)
    figure.savefig(path)


def draw_fine_tune(path: Path) -> None:
    """Held-out losses of the fine-tune at 16K tokens, as `benchmarks/quality/fine_tune.py` measured them."""
    run = latest("fine_tune.json")
    figure = figure_of(3.6)
    before, after, above = figure.subplots(1, 3, width_ratios=[1, 1.4, 1.4])
    steps, losses = zip(*run["pretraining"]["held_out_loss"][1:], strict=True)
    before.plot(steps, losses, color="#444")
    before.set(title="pretraining, dense", xlabel="steps", ylabel="held-out loss")
    dense = [loss for _, loss in run["arms"]["dense"]["held_out_loss"]]
    for name, arm in run["arms"].items():
        steps, losses = zip(*arm["held_out_loss"], strict=True)
        (line,) = after.plot(steps, losses, label=name, marker="o", markersize=3)
        if name not in ("dense", "linear only"):
            gaps = [100 * (loss / base - 1) for loss, base in zip(losses, dense, strict=True)]
            above.plot(steps, gaps, color=line.get_color(), marker="o", markersize=3)
    after.set(title=f"fine-tuning at {run['tokens']:,} tokens", xlabel="steps")
    after.legend(frameon=False, fontsize=9)
    above.set(title="above dense, %, without linear only", xlabel="steps")
    above.axhline(0, color="#888", linewidth=1, linestyle=":")
    for axis in (before, after, above):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    figure.savefig(path)


def draw_routers(path: Path) -> None:
    """Held-out losses of the tiny model's arms by step, seed by seed, and at each noise level above dense attention."""
    runs, before = (
        list(json.loads((RESULTS / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json").read_text()).values())
        for name in ("per-head", "router")
    )
    (dense,) = (run for run in before if run["arm"] == "dense")
    names = {
        "blocks": "by mean queries and keys",
        "blocks, SLA2 (rate x 10)": "SLA2: one router, and a linear branch",
        "blocks, router (rate x 10)": "one router",
        "blocks, router per head (rate x 10)": "a router for each head",
    }
    figure = figure_of(3.6)
    by_step, by_level = figure.subplots(1, 2, width_ratios=[1.5, 1])
    base = torch.tensor(dense["after"]).mean(0)
    for (arm, label), color in zip(names.items(), ("#888", "#d19a2e", "#5aa9b8", "#1f5f6e"), strict=True):
        of_arm = [run for run in runs if run["arm"] == arm]
        for run, style in zip(of_arm, ("-", "--"), strict=True):
            steps, losses = zip(*run["curve"], (run["steps"], torch.tensor(run["after"]).mean().item()), strict=True)
            by_step.plot(
                steps, losses, style, color=color, marker="o", markersize=3, label=label if style == "-" else None
            )
        after = torch.tensor([run["after"] for run in of_arm]).mean((0, 1))
        by_level.plot(dense["levels"], 100 * (after / base - 1), color=color, marker="o", markersize=3)
    by_step.axhline(base.mean().item(), color="#444", linewidth=1, linestyle=":", label="dense attention")
    by_step.set(xlabel="steps", ylabel="held-out loss")
    by_step.set_title("10% of the blocks, 1,872 tokens, both seeds", fontsize=10)
    by_step.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 0.05))
    by_level.axhline(0, color="#444", linewidth=1, linestyle=":")
    by_level.set(xlabel="noise level", ylabel="above dense attention, %", ylim=(-0.5, None))
    for axis in (by_step, by_level):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_routers_share(path: Path) -> None:
    """What sparsity costs the tiny model, by the share of blocks or cubes that are read, with and without a router."""

    def runs_of(*names: str) -> dict[str, dict]:
        files = (RESULTS / f"quality-tiny-{name}-nvidia-h200-2026-11-30.json" for name in names)
        return {key: run for file in files for key, run in json.loads(file.read_text()).items()}

    def price(runs: dict[str, dict], arm: str, seeds: tuple[int, ...]) -> float:
        """In percent above dense attention, the mean over clips and seeds."""
        shares = []
        for seed in seeds:
            mine, dense = (torch.tensor(runs[f"{name} #{seed}"]["after"]).mean(1) for name in (arm, "dense"))
            shares.append(100 * (mine / dense - 1).mean().item())
        return sum(shares) / len(shares)

    router, cubes = "blocks, router per head", "VSA 4x4x4, router per head"
    short = {**runs_of("per-head", "router-settings", "vsa-router"), "dense #1": runs_of("router")["dense #1"]}
    panels = (  # with the share that the arms read: of 30 blocks and of 48 cubes, and of 225 and of 280
        (
            "1,872 tokens, 1,000 steps",
            short,
            (1,),
            {"blocks": 3 / 30},
            {f"{router} (rate x 10)": 3 / 30, f"{router} (x 4/3, rate x 10)": 4 / 30},
            {"VSA 4x4x4": 6 / 48},
            {f"{cubes} (x 1/2, rate x 10)": 3 / 48, f"{cubes} (rate x 10)": 6 / 48},
        ),
        (
            "14,400 tokens, 400 steps",
            runs_of("14400-routers"),
            (0, 1),
            {"blocks": 0.05, "blocks (x 4/3)": 0.05 * 4 / 3},
            {f"{router} (rate x 10)": 0.05},
            {"VSA 4x4x4": 0.05},
            {f"{cubes} (x 1/2, rate x 10)": 0.025, f"{cubes} (rate x 10)": 0.05},
        ),
    )
    labels = {
        "blocks, by means": "#888",
        "blocks, a router for each head": "#1f5f6e",
        "VSA": "#a06cd5",
        "VSA, a router for each head": "#c94f9b",
    }
    figure = figure_of(3.8)
    for axis, (title, runs, seeds, *lines) in zip(figure.subplots(1, 2), panels, strict=True):
        for (label, color), arms in zip(labels.items(), lines, strict=True):
            shares, prices = [100 * share for share in arms.values()], [price(runs, arm, seeds) for arm in arms]
            axis.plot(shares, prices, color=color, marker="o", markersize=6, label=label)
            for share, cost in zip(shares, prices, strict=True):
                axis.annotate(
                    f"{cost:.1f}%", (share, cost), (6, 5), textcoords="offset points", fontsize=9, color=color
                )
        axis.axhline(0, color="#444", linewidth=1, linestyle=":")
        axis.set(xlabel="read exactly, % of the blocks or cubes", title=title)
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    left, right = figure.axes
    left.set(xlim=(5, 15), ylim=(-0.5, 12.5), ylabel="loss above dense attention, %")
    right.set(xlim=(2, 7.5), ylim=(-0.2, 5.6))
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=9, ncols=4, loc="outside lower center")
    figure.savefig(path)


def draw_kernels(path: Path) -> None:
    """Kernels and methods against dense attention, as `foveal bench` draws its own results."""
    write_plot(path, bench_run("480p", "kernel")[0])


def draw_speed(path: Path) -> None:
    """A whole Wan transformer call against its number of tokens, as `benchmarks/wan_transformer.py` measured it."""
    run = latest("wan-1.3b-*.json", lambda run: len(run["calls"]) > 1)
    tokens = {"480p": WAN_480P["grid"].num_tokens, "720p": VideoGrid(21, 45, 80).num_tokens}
    figure = figure_of(3.8, 8)
    axis = figure.subplots()
    for arm in run["calls"]["480p"]:
        style = {"color": "#888", "linestyle": ":"} if arm.startswith("no ") else {}
        speedups = [run["calls"][resolution][arm]["speedup"] for resolution in tokens]
        axis.plot(list(tokens.values()), speedups, marker="o", markersize=4, label=arm, **style)
    labels = [f"{count:,}\n{name}" for name, count in tokens.items()]
    axis.set_xticks(list(tokens.values()), labels)
    axis.set(xlabel="tokens", ylabel="times faster than dense", ylim=(0, None))
    axis.set_title(f"Wan2.1-1.3B transformer call, {run['machine']['device']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def draw_error(path: Path) -> None:
    """Output error against the share of blocks that is kept, from the runs of `benchmarks/quality/token_order.py`."""
    run = latest("token_order.json")
    ratios = [100 * ratio for ratio in run["keep_ratios"]]
    figure = figure_of(3.6, 8)
    axis = figure.subplots()
    for order, color in (("raster", "#2a7f8e"), ("tile", "#d19a2e")):
        for ranking, style in (("pooled", "-"), ("oracle", "--")):
            errors = torch.tensor([each[order]["error"][ranking] for each in run["runs"]]).mean(0)
            axis.plot(ratios, 100 * errors, style, color=color, marker="o", markersize=3, label=f"{order}, {ranking}")
    axis.set(xlabel="blocks kept, %", ylabel="output error, %", ylim=(0, None))
    axis.set_title("the demo's model, sparse part only, before fine-tuning", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path)


FIGURES = {
    "kernels.png": draw_kernels,
    "speed.png": draw_speed,
    "error.png": draw_error,
    "fine-tune.png": draw_fine_tune,
    "routers.png": draw_routers,
    "routers-share.png": draw_routers_share,
    "token-orders.png": draw_token_orders,
    "selection.png": draw_selection,
    "vsa-stages.png": draw_stages,
    "cost-480p.png": draw_cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ASSETS, help="where to write (default: docs/assets)")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
