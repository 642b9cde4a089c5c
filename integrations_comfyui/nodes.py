"""The nodes. They read widgets and pass values to `foveal.hosts.comfyui`, which does the work."""

from pathlib import Path

import comfy.lora
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch

from foveal import Policy, SLAConfig
from foveal.hosts.comfyui.attention import SparseAttention
from foveal.hosts.comfyui.layers import build_layers, gates_in_model, host_family, parse_ratios, write_budgets
from foveal.hosts.comfyui.preview import preview
from foveal.kernels.api import IMPLS
from foveal.lab.inspect.budgets import BudgetCalibration
from foveal.models.files.exports import EXPORTED, WEIGHTS
from foveal.models.files.parts import (
    read_base_weights,
    read_exported_lora,
    read_exported_weights,
    read_saved_parameters,
    read_sparse_parameters,
)
from foveal.models.files.persist import WEIGHTS_FILE

CATEGORY = "foveal"
FOLDER = "diffusion_models"
EXPORTS = "foveal"  # models/foveal has a folder for each model that was trained with foveal
folder_paths.add_model_folder_path(EXPORTS, str(Path(folder_paths.models_dir) / EXPORTS))
DTYPES = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def _ratio(default, tooltip, low=0.0):
    return ("FLOAT", {"default": default, "min": low, "max": 1.0, "step": 0.005, "round": 0.0001, "tooltip": tooltip})


def _blocks(default, tooltip):
    return ([64, 128], {"default": default, "tooltip": tooltip})


TOKEN_ORDER = (["raster", "tile"], {"tooltip": "Blocks are strips of a frame, or cubes of 4x4x4 tokens."})
# What every node that makes a model sparse has.
RUNNING = {
    "min_tokens": (
        "INT",
        {"default": 8192, "min": 0, "max": 1 << 20, "tooltip": "Shorter sequences run dense, which is faster there."},
    ),
    "preview_step": (
        "INT",
        {"default": 0, "min": 0, "max": 10000, "tooltip": "The preview shows the first sparse step from this one on."},
    ),
    "strict": (
        "BOOLEAN",
        {"default": False, "tooltip": "Stop if a layer falls back to dense attention that you did not ask for."},
    ),
    "impl": (
        list(IMPLS),
        {"default": "auto", "tooltip": "auto takes the fastest that supports the model; a named one never falls back."},
    ),
}
CHOICES = {
    "policy": ("FOVEAL_POLICY", {"tooltip": "Which steps and layers run dense. None: all are sparse."}),
    "budgets": ("FOVEAL_BUDGETS", {"tooltip": "keep_ratio of layers that have one of their own."}),
}


def _made_sparse(model, config=None, *, parameters=None, policy=None, budgets=None, impl="auto", **running):
    """The cloned model with foveal's attention, and that attention, whose record the preview shows."""
    diffusion_model = model.model.diffusion_model
    modules, held = build_layers(diffusion_model, config, parameters=parameters, budgets=budgets, impl=impl)
    in_model = parameters is not None and parameters.in_model
    gate = host_family(diffusion_model).gate if in_model else None
    attention = SparseAttention(modules, held, policy=policy, gate=gate, **running)
    sparse = attention.attach(model)
    if parameters is not None and not in_model:
        devices = {"load_device": model.load_device, "offload_device": model.offload_device}
        sparse.set_additional_models("foveal", [comfy.model_patcher.ModelPatcher(attention.parameters(), **devices)])
    return sparse, attention


class TrainingFree:
    """Block-sparse attention in a model that was never trained for it."""

    DESCRIPTION = "Reads only the most relevant blocks of keys, in a model as it is. No training, no extra weights."
    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "FOVEAL_RUN")
    RETURN_NAMES = ("model", "run")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "keep_ratio": _ratio(0.3, "The share of key blocks that each query block reads.", low=0.005),
                "token_order": TOKEN_ORDER,
                "block_q": _blocks(64, "Queries that share one choice of blocks."),
                "block_k": _blocks(64, "Keys of a block."),
                **RUNNING,
            },
            "optional": CHOICES,
        }

    def apply(self, model, keep_ratio, token_order, block_q, block_k, **running):
        config = SLAConfig(
            keep_ratio=keep_ratio,
            drop_ratio=0.0,
            block_q=int(block_q),
            block_k=int(block_k),
            token_order=token_order,
            linear_scope="none",
            projection=False,
        )
        return _made_sparse(model, config, **running)


class Trained:
    """Sparse attention as weights were trained for it: released ones, or those of `foveal train`."""

    DESCRIPTION = "Sparse attention as a checkpoint was trained for it: TurboWan's SLA, FastWan's VSA, or your own."
    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "FOVEAL_RUN")
    RETURN_NAMES = ("model", "run")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "parameters": ("FOVEAL_PARAMETERS",),
                "keep_ratio": _ratio(0.0, "The share of blocks or cubes to read; 0 takes what the weights come with."),
                **RUNNING,
            },
            "optional": CHOICES,
        }

    def apply(self, model, parameters, keep_ratio, **running):
        if keep_ratio != 0:
            parameters = parameters.following(keep_ratio=keep_ratio)
        return _made_sparse(model, parameters=parameters, **running)


class LoadModel:
    """A released sparse Wan checkpoint: the model, and its sparse parameters."""

    DESCRIPTION = "Loads a sparse Wan checkpoint (TurboDiffusion's, int8 included, or FastVideo's) in one go."
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "FOVEAL_PARAMETERS")
    RETURN_NAMES = ("model", "parameters")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "file": (folder_paths.get_filename_list(FOLDER),),
                "weight_dtype": (list(DTYPES), {"tooltip": "Of the model; its sparse parameters keep the file's."}),
            }
        }

    def load(self, file, weight_dtype):
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        parameters = read_sparse_parameters(path)
        dtype = DTYPES[weight_dtype]
        options = {} if dtype is None else {"dtype": dtype}
        model = comfy.sd.load_diffusion_model_state_dict(read_base_weights(path), model_options=options)
        if model is None:
            raise ValueError(f"{file} is for no model that this ComfyUI knows")
        return model, parameters


class LoadTrained:
    """What `foveal train` exported, or `foveal.save` wrote, for a model of Wan or MiniMax-H3."""

    DESCRIPTION = "Loads a model that was trained with foveal: a folder of `foveal train`'s export in models/foveal."
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "FOVEAL_PARAMETERS", "FOVEAL_POLICY")
    RETURN_NAMES = ("model", "parameters", "policy")

    @classmethod
    def INPUT_TYPES(cls):
        saved = [Path(name) for name in folder_paths.get_filename_list(EXPORTS) if Path(name).name == WEIGHTS_FILE]
        folders = {path.parent.parent if path.parent.name == EXPORTED else path.parent for path in saved}
        return {
            "required": {
                "folder": (sorted(map(str, folders)),),
                "component": (
                    ["transformer", "transformer_2"],
                    {"tooltip": "Of Wan 2.2 14B: transformer for high noise, transformer_2 for low noise."},
                ),
                "strength": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05, "tooltip": "Of its LoRA, if it has one."},
                ),
            },
            "optional": {"model": ("MODEL", {"tooltip": "The dense model, unless the export has weights of its own."})},
        }

    def load(self, folder, component, strength, model=None):
        at = Path(folder_paths.get_full_path_or_raise(EXPORTS, str(self._saved(folder)))).parent
        parameters, policy = read_saved_parameters(at, component)
        export, depth = at.parent if at.name == EXPORTED else at, len(parameters.layers)
        if model is not None and (export / WEIGHTS).is_dir():
            raise ValueError(f"{folder} has weights of its own: leave model unconnected")
        if (export / WEIGHTS).is_dir():
            model = comfy.sd.load_diffusion_model_state_dict(read_exported_weights(export, depth, parameters.family))
        lora = read_exported_lora(export, depth, parameters.family)
        if model is None:
            raise ValueError(f"{folder} has no weights of a model: connect the one that it was trained from")
        if lora is not None:
            known = comfy.lora.model_lora_keys_unet(model.model, {})
            unknown = sorted({name.rpartition(".lora_")[0] for name in lora} - known.keys())
            if unknown:
                raise ValueError(f"the model has no {unknown[0]}, which the LoRA of {folder} updates: another model?")
            model, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
        return model, parameters, policy

    @staticmethod
    def _saved(folder):
        """The file of sparse parameters in a folder, as ComfyUI lists it."""
        names = [str(Path(folder) / WEIGHTS_FILE), str(Path(folder) / EXPORTED / WEIGHTS_FILE)]
        return next(name for name in names if name in folder_paths.get_filename_list(EXPORTS))


class LoadParameters:
    """The sparse parameters of a checkpoint, for a model that is loaded by another node."""

    DESCRIPTION = "Loads only the sparse parameters of a checkpoint: SLA's projections, VSA's gates."
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("FOVEAL_PARAMETERS",)
    RETURN_NAMES = ("parameters",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": (folder_paths.get_filename_list(FOLDER),)}}

    def load(self, file):
        return (read_sparse_parameters(folder_paths.get_full_path_or_raise(FOLDER, file)),)


class ModelGates:
    """The gates that ComfyUI loaded with MiniMax-H3, in whatever form it keeps the weights."""

    DESCRIPTION = "VSA's gates as the model itself has them: FastH3, loaded by ComfyUI's own node, quantized or not."
    CATEGORY = CATEGORY
    FUNCTION = "take"
    RETURN_TYPES = ("FOVEAL_PARAMETERS",)
    RETURN_NAMES = ("parameters",)

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "The share of cubes to read, which the model does not say: FastH3 v1 has 0.1, the 8-step V2 0.2."
        return {"required": {"model": ("MODEL",), "keep_ratio": _ratio(0.1, tooltip, low=0.005)}}

    def take(self, model, keep_ratio):
        return (gates_in_model(model.model.diffusion_model, keep_ratio),)


class MakePolicy:
    """When sparse layers run dense."""

    DESCRIPTION = "Which denoising steps and layers run dense, and how much is kept by timestep."
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("FOVEAL_POLICY",)
    RETURN_NAMES = ("policy",)

    @classmethod
    def INPUT_TYPES(cls):
        steps = {"min": 0, "max": 10000}
        timestep = {"min": 0.0, "max": 1000.0, "step": 1.0}
        return {
            "required": {
                "dense_first_steps": ("INT", {"default": 1, **steps, "tooltip": "Of this model's sampler."}),
                "dense_last_steps": ("INT", {"default": 0, **steps, "tooltip": "Of this model's sampler."}),
                "dense_layers": ("STRING", {"default": "", "tooltip": "Layers by number, such as 0, 1, 29."}),
                "dense_above": ("FLOAT", {"default": 1000.0, **timestep, "tooltip": "Timesteps above it are dense."}),
                "dense_below": ("FLOAT", {"default": 0.0, **timestep, "tooltip": "Timesteps below it are dense."}),
                "keep_ratio": (
                    "STRING",
                    {"default": "", "tooltip": "By timestep, such as 0: 0.1, 800: 0.3. Takes the place of budgets."},
                ),
            }
        }

    def make(self, dense_first_steps, dense_last_steps, dense_layers, dense_above, dense_below, keep_ratio):
        layers = [part.strip() for part in dense_layers.split(",") if part.strip()]
        return (
            Policy(
                dense_first_steps=dense_first_steps,
                dense_last_steps=dense_last_steps,
                dense_layers=tuple(int(layer) if layer.isdigit() else layer for layer in layers),
                dense_above=None if dense_above >= 1000 else dense_above,
                dense_below=None if dense_below <= 0 else dense_below,
                keep_ratio=parse_ratios("keep_ratio", keep_ratio) or None,
            ),
        )


class MakeBudgets:
    """A keep_ratio for each layer, as text."""

    DESCRIPTION = (
        "How much each layer keeps, such as 0: 1, 1-28: 0.1, 29: 0.3. Layers that are not named keep the node's."
    )
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("FOVEAL_BUDGETS",)
    RETURN_NAMES = ("budgets",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"budgets": ("STRING", {"default": "", "multiline": True})}}

    def make(self, budgets):
        return (parse_ratios("budgets", budgets),)


class Calibrate:
    """The model, dense, with its layers measured while it runs."""

    DESCRIPTION = "Runs a model dense and measures how much each layer has to keep: sample with it, then read it."
    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "FOVEAL_CALIBRATION")
    RETURN_NAMES = ("model", "calibration")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "error": _ratio(0.1, "The relative error that a layer's output may have."),
                "steps": ("INT", {"default": 3, "min": 1, "max": 1000, "tooltip": "Denoising steps to measure at."}),
                "token_order": TOKEN_ORDER,
                "block_q": _blocks(64, "As you will run it."),
                "block_k": _blocks(64, "As you will run it."),
            }
        }

    def apply(self, model, error, steps, token_order, block_q, block_k):
        cut = {"block_q": int(block_q), "block_k": int(block_k), "token_order": token_order}
        calibration = BudgetCalibration(error, steps=steps, **cut)
        config = SLAConfig(linear_scope="none", projection=False, **cut)
        modules, held = build_layers(model.model.diffusion_model, config)
        return SparseAttention(modules, held, look=calibration.look).attach(model), calibration


class ReadBudgets:
    """What a calibration found."""

    DESCRIPTION = "The budgets that a calibration found, after its model was sampled."
    CATEGORY = CATEGORY
    FUNCTION = "read"
    RETURN_TYPES = ("FOVEAL_BUDGETS", "STRING")
    RETURN_NAMES = ("budgets", "text")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "calibration": ("FOVEAL_CALIBRATION",),
                "samples": ("LATENT", {"tooltip": "What the calibrated model's sampler returned, so that it ran."}),
            }
        }

    def read(self, calibration, samples):
        found = calibration.budgets()
        return dict(found), write_budgets(found)


class Preview:
    """What the latest sampling run kept, layer by layer, and what fell back."""

    DESCRIPTION = "A map of the kept blocks of each layer, and a report of what ran sparse, what did not, and why."
    CATEGORY = CATEGORY
    FUNCTION = "show"
    OUTPUT_NODE = True
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "report")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "run": ("FOVEAL_RUN",),
                "samples": ("LATENT", {"tooltip": "What the sampler of this model returned, so that it ran."}),
                "size": ("INT", {"default": 192, "min": 32, "max": 1024, "tooltip": "Pixels of a map's side."}),
            }
        }

    def show(self, run, samples, size):
        report = str(run.record)
        return {"ui": {"text": [report]}, "result": (preview(run.record, size=size), report)}


NODE_CLASS_MAPPINGS = {
    "FovealTrainingFree": TrainingFree,
    "FovealTrained": Trained,
    "FovealLoadModel": LoadModel,
    "FovealLoadTrained": LoadTrained,
    "FovealLoadParameters": LoadParameters,
    "FovealModelGates": ModelGates,
    "FovealPolicy": MakePolicy,
    "FovealBudgets": MakeBudgets,
    "FovealCalibrate": Calibrate,
    "FovealReadBudgets": ReadBudgets,
    "FovealPreview": Preview,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FovealTrainingFree": "Sparse Attention (training-free)",
    "FovealTrained": "Sparse Attention (trained)",
    "FovealLoadModel": "Load Sparse Wan Model",
    "FovealLoadTrained": "Load Trained Sparse Model",
    "FovealLoadParameters": "Load Sparse Parameters",
    "FovealModelGates": "Gates of the Model (FastH3)",
    "FovealPolicy": "Sparse Attention Policy",
    "FovealBudgets": "Sparse Attention Budgets",
    "FovealCalibrate": "Calibrate Sparse Attention",
    "FovealReadBudgets": "Budgets from Calibration",
    "FovealPreview": "Preview Kept Blocks",
}
