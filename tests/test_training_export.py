"""What a run exports, in a pipeline of two transformers: each of them is trained by a run of its own."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_training import SPARSE, config, write_data
from tiny_wan import generate, tiny_pipeline, tiny_transformer

import foveal
from foveal import SLA2Config, SLAConfig
from foveal.lab.train.model import build_model
from foveal.lab.train.settings import LoraSettings, ModelSettings, SparsitySettings
from foveal.lab.train.trainer import Trainer
from foveal.models.processor import sparse_processors

TURBO = SLAConfig(keep_ratio=0.4, drop_ratio=0.0, block_q=16, block_k=16, linear_scope="all")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train_second(folder, **changes):
    """The low-noise transformer of `tiny_pipeline`, trained for two steps; (its trainer, the export's folder)."""
    write_data(folder / "data")
    for name, seed in (("transformer", 0), ("transformer_2", 1)):
        tiny_transformer(seed=seed).save_pretrained(folder / "base" / name)
    settings = config(
        folder,
        model=ModelSettings(str(folder / "base"), "transformer_2", gradient_checkpointing=False),
        sparsity=SparsitySettings(TURBO),
        steps=2,
        objective__sigma_range=(0.0, 0.6),
        **changes,
    )
    trainer = Trainer(settings)
    return trainer, trainer.run().export


def averages(trainer):
    return dict(zip(trainer.parameters, trainer.state.average.shadow_params, strict=True))


@pytest.mark.parametrize("way", ["checkpoint", "folders"])
def test_the_export_of_one_expert_goes_into_its_place(tmp_path, way):
    trainer, export = train_second(tmp_path, export_formats=("turbodiffusion-sla",))
    start = tiny_transformer(seed=1).state_dict()
    trained = averages(trainer)
    assert any(not torch.equal(trained[name], tensor) for name, tensor in start.items() if name in trained)

    pipe = tiny_pipeline()
    first = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    before = generate(pipe)
    if way == "checkpoint":
        report = foveal.load_checkpoint(pipe.transformer_2, export / "turbodiffusion-sla.safetensors")
        assert report.from_file
        assert report.config == TURBO
    else:
        pipe.transformer_2 = type(pipe.transformer_2).from_pretrained(export / "transformer")
        foveal.load(pipe.transformer_2, export / "sparse")
    loaded = dict(pipe.transformer_2.named_parameters())
    assert trained.keys() == loaded.keys()
    for name, tensor in trained.items():
        assert torch.equal(loaded[name], tensor), name
    assert all(torch.equal(tensor, first[name]) for name, tensor in pipe.transformer.state_dict().items())
    sparse = [row.layer for row in foveal.summary(pipe).rows if row.config is not None]
    assert sparse == ["transformer_2.blocks.0.attn1", "transformer_2.blocks.1.attn1"]
    after = generate(pipe)
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_the_adapter_of_one_expert_goes_into_its_place(tmp_path):
    pytest.importorskip("peft")
    trainer, export = train_second(tmp_path, optimizer__trainable="lora", lora=LoraSettings(rank=2, alpha=6))
    assert {path.name for path in export.iterdir()} == {"sparse", "lora"}
    pipe = tiny_pipeline()
    foveal.load(pipe.transformer_2, export / "sparse")
    pipe.load_lora_weights(export / "lora", load_into_transformer_2=True)
    assert not any(".lora_" in name for name, _ in pipe.transformer.named_parameters())
    (adapter,) = pipe.transformer_2.peft_config
    assert pipe.transformer_2.peft_config[adapter].lora_alpha == 6
    loaded = {name.replace(f".{adapter}.", ".default."): p for name, p in pipe.transformer_2.named_parameters()}
    for name, tensor in averages(trainer).items():
        assert torch.equal(loaded[name], tensor), name


SLA2 = SLA2Config(keep_ratio=0.4, block_q=16, block_k=16)


def own_parameters(model):
    """What conversion added, named as in a file of `foveal.save`."""
    return {
        f"transformer.{name}.{key}": parameter.detach().clone()
        for name, processor in sparse_processors(model).items()
        for key, parameter in processor.attention.named_parameters()
    }


def test_a_second_stage_starts_from_what_the_first_exported(tmp_path):
    write_data(tmp_path / "data")
    first = config(
        tmp_path,
        output=tmp_path / "first",
        steps=2,
        sparsity=SparsitySettings(SLA2.replace(routing="soft")),
        optimizer__trainable="new",
    )
    exported = Trainer(first).run().export / "sparse"
    saved = load_file(exported / "foveal.safetensors")
    routers = {name for name in saved if ".router." in name}
    assert routers
    assert any(not torch.equal(saved[name], x) for name, x in own_parameters(build_model(first)).items())

    AcceleratorState._reset_state(reset_partial_state=True)
    fixed = SparsitySettings(SLA2.replace(routing="fixed"), parameters=exported)
    trainer = Trainer(config(tmp_path, output=tmp_path / "second", steps=2, sparsity=fixed))
    begun = own_parameters(trainer.transformer)
    assert set(begun) == set(saved)
    assert all(torch.equal(begun[name], saved[name]) for name in saved)
    trainer.run()
    ended = own_parameters(trainer.transformer)
    assert {name for name in saved if torch.equal(ended[name], saved[name])} == routers


def test_parameters_that_do_not_fit_are_refused(tmp_path):
    write_data(tmp_path / "data")
    foveal.save(build_model(config(tmp_path)), tmp_path / "sla")
    with pytest.raises(ValueError, match=r"lacks .*alpha_logits.* and has unexpected .*proj"):
        build_model(config(tmp_path, sparsity=SparsitySettings(SLA2, parameters=tmp_path / "sla")))
    one_dense = SparsitySettings(SPARSE, dense_layers=(0,), parameters=tmp_path / "sla")
    with pytest.raises(ValueError, match=r"has unexpected transformer\.blocks\.0"):
        build_model(config(tmp_path, sparsity=one_dense))
    with pytest.raises(ValueError, match=r"sparsity\.parameters needs sparsity\.attention"):
        SparsitySettings(parameters=tmp_path / "sla")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        SparsitySettings(SLA2, parameters=tmp_path / "none")
