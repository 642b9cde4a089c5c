"""`foveal doctor`: what it says of implementations is what the code chooses, what it estimates is what a model does."""

import dataclasses
import inspect
import itertools
import json
import math

import pytest
import torch

from foveal import SLAConfig, VideoGrid, VSAConfig, attention_cost
from foveal.kernels.api import choose_impl
from foveal.lab.bench.break_even import break_even
from foveal.lab.bench.timing import CpuTimer
from foveal.lab.cli import COMMANDS, main
from foveal.lab.doctor import (
    TEXT_TOKENS,
    environment,
    estimate,
    examine,
    implementations,
    measure_gain,
    shorter_grids,
    tables,
)
from foveal.models.families.table import FAMILIES
from foveal.models.model_sizes import MODEL_SIZES, USUAL_VAE_STRIDES, model_size

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "video", "expected"),
    [
        ("wan-1.3b", (81, 480, 832), (21, 30, 52)),
        ("wan-14b", (81, 720, 1280), (21, 45, 80)),
        ("wan-5b", (121, 704, 1280), (31, 22, 40)),
        ("wan-1.3b", (1, 480, 832), (1, 30, 52)),
        ("hunyuan-video", (129, 720, 1280), (33, 45, 80)),
        ("hunyuan-video-1.5", (121, 480, 848), (31, 30, 53)),
        ("cogvideox-5b", (49, 480, 720), (13, 30, 45)),
        ("ltx-video", (161, 512, 704), (21, 16, 22)),
        ("flux", (1, 1024, 1024), (1, 64, 64)),
    ],
)
def test_grids_of_known_models(name, video, expected):
    assert MODEL_SIZES[name].grid(*video).shape == expected


@pytest.mark.parametrize(
    ("name", "video", "match"),
    [
        ("flux", (2, 1024, 1024), "frames must be 1 for flux, which makes images, got 2"),
        ("wan-1.3b", (80, 480, 832), "frames must be 1 more than a multiple of 4 for wan-1.3b, got 80"),
        ("wan-1.3b", (81, 488, 832), "height must be a multiple of 16 for wan-1.3b, got 488"),
        ("wan-1.3b", (81, 480, 0), "width must be at least 1"),
    ],
)
def test_sizes_that_a_model_cannot_take(name, video, match):
    with pytest.raises(ValueError, match=match):
        MODEL_SIZES[name].grid(*video)


@pytest.mark.parametrize("size", MODEL_SIZES.values(), ids=lambda size: size.name)
def test_known_models_are_of_known_families(size):
    assert size.family in FAMILIES


def test_every_family_has_strides():
    assert set(USUAL_VAE_STRIDES) == set(FAMILIES)


@pytest.mark.parametrize(
    "name", ["wan-14b", "hunyuan-video", "hunyuan-video-1.5", "cogvideox-2b", "ltx-video", "ltx-2", "flux"]
)
def test_known_models_that_are_the_defaults_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    size = MODEL_SIZES[name]
    parameters = inspect.signature(getattr(diffusers, FAMILIES[size.family].transformer)).parameters
    default = {key: parameter.default for key, parameter in parameters.items()}
    assert (size.heads, size.head_dim) == (default["num_attention_heads"], default["attention_head_dim"])
    assert size.layers == default["num_layers"] + default.get("num_single_layers", 0)
    if size.ffn_dim is not None:
        assert size.ffn_dim == default["ffn_dim"]


def test_sizes_from_a_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from tiny_wan import tiny_transformer

    tiny_transformer(num_layers=3).save_config(tmp_path / "transformer")
    size = model_size(tmp_path / "transformer")
    expected = dataclasses.replace(
        MODEL_SIZES["wan-1.3b"], name=size.name, layers=3, heads=2, head_dim=16, ffn_dim=32, note=size.note
    )
    assert size == expected
    assert "strides (4, 8, 8) assumed" in size.note
    assert model_size(tmp_path).layers == 3
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[])
    vae.register_to_config(scale_factor_temporal=2, scale_factor_spatial=16)
    vae.save_config(tmp_path / "vae")
    size = model_size(str(tmp_path))
    assert (size.vae_strides, size.note) == ((2, 16, 16), None)
    assert size.grid(5, 64, 96) == VideoGrid(3, 2, 3)


def test_image_models_fold_latents_into_tokens(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    with torch.device("meta"):
        diffusers.FluxTransformer2DModel(**sizes, axes_dims_rope=(4, 6, 6)).save_config(tmp_path)
    size = model_size(tmp_path)
    assert (size.layers, size.heads, size.head_dim, size.ffn_dim) == (3, 2, 16, None)
    assert size.grid(1, 1024, 512) == VideoGrid(1, 64, 32)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown model 'gpt'; expected a folder with a config\.json, or \('wan-1\.3b'"
    ):
        model_size("gpt")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match=r"holds a UNet2DConditionModel; expected one of .*WanTransformer3DModel"):
        model_size(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        model_size(tmp_path)


def test_implementations_are_those_that_would_run():
    rows = implementations(CPU)
    assert len(rows) == 2 * 3 * 3
    for row in rows:
        x = torch.empty(1, 2, 128, row["head_dim"], dtype=getattr(torch, row["dtype"]))
        assert row["impl"] == choose_impl("auto", x, x, x, row["block_q"], row["block_k"]).impl
        assert row["impl"] not in row["refused"]
        for impl, reason in row["refused"].items():
            with pytest.raises(ValueError, match="cannot run here") as raised:
                choose_impl(impl, x, x, x, row["block_q"], row["block_k"])
            assert str(raised.value) == reason
    assert set(rows[0]["refused"]) == {"triton", "gluon"}


@pytest.mark.gpu
def test_implementations_on_a_gpu():
    rows = implementations(torch.device("cuda"))
    half = [row for row in rows if row["dtype"] != "float32"]
    assert {row["impl"] for row in half} <= {"triton", "gluon"}
    assert {row["impl"] for row in rows if row["dtype"] == "float32"} == {"torch"}


def test_environment_has_every_package():
    found = environment(CPU)
    assert found["packages"]["torch"] == torch.__version__
    assert found["capability"] is None
    json.dumps(found)


def test_known_problems_are_said():
    from torch._inductor import config

    with config.patch({"triton.mix_order_reduction": False}):
        assert environment(CPU)["known_problems"] == []
    with config.patch({"triton.mix_order_reduction": True}):
        (problem,) = environment(CPU)["known_problems"]
    assert "issues/193061" in problem


def flops_of_layers(num_layers):
    """Matrix products of a Wan transformer's forward, counted by torch."""
    from tiny_wan import tiny_transformer
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_transformer(num_layers=num_layers, ffn_dim=48)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 4, 3, 10, 14), torch.zeros(1), torch.zeros(1, TEXT_TOKENS, 8))
    return counter.get_total_flops()


def test_estimate_counts_what_the_model_does():
    pytest.importorskip("diffusers")
    one_layer = flops_of_layers(2) - flops_of_layers(1)
    size = dataclasses.replace(MODEL_SIZES["wan-1.3b"], heads=2, head_dim=16, ffn_dim=48, layers=7)
    grid, config = VideoGrid(3, 5, 7), SLAConfig(keep_ratio=0.3, block_q=16, block_k=16)
    cost = attention_cost(config, grid=grid, heads=2, head_dim=16)
    found = estimate(config, size, grid)
    assert found["attention_share"] == pytest.approx(cost.dense.flops / one_layer)
    left = one_layer - cost.dense.flops + cost.flops
    assert found["transformer_reduction"] == pytest.approx(one_layer / left)
    assert found["attention_reduction"] == cost.reduction
    assert sum(found["parts"].values()) == pytest.approx(cost.flops / cost.dense.flops)
    assert "estimate" in found["what"]
    unknown = estimate(config, dataclasses.replace(size, ffn_dim=None), grid)
    assert (unknown["attention_share"], unknown["transformer_reduction"]) == (None, None)


def test_shorter_grids_halve():
    grids = shorter_grids(VideoGrid(21, 30, 52))
    tokens = [grid.num_tokens for grid in grids]
    assert grids[-1] == VideoGrid(21, 30, 52)
    assert tokens == sorted(tokens)
    assert all(1.7 < more / fewer < 2.4 for fewer, more in itertools.pairwise(tokens))
    assert shorter_grids(VideoGrid(1, 1, 1)) == [VideoGrid(1, 1, 1)]


@pytest.mark.parametrize(
    ("speedups", "tokens", "verdict"),
    [
        ([(1000, 0.5), (4000, 2.0)], 2000, "faster from about 2,000 tokens on"),
        ([(100, 2.0), (1000, 0.25), (2000, 1.0), (4000, 4.0)], 2000, "from about 2,000"),
        ([(1000, 1.5), (4000, 2.0)], None, "faster at every measured length, from 1,000 tokens on"),
        ([(1000, 1.5), (4000, 0.9)], None, "no faster at the longest measured length, 4,000 tokens"),
        ([], None, "nothing was measured"),
    ],
)
def test_break_even(speedups, tokens, verdict):
    found = break_even(speedups)
    assert found[0] == tokens
    assert verdict in found[1]


class FixedTimer:
    """Says that dense attention takes tokens^2 and sparse attention a fixed time and a bit a token."""

    def __init__(self):
        self.calls = []

    def burst(self, function, calls):
        tokens = function().shape[2]
        dense = "scaled_dot_product_attention" in function.__code__.co_names
        self.calls.append((tokens, dense))
        return [tokens**2 * 1e-4 if dense else 4.0 + tokens * 1e-3] * calls

    def sustained(self, function, calls):
        return 1.0

    def host(self, function, calls):
        return 1.0


@pytest.mark.parametrize(
    "config", [SLAConfig(keep_ratio=0.3, block_q=16, block_k=16), VSAConfig(keep_ratio=0.3, tile=(2, 2, 4))]
)
def test_measured_gain(config):
    grids = [VideoGrid(2, 4, 5), VideoGrid(4, 8, 10)]
    timer = FixedTimer()
    sizes = {"heads": 2, "head_dim": 16, "device": CPU, "dtype": torch.float32}
    found = measure_gain(config, grids, **sizes, timer=timer)
    assert [entry["tokens"] for entry in found["lengths"]] == [40, 320]
    for entry in found["lengths"]:
        assert entry["dense_ms"] == pytest.approx(entry["tokens"] ** 2 * 1e-4)
        assert entry["sparse_ms"] == pytest.approx(4.0 + entry["tokens"] * 1e-3)
        assert entry["speedup"] == pytest.approx(entry["dense_ms"] / entry["sparse_ms"])
    assert 40 < found["break_even_tokens"] < 320
    assert set(timer.calls) == {(tokens, dense) for tokens in (40, 320) for dense in (False, True)}
    real = measure_gain(config, grids[:1], **sizes, timer=CpuTimer())
    assert all(math.isfinite(entry["speedup"]) and entry["speedup"] > 0 for entry in real["lengths"])


def test_lengths_that_do_not_fit_are_skipped():
    class Full(FixedTimer):
        def burst(self, function, calls):
            if function().shape[2] > 100:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().burst(function, calls)

    config = SLAConfig(keep_ratio=0.3, block_q=16, block_k=16)
    grids = [VideoGrid(2, 4, 5), VideoGrid(4, 8, 10)]
    found = measure_gain(config, grids, heads=2, head_dim=16, device=CPU, dtype=torch.float32, timer=Full())
    assert found["skipped"] == [320]
    assert [entry["tokens"] for entry in found["lengths"]] == [40]


def text_of(report):
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in tables(report):
        console.print(part)
    return console.export_text()


def test_report_for_people():
    report = examine("wan-1.3b", measured=False)
    text = text_of(report)
    for words in ("This machine", "diffusers", "32,760 (21x30x52)", "30 layers, 12 heads of 128", "14.2x fewer FLOPs"):
        assert words in text
    assert "estimated from FLOPs" in text
    assert "nothing was timed" in text
    assert "it needs a GPU" in text or torch.cuda.is_available()
    config = SLAConfig(keep_ratio=0.3, block_q=16, block_k=16)
    sizes = {"heads": 2, "head_dim": 16, "device": CPU, "dtype": torch.float32, "timer": FixedTimer()}
    report["measured"] = measure_gain(config, [VideoGrid(2, 4, 5), VideoGrid(4, 8, 10)], **sizes)
    text = text_of(report)
    assert "Measured here" in text
    assert "faster from about" in text
    assert "nothing was timed" not in text


def test_the_command(capsys):
    pytest.importorskip("tyro")
    assert "doctor" in COMMANDS
    COMMANDS["doctor"](measure=False, json=True, method="vsa", keep_ratio=0.2, height=720, width=1280).run()
    report = json.loads(capsys.readouterr().out)
    assert report["config"] == {"method": "vsa", **VSAConfig(keep_ratio=0.2).to_dict()}
    assert report["model"]["video"]["tokens"] == 75600
    cost = attention_cost(VSAConfig(keep_ratio=0.2), grid=VideoGrid(21, 45, 80), heads=12, head_dim=128)
    assert report["estimate"]["attention_reduction"] == pytest.approx(cost.reduction)
    assert report["measured"] is None
    COMMANDS["doctor"](measure=False).run()
    assert "What impl=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--model", "gpt"], "unknown model 'gpt'"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--frames", "80"], "frames must be"),
        (["--keep-ratio", "2"], "keep_ratio must be in"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, match):
    pytest.importorskip("tyro")
    assert main(["doctor", "--no-measure", *arguments]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert len(error.splitlines()) == 1
