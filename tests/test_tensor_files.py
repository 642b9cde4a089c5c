"""Files of tensors that cannot be read: cut short, of other kinds, shards that do not fit, and writes that stop."""

import json
import os
import random
import re

import pytest
import torch
from checkpoint_files import (
    LAYERS,
    SMALL_SLA,
    SMALL_VSA,
    TURBO,
    cut_short,
    fastvideo_folder,
    gates,
    refused,
    turbo,
    write,
)
from tiny_wan import randomize, tiny_transformer

from foveal.models import sparsify
from foveal.models.files.checkpoints import export_checkpoint
from foveal.models.files.tensor_files import open_tensors, write_tensors


class Unpicklable:
    """Not a tensor."""


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda f: write(f / "list.pth", [torch.ones(2)]), "must hold a dict of named tensors, got list"),
        (lambda f: write(f / "text.pth", {"a": torch.ones(2), "b": "text"}), "but b are of other types"),
        (lambda f: write(f / "code.pth", {"a": Unpicklable()}), "holds more than tensors"),
        (lambda f: cut_short(turbo(f), 5000), "corrupt or cut short"),
        (lambda f: cut_short(turbo(f), 0), "corrupt"),
        (lambda f: cut_short(turbo(f, name="turbo.safetensors"), 50_000), "corrupt or cut short"),
        (lambda f: cut_short(turbo(f, name="turbo.safetensors"), 4), "corrupt or cut short"),
        (lambda f: write(f / "model.npz.pth", torch.ones(2)), "must hold a dict of named tensors, got Tensor"),
        (lambda f: turbo(f).rename(f / "turbo.gguf"), "must end in one of"),
        (lambda f: f, "must hold one safetensors file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, make, match):
    refused(tiny_transformer(num_layers=LAYERS), make(tmp_path), ValueError, match, **SMALL_SLA)


def test_the_advice_of_torch_is_not_repeated(tmp_path):
    torch.save({"a": Unpicklable()}, tmp_path / "code.pth")
    (tmp_path / "junk.pth").write_bytes(b"not a pickle at all")
    for name, ending in (("code.pth", f": it asks for {__name__}.Unpicklable"), ("junk.pth", "")):
        message = f"{tmp_path / name} is corrupt, or holds more than tensors, which is not loaded{ending}"
        with pytest.raises(ValueError, match=re.escape(message) + "$"), open_tensors(tmp_path / name):
            pass


def rewrite_index(folder, change):
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def first(content):
    return next(iter(content["weight_map"]))


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (
            lambda f: (f / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink(),
            FileNotFoundError,
            "lacks the shards diffusion_pytorch_model-00002-of-00003",
        ),
        (
            lambda f: rewrite_index(f, lambda c: c["weight_map"].pop(first(c))),
            ValueError,
            r"disagree about blocks\.0\.attn1\.norm_k\.weight",
        ),
        (lambda f: rewrite_index(f, lambda c: c.pop("weight_map")), ValueError, "is no index of shards"),
        (
            lambda f: rewrite_index(f, lambda c: c["weight_map"].update({first(c): "../other.safetensors"})),
            ValueError,
            "outside its folder",
        ),
        (
            lambda f: cut_short(f / "diffusion_pytorch_model-00003-of-00003.safetensors", 100),
            ValueError,
            "00003-of-00003.safetensors is corrupt or cut short",
        ),
        (
            lambda f: (f / "other.safetensors.index.json").write_text("{}"),
            ValueError,
            "has several indices",
        ),
    ],
)
def test_bad_shards_are_refused(tmp_path, damage, error, match):
    folder = fastvideo_folder(tmp_path / "fast", tiny_transformer(num_layers=LAYERS).state_dict() | gates())
    damage(folder)
    refused(tiny_transformer(num_layers=LAYERS), folder, error, match, **SMALL_VSA)


def test_junk_is_refused_in_one_line(tmp_path, recwarn):
    """Bytes of pickles in any order, and what people have instead of a download."""
    path = tmp_path / "junk.pth"
    generator = random.Random(0)
    opcodes = b"\x80\x02}q.()lcbitJKMXUV]aesuR0N\x88\x89\x8a\n hello"
    junk = [bytes(generator.choices(opcodes, k=generator.randint(1, 60))) for _ in range(400)]
    junk += [b"\x80\x02" + data for data in junk]
    for data in (b"", b"hello world", b"<html>404</html>", b"PK\x03\x04junk", *junk):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"junk\.pth (is corrupt|must hold)") as error, open_tensors(path):
            pass
        assert "\n" not in str(error.value)
    assert not recwarn.list


def test_reading_is_lazy_and_exact(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.int8),
        "c": torch.ones(()).bfloat16(),
    }
    for name in ("all.safetensors", "all.pth"):
        write_tensors(tmp_path / name, tensors, "said", "here")
        with open_tensors(tmp_path / name) as file:
            assert file.shapes == {"a": (2, 3), "b": (4,), "c": ()}
            assert file.not_floating == {"b"}
            assert file.metadata.get("said") == (None if name.endswith(".pth") else "here")
            assert all(torch.equal(file.read(key), tensor) for key, tensor in tensors.items())
            assert file.read("c").dtype == torch.bfloat16
    legacy = tmp_path / "legacy.pt"
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    with open_tensors(legacy) as file:
        assert torch.equal(file.read("a"), tensors["a"])


def test_a_slice_is_written_without_the_rest(tmp_path):
    whole = torch.zeros(1000, 100)
    write_tensors(tmp_path / "slice.pth", {"a": whole[:1]}, "said", "here")
    assert (tmp_path / "slice.pth").stat().st_size < 5000


def test_an_interrupted_export_leaves_the_former_file(tmp_path, monkeypatch):
    source = sparsify(tiny_transformer(), TURBO)
    path = tmp_path / "turbo.safetensors"
    export_checkpoint(source, path, format="turbodiffusion-sla")
    former = path.read_bytes()
    randomize(source)

    def stop(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        with pytest.raises(OSError, match="no space"):
            export_checkpoint(source, path, format="turbodiffusion-sla")
    assert path.read_bytes() == former
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_checkpoint(source, tmp_path / "model.gguf", format="turbodiffusion-sla")
