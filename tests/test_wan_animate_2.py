"""Sparse attention in Wan-Animate-2, whose tokens read a video and, of its reference, their own frame."""

import pytest
import torch
from family_checks import FamilyChecks
from tiny_wan import DENSE_SLA, DENSE_VSA, SPARSE_SLA, SPARSE_VSA
from torch.nn import functional

from foveal import SLAConfig, VideoGrid, VSAConfig
from foveal.lab.inspect.capture import capture_selections
from foveal.models import densify, sparsify
from foveal.models.processor import sparse_processors
from foveal.testing import relative_error

diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "WanAnimate2Transformer3DModel"):
    pytest.skip("this diffusers has no Wan-Animate-2", allow_module_level=True)

from diffusers.models.transformers import transformer_wan_animate_2 as theirs  # noqa: E402

LAYERS = 3


@pytest.fixture
def without_flex(monkeypatch):
    """The dense model with its own mask, in attention that has a backward on a CPU, which FlexAttention has not."""
    dispatch = theirs.dispatch_attention_fn

    def mask_of(mask_mod, B, H, Q_LEN, KV_LEN, device, _compile):
        rows, columns = (torch.arange(length, device=device) for length in (Q_LEN, KV_LEN))
        return mask_mod(0, 0, rows[:, None], columns)

    def attention(query, key, value, attn_mask=None, **options):
        if attn_mask is None:
            return dispatch(query, key, value, **options)
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return functional.scaled_dot_product_attention(*heads_first, attn_mask=attn_mask).transpose(1, 2)

    monkeypatch.setattr(theirs, "create_block_mask", mask_of)
    monkeypatch.setattr(theirs, "dispatch_attention_fn", attention)


@pytest.mark.usefixtures("without_flex")
class TestWanAnimate2(FamilyChecks):
    LAYERS = ("blocks.0.self_attn", "blocks.1.self_attn", "blocks.2.self_attn")
    LATENTS = ((3, 10, 12), (3, 12, 10))
    GRID = VideoGrid(3, 5, 6)

    def model(self, seed=0, dim=32):
        torch.manual_seed(seed)
        sizes = {"dim": dim, "num_heads": 2, "num_layers": LAYERS, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16}
        channels = {"in_dim": 10, "out_dim": 4, "text_len": 7, "use_img_emb": False}
        return diffusers.WanAnimate2Transformer3DModel(**sizes, **channels).eval()

    def inputs(self, latent=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        frames, height, width = latent or self.LATENTS[0]

        def draw(channels, frames):
            return torch.randn(2, channels, frames, height, width, generator=generator).to(dtype)

        return {
            "hidden_states": draw(4, frames),
            "condition_latents": draw(6, frames),
            "reference": draw(4, frames - 1),
            "reference_condition": draw(6, frames - 1),
            "timestep": torch.tensor([3.0, 403.0]),
            "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator).to(dtype),
        }

    def run(self, model, **inputs):
        """The reference's pass, and one of the generated video."""
        given = inputs or self.inputs()
        frames, height, width = given["hidden_states"].shape[2:]
        size = (height // 2) * (width // 2)
        grid = torch.tensor([[frames - 1, height // 2, width // 2]]).expand(2, 3)
        shared = {"timestep": given["timestep"], "encoder_hidden_states": list(given["encoder_hidden_states"])}
        shared |= {"kv_cache": theirs.WanAnimate2KVCache(LAYERS), "return_dict": False}
        model(
            hidden_states=list(given["reference"]),
            condition_latents=list(given["reference_condition"]),
            kv_cache_mode="extract",
            seq_len=(frames - 1) * size,
            offset_grid_sizes=grid,
            **shared,
        )
        (made,) = model(
            hidden_states=list(given["hidden_states"]),
            condition_latents=list(given["condition_latents"]),
            kv_cache_mode="cached",
            seq_len=frames * size,
            reference_grid_sizes=grid,
            origin_len=given.get("origin_len", 4 * (frames - 2) + 1),
            origin_area=[8 * height, 8 * width],
            **shared,
        )
        return torch.stack(made)

    # diffusers' own model has neither.
    test_gradient_checkpointing_gives_the_same_gradients = test_sequential_offloading = None

    def test_the_dense_model_has_no_checkpointing_and_no_sequential_offloading(self):
        accelerate = pytest.importorskip("accelerate")
        model = self.model().train()
        model.enable_gradient_checkpointing()
        with pytest.raises(TypeError, match="unexpected keyword argument 'kv_cache'"):
            self.run(model)
        model = self.model()
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(NotImplementedError, match="meta tensor"), torch.no_grad():
            self.run(model)

    @pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
    @torch.no_grad()
    def test_one_softmax_over_the_kept_blocks_and_the_frame_of_the_reference(self, config, monkeypatch):
        """The dense model gives the same under a mask that also has the blocks that each layer picked."""
        if isinstance(config, SLAConfig):
            config = config.replace(linear_scope="none", projection=False, drop_ratio=0.0)
        model = sparsify(self.model().double(), config)  # VSA's coarse branch is zero at the start
        data = self.inputs(dtype=torch.float64)
        with capture_selections(model) as selections:
            output = self.run(model, **data)
        layers = [(selections[f"{name}.processor.attention"], sparse_processors(model)[name]) for name in self.LAYERS]
        masks = [_token_mask(selection, layer.attention, self.GRID) for selection, layer in layers]
        assert not all(mask.all() for mask in masks)
        dense_attention, calls = theirs.dispatch_attention_fn, iter(masks)

        def attention(query, key, value, attn_mask=None, **options):
            if attn_mask is not None:
                picked, attn_mask = next(calls), attn_mask.expand(2, 2, *attn_mask.shape).clone()
                attn_mask[..., : picked.shape[2], : picked.shape[3]] &= picked
            return dense_attention(query, key, value, attn_mask, **options)

        monkeypatch.setattr(theirs, "dispatch_attention_fn", attention)
        expected = self.run(densify(model), **data)
        # Rotary embeddings are float32 in diffusers whatever the model is.
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_fused_projections(self):
        model = self.sparse(SPARSE_SLA)
        expected = self.run(model)
        for block in model.blocks:
            block.self_attn.fuse_projections()
        torch.testing.assert_close(self.run(model), expected, rtol=0, atol=1e-5)

    def test_sizes_that_do_not_fit(self):
        model = sparsify(self.model(), SPARSE_SLA)
        with pytest.raises(ValueError, match="3 frames of 30 tokens, got 4 and 30; run the model dense"):
            self.run(model, **self.inputs(), origin_len=9)


def _token_mask(selection, attention, grid):
    """The selection in raster order, bool [B, H, L, L]."""
    places = attention.token_places(grid)
    return selection.expand(selection.critical_mask())[:, :, places][..., places]


@pytest.mark.slow
@torch.no_grad()
def test_against_flex_attention():
    """The dense model as it is."""
    checks = TestWanAnimate2()
    for config in (DENSE_SLA, DENSE_VSA):
        checks.check_equals_dense(checks.model(), config, checks.inputs())


@pytest.mark.usefixtures("without_flex")
@pytest.mark.parametrize("config", [SLAConfig(keep_ratio=1.0, drop_ratio=0.0), VSAConfig(keep_ratio=1.0)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels(config, device):
    """Heads of 64 in bfloat16, with gradients: no farther from float32 than twice the dense model."""
    checks, generator = TestWanAnimate2(), torch.Generator().manual_seed(5)
    data = checks.inputs(latent=(4, 16, 28))
    weight = torch.randn(2, 4, 4, 16, 28, generator=generator)

    def run(sparse, device, dtype):
        model = checks.model(dim=128)
        model = (sparsify(model, config) if sparse else model).to(device, dtype)
        fed = {name: x.to(device, x.dtype if name == "timestep" else dtype) for name, x in data.items()}
        inputs = [fed[name].requires_grad_() for name in ("hidden_states", "reference")]
        output = checks.run(model, **fed)
        gradients = torch.autograd.grad((output * weight.to(device)).sum(), inputs)
        return [x.detach().float().cpu() for x in (output, *gradients)]

    exact, plain = run(False, "cpu", torch.float32), run(False, device, torch.bfloat16)
    for found, other, wanted in zip(run(True, device, torch.bfloat16), plain, exact, strict=True):
        assert relative_error(found, wanted) <= 2 * relative_error(other, wanted)
