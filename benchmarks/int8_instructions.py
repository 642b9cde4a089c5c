"""Counts the instructions of a tile of block-sparse attention in bfloat16 and in int8, and predicts what int8 gains.

    PYTHONPATH=src python benchmarks/int8_instructions.py benchmarks/results/int8-instructions.json

No GPU is needed: Triton compiles the kernels for chips that are not there, and their machine code is read. A tile is
one pass of the main loop, 64 queries by 64 keys with a head dimension of 128. Counts are those of one warp, of four.

The prediction is no measurement. It assumes that tensor cores run at their published rates and bound the loop, which
holds where a warp's other instructions take fewer cycles than its products; both are in the result. Quantization
adds what its passes move, at the published bandwidth of the memory.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from pathlib import Path

import pytest
import triton

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import launched_calls
from launched_kernels import compiled, figures, machine_code, noted_launches, product_loops

TILE, HEAD_DIM, WARPS = 64, 128, 4
BACKENDS = {"bf16": "triton", "int8": launched_calls.INT8}
# NVIDIA's whitepapers: dense tensor TFLOP/s (bfloat16 with sums in float32) and TOP/s (int8), GB/s, SMs, boost GHz.
CARDS = {
    "sm_89": {"card": "RTX 4090", "bf16": 165.2, "int8": 660.6, "bandwidth": 1008, "sms": 128, "clock": 2.52},
    "sm_120": {"card": "RTX 5090", "bf16": 209.5, "int8": 838.0, "bandwidth": 1792, "sms": 170, "clock": 2.407},
}
# Operations of one warp's instruction: m16n8k16 and m16n8k32.
PRODUCTS = {"bf16": (r"HMMA\.16816", 2 * 16 * 8 * 16), "int8": (r"IMMA\.16832", 2 * 16 * 8 * 32)}
KINDS = {
    "bf16 products": PRODUCTS["bf16"][0],
    "int8 products": PRODUCTS["int8"][0],
    "loads from shared memory": r"LDSM|LDS\b",
    "copies to shared memory": r"LDGSTS|UBLKCP|UTMALDG",
    "integer to float": r"I2F",
    "float to bf16": r"F2F",
    "exponentials": r"MUFU\.EX2",
    "float32 arithmetic": r"FFMA|FADD|FMUL|FMNMX",
}
# What is timed on GPUs: 480p, 12 heads, every eighth key block.
LENGTH, HEADS, KEEP = 32760, 12, 0.125


def counts(chip: str, backend: str) -> dict[str, int]:
    """Instructions of one warp in a pass of the main loop, by kind, and what the kernel takes."""
    with pytest.MonkeyPatch.context() as monkeypatch, noted_launches(monkeypatch, chip) as launched:
        launched_calls.sparse(HEAD_DIM, TILE, TILE, launched_calls.BF16, False, backend=backend)
    (one,) = (x for x in launched.values() if x.name == "_block_sparse_fwd_kernel")
    assert one.options.num_warps == WARPS
    binary = compiled(one)
    instructions, loops = product_loops(machine_code(binary))
    first, last = min(loops)  # the loop over full tiles; that over tiles with padding follows
    names = [re.sub(r"^@!?U?P\d+\s+", "", text).split()[0] for at, text in instructions if first <= at <= last]
    found = collections.Counter()
    for name in names:
        kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), "others")
        found[kind] += 1
    made = figures(binary)
    facts = {"registers": made.registers, "shared_memory": made.shared, "loop_spills": made.loop_spills}
    return {"all": len(names), **{kind: found[kind] for kind in (*KINDS, "others")}, **facts}


def predicted(chip: str, found: dict[str, dict[str, int]]) -> dict[str, float]:
    """Cycles of one warp a tile, and how many times faster int8 is: the loop, and the call with its quantization."""
    card = CARDS[chip]
    per_cycle = {kind: card[kind] * 1e3 / (card["sms"] * card["clock"] * 4) for kind in PRODUCTS}  # of a scheduler
    cycles = {}
    for name, counted in found.items():
        cycles[name] = sum(counted[f"{kind} products"] * PRODUCTS[kind][1] / per_cycle[kind] for kind in PRODUCTS)
    loop = cycles["bf16"] / cycles["int8"]
    milliseconds = 4 * HEADS * LENGTH**2 * KEEP * HEAD_DIM / card["bf16"] * 1e-9
    moved = HEADS * LENGTH * HEAD_DIM * (2 + 2 + 1)  # to pool K, to read it again, and to write it in int8
    quantization = moved / card["bandwidth"] * 1e-6
    return {
        "product_cycles_bf16": cycles["bf16"],
        "product_cycles_int8": cycles["int8"],
        "loop": loop,
        "bf16_ms": milliseconds,
        "quantization_ms": quantization,
        "call": milliseconds / (milliseconds / loop + quantization),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the JSON goes")
    result = {"triton": triton.__version__, "tile": [TILE, TILE, HEAD_DIM], "shape": [HEADS, LENGTH, KEEP], "chips": {}}
    for chip, card in CARDS.items():
        found = {name: counts(chip, backend) for name, backend in BACKENDS.items()}
        result["chips"][chip] = card | {"counts": found, "predicted": predicted(chip, found)}
    parser.parse_args().file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
