"""Checkpoints: written whole or not at all, found damaged where they are, and read back bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

from safetensors import SafetensorError

from foveal.lab.train import checkpoint as module
from foveal.lab.train.checkpoint import CheckpointError, CheckpointStore, read_checkpoint, restore
from foveal.lab.train.optimization import build_optimizer, parameter_groups, set_steps_taken, warmup_and_decay
from foveal.lab.train.state import optimizer_tensors, optimizer_values, restore_optimizer


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(3.0),
        "bytes": torch.arange(9, dtype=torch.uint8),
    }


def save(store: CheckpointStore, step: int, loss: float | None = None, seed: int = 0) -> None:
    store.save(step, {"model": tensors(seed).items()}, {"list": [1, "x"]}, held_out_loss=loss)


def steps(store: CheckpointStore) -> list[int]:
    return [int(path.name[-8:]) for path in sorted(store.folder.glob("step-*"))]


def test_everything_comes_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 64)
    store = CheckpointStore(tmp_path / "checkpoints")
    groups = {"model": tensors(1).items(), "rng": {"cpu/0": torch.get_rng_state()}.items()}
    store.save(12, groups, {"x": [1.5, None]}, held_out_loss=0.25)
    found = store.latest()
    assert (found.step, found.held_out_loss, found.state) == (12, 0.25, {"x": [1.5, None]})
    # In several files, each of tensors that fit.
    assert {"model-00001.safetensors", "model-00002.safetensors"} <= {path.name for path in found.folder.iterdir()}
    back = dict(found.tensors("model"))
    assert back.keys() == tensors().keys()
    for name, tensor in tensors(1).items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert torch.equal(dict(found.tensors("rng"))["cpu/0"], torch.get_rng_state())
    assert [path.name for path in store.folder.iterdir()] == ["step-00000012"]


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step, loss in ((1, 0.9), (2, 0.3), (3, None), (4, 0.5), (5, 0.4)):
        save(store, step, loss)
    assert steps(store) == [2, 4, 5]
    save(store, 6, 0.2)
    assert steps(store) == [5, 6]


def test_a_step_is_saved_again_in_place(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1, seed=0)
    save(store, 1, seed=1)
    assert torch.equal(dict(store.latest().tensors("model"))["a.weight"], tensors(1)["a.weight"])
    assert steps(store) == [1]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "bytes, "),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xff"), "its checksum differs"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: (file.parent / "checkpoint.json").write_text("{"), "cannot be read"),
        (lambda file: (file.parent / "checkpoint.json").unlink(), "cannot be read"),
        (lambda file: (file.parent / "checkpoint.json").write_text('{"format": 9}'), "not of checkpoint format 1"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage, complaint):
    lines = []
    store = CheckpointStore(tmp_path, report=lines.append)
    save(store, 1)
    save(store, 2)
    damage(tmp_path / "step-00000002" / "model-00001.safetensors")
    assert store.latest().step == 1
    assert len(lines) == 1
    assert "step-00000002 is damaged, falling back to the one before" in lines[0]
    assert complaint in lines[0]
    with pytest.raises(CheckpointError, match="step-00000002"):
        read_checkpoint(tmp_path / "step-00000002")


def test_no_checkpoint_is_none(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert store.latest() is None
    assert not store.exists()


def test_a_full_disk_is_named_and_leaves_the_former_one(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"is full: .* step 2 was not written; .* step 1 is intact"):
        save(store, 2)
    assert steps(store) == [1]
    assert store.latest().step == 1
    monkeypatch.undo()
    save(store, 2)
    assert store.latest().step == 2


def test_other_failures_to_write_are_named_too(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"step 1 was not written .*Input/output error.*there is no earlier one"):
        save(CheckpointStore(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_disk_that_is_really_full(tmp_path):
    script = f"""
import torch
from foveal.lab.train.checkpoint import CheckpointError, CheckpointStore
store = CheckpointStore({str(tmp_path)!r})
store.save(1, {{"model": [("w", torch.zeros(1000))]}}, {{}})
try:
    store.save(2, {{"model": [("w", torch.zeros(1_000_000))]}}, {{}})
except CheckpointError as error:
    print(error)
print(store.latest().step, [path.name for path in store.folder.iterdir()])
"""
    mounted = f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "{sys.executable}" -c "$SCRIPT"'
    run = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted],
        env={**os.environ, "SCRIPT": script},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare:" in run.stderr or "mount:" in run.stderr:
        pytest.skip("may not mount here")
    assert run.returncode == 0, run.stderr
    complaint, rest = run.stdout.strip().splitlines()
    assert "is full: the checkpoint of step 2 was not written; the checkpoint of step 1 is intact" in complaint
    assert rest == "1 ['step-00000001']"


def test_killed_while_saving_there_is_a_whole_checkpoint(tmp_path):
    """SIGKILL at moments of a loop that only saves: whatever has a checkpoint's name can be read."""
    script = f"""
import torch
from foveal.lab.train.checkpoint import CheckpointStore
store = CheckpointStore({str(tmp_path)!r}, keep=1)
print("ready", flush=True)
for step in range(1, 10_000):
    store.save(step, {{"model": [("w", torch.full((50_000,), float(step)))]}}, {{}})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    store = CheckpointStore(tmp_path, keep=1, report=lambda line: pytest.fail(line))
    seconds = 0.31
    while not store.exists():
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = store.latest()
    assert torch.equal(dict(found.tensors("model"))["w"], torch.full((50_000,), float(found.step)))
    save(store, found.step + 1)
    assert store.latest().step == found.step + 1
    # What was half written is gone.
    assert steps(store) == [found.step + 1]


def test_restoring_names_what_does_not_fit():
    parameters = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"here has c, which this run does not train"):
        restore(parameters, [("c", torch.ones(2))], "here")
    with pytest.raises(CheckpointError, match=r"a has shape \(3,\), expected \(2,\)"):
        restore(parameters, [("a", torch.ones(3))], "here")
    with pytest.raises(CheckpointError, match=r"lacks \['b'\]"):
        restore(parameters, [("a", torch.ones(2))], "here")


def _run(model: nn.Module, optimizer, schedule, batches) -> list[float]:
    losses = []
    for batch in batches:
        loss = (model(batch) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _build(seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    fast = list(model[1].parameters())
    groups = parameter_groups(model.parameters(), (fast, 0.1), learning_rate=1e-2)
    optimizer = build_optimizer(groups)
    return model, optimizer, warmup_and_decay(optimizer, steps=20, warmup=3)


def test_an_optimizer_goes_on_to_the_last_bit(tmp_path):
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    model, optimizer, schedule = _build(0)
    _run(model, optimizer, schedule, batches[:6])
    named = dict(model.named_parameters())
    CheckpointStore(tmp_path).save(
        6,
        {"model": named.items(), "optimizer": optimizer_tensors(optimizer, named)},
        {"optimizer": optimizer_values(optimizer, named), "steps_taken": schedule.last_epoch},
    )
    rates = schedule.get_last_lr()
    expected = _run(model, optimizer, schedule, batches[6:])

    model, optimizer, schedule = _build(1)
    named = dict(model.named_parameters())
    found = CheckpointStore(tmp_path).latest()
    restore(named, found.tensors("model"), "here")
    restore_optimizer(optimizer, named, found.tensors("optimizer"), found.state["optimizer"], "here")
    set_steps_taken(schedule, found.state["steps_taken"])
    assert schedule.get_last_lr() == rates
    assert _run(model, optimizer, schedule, batches[6:]) == expected
    # Nothing but tensors and JSON.
    assert {path.suffix for path in found.folder.iterdir()} == {".safetensors", ".json"}
    json.loads((found.folder / "checkpoint.json").read_text())
