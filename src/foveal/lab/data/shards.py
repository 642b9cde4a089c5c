"""Precomputed samples on the disk: safetensors shards, and an index that says what should be in them.

A folder holds `index.json`, `shard-00000.safetensors`, and so on. A shard is written before the index that names it.
Within a shard, `latents/I` is the latent of its sample I, `audio_latents/I` that of its sound if it has any, and
`text/J/NAME` is one tensor of its caption J. The header lists the samples:

    {"samples": [{"id": "cat.mp4#0", "source": "cat.mp4", "caption": "a cat", "text": 0, "sound": true}, ...]}

Rows of zeros at the end of a text tensor, such as Wan's padding, are not stored; the index has the whole shapes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.models.files.tensor_files import save_tensors

FORMAT = 1
INDEX_FILE = "index.json"
EMPTY_CAPTION_FILE = "empty-caption.safetensors"
HEADER_KEY = "foveal"
EMPTY_CAPTION = "empty/"
# A sample's tensors that are no text: its video, and its sound.
LATENTS = ("latents", "audio_latents")


@dataclass
class Shard:
    """One file of samples: its name, how many bytes and samples it has, and the SHA-256 of its bytes."""

    file: str
    bytes: int
    sha256: str
    samples: int


@dataclass
class Index:
    """What a folder of precomputed samples holds.

    Args:
        settings: what the samples were made with.
        text_shapes: the shape of each text tensor of a sample, by name.
        shards: the files.
        latent_shapes: how many samples have latents of each shape, by "CxFxHxW".
        empty_caption: the shard of the empty caption's text tensors; None without text.
        skipped: the files that were left out, and why.
        complete: whether everything that was asked for is in.
    """

    settings: dict[str, Any]
    text_shapes: dict[str, list[int]] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    latent_shapes: dict[str, int] = field(default_factory=dict)
    empty_caption: Shard | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)
    complete: bool = False

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A hash of the settings and of every shard's bytes."""
        shards = [*self.shards, *([self.empty_caption] if self.empty_caption else [])]
        content = [self.settings, [shard.sha256 for shard in shards]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, file: Path) -> None:
        """Write the index to a file."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")


def shard_name(number: int) -> str:
    """The file name of a shard, counted from 0."""
    return f"shard-{number:05d}.safetensors"


def read_index(folder: Path) -> Index:
    """Read the index of a folder, without a look at the shards.

    Raises:
        FileNotFoundError: no such folder, or no index in it.
        ValueError: the index is malformed or has another format version.
    """
    file = folder / INDEX_FILE
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX_FILE}; expected a folder that foveal precompute wrote")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"{file} has format version {content['format']!r}; this version reads {FORMAT}")
        del content["format"]
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        content["empty_caption"] = Shard(**content["empty_caption"]) if content["empty_caption"] else None
        return Index(**content)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is malformed: {error!r}") from None


def check_shards(folder: Path, index: Index, *, verify: bool) -> None:
    """Check that every shard is there and has the size that the index says, and with `verify` the same bytes.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    for shard in [*index.shards, *([index.empty_caption] if index.empty_caption else [])]:
        file = folder / shard.file
        if not file.is_file():
            raise ValueError(f"{folder / INDEX_FILE} lists {shard.file}, which is missing")
        size = file.stat().st_size
        if size != shard.bytes:
            raise ValueError(f"{file} has {size:,} bytes, but the index says {shard.bytes:,}: it is damaged")
        if verify and _sha256(file) != shard.sha256:
            raise ValueError(f"{file} does not have the SHA-256 that the index says: it is damaged")


def write_shard(file: Path, samples: list[dict[str, Any]], text_shapes: dict[str, list[int]]) -> Shard:
    """Write samples as one file. Text that several samples share is stored once.

    Args:
        file: the file to write.
        samples: for each sample, "latents", "audio_latents" if it has sound, one tensor for each name in `text_shapes`,
            "id", "source", and "caption".
        text_shapes: the shape of each text tensor, by name.

    Raises:
        ValueError: a sample has other text tensors than `text_shapes` says.
    """
    tensors, records, texts = {}, [], []
    for place, sample in enumerate(samples):
        record = {key: sample[key] for key in ("id", "source", "caption")}
        # A copy: safetensors refuses tensors that share memory, as those of one batch may.
        for name in LATENTS:
            if name in sample:
                tensors[f"{name}/{place}"] = sample[name].clone(memory_format=torch.contiguous_format)
        if "audio_latents" in sample:
            record["sound"] = True
        if text_shapes:
            text = _text_tensors(sample, text_shapes)
            same = (number for number, other in enumerate(texts) if _equal(text, other))
            record["text"] = next(same, len(texts))
            if record["text"] == len(texts):
                texts.append(text)
                tensors.update({f"text/{record['text']}/{name}": tensor for name, tensor in text.items()})
        records.append(record)
    return _write_tensors(file, tensors, {"samples": records}, len(samples))


def write_empty_caption(file: Path, text: dict[str, Tensor], text_shapes: dict[str, list[int]]) -> Shard:
    """Write the text tensors of the empty caption as one file."""
    tensors = {EMPTY_CAPTION + name: tensor for name, tensor in _text_tensors(text, text_shapes).items()}
    return _write_tensors(file, tensors, {}, 0)


def read_header(file: Path) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """Read the header of a shard.

    Returns:
        The records of its samples, and the shape of each latent by the name of its tensor.

    Raises:
        ValueError: the file is not a shard.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            records = json.loads((opened.metadata() or {})[HEADER_KEY])["samples"]
            names = [f"latents/{place}" for place in range(len(records))]
            return records, {name: opened.get_slice(name).get_shape() for name in names}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is no shard of samples: {error!r}") from None


def read_text(opened: Any, prefix: str, text_shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Read the text tensors under a prefix of an open safetensors file, and restore the rows of zeros at their ends."""
    text = {}
    for name, shape in text_shapes.items():
        stored = opened.get_tensor(prefix + name)
        text[name] = stored.new_zeros(shape)
        text[name][: len(stored)] = stored
    return text


def _equal(text: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in text.items())


def _text_tensors(text: dict[str, Tensor], text_shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Copies of a sample's text tensors, without the rows of zeros at their ends."""
    stored = {}
    for name, shape in text_shapes.items():
        tensor = text.get(name)
        if tensor is None or list(tensor.shape) != shape:
            got = "none" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"text tensor {name!r} must have shape {tuple(shape)} in every sample, got {got}")
        used = tensor.reshape(len(tensor), -1).ne(0).any(1).nonzero()
        stored[name] = tensor[: int(used[-1]) + 1 if len(used) else 0].clone()
    return stored


def _write_tensors(file: Path, tensors: dict[str, Tensor], header: dict[str, Any], samples: int) -> Shard:
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    save_tensors(tensors, file, {HEADER_KEY: json.dumps(header, ensure_ascii=False)})
    return Shard(file.name, file.stat().st_size, _sha256(file), samples)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def shape_name(latents: Tensor) -> str:
    """The name of a latent's shape: "16x21x60x104" for latents [16, 21, 60, 104]."""
    return "x".join(map(str, latents.shape))


def to_dtype(text: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert floating-point tensors to `dtype`, and leave masks as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in text.items()}


def text_tensors(sample: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a sample that are its caption's."""
    return {name: value for name, value in sample.items() if isinstance(value, Tensor) and name not in LATENTS}
