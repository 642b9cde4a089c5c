"""What users get wrong with the functions for models: each says which argument, what was expected and what came."""

import pytest
import torch
from tiny_wan import SPARSE_SLA, SPARSE_VSA, randomize, tiny_pipeline, tiny_transformer

import foveal
from foveal import Policy, SLAConfig
from foveal.models.processor import sparse_processors


def sparse():
    model = foveal.sparsify(tiny_transformer(), SPARSE_SLA)
    randomize(model)
    return model


CALLS = {
    "sparsify": lambda model: foveal.sparsify(model, SPARSE_SLA),
    "densify": foveal.densify,
    "dense": lambda model: foveal.dense(model).__enter__(),
    "summary": foveal.summary,
    "save": lambda model: foveal.save(model, "folder"),
    "load": lambda model: foveal.load(model, "folder"),
    "set_policy": lambda model: foveal.set_policy(model, Policy()),
    "get_policy": foveal.get_policy,
    "reconfigure": lambda model: foveal.reconfigure(model, SPARSE_SLA),
    "sparse_parameters": foveal.sparse_parameters,
    "unfreeze": foveal.unfreeze,
}

MODELS = {
    "a name": (
        lambda: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "transformer_2 or transformer_ref, got str",
    ),
    "a class": (lambda: type(tiny_transformer()), "transformer_2 or transformer_ref, got type"),
    "nothing": (lambda: None, "got NoneType"),
    "another model": (lambda: torch.nn.Linear(2, 2), "must be one of WanTransformer3DModel.*, got Linear"),
    "a block": (lambda: tiny_transformer().blocks[0], "must be one of .*, got WanTransformerBlock"),
    "a wrapper": (
        lambda: torch.nn.DataParallel(tiny_transformer()),
        "got DataParallel; for a wrapper .* the model inside",
    ),
    "a compiled model": (lambda: torch.compile(tiny_transformer()), "got OptimizedModule; for a wrapper"),
    "a pipeline of another model": (
        lambda: type("Pipeline", (), {"transformer": torch.nn.Linear(2, 2)})(),
        "must be one of .*, got Linear",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_model(call):
    for make, match in MODELS.values():
        with pytest.raises(TypeError, match=f"model must be .*{match.removeprefix('must be ')}"):
            CALLS[call](make())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, f: foveal.sparsify(m, SPARSE_SLA), ValueError, r"blocks\.0\.attn1 is sparse already .*densify"),
        (lambda m, f: foveal.sparsify(tiny_transformer(), 0.05), TypeError, "config must be one of .*, got float"),
        (lambda m, f: foveal.sparsify(tiny_transformer(), SLAConfig), TypeError, "config must be one of .*, got type"),
        (lambda m, f: foveal.sparsify(tiny_transformer(), SPARSE_SLA, impl="cuda"), ValueError, "unknown impl 'cuda'"),
        (lambda m, f: foveal.summary(m, (21, 30, 52)), TypeError, r"grid must be a VideoGrid, got \(21, 30, 52\)"),
        (lambda m, f: foveal.summary(m, SPARSE_SLA), TypeError, "grid must be a VideoGrid, got SLAConfig"),
        (lambda m, f: foveal.save(f, m), TypeError, "model must be"),
        (lambda m, f: foveal.save(tiny_transformer(), f), ValueError, "no sparse layer.*call sparsify first"),
        (lambda m, f: foveal.save(m, f / "file"), FileExistsError, "file"),
        (lambda m, f: foveal.load(f, m), TypeError, "model must be"),
        (lambda m, f: foveal.load(m, f / "nowhere"), FileNotFoundError, "no such folder: .*nowhere"),
        (lambda m, f: foveal.load(m, f), FileNotFoundError, "has no foveal.safetensors; expected a folder that foveal"),
        (lambda m, f: foveal.load(m, f / "file"), FileNotFoundError, "no such folder: .*file"),
        (lambda m, f: foveal.set_policy(m, "dense"), TypeError, "policy must be a Policy or None, got 'dense'"),
        (lambda m, f: foveal.set_policy(m, Policy), TypeError, "policy must be a Policy or None, got <class"),
        (lambda m, f: foveal.set_policy(tiny_transformer(), None), ValueError, "no sparse layer for a policy"),
        (lambda m, f: foveal.reconfigure(m, None), TypeError, "config must be one of .*, got NoneType"),
        (lambda m, f: foveal.reconfigure(m, SPARSE_VSA), ValueError, "densify the model and sparsify it again"),
        (lambda m, f: foveal.reconfigure(tiny_transformer(), SPARSE_SLA), ValueError, "no sparse layer to reconfigure"),
        (
            lambda m, f: foveal.unfreeze(tiny_transformer()),
            ValueError,
            "no sparse parameters to unfreeze; call sparsify",
        ),
    ],
)
def test_wrong_use(call, error, match, tmp_path):
    (tmp_path / "file").write_text("")
    model = sparse()
    former = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        call(model, tmp_path)
    assert [processor.config for processor in sparse_processors(model).values()] == [SPARSE_SLA] * 2
    assert all(torch.equal(tensor, former[name]) for name, tensor in model.state_dict().items())


def test_what_is_harmless_passes():
    """Calls that ask for what is so already."""
    model = tiny_transformer()
    assert foveal.densify(model) is model
    with foveal.dense(model) as same:
        assert same is model
    assert foveal.get_policy(model) is None
    assert foveal.sparse_parameters(model) == {}
    assert foveal.summary(model).reduction is None
    pipeline = tiny_pipeline()
    assert foveal.densify(pipeline) is pipeline
    assert foveal.set_policy(foveal.sparsify(pipeline, SPARSE_SLA), None) is pipeline
