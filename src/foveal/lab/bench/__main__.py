"""`python -m foveal.lab.bench`: the command `foveal bench` where tyro and rich are not installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from foveal.kernels.api import IMPLS
from foveal.lab.bench.report import bench
from foveal.lab.bench.run import BenchSettings
from foveal.lab.bench.shapes import SHAPE_SETS, SHAPES


def main(arguments: list[str] | None = None) -> int:
    """0 if all went well, 1 if a candidate of ours failed, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m foveal.lab.bench", description="Check and time attention.")
    parser.add_argument("--quick", action="store_true", help="only 480p, fewer repetitions, no FlexAttention")
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="NAME", help=f"some of {', '.join((*SHAPES, *SHAPE_SETS))}"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="the folder to write into")
    parser.add_argument("--only", help="kernels or methods")
    parser.add_argument("--names", nargs="+", default=[], metavar="PART", help="only what has one of these in its name")
    parser.add_argument("--impl", nargs="+", default=[], metavar="NAME", help=f"some of {', '.join(IMPLS)}")
    parser.add_argument("--seed", type=int, default=0, help="of tensors and random selections")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with a --length")
    parser.add_argument("--length", type=int, help="one small shape of so many tokens instead")
    parser.add_argument("--commit", help="of this tree, for the record, where git cannot say")
    options = parser.parse_args(arguments)
    try:
        settings = BenchSettings(
            shapes=tuple(options.shapes),
            quick=options.quick,
            only=options.only,
            names=tuple(options.names),
            impls=tuple(options.impl),
            seed=options.seed,
            device=options.device,
            length=options.length,
            commit=options.commit,
        )
        return min(1, bench(settings, options.output))
    except (ValueError, OSError) as error:
        print(f"foveal bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
