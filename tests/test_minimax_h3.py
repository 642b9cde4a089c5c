"""Sparse attention in a tiny random `MiniMaxH3Transformer3DModel`, and in the loop of its modular pipeline."""

import pytest
import torch
from family_checks import DENSE_METHODS, METHODS, FamilyChecks
from tiny_wan import DENSE_SLA, SPARSE_SLA

from foveal import Policy, TokenLayout, VideoGrid, VSAConfig, set_policy
from foveal.models import sparsify, summary
from foveal.models.families import minimax_h3
from foveal.models.model_sizes import MODEL_SIZES
from foveal.models.processor import sparse_processors, state_of

diffusers = pytest.importorskip("diffusers", minversion="0.42.1")
if not hasattr(diffusers, "MiniMaxH3Transformer3DModel"):
    pytest.skip("diffusers has no MiniMax-H3", allow_module_level=True)

AUDIO, CHANNELS = 3, 2


def packed(latent, text, keyframes=(), audio=AUDIO):
    """The structure of a request, as diffusers' own pipeline packs it, and how many rows are conditions."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep as Layout

    frames, height, width = latent
    positions, tags, video, sound, words, conditions, _ = Layout.build_packed_sequence(
        torch.ones(text, dtype=torch.long), frames, height, width, audio, (1, 2, 2), CHANNELS, 2, 0, keyframes
    )
    return {
        "position_ids": positions,
        "token_tags": tags,
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": words,
    }, conditions


class TestMiniMaxH3(FamilyChecks):
    LAYERS = ("transformer_blocks.0.attn", "transformer_blocks.1.attn", "transformer_blocks.2.attn")
    LATENTS = ((3, 10, 12), (3, 12, 10))
    GRID = VideoGrid(3, 5, 6)
    WORDS = 7
    PACKED = True
    TEXT = WORDS + 30 + AUDIO * CHANNELS  # with one condition frame

    def model(self, seed=0, **overrides):
        torch.manual_seed(seed)
        settings = {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "hidden_size": 32,  # narrower than the heads
            "num_layers": 3,
            "num_refiner_layers": 1,
            "ffn_dim": 48,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        }
        return diffusers.MiniMaxH3Transformer3DModel(**settings | overrides).eval()

    def inputs(self, latent=None, dtype=torch.float32, batch=2, keyframes=("first",), audio=AUDIO):
        structure, conditions = packed(latent or self.LATENTS[0], self.WORDS, keyframes, audio)
        generator = torch.Generator().manual_seed(1)
        timesteps = torch.zeros(len(structure["token_tags"]), dtype=torch.long)
        timesteps[structure["audio_indices"]] = 1
        timesteps[structure["video_indices"][:conditions]] = 2
        rows = {name: len(structure[f"{name}_indices"]) for name in ("video", "audio", "text")}
        return structure | {
            "hidden_states": torch.randn(batch, rows["video"], 16, generator=generator).to(dtype),
            "audio_hidden_states": torch.randn(batch, rows["audio"], 4, generator=generator).to(dtype),
            "encoder_hidden_states": torch.randn(batch, rows["text"], 16, generator=generator).to(dtype),
            "timestep": torch.tensor([0.25, 0.5, 1.0]),
            "timestep_indices": timesteps,
        }

    def run(self, model, **inputs):
        return torch.cat([x.flatten(1) for x in model(**(inputs or self.inputs()), return_dict=False)], 1)

    @DENSE_METHODS
    @pytest.mark.parametrize("keyframes", [(), ("first", "last")], ids=["no condition", "two conditions"])
    @pytest.mark.parametrize("audio", [AUDIO, 0], ids=["audio", "no audio"])
    def test_other_packings(self, config, keyframes, audio):
        """Without audio, condition frames stand right before the video, and the first has the time of its start."""
        data = self.inputs(dtype=torch.float64, keyframes=keyframes, audio=audio)
        self.check_equals_dense(self.model().double(), config, data)

    def test_fused_projections(self):
        model = self.model().double()
        model.fuse_qkv_projections()
        self.check_equals_dense(model, DENSE_SLA, self.inputs(dtype=torch.float64))

    def test_the_refiner_stays_dense(self):
        model = sparsify(self.model(), SPARSE_SLA)
        assert not any("refiner" in name for name in sparse_processors(model))
        with torch.no_grad():
            self.run(model)
        assert {row.layer for row in summary(model).rows} == set(self.LAYERS)

    @METHODS
    @torch.no_grad()
    def test_protected_rows_see_everything(self, config):
        """Audio and conditions are exact in the first layer, where nothing before them was sparse."""
        dense, sparse = (self.model(num_layers=1).double() for _ in range(2))
        sparsify(sparse, config)
        data = self.inputs(dtype=torch.float64)
        expected, output = (model(**data, return_dict=False) for model in (dense, sparse))
        torch.testing.assert_close(output[1], expected[1], rtol=0, atol=1e-12)
        conditions = self.GRID.height * self.GRID.width
        torch.testing.assert_close(output[0][:, :conditions], expected[0][:, :conditions], rtol=0, atol=1e-12)
        assert (output[0][:, conditions:] - expected[0][:, conditions:]).abs().max() > 1e-4

    @pytest.mark.parametrize(
        ("keyframes", "audio", "before"),
        [(("first",), AUDIO, (7, 30, 6)), ((), AUDIO, (7, 6)), (("first", "last"), 0, (7, 60)), ((), 0, (7,))],
    )
    def test_segments(self, keyframes, audio, before):
        layout = minimax_h3.read_grid(self.model(), self.inputs(keyframes=keyframes, audio=audio))
        assert layout == TokenLayout(self.GRID, before=before)

    @torch.no_grad()
    def test_gates_of_all_rows(self):
        """VSA as FastH3 was trained: text, conditions, and audio have the coarse branch too, by gates of their own."""
        model = self.sparse(VSAConfig(keep_ratio=1.0, tile=(2, 2, 2)), layers=[0])
        data, outputs = self.inputs(), []
        for processor in sparse_processors(model).values():
            processor.attention.to_gate_coarse.weight.zero_()
            for gate in (0.0, 1.0):
                processor.attention.to_gate_coarse.bias.fill_(gate)
                outputs.append(model(**data, return_dict=False))
        assert (outputs[0][1] - outputs[1][1]).abs().max() > 1e-3
        torch.testing.assert_close(outputs[0], self.model()(**data, return_dict=False), rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_one_reading_a_request(self, monkeypatch):
        """Steps of one request read its layout once; another request is read anew, though its tensors are as large."""
        model, reads = sparsify(self.model(), SPARSE_SLA), []
        read = minimax_h3.grid_of_coordinates
        monkeypatch.setattr(minimax_h3, "grid_of_coordinates", lambda *x: reads.append(1) or read(*x))
        for latent in self.LATENTS:
            data = self.inputs(latent)
            for step in range(3):
                self.run(model, **data | {"timestep": torch.tensor([0.1 * step, 0.5, 1.0])})
            assert state_of(model).grid == VideoGrid(latent[0], latent[1] // 2, latent[2] // 2)
        assert len(reads) == 2
        data["position_ids"][-1, 0] += 1.0  # changed in place: the last row is no longer of the last frame
        with pytest.raises(ValueError, match="position_ids must be those of one grid of tokens in raster order"):
            self.run(model, **data)

    @torch.no_grad()
    def test_inference_mode(self):
        model = sparsify(self.model(), DENSE_SLA)
        with torch.inference_mode():
            output = self.run(model)
        torch.testing.assert_close(output.clone(), self.run(self.model()), rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_the_video_must_come_last(self):
        model, data = sparsify(self.model(), SPARSE_SLA), self.inputs(keyframes=())
        names = ("video_indices", "audio_indices", "text_indices")
        turned = {name: len(data["token_tags"]) - 1 - data[name].flip(0) for name in names}
        with pytest.raises(ValueError, match="video_indices must hold the last row of the sequence"):
            self.run(model, **data | turned)

    @torch.no_grad()
    def test_policies_count_noise_down(self):
        """H3's timesteps rise to 1 as the noise goes; a policy's 1000 is pure noise as everywhere."""
        model = self.sparse(SPARSE_SLA)
        data = self.inputs()
        sparse = self.run(model, **data)
        set_policy(model, Policy(dense_above=700.0))  # the video's 0.25 is 750
        assert (self.run(model, **data) - sparse).abs().max() > 1e-4
        set_policy(model, Policy(dense_above=760.0))
        assert torch.equal(self.run(model, **data), sparse)

    @torch.no_grad()
    def test_the_loop_of_its_pipeline(self):
        """diffusers' own denoising loop, with its schedulers: dense first steps, then sparse, as a policy says."""
        from diffusers.modular_pipelines.minimax_h3 import denoise
        from diffusers.modular_pipelines.modular_pipeline import BlockState

        model = self.sparse(SPARSE_SLA)
        data, phases = self.inputs(batch=1), []

        class Components:
            transformer = model
            scheduler, audio_scheduler = diffusers.MiniMaxH3Scheduler(), diffusers.MiniMaxH3Scheduler(shift=3.0)

        set_policy(Components, Policy(dense_first_steps=2, dense_last_steps=1))
        Components.scheduler.set_timesteps(7)
        Components.audio_scheduler.set_timesteps(7)
        model.register_forward_pre_hook(lambda *_: phases.append(state_of(model).phase.dense))
        plan = [
            (torch.stack((video, audio, torch.tensor(1.0))), data["timestep_indices"])
            for video, audio in zip(Components.scheduler.timesteps, Components.audio_scheduler.timesteps, strict=True)
        ]
        structure = {name: data[name] for name in packed(self.LATENTS[0], self.WORDS)[0]}
        state = BlockState(
            latents=data["hidden_states"][0],
            audio_latents=data["audio_hidden_states"][0],
            prompt_embeds=data["encoder_hidden_states"],
            row_timestep_plan=plan,
            denoiser_input_fields=structure,
            attention_kwargs=None,
            audio_timesteps=Components.audio_scheduler.timesteps,
            num_condition_video_rows=30,
            num_condition_audio_rows=0,
        )
        loop = (denoise.MiniMaxH3LoopDenoiser(), denoise.MiniMaxH3LoopSchedulerStep())
        for index, timestep in enumerate(Components.scheduler.timesteps):
            for block in loop:
                _, state = block(Components, state, index, timestep)
        assert phases == [True, True, False, False, False, True]
        assert state.latents.isfinite().all()


def test_sizes():
    size = MODEL_SIZES["minimax-h3"]
    assert size.hidden_dim == 7168
    grid = size.grid(124, 768, 1344)
    assert (grid, grid.num_tokens) == (VideoGrid(37, 24, 42), 37296)
    with pytest.raises(ValueError, match="frames must be 5 more than a multiple of 17 for minimax-h3, got 121"):
        size.grid(121, 768, 1344)


def test_full_size_on_meta():
    with torch.device("meta"):
        model = sparsify(diffusers.MiniMaxH3Transformer3DModel(), SPARSE_SLA)
    assert len(sparse_processors(model)) == 50
    added = [name for name in model.state_dict() if ".processor." in name]
    assert len(added) == 100
    assert all(p.shape[0] == 128 for name, p in model.named_parameters() if ".processor." in name)
