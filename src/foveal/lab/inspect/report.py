"""Write what was observed as figures, as one page that needs no other file, and as JSON with every number."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from foveal.lab.inspect.advice import Advice, to_json
from foveal.lab.inspect.probe import InspectSettings, LayerObservation

COLORS = {"raster": "#c1666b", "tile": "#2a7f8e", "full": "#33415c", "rest": "#d19a2e"}
STYLES = {"pooled": "-", "oracle": ":"}
PAGE, FIGURES_FILE = "index.html", "inspect.json"
FILES = (PAGE, FIGURES_FILE, "quality.png", "layers.png", "distribution.png")


def write_report(
    folder: Path,
    observations: Sequence[LayerObservation],
    settings: InspectSettings,
    advice: Advice,
    facts: dict[str, Any],
) -> None:
    """Write `inspect.json`, the figures as PNG files, and `index.html`, which contains the figures, into `folder`.

    Args:
        folder: an existing folder.
        observations, settings: what was observed, and how.
        advice: the recommendation.
        facts: what was run (model, prompt, versions, seconds), JSON-ready, for the page and the JSON.
    """
    document = {
        "facts": facts,
        "settings": {name: getattr(settings, name) for name in settings.__dataclass_fields__},
        "advice": {
            "config": advice.config.to_dict(),
            "code": advice.code(),
            "dense_layers": [list(layer) for layer in advice.dense_layers],
            "tolerance": advice.tolerance,
            "error": advice.error,
            "recall": advice.recall,
            "flops_ratio": advice.flops_ratio,
            "within_tolerance": advice.reached,
        },
        "observations": to_json(observations),
    }
    figures = {
        "quality": _quality_figure(observations, settings),
        "layers": _layers_figure(observations, settings, advice),
        "distribution": _distribution_figure(observations),
    }
    pictures = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        pictures[name] = buffer.getvalue()
        (folder / f"{name}.png").write_bytes(pictures[name])
    text = json.dumps(document, indent=1, allow_nan=False, default=list) + "\n"
    (folder / FIGURES_FILE).write_text(text, encoding="utf-8")
    (folder / PAGE).write_text(_page(observations, settings, advice, facts, pictures), encoding="utf-8")


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")


def _plain(*axes) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)


def _quality_figure(observations: Sequence[LayerObservation], settings: InspectSettings):
    """Recall and output error against the share of blocks kept, at the first pair of block sizes."""
    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    ratios = [100 * ratio for ratio in settings.keep_ratios]
    block_q, block_k = settings.blocks[0]
    for order in settings.orders:
        for ranking, style in STYLES.items():
            label = f"{order} order, {'pooled scores' if ranking == 'pooled' else 'oracle'}"
            drawn = {"color": COLORS[order], "linestyle": style, "label": label, "marker": "o", "markersize": 3}
            for axis, name in ((left, "recall"), (right, "error")):
                values = [getattr(o.quality[order, block_q, block_k], name)[ranking].mean(0) for o in observations]
                axis.plot(ratios, torch.stack(values).mean(0).tolist(), **drawn)
    left.set(title="Attention mass in the kept blocks", xlabel="key blocks kept, %", ylabel="recall", ylim=(None, 1.02))
    right.set(title="Output error with only the kept blocks", xlabel="key blocks kept, %", ylabel="relative error")
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    _plain(left, right)
    figure.suptitle(f"Mean over layers, heads and calls; blocks of {block_q} x {block_k} tokens", fontsize=9)
    return figure


def _layers_figure(observations: Sequence[LayerObservation], settings: InspectSettings, advice: Advice):
    """Output error of each layer and head with the recommended blocks."""
    variant = (advice.config.token_order, advice.config.block_q, advice.config.block_k)
    index = settings.keep_ratios.index(advice.config.keep_ratio)
    grouped = _by_layer(observations, lambda o: o.quality[variant].error["pooled"][:, index])
    table = torch.stack(list(grouped.values()))
    figure = _figure(10, 1.4 + 0.2 * len(grouped))
    axis = figure.subplots()
    image = axis.imshow(table.numpy(), cmap="magma_r", aspect="auto", vmin=0)
    axis.set_yticks(range(len(grouped)), list(grouped), fontsize=8)
    axis.set(xlabel="head", title=f"Output error, {100 * advice.config.keep_ratio:g} % of the blocks, pooled choice")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, label="relative error")
    return figure


def _by_layer(
    observations: Sequence[LayerObservation], figure: Callable[[LayerObservation], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A figure [H] of each observation, as its mean over the calls of each layer."""
    grouped: dict[str, list[torch.Tensor]] = {}
    for o in observations:
        name = o.layer if o.component == "transformer" else f"{o.component}: {o.layer}"
        grouped.setdefault(name, []).append(figure(o))
    return {name: torch.stack(values).mean(0) for name, values in grouped.items()}


def _int8_rows(observations: Sequence[LayerObservation]) -> str:
    return "".join(
        f"<tr><td>{html.escape(name)}</td><td>{float(heads.mean()):.4f}</td><td>{float(heads.max()):.4f}</td></tr>"
        for name, heads in _by_layer(observations, lambda o: o.int8_error).items()
    )


def _distribution_figure(observations: Sequence[LayerObservation]):
    """How the weights are spread, and the stable rank with and without each row's largest weights."""
    figure = _figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    place = range(len(observations))

    def series(name: str) -> list[float]:
        return [float(getattr(o.distribution, name).mean()) for o in observations]

    left.plot(place, [100 * x for x in series("share_above")], color=COLORS["full"], label="weights above 1/N")
    left.plot(place, [100 * x for x in series("share_below")], color=COLORS["rest"], label="weights below 1/(100 N)")
    left.set(title="Spread of the weights", xlabel="layer (then next call)", ylabel="share of the weights, %")
    right.plot(place, series("stable_rank"), color=COLORS["full"], label="all weights")
    right.plot(place, series("stable_rank_rest"), color=COLORS["rest"], label="without each row's largest")
    right.set(title="Stable rank of sampled rows", xlabel="layer (then next call)", ylabel="stable rank", yscale="log")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    _plain(left, right)
    return figure


def _page(
    observations: Sequence[LayerObservation],
    settings: InspectSettings,
    advice: Advice,
    facts: dict[str, Any],
    pictures: dict[str, bytes],
) -> str:
    def picture(name: str, text: str) -> str:
        data = base64.b64encode(pictures[name]).decode()
        return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(text)}"></figure>'

    rows = "".join(
        f"<tr><td>{order}</td><td>{bq} x {bk}</td>"
        + "".join(
            f"<td>{_mean(observations, (order, bq, bk), 'recall', index):.3f}</td>"
            f"<td>{_mean(observations, (order, bq, bk), 'error', index):.3f}</td>"
            for index in range(len(settings.keep_ratios))
        )
        + f"<td>{_overlap(observations, (order, bq, bk), settings, advice):.2f}</td></tr>"
        for order in settings.orders
        for bq, bk in settings.blocks
    )
    heads = "".join(f'<th colspan="2">{100 * ratio:g} %</th>' for ratio in settings.keep_ratios)
    known = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>foveal inspect</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 1120px;
       margin: 2.5rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.9rem; margin-bottom: .2rem; }} h2 {{ margin-top: 2.4rem; font-size: 1.25rem; }}
img {{ width: 100%; height: auto; }} figure {{ margin: 1rem 0; }} .lead {{ color: #4a5866; }}
pre {{ background: #f3f5f7; padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }}
.table {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ text-align: right; padding: .35rem .55rem; border-bottom: 1px solid #dde3e8; }}
td {{ font-variant-numeric: tabular-nums; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem; }}
dt {{ color: #4a5866; }} dd {{ margin: 0; }}
</style>
</head>
<body>
<h1>Where this model's attention looks</h1>
<p class="lead">{len(observations)} observations of {len(advice.layers)} layers, on a grid of
{" x ".join(map(str, observations[0].grid.shape))} tokens.</p>
<h2>To try first</h2>
<pre>{html.escape(advice.code())}</pre>
<p>{html.escape(advice.verdict())} Converted, the model reads the blocks that were measured here; fine-tuning teaches a
router in each head which to read.</p>
<h2>What is kept, and what that costs</h2>
{picture("quality", "recall and output error against the share of kept blocks")}
<p>Dotted: the blocks with the most attention mass, known in hindsight. Solid: the blocks that pooled scores choose, as
SLA and VSA do. The distance between them is the price of choosing cheaply; what lies between the two colors is the
gain of sorting tokens by cubes.</p>
<div class="table"><table><thead>
<tr><th>order</th><th>blocks</th>{heads}<th>neighbors</th></tr>
<tr><th></th><th></th>{"<th>recall</th><th>error</th>" * len(settings.keep_ratios)}<th>overlap</th></tr>
</thead><tbody>{rows}</tbody></table></div>
<p>Pooled choice; means over layers, heads and calls. Overlap: the share of a query block's kept blocks that the next
one keeps too, at the recommended ratio.</p>
<h2>Layer by layer</h2>
{picture("layers", "output error of every layer and head")}
<p>What <code>precision="int8"</code> would change by itself, with all blocks read:</p>
<div class="table"><table><thead>
<tr><th>layer</th><th>int8 error</th><th>worst head</th></tr>
</thead><tbody>{_int8_rows(observations)}</tbody></table></div>
<h2>The weights themselves</h2>
{picture("distribution", "spread of the weights and stable ranks")}
<p>SLA rests on two things: few weights are large, and without them what is left has a low stable rank, so that a linear
branch can stand in for it. Stable rank is |P|<sub>F</sub>&sup2; / |P|<sub>2</sub>&sup2; of {settings.rows or "all"}
query rows; the rest leaves out the largest {100 * settings.top:g} % of each row's weights.</p>
<h2>Run</h2>
<dl>{known}</dl>
</body>
</html>
"""


def _mean(observations, variant, name: str, index: int) -> float:
    return float(torch.stack([getattr(o.quality[variant], name)["pooled"][:, index] for o in observations]).mean())


def _overlap(observations, variant, settings: InspectSettings, advice: Advice) -> float:
    index = settings.keep_ratios.index(advice.config.keep_ratio)
    return float(torch.stack([o.quality[variant].overlap[:, index] for o in observations]).mean())
