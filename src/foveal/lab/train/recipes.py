"""Recipes: functions without arguments that return a whole `TrainingConfig`, for the command line to override.

Your own recipe is such a function in your own file: `foveal train path/to/file.py:function`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from foveal.lab.command_line import read_arguments
from foveal.lab.config_file import arguments_of, take_config
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.settings import (
    Annealing,
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    LoraSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    SparsitySettings,
    WanArchitecture,
)
from foveal.methods.base import Config
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla2.config import SLA2Config
from foveal.methods.vsa.config import VSAConfig
from foveal.models.shipped import TINY

WAN_1_3B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
WAN_14B = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
MINIMAX_H3 = "MiniMaxAI/MiniMax-H3"
# Routers start at the identity, so their steps are of a size of their own: that of the runs in docs/evidence.md.
ROUTER_LEARNING_RATE = 3e-3


def tiny() -> TrainingConfig:
    """A small random Wan with SLA on a sample clip: a few minutes on a CPU, nothing to download."""
    return TrainingConfig(
        model=ModelSettings(
            architecture=WanArchitecture(
                num_layers=2, num_heads=2, head_dim=32, ffn_dim=128, patch=4, channels=3, text_dim=16, freq_dim=64
            ),
            gradient_checkpointing=False,
        ),
        sparsity=SparsitySettings(SLAConfig(keep_ratio=0.2, drop_ratio=0.1, block_q=32, block_k=32)),
        data=DataSettings(
            clip="bigbuckbunny", height=32, width=56, frames=6, held_out=2, caption_dropout=0.0, workers=0
        ),
        output=Path("foveal-tiny"),
        steps=60,
        batch_size=2,
        objective=ObjectiveSettings(shift=2.0),
        optimizer=OptimizerSettings(learning_rate=2e-3, new_learning_rate=1e-2, warmup=6, decay=True, ema_decay=0.95),
        evaluation=EvaluationSettings(every=20, sampling_steps=8),
        checkpoint=CheckpointSettings(every=10, keep=2),
        precision="no",
        device="cpu",
    )


def wan_1_3b_sla() -> TrainingConfig:
    """Wan2.1-1.3B to SLA: the paper's 2,000 steps of batch 64 (arXiv 2509.24006)."""
    return TrainingConfig(
        model=ModelSettings(WAN_1_3B),
        sparsity=SparsitySettings(SLAConfig(keep_ratio=0.05, drop_ratio=0.10)),
        data=DataSettings(),
        output=Path("wan-1.3b-sla"),
        optimizer=OptimizerSettings(learning_rate=1e-5, new_learning_rate=2e-4, ema_decay=0.99),
        evaluation=EvaluationSettings(sample_every=500),
    )


def wan_1_3b_sla2() -> TrainingConfig:
    """Wan2.1-1.3B to SLA2: the paper's 500 steps (arXiv 2602.12675), router and weights in one run."""
    return wan_1_3b_sla().replace(
        sparsity=SparsitySettings(SLA2Config(keep_ratio=0.05)), output=Path("wan-1.3b-sla2"), steps=500
    )


def wan_1_3b_router() -> TrainingConfig:
    """Wan2.1-1.3B to exact blocks that a router in each head learns to choose, without a linear branch."""
    attention = SLA2Config(keep_ratio=0.05, linear_scope="none", router="per_head", token_order="tile")
    base = wan_1_3b_sla2()
    return base.replace(
        sparsity=SparsitySettings(attention),
        output=Path("wan-1.3b-router"),
        optimizer=dataclasses.replace(base.optimizer, router_learning_rate=ROUTER_LEARNING_RATE),
    )


def wan_14b_sla() -> TrainingConfig:
    """Wan2.1-14B to SLA, sharded over the devices of `torchrun`."""
    return wan_1_3b_sla().replace(model=ModelSettings(WAN_14B), output=Path("wan-14b-sla"), parallel="fsdp")


def wan_1_3b_vsa() -> TrainingConfig:
    """Wan2.1-1.3B to VSA: dense at first, then fewer cubes every 50 steps down to 32 (arXiv 2505.13389).

    At 480p and 81 frames there are 624 cubes, and 3% of them are removed at a time.
    """
    return TrainingConfig(
        model=ModelSettings(WAN_1_3B),
        sparsity=SparsitySettings(
            VSAConfig(topk=32), annealing=Annealing(start=606, decrement=18, dense_steps=50, every=50)
        ),
        data=DataSettings(),
        output=Path("wan-1.3b-vsa"),
        steps=4000,
        optimizer=OptimizerSettings(learning_rate=1e-5, new_learning_rate=2e-4, ema_decay=0.99),
        evaluation=EvaluationSettings(sample_every=500),
    )


def wan_1_3b_vsa_router() -> TrainingConfig:
    """Wan2.1-1.3B to VSA, whose cubes a router in each head learns to choose; annealed as `wan_1_3b_vsa` is."""
    base = wan_1_3b_vsa()
    attention = base.sparsity.attention.replace(router="per_head")
    return base.replace(
        sparsity=dataclasses.replace(base.sparsity, attention=attention),
        output=Path("wan-1.3b-vsa-router"),
        optimizer=dataclasses.replace(base.optimizer, router_learning_rate=ROUTER_LEARNING_RATE),
    )


def wan_14b_vsa() -> TrainingConfig:
    """Wan2.1-14B to VSA, annealed in the same way, sharded over the devices of `torchrun`."""
    return wan_1_3b_vsa().replace(model=ModelSettings(WAN_14B), output=Path("wan-14b-vsa"), parallel="fsdp")


def wan_1_3b_lora() -> TrainingConfig:
    """Wan2.1-1.3B to SLA with frozen weights: trains LoRA and the projections, with the dense model as teacher."""
    return TrainingConfig(
        model=ModelSettings(WAN_1_3B, frozen_dtype="bfloat16"),
        sparsity=SparsitySettings(SLAConfig(keep_ratio=0.10, drop_ratio=0.10)),
        data=DataSettings(),
        output=Path("wan-1.3b-lora"),
        batch_size=16,
        objective=ObjectiveSettings(flow_matching=0.5, distillation=0.5, teacher="same"),
        optimizer=OptimizerSettings(trainable="lora", learning_rate=1e-4, new_learning_rate=1e-3, ema_decay=0.99),
        evaluation=EvaluationSettings(sample_every=500),
    )


def _minimax_h3(output: str, attention: Config, optimizer: OptimizerSettings) -> TrainingConfig:
    """Only the dense model teaches: the weights are distilled for guidance, which plain flow matching would undo."""
    return TrainingConfig(
        model=ModelSettings(MINIMAX_H3, frozen_dtype="bfloat16"),
        sparsity=SparsitySettings(attention),
        data=DataSettings(caption_dropout=0.0),
        output=Path(output),
        batch_size=16,
        objective=ObjectiveSettings(flow_matching=0.0, distillation=1.0, teacher="same"),
        optimizer=optimizer,
    )


def minimax_h3_vsa() -> TrainingConfig:
    """MiniMax-H3 to VSA, video and sound: trains LoRA and the gates, with the dense model as teacher.

    The gates have 1.9 billion parameters. They and their optimizer take 31 GB.
    """
    settings = OptimizerSettings(trainable="lora", learning_rate=1e-4, new_learning_rate=1e-4)
    return _minimax_h3("minimax-h3-vsa", VSAConfig(keep_ratio=0.1), settings)


def minimax_h3_vsa_router() -> TrainingConfig:
    """MiniMax-H3 to VSA, whose cubes a router in each head learns to choose: trains LoRA, gates, and routers."""
    rates = {"learning_rate": 1e-4, "new_learning_rate": 1e-4, "router_learning_rate": ROUTER_LEARNING_RATE}
    settings = OptimizerSettings(trainable="lora", **rates)
    return _minimax_h3("minimax-h3-vsa-router", VSAConfig(keep_ratio=0.1, router="per_head"), settings)


def minimax_h3_sla() -> TrainingConfig:
    """MiniMax-H3 to SLA, video and sound: trains LoRA and the projections, with the dense model as teacher."""
    settings = OptimizerSettings(trainable="lora", learning_rate=1e-4, new_learning_rate=1e-3, ema_decay=0.99)
    return _minimax_h3("minimax-h3-sla", SLAConfig(keep_ratio=0.05, drop_ratio=0.10), settings)


def minimax_h3_router() -> TrainingConfig:
    """MiniMax-H3 to exact blocks that a router in each head learns to choose: trains LoRA and the routers."""
    rates = {"learning_rate": 1e-4, "router_learning_rate": ROUTER_LEARNING_RATE}
    settings = OptimizerSettings(trainable="lora", **rates, ema_decay=0.99)
    attention = SLA2Config(keep_ratio=0.05, linear_scope="none", router="per_head")
    return _minimax_h3("minimax-h3-router", attention, settings)


def _tiny_adapter(name: str, attention: Config) -> TrainingConfig:
    """LoRA and the new parameters, on a few thousand clips: the recipe of the adapters that come with foveal."""
    return TrainingConfig(
        model=ModelSettings(TINY, gradient_checkpointing=False),
        sparsity=SparsitySettings(attention),
        data=DataSettings(held_out=16),
        output=Path(name),
        steps=400,
        batch_size=32,
        micro_batch_size=32,
        objective=ObjectiveSettings(flow_matching=0.5, distillation=0.5, teacher="same", first_frame=0.6),
        optimizer=OptimizerSettings(
            trainable="lora", learning_rate=1e-3, new_learning_rate=3e-3, warmup=20, decay=True, ema_decay=0.98
        ),
        lora=LoraSettings(rank=16, alpha=16),
        checkpoint=CheckpointSettings(every=400, keep=1),
        tracker="none",
    )


def tiny_sla() -> TrainingConfig:
    """The model that comes with foveal to SLA, 10% of the key blocks read exactly, by LoRA."""
    return _tiny_adapter("tiny-sla", SLAConfig(keep_ratio=0.1, drop_ratio=0.1, token_order="tile"))


def tiny_sla2() -> TrainingConfig:
    """The model that comes with foveal to SLA2, 10% of the key blocks read exactly, by LoRA."""
    return _tiny_adapter("tiny-sla2", SLA2Config(keep_ratio=0.1, block_q=64, token_order="tile"))


def tiny_router() -> TrainingConfig:
    """The model that comes with foveal to 10% of the key blocks, which a router in each head learns to choose."""
    attention = SLA2Config(keep_ratio=0.1, block_q=64, linear_scope="none", router="per_head", token_order="tile")
    return _tiny_adapter("tiny-router", attention)


def tiny_vsa() -> TrainingConfig:
    """The model that comes with foveal to VSA, 12.5% of the cubes read exactly, by LoRA."""
    return _tiny_adapter("tiny-vsa", VSAConfig(keep_ratio=0.125))


def tiny_vsa_router() -> TrainingConfig:
    """The model that comes with foveal to VSA, whose cubes a router in each head learns to choose, by LoRA."""
    return _tiny_adapter("tiny-vsa-router", VSAConfig(keep_ratio=0.125, router="per_head"))


def _from_scratch(output: str) -> TrainingConfig:
    """A Wan of about 0.4B parameters with random weights, dense."""
    return TrainingConfig(
        model=ModelSettings(architecture=WanArchitecture(num_layers=24, num_heads=8, ffn_dim=4096)),
        sparsity=SparsitySettings(),
        data=DataSettings(),
        output=Path(output),
        steps=100_000,
        batch_size=256,
        micro_batch_size=4,
        objective=ObjectiveSettings(shift=3.0),
        optimizer=OptimizerSettings(learning_rate=2e-4, warmup=2000, decay=True, weight_decay=0.1, ema_decay=0.9999),
        evaluation=EvaluationSettings(every=1000, sample_every=5000),
        checkpoint=CheckpointSettings(every=1000),
    )


def scratch_sla() -> TrainingConfig:
    """A Wan of about 0.4B parameters from random weights, SLA from the first step."""
    return _from_scratch("scratch-sla").replace(sparsity=SparsitySettings(SLAConfig(keep_ratio=0.05, drop_ratio=0.10)))


def scratch_vsa() -> TrainingConfig:
    """The same with VSA, both gates learned, 87.5% sparse (arXiv 2505.13389)."""
    return _from_scratch("scratch-vsa").replace(sparsity=SparsitySettings(VSAConfig(keep_ratio=0.125, fine_gate=True)))


RECIPES: dict[str, Callable[[], TrainingConfig]] = {
    "tiny": tiny,
    "tiny-sla": tiny_sla,
    "tiny-sla2": tiny_sla2,
    "tiny-router": tiny_router,
    "tiny-vsa": tiny_vsa,
    "tiny-vsa-router": tiny_vsa_router,
    "wan-1.3b-sla": wan_1_3b_sla,
    "wan-1.3b-sla2": wan_1_3b_sla2,
    "wan-1.3b-router": wan_1_3b_router,
    "wan-14b-sla": wan_14b_sla,
    "wan-1.3b-vsa": wan_1_3b_vsa,
    "wan-1.3b-vsa-router": wan_1_3b_vsa_router,
    "wan-14b-vsa": wan_14b_vsa,
    "wan-1.3b-lora": wan_1_3b_lora,
    "minimax-h3-vsa": minimax_h3_vsa,
    "minimax-h3-vsa-router": minimax_h3_vsa_router,
    "minimax-h3-sla": minimax_h3_sla,
    "minimax-h3-router": minimax_h3_router,
    "scratch-sla": scratch_sla,
    "scratch-vsa": scratch_vsa,
}


def find_recipe(name: str) -> Callable[[], TrainingConfig]:
    """A recipe by name, or by file and function: "path/to/file.py:function".

    Raises:
        ValueError: the name is not in the table, or the file does not have the function.
        FileNotFoundError: the file does not exist.
    """
    path, separator, function = name.rpartition(":")
    if not separator:
        if name not in RECIPES:
            raise ValueError(f"unknown recipe {name!r}; expected one of {tuple(RECIPES)}, or path/to/file.py:function")
        return RECIPES[name]
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such recipe file: {path}")
    spec = importlib.util.spec_from_file_location(f"foveal_recipes_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    recipe = getattr(module, function, None)
    if not callable(recipe):
        raise ValueError(f"{path} has no function {function!r}")
    return recipe


def usage() -> str:
    """What `foveal train --help` prints."""
    width = max(map(len, RECIPES))
    return "\n".join(
        [
            "usage: foveal train RECIPE [--config FILE] [OPTIONS]",
            "",
            "Train or fine-tune. RECIPE is path/to/file.py:function, or one of",
            "",
            *(f"  {name.ljust(width)}  {recipe.__doc__.splitlines()[0]}" for name, recipe in RECIPES.items()),
            "",
            "`foveal train RECIPE --help` lists the recipe's settings, each of which is an option.",
            "FILE is TOML, YAML, or JSON with settings by the same names, and may name the recipe too, as recipe.",
            "Options on the command line win.",
        ]
    )


def parse(arguments: list[str]) -> TrainingConfig:
    """Parse the arguments of `foveal train`: a recipe, a config file, and settings that override both.

    Raises:
        SystemExit: with status 0, after --help.
        TypeError, ValueError, FileNotFoundError: the recipe cannot be found, a setting does not exist or has a wrong
            value, or settings contradict each other.
    """
    import tyro

    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    entries, arguments, file = take_config(arguments)
    in_file = entries.pop("recipe", None)
    if arguments and not arguments[0].startswith("-"):
        first, *arguments = arguments
    elif in_file is not None:
        first = str(in_file)
    else:
        raise ValueError(f"name a recipe, one of {tuple(RECIPES)}, on the command line or as recipe in the config file")
    recipe = find_recipe(first)
    config = recipe()
    if not isinstance(config, TrainingConfig):
        raise TypeError(f"recipe {first} must return a TrainingConfig, got {type(config).__name__}")
    return read_arguments(
        TrainingConfig,
        [*arguments_of(entries, file, config), *arguments],
        prog=f"foveal train {first}",
        description=recipe.__doc__,
        default=config,
        config=(tyro.conf.AvoidSubcommands,),
    )
