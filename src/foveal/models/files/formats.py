"""The only table of other projects' checkpoint formats: the names of their sparse weights, and what they mean.

A format fixes where the parameters of the sparse attention are, how the rest of the model is named, and the
configuration that the released weights were trained with. Most of that configuration is in no file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from foveal.checks import check_choice
from foveal.methods.base import Config
from foveal.methods.sla.config import SLAConfig
from foveal.methods.vsa.config import VSAConfig
from foveal.models.files.contracts import FILE, V1, forwards_in_diffusers, how_to_run

# Prefixes that other tools put before every name of a state dict.
PREFIXES = ("net.", "model.diffusion_model.", "diffusion_model.", "module.", "base_model.model.")
PREFIXES += ("model.velocity_model.", "model.")
_BASE_WEIGHT = re.compile(r"(transformer_)?blocks\.\d+\.(self_attn|attn1|attn)\.")


@dataclass(frozen=True)
class CheckpointFormat:
    """One checkpoint format.

    Args:
        name: the name that users give.
        families: the model families that it is for, as in the table of families.
        source: who writes it, to display.
        config_for: the model's hidden width to the configuration that the released weights were trained with.
        fixed: fields of it that the format implies. The others are run-time settings of the project.
        sparse_keys: parameter of the method's module to its name in the file, with {index} for the layer.
        layout: how the rest of the model is named: "wan" and "ltx2" (their repositories), "diffusers", or
            "minimax_h3" (its repository: `h3_names` translates a whole file, so `sparse_keys` are diffusers' names).
        flat_patches: patches are embedded by a linear layer: [C, channels * t * h * w] where diffusers has the
            convolution's [C, channels, t, h, w].
        lora: the file holds low-rank updates of the base weights instead of weights.
        updates: it holds FastVideo's updates of them, and the gates, under `sparse_keys` of another ending.
        plain: it holds only base weights, and nothing tells that they were made for sparse attention.
        shared: it holds one set of parameters for the layers of each head size, which stands in the place of {index}.
        contract: whether a `fastvideo_inference.json` beside the file may say the configuration.
        notes: what a pipeline needs to know to run the released weights, for the report, unless a contract says it.
    """

    name: str
    families: tuple[str, ...]
    source: str
    config_for: Callable[[int], Config]
    fixed: tuple[str, ...]
    sparse_keys: dict[str, str]
    layout: str
    flat_patches: bool = False
    lora: bool = False
    updates: bool = False
    plain: bool = False
    shared: bool = False
    contract: bool = False
    notes: tuple[str, ...] = ()

    def matches(self, names: Iterable[str]) -> bool:
        """Whether a file with these names has this format."""
        if self.lora:
            return any(".lora_" in name for name in names)
        if self.plain:
            return any(_BASE_WEIGHT.match(name) for name in names)
        patterns = [re.compile(re.escape(key).replace(r"\{index\}", r"\d+")) for key in self.sparse_keys.values()]
        return any(pattern.fullmatch(name) for name in names for pattern in patterns)


# Trained with 64x64 blocks over all keys (arXiv 2512.16093); top-k 0.1 is what its scripts run by default.
_TURBODIFFUSION = SLAConfig(keep_ratio=0.1, drop_ratio=0.0, block_q=64, block_k=64, linear_scope="all")
_TURBODIFFUSION_FIXED = ("feature_map", "linear_scope", "projection", "token_order")
# Wan's widths: 1536 is 1.3B, run at VSA sparsity 0.8; 5120 is 14B, run at 0.9.
_FASTVIDEO_KEEP = {1536: 0.2, 5120: 0.1}
# SimpleTuner's defaults; the file says what a run had.
_SIMPLETUNER = SLAConfig(keep_ratio=0.2, drop_ratio=0.0, block_q=64, block_k=64, linear_scope="all")
_FASTH3 = VSAConfig(keep_ratio=0.1, tile=(4, 4, 4))
_FASTH3_NOTES = (f"taken for FastH3 v1, since no {FILE} is beside it", *how_to_run(V1))
_TURBODIFFUSION_NOTES = ("distilled to 1 to 4 forwards of a sampler of its own (rCM), which sets the noise levels",)

FORMATS = {
    made.name: made
    for made in (
        CheckpointFormat(
            name="turbodiffusion-sla",
            families=("wan",),
            source="TurboDiffusion",
            config_for=lambda width: _TURBODIFFUSION,
            fixed=_TURBODIFFUSION_FIXED,
            sparse_keys={
                f"proj.{part}": f"blocks.{{index}}.self_attn.attn_op.local_attn.proj_l.{part}"
                for part in ("weight", "bias")
            },
            layout="wan",
            flat_patches=True,
            notes=_TURBODIFFUSION_NOTES,
        ),
        CheckpointFormat(
            name="turbodiffusion-sla-diffusers",
            families=("wan",),
            source="TurboDiffusion, converted to diffusers' names",
            config_for=lambda width: _TURBODIFFUSION,
            fixed=_TURBODIFFUSION_FIXED,
            sparse_keys={
                f"proj.{part}": f"blocks.{{index}}.attn1.attn_op.local_attn.proj_l.{part}"
                for part in ("weight", "bias")
            },
            layout="diffusers",
            notes=_TURBODIFFUSION_NOTES,
        ),
        CheckpointFormat(
            name="fastvideo-vsa",
            families=("wan",),
            source="FastVideo",
            config_for=lambda width: VSAConfig(keep_ratio=_FASTVIDEO_KEEP.get(width, 0.2), tile=(4, 4, 4)),
            fixed=("tile", "coarse", "fine_gate"),
            sparse_keys={
                f"to_gate_coarse.{part}": f"blocks.{{index}}.to_gate_compress.{part}" for part in ("weight", "bias")
            },
            layout="diffusers",
            notes=(
                "FastWan is distilled to 3 forwards at timesteps 1000, 757, 522",
                "shift of FastWan's schedule: 8 (Wan 2.1), 5 (Wan 2.2 5B)",
            ),
        ),
        # FastH3 for MiniMax-H3: v1 at 90% sparsity, the 8-step V2 at 80%, which its contract says.
        CheckpointFormat(
            name="fasth3-vsa",
            families=("minimax_h3",),
            source="FastVideo (FastH3)",
            config_for=lambda width: _FASTH3,
            fixed=("coarse", "fine_gate"),
            sparse_keys={"to_gate_coarse.weight": "transformer_blocks.{index}.attn.to_gate_compress.weight"},
            layout="diffusers",
            contract=True,
            notes=_FASTH3_NOTES,
        ),
        # The same under the names of MiniMax-H3's repository, which ComfyUI reads.
        CheckpointFormat(
            name="fasth3-vsa-comfyui",
            families=("minimax_h3",),
            source="FastVideo (FastH3), for ComfyUI",
            config_for=lambda width: _FASTH3,
            fixed=("coarse", "fine_gate"),
            sparse_keys={"to_gate_coarse.weight": "transformer_blocks.{index}.attn.to_gate_compress.weight"},
            layout="minimax_h3",
            contract=True,
            notes=_FASTH3_NOTES,
        ),
        CheckpointFormat(
            name="fasth3-vsa-adapter",
            families=("minimax_h3",),
            source="FastVideo (FastH3), as an adapter",
            config_for=lambda width: _FASTH3,
            fixed=("coarse", "fine_gate"),
            sparse_keys={"to_gate_coarse.weight": "transformer_blocks.{index}.attn.to_gate_compress.set_weight"},
            layout="diffusers",
            updates=True,
            contract=True,
            notes=_FASTH3_NOTES,
        ),
        # Distilled at 85% sparsity, run as plain block-sparse: the files have no projection, and none is applied.
        CheckpointFormat(
            name="lightx2v-sla-lora",
            families=("wan",),
            source="LightX2V",
            config_for=lambda width: SLAConfig(keep_ratio=0.15, drop_ratio=0.0, linear_scope="none", projection=False),
            fixed=("linear_scope", "token_order"),
            sparse_keys={},
            layout="wan",
            lora=True,
        ),
        # Turbo-SLA for MiniMax-H3: the same, its blocks and its schedule as LightX2V's settings for the file have them.
        CheckpointFormat(
            name="lightx2v-h3-sla-lora",
            families=("minimax_h3",),
            source="LightX2V (Turbo-SLA)",
            config_for=lambda width: SLAConfig(
                keep_ratio=0.15, drop_ratio=0.0, block_q=128, block_k=64, linear_scope="none", projection=False
            ),
            fixed=("linear_scope", "token_order"),
            sparse_keys={},
            layout="diffusers",
            lora=True,
            notes=(
                "distilled to 4 forwards, without guidance",
                forwards_in_diffusers(4),
                "shift of the schedule: 6 (video), 3 (audio)",
            ),
        ),
        # For families whose self-attention is the video's only: where text joins it, SimpleTuner does not protect it.
        CheckpointFormat(
            name="simpletuner-sla",
            families=("wan", "wan_vace", "wan_animate", "ltx_video", "ltx2"),
            source="SimpleTuner",
            config_for=lambda width: _SIMPLETUNER,
            fixed=("feature_map", "linear_scope", "projection", "token_order"),
            sparse_keys={f"proj.{part}": f"{{index}}.proj_l.{part}" for part in ("weight", "bias")},
            layout="diffusers",
            shared=True,
            notes=("SimpleTuner's SLA also takes in cross-attention without a mask, which is dense here",),
        ),
        # Its projection of the linear branch is zero, and skipped.
        CheckpointFormat(
            name="turbot2av-sla",
            families=("ltx2",),
            source="TurboT2AV",
            config_for=lambda width: SLAConfig(
                keep_ratio=0.3, drop_ratio=0.0, block_q=128, block_k=64, linear_scope="none", projection=False
            ),
            fixed=("linear_scope", "token_order"),
            sparse_keys={},
            layout="ltx2",
            plain=True,
            notes=(
                "distilled to 4 forwards, without guidance",
                "TurboT2AV also makes the audio's self-attention sparse, which is dense here",
            ),
        ),
    )
}


def format_named(name: str) -> CheckpointFormat:
    """The format with this name.

    Raises:
        ValueError: the name is unknown.
    """
    check_choice("format", name, tuple(FORMATS))
    return FORMATS[name]


def recognized(names: Iterable[str], source: str) -> CheckpointFormat:
    """The first format of a file with these names, without prefixes.

    Raises:
        ValueError: the file has no format in the table; the message says what it looks like instead.
    """
    names = list(names)
    for known in FORMATS.values():
        if not (known.lora or known.plain) and known.matches(names):
            return known
    valid = ", ".join(FORMATS)
    lora = [known.name for known in FORMATS.values() if known.lora]
    if any(".lora_" in name for name in names):
        raise ValueError(
            f"{source} is a LoRA, and nothing in one says that it was trained with sparse attention; if it was, give "
            f"format={' or '.join(map(repr, lora))}, else load it with diffusers"
        )
    if any(map(_BASE_WEIGHT.match, names)):
        plain = " or ".join(repr(known.name) for known in FORMATS.values() if known.plain)
        raise ValueError(
            f"{source} is a dense checkpoint: it has no parameters of a sparse attention ({valid}); load it with "
            f"diffusers, then call sparsify; or give format={plain} if it is such a file"
        )
    raise ValueError(f"{source} is of no known format; expected one of {valid}")


def without_prefix(names: Iterable[str]) -> dict[str, str]:
    """Names without a known prefix that they all share, mapped to the names as they are."""
    names = list(names)
    for prefix in PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return {name.removeprefix(prefix): name for name in names}
    return {name: name for name in names}


def to_diffusers(names: Iterable[str], layout: str) -> dict[str, str]:
    """Base weights' names in diffusers to their names in a file of this layout.

    Raises:
        ValueError: a Wan-Animate file, whose tensors have to be cut as well as renamed.
    """
    names = list(names)
    # Both conversions rename keys and do not touch values, so the old names can stand in for the tensors.
    if layout == "ltx2":
        from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers

        return convert_ltx2_transformer_to_diffusers({name: name for name in names})
    if layout != "wan":
        return {name: name for name in names}
    if any(name.startswith(("motion_encoder.", "face_adapter.")) for name in names):
        raise ValueError("the file is for Wan-Animate, which is not supported")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return convert_wan_transformer_to_diffusers({name: name for name in names})


def from_diffusers(names: Iterable[str], layout: str, num_layers: int) -> dict[str, str]:
    """Base weights' names in diffusers to their names in a file of this layout: `to_diffusers` for writing.

    The Wan repository's names are listed, converted by diffusers, and looked up, so there is only one conversion.

    Raises:
        ValueError: the layout has no names for some of them.
    """
    names = list(names)
    if layout != "wan":
        return {name: name for name in names}
    known = to_diffusers(wan_names(num_layers), layout)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the Wan repository has no names for {', '.join(unknown[:5])}")
    return {name: known[name] for name in names}


def wan_names(num_layers: int) -> list[str]:
    """Every name that a Wan 2.1 or 2.2 transformer can have in the Wan repository."""
    attention = ("q", "k", "v", "o", "norm_q", "norm_k", "k_img", "v_img", "norm_k_img")
    modules = [f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in attention]
    modules += ["norm3", "ffn.0", "ffn.2"]
    outside = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    outside += ["time_projection.1", "head.head", *(f"img_emb.proj.{index}" for index in (0, 1, 3, 4))]
    blocks = [f"blocks.{index}" for index in range(num_layers)]
    owners = outside + [f"{block}.{module}" for block in blocks for module in modules]
    tables = ["head.modulation", *(f"{block}.modulation" for block in blocks)]
    return [f"{owner}.{part}" for owner in owners for part in ("weight", "bias")] + tables
