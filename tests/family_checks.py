"""What every family of transformers has to pass, on a tiny random model of diffusers' own."""

import copy

import pytest
import torch
from tiny_wan import DENSE_SLA, DENSE_VSA, SPARSE_SLA, SPARSE_VSA, randomize

from foveal import SLA2Config, SLAConfig, VSAConfig
from foveal.lab.inspect.capture import capture_selections
from foveal.models import dense, densify, load, save, sparsify, summary
from foveal.models.parameters import of_router
from foveal.models.processor import sparse_processors, state_of

METHODS = pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA], ids=["sla", "vsa"])
DENSE_METHODS = pytest.mark.parametrize("config", [DENSE_SLA, DENSE_VSA], ids=["sla", "vsa"])
ROUTED = (
    SLA2Config(keep_ratio=0.3, block_q=16, block_k=16, linear_scope="none", router="per_head"),
    SPARSE_VSA.replace(router="per_head"),
)


def replace_arguments(attn, *args, **kwargs) -> None:
    """Calls of an attention module, as the forward of its model makes them, get these arguments from now on."""
    attn.register_forward_pre_hook(lambda *_: (args, kwargs), with_kwargs=True)


def attention_processors(model) -> dict:
    return {f"{name}.processor": part.processor for name, part in model.named_modules() if hasattr(part, "processor")}


@torch.no_grad()
def check_pipeline(pipeline, grid, **arguments) -> None:
    """A pipeline whose attention keeps everything makes what it made dense, and its tokens are of this grid."""
    pipeline.set_progress_bar_config(disable=True)

    def generate() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipeline(**arguments, num_inference_steps=2, generator=generator, output_type="latent")[0]

    expected = generate()
    assert expected.abs().max() > 0.1
    sparsify(pipeline, DENSE_SLA)
    torch.testing.assert_close(generate(), expected, rtol=0, atol=1e-4)
    assert state_of(pipeline.transformer).grid == grid
    # Whatever the model is, it was ours that ran.
    sparsify(densify(pipeline), SPARSE_SLA)
    assert (generate() - expected).abs().max() > 1e-4


class FamilyChecks:
    """A test class of a family derives from this.

    Attributes:
        LAYERS: names of the layers that `sparsify` converts, in order.
        LATENTS: two shapes (frames, height, width) of the latent, with as many tokens.
        GRID: of tokens of the first of them.
        TEXT: tokens past the video that every query sees; 0 for a family without text in its self-attention.
        PACKED: whether the method gets the whole sequence, with a `TokenLayout`.
        PADDING: how many of the first sample's text tokens are masked, in all.
        MASKED: how many of them stand at the end of `encoder_hidden_states`.
    """

    LAYERS: tuple[str, ...]
    LATENTS: tuple[tuple[int, int, int], tuple[int, int, int]]
    GRID = None
    TEXT = 0
    PACKED = False
    PADDING = 0
    MASKED = 0

    def model(self, seed: int = 0):
        raise NotImplementedError

    def inputs(self, latent=None, dtype=torch.float32, **changes):
        raise NotImplementedError

    def run(self, model, **inputs):
        return model(**(inputs or self.inputs()), return_dict=False)[0]

    def sparse(self, config, seed: int = 0, **kwargs):
        model = sparsify(self.model(seed), config, **kwargs)
        randomize(model)
        return model

    @torch.no_grad()
    def check_equals_dense(self, model, config, data, grid=None) -> None:
        """A dense model gives the same once it is sparse with a configuration that keeps everything.

        Args:
            grid: of the tokens; None for `GRID`.
        """
        expected = self.run(model, **data)
        sparsify(model, config)
        # Rotary embeddings and time embeddings are float32 in diffusers whatever the model is.
        torch.testing.assert_close(self.run(model, **data), expected, rtol=0, atol=1e-5)
        assert state_of(model).grid == (grid or self.GRID)
        assert expected.abs().max() > 0.1

    @pytest.mark.parametrize(
        "config", [DENSE_SLA, DENSE_SLA.replace(token_order="tile"), DENSE_VSA], ids=["sla", "sla tile order", "vsa"]
    )
    def test_keeping_everything_equals_dense(self, config):
        self.check_equals_dense(self.model().double(), config, self.inputs(dtype=torch.float64))

    @DENSE_METHODS
    def test_keeping_everything_has_the_dense_gradients(self, config):
        model, data = self.model().double(), self.inputs(dtype=torch.float64)
        parameters = dict(model.named_parameters())
        expected = torch.autograd.grad(self.run(model, **data).square().mean(), parameters.values(), allow_unused=True)
        loss = self.run(sparsify(model, config), **data).square().mean()
        ours = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
        for name, one, other in zip(parameters, ours, expected, strict=True):
            if other is None:
                assert one is None, name
            else:
                assert (one - other).norm() <= 1e-4 * other.norm() + 1e-9, name

    def test_layers(self):
        model = self.model()
        before, processors = set(model.state_dict()), attention_processors(model)
        sparsify(model, SPARSE_SLA)
        assert tuple(sparse_processors(model)) == self.LAYERS
        others = {name: p for name, p in processors.items() if name.removesuffix(".processor") not in self.LAYERS}
        assert {name: attention_processors(model)[name] for name in others} == others
        added = {f"{name}.processor.attention.proj.{part}" for name in self.LAYERS for part in ("weight", "bias")}
        assert set(model.state_dict()) - before == added
        assert [row.layer for row in summary(model).rows] == list(self.LAYERS)

    @METHODS
    @torch.no_grad()
    def test_method_is_called_with_video_queries(self, config):
        model, calls = self.sparse(config), []
        for processor in sparse_processors(model).values():
            processor.attention.register_forward_pre_hook(lambda module, args: calls.append(args))
        with capture_selections(model) as selections:
            self.run(model)
        assert len(calls) == len(selections) == len(self.LAYERS)
        queries = self.GRID.num_tokens + (self.TEXT if self.PACKED else 0)
        for query, key, value, *hidden_states in calls:
            assert query.shape[2] == queries
            assert key.shape == value.shape
            assert key.shape[2] == self.GRID.num_tokens + self.TEXT
            assert all(x.shape[1] == queries for x in hidden_states if x is not None)
        for selection in selections.values():
            valid = selection.key_valid().sum(1).tolist()
            assert valid[0] == self.GRID.num_tokens + self.TEXT - self.PADDING
            if self.PACKED:  # the last blocks are those of the protected segments, and every row sees all of them
                last = selection.key_block_sizes[0].flip(0).cumsum(0).tolist().index(self.TEXT) + 1
                assert selection.critical_mask()[..., -last:].all()
                continue
            # Every row sees all of the text that is valid.
            seen = selection.expand(selection.critical_mask())[0, 0, :, -self.TEXT :].any(0) if self.TEXT else None
            assert seen is None or seen.sum() == self.TEXT - self.PADDING

    @METHODS
    @torch.no_grad()
    def test_sparse_differs_and_dense_restores(self, config):
        model = self.model()
        expected = self.run(model)
        sparsify(model, config)
        randomize(model)
        assert (self.run(model) - expected).abs().max() > 1e-3
        with dense(model):
            assert torch.equal(self.run(model), expected)
        assert torch.equal(self.run(densify(model)), expected)
        assert not any(module._forward_pre_hooks for module in model.modules())

    @METHODS
    @torch.no_grad()
    def test_text_counts_and_padding_does_not(self, config):
        model, data = self.sparse(config), self.inputs()
        output = self.run(model, **data)
        text = data["encoder_hidden_states"]
        changed = text.clone()
        changed[:, 0] += 1.0
        assert (self.run(model, **data | {"encoder_hidden_states": changed}) - output).abs().max() > 1e-4
        if self.MASKED:
            changed = text.clone()
            changed[0, -self.MASKED :] = 100.0
            padded = self.run(model, **data | {"encoder_hidden_states": changed})
            torch.testing.assert_close(padded, output, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA.replace(fine_gate=True)], ids=["sla", "vsa"])
    def test_gradients_reach_the_new_parameters(self, config):
        model = sparsify(self.model(), config)
        self.run(model).square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if ".processor." in name}
        assert len(gradients) == len(self.LAYERS) * (2 if isinstance(config, SLAConfig) else 4)
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), name
            assert gradient.abs().max() > 0, name

    @torch.no_grad()
    def test_without_a_configuration_it_begins_as_vsa(self):
        model, other = sparsify(self.model()), sparsify(self.model(), VSAConfig(keep_ratio=0.125))
        assert {processor.config.router for processor in sparse_processors(model).values()} == {"per_head"}
        assert torch.equal(self.run(model), self.run(other))

    @pytest.mark.parametrize("config", ROUTED, ids=["sla2", "vsa"])
    def test_routers_learn(self, config):
        model = self.sparse(config).train()
        self.run(model).square().sum().backward()
        routers = {name: p for name, p in model.named_parameters() if of_router(name)}
        assert len(routers) == 2 * len(self.LAYERS)
        for name, parameter in routers.items():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name

    @pytest.mark.parametrize("config", [SPARSE_SLA, SPARSE_VSA, *ROUTED], ids=["sla", "vsa", "sla2", "vsa router"])
    def test_gradient_checkpointing_gives_the_same_gradients(self, config):
        model = self.sparse(config).train()
        checkpointed = copy.deepcopy(model)
        checkpointed.enable_gradient_checkpointing()
        self.run(model).square().sum().backward()
        loss = self.run(checkpointed).square().sum()
        # As many tokens in another shape, and a dense forward, come between.
        with torch.no_grad(), dense(checkpointed):
            self.run(checkpointed, **self.inputs(latent=self.LATENTS[1]))
        loss.backward()
        for (name, parameter), other in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
            if parameter.grad is None:
                assert other.grad is None, name
            else:
                assert torch.equal(parameter.grad, other.grad), name

    @DENSE_METHODS
    @pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
    @torch.no_grad()
    def test_half_precision(self, config, autocast):
        exact = self.run(self.model())
        model = self.model() if autocast else self.model().to(torch.bfloat16)
        data = self.inputs(dtype=torch.float32 if autocast else torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain = self.run(model, **data)
            output = self.run(sparsify(model, config), **data)
        assert output.dtype == plain.dtype
        assert (output - exact).abs().max() <= 2 * (plain - exact).abs().max()

    @torch.no_grad()
    def test_sequential_offloading(self):
        accelerate = pytest.importorskip("accelerate")
        model = self.sparse(SPARSE_VSA)
        expected = self.run(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(p.device.type == "meta" for p in model.parameters())
        torch.testing.assert_close(self.run(model), expected)

    @METHODS
    @torch.no_grad()
    def test_save_load_and_copy(self, config, tmp_path):
        model = self.sparse(config, layers=[0, len(self.LAYERS) - 1])
        expected = self.run(model)
        assert torch.equal(self.run(copy.deepcopy(model)), expected)
        save(model, tmp_path)
        loaded = load(self.model(), tmp_path)
        assert torch.equal(self.run(loaded), expected)
        assert tuple(sparse_processors(loaded)) == tuple(dict.fromkeys((self.LAYERS[0], self.LAYERS[-1])))

    @torch.no_grad()
    def test_compiled_blocks(self, config=SPARSE_SLA):
        model = self.sparse(config)
        data = [self.inputs(latent=latent) for latent in self.LATENTS]
        expected = [self.run(model, **inputs) for inputs in data]
        torch._dynamo.reset()
        # The first and the last block: they may be of different kinds.
        for name in (self.LAYERS[0], self.LAYERS[-1]):
            model.get_submodule(name.rpartition(".")[0]).compile(fullgraph=True, backend="eager")
        for inputs, output in zip(data, expected, strict=True):
            torch.testing.assert_close(self.run(model, **inputs), output, rtol=0, atol=1e-5)
