"""The table of `arms.py`: held-out losses, paired by clip and noise level. docs/tables.py prints it too."""

from __future__ import annotations

import statistics


def interval(values: list[float]) -> str:
    """Mean and half-width of its 95 % interval by Student's t, of shares, in %."""
    freedom, normal = len(values) - 1, 1.96
    student = normal + (normal**3 + normal) / (4 * max(1, freedom))
    half = student * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):+.2f} ± {100 * half:.2f}%"


def table(runs: list[dict]) -> str:
    """A Markdown table: an interval is over clips, of their means over the seeds; the last column has every seed.

    Args:
        runs: as `arms.py` writes them, in the order of the rows. An arm is compared with "dense" and with the arm that
            its name begins with, up to the first comma: the same without a branch.
    """
    losses = {(run["arm"], run["seed"]): [statistics.mean(levels) for levels in run["after"]] for run in runs}
    before = {run["arm"]: statistics.mean(run["before"]) for run in runs}
    titles = ("attention", "seeds", "loss before", "after", "against dense", "against no branch", "by seed")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm in before:
        seeds = [seed for name, seed in losses if name == arm]
        mean = statistics.mean(statistics.mean(losses[arm, seed]) for seed in seeds)
        cells = [arm, str(len(seeds)), f"{before[arm]:.4f}", f"{mean:.4f}"]
        for other in ("dense", arm.split(",")[0]):
            shared = [seed for seed in seeds if (other, seed) in losses and other != arm]
            pairs = [zip(losses[arm, seed], losses[other, seed], strict=True) for seed in shared]
            relative = [[mine / theirs - 1 for mine, theirs in pair] for pair in pairs]
            cells.append(interval([statistics.mean(clip) for clip in zip(*relative, strict=True)]) if shared else "")
        cells.append(" / ".join(f"{100 * statistics.mean(clips):+.2f}" for clips in relative))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def levels(runs: list[dict]) -> str:
    """A Markdown table of how much losses differ at each noise level, of the same clips in the same seeds.

    An arm with a branch is compared with the same without one, and one without with "dense"; empty if neither ran.
    """
    losses = {(run["arm"], run["seed"]): run["after"] for run in runs}
    names = [f"{level:g}" for level in runs[0]["levels"]]
    lines = [f"| {' | '.join(('attention', 'against', *names))} |", "|---" * (2 + len(names)) + "|"]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        other = arm.split(",")[0] if "," in arm else "dense"
        seeds = [seed for name, seed in losses if name == arm and (other, seed) in losses and other != arm]
        if not seeds:
            continue
        cells = [arm, other]
        for level in range(len(names)):
            pairs = [zip(losses[arm, seed], losses[other, seed], strict=True) for seed in seeds]
            relative = [[mine[level] / theirs[level] - 1 for mine, theirs in pair] for pair in pairs]
            cells.append(interval([statistics.mean(clip) for clip in zip(*relative, strict=True)]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def quality(runs: list[dict]) -> str:
    """A Markdown table of how far arms are from the dense checkpoint, means over the seeds; empty without videos."""
    runs = [run for run in runs if run.get("videos")]
    sets = all(run.get("frechet") for run in runs)
    titles = ["attention", "velocity error before", "after", "PSNR, dB", "SSIM", "flicker", "the checkpoint's"]
    titles += ["Fréchet distance to real", "the checkpoint's", "to the checkpoint's"] * sets
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"] if runs else []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        errors = (
            statistics.mean(statistics.mean(run["velocity_error"][x]) for run in mine) for x in ("before", "after")
        )
        videos = {name: statistics.mean(run["videos"][name] for run in mine) for name in mine[0]["videos"]}
        cells = [arm, *(f"{100 * error:.1f}%" for error in errors), f"{videos['psnr_db']:.1f}", f"{videos['ssim']:.3f}"]
        cells += [f"{videos[name]:.2f}" for name in ("flicker", "flicker_dense")]
        if sets:
            cells += [
                f"{statistics.mean(run['frechet'][name] for run in mine):.2f}"
                for name in ("real", "dense_to_real", "dense")
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
