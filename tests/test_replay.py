"""A replayed call gives the same bits as one that works everything out, wherever its tensors lie."""

import ctypes
import sys
import threading

import pytest
import torch
from counted_replays import replays
from interpreted import all_strided, mend_interpreter, run_interpreted

from foveal.kernels import host, record, replay
from foveal.kernels.record import Allocation, DirectLaunch, Map, Place, Record
from foveal.kernels.replay import replayed
from foveal.kernels.side_stream import side_stream


@pytest.fixture(autouse=True)
def fresh():
    host.clear()
    yield
    host.clear()


def inputs(seed: int, *shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def kinds_of_steps(tensors, options):
    """Memory, views of it and of an input, products into it, an in-place step, and results whole or as views."""
    x, y, none = tensors
    assert none is None
    product = torch.empty(4, 6, 5)
    torch.bmm(x.view(4, 6, 3)[:, ::2], y.transpose(1, 2), out=product[:, :3])
    torch.bmm(x.view(4, 6, 3)[:, 1::2], y.transpose(1, 2), out=product[:, 3:])
    total = product.sum(1)
    total += CONSTANT
    lower, upper = product.add(options).chunk(2, 1)
    return (total, upper, lower.contiguous(), x, None)


CONSTANT = torch.arange(5.0)


def check(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x is y or (torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype)


def test_the_third_call_is_replayed(monkeypatch):
    runs, kept = replays(monkeypatch.setattr), []
    monkeypatch.setattr(torch, "empty_strided", lambda *x, **named: torch.full(x[0], torch.nan, **named))
    for seed in range(5):
        tensors = *inputs(seed, (4, 18), (4, 5, 3)), None
        found = replayed(kinds_of_steps, tensors, 2.0)
        check(found, kinds_of_steps(tensors, 2.0))
        assert found[3] is tensors[0]
        kept.append(found)
        assert len(runs) == max(0, seed - 1)
    assert not any(torch.equal(kept[3][0], other[0]) for other in kept[:3])  # results are not shared


def unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda x: x, 3.0),
        (lambda x: x.flip(0)[:, :9].contiguous(), 2.0),
        (lambda x: x.double(), 2.0),
        (lambda x: x.T.contiguous().T, 2.0),
        (unaligned, 2.0),
    ],
    ids=["options", "shape", "dtype", "strides", "alignment"],
)
def test_another_kind_of_call_is_another_record(monkeypatch, change, options):
    runs = replays(monkeypatch.setattr)
    for seed in range(3):
        replayed(scaled, inputs(seed, (4, 18)), 2.0)
    assert len(runs) == 1
    tensors = [change(inputs(7, (4, 18))[0])]
    for _ in range(2):
        check(replayed(scaled, tensors, options), scaled(tensors, options))
    assert len(runs) == 1


def scaled(tensors, options):
    return (tensors[0] * options,)


def added(tensors, options):
    return (tensors[0] + tensors[1],)


def test_a_tensor_passed_twice(monkeypatch):
    runs = replays(monkeypatch.setattr)
    for seed in range(4):
        (x,) = inputs(seed, (8,))
        assert torch.equal(replayed(added, (x, x), None)[0], 2 * x)
    assert len(runs) == 2
    x, y = inputs(9, (8,), (8,))
    assert torch.equal(replayed(added, (x, y), None)[0], x + y)
    assert len(runs) == 2


def test_parts_of_one_tensor(monkeypatch):
    """Query, key and value of a fused projection share memory in one call and not in the next."""
    runs = replays(monkeypatch.setattr)
    for seed in range(4):
        x, y = inputs(seed, (2, 8))[0] if seed % 2 else inputs(seed, (8,), (8,))
        assert torch.equal(replayed(added, (x, y), None)[0], x + y)
    assert len(runs) == 2


def reads(tensors, options):
    return (tensors[0] * tensors[0].sum().item(),)


def test_what_is_not_recorded_goes_on(monkeypatch):
    runs = replays(monkeypatch.setattr)
    for seed in range(4):
        tensors = inputs(seed, (8,))
        check(replayed(reads, tensors, None), reads(tensors, None))
    assert not runs


class Stream:
    """A stream of a CPU, which has none: it notes who waits for whom."""

    current, log = None, []

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def beside(tensors, options):
    side = side_stream(tensors[0].device)
    side.follow()
    product = tensors[0] * 2
    with side:
        Stream.log.append(f"recorded on {Stream.current.name}")
        total = torch.square(tensors[1]).sum()
    return (product + total,)


def test_a_second_stream(monkeypatch):
    """A replay waits and changes streams as the call did, and comes back from an error inside."""
    runs, log, main = replays(monkeypatch.setattr), [], Stream("main")
    monkeypatch.setattr(Stream, "log", log)
    monkeypatch.setattr(Stream, "current", main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(Stream, "current", stream))
    for seed in range(4):
        x, y = inputs(seed, (8,), (8,))
        log.clear()
        (found,) = replayed(beside, [x, y], None)
        assert torch.equal(found, 2 * x + y.square().sum())
        recorded = [] if seed > 1 else ["recorded on side"]
        assert log == ["side waits for main", *recorded, "main waits for side"]
        assert Stream.current is main
    assert len(runs) == 2

    with pytest.raises(RuntimeError, match="got None"):
        runs[-1].run([x, None])
    assert log[-1] == "main waits for side"
    assert Stream.current is main


def test_off_switch_and_clear(monkeypatch):
    runs = replays(monkeypatch.setattr)
    for _ in range(3):
        replayed(added, inputs(0, (8,), (8,)), None)
    monkeypatch.setattr(host.DOORS["replay"], "on", False)
    replayed(added, inputs(0, (8,), (8,)), None)
    assert len(runs) == 1
    assert replay._REPLAYS
    host.clear()
    assert not replay._REPLAYS


def test_an_error_leaves_no_recorder():
    def fails(tensors, options):
        if host.RECORDING.recorder is not None:
            raise ValueError("while it is recorded")
        return (), None

    replayed(fails, inputs(0, (8,)), None)
    with pytest.raises(ValueError, match="while it is recorded"):
        replayed(fails, inputs(0, (8,)), None)
    assert host.RECORDING.recorder is None


def test_threads():
    """Records are made and replayed by several threads at once."""
    failures = []

    def work(seed: int) -> None:
        for index in range(40):
            x, y = inputs(100 * seed + index, (8,), (8,))
            if not torch.equal(replayed(added, (x, y), None)[0], x + y):
                failures.append((seed, index))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_temporary_memory_is_given_back():
    """A replay holds a tensor no longer than the call that was recorded did."""

    def two_sums(tensors, options):
        large = tensors[0] * 2
        total = large.sum()
        del large
        return (total + (tensors[0] * 3).sum(),)

    for seed in range(2):
        replayed(two_sums, inputs(seed, (64,)), None)
    (one,) = (x._record for x in replay._REPLAYS.values())
    held, most = 0, 0
    for step in one.steps:
        held += sum(slot is not None for slot in step.made)
        most = max(most, held)
        held -= len(step.done)
    assert most == 3  # a sum, a product, and the product's sum
    assert held == 1


def test_small_memory_is_taken_at_once():
    """Steps that go by addresses: an input through two temporaries into a result, which is no part of the pool."""

    def move(arguments: list) -> None:
        target, source, size = arguments
        ctypes.memmove(target, source, size)

    def allocation(slot: int, length: int) -> Allocation:
        return Allocation(slot, torch.Size([length]), (1,), torch.float32, torch.device("cpu"))

    def launch(target: Place, source: Place, size: int) -> DirectLaunch:
        return DirectLaunch(move, (target, source, size))

    large = record.POOL_BYTES // 4
    whole = {slot: Place(slot, 0, None) for slot in range(5)}
    steps = [
        allocation(1, 100),
        launch(whole[1], whole[0], 400),
        allocation(2, 100),
        launch(whole[2], Place(1, 200, None), 200),
        launch(Place(2, 200, None), whole[1], 200)._replace(done=(1,)),
        allocation(3, large),
        launch(Place(3, 40, None), whole[2], 400)._replace(done=(2,)),
        allocation(4, 100),
        launch(whole[4], Place(3, 40, None), 400)._replace(done=(3,)),
    ]
    steps, values = record.pooled(steps, [None] * 5, {4})
    sizes = [step.size[0] for step in steps if isinstance(step, Allocation)]
    assert sizes == [1024, large, 100]  # two temporaries at multiples of 512 bytes
    (x,) = inputs(0, (100,))
    (result,) = Record(steps, values, [whole[4]]).run([x])
    assert torch.equal(result, torch.cat((x[50:], x[:50])))


def test_arguments_of_a_direct_launch():
    """Addresses, TMA maps that are made once for each address, tuples, and constants as they are."""
    launched, made = [], []
    tiles = Map(Place(0, 8, None), lambda address: made.append(address) or f"map of {address}")
    arguments = (Place(0, 0, None), tiles, (Place(1, 4, None), None, 2**40), "softmax", 0.1, float("inf"), True, None)
    one = Record([DirectLaunch(launched.append, arguments)], [None, None], [None])
    tensors = inputs(0, (8,), (8,))
    first, second = (x.data_ptr() for x in tensors)
    for _ in range(2):
        assert one.run(tensors) == (None,)
    expected = [first, f"map of {first + 8}", (second + 4, None, 2**40), "softmax", 0.1, float("inf"), True, None]
    assert launched == [expected, expected]
    assert made == [first + 8]
    one.run(tensors[::-1])
    assert made == [first + 8, second + 8]


INTERPRETED = [
    *("sla, marginal", "sla, all, strides", "sla, selection"),
    *("vsa", "vsa, both gates, text", "vsa, two slots"),
    "sla2, no linear branch",
]


def run_replays(name: str) -> None:
    """SLA and VSA through Triton's interpreter: replays against calls that work everything out, with all gradients."""
    from on_kernels import selection_rule, sla_attention_gpu, vsa_attention_gpu

    from foveal import SLAConfig, VideoGrid, VSAConfig, select_blocks
    from foveal.methods.sla2.gpu_exact import ExactCall, ExactOptions, sla2_exact_gpu
    from foveal.methods.vsa.layout import CubeLayout
    from foveal.testing import make_inputs, output_and_gradients

    blocks = {"block_q": 64, "block_k": 64}

    def case(seed: int):
        sizes = {"batch": 1, "heads": 1, "head_dim": 64, "dtype": torch.bfloat16, "seed": seed}
        grid = VideoGrid(5, 8, 8) if "slots" in name else VideoGrid(4, 5, 5)
        lengths = {"query_length": grid.num_tokens, "key_length": grid.num_tokens}
        query, key, value = make_inputs(**lengths, **sizes)
        generator = torch.Generator().manual_seed(seed)
        weight, bias = (torch.randn(shape, generator=generator) / 8 for shape in ((64, 64), (64,)))
        if name.startswith("sla2"):
            rule = selection_rule(query, key, **blocks, keep_ratio=0.5)
            weights = [torch.randn(1, 64, 64, generator=generator) / 8 for _ in range(2)]

            def routed(query, key, value, *weights):
                call = ExactCall(query, key, value, *weights, None, None, None, rule)
                return sla2_exact_gpu(call, ExactOptions(0.125, 0.1, "triton"))[0]

            return (query, key, value, *weights), routed
        if name.startswith("sla"):
            config = SLAConfig(
                keep_ratio=0.5, drop_ratio=0.0, feature_map="relu", linear_scope="all" if "all" in name else "marginal"
            )
            if "strides" in name:
                query, key, value = all_strided(query, key, value)
            if "selection" in name:
                choice = select_blocks(query, key, **blocks, keep_ratio=0.5)
            else:
                choice = selection_rule(query, key, **blocks, keep_ratio=0.5, drop_ratio=0.0)
            return (query, key, value, weight, bias), lambda query, key, value, weight, bias: sla_attention_gpu(
                query, key, value, config, choice, 0.125, weight, bias, "triton"
            )
        text = 30 if "text" in name else 0
        key, value = (torch.cat((x, x[:, :, :text].flip(2)), 2) for x in (key, value))
        gates = make_inputs(**lengths, **sizes | {"seed": seed + 50})[:2]
        gates = gates if "both" in name else gates[:1]

        def attend(query, key, value, coarse, fine=None):
            tile = (4, 8, 8) if "slots" in name else (4, 4, 4)
            layout = CubeLayout(VSAConfig(topk=1, tile=tile), grid, key, None)
            return vsa_attention_gpu(query, key, value, layout, None, 0.125, coarse, fine, "triton")

        return (query, key, value, *gates), attend

    runs = replays()
    for seed in range(4):
        tensors, attend = case(seed)
        found = output_and_gradients(attend, tensors)
        with torch.no_grad():
            output = attend(*tensors)
        if seed < 2:
            continue
        host.DOORS["replay"].on = False
        expected = output_and_gradients(attend, tensors)
        with torch.no_grad():
            assert torch.equal(output, attend(*tensors)), f"{name}: output without gradients, call {seed}"
        host.DOORS["replay"].on = True
        for label, x, y in zip(("output", "dQ", "dK", "dV", "4", "5"), found, expected, strict=False):
            assert torch.equal(x, y), f"{name}: {label}, call {seed}"
    # Forward and inference from the third call on, and the backward, which waits for a packed forward, in the fourth.
    assert len(runs) == 5, f"{name}: got {len(runs)} replays"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in ("sla, marginal", "vsa, both gates, text") else ())
        for name in INTERPRETED
    ],
)
def test_interpreted(name):
    pytest.importorskip("triton")
    run_interpreted(__file__, [name])


if __name__ == "__main__":
    mend_interpreter()
    for name in sys.argv[1:]:
        run_replays(name)
