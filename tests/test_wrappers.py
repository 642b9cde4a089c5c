"""What other libraries do to a model with sparse layers: offloading by a device map, DDP, adapters by short names."""

import warnings

import peft
import pytest
import torch
import torch.distributed as dist
from tiny_wan import SPARSE_SLA, SPARSE_VSA, inputs, randomize, run, tiny_transformer
from torch.nn.parallel import DistributedDataParallel

from foveal import Policy, VSAConfig, dense, load, save, set_policy, sparse_parameters, sparsify
from foveal.models import WanTransformer3DModel

CONFIGS = pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
PLACES = dict.fromkeys(("patch_embedding", "condition_embedder", "rope", "norm_out", "proj_out", "blocks.0"), "cpu")


@pytest.mark.wrapper("accelerate offloading")
@CONFIGS
@pytest.mark.parametrize("place", ["cpu", "disk"])
@torch.no_grad()
def test_a_device_map_that_offloads_a_sparse_block(config, place, tmp_path):
    model = sparsify(tiny_transformer(), config)
    randomize(model)
    model.save_pretrained(tmp_path / "model")
    again = WanTransformer3DModel.from_pretrained(
        tmp_path / "model",
        device_map=PLACES | {"scale_shift_table": "cpu", "blocks.1": place},
        offload_folder=tmp_path / "offload",
    )
    torch.testing.assert_close(run(again), run(model), rtol=0, atol=1e-5)
    with dense(model), dense(again):
        torch.testing.assert_close(run(again), run(model), rtol=0, atol=1e-5)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.wrapper("DDP")
@CONFIGS
@pytest.mark.parametrize("policy", [Policy(dense_layers=(0,)), Policy(dense_above=900)], ids=["layers", "timesteps"])
def test_ddp_with_a_policy(config, policy, one_rank):
    model = sparsify(tiny_transformer(), config).train()
    set_policy(model, policy)
    ddp = DistributedDataParallel(model)
    for timestep in (500, 950, 500):
        model.zero_grad()
        ddp(**inputs() | {"timestep": torch.tensor([timestep] * 2)}).sample.square().mean().backward()
        gradients = {name: p.grad for name, p in sparse_parameters(model).items()}
        assert all(gradient is not None for gradient in gradients.values())
        if policy.dense_layers or timestep > 900:
            assert not any(g.any() for name, g in gradients.items() if name.startswith("blocks.0"))


@pytest.mark.parametrize("targets", [["to_q", "proj"], ["net.0.proj"], "all-linear"], ids=str)
@CONFIGS
def test_adapters_whose_targets_end_like_our_modules(config, targets):
    model = sparsify(tiny_transformer(), config)
    adapter = peft.LoraConfig(r=2, target_modules=targets)
    model.add_adapter(adapter)
    assert any("lora" in name and "ffn" in name for name, _ in model.named_parameters())
    assert not any("lora" in name and "attention.proj" in name for name, _ in model.named_parameters())
    assert adapter.exclude_modules is None
    run(model)


@CONFIGS
def test_adapters_that_are_far_from_our_modules_exclude_nothing(config):
    """peft warns of exclusions that meet no module."""
    model = sparsify(tiny_transformer(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    assert model.peft_config["default"].exclude_modules is None


@pytest.mark.parametrize("config", [SPARSE_SLA, VSAConfig(tile=(2, 2, 4), fine_gate=True)], ids=["sla", "vsa"])
def test_conversion_and_loading_leave_the_random_state_alone(config, tmp_path):
    model, other = tiny_transformer(), tiny_transformer()
    before = torch.random.get_rng_state()
    sparsify(model, config)
    save(model, tmp_path)
    load(other, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


@CONFIGS
def test_float32_parameters_in_a_bfloat16_model(config):
    model = sparsify(tiny_transformer().to(torch.bfloat16), config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in sparse_parameters(model).values():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    run(model, **inputs(dtype=torch.bfloat16)).float().square().mean().backward()
    assert all(p.grad is not None for p in sparse_parameters(model).values())
