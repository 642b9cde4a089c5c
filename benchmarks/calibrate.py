"""Training-free sparsity on a pipeline: calibrates for several errors, and compares each with dense attention.

    python benchmarks/calibrate.py --work WORK --commit COMMIT

It measures once, with the pooled tail and without it, writes a policy for each error, and evaluates each on prompts
that it was not measured on; then the middle one again without the tail. The figures go to
benchmarks/results/calibrate-MODEL.json and into the tables of docs/calibrate.md. WORK keeps the policies and the
videos.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch
from result_page import ResultPage

import foveal
from foveal.lab.calibrate.choose import Choice
from foveal.lab.calibrate.measure import LayerErrors
from foveal.lab.calibrate.run import BUDGETS, CalibrationSettings, measure_pipeline, training_free, write_policy
from foveal.lab.evaluate.run import evaluate
from foveal.lab.generate.run import GenerationSettings, environment
from foveal.lab.generate.sparse import SparseChoice
from foveal.lab.pipelines import LoadedPipeline, choose_device, choose_dtype, load_pipeline
from foveal.methods.base import Config
from foveal.models.files.policy_file import ComponentPolicy, policy_text, read_policy
from foveal.models.shipped import shipped_clips

PAGE = ResultPage.of("calibrate")


def without_tail(policy: Path, output: Path) -> Path:
    """The same policy with no tail, in another file."""
    components = {
        name: ComponentPolicy(
            found.family, {layer: config.replace(tail="none") for layer, config in found.layers.items()}, found.policy
        )
        for name, found in read_policy(policy).items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(policy_text(components), encoding="utf-8")
    return output


def quality(
    loaded: LoadedPipeline, policy: Path, prompts: list[str], seeds: list[int], work: Path, steps: int | None
) -> dict[str, float]:
    """PSNR, SSIM, flicker, and seconds a step of a policy's videos beside the dense ones, over all pairs."""
    settings = GenerationSettings(steps=steps, exact=True)
    choice = SparseChoice(policy=policy)
    report = evaluate(loaded, prompts, seeds, work / "videos", settings, sparse=choice)
    foveal.densify(loaded.pipe)
    pairs = report.pairs
    mean = {name: sum(pair[name] for pair in pairs) / len(pairs) for name in ("psnr_db", "ssim")}
    rows = report.to_dict()["table"]
    arms = {"flicker": rows.get("flicker", {}), "step_seconds": rows["seconds a step"]}
    return mean | {
        f"{name}_{arm}": found[arm]["mean"] for name, found in arms.items() for arm in found if arm != "paired"
    }


def work_of(layers: list[LayerErrors], configs: list[Config], chosen: Choice) -> float:
    """FLOPs of attention over those of dense attention, over all steps and layers, with these configurations."""
    total, calls = 0.0, 0
    for layer, budget in zip(layers, chosen.budgets, strict=True):
        last = 1 + max(step for one in layers for step in one.steps) - chosen.dense_last_steps
        for step in layer.steps:
            sparse = budget is not None and chosen.dense_first_steps <= step < last
            total += layer.work(configs[budget], budget) if sparse else 1
            calls += 1
    return total / calls


def first_budgets(layer: LayerErrors, count: int) -> LayerErrors:
    """What was measured at only the first budgets."""
    steps = {
        step: dataclasses.replace(seen, missed=seen.missed[:count], kept=seen.kept[:count])
        for step, seen in layer.steps.items()
    }
    return dataclasses.replace(layer, steps=steps)


def median_errors(layers: list[LayerErrors]) -> list[float]:
    """The median error over layers and steps, by budget."""
    errors = torch.tensor([seen.layer() for layer in layers for seen in layer.steps.values()])
    return [round(error, 4) for error in errors.median(0).values.tolist()]


def error_table(results: dict) -> str:
    """The lines of the page's table of errors by budget."""
    budgets, errors = results["budgets"], results["median_errors"]
    lines = [
        f"| {results['by']} of each layer | {' | '.join(f'{budget:g}' for budget in budgets)} |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    lines += [f"| tail {tail} | {' | '.join(f'{e:.3f}' for e in found)} |" for tail, found in errors.items()]
    return "\n".join(lines)


def table(results: dict) -> str:
    """The lines of the page's table of videos."""
    lines = [
        "| error allowed | tail | less attention work | dense steps | sparse layers | PSNR, dB | SSIM "
        "| flicker, dense | sparse | seconds a step, dense | sparse |",
        "|---" * 11 + "|",
    ]
    for row in results["rows"]:
        cells = (
            f"{row['error']:g}",
            row["tail"],
            f"{1 / row['work']:.2f}x",
            f"{row['dense_first_steps']} + {row['dense_last_steps']} of {results['steps']}",
            f"{row['sparse_layers']} of {results['layers']}",
            f"{row['psnr_db']:.1f}",
            f"{row['ssim']:.3f}",
            *(f"{row[name]:.2f}" if name in row else "" for name in ("flicker_dense", "flicker_sparse")),
            *(f"{row[name]:.3f}" if name in row else "" for name in ("step_seconds_dense", "step_seconds_sparse")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    size = "x".join(map(str, results["grid"]))
    lines += [
        "",
        f"*`{results['model']}`, {size} tokens, mean of {results['pairs']} pairs with dense attention, calibrated on "
        f"{results['prompts']} other; {results['environment']['device']}, commit `{results['commit']}`.*",
    ]
    return "\n".join(lines)


def tables(results: dict) -> str:
    """What the page shows."""
    return (
        f"The median error of a layer in a step, by how much each layer reads:\n\n{error_table(results)}\n\n"
        f"Videos under the policies:\n\n{table(results)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="foveal/tiny")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--errors", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--by", default="ratio")
    parser.add_argument("--prompts", type=int, default=1, help="how many to measure on")
    parser.add_argument("--pairs", type=int, default=2, help="how many to evaluate on")
    parser.add_argument("--steps", type=int, default=4, help="of denoising")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", required=True, help="of this tree, for the record")
    given = parser.parse_args()

    device = choose_device(given.device)
    loaded = load_pipeline(given.model, device=device, dtype=choose_dtype("auto", device))
    captions = {part: [clip.caption for clip in shipped_clips(part)] for part in ("train", "held-out")}
    prompts, others = (list(dict.fromkeys(captions[part])) for part in ("train", "held-out"))
    prompts, others = prompts[: given.prompts], others[: given.pairs]
    seeds = list(range(100, 100 + -(-given.pairs // len(others))))
    generation = GenerationSettings(steps=given.steps)
    settings = [CalibrationSettings(error, training_free("sla"), given.by) for error in given.errors]
    pooled = settings[0].configs
    plain = [config.replace(tail="none") for config in pooled]
    both = measure_pipeline(loaded, prompts, generation, [*pooled, *plain])
    layers, medians = [first_budgets(layer, len(pooled)) for layer in both], median_errors(both)

    rows, steps = [], generation.call_arguments(loaded)["num_inference_steps"]
    for one in settings:
        folder = given.work / f"policy-{one.error:g}-{one.by}"
        shutil.rmtree(folder, ignore_errors=True)
        facts = {"prompts": prompts, "seed": 0}
        policy, chosen = write_policy(loaded, layers, folder, generation, one, facts)
        arms = {"pooled": policy}
        if one is settings[len(settings) // 2]:
            arms["none"] = without_tail(policy, given.work / f"without-{one.error:g}-{one.by}" / "policy.json")
        for tail, file in arms.items():
            row = {
                "error": one.error,
                "tail": tail,
                "work": work_of(layers, [config.replace(tail=tail) for config in one.configs], chosen),
                "dense_first_steps": chosen.dense_first_steps,
                "dense_last_steps": chosen.dense_last_steps,
                "sparse_layers": sum(budget is not None for budget in chosen.budgets),
                "budgets": list(chosen.budgets),
                "largest_error": chosen.error,
                **quality(loaded, file, others, seeds, given.work, given.steps),
            }
            rows.append(row)
            print(row, flush=True)
    results = {
        "model": given.model,
        "by": given.by,
        "budgets": list(BUDGETS[given.by]),
        "median_errors": {"pooled": medians[: len(pooled)], "none": medians[len(pooled) :]},
        "steps": steps,
        "layers": len(layers),
        "grid": list(layers[0].grid.shape),
        "prompts": len(prompts),
        "pairs": len(others) * len(seeds),
        "commit": given.commit,
        "environment": environment(torch.device(device)),
        "rows": rows,
    }
    PAGE.write_results(given.model, results)
    PAGE.renew(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
