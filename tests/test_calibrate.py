"""`foveal calibrate`: what is measured, what is chosen from it, and the policy that the commands follow."""

import dataclasses
import json
import math

import pytest
import torch
from tiny_media import save_tiny_wan
from tiny_training import config as training_config
from tiny_training import write_data
from tiny_wan import inputs, run, tiny_transformer

import foveal
from foveal import (
    Policy,
    SLAConfig,
    TokenLayout,
    VideoGrid,
    VSAConfig,
    attention_cost,
    get_policy,
    sla_attention,
    vsa_attention,
)
from foveal.lab import cli
from foveal.lab.calibrate.choose import choose, least_tokens
from foveal.lab.calibrate.measure import LayerErrors, StepErrors, compare, measure
from foveal.lab.calibrate.run import CalibrationSettings, training_free
from foveal.lab.generate.sparse import choose_sparse
from foveal.lab.train.model import build_model, load_transformer, policy_component
from foveal.lab.train.settings import ModelSettings, SparsitySettings
from foveal.lab.train.trainer import run_training
from foveal.lab.ui.page import by_policy
from foveal.models.files.policy_file import ComponentPolicy, policy_text, read_policy
from foveal.models.processor import sparse_processors
from foveal.testing import make_inputs, relative_error

pytest.importorskip("tyro")

BLOCKS = {"block_q": 16, "block_k": 16}
TAIL = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, linear_scope="none", tail="pooled", **BLOCKS)
SIZE = ("--frames", "9", "--height", "160", "--width", "160", "--steps", "2")  # 300 tokens, 5 blocks


def test_errors_are_those_of_the_method_by_head_and_layer():
    grid = VideoGrid(3, 6, 8)
    query, key, value = make_inputs(query_length=144, key_length=150, head_dim=16, dtype=torch.float32)
    configs = [TAIL.replace(keep_ratio=ratio) for ratio in (0.1, 0.5, 1.0)]
    seen = compare(query, key, value, grid, configs)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for index, config in enumerate(configs):
        output = sla_attention(query, key, value, config=config, protected_keys=(144, 150))
        assert seen.layer()[index] == pytest.approx(relative_error(output, dense), abs=1e-6)
        for head in range(2):
            expected = relative_error(output[:, head], dense[:, head])
            assert float(seen.heads()[index, head]) == pytest.approx(expected, abs=1e-6)
    assert seen.kept.tolist() == [1 / 9, 4 / 9, 1.0]
    assert seen.layer()[0] > seen.layer()[1] > 1e-3 > seen.layer()[2]
    both = compare(query, key, value, grid, configs)
    both.add(seen)
    assert both.layer() == pytest.approx(seen.layer())
    assert both.prompts == 2
    every = SLAConfig(keep_ratio=1.0, drop_ratio=0.0, linear_scope="none", precision="int8")
    rounded = sla_attention(query, key, value, config=every, protected_keys=(144, 150))
    assert seen.int8_error() == pytest.approx(relative_error(rounded, dense), rel=1e-3)
    assert both.int8_error() == pytest.approx(seen.int8_error())
    assert 1e-3 < seen.int8_error() < 0.02


@pytest.mark.parametrize("method", ["sla", "vsa"])
def test_errors_of_a_packed_sequence_are_those_of_the_method_over_it(method):
    """As MiniMax-H3 runs it: the scores of VSA are over the protected tiles too, and its gate starts at zero."""
    layout = TokenLayout(VideoGrid(3, 6, 8), before=(5, 21))
    query, key, value = make_inputs(query_length=170, key_length=170, head_dim=16, dtype=torch.float32)
    config = TAIL if method == "sla" else VSAConfig(tile=(2, 2, 4), keep_ratio=0.3)
    seen = compare(query, key, value, layout, [config])
    if method == "sla":
        output = sla_attention(query, key, value, config=config, layout=layout)
    else:
        output = vsa_attention(query, key, value, config=config, layout=layout, gate_coarse=torch.zeros_like(query))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    of_video = (x[:, :, layout.video] for x in (output, dense))
    assert seen.layer()[0] == pytest.approx(relative_error(*of_video), abs=1e-6)
    assert relative_error(output[:, :, :26], dense[:, :, :26]) < 1e-6
    cubes = 9 if method == "sla" else 2 * 3 * 2
    assert float(seen.kept) == (2 if method == "sla" else math.ceil(0.3 * cubes)) / cubes
    layer = LayerErrors("transformer", "attn", layout.grid, 2, 16, {0: seen}, layout)
    cost = attention_cost(config, layout=layout, heads=2, head_dim=16)
    assert layer.work(config, 0) == pytest.approx(cost.flops_ratio)


@pytest.mark.parametrize("config", [VSAConfig(tile=(2, 2, 4)), TAIL.replace(keep_mass=0.5)])
def test_other_methods_and_masses_are_measured(config):
    query, key, value = make_inputs(query_length=144, head_dim=16, dtype=torch.float32)
    seen = compare(query, key, value, VideoGrid(3, 6, 8), [config])
    assert 0 < seen.layer()[0] < 3
    assert 0 < float(seen.kept) < 1


def test_a_model_is_measured_in_each_step_and_stays_as_it_was():
    model = tiny_transformer()
    expected = run(model)

    def generation():
        for timestep in (900, 500, 100):
            run(model, **inputs(batch=1) | {"timestep": torch.tensor([timestep])})

    layers = measure(model, [generation, generation], [TAIL, TAIL.replace(keep_ratio=0.6)], 3)
    assert [(x.component, x.layer, sorted(x.steps)) for x in layers] == [
        ("transformer", f"blocks.{i}.attn1", [0, 1, 2]) for i in range(2)
    ]
    assert all(step.prompts == 2 for x in layers for step in x.steps.values())
    assert not sparse_processors(model)
    assert torch.equal(run(model), expected)


def test_the_choice_is_the_least_work_within_the_target():
    work = [[0.2, 0.5], [0.2, 0.5], [0.2, 0.5]]
    calm, late = {step: [0.04, 0.01] for step in range(4)}, {step: [0.08, 0.04] for step in range(4)}
    never = {step: [0.9, 0.8] for step in range(4)}
    found = choose([calm, late, never], work, 4, 0.05)
    assert (found.dense_first_steps, found.dense_last_steps) == (0, 0)
    assert found.budgets == (0, 1, None)
    assert found.work == pytest.approx((0.2 + 0.5 + 1) / 3)
    assert found.error == 0.04


def test_steps_that_no_budget_serves_are_dense_at_the_ends():
    hard, easy = [0.9, 0.8], [0.04, 0.01]
    errors = [{0: hard, 1: easy, 2: easy, 3: easy, 4: hard}] * 2
    found = choose(errors, [[0.2, 0.5]] * 2, 5, 0.05)
    assert (found.dense_first_steps, found.dense_last_steps, found.budgets) == (1, 1, (0, 0))
    assert found.work == pytest.approx((2 + 3 * 0.2) / 5)
    # A hard step in the middle leaves the larger part.
    errors = [{0: easy, 1: hard, 2: easy, 3: easy, 4: easy}]
    found = choose(errors, [[0.2, 0.5]], 5, 0.05)
    assert (found.dense_first_steps, found.dense_last_steps) == (2, 0)
    # Layers of two transformers run in different steps.
    found = choose([{0: hard, 1: hard}, {2: easy, 3: easy}], [[0.2, 0.5]] * 2, 4, 0.05)
    assert found.budgets == (None, 0)
    assert found.work == pytest.approx((2 + 2 * 0.2) / 4)


def test_heads_that_need_less_get_less():
    work = [[0.1, 0.2, 0.5]]
    # The first head is easy; of the second a small budget costs most of the error that is allowed.
    shares = {0: [[4e-4, 9e-3], [1e-4, 1.5e-3], [0.0, 1e-4]], 1: [[2e-4, 9e-3], [1e-4, 1e-3], [0.0, 1e-4]]}
    errors = {step: [sum(heads) ** 0.5 for heads in budgets] for step, budgets in shares.items()}
    target = 2e-3**0.5
    uniform = choose([errors], work, 2, target)
    assert (uniform.budgets, uniform.work) == ((1,), 0.2)
    found = choose([errors], work, 2, target, [shares])
    assert found.budgets == ((0, 1),)
    assert found.work == pytest.approx(0.15)
    assert found.error == pytest.approx(max(4e-4 + 1.5e-3, 2e-4 + 1e-3) ** 0.5)
    # No less work, no budgets by head.
    alike = {step: [[x, x] for x in (1e-3, 1e-4, 1e-5)] for step in range(2)}
    errors = {step: [sum(heads) ** 0.5 for heads in budgets] for step, budgets in alike.items()}
    assert choose([errors], work, 2, target, [alike]).budgets == (0,)
    # Where heads together are too much, the layer is dense.
    with pytest.raises(ValueError, match="no budget saves work"):
        choose([errors], work, 2, 1e-5, [alike])


def test_errors_at_budgets_of_heads():
    missed, exact = torch.tensor([[4.0, 9.0], [1.0, 2.0]]).double(), torch.tensor([16.0, 84.0]).double()
    step = StepErrors(missed, exact, torch.ones(2), torch.zeros(2, 2))
    assert step.at(0)[0] == pytest.approx(step.layer()[0])
    assert step.at((0, 1)) == (pytest.approx(0.06**0.5), pytest.approx([0.5, (2 / 84) ** 0.5]))
    assert step.shares() == [[0.04, 0.09], [0.01, 0.02]]


def test_an_error_that_no_budget_reaches_is_refused():
    with pytest.raises(ValueError, match=r"no budget saves work within an error of 0\.001; the smallest .* is 0\.01"):
        choose([{0: [0.04, 0.01]}], [[0.2, 0.5]], 1, 0.001)


def test_min_tokens_is_where_sparse_begins_to_be_less_work():
    grid = VideoGrid(10, 10, 10)
    assert least_tokens(grid, lambda smaller: 0.5) == 1
    assert least_tokens(grid, lambda smaller: 0.9 if smaller.num_tokens > 300 else 1.1) == 343
    config = TAIL.replace(block_q=64, block_k=64)
    step = StepErrors(torch.zeros(1, 2), torch.ones(2), torch.ones(1), torch.zeros(2, 2))
    layer = LayerErrors("transformer", "x", VideoGrid(8, 30, 52), 2, 64, {0: step})
    least = least_tokens(layer.grid, lambda smaller: layer.work(config, 0, smaller))
    assert 64 < least < 600
    # A mass counts what was kept.
    mass = config.replace(keep_mass=0.5, keep_ratio=0.1)
    kept = LayerErrors("transformer", "x", layer.grid, 2, 64, {0: dataclasses.replace(step, kept=torch.ones(1) * 0.4)})
    assert kept.work(mass, 0) == pytest.approx(layer.work(config.replace(keep_ratio=0.4), 0), rel=0.02)


def test_settings():
    assert training_free("sla").tail == "pooled"
    assert training_free("sla", score="log_sum_exp", token_order=None).score == "log_sum_exp"
    assert training_free("vsa") == VSAConfig()
    with pytest.raises(ValueError, match="method vsa has no token_order"):
        training_free("vsa", token_order="tile")
    with pytest.raises(ValueError, match=r"error must be above 0 and below 1, got 0"):
        CalibrationSettings(0, TAIL)
    with pytest.raises(ValueError, match="unknown by 'heads'"):
        CalibrationSettings(0.1, TAIL, by="heads")
    by_head = CalibrationSettings(0.1, TAIL, by="head")
    assert by_head.at(1) == TAIL.replace(keep_ratio=0.075)
    assert by_head.at((0, 2)) == TAIL.replace(keep_ratio=(0.05, 0.1))
    with pytest.raises(ValueError, match=r'by="head" needs a method whose heads may keep different shares'):
        CalibrationSettings(0.1, foveal.SLA2Config(), by="head")
    with pytest.raises(ValueError, match="min_tokens must be at least 0, got -1"):
        CalibrationSettings(0.1, TAIL, min_tokens=-1)
    assert len({c.keep_mass for c in CalibrationSettings(0.1, TAIL, by="mass").configs}) > 4
    with pytest.raises(ValueError, match="give --policy, or --sparse, or --method"):
        choose_sparse(None, "sla", policy="policy.json", impl="auto")
    with pytest.raises(FileNotFoundError, match=r"no such policy file: none\.json"):
        choose_sparse(None, None, policy="none.json", impl="auto")
    with pytest.raises(FileNotFoundError, match="no such policy file"):
        SparsitySettings(policy="none.json")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(a pipeline's folder, the policy file that the command wrote for it)."""
    folder = tmp_path_factory.mktemp("calibrate")
    wan = save_tiny_wan(folder / "wan")
    arguments = (
        "calibrate",
        "--model",
        wan,
        "--prompt",
        "a cat",
        "a dog",
        "--error",
        "0.5",
        "--output",
        folder / "out",
    )
    assert cli.main([str(x) for x in (*arguments, *SIZE, "--device", "cpu")]) == 0
    return wan, folder / "out" / "policy.json"


def test_the_command_writes_what_sparsify_reads(calibrated):
    _, file = calibrated
    found = json.loads(file.read_text())
    assert found["calibration"]["prompts"] == ["a cat", "a dog"]
    assert found["calibration"]["largest_error"] <= 0.5
    (component,) = read_policy(file).values()
    assert component.layers
    for config in component.layers.values():
        assert config.tail == "pooled"
    assert all(0 < step["int8_error"] < 0.05 for layer in found["measured"].values() for step in layer.values())
    heads = [step["heads"] for layer in found["measured"].values() for step in layer.values()]
    assert all(len(budgets) == len(found["calibration"]["budgets"]) for budgets in heads)


def test_the_command_writes_a_ratio_for_each_head(calibrated, tmp_path, capsys):
    wan, _ = calibrated
    arguments = ("calibrate", "--model", wan, "--prompt", "a cat", "--error", "0.3", "--by", "head")
    assert cli.main([str(x) for x in (*arguments, "--output", tmp_path, *SIZE, "--device", "cpu")]) == 0
    found = json.loads((tmp_path / "policy.json").read_text())
    assert (found["calibration"]["by"], found["calibration"]["largest_error"] <= 0.3) == ("head", True)
    (component,) = read_policy(tmp_path / "policy.json").values()
    ratios = [config.keep_ratio for config in component.layers.values()]
    assert any(isinstance(ratio, tuple) and len(set(ratio)) > 1 for ratio in ratios)
    arguments = ("generate", "--model", wan, "--prompt", "a cat", "--policy", tmp_path / "policy.json")
    assert cli.main([str(x) for x in (*arguments, "--output", tmp_path / "videos", *SIZE)]) == 0


def test_generate_follows_the_policy(calibrated, tmp_path, capsys):
    wan, file = calibrated
    arguments = ("generate", "--model", wan, "--prompt", "a cat", "--policy", file, "--output", tmp_path / "videos")
    assert cli.main([str(x) for x in (*arguments, *SIZE)]) == 0
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "videos").glob("*.json"))
    assert record["settings"]["sparse"]["policy"] == str(file)
    assert record["attention_flops_reduction"] != 1
    assert any(path.name.startswith("a-cat") and "policy-" in path.name for path in (tmp_path / "videos").iterdir())


def test_a_run_trains_by_the_policy_and_exports_all_of_it(tmp_path):
    policy = Policy(dense_first_steps=1, min_tokens=7)
    (tmp_path / "policy.json").write_text(
        policy_text({"transformer": ComponentPolicy("wan", {"blocks.1.attn1": TAIL}, policy)})
    )
    write_data(tmp_path / "data")
    sparsity = SparsitySettings(attention=TAIL, policy=tmp_path / "policy.json")
    config = training_config(tmp_path, sparsity=sparsity, steps=2, optimizer__trainable="attention")
    model = build_model(config)
    assert list(sparse_processors(model)) == ["blocks.1.attn1"]
    assert get_policy(model) == Policy(min_tokens=7)
    run_training(config)
    loaded = foveal.load(load_transformer(config.model), tmp_path / "run" / "export" / "sparse")
    assert get_policy(loaded) == policy


def test_a_run_trains_its_part_of_a_policy_for_two_transformers(tmp_path):
    """As of Wan 2.2, whose second transformer is trained by `model.subfolder`."""
    parts = {
        name: ComponentPolicy("wan", {f"blocks.{index}.attn1": TAIL}, Policy(dense_first_steps=index, min_tokens=7))
        for index, name in enumerate(("transformer", "transformer_2"))
    }
    for name in parts:
        tiny_transformer().save_pretrained(tmp_path / "base" / name)
    path = tmp_path / "policy.json"

    def settings(subfolder):
        model = ModelSettings(str(tmp_path / "base"), subfolder=subfolder)
        return training_config(tmp_path, sparsity=SparsitySettings(policy=path), model=model)

    path.write_text(policy_text(parts))
    for index, name in enumerate(parts):
        model = build_model(settings(name))
        assert list(sparse_processors(model)) == [f"blocks.{index}.attn1"]
        assert get_policy(model) == Policy(min_tokens=7)
        assert policy_component(settings(name)).policy.dense_first_steps == index
    path.write_text(policy_text({"transformer": parts["transformer"]}))
    with pytest.raises(ValueError, match=r"policy\.json is for transformer, but training takes transformer_2 of the"):
        build_model(settings("transformer_2"))
    path.write_text(policy_text({"transformer": ComponentPolicy("flux", parts["transformer"].layers, Policy())}))
    with pytest.raises(ValueError, match=r"policy\.json: transformer was saved from family 'flux', but the model's is"):
        build_model(settings("transformer"))


def test_the_page_offers_what_each_layer_runs():
    layers = {"blocks.1.attn1": TAIL}
    assert by_policy(layers, "blocks.1.attn1") is TAIL
    assert by_policy(layers, "blocks.0.attn1") == TAIL.replace(keep_ratio=1.0)


def test_the_command_line_says_what_is_wrong(calibrated, tmp_path, capsys):
    wan, file = calibrated
    for arguments, message in (
        (("calibrate", "--model", wan), "give --prompt or --prompt-file, one of them"),
        (("calibrate", "--model", wan, "--prompt", "a", "--error", "-1"), "error must be above 0 and below 1, got -1"),
        (("generate", "--model", wan, "--prompt", "a", "--policy", tmp_path / "x.json"), "no such policy file"),
        (("generate", "--model", wan, "--prompt", "a", "--policy", file, "--keep-ratio", "0.1"), "give --policy, or"),
    ):
        assert cli.main([str(x) for x in arguments]) == 2
        assert message in capsys.readouterr().err
