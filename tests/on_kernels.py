"""The kernels' operators by the arguments that tests have: tensors, configurations, and a backend's name."""

import pytest
import torch

from foveal.kernels import sparse
from foveal.kernels.api import why_not
from foveal.methods.sla import gpu as sla
from foveal.methods.sla2 import gpu as sla2
from foveal.methods.sla2.mixing import block_logits, start_logits
from foveal.methods.vsa import gpu as vsa
from foveal.rules import Choosing
from foveal.rules import selection_rule as rule_over


def block_sparse_attention_gpu(query, key, value, selection, scale, backend):
    options = sparse.SparseOptions(scale, backend)
    return sparse.block_sparse_attention_gpu(sparse.SparseCall(query, key, value, selection), options)


def sla_attention_gpu(query, key, value, config, choice, scale, weight, bias, backend):
    options = sla.SLAOptions(scale, config.feature_map, config.linear_scope, backend)
    return sla.sla_attention_gpu(sla.SLACall(query, key, value, weight, bias, choice), options)[0]


def linear_branch_gpu(query, key, value, config, selection, scale, weight, bias, backend):
    options = sla.SLAOptions(scale, config.feature_map, config.linear_scope, backend)
    return sla.linear_branch_gpu(sla.SLACall(query, key, value, weight, bias, selection), options)


def sla2_attention_gpu(query, key, value, choice, scale, feature_map, backend):
    """With a router and log-odds of alpha as they start; the router is trained if the inputs are."""
    eye, rows = torch.eye(query.shape[3]), -(-query.shape[2] // choice.block_q)
    logits = block_logits(start_logits(query.shape[1], 1, 0.9), rows)
    router = (eye, eye, None, None) if query.requires_grad else (None, None, eye, eye)
    call = sla2.SLA2Call(query, key, value, logits, *router, None, choice)
    return sla2.sla2_attention_gpu(call, sla2.SLA2Options(scale, 0.1, feature_map, backend))[0]


def vsa_attention_gpu(query, key, value, layout, selection, scale, gate_coarse, gate_fine, backend):
    gates, choice = (gate_coarse, gate_fine), vsa.choice_of(layout, selection)
    call = vsa.VSACall(query, key, value, *gates, None, None, layout.cubes(), choice)
    return vsa.vsa_attention_gpu(call, vsa.VSAOptions(scale, 1.0, backend))[0]


def skip_without(impl, *arguments):
    """Skips the test that runs where an implementation does not take such a call, for the reason that it gives."""
    reason = why_not(impl, *arguments)
    if reason is not None:
        pytest.skip(reason)


LIMITS = "kv_lengths", "protected_keys", "protected_queries"


def selection_rule(query, key, *, block_q, block_k, **options):
    """The rule of `select_blocks` for these options."""
    limits = {name: options.pop(name) for name in LIMITS if name in options}
    return rule_over(query, key, (block_q, block_k), Choosing(**options), **limits)
