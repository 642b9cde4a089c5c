"""SLA2 on Triton's kernels without a GPU: interpreted, see `interpreted`. The same cases run on GPUs."""

import sys

import pytest
from interpreted import mend_interpreter, pretend_to_be_on, run_interpreted

# name: (block_q, block_k, D, heads, queries, keys, valid keys of each sample or None, log-odds of alpha, dtype)
CASES = {
    "partial blocks": (64, 64, 64, 2, 150, 201, None, 1.0, "bfloat16"),
    "wide query blocks": (128, 64, 64, 1, 150, 150, None, 2.2, "float16"),
    "padding": (64, 128, 64, 1, 130, 201, (201, 70), 0.0, "bfloat16"),
    "128 features": (64, 64, 128, 1, 70, 150, None, 0.5, "bfloat16"),
    "eight bits": (64, 64, 64, 1, 130, 201, (201, 70), 1.0, "bfloat16"),
    "large logits": (64, 64, 64, 2, 150, 330, None, 1.0, "bfloat16"),
    "one block": (64, 64, 64, 1, 70, 40, None, 1.0, "float16"),
    "no linear branch": (64, 64, 64, 2, 150, 330, (330, 201), None, "bfloat16"),
    "no linear branch, wide, eight bits": (128, 64, 128, 1, 150, 201, None, None, "float16"),
    "a router for each head": (64, 64, 64, 2, 150, 201, (201, 130), 1.0, "bfloat16"),
    "no linear branch, a router for each head": (64, 64, 64, 2, 70, 201, (201, 130), None, "bfloat16"),
}
NAMES = ("output", "grad_query", "grad_key", "grad_value", "grad_alpha", "grad_proj_query", "grad_proj_key")


def make_case(name, device):
    """(query, key, value, alpha_logits, proj_query, proj_key), the configuration, and the options of the choice."""
    import torch

    from foveal import SLA2Config
    from foveal.testing import make_inputs

    block_q, block_k, head_dim, heads, length, keys, lengths, logit, dtype = CASES[name]
    config = SLA2Config(keep_ratio=0.4, block_q=block_q, block_k=block_k, alpha_rows=2)
    config = config.replace(precision="int8") if "eight bits" in name else config
    config = config.replace(linear_scope="none") if logit is None else config
    sizes = {"batch": 1 if lengths is None else 2, "heads": heads, "head_dim": head_dim, "device": device}
    query, key, value = make_inputs(
        query_length=length, key_length=keys, layout="BLHD", dtype=getattr(torch, dtype), **sizes
    )
    if name == "large logits":  # also by the mean of the keys
        query, key = 6 * query, key + 1
    generator = torch.Generator().manual_seed(2)
    # Without a linear branch they are not read.
    logits = (logit or 0.0) + torch.randn(heads, 2, generator=generator) / 4
    shape = (heads,) * ("a router for each head" in name) + (head_dim, head_dim)
    projections = (torch.randn(shape, generator=generator) / head_dim**0.5 for _ in range(2))
    weights = (x.to(device) for x in (logits, *projections))
    lengths = None if lengths is None else torch.tensor(lengths, device=device)
    return (query, key, value + 1, *weights), config, lengths


def ratio(config, logits):
    """What a call is told of the log-odds of alpha."""
    return {} if config.linear_scope == "none" else {"alpha_logits": logits}


def check_case(name, device, attend):
    """`attend`(tensors, config, selection or None, lengths) against the reference over the same blocks."""
    import torch

    from foveal import sla2_attention
    from foveal.layout import Where
    from foveal.methods.routing import Router
    from foveal.methods.sla2.attention import select_routed
    from foveal.testing import assert_close_to_reference, output_and_gradients, poison_empty, relative_error

    inputs, config, lengths = make_case(name, device)
    selection = select_routed(*inputs[:2], config, Router(*inputs[4:]), Where(kv_lengths=lengths))

    def reference(query, key, value, logits, *projections):
        named = dict(zip(("proj_query", "proj_key"), projections, strict=True))
        return sla2_attention(
            query, key, value, config=config, selection=selection, impl="reference", **ratio(config, logits), **named
        )

    poisoned = inputs
    if lengths is not None:
        padding = (torch.arange(inputs[1].shape[2], device=device) >= lengths[:, None])[:, None, :, None]
        poisoned = (inputs[0], *(x.masked_fill(padding, torch.nan) for x in inputs[1:3]), *inputs[3:])
    exact = output_and_gradients(reference, [x.double() for x in inputs])
    plain = output_and_gradients(reference, inputs)
    for given in (selection, None):
        with poison_empty():
            ours = output_and_gradients(lambda *x, given=given: attend(x, config, given, lengths), poisoned)
        for label, x, y, z in zip(NAMES, ours, exact, plain, strict=True):
            if label.startswith("grad_proj"):
                factor, floor = 2, 2 * torch.finfo(inputs[0].dtype).eps
                if config.linear_scope != "none":  # its states have 8 bits
                    factor, floor = 6, 2**-8
                limit = max(factor * relative_error(z, y), floor)
                assert relative_error(x, y) <= limit, f"{name}: {label}: {relative_error(x, y):.2e} exceeds {limit:.2e}"
            elif x.dtype == torch.float32:  # sums over rows whose parts cancel, from half-precision outputs
                assert_close_to_reference(x, y, z, name=f"{name}: {label}", factor=6.0)
            elif "eight bits" in name and label != "output":
                # A value on the border of two integers may go either way, see test_int8_triton.py.
                limit = max(2 * relative_error(z, y), 2 * torch.finfo(x.dtype).eps)
                assert relative_error(x, y) <= limit, f"{name}: {label}: {relative_error(x, y):.2e} exceeds {limit:.2e}"
                limit = max(2 * (z.double() - y).abs().max(), y.abs().max() / 127)
                assert (x.double() - y).abs().max() <= limit, f"{name}: one entry of {label}"
            else:
                assert_close_to_reference(x, y, z, name=f"{name}: {label}")


def run_case(name: str) -> None:
    from foveal.kernels import api
    from foveal.methods.sla2 import attention, blocks

    pretend_to_be_on("sm_90")
    api.why_not = lambda backend, *_, **__: None if backend == "triton" else "interpreted"
    blocks.fits_kernel = lambda *_: True

    def attend(tensors, config, selection, lengths):
        query, key, value, logits, proj_query, proj_key = tensors
        given = {"selection": selection} if selection is not None else {"kv_lengths": lengths}
        named = {**ratio(config, logits), "proj_query": proj_query, "proj_key": proj_key}
        return attention.sla2_attention(query, key, value, config=config, impl="triton", **given, **named)

    check_case(name, "cpu", attend)


def with_fakes(run):
    """The forward of an operator, whose results must be as its fakes say."""

    def checked(self, tensors, given):
        from foveal.kernels.values import unflatten

        numbers, options, save = given
        results = run(self, tensors, given)
        outputs, saved = self._fake(unflatten(tensors, numbers), options)
        fakes = [*outputs, *saved] if save else outputs
        known = [[(x.shape, x.stride(), x.dtype) for x in several] for several in (results, fakes)]
        assert known[0] == known[1]
        return results

    return checked


def run_ways() -> None:
    """The custom operators, checkpointed or not, give the bits of the autograd function, in what their fakes tell."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from foveal.kernels import api, operator
    from foveal.methods.sla2 import attention, blocks
    from foveal.testing import output_and_gradients, relative_error

    pretend_to_be_on("sm_90")
    api.why_not = lambda backend, *_, **__: None if backend == "triton" else "interpreted"
    blocks.fits_kernel = lambda *_: True
    operator.KernelOperator.run = with_fakes(operator.KernelOperator.run)
    is_plain = operator.is_plain
    for name in ("128 features", "no linear branch, a router for each head"):
        inputs, config, lengths = make_case(name, "cpu")

        def attend(query, key, value, logits, proj_query, proj_key, config=config, lengths=lengths):
            named = {**ratio(config, logits), "proj_query": proj_query, "proj_key": proj_key, "kv_lengths": lengths}
            return attention.sla2_attention(query, key, value, config=config, impl="triton", **named)

        operator.is_plain = is_plain
        expected = output_and_gradients(attend, inputs)
        operator.is_plain = lambda *_: False
        for way in (attend, lambda *x, attend=attend: checkpoint(attend, *x, use_reentrant=False)):
            got = output_and_gradients(way, inputs)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        with torch.no_grad():  # which keeps no states, and rounds Z as it rounds H
            assert relative_error(attend(*inputs), expected[0]) < 5e-3


def main(names) -> None:
    mend_interpreter()
    for name in names:
        if name == "ways":
            run_ways()
        else:
            run_case(name)


# The interpreter takes seconds for a case. The others are left out unless asked for.
QUICK = ("padding", "no linear branch", "ways")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.exhaustive) for x in (*CASES, "ways")]
)
def test_interpreted(name):
    pytest.importorskip("triton")
    run_interpreted(__file__, [name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["triton", "gluon"])
def test_on_gpu(name, impl):
    import torch
    from on_kernels import skip_without

    from foveal import sla2_attention

    inputs, config, _ = make_case(name, "cuda")
    skip_without(impl, *inputs[:3], config.block_q, config.block_k, config.precision)

    def attend(tensors, config, selection, lengths):
        query, key, value, logits, proj_query, proj_key = tensors
        given = {"selection": selection} if selection is not None else {"kv_lengths": lengths}
        named = {**ratio(config, logits), "proj_query": proj_query, "proj_key": proj_key}
        return sla2_attention(query, key, value, config=config, impl=impl, **given, **named)

    for _ in range(4):  # the third forward and the fourth backward are replayed
        check_case(name, "cuda", attend)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    check_case(name, "cuda", compiled)


if __name__ == "__main__":
    main(sys.argv[1:])
