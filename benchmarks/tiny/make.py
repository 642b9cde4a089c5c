"""Trains the tiny model: its VAE, its transformer, and what the package ships.

    python benchmarks/quality/clips.py --output WORK/clips
    python benchmarks/tiny/make.py vae --work WORK --seconds 300
    python benchmarks/tiny/make.py latents --work WORK
    python benchmarks/tiny/make.py transformer --work WORK --steps 17400
    python benchmarks/tiny/make.py pipeline --work WORK --output FOLDER
    python benchmarks/tiny/make.py shards --work WORK --pipeline FOLDER --output WORK/shards
    foveal train tiny-sla --model.path FOLDER --data.folder WORK/shards --output WORK/sla
    foveal train tiny-sla2 --model.path FOLDER --data.folder WORK/shards --output WORK/sla2
    foveal train tiny-router --model.path FOLDER --data.folder WORK/shards --output WORK/router
    foveal train tiny-vsa --model.path FOLDER --data.folder WORK/shards --output WORK/vsa
    foveal train tiny-vsa-router --model.path FOLDER --data.folder WORK/shards --output WORK/vsa-router
    python benchmarks/tiny/make.py ship --work WORK --pipeline FOLDER --output WORK/shipped_files
    python benchmarks/tiny/make.py samples --work WORK --pipeline FOLDER --output PICTURES
    python benchmarks/tiny/make.py unpack --work WORK --pipeline FOLDER
    python benchmarks/tiny/make.py features --work WORK --steps 1500

`transformer` uses several GPUs under `torchrun --standalone --nproc-per-node 2 benchmarks/tiny/make.py`. It stops
after `--seconds` with a checkpoint, and the same command goes on from it. What `ship` writes takes the place of
src/foveal/models/shipped_files. What a run measured is in WORK/vae.json and WORK/transformer.jsonl; those of the model
that ships are in benchmarks/results/tiny. With `--pipeline`, `vae` and `transformer` go on from the weights of an
earlier pipeline, and `latents` takes its words and statistics. `unpack` takes the place of `vae` and `transformer`: it
gives WORK those of a pipeline, such as the one that ships, so that `latents` and arms.py run without training.
`features` trains the network by which `arms.py --distance` compares sets of clips, on the latents.

The same model over 14,400 tokens, for `arms.py --name long`:

    python benchmarks/quality/clips.py --output WORK/clips --frames 97 --times 2 --seeds 4
    python benchmarks/tiny/make.py unpack --work WORK --pipeline FOLDER
    python benchmarks/tiny/make.py latents --work WORK --pipeline FOLDER
    python benchmarks/tiny/make.py transformer --work WORK --pipeline FOLDER --name long --batch 8 --steps 2000
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import model as parts
import numpy as np
import torch
from common import DEVICE, read_clips, to_video, weights_of
from features import train_features
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from train_transformer import train_transformer
from train_vae import train_vae, write_latents

from foveal.lab.data.dataset import write_latent_dataset
from foveal.lab.encoding import encode_video, vae_facts
from foveal.lab.pipelines import DEFAULTS_FILE, load_pipeline
from foveal.models.shipped import ADAPTERS, SHIPPED

# What the pipeline is called with where nothing else is asked for.
DEFAULTS = {
    "num_frames": parts.FRAMES,
    "height": parts.HEIGHT,
    "width": parts.WIDTH,
    "num_inference_steps": 20,
    "guidance_scale": 2.0,
}
# Clips that the package gets, by the name of their job and their number in it.
SHIPPED_CLIPS = {
    "held-out": (
        ("deadly_corridor-100", 3),
        ("health_gathering_supreme-100", 0),
        ("defend_the_center-100", 2),
        ("map07-100", 8),
    ),
    "train": (
        ("deadly_corridor-3", 7),
        ("deadly_corridor-3", 11),
        ("defend_the_center-3", 0),
        ("health_gathering_supreme-3", 1),
        ("map01-3", 8),
        ("map01-3", 1),
        ("map04-4", 11),
        ("map09-3", 15),
    ),
}


def write_pipeline(work: Path, name: str, size: str, output: Path) -> None:
    facts = json.loads((work / "latents.json").read_text())
    vae, transformer = parts.build_vae(facts["mean"], facts["std"]), parts.build_transformer(size)
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    tensors = load_file(work / f"{name}.safetensors")
    transformer.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average/")})
    encoder = parts.build_text_encoder(facts["words"])
    pipe = parts.assemble(vae, transformer, encoder, parts.build_tokenizer(facts["words"]))
    for module in (vae, transformer, encoder):
        module.to(torch.bfloat16)
    pipe.save_pretrained(output)
    (output / DEFAULTS_FILE).write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    # transformers 5 writes a name that transformers 4 does not know.
    for file in (output / "model_index.json", output / "tokenizer" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def unpack(work: Path, pipeline: Path) -> None:
    """The weights of a pipeline's VAE and transformer in float32, as `vae` and `transformer` leave them in WORK."""
    for name, prefix in (("vae", ""), ("transformer", "average/")):
        tensors = weights_of(pipeline, name)
        save_file({prefix + key: value for key, value in tensors.items()}, work / f"{name}.safetensors")


def ship(work: Path, pipeline: Path, output: Path) -> None:
    """A new folder for the package: the pipeline, its adapters in bfloat16, and a few clips with their latents."""
    output.mkdir(parents=True)
    shutil.copytree(pipeline, output / SHIPPED["foveal/tiny"])
    for name in ADAPTERS:
        ship_adapter(work / name / "export", output / SHIPPED[f"foveal/tiny-{name}"])
    loaded = load_pipeline(pipeline, device=DEVICE, dtype=torch.float32)
    folder, captions = output / "clips", {}
    folder.mkdir()
    for part, picks in SHIPPED_CLIPS.items():
        latents, captions[part] = {}, {}
        for job, number in picks:
            with np.load(work / "clips" / part / f"{job}.npz") as content:
                frames, caption = content["frames"][number], str(content["captions"][number])
            name = f"{job}-{number}"
            captions[part][name] = caption
            latents[name] = encode_video(loaded, to_video(torch.from_numpy(frames)[None]))[0].bfloat16().contiguous()
            if part == "held-out":
                write_small_video(folder / f"{name}.mp4", frames)
        save_file(latents, folder / f"{part}.safetensors")
    (folder / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")


def ship_adapter(trained: Path, output: Path) -> None:
    """What `foveal train` exported, its LoRA in bfloat16."""
    shutil.copytree(trained / "sparse", output / "sparse")
    (output / "lora").mkdir()
    lora = "lora/pytorch_lora_weights.safetensors"
    with safe_open(trained / lora, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: x.bfloat16() for name, x in load_file(trained / lora).items()}, output / lora, metadata)


def write_small_video(file: Path, frames: np.ndarray) -> None:
    """uint8 [F, H, W, 3] as an MP4 of about 150 KB."""
    import av

    with av.open(str(file), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "23", "preset": "veryslow"})
        stream.height, stream.width, stream.pix_fmt = parts.HEIGHT, parts.WIDTH, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_shards(work: Path, pipeline: Path, output: Path) -> None:
    """The training latents and captions as `foveal precompute` would write them, for `foveal train`."""
    from diffusers import AutoencoderKLWan

    tensors, facts = load_file(work / "latents.safetensors"), json.loads((work / "latents.json").read_text())
    texts = F.pad(tensors["texts"], (0, 0, 0, parts.TEXT_TOKENS - tensors["texts"].shape[1])).bfloat16()
    embedded = dict(zip(facts["texts"], texts, strict=True))
    captions = facts["captions"]["train"]
    samples = (
        {"latents": latents, "prompt_embeds": embedded[text], "caption": text, "id": f"clip-{number:05d}#0"}
        for number, (latents, text) in enumerate(zip(tensors["train"], captions, strict=True))
    )
    settings = {
        "space": "latent",
        "pipeline": "WanPipeline",
        "model": str(pipeline),
        "vae": vae_facts("AutoencoderKLWan", AutoencoderKLWan.load_config(pipeline, subfolder="vae")),
        "fps": 16,
    }
    write_latent_dataset(output, samples, settings=settings, empty_prompt={"prompt_embeds": embedded[""]})


def sheet(videos: Tensor, columns: int = 7) -> np.ndarray:
    """uint8 [rows * H, columns * W, 3] of frames, evenly spaced, of uint8 [N, F, 3, H, W]."""
    index = torch.linspace(0, videos.shape[1] - 1, columns).long()
    picked = videos[:, index].permute(0, 3, 1, 4, 2)
    return picked.reshape(picked.shape[0] * picked.shape[1], -1, 3).contiguous().numpy()


@torch.no_grad()
def make_samples(work: Path, pipeline: Path, output: Path, *, steps: int, guidance: float, count: int) -> None:
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
    from PIL import Image

    output.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    vae = AutoencoderKLWan.from_pretrained(pipeline, subfolder="vae", dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(pipeline, vae=vae, dtype=dtype).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    clips, captions = read_clips(work / "clips" / "held-out")
    picked = np.linspace(0, len(clips) - 1, count).astype(int)
    size = {"num_frames": parts.FRAMES, "height": parts.HEIGHT, "width": parts.WIDTH, "num_inference_steps": steps}
    options = {**size, "guidance_scale": guidance, "output_type": "pt"}
    real = torch.from_numpy(clips[picked]).permute(0, 1, 4, 2, 3)
    continued = WanImageToVideoPipeline.from_pipe(pipe)
    continued.set_progress_bar_config(disable=True)
    rows = []
    for place, index in enumerate(picked):
        video = to_video(torch.from_numpy(clips[index : index + 1]))
        restored = vae.decode(vae.encode(video).latent_dist.mode()).sample[0].permute(1, 0, 2, 3) / 2 + 0.5
        made = continued(
            image=Image.fromarray(clips[index, 0]),
            prompt=captions[index],
            generator=torch.Generator().manual_seed(place),
            **options,
        ).frames[0]
        rows += [real[place], *((255 * x.float().clamp(0, 1)).round().byte().cpu() for x in (restored, made))]
    Image.fromarray(sheet(torch.stack(rows))).save(output / "continued.png")
    trained = json.loads((work / "latents.json").read_text())["captions"]["train"]
    texts, rows = [captions[picked[0]], *trained[:: len(trained) // count]][:count], []
    for place, text in enumerate(texts):
        made = pipe(prompt=text, generator=torch.Generator().manual_seed(place), **options).frames[0]
        rows.append((255 * made.float().clamp(0, 1)).round().byte().cpu())
    Image.fromarray(sheet(torch.stack(rows))).save(output / "from-text.png")
    (output / "captions.json").write_text(
        json.dumps({"continued": [captions[i] for i in picked], "text": texts}, indent=1)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stage",
        choices=("vae", "latents", "transformer", "pipeline", "shards", "ship", "samples", "unpack", "features"),
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pipeline", type=Path)
    parser.add_argument("--name", default="transformer", help="of the transformer's files in WORK")
    parser.add_argument("--size", choices=tuple(parts.SIZES), default="tiny", help="of the transformer")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--steps", type=int, default=17400)
    parser.add_argument("--commit", help="the commit of this tree, for the record")
    parser.add_argument("--sampling-steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--vae-batch", type=int, default=4)
    parser.add_argument("--vae-rate", type=float, default=1.5e-3)
    parser.add_argument("--decoder-only", action="store_true", help="vae: the latents stay those of --pipeline")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--count", type=int, default=6)
    options = parser.parse_args()
    work = options.work
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if options.stage == "vae":
        train_vae(
            work,
            seconds=options.seconds,
            batch=options.vae_batch,
            rate=options.vae_rate,
            start=options.pipeline,
            decoder_only=options.decoder_only,
            commit=options.commit,
        )
    elif options.stage == "latents":
        write_latents(work, options.pipeline)
    elif options.stage == "transformer":
        train_transformer(
            work,
            options.name,
            size=options.size,
            steps=options.steps,
            seconds=options.seconds,
            batch=options.batch,
            rate=options.rate,
            optimizer=options.optimizer,
            start=options.pipeline,
            commit=options.commit,
        )
    elif options.stage == "pipeline":
        write_pipeline(work, options.name, options.size, options.output)
    elif options.stage == "unpack":
        unpack(work, options.pipeline)
    elif options.stage == "ship":
        ship(work, options.pipeline, options.output)
    elif options.stage == "features":
        train_features(work, steps=options.steps, batch=options.batch, rate=options.rate, commit=options.commit)
    elif options.stage == "shards":
        write_shards(work, options.pipeline, options.output)
    else:
        make_samples(
            work,
            options.pipeline,
            options.output,
            steps=options.sampling_steps,
            guidance=options.guidance,
            count=options.count,
        )


if __name__ == "__main__":
    main()
