"""`examples/distill_minimax_h3.py` on a tiny MiniMax-H3: the sparse model comes closer to its dense self."""

import importlib.util
from pathlib import Path

import pytest
import torch

import foveal

diffusers = pytest.importorskip("diffusers", minversion="0.42.1")
if not hasattr(diffusers, "MiniMaxH3Transformer3DModel"):
    pytest.skip("diffusers has no MiniMax-H3", allow_module_level=True)

from test_minimax_h3 import TestMiniMaxH3 as Tiny  # noqa: E402
from tiny_wan import SPARSE_SLA, SPARSE_VSA  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "examples" / "distill_minimax_h3.py"
# What the pipeline takes for granted without its VAEs.
CHANNELS = {"in_channels": 24, "audio_in_channels": 32}
CALL = {"num_frames": 124, "height": 64, "width": 96, "num_inference_steps": 4}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("distill_minimax_h3", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts():
    generator = torch.Generator().manual_seed(2)
    return [
        {"prompt_embeds": torch.randn(1, words, 16, generator=generator), "text_token_tags": torch.ones(words).long()}
        for words in (5, 9)
    ]


@pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
def test_it_learns(script, tmp_path, config):
    transformer = Tiny().model(**CHANNELS)
    before = {name: x.clone() for name, x in transformer.state_dict().items()}
    student = script.Student(transformer, config, learning_rate=3e-3)
    pipe = script.teaching_blocks(student).init_pipeline()
    pipe.update_components(
        transformer=transformer,
        scheduler=diffusers.MiniMaxH3Scheduler(),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    script.train(pipe, student, texts(), 10, **CALL)
    # A generation's steps differ from each other: the same ones of the first and of the last two are compared.
    forwards = len(student.losses) // 10
    first, last = (torch.tensor(x) for x in (student.losses[: 2 * forwards], student.losses[-2 * forwards :]))
    assert last.mean() < 0.9 * first.mean()
    for name, x in transformer.state_dict().items():
        if name in before:
            assert torch.equal(x, before[name]), name
    foveal.save(transformer, tmp_path / "saved")
    learned = foveal.sparse_parameters(foveal.load(Tiny().model(**CHANNELS), tmp_path / "saved"))
    assert learned
    for name, x in foveal.sparse_parameters(transformer).items():
        assert torch.equal(learned[name], x), name
