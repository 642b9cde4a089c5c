"""`foveal.lab.inspect`: figures against brute force, the model left as it was, the report."""

import dataclasses
import html
import json
import re

import pytest
import torch
from tiny_wan import SPARSE_SLA, inputs, run, tiny_pipeline, tiny_transformer

import foveal
from foveal import SLA2Config, SLAConfig, VideoGrid, sla_attention, sparsify
from foveal.lab import cli
from foveal.lab.inspect.advice import Advice, advise
from foveal.lab.inspect.probe import InspectSettings, LayerObservation, look_at, observe
from foveal.lab.inspect.run import inspect_model
from foveal.lab.inspect.statistics import int8_squares, reorder, selection_quality, weight_distribution
from foveal.lab.terminal import Progress
from foveal.models.processor import sparse_processors
from foveal.output_folder import LIST_FILE
from foveal.rules import count
from foveal.testing import relative_error

TINY = InspectSettings(keep_ratios=(0.1, 0.3, 0.6), blocks=((16, 16), (32, 16)), query_blocks=None, rows=None)


def qkv(length, keys=None, heads=2, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = length if keys is None else keys
    # Neighbours are alike, as in a video, so that pooling finds something.
    drift = [torch.randn(1, heads, n, head_dim, generator=generator).cumsum(2) * 0.3 for n in (length, keys)]
    return (*drift, torch.randn(1, heads, keys, head_dim, generator=generator))


def brute_force(query, key, value, block_q, block_k, ratio, ranking):
    """Recall and output error over every row, from the whole matrix in float64."""
    query, key, value = (x[0].double() for x in (query, key, value))
    heads, length, dim = query.shape
    keys, free = key.shape[1], key.shape[1] if key.shape[1] == length else (length // block_k) * block_k
    weights = (query @ key.transpose(1, 2) / dim**0.5).softmax(-1)
    recalls, errors = [], []
    for head in range(heads):
        keep = torch.zeros(length, keys, dtype=torch.bool)
        for start in range(0, length, block_q):
            rows = slice(start, min(start + block_q, length))
            scores = []
            for first in range(0, free, block_k):
                columns = slice(first, min(first + block_k, keys))
                if ranking == "oracle":
                    scores.append(weights[head, rows, columns].sum())
                else:
                    scores.append(query[head, rows].mean(0) @ key[head, columns].mean(0))
            wanted = max(1, count(ratio, len(scores)))
            for index in torch.stack(scores).topk(wanted).indices.tolist():
                keep[rows, index * block_k : min((index + 1) * block_k, keys)] = True
            keep[rows, free:] = True
        kept = weights[head] * keep
        recalls.append(kept.sum() / length)
        exact = weights[head] @ value[head]
        errors.append(((kept / kept.sum(-1, keepdim=True)) @ value[head] - exact).norm() / exact.norm())
    return torch.stack(recalls), torch.stack(errors)


@pytest.mark.parametrize(
    ("length", "keys", "block_q", "block_k"), [(200, 200, 16, 16), (203, 203, 32, 16), (90, 110, 16, 16)]
)
def test_agrees_with_brute_force(length, keys, block_q, block_k):
    tensors = qkv(length, keys)
    ratios = (0.1, 0.35, 1.0)
    found = selection_quality(*tensors, block_q=block_q, block_k=block_k, keep_ratios=ratios)
    for index, ratio in enumerate(ratios):
        for ranking in ("oracle", "pooled"):
            recall, error = brute_force(*tensors, block_q, block_k, ratio, ranking)
            torch.testing.assert_close(found.recall[ranking][:, index].double(), recall, atol=1e-5, rtol=0)
            torch.testing.assert_close(found.error[ranking][:, index].double(), error, atol=1e-4, rtol=0)
    assert (found.recall["oracle"] >= found.recall["pooled"] - 1e-6).all()


def test_agrees_with_brute_force_at_4096_tokens():
    """What the page says at a length where a whole matrix still fits: to 1e-3, from all rows; a sample comes near."""
    tensors = qkv(4096, heads=1, head_dim=64)
    settings = {"block_q": 64, "block_k": 64, "keep_ratios": (0.1,)}
    recall, _ = brute_force(*tensors, 64, 64, 0.1, "pooled")
    found = selection_quality(*tensors, **settings, memory_bytes=2**27)
    assert abs(float(found.recall["pooled"][0, 0]) - float(recall)) < 1e-3
    sampled = selection_quality(*tensors, **settings, query_blocks=16)
    assert abs(float(sampled.recall["pooled"][0, 0]) - float(recall)) < 0.05


def test_chunks_change_nothing():
    tensors = qkv(200)
    settings = {"block_q": 16, "block_k": 16, "keep_ratios": (0.1, 0.5)}
    whole, pieces = (selection_quality(*tensors, **settings, memory_bytes=size) for size in (2**30, 2**12))
    for name in ("oracle", "pooled"):
        torch.testing.assert_close(whole.recall[name], pieces.recall[name])
        torch.testing.assert_close(whole.error[name], pieces.error[name])


@pytest.mark.parametrize(("length", "keys"), [(200, 200), (90, 110)])
def test_int8_error_is_that_of_the_method(length, keys):
    query, key, value = qkv(length, keys)
    every = SLAConfig(keep_ratio=1.0, drop_ratio=0.0, block_q=16, block_k=16, linear_scope="none")
    exact, rounded = (
        sla_attention(query, key, value, config=every.replace(precision=precision)) for precision in ("input", "int8")
    )
    missed, squares = int8_squares(query, key, value, block=16, query_blocks=None)
    expected = [relative_error(rounded[:, head], exact[:, head]) for head in range(2)]
    assert (missed / squares).sqrt().tolist() == pytest.approx(expected, rel=1e-3)
    pieces = int8_squares(query, key, value, block=16, query_blocks=None, memory_bytes=1)
    torch.testing.assert_close(pieces, torch.stack((missed, squares)))
    rows = torch.cat([torch.arange(start, min(start + 16, length)) for start in (0, (length - 1) // 16 * 16)])
    _, some = int8_squares(query, key, value, block=16, query_blocks=2)
    torch.testing.assert_close(some, exact[0, :, rows].double().square().sum((1, 2)), rtol=1e-4, atol=0)


def test_overlap_of_known_choices():
    """Keys that only their own place likes: with one block kept, neighbors share none; with all kept, all."""
    eye = torch.eye(8).repeat_interleave(16, 0)[None, None] * 20
    found = selection_quality(eye, eye, eye, block_q=16, block_k=16, keep_ratios=(0.125, 1.0))
    assert found.overlap.tolist() == [[0.0, 1.0]]
    assert found.recall["pooled"][0, 0] > 0.99


def test_distribution_of_known_weights():
    length = 64
    flat = torch.zeros(1, 1, length, 16)
    found = weight_distribution(flat, flat, rows=None, top=0.25)
    assert float(found.share_above) == pytest.approx(0.0)
    # Equal weights: rank 1, and zeros in a quarter of the columns leave rank 1.
    assert float(found.stable_rank) == pytest.approx(1.0, rel=1e-4)
    assert float(found.stable_rank_rest) == pytest.approx(1.0, rel=1e-4)
    eye = torch.eye(length)[None, None] * 30
    found = weight_distribution(eye, eye, rows=None, top=1 / length)
    assert float(found.mass_above) == pytest.approx(1.0, abs=1e-4)
    assert float(found.share_above) == pytest.approx(1 / length)
    assert float(found.share_below) == pytest.approx(1 - 1 / length)
    assert float(found.stable_rank) == pytest.approx(length, rel=1e-3)


def test_stable_rank_is_that_of_the_singular_values():
    query, key, _ = qkv(120)
    found = weight_distribution(query, key, rows=None)
    weights = (query[0].double() @ key[0].double().transpose(1, 2) / 4).softmax(-1)
    exact = weights.square().sum((1, 2)) / torch.linalg.matrix_norm(weights, 2).square()
    torch.testing.assert_close(found.stable_rank.double(), exact, rtol=1e-3, atol=0)


def test_text_keys_stay_where_they_are():
    grid = VideoGrid(2, 4, 4)
    x = torch.arange(40.0).view(1, 1, 40, 1)
    ordered = reorder(x, grid, (2, 2, 2)).flatten()
    assert ordered[32:].tolist() == list(range(32, 40))
    assert ordered[:8].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]


def test_a_model_is_seen_and_left_as_it_was():
    model = tiny_transformer()
    before = run(model)
    keys = list(model.state_dict())
    seen = []
    found = observe(
        model, lambda: [run(model) for _ in range(3)], calls=(0, 2), settings=TINY, on_observation=seen.append
    )
    assert [(o.call, o.layer) for o in found] == [
        (0, "blocks.0.attn1"),
        (0, "blocks.1.attn1"),
        (2, "blocks.0.attn1"),
        (2, "blocks.1.attn1"),
    ]
    assert seen == found
    # Of the batch the last sample.
    assert found[0].timestep == 403.0
    assert found[0].grid == VideoGrid(3, 5, 7)
    assert set(found[0].quality) == {(o, q, 16) for o in ("raster", "tile") for q in (16, 32)}
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model), before)


def test_steps_are_told_apart_by_their_timesteps():
    """Two calls a step, as guidance makes them; the first counts."""
    model, fed = tiny_transformer(), inputs(batch=1)

    def generate():
        for timestep in (900.0, 500.0, 100.0):
            for _ in range(2):
                run(model, **fed | {"timestep": torch.tensor([timestep])})

    few = dataclasses.replace(TINY, orders=("raster",), blocks=((16, 16),))
    found = observe(model, generate, steps=(0, 2), layers=["blocks.0.attn1"], settings=few)
    assert [(o.step, o.call, o.timestep) for o in found] == [(0, 0, 900.0), (2, 4, 100.0)]
    with pytest.raises(ValueError, match=r"steps \[3\] were never made"):
        observe(model, generate, steps=(3,), settings=few)


def test_a_converted_model_is_seen_as_it_runs():
    model = sparsify(tiny_transformer(), SPARSE_SLA)
    before = run(model)
    found = observe(model, lambda: run(model), layers=["blocks.1.attn1"], settings=TINY)
    assert [o.layer for o in found] == ["blocks.1.attn1"]
    assert torch.equal(run(model), before)


def test_mistakes():
    model = tiny_transformer()
    with pytest.raises(ValueError, match=r"unknown layers \['blocks.9.attn1'\]"):
        observe(model, lambda: run(model), layers=["blocks.9.attn1"])
    assert not [name for name, _ in model.named_modules() if "processor" in name]
    with pytest.raises(ValueError, match=r"calls \[7\] were never made"):
        observe(model, lambda: run(model), calls=(0, 7), settings=TINY)
    with pytest.raises(ValueError, match="give calls or steps, not both"):
        observe(model, lambda: run(model), calls=(0,), steps=(0,))
    with pytest.raises(TypeError, match="model must be one of"):
        observe(torch.nn.Linear(2, 2), lambda: None)
    with pytest.raises(ValueError, match="keep_ratios must ascend"):
        InspectSettings(keep_ratios=(0.2, 0.1))
    with pytest.raises(ValueError, match="unknown order "):
        InspectSettings(orders=("spiral",))
    with pytest.raises(TypeError, match="query_blocks must be an int"):
        InspectSettings(query_blocks=1.5)
    with pytest.raises(ValueError, match="nothing was observed"):
        advise([], TINY, heads=2, head_dim=16)
    with pytest.raises(ValueError, match="one sample"):
        selection_quality(*(x.expand(2, -1, -1, -1) for x in qkv(32)), block_q=16, block_k=16, keep_ratios=(0.5,))


def test_advice_takes_the_fewest_blocks_within_the_tolerance():
    """Attention that stays inside its own block needs one block of many; attention to everything needs them all."""
    grid = VideoGrid(4, 8, 8)
    settings = InspectSettings(keep_ratios=(0.0625, 0.5, 1.0), blocks=((16, 16),), orders=("raster",))
    eye = torch.eye(16).repeat_interleave(16, 0)[None, None] * 20
    value = qkv(256)[2][:, :1]
    local = LayerObservation("transformer", "local", 0, 0, 1.0, grid, *look_at(eye, eye, value, grid, settings))
    flat = torch.zeros_like(eye)
    spread = LayerObservation("transformer", "spread", 0, 0, 1.0, grid, *look_at(flat, flat, value, grid, settings))
    advice = advise([local, local, spread], settings, heads=1, head_dim=16)
    assert advice.config.keep_ratio == 0.0625
    assert advice.reached
    assert advice.dense_layers == (("transformer", "spread"),)
    assert advice.error < 0.01
    few = InspectSettings(keep_ratios=(0.0625,), blocks=((16, 16),), orders=("raster",))
    spread = LayerObservation("transformer", "spread", 0, 0, 1.0, grid, *look_at(flat, flat, value, grid, few))
    advice = advise([spread], few, heads=1, head_dim=16)
    assert not advice.reached
    # No layer is left to convert: the figures are those of the layers that would have been.
    assert advice.dense_layers == (("transformer", "spread"),)
    assert advice.recall == pytest.approx(1 / 16, rel=1e-3)
    assert advice.error > 0.2


def advice_with(dense, *, components=("transformer",), reached=True):
    own = {"linear_scope": "none", "router": "per_head", "token_order": "tile"}
    config = SLA2Config(keep_ratio=0.3, block_q=16, block_k=16, **own)
    layers = tuple((component, f"blocks.{index}.attn1") for component in components for index in (0, 1))
    return Advice(
        config=config,
        layers=layers,
        dense_layers=tuple(dense),
        tolerance=0.1,
        error=0.123,
        recall=0.8,
        flops_ratio=0.4,
        reached=reached,
    )


@pytest.mark.parametrize(
    ("components", "dense"),
    [
        (("transformer",), []),
        (("transformer",), [("transformer", "blocks.1.attn1")]),
        (("transformer", "transformer_2"), [("transformer_2", "blocks.0.attn1")]),
        (
            ("transformer", "transformer_2"),
            [("transformer", "blocks.0.attn1"), ("transformer_2", "blocks.0.attn1")],
        ),
    ],
)
def test_the_line_to_paste_does_what_the_words_say(components, dense):
    advice = advice_with(dense, components=components)
    pipe = tiny_pipeline()
    if len(components) == 1:
        pipe = type("OneTransformer", (), {"transformer": pipe.transformer})()
    exec(advice.code(), {"foveal": foveal, "pipe": pipe})
    converted = {
        (component, layer): processor.config
        for component in components
        for layer, processor in sparse_processors(getattr(pipe, component)).items()
    }
    assert converted == dict.fromkeys((layer for layer in advice.layers if layer not in dense), advice.config)
    for _, layer in dense:
        assert layer in advice.verdict()
    total = len(advice.layers)
    assert (f"{len(dense)} of {total} layers stay dense" if dense else f"In all {total} layers") in advice.verdict()
    assert "within the tolerance" not in advice.verdict()


def test_no_line_to_paste_where_no_layer_is_to_be_converted():
    both = [("transformer", "blocks.0.attn1"), ("transformer", "blocks.1.attn1")]
    advice = advice_with(both, reached=False)
    assert advice.code() == "# Leave attention dense, or allow a larger tolerance."
    assert advice.verdict().startswith(
        "No ratio that was tried keeps the median layer's error within the tolerance of 0.1. "
        "All 2 layers change by more than twice the tolerance, so none is converted: output error 12.3 %"
    )


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    model = tiny_transformer()
    page, advice, observations = inspect_model(
        model, lambda: run(model, **inputs()), tmp_path / "out", settings=TINY, facts={"model": "<tiny> & random"}
    )
    names = {"index.html", "inspect.json", "quality.png", "layers.png", "distribution.png", LIST_FILE}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "&lt;tiny&gt; &amp; random" in text
    assert 'src="http' not in text
    document = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert document["advice"]["config"] == advice.config.to_dict()
    first = document["observations"][0]
    assert len(first["distribution"]["stable_rank"]) == 2
    assert all(0 < error < 0.05 for error in first["int8_error"])
    layers = {observation.layer for observation in observations}
    assert len(re.findall(r"<tr><td>blocks[^<]*</td><td>0\.\d{4}</td><td>0\.\d{4}</td></tr>", text)) == len(layers)
    quality = observations[0].quality["raster", 16, 16]
    assert first["quality"][0]["recall"]["pooled"][0] == pytest.approx(quality.recall["pooled"][0].tolist(), rel=1e-5)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    from tiny_media import save_tiny_wan

    return save_tiny_wan(tmp_path_factory.mktemp("model") / "wan")


SIZE = ("--frames", "9", "--height", "48", "--width", "64", "--steps", "3")


def test_command(pipeline_folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    # No terminal: it says where it is, here all the time.
    monkeypatch.setitem(Progress.__init__.__kwdefaults__, "every", 0.01)
    output = tmp_path / "seen"
    arguments = ["inspect", "--model", str(pipeline_folder), "--prompt", "a bar", "--output", str(output), *SIZE]
    assert cli.main([*arguments, "--look-at", "0", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(output / "index.html")
    assert re.search(r"^inspect: [123] of 3 steps, 0:\d\d so far", said.err, re.MULTILINE)
    document = json.loads((output / "inspect.json").read_text())
    # The terminal and the page say the same.
    assert f"to try first:\n{document['advice']['code']}\n" in said.err
    assert html.escape(document["advice"]["code"]) in (output / "index.html").read_text()
    missed = "keeps the median layer's error within the tolerance of 0.1" in said.err
    assert missed == (not document["advice"]["within_tolerance"])
    assert document["facts"]["prompt"] == "a bar"
    assert sorted({observation["step"] for observation in document["observations"]}) == [0, 2]
    assert {observation["component"] for observation in document["observations"]} == {"transformer"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", *SIZE], "no such pipeline folder: nowhere"),
        (["--model", "MODEL", "--frames", "9"], "give frames, height and width together"),
        (["--model", "MODEL", *SIZE[:2], "--height", "50", "--width", "64"], "height must be"),
        (["--model", "MODEL", *SIZE, "--look-at", "3"], "steps must be in [0, 3), got [3]"),
        (["--model", "MODEL", *SIZE, "--layers", "blocks.7.attn1"], "unknown layers ['blocks.7.attn1']"),
        (["--model", "MODEL", *SIZE, "--sparse", "nothing"], "nothing"),
        (["--model", "MODEL", *SIZE, "--tolerance", "0"], "tolerance must be above 0, got 0.0"),
        (["--model", "MODEL", *SIZE, "--tolerance", "nan"], "tolerance must be above 0, got nan"),
    ],
)
def test_mistakes_at_the_command_line(arguments, message, pipeline_folder, tmp_path, capsys):
    pytest.importorskip("tyro")
    named = [str(pipeline_folder) if part == "MODEL" else part for part in arguments]
    output = tmp_path / "seen"
    assert cli.main(["inspect", *named, "--prompt", "a bar", "--output", str(output), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_folders_that_cannot_be_made_cost_no_generation(tmp_path, name):
    (tmp_path / "file").write_text("x")
    model = tiny_transformer()
    with pytest.raises(ValueError, match=r"file is a file; expected a folder"):
        inspect_model(model, lambda: pytest.fail("the model ran"), tmp_path / name)
    assert (tmp_path / "file").read_text() == "x"
