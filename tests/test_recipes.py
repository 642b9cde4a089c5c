"""Recipes and the settings that they are made of: found by name or file, overridden, refused where they contradict."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("tyro")

from tiny_training import config

from foveal import SLA2Config, SLAConfig, VSAConfig
from foveal.lab.train.config import TrainingConfig, differences
from foveal.lab.train.inputs import NoiseAhead
from foveal.lab.train.objective import sample_noise, sample_sigmas, scheduler_shift
from foveal.lab.train.recipes import RECIPES, find_recipe, parse
from foveal.lab.train.settings import (
    Annealing,
    ModelSettings,
    ObjectiveSettings,
    SparsitySettings,
)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_whole_configuration(name):
    recipe = find_recipe(name)
    built = recipe()
    assert isinstance(built, TrainingConfig)
    assert recipe.__doc__
    assert json.loads(json.dumps(built.to_dict())) == built.to_dict()
    assert built.batch_size % built.micro_batch_size == 0


def test_recipes_are_those_of_the_papers():
    sla = RECIPES["wan-1.3b-sla"]()
    assert (sla.steps, sla.batch_size, sla.optimizer.learning_rate) == (2000, 64, 1e-5)
    assert (sla.sparsity.attention.keep_ratio, sla.sparsity.attention.drop_ratio) == (0.05, 0.10)
    sla2 = RECIPES["wan-1.3b-sla2"]()
    assert (sla2.steps, sla2.batch_size, sla2.sparsity.attention) == (500, 64, SLA2Config(keep_ratio=0.05))
    router = RECIPES["wan-1.3b-router"]()
    own = {"linear_scope": "none", "router": "per_head", "token_order": "tile"}
    assert (router.steps, router.sparsity.attention) == (500, sla2.sparsity.attention.replace(**own))
    assert (router.optimizer.router_learning_rate, router.optimizer.new_learning_rate) == (3e-3, 2e-4)
    vsa, routed = (RECIPES[f"wan-1.3b-vsa{router}"]() for router in ("", "-router"))
    assert routed.sparsity.attention == vsa.sparsity.attention.replace(router="per_head")
    assert routed.sparsity.annealing == vsa.sparsity.annealing
    assert (routed.optimizer.router_learning_rate, routed.optimizer.new_learning_rate) == (3e-3, 2e-4)
    annealing = vsa.sparsity.annealing
    assert (annealing.dense_steps, annealing.every, vsa.sparsity.attention.topk) == (50, 50, 32)
    assert annealing.kept(vsa.steps, 32) == 32
    assert RECIPES["wan-14b-sla"]().parallel == "fsdp"
    lora = RECIPES["wan-1.3b-lora"]()
    assert (lora.optimizer.trainable, lora.objective.teacher) == ("lora", "same")
    assert RECIPES["scratch-vsa"]().sparsity.attention == VSAConfig(keep_ratio=0.125, fine_gate=True)


def test_the_command_line_overrides_any_setting():
    line = (
        "tiny --steps 7 --sparsity.attention.keep-ratio 0.3 --optimizer.learning-rate 1e-3 --resume "
        "--sparsity.layer-keep-ratio 0 0.5 --model.architecture.num-layers 3 --sparsity.dense-layers 2"
    )
    built = parse(line.split())
    expected = RECIPES["tiny"]()
    expected = expected.replace(
        steps=7,
        resume=True,
        sparsity=dataclasses.replace(
            expected.sparsity,
            attention=expected.sparsity.attention.replace(keep_ratio=0.3),
            layer_keep_ratio={0: 0.5},
            dense_layers=(2,),
        ),
        optimizer=dataclasses.replace(expected.optimizer, learning_rate=1e-3),
        model=dataclasses.replace(
            expected.model, architecture=dataclasses.replace(expected.model.architecture, num_layers=3)
        ),
    )
    assert built == expected
    assert parse(["wan-1.3b-vsa", "--sparsity.attention.topk", "16"]).sparsity.attention == VSAConfig(topk=16)


def test_help_lists_the_recipes_and_their_settings(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)
    with pytest.raises(SystemExit, match="0"):
        parse(["tiny", "--help"])
    shown = capsys.readouterr().out
    assert "--sparsity.attention.keep-ratio" in shown
    assert "--checkpoint.every" in shown


def test_a_recipe_may_be_in_a_file(tmp_path):
    built = find_recipe(f"{ROOT / 'recipes' / 'my_clips.py'}:sparser")()
    assert built.sparsity.attention.keep_ratio == 0.03
    assert built.optimizer.name == "adamw8bit"
    (tmp_path / "mine.py").write_text("def wrong():\n    return 3\n")
    with pytest.raises(TypeError, match="must return a TrainingConfig, got int"):
        parse([f"{tmp_path / 'mine.py'}:wrong"])
    with pytest.raises(ValueError, match="has no function 'other'"):
        find_recipe(f"{tmp_path / 'mine.py'}:other")
    with pytest.raises(FileNotFoundError, match="no such recipe file"):
        find_recipe("missing.py:recipe")
    with pytest.raises(ValueError, match=r"unknown recipe 'tny'; expected one of \('tiny'"):
        find_recipe("tny")


def test_the_page_shows_commands_and_settings_that_exist(monkeypatch):
    """Each command of docs/training.md parses, and each setting in its text is one."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "training.md").read_text()
    commands = re.findall(r"^(?:torchrun .* )?foveal train (.*)$", page, re.M)
    assert len(commands) >= 7
    for command in commands:
        assert isinstance(parse(command.split()), TrainingConfig), command
    named = re.findall(r"`(?:--)?((?:model|sparsity|data|objective|optimizer|evaluation|checkpoint)\.[a-z-]+)`", page)
    assert len(named) >= 12
    for name in named:
        part, field = name.replace("-", "_").split(".")
        settings = getattr(RECIPES["tiny"](), part)
        switched_off = isinstance(getattr(settings, field.removeprefix("no_"), None), bool)
        assert hasattr(settings, field) or switched_off, name


def test_layers_have_configurations_of_their_own():
    attention = SLAConfig(keep_ratio=0.1)
    settings = SparsitySettings(attention, dense_layers=(0,), layer_keep_ratio={2: 0.5})
    assert settings.layer_configs(4) == {1: attention, 2: attention.replace(keep_ratio=0.5), 3: attention}
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, got \[2\]"):
        settings.layer_configs(2)
    with pytest.raises(ValueError, match=r"layers \[2\] are in dense_layers and in layer_keep_ratio"):
        SparsitySettings(attention, dense_layers=(2,), layer_keep_ratio={2: 0.5}).layer_configs(4)


def test_annealing_goes_down_step_by_step():
    annealing = Annealing(start=9, decrement=3, dense_steps=2, every=2)
    kept = [annealing.kept(step, 4) for step in range(1, 10)]
    assert kept == [None, None, 9, 9, 6, 6, 4, 4, 4]
    assert Annealing(start=1.0, decrement=0.5, dense_steps=0, every=1).kept(1, 0.1) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"context_parallel": 0}, "context_parallel must be at least 1"),
        ({"batch_size": 5, "micro_batch_size": 2}, "batch_size must be a multiple of micro_batch_size, got 5 and 2"),
        ({"sparsity": SparsitySettings(), "optimizer__trainable": "new"}, "'new' needs sparsity.attention"),
        ({"optimizer__trainable": "lora"}, "needs model.path"),
        ({"objective__distillation": 1.0, "objective__teacher": "same"}, "needs frozen weights"),
        ({"parallel": "fsdp", "optimizer__name": "adamw8bit"}, 'works only with parallel="ddp"'),
        ({"objective__sigma_range": (0.5, 0.5)}, "two levels in"),
        ({"evaluation__sigmas": (0.5, 1.0)}, "levels between 0 and 1"),
        (
            {"model__compile": True, "sparsity__annealing": Annealing(start=1.0, decrement=0.1)},
            "exclude each other",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_settings_are_refused_where_they_stand():
    with pytest.raises(ValueError, match=r"give model\.path or model\.architecture"):
        ModelSettings()
    with pytest.raises(ValueError, match="must be at least 0 and not both 0"):
        ObjectiveSettings(flow_matching=0.0)
    with pytest.raises(ValueError, match=r"need sparsity\.attention"):
        SparsitySettings(dense_layers=(0,))
    with pytest.raises(ValueError, match="got one with topk"):
        SparsitySettings(VSAConfig(topk=3), layer_keep_ratio={0: 0.5})


def test_differences_are_named_by_their_option(tmp_path):
    first, second = config(tmp_path), config(tmp_path, steps=9, optimizer__learning_rate=1.0)
    assert differences(first.to_dict(), first.to_dict()) == []
    assert differences(first.to_dict(), second.to_dict()) == ["steps: 6 -> 9", "optimizer.learning_rate: 0.002 -> 1.0"]


def test_noise_is_a_function_of_the_sample_alone():
    noise, sigmas = sample_noise((4, 2, 3), first=10, seed=5, shift=3.0)
    again, levels = sample_noise((2, 2, 3), first=12, seed=5, shift=3.0)
    assert torch.equal(noise[2:], again)
    assert torch.equal(sigmas[2:], levels)
    other, _ = sample_noise((4, 2, 3), first=10, seed=6, shift=3.0)
    assert not torch.isin(noise, other).any()
    many, levels = sample_noise((400, 8), first=0, seed=0, shift=1.0)
    assert abs(many.mean()) < 0.06
    assert abs(many.std() - 1) < 0.06
    assert abs(levels.mean() - 0.5) < 0.05


def test_noise_made_ahead_is_the_same():
    """Whether the next call is the one that was foreseen, or has another shape or number."""
    settings = {"seed": 5, "shift": 3.0, "sigma_range": (0.1, 0.9)}
    ahead = NoiseAhead(**settings, device=torch.device("cpu"))
    for shape, first, following in (((2, 3), 0, 2), ((2, 3), 2, 4), ((2, 3), 8, 10), ((2, 5), 10, 12), ((2, 5), 12, 0)):
        for ours, expected in zip(
            ahead.take(shape, first, following), sample_noise(shape, first=first, **settings), strict=True
        ):
            assert torch.equal(ours, expected)
    ahead.close()


def test_noise_levels_may_be_those_of_one_expert():
    generator = torch.Generator().manual_seed(0)
    sigmas = sample_sigmas(5000, shift=5.0, generator=generator, sigma_range=(0.875, 1.0))
    assert 0.875 <= sigmas.min() < 0.88
    assert 0.995 < sigmas.max() <= 1.0
    # The distribution is that of all levels, cut.
    every = sample_sigmas(40000, shift=5.0, generator=generator)
    assert abs(sigmas.mean() - every[every >= 0.875].mean()) < 2e-3


def test_the_shift_is_read_from_the_models_scheduler():
    assert scheduler_shift({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}) == 3.0
    unipc = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0}
    assert scheduler_shift(unipc) == 5.0
    with pytest.raises(ValueError, match="DDIMScheduler, is not for flow matching"):
        scheduler_shift({"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match="by resolution"):
        scheduler_shift({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True})


def test_older_pytorch_shards_weights_of_one_dtype(tmp_path, monkeypatch):
    changes = {"parallel": "fsdp", "model__frozen_dtype": "bfloat16"}
    monkeypatch.setattr("torch.__version__", "2.9.0+cu128")
    assert config(tmp_path, **changes).parallel == "fsdp"
    monkeypatch.setattr("torch.__version__", "2.8.1")
    with pytest.raises(ValueError, match=r"weights of one dtype with PyTorch 2\.8\.1"):
        config(tmp_path, **changes)


def test_the_line_that_trains_a_released_checkpoint_with_routers():
    """As docs/checkpoints.md has it: half of FastWan's cubes from the first step on."""
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    line = re.search(r"foveal train (wan-1\.3b-vsa-router .*?)\n```", page, re.DOTALL)[1].replace("\\\n", " ")
    line = line.replace("--sparsity.parameters start/sparse", "")
    built = parse(line.split())
    assert {built.sparsity.annealing.kept(step, built.sparsity.attention.topk) for step in (1, 50, 4000)} == {62}
    assert built.sparsity.attention.topk == round(0.2 * 624) // 2
