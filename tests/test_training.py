"""The objective, the clip windows and the loop that the demo trains with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveal.lab.data.windows import (
    ClipWindows,
    read_video,
    sample_clip,
    to_frames,
    to_model_range,
    upscale,
    write_video,
)
from foveal.lab.train.loop import Action, run_steps, train
from foveal.lab.train.objective import add_noise, flow_matching_loss, sample_noise, sample_sigmas, with_first_frame


def test_sigmas_follow_the_shift():
    generator = torch.Generator().manual_seed(0)
    plain = sample_sigmas(20000, shift=1.0, generator=generator)
    generator = torch.Generator().manual_seed(0)
    shifted = sample_sigmas(20000, shift=3.0, generator=generator)
    assert plain.min() >= 0
    assert plain.max() < 1
    assert abs(plain.mean().item() - 0.5) < 0.01
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_noise_and_target_are_consistent():
    torch.manual_seed(0)
    clean, noise = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2, 4, 5, 6)
    sigmas = torch.tensor([0.0, 0.3, 1.0])
    noisy, target = add_noise(clean, noise, sigmas)
    torch.testing.assert_close(noisy[0], clean[0])
    torch.testing.assert_close(noisy[2], noise[2])
    # One Euler step with the true velocity from any level goes back to the clean video.
    torch.testing.assert_close(noisy - sigmas.view(-1, 1, 1, 1, 1) * target, clean)
    assert flow_matching_loss(target, target).eq(0).all()
    torch.testing.assert_close(flow_matching_loss(target + 2, target), torch.full((3,), 4.0))


def test_a_given_first_frame_has_no_noise_and_no_loss():
    clean, noise = torch.randn(2, 2, 3, 4, 5, 6)
    levels = with_first_frame(torch.tensor([0.3, 0.8]), torch.tensor([True, False]), frames=4)
    torch.testing.assert_close(levels, torch.tensor([[0.0, 0.3, 0.3, 0.3], [0.8] * 4]))
    noisy, target = add_noise(clean, noise, levels)
    torch.testing.assert_close(noisy[0, :, 0], clean[0, :, 0])
    whole, _ = add_noise(clean, noise, torch.tensor([0.3, 0.8]))
    torch.testing.assert_close(noisy[0, :, 1:], whole[0, :, 1:])
    torch.testing.assert_close(noisy[1], whole[1])
    wrong = target.clone()
    wrong[:, :, 0] += 100
    wrong[:, :, 1] += 3
    losses = flow_matching_loss(wrong, target, levels)
    torch.testing.assert_close(losses, torch.tensor([9 / 3, (100**2 + 9) / 4]))


def test_giving_first_frames_changes_no_noise():
    settings = {"first": 5, "seed": 3, "shift": 2.0}
    noise, sigmas = sample_noise((300, 1, 3, 1, 1), **settings)
    same, levels = sample_noise((300, 1, 3, 1, 1), **settings, first_frame=0.25)
    assert torch.equal(noise, same)
    assert torch.equal(levels[:, 1:], sigmas[:, None].expand(-1, 2))
    given = levels[:, 0].eq(0)
    assert torch.equal(levels[~given, 0], sigmas[~given])
    assert 0.18 < given.float().mean() < 0.32


def test_windows_never_share_a_frame_with_the_held_out_ones():
    clip = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 2, 2)
    windows = ClipWindows(clip, frames=5, stride=3)
    frames = [{start + 3 * i for i in range(5)} for start in windows.train_starts]
    held_out = [{start + 3 * i for i in range(5)} for start in windows.held_out_starts]
    assert max(map(max, frames)) < min(map(min, held_out))
    assert max(map(max, held_out)) == 59
    window = windows.window(4)
    assert window.shape == (3, 5, 2, 2)
    assert to_frames(window)[:, 0, 0, 0].tolist() == [4, 7, 10, 13, 16]
    first = windows.train_batch(3, torch.Generator().manual_seed(1))
    second = windows.train_batch(3, torch.Generator().manual_seed(1))
    assert torch.equal(first, second)
    assert windows.held_out_batch(4).shape == (4, 3, 5, 2, 2)


def test_short_clips_are_refused():
    with pytest.raises(ValueError, match="the clip has 20 frames, but 26 are needed"):
        ClipWindows(torch.zeros(20, 3, 2, 2, dtype=torch.uint8), frames=5, stride=3)


def test_video_round_trip(tmp_path):
    pytest.importorskip("av")
    shades = torch.linspace(20, 230, 12).to(torch.uint8)[:, None, None, None].expand(12, 3, 32, 48)
    write_video(tmp_path / "v.mp4", shades.contiguous(), fps=6)
    decoded = read_video(tmp_path / "v.mp4", height=32, width=48)
    assert decoded.shape == (12, 3, 32, 48)
    assert (decoded.int() - shades.int()).abs().max() <= 4
    assert read_video(tmp_path / "v.mp4", height=16, width=16, max_frames=3).shape == (3, 3, 16, 16)
    assert torch.equal(to_frames(to_model_range(decoded)), decoded)
    assert upscale(decoded, 2).shape == (12, 3, 64, 96)


def test_sample_clips_decode():
    pytest.importorskip("av")
    for name in ("bigbuckbunny", "bikes"):
        frames = read_video(sample_clip(name), height=24, width=40, max_frames=2)
        assert frames.shape == (2, 3, 24, 40)
        assert frames.float().std() > 10
    with pytest.raises(ValueError, match="unknown clip 'bunny'; expected one of"):
        sample_clip("bunny")


def test_bad_videos_are_named(tmp_path):
    av = pytest.importorskip("av")
    with pytest.raises(FileNotFoundError, match=r"no such video file: .*missing\.mp4"):
        read_video(tmp_path / "missing.mp4", height=16, width=16)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"cannot decode .*text\.mp4"):
        read_video(tmp_path / "text.mp4", height=16, width=16)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        frame.planes[0].update(bytes(1600))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"sound\.wav has no video stream"):
        read_video(tmp_path / "sound.wav", height=16, width=16)


def _regression(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    true = torch.tensor([[1.0, -2.0]])
    while True:
        x = torch.randn(16, 2, generator=generator)
        yield x, x @ true.T


def _loss(model: nn.Module, batch) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_actions_run_between_steps():
    """Before the first, every few, after the last; those that are due together in their order."""
    seen = []

    def noting(name):
        return lambda: seen.append(name)

    actions = (
        Action(noting("evaluate"), every=2, at_start=True, at_end=True),
        Action(noting("sample"), every=4),
        Action(noting("never")),
    )
    run_steps(noting("step"), steps=5, actions=actions)
    assert seen == ["evaluate", *["step"] * 2, "evaluate", *["step"] * 2, "evaluate", "sample", "step", "evaluate"]

    # A run that goes on counts from where it was, and starts with a step.
    seen.clear()
    run_steps(noting("step"), steps=5, begin=3, actions=actions)
    assert seen == ["step", "evaluate", "sample", "step", "evaluate"]

    # Stopped, it neither steps nor ends.
    seen.clear()
    run_steps(noting("step"), steps=5, actions=actions, stopped=lambda: seen.count("step") == 1)
    assert seen == ["evaluate", "step"]
    seen.clear()
    run_steps(noting("step"), steps=5, begin=5, actions=actions)
    assert seen == []


def test_loop_trains_records_and_repeats():
    def run():
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        held_out = next(_regression(9))
        steps = []
        record = train(
            model,
            _regression(),
            _loss,
            steps=120,
            learning_rate=0.1,
            warmup=10,
            evaluate=lambda m: _loss(m, held_out).item(),
            evaluate_every=50,
            on_step=lambda step, loss: steps.append(step),
        )
        assert steps == list(range(1, 121))
        return record

    record = run()
    assert [step for step, _ in record.held_out] == [0, 50, 100, 120]
    assert record.held_out[-1][1] < 1e-2 * record.held_out[0][1]
    assert len(record.losses) == len(record.step_seconds) == 120
    assert record.median_step_seconds > 0
    again = run()
    assert again.losses == record.losses
    assert again.held_out == record.held_out


def test_loop_stops_at_a_loss_that_is_not_finite():
    model = nn.Linear(2, 1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="training loss is nan at step 1"):
        train(model, _regression(), lambda m, b: _loss(m, b) * float("nan"), steps=3, learning_rate=0.1, warmup=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_new_parameters_may_have_a_rate_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    before = [p.detach().clone() for p in model.parameters()]
    train(
        model,
        _regression(),
        _loss,
        steps=1,
        learning_rate=1e-3,
        warmup=0,
        fast_parameters=list(model[1].parameters()),
        fast_learning_rate=1e-1,
    )
    moved = [(a - b).abs().max().item() for a, b in zip(before, model.parameters(), strict=True)]
    # AdamW's first step moves a parameter by its rate.
    assert moved[0] == pytest.approx(1e-3, rel=0.1)
    assert moved[2] == pytest.approx(1e-1, rel=0.1)
