"""`foveal.patch`: a host's public functions compute with foveal's, forward and backward, until the patch is undone."""

import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from host_modules import HostSLA, fastvideo_modules, turbodiffusion_modules
from torch.nn import functional

import foveal
from foveal.hosts.patching import import_host
from foveal.testing import assert_close_to_reference

BLOCK, DIM, HEADS, BATCH = 64, 16, 2, 2
SIZES = [64, 40, 64, 1, 64]


@pytest.fixture
def fastvideo(monkeypatch):
    modules = fastvideo_modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


@pytest.fixture
def sla_class(monkeypatch):
    modules = turbodiffusion_modules()
    monkeypatch.setitem(sys.modules, "SLA", modules["SLA"])
    return modules["SLA"].SparseLinearAttention


def tensors(*shape, number=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(number)]


def gradients(output, inputs, weight=None):
    """Of a sum with uneven weights, over all of the output or where `weight` is 1."""
    uneven = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return torch.autograd.grad((output * uneven * (1 if weight is None else weight)).sum(), inputs)


def assert_equal(got, expected, tolerance=1e-9):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def token_mask(blocks, valid, block=BLOCK):
    """[B, H, T, T] blocks and [S] valid keys to [B, H, S, S]."""
    return blocks.repeat_interleave(block, 2).repeat_interleave(block, 3) & valid


def dense_softmax(query, key, value, mask):
    scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def padded_tokens(sizes=SIZES, block=BLOCK):
    """Valid tokens of blocks of such sizes, bool [S]."""
    return (torch.arange(block)[None] < torch.tensor(sizes)[:, None]).flatten()


def vsa_oracle(query, key, value, topk, gate, sizes=SIZES, block=BLOCK):
    """The published VSA over tokens in tile order: dense, and without anything of foveal."""
    valid, sizes = padded_tokens(sizes, block), torch.tensor(sizes)[:, None]
    pooled = [(x * valid[:, None]).unflatten(2, (-1, block)).sum(3) / sizes for x in (query, key, value)]
    scores = pooled[0] @ pooled[1].mT / math.sqrt(DIM)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(topk).indices, True)
    coarse = (scores.softmax(-1) @ pooled[2]).repeat_interleave(block, 2)
    return coarse * gate + dense_softmax(query, key, value, token_mask(kept, valid, block))[0]


@pytest.mark.parametrize("gated", [True, False])
def test_fastvideo_vsa_equals_a_dense_computation(fastvideo, gated):
    query, key, value, gate = inputs = tensors(BATCH, HEADS, BLOCK * len(SIZES), DIM, number=4)
    inputs = inputs if gated else inputs[:3]
    sizes, valid = torch.tensor(SIZES, dtype=torch.int32), padded_tokens()[:, None]
    expected = vsa_oracle(query, key, value, 2, gate if gated else 1)
    with foveal.patch("fastvideo", impl="torch"):
        output = fastvideo["model_of_fastvideo"].video_sparse_attn(
            query,
            key,
            value,
            variable_block_sizes=sizes,
            q_variable_block_sizes=sizes,
            topk=2,
            block_size=(4, 4, 4),
            compress_attn_weight=gate if gated else None,
        )
    # The host's models drop what stands in padding rows.
    assert_equal([output * valid], [expected * valid])
    assert_equal(gradients(output, inputs, valid), gradients(expected, inputs, valid))


def test_cubes_of_256_tokens_run_as_two_blocks_each(fastvideo):
    """Also where the second of the two is empty."""
    sizes = [256, 130, 3, 128, 256]
    query, key, value, gate = inputs = tensors(1, HEADS, 256 * len(sizes), DIM, number=4)
    expected = vsa_oracle(query, key, value, 2, gate, sizes, 256)
    given, valid = torch.tensor(sizes), padded_tokens(sizes, 256)[:, None]
    with foveal.patch("fastvideo", impl="torch"):
        output = fastvideo["fastvideo_kernel"].video_sparse_attn(query, key, value, given, given, 2, (4, 8, 8), gate)
    assert_equal([output * valid], [expected * valid])
    assert_equal(gradients(output, inputs, valid), gradients(expected, inputs, valid))


def test_fastvideo_attention_over_lists_equals_a_dense_computation(fastvideo):
    query, key, value = inputs = tensors(BATCH, HEADS, BLOCK * len(SIZES), DIM)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(BATCH, HEADS, len(SIZES), len(SIZES), generator=generator) < 0.5
    blocks[..., 0] = True
    # Unsorted lists, with what the host leaves past the end.
    order = blocks.to(torch.int8).argsort(-1, descending=True).int()
    counts = blocks.sum(-1, dtype=torch.int32)
    lists = torch.where(torch.arange(len(SIZES)) < counts[..., None], order, -1)
    swapped = lists.clone()
    swapped[0, 0, 0, : counts[0, 0, 0]] = lists[0, 0, 0, : counts[0, 0, 0]].flip(0)
    expected, lse = dense_softmax(query, key, value, token_mask(blocks, padded_tokens()))
    with foveal.patch("fastvideo", impl="torch"):
        output, base_2 = sys.modules["fastvideo_kernel"].block_sparse_attn_from_indices(
            query, key, value, swapped, counts, torch.tensor(SIZES)
        )
    assert_equal([output], [expected])
    assert_equal(gradients(output, inputs), gradients(expected, inputs))
    assert base_2.dtype == torch.float32
    torch.testing.assert_close(base_2, (lse / math.log(2)).float())


def test_every_module_that_holds_the_function_changes_and_changes_back(fastvideo):
    names = ("video_sparse_attn", "block_sparse_attn_from_indices")
    before = {(module, name): getattr(module, name) for module in fastvideo.values() for name in names}
    patch = foveal.patch("fastvideo")
    assert all(getattr(module, name) is not function for (module, name), function in before.items())
    # Imported while the patch is in place.
    late = types.ModuleType("late_model")
    late.attention = fastvideo["fastvideo_kernel"].video_sparse_attn
    sys.modules["late_model"] = late
    try:
        patch.undo()
    finally:
        del sys.modules["late_model"]
    assert late.attention is fastvideo["fastvideo_kernel.ops"].video_sparse_attn
    assert {(module, name): getattr(module, name) for module, name in before} == before
    patch.undo()
    assert {(module, name): getattr(module, name) for module, name in before} == before


def test_an_error_inside_the_block_undoes_the_patch(fastvideo):
    original = fastvideo["fastvideo_kernel"].video_sparse_attn
    with pytest.raises(KeyError), foveal.patch("fastvideo"):
        raise KeyError
    assert fastvideo["model_of_fastvideo"].video_sparse_attn is original


def sla_oracle(query, key, value, kept, feature_map, proj, block_q):
    """SLA with linear_scope "all" on [B, H, L, D], dense, and without anything of foveal."""
    length = query.shape[2]

    def pooled(x, block):
        return torch.stack([part.mean(2) for part in x.split(block, 2)], 2)

    scores = pooled(query, block_q) @ pooled(key - key.mean(2, keepdim=True), BLOCK).mT
    blocks = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(kept).indices, True)
    mask = blocks.repeat_interleave(block_q, 2)[:, :, :length].repeat_interleave(BLOCK, 3)[..., :length]
    sparse, _ = dense_softmax(query, key, value, mask)
    phi_query, phi_key = feature_map(query), feature_map(key)
    denominator = (phi_query * phi_key.sum(2, keepdim=True)).sum(-1, keepdim=True) + 1e-5
    return sparse + proj(phi_query @ (phi_key.mT @ value) / denominator)


MAPS = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: functional.elu(x) + 1,
    "relu": torch.relu,
}


@pytest.mark.parametrize(("feature_map", "block_q"), [("softmax", 64), ("softmax", 128), ("elu", 64), ("relu", 64)])
def test_turbodiffusion_sla_equals_a_dense_computation(sla_class, feature_map, block_q):
    torch.manual_seed(0)
    module = sla_class(DIM, 0.4, feature_map=feature_map, BLKQ=block_q).double()
    module.dtype = torch.float64
    inputs = tensors(BATCH, 300, HEADS, DIM)
    parameters = [*inputs, module.proj_l.weight, module.proj_l.bias]
    heads_first = [x.transpose(1, 2) for x in inputs]
    expected = sla_oracle(*heads_first, 2, MAPS[feature_map], module.proj_l, block_q).transpose(1, 2)
    with foveal.patch("turbodiffusion", impl="torch"):
        output, kept = module(*inputs, return_sparsity=True)
        assert torch.equal(module(*inputs), output)
    assert kept == 2 / 5
    assert_equal([output], [expected])
    assert_equal(gradients(output, parameters), gradients(expected, parameters))
    with pytest.raises(AssertionError, match="the host's own"):
        module(*inputs)


def test_turbodiffusion_computes_in_the_modules_dtype_and_answers_in_the_inputs(sla_class):
    module = sla_class(DIM, 0.4)
    inputs = tensors(1, 300, HEADS, DIM, dtype=torch.float32)
    with foveal.patch("turbodiffusion", impl="torch"):
        output = module(*inputs)
    rounded = [x.detach().bfloat16().double().transpose(1, 2) for x in inputs]
    exact = sla_oracle(*rounded, 2, MAPS["softmax"], module.proj_l.double(), BLOCK).transpose(1, 2)
    assert output.dtype == torch.float32
    assert torch.equal(output, output.bfloat16().float())
    assert 0 < (output - exact).abs().max() < 0.05


def test_turbodiffusion_keeps_a_block_where_the_ratio_rounds_to_none(sla_class):
    module = sla_class(DIM, 0.1)
    with foveal.patch("turbodiffusion", impl="torch"):
        output, kept = module(*tensors(1, 300, HEADS, DIM), return_sparsity=True)
    assert kept == 1 / 5
    assert output.isfinite().all()


def test_mistakes_are_named(fastvideo, sla_class):
    with pytest.raises(ValueError, match=r"unknown host 'comfyui'; expected one of \('fastvideo', 'turbod"):
        foveal.patch("comfyui")
    with pytest.raises(ValueError, match="unknown impl 'cuda'"):
        foveal.patch("fastvideo", impl="cuda")
    query, key, value = tensors(1, 1, 128, DIM)
    sizes = torch.tensor([64, 64])
    host = fastvideo["fastvideo_kernel"]
    with foveal.patch("fastvideo", impl="torch"):
        with pytest.raises(ValueError, match=r"'fastvideo' is patched already: undo that patch first"):
            foveal.patch("fastvideo")
        with pytest.raises(ValueError, match=r"block_size must hold 64, 128, or 256 .* got 64, which holds 262144"):
            host.video_sparse_attn(query, key, value, sizes, sizes, 1)
        with pytest.raises(
            ValueError, match=r"q_variable_block_sizes must have one entry for each block of 64 .* got 1"
        ):
            host.video_sparse_attn(query, key, value, sizes, sizes[:1], 1, (4, 4, 4))
        lists, counts = torch.zeros(1, 1, 2, 1).int(), torch.ones(1, 1, 2).int()
        of_16_tokens = torch.full((8,), 16)
        with pytest.raises(ValueError, match=r"variable_block_sizes must have one entry for every 64 or 128 .* got 8;"):
            host.block_sparse_attn_from_indices(query, key, value, lists, counts, of_16_tokens)
    with foveal.patch("turbodiffusion"):
        module = sla_class(DIM, 0.5)
        module.feature_map_q = torch.sigmoid
        with pytest.raises(ValueError, match=r"feature_map_q must be the host's softmax, elu, or relu .* got sigmoid"):
            module(*tensors(1, 128, 1, DIM))
        module = sla_class(DIM, 0.5)
        module.proj_l = torch.nn.Identity()
        with pytest.raises(TypeError, match=r"proj_l must be a Linear layer .* got Identity"):
            module(*tensors(1, 128, 1, DIM))


def test_an_absent_host_is_named_with_its_install_command(monkeypatch):
    # None there makes an import fail as an absent package does, also on a machine that has it.
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", None)
    monkeypatch.setitem(sys.modules, "SLA", None)
    with pytest.raises(ImportError, match=r"fastvideo-kernel is not installed.*pip install fastvideo-kernel"):
        foveal.patch("fastvideo")
    with pytest.raises(ImportError, match=r"TurboDiffusion is not installed.*pip install turbodiffusion, or put"):
        foveal.patch("turbodiffusion")
    # Also where only a part of it is asked for; another part that it has not got is no missing host.
    with pytest.raises(ImportError, match=r"^Host is not installed, and patching needs it: pip install host$"):
        import_host("no_such_host.attention", "Host", "pip install host")
    with pytest.raises(ImportError, match=r"^Host is installed, but needs json\.no_such_part"):
        import_host("json.no_such_part", "Host", "pip install host")


@pytest.mark.parametrize("host", ["diffusers", "fastvideo", "turbodiffusion"])
def test_a_command_shows_that_it_runs(fastvideo, sla_class, monkeypatch, capsys, host):
    """`python -m foveal.hosts`, as the page has it."""
    pytest.importorskip("diffusers")
    from foveal.hosts import __main__ as command

    assert command.main([host]) == 0
    said = capsys.readouterr().out
    assert "foveal" in said.splitlines()[0]
    errors = [float(error) for error in re.findall(r"[\d.]+e-\d+", said)]
    assert len(errors) == 2
    assert 0 < max(errors) < 1e-5
    # And that it does not.
    monkeypatch.setattr(command, "relative_error", lambda ours, exact: torch.ones(()))
    assert command.main([host]) == 1


def test_commands_say_what_is_missing(monkeypatch, capsys):
    from foveal.hosts import __main__ as command
    from foveal.hosts.sglang import __main__ as sglang
    from foveal.hosts.vllm_omni import __main__ as vllm_omni

    for name in ("diffusers", "fastvideo_kernel", "SLA", "sglang", "vllm_omni"):
        monkeypatch.setitem(sys.modules, name, None)
    commands = {
        "pip install diffusers": lambda: command.main(["diffusers"]),
        "pip install fastvideo-kernel einops": lambda: command.main(["fastvideo"]),
        'pip install "sglang[diffusion]"': sglang.main,
        "pip install vllm-omni": vllm_omni.main,
    }
    for how_to_install, main in commands.items():
        assert main() == 1
        said = capsys.readouterr().out
        assert said.count("\n") == 1
        assert said.endswith(f"is not installed, and patching needs it: {how_to_install}\n")


def test_a_host_of_another_version_is_left_alone(fastvideo, monkeypatch):
    def video_sparse_attn(q, k, v, topk):
        return q

    monkeypatch.setattr(fastvideo["fastvideo_kernel"], "video_sparse_attn", video_sparse_attn)
    with pytest.raises(
        ImportError, match=r"video_sparse_attn of fastvideo-kernel takes \['q', 'k', 'v', 'topk'\], but"
    ):
        foveal.patch("fastvideo")
    assert fastvideo["fastvideo_kernel"].video_sparse_attn is video_sparse_attn
    monkeypatch.delattr(fastvideo["fastvideo_kernel"], "block_sparse_attn_from_indices")
    monkeypatch.setattr(
        fastvideo["fastvideo_kernel"], "video_sparse_attn", fastvideo["fastvideo_kernel.ops"].video_sparse_attn
    )
    with pytest.raises(ImportError, match="has no block_sparse_attn_from_indices"):
        foveal.patch("fastvideo")


def on_device(device, impl, dtype, call):
    """What `call(tensor)` gives there, and its gradients; `tensor(*shape)` makes an input of bfloat16 numbers."""
    generator, inputs = torch.Generator().manual_seed(0), []

    def tensor(*shape):
        x = torch.randn(shape, generator=generator).bfloat16().to(device, dtype)
        inputs.append(x.requires_grad_())
        return x

    with foveal.patch("fastvideo", impl=impl), foveal.patch("turbodiffusion", impl=impl):
        output = call(tensor)
    return [output, *gradients(output, inputs)]


def check_kernels(device, impl, sla_class):
    """Both hosts' functions by `impl` in bfloat16, with the tolerance of plain PyTorch at that precision."""

    def vsa(tensor):
        query, key, value, gate = (tensor(BATCH, HEADS, BLOCK * len(SIZES), 64) for _ in range(4))
        sizes, valid = torch.tensor(SIZES, device=query.device), padded_tokens()[:, None].to(query.device)
        host = sys.modules["fastvideo_kernel"]
        return host.video_sparse_attn(query, key, value, sizes, sizes, 2, (4, 4, 4), gate) * valid

    def wide_vsa(tensor):
        sizes = [256, 130, 3, 128, 256]
        query, key, value, gate = (tensor(1, HEADS, 256 * len(sizes), 64) for _ in range(4))
        valid, sizes = padded_tokens(sizes, 256)[:, None].to(query.device), torch.tensor(sizes, device=query.device)
        host = sys.modules["fastvideo_kernel"]
        return host.video_sparse_attn(query, key, value, sizes, sizes, 2, (4, 8, 8), gate) * valid

    def lists(tensor):
        query, key, value = (tensor(BATCH, HEADS, BLOCK * len(SIZES), 64) for _ in range(3))
        rows = torch.tensor([3, 0, 2, -1, -1], device=query.device).expand(BATCH, HEADS, len(SIZES), 5)
        counts = torch.full(rows.shape[:3], 3, device=query.device)
        sizes = torch.tensor(SIZES, device=query.device)
        return sys.modules["fastvideo_kernel"].block_sparse_attn_from_indices(query, key, value, rows, counts, sizes)[0]

    def sla(tensor):
        query, key, value = (tensor(BATCH, 300, HEADS, 64) for _ in range(3))
        torch.manual_seed(0)
        module = sla_class(64, 0.4).bfloat16().to(query)
        module.dtype = query.dtype
        return module(query, key, value)

    for call in (vsa, wide_vsa, lists, sla):
        exact = on_device("cpu", "reference", torch.float64, call)
        plain = on_device("cpu", "torch", torch.bfloat16, call)
        for number, found in enumerate(zip(on_device(device, impl, torch.bfloat16, call), exact, plain, strict=True)):
            assert_close_to_reference(*found, name=f"{call.__name__}, tensor {number}")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_kernels_run_behind_the_hosts_functions(fastvideo, sla_class, impl):
    for _ in range(3):  # the second call like the first is recorded, the third is replayed
        check_kernels("cuda", impl, sla_class)


# fastvideo-kernel asks for a GPU when it is imported, and gets one that does nothing.
REAL_HOST = """
import inspect, types, triton, torch
target = types.SimpleNamespace(backend="cuda", arch=90, warp_size=32)
device = types.SimpleNamespace(get_current_target=lambda: target, get_active_torch_device=lambda: torch.device("cpu"))
device.get_benchmarker = lambda: None
triton.runtime.driver.set_active(device)
"""


def run_with_host(package, script, **environment):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, so the patch was tested with a stand-in of the same signatures only")
    command, environment = [sys.executable, "-c", REAL_HOST + script], {**os.environ, **environment}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_the_installed_fastvideo_is_patched_and_has_these_signatures():
    script = """
import fastvideo_kernel as host, foveal, torch
from fastvideo_kernel.ops import video_sparse_attn as original
print(*inspect.signature(original).parameters, "|", *inspect.signature(host.block_sparse_attn_from_indices).parameters)
x = torch.randn(1, 2, 128, 16, requires_grad=True)
sizes = torch.tensor([64, 64], dtype=torch.int32)
with foveal.patch("fastvideo", impl="torch"):
    output = host.video_sparse_attn(x, x, x, sizes, sizes, 2, (4, 4, 4), torch.zeros_like(x))
    varlen = host.block_sparse_attn_varlen.__globals__["block_sparse_attn_from_indices"]
    assert varlen is host.block_sparse_attn_from_indices
torch.testing.assert_close(output, torch.nn.functional.scaled_dot_product_attention(x, x, x))
output.sum().backward()
assert host.video_sparse_attn is original and x.grad.abs().sum() > 0
"""
    module = fastvideo_modules()["fastvideo_kernel"]
    functions = (module.video_sparse_attn, module.block_sparse_attn_from_indices)
    stand_in = " | ".join(" ".join(inspect.signature(function).parameters) for function in functions)
    assert run_with_host("fastvideo_kernel", script) == stand_in.split()


def test_the_installed_fastvideos_tiles_are_those_of_vsa_attention():
    """In its tile order, and back, the patched function gives what `vsa_attention` gives in raster order."""
    script = """
import fastvideo_kernel as host, foveal, torch
grid, tile = (6, 9, 10), (4, 4, 4)
indices = host.build_vsa_metadata(grid, tile, "cpu")
sizes, places = indices["variable_block_sizes"], indices["non_pad_index"]
inputs = [torch.randn(1, 2, 540, 16, dtype=torch.float64, requires_grad=True) for _ in range(4)]

def tiled(x):
    padded = x.new_zeros(1, 2, 64 * len(sizes), 16)
    return padded.index_copy(2, places, x[:, :, indices["tile_partition_indices"]])

query, key, value, gate = map(tiled, inputs)
with foveal.patch("fastvideo", impl="torch"):
    output = host.video_sparse_attn(query, key, value, sizes, sizes, 5, tile, gate)
output = output[:, :, places][:, :, indices["reverse_tile_partition_indices"]]
config = foveal.VSAConfig(topk=5, tile=tile)
raster = foveal.vsa_attention(
    *inputs[:3], config=config, grid=foveal.VideoGrid(*grid), gate_coarse=inputs[3], impl="reference"
)
torch.testing.assert_close(output, raster)
weight = torch.randn_like(output)
gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (output, raster)]
torch.testing.assert_close(*gradients)
print(len(sizes))
"""
    assert run_with_host("fastvideo_kernel", script) == ["18"]


def test_the_installed_turbodiffusion_is_patched_and_has_these_signatures():
    script = """
import SLA as host, foveal, torch
cls = host.SparseLinearAttention
original = cls.forward
print(*inspect.signature(cls.__init__).parameters, "|", *inspect.signature(original).parameters)
for feature_map in ("softmax", "elu", "relu"):
    module = cls(16, 1.0, feature_map=feature_map).double()
    module.dtype = torch.float64
    x = torch.randn(1, 128, 2, 16, dtype=torch.float64, requires_grad=True)
    with foveal.patch("turbodiffusion", impl="torch"):
        output = module(x, x, x)
    heads = x.transpose(1, 2)
    dense = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)
    torch.testing.assert_close(output, dense)
    output.sum().backward()
    assert module.proj_l.weight.grad.abs().sum() > 0
assert cls.forward is original
"""
    functions = (HostSLA.__init__, HostSLA.forward)
    stand_in = " | ".join(" ".join(inspect.signature(function).parameters) for function in functions)
    assert run_with_host("SLA", script) == stand_in.split()


def test_the_installed_turbodiffusions_own_kernels_give_the_same():
    """They run in Triton's interpreter, in float32, forward and backward."""
    script = """
import SLA as host, foveal, torch
for feature_map, block_q in (("softmax", 64), ("elu", 128), ("relu", 64)):
    torch.manual_seed(0)
    module = host.SparseLinearAttention(64, 0.4, feature_map=feature_map, BLKQ=block_q)
    torch.nn.init.normal_(module.proj_l.weight, std=0.1)
    module.dtype = torch.float32
    inputs = [torch.randn(1, 300, 2, 64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(inputs[0].shape)

    def run():
        output, kept = module(*inputs, return_sparsity=True)
        return output, kept, torch.autograd.grad((output * weight).sum(), [*inputs, *module.parameters()])

    theirs = run()
    with foveal.patch("turbodiffusion", impl="torch"):
        ours = run()
    assert theirs[1] == ours[1] == 0.4
    for own, foveals in zip((theirs[0], *theirs[2]), (ours[0], *ours[2]), strict=True):
        torch.testing.assert_close(foveals, own, rtol=1e-4, atol=1e-5 * own.abs().max().item())
print("equal")
"""
    assert run_with_host("SLA", script, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") == ["equal"]


def test_figures_of_the_page_are_those_of_the_runs():
    """The speed-ups in the table, from the files that the page names."""
    root = Path(__file__).parents[1]
    page = (root / "docs" / "hosts.md").read_text()
    names = re.findall(r"`((?:wan|minimax-h3|training-step)-[\w.-]+\.json)`", page)
    wan, h3, training = (json.loads((root / "benchmarks" / "results" / name).read_text()) for name in names)
    steps = training["arms"]
    wan, h3 = wan["calls"]["480p"], h3["figures"]["15 s, compiled"]["arms"]
    pairs = [
        (wan["SLA 64x64 marginal"]["speedup"], wan["VSA 12.5 %"]["speedup"]),
        (h3["VSA 10 %"]["speedup"], h3["SLA 5 %"]["speedup"]),
        [
            steps["dense"]["median_seconds"] / steps[name]["median_seconds"]
            for name in ("sla 5% 64x64 marginal", "vsa 12.5% wide")
        ],
    ]
    found = re.findall(r"a step ([\d.]+)x with [SLVA]+ [\d.]+%, ([\d.]+)x with", page)
    assert found == [(f"{first:.2f}", f"{second:.2f}") for first, second in pairs]
