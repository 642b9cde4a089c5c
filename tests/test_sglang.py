"""SGLang's own diffusion attention with foveal's behind it, on the CPU.

    pytest -n 0 tests/test_sglang.py --sglang FOLDER

FOLDER is the site-packages of an environment that has sglang 0.5.23 for the PyTorch of this one; docs/sglang.md says
how to make it. The tests that need it are skipped without it.
"""

import importlib
import math
import sys
import types

import pytest
import torch
from real_hosts import install_entry_points, require

import foveal
from foveal import Policy, SLAConfig, TokenLayout, VideoGrid, VSAConfig
from foveal.hosts import sglang as plugin
from foveal.hosts.sglang.trained import SETTING, read_layers
from foveal.models.processor import sparse_processors

GRID, TILE, SEGMENTS = VideoGrid(5, 16, 17), (4, 4, 4), (70, 9)
HEADS, DIM = 2, 64


def tensors(*shape, number=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(number)]


def raster(*x):
    """[T, H, D] rows to [1, H, T, D]."""
    return [None if y is None else y.transpose(0, 1)[None] for y in x]


@pytest.mark.parametrize(("sparsity", "expected"), [(0.9, 4), (0.8, 8), (0.5, 20), (0.0, 40), (1.0, 1)])
def test_the_host_rounds_up(sparsity, expected):
    assert plugin.kept(sparsity, 40) == expected


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("sparsity", [0.9, 0.0])
def test_packed_attention_is_vsa_attention(gated, sparsity):
    layout = TokenLayout(GRID, before=SEGMENTS)
    query, key, value, gate = tensors(layout.num_tokens + 5, HEADS, DIM)
    output = plugin.packed_attention(query, key, value, gate if gated else None, layout, sparsity, "torch")
    used = [x[: layout.num_tokens] for x in (query, key, value, gate if gated else torch.zeros_like(gate))]
    query, key, value, gate = raster(*used)
    expected = foveal.vsa_attention(
        query,
        key,
        value,
        config=VSAConfig(topk=4 if sparsity else 40),
        layout=layout,
        gate_coarse=gate,
        impl="reference",
    )
    torch.testing.assert_close(output[: layout.num_tokens], expected[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
    assert not output[layout.num_tokens :].any()


ROUTED = VSAConfig(keep_ratio=0.1, router="per_head", coarse=False)


def saved(folder, *, heads=HEADS, **how):
    """What `foveal.save` writes of a MiniMax-H3 whose routers have learned; the model."""
    pytest.importorskip("diffusers", minversion="0.42.1")
    from test_minimax_h3 import TestMiniMaxH3

    sizes = {"num_attention_heads": heads, "attention_head_dim": DIM, "hidden_size": 64, "num_layers": 5}
    model = foveal.sparsify(TestMiniMaxH3().model(**sizes), *([] if "layers" in how else [ROUTED]), **how)
    generator = torch.Generator().manual_seed(5)
    for processor in sparse_processors(model).values():
        for x in processor.parameters():
            x.data.add_(0.3 * torch.randn(x.shape, generator=generator))
    foveal.save(model, folder)
    read_layers.cache_clear()
    return model


def routers(model):
    """The projections of each layer, in order."""
    found = foveal.sparse_parameters(model)
    names = [f"transformer_blocks.{index}.attn.processor.attention.router.proj_" for index in range(5)]
    return [tuple(found[f"{name}{part}"] for part in ("query", "key")) for name in names if f"{name}key" in found]


def test_routers_that_foveal_trained_choose_the_cubes(tmp_path):
    layout, model = TokenLayout(GRID, before=SEGMENTS), saved(tmp_path)
    query, key, value, gate = tensors(layout.num_tokens, HEADS, DIM)
    for layer, (proj_query, proj_key) in zip(read_layers(str(tmp_path)), routers(model), strict=True):
        output = plugin.packed_attention(query, key, value, gate, layout, 0.9, "torch", trained=layer)
        weights = {"proj_query": proj_query.detach(), "proj_key": proj_key.detach()}
        expected = foveal.vsa_attention(
            *raster(query, key, value), config=ROUTED.replace(topk=4), layout=layout, impl="torch", **weights
        )
        torch.testing.assert_close(output, expected[0].transpose(0, 1))
    by_means = plugin.packed_attention(query, key, value, None, layout, 0.9, "torch")
    assert not torch.allclose(output, by_means, atol=1e-3)


def test_layers_that_training_left_dense_are_dense(tmp_path):
    saved(tmp_path, layers={0: None, range(1, 5): ROUTED})
    layout, layer = TokenLayout(GRID, before=SEGMENTS), read_layers(str(tmp_path))[0]
    query, key, value, gate = tensors(layout.num_tokens, HEADS, DIM)
    output = plugin.packed_attention(query, key, value, gate, layout, 0.9, "torch", trained=layer)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (query, key, value)))
    torch.testing.assert_close(output, expected.transpose(0, 1))


def test_each_gpu_takes_the_routers_of_its_heads(tmp_path, monkeypatch):
    """Two of tensor parallelism, each with two of Ulysses: the latter divide the heads of the former."""
    model = saved(tmp_path, heads=8)
    layer, (proj_query, proj_key) = read_layers(str(tmp_path))[3], routers(model)[3]
    ranks = {"get_tp_world_size": 2, "get_tp_rank": 1, "get_ulysses_parallel_world_size": 2}
    for ulysses, own in ((0, slice(4, 6)), (1, slice(6, 8))):
        state = types.ModuleType("parallel_state")
        for name, value in (ranks | {"get_ulysses_parallel_rank": ulysses}).items():
            setattr(state, name, lambda value=value: value)
        monkeypatch.setitem(sys.modules, "sglang.multimodal_gen.runtime.distributed.parallel_state", state)
        found = layer.of(torch.zeros(3, 2, DIM))
        assert all(torch.equal(x, y[own]) for x, y in zip(found, (proj_query, proj_key), strict=True))
        with pytest.raises(ValueError, match="routers of 8 heads, but a layer has 3 on each of 4 GPUs"):
            layer.of(torch.zeros(3, 3, DIM))
    shared = layer._replace(projections=tuple(x[0] for x in layer.projections))
    assert shared.of(torch.zeros(3, 2, DIM))[0].shape == (DIM, DIM)


def test_parameters_that_sglang_cannot_run_are_named(tmp_path):
    sla = SLAConfig(keep_ratio=0.1, drop_ratio=0.1)
    saved(tmp_path / "sla", layers={range(5): sla})
    with pytest.raises(ValueError, match="must hold parameters of VSA, got SLAConfig"):
        read_layers(str(tmp_path / "sla"))
    saved(tmp_path / "policy", policy=Policy(dense_above=900))
    with pytest.raises(ValueError, match=r"has a policy.*vsa_dense_first_n_steps"):
        read_layers(str(tmp_path / "policy"))
    saved(tmp_path / "gate", layers={range(5): ROUTED.replace(fine_gate=True)})
    with pytest.raises(ValueError, match="SGLang has no fine gate"):
        read_layers(str(tmp_path / "gate"))


def test_an_absent_host_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ImportError, match=r'SGLang is not installed.*pip install "sglang\[diffusion\]"'):
        foveal.patch("sglang")


@pytest.fixture(scope="module")
def host(pytestconfig, tmp_path_factory):
    """The host's modules, and foveal's entry points where `importlib.metadata` looks."""
    require(pytestconfig, "sglang", "sglang")
    path = install_entry_points(tmp_path_factory.mktemp("site"))
    sys.path.insert(0, path)
    names = {
        "h3": f"{plugin.BACKENDS}.video_sparse_attn_h3",
        "vsa": f"{plugin.BACKENDS}.video_sparse_attn",
        "sla": f"{plugin.BACKENDS}.sparse_linear_attn",
        "plugins": "sglang.multimodal_gen.runtime.platforms.plugins",
    }
    yield types.SimpleNamespace(**{name: importlib.import_module(module) for name, module in names.items()})
    sys.path.remove(path)


def hooked(host):
    """The classes and the names of the methods that foveal's hooks replace."""
    return (
        (host.h3.VideoSparseAttentionH3MetadataBuilder, "build"),
        (host.h3.VideoSparseAttentionH3Impl, "forward_varlen"),
        (host.vsa.VideoSparseAttentionImpl, "forward"),
        (host.sla.SparseLinearAttentionImpl, "forward"),
    )


def methods(host):
    return tuple(getattr(owner, name) for owner, name in hooked(host))


@pytest.fixture
def their_kernels(host, monkeypatch):
    """The host's own H3 implementation with plain PyTorch in the place of its Triton kernels, which need a GPU."""

    def pack(query, key, value, gate, index, sizes, tiled, pooled):
        for slot, x in zip(tiled, (query, key, value, gate), strict=False):
            rows = torch.where(index[:, None, None] >= 0, x[index.clamp(min=0)], 0)
            slot[:, : len(index)] = rows.transpose(0, 1)
        for row, x in zip(pooled, tiled, strict=False):
            row.copy_(x[:, : len(index)].float().unflatten(1, (-1, 64)).sum(2) / sizes[:, None])

    def attention(query, key, value, lists, counts, sizes, out, use_sm100_kernel):
        listed = torch.arange(lists.shape[-1]) < counts[..., None]
        blocks = torch.zeros(*lists.shape[:3], len(sizes) + 1, dtype=torch.bool)
        blocks = blocks.scatter(-1, torch.where(listed, lists, len(sizes)).long(), True)[..., :-1]
        valid = (torch.arange(64) < sizes[:, None]).flatten()
        mask = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3) & valid
        scores = (query.double() @ key.double().mT / math.sqrt(DIM)).masked_fill(~mask, -1e30)
        out.copy_(scores.softmax(-1) @ value.double())

    def untile(tiled, gate, coarse, places, used, result):
        rows = tiled[:, places[:used].long()].float()
        if gate is not None:
            rows = rows + gate[:, places[:used].long()] * coarse[:, places[:used].long() // 64]
        result[:used] = rows.transpose(0, 1).to(result.dtype)

    def topk_lists(picked, mask, out, prefix):
        out[..., :prefix] = torch.arange(prefix)
        out[..., prefix : prefix + picked.shape[-1]] = picked.sort(-1).values + prefix

    for name, function in {
        "vsa_h3_pack_tiles": pack,
        "vsa_h3_block_sparse_attn_forward": attention,
        "vsa_h3_untile": untile,
        "vsa_h3_topk_lists": topk_lists,
        "can_use_vsa_block_sparse_sm100": lambda *args: False,
    }.items():
        monkeypatch.setattr(host.h3, name, function)


def h3_metadata(host, **more):
    """The host's metadata for one step of a text-and-audio prefix and a video."""
    arguments = {
        "current_timestep": 1,
        "raw_latent_shape": (GRID.frames, 2 * GRID.height, 2 * GRID.width),
        "patch_size": (1, 2, 2),
        "VSA_sparsity": 0.9,
        "prefix_segments": SEGMENTS,
        "device": torch.device("cpu"),
    }
    return host.h3.VideoSparseAttentionH3MetadataBuilder().build(**(arguments | more))


def h3_layer(host, prefix="blocks.3.attn"):
    return host.h3.VideoSparseAttentionH3Impl(
        num_heads=HEADS, head_size=DIM, causal=False, softmax_scale=DIM**-0.5, prefix=prefix
    )


def run_h3(host, layer, metadata, dtype=torch.float32, gated=True, **more):
    used, padding = sum(SEGMENTS) + GRID.num_tokens, 17
    query, key, value, gate = tensors(used + padding, HEADS, DIM, dtype=dtype)
    bounds = (0, used, used + padding)
    output = layer.forward_varlen(
        query,
        key,
        value,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        cu_seqlens_host=bounds,
        max_seqlen=used,
        attn_metadata=metadata,
        gate_compress=gate if gated else None,
        **more,
    )
    if isinstance(output, tuple):
        return output[0][:used], output[1]
    return output[:used]


CASES = {
    "gated": {},
    "without a gate": {"gated": False},
    "keeps everything": {"VSA_sparsity": 0.0},
    "dense and without a gate": {"VSA_sparsity": 0.0, "gated": False},
    "a dense layer": {"dense_layers": (3,)},
    "the first step is dense": {"dense_first_n_steps": 2},
    "no protected segment": {"prefix_segments": (0,)},
}


@pytest.mark.parametrize("name", CASES)
def test_minimax_h3_equals_theirs_at_the_same_selection(host, their_kernels, name, monkeypatch):
    changes = dict(CASES[name])
    gated = changes.pop("gated", True)
    if "prefix_segments" in changes:
        monkeypatch.setattr(sys.modules[__name__], "SEGMENTS", (0,))
    theirs = run_h3(host, h3_layer(host), h3_metadata(host, **changes), gated=gated)
    with foveal.patch("sglang", impl="torch"):
        metadata = h3_metadata(host, **changes)
        assert getattr(metadata, plugin.LAYOUT).num_tokens == len(theirs)
        ours = run_h3(host, h3_layer(host), metadata, gated=gated)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def serve(monkeypatch, **settings):
    """What a server was told of its attention."""
    args = importlib.import_module("sglang.multimodal_gen.runtime.server_args.server_args")
    monkeypatch.setattr(args, "_global_server_args", types.SimpleNamespace(attention_backend_config=settings))


def test_minimax_h3_with_routers_that_foveal_trained(host, tmp_path, monkeypatch):
    model = saved(tmp_path)
    serve(monkeypatch, **{"VSA_sparsity": 0.9, SETTING: str(tmp_path)})
    with foveal.patch("sglang", impl="torch"):
        metadata = h3_metadata(host)
        ours = run_h3(host, h3_layer(host), metadata)
    query, key, value, _ = raster(*(x[: len(ours)] for x in tensors(len(ours) + 17, HEADS, DIM)))
    proj_query, proj_key = (x.detach() for x in routers(model)[3])  # of the layer blocks.3.attn
    expected = foveal.vsa_attention(
        query,
        key,
        value,
        config=ROUTED.replace(topk=4),
        layout=getattr(metadata, plugin.LAYOUT),
        proj_query=proj_query,
        proj_key=proj_key,
        impl="torch",
    )
    torch.testing.assert_close(ours, expected[0].transpose(0, 1))
    with foveal.patch("sglang", impl="torch"), pytest.raises(ValueError, match=f"{SETTING} needs vsa_mode=exempt"):
        h3_metadata(host, exempt=False)


def test_minimax_h3_returns_the_coarse_branch_of_each_tile(host, their_kernels):
    """As the host asks for under Ulysses parallelism, where it gates it itself."""
    theirs = run_h3(host, h3_layer(host), h3_metadata(host), gated=False, return_compress=True)
    with foveal.patch("sglang", impl="torch"):
        ours = run_h3(host, h3_layer(host), h3_metadata(host), gated=False, return_compress=True)
    for own, foveals in zip(theirs, ours, strict=True):
        assert own.shape == foveals.shape
        torch.testing.assert_close(foveals, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"exempt": False},
        {"tile_size": 128},
        {"packed_segments": (70, (2, 8, 8), 9, GRID.shape), "ref_keep_rate": 0.5},
    ],
    ids=["competing prefix", "cubes of 128 tokens", "a reference video"],
)
def test_minimax_h3_leaves_to_the_host_what_foveal_does_not_have(host, their_kernels, changes, monkeypatch):
    with foveal.patch("sglang", impl="torch"):
        metadata = h3_metadata(host, **changes)
        assert getattr(metadata, plugin.LAYOUT) is None
        called = []
        monkeypatch.setattr(plugin, "packed_attention", lambda *args, **kwargs: called.append(args))
        if "packed_segments" in changes:
            monkeypatch.setattr(sys.modules[__name__], "SEGMENTS", (70, 128, 9))
        run_h3(host, h3_layer(host), metadata)
        assert not called


@pytest.mark.parametrize("sparsity", [0.9, 0.5])
def test_wan_is_vsa_attention(host, sparsity, monkeypatch):
    monkeypatch.setattr(host.vsa, "get_sp_group", lambda: types.SimpleNamespace(world_size=1))
    inputs = [x[None] for x in tensors(GRID.num_tokens, HEADS, DIM)]
    metadata = host.vsa.VideoSparseAttentionMetadataBuilder().build(
        current_timestep=1,
        raw_latent_shape=(GRID.frames, 2 * GRID.height, 2 * GRID.width),
        patch_size=(1, 2, 2),
        VSA_sparsity=sparsity,
        device=torch.device("cpu"),
    )
    layer = host.vsa.VideoSparseAttentionImpl(HEADS, DIM, False, DIM**-0.5)
    stacked = layer.preprocess_qkv(torch.cat(inputs), metadata)
    with foveal.patch("sglang", impl="torch"):
        query, key, value, gate = stacked.chunk(4)
        output = layer.forward(query, key, value, gate_compress=gate, attn_metadata=metadata)
    output = layer.postprocess_output(output, metadata)
    query, key, value, gate = (x.transpose(1, 2) for x in inputs)
    config = VSAConfig(topk=math.ceil((1 - sparsity) * 40))
    expected = foveal.vsa_attention(query, key, value, config=config, grid=GRID, gate_coarse=gate, impl="reference")
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_sla_is_sla_attention(host, feature_map):
    layer = host.sla.SparseLinearAttentionImpl(HEADS, DIM, topk_ratio=0.4, feature_map=feature_map)
    layer.dtype = torch.float32
    torch.nn.init.normal_(layer.proj_l.weight, std=0.1)
    query, key, value = tensors(1, 300, HEADS, DIM, number=3)
    with foveal.patch("sglang", impl="torch"):
        output = layer.forward(query, key, value)
    config = SLAConfig(keep_ratio=0.4, drop_ratio=0.0, block_q=128, feature_map=feature_map, linear_scope="all")
    weights = {"proj_weight": layer.proj_l.weight, "proj_bias": layer.proj_l.bias}
    expected = foveal.sla_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), config=config, impl="reference", **weights
    )
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_the_host_finds_and_applies_the_plugin(host, monkeypatch):
    before = methods(host)
    monkeypatch.setenv("SGLANG_PLUGINS", "foveal")
    host.plugins._reset_lifecycle_for_tests()
    try:
        host.plugins.apply_plugin_hooks()
        after = methods(host)
        assert [method.__wrapped__ for method in after] == list(before)
        metadata = h3_metadata(host)
        assert getattr(metadata, plugin.LAYOUT) == TokenLayout(GRID, before=SEGMENTS)
        query, key, value, gate = tensors(sum(SEGMENTS) + GRID.num_tokens, HEADS, DIM)
        expected = plugin.packed_attention(query, key, value, gate, getattr(metadata, plugin.LAYOUT), 0.9, "auto")
        bounds = (0, len(query), len(query))
        found = h3_layer(host).forward_varlen(
            query,
            key,
            value,
            cu_seqlens=torch.tensor(bounds),
            max_seqlen=len(query),
            attn_metadata=metadata,
            gate_compress=gate,
        )
        torch.testing.assert_close(found, expected)
    finally:
        for method, (owner, name) in zip(before, hooked(host), strict=True):
            setattr(owner, name, method)
        host.plugins.HookRegistry.reset()
        host.plugins._reset_lifecycle_for_tests()


def test_unplugged_the_host_is_what_it_was(host):
    before = methods(host)
    with foveal.patch("sglang"):
        assert not set(methods(host)) & set(before)
        with pytest.raises(ValueError, match="'sglang' is patched already"):
            foveal.patch("sglang")
    assert methods(host) == before
