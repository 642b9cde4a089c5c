"""Every way to fall back is named in the report, and is an error when that is asked for."""

import dataclasses

import pytest
import torch
from test_report import ON_CPU, cuda_inputs
from tiny_media import save_tiny_wan
from tiny_training import config as training_config
from tiny_training import write_data
from tiny_wan import SPARSE_SLA, SPARSE_VSA, generate, inputs, run, tiny_pipeline, tiny_transformer

import foveal
from foveal import Policy, VSAConfig
from foveal.kernels import api, chips
from foveal.kernels.hopper import support
from foveal.lab import cli
from foveal.lab.train.trainer import run_training
from foveal.methods.sla import attention as sla
from foveal.methods.vsa import attention as vsa

TORCH = {"impl": "torch"}


@dataclasses.dataclass
class Way:
    """One way to fall back: a model, what is done to it before it runs, and what the report says of it."""

    why: str
    config: object = SPARSE_SLA
    options: dict = dataclasses.field(default_factory=dict)
    policy: Policy | None = None
    refused: tuple | None = None  # the tensors and blocks of a GPU that has no kernel for them
    slow: tuple[str, ...] = ()  # parts in PyTorch of a call on kernels
    most_blocks: int | None = None  # that kernels choose from
    offload: bool = False
    autocast: bool = False
    pipeline: bool = False


def on_a_gpu(blocks=(64, 64), **tensors):
    return {"refused": (tensors, blocks)}


def on_the_policy(field, value=1, **more):
    return Way(f"the policy's {field}", options=TORCH, policy=Policy(**{field: value}), **more)


HEDGEHOG = SPARSE_SLA.replace(feature_map="hedgehog")
INT8 = SPARSE_SLA.replace(precision="int8")
WAYS = {
    "a CPU": Way(ON_CPU),
    "a CPU, cubes": Way(ON_CPU, SPARSE_VSA),
    "autocast": Way(ON_CPU, autocast=True),
    "CPU offload": Way(ON_CPU, offload=True),
    "float32": Way("not triton: it takes bfloat16 and float16, got torch.float32", **on_a_gpu(dtype=torch.float32)),
    "float64": Way("not triton: it takes bfloat16 and float16, got torch.float64", **on_a_gpu(dtype=torch.float64)),
    "head_dim": Way("not triton: it takes head dimensions 64 and 128, got 80", **on_a_gpu(head_dim=80)),
    "query blocks": Way("not triton: it takes blocks of 64 and 128 tokens, got 32x64", **on_a_gpu((32, 64))),
    "key blocks": Way("not triton: it takes blocks of 64 and 128 tokens, got 64x256", **on_a_gpu((64, 256))),
    "strides": Way("not gluon: query must be contiguous", **on_a_gpu(strided=True)),
    "no Triton": Way("not triton: the package triton is not installed", **on_a_gpu(no_triton=True)),
    "another Triton": Way("not gluon: it is written for", **on_a_gpu(other_triton=True)),
    "eight bits": Way('not gluon: it has no kernels for precision="int8"', INT8, **on_a_gpu(precision="int8")),
    "feature map": Way(sla.SLOW_LINEAR, HEDGEHOG, slow=(sla.SLOW_LINEAR,)),
    "choice of blocks": Way(sla.SLOW_SELECTION, HEDGEHOG, slow=(sla.SLOW_SELECTION,)),
    "choice of cubes": Way(sla.SLOW_SELECTION, SPARSE_VSA, slow=(sla.SLOW_SELECTION,), most_blocks=3),
    "first steps": on_the_policy("dense_first_steps", pipeline=True),
    "last steps": on_the_policy("dense_last_steps", pipeline=True),
    "timesteps above": on_the_policy("dense_above", 50),
    "timesteps below": on_the_policy("dense_below", 500),
    "dense layers": on_the_policy("dense_layers", (1,)),
    "length": on_the_policy("min_tokens", 10_000),
    "a short video": Way("covers all blocks, 1", SPARSE_SLA.replace(block_q=128, block_k=128), TORCH),
    "a small grid": Way("covers all blocks, 12", VSAConfig(topk=99, tile=(2, 2, 4)), TORCH),
    "a mass": Way(ON_CPU, SPARSE_SLA.replace(keep_mass=0.9)),
}


def refusal(tensors, blocks, monkeypatch):
    """What "auto" takes on a Hopper GPU for tensors like these."""
    tensors = dict(tensors)
    precision = tensors.pop("precision", "input")
    monkeypatch.setattr(chips, "capability", lambda device: "9.0")
    no_triton, other_triton = (tensors.pop(name, False) for name in ("no_triton", "other_triton"))
    monkeypatch.setattr(api, "_HAS_TRITON", not no_triton)
    version = "it is written for Triton 3.6 to 3.9, got 2.0" if no_triton or other_triton else None
    monkeypatch.setattr(support, "missing_gluon", lambda: version)
    return api.choose_impl("auto", *cuda_inputs(**tensors), *blocks, precision)


def prepare(way, monkeypatch):
    """(the model or pipeline, what runs it once)."""
    if way.refused is not None:
        ran = refusal(*way.refused, monkeypatch)
        assert ran.impl != "gluon"
        # It is what would run there; here PyTorch does.
        monkeypatch.setattr(sla, "choose_impl", lambda *_: api.Ran("torch", ran.why))
    if way.slow:
        for module in (sla, vsa):
            monkeypatch.setattr(module, "choose_impl", lambda *_: api.Ran("triton"))
        real = sla.block_sparse_attention
        monkeypatch.setattr(sla, "block_sparse_attention", lambda *x, impl, **named: real(*x, impl="torch", **named))
        monkeypatch.setattr(vsa, "_run_with", lambda *_: vsa.vsa_attention_torch)
    if way.most_blocks is not None:
        monkeypatch.setattr(vsa, "KERNEL_MAX_BLOCKS", way.most_blocks)
    model = tiny_pipeline() if way.pipeline else tiny_transformer()
    foveal.sparsify(model, way.config, **way.options)
    if way.policy is not None:
        foveal.set_policy(model, way.policy)
    if way.offload:
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=torch.device("cpu"))

    def call():
        if way.pipeline:
            return generate(model)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=way.autocast):
            return run(model, **inputs() | {"timestep": torch.full((2,), 100)})

    return model, call


def test_there_are_at_least_twenty():
    assert len(WAYS) >= 20


@pytest.mark.parametrize("name", WAYS)
def test_each_is_named_and_raised(name, monkeypatch):
    way = WAYS[name]
    model, call = prepare(way, monkeypatch)
    call()
    assert any(way.why in row.ran.why for row in foveal.report(model).fallbacks)
    assert way.why in str(foveal.report(model))
    foveal.set_on_fallback(model, "raise")
    with pytest.raises(RuntimeError, match=r'on_fallback="raise", and sparse layers fell back: blocks\.') as raised:
        call()
    assert way.why in str(raised.value)


def test_the_commands_mind_it(tmp_path, capsys):
    wan = save_tiny_wan(tmp_path / "wan")
    size = ("--frames", "9", "--height", "160", "--width", "160", "--steps", "1", "--prompt", "a cat")
    sparse = ("--method", "sla", "--keep-ratio", "0.4", "--drop-ratio", "0.1")

    def command(name, *options):
        arguments = (name, "--model", wan, *size, "--output", tmp_path / name, *options)
        return cli.main([str(x) for x in arguments]), capsys.readouterr().err

    for name in ("generate", "eval"):
        status, error = command(name, *sparse, "--on-fallback", "raise")
        assert status == 1
        said = f"blocks.0.attn1 and 1 more ran sla (torch): {ON_CPU}"
        assert error.endswith(f'foveal: on_fallback="raise", and sparse layers fell back: {said}\n')
        assert command(name, *sparse, "--impl", "torch", "--on-fallback", "raise")[0] == 0
    assert (
        "unknown on_fallback 'error'; expected one of ('allow', 'warn', 'raise')"
        in command("generate", *sparse, "--on-fallback", "error")[1]
    )
    assert "on_fallback='raise' needs sparse attention" in command("generate", "--on-fallback", "raise")[1]


def test_training_minds_it(tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    write_data(tmp_path / "data")
    with pytest.raises(RuntimeError, match="sparse layers fell back"):
        run_training(training_config(tmp_path, sparsity__on_fallback="raise"))
