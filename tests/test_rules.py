"""Rules for the choice beyond the paper's: scores of quarters of blocks, and as many blocks as a mass needs."""

import itertools
import math

import pytest
import torch
from tiny_wan import check_compiled_over_grids, run, tiny_transformer

import foveal
from foveal import (
    SLAConfig,
    SparseLinearAttention,
    TokenLayout,
    VideoGrid,
    VideoSparseAttention,
    VSAConfig,
    select_blocks,
    sla_attention,
    vsa_attention,
)
from foveal.kernels import api
from foveal.methods.sla import attention as sla
from foveal.methods.vsa import attention as vsa
from foveal.methods.vsa.attention import select_cubes
from foveal.testing import make_inputs, output_and_gradients, relative_error

RULES = {
    "quarters": {"score": "log_sum_exp"},
    "spread": {"score": "mean_spread"},
    "mass of spread": {"score": "mean_spread", "keep_mass": 0.5},
    "mass": {"keep_mass": 0.6},
    "capped mass": {"keep_mass": 0.45, "max_keep_ratio": 0.4},
    "mass of quarters": {"score": "log_sum_exp", "keep_mass": 0.5, "max_keep_ratio": 0.7},
}


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def score_of(query, key, block_q, block_k, scale, score):
    """One pair of blocks, lists of vectors that hold only valid tokens, by the definition and no faster."""

    def product(x, y):
        return scale * sum(a * b for a, b in zip(x, y, strict=True))

    if score == "mean":
        return product(mean(query), mean(key)) if key else -math.inf
    if score == "mean_spread":
        if not key:
            return -math.inf
        center = mean(key)
        variance = mean([[(a - b) ** 2 for a, b in zip(k, center, strict=True)] for k in key])
        spread = sum(q * q * v for q, v in zip(mean(query), variance, strict=True))
        return product(mean(query), center) + 0.5 * scale**2 * spread
    quarters = [
        [part for start in range(0, len(x), block // 4) if (part := x[start : start + block // 4])]
        for x, block in ((query, block_q), (key, block_k))
    ]
    pairs = [math.exp(product(mean(q), mean(k))) for q, k in itertools.product(*quarters)]
    return math.log(sum(pairs)) if pairs else -math.inf


def chosen_of(scores, keep_ratio, keep_mass=None, max_keep_ratio=1.0):
    """The columns of a row that are kept."""
    count = len(scores)
    order = sorted(range(count), key=lambda j: (-scores[j], j))
    kept = max(1, math.floor(keep_ratio * count + 1e-6))
    if keep_mass is not None:
        weights = [math.exp(scores[j] - max(scores)) for j in order]
        needed = next(n for n in range(1, count + 1) if sum(weights[:n]) >= keep_mass * sum(weights) * (1 - 1e-12))
        kept = max(kept, min(needed, max(1, math.floor(max_keep_ratio * count + 1e-6))))
    return set(order[:kept])


def labels_of(query, key, *, block_q, block_k, keep_ratio, lengths=None, score="mean", **mass):
    """bool [B, H, Tq, Tk] by loops over float64 numbers."""
    batch, heads, length, head_dim = query.shape
    rows, columns = -(-length // block_q), -(-key.shape[2] // block_k)
    labels = torch.zeros(batch, heads, rows, columns, dtype=torch.bool)
    for b, h, i in itertools.product(range(batch), range(heads), range(rows)):
        valid = key.shape[2] if lengths is None else lengths[b]
        q = query[b, h, i * block_q : (i + 1) * block_q].tolist()
        ks = [key[b, h, j * block_k : min((j + 1) * block_k, valid)].tolist() for j in range(-(-valid // block_k))]
        scores = [score_of(q, k, block_q, block_k, head_dim**-0.5, score) for k in ks]
        for j in chosen_of(scores, keep_ratio, **mass):
            labels[b, h, i, j] = True
    return labels


def spiky(query_length=70, key_length=101, heads=2, batch=2, head_dim=8):
    """float64 query and key whose rows concentrate differently."""
    query, key, _ = make_inputs(
        batch=batch, heads=heads, query_length=query_length, key_length=key_length, head_dim=head_dim,
        dtype=torch.float64,
    )  # fmt: skip
    return query * torch.linspace(0.2, 6, query_length, dtype=torch.float64)[:, None], key


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("blocks", [(8, 8), (16, 4), (4, 12)])
@pytest.mark.parametrize("lengths", [None, (101, 37)])
def test_the_rule_is_its_definition(rule, blocks, lengths):
    query, key = spiky()
    settings = {"block_q": blocks[0], "block_k": blocks[1], "keep_ratio": 0.1, **RULES[rule]}
    given = None if lengths is None else torch.tensor(lengths)
    selection = select_blocks(query, key, **settings, kv_lengths=given)
    expected = labels_of(query, key, **settings, lengths=lengths)
    assert torch.equal(selection.critical_mask(), expected)
    counts = selection.critical_count
    assert torch.equal(counts, expected.sum(-1))
    # The lists are ascending, and no wider than the cap.
    most = settings.get("max_keep_ratio", 1.0) if "keep_mass" in settings else settings["keep_ratio"]
    assert selection.critical.shape[-1] == max(1, math.floor(most * selection.num_key_blocks + 1e-6))
    if "keep_mass" in settings:
        assert counts.unique().numel() > 1  # rows differ, or the test says nothing


def test_padding_may_hold_anything():
    query, key = spiky()
    lengths = torch.tensor([101, 37])
    settings = {"block_q": 8, "block_k": 8, "keep_ratio": 0.1, "kv_lengths": lengths, **RULES["mass of quarters"]}
    plain = select_blocks(query, key, **settings).labels()
    key[1, :, 37:] = math.nan
    assert torch.equal(select_blocks(query, key, **settings).labels(), plain)


def test_one_key_in_a_dull_block_shows_in_its_quarter():
    query, key = torch.zeros(1, 1, 16, 8), torch.zeros(1, 1, 64, 8)
    query[..., 0] = 4.0
    key[:, :, :16, 0] = 1.0  # a block that is good throughout
    key[:, :, 33, 0], key[:, :, 34:48, 0] = 40.0, -4.0  # one that has only one good key
    blocks = {"block_q": 16, "block_k": 16, "keep_ratio": 0.25}
    assert select_blocks(query, key, **blocks).critical.item() == 0
    assert select_blocks(query, key, **blocks, score="log_sum_exp").critical.item() == 2
    assert select_blocks(query, key, **blocks, score="mean_spread").critical.item() == 2


def test_a_mass_of_all_keeps_all():
    query, key = spiky()
    selection = select_blocks(query * 0.01, key, block_q=8, block_k=8, keep_ratio=0.1, keep_mass=1.0)
    assert (selection.critical_count == selection.num_key_blocks).all()


def test_what_is_dropped_is_never_what_is_kept():
    query, key = spiky()
    selection = select_blocks(query, key, block_q=8, block_k=8, keep_ratio=0.1, drop_ratio=0.5, keep_mass=0.9)
    labels = selection.labels()
    assert torch.equal((labels == 1).sum(-1), selection.critical_count)
    left = selection.num_key_blocks - selection.critical_count
    assert torch.equal((labels == -1).sum(-1), left.clamp(max=math.floor(0.5 * selection.num_key_blocks)))


def test_protected_keys_are_kept_beside():
    query, key = spiky()
    settings = {"block_q": 8, "block_k": 8, "keep_ratio": 0.1, **RULES["capped mass"]}
    plain = select_blocks(query, key, **settings).critical_mask()
    plain[..., 9:11] = True
    assert torch.equal(select_blocks(query, key, **settings, protected_keys=(72, 85)).critical_mask(), plain)


# --- The methods -----------------------------------------------------------------------------------------------------

GRID = VideoGrid(3, 5, 7)
SLA = {"keep_ratio": 0.15, "drop_ratio": 0.3, "block_q": 16, "block_k": 16}


def method_inputs(length, extra=0, dtype=torch.float64):
    query, key, value = make_inputs(batch=2, query_length=length, key_length=length + extra, head_dim=16, dtype=dtype)
    return query * torch.linspace(0.2, 9, length, dtype=dtype)[:, None], key, value


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ["raster", "tile"])
@pytest.mark.parametrize("packed", [False, True])
def test_sla_follows_its_rule(rule, order, packed):
    config = SLAConfig(**SLA, token_order=order, projection=False, **RULES[rule])
    layout = TokenLayout(GRID, (6,), (9,)) if packed else GRID
    tensors = method_inputs(layout.num_tokens)
    where = {"layout": layout}
    module = SparseLinearAttention(16, config)
    selection = module.select(*tensors[:2], **where)
    assert rule != "mass" or selection.critical_count.unique().numel() > 1

    def attention(impl, chosen=None):
        return lambda *x: sla_attention(*x, config=config, selection=chosen, impl=impl, **where)

    ours, exact, given = (
        output_and_gradients(f, tensors)
        for f in (attention("torch"), attention("reference"), attention("torch", selection))
    )
    for x, y, z in zip(ours, exact, given, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x, z, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_sla_picks_in_the_order_of_its_blocks(packed):
    """The selection of the method is the rule's on the tokens as they are cut."""
    config = SLAConfig(**SLA, token_order="tile", **RULES["capped mass"])
    layout = TokenLayout(GRID, (6,)) if packed else TokenLayout(GRID)
    query, key, _ = method_inputs(layout.num_tokens)
    kept = SparseLinearAttention(16, config).select(query, key, layout=layout).critical_mask()
    video = [GRID.to_tile_order(x[:, :, layout.video], (4, 4, 4)) for x in (query, key)]
    expected = labels_of(*video, block_q=16, block_k=16, keep_ratio=0.15, **RULES["capped mass"])
    assert torch.equal(kept[..., : expected.shape[-1]], expected)
    assert kept[..., expected.shape[-1] :].all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", ["grid", "text", "packed"])
@pytest.mark.parametrize("budget", [{"topk": 2}, {"keep_ratio": 0.1}], ids=["topk", "ratio"])
def test_vsa_follows_its_rule(rule, where, budget):
    config = VSAConfig(**budget, tile=(2, 2, 4), **RULES[rule])
    layout = TokenLayout(GRID, (6,), (9,)) if where == "packed" else GRID
    text = 21 if where == "text" else 0
    options = {"layout": layout}
    if text:
        options["kv_lengths"] = torch.tensor([GRID.num_tokens + 21, GRID.num_tokens + 3])
    tensors = method_inputs(layout.num_tokens, text)
    module = VideoSparseAttention(32, tensors[0].shape[1], 16, config)
    selection = module.select(*tensors[:2], **options)

    order = GRID.tile_order((2, 2, 4), 16, torch.device("cpu"))
    video = layout.video if where == "packed" else slice(0, GRID.num_tokens)
    tokens = [order.to_tile.view(-1, 16)[c] for c in range(GRID.num_cubes((2, 2, 4)))]
    kept = selection.critical_mask()
    cubes = len(tokens)
    least = budget["topk"] / cubes if "topk" in budget else budget["keep_ratio"]
    if "keep_ratio" in budget:
        least = math.ceil(least * cubes - 1e-6) / cubes
    query, key = (x[:, :, video] for x in tensors[:2])
    for b, h, i in itertools.product(range(2), range(query.shape[1]), range(cubes)):
        parts = [[x[b, h, t].tolist() for t in row.tolist() if t >= 0] for x in (query, key) for row in tokens]
        q, ks = parts[i], parts[cubes:]
        scores = [score_of(q, k, 16, 16, 0.25, config.score) for k in ks]
        rest = {name: value for name, value in RULES[rule].items() if name != "score"}
        assert set(kept[b, h, i, :cubes].nonzero().flatten().tolist()) == chosen_of(scores, least, **rest)
    if where == "packed":
        assert kept[..., cubes:].all()
    if text:
        assert kept[0, ..., cubes:].all()
        assert kept[1, ..., cubes].all()
        assert not kept[1, ..., cubes + 1 :].any()

    def attention(impl):
        return lambda *x: vsa_attention(*x, config=config, impl=impl, **options)

    for x, y in zip(*(output_and_gradients(attention(i), tensors) for i in ("torch", "reference")), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [SLAConfig(**SLA), VSAConfig(keep_ratio=0.1, tile=(2, 2, 4))], ids=["sla", "vsa"])
@pytest.mark.parametrize("rule", RULES)
def test_compiled_models_follow_their_rule(config, rule):
    check_compiled_over_grids(config.replace(**RULES[rule]))


@pytest.mark.parametrize("config", [SLAConfig(**SLA), VSAConfig(topk=2, tile=(2, 2, 4))], ids=["sla", "vsa"])
def test_models_keep_their_rule(config, tmp_path):
    config = config.replace(**RULES["mass of quarters"])
    model = foveal.sparsify(tiny_transformer(num_layers=1), config)
    foveal.save(model, tmp_path)
    loaded = foveal.load(tiny_transformer(num_layers=1), tmp_path)
    with torch.no_grad():
        assert torch.equal(run(model), run(loaded))
    assert foveal.summary(loaded).rows[0].config == config
    assert "mass 0.5" in str(foveal.summary(loaded))
    assert foveal.report(loaded).rows[0].ran.kept is None  # the device knows


def test_old_configurations_mean_the_same():
    old = {"keep_ratio": 0.05, "drop_ratio": 0.1, "block_q": 64, "block_k": 64}
    assert SLAConfig.from_dict(old) == SLAConfig()


@pytest.mark.parametrize(("score", "most"), [("mean_spread", 3), ("mean", 3), ("mean", 10**4)])
def test_kernels_with_too_many_cubes_say_what_runs_in_pytorch(score, most, monkeypatch):
    monkeypatch.setattr(vsa, "KERNEL_MAX_BLOCKS", most)
    for module in (sla, vsa):
        monkeypatch.setattr(module, "choose_impl", lambda *_: api.Ran("triton"))
    monkeypatch.setattr(vsa, "_run_with", lambda *_: vsa.vsa_attention_torch)
    module = VideoSparseAttention(32, 2, 16, VSAConfig(topk=2, tile=(2, 2, 4), score=score))
    query, key, value = make_inputs(heads=2, query_length=GRID.num_tokens, head_dim=16)
    module(query, key, value, torch.zeros(query.shape[0], GRID.num_tokens, 32), grid=GRID)
    assert module.ran == api.Ran("triton", api.SLOW_SELECTION if most == 3 else None)


MISTAKES = {
    "score": ({"score": "max"}, "score"),
    "blocks": ({"score": "log_sum_exp", "block_k": 6}, "multiples of 4, got 16x6"),
    "mass": ({"keep_mass": 1.5}, "keep_mass"),
    "no mass": ({"keep_mass": 0.0}, "above 0"),
    "cap": ({"keep_mass": 0.5, "max_keep_ratio": 0.1}, "at most max_keep_ratio"),
    "a cap without a mass": ({"max_keep_ratio": 0.5}, "max_keep_ratio bounds keep_mass"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    options, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        SLAConfig(**SLA | options)
    query, key = spiky()
    with pytest.raises(ValueError, match=message):
        select_blocks(query, key, **{k: v for k, v in (SLA | options).items() if k != "drop_ratio"})


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_the_kernels_choose_what_pytorch_chooses(rule):
    query, key, _ = make_inputs(query_length=1000, key_length=1500, head_dim=128, dtype=torch.bfloat16)
    settings = {"block_q": 64, "block_k": 64, "keep_ratio": 0.2, "drop_ratio": 0.2, **RULES[rule]}
    settings["kv_lengths"] = torch.tensor([1437])
    expected = select_blocks(query, key, **settings).labels()
    settings["kv_lengths"] = settings["kv_lengths"].cuda()
    ours = select_blocks(query.cuda(), key.cuda(), **settings).labels()
    assert (ours.cpu() == expected).double().mean() > 0.995  # sums in another order may part neighbors in rank


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tile", [(3, 5, 4), (4, 4, 8)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels_choose_cubes_as_pytorch_does(rule, tile, packed):
    layout = TokenLayout(VideoGrid(7, 12, 25), before=(70,) if packed else ())
    config = VSAConfig(keep_ratio=0.2, tile=tile, **RULES[rule])
    inputs = make_inputs(query_length=layout.num_tokens, head_dim=128, dtype=torch.bfloat16, layout="BLHD")
    expected = select_cubes(*inputs[:2], config=config, layout=layout)
    query, key, value = (x.cuda() for x in inputs)
    ours = select_cubes(query, key, config=config, layout=layout)
    assert (ours.labels().cpu() == expected.labels()).double().mean() > 0.99
    inside = vsa_attention(query, key, value, config=config, layout=layout)
    given = vsa_attention(query, key, value, config=config, layout=layout, selection=ours)
    assert relative_error(inside, given) < 0.01
    module = VideoSparseAttention(8, query.shape[1], 128, config).cuda()
    module(query, key, value, None, (torch.zeros_like(query), None), layout=layout)
    assert api.SLOW_SELECTION not in (module.ran.why or "")


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", ["marginal", "all"])
def test_the_kernels_choose_on_the_way_what_they_choose_before(rule, scope):
    inputs = make_inputs(
        batch=1, heads=12, query_length=4000, key_length=4000, head_dim=128, dtype=torch.bfloat16, layout="BLHD"
    )
    query, key, value = (x.cuda() for x in inputs)
    config = SLAConfig(keep_ratio=0.1, drop_ratio=0.1, linear_scope=scope, **RULES[rule])
    module = SparseLinearAttention(128, config).cuda()
    selection = module.select(query, key)
    with torch.no_grad():
        inside, given = (module(query, key, value, selection=x) for x in (None, selection))
    assert relative_error(inside, given) < 0.01
