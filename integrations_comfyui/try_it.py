"""Run an example workflow in ComfyUI without its server, on the CPU, with a tiny random Wan model.

    python ComfyUI/custom_nodes/foveal/try_it.py

It prints what ran sparse and why the rest did not, and writes the map of the kept blocks. ComfyUI's own node loader and
executor run the workflow's own nodes. Only what would need weights is replaced: the files of the model, the text
encoder (random embeddings), and the decoder.
"""

import argparse
import asyncio
import importlib
import json
import logging
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import foveal
from foveal.models.files.formats import to_diffusers

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE / "example_workflows" / "wan_training_free.json"
# In the place of a model file: by a word in the name of its file, else the last.
FILES = {"Turbo": "tiny_turbowan.pth", "FastWan": "tiny_fastwan.safetensors", "": "tiny_wan.safetensors"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CHANGE_AFTER_RUN = {"seed", "noise_seed"}  # the page adds a widget after these
# Frames, height, and width in pixels, and steps: small enough for two CPU cores.
SMALL = {"length": 17, "height": 192, "width": 192, "steps": 3, "min_tokens": 0}
TEXT_ENCODER = {"CLIPTextEncode"}
# What reads a decoded video, and what only serves the nodes that are replaced.
LEFT_OUT = {"CLIPLoader", "VAELoader", "VAEDecode", "CreateVideo", "SaveVideo"}


class RandomConditioning:
    """Stands in for the text encoder."""

    FUNCTION = "draw"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def draw(self, seed):
        return ([[torch.randn(1, 8, 4096, generator=torch.Generator().manual_seed(seed)), {}]],)


class Server:
    """What ComfyUI's executor needs of a server."""

    client_id = last_node_id = None

    def send_sync(self, event, data, client_id=None):
        if event == "execution_error":
            raise RuntimeError(f"{data['node_type']}: {data['exception_message']}")


class Host:
    """ComfyUI in this process, without its server.

    Args:
        root: ComfyUI's folder; None if it can be imported already.
        workspace: a folder for models and outputs.
    """

    def __init__(self, root, workspace):
        if root is not None:
            sys.path.insert(0, str(root))
            # First: later ComfyUI has a folder on the path in which `utils` is something else.
            importlib.import_module("utils.install_util")
        from comfy.cli_args import args

        args.cpu = True
        args.base_directory = str(workspace)
        self.models = Path(workspace) / "models" / "diffusion_models"
        self.models.mkdir(parents=True, exist_ok=True)
        import execution
        import nodes

        self.nodes, self.execution = nodes, execution
        asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        if not asyncio.run(nodes.load_custom_node(str(HERE))):
            raise RuntimeError(f"ComfyUI did not load {HERE}")
        nodes.NODE_CLASS_MAPPINGS["RandomConditioning"] = RandomConditioning
        self.executor = execution.PromptExecutor(Server())
        self.executor.cache_args = {"ram": 0.0}  # what later versions read as they run, and their server sets

    def run(self, prompt):
        """Executes a prompt, {id: {"class_type", "inputs"}}; returns the values of each node by id.

        Raises:
            ValueError: ComfyUI finds the prompt invalid.
            RuntimeError: a node failed.
        """
        valid, error, outputs, details = asyncio.run(self.execution.validate_prompt("try", prompt, None))
        if not valid:
            raise ValueError(f"{error}; {details}")
        self.executor.execute(prompt, "try", {}, outputs)
        if not self.executor.success:
            raise RuntimeError(self.executor.status_messages[-1])
        cached = {name: self.executor.caches.outputs.get(name) for name in prompt}
        # Newer versions of ComfyUI put an object around the list of slots.
        slots = {name: getattr(value, "outputs", value) for name, value in cached.items() if value is not None}
        return {name: [slot[0] for slot in outputs] for name, outputs in slots.items()}

    def prompt_of(self, workflow):
        """A workflow as the page saves it, as the prompt that the page would send."""
        links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
        prompt = {}
        for node in workflow["nodes"]:
            if node["type"] == "MarkdownNote":
                continue
            types = self.nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
            linked = {slot["name"]: slot["link"] for slot in node.get("inputs", []) if slot.get("link") is not None}
            values, inputs = iter(node.get("widgets_values", [])), {}
            for name, (kind, *_) in (types.get("required", {}) | types.get("optional", {})).items():
                if isinstance(kind, list) or kind in WIDGETS:
                    inputs[name] = next(values)
                    if name in CHANGE_AFTER_RUN:
                        next(values)
                if name in linked:
                    inputs[name] = list(links[linked[name]])
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        return prompt

    def small(self, prompt):
        """The prompt for tiny models and a small video, without what needs a text encoder or a decoder.

        The files of the models are written.
        """
        kept = {}
        for name, node in prompt.items():
            kind, inputs = node["class_type"], dict(node["inputs"])
            if kind in LEFT_OUT:
                continue
            if kind in TEXT_ENCODER:
                kept[name] = {"class_type": "RandomConditioning", "inputs": {"seed": int(name)}}
                continue
            inputs |= {key: value for key, value in SMALL.items() if key in inputs}
            for key in {"unet_name", "file"} & inputs.keys():
                inputs[key] = self.tiny_file(inputs[key])
            if kind == "FovealLoadTrained":
                self.tiny_export(inputs["folder"])
            kept[name] = {"class_type": kind, "inputs": inputs}
        return kept

    def tiny_file(self, name):
        """The name of the file of a tiny model of the same format as one of this name."""
        word = next(word for word in FILES if word in name)
        target = self.models / FILES[word]
        if not target.exists():
            weights = tiny_wan()
            if word:
                weights = tiny_turbowan(weights) if word == "Turbo" else tiny_fastwan(weights)
            torch.save(weights, target) if target.suffix == ".pth" else save_file(weights, target)
        return target.name

    def tiny_export(self, name):
        """Writes what `foveal.save` does for a tiny model that was trained with VSA and routers."""
        from diffusers import WanTransformer3DModel

        target = self.models.parent / "foveal" / name
        if target.exists():
            return
        depth, width = depth_of(weights := tiny_wan()), weights["head.modulation"].shape[-1]
        sizes = {"num_attention_heads": width // 128, "num_layers": depth, "ffn_dim": 256}
        model = foveal.sparsify(WanTransformer3DModel(**sizes, attention_head_dim=128))
        generator = torch.Generator().manual_seed(2)
        for parameter in foveal.sparse_parameters(model).values():
            parameter.data += torch.randn(parameter.shape, generator=generator) / 16
        foveal.save(model, target)


def tiny_wan(layers=3, heads=2, seed=0):
    """The random weights of a Wan model with a head dimension of 128, by the names of the Wan repository."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    sizes = {"dim": 128 * heads, "num_heads": heads, "ffn_dim": 256, "num_layers": layers}
    model = WanModel(**sizes, device="cpu", dtype=torch.float32, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in model.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        gain = name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight"))
        weights[name] = 1 + 0.1 * drawn if gain else drawn / max(1, value[0].numel()) ** 0.5
    return weights


def tiny_turbowan(weights, seed=1):
    """The same with the projections of SLA, as TurboDiffusion's files have both."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"weight": (128, 128), "bias": (128,)}
    projections = {
        f"blocks.{index}.self_attn.attn_op.local_attn.proj_l.{part}": torch.randn(size, generator=generator) / 16
        for index in range(depth_of(weights))
        for part, size in sizes.items()
    }
    return weights | {"patch_embedding.weight": weights["patch_embedding.weight"].flatten(1)} | projections


def tiny_fastwan(weights, seed=1):
    """The same with the gates of VSA, as FastVideo's files have both: by diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    width = weights["head.modulation"].shape[-1]
    gates = {
        f"blocks.{index}.to_gate_compress.{part}": torch.randn(size, generator=generator) / width**0.5
        for index in range(depth_of(weights))
        for part, size in {"weight": (width, width), "bias": (width,)}.items()
    }
    return {name: weights[stored] for name, stored in to_diffusers(list(weights), "wan").items()} | gates


def depth_of(weights):
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=HERE.parent.parent, help="ComfyUI's folder")
    parser.add_argument("--workflow", type=Path, default=EXAMPLE)
    parser.add_argument("--out", type=Path, default=Path("foveal-comfyui"), help="a folder for what it writes")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # ComfyUI warns of each of its own nodes that lacks a package
    host = Host(options.comfyui, options.out.resolve())
    prompt = host.small(host.prompt_of(json.loads(options.workflow.read_text())))
    results = host.run(prompt)
    for name, node in prompt.items():
        if node["class_type"] == "FovealPreview":
            image, report = results[name]
            print(report)
            target = options.out / f"kept-blocks-{name}.png"
            save_image(image, target)
            print(f"wrote {target}")


def save_image(image, path):
    """One image of ComfyUI, [1, height, width, 3] from 0 to 1, to a PNG."""
    from PIL import Image

    Image.fromarray((image[0] * 255).round().to(torch.uint8).cpu().numpy()).save(path)


if __name__ == "__main__":
    main()
