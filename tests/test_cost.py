"""FLOPs and bytes, against counts worked out by hand and against what PyTorch counts while it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveal import SLAConfig, VideoGrid, VSAConfig
from foveal.methods.cost import AttentionCost, CostPart, attention_cost

WAN_480P = {"grid": VideoGrid(21, 30, 52), "heads": 12, "head_dim": 128}


def names(cost):
    return [part.name for part in cost.parts]


def share(cost, name):
    return cost.part(name).flops / cost.dense.flops


def test_dense():
    cost = attention_cost(None, query_length=100, key_length=300, heads=2, head_dim=64, batch=3)
    assert cost.dense.flops == cost.flops == 4 * 3 * 2 * 100 * 300 * 64
    assert cost.dense.bytes == cost.bytes == 2 * 3 * 2 * 64 * (100 + 300 + 300 + 100)
    assert cost.flops_ratio == cost.reduction == 1.0


def test_wan_480p_at_95_percent():
    """The sparse part is 25 of 512 blocks; the linear branch is not free, and 64x64 marginal sums cost most of it."""
    cost = attention_cost(SLAConfig(), **WAN_480P)
    assert names(cost) == ["selection", "sparse", "state build", "mask GEMM", "apply", "projection"]
    assert share(cost, "sparse") == pytest.approx(25 / 512, rel=1e-3)
    assert cost.part("mask GEMM").flops == 2 * 12 * 512 * 512 * 128 * 129
    assert share(cost, "mask GEMM") == pytest.approx(0.016, abs=3e-4)
    assert share(cost, "state build") == pytest.approx(128 / 2 / 32760, rel=0.02)
    assert cost.flops_ratio == pytest.approx(0.0706, abs=1e-4)
    assert cost.reduction == pytest.approx(14.2, abs=0.05)


@pytest.mark.parametrize(("block_q", "block_k", "mask_gemm"), [(64, 64, 0.0158), (128, 64, 0.0079), (128, 128, 0.0039)])
def test_larger_blocks_make_the_mask_gemm_cheaper(block_q, block_k, mask_gemm):
    cost = attention_cost(SLAConfig(block_q=block_q, block_k=block_k), **WAN_480P)
    assert share(cost, "mask GEMM") == pytest.approx(mask_gemm, abs=1e-4)


def test_parts_that_a_configuration_lacks_are_absent():
    def parts(**fields):
        return names(attention_cost(SLAConfig(**fields), **WAN_480P))

    everything = ["selection", "sparse", "state build", "mask GEMM", "apply", "projection"]
    assert parts(linear_scope="noncritical") == everything
    assert parts(linear_scope="all") == [name for name in everything if name != "mask GEMM"]
    assert parts(linear_scope="none") == ["selection", "sparse"]
    assert parts(keep_ratio=0.0) == [name for name in everything if name != "sparse"]
    assert parts(projection=False) == everything[:-1]
    assert parts(token_order="tile") == ["reorder", *everything]
    assert parts(feature_map="hedgehog") == [*everything[:2], "feature map", *everything[2:]]


def test_counts_follow_the_rule_of_the_selection():
    def blocks(keep_ratio, length):
        cost = attention_cost(SLAConfig(keep_ratio=keep_ratio), query_length=length, heads=1, head_dim=64)
        return cost.part("sparse").flops / (4 * -(-length // 64) * 64 * 64 * 64)

    assert blocks(0.29, 6400) == 29
    assert blocks(0.001, 6400) == 1
    assert blocks(0.05, 32760) == 25
    assert blocks(0.5, 65) == 1


def test_sla_parts_are_what_pytorch_counts():
    """The products of the method written out, run under PyTorch's own FLOP counter."""
    lq, lk, d, bq, bk = 128, 192, 16, 32, 64
    config = SLAConfig(keep_ratio=0.34, drop_ratio=0.3, block_q=bq, block_k=bk, feature_map="hedgehog")
    cost = attention_cost(config, query_length=lq, key_length=lk, heads=3, head_dim=d, batch=2)
    pairs, tq, tk, kept, features = 6, 4, 3, 1, 32
    rows, states = torch.empty(pairs, tq, bq, features), torch.empty(pairs, tk, features, d + 1)
    query, key = torch.empty(pairs, tq, bq, d), torch.empty(pairs, tq, kept * bk, d)

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    mask = torch.empty(pairs, tq, tk)
    products = {
        "sparse": lambda: (query @ key.mT) @ key,
        "feature map": lambda: torch.empty(pairs * (lq + lk), d) @ torch.empty(d, d),
        "mask GEMM": lambda: mask @ states.flatten(2),
        "apply": lambda: rows @ (mask @ states.flatten(2)).unflatten(2, (features, d + 1)),
    }
    assert cost.part("sparse").flops == flops(products["sparse"])
    assert cost.part("feature map").flops == flops(products["feature map"])
    assert cost.part("mask GEMM").flops == flops(products["mask GEMM"])
    assert cost.part("apply").flops == flops(products["apply"]) - flops(products["mask GEMM"])
    assert cost.part("state build").flops == pairs * lk * (2 * features * d + features)
    assert cost.part("selection").flops == pairs * (lq + lk) * d + 2 * pairs * tq * tk * d
    assert cost.part("projection").flops == 2 * pairs * lq * d * d + pairs * lq * d


def test_backward_of_each_part():
    """Products whose operands are recomputed count again; sums and choices have no backward."""

    def backward(config):
        return {part.name: part.backward for part in attention_cost(config, **WAN_480P).parts if part.flops}

    sla = {"selection": 0, "sparse": 2.5, "feature map": 2, "state build": 3, "mask GEMM": 2, "apply": 3}
    assert backward(SLAConfig(feature_map="hedgehog")) == sla | {"projection": 2}
    assert backward(VSAConfig()) == {"coarse": 2, "fine": 2.5, "gates": 2, "combine": 2}
    dense = attention_cost(None, **WAN_480P)
    assert dense.backward_flops == 2.5 * dense.flops


def test_sla_bytes_by_hand():
    config = SLAConfig(keep_ratio=0.5, block_q=32, block_k=32)
    cost = attention_cost(config, query_length=64, key_length=128, heads=1, head_dim=16)
    query, key, lists, mask, state = 64 * 16 * 2, 128 * 16 * 2, 2 * (2 + 1) * 4, 2 * 4 * 2, 16 * (16 * 2 + 4)
    assert cost.part("selection").bytes == query + key + lists + mask
    assert cost.part("sparse").bytes == query + key + key + query + lists + 64 * 4
    assert cost.part("state build").bytes == key + key + 4 * state
    assert cost.part("mask GEMM").bytes == mask + (4 + 2) * state
    assert cost.part("apply").bytes == query + 2 * state + query
    assert cost.part("projection").bytes == query + query + query + 16 * 17 * 4
    assert cost.bytes == sum(part.bytes for part in cost.parts)


def test_one_global_sum_moves_one_state():
    config = SLAConfig(linear_scope="all", projection=False)
    cost = attention_cost(config, query_length=640, heads=2, head_dim=64)
    tensor, state = 2 * 640 * 64 * 2, 2 * 64 * (64 * 2 + 4)
    assert cost.part("state build").bytes == 2 * tensor + state
    assert cost.part("apply").bytes == 3 * tensor + state


def test_vsa_counts_slots():
    grid = VideoGrid(21, 30, 52)
    padded, tight = (attention_cost(VSAConfig(topk=32, tile=tile), **WAN_480P) for tile in ((4, 4, 4), "auto"))
    assert names(padded) == ["reorder", "coarse", "selection", "fine", "gates", "combine"]
    assert padded.part("fine").flops == 4 * 12 * (624 * 64) * (32 * 64) * 128
    assert tight.part("fine").flops == 4 * 12 * (546 * 64) * (32 * 64) * 128
    assert padded.part("coarse").flops == 12 * (3 * 624 * 64 * 128 + 4 * 624 * 624 * 128)
    assert padded.part("gates").flops == 2 * grid.num_tokens * 1536 * 1536
    assert padded.part("selection").flops == padded.part("reorder").flops == 0
    both = attention_cost(VSAConfig(topk=32, fine_gate=True), **WAN_480P)
    assert both.part("gates").flops == 2 * padded.part("gates").flops


def test_vsa_counts_cubes_by_the_rule():
    def cubes(config, grid):
        cost = attention_cost(config, grid=grid, heads=1, head_dim=64)
        return cost.part("fine").flops / (4 * grid.num_cubes((4, 4, 4)) * 64 * 64 * 64)

    grid = VideoGrid(8, 20, 40)
    assert grid.num_cubes((4, 4, 4)) == 100
    assert cubes(VSAConfig(keep_ratio=0.29), grid) == 29
    assert cubes(VSAConfig(keep_ratio=0.001), grid) == 1
    assert cubes(VSAConfig(topk=32), grid) == 32
    assert cubes(VSAConfig(topk=32), VideoGrid(4, 8, 8)) == 4


@pytest.mark.parametrize("config", [SLAConfig(), SLAConfig(linear_scope="all"), VSAConfig(), None])
def test_scales_with_batch_but_for_the_weights(config):
    once, thrice = (attention_cost(config, **WAN_480P, batch=batch) for batch in (1, 3))
    assert thrice.flops == 3 * once.flops
    assert thrice.bytes <= 3 * once.bytes
    assert thrice.bytes == pytest.approx(3 * once.bytes, rel=0.02)


def test_table_names_every_part_and_its_share():
    cost = attention_cost(SLAConfig(), **WAN_480P)
    lines = str(cost).splitlines()
    for part in cost.parts:
        line = next(line for line in lines if line.startswith(part.name))
        assert f"{100 * part.flops / cost.dense.flops:.2f} %" in line
        assert f"{part.bytes / 1e6:,.1f}" in line
    assert lines[-1] == "14.2x fewer FLOPs than dense (forward)"
    assert len({len(line) for line in lines[:-1]}) == 1


def test_unknown_part():
    cost = AttentionCost((CostPart("sparse", 1, 1),), CostPart("dense", 4, 1))
    assert cost.part("sparse").flops == 1
    with pytest.raises(ValueError, match=r"unknown part 'linear'; expected one of \('sparse',\)"):
        cost.part("linear")


MISTAKES = [
    ({"config": "sla"}, TypeError, r"config must be one of SLAConfig, .*, SLAVSAConfig, got str"),
    ({"grid": None}, ValueError, r"give grid, or query_length"),
    ({"query_length": 100}, ValueError, r"give grid or lengths, not both"),
    ({"grid": (1, 2, 3)}, TypeError, r"grid must be a VideoGrid, got \(1, 2, 3\)"),
    ({"grid": None, "query_length": 0}, ValueError, r"query_length must be at least 1, got 0"),
    ({"grid": None, "query_length": 9, "key_length": 1.5}, TypeError, r"key_length must be an int, got 1\.5"),
    ({"config": VSAConfig(), "grid": None, "query_length": 9}, ValueError, r"grid is required for a VSAConfig"),
    ({"heads": 0}, ValueError, r"heads must be at least 1, got 0"),
    ({"head_dim": 64.0}, TypeError, r"head_dim must be an int, got 64\.0"),
    ({"dtype_bytes": True}, TypeError, r"dtype_bytes must be an int, got True"),
]


@pytest.mark.parametrize(("changes", "error", "match"), MISTAKES, ids=[str(m[0]) for m in MISTAKES])
def test_mistakes(changes, error, match):
    arguments = {"config": SLAConfig(), **WAN_480P} | changes
    with pytest.raises(error, match=match):
        attention_cost(arguments.pop("config"), **arguments)
