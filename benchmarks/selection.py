"""Recall and output error of every score and rule, at equal shares of kept blocks, on a small model.

    python benchmarks/selection.py --commit COMMIT
    python benchmarks/selection.py --tables

The model makes a video of each prompt with dense attention. In every step and layer each rule
chooses blocks at several budgets, from the same query, key, and value, of which a fourth of the queries is looked at.
Recall is the share of attention's mass in the blocks that are kept, error is |O_kept - O| / |O| of a layer's output,
where O_kept attends only to these. Rules that keep different numbers of blocks are compared at the same share by
interpolation between their budgets. The ratios of single heads are chosen on the first prompt, which does not count
for any rule.

At equal time a rule that is dearer to choose by is compared with the means at more blocks. How many is read from what
`selection_cost.py` measured on a GPU: the difference of the choices' times over the time that a block takes.

The figures go to benchmarks/results/selection-MODEL.json and into the tables of docs/selection.md. With --tables those
of the file go into the page again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from typing import Any

import torch
from result_page import ROOT, ResultPage
from torch import Tensor

from foveal import BlockSelection, SLAConfig, SparseLinearAttention, VideoGrid, VideoSparseAttention, VSAConfig
from foveal.blocks import pick_blocks
from foveal.kernels.choice import block_scores
from foveal.lab.generate.run import GenerationSettings, environment
from foveal.lab.inspect.probe import Progress, watch
from foveal.lab.pipelines import choose_device, choose_dtype, load_pipeline
from foveal.methods.base import Config
from foveal.methods.sla.order import fixed_of, token_order
from foveal.methods.vsa.layout import CubeLayout
from foveal.models.shipped import shipped_clips

PAGE = ResultPage.of("selection")

RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
MASSES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 0.95)
QUERY_STEP = 4  # of the tokens of each block so many times fewer are looked at as queries
SHARES = (0.1, 0.2, 0.3, 0.5)  # of the table

SLA = {"drop_ratio": 0.0, "linear_scope": "none", "projection": False}
METHODS = {
    "SLA, raster": SLAConfig(**SLA),
    "SLA, tile": SLAConfig(**SLA, token_order="tile"),
    "VSA": VSAConfig(tile="auto"),
}
# name: (fields, whether a mass is varied instead of the ratio)
RULES = {
    "mean": ({}, False),
    "mean_spread": ({"score": "mean_spread"}, False),
    "log_sum_exp": ({"score": "log_sum_exp"}, False),
    "mean, mass": ({}, True),
    "log_sum_exp, mass": ({"score": "log_sum_exp"}, True),
    "mean, first frame": ({"sink_frames": 1}, False),
    "mean, window 1x3x3": ({"window": (1, 3, 3)}, False),
    "mean, window 3x1x1": ({"window": (3, 1, 1)}, False),
}
SCORES = ("mean_spread", "log_sum_exp")  # beside the means
# What `selection_cost.py` calls these methods and rules. It times few rules in tile order: those in raster order count.
COST_METHODS = {"SLA, raster": "SLA", "SLA, tile": "SLA", "VSA": "VSA"}
COST_RULES = {
    "mean_spread": "mean_spread",
    "log_sum_exp": "log_sum_exp",
    "mean, mass": "top-p",
    "log_sum_exp, mass": "top-p, log_sum_exp",
    "mean, first frame": "first frame",
    "mean, ratios by head": "ratio by head",
}
COST_SHAPES = ("480p", "h3-5s")
BY_HEAD, ORACLE = "mean, ratios by head", "oracle"


def budgets_of(method: Config, rule: str) -> list[Config]:
    """A rule's configurations, one for each budget; none where the method does not have the rule."""
    fields, by_mass = RULES[rule]
    if "window" in fields and getattr(method, "token_order", "tile") == "raster":
        return []
    config = method.replace(**fields)
    if by_mass:
        return [config.replace(keep_ratio=RATIOS[0], keep_mass=mass) for mass in MASSES]
    return [config.replace(keep_ratio=ratio) for ratio in RATIOS]


class Blocks:
    """Dense attention of one call by key blocks. Shape legend: H heads, L tokens, M queries of them, T blocks, D.

    Args:
        places: int64 [L], where each token stands in the order that blocks are cut from.
        size: tokens of a block.

    Attributes:
        block: int64 [M], the block that each query stands in.
        mass: float32 [H, M, T], each query's attention mass in each block.
        parts: float32 [H, M, T, D], what each block adds to its output.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, places: Tensor, size: int) -> None:
        block, looked_at = places // size, places % QUERY_STEP == 0
        weights = (query[0, :, looked_at].float() @ key[0].float().mT * query.shape[-1] ** -0.5).softmax(-1)
        self.block = block[looked_at]
        members = [(block == index).nonzero().flatten() for index in range(int(block.max()) + 1)]
        self.mass = torch.stack([weights[..., tokens].sum(-1) for tokens in members], -1)
        self.parts = torch.stack([weights[..., tokens] @ value[0, :, tokens].float() for tokens in members], 2)
        self.exact = self.parts.sum(2)

    def oracle(self, kept: int) -> Tensor:
        """bool [H, T, T]: for each block of queries those with the most mass."""
        rows = self.mass.new_zeros(self.mass.shape[0], self.mass.shape[2], self.mass.shape[2])
        best = rows.index_add_(1, self.block, self.mass).topk(kept, -1).indices
        return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, best, True)

    def of(self, kept: Tensor) -> Tensor:
        """float64 [N, 4, H] of choices, bool [N, H, T, T]: share of blocks, recall, squared error, squared output."""
        mask = kept[:, :, self.block].permute(1, 2, 0, 3).float()  # [H, M, N, T]
        mass = (mask @ self.mass[..., None]).squeeze(-1)
        missed = (mask @ self.parts / mass.clamp_min(1e-30)[..., None] - self.exact[:, :, None]).square().sum(-1)
        share, recall = kept.double().mean((2, 3)), mass.double().mean(1).mT
        squares = self.exact.square().sum(-1).double().sum(1).expand_as(share)
        return torch.stack((share, recall, missed.double().sum(1).mT, squares), 1)


class Chooser:
    """The choices of one call, [1, H, L, D], by the configurations of a method; each score is computed once."""

    def __init__(self, query: Tensor, key: Tensor, grid: VideoGrid) -> None:
        self.query, self.key, self.grid = query, key, grid
        self.scale, self.scores = query.shape[-1] ** -0.5, {}

    def masks(self, configs: list[Config]) -> Tensor:
        """bool [N, H, T, T]: what each configuration of one rule keeps, as the method's module does."""
        return torch.stack([self._chosen(config).critical_mask()[0] for config in configs])

    def _chosen(self, config: Config) -> BlockSelection:
        if isinstance(config, VSAConfig):
            layout = CubeLayout(config, self.grid, self.key, None)
            return layout.pick(self._scores(config, layout))
        blocks = {"block_q": config.block_q, "block_k": config.block_k}
        critical, counts, _ = pick_blocks(
            self._scores(config, None),
            keep_ratio=config.keep_ratio,
            keep_mass=config.keep_mass,
            max_keep_ratio=config.max_keep_ratio,
            fixed=fixed_of(config, self.grid, self.query.device),
        )
        lengths = {"query_length": self.query.shape[2], "key_length": self.key.shape[2]}
        return BlockSelection(critical=critical, critical_count=counts, marginal=None, **blocks, **lengths)

    def _scores(self, config: Config, cubes: CubeLayout | None) -> Tensor:
        asked = type(config), getattr(config, "token_order", None), config.score
        if asked not in self.scores:
            sizes, blocks = (), None
            if cubes is not None:
                tokens = cubes.to_cubes(self.query), cubes.to_cubes(self.key)
                sizes, blocks = (cubes.cube_sizes, cubes.cube_sizes), (cubes.slot, cubes.slot)
            else:
                order, blocks = token_order(config, self.grid, self.query.device), (config.block_q, config.block_k)
                tokens = (x if order is None else order.sort(x) for x in (self.query, self.key))
            self.scores[asked] = block_scores(*tokens, *blocks, self.scale, config.score, *sizes)
        return self.scores[asked]


# {(method, rule): {(prompt, layer, step): float64 [budgets, 4, H]}}
Found = dict[tuple[str, str], dict[tuple[int, str, int], Tensor]]


@torch.no_grad()
def look_at(query: Tensor, key: Tensor, value: Tensor, grid: VideoGrid) -> dict[tuple[str, str], Tensor]:
    """One call of a layer: for each method and rule what `Blocks.of` says at each budget, [budgets, 4, H]."""
    heads, head_dim = query.shape[1], query.shape[3]
    found, chooser = {}, Chooser(query, key, grid)
    for name, method in METHODS.items():
        if isinstance(method, SLAConfig):
            module = SparseLinearAttention(head_dim, method, impl="torch")
        else:
            module = VideoSparseAttention(heads * head_dim, heads, head_dim, method, impl="torch")
        size = module.kernel_blocks(method, grid)[0]
        blocks = Blocks(query, key, value, module.token_places(grid).to(query.device), size)
        for rule in RULES:
            configs = budgets_of(method, rule)
            if not configs:
                continue
            masks = chooser.masks(configs)
            found[name, rule] = blocks.of(masks)
            if rule == "mean":
                kept = masks[:, 0, 0].sum(-1).tolist()
                found[name, ORACLE] = blocks.of(torch.stack([blocks.oracle(count) for count in kept]))
    return found


def by_head(calibrated: list[Tensor], measured: list[Tensor]) -> list[Tensor]:
    """Figures with a budget for each head, [budgets, 4, H]: for each mean share, that which the squared error asks for.

    Args:
        calibrated: of one layer, by step, [budgets, 4, H], to choose from.
        measured: of the same layer, other calls.
    """
    shares, missed = calibrated[0][:, 0], sum(call[:, 2] for call in calibrated)
    budgets, heads = missed.shape
    place, wanted, chosen = [0] * heads, shares.mean(1).tolist(), []
    for share in wanted:
        while True:
            now = sum(float(shares[at, head]) for head, at in enumerate(place))
            steps = [
                (float(missed[at, head] - missed[to, head]) / float(shares[to, head] - shares[at, head]), head, to)
                for head, at in enumerate(place)
                for to in range(at + 1, budgets)
                if shares[to, head] > shares[at, head]
                and now + float(shares[to, head] - shares[at, head]) <= heads * share + 1e-9
            ]
            if not steps:
                break
            _, head, to = max(steps)
            place[head] = to
        chosen.append(list(place))
    return [
        torch.stack([torch.stack([call[b, :, h] for h, b in enumerate(one)], -1) for one in chosen])
        for call in measured
    ]


def points_of(calls: list[Tensor]) -> list[dict[str, float]]:
    """Means over calls, by budget: the share of blocks, the recall, and the layer's relative error."""
    points = []
    for figures in torch.stack(calls).unbind(1):  # [calls, 4, H]
        share, recall, missed, exact = figures.unbind(1)
        error = (missed.sum(1) / exact.sum(1)).sqrt().mean()
        values = share.mean(), recall.mean(), error
        points.append({k: round(float(x), 5) for k, x in zip(("kept", "recall", "error"), values, strict=True)})
    return points


def at_share(points: list[dict[str, float]], share: float, figure: str) -> float | None:
    """A figure at a share of kept blocks, between the two budgets around it; None where there are none."""
    points = sorted(points, key=lambda point: point["kept"])
    for lower, upper in itertools.pairwise(points):
        if lower["kept"] <= share <= upper["kept"] and lower["kept"] < upper["kept"]:
            part = (share - lower["kept"]) / (upper["kept"] - lower["kept"])
            return lower[figure] + part * (upper[figure] - lower[figure])
    return None


def costs() -> dict[str, Any]:
    """What `selection_cost.py` measured last."""
    file = max((ROOT / "benchmarks" / "results").glob("selection-cost-*.json"), key=lambda file: file.name)
    return json.loads(file.read_text(encoding="utf-8"))


def more_blocks(cost: dict[str, Any], shape: str, method: str) -> dict[str, tuple[float, float]]:
    """By rule: milliseconds that choosing takes more than by the means, and the share of key blocks read in that time.

    A share of blocks takes the slope of the forward's time, with its selection given, over the shares of all rules.
    """
    entries = [x for x in cost["entries"] if (x["shape"], x["method"]) == (shape, method) and "cost_ms" in x]
    kept, times = ([x[name] for x in entries] for name in ("kept", "given_ms"))
    slope = statistics.linear_regression(kept, times).slope
    known = {x["rule"]: x["cost_ms"] for x in entries}
    return {rule: (cost - known["mean"], (cost - known["mean"]) / slope) for rule, cost in known.items()}


# By method and rule, for each share: (its error, its recall, those of the means in the same time), None if unknown.
EqualTime = dict[tuple[str, str], list[tuple[float, float, float, float] | None]]


def at_equal_time(results: dict[str, Any], cost: dict[str, Any], shape: str) -> EqualTime:
    """The figures of each rule, and of the means at as many more blocks as that rule's choice takes time for."""
    points = {(row["method"], row["rule"]): row["points"] for row in results["rows"]}
    found = {}
    for (method, rule), of_rule in points.items():
        more = more_blocks(cost, shape, COST_METHODS[method]).get(COST_RULES.get(rule))
        if more is None:
            continue
        cells = []
        for share in results["shares"]:
            shares = (of_rule, share), (points[method, "mean"], share + more[1])
            cell = [at_share(x, at, figure) for x, at in shares for figure in ("error", "recall")]
            cells.append(None if None in cell else tuple(cell))
        found[method, rule] = cells
    return found


def equal_time_tables(results: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    """The lines that compare the rules with the means at equal time."""
    machine = cost["machine"]
    versions = f"torch {machine['torch']}, Triton {machine['triton']}"
    lines = [
        "What rules take longer to choose than the means, and how many more key blocks are read in that time:",
        "",
        "| shape | method | rule | longer, ms | more blocks |",
        "|---|---|---|---|---|",
    ]
    for shape, method in itertools.product(COST_SHAPES, dict.fromkeys(COST_METHODS.values())):
        more = more_blocks(cost, shape, method)
        for rule, name in COST_RULES.items():
            if name in more:
                longer, share = more[name]
                lines.append(f"| {shape} | {method} | {rule} | {longer:+.3f} | {100 * share:+.2f} % |")
    lines += [
        "",
        f"*{machine['device']}, {versions}, commit `{machine['commit'][:7]}`; {cost['started'][:10]}.*",
        "",
        "Beside the means of blocks with so many more of them, which is at equal time (medians over cells):",
        "",
        "| shape | rule | lower error than the means in | error, of that of the means | recall, less theirs |",
        "|---|---|---|---|---|",
    ]
    better: dict[str, list[bool]] = {rule: [] for rule in SCORES}
    for shape in COST_SHAPES:
        found = at_equal_time(results, cost, shape)
        for rule in COST_RULES:
            cells = [cell for (_, name), some in found.items() if name == rule for cell in some if cell is not None]
            ratios, gains = [cell[0] / cell[2] for cell in cells], [cell[1] - cell[3] for cell in cells]
            lower = sum(ratio < 1 for ratio in ratios)
            figures = f"{statistics.median(ratios):.2f}x | {statistics.median(gains):+.3f}"
            lines.append(f"| {shape} | {rule} | {lower} of {len(ratios)} cells | {figures} |")
            if rule in better:
                better[rule] += [ratio < 1 for ratio in ratios]
    always = [rule for rule, cells in better.items() if all(cells)]
    verdict = "No score has a lower error than the means in every cell at equal time, so the means stay the default."
    if always:
        verdict = f"`{'` and `'.join(always)}` had a lower error than the means in every cell at equal time."
    shape = COST_SHAPES[0]
    lines += ["", verdict, ""]
    for place, of in enumerate(("Output error", "Recall")):
        lines += [
            f"{of} of the scores at {shape}'s times: at a share of key blocks, and of the means at the larger share:",
            "",
            f"| method | score | {' | '.join(f'{100 * share:g} %' for share in results['shares'])} |",
            "|---" * (len(results["shares"]) + 2) + "|",
        ]
        for (method, rule), cells in at_equal_time(results, cost, shape).items():
            if rule in SCORES:
                shown = ("" if cell is None else f"{cell[place]:.3f}, {cell[place + 2]:.3f}" for cell in cells)
                lines.append(f"| {method} | {rule} | {' | '.join(shown)} |")
        lines.append("")
    return lines


def beside_means(results: dict[str, Any]) -> dict[str, list[float]]:
    """By rule, how many times the error of the means its error is, in each cell of the table that both have."""
    errors = {
        (row["method"], row["rule"]): [at_share(row["points"], share, "error") for share in results["shares"]]
        for row in results["rows"]
    }
    found: dict[str, list[float]] = {}
    for (method, rule), cells in errors.items():
        if rule not in ("mean", ORACLE):
            pairs = zip(cells, errors[method, "mean"], strict=True)
            found.setdefault(rule, []).extend(x / y for x, y in pairs if x is not None and y is not None)
    return found


def conclusions(results: dict[str, Any]) -> list[str]:
    """The lines that say how the rules stand beside the means of blocks."""
    lines = ["| rule | lower error than the means in | error, of that of the means |", "|---|---|---|"]
    found = beside_means(results)
    for rule, ratios in found.items():
        lower = sum(ratio < 1 for ratio in ratios)
        lines.append(f"| {rule} | {lower} of {len(ratios)} cells | {statistics.median(ratios):.2f}x |")
    better = [rule for rule in SCORES if all(ratio < 1 for ratio in found[rule])]
    verdict = "No score has a lower error than the means in every cell, so the means stay the default."
    if better:
        verdict = f"`{'` and `'.join(better)}` had a lower error than the means in every cell."
    return ["Beside the means of blocks, at equal shares (medians over cells):", "", *lines, "", verdict, ""]


def tables(results: dict[str, Any]) -> str:
    """What the page shows."""
    shares = results["shares"]
    lines = conclusions(results)
    for figure, of in (("error", "Output error"), ("recall", "Recall")):
        lines += [
            f"{of}, by the share of key blocks that rows read:",
            "",
            f"| method | rule | {' | '.join(f'{100 * share:g} %' for share in shares)} |",
            "|---" * (len(shares) + 2) + "|",
        ]
        for row in results["rows"]:
            values = [at_share(row["points"], share, figure) for share in shares]
            cells = ["" if value is None else f"{value:.3f}" for value in values]
            lines.append(f"| {row['method']} | {row['rule']} | {' | '.join(cells)} |")
        lines.append("")
    grid = "x".join(map(str, results["grid"]))
    lines += [*equal_time_tables(results, costs()), ""]
    lines.append(
        f"*`{results['model']}`, {grid} tokens, mean of {results['layers']} layers, {results['steps']} steps, and "
        f"{results['prompts']} prompts; {results['environment']['device']}, commit `{results['commit']}`.*"
    )
    return "\n".join(lines)


def rows_of(found: Found) -> list[dict[str, Any]]:
    """The rows of the table; the calls of the first prompt serve only to choose the ratios of single heads."""
    rows = []
    for method in METHODS:
        for rule in (*RULES, BY_HEAD, ORACLE):
            calls = found.get((method, "mean" if rule == BY_HEAD else rule), {})
            counted = {call: figures for call, figures in calls.items() if call[0] > 0}
            if rule == BY_HEAD:
                by_layer: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
                for (prompt, layer, _), figures in calls.items():
                    by_layer[layer][int(prompt > 0)].append(figures)
                figures = [x for calibrated, measured in by_layer.values() for x in by_head(calibrated, measured)]
            else:
                figures = list(counted.values())
            if figures:
                rows.append({"method": method, "rule": rule, "points": points_of(figures)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="foveal/tiny")
    parser.add_argument("--prompts", type=int, default=2, help="how many count")
    parser.add_argument("--steps", type=int, default=3, help="of denoising")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of this tree, for the record; required unless --tables")
    parser.add_argument("--tables", action="store_true", help="only renew the page, from files of results")
    given = parser.parse_args()
    if given.tables:
        file = PAGE.results_of(given.model)
        PAGE.renew(tables(json.loads(file.read_text(encoding="utf-8"))))
        return
    if given.commit is None:
        parser.error("--commit is required to measure")

    device = choose_device(given.device)
    loaded = load_pipeline(given.model, device=device, dtype=choose_dtype("auto", device))
    captions = [next(clip.caption for clip in shipped_clips("train"))]
    captions += dict.fromkeys(clip.caption for clip in shipped_clips("held-out"))
    arguments = GenerationSettings(steps=given.steps).call_arguments(loaded)
    steps, found, grids, layers = arguments["num_inference_steps"], defaultdict(dict), set(), set()

    for prompt, caption in enumerate(captions[: given.prompts + 1]):

        def look(component, layer, progress: Progress, query, key, value, grid, prompt=prompt) -> None:
            grids.add(grid)
            layers.add(layer)
            for name, figures in look_at(query, key, value, grid).items():
                found[name][prompt, layer, progress.step] = figures
            print(f"prompt {prompt}, step {progress.step}, {layer}", flush=True)

        def run(caption=caption, prompt=prompt) -> None:
            generator = torch.Generator().manual_seed(prompt)
            loaded.pipe(prompt=caption, generator=generator, output_type="latent", **arguments)

        watch(loaded.pipe, run, look, steps=range(steps))
    (grid,) = grids
    results = {
        "model": given.model,
        "grid": list(grid.shape),
        "layers": len(layers),
        "steps": steps,
        "prompts": given.prompts,
        "shares": list(SHARES),
        "commit": given.commit,
        "environment": environment(torch.device(device)),
        "rows": rows_of(found),
    }
    PAGE.write_results(given.model, results)
    PAGE.renew(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
