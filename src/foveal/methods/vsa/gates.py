"""The gates of VSA's branches: what they are made by, and what is checked of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def constant_linear(inputs: int, outputs: int, value: float) -> nn.Linear:
    """A linear layer that gives `value` at the start. nn.Linear's own start would draw from the global generator."""
    device = torch.get_default_device()
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs)
    layer = layer.to_empty(device=device)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, value)
    return layer


def _gate(to_gate: nn.Module, hidden_states: Tensor) -> Tensor:
    """The gate in the dtype of the hidden states, whatever that of its parameters (float32, if only they train)."""
    if torch.is_autocast_enabled(hidden_states.device.type):
        return to_gate(hidden_states)
    return to_gate(hidden_states.to(to_gate.weight.dtype)).to(hidden_states.dtype)


def gates_of(
    to_gates: tuple[nn.Module | None, ...], hidden_states: Tensor, hidden_dim: int, heads: tuple[int, int]
) -> tuple[Tensor | None, ...]:
    """What each of these modules makes of hidden_states [B, L, hidden_dim]: [B, H, L, D], or None for no module.

    heads: H and D.
    """
    if not isinstance(hidden_states, Tensor) or hidden_states.shape[2:] != (hidden_dim,):
        got = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else type(hidden_states).__name__
        raise ValueError(f"hidden_states must have shape [B, L, {hidden_dim}], got {got}")
    return tuple(
        None if to_gate is None else _gate(to_gate, hidden_states).unflatten(-1, heads).transpose(1, 2)
        for to_gate in to_gates
    )


def closed_gate(query: Tensor, given: Tensor | None) -> Tensor:
    """The gate of a method without a coarse branch, zero, like the queries; a ValueError if one was given."""
    if given is not None:
        raise ValueError("gate_coarse was given, but config has coarse=False")
    return query.new_zeros(()).expand_as(query)


def check_gates(query: Tensor, gate_coarse: Tensor | None, gate_fine: Tensor | None) -> None:
    """Raise a ValueError unless gates are like the queries."""
    for name, gate in (("gate_coarse", gate_coarse), ("gate_fine", gate_fine)):
        if gate is not None and (not isinstance(gate, Tensor) or gate.shape != query.shape):
            got = tuple(gate.shape) if isinstance(gate, Tensor) else type(gate).__name__
            raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}, got {got}")
        if gate is not None and gate.device != query.device:
            raise ValueError(f"{name} is on {gate.device}, but query is on {query.device}")
