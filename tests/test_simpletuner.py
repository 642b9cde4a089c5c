"""SimpleTuner's `sla_attention.pt`, as it saves it, for tiny models."""

import os

import pytest
import torch
from checkpoint_files import drawn
from test_ltx2 import TestLTX2 as TinyLTX2
from test_minimax_h3 import TestMiniMaxH3 as TinyH3
from tiny_wan import run, tiny_transformer

from foveal import SLAConfig, export_checkpoint, load_checkpoint, sparsify
from foveal.models.files.checkpoints import check_checkpoint
from foveal.models.processor import sparse_processors

SETTINGS = {"topk": 0.2, "feature_map": "softmax", "blkq": 64, "blkk": 64, "tie_feature_map_qk": True}


def projection(head_dim=16, seed=0):
    return {"proj_l.weight": drawn(head_dim, head_dim, seed=seed), "proj_l.bias": drawn(head_dim, seed=seed)}


def zeros(head_dim=16):
    return {name: torch.zeros_like(x) for name, x in projection(head_dim).items()}


def saved(folder, **changes):
    """What SimpleTuner's `on_save_checkpoint` writes for heads of 16; a change of None leaves an entry out."""
    payload = {"settings": SETTINGS, "state": {"16:bf16": projection()}, "version": 1} | changes
    torch.save({name: x for name, x in payload.items() if x is not None}, folder / "sla_attention.pt")
    return folder / "sla_attention.pt"


@torch.no_grad()
def test_every_layer_has_the_projection(tmp_path):
    path = saved(tmp_path)
    check_checkpoint(path)
    model, expected = tiny_transformer(), tiny_transformer()
    report = load_checkpoint(model, path, block_q=16, block_k=16, keep_ratio=0.3)
    assert report.format == "simpletuner-sla"
    assert (report.sparse_tensors, report.base_tensors, report.layers) == (2, 0, 2)
    assert report.config == SLAConfig(
        keep_ratio=0.3, drop_ratio=0.0, block_q=16, block_k=16, feature_map="softmax", linear_scope="all"
    )
    for processor in sparse_processors(sparsify(expected, report.config)).values():
        processor.attention.proj.weight.copy_(projection()["proj_l.weight"])
        processor.attention.proj.bias.copy_(projection()["proj_l.bias"])
    assert torch.equal(run(model), run(expected))
    # They are copies: what one layer learns is its own.
    first, second = sparse_processors(model).values()
    first.attention.proj.weight.zero_()
    assert second.attention.proj.weight.any()
    assert first.attention.proj.weight.dtype is torch.float32


def test_the_file_says_the_configuration(tmp_path):
    settings = SETTINGS | {"topk": 0.15, "feature_map": "elu", "blkq": 128, "blkk": 32}
    report = load_checkpoint(tiny_transformer(), saved(tmp_path, settings=settings))
    assert report.from_file
    assert report.config == SLAConfig(
        keep_ratio=0.15, drop_ratio=0.0, block_q=128, block_k=32, feature_map="elu", linear_scope="all"
    )
    assert "one projection for all layers" in str(report)
    assert "SimpleTuner's SLA also takes in cross-attention without a mask, which is dense here" in str(report)


def test_the_trained_one_of_two_precisions(tmp_path):
    """Validation in another precision leaves a projection that is zero."""
    state = {"16:bf16": zeros(), "16:fp16": projection(seed=3)}
    model = tiny_transformer()
    load_checkpoint(model, saved(tmp_path, state=state))
    for processor in sparse_processors(model).values():
        assert torch.equal(processor.attention.proj.bias, projection(seed=3)["proj_l.bias"])
    with pytest.raises(ValueError, match="has trained projections of bf16 and fp16 for heads of 16"):
        load_checkpoint(tiny_transformer(), saved(tmp_path, state={"16:bf16": projection(), "16:fp16": projection()}))
    load_checkpoint(tiny_transformer(), saved(tmp_path, state={"16:bf16": zeros(), "16:fp16": zeros()}))


def test_heads_of_other_sizes_are_left_out(tmp_path):
    """LTX-2's audio has smaller heads than its video, and SimpleTuner runs SLA there too."""
    model = TinyLTX2().model()
    report = load_checkpoint(model, saved(tmp_path, state={"8:bf16": projection(8), "16:bf16": projection()}))
    assert (report.sparse_tensors, report.layers) == (2, 2)
    assert "projections of heads of 8 are of other attention, and were left out" in str(report)
    for processor in sparse_processors(model).values():
        assert torch.equal(processor.attention.proj.weight, projection()["proj_l.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "must be of version 1, got 2"),
        ({"version": None}, "must hold only named tensors, but settings, state are of other types"),
        ({"state": {}}, "must hold SLA's settings and at least one projection"),
        ({"state": {"16": projection()}}, r"by head size and precision \('128:bf16'\), got '16'"),
        ({"state": {"32:bf16": projection(32)}}, r"lacks 16\.proj_l\.bias, 16\.proj_l\.weight"),
        ({"state": {"16:bf16": projection() | {"router.weight": drawn(3)}}}, r"has unexpected 16\.router\.weight"),
        ({"state": {"16:bf16": projection() | {"proj_l.weight": drawn(8, 8)}}}, r"has shape \(8, 8\), the model's is"),
        ({"settings": {"topk": 0.2}}, "lacks feature_map, blkq, blkk"),
        ({"settings": SETTINGS | {"topk": 1.5}}, r"keep_ratio must be"),
        ({"settings": SETTINGS | {"feature_map": "hedgehog"}}, "must have a feature_map of .* got 'hedgehog'"),
    ],
)
@torch.no_grad()
def test_files_that_do_not_fit(tmp_path, changes, message):
    model = tiny_transformer()
    before = run(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, saved(tmp_path, **changes))
    assert torch.equal(run(model), before)
    assert not sparse_processors(model)


class Touch:
    """Code that a pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_runs(tmp_path):
    path = saved(tmp_path, settings={"topk": Touch(tmp_path / "ran")})
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_checkpoint(tiny_transformer(), path)
    assert not (tmp_path / "ran").exists()


def test_what_it_is_not_for(tmp_path):
    with pytest.raises(ValueError, match=r"is for models of family 'wan' or .* got one of 'minimax_h3'"):
        load_checkpoint(TinyH3().model(), saved(tmp_path))
    with pytest.raises(ValueError, match="stands for feature_map='softmax', got 'elu'"):
        load_checkpoint(tiny_transformer(), saved(tmp_path), feature_map="elu")
    model = tiny_transformer()
    load_checkpoint(model, saved(tmp_path))
    with pytest.raises(ValueError, match="has one projection for all layers, and here each has its own; use save"):
        export_checkpoint(model, tmp_path / "out.pt", format="simpletuner-sla")
