"""A tiny random Wan pipeline with text encoder and tokenizer, saved as a user would have it, and clips to feed it."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_wan import tiny_transformer

from foveal.lab.data.sound import Sound
from foveal.lab.data.windows import write_video

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("av")

LATENTS_MEAN, LATENTS_STD = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]


def tiny_tokenizer():
    """A tokenizer of single characters, made here: none can be downloaded in a test."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_vae() -> torch.nn.Module:
    """An `AutoencoderKLWan` that compresses as the real one does, 4 in time and 8 in space."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
    ).eval()


def tiny_text_encoder() -> torch.nn.Module:
    config = transformers.UMT5Config(vocab_size=128, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return transformers.UMT5EncoderModel(config).eval()


def save_tiny_wan(folder: Path) -> Path:
    torch.manual_seed(0)
    diffusers.WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_transformer(),
    ).save_pretrained(folder)
    return folder


def moving_bar(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 [frames, 3, height, width]: a bright bar that moves over a coloured ground."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.randint(40, 120, (3, 1, 1), generator=generator).expand(3, height, width)
    video = ground.to(torch.uint8).repeat(frames, 1, 1, 1)
    for frame in range(frames):
        left = (3 * frame + 5 * seed) % (width - 8)
        video[frame, :, :, left : left + 8] = 230
    return video


def tone(seconds: float, rate: int, pitch: float = 440.0) -> Sound:
    """A tone in one ear, and twice its pitch in the other."""
    times = torch.arange(round(seconds * rate)) / rate
    return Sound(torch.stack([(2 * math.pi * pitch * n * times).sin() for n in (1, 2)]) * 0.5, rate)


def precomputed_with_sound(model: Path, folder: Path, *, frames: int, rate: int, bucket: str) -> Path:
    """What `foveal precompute` makes of three clips in a folder; the first has neither sound nor a caption."""
    from foveal.lab import cli

    for index in range(3):
        sound = tone(2.0, rate, 200.0 * (index + 1)) if index else None
        write_video(folder / f"clip{index}.mp4", moving_bar(frames, 64, 96, index), fps=24, sound=sound)
        (folder / f"clip{index}.txt").write_text("a bar" if index else "", encoding="utf-8")
    command = ["precompute", "--videos", str(folder), "--model", str(model), "--bucket", bucket]
    assert cli.main([*command, "--output", str(folder / "out")]) in (0, None)
    return folder / "out"


def write_clip(path: Path, frames: int = 12, height: int = 48, width: int = 64, fps: int = 16, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, moving_bar(frames, height, width, seed), fps=fps)
    return path


def write_turned(path: Path, source: Path) -> Path:
    """An MP4 of ours as a phone that was held upright stores it: the display matrix says to turn it clockwise."""
    content = source.read_bytes()
    upright = b"".join(n.to_bytes(4, "big") for n in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    clockwise = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    place = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:place] + clockwise + content[place + len(upright) :])
    return path


def write_wide_pixels(path: Path, frames: torch.Tensor, *, fps: int, aspect: int) -> Path:
    """uint8 [frames, 3, height, width] as an MP4 whose pixels are `aspect` times as wide as high."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for image in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """An MP4 with sound and no picture."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate = 8000
        frame.planes[0].update(bytes(4096))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def commands_of(page: str) -> list[list[str]]:
    """The arguments of every `foveal` command in the bash blocks of a page of the documentation."""
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("foveal ")]
