"""MiniMax-H3 end to end: diffusers' modular pipeline from noise to video and sound, tiny; casting and offloading."""

import pytest
import torch
from family_checks import DENSE_METHODS
from test_fasth3 import LAYERS, release
from test_minimax_h3 import TestMiniMaxH3 as Tiny
from tiny_wan import DENSE_VSA, SPARSE_SLA, SPARSE_VSA, randomize

import foveal
from foveal import Policy, TokenLayout, VideoGrid, load_checkpoint, set_policy, sparsify
from foveal.models.processor import sparse_processors, state_of

diffusers = pytest.importorskip("diffusers", minversion="0.42.1")
if not hasattr(diffusers, "MiniMaxH3Transformer3DModel"):
    pytest.skip("diffusers has no MiniMax-H3", allow_module_level=True)

WORDS, CHANNELS, SOUND = 9, 4, 8
# The shortest clip that the pipeline makes, on a canvas of 2 x 3 tokens.
FRAMES, HEIGHT, WIDTH = 124, 64, 96


def tiny_pipeline():
    """The pipeline of `t2va` without the text encoder, whose results it is given."""
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.minimax_h3 import modular_blocks_minimax_h3 as blocks

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLMiniMaxH3(
        latent_channels=CHANNELS,
        block_out_channels=(4, 4, 4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=1,
        decoder_attention_head_dim=16,
        decoder_num_register_tokens=1,
        decoder_ffn_mult=1,
        latents_mean=(0.0,) * CHANNELS,
        latents_std=(1.0,) * CHANNELS,
    )
    audio_vae = diffusers.AutoencoderKLMiniMaxH3Audio(
        encoder_dim=2,
        latent_dim=16,
        latent_channels=SOUND,
        num_attention_heads=1,
        decoder_dim=128,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        latents_mean=[0.0] * SOUND,
        latents_std=[1.0] * SOUND,
    )
    steps = {"denoise": blocks.MiniMaxH3CoreDenoiseStep(), "decode": blocks.MiniMaxH3DecodeStep()}
    pipe = SequentialPipelineBlocks.from_blocks_dict(steps).init_pipeline()
    pipe.update_components(
        transformer=Tiny().model(audio_in_channels=SOUND),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        scheduler=diffusers.MiniMaxH3Scheduler(),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def generate(pipe, steps=3, output_type="pt"):
    """The video [F, 3, H, W] in [0, 1] and the sound [2, samples]; [F, H, W, 3] of "np"."""
    generator = torch.Generator().manual_seed(1)
    made = pipe(
        prompt_embeds=torch.randn(1, WORDS, 16, generator=generator),
        text_token_tags=torch.ones(WORDS, dtype=torch.long),
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=steps,
        generator=generator,
        output_type=output_type,
        output=["videos", "audio"],
    )
    return made["videos"][0], made["audio"][0]


@DENSE_METHODS
def test_video_and_sound_of_dense_attention(config):
    pipe = tiny_pipeline()
    expected = generate(pipe)
    assert expected[0].shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert expected[1].shape[0] == 2
    assert all(x.isfinite().all() and x.std() > 1e-4 for x in expected)
    sparsify(pipe, config)
    for made, x in zip(generate(pipe), expected, strict=True):
        torch.testing.assert_close(made, x, rtol=0, atol=1e-4)
    state = state_of(pipe.transformer)
    assert state.grid == VideoGrid(37, 2, 3)


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
def test_sparse_with_a_policy(config):
    """A generation whose steps a policy keeps dense is the dense one, and one step less is another."""
    pipe = tiny_pipeline()
    expected = generate(pipe)
    sparsify(pipe, config)
    randomize(pipe.transformer)
    set_policy(pipe, Policy(dense_first_steps=3))
    torch.testing.assert_close(generate(pipe), expected, rtol=0, atol=1e-5)
    phases = []
    pipe.transformer.register_forward_pre_hook(lambda *_: phases.append(state_of(pipe.transformer).phase.dense))
    set_policy(pipe, Policy(dense_first_steps=1))
    video, sound = generate(pipe)
    assert phases[0]
    assert len(phases) > 1
    assert not any(phases[1:])
    assert (video - expected[0]).abs().max() > 1e-5
    assert sound.isfinite().all()


def test_a_released_checkpoint_saved_and_loaded(tmp_path):
    pipe = tiny_pipeline()
    pipe.update_components(transformer=Tiny().model())
    report = load_checkpoint(pipe, release(tmp_path / "FastH3"))
    assert report.layers == LAYERS
    foveal.save(pipe, tmp_path / "saved")
    again = tiny_pipeline()
    again.update_components(transformer=Tiny().model(seed=1))
    foveal.load(again, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(Tiny().run(again.transformer), Tiny().run(pipe.transformer))


def test_layouts_of_the_pipeline():
    pipe, seen = tiny_pipeline(), []
    sparsify(pipe, SPARSE_VSA)
    processor = next(iter(sparse_processors(pipe.transformer).values()))
    run = processor._run_method
    processor._run_method = lambda tokens, *rest: seen.append(tokens) or run(tokens, *rest)
    generate(pipe, steps=2)
    assert [(x.before, x.after) for x in seen] == [((WORDS, 2 * 207), ())]
    assert all(isinstance(x, TokenLayout) for x in seen)


@torch.no_grad()
def test_references_have_a_transformer_of_their_own():
    """Two pictures and a clip of other sizes, a voice, and a clip's own sound: each run of a kind is a segment."""
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3AudioReference as Sound
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference as Picture
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3VideoReference as Clip
    from diffusers.modular_pipelines.minimax_h3 import modular_blocks_minimax_h3 as blocks

    steps = {"denoise": blocks.MiniMaxH3Ref2VACoreDenoiseStep(), "decode": blocks.MiniMaxH3DecodeStep()}
    pipe = SequentialPipelineBlocks.from_blocks_dict(steps).init_pipeline()
    parts, model = tiny_pipeline(), Tiny().model(audio_in_channels=SOUND)
    shared = ("vae", "audio_vae", "scheduler", "audio_scheduler")
    pipe.update_components(transformer_ref=model, **{name: getattr(parts, name) for name in shared})
    pipe.set_progress_bar_config(disable=True)

    def video_and_sound():
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        made = pipe(
            prompt_embeds=draw(1, WORDS, 16),
            text_token_tags=torch.tensor([1, 0, 0, 1, 1, 1, 1, 1, 1]),
            normalized_references=[Picture(None), Picture(None), Sound(None), Clip(None, audio=torch.zeros(2, 1))],
            condition_latents=[draw(1, CHANNELS, *sides) for sides in ((1, 4, 4), (1, 6, 4), (2, 4, 6))],
            audio_condition_latents=[draw(10, SOUND), draw(6, SOUND)],
            height=HEIGHT,
            width=WIDTH,
            num_frames=22,
            num_inference_steps=2,
            generator=generator,
            output_type="pt",
            output=["videos", "audio"],
        )
        return made["videos"][0], made["audio"][0]

    expected, layouts = video_and_sound(), []
    sparsify(pipe, DENSE_VSA)
    for processor in sparse_processors(model).values():
        run = processor._run_method
        processor._run_method = lambda tokens, *rest, run=run: layouts.append(tokens) or run(tokens, *rest)
    for made, x in zip(video_and_sound(), expected, strict=True):
        torch.testing.assert_close(made, x, rtol=0, atol=1e-4)
    assert layouts == [TokenLayout(VideoGrid(7, 2, 3), (WORDS, 4 + 6, 10 + 6, 12, 2 * 37))] * LAYERS


@pytest.mark.parametrize(("given", "forwards"), [(2, 1), (5, 4), (9, 8)])
def test_steps_count_the_end_of_the_schedule(given, forwards):
    """As the reports of distilled checkpoints say."""
    pipe, calls = tiny_pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    generate(pipe, given)
    assert len(calls) == forwards


def test_one_file(tmp_path):
    """Video and sound in one MP4, as the page says."""
    av = pytest.importorskip("av")
    pipe = sparsify(tiny_pipeline(), SPARSE_VSA)
    video, sound = generate(pipe, 2, "np")
    path = str(tmp_path / "clip.mp4")
    diffusers.utils.encode_video(video, 24, path, audio=sound, audio_sample_rate=pipe.audio_sampling_rate)
    with av.open(path) as written:
        assert [stream.type for stream in written.streams] == ["video", "audio"]
        assert sum(1 for _ in written.decode(video=0)) == FRAMES


def mixed_precision(config):
    """A sparse transformer in the dtypes that `from_pretrained(torch_dtype=torch.bfloat16)` gives it."""
    model = Tiny().model()
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    model = sparsify(model, config)
    randomize(model)
    return model


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
@torch.no_grad()
def test_layerwise_casting(config):
    """Weights in eight bits, but for ours, the norms, and what the release has in float32."""
    model, reference = (mixed_precision(config) for _ in range(2))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    dtypes = {name: x.dtype for name, x in model.named_parameters()}
    assert dtypes["transformer_blocks.0.attn.to_q.weight"] is torch.float8_e4m3fn
    kept = [
        name for name in dtypes if ".processor." in name or "norm" in name.split(".")[-2] or name.startswith("proj_")
    ]
    before = {name: x.dtype for name, x in reference.named_parameters()}
    assert any(".processor." in name for name in kept)
    assert all(dtypes[name] is before[name] for name in kept)
    output, expected = Tiny().run(model), Tiny().run(reference)
    assert output.isfinite().all()
    assert (output - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offloading(config, kind):
    model, reference = (mixed_precision(config) for _ in range(2))
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    assert torch.equal(Tiny().run(model), Tiny().run(reference))


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
@torch.no_grad()
def test_compile_repeated_blocks(config):
    """diffusers compiles the blocks of the refiner too, which stay dense; one layout after the other."""
    model, expected = sparsify(Tiny().model(), config), []
    randomize(model)
    requests = [Tiny().inputs(latent=latent, batch=1) for latent in Tiny.LATENTS]
    expected = [Tiny().run(model, **inputs) for inputs in requests]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for inputs, output in zip(requests, expected, strict=True):
        torch.testing.assert_close(Tiny().run(model, **inputs), output, rtol=0, atol=1e-5)


@torch.no_grad()
def test_group_offloading_with_layerwise_casting():
    """Both at once, as a GPU that is too small for the model needs it."""
    model, reference = (mixed_precision(SPARSE_VSA) for _ in range(2))
    for part in (model, reference):
        part.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(Tiny().run(model), Tiny().run(reference))
