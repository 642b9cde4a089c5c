"""Block-sparse attention as an attention backend of diffusers, in its own Wan and through its own methods."""

import pytest
import torch
from tiny_wan import inputs, tiny_transformer

import foveal
from foveal import SLAConfig, VSAConfig
from foveal.hosts.diffusers import register_attention_backend

dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

CONFIG = SLAConfig(keep_ratio=0.3, drop_ratio=0.0, block_q=16, block_k=16, linear_scope="none", projection=False)


def run(model, **more):
    with torch.no_grad():
        return model(**inputs(**more), return_dict=False)[0]


def names():
    """All that diffusers says of its backends."""
    registry, members = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName
    tables = (registry._backends, registry._constraints, registry._supported_arg_names)
    return [set(table) for table in tables], list(members), dict(members._value2member_map_), list(members.__members__)


def test_wan_with_the_backend_is_wan_converted():
    model = tiny_transformer()
    dense = run(model)
    with register_attention_backend(CONFIG, impl="torch"):
        model.set_attention_backend("foveal")
        sparse = run(model)
        assert {p._attention_backend.value for p in model.attn_processors.values()} == {"foveal"}
        model.reset_attention_backend()
    assert (sparse - dense).abs().max() > 1e-3
    torch.testing.assert_close(run(model), dense, rtol=0, atol=0)
    foveal.sparsify(model, CONFIG)
    torch.testing.assert_close(run(model), sparse)


def test_keeping_everything_is_dense_and_gradients_flow():
    model = tiny_transformer()
    call = inputs()
    hidden = call.pop("hidden_states").requires_grad_()

    def gradient():
        return torch.autograd.grad(model(hidden, **call, return_dict=False)[0].square().sum(), hidden)[0]

    expected = gradient()
    with register_attention_backend(CONFIG.replace(keep_ratio=1.0), impl="torch"):
        with dispatch.attention_backend("foveal"):
            found = gradient()
        assert dispatch._AttentionBackendRegistry.get_active_backend()[0].value == "native"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["a mask", "causal", "other keys", "dropout"])
def test_the_rest_stays_native(case):
    query, key = torch.randn(1, 40, 2, 16), torch.randn(1, 30 if case == "other keys" else 40, 2, 16)
    more = {
        "a mask": {"attn_mask": torch.rand(1, 1, 40, 40) < 0.5},
        "causal": {"is_causal": True},
        "other keys": {},
        "dropout": {"dropout_p": 0.5},
    }[case]

    def attend(backend):
        torch.manual_seed(0)
        return dispatch.dispatch_attention_fn(query, key, key, **more, backend=backend)

    expected = attend("native")
    with register_attention_backend(CONFIG, impl="torch"):
        torch.testing.assert_close(attend("foveal"), expected, rtol=0, atol=0)


def test_the_scale_of_the_model_counts():
    query, key, value = torch.randn(3, 1, 40, 2, 16)
    with register_attention_backend(CONFIG, impl="torch"):
        found = dispatch.dispatch_attention_fn(query, key, value, scale=0.7, backend="foveal")
    heads = (x.transpose(1, 2) for x in (query, key, value))
    expected = foveal.sla_attention(*heads, config=CONFIG, scale=0.7, impl="reference").transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_undone_diffusers_is_what_it_was():
    before = names()
    patch = register_attention_backend(CONFIG)
    assert "foveal" in [name.value for name in dispatch.AttentionBackendName]
    model = tiny_transformer()
    model.set_attention_backend("foveal")
    model.reset_attention_backend()
    patch.undo()
    assert names() == before
    assert dispatch._AttentionBackendRegistry.get_active_backend()[0].value == "native"
    with pytest.raises(ValueError, match="`backend='foveal'` must be one of"):
        model.set_attention_backend("foveal")
    with register_attention_backend(CONFIG):
        pass
    assert names() == before


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(TypeError, match="config must be an SLAConfig, got VSAConfig"):
        register_attention_backend(VSAConfig())
    for wrong in ({"linear_scope": "all"}, {"projection": True}, {"token_order": "tile"}):
        with pytest.raises(ValueError, match='config must have linear_scope="none", projection=False, and token_order'):
            register_attention_backend(CONFIG.replace(**wrong))
    with pytest.raises(ValueError, match="unknown impl 'cuda'"):
        register_attention_backend(CONFIG, impl="cuda")
    with (
        register_attention_backend(CONFIG),
        pytest.raises(ValueError, match="has an attention backend 'foveal' already"),
    ):
        register_attention_backend(CONFIG)
    monkeypatch.delattr(dispatch, "_AttentionBackendRegistry")
    with pytest.raises(ImportError, match="another registry of attention backends than foveal knows"):
        register_attention_backend(CONFIG)
