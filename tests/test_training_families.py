"""The trainer beyond Wan: tiny random models of MiniMax-H3, LTX-2, and HunyuanVideo, saved, trained, and exported."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_training import config, metrics
from tiny_wan import DENSE_SLA, SPARSE_SLA, SPARSE_VSA

import foveal
from foveal import SLAConfig
from foveal.lab.data.dataset import write_latent_dataset
from foveal.lab.train.model import build_model, load_transformer, velocities
from foveal.lab.train.objective import levels_of, noised, sample_noise, sample_sound_noise, velocity_loss
from foveal.lab.train.recipes import RECIPES, parse
from foveal.lab.train.settings import LoraSettings, ModelSettings, SparsitySettings
from foveal.lab.train.throughput import sample_flops
from foveal.lab.train.trainer import Trainer, run_training
from foveal.layout import VideoGrid
from foveal.models.families.table import FAMILIES
from foveal.models.training import to_tokens, to_video

diffusers = pytest.importorskip("diffusers", minversion="0.42.1")
pytest.importorskip("peft")
if not hasattr(diffusers, "MiniMaxH3Transformer3DModel"):
    pytest.skip("diffusers has no MiniMax-H3", allow_module_level=True)

from test_hunyuan_video import TestHunyuanVideo as TinyHunyuanVideo  # noqa: E402
from test_ltx2 import TestLTX2 as TinyLTX2  # noqa: E402
from test_minimax_h3 import TestMiniMaxH3 as TinyMiniMaxH3  # noqa: E402
from test_minimax_h3 import packed  # noqa: E402

WORDS, TEXT = 7, 9
TINY = {"minimax_h3": TinyMiniMaxH3(), "ltx2": TinyLTX2(), "hunyuan_video": TinyHunyuanVideo()}
LATENT = {"minimax_h3": (4, 3, 10, 12), "ltx2": (4, 3, 5, 6), "hunyuan_video": (4, 3, 10, 12)}
SOUND = {"minimax_h3": (2, 4, 5), "ltx2": (2, 5, 2)}
FAMILY = pytest.mark.parametrize("name", TINY)


@pytest.fixture(autouse=True)
def one_thread():
    AcceleratorState._reset_state(reset_partial_state=True)  # a test before this one in the process may have trained
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def text(name, generator, words=WORDS):
    """The text tensors of one sample, padded to `TEXT`."""
    mask = (torch.arange(TEXT) < words).long()
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    found = {"prompt_embeds": draw(TEXT, 16) * mask[:, None], "prompt_attention_mask": mask}
    if name == "ltx2":
        found["audio_prompt_embeds"] = draw(TEXT, 16) * mask[:, None]
    if name == "hunyuan_video":
        found["pooled_prompt_embeds"] = draw(8)
    return found


@pytest.fixture
def run(tmp_path):
    """A function from a family's name to a run on its tiny model, from a folder as its pipeline is saved."""

    def prepare(name, **changes):
        TINY[name].model().save_pretrained(tmp_path / "base" / "transformer")
        shifts = {"scheduler": 12.0, "audio_scheduler": 3.0}
        if name == "minimax_h3":
            for part, shift in shifts.items():
                diffusers.MiniMaxH3Scheduler(shift=shift).save_pretrained(tmp_path / "base" / part)
        else:
            diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(tmp_path / "base" / "scheduler")
        generator = torch.Generator().manual_seed(3)
        samples = []
        for index in range(6):
            sample = {"latents": torch.randn(LATENT[name], generator=generator)}
            if name in SOUND:
                sample["audio_latents"] = torch.randn(SOUND[name], generator=generator)
            sample |= text(name, generator, 3 + index % 3) | {"caption": str(index), "id": f"{index}.mp4#0"}
            samples.append(sample)
        settings = {"space": "latent", "fps": 24, "model": None}
        empty = text(name, generator, 0 if name == "minimax_h3" else 1)
        write_latent_dataset(tmp_path / "data", samples, settings=settings, empty_prompt=empty)
        return config(
            tmp_path,
            **{
                "model": ModelSettings(str(tmp_path / "base")),
                "sparsity": SparsitySettings(SPARSE_VSA),
                "lora": LoraSettings(rank=2, alpha=6),
                "steps": 2,
                "evaluation__every": 0,
                "objective__shift": None,
                "objective__flow_matching": 0.0,
                "objective__distillation": 1.0,
                "objective__teacher": "same",
                "optimizer__trainable": "lora",
                "optimizer__ema_decay": None,
            }
            | changes,
        )

    return prepare


@FAMILY
@pytest.mark.parametrize("method", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
def test_it_trains_and_exports(run, name, method):
    settings = run(name, sparsity=SparsitySettings(method))
    trainer = Trainer(settings)
    before = {key: x.clone() for key, x in trainer.transformer.named_parameters()}
    result = trainer.run()
    assert result.finished
    assert all(0 < loss < 100 for loss in metrics(settings.output.parent).values())
    changed = {key for key, x in trainer.transformer.named_parameters() if not torch.equal(x, before[key])}
    assert any(".processor." in key for key in changed)
    assert any(".lora_B" in key for key in changed)
    assert all(".processor." in key or ".lora_" in key for key in changed)
    # Of a tiny model the largest layers are compared with dense attention too.
    assert set(result.evaluation.layers) == set(TINY[name].LAYERS)
    assert all(0 < layer.recall <= 1 + 1e-6 and layer.error > 0 for layer in result.evaluation.layers.values())
    # What was written is what was trained.
    again = foveal.load(TINY[name].model(), result.export / "sparse")
    learned = foveal.sparse_parameters(again)
    for key, x in foveal.sparse_parameters(trainer.transformer).items():
        assert torch.equal(learned[key], x), key
    loader = getattr(diffusers, FAMILIES[name].training.lora_loader)
    state, *rest = loader.lora_state_dict(result.export / "lora", return_lora_metadata=True)
    assert rest[-1]["transformer.lora_alpha"] == 6
    assert {key.removeprefix("transformer.").replace(".weight", ".default.weight") for key in state} == {
        key for key in trainer.parameters if ".lora_" in key
    }


@FAMILY
def test_a_student_that_keeps_everything_has_nothing_to_learn(run, name):
    settings = run(name, sparsity=SparsitySettings(DENSE_SLA), steps=1)
    result = run_training(settings)
    assert metrics(settings.output.parent)[1] < 1e-8
    assert result.evaluation.sparse == pytest.approx(result.evaluation.dense, rel=1e-4)


@FAMILY
@pytest.mark.parametrize("scale", [None, 3.5])
def test_the_loss_is_the_distance_to_the_dense_model(run, name, scale):
    settings = run(name, objective__guidance_scale=scale, batch_size=1)
    trainer = Trainer(settings)
    batch = trainer._read()
    (loss,) = trainer.losses.of_batch(batch, 0, dense_now=False)

    shifts = {"minimax_h3": (12.0, 3.0), "ltx2": (7.0, 7.0), "hunyuan_video": (7.0,)}[name]
    assert trainer.shifts == shifts
    clean = tuple(batch[key] for key in ("latents", "audio_latents") if key in batch)
    noise, sigmas = sample_noise(tuple(clean[0].shape), first=0, seed=0, shift=shifts[0])
    noises = (noise, *(sample_sound_noise(tuple(x.shape), first=0, seed=0) for x in clean[1:]))
    levels = levels_of(sigmas, shifts)
    noisy, _ = noised(clean, noises, levels)
    words = {key: x for key, x in batch.items() if isinstance(x, torch.Tensor) and "latents" not in key}
    dense = TINY[name].model()
    with torch.no_grad():
        taught = velocities(dense, noisy, levels, words)
        if scale is not None:
            empty = {key: x[None] for key, x in trainer.stream.dataset.empty_prompt().items()}
            without = velocities(dense, noisy, levels, empty)
            taught = tuple(x + scale * (y - x) for x, y in zip(without, taught, strict=True))
        student = velocities(build_model(settings), noisy, levels, words)
    torch.testing.assert_close(loss, velocity_loss(student, taught, levels).sum())
    assert loss > 1e-6


def test_velocities_of_minimax_h3_are_those_of_its_pipeline():
    """Rows as diffusers packs them, time from noise to data, and velocities that point to the noise."""
    model, generator = TinyMiniMaxH3().model(), torch.Generator().manual_seed(0)
    video, sound = torch.randn(1, 4, 3, 10, 12, generator=generator), torch.randn(1, 2, 4, 3, generator=generator)
    words = {key: x[None] for key, x in text("minimax_h3", generator).items()}
    structure, _ = packed((3, 10, 12), WORDS)
    from diffusers.modular_pipelines.minimax_h3.before_denoise import patchify_video_latents

    timesteps = torch.zeros(len(structure["token_tags"]), dtype=torch.long)
    timesteps[structure["audio_indices"]] = 1
    with torch.no_grad():
        rows, sounds = model(
            hidden_states=patchify_video_latents(video, (1, 2, 2))[None],
            audio_hidden_states=sound.permute(0, 1, 3, 2).reshape(1, -1, 4),
            encoder_hidden_states=words["prompt_embeds"][:, :WORDS],
            timestep=torch.tensor([0.25, 0.5]),
            timestep_indices=timesteps,
            return_dict=False,
            **structure,
        )
        found = velocities(model, (video, sound), (torch.tensor([0.75]), torch.tensor([0.5])), words)
    torch.testing.assert_close(patchify_video_latents(found[0], (1, 2, 2))[None], -rows)
    torch.testing.assert_close(found[1].permute(0, 1, 3, 2).reshape(1, -1, 4), -sounds)
    # One step of its scheduler from there to the data is one along the velocity.
    scheduler = diffusers.MiniMaxH3Scheduler()
    scheduler.set_timesteps(sigmas=[0.75, 0.0])
    stepped = scheduler.step(rows[0], scheduler.timesteps[0], patchify_video_latents(video, (1, 2, 2)))[0]
    torch.testing.assert_close(stepped, patchify_video_latents(video - 0.75 * found[0], (1, 2, 2)))


def test_tokens_and_back():
    video = torch.randn(2, 3, 2, 4, 6)
    tokens = to_tokens(video, (1, 2, 2))
    assert tokens.shape == (2, 12, 12)
    assert torch.equal(tokens[0, 4], video[0, :, 0, 2:4, 2:4].flatten())
    assert torch.equal(to_video(tokens, (1, 2, 2), video.shape), video)


def test_the_sound_shares_the_level_of_the_video_before_the_shift():
    levels = levels_of(torch.tensor([0.9, 0.96]), (12.0, 3.0))
    base = torch.tensor([0.9, 0.96]) / (12 - 11 * torch.tensor([0.9, 0.96]))
    torch.testing.assert_close(levels[1], 3 * base / (1 + 2 * base))
    assert torch.equal(levels_of(torch.tensor([0.3]), (5.0,))[0], torch.tensor([0.3]))


@FAMILY
def test_flops_count_what_the_tokens_of_the_video_go_through(run, name):
    model = TINY[name].model()
    grid = VideoGrid(3, 5, 6)
    more = sample_flops(model, grid, dense=True)
    for key, parameter in model.named_parameters():
        if any(part in key for part in FAMILIES[name].training.not_per_token):
            parameter.data = parameter.data.new_zeros(1, 1) if parameter.dim() == 2 else parameter.data
    assert more == sample_flops(model, grid, dense=True)
    sparse = sample_flops(foveal.sparsify(model, SLAConfig(keep_ratio=0.1, block_q=16, block_k=16)), grid)
    assert sparse < more


@pytest.mark.parametrize("recipe", ["minimax-h3-vsa", "minimax-h3-sla", "minimax-h3-router"])
def test_the_recipes_of_minimax_h3(run, recipe, tmp_path):
    """As they are, on the tiny model: in bfloat16, with gradient checkpointing."""
    run("minimax_h3")
    whole = RECIPES[recipe]()
    assert whole.objective.flow_matching == 0
    assert whole.model.gradient_checkpointing
    options = {"model.path": tmp_path / "base", "data.folder": tmp_path / "data", "data.held-out": 2, "batch-size": 2}
    options |= {"steps": 2, "device": "cpu", "tracker": "none", "output": tmp_path / "run"}
    if recipe != "minimax-h3-vsa":
        options |= {"sparsity.attention.block-q": 16, "sparsity.attention.block-k": 16}
    settings = parse([recipe, *(x for name, value in options.items() for x in (f"--{name}", str(value)))])
    result = run_training(settings)
    assert result.finished
    assert (result.export / "lora" / "pytorch_lora_weights.safetensors").is_file()
    manifest = json.loads((result.export / "sparse" / "foveal.json").read_text())
    assert manifest["components"]["transformer"]["family"] == "minimax_h3"


def test_minimax_h3_sharded_over_two_processes(run, tmp_path):
    """Frozen weights in bfloat16, those that are trained in float32; the same losses as in one process."""
    run("minimax_h3")
    options = {"model.path": tmp_path / "base", "data.folder": tmp_path / "data", "data.held-out": 2, "batch-size": 2}
    options |= {"steps": 2, "device": "cpu", "tracker": "none", "precision": "no"}
    found = {}
    for processes in (1, 2):
        output = tmp_path / f"run{processes}"
        arguments = [x for name, value in options.items() for x in (f"--{name}", str(value))]
        arguments += ["--parallel", "fsdp" if processes > 1 else "ddp", "--output", str(output)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        python = [sys.executable, "-c", "import sys; from foveal.lab.cli import main; sys.exit(main())"]
        done = subprocess.run(
            [*launcher, "--no-python", *python, "train", "minimax-h3-vsa", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        found[processes] = [line["loss"] for line in lines if "loss" in line]
    assert found[2] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("minimax_h3", {"micro_batch_size": 2}, "micro_batch_size must be 1 for .*base, got 2"),
        ("minimax_h3", {"context_parallel": 2}, "context_parallel must be 1 for .*base, got 2"),
        ("hunyuan_video", {"objective__first_frame": 0.5}, "objective.first_frame must be 0 for .*base, got 0.5"),
        ("hunyuan_video", {"objective__sound_shift": 3.0}, "objective.sound_shift must be None for .*base"),
    ],
)
def test_what_a_family_cannot_be_asked_for(run, name, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(run(name, **changes))


def test_data_without_sound_is_refused(run, tmp_path):
    settings = run("minimax_h3")
    samples = [{"latents": torch.randn(4, 3, 10, 12), "caption": "", "id": f"{i}.mp4#0"} for i in range(4)]
    write_latent_dataset(tmp_path / "silent", samples)
    with pytest.raises(ValueError, match=r"silent has no sound \(audio_latents\), but model.path .*base makes sound"):
        Trainer(settings.replace(data=type(settings.data)(folder=tmp_path / "silent", held_out=1, caption_dropout=0.0)))


def test_guidance_is_the_teachers(run):
    with pytest.raises(ValueError, match=r"objective\.guidance_scale must be finite, and is the teacher's"):
        run("ltx2", objective__guidance_scale=3.0, objective__distillation=0.0, objective__flow_matching=1.0)


def test_frozen_weights_are_read_in_their_dtype(run):
    settings = run("minimax_h3")
    model = load_transformer(settings.model, dtype=torch.bfloat16)
    dtypes = {key: x.dtype for key, x in model.named_parameters()}
    assert dtypes["transformer_blocks.0.attn.to_q.weight"] is torch.bfloat16
    assert dtypes["proj_in.weight"] is torch.float32
