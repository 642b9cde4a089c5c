"""`sparsify`, `densify`, `dense` and `summary`: what they change, what they restore, what they refuse."""

import copy
import io
import pickle

import pytest
import torch
from tiny_wan import (
    SPARSE_SLA,
    SPARSE_VSA,
    inputs,
    randomize,
    run,
    tiny_pipeline,
    tiny_transformer,
)
from torch import nn

from foveal import SLAConfig, VideoGrid, VSAConfig
from foveal.methods.cost import attention_cost
from foveal.models import dense, densify, sparsify, summary
from foveal.models.processor import SparseAttentionProcessor, sparse_processors, state_of

CONFIGS = pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])


def is_dense(model) -> bool:
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return not sparse_processors(model) and not hooked


@CONFIGS
@torch.no_grad()
def test_densify_is_exact(config):
    model = tiny_transformer()
    expected = run(model)
    processors = [block.attn1.processor for block in model.blocks]
    former = {name: set(vars(module)) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    assert sparsify(model, config) is model
    randomize(model)
    assert (run(model) - expected).abs().max() > 1e-3
    assert densify(model) is model

    assert is_dense(model)
    assert all(block.attn1.processor is old for block, old in zip(model.blocks, processors, strict=True))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == former
    assert model._skip_layerwise_casting_patterns is type(model)._skip_layerwise_casting_patterns
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert torch.equal(run(model), expected)
    densify(model)
    assert torch.equal(run(sparsify(model, config)), run(sparsify(tiny_transformer(), config)))


def test_densify_keeps_casting_patterns_of_the_user():
    model = tiny_transformer()
    model._skip_layerwise_casting_patterns = ["mine"]
    sparsify(model, SPARSE_SLA)
    assert model._skip_layerwise_casting_patterns[0] == "mine"
    assert densify(model)._skip_layerwise_casting_patterns == ["mine"]


@torch.no_grad()
def test_dense_nests_and_survives_exceptions():
    model = tiny_transformer()
    expected = run(model)
    sparsify(model, SPARSE_SLA)
    randomize(model)
    sparse, names = run(model), list(model.state_dict())
    with dense(model) as inside:
        assert inside is model
        assert torch.equal(run(model), expected)
        with dense(model):
            assert torch.equal(run(model), expected)
        assert torch.equal(run(model), expected)
        assert list(model.state_dict()) == names
    assert torch.equal(run(model), sparse)
    with pytest.raises(RuntimeError, match="inside"), dense(model):
        raise RuntimeError("inside")
    assert torch.equal(run(model), sparse)


def test_dense_and_densify_leave_a_dense_model_alone():
    model = tiny_transformer()
    with torch.no_grad(), dense(model):
        assert torch.equal(run(model), run(densify(model)))
    assert is_dense(model)


@CONFIGS
@torch.no_grad()
def test_deepcopy_is_independent(config):
    model = sparsify(tiny_transformer(), config)
    randomize(model)
    expected = run(model)
    clone = copy.deepcopy(model)
    assert torch.equal(run(clone), expected)
    assert state_of(clone) is not state_of(model)
    assert len({id(processor.state) for processor in sparse_processors(clone).values()}) == 1

    run(clone, **inputs(latent=(2, 6, 8)))
    assert state_of(clone).grid == VideoGrid(2, 3, 4)
    assert state_of(model).grid == VideoGrid(3, 5, 7)
    with dense(clone):
        assert torch.equal(run(model), expected)
    for parameter in clone.parameters():
        parameter.zero_()
    assert torch.equal(run(model), expected)
    densify(clone)
    assert is_dense(clone)
    assert torch.equal(run(model), expected)
    assert state_of(model).grid == VideoGrid(3, 5, 7)


@torch.no_grad()
def test_pickle_round_trip():
    model = sparsify(tiny_transformer(num_layers=1), SPARSE_SLA)
    clone = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(clone), run(model))
    assert is_dense(densify(clone))


@CONFIGS
@torch.no_grad()
def test_state_dict_round_trip(config):
    model, other = sparsify(tiny_transformer(), config), sparsify(tiny_transformer(seed=1), config)
    randomize(model)
    assert not torch.equal(run(model), run(other))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(model), run(other))


def test_dtypes():
    model = sparsify(tiny_transformer().to(torch.bfloat16), SPARSE_VSA, layers=[0])
    sparsify(model, SPARSE_SLA.replace(feature_map="hedgehog"), layers=[1])
    gates, linear = (processor.attention for processor in sparse_processors(model).values())
    assert gates.to_gate_coarse.weight.dtype == torch.bfloat16
    assert linear.feature_weight.dtype == torch.bfloat16
    assert linear.proj.weight.dtype == torch.float32
    with torch.no_grad():
        assert run(model, **inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.float()
    assert gates.to_gate_coarse.weight.dtype == torch.float32

    late = sparsify(tiny_transformer(), SPARSE_SLA)
    randomize(late)
    former = late.blocks[0].attn1.processor.attention.proj.weight.clone()
    late.to(torch.bfloat16)
    assert torch.equal(late.blocks[0].attn1.processor.attention.proj.weight, former)
    assert late.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


def test_new_parameters_go_to_the_model_s_device():
    with torch.device("meta"):
        model = tiny_transformer()
    sparsify(model, SPARSE_VSA)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_train_and_eval_reach_the_processor():
    model = tiny_transformer()
    assert not sparsify(model, SPARSE_SLA).blocks[0].attn1.processor.training
    assert model.train().blocks[0].attn1.processor.attention.training


def test_some_layers():
    model = tiny_transformer(num_layers=3)
    sparsify(model, SPARSE_SLA, layers=[2, "blocks.0.attn1", 0])
    sparsify(model, SPARSE_VSA, layers=range(1, 2))
    configs = [block.attn1.processor.config for block in model.blocks]
    assert configs == [SPARSE_SLA, SPARSE_VSA, SPARSE_SLA]
    assert len({id(processor.state) for processor in sparse_processors(model).values()}) == 1
    for module in (model, *model.blocks):
        assert len(module._forward_pre_hooks) == 1
    assert is_dense(densify(model))


def test_attention_backend_reaches_the_dense_processor():
    model = sparsify(tiny_transformer(), SPARSE_SLA)
    original = model.blocks[0].attn1.processor.original
    try:
        model.set_attention_backend("native")
        assert original._attention_backend is not None
        assert model.blocks[0].attn1.processor._attention_backend == original._attention_backend
    finally:
        model.reset_attention_backend()
    assert original._attention_backend is None


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"config": {"keep_ratio": 0.1}}, TypeError, "config must be"),
        ({"layers": [2]}, ValueError, r"layers must be in 0\.\.1, got 2"),
        ({"layers": [-1]}, ValueError, r"layers must be in 0\.\.1, got -1"),
        ({"layers": ["blocks.0.attn2"]}, ValueError, "unknown layer 'blocks.0.attn2'"),
        ({"layers": "blocks.0.attn1"}, TypeError, "layers must be an iterable"),
        ({"layers": 0}, TypeError, "layers must be an iterable"),
        ({"layers": [True]}, TypeError, "layers must hold indices or names, got True"),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"impl": "cuda"}, ValueError, "unknown impl 'cuda'"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    model = tiny_transformer()
    with pytest.raises(error, match=match):
        sparsify(model, **{"config": SPARSE_SLA, **arguments})
    assert is_dense(model)


@pytest.mark.parametrize("use", [lambda model: sparsify(model, SPARSE_SLA), densify, summary])
def test_unsupported_models(use):
    with pytest.raises(TypeError, match=r"one of WanTransformer3DModel, .*, or a pipeline with one, got Linear"):
        use(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="transformer, transformer_2 or transformer_ref, got str"):
        use("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_sparse_layers_are_not_converted_twice():
    model = sparsify(tiny_transformer(), SPARSE_SLA, layers=[1])
    processor = model.blocks[1].attn1.processor
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 is sparse already.*densify"):
        sparsify(model, SPARSE_VSA)
    assert list(sparse_processors(model)) == ["blocks.1.attn1"]
    assert model.blocks[1].attn1.processor is processor


def test_foreign_processors_are_not_replaced():
    class SomeoneElses:
        pass

    model = tiny_transformer()
    model.blocks[1].attn1.set_processor(SomeoneElses())
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 has a SomeoneElses"):
        sparsify(model, SPARSE_SLA)
    assert is_dense(model)
    sparsify(model, SPARSE_SLA, layers=[0])


def test_offloaded_models_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_transformer()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        sparsify(model, SPARSE_SLA)
    assert is_dense(model)


@pytest.mark.wrapper("model and sequential offloading")
@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_SLA.replace(feature_map="hedgehog"), SPARSE_VSA], ids=str)
def test_sequential_offloading_fetches_our_parameters(config):
    accelerate = pytest.importorskip("accelerate")
    model = sparsify(tiny_transformer(), config)
    randomize(model)
    with torch.no_grad():
        expected = run(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(p.device.type == "meta" for p in model.parameters())
        torch.testing.assert_close(run(model), expected)


def test_a_pipeline_is_converted_as_a_whole_or_not_at_all():
    pipeline = tiny_pipeline()
    sparsify(pipeline.transformer_2, SPARSE_SLA)
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(pipeline, SPARSE_SLA)
    assert is_dense(pipeline.transformer)
    densify(pipeline)
    pipeline.transformer_2 = None
    sparsify(pipeline, SPARSE_SLA)
    assert isinstance(pipeline.transformer.blocks[0].attn1.processor, SparseAttentionProcessor)


def test_summary():
    model = tiny_transformer(num_layers=3)
    sparsify(model, SPARSE_SLA, layers=[0])
    sparsify(model, VSAConfig(topk=3, tile="auto"), layers=[1])
    table = summary(model)
    assert [row.method for row in table.rows] == ["sla", "vsa", "dense"]
    assert [row.layer for row in table.rows] == [f"blocks.{i}.attn1" for i in range(3)]
    assert [row.parameters for row in table.rows] == [16 * 16 + 16, 32 * 32 + 32, 0]
    assert table.parameters == 16 * 16 + 16 + 32 * 32 + 32
    assert table.reduction is None
    assert all(row.reduction is None and row.cells()[-1] == "" for row in table.rows)

    grid = VideoGrid(8, 16, 16)
    costs = [attention_cost(row.config, grid=grid, heads=2, head_dim=16) for row in table.rows]
    table = summary(model, grid)
    assert [row.reduction for row in table.rows] == [cost.reduction for cost in costs]
    assert table.rows[2].reduction == 1.0
    assert table.reduction == sum(cost.dense.flops for cost in costs) / sum(cost.flops for cost in costs)
    text = str(table)
    for expected in ("2 of 3 self-attention layers sparse", "1,328 parameters", "8x16x16", "top 3", "4x4x4"):
        assert expected in text, expected
    assert text.splitlines()[4].endswith(f" {costs[0].reduction:.1f}x")
    assert "auto" in str(summary(model))
    assert text.splitlines()[4].split()[2:5] == ["0.3", "0.1", "marginal"]

    with torch.no_grad():
        run(model)
    assert {row.grid for row in summary(model).rows} == {VideoGrid(3, 5, 7)}
    assert summary(tiny_transformer()).parameters == 0
    with pytest.raises(TypeError, match="grid must be a VideoGrid"):
        summary(model, (8, 16, 16))


def test_summary_says_which_implementation_ran():
    model = tiny_transformer(num_layers=3)
    sparsify(model, SPARSE_SLA, layers=[0])
    sparsify(model, VSAConfig(topk=3, tile="auto"), layers=[1], impl="reference")
    assert " ran " not in str(summary(model)).splitlines()[2]
    with torch.no_grad(), dense(model):
        run(model)
    assert [row.ran for row in summary(model).rows] == [None] * 3
    with torch.no_grad():
        run(model)
    table = summary(model)
    assert [row.ran for row in table.rows] == ["torch", "reference", None]
    titles, _, *rows = str(table).partition("\n\n")[2].splitlines()
    place = titles.index("ran")
    assert [row[place:].split()[0] for row in rows] == ["torch", "reference", "0"]
    console = pytest.importorskip("rich.console").Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "ran" in text
    assert "reference" in text


def test_summary_as_a_rich_table():
    console = pytest.importorskip("rich.console").Console(width=160, record=True, file=io.StringIO())
    console.print(summary(sparsify(tiny_transformer(), SLAConfig())))
    text = console.export_text()
    assert "blocks.1.attn1" in text
    assert "0.05" in text
