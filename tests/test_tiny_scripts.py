"""The scripts that make the model in the box: encoding in two calls, given frames, and what a checkpoint keeps."""

import copy
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foveal.models.processor import sparse_processors

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")
SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "tiny"
NAMES = ("common", "model", "train_transformer", "train_vae", "make", "arms", "arms_quality", "arms_table", "features")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import arms
    import arms_quality
    import common
    import features
    import make
    import model
    import train_transformer
    import train_vae

    yield {
        "arms": arms,
        "quality": arms_quality,
        "vae": train_vae,
        "common": common,
        "features": features,
        "make": make,
        "model": model,
        "train": train_transformer,
    }
    for name in NAMES:
        sys.modules.pop(name, None)


def test_two_calls_of_the_vae_are_as_good_as_many(scripts):
    torch.manual_seed(0)
    vae = scripts["model"].build_vae().eval()
    video = torch.rand(1, 3, 13, 32, 48) * 2 - 1
    with torch.no_grad():
        moments = scripts["model"].encode(vae, video)
        torch.testing.assert_close(moments, vae.encode(video).latent_dist.parameters, rtol=1e-4, atol=1e-5)
        latents = moments.chunk(2, 1)[0]
        decoded = scripts["model"].decode(vae, latents).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(latents).sample, rtol=1e-4, atol=1e-5)
    assert moments.shape == (1, 32, 4, 4, 6)


def test_a_given_frame_is_clean_and_has_timestep_zero(scripts):
    clean, noise = torch.randn(2, 2, 16, 3, 4, 6)
    given = torch.tensor([True, False])
    seen = []

    def model(x, timesteps, text, return_dict):
        seen.extend((x, timesteps))
        return (noise - clean + (torch.arange(3) == 1).view(3, 1, 1),)  # wrong by 1 in the second frame

    losses, _ = scripts["train"].loss_and_velocity(model, clean, noise, torch.tensor([0.5, 0.25]), given, None)
    noisy, timesteps = seen
    assert losses.tolist() == pytest.approx([1 / 2, 1 / 3])  # of the frames that are not given
    assert torch.equal(noisy[0, :, 0], clean[0, :, 0])
    assert timesteps.tolist() == [[0.0] * 6 + [500.0] * 12, [250.0] * 18]


def test_mirrored_captions_turn_the_other_way(scripts):
    mirrored = scripts["common"].mirrored
    assert mirrored("turning left, then right") == "turning right, then left"
    assert mirrored("walking forward") == "walking forward"


def test_every_word_has_a_number_and_others_are_unknown(scripts):
    words = scripts["model"].vocabulary(["first-person view of a cave, turning left", ""])
    tokenizer = scripts["model"].build_tokenizer(words)
    ids = tokenizer("A cave, and a dragon").input_ids
    assert [list(words)[index] for index in ids] == ["a", "cave", ",", "<unk>", "a", "<unk>", "</s>"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_goes_on_from_a_checkpoint(scripts, tmp_path, optimizer):
    def run():
        torch.manual_seed(0)
        model, average = torch.nn.Sequential(), torch.nn.Linear(4, 4)
        model.add_module("blocks", torch.nn.Linear(4, 4))
        found = scripts["train"].optimizers(model, optimizer, 1e-2)
        return model, average, found, scripts["train"].Checkpoint(tmp_path / "run.safetensors", model, average, found)

    def step(model, found):
        model(torch.ones(2, 4)).square().mean().backward()
        for each in found:
            each.step()
            each.zero_grad()

    model, _, found, checkpoint = run()
    assert checkpoint.load() == 0
    step(model, found)
    checkpoint.save(1)
    step(model, found)
    again, _, found, checkpoint = run()
    assert checkpoint.load() == 1
    step(again, found)
    for expected, value in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(expected, value)


def test_the_lightened_vae_computes_the_same(scripts):
    torch.manual_seed(0)
    plain, light = scripts["model"].build_vae(), scripts["model"].build_vae()
    light.load_state_dict(plain.state_dict())
    scripts["vae"].lighten(light)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        moments = scripts["model"].encode(plain, video)
        torch.testing.assert_close(scripts["model"].encode(light, video), moments, rtol=1e-4, atol=1e-5)
        latents = moments.chunk(2, 1)[0]
        expected = scripts["model"].decode(plain, latents)
        torch.testing.assert_close(scripts["model"].decode(light, latents), expected, rtol=1e-4, atol=1e-5)


def test_a_step_of_the_vae_learns_from_crops_of_whole_length(scripts, monkeypatch):
    vae = scripts["vae"]
    monkeypatch.setattr(vae, "CROP", (16, 24))
    clips = torch.randint(256, (3, 5, 32, 48, 3), dtype=torch.uint8)
    found = vae.crops(clips, 4, torch.Generator().manual_seed(0))
    assert found.shape == (4, 5, 16, 24, 3)
    places = {(row, column) for row in (0, 8, 16) for column in (0, 8, 16, 24)}
    every = [clip[:, r : r + 16, c : c + 24] for clip in clips for r, c in places]
    assert all(any(torch.equal(crop, whole) or torch.equal(crop.flip(2), whole) for whole in every) for crop in found)
    torch.manual_seed(0)
    model = scripts["model"].build_vae()
    model.encoder.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = vae.Trainer(model, (4, 3, 5, 16, 24))
    losses = []
    for _ in range(3):
        trainer.step(scripts["common"].to_video(found), 1e-3)
        losses.append(trainer.loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"quant_conv", "post_quant_conv", "decoder"}


def test_a_decoder_is_not_trained_without_its_encoder(scripts, tmp_path):
    with pytest.raises(ValueError, match="decoder_only needs a pipeline"):
        scripts["vae"].train_vae(tmp_path, seconds=1, batch=1, rate=1e-3, start=None, decoder_only=True, commit=None)


def test_arms_train_and_the_tables_pair_them(scripts, monkeypatch, tmp_path):
    arms, torch_random = scripts["arms"], torch.Generator().manual_seed(0)
    monkeypatch.setattr(scripts["model"], "TEXT_TOKENS", 8)
    data = object.__new__(scripts["train"].Data)
    data.latents = data.held_out = torch.randn(2, 16, 3, 8, 8, generator=torch_random)
    data.texts, data.empty = torch.randn(1, 8, 64, generator=torch_random), 0
    data.caption = data.held_out_caption = torch.zeros(2, dtype=torch.long)
    options = Namespace(batch=2, steps=1, rate=1e-3, commit=None, compile=False, scratch=False)
    options.evaluate_every, options.distillation = 1, 0.0
    torch.manual_seed(0)
    dense = scripts["model"].build_transformer()
    dense.blocks = dense.blocks[:1]
    (tmp_path / "latents.json").write_text(json.dumps({"mean": [0.0] * 16, "std": [1.0] * 16}))
    save_file(scripts["model"].build_vae().state_dict(), tmp_path / "vae.safetensors")
    beside = scripts["quality"].DenseCheckpoint(dense, data, tmp_path, batch=2, videos=1, steps=2)
    rounding = max(beside.losses_and_errors(dense)[1])  # of what is kept
    assert 0 < rounding < 0.01
    assert beside.compare_videos(dense)["psnr_db"] == 100
    runs = [
        {"arm": name, "seed": 0, **arms.train_arm(dense, arm, data, beside, 0, options)}
        for name, arm in arms.arms().items()
        if name
        in (
            "dense",
            "cubes",
            "cubes, coarse, linear",
            "blocks",
            "blocks, SLA2",
            "blocks, router (rate x 10)",
            "VSA 4x4x4",
        )
    ]
    assert runs[0]["velocity_error"]["before"] != runs[0]["velocity_error"]["after"]
    assert {run["arm"]: max(run["velocity_error"]["before"]) > rounding for run in runs}["blocks"]
    shown = arms.quality(runs).splitlines()
    assert len(shown) == 2 + len(runs)
    assert f"| {runs[1]['videos']['psnr_db']:.1f} |" in shown[3]
    assert all(run["after"] != runs[0]["after"] for run in runs[1:])
    assert {run["arm"]: len(run["added_norms"]) > 0 for run in runs} == {
        run["arm"]: any(word in run["arm"] for word in ("coarse", "SLA2", "router", "VSA")) for run in runs
    }
    routed, mixed = (
        next(run for run in runs if run["arm"] == f"blocks, {name}") for name in ("router (rate x 10)", "SLA2")
    )
    assert len(mixed["added_norms"]) == len(routed["added_norms"]) + 1  # the ratio does not train

    without = scripts["quality"].DenseCheckpoint(dense, data, tmp_path, batch=2, videos=0, steps=2)
    assert without.compare_videos(dense) == {}
    assert arms.quality([{**run, "videos": {}} for run in runs]) == ""
    options.steps = 2
    again = arms.train_arm(dense, arms.Arm(), data, beside, 0, options)
    assert [step for step, _ in again["curve"]] == [1]
    assert sum(again["before"]) / 4 > again["curve"][0][1] > 0
    options.distillation = 1.0
    taught = arms.train_arm(dense, arms.Arm(), data, beside, 0, options)
    assert taught["distillation"] == 1
    assert max(taught["velocity_error"]["after"]) < min(again["velocity_error"]["after"])  # a copy is its own teacher
    tokens, weights = 25 * 18 * 32, sum(p.numel() for p in dense.parameters())
    attention = 6 * 3.5 * 4 * tokens**2 * 4 * 64  # layers, passes, and products of 4 heads of 64
    flops = arms.step_flops(dense, None, (16, 25, 36, 64))
    assert flops == 6 * weights * tokens + attention
    assert arms.step_flops(dense, arms.arms()["VSA 4x4x4"].config, (16, 25, 36, 64)) < flops - attention / 2
    rows = arms.table(runs).splitlines()
    assert len(rows) == 2 + len(runs)
    assert rows[2].startswith("| dense | 1 |")
    assert rows[4].count("±") == 2


def test_arms_of_vsas_branches_begin_with_those_branches(scripts):
    arms = scripts["arms"]
    torch.manual_seed(0)
    dense = scripts["model"].build_transformer()
    dense.blocks = dense.blocks[:1]
    found = {}
    for name in ("coarse only", "no gates", "both gates", "router per head (closed gate, rate x 10)"):
        model = copy.deepcopy(dense)
        added = arms.arms()[f"VSA 4x4x4, {name}"].begin(model)
        (processor,) = sparse_processors(model).values()
        own, hidden = dict(processor.named_parameters()), torch.randn(1, 6, 256)
        coarse, fine = processor.attention.gates(hidden)
        found[name] = [None if x is None else x.unique().tolist() for x in (coarse, fine)]
        trained = [key.partition(".")[2] for key, x in own.items() if any(x is y for y in added)]
        found[name].append(sorted({key.rpartition(".")[0] for key in trained}))
    assert found == {
        "coarse only": [[1.0], [0.0], ["to_gate_coarse"]],
        "no gates": [[1.0], None, []],
        "both gates": [[0.0], [1.0], ["to_gate_coarse", "to_gate_fine"]],
        "router per head (closed gate, rate x 10)": [None, None, ["router"]],
    }


def test_budgets_go_where_they_help_most(scripts):
    from arms_budgets import allocate

    ratios = torch.tensor([0.05, 0.1, 0.2, 0.4])
    errors = torch.tensor([[0.9, 0.1, 0.5], [0.5, 0.1, 0.3], [0.2, 0.1, 0.2], [0.1, 0.1, 0.19]])
    chosen = allocate(errors, ratios, 0.15)
    assert [round(x, 2) for x in chosen.tolist()] == [0.2, 0.05, 0.2]
    assert chosen.mean() <= 0.15
    assert allocate(errors, ratios, 1.0).tolist() == pytest.approx([0.4, 0.05, 0.4])


def test_an_annealed_arm_ends_at_its_configuration(scripts):
    arms = scripts["arms"]
    arm = arms.arms(cubes=0.1)["VSA 4x4x4, annealed"]
    torch.manual_seed(0)
    model = scripts["model"].build_transformer()
    arm.begin(model)
    kept = [arm.keep_at(model, step, 16) for step in range(16)]
    expected = [None] * 2 + [0.4] * 2 + [0.3] * 2 + [0.2] * 2 + [0.1] * 8
    assert [x and round(x, 6) for x in kept] == expected
    assert {round(processor.config.keep_ratio, 6) for processor in sparse_processors(model).values()} == {0.1}


def test_features_tell_sets_of_clips_apart(scripts, monkeypatch, tmp_path):
    """Clips whose latents depend on what their captions say, as training clips and as held-out ones."""
    features, generator = scripts["features"], torch.Generator().manual_seed(0)
    texts = [
        "",
        "a view of a maze",
        "a view of a maze, a demon ahead",
        "a view of an arena",
        "a view of an arena, a demon",
    ]
    patterns = torch.randn(len(texts), 16, 1, 1, 1, generator=generator)

    def clips(number):
        told = torch.randint(1, len(texts), (number,), generator=generator)
        latents = patterns[told] + 0.3 * torch.randn(number, 16, 5, 6, 8, generator=generator)
        return latents, [texts[i] for i in told]

    (train, captions), (held_out, held_out_captions) = clips(48), clips(32)
    tensors = {
        "train": train,
        "train-mirrored": train.clone(),
        "held-out": held_out,
        "texts": torch.zeros(len(texts), 2, 4),
    }
    save_file(tensors, tmp_path / "latents.safetensors")
    captions = {"train": captions, "train-mirrored": captions, "held-out": held_out_captions}
    (tmp_path / "latents.json").write_text(json.dumps({"texts": texts, "captions": captions}))
    assert features.words_of(texts)[0] == ["ahead", "an", "arena", "demon", "maze"]
    features.train_features(tmp_path, steps=80, batch=16, rate=3e-3, commit="abc")
    record = json.loads((tmp_path / "features.json").read_text())
    assert (record["steps"], record["commit"], record["held_out_clips"]) == (80, "abc", 32)
    assert record["captions_right"] > 0.9

    model, real = features.load_features(tmp_path), held_out.split(8)
    assert abs(features.frechet_distance(model, real, real)) < 1e-3
    same = features.frechet_distance(model, real, clips(32)[0].split(8))
    others = features.frechet_distance(model, real, (held_out.flip(1),))
    assert 0 < same < others / 2

    monkeypatch.setattr(scripts["model"], "TEXT_TOKENS", 8)
    data = scripts["train"].Data(tmp_path)
    (tmp_path / "latents.json").write_text(json.dumps({"mean": [0.0] * 16, "std": [1.0] * 16}))
    save_file(scripts["model"].build_vae().state_dict(), tmp_path / "vae.safetensors")
    monkeypatch.setattr(
        scripts["quality"],
        "velocity_of",
        lambda model, x, *rest: x * model.share,  # goes to zero, or stays as it is
    )
    monkeypatch.setattr(scripts["quality"], "loss_and_velocity", lambda model, clean, *rest: (None, clean))
    found, shares = {}, (1.0, 0.5)
    models = [Namespace(share=share) for share in shares]
    beside = scripts["quality"].DenseCheckpoint(models[0], data, tmp_path, batch=8, videos=0, steps=2, distance=20)
    for model in models:
        found[model.share] = beside.compare_sets(model)
    assert len(torch.cat(beside.continued)) == 20
    assert abs(found[1.0]["dense"]) < 1e-3 < found[0.5]["dense"]
    assert found[1.0]["real"] == pytest.approx(found[1.0]["dense_to_real"], abs=1e-4)
    assert found[1.0]["dense_to_real"] == found[0.5]["dense_to_real"] > 0
    runs = [
        {
            "arm": f"share {share:g}",
            "velocity_error": {"before": [0.5], "after": [0.25]},
            "videos": {"psnr_db": 30.0, "ssim": 0.9, "flicker": 3.0, "flicker_dense": 2.0},
            "frechet": found[share],
        }
        for share in shares
    ]
    shown = scripts["arms"].quality(runs).splitlines()
    assert shown[0].endswith("| Fréchet distance to real | the checkpoint's | to the checkpoint's |")
    assert shown[3].endswith(" | {real:.2f} | {dense_to_real:.2f} | {dense:.2f} |".format(**found[0.5]))
    assert "Fréchet" not in scripts["arms"].quality([runs[0], {**runs[1], "frechet": {}}])


def test_the_table_by_noise_level_pairs_clips_of_the_same_seed(scripts):
    found = [
        ("dense", 0, [1.0, 2.0]),
        ("blocks", 0, [1.1, 2.0]),
        ("blocks, linear", 0, [1.1, 1.0]),
        ("cubes", 1, [9, 9]),
    ]
    runs = [{"arm": arm, "seed": seed, "levels": [0.2, 0.9], "after": [x, x]} for arm, seed, x in found]
    assert scripts["arms"].levels(runs).splitlines()[2:] == [
        "| blocks | dense | +10.00 ± 0.00% | +0.00 ± 0.00% |",
        "| blocks, linear | blocks | +0.00 ± 0.00% | -50.00 ± 0.00% |",
    ]
    assert scripts["arms"].levels(runs[3:]) == ""


def test_a_pipeline_gives_a_work_folder_its_weights(scripts, tmp_path):
    from safetensors.torch import load_file

    from foveal.models.shipped import FOLDER

    scripts["make"].unpack(tmp_path, FOLDER / "tiny")
    vae, transformer = scripts["model"].build_vae(), scripts["model"].build_transformer()
    vae.load_state_dict(load_file(tmp_path / "vae.safetensors"))
    tensors = load_file(tmp_path / "transformer.safetensors")
    transformer.load_state_dict({key.removeprefix("average/"): value for key, value in tensors.items()})
    assert all(value.dtype == torch.float32 for value in tensors.values())


def test_latents_of_other_clips_keep_a_pipelines_words_and_statistics(scripts, monkeypatch, tmp_path):
    import numpy as np
    from safetensors.torch import load_file

    from foveal.models.shipped import FOLDER

    pipeline, seen = FOLDER / "tiny", []
    monkeypatch.setattr(scripts["vae"], "CLIP_PIXELS", 2 * 5 * 16 * 24)
    encode = scripts["model"].encode
    monkeypatch.setattr(scripts["model"], "encode", lambda vae, video: seen.append(len(video)) or encode(vae, video))
    scripts["make"].unpack(tmp_path, pipeline)
    for part, count in (("train", 3), ("held-out", 1)):
        folder = tmp_path / "clips" / part
        folder.mkdir(parents=True)
        for number in range(2):
            frames = np.random.RandomState(number).randint(0, 256, (count, 5, 16, 24, 3)).astype(np.uint8)
            np.savez(folder / f"{number}.npz", frames=frames, captions=[f"turning left, then {number}"] * count)
    scripts["vae"].write_latents(tmp_path, pipeline)
    tensors, facts = load_file(tmp_path / "latents.safetensors"), json.loads((tmp_path / "latents.json").read_text())
    assert seen == [2, 2, 1, 1] * 2 + [1] * 4
    assert tensors["train"].shape == tensors["train-mirrored"].shape == (6, 16, 2, 2, 3)
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    assert facts["mean"] == pytest.approx(config["latents_mean"])
    assert len(facts["words"]) == 53
    assert facts["captions"]["train"][3:] == ["turning left, then 1"] * 3
    assert facts["captions"]["train-mirrored"][0] == "turning right, then 0"


def test_a_step_clips_and_moves_by_its_share_of_the_rate(scripts, monkeypatch):
    monkeypatch.setattr(scripts["train"], "loss_of", lambda model, x: 50 * model(x).sum(1))
    x, moved = torch.ones(2, 4), []
    for share in (1.0, 0.5):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1, bias=False)
        before = model.weight.detach().clone()
        found = [torch.optim.SGD(model.parameters(), lr=9.0)]
        found[0].param_groups[0]["peak"] = 0.1
        step = scripts["train"].Step(model, found, (x,), graphed=False)
        losses = [step((x,), share).item() for _ in range(2)]
        assert losses[1] < losses[0]
        moved.append((model.weight - before).norm().item())
    assert moved == pytest.approx([0.2, 0.1])  # two steps of a gradient of norm 1, at rates of 0.1 and 0.05


def test_a_taught_loss_compares_what_is_not_given_with_the_teachers_velocity(scripts, monkeypatch):
    train, generator = scripts["train"], torch.Generator().manual_seed(0)
    monkeypatch.setattr(train, "velocity_of", lambda model, x, sigmas, given, text: x * model.weight)
    clean, noise = torch.randn(2, 2, 4, 3, 2, 2, generator=generator)
    values = clean, noise, torch.tensor([0.3, 0.8]), torch.tensor([True, False]), None
    model, teacher = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    plain = train.loss_of(model, *values)
    assert torch.equal(train.taught_loss(model, *values, teacher=teacher, share=0.0), plain)
    assert train.taught_loss(model, *values, teacher=model, share=1.0).tolist() == [0, 0]
    x = [0.7 * clean[0, :, 1:] + 0.3 * noise[0, :, 1:], 0.2 * clean[1] + 0.8 * noise[1]]
    expected = torch.stack([((model.weight - teacher.weight) * mine).square().mean() for mine in x])
    torch.testing.assert_close(train.taught_loss(model, *values, teacher=teacher, share=1.0), expected)
    torch.testing.assert_close(
        train.taught_loss(model, *values, teacher=teacher, share=0.25), 0.75 * plain + 0.25 * expected
    )
