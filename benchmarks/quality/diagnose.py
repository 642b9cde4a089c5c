"""What sparse attention loses in a dense model, and how much of it each kind of global branch could give back.

For every self-attention layer, from the queries, keys and values of held-out windows at several noise levels: the mass
inside the chosen blocks, and for many global branches the share of the sparse output's squared error that is removed,

    removed = 1 - |O - O_dense|^2 / |O_sparse - O_dense|^2,

on other windows than those that branches with weights were fitted on (least squares, one [D, D] matrix and a bias for
a layer's heads together, as SLA's projection, or for each). Shape legend: H heads, M sampled query tokens, R sampled
query blocks, N keys, T key blocks, D head dimension.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from attention import Heads, Regression, block_sizes, pooled_tail_scores, record, token_mask
from pixel_wan import HELD_OUT_SIGMAS
from task import HeldOut, Scale
from torch import Tensor, nn

from foveal.blocks import pick_blocks, pool_blocks, pooled_scores
from foveal.methods.sla.linear import linear_branch

KEEP_RATIOS = (0.05, 0.016)
DROP_RATIO = 0.1
SCOPES = ("marginal", "noncritical", "all")
RECALL_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
CHUNK_BYTES = {"cuda": 2**31, "cpu": 2**28}


def feature_maps(query: Tensor, key: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """phi(Q) and phi(K) by name."""
    maps = {name: tuple(f(x) for x in (query, key)) for name, f in _MAPS.items()}
    centered = (key - key.mean(2, keepdim=True)).clamp(max=30)
    return maps | {"exp of centered keys": (query.softmax(-1), centered.exp())}


_MAPS = {
    "softmax": lambda x: x.softmax(-1),
    "softmax, temperature 0.25": lambda x: (x / 0.25).softmax(-1),
    "softmax, temperature 4": lambda x: (x / 4).softmax(-1),
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": lambda x: x.relu(),
}


class Exact:
    """Dense attention of sampled query blocks, a few at a time, and its mass on every block of keys.

    Attributes:
        output: O_dense [H, M, D].
        mass: [H, M, T], each query's softmax mass on each key block.
        keys: effective number of keys of each query, the exponential of its entropy, [H, M].
        sparse: by keep ratio and ranking ("pooled" as the library ranks, "oracle" by true mass), O_sparse [H, M, D].
        critical, marginal: by keep ratio, of the pooled ranking, bool [H, R, T].
        inside: by keep ratio and ranking, the true mass inside the critical blocks, [H, M].
    """

    def __init__(self, heads: Heads, block: int, rows: Tensor) -> None:
        query, key, value = (x[0].float() for x in heads)
        length, scale = key.shape[1], query.shape[-1] ** -0.5
        blocks = -(-length // block)
        scores = pooled_scores(pool_blocks(heads[0], block), pool_blocks(heads[1], block), scale)
        self.critical, self.marginal = {}, {}
        for keep in KEEP_RATIOS:
            lists, counts, marginal = pick_blocks(scores, keep_ratio=keep, drop_ratio=DROP_RATIO)
            listed = torch.arange(lists.shape[-1], device=query.device) < counts[..., None]
            mask = torch.zeros_like(scores, dtype=torch.bool)
            mask = mask.scatter(-1, lists.long(), listed)  # no list is shorter than its width here
            self.critical[keep], self.marginal[keep] = mask[0][:, rows], marginal[0][:, rows]
        step = max(1, CHUNK_BYTES[query.device.type] // (query.shape[0] * block * length * 4 * 4))
        found = defaultdict(list)
        pad = blocks * block - length
        for first in range(0, len(rows), step):
            chosen = rows[first : first + step]
            tokens = (chosen[:, None] * block + torch.arange(block, device=rows.device)).flatten()
            logits = (query[:, tokens] * scale) @ key.transpose(-1, -2)
            lse = logits.logsumexp(-1, keepdim=True)
            weights = (logits - lse).exp()
            found["output"].append(weights @ value)
            found["keys"].append((lse[..., 0] - (weights * logits).sum(-1)).exp())
            del logits
            mass = torch.nn.functional.pad(weights, (0, pad)).unflatten(-1, (blocks, block)).sum(-1)
            found["mass"].append(mass)
            true = mass.unflatten(1, (-1, block)).mean(2)
            for keep in KEEP_RATIOS:
                pooled = self.critical[keep][:, first : first + step]
                best = torch.zeros_like(pooled).scatter(-1, true.topk(int(pooled[0, 0].sum()), -1).indices, True)
                for ranking, mask in (("pooled", pooled), ("oracle", best)):
                    inside = mask.repeat_interleave(block, 1)
                    kept = (mass * inside).sum(-1)
                    tokens_inside = inside.repeat_interleave(block, 2)[..., :length]
                    sparse = (weights * tokens_inside) @ value / kept.clamp(min=1e-30)[..., None]
                    found["sparse", keep, ranking].append(sparse)
                    found["inside", keep, ranking].append(kept)
        joined = {name: torch.cat(parts, 1) for name, parts in found.items()}
        self.output, self.mass, self.keys = joined["output"], joined["mass"], joined["keys"]
        self.sparse = {name[1:]: x for name, x in joined.items() if name[0] == "sparse"}
        self.inside = {name[1:]: x for name, x in joined.items() if name[0] == "inside"}


def branches(heads: Heads, exact: Exact, keep: float, block: int, rows: Tensor):
    """Yields (name, base, X, constant): a branch is base + X (fixed), or base + a fit on X (where constant is True).

    Base and X are [H, M, D]; X None stands for no features.
    """
    query, key, value = (x.float() for x in heads)
    tokens = (rows[:, None] * block + torch.arange(block, device=rows.device)).flatten()
    query = query[:, :, tokens]
    critical, marginal = exact.critical[keep], exact.marginal[keep]
    sparse, inside = exact.sparse[keep, "pooled"], exact.inside[keep, "pooled"][..., None]
    kept, zero = inside * sparse, torch.zeros_like(sparse)
    unread = token_mask(~critical[None], block, query.shape[2])[0]
    sizes = block_sizes(key.shape[2], block, key)
    means = pool_blocks(value, block)[0]

    yield "bias alone", sparse, None, True
    uniform = unread * sizes
    uniform = uniform / uniform.sum(-1, keepdim=True)
    mean = uniform @ means
    yield "mean V of unread blocks, fitted", sparse, mean, True
    yield "a O_s + (1-a) mean V of unread blocks", kept, (1 - inside) * mean, False
    for name, (phi_query, phi_key) in feature_maps(query, key).items():
        for scope in SCOPES:
            mask = {"marginal": marginal[None], "noncritical": ~critical[None], "all": None}[scope]
            linear = linear_branch(phi_query, phi_key, value, mask, block, block)[0]
            title = f"{name}, {scope}"
            yield f"{title}: fitted (SLA)", sparse, linear, True
            yield f"{title}: O_s + O_l", sparse, linear, False
            yield f"{title}: fitted on (1-a) O_l", sparse, (1 - inside) * linear, True
            yield f"{title}: a O_s + (1-a) O_l", kept, (1 - inside) * linear, False
            yield f"{title}: a O_s + fit on (1-a) O_l (SLA2)", kept, (1 - inside) * linear, True
            if (name, scope) == ("softmax", "marginal"):
                yield f"{title}, in bfloat16: fitted (SLA)", sparse, linear.bfloat16().float(), True
                yield f"{title}, without its mean: fitted (SLA)", sparse, linear - linear.mean(1, keepdim=True), True

    pooled_query = pool_blocks(heads[0], block)[:, :, rows]
    scores = pooled_scores(pooled_query, pool_blocks(heads[1], block), key.shape[-1] ** -0.5)
    coarse = token_mask(scores.softmax(-1), block, query.shape[2])[0] @ means
    yield "coarse output of VSA: fitted", sparse, coarse, True
    yield "coarse output of VSA: added", sparse, coarse, False

    exact_mass = _log_mass(query[0], heads[1][0], exact, block, tokens)
    tails = {
        "tail of mean keys, query's block": token_mask(scores + sizes.log(), block, query.shape[2])[0],
        "tail of mean keys": pooled_tail_scores(query, key, block)[0],
        "tail of mean keys and variances": pooled_tail_scores(query, key, block, variance=True)[0],
        "tail of true block masses": exact_mass,
    }
    log_read = exact_mass.masked_fill(unread, -math.inf).logsumexp(-1)
    for name, log_mass in tails.items():
        log_mass = log_mass.masked_fill(~unread, -math.inf)
        total = log_mass.logsumexp(-1)
        tail = (log_mass - total[..., None]).exp() @ means
        share = (log_read - total).sigmoid()[..., None]
        yield f"{name}: merged", share * sparse, (1 - share) * tail, False
        yield f"{name}: merged by the true mass", kept, (1 - inside) * tail, False
        yield f"{name}: fitted", sparse, tail, True
        yield f"{name}: a O_s + fit on (1-a) tail", kept, (1 - inside) * tail, True
    yield "nothing, a O_s", kept, zero, False


def _log_mass(query: Tensor, key: Tensor, exact: Exact, block: int, tokens: Tensor) -> Tensor:
    """log sum exp(q.k) of each key block, [H, M, T]: the true masses, and the whole from the largest of them."""
    scale = query.shape[-1] ** -0.5
    best = exact.mass.argmax(-1)
    place = (best[..., None] * block + torch.arange(block, device=key.device)).clamp(max=key.shape[1] - 1)
    valid = best[..., None] * block + torch.arange(block, device=key.device) < key.shape[1]
    whole = torch.empty_like(exact.keys)
    for head in range(len(query)):  # one head at a time: [M, block, D] of keys
        logits = torch.einsum("md,mkd->mk", query[head] * scale, key[head].float()[place[head]])
        logits = logits.masked_fill(~valid[head], -math.inf)
        whole[head] = logits.logsumexp(-1) - exact.mass[head].amax(-1).log()
    return exact.mass.clamp(min=1e-37).log() + whole[..., None]


@torch.no_grad()
def diagnose(model: nn.Module, held_out: HeldOut, scale: Scale, *, row_step: int = 1, levels=HELD_OUT_SIGMAS) -> dict:
    """The figures, JSON-ready.

    The first half of the windows are fitted on, the second half tested on; each is taken at two noise levels, such that
    each half meets every level equally often.

    Args:
        held_out: whose windows to take: all of them.
        row_step: take every n-th query block.
    """
    windows, block = len(held_out.video), scale.block
    fits: list[dict] = [defaultdict(Regression) for _ in range(len(model.blocks))]
    tests: list[dict] = [defaultdict(lambda: defaultdict(Regression)) for _ in fits]
    fixed: list[dict] = [defaultdict(lambda: defaultdict(float)) for _ in fits]
    facts: list[dict] = [defaultdict(list) for _ in fits]
    for window in range(windows):
        testing = window >= windows // 2
        for sigma in {levels[(window + shift) % len(levels)] for shift in (0, len(levels) // 2)}:
            noisy, _, sigmas, given = held_out.noisy(slice(window, window + 1), sigma)
            for layer, heads in enumerate(record(model, noisy, sigmas, given, block)):
                full = heads[0].shape[2] // block  # a partial last block of queries is left out
                rows = torch.arange(0, full, row_step, device=noisy.device)
                exact = Exact(heads, block, rows)
                if testing:
                    _add_facts(facts[layer], exact)
                for keep in KEEP_RATIOS:
                    for name, base, x, fitted in branches(heads, exact, keep, block, rows):
                        target = exact.output - base
                        if fitted and testing:
                            tests[layer][keep, name][sigma].add(x, target)
                        elif fitted:
                            fits[layer][keep, name].add(x, target)
                        elif testing:
                            left = (target - x).double().square().sum((1, 2))
                            fixed[layer][keep, name][sigma] = fixed[layer][keep, name][sigma] + left
                    if testing:
                        for name, x in (("sparse", exact.sparse[keep, "pooled"]), ("dense", torch.zeros_like(base))):
                            left = (exact.output - x).double().square().sum((1, 2))
                            fixed[layer][keep, name][sigma] = fixed[layer][keep, name][sigma] + left
    return _report(fits, tests, fixed, facts, {"windows": windows, "row_step": row_step, "levels": list(levels)})


def _add_facts(facts: dict, exact: Exact) -> None:
    probabilities = torch.tensor(RECALL_QUANTILES, device=exact.keys.device)
    facts["effective keys"].append(exact.keys.mean())
    facts["effective keys by head"].append(exact.keys.mean(1))
    best = exact.mass.topk(min(max(RANKS), exact.mass.shape[-1]), -1).values.cumsum(-1).mean((0, 1))
    facts["mass of a query's n best blocks"].append(torch.stack([best[min(n, len(best)) - 1] for n in RANKS]))
    for (keep, ranking), inside in exact.inside.items():
        title = f"keep {keep}, {ranking}"
        facts[f"{title}: mass inside"].append(inside.mean())
        facts[f"{title}: mass inside by head"].append(inside.mean(1))
        some = inside.flatten()[:: max(1, inside.numel() // 2**20)]
        facts[f"{title}: quantiles of the mass inside"].append(some.quantile(probabilities))
        error = (exact.sparse[keep, ranking] - exact.output).norm() / exact.output.norm()
        facts[f"{title}: relative error of O_s"].append(error)


def _report(fits: list, tests: list, fixed: list, facts: list, settings: dict) -> dict:
    """Sums of squares to shares removed, by layer and for all layers together, over all levels and by level."""
    layers, totals = [], defaultdict(lambda: defaultdict(float))
    for layer in range(len(fits)):
        left: dict = {key: dict(by_level) for key, by_level in fixed[layer].items()}
        norms = {}
        for (keep, name), regression in fits[layer].items():
            for shared, title in ((True, name), (False, f"{name}, by head")):
                weights = regression.solve(shared=shared)
                by_level = tests[layer][keep, name].items()
                left[keep, title] = {sigma: test.squared_error(weights) for sigma, test in by_level}
                norms[keep, title] = weights[..., :-1, :].norm().item()
        for key, by_level in left.items():
            for sigma, squares in by_level.items():
                totals[key][sigma] += squares.sum().item()
        layers.append(
            {
                "facts": {name: torch.stack(found).mean(0).tolist() for name, found in facts[layer].items()},
                "removed": _removed({key: {s: x.sum().item() for s, x in v.items()} for key, v in left.items()}),
                "norm of the fitted matrix": {f"keep {keep}: {name}": x for (keep, name), x in norms.items()},
            }
        )
    names = {"quantiles": RECALL_QUANTILES, "ranks": RANKS, "keep_ratios": KEEP_RATIOS, "drop_ratio": DROP_RATIO}
    return {"settings": settings | names, "all layers": _removed(totals), "layers": layers}


def _removed(left: dict) -> dict:
    """By keep ratio and name: relative error of the output, and shares removed, over all levels and for each."""
    result: dict = {}
    for (keep, name), by_level in left.items():
        sparse, dense = left[keep, "sparse"], left[keep, "dense"]
        if name == "dense":
            continue
        result.setdefault(f"keep {keep}", {})[name] = {
            "error": (sum(by_level.values()) / sum(dense.values())) ** 0.5,
            "removed": 1 - sum(by_level.values()) / sum(sparse.values()),
            "by level": {str(sigma): 1 - x / sparse[sigma] for sigma, x in sorted(by_level.items())},
        }
    return result


def table(report: dict) -> str:
    """The branches that heads share, in order of what they remove over all layers, for people."""
    lines = []
    for layer, found in enumerate(report["layers"]):
        facts = found["facts"]
        parts = [f"layer {layer}: {facts['effective keys']:.0f} effective keys"]
        for keep in KEEP_RATIOS:
            inside, best = (facts[f"keep {keep}, {ranking}: mass inside"] for ranking in ("pooled", "oracle"))
            error = facts[f"keep {keep}, pooled: relative error of O_s"]
            parts.append(f"keep {keep}: mass {inside:.3f} (oracle {best:.3f}), error {error:.3f}")
        lines.append("; ".join(parts))
    for keep, branches_found in report["all layers"].items():
        lines.append(f"\n{keep}: share of the squared error removed, all layers | by noise level | relative error")
        for name, found in sorted(branches_found.items(), key=lambda item: -item[1]["removed"]):
            levels = " ".join(f"{x:+.3f}" for x in found["by level"].values())
            if not name.endswith("by head"):
                lines.append(f"{found['removed']:+.4f} | {levels} | {found['error']:.4f} | {name}")
    return "\n".join(lines)
