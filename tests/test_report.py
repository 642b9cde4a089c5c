"""`report` and `summary` name every fallback, and `on_fallback` minds it; what the user named is none."""

import copy
import importlib.metadata
import warnings

import pytest
import torch
import window_method
from tiny_wan import DENSE_SLA, SPARSE_SLA, SPARSE_VSA, inputs, run, tiny_transformer

import foveal
from foveal import Policy, SLAConfig, SparseLinearAttention, TokenLayout, VideoGrid, VSAConfig
from foveal.checks import clear_constants
from foveal.kernels import api, chips
from foveal.kernels.hopper import support
from foveal.methods.base import METHODS, register
from foveal.methods.sla import attention as sla
from foveal.models import record
from foveal.models.processor import sparse_processors, state_of
from foveal.testing import make_inputs

ON_CPU = "not triton: it needs a GPU, got tensors on 'cpu'"


def sparse(config=SPARSE_SLA, num_layers=2, **options):
    return foveal.sparsify(tiny_transformer(num_layers=num_layers), config, **options)


def at(model, timestep, latent=(3, 10, 14)):
    with torch.no_grad():
        return run(model, **inputs(latent=latent) | {"timestep": torch.full((2,), timestep)})


def told(model):
    """(forwards, grid, method, implementation, layers, why) of each row."""
    return [
        (row.forwards, row.grid, row.ran.method, row.ran.impl, len(row.ran.layers), row.ran.why)
        for row in foveal.report(model).rows
    ]


def test_nothing_ran():
    assert foveal.report(tiny_transformer()).rows == ()
    assert str(foveal.report(sparse())) == "no forward of a sparse layer yet"


def test_forwards_are_counted_by_kind():
    model = sparse()
    foveal.set_policy(model, Policy(dense_above=500, keep_ratio={300: 0.6}))
    for timestep in (100, 100, 400, 600, 100):
        at(model, timestep)
    at(model, 100, latent=(2, 10, 14))
    small, large = (2, 5, 7), (3, 5, 7)
    assert told(model) == [
        (3, large, "sla", "torch", 2, ON_CPU),
        (1, large, "sla", "torch", 2, ON_CPU),
        (1, large, "dense", "dense", 2, "the policy's dense_above"),
        (1, small, "sla", "torch", 2, ON_CPU),
    ]
    assert [row.ran.kept for row in foveal.report(model).rows] == [(2, 7), (4, 7), None, (1, 5)]
    assert "5 of 5" not in str(foveal.report(model))


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
def test_kept_blocks_are_those_that_are_selected(config):
    model = sparse(config, num_layers=1)
    at(model, 100)
    processor = next(iter(sparse_processors(model).values()))
    module, grid = processor.attention, VideoGrid(3, 5, 7)
    query, key, _ = make_inputs(heads=2, head_dim=16, query_length=grid.num_tokens)
    selection = module.select(query, key, grid=grid)
    (row,) = foveal.report(model).rows
    assert row.ran.kept == (int(selection.critical_count.max()), selection.num_key_blocks)


def test_kept_cubes_of_a_packed_sequence_round_up_either_way():
    layout, config = TokenLayout(VideoGrid(3, 5, 7), (6,)), SPARSE_VSA.replace(keep_ratio=0.3, rounding="down")
    module = foveal.VideoSparseAttention(32, 2, 16, config)
    query, key, _ = make_inputs(heads=2, head_dim=16, query_length=layout.num_tokens)
    picked = module.select(query, key, layout=layout).critical_count.max() - layout.num_chunks(16)
    kept, cubes = METHODS["vsa"].kept_blocks(config, layout.grid, True)
    assert (int(picked), layout.grid.num_cubes((2, 2, 4))) == (kept, cubes)
    assert METHODS["vsa"].kept_blocks(config, layout.grid, False)[0] == kept - 1


def test_a_named_implementation_and_the_switch_are_no_fallback():
    model = sparse(impl="torch", on_fallback="raise")
    at(model, 100)
    with foveal.dense(model):
        at(model, 100)
    assert told(model) == [
        (1, (3, 5, 7), "sla", "torch", 2, None),
        (1, None, "dense", "dense", 2, "dense(model)"),
    ]
    assert foveal.report(model).fallbacks == ()


FALLBACKS = {
    "implementation": (SPARSE_SLA, {}, None, ON_CPU),
    "implementation of VSA": (SPARSE_VSA, {}, None, ON_CPU),
    "dense timestep above": (SPARSE_SLA, {"impl": "torch"}, Policy(dense_above=50), "the policy's dense_above"),
    "dense timestep below": (SPARSE_SLA, {"impl": "torch"}, Policy(dense_below=500), "the policy's dense_below"),
    "dense layer": (SPARSE_SLA, {"impl": "torch"}, Policy(dense_layers=(1,)), "the policy's dense_layers"),
    "all blocks kept": (SPARSE_SLA.replace(block_q=128, block_k=128), {"impl": "torch"}, None, "covers all blocks, 1"),
    "all cubes kept": (VSAConfig(topk=99, tile=(2, 2, 4)), {"impl": "torch"}, None, "covers all blocks, 12"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_each_fallback_is_told_and_minded(name):
    config, options, policy, why = FALLBACKS[name]
    model = sparse(config, **options)
    foveal.set_policy(model, policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at(model, 100)
    assert any(why in row.ran.why for row in foveal.report(model).fallbacks)
    assert why in str(foveal.report(model))

    foveal.set_on_fallback(model, "warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        at(model, 100)
        at(model, 100)
    assert [why in str(one.message) for one in caught].count(True) == 1

    foveal.set_on_fallback(model, "raise")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"blocks\.[01]\.attn1") as raised:
            at(model, 100)
        assert why in str(raised.value)


@pytest.mark.parametrize(("step", "field"), [(0, "dense_first_steps"), (3, "dense_last_steps"), (2, None)])
def test_dense_steps_name_their_field(step, field):
    phase = Policy(dense_first_steps=1, dense_last_steps=1, dense_above=900).phase(step, 4, 100.0)
    assert phase.dense == (field is not None)
    assert phase.why == (field and f"the policy's {field}")
    assert len(phase.as_text()) == 3  # a reason makes no other graph


def test_keep_ratio_1_is_asked_for():
    model = sparse(DENSE_SLA, impl="torch", on_fallback="raise")
    at(model, 100)
    assert foveal.report(model).rows[0].ran.kept == (7, 7)


def cuda_inputs(head_dim=64, dtype=torch.bfloat16, strided=False):
    """Tensors without memory of a GPU's device type."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        if strided:
            sizes = (1, 2, 128, head_dim), (2 * 128 * (head_dim + 1), 128 * (head_dim + 1), head_dim + 1, 1)
            return tuple(torch.empty_strided(*sizes, dtype=dtype, device="cuda") for _ in range(3))
        return tuple(torch.empty(1, 2, 128, head_dim, dtype=dtype, device="cuda") for _ in range(3))


REFUSALS = {
    "float32": ({"dtype": torch.float32}, (64, 64), "torch", "not triton: it takes bfloat16 and float16"),
    "head dimension": ({"head_dim": 80}, (64, 64), "torch", "not triton: it takes head dimensions"),
    "blocks": ({}, (32, 64), "torch", "not triton: it takes blocks of 64 and 128 tokens, got 32x64"),
    "small cubes": ({}, (16, 16), "torch", "not triton: it takes blocks of 64 and 128 tokens, got 16x16"),
    "strides": ({"strided": True}, (64, 64), "triton", "not gluon: query must be contiguous"),
    "another Triton": ({}, (64, 64), "triton", "not gluon: it is written for Triton 3.6"),
    "an unverified Triton": ({}, (64, 64), "triton", "not gluon: its kernels were verified"),
    "nothing": ({}, (64, 64), "gluon", None),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_hopper_gpu_says_why_not(name, monkeypatch):
    options, blocks, impl, why = REFUSALS[name]
    monkeypatch.setattr(chips, "capability", lambda device: "9.0")
    monkeypatch.setattr(api, "_HAS_TRITON", True)
    version = "it is written for Triton 3.6, got 3.9.0"
    monkeypatch.setattr(support, "missing_gluon", lambda: version if name == "another Triton" else None)
    why_unverified = "its kernels were verified on a GPU with Triton 3.6, got 3.9.0"
    monkeypatch.setattr(support, "unverified_release", lambda: why_unverified if "unverified" in name else None)
    ran = api.choose_impl("auto", *cuda_inputs(**options), *blocks)
    assert ran.impl == impl
    assert ran.why is None if why is None else ran.why.startswith(why)


@pytest.fixture
def another_gpu(monkeypatch):
    """A function that makes a capability that of the GPU, and a release that of Triton."""

    def install(capability, release="3.9.0"):
        monkeypatch.setattr(chips, "capability", lambda device: capability)
        monkeypatch.setattr(api, "_HAS_TRITON", True)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: release)
        clear_constants()

    yield install
    clear_constants()


@pytest.mark.parametrize(
    ("capability", "release", "why"),
    [
        ("7.5", "3.9.0", "not triton: it needs a GPU of compute capability 8.0 or newer, got 7.5"),
        ("12.0", "3.4.0", "not triton: it needs Triton 3.6 or newer, which comes with torch 2.10, got 3.4.0"),
        ("12.0", "3.6.0", None),
    ],
)
def test_what_no_kernel_is_written_for_runs_in_pytorch(another_gpu, capability, release, why):
    another_gpu(capability, release)
    inputs = cuda_inputs()
    assert api.choose_impl("auto", *inputs, 64, 64) == (api.Ran("triton") if why is None else api.Ran("torch", why))
    assert api.fits_kernel(*inputs[:2], 64) == (why is None)


def test_triton_is_what_other_gpus_are_for(monkeypatch):
    monkeypatch.setattr(chips, "capability", lambda device: "8.0")
    monkeypatch.setattr(api, "_HAS_TRITON", True)
    assert api.choose_impl("auto", *cuda_inputs(), 64, 64) == api.Ran("triton")
    monkeypatch.setattr(api, "_HAS_TRITON", False)
    assert api.choose_impl("auto", *cuda_inputs(), 64, 64).why == "not triton: the package triton is not installed"


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_parts_in_pytorch_are_told(impl, monkeypatch):
    """Whatever was named: a part of it is not what runs."""
    monkeypatch.setattr(sla, "choose_impl", lambda *_: api.Ran("triton"))
    real = sla.block_sparse_attention
    monkeypatch.setattr(sla, "block_sparse_attention", lambda *x, impl, **named: real(*x, impl="torch", **named))
    module = SparseLinearAttention(64, SLAConfig(feature_map="hedgehog"), impl=impl)
    module(*make_inputs(query_length=128))
    assert module.ran == api.Ran("triton", f"{sla.SLOW_LINEAR}; {sla.SLOW_SELECTION}")
    packed = SparseLinearAttention(64, SLAConfig(linear_scope="none"), impl=impl)
    layout = TokenLayout(VideoGrid(2, 8, 8), (5,))
    packed(*make_inputs(query_length=layout.num_tokens), layout=layout)
    assert packed.ran == api.Ran("triton", sla.SLOW_SELECTION)
    monkeypatch.setattr(sla, "fits_kernel", lambda *_: True)
    module(*make_inputs(query_length=128))
    assert module.ran.why == sla.SLOW_LINEAR


def test_layers_that_a_forward_skips_are_not_told():
    model = sparse()
    at(model, 100)
    block = model.blocks[1]
    block.forward = lambda hidden_states, *rest: hidden_states  # as caches of diffusers do
    at(model, 100)
    assert [(count, layers) for count, *_, layers, _ in told(model)] == [(1, 2), (1, 1)]


def test_failed_forwards_are_not_counted(monkeypatch):
    model = sparse()
    monkeypatch.setattr(sla, "choose", None)
    with pytest.raises(TypeError):
        at(model, 100)
    assert foveal.report(model).rows == ()


def test_kinds_have_a_bound(monkeypatch):
    monkeypatch.setattr(record, "MOST_KINDS", 2)
    model = sparse(num_layers=1)
    for latent in ((2, 6, 6), (3, 6, 6), (4, 6, 6), (5, 6, 6)):
        at(model, 100, latent)
    assert [(row.forwards, row.grid) for row in foveal.report(model).rows] == [
        (1, (2, 3, 3)),
        (1, (3, 3, 3)),
        (2, None),
    ]


def test_a_method_that_does_not_say_what_it_runs():
    before = dict(METHODS)
    register(window_method.WINDOW)
    try:
        model = sparse(window_method.WindowConfig(block=16), num_layers=1, on_fallback="raise")
        at(model, 100)
        assert told(model) == [(1, (3, 5, 7), "window", "", 1, None)]
    finally:
        METHODS.clear()
        METHODS.update(before)


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
def test_compiled_blocks_are_counted_without_another_graph(config):
    model = sparse(config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for _ in range(3):
        at(model, 100)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        at(model, 100)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1
    ((forwards, *_, impl, layers, why),) = told(model)
    assert (forwards, impl, layers, why) == (6, "torch", 2, ON_CPU)
    foveal.set_on_fallback(model, "raise")
    with pytest.raises(RuntimeError, match="it needs a GPU"):
        at(model, 100)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_training_with_checkpoints_takes_no_notes(whole):
    """Dynamo takes no side effects in a checkpoint that is part of a graph."""
    model = sparse().train()
    foveal.set_policy(model, Policy(dense_layers=(1,)))
    model.enable_gradient_checkpointing()
    torch._dynamo.reset()
    if whole:
        compiled = torch.compile(model, backend="aot_eager")
    else:
        compiled = model
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        run(compiled).square().sum().backward()
    if not whole:
        layers = [(row.forwards, row.ran.impl, row.ran.layers) for row in foveal.report(model).rows]
        assert layers == [(2, "", ("blocks.0.attn1",)), (2, "dense", ("blocks.1.attn1",))]
    assert model.blocks[0].attn1.processor.attention.ran is None


def test_a_whole_compiled_model_tells_its_latest_forward():
    model = sparse()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    at(compiled, 100)
    at(compiled, 100)
    assert told(model) == [(None, (3, 5, 7), "sla", "torch", 2, ON_CPU)]
    foveal.set_on_fallback(model, "raise")
    with pytest.raises(RuntimeError, match="it needs a GPU"):
        at(torch.compile(model, backend="eager"), 100)


def test_copies_count_for_themselves_and_files_keep_no_record(tmp_path):
    model = sparse(on_fallback="warn")
    with pytest.warns(UserWarning, match="fell back"):
        at(model, 100)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at(twin, 100)
    assert [count for count, *_ in told(model)] == [1]
    assert [count for count, *_ in told(twin)] == [2]
    foveal.save(model, tmp_path)
    loaded = foveal.load(tiny_transformer(), tmp_path)
    assert not state_of(loaded).minds_fallbacks


def test_mistakes():
    with pytest.raises(ValueError, match=r"unknown on_fallback 'error'; expected one of \('allow', 'warn', 'raise'\)"):
        sparse(on_fallback="error")
    with pytest.raises(ValueError, match="on_fallback"):
        foveal.set_on_fallback(sparse(), "never")
    with pytest.raises(ValueError, match="no sparse layer"):
        foveal.set_on_fallback(tiny_transformer(), "warn")


def test_summary_names_the_reason():
    model = sparse()
    at(model, 100)
    assert f"fell back in 2 layers: {ON_CPU}" in str(foveal.summary(model))
