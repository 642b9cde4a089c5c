"""Raster against tile order on the demo's model, trained: which keeps more attention mass at equal sparsity.

    python benchmarks/quality/token_order.py --json benchmarks/results/token_order.json

Pretrains the demo's transformer (dense, real clips, several seeds), then looks at every layer's attention over held-out
windows and noise levels with `foveal.lab.inspect`: recall of attention mass and output error of the chosen blocks, in
both orders, by pooled scores and in hindsight, over all query blocks. Nothing is fine-tuned.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from pixel_wan import Batches, HeldOut, PixelSettings, build_model, training_loss

from foveal.lab.bench.machine import machine
from foveal.lab.bench.report import write_json
from foveal.lab.data.windows import ClipWindows, read_video, sample_clip
from foveal.lab.inspect.probe import InspectSettings, observe
from foveal.lab.train.loop import train

KEEP_RATIOS = (0.05, 0.1, 0.2, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/token_order.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    inspection = InspectSettings(keep_ratios=KEEP_RATIOS, blocks=((64, 64),), query_blocks=None, rows=256)
    runs = []
    for clip in ("bigbuckbunny", "bikes"):
        for seed in range(options.seeds):
            settings = dataclasses.replace(
                PixelSettings.for_device(device.type), seed=seed, pretrain_steps=options.steps
            )
            frames = read_video(sample_clip(clip), height=settings.height, width=settings.width)
            windows = ClipWindows(frames, frames=settings.frames, stride=settings.stride)
            held_out = HeldOut(windows, settings, device)
            model = build_model(settings).to(device)
            start = time.perf_counter()
            train(
                model,
                Batches(windows, settings, device, seed=seed + 1),
                training_loss,
                steps=settings.pretrain_steps,
                learning_rate=settings.learning_rate,
                warmup=max(1, settings.pretrain_steps // 10),
                final_learning_rate=settings.fine_tune_learning_rate / 2,
            )
            loss = held_out.loss(model)
            calls = range(2 * settings.held_out_windows)
            found = observe(model, lambda m=model, h=held_out: h.velocities(m), calls=calls, settings=inspection)
            means = {}
            for order in inspection.orders:
                qualities = [observation.quality[order, 64, 64] for observation in found]
                means[order] = {
                    name: {
                        ranking: torch.stack([getattr(q, name)[ranking].mean(0) for q in qualities]).mean(0).tolist()
                        for ranking in ("pooled", "oracle")
                    }
                    for name in ("recall", "error")
                }
            runs.append({"clip": clip, "seed": seed, "held_out_loss": loss, "observations": len(found), **means})
            recalls = {order: [round(x, 4) for x in means[order]["recall"]["pooled"]] for order in inspection.orders}
            print(
                f"{clip} seed {seed}: loss {loss:.4f}, {time.perf_counter() - start:.0f} s, recall {recalls}",
                flush=True,
            )
    differences = {
        name: [
            [run["tile"][name]["pooled"][index] - run["raster"][name]["pooled"][index] for run in runs]
            for index in range(len(KEEP_RATIOS))
        ]
        for name in ("recall", "error")
    }
    write_json(
        options.json,
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(device),
            "settings": PixelSettings.for_device(device.type).to_dict() | {"pretrain_steps": options.steps},
            "keep_ratios": KEEP_RATIOS,
            "runs": runs,
            "tile_minus_raster": {
                name: [{"mean": statistics.mean(values), "all": values} for values in rows]
                for name, rows in differences.items()
            },
        },
    )
    print(options.json)


if __name__ == "__main__":
    main()
