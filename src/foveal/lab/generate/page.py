"""The page beside generated videos: each prompt and seed with its players, and how each output was made."""

from __future__ import annotations

import html
import json
import statistics
from pathlib import Path
from typing import Any

from foveal.lab.generate.outputs import FORMAT, beside_name, media_suffix
from foveal.output_folder import OutputFolder

PAGE = "index.html"
# What a heading says, or what is the same for each output that one looks at together.
OWN = ("prompt", "seed", "arm", "sparse")


def write_page(folder: OutputFolder) -> None:
    """Write `index.html` for all outputs of `foveal generate` in the folder, of former runs too."""
    text = page_of(folder)
    path = folder.path / PAGE
    if folder.owns(PAGE) and path.read_text(encoding="utf-8") == text:
        return
    with folder.writing(PAGE) as aside:
        aside.write_text(text, encoding="utf-8")


def page_of(folder: OutputFolder) -> str:
    """The page as HTML. It loads nothing but the outputs beside it."""
    groups: dict[tuple[str, int], list[tuple[str, dict[str, Any]]]] = {}
    for name, record in _records(folder):
        settings = record["settings"]
        groups.setdefault((settings["prompt"], settings["seed"]), []).append((name, record))
    sections = "\n".join(_section(folder, *key, groups[key]) for key in sorted(groups))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>foveal generate</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 1280px;
       margin: 2rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ font-size: 1.2rem; margin: 2.4rem 0 .6rem; }} h2 small {{ color: #4a5866; }}
.arms {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 1rem; }}
figure {{ margin: 0 0 1rem; }} video, img {{ width: 100%; height: auto; border-radius: 6px; background: #14171c; }}
figcaption, details {{ font-size: .9rem; }} summary {{ cursor: pointer; color: #4a5866; }}
th {{ text-align: left; font-weight: 500; padding-right: 1.2rem; vertical-align: top; }}
td {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>Generated with foveal</h1>
{sections}
</body>
</html>
"""


def _records(folder: OutputFolder) -> list[tuple[str, dict[str, Any]]]:
    """(name, record) of each finished output that the command wrote, dense ones first."""
    found = []
    for path in sorted(folder.path.glob("*.json")):
        if folder.owns(path.name):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.get("format") == FORMAT and (folder.path / record["outputs"][0]["file"]).is_file():
                found.append((path.stem, record))
    return sorted(found, key=lambda item: (item[1]["settings"]["arm"], item[0]))


def _section(folder: OutputFolder, prompt: str, seed: int, outputs: list[tuple[str, dict[str, Any]]]) -> str:
    arms, pairs = [], []
    for name, record in outputs:
        suffix = Path(record["outputs"][0]["file"]).suffix
        beside = beside_name(name, is_image=suffix == media_suffix(True))
        if record["settings"]["sparse"] is not None and folder.owns(beside):
            pairs.append(_figure(beside, f"dense on the left, {_label(name, seed)} on the right"))
        arms.append(
            f"<div>{_figure(record['outputs'][0]['file'], _caption(name, record))}{_details(name, record)}</div>"
        )
    return (
        f"<section>\n<h2>{html.escape(prompt)} <small>seed {seed}</small></h2>\n"
        + "\n".join(pairs)
        + f'\n<div class="arms">\n{"".join(arms)}\n</div>\n</section>'
    )


def _label(name: str, seed: int) -> str:
    return name.rpartition(f"-seed{seed}-")[2]


def _figure(file: str, caption: str) -> str:
    source = html.escape(file)
    shown = f'<a href="{source}"><img src="{source}" alt=""></a>'
    if Path(file).suffix != media_suffix(True):
        shown = f'<video src="{source}" controls loop muted playsinline preload="metadata"></video>'
    return f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>\n"


def _caption(name: str, record: dict[str, Any]) -> str:
    seconds = record["seconds"]
    # The first step compiles kernels and fills caches.
    step = statistics.median(seconds["steps"][1:] or seconds["steps"])
    caption = f"{_label(name, record['settings']['seed'])}: {seconds['total']:.1f} s, {step:.2f} s a step"
    if record["settings"]["sparse"] is not None:
        caption += f", {100 / record['attention_flops_reduction']:.0f} % of dense attention's FLOPs"
    return caption


def _details(name: str, record: dict[str, Any]) -> str:
    shown = {key: value for key, value in record["settings"].items() if key not in OWN and value is not None}
    sparse = record["settings"]["sparse"] or {}
    shown |= {key: value for key, value in (sparse | (sparse.get("config") or {})).items() if key != "config"}
    shown["tokens"] = "x".join(map(str, record["tokens"]))
    shown |= record["environment"]
    rows = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in shown.items())
    link = f'<a href="{html.escape(name)}.json">{html.escape(name)}.json</a>'
    return f"<details><summary>Settings</summary><table>{rows}</table><p>{link}</p></details>\n"
