"""TurboT2AV's `model.pth` for LTX-2: names of its repository and wrapper, for a tiny LTX-2."""

import pytest
import torch
from test_ltx2 import TestLTX2 as Tiny
from tiny_wan import tiny_transformer

from foveal import SLAConfig, export_checkpoint, load_checkpoint, sparsify
from foveal.models.processor import sparse_processors

tiny = Tiny()
FORMAT = "turbot2av-sla"
CONFIG = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, block_q=128, block_k=64, linear_scope="none", projection=False)
# Written out, so that the tests do not lean on the conversion that they test.
MODULES = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
PARTS = {
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
}


def theirs(name):
    first, *rest = name.split(".")
    return ".".join([MODULES.get(first, first), *(PARTS.get(part, part) for part in rest)])


def saved(path, wrapper="generator", prefix="model.", **changes):
    state = {theirs(name): x.clone() for name, x in tiny.model(seed=1).state_dict().items()} | changes
    state = {f"{prefix}{name}": x for name, x in state.items() if x is not None}
    torch.save({wrapper: state} if wrapper else state, path)
    return path


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [("generator", "model."), ("model", "model.velocity_model."), (None, "")],
    ids=["as trained", "of another run", "bare"],
)
@torch.no_grad()
def test_a_release(tmp_path, wrapper, prefix):
    path = saved(tmp_path / "model.pth", wrapper, prefix)
    model, expected = tiny.model(), sparsify(tiny.model(seed=1), CONFIG)
    report = load_checkpoint(model, path, format=FORMAT)
    assert (report.format, report.config) == (FORMAT, CONFIG)
    assert (report.sparse_tensors, report.base_tensors) == (0, len(tiny.model().state_dict()))
    assert not report.from_file
    for name, x in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name
    assert torch.equal(tiny.run(model), tiny.run(expected))
    assert "TurboT2AV also makes the audio's self-attention sparse, which is dense here" in str(report)


def test_it_has_to_be_named(tmp_path):
    with pytest.raises(ValueError, match=r"is a dense checkpoint.*or give format='turbot2av-sla' if it is such a file"):
        load_checkpoint(tiny.model(), saved(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer_blocks.1.attn1.to_q.weight": None}, r"lacks transformer_blocks\.1\.attn1\.to_q\.weight"),
        ({"transformer_blocks.1.attn1.more.weight": torch.ones(2)}, "has unexpected .*attn1.more.weight"),
        ({"transformer_blocks.2.attn1.to_q.weight": torch.ones(2)}, "is for a model of 3 layers, got one of 2"),
        ({"transformer_blocks.1.attn1.to_q.weight": torch.ones(2, 2)}, r"has shape \(2, 2\)"),
    ],
)
def test_files_that_do_not_fit(tmp_path, changes, message):
    model = tiny.model()
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, saved(tmp_path / "model.pth", **changes), format=FORMAT)
    assert not sparse_processors(model)


def test_what_it_is_not_for(tmp_path):
    with pytest.raises(ValueError, match="is for models of family 'ltx2', got one of 'wan'"):
        load_checkpoint(tiny_transformer(), saved(tmp_path / "model.pth"), format=FORMAT)
    torch.save({"proj_in.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"is not of format '{FORMAT}': it has no attention of such a model"):
        load_checkpoint(tiny.model(), tmp_path / "other.pth", format=FORMAT)
    model = tiny.model()
    load_checkpoint(model, saved(tmp_path / "model.pth"), format=FORMAT)
    with pytest.raises(ValueError, match="is only read: nothing in it tells sparse attention; use save"):
        export_checkpoint(model, tmp_path / "out.pth", format=FORMAT)
