"""vLLM-Omni's own attention layers and models with foveal in their slot, on the CPU.

    pytest -n 0 tests/test_vllm_omni.py --vllm-omni FOLDER

FOLDER is the site-packages of an environment that has vllm-omni 0.30 for the PyTorch of this one (docs/vllm-omni.md
says how to make it). Its tests are skipped without it. vLLM-Omni has no platform for CPUs. `CpuPlatform` below
says that it is Intel's, so that the host's other layers run in plain PyTorch too.
"""

import importlib
import math
import sys
import types

import pytest
import torch
from real_hosts import entry_point, entry_points, install_entry_points, require

import foveal
from foveal import TokenLayout, VideoGrid, VSAConfig
from foveal.hosts.vllm_omni.function import sparse_attention

GRID, WAN_TILE, H3_TILE = VideoGrid(5, 16, 17), (4, 8, 8), (4, 4, 4)
SEGMENTS = (70, 9)


def tensors(*shape, number=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(number)]


def test_the_entry_points_name_functions():
    groups = entry_points()
    assert {"vllm_omni.general_plugins", "vllm_omni.sparse_attn"} <= set(groups)
    for group, names in groups.items():
        assert list(names) == ["foveal"]
        assert callable(entry_point(group))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {"vsa_dit_seq_shape": (5, 16, 17)},
        {"latent_shape": torch.tensor([[5, 32, 34]] * 2), "patch_size": torch.tensor([[1, 2, 2]] * 2)},
    ],
    ids=["of the sequence", "of the latents"],
)
def test_the_function_is_vsa_attention(gated, shape):
    query, key, value, gate = tensors(2, GRID.num_tokens, 2, 16, number=4)
    params = {"topk": 3, "tile": [4, 4, 4], "impl": "torch", "timestep": 3.0, **shape}
    if gated:
        params["gate_compress"] = gate
    output = sparse_attention(query, key, value, params, is_causal=False, softmax_scale=0.3)
    expected = foveal.vsa_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        config=VSAConfig(topk=3),
        grid=GRID,
        gate_coarse=gate.transpose(1, 2) if gated else torch.zeros_like(gate.transpose(1, 2)),
        scale=0.3,
        impl="reference",
    )
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_the_function_says_what_is_wrong():
    x = torch.randn(1, 64, 1, 16)
    call = {"is_causal": False, "softmax_scale": 0.25}
    with pytest.raises(ValueError, match="is_causal must be False"):
        sparse_attention(x, x, x, {}, True, 0.25)
    with pytest.raises(ValueError, match=r"params must hold the video's shape .* got \['topk'\]"):
        sparse_attention(x, x, x, {"topk": 2}, **call)
    shapes = {"latent_shape": torch.tensor([[1, 8, 8], [1, 4, 16]]), "patch_size": torch.tensor([1, 1, 1])}
    with pytest.raises(ValueError, match="latent_shape must be the same for all samples"):
        sparse_attention(x, x, x, shapes, **call)
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        sparse_attention(x, x, x, {"topk": 0, "vsa_dit_seq_shape": (1, 8, 8)}, **call)
    with pytest.raises(ValueError, match="grid 1x4x4 has 16 tokens, but the tensors have 64"):
        sparse_attention(x, x, x, {"vsa_dit_seq_shape": (1, 4, 4)}, **call)


def test_an_absent_host_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_omni", None)
    with pytest.raises(ImportError, match=r"vLLM-Omni is not installed.*pip install vllm-omni"):
        foveal.patch("vllm_omni")


@pytest.fixture(scope="module")
def host(pytestconfig, tmp_path_factory):
    """The host's modules, one rank, and foveal's entry points where `importlib.metadata` looks."""
    require(pytestconfig, "vllm-omni", "vllm_omni")
    import vllm_omni.platforms
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

    class CpuPlatform(OmniPlatform):
        _omni_enum = OmniPlatformEnum.XPU
        device_name = device_type = "cpu"
        get_device_count = classmethod(lambda cls: 1)
        set_device = classmethod(lambda cls, device: None)
        get_torch_device = classmethod(lambda cls, local_rank=None: torch.device("cpu"))
        has_flash_attn_package = classmethod(lambda cls: False)

        @classmethod
        def get_diffusion_attn_backend_cls(cls, selected_backend, head_size, allow_trtllm_default=True):
            from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

            if selected_backend is not None:
                cls.validate_diffusion_attn_backend(selected_backend)
            return DiffusionAttentionBackendEnum[(selected_backend or "TORCH_SDPA").upper()].get_path()

    vllm_omni.platforms._current_omni_platform = CpuPlatform()
    from vllm_omni.diffusion.distributed import parallel_state

    path = install_entry_points(tmp_path_factory.mktemp("site"))
    sys.path.insert(0, path)
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    store = tmp_path_factory.mktemp("store") / "store"
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
        yield types.SimpleNamespace(
            registry=importlib.import_module("vllm_omni.diffusion.attention.backends.registry"),
            theirs=importlib.import_module("vllm_omni.diffusion.attention.backends.fastvideo_vsa"),
            h3=importlib.import_module("vllm_omni.diffusion.models.minimax_h3.attention.fastvideo_h3"),
            vllm_config=config,
        )
    sys.path.remove(path)
    torch.distributed.destroy_process_group()


@pytest.fixture
def slot(host):
    slot = host.registry.DiffusionAttentionBackendEnum.FASTVIDEO_VSA
    assert not slot.is_overridden()
    yield slot
    slot.clear_override()


def settings(topk=None):
    """The host's configuration with its VSA in every self-attention."""
    from vllm_omni.diffusion.data import OmniDiffusionConfig

    spec = {"backend": "FASTVIDEO_VSA", **({} if topk is None else {"fastvideo_vsa_topk": topk})}
    return OmniDiffusionConfig(model="none", diffusion_attention_config={"per_role": {"self": spec}})


def random_parameters(model, std=0.2):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.requires_grad_(False)


def wan(topk):
    """The host's Wan of two layers."""
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
    with set_current_diffusion_config(settings(topk)):
        model = WanTransformer3DModel(**sizes, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2)
    return random_parameters(model)


def run_wan(host, model):
    from vllm_omni.diffusion.forward_context import set_forward_context

    torch.manual_seed(1)
    frames, height, width = GRID.shape
    inputs = torch.randn(2, 4, frames, 2 * height, 2 * width), torch.tensor([500.0] * 2), torch.randn(2, 7, 16)
    with set_forward_context(vllm_config=host.vllm_config, omni_diffusion_config=settings()):
        return model(*inputs, return_dict=False)[0]


def dense_over_blocks(query, key, value, blocks, sizes, size):
    """Softmax over the valid tokens of the blocks that `blocks` [B, H, T, T] names: of [B, H, T * size, D], dense."""
    valid = (torch.arange(size) < sizes[:, None]).flatten()
    mask = blocks.repeat_interleave(size, 2).repeat_interleave(size, 3) & valid
    scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~mask, -1e30)
    return scores.softmax(-1) @ value


@pytest.fixture
def their_kernels(host, monkeypatch):
    """The host's own implementation with dense PyTorch in the place of fastvideo-kernel, which needs a GPU."""

    def vsa(query, key, value, sizes, query_sizes, gate, topk, *tile):
        size = math.prod(tile)
        query, key, value, gate = (x.transpose(1, 2) for x in (query, key, value, gate))
        pooled = [x.unflatten(2, (-1, size)).sum(3) / sizes[:, None] for x in (query, key, value)]
        scores = pooled[0] @ pooled[1].mT / math.sqrt(query.shape[-1])
        blocks = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(topk).indices, True)
        coarse = (scores.softmax(-1) @ pooled[2]).repeat_interleave(size, 2)
        return (coarse * gate + dense_over_blocks(query, key, value, blocks, sizes, size)).transpose(1, 2)

    def sparse(query, key, value, blocks, sizes, logical):
        query, key, value = (x.transpose(1, 2).float() for x in (query, key, value))
        return dense_over_blocks(query, key, value, blocks, sizes, 64).transpose(1, 2).to(torch.bfloat16)

    implementation, backend = host.theirs.FastVideoVSAImpl, host.theirs.FastVideoVSABackend
    monkeypatch.setattr(implementation, "forward_xpu", lambda self, *args: self.forward_cuda(*args))
    monkeypatch.setattr(implementation, "_fallback_reason", lambda *args: None)
    monkeypatch.setattr(backend, "validate_available", classmethod(lambda cls: None))
    monkeypatch.setattr(backend, "supports_packed_mask_free", classmethod(lambda cls: True))
    monkeypatch.setattr(host.theirs, "_fastvideo_vsa_bshd_op", vsa)
    monkeypatch.setattr(host.h3, "fastvideo_block_sparse_attn_bshd", sparse)


def test_the_host_finds_and_runs_the_plugin(host, slot, monkeypatch):
    from vllm_omni import plugins

    monkeypatch.setenv("VLLM_PLUGINS", "foveal")
    monkeypatch.setattr(plugins, "omni_plugins_loaded", False)
    theirs = host.h3.MiniMaxH3VSAImpl
    try:
        plugins.load_omni_general_plugins()
        assert slot.get_class().__module__ == "foveal.hosts.vllm_omni.backend"
        assert host.h3.MiniMaxH3VSAImpl is slot.get_class().get_impl_cls()
        again = slot.get_class()
        plugins.load_omni_plugins_by_group("vllm_omni.general_plugins")["foveal"]()
        assert slot.get_class() is again
        with pytest.raises(ValueError, match="'vllm_omni' is patched already"):
            foveal.patch("vllm_omni")
    finally:
        host.h3.MiniMaxH3VSAImpl = theirs


@pytest.mark.parametrize("topk", [2, 5])
def test_wan_equals_theirs_at_the_same_selection(host, slot, their_kernels, topk):
    theirs = run_wan(host, wan(topk))
    with foveal.patch("vllm_omni", impl="torch"):
        model = wan(topk)
    layer = model.blocks[0].attn1
    assert layer.attn.attention.implementation == "torch"
    assert layer.to_gate_compress is not None
    torch.testing.assert_close(run_wan(host, model), theirs, rtol=1e-4, atol=1e-4)
    for block in model.blocks:
        block.attn1.attn.attention.topk = 12  # of 2 x 2 x 3 cubes
    dense = run_wan(host, model)
    assert (dense - theirs).abs().max() > 1e-2


def test_wan_without_gates_runs_the_fine_branch_alone(host, slot, their_kernels):
    def run():
        model = wan(2)
        for block in model.blocks:
            block.attn1.to_gate_compress = None
        return run_wan(host, model)

    theirs = run()
    with foveal.patch("vllm_omni", impl="torch"):
        torch.testing.assert_close(run(), theirs, rtol=1e-4, atol=1e-4)


def h3_layer(topk=None, sparsity=None):
    """The host's attention of MiniMax-H3, with its gate."""
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.models.minimax_h3.minimax_h3_transformer import (
        MiniMaxH3Attention,
        MiniMaxH3DiTArchConfig,
    )

    arch = MiniMaxH3DiTArchConfig(hidden_size=32, num_attention_heads=2, attention_head_dim=32, rope_inv_freq_len=4)
    with set_current_diffusion_config(settings(topk)):
        layer = MiniMaxH3Attention(arch, None, prefix="blocks.0.attn")
        layer.enable_vsa_gate()
    layer.vsa_sparsity = sparsity
    return random_parameters(layer)


def run_h3(layer, padding=17):
    """[T, hidden] rows of a packed sequence through the layer, and what its attention was given."""
    from vllm_omni.diffusion.attention.backends.abstract import VideoTokenLayout, VideoTokenSpan

    start, used = sum(SEGMENTS), sum(SEGMENTS) + GRID.num_tokens
    span = VideoTokenSpan(start=start, latent_grid=GRID.shape, role="target")
    bounds = [0, used] if padding == 0 else [0, used, used + padding]
    given = {}
    handle = layer.attention.register_forward_pre_hook(lambda module, args: given.update(args=args))
    rows = torch.randn(used + padding, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    output = layer(
        rows,
        rope_table=None,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=used,
        video_layout=VideoTokenLayout(used_len=used, video_spans=(span,)),
        vsa_prefix_segments=SEGMENTS,
    )
    handle.remove()
    return output[:used].float(), given["args"]


@pytest.mark.parametrize("padding", [0, 17])
def test_minimax_h3_equals_theirs_and_ours(host, slot, their_kernels, padding):
    theirs, _ = run_h3(h3_layer(topk=4), padding)
    with foveal.patch("vllm_omni", impl="torch"):
        layer = h3_layer(topk=4)
    assert layer.attention.attention.implementation == "torch"
    ours, (*inputs, metadata) = run_h3(layer, padding)
    assert_close(ours, theirs)
    found = layer.attention(*inputs, metadata)
    used = sum(SEGMENTS) + GRID.num_tokens
    assert found.shape[1] == used + padding
    assert not found[:, used:].any()
    query, key, value, gate = (x[:, :used].transpose(1, 2) for x in (*inputs, metadata.extra["gate_compress"]))
    layout = TokenLayout(GRID, before=SEGMENTS)
    expected = foveal.vsa_attention(
        query, key, value, config=VSAConfig(topk=4), layout=layout, gate_coarse=gate, impl="reference"
    )
    assert_close(found[:, :used].transpose(1, 2), expected)


def assert_close(got, expected):
    """Equal but for the rounding of bfloat16."""
    got, expected = got.double(), expected.double()
    assert float((got - expected).norm() / expected.norm()) < 0.005


def test_minimax_h3_follows_the_sparsity_of_the_checkpoint(host, slot):
    with foveal.patch("vllm_omni", impl="torch"):
        by_sparsity, by_topk = h3_layer(sparsity=0.8), h3_layer(topk=8)
        assert GRID.num_cubes(H3_TILE) == 40
        torch.testing.assert_close(run_h3(by_sparsity)[0], run_h3(by_topk)[0], rtol=0, atol=0)
        both = h3_layer(topk=3, sparsity=0.8)
    assert not torch.equal(run_h3(both)[0], run_h3(by_topk)[0])


def test_a_version_without_the_slot_is_left_alone(host, slot, monkeypatch):
    monkeypatch.setattr(host.registry, "DiffusionAttentionBackendEnum", types.SimpleNamespace())
    with pytest.warns(
        UserWarning, match="foveal does not run in this vLLM-Omni: .* no attention backend FASTVIDEO_VSA"
    ):
        entry_point("vllm_omni.general_plugins")()


def test_the_command_shows_it_work(host, slot, capsys, monkeypatch):
    from vllm_omni import plugins

    from foveal.hosts.vllm_omni import __main__ as command

    monkeypatch.setattr(plugins, "omni_plugins_loaded", True)
    assert command.main() == 1
    assert "the slot FASTVIDEO_VSA runs vllm_omni.diffusion" in capsys.readouterr().out
    with foveal.patch("vllm_omni", impl="torch"):
        assert command.main() == 0
    assert "the slot FASTVIDEO_VSA runs foveal.hosts.vllm_omni.backend.FovealVSA_torch" in capsys.readouterr().out


def test_layers_without_a_video_run_the_hosts_dense_attention(host, slot):
    from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
    from vllm_omni.diffusion.attention.layer import Attention
    from vllm_omni.diffusion.config import set_current_diffusion_config

    with foveal.patch("vllm_omni", impl="torch"), set_current_diffusion_config(settings(2)):
        layer = Attention(num_heads=2, head_size=16, causal=False, softmax_scale=0.25, role="self")
    query, key = torch.randn(1, 30, 2, 16), torch.randn(1, 40, 2, 16)

    def dense(query, key, **more):
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(query, key, key, scale=0.25, **more).transpose(1, 2)

    torch.testing.assert_close(layer(query, key, key), dense(query, key))
    torch.testing.assert_close(layer(key, key, key), dense(key, key))
    # What the model says of its tokens does not fit: no guess.
    wrong = AttentionMetadata(extra={"vsa_dit_seq_shape": (2, 4, 4)})
    torch.testing.assert_close(layer(key, key, key, wrong), dense(key, key))
    with foveal.patch("vllm_omni", impl="torch"), set_current_diffusion_config(settings(2)):
        causal = Attention(num_heads=2, head_size=16, causal=True, softmax_scale=0.25, role="self")
    torch.testing.assert_close(causal(key, key, key), dense(key, key, is_causal=True))


def test_unplugged_the_host_is_what_it_was(host, slot):
    from vllm_omni.diffusion.attention.selector import _cached_get_backend_cls

    before, override = slot.get_path(), host.h3.MiniMaxH3VSAImpl
    patch = foveal.patch("vllm_omni", impl="torch")
    assert slot.get_path() == "foveal.hosts.vllm_omni.backend.FovealVSA_torch"
    assert _cached_get_backend_cls("FASTVIDEO_VSA", 64).get_impl_cls().implementation == "torch"
    patch.undo()
    assert (slot.get_path(), slot.is_overridden(), host.h3.MiniMaxH3VSAImpl) == (before, False, override)
    assert _cached_get_backend_cls.cache_info().currsize == 0
    # Another package's backend in the slot comes back too.
    host.registry.register_diffusion_backend(slot, "another.package.Backend")
    with foveal.patch("vllm_omni"):
        assert slot.get_path().endswith("FovealVSA_auto")
    assert slot.get_path() == "another.package.Backend"
