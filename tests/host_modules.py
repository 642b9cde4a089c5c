"""Modules with the public signatures of fastvideo-kernel 0.3.5 and TurboDiffusion 1.0.0, whose functions cannot run.

They stand in for the hosts, which need Triton, and fastvideo-kernel a GPU, when they are imported. `test_hosts.py`
compares these signatures with those of the installed packages, where there are any.
"""

import types

import torch
from torch import nn
from torch.nn import functional


def fastvideo_modules():
    """{name: module}: the package, its submodule, and a model's module that imported from the package by name."""
    ops = types.ModuleType("fastvideo_kernel.ops")
    exec(
        """
def video_sparse_attn(q, k, v, variable_block_sizes, q_variable_block_sizes, topk, block_size=64,
                      compress_attn_weight=None):
    raise AssertionError("the host's own function ran")

def block_sparse_attn_from_indices(q, k, v, q2k_idx, q2k_num, variable_block_sizes):
    raise AssertionError("the host's own function ran")
""",
        ops.__dict__,
    )
    package, user = types.ModuleType("fastvideo_kernel"), types.ModuleType("model_of_fastvideo")
    for module in (package, user):
        module.video_sparse_attn = ops.video_sparse_attn
        module.block_sparse_attn_from_indices = ops.block_sparse_attn_from_indices
    return {module.__name__: module for module in (package, ops, user)}


class HostSLA(nn.Module):
    """The attributes and the signatures of TurboDiffusion's `SparseLinearAttention`."""

    def __init__(self, head_dim, topk, feature_map="softmax", BLKQ=64, BLKK=64, use_bf16=True, tie_feature_map_qk=True):
        super().__init__()

        def softmax_feature_map(x):
            return functional.softmax(x, dim=-1)

        def elu_feature_map(x):
            return functional.elu(x) + 1

        maps = {"softmax": softmax_feature_map, "elu": elu_feature_map, "relu": nn.ReLU()}
        self.feature_map_q = self.feature_map_k = maps[feature_map]
        self.dtype = torch.bfloat16 if use_bf16 else torch.float16
        self.topk, self.BLKQ, self.BLKK = topk, BLKQ, BLKK
        self.proj_l = nn.Linear(head_dim, head_dim, dtype=torch.float32)

    def forward(self, q, k, v, return_sparsity=False):
        raise AssertionError("the host's own function ran")


def turbodiffusion_modules():
    """{name: module}: the package `SLA`."""
    package = types.ModuleType("SLA")
    package.__path__ = ["nowhere"]
    # A class of its own for each test, since a patch changes it.
    package.SparseLinearAttention = type("SparseLinearAttention", (HostSLA,), {"forward": HostSLA.forward})
    return {"SLA": package}
