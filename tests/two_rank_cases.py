"""What `test_context_parallel.py` and `test_fsdp.py` run in two processes, each case compared with one process.

    python tests/two_rank_cases.py RANK RENDEZVOUS RESULTS CASE...

Both ranks run the cases in the order given, and write {case: None or a traceback} to RESULTS as JSON.
"""

import contextlib
import copy
import datetime
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tiny_wan import SPARSE_SLA, inputs, randomize, tiny_transformer
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import foveal
from foveal import SLA2Config, VideoGrid, VSAConfig
from foveal.methods.base import method_of
from foveal.methods.sla.attention import Projection
from foveal.models.context_parallel import Shards, context_parallel_attention
from foveal.testing import make_inputs

RANKS = 2
CONFIGS = {
    "sla": SPARSE_SLA,
    "sla2": SLA2Config(keep_ratio=0.4, block_q=8, block_k=8, router="per_head", alpha_rows=2),
    "sla tile": SPARSE_SLA.replace(token_order="tile", feature_map="hedgehog"),
    "vsa router": VSAConfig(keep_ratio=0.3, tile=(2, 2, 4), router="per_head"),
    "vsa": VSAConfig(keep_ratio=0.3, tile=(2, 2, 4), fine_gate=True),
}
# 48 tokens divide between the ranks, 105 do not.
EVEN, ODD = {"latent": (2, 8, 12)}, {"latent": (3, 10, 14)}


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-4, "atol": 2e-5} | tolerances)


def run(model, **fed):
    # Under its hooks for context parallelism, diffusers cannot return a dictionary.
    return model(**fed, return_dict=False)[0]


def summed(gradient):
    """A parameter's gradient from all ranks; none counts as zero where another rank has one."""
    total = gradient.clone()
    dist.all_reduce(total)
    return total


def parallel(model, **settings):
    from diffusers import ContextParallelConfig

    # Without an accelerator diffusers counts no devices, and divides by that.
    torch.accelerator.device_count = lambda: RANKS
    model.enable_parallelism(config=ContextParallelConfig(**{"ulysses_degree": RANKS} | settings))
    return model


def backward(model, fed):
    """Output and gradients by name of a loss that sees every value of it."""
    output = run(model, **fed)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def raises(match, function, error=ValueError):
    with pytest.raises(error, match=match):
        function()


# The exchange


def exchange_is_a_permutation():
    """Rows arrive where they belong, with and without text and in uneven shards, and gradients go the same way back."""
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(1)
    for length, text in ((6, 0), (7, 0), (6, 3)):
        shards = Shards(dist.group.WORLD, uneven=length % RANKS > 0)
        sizes = shards.sizes(length)
        whole = torch.randn(2, 4, length + text * RANKS, 3, dtype=torch.float64, generator=generator)
        video, texts = whole[:, :, :length].split(sizes, 2), whole[:, :, length:].split(text or 1, 2)
        local = torch.cat((video[rank], texts[rank]), 2) if text else video[rank]
        local = local.clone().requires_grad_()
        heads = shards.receive(shards.send(local, length, text), length, text)
        assert torch.equal(heads, whole.chunk(RANKS, 1)[rank])
        assert torch.equal(shards.to_tokens(heads[:, :, :length], sizes), video[rank])
        if text:
            assert torch.equal(shards.to_tokens(heads[:, :, length:], [text] * RANKS), texts[rank])
        (gradient,) = torch.autograd.grad((heads * whole.chunk(RANKS, 1)[rank]).sum(), local)
        assert torch.equal(gradient, local.detach())
    with torch.no_grad():
        raises("3 heads do not divide among 2 ranks", lambda: shards.send(whole[:, :3, :3], 6))
        raises("must hold 3 of the video's 6 tokens", lambda: shards.send(whole, 6))
        raises("5 tokens do not divide among 2 ranks", lambda: shards.send(whole, 5))
        raises("even shards", lambda: Shards(dist.group.WORLD, uneven=True).send(whole[:, :, :4], 6, 1))


def own_modules(name, **fields):
    """`context_parallel_attention` on shards of 105 tokens: outputs, gradients of the inputs and of the parameters."""
    config, grid, rank = CONFIGS[name].replace(**fields), VideoGrid(3, 5, 7), dist.get_rank()
    torch.manual_seed(0)
    module = method_of(config).build(config, 24, 4, 8, "auto").double()
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.5)
    query, key, value = make_inputs(batch=2, heads=4, query_length=105, head_dim=8, dtype=torch.float64)
    hidden = torch.randn(2, 105, 24, dtype=torch.float64)
    weights = torch.randn(query.shape, dtype=torch.float64)
    gated = isinstance(config, VSAConfig)

    wholes = [x.clone().requires_grad_() for x in (query, key, value, hidden)][: 4 if gated else 3]
    output = module(*wholes, grid=grid)
    parameters = list(module.parameters())
    expected = torch.autograd.grad((output * weights).sum(), wholes + parameters)

    part = slice(0, 53) if rank == 0 else slice(53, 105)
    locals_ = [x.detach()[..., part, :].clone().requires_grad_() for x in wholes]
    local = context_parallel_attention(module, *locals_, grid=grid)
    close(local, output[:, :, part].detach(), rtol=1e-9, atol=1e-11)
    gradients = torch.autograd.grad((local * weights[:, :, part]).sum(), locals_ + parameters)
    for ours, theirs in zip(gradients[: len(wholes)], expected, strict=False):
        close(ours, theirs[..., part, :], rtol=1e-8, atol=1e-10)
    for ours, theirs in zip(gradients[len(wholes) :], expected[len(wholes) :], strict=True):
        assert theirs.abs().max() > 1e-3
        close(summed(ours), theirs, rtol=1e-8, atol=1e-10)


# Under diffusers


def gather_uneven(tensor, dim, group):
    """What diffusers gathers with NCCL; gloo takes only equal shapes."""
    sizes = [torch.tensor(0) for _ in range(RANKS)]
    dist.all_gather(sizes, torch.tensor(tensor.shape[dim]))
    padded = tensor.new_zeros((*tensor.shape[:dim], max(sizes), *tensor.shape[dim + 1 :]))
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in range(RANKS)]
    dist.all_gather(parts, padded)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)


def wan(name, *, latent, checkpointing=False, sparse_first=True, ratios=None, **settings):
    """Wan under `enable_parallelism`: output and the gradients of all parameters."""
    fed, config = inputs(**latent), CONFIGS[name] if ratios is None else CONFIGS[name].replace(keep_ratio=ratios)
    single, model = (tiny_transformer() for _ in range(2))
    foveal.sparsify(single, config)
    if sparse_first:
        foveal.sparsify(model, config)
        parallel(model, **settings)
    else:
        parallel(model, **settings)
        foveal.sparsify(model, config)
    randomize(single)
    randomize(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    output, gradients = backward(model, fed)
    expected, theirs = backward(single, fed)
    close(output, expected)
    assert gradients.keys() == theirs.keys()
    assert any(".processor." in name for name in gradients)
    for key, gradient in gradients.items():
        close(summed(gradient), theirs[key])
    return single, model, fed


def wan_uneven():
    from diffusers.hooks import context_parallel

    context_parallel._all_gather_anything = gather_uneven
    wan("vsa", latent=ODD, ulysses_anything=True)


def wan_dense_again():
    """`dense` and `densify` fall back on diffusers' own exchange, and `dense` holds through a recomputation."""
    single, model, fed = wan("vsa", latent=EVEN, checkpointing=True, sparse_first=False)
    with torch.no_grad(), foveal.dense(single):
        expected = run(single, **fed)
    assert (run(single, **fed) - expected).abs().max() > 1e-3
    with foveal.dense(model):
        output = run(model, **fed)
    close(output.detach(), expected)
    model.zero_grad()
    output.sum().backward()
    with torch.no_grad():
        close(run(foveal.densify(model), **fed), expected)


def wan_compiled(name):
    """The exchange is in the graph of a block, forward and backward."""
    single, model = (foveal.sparsify(tiny_transformer(num_layers=1), CONFIGS[name]) for _ in range(2))
    randomize(single)
    randomize(model)
    fed = inputs(**EVEN)
    with torch.no_grad():
        run(parallel(model), **fed)  # diffusers' hook on the first block looks up its parameters, which no graph holds
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    (output, ours), (expected, theirs) = backward(model, fed), backward(single, fed)
    close(output, expected)
    for key, gradient in ours.items():
        close(summed(gradient), theirs[key.replace("._orig_mod", "")])


def wan_travels():
    """Query, key, value and both gates are all on their way before the first is waited for; so are their gradients."""
    from foveal.models import context_parallel

    log = []

    def noted(name):
        original = getattr(context_parallel, name)

        def wrapper(*args):
            log.append(name)
            return original(*args)

        return mock.patch.object(context_parallel, name, wrapper)

    model = parallel(foveal.sparsify(tiny_transformer(num_layers=1), CONFIGS["vsa"]))
    there, back = 5 * ["_start"] + 5 * ["_wait"], ["_start", "_wait"]
    with noted("_start"), noted("_wait"):
        output = run(model, **inputs(**EVEN))
        assert log == there + back
        log.clear()
        output.sum().backward()
        assert log == back + there
        # Anomaly mode reads gradients between two steps of the backward.
        output = run(model, **inputs(**EVEN))
        log.clear()
        with torch.autograd.set_detect_anomaly(True):
            output.sum().backward()
        assert log == 6 * back


def wan_travels_compiled():
    """In Inductor's code, too, value, query and key leave before the next one's projection is made."""
    from torch._inductor.utils import run_and_get_code

    model, fed = parallel(foveal.sparsify(tiny_transformer(num_layers=1), SPARSE_SLA)), inputs(**EVEN)
    with torch.no_grad():
        expected = run(model, **fed)
        model.compile_repeated_blocks(fullgraph=True)
        output, (code,) = run_and_get_code(run, model, **fed)
    close(output, expected)
    steps = re.findall(r"= torch.ops._c10d_functional.(all_to_all)_single.default\(|extern_kernels.(addmm)\(", code)
    assert ["".join(step) for step in steps[:6]] == 3 * ["addmm", "all_to_all"]


def wan_policy():
    """A policy sees the whole timesteps and holds its layers dense on every rank."""
    fed = inputs(**EVEN)
    models = foveal.sparsify(tiny_transformer(), SPARSE_SLA), parallel(foveal.sparsify(tiny_transformer(), SPARSE_SLA))
    outputs = []
    for model in models:
        randomize(model)
        foveal.set_policy(model, foveal.Policy(dense_layers=[0], keep_ratio={0: 0.6}))
        with torch.no_grad():
            outputs.append(run(model, **fed))
    close(outputs[1], outputs[0])


def wan_mistakes():
    three = parallel(foveal.sparsify(tiny_transformer(num_attention_heads=3), SPARSE_SLA))
    raises("3 heads do not divide among 2 ranks", lambda: run(three, **inputs(**EVEN)))


def family(name):
    """Flux, with text in the same sequence: outputs, gradients of the sparse parameters. LTX-Video: outputs.

    diffusers' exchange of LTX-Video's cross-attention takes no mask, and has no backward.
    """
    if name == "flux":
        from test_flux import TestFlux as Checks

        Checks.TEXT = 8
        fed = Checks().inputs()
    else:
        from test_ltx_video import TestLTXVideo as Checks

        fed = Checks().inputs() | {"encoder_attention_mask": None}
        fed["encoder_hidden_states"] = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(4))
    for config in (SPARSE_SLA, CONFIGS["vsa"].replace(tile="auto")):
        single = foveal.sparsify(Checks().model(), config)
        model = parallel(foveal.sparsify(Checks().model(), config))
        randomize(single)
        randomize(model)
        if name == "ltx_video":
            with torch.no_grad():
                close(run(model, **fed), run(single, **fed))
            continue
        (output, ours), (expected, theirs) = backward(model, fed), backward(single, fed)
        close(output, expected)
        sparse = foveal.sparse_parameters(single)
        assert sparse
        for key in sparse:
            close(summed(ours[key]), theirs[key])


def packed(words, **settings):
    """MiniMax-H3: text, a condition, audio, and video in one sequence. Its token refiner has the whole text everywhere.

    Where shards are uneven, diffusers' dense attention, which the refiner has, has no backward.
    """
    from diffusers.hooks import context_parallel
    from test_minimax_h3 import TestMiniMaxH3 as Checks

    context_parallel._all_gather_anything = gather_uneven
    Checks.WORDS, uneven = words, bool(settings)
    checks = Checks()
    fed = checks.inputs()
    assert len(fed["token_tags"]) % RANKS == uneven
    for config in (SPARSE_SLA, CONFIGS["vsa"]):
        single, model = (foveal.sparsify(checks.model(num_attention_heads=4), config) for _ in range(2))
        randomize(single)
        randomize(model)
        parallel(model, **settings)
        with torch.no_grad():
            for actual, expected in zip(model(**fed, return_dict=False), single(**fed, return_dict=False), strict=True):
                close(actual, expected)
        if uneven:
            continue
        (output, ours), (expected, theirs) = backward(model, fed), backward(single, fed)
        close(output, expected)
        assert theirs.keys() == ours.keys()
        assert set(foveal.sparse_parameters(single)) <= theirs.keys()
        for key, gradient in ours.items():
            close(summed(gradient), theirs[key])


# Sharded parameters


def sharded(model, **settings):
    """FSDP2 as its users apply it: the blocks, then the whole."""
    for block in model.blocks:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def wan_pair(config, dtype=torch.float32):
    """Two equal models, one of them to be sharded."""
    models = [foveal.sparsify(tiny_transformer().to(dtype), config) for _ in range(RANKS)]
    for model in models:
        randomize(model)
    return models


def samples(dtype=torch.float32, **latent):
    """A sample for each rank."""
    fed = inputs(**latent, dtype=dtype)
    return [{name: x[rank : rank + 1] for name, x in fed.items()} for rank in range(RANKS)]


def fsdp(name):
    """Each rank has a sample of its own: its output, and the mean over ranks of all gradients."""
    single, model = wan_pair(CONFIGS[name])
    sharded(model)
    shards = foveal.sparse_parameters(model)
    assert shards
    for parameter in shards.values():
        assert parameter.to_local().numel() == parameter.numel() // RANKS
    outputs, fed = [], samples()
    for sample in fed:
        expected, theirs = backward(single, sample)
        outputs.append(expected)
    output, ours = backward(model, fed[dist.get_rank()])
    close(output, outputs[dist.get_rank()])
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        close(gradient.full_tensor(), theirs[key] / RANKS)


def fsdp_bfloat16():
    """SLA's projection stays in float32; as FSDP2 wants one dtype a unit, it gets units of its own."""
    single, model = wan_pair(SPARSE_SLA, torch.bfloat16)
    for block in model.blocks:
        fully_shard(block.attn1.processor.attention.proj)
    sharded(model)
    fed = samples(torch.bfloat16)[0]
    for _ in range(2):
        (output, ours), (expected, theirs) = backward(model, fed), backward(single, fed)
        assert torch.equal(output, expected)
        for key, gradient in ours.items():
            close(gradient.full_tensor(), theirs[key], rtol=0.02, atol=0.02 * theirs[key].abs().max().item())


def fsdp_recomputes_dense():
    """FSDP2 replaces a block's arguments, and with them what a recomputation reads its phase from."""
    single, model = wan_pair(SPARSE_SLA)
    model.enable_gradient_checkpointing()
    sharded(model)
    fed = samples()[0]
    with foveal.dense(single):
        expected = run(single, **fed)
    with foveal.dense(model):
        output = run(model, **fed)
    close(output, expected)
    expected.sum().backward()
    output.clone().sum().backward()
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        if theirs.grad is not None:
            close(ours.grad.full_tensor(), theirs.grad)


def fsdp_saves_and_loads():
    single, model = wan_pair(CONFIGS["vsa"])
    sharded(model)
    folder, expected = shared_folder(), foveal.sparse_parameters(single)
    foveal.save(model, folder)
    check_saved_of(single, folder)
    for parameter in foveal.sparse_parameters(model).values():
        parameter.data.zero_()
    foveal.load(model, folder)
    for name, parameter in foveal.sparse_parameters(model).items():
        assert torch.equal(parameter.full_tensor(), expected[name])
    removed(folder)


def fsdp_checkpoints():
    """Each rank writes its rows, uneven or none, and nothing is gathered; a rank that cannot write ends it for all."""
    from torch.distributed.tensor import DTensor

    from foveal.lab.train.checkpoint import CheckpointError, CheckpointStore, Peers

    torch.manual_seed(0)
    single = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1))
    model = fully_shard(copy.deepcopy(single))
    rank, expected = dist.get_rank(), dict(single.named_parameters())
    assert [len(parameter.to_local()) for parameter in model.parameters()] == ([3, 3, 1, 1], [2, 2, 0, 0])[rank]

    def gather(value):
        values = [None] * RANKS
        dist.all_gather_object(values, value)
        return values

    folder = gather(tempfile.mkdtemp() if rank == 0 else None)[0]
    peers = Peers(rank, gather)
    store = CheckpointStore(Path(folder))
    counts = {"count": torch.tensor(7.0)}
    groups = {"model": model.named_parameters, "optimizer": counts.items}
    refuse = mock.Mock(side_effect=AssertionError("a tensor was gathered"))
    with mock.patch.object(DTensor, "full_tensor", refuse), mock.patch.object(DTensor, "redistribute", refuse):
        store.save(3, {name: tensors() for name, tensors in groups.items()}, {"x": 1}, peers=peers)
    found = store.latest()
    assert (found.step, found.state, found.manifest["format"]) == (3, {"x": 1}, 2)
    names = {"model-00001.safetensors", "model.rank-001-00001.safetensors", "optimizer-00001.safetensors"}
    assert set(found.manifest["files"]) == names
    back = dict(found.tensors("model"))
    assert back.keys() == expected.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, expected[name])
    assert dict(found.tensors("optimizer")) == counts

    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("safetensors.torch.save_file", side_effect=full) if rank else contextlib.nullcontext():
        raises(
            "is full: .* step 4 was not written; .* step 3 is intact",
            lambda: store.save(4, {"model": model.named_parameters()}, {}, peers=peers),
            CheckpointError,
        )
    gather(None)
    assert os.listdir(folder) == ["step-00000003"]
    # What one rank wrote is cut short: the whole checkpoint is passed over.
    gather(None)
    if rank == 0:
        file = Path(folder, "step-00000003", "model.rank-001-00001.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        said = []
        assert CheckpointStore(Path(folder), report=said.append).latest() is None
        assert file.name in said[0]
        shutil.rmtree(folder)


def fsdp_comes_after_sparsify():
    raises("sparsify the model before fully_shard", lambda: foveal.sparsify(sharded(tiny_transformer()), SPARSE_SLA))


def fsdp_and_context_parallel(name):
    """Both over the same ranks: FSDP2 takes the mean, so the loss counts once for every rank of a sequence."""
    single, model = wan_pair(CONFIGS[name])
    sharded(parallel(model))
    fed = samples(**EVEN)[0]
    (output, ours), (expected, theirs) = backward(model, fed), backward(single, fed)
    close(output, expected)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        close(gradient.full_tensor() * RANKS, theirs[key])


def policy_of_one_rank(name, wrap, dtype=torch.float32):
    """A policy makes the layers of one rank dense: their parameters get zero gradients there, and no rank waits."""
    _, model = wan_pair(CONFIGS[name], dtype)
    for parameter in foveal.sparse_parameters(model).values():
        parameter.data = parameter.data.float()
    foveal.set_policy(model, foveal.Policy(dense_above=900))
    wrapped, fed = wrap(model), samples(dtype)[dist.get_rank()]
    for timestep in (500, 950 if dist.get_rank() else 500, 950, 500):
        run(wrapped, **fed | {"timestep": torch.tensor([timestep])}).float().square().mean().backward()
    with torch.no_grad():
        run(wrapped, **fed | {"timestep": torch.tensor([950 if dist.get_rank() else 500])})


def with_units_of_their_own(model):
    """FSDP2 of blocks whose sparse parameters have another dtype."""
    for block in model.blocks:
        for module in block.attn1.processor.attention.modules():
            if list(module.parameters(recurse=False)):
                fully_shard(module)
    return sharded(model)


# FSDP1


def fsdp1_wrapped(model, policy="blocks", **settings):
    """FSDP of the first version as accelerate applies it: a unit for each block, and one for the rest."""
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy, transformer_auto_wrap_policy

    block = type(model.blocks[0])
    policies = {
        "blocks": functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={block}),
        "classes": ModuleWrapPolicy({block, Projection}),
        "whole": None,
    }
    settings = {"use_orig_params": True, "device_id": torch.device("cpu")} | settings
    return FullyShardedDataParallel(model, auto_wrap_policy=policies[policy], **settings)


def fsdp1(name, dtype=torch.float32, policy="blocks", **settings):
    """Each rank has a sample of its own: its output, and the mean over ranks of all gradients, as without FSDP."""
    single, model = wan_pair(CONFIGS[name], dtype)
    fed, rank = samples(dtype), dist.get_rank()
    wrapped = fsdp1_wrapped(model, policy, **settings)
    for _ in range(2):
        single.zero_grad()
        wrapped.zero_grad()
        results = [backward(single, sample) for sample in fed]
        output, _ = backward(wrapped, fed[rank])
        loose = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        close(output, results[rank][0], **loose)
        theirs = results[-1][1]  # of both samples
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            ours = {key.replace("_fsdp_wrapped_module.", ""): p.grad for key, p in wrapped.named_parameters()}
            assert {key for key, gradient in ours.items() if gradient is not None} == theirs.keys()
            assert any(".processor." in key for key in theirs)
            for key, expected in theirs.items():
                if dtype != torch.float32:
                    loose["atol"] = 0.02 * expected.abs().max().item()
                close(ours[key], expected / RANKS, **loose)
    return wrapped


def fsdp1_saves_and_loads(name, dtype, **settings):
    single, model = wan_pair(CONFIGS[name], dtype)
    wrapped = fsdp1_wrapped(model, **settings)
    folder = shared_folder()
    # Only the outermost wrapper knows before a forward that it is one.
    raises("FSDP has not run the model yet; .*summon_full_params", lambda: foveal.save(wrapped.module, folder))
    with FullyShardedDataParallel.summon_full_params(wrapped):
        foveal.save(wrapped.module, folder)
    check_saved_of(single, folder)
    foveal.save(wrapped.module, folder)
    check_saved_of(single, folder)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        for key, parameter in wrapped.named_parameters():
            if ".processor." in key:
                parameter.data.zero_()
    foveal.load(wrapped.module, folder)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        for key, expected in single.named_parameters():
            found = dict(wrapped.named_parameters())
            close({k.replace("_fsdp_wrapped_module.", ""): p for k, p in found.items()}[key], expected, rtol=0, atol=0)
    removed(folder)


def fsdp1_whole():
    """One unit for the whole model: the wrapper around it has the parameters, and the error says so."""
    folder = shared_folder()
    for use_orig_params in (True, False):
        single, model = wan_pair(CONFIGS["vsa"])
        wrapped = fsdp1_wrapped(model, "whole", use_orig_params=use_orig_params)
        refused = r"FSDP has the parameters of transformer.blocks.0.attn1 in pieces, .*summon_full_params.*FSDP2"
        raises(refused, lambda wrapped=wrapped: foveal.save(wrapped.module, folder))
        with FullyShardedDataParallel.summon_full_params(wrapped):
            foveal.save(wrapped.module, folder)
        check_saved_of(single, folder)
        raises(refused, lambda wrapped=wrapped: foveal.load(wrapped.module, folder))
        with FullyShardedDataParallel.summon_full_params(wrapped):
            foveal.load(wrapped.module, folder)
    removed(folder)


def fsdp1_comes_after_sparsify():
    for use_orig_params in (True, False):
        wrapped = fsdp1_wrapped(tiny_transformer(), use_orig_params=use_orig_params)
        raises(
            r"sharded \(FSDP\), .*sparsify the model before FullyShardedDataParallel",
            lambda wrapped=wrapped: foveal.sparsify(wrapped.module, SPARSE_SLA),
        )


# DeepSpeed


def zero(stage, name):
    """Each rank has a sample of its own; after three steps, one of them dense, the save is that of one process."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed

    single, model = wan_pair(CONFIGS[name])
    fed, rank, optimizers = samples(), dist.get_rank(), []
    for each in (single, model):
        foveal.set_policy(each, foveal.Policy(dense_above=900))
        optimizers.append(torch.optim.SGD(each.parameters(), lr=0.1))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1e6,  # 1 by default
    }
    with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):  # compiles for minutes
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizers[1], config=settings)
    for timestep in (500, 950, 500):
        losses = [run(single, **x | {"timestep": torch.tensor([timestep])}).square().mean() for x in fed]
        optimizers[0].zero_grad()
        (sum(losses) / RANKS).backward()
        optimizers[0].step()
        loss = run(engine, **fed[rank] | {"timestep": torch.tensor([timestep])}).square().mean()
        close(loss.detach(), losses[rank].detach())
        engine.backward(loss)
        engine.step()
    folder = shared_folder()
    foveal.save(model, folder)
    dist.barrier()
    expected = foveal.sparse_parameters(single)
    for key, parameter in foveal.sparse_parameters(foveal.load(tiny_transformer(), folder)).items():
        close(parameter, expected[key])
    foveal.load(model, folder)
    close(run(engine, **fed[rank]).detach(), run(single, **fed[rank]).detach())
    removed(folder)


def shared_folder():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


def removed(folder):
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def check_saved_of(model, folder):
    """A save has the parameters of this model."""
    expected = foveal.sparse_parameters(model)
    loaded = foveal.load(tiny_transformer().to(model.dtype), folder)
    assert foveal.sparse_parameters(loaded).keys() == expected.keys()
    for name, parameter in foveal.sparse_parameters(loaded).items():
        assert torch.equal(parameter, expected[name])


CONTEXT_PARALLEL = {
    "exchange": exchange_is_a_permutation,
    **{f"own modules, {name}": lambda name=name: own_modules(name) for name in CONFIGS},
    **{f"wan, {name}": lambda name=name: wan(name, latent=EVEN) for name in CONFIGS},
    **{
        f"own modules, ratios by head, {name}": lambda name=name: own_modules(name, keep_ratio=(0.1, 0.6, 0.3, 0.5))
        for name in ("sla", "vsa")
    },
    "wan, ratios by head, sla": lambda: wan("sla", latent=EVEN, ratios=(0.1, 0.6)),
    "wan, uneven": wan_uneven,
    "wan, dense again": wan_dense_again,
    "wan, compiled": lambda: wan_compiled("vsa"),
    "wan, travels": wan_travels,
    "wan, travels compiled": wan_travels_compiled,
    "wan, policy": wan_policy,
    "wan, mistakes": wan_mistakes,
    "flux": lambda: family("flux"),
    "ltx_video": lambda: family("ltx_video"),
    "minimax_h3": lambda: packed(8),
    "minimax_h3, uneven": lambda: packed(7, ulysses_anything=True),
}
INDUCTOR = ("wan, travels compiled",)  # of these, what compiles C++
FSDP = {
    **{f"fsdp, {name}": lambda name=name: fsdp(name) for name in CONFIGS},
    "fsdp, bfloat16, sla": fsdp_bfloat16,
    "fsdp, recomputed dense, sla": fsdp_recomputes_dense,
    "fsdp, save and load, vsa": fsdp_saves_and_loads,
    "fsdp, checkpoints": fsdp_checkpoints,
    "fsdp, after sparsify": fsdp_comes_after_sparsify,
    **{f"fsdp, policy, {name}": lambda name=name: policy_of_one_rank(name, sharded) for name in ("sla", "vsa")},
    **{
        f"fsdp, policy, own units, {name}": lambda name=name: policy_of_one_rank(
            name, with_units_of_their_own, torch.bfloat16
        )
        for name in ("sla", "vsa")
    },
    "fsdp, context parallel, sla": lambda: fsdp_and_context_parallel("sla"),
    "fsdp, context parallel, vsa": lambda: fsdp_and_context_parallel("vsa"),
}
FSDP1 = {
    **{f"fsdp1, {name}": lambda name=name: fsdp1(name) for name in ("sla", "vsa")},
    "fsdp1, sla, bfloat16": lambda: fsdp1("sla", torch.bfloat16),
    "fsdp1, sla, bfloat16, by classes": lambda: fsdp1("sla", torch.bfloat16, "classes"),
    "fsdp1, vsa, whole": lambda: fsdp1("vsa", policy="whole"),
    **{
        f"fsdp1, policy, {name}": lambda name=name: policy_of_one_rank(name, fsdp1_wrapped, torch.bfloat16)
        for name in ("sla", "vsa")
    },
    "fsdp1, save and load, sla": lambda: fsdp1_saves_and_loads("sla", torch.bfloat16),
    "fsdp1, save and load, vsa": lambda: fsdp1_saves_and_loads("vsa", torch.float32),
    "fsdp1, save and load, flat, sla": lambda: fsdp1_saves_and_loads("sla", torch.float32, use_orig_params=False),
    "fsdp1, one unit, vsa": fsdp1_whole,
    "fsdp1, after sparsify": fsdp1_comes_after_sparsify,
}
ZERO = {
    f"zero-{stage}, {name}": lambda stage=stage, name=name: zero(stage, name)
    for stage in (1, 2, 3)
    for name in ("sla", "vsa")
}
CASES = CONTEXT_PARALLEL | FSDP | FSDP1 | ZERO


def marked(cases, wrapper):
    """Parameters of pytest, with the wrapper's mark on those that name a method."""
    named = {case: any(method in case.split(", ") for method in ("sla", "vsa")) for case in cases}
    return [pytest.param(case, marks=pytest.mark.wrapper(wrapper) if named[case] else ()) for case in cases]


def check_case(case, request):
    """Fails with the traceback of a rank that failed.

    One pair of processes, which take long to start, runs all cases that were selected, of both files.
    """
    items = request.session.items
    cases = [item for item in items if item.originalname == "test_two_ranks"]
    skipped = [item for item in cases if any(mark.args[0] for mark in item.iter_markers("skipif"))]
    names = [item.callspec.params["case"] for item in cases if item not in skipped]
    for rank, outcome in enumerate(outcomes_of(tuple(names))):
        assert outcome[case] is None, f"rank {rank}: {outcome[case]}"


@functools.cache
def outcomes_of(names):
    """Of each rank, {case: a traceback or None}."""
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder, f"{rank}.json") for rank in range(RANKS)]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(Path(folder, "rendezvous")), str(result), *names],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, result in enumerate(results)
        ]
        try:
            printed = [process.communicate(timeout=600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, printed, strict=True):
            assert process.returncode == 0, output
        return [json.loads(result.read_text()) for result in results]


def main(rank: str, rendezvous: str, results: str, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=Path(rendezvous).as_uri(),
        rank=int(rank),
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    outcome = {}
    for name in names:
        try:
            CASES[name]()
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
    Path(results).write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
