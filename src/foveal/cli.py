"""The `foveal` command."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Demo:
    """Train a small Wan on a real clip, convert it to SLA and VSA, fine-tune, generate, and write a report."""

    video: Path | None = None
    """A video file of your own; the sample clip otherwise."""
    clip: str = "bigbuckbunny"
    """The sample clip: bigbuckbunny or bikes."""
    output: Path = Path("foveal-demo")
    """The folder to write."""
    device: str = "auto"
    """cpu, cuda or auto (a GPU where there is one)."""
    seed: int = 0
    """Of weights, batches and noise."""
    pretrain_steps: int | None = None
    """Dense optimiser steps; the device's default otherwise."""
    fine_tune_steps: int | None = None
    """Optimiser steps after conversion; the device's default otherwise."""

    def run(self) -> None:
        import torch
        from rich.console import Console

        from foveal.demo.run import run_demo
        from foveal.demo.settings import DemoSettings

        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"unknown device {self.device!r}; expected one of ('auto', 'cpu', 'cuda')")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but torch finds no CUDA device")
        chosen = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        steps = {"pretrain_steps": self.pretrain_steps, "fine_tune_steps": self.fine_tune_steps}
        settings = dataclasses.replace(
            DemoSettings.for_device(chosen),
            seed=self.seed,
            **{name: value for name, value in steps.items() if value is not None},
        )
        console = Console(stderr=True)
        results = run_demo(
            settings,
            output=self.output,
            video=self.video,
            clip=self.clip,
            device=torch.device(chosen),
            console=console,
        )
        for verdict in results["expectations"]:
            mark = "as expected" if verdict["met"] else "NOT as expected"
            console.print(f"{mark}: {verdict['expected']} ({verdict['figures']})")
        print(self.output / "index.html")


@dataclass
class Bench:
    """Check attention against the reference, then time it against dense and block-sparse peers on this GPU."""

    quick: bool = False
    """480p alone, fewer repetitions, no FlexAttention, forward and backward apart."""
    shapes: tuple[str, ...] = ()
    """Some of 480p, 720p, paper and d64; all of them otherwise."""
    output: Path = Path("benchmarks/results")
    """The folder to write figures and plot into."""
    only: str | None = None
    """kernels or methods."""
    impl: tuple[str, ...] = ()
    """Implementations of ours to run instead of the default ones."""
    seed: int = 0
    """Of tensors and random selections."""
    device: str = "cuda"
    """cuda, or cpu with a length."""
    length: int | None = None
    """One small shape of so many tokens instead of the named ones."""

    def run(self) -> None:
        from foveal.bench.report import bench
        from foveal.bench.run import BenchSettings

        settings = BenchSettings(
            shapes=self.shapes,
            quick=self.quick,
            only=self.only,
            impls=self.impl,
            seed=self.seed,
            device=self.device,
            length=self.length,
        )
        if bench(settings, self.output):
            raise SystemExit(1)


COMMANDS = {"demo": Demo, "bench": Bench}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; user mistakes end with one line and exit status 2, Ctrl-C with 130."""
    try:
        import tyro
    except ImportError:
        print('foveal: the command line needs more packages: pip install "foveal[demo]"', file=sys.stderr)
        return 2
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="foveal", description="Trainable sparse attention for video transformers.", args=arguments
    )
    try:
        command.run()
    except KeyboardInterrupt:
        print("foveal: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, TypeError, FileNotFoundError, FloatingPointError) as error:
        print(f"foveal: {error}", file=sys.stderr)
        return 2
    return 0
