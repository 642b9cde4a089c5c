"""On a GPU: both methods over video and text in one sequence, as the families with joint attention call them."""

import copy

import pytest
import torch
import torch.nn.functional as F

from foveal import SLAConfig, SparseLinearAttention, VideoGrid, VideoSparseAttention, VSAConfig
from foveal.methods.base import LayerCall, method_of
from foveal.models.self_attention import LayerAttention, joint_attention
from foveal.testing import make_inputs

pytestmark = pytest.mark.gpu

GRID, TEXT, HEADS, WIDTH = VideoGrid(5, 12, 20), 77, 3, 96
VIDEO = GRID.num_tokens
SLA = SLAConfig(keep_ratio=0.2, drop_ratio=0.2)


def build(config, head_dim, device):
    torch.manual_seed(0)
    if isinstance(config, SLAConfig):
        module = SparseLinearAttention(head_dim, config)
    else:
        module = VideoSparseAttention(WIDTH, HEADS, head_dim, config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return module.to(device)


def run(module, inputs, hidden_states, lengths, impl):
    """Both outputs, and the gradients of the query, key and value [B, L, H, D] and of the module's parameters."""
    module.impl = impl
    inputs = [x.detach().requires_grad_() for x in inputs]
    method = method_of(module.config)

    def run_method(query, key, value, hidden_states, kv_lengths):
        return method.run(module, LayerCall(query, key, value, hidden_states, GRID, kv_lengths))

    outputs = joint_attention(LayerAttention(run_method, GRID), *inputs, hidden_states, lengths)
    loss = sum(output.double().square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*inputs, *module.parameters()])]


@pytest.mark.parametrize("impl", ["triton", "gluon"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "config",
    [
        SLA,
        SLA.replace(token_order="tile"),
        SLA.replace(linear_scope="all"),
        VSAConfig(keep_ratio=0.25),
        VSAConfig(keep_ratio=0.25, tile="auto"),
    ],
    ids=["sla", "sla tile order", "sla all keys", "vsa", "vsa auto tile"],
)
def test_text_with_padding(config, head_dim, impl):
    if impl == "gluon" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    device = "cuda"
    lengths = torch.tensor([VIDEO + 13, VIDEO + TEXT], device=device)
    sizes = {"batch": 2, "heads": HEADS, "query_length": VIDEO + TEXT, "head_dim": head_dim}
    inputs = [x.transpose(1, 2) for x in make_inputs(**sizes, dtype=torch.bfloat16, device=device, layout="BLHD")]
    hidden_states = torch.randn(2, VIDEO, WIDTH, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    module = build(config, head_dim, device).to(torch.bfloat16)
    exact = run(
        copy.deepcopy(module).double(), [x.double() for x in inputs], hidden_states.double(), lengths, "reference"
    )
    plain = run(module, inputs, hidden_states, lengths, "reference")
    ours = run(module, inputs, hidden_states, lengths, impl)
    for index, (result, other, expected) in enumerate(zip(ours, plain, exact, strict=True)):
        error, allowed = ((x.double() - expected).norm() / expected.norm() for x in (result, other))
        assert error <= 2 * allowed + 1e-3, (index, error, allowed)
    for gradient in ours[3:5]:
        assert not gradient[0, VIDEO + 13 :].any()
    mask = (torch.arange(VIDEO + TEXT, device=device) < lengths[:, None])[:, None, None]
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), attn_mask=mask)
    torch.testing.assert_close(ours[1].unflatten(2, (HEADS, -1)).transpose(1, 2), dense[:, :, VIDEO:])
