"""Configurations and block selections: what they accept, refuse, remember and convert."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal import BlockSelection, SLAConfig, VSAConfig
from foveal.blocks import lists_from_mask
from foveal.rules import count
from foveal.testing import random_selection


@pytest.mark.parametrize(
    ("ratio", "total", "expected"),
    [(0.29, 100, 29), (0.05, 512, 25), (0.1, 10, 1), (0.7, 10, 7), (1.0, 3, 3), (0.0, 9, 0), (0.9999, 10, 9)],
)
def test_count(ratio, total, expected):
    assert count(ratio, total) == expected


@given(part=st.integers(0, 3000), total=st.integers(1, 3000))
def test_count_of_an_exact_fraction_is_exact(part, total):
    assert count(min(part, total) / total, total) == min(part, total)


CONFIGS = [
    SLAConfig(),
    SLAConfig(keep_ratio=0, drop_ratio=1, linear_scope="all", feature_map="hedgehog", token_order="tile"),
    SLAConfig(block_q=128, projection=False, linear_scope="none"),
    VSAConfig(),
    VSAConfig(topk=32, tile="auto", fine_gate=True),
    VSAConfig(keep_ratio=1.0, tile=(1, 8, 8)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_round_trip_through_json(config):
    fields = json.loads(json.dumps(config.to_dict()))
    again = type(config).from_dict(fields)
    assert again == config
    assert hash(again) == hash(config)


def test_configs_are_frozen_and_replace_validates():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SLAConfig().keep_ratio = 0.5
    assert SLAConfig().replace(keep_ratio=0.2).keep_ratio == 0.2
    with pytest.raises(ValueError, match=r"keep_ratio must be in \[0, 1\], got 2"):
        SLAConfig().replace(keep_ratio=2)


def test_sparsity_is_one_minus_keep_ratio():
    assert SLAConfig(keep_ratio=0.05).sparsity == 0.95
    assert VSAConfig(keep_ratio=0.125).sparsity == 0.875
    assert VSAConfig(topk=32).sparsity is None


def test_topk_replaces_the_default_ratio():
    assert VSAConfig(topk=32).keep_ratio is None
    assert VSAConfig(topk=32).replace(topk=16) == VSAConfig(topk=16)
    assert VSAConfig(topk=32).replace(keep_ratio=0.3) == VSAConfig(keep_ratio=0.3)
    assert VSAConfig(keep_ratio=0.3).replace(topk=16, tile="auto") == VSAConfig(topk=16, tile="auto")
    with pytest.raises(ValueError, match="give topk or keep_ratio, not both"):
        VSAConfig().replace(topk=16, keep_ratio=0.3)
    assert VSAConfig(topk=32).replace(topk=None, keep_ratio=0.5) == VSAConfig(keep_ratio=0.5)


SLA_MISTAKES = [
    ({"keep_ratio": -0.1}, ValueError, r"keep_ratio must be in \[0, 1\], got -0\.1"),
    ({"keep_ratio": 1.5}, ValueError, r"keep_ratio must be in \[0, 1\], got 1\.5"),
    ({"keep_ratio": True}, TypeError, r"keep_ratio must be a number in \[0, 1\], got True \(bool\)"),
    ({"keep_ratio": "5%"}, TypeError, r"keep_ratio must be a number in \[0, 1\], got '5%' \(str\)"),
    ({"drop_ratio": None}, TypeError, r"drop_ratio must be a number in \[0, 1\], got None"),
    ({"drop_ratio": float("nan")}, ValueError, r"drop_ratio must be in \[0, 1\], got nan"),
    (
        {"keep_ratio": 0.6, "drop_ratio": 0.5},
        ValueError,
        r"keep_ratio \+ drop_ratio must be at most 1, got 0\.6 \+ 0\.5",
    ),
    ({"keep_ratio": 0.0, "linear_scope": "none"}, ValueError, r"leaves neither branch"),
    ({"block_q": 0}, ValueError, r"block_q must be at least 1, got 0"),
    ({"block_k": 64.0}, TypeError, r"block_k must be an int, got 64\.0 \(float\)"),
    ({"block_k": True}, TypeError, r"block_k must be an int, got True \(bool\)"),
    ({"feature_map": "gelu"}, ValueError, r"unknown feature_map 'gelu'; expected one of \('softmax', 'elu', 'relu'"),
    ({"linear_scope": None}, ValueError, r"unknown linear_scope None; expected one of \('marginal'"),
    ({"token_order": "zigzag"}, ValueError, r"unknown token_order 'zigzag'; expected one of \('raster', 'tile'\)"),
    ({"projection": 1}, TypeError, r"projection must be a bool, got 1"),
]
VSA_MISTAKES = [
    ({"topk": 0}, ValueError, r"topk must be at least 1, got 0"),
    ({"topk": 32.0}, TypeError, r"topk must be an int, got 32\.0 \(float\)"),
    ({"topk": 32, "keep_ratio": 0.5}, ValueError, r"give topk or keep_ratio, not both, got topk=32"),
    ({"keep_ratio": None}, TypeError, r"keep_ratio must be a number in \[0, 1\], got None"),
    ({"keep_ratio": 0.0}, ValueError, r"keep_ratio must be above 0 for VSA"),
    ({"keep_ratio": 1.01}, ValueError, r"keep_ratio must be in \[0, 1\], got 1\.01"),
    ({"tile": 64}, TypeError, r"tile must be a tuple of three ints \(frames, height, width\), got 64"),
    ({"tile": (4, 4)}, TypeError, r"tile must be a tuple of three ints \(frames, height, width\), got \(4, 4\)"),
    ({"tile": (4, 4, 0)}, ValueError, r"tile width must be at least 1, got 0"),
    ({"tile": (4, 4.0, 4)}, TypeError, r"tile height must be an int, got 4\.0"),
    ({"tile": "small"}, ValueError, r"unknown tile 'small'; expected one of \('auto', 'wide'\)"),
    ({"fine_gate": None}, TypeError, r"fine_gate must be a bool, got None"),
]


@pytest.mark.parametrize(("fields", "error", "match"), SLA_MISTAKES, ids=[str(m[0]) for m in SLA_MISTAKES])
def test_sla_config_refuses(fields, error, match):
    with pytest.raises(error, match=match):
        SLAConfig(**fields)


@pytest.mark.parametrize(("fields", "error", "match"), VSA_MISTAKES, ids=[str(m[0]) for m in VSA_MISTAKES])
def test_vsa_config_refuses(fields, error, match):
    with pytest.raises(error, match=match):
        VSAConfig(**fields)


@pytest.mark.parametrize("config_type", [SLAConfig, VSAConfig])
def test_from_dict_refuses_unknown_keys(config_type):
    with pytest.raises(ValueError, match=rf"unknown {config_type.__name__} fields \['sparsity'\]; expected some of"):
        config_type.from_dict({"keep_ratio": 0.1, "sparsity": 0.9})


@given(
    lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_labels_round_trip(lengths, sizes, seed):
    rows, columns = (-(-length // block) for length, block in zip(lengths, sizes, strict=True))
    labels = torch.randint(-1, 2, (2, 3, rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    selection = BlockSelection.from_labels(
        labels, block_q=sizes[0], block_k=sizes[1], query_length=lengths[0], key_length=lengths[1]
    )
    assert selection.labels().dtype == torch.int8
    assert torch.equal(selection.labels(), labels)
    assert torch.equal(selection.critical_mask(), labels == 1)
    assert torch.equal(selection.critical_count, (labels == 1).sum(-1, dtype=torch.int32))
    assert (selection.num_query_blocks, selection.num_key_blocks) == (rows, columns)
    assert selection.critical.dtype == selection.critical_count.dtype == torch.int32
    assert selection.critical.shape[-1] == max(1, int((labels == 1).sum(-1).max()))


def test_lists_ascend_and_end_in_zeros():
    mask = torch.tensor([[False, True, False, True], [False, False, False, False], [True, True, True, True]])
    lists, counts = lists_from_mask(mask)
    assert lists.tolist() == [[1, 3, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert counts.tolist() == [2, 0, 4]


def test_linear_masks_follow_the_scope():
    labels = torch.tensor([[[[1, 0, -1]]]])
    selection = BlockSelection.from_labels(labels, block_q=4, block_k=4, query_length=4, key_length=12)
    assert selection.linear_mask("marginal").tolist() == [[[[False, True, False]]]]
    assert selection.linear_mask("noncritical").tolist() == [[[[False, True, True]]]]
    assert selection.linear_mask("all") is None


def test_expanding_leaves_padding_out():
    labels = torch.tensor([[[[1, 0], [0, 1]]]]).expand(2, 1, 2, 2)
    sizes = torch.tensor([[3, 1], [1, 0]], dtype=torch.int32)
    selection = BlockSelection.from_labels(
        labels, block_q=2, block_k=3, query_length=3, key_length=5, key_block_sizes=sizes
    )
    mask = selection.expand(selection.critical_mask()).int()
    assert mask[0, 0].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert mask[1, 0].tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    full = dataclasses.replace(selection, key_block_sizes=None)
    assert full.key_valid().all()
    assert full.key_valid().shape == (1, 5)


class TestFromLabelsErrors:
    sizes = {"block_q": 8, "block_k": 8, "query_length": 20, "key_length": 30}  # noqa: RUF012

    def test_no_tensor(self):
        with pytest.raises(TypeError, match=r"labels must be a tensor, got list"):
            BlockSelection.from_labels([[1]], **self.sizes)

    def test_shape(self):
        match = r"labels must have shape \[B, H, 3, 4\] for lengths \(20, 30\) in blocks of \(8, 8\), got \(1, 2,"
        with pytest.raises(ValueError, match=match):
            BlockSelection.from_labels(torch.zeros(1, 2, 3, 3), **self.sizes)

    def test_values(self):
        labels = torch.zeros(1, 1, 3, 4, dtype=torch.int8)
        labels[..., 0] = 2
        with pytest.raises(ValueError, match=r"labels must be -1, 0 or 1, got \[2\]"):
            BlockSelection.from_labels(labels, **self.sizes)

    def test_sizes(self):
        with pytest.raises(ValueError, match=r"block_q must be at least 1, got 0"):
            BlockSelection.from_labels(torch.zeros(1, 1, 3, 4), **(self.sizes | {"block_q": 0}))
        with pytest.raises(TypeError, match=r"key_length must be an int, got 30\.0"):
            BlockSelection.from_labels(torch.zeros(1, 1, 3, 4), **(self.sizes | {"key_length": 30.0}))


def test_random_selections_have_rows_of_every_kind():
    """Tests rely on it: rows without a critical block, rows without a marginal one, and counts that differ."""
    labels = random_selection(query_length=96, key_length=80, block_q=8, block_k=8).labels()
    assert not (labels[:, :, 3::4] == 1).any()
    assert not (labels[:, :, 2::3] == 0).any()
    assert len((labels == 1).sum(-1).unique()) > 2
    assert (labels == 0).any()
