"""`block_sparse_attention`: its contract, the reference, and the implementation in plain PyTorch."""

import dataclasses
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from foveal import BlockSelection, block_sparse_attention, select_blocks
from foveal.kernels import cpu as torch_impl
from foveal.testing import (
    assert_close_to_reference,
    make_inputs,
    output_and_gradients,
    poison_empty,
    random_selection,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-11}

# (batch, heads, Lq, Lk, D, bq, bk): what each case is there for.
SHAPES = {
    "one token": (1, 1, 1, 1, 8, 4, 4),
    "one query": (1, 2, 1, 40, 16, 16, 8),
    "single block": (1, 2, 13, 11, 16, 16, 16),
    "exact blocks": (1, 2, 64, 64, 16, 16, 16),
    "partial blocks": (2, 2, 67, 83, 16, 8, 16),
    "long keys": (1, 1, 24, 130, 8, 16, 8),
    "long queries": (2, 1, 131, 17, 8, 8, 8),
    "head dim 128": (1, 1, 70, 70, 128, 32, 16),
    "one key short": (1, 6, 15, 63, 8, 16, 16),
}


def case(shape, **selection):
    batch, heads, query_length, key_length, head_dim, block_q, block_k = shape
    lengths = {"batch": batch, "heads": heads, "query_length": query_length, "key_length": key_length}
    chosen = random_selection(**lengths, block_q=block_q, block_k=block_k, **selection)
    return make_inputs(**lengths, head_dim=head_dim), chosen


def with_lse(selection, impl, **options):
    return lambda *qkv: block_sparse_attention(*qkv, selection, impl=impl, return_lse=True, **options)


def assert_same(ours, expected, **tolerance):
    names = ("output", "lse", "grad_query", "grad_key", "grad_value")
    for name, x, y in zip(names, ours, expected, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or TIGHT))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_matches_reference(shape):
    inputs, selection = case(shape)
    with poison_empty():
        ours = output_and_gradients(with_lse(selection, "torch"), inputs)
    assert_same(ours, output_and_gradients(with_lse(selection, "reference"), inputs))


@pytest.mark.parametrize("budget", [1, 700, 5000])
def test_chunk_size_changes_nothing(budget, monkeypatch):
    inputs, selection = case(SHAPES["partial blocks"])
    expected = output_and_gradients(with_lse(selection, "reference"), inputs)
    monkeypatch.setitem(torch_impl.CHUNK_SCORES, "cpu", budget)
    assert_same(output_and_gradients(with_lse(selection, "torch"), inputs), expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck(impl):
    inputs, selection = case((1, 2, 14, 11, 3, 4, 4), critical=0.6)
    inputs = [x.requires_grad_() for x in inputs]
    has_lse = selection.critical_count.repeat_interleave(4, -1)[..., :14] > 0
    assert has_lse.any()
    assert not has_lse.all()

    def function(*qkv):
        output, lse = block_sparse_attention(*qkv, selection, impl=impl, return_lse=True)
        return output, lse[has_lse]

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_lse_alone_gives_gradients(impl):
    (query, key, value), selection = case(SHAPES["single block"], critical=1.0, negligible=0.0)
    query.requires_grad_()
    _, lse = block_sparse_attention(query, key, value, selection, impl=impl, return_lse=True)
    (grad,) = torch.autograd.grad(lse.sum(), query)
    probs = (query.detach() @ key.mT / 4).softmax(-1)
    torch.testing.assert_close(grad, probs @ key / 4, **TIGHT)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_rows_without_critical_blocks(impl):
    inputs, _ = case(SHAPES["partial blocks"])
    labels = torch.zeros(2, 2, 9, 6, dtype=torch.int8)
    labels[:, :, 0] = 1
    selection = BlockSelection.from_labels(labels, block_q=8, block_k=16, query_length=67, key_length=83)
    output, lse, *grads = output_and_gradients(with_lse(selection, impl), inputs)
    assert (output[:, :, 8:] == 0).all()
    assert (lse[:, :, 8:] == -math.inf).all()
    assert (grads[0][:, :, 8:] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in grads)
    torch.testing.assert_close(output[:, :, :8], F.scaled_dot_product_attention(*inputs)[:, :, :8], **TIGHT)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_nothing_selected_at_all(impl):
    inputs, _ = case(SHAPES["single block"])
    labels = -torch.ones(1, 2, 1, 1, dtype=torch.int8)
    selection = BlockSelection.from_labels(labels, block_q=16, block_k=16, query_length=13, key_length=11)
    output, lse, *grads = output_and_gradients(with_lse(selection, impl), inputs)
    assert (output == 0).all()
    assert (lse == -math.inf).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("padding", [0.0, 1e4, math.nan], ids=["zeros", "large", "nan"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_padding_keys_never_count(impl, padding):
    lengths = torch.tensor([83, 40, 0])
    (query, key, value), selection = case((3, 2, 67, 83, 16, 8, 16), critical=0.5, kv_lengths=lengths)
    for sample, length in enumerate(lengths):
        key[sample, :, length:] = padding
        value[sample, :, length:] = padding
    results = output_and_gradients(with_lse(selection, impl), (query, key, value))
    output, lse, *grads = results
    assert all(torch.isfinite(x).all() for x in (output, *grads))
    assert (output[2] == 0).all()
    assert (lse[2] == -math.inf).all()

    token_mask = selection.expand(selection.critical_mask())
    scores = (query @ key.nan_to_num().mT / 4).masked_fill(~token_mask, -math.inf)
    expected = torch.nan_to_num(scores.softmax(-1)) @ value.nan_to_num()
    torch.testing.assert_close(output, expected, **TIGHT)
    torch.testing.assert_close(lse, scores.logsumexp(-1), **TIGHT)
    for sample, length in enumerate(lengths):
        assert (grads[1][sample, :, length:] == 0).all()
        assert (grads[2][sample, :, length:] == 0).all()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_against_float64(dtype, head_dim):
    shape = {"batch": 1, "heads": 2, "query_length": 150, "key_length": 190}
    inputs = make_inputs(**shape, head_dim=head_dim, dtype=dtype)
    selection = random_selection(**shape, block_q=32, block_k=32)
    reference = output_and_gradients(with_lse(selection, "reference"), [x.double() for x in inputs])
    plain = output_and_gradients(with_lse(selection, "reference"), inputs)
    ours = output_and_gradients(with_lse(selection, "torch"), inputs)
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    for name, *results in zip(("output", "lse", "grad_q", "grad_k", "grad_v"), ours, reference, plain, strict=True):
        assert_close_to_reference(*results, name=name)


def test_large_logits():
    inputs = make_inputs(query_length=70, head_dim=16, dtype=torch.bfloat16)
    exact = [x.double() for x in inputs]
    selection = random_selection(query_length=70, block_q=16, block_k=16)
    reference = output_and_gradients(with_lse(selection, "reference", scale=30.0), exact)
    assert reference[1][torch.isfinite(reference[1])].max() > 300
    assert_same(output_and_gradients(with_lse(selection, "torch", scale=30.0), exact), reference)
    plain = output_and_gradients(with_lse(selection, "reference", scale=30.0), inputs)
    ours = output_and_gradients(with_lse(selection, "torch", scale=30.0), inputs)
    for result in zip(ours, reference, plain, strict=True):
        assert_close_to_reference(*result)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_strided_views(impl):
    contiguous, selection = case(SHAPES["partial blocks"])
    views = make_inputs(batch=2, heads=2, query_length=67, key_length=83, head_dim=16, layout="BLHD")
    assert views[0].stride() != contiguous[0].stride()
    ours = output_and_gradients(with_lse(selection, impl), views)
    assert_same(ours, output_and_gradients(with_lse(selection, impl), contiguous), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
@pytest.mark.parametrize("shape", [SHAPES["partial blocks"], SHAPES["one token"]], ids=["partial", "one token"])
def test_keeping_everything_is_dense_attention(impl, shape):
    inputs, _ = case(shape)
    selection = select_blocks(*inputs[:2], block_q=shape[5], block_k=shape[6], keep_ratio=1.0)
    ours = output_and_gradients(lambda *qkv: block_sparse_attention(*qkv, selection, impl=impl), inputs)
    expected = output_and_gradients(F.scaled_dot_product_attention, inputs)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_agrees_with_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    inputs = make_inputs(query_length=60, key_length=90, head_dim=16)
    selection = random_selection(query_length=60, key_length=90, block_q=16, block_k=16)
    critical = selection.critical_mask()[0]
    block_mask = flex.create_block_mask(
        lambda b, h, q, k: critical[h, q // 16, k // 16], None, 2, 60, 90, device="cpu", BLOCK_SIZE=16
    )
    expected = flex.flex_attention(*inputs, block_mask=block_mask)
    torch.testing.assert_close(block_sparse_attention(*inputs, selection, impl="torch"), expected, **TIGHT)


@given(
    batch=st.integers(1, 2),
    query_length=st.integers(1, 50),
    key_length=st.integers(1, 50),
    block_q=st.integers(1, 20),
    block_k=st.integers(1, 20),
    critical=st.floats(0, 1),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(batch, query_length, key_length, block_q, block_k, critical, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, key_length + 1, (batch,), generator=generator) if padded else None
    shape = {"batch": batch, "heads": 1, "query_length": query_length, "key_length": key_length}
    inputs = make_inputs(**shape, head_dim=4, seed=seed)
    selection = random_selection(
        **shape, block_q=block_q, block_k=block_k, critical=critical, negligible=0.0, kv_lengths=lengths, seed=seed
    )
    ours = output_and_gradients(with_lse(selection, "torch"), inputs)
    assert_same(ours, output_and_gradients(with_lse(selection, "reference"), inputs))


def test_two_runs_give_the_same_bits():
    inputs, selection = case(SHAPES["partial blocks"])
    first, second = (output_and_gradients(with_lse(selection, "torch"), inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_inputs_are_left_alone():
    inputs, selection = case(SHAPES["partial blocks"])
    copies = [x.clone() for x in inputs]
    output_and_gradients(with_lse(selection, "torch"), inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


def test_compiles_without_graph_break():
    inputs, selection = case(SHAPES["partial blocks"])
    compiled = torch.compile(with_lse(selection, "torch"), fullgraph=True, backend="aot_eager")
    assert_same(output_and_gradients(compiled, inputs), output_and_gradients(with_lse(selection, "torch"), inputs))


def test_selecting_compiles_too():
    inputs, _ = case(SHAPES["partial blocks"])

    def select_and_attend(query, key, value):
        selection = select_blocks(query, key, block_q=8, block_k=16, keep_ratio=0.4, drop_ratio=0.2)
        return block_sparse_attention(query, key, value, selection, return_lse=True)

    compiled = torch.compile(select_and_attend, fullgraph=True, backend="aot_eager")
    assert_same(output_and_gradients(compiled, inputs), output_and_gradients(select_and_attend, inputs))


def test_one_compiled_graph_takes_several_lengths():
    def select_and_attend(query, key, value):
        selection = select_blocks(query, key, block_q=8, block_k=16, keep_ratio=0.4, drop_ratio=0.2)
        return block_sparse_attention(query, key, value, selection)

    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(select_and_attend, fullgraph=True, backend=graphs)
    for length in (50, 67, 128, 131, 200, 93):
        inputs = make_inputs(query_length=length, key_length=length + 7, head_dim=8)
        torch.testing.assert_close(compiled(*inputs), select_and_attend(*inputs), **TIGHT)
    assert graphs.frame_count < 6


@pytest.mark.parametrize("padded", [False, True])
def test_custom_ops_keep_their_promises(padded):
    lengths = torch.tensor([20, 9]) if padded else None
    inputs, selection = case((2, 1, 18, 21, 4, 8, 8), critical=0.7, kv_lengths=lengths)
    inputs = [x.requires_grad_() for x in inputs]
    lists = (selection.critical, selection.critical_count, selection.key_block_sizes, 8, 8, 0.5)
    torch.library.opcheck(torch_impl._forward_op, (*inputs, *lists))
    output, lse = (x.detach() for x in torch_impl._forward_op(*inputs, *lists))
    plain = [x.detach() for x in inputs]
    torch.library.opcheck(torch_impl._backward_op, (torch.ones_like(output), *plain, output.sum(-1), lse, *lists))


def test_activation_checkpointing_gives_the_same_gradients():
    inputs, selection = case(SHAPES["partial blocks"])
    function = with_lse(selection, "torch")
    again = output_and_gradients(lambda *qkv: checkpoint(function, *qkv, use_reentrant=False), inputs)
    assert all(torch.equal(x, y) for x, y in zip(again, output_and_gradients(function, inputs), strict=True))


class TestErrors:
    inputs = make_inputs(query_length=20, key_length=24, head_dim=8, dtype=torch.float32)
    selection = random_selection(query_length=20, key_length=24, block_q=8, block_k=8)

    def attend(self, *, query=None, key=None, value=None, selection=None, **options):
        given = (query, key, value)
        qkv = [x if y is None else y for x, y in zip(self.inputs, given, strict=True)]
        return block_sparse_attention(*qkv, self.selection if selection is None else selection, **options)

    def test_no_tensor(self):
        with pytest.raises(TypeError, match=r"value must be a tensor, got list"):
            self.attend(value=[1.0])

    def test_integer_dtype(self):
        with pytest.raises(TypeError, match=r"query must be bfloat16.*got torch\.int64"):
            self.attend(query=self.inputs[0].long())

    def test_mixed_dtypes(self):
        with pytest.raises(TypeError, match=r"one dtype, got torch\.float32 and torch\.float64 \(key\)"):
            self.attend(key=self.inputs[1].double())

    def test_mixed_devices(self):
        with pytest.raises(ValueError, match=r"one device, got cpu and meta \(value\)"):
            self.attend(value=self.inputs[2].to("meta"))

    def test_three_dimensions(self):
        with pytest.raises(ValueError, match=r"key must be non-empty and have shape \[B, H, L, D\], got \(2, 24, 8\)"):
            self.attend(key=self.inputs[1][0])

    def test_empty(self):
        with pytest.raises(ValueError, match=r"query must be non-empty"):
            self.attend(query=self.inputs[0][:, :, :0])

    def test_strided_last_dimension(self):
        wide = torch.randn(1, 2, 20, 16)[..., ::2]
        with pytest.raises(ValueError, match=r"last dimension of query must be contiguous"):
            self.attend(query=wide)

    def test_key_and_value_differ(self):
        with pytest.raises(ValueError, match=r"key and value must have one shape"):
            self.attend(value=self.inputs[2][:, :, :-1])

    def test_head_dim_mismatch(self):
        with pytest.raises(ValueError, match=r"agree in batch, heads and head_dim"):
            self.attend(query=torch.randn(1, 2, 20, 4))

    def test_selection_of_another_type(self):
        with pytest.raises(TypeError, match=r"selection must be a BlockSelection, got Tensor"):
            self.attend(selection=self.selection.labels())

    def test_selection_for_other_lengths(self):
        other = dataclasses.replace(self.selection, query_length=19)
        with pytest.raises(ValueError, match=r"made for \(B, H, Lq, Lk\) = \(1, 2, 19, 24\).* have \(1, 2, 20, 24\)"):
            self.attend(selection=other)

    def test_selection_on_another_device(self):
        other = dataclasses.replace(self.selection, critical=self.selection.critical.to("meta"))
        with pytest.raises(ValueError, match=r"selection is on meta, but query is on cpu"):
            self.attend(selection=other)

    def test_unknown_impl_lists_the_valid_ones(self):
        with pytest.raises(ValueError, match=r"unknown impl 'cuda'; expected one of \('auto', 'reference', 'torch'"):
            self.attend(impl="cuda")

    def test_named_impl_never_falls_back(self):
        with pytest.raises(ValueError, match=r"impl=\"triton\" cannot run here: "):
            self.attend(impl="triton")

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
    def test_scale_out_of_range(self, scale):
        with pytest.raises(ValueError, match=r"scale must be finite and above 0"):
            self.attend(scale=scale)

    def test_scale_of_another_type(self):
        with pytest.raises(TypeError, match=r"scale must be a number or None, got True"):
            self.attend(scale=True)
