"""Block selection, against the rule written out in plain Python loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal import select_blocks
from foveal.blocks import pick_blocks, pick_by_rule, pool_blocks, pooled_scores
from foveal.kernels import choice
from foveal.rules import Choosing, FixedBlocks, rule_of
from foveal.testing import make_inputs


def count_by_hand(ratio, total):
    return math.floor(ratio * total + 1e-6)


def labels_by_hand(scores, *, keep_ratio=None, topk=None, drop_ratio=0.0, valid=None, keys=(), queries=()):
    """[B][H][Tq][Tk] labels from scores by the letter of the rule.

    Args:
        valid: for each sample how many leading blocks hold a key.
        keys, queries: protected blocks.
    """
    result = []
    for b, sample in enumerate(scores.tolist()):
        n = scores.shape[-1] if valid is None else valid[b]
        if topk is not None:
            n_critical = min(topk, n)
        else:
            n_critical = max(1, count_by_hand(keep_ratio, n)) if keep_ratio and n else 0
        heads = []
        for head in sample:
            rows = []
            for i, row in enumerate(head):
                best_first = sorted(range(n), key=lambda j: (-row[j], j))
                critical = set(best_first[:n_critical]) | {j for j in keys if j < n}
                if i in queries:
                    critical = set(range(n))
                rest = [j for j in best_first if j not in critical]
                n_negligible = min(count_by_hand(drop_ratio, n), len(rest))
                negligible = set(rest[len(rest) - n_negligible :])
                labels = [1 if j in critical else -1 if j in negligible else 0 for j in range(len(row))]
                rows.append(labels)
            heads.append(rows)
        result.append(heads)
    return torch.tensor(result, dtype=torch.int8)


def picked_labels(scores, **options):
    """pick_blocks as labels; without a dropped block the rest is marginal."""
    critical, counts, marginal = pick_blocks(scores, **options)
    labels = torch.zeros(scores.shape, dtype=torch.int8)
    if marginal is not None:
        labels = marginal.to(torch.int8) - 1
    for index in torch.cartesian_prod(*(torch.arange(side) for side in counts.shape)).tolist():
        n = int(counts[tuple(index)])
        listed = critical[tuple(index)].tolist()
        assert listed[:n] == sorted(set(listed[:n])), "lists are ascending, without repeats"
        assert not any(listed[n:]), "entries past the count are 0"
        for j in listed[:n]:
            assert marginal is None or not marginal[(*index, j)]
            labels[(*index, j)] = 1
    return labels


blocks = st.integers(1, 12)


@given(
    rows=blocks,
    columns=blocks,
    keep=st.sampled_from([0.0, 0.05, 0.29, 1 / 3, 0.5, 0.999, 1.0]),
    drop=st.sampled_from([0.0, 0.1, 0.29, 0.5, 1.0]),
    levels=st.sampled_from([1, 2, 5, 1000]),
    protect=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_picks_by_the_rule(rows, columns, keep, drop, levels, protect, seed):
    """Few levels make many ties; one makes everything a tie."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (2, 1, rows, columns), generator=generator).double() - levels // 2
    keys = (columns // 3, columns // 3 + 1) if protect[0] else None
    queries = (rows // 2, rows) if protect[1] else None
    ours = picked_labels(scores, keep_ratio=keep, drop_ratio=drop, protected_keys=keys, protected_queries=queries)
    ranges = [range(*(pair or (0, 0))) for pair in (keys, queries)]
    expected = labels_by_hand(scores, keep_ratio=keep, drop_ratio=drop, keys=ranges[0], queries=ranges[1])
    assert torch.equal(ours, expected)


@given(columns=blocks, topk=st.integers(1, 20), seed=st.integers(0, 99))
def test_topk_is_capped(columns, topk, seed):
    scores = torch.randint(0, 3, (1, 2, 4, columns), generator=torch.Generator().manual_seed(seed)).double()
    assert torch.equal(picked_labels(scores, topk=topk), labels_by_hand(scores, topk=topk))


@given(
    valid=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    keep=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    drop=st.sampled_from([0.0, 0.3]),
    protected=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ratios_count_the_valid_blocks_of_each_sample(valid, keep, drop, protected, seed):
    scores = torch.randint(0, 4, (2, 1, 3, 9), generator=torch.Generator().manual_seed(seed)).double()
    protected_keys = (2, 4) if protected else None
    ours = picked_labels(
        scores, keep_ratio=keep, drop_ratio=drop, valid_blocks=torch.tensor(valid), protected_keys=protected_keys
    )
    expected = labels_by_hand(
        scores, keep_ratio=keep, drop_ratio=drop, valid=valid, keys=range(2, 4) if protected else ()
    )
    for sample, n in enumerate(valid):
        assert torch.equal(ours[sample, ..., :n], expected[sample, ..., :n])
        assert not (ours[sample, ..., n:] == 1).any()


@pytest.mark.parametrize(
    ("keep", "drop", "total", "critical", "negligible"),
    [
        (0.29, 0.0, 100, 29, 0),  # int(0.29 * 100) is 28
        (0.05, 0.10, 512, 25, 51),
        (0.001, 0.0, 100, 1, 0),
        (0.0, 0.25, 8, 0, 2),
        (0.3, 0.7, 10, 3, 7),
        (0.01, 0.99, 10, 1, 9),
        (1.0, 0.0, 7, 7, 0),
        (0.0, 1.0, 7, 0, 7),
    ],
)
def test_counts(keep, drop, total, critical, negligible):
    query, key, _ = make_inputs(query_length=6, key_length=2 * total, head_dim=4)
    selection = select_blocks(query, key, block_q=3, block_k=2, keep_ratio=keep, drop_ratio=drop)
    labels = selection.labels()
    assert ((labels == 1).sum(-1) == critical).all()
    assert ((labels == -1).sum(-1) == negligible).all()
    assert (selection.critical_count == critical).all()


@pytest.mark.parametrize("length", [1, 5, 16, 37, 40])
def test_pools_the_mean_of_the_valid_tokens(length):
    x = make_inputs(query_length=length, head_dim=4)[0]
    expected = torch.stack([part.mean(2) for part in x.split(8, 2)], 2)
    torch.testing.assert_close(pool_blocks(x, 8), expected)
    short = max(0, length - 3)
    starts = torch.arange(expected.shape[2]) * 8
    sizes = (short - starts).clamp(0, 8)[None]
    x[:, :, short:] = math.nan
    means = [x[:, :, start : min(start + 8, short)].mean(2) for start in range(0, length, 8)]
    torch.testing.assert_close(pool_blocks(x, 8, sizes), torch.stack(means, 2).nan_to_num(0))


def test_pools_in_float32():
    """One large token beside small ones: a bfloat16 sum would lose them and make ties."""
    x = torch.full((1, 1, 128, 1), 0.001, dtype=torch.bfloat16)
    x[0, 0, 0] = 64.0
    pooled = pool_blocks(x, 128)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, x.double().mean(2, keepdim=True).float())
    assert pool_blocks(x.double(), 128).dtype == torch.float64


@given(
    query_length=st.integers(1, 40),
    key_length=st.integers(1, 40),
    block_q=st.integers(1, 9),
    block_k=st.integers(1, 9),
    ratios=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    seed=st.integers(0, 99),
)
def test_selects_by_the_rule(query_length, key_length, block_q, block_k, ratios, seed):
    query, key, _ = make_inputs(
        batch=2, heads=1, query_length=query_length, key_length=key_length, head_dim=4, seed=seed
    )
    selection = select_blocks(query, key, block_q=block_q, block_k=block_k, keep_ratio=ratios[0], drop_ratio=ratios[1])
    pooled = [
        torch.stack([part.mean(2) for part in x.split(block, 2)], 2) for x, block in ((query, block_q), (key, block_k))
    ]
    probabilities = (pooled[0] @ pooled[1].mT / 2).softmax(-1)
    assert torch.equal(selection.labels(), labels_by_hand(probabilities, keep_ratio=ratios[0], drop_ratio=ratios[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_of_constant_inputs_go_to_the_ends(dtype):
    query, key = torch.ones(1, 2, 40, 16, dtype=dtype), torch.full((1, 2, 80, 16), 0.3, dtype=dtype)
    selection = select_blocks(query, key, block_q=8, block_k=8, keep_ratio=0.3, drop_ratio=0.2)
    expected = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, -1, -1], dtype=torch.int8).expand(1, 2, 5, 10)
    assert torch.equal(selection.labels(), expected)


def test_duplicated_keys_go_to_the_lower_block():
    query, key, _ = make_inputs(query_length=32, key_length=32, head_dim=16, dtype=torch.float32)
    key = torch.cat((key, key), 2)
    selection = select_blocks(query, key, block_q=8, block_k=8, keep_ratio=0.125)
    assert selection.critical.max() < 4


def test_marginal_is_none_without_dropping():
    query, key, _ = make_inputs(query_length=32, head_dim=8)
    kept = select_blocks(query, key, block_q=8, block_k=8, keep_ratio=0.5)
    assert kept.marginal is None
    assert set(kept.labels().unique().tolist()) == {0, 1}
    assert torch.equal(kept.linear_mask("marginal"), kept.labels() == 0)
    dropped = select_blocks(query, key, block_q=8, block_k=8, keep_ratio=0.5, drop_ratio=0.25)
    assert torch.equal(dropped.critical, kept.critical)
    assert torch.equal(dropped.marginal, dropped.labels() == 0)
    assert torch.equal(dropped.linear_mask("noncritical"), dropped.labels() != 1)
    assert dropped.linear_mask("all") is None


def test_protected_tokens_protect_their_blocks():
    query, key, _ = make_inputs(batch=2, query_length=60, key_length=70, head_dim=8)
    lengths = torch.tensor([70, 33])
    selection = select_blocks(
        query,
        key,
        block_q=8,
        block_k=8,
        keep_ratio=0.2,
        drop_ratio=0.3,
        kv_lengths=lengths,
        protected_keys=(15, 25),
        protected_queries=(50, 51),
    )
    labels = selection.labels()
    assert (labels[..., 1:4] == 1).all()
    assert (labels[0, :, 6] == 1).all()
    assert (labels[1, :, 6, :5] == 1).all()
    assert not (labels[1, ..., 5:] == 1).any()
    plain = select_blocks(query, key, block_q=8, block_k=8, keep_ratio=0.2, kv_lengths=lengths).labels()
    assert (labels[plain == 1] == 1).all()


def test_kv_lengths_select_as_if_the_padding_were_not_there():
    query, key, _ = make_inputs(batch=3, query_length=20, key_length=50, head_dim=8)
    lengths = torch.tensor([50, 27, 0])
    options = {"block_q": 8, "block_k": 8, "keep_ratio": 0.5, "drop_ratio": 0.25}
    for sample, length in enumerate(lengths):
        key[sample, :, length:] = math.nan
    selection = select_blocks(query, key, **options, kv_lengths=lengths)
    labels = selection.labels()
    assert selection.key_block_sizes.tolist() == [[8] * 6 + [2], [8, 8, 8, 3, 0, 0, 0], [0] * 7]
    assert torch.equal(selection.key_valid(), torch.arange(50) < lengths[:, None])
    for sample, n in enumerate((7, 4)):
        alone = select_blocks(query[[sample]], key[[sample], :, : lengths[sample]], **options).labels()
        assert torch.equal(labels[[sample], ..., :n], alone)
    assert (selection.critical_count[2] == 0).all()
    assert (labels[2] != 1).all()


def test_two_runs_select_the_same():
    query, key, _ = make_inputs(query_length=90, head_dim=8, dtype=torch.bfloat16)
    first, second = (select_blocks(query, key, block_q=8, block_k=8, keep_ratio=0.3, drop_ratio=0.3) for _ in range(2))
    assert torch.equal(first.critical, second.critical)
    assert torch.equal(first.marginal, second.marginal)


def test_strides_do_not_matter():
    contiguous = make_inputs(query_length=45, head_dim=8)[:2]
    views = make_inputs(query_length=45, head_dim=8, layout="BLHD")[:2]
    first, second = (select_blocks(*qk, block_q=8, block_k=8, keep_ratio=0.3) for qk in (contiguous, views))
    assert torch.equal(first.critical, second.critical)


def test_is_not_differentiated_through():
    query, key, _ = make_inputs(query_length=32, head_dim=8, requires_grad=True)
    selection = select_blocks(query, key, block_q=8, block_k=8, keep_ratio=0.3, drop_ratio=0.3)
    tensors = (selection.critical, selection.critical_count, selection.marginal)
    assert not any(x.requires_grad for x in tensors)


class TestErrors:
    query, key, _ = make_inputs(query_length=32, head_dim=8, dtype=torch.float32)

    def select(self, *, query=query, key=key, block_q=8, block_k=8, keep_ratio=0.5, **options):
        return select_blocks(query, key, block_q=block_q, block_k=block_k, keep_ratio=keep_ratio, **options)

    @pytest.mark.parametrize("name", ["keep_ratio", "drop_ratio"])
    @pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
    def test_ratio_out_of_range(self, name, value):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got {value}"):
            self.select(**{name: value})

    @pytest.mark.parametrize("value", [True, "0.5", None])
    def test_ratio_of_another_type(self, value):
        with pytest.raises(TypeError, match=r"keep_ratio must be a number in \[0, 1\]"):
            self.select(keep_ratio=value)

    def test_ratios_above_one(self):
        with pytest.raises(ValueError, match=r"keep_ratio \+ drop_ratio must be at most 1, got 0\.5 \+ 0\.6"):
            self.select(drop_ratio=0.6)

    def test_block_sizes(self):
        with pytest.raises(ValueError, match=r"block_q must be at least 1, got 0"):
            self.select(block_q=0)
        with pytest.raises(TypeError, match=r"block_k must be an int, got 64\.0 \(float\)"):
            self.select(block_k=64.0)

    def test_tensors(self):
        with pytest.raises(TypeError, match=r"query must be a floating-point tensor, got torch\.int64"):
            self.select(query=self.query.long())
        with pytest.raises(ValueError, match=r"key must be non-empty.*got \(1, 2, 0, 8\)"):
            self.select(key=self.key[:, :, :0])
        with pytest.raises(ValueError, match=r"agree in batch, heads and head_dim, got .* and \(1, 1, 32, 8\)"):
            self.select(key=self.key[:, :1])
        with pytest.raises(ValueError, match=r"query and key must be on one device, got cpu and meta"):
            self.select(key=self.key.to("meta"))

    def test_kv_lengths(self):
        with pytest.raises(TypeError, match=r"kv_lengths must be an integer tensor, got torch\.float32"):
            self.select(kv_lengths=torch.tensor([3.0]))
        with pytest.raises(TypeError, match=r"kv_lengths must be an integer tensor, got <class 'list'>"):
            self.select(kv_lengths=[3])
        with pytest.raises(ValueError, match=r"kv_lengths must have shape \[1\], got \[2\]"):
            self.select(kv_lengths=torch.tensor([3, 4]))
        with pytest.raises(ValueError, match=r"kv_lengths must be in \[0, 32\], got \[33\]"):
            self.select(kv_lengths=torch.tensor([33]))

    @pytest.mark.parametrize("name", ["protected_keys", "protected_queries"])
    def test_protected_ranges(self, name):
        with pytest.raises(TypeError, match=rf"{name} must be a token range \(start, stop\), got 5"):
            self.select(**{name: 5})
        with pytest.raises(ValueError, match=rf"{name} must satisfy 0 <= start <= stop <= 32, got \(30, 33\)"):
            self.select(**{name: (30, 33)})
        assert (self.select(**{name: (4, 4)}).critical_count == 2).all()

    def test_scale(self):
        with pytest.raises(ValueError, match=r"scale must be finite and above 0, got -1"):
            self.select(scale=-1)


@pytest.mark.parametrize("most", [1, 40, 10**6])
def test_blocks_are_chosen_piece_by_piece_as_at_once(monkeypatch, most):
    """So many scores at a time, ties among them."""
    monkeypatch.setattr(choice, "MOST_SCORES", most)
    query, key = torch.randn(2, 3, 11, 8), torch.randn(2, 3, 13, 8)
    key[:, :, 7] = key[:, :, 2]
    ranges = torch.tensor([[[i % 4, i % 4 + i % 3], [0, 0]] for i in range(11)], dtype=torch.int32)
    fixed = FixedBlocks(ranges, torch.zeros(3, dtype=torch.int8))
    further = {"keep_ratio": (0.2, 0.5, 0.2), "keep_mass": 0.5, "max_keep_ratio": 0.6, "fixed": fixed}
    for options in ({"topk": 4}, further):
        rule = rule_of(13, query.device, (1, 1), Choosing(**options))
        critical, counts = choice.choose_in_pieces(query, key, 0.5, rule)
        expected, expected_counts, _ = pick_by_rule(pooled_scores(query, key, 0.5), rule, False)
        assert torch.equal(critical, expected)
        assert torch.equal(counts, expected_counts)
