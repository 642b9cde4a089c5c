"""`foveal precompute` encodes videos and captions into latents and text embeddings, and can be killed at any time.

It computes once what does not change during training. It takes files in the order of their names, gathers the samples
of whole files into shards, and never computes a shard again that is in the index.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.checks import check_positive_int
from foveal.lab.data.clips import Bucket, choose_bucket, clip_starts, probe, read_clip
from foveal.lab.data.shards import (
    EMPTY_CAPTION_FILE,
    INDEX_FILE,
    Index,
    check_shards,
    read_header,
    read_index,
    shape_name,
    shard_name,
    text_tensors,
    to_dtype,
    write_empty_caption,
    write_shard,
)
from foveal.lab.data.sound import read_sound
from foveal.lab.data.sources import Source, read_sources
from foveal.lab.data.windows import to_model_range
from foveal.lab.encoding import encode_sound, encode_text, encode_video, vae_facts
from foveal.lab.pipelines import LoadedPipeline, default_size
from foveal.output_folder import OutputFolder

SHARD_BYTES = 512 * 2**20


@dataclass(frozen=True)
class PrecomputeSettings:
    """How the samples are made.

    Args:
        buckets: the sizes of clips; empty takes the pipeline's own size.
        fps: frames per second; None takes the pipeline's rate, and in pixel space each file's own frames.
        clips_per_video: the largest number of clips from one file. Clips do not overlap.
        dtype: the dtype in which latents and embeddings are stored.
        shard_samples: about how many samples go into a shard, which is what a kill loses at most.
    """

    buckets: tuple[Bucket, ...] = ()
    fps: float | None = None
    clips_per_video: int = 1
    dtype: torch.dtype = torch.bfloat16
    shard_samples: int = 32

    def __post_init__(self) -> None:
        check_positive_int("clips_per_video", self.clips_per_video)
        check_positive_int("shard_samples", self.shard_samples)
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if len(set(self.buckets)) != len(self.buckets):
            raise ValueError(f"a bucket is given twice: {', '.join(map(str, self.buckets))}")


class _Clip(NamedTuple):
    """The frames of a clip, uint8 [F, 3, H, W], and its sound, float32 [2, samples], where samples have sound."""

    frames: Tensor
    sound: Tensor | None = None


class Progress:
    """What a run reports to. This one drops the reports; the command line's draws a bar."""

    def start(self, files: int, done: int) -> None:
        """Report the number of files, and how many of them former runs have done."""

    def advance(self, source: Source, reason: str | None) -> None:
        """Report that a file is done, with the reason if it was left out."""


@dataclass
class _Run:
    """A run in progress.

    Args:
        output: the folder.
        index: what is in the folder.
        buckets, fps: the sizes and the frame rate of the clips.
        left: the files that are not in the index yet.
        total: all files.
        pending: samples that are in no shard yet.
    """

    output: OutputFolder
    index: Index
    buckets: tuple[Bucket, ...]
    fps: float | None
    left: list[Source]
    total: int
    pending: list[dict[str, Any]] = field(default_factory=list)

    def add(self, samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            if not self.index.text_shapes and not self.index.shards and not self.pending:
                self.index.text_shapes = {name: list(x.shape) for name, x in text_tensors(sample).items()}
            self.pending.append(sample)

    @property
    def pending_bytes(self) -> int:
        return sum(sample["latents"].nbytes for sample in self.pending)

    def flush(self) -> None:
        """Put the samples that are waiting into a shard, and the shard into the index."""
        if self.pending:
            with self.output.writing(shard_name(len(self.index.shards))) as aside:
                shard = write_shard(aside, self.pending, self.index.text_shapes)
            self.index.shards.append(shard)
            for sample in self.pending:
                name = shape_name(sample["latents"])
                self.index.latent_shapes[name] = self.index.latent_shapes.get(name, 0) + 1
            self.pending = []
        with self.output.writing(INDEX_FILE) as aside:
            self.index.write(aside)


def precompute(
    videos: str | Path,
    output: str | Path,
    settings: PrecomputeSettings,
    *,
    loaded: LoadedPipeline | None = None,
    progress: Progress | None = None,
) -> Index:
    """Encode every video or image of a folder or a list, and write a folder that `LatentDataset` reads.

    A second run with the same arguments continues: after an interrupt at the next file, and after a kill at the last
    complete shard. It tries files again that were left out, and adds new ones.

    Args:
        videos: see `read_sources`.
        output: the folder to write; new, empty, or from a former run with the same settings.
        settings: sizes and rates.
        loaded: the pipeline whose VAE and text encoder to use; None stores pixels in [-1, 1], without text.
        progress: what to report each file to.

    Returns:
        The index as written: complete, with the files that were left out and why.

    Raises:
        FileNotFoundError: no such folder or list.
        ValueError: the list cannot be read, a size does not fit the pipeline, the output folder holds something else or
            samples made with other settings or captions, or no file can be used.
        OSError: the disk is full. The message says how many samples are kept.
        FileExistsError: a name that is needed is taken by a file that foveal did not write.
    """
    output = Path(output)
    run = _plan(videos, output, settings, loaded)
    run.index.complete, run.index.skipped = False, []
    progress = progress or Progress()
    progress.start(run.total, run.total - len(run.left))
    with _saying_what_is_kept(output):
        try:
            sound = None
            if loaded is not None and loaded.kind.sound:
                sound = loaded.pipe.audio_sampling_rate, loaded.kind.sound.samples_of_a_latent(loaded.pipe)
            clips_of = run.buckets, run.fps, settings.clips_per_video, sound
            for source, clips, reason in _read_ahead(run.left, *clips_of):
                if reason is not None:
                    run.index.skipped.append({"file": source.name, "reason": reason})
                else:
                    run.add(_encode(source, clips, loaded, settings.dtype))
                if len(run.pending) >= settings.shard_samples or run.pending_bytes >= SHARD_BYTES:
                    run.flush()
                progress.advance(source, reason)
        except OSError:
            raise  # What is pending could not be written either.
        except BaseException:
            run.flush()
            raise
        run.flush()
        if not run.index.samples:
            first = run.index.skipped[0]["reason"]
            raise ValueError(f"none of the {run.total} files of {videos} could be used; the first: {first}")
        if loaded is not None and run.index.empty_caption is None:
            text = {name: tensor[0] for name, tensor in to_dtype(encode_text(loaded, [""]), settings.dtype).items()}
            with run.output.writing(EMPTY_CAPTION_FILE) as aside:
                run.index.empty_caption = write_empty_caption(aside, text, run.index.text_shapes)
        run.index.complete = True
        run.flush()
    return run.index


def check_request(
    videos: str | Path, output: str | Path, settings: PrecomputeSettings, loaded: LoadedPipeline | None
) -> None:
    """Check what can be checked before a file is decoded, and before weights are loaded.

    Args:
        videos, output, settings: as in `precompute`.
        loaded: the pipeline, or its outline.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: as in `precompute`.
    """
    _plan(videos, Path(output), settings, loaded)


def _plan(videos: str | Path, output: Path, settings: PrecomputeSettings, loaded: LoadedPipeline | None) -> _Run:
    """The run to start or to continue, checked."""
    sources = read_sources(videos)
    buckets = _buckets(settings, loaded)
    fps = settings.fps if settings.fps is not None or loaded is None else loaded.kind.fps
    if loaded is not None and loaded.kind.is_image:
        fps = None
    if loaded is not None and loaded.kind.sound and fps != loaded.kind.fps:
        raise ValueError(f"fps must be {loaded.kind.fps} for {loaded.kind.name}, whose sound has it, got {fps:g}")
    described = {
        "space": "pixel" if loaded is None else "latent",
        "pipeline": None if loaded is None else loaded.kind.name,
        "model": None if loaded is None else loaded.source,
        "vae": None if loaded is None else vae_facts(type(loaded.pipe.vae).__name__, loaded.pipe.vae.config),
        "buckets": [str(bucket) for bucket in buckets],
        "fps": fps,
        "clips_per_video": settings.clips_per_video,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "text": [] if loaded is None else [name for name in loaded.kind.text if name is not None],
    }
    index, done = _open_index(output, described)
    _check_captions(sources, done, output)
    left = [source for source in sources if source.name not in done]
    folder = OutputFolder(output, "precompute")
    names = [INDEX_FILE, *(shard_name(len(index.shards) + place) for place in range(len(left)))]
    needs_empty_caption = loaded is not None and index.empty_caption is None
    folder.check([*names, EMPTY_CAPTION_FILE] if needs_empty_caption else names)
    return _Run(folder, index, buckets, fps, left, len(sources))


@contextlib.contextmanager
def _saying_what_is_kept(output: Path) -> Iterator[None]:
    """Raise an OSError about a full disk again, with what became of the run."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        kept = read_index(output).samples if (output / INDEX_FILE).is_file() else 0
        message = f"the disk is full; {kept} samples are kept, and the same command continues when there is room"
        raise OSError(errno.ENOSPC, message, str(output)) from error


def _buckets(settings: PrecomputeSettings, loaded: LoadedPipeline | None) -> tuple[Bucket, ...]:
    buckets = settings.buckets
    if not buckets:
        size = (None,) if loaded is None else default_size(loaded)
        if None in size:
            name = "pixel space" if loaded is None else loaded.kind.name
            raise ValueError(f"{name} has no size of its own; give at least one bucket, like 49x480x720")
        buckets = (Bucket(*size),)
    if loaded is not None:
        for bucket in buckets:
            try:
                loaded.sizes.check(bucket.frames, bucket.height, bucket.width)
            except ValueError as error:
                raise ValueError(f"bucket {bucket}: {error}") from None
            if loaded.kind.is_image and bucket.frames != 1:
                raise ValueError(f"bucket {bucket}: {loaded.kind.name} makes images, which have 1 frame")
    return buckets


def _open_index(output: Path, settings: dict[str, Any]) -> tuple[Index, dict[str, str]]:
    """The index to go on with, and the caption of every file that has its samples already."""
    folder = OutputFolder(output, "precompute")
    if not (output / INDEX_FILE).exists():
        folder.check([INDEX_FILE])
        folder.check_alone()
        return Index(settings), {}
    index = read_index(output)
    for name, value in settings.items():
        # Older versions did not record the VAE.
        if index.settings.get(name) != value and not (name == "vae" and name not in index.settings):
            raise ValueError(
                f"output {output} was made with {name} {index.settings.get(name)!r}, this run has {value!r}; "
                "choose another folder"
            )
    check_shards(output, index, verify=False)
    done = {}
    for shard in index.shards:
        done.update({record["source"]: record["caption"] for record in read_header(output / shard.file)[0]})
    # Older versions kept no list, but an index shows by itself that precompute wrote it.
    folder.adopt(INDEX_FILE)
    return index, done


def _check_captions(sources: list[Source], done: dict[str, str], output: Path) -> None:
    for source in sources:
        if source.name in done and done[source.name] != source.caption:
            raise ValueError(
                f"{source.name} has another caption now than in output {output}: {source.caption!r}, "
                f"there {done[source.name]!r}; choose another folder"
            )


def _read_ahead(
    sources: list[Source], buckets: tuple[Bucket, ...], fps: float | None, clips: int, sound: tuple[int, int] | None
) -> Iterator[tuple[Source, list[_Clip], str | None]]:
    """Yield each source with its clips, or the reason why there are none. Decodes one file ahead of the caller.

    sound: samples per second, and per latent, of the sound to read; None for none.
    """
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(_read_clips, sources[0], buckets, fps, clips, sound) if sources else None
        for place, source in enumerate(sources):
            current, ahead = ahead, None
            decoded, reason = current.result()
            if place + 1 < len(sources):
                ahead = pool.submit(_read_clips, sources[place + 1], buckets, fps, clips, sound)
            yield source, decoded, reason


def _read_clips(
    source: Source, buckets: tuple[Bucket, ...], fps: float | None, clips: int, sound: tuple[int, int] | None
) -> tuple[list[_Clip], str | None]:
    try:
        media = probe(source.path)
        bucket = choose_bucket(media, buckets, fps)
        starts = clip_starts(media, bucket, fps, clips)
        frames = [read_clip(media, bucket, fps=fps, start=start) for start in starts]
        sounds = [
            None if sound is None else _sound(source, start / fps, bucket.frames / fps, *sound) for start in starts
        ]
        return list(map(_Clip, frames, sounds)), None
    except (ValueError, FileNotFoundError) as error:
        return [], str(error)


def _sound(source: Source, start: float, seconds: float, rate: int, hop: int) -> Tensor:
    """The sound of a clip, as many samples as whole latents of `hop` cover best; silence for a file without sound."""
    count = round(seconds * rate / hop) * hop
    found = read_sound(source.path, rate=rate, start=start, seconds=count / rate)
    return torch.zeros(2, count) if found is None else found


def _encode(
    source: Source, clips: list[_Clip], loaded: LoadedPipeline | None, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The samples of a file's clips, on the CPU."""
    text = {}
    if loaded is not None:
        text = to_dtype(encode_text(loaded, [source.caption]), dtype)
        text = {name: tensor[0].cpu() for name, tensor in text.items()}
    samples = []
    for place, clip in enumerate(clips):
        latents, extra = to_model_range(clip.frames), {}
        if loaded is not None:
            latents = encode_video(loaded, latents[None])[0]
            if not latents.isfinite().all():
                raise FloatingPointError(f"the VAE gives latents that are not finite for {source.name}")
            if clip.sound is not None:
                extra["audio_latents"] = encode_sound(loaded, clip.sound).to("cpu", dtype)
        sample = {"id": f"{source.name}#{place}", "source": source.name, "caption": source.caption}
        samples.append({**sample, "latents": latents.to("cpu", dtype), **extra, **text})
    return samples
