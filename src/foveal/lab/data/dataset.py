"""Precomputed samples for training: a dataset that checks what it loads, and batches that can start at any position.

Shape legend: B batch, C latent channels, F latent frames, H x W latent height and width, L text tokens.
"""

from __future__ import annotations

import collections
import hashlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from foveal.checks import check_positive_int
from foveal.lab.data.shards import (
    EMPTY_CAPTION,
    EMPTY_CAPTION_FILE,
    INDEX_FILE,
    Index,
    check_shards,
    read_header,
    read_index,
    read_text,
    shape_name,
    shard_name,
    text_tensors,
    write_empty_caption,
    write_shard,
)
from foveal.output_folder import OutputFolder

# Open files at once: shards are many, and file descriptors are not.
OPEN_SHARDS = 16
# Batches that are read ahead of the training loop.
READ_AHEAD = 2
NOT_TENSORS = ("id", "caption")


class LatentDataset(Dataset):
    """The samples that `foveal precompute` wrote.

    A sample is a dict:

    - "latents" is [C, F, H, W], normalized as the family's transformer expects it; an image has F = 1. In pixel space
      it is [3, F, H, W] in [-1, 1].
    - "audio_latents" is its sound, where the family makes sound: [2, C, L] for MiniMax-H3, one entry for each ear.
    - Text tensors have the names of the pipeline's arguments and no batch dimension: "prompt_embeds" [L, C], and the
      family's others. In pixel space there are none.
    - "caption" and "id" are strings.

    Args:
        folder: the output folder of `foveal precompute`.
        verify: compare every file's SHA-256 with the index, which reads all of them. Sizes are always compared.
        incomplete: accept what a run that has not finished has written so far.

    Attributes:
        settings: what the samples were made with.
        fingerprint: a hash of the settings and of all bytes.
        buckets: the indices of the samples that have a latent shape, by shape.

    Raises:
        FileNotFoundError: no such folder, or no index in it.
        ValueError: the index or a shard is malformed, missing, or damaged, or the run has not finished.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False, incomplete: bool = False) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if not index.complete and not incomplete:
            raise ValueError(
                f"{self.folder} is not complete, it has {index.samples} samples so far; run the same "
                "foveal precompute again to finish it"
            )
        check_shards(self.folder, index, verify=verify)
        self._index = index
        self._samples = _read_records(self.folder, index)
        self._chosen = list(range(len(self._samples)))
        self._opened: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    @property
    def settings(self) -> dict[str, Any]:
        return self._index.settings

    @property
    def fingerprint(self) -> str:
        ids = [self._samples[place]["id"] for place in self._chosen]
        if len(ids) == len(self._samples):
            return self._index.fingerprint
        return hashlib.sha256("\n".join([self._index.fingerprint, *ids]).encode()).hexdigest()

    @property
    def text_shapes(self) -> dict[str, list[int]]:
        """The shape of each text tensor of a sample, by name."""
        return self._index.text_shapes

    @property
    def has_sound(self) -> bool:
        """Whether the samples have sound."""
        return any(self._samples[place].get("sound") for place in self._chosen)

    @property
    def buckets(self) -> dict[tuple[int, ...], list[int]]:
        found: dict[tuple[int, ...], list[int]] = {}
        for index, place in enumerate(self._chosen):
            found.setdefault(tuple(self._samples[place]["shape"]), []).append(index)
        return found

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._samples[self._chosen[index]]
        opened = self._open(record["file"])
        sample = {"latents": opened.get_tensor(record["latents"])}
        if record.get("sound"):
            sample["audio_latents"] = opened.get_tensor(f"audio_{record['latents']}")
        if self._index.text_shapes:
            sample.update(read_text(opened, f"text/{record['text']}/", self._index.text_shapes))
        return sample | {"caption": record["caption"], "id": record["id"]}

    def empty_prompt(self) -> dict[str, Tensor]:
        """The text tensors of the empty caption, as a sample has them; an empty dict without text."""
        if self._index.empty_caption is None:
            return {}
        return read_text(self._open(self._index.empty_caption.file), EMPTY_CAPTION, self._index.text_shapes)

    def split(self, held_out: int) -> tuple[LatentDataset, LatentDataset]:
        """Split into a training and a held-out dataset. No file has samples in both.

        Which files are held out depends only on their names.

        Args:
            held_out: the least number of samples to hold out; 0 holds out none.

        Raises:
            ValueError: nothing is left to train on.
        """
        by_source: dict[str, list[int]] = {}
        for place in self._chosen:
            by_source.setdefault(self._samples[place]["source"], []).append(place)
        taken: set[int] = set()
        for source in sorted(by_source, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if len(taken) >= held_out:
                break
            taken.update(by_source[source])
        if len(taken) < held_out or len(taken) == len(self._chosen):
            raise ValueError(
                f"cannot hold out {held_out} of {len(self)} samples from {len(by_source)} files: a file is held out as "
                "a whole, and some must be left to train on"
            )
        return (
            self._subset([place for place in self._chosen if place not in taken]),
            self._subset([place for place in self._chosen if place in taken]),
        )

    def _subset(self, chosen: list[int]) -> LatentDataset:
        subset = object.__new__(type(self))
        subset.__setstate__(self.__getstate__() | {"_chosen": chosen})
        return subset

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        with self._lock:
            if file not in self._opened:
                self._opened[file] = safe_open(self.folder / file, framework="pt", device="cpu")
                if len(self._opened) > OPEN_SHARDS:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(file)
            return self._opened[file]

    def __getstate__(self) -> dict[str, Any]:
        # Open files and locks do not travel to the workers of a DataLoader.
        return {key: value for key, value in vars(self).items() if key not in ("_opened", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._opened, self._lock = collections.OrderedDict(), threading.Lock()


class BatchStream:
    """An endless stream of batches that can start at any position, and is the same for the same arguments.

    Batch k of a rank depends only on the dataset, the seed, k, and the size of the global batch, which is batch_size *
    world_size samples. All ranks get samples of one shape at a time: rank r has places r * batch_size to (r + 1) *
    batch_size of the global batch. An epoch sees every sample at least once: the last global batch of a shape is filled
    up with samples from the front of that shape's order.

    A batch is a dict: each tensor of a sample stacked along a new first dimension, on the CPU, and "caption" and "id"
    as lists.

    Args:
        dataset: a `LatentDataset`.
        batch_size: the number of samples in a batch of one rank.
        seed: the seed of the order and of the dropped captions.
        rank, world_size: which part of every global batch this stream yields.
        caption_dropout: the probability that a sample's caption is replaced by the empty one.
        num_workers: threads that read ahead, and one that puts batches together; 0 reads when asked.
        pin_memory: put batches into pinned memory, for copies to a GPU that overlap.

    Raises:
        ValueError: for an empty dataset, caption dropout without text, or an argument out of its range.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        caption_dropout: float = 0.0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_positive_int("batch_size", batch_size)
        check_positive_int("world_size", world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        if not len(dataset):
            raise ValueError("the dataset has no samples")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size, self.caption_dropout = rank, world_size, caption_dropout
        self.pin_memory = pin_memory
        self.position = 0
        self._empty = dataset.empty_prompt() if caption_dropout else {}
        if caption_dropout and not self._empty:
            raise ValueError("caption_dropout needs a dataset with text; this one has none")
        self._plan: tuple[int, list[list[tuple[int, bool]]]] = (-1, [])
        self._buckets = list(dataset.buckets.values())
        self._readers = self._assembler = None
        if num_workers:
            self._readers = ThreadPoolExecutor(num_workers)
            self._assembler = ThreadPoolExecutor(1, **thread_of_this_gpu(pin_memory))
        # A batch, and the samples that it waits for.
        self._ahead: collections.deque[tuple[Future, list[Future]]] = collections.deque()

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def batches_per_epoch(self) -> int:
        return sum(-(-len(bucket) // self.global_batch) for bucket in self._buckets)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self.position // self.batches_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._readers is None:
            batch = self._assemble([self._read(*pick) for pick in self._picks(self.position)])
        else:
            while len(self._ahead) <= READ_AHEAD:
                picks = self._picks(self.position + len(self._ahead))
                samples = [self._readers.submit(self._read, *pick) for pick in picks]
                self._ahead.append((self._assembler.submit(self._assemble_ahead, samples), samples))
            batch = self._ahead[0][0].result()
            self._ahead.popleft()
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The number of batches that `next` has returned, and what they depend on, as JSON, for `load_state_dict`."""
        return {
            "position": self.position,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "caption_dropout": self.caption_dropout,
            "fingerprint": self.dataset.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which the state was taken.

        Raises:
            ValueError: the stream would not continue the same sequence; the message names what differs.
        """
        ours = self.state_dict()
        if set(state) != set(ours):
            raise ValueError(f"state must have the keys {sorted(ours)}, got {sorted(state)}")
        for key, value in ours.items():
            if key != "position" and state[key] != value:
                raise ValueError(
                    f"the data has another {key}: the state was taken with {state[key]!r}, this is {value!r}"
                )
        self._drop_read_ahead()
        self.position = state["position"]

    def close(self) -> None:
        """End the reading threads, and with them the stream."""
        self._drop_read_ahead()
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)
            self._assembler.shutdown(wait=True, cancel_futures=True)

    def _drop_read_ahead(self) -> None:
        for batch, samples in self._ahead:
            batch.cancel()
            for sample in samples:
                sample.cancel()
        self._ahead.clear()

    def _assemble_ahead(self, samples: list[Future]) -> dict[str, Any]:
        read = [sample.result() for sample in samples]
        samples.clear()  # or they would be in memory beside their batch
        return self._assemble(read)

    def _assemble(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: [sample[key] for sample in samples] for key in samples[0]}
        batch = {key: value if key in NOT_TENSORS else torch.stack(value) for key, value in batch.items()}
        if self.pin_memory:
            batch = {key: value if key in NOT_TENSORS else value.pin_memory() for key, value in batch.items()}
        return batch

    def _read(self, index: int, drop_caption: bool) -> dict[str, Any]:
        sample = self.dataset[index]
        return sample | self._empty | {"caption": ""} if drop_caption else sample

    def _picks(self, position: int) -> list[tuple[int, bool]]:
        """For each sample of this rank in one batch, its index and whether its caption is dropped."""
        epoch, place = divmod(position, self.batches_per_epoch)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._order(epoch))
        return self._plan[1][place][self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _order(self, epoch: int) -> list[list[tuple[int, bool]]]:
        # A generator of its own for each epoch: position k is reached without drawing all before it. Seeds that are
        # neighbors in both numbers must not meet, hence the hash.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        batches = []
        for bucket in self._buckets:
            order = [bucket[place] for place in torch.randperm(len(bucket), generator=generator).tolist()]
            count = -(-len(order) // self.global_batch) * self.global_batch
            order = [order[place % len(order)] for place in range(count)]
            dropped = (torch.rand(count, generator=generator) < self.caption_dropout).tolist()
            picks = list(zip(order, dropped, strict=True))
            batches += [picks[start : start + self.global_batch] for start in range(0, count, self.global_batch)]
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def thread_of_this_gpu(pins: bool) -> dict[str, Any]:
    """Arguments of a `ThreadPoolExecutor` whose threads pin memory for the current GPU, and not for the first one."""
    return {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)} if pins else {}


def write_latent_dataset(
    folder: str | Path,
    samples: Iterable[dict[str, Any]],
    *,
    settings: dict[str, Any] | None = None,
    empty_prompt: dict[str, Tensor] | None = None,
    samples_per_shard: int = 64,
) -> None:
    """Write samples that are in memory as a folder that `LatentDataset` reads.

    Args:
        folder: the folder to write; it must not hold a dataset yet.
        samples: what `LatentDataset` returns: "latents", text tensors with the same names and shapes in every sample,
            "caption", and "id"; "audio_latents" in all or in none. "source" names the file that a sample comes from;
            the default is its id up to "#".
        settings: facts about the samples, to keep in the index.
        empty_prompt: the text tensors of the empty caption.
        samples_per_shard: the number of samples in a file.

    Raises:
        ValueError: the folder has an index, or the samples' text tensors differ in name or shape.
        FileExistsError: a name that is needed is taken by a file that foveal did not write.
    """
    folder = Path(folder)
    if (folder / INDEX_FILE).exists():
        raise ValueError(f"{folder} holds a dataset already")
    with OutputFolder(folder, "write_latent_dataset").renewing(last=INDEX_FILE) as new:
        fill_with_samples(
            new, samples, settings=settings, empty_prompt=empty_prompt, samples_per_shard=samples_per_shard
        )


def fill_with_samples(
    folder: Path,
    samples: Iterable[dict[str, Any]],
    *,
    settings: dict[str, Any] | None = None,
    empty_prompt: dict[str, Tensor] | None = None,
    samples_per_shard: int = 64,
) -> None:
    """Write samples as `write_latent_dataset` does into an empty folder."""
    samples = [{"source": sample["id"].split("#")[0], **sample} for sample in samples]
    index = Index(settings=settings or {})
    if samples:
        index.text_shapes = {name: list(tensor.shape) for name, tensor in text_tensors(samples[0]).items()}
    for start in range(0, len(samples), samples_per_shard):
        part = samples[start : start + samples_per_shard]
        index.shards.append(write_shard(folder / shard_name(len(index.shards)), part, index.text_shapes))
        for sample in part:
            name = shape_name(sample["latents"])
            index.latent_shapes[name] = index.latent_shapes.get(name, 0) + 1
    if empty_prompt is not None:
        index.empty_caption = write_empty_caption(folder / EMPTY_CAPTION_FILE, empty_prompt, index.text_shapes)
    index.complete = True
    index.write(folder / INDEX_FILE)


def _read_records(folder: Path, index: Index) -> list[dict[str, Any]]:
    """Every sample's record, with its file, tensor name and shape, checked against the index."""
    samples, shapes = [], collections.Counter()
    for shard in index.shards:
        records, latents = read_header(folder / shard.file)
        if len(records) != shard.samples:
            raise ValueError(f"{folder / shard.file} has {len(records)} samples, but the index says {shard.samples}")
        for record, (name, shape) in zip(records, latents.items(), strict=True):
            samples.append({**record, "file": shard.file, "latents": name, "shape": shape})
            shapes["x".join(map(str, shape))] += 1
    if dict(shapes) != index.latent_shapes:
        raise ValueError(f"{folder} has latents of {dict(shapes)}, but the index says {index.latent_shapes}")
    return samples
