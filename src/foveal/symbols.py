"""Arithmetic of sizes that a compiled graph may hold as symbols, so that it takes any of them."""

from __future__ import annotations

import torch


def ceil_div(size: int, part: int) -> int:
    """How many parts of this size it takes. A symbol's `-(-size // part)` fails: PyTorch asserts on its remainder."""
    return (size + part - 1) // part


def larger(a: int, b: int) -> int:
    """max(a, b), and of symbols without asking which of them it is."""
    return max(a, b) if type(a) is type(b) is int else torch.sym_max(a, b)


def smaller(a: int, b: int) -> int:
    """min(a, b), and of symbols without asking which of them it is."""
    return min(a, b) if type(a) is type(b) is int else torch.sym_min(a, b)
