"""A picture of the blocks that each layer of a sampling run kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foveal.checks import check_positive_int
from foveal.hosts.comfyui.record import Record
from foveal.symbols import ceil_div

CAPTION, GAP = 16, 6
BACKGROUND, TEXT = (24, 26, 30), (220, 222, 226)
# From no head that keeps a block to all of them.
COLORS = ((24, 26, 48), (38, 84, 124), (48, 154, 140), (190, 208, 84), (255, 244, 190))


def preview(record: Record, *, size: int = 192, columns: int = 0) -> Tensor:
    """One map for each layer that ran sparse: a row for each query block, a column for each key block.

    The brighter a block, the more heads keep it. What was kept at one denoising step is shown, for the last sample.

    Args:
        record: of a sampling run.
        size: pixels of a map's side.
        columns: maps in a row; 0 makes the picture about square.

    Returns:
        [1, height, width, 3] in float32 from 0 to 1, as ComfyUI has images; one line of text if no layer ran sparse.
    """
    from PIL import Image, ImageDraw

    check_positive_int("size", size)
    maps = [(name, layer) for name, layer in record.layers.items() if layer.kept is not None]
    columns = columns or max(1, math.ceil(math.sqrt(len(maps))))
    rows = max(1, ceil_div(len(maps), columns))
    width, height = columns * (size + GAP) + GAP, rows * (size + CAPTION + GAP) + GAP
    sheet = Image.new("RGB", (max(width, 320), height if maps else CAPTION + 2 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if not maps:
        draw.text((GAP, GAP), "No layer ran sparse; see the report.", fill=TEXT)
    for place, (name, layer) in enumerate(maps):
        row, column = divmod(place, columns)
        left, top = GAP + column * (size + GAP), GAP + row * (size + CAPTION + GAP)
        share = 100 * float(layer.kept_share)
        draw.text((left, top), f"{_short(name)}: {share:.1f} % kept", fill=TEXT)
        sheet.paste(Image.fromarray(_colored(layer.kept, size).numpy()), (left, top + CAPTION))
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(1, sheet.height, sheet.width, 3).float() / 255


def _colored(kept: Tensor, size: int) -> Tensor:
    """[Tq, Tk] from 0 to 1 to uint8 [size, size, 3]."""
    kept = nn.functional.interpolate(kept.float().cpu()[None, None], (size, size), mode="nearest")[0, 0]
    colors = torch.tensor(COLORS, dtype=torch.float32)
    place = kept.clamp(0, 1) * (len(colors) - 1)
    low = place.floor().long().clamp(max=len(colors) - 2)
    share = (place - low)[..., None]
    return (colors[low] * (1 - share) + colors[low + 1] * share).round().to(torch.uint8)


def _short(name: str) -> str:
    """ "block 3" for blocks.3.self_attn."""
    group, index, *_ = name.split(".")
    return f"{group.removesuffix('s').replace('_', ' ')} {index}"
