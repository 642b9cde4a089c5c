"""Checkpoints with the exact names of other projects, made for a tiny Wan."""

import json
import os

import pytest
import torch
from tiny_wan import run, tiny_transformer

from foveal import SLAConfig
from foveal.models.files.checkpoints import load_checkpoint
from foveal.models.processor import sparse_processors

safetensors_torch = pytest.importorskip("safetensors.torch")

LAYERS = 3
# What fits the tiny model: the released weights have blocks of 64 tokens.
SMALL_SLA = {"keep_ratio": 0.3, "block_q": 16, "block_k": 16}
SMALL_VSA = {"keep_ratio": 0.3}
TURBO = SLAConfig(keep_ratio=0.1, drop_ratio=0.0, block_q=64, block_k=64, linear_scope="all")

# Written out, so that the tests do not lean on the conversion that they test.
WAN_BLOCK = {
    **{
        f"{theirs}_attn.{a}": f"{ours}.{b}"
        for theirs, ours in (("self", "attn1"), ("cross", "attn2"))
        for a, b in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
WAN_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


def wan_state(model, flat_patches=True):
    """A dense transformer's weights under the names of the Wan repository."""
    given = model.state_dict()
    modules = WAN_OUTSIDE | {
        f"blocks.{i}.{theirs}": f"blocks.{i}.{ours}"
        for i in range(len(model.blocks))
        for theirs, ours in WAN_BLOCK.items()
    }
    state = {
        f"{theirs}.{part}": given.pop(f"{ours}.{part}")
        for theirs, ours in modules.items()
        for part in ("weight", "bias")
        if f"{ours}.{part}" in given
    }
    state["head.modulation"] = given.pop("scale_shift_table")
    for i in range(len(model.blocks)):
        state[f"blocks.{i}.modulation"] = given.pop(f"blocks.{i}.scale_shift_table")
    assert not given
    if flat_patches:
        state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
    return {name: tensor.clone() for name, tensor in state.items()}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.5


def projections(num_layers=LAYERS, head_dim=16, key="self_attn.attn_op.local_attn.proj_l"):
    return {
        f"blocks.{i}.{key}.{part}": drawn(*shape, seed=i)
        for i in range(num_layers)
        for part, shape in (("weight", (head_dim, head_dim)), ("bias", (head_dim,)))
    }


def gates(num_layers=LAYERS, width=32):
    return {
        f"blocks.{i}.to_gate_compress.{part}": drawn(*shape, seed=i)
        for i in range(num_layers)
        for part, shape in (("weight", (width, width)), ("bias", (width,)))
    }


def write(path, tensors, metadata=None):
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        safetensors_torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def outputs(model, **kwargs):
    with torch.no_grad():
        return run(model, **kwargs)


def trained(**kwargs):
    """A dense model with its own weights, none of them where it starts."""
    model = tiny_transformer(num_layers=LAYERS, seed=3, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(drawn(*parameter.shape, seed=len(name)) * 0.2)
    return model


def fastvideo_folder(folder, state, shards=3):
    folder.mkdir(parents=True)
    names = sorted(state)
    weight_map = {}
    for index in range(shards):
        file = f"diffusion_pytorch_model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[index::shards]}
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def refused(model, path, error, match, **arguments):
    """The load raises, and leaves the model as it was."""
    former = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = count_hooks(model)
    with pytest.raises(error, match=match):
        load_checkpoint(model, path, **arguments)
    state = model.state_dict()
    assert state.keys() == former.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in former.items())
    assert count_hooks(model) == hooks
    assert not sparse_processors(model)


def turbo(folder, change=lambda state: None, name="turbo.pth"):
    state = wan_state(trained()) | projections()
    change(state)
    return write(folder / name, state)


def cut_short(path, bytes_left):
    os.truncate(path, bytes_left)
    return path
