"""Precomputed samples: what is stored comes back, what is damaged is found, and batches go on where they stopped."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from foveal.lab.data.dataset import BatchStream, LatentDataset, write_latent_dataset
from foveal.lab.data.shards import INDEX_FILE

SHAPES = [(4, 3, 6, 8), (4, 5, 8, 6)]


def sample(place: int, shape=None) -> dict:
    generator = torch.Generator().manual_seed(place)
    text = torch.zeros(16, 8)
    text[: 1 + place % 5] = torch.randn(1 + place % 5, 8, generator=generator)
    return {
        "id": f"clips/{place // 2}.mp4#{place % 2}",
        "caption": f"caption {place // 2}",
        "latents": torch.randn(shape or SHAPES[place % 3 == 0], generator=generator).bfloat16(),
        "prompt_embeds": text,
        "prompt_attention_mask": torch.arange(16) <= place % 5,
    }


EMPTY = {"prompt_embeds": torch.full((16, 8), 0.5), "prompt_attention_mask": torch.arange(16) < 1}


def write(folder, count=14, **kwargs):
    # Two clips of a file have the same caption, and so the same text.
    samples = [
        sample(place) | {k: v for k, v in sample(place - place % 2).items() if k.startswith("prompt")}
        for place in range(count)
    ]
    write_latent_dataset(folder, samples, settings={"space": "latent"}, empty_prompt=EMPTY, **kwargs)
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "samples"
    write(folder, samples_per_shard=4)
    return folder


@pytest.fixture
def data(folder):
    return LatentDataset(folder, verify=True)


def test_samples_come_back_bit_for_bit(data, tmp_path):
    written = write(tmp_path / "again", samples_per_shard=4)
    assert len(data) == len(written) == 14
    for ours, theirs in zip((data[i] for i in range(14)), written, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours[key], value), key
                assert ours[key].dtype == value.dtype
            else:
                assert ours[key] == value
    assert {key: torch.equal(value, EMPTY[key]) for key, value in data.empty_prompt().items()} == dict.fromkeys(
        EMPTY, True
    )
    assert data.settings == {"space": "latent"}
    assert data.fingerprint == LatentDataset(tmp_path / "again").fingerprint


def test_zero_rows_and_repeated_captions_take_no_space(data, folder, tmp_path):
    from safetensors import safe_open

    with safe_open(folder / "shard-00000.safetensors", framework="pt") as opened:
        assert sorted(key for key in opened.keys() if key.endswith("embeds")) == [  # noqa: SIM118
            "text/0/prompt_embeds",
            "text/1/prompt_embeds",
        ]
        assert opened.get_tensor("text/0/prompt_embeds").shape == (1, 8)
        assert opened.get_tensor("text/1/prompt_embeds").shape == (3, 8)


def test_buckets_are_the_latent_shapes(data):
    assert set(data.buckets) == set(SHAPES)
    for shape, indices in data.buckets.items():
        assert all(data[i]["latents"].shape == shape for i in indices)
    assert sorted(i for indices in data.buckets.values() for i in indices) == list(range(14))


def test_split_by_file_whatever_the_order(data, tmp_path):
    train, held_out = data.split(held_out=3)
    assert len(held_out) == 4
    assert len(train) == 10
    files = [{part[i]["id"].split("#")[0] for i in range(len(part))} for part in (train, held_out)]
    assert files[0].isdisjoint(files[1])
    samples = [data[i] for i in reversed(range(14))]
    write_latent_dataset(tmp_path / "reversed", samples, settings={}, empty_prompt=EMPTY)
    _, other = LatentDataset(tmp_path / "reversed").split(held_out=3)
    assert {other[i]["id"] for i in range(4)} == {held_out[i]["id"] for i in range(4)}
    assert len({data.fingerprint, train.fingerprint, held_out.fingerprint}) == 3
    everything, nothing = data.split(held_out=0)
    assert (len(everything), len(nothing)) == (14, 0)
    with pytest.raises(ValueError, match="cannot hold out 14 of 14 samples from 7 files"):
        data.split(held_out=14)


def test_datasets_travel_to_worker_processes(data):
    copy = pickle.loads(pickle.dumps(data.split(held_out=2)[0]))
    assert torch.equal(copy[3]["latents"], data.split(held_out=2)[0][3]["latents"])


def test_damage_is_found_and_named(folder, tmp_path):
    import shutil

    def damaged(name):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        return copy, copy / "shard-00001.safetensors"

    with pytest.raises(FileNotFoundError, match="no such folder"):
        LatentDataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no index\.json; expected a folder that foveal precompute wrote"):
        LatentDataset(tmp_path / "empty")
    copy, shard = damaged("missing")
    shard.unlink()
    with pytest.raises(ValueError, match=r"lists shard-00001\.safetensors, which is missing"):
        LatentDataset(copy)
    copy, shard = damaged("short")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"shard-00001\.safetensors has .* bytes, but the index says .*: it is damaged"
    ):
        LatentDataset(copy)
    copy, shard = damaged("flipped")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    LatentDataset(copy)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors does not have the SHA-256"):
        LatentDataset(copy, verify=True)
    copy, shard = damaged("swapped")
    index = json.loads((copy / INDEX_FILE).read_text())
    index["latent_shapes"] = {"1x1x1x1": 14}
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has latents of .* but the index says"):
        LatentDataset(copy)
    for text, message in (
        ("{", "malformed"),
        ('{"format": 2}', "format version 2; this version reads 1"),
        ("[]", "malformed"),
    ):
        (copy / INDEX_FILE).write_text(text)
        with pytest.raises(ValueError, match=message):
            LatentDataset(copy)


def test_unfinished_data_is_refused(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / INDEX_FILE).read_text())
    (tmp_path / "copy" / INDEX_FILE).write_text(json.dumps(index | {"complete": False}))
    with pytest.raises(ValueError, match="is not complete, it has 14 samples so far"):
        LatentDataset(tmp_path / "copy")
    assert len(LatentDataset(tmp_path / "copy", incomplete=True)) == 14


def test_writing_checks_what_it_is_given(folder, tmp_path):
    with pytest.raises(ValueError, match="holds a dataset already"):
        write_latent_dataset(folder, [sample(0)])
    odd = sample(1) | {"prompt_embeds": torch.zeros(15, 8)}
    with pytest.raises(ValueError, match=r"'prompt_embeds' must have shape \(16, 8\) in every sample, got \(15, 8\)"):
        write_latent_dataset(tmp_path / "odd", [sample(0), odd])
    assert not (tmp_path / "odd" / INDEX_FILE).exists()


def ids(stream, count):
    return [next(stream)["id"] for _ in range(count)]


def test_batches_stack_one_shape_and_cover_the_data(data):
    stream = BatchStream(data, 3, seed=1)
    assert stream.batches_per_epoch == sum(-(-len(bucket) // 3) for bucket in data.buckets.values())
    seen = []
    for _ in range(stream.batches_per_epoch):
        assert stream.epoch == 0
        batch = next(stream)
        assert batch["latents"].shape[0] == 3
        assert batch["latents"].shape[1:] in SHAPES
        assert batch["prompt_embeds"].shape == (3, 16, 8)
        assert len(batch["id"]) == len(batch["caption"]) == 3
        seen += batch["id"]
    assert stream.epoch == 1
    assert set(seen) == {data[i]["id"] for i in range(14)}
    # Filled up from within the shape, and nothing three times while others are there once.
    assert max(seen.count(name) for name in seen) == 2


@pytest.mark.parametrize("workers", [0, 3])
def test_the_sequence_is_a_function_of_the_seed_and_goes_on_anywhere(data, workers):
    whole = ids(BatchStream(data, 2, seed=5), 20)
    assert ids(BatchStream(data, 2, seed=6), 20) != whole
    stream = BatchStream(data, 2, seed=5, num_workers=workers)
    first = ids(stream, 11)
    state = json.loads(json.dumps(stream.state_dict()))
    assert state["position"] == 11
    stream.close()
    fresh = BatchStream(data, 2, seed=5, num_workers=workers)
    ids(fresh, 3)
    fresh.load_state_dict(state)
    assert first + ids(fresh, 9) == whole
    fresh.close()


def test_epochs_have_different_orders(data):
    stream = BatchStream(data, 1, seed=0)
    epochs = [ids(stream, stream.batches_per_epoch) for _ in range(3)]
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 3
    assert {tuple(sorted(map(tuple, epoch))) for epoch in epochs} == {tuple(sorted(map(tuple, epochs[0])))}


def test_ranks_share_the_global_batches_of_one_process(data):
    alone = BatchStream(data, 4, seed=3)
    ranks = [BatchStream(data, 2, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(10):
        parts = [next(rank) for rank in ranks]
        assert parts[0]["latents"].shape == parts[1]["latents"].shape
        assert parts[0]["id"] + parts[1]["id"] == next(alone)["id"]
    # A run on two processes goes on as one on one process, at the same global batch.
    alone.load_state_dict(ranks[1].state_dict())
    assert next(alone)["id"] == next(ranks[0])["id"] + next(ranks[1])["id"]


def test_captions_are_dropped_at_the_rate_and_repeatably(data):
    def captions(seed):
        stream = BatchStream(data, 2, seed=seed, caption_dropout=0.4)
        batches = [next(stream) for _ in range(200)]
        for batch in batches:
            for caption, embeds in zip(batch["caption"], batch["prompt_embeds"], strict=True):
                assert (caption == "") == torch.equal(embeds, EMPTY["prompt_embeds"])
        return [caption for batch in batches for caption in batch["caption"]]

    dropped = captions(0)
    assert abs(dropped.count("") / len(dropped) - 0.4) < 0.1
    assert captions(0) == dropped
    # Without dropout the order is the same.
    plain = BatchStream(data, 2, seed=0)
    kept = [caption for _ in range(200) for caption in next(plain)["caption"]]
    assert all(a in ("", b) for a, b in zip(dropped, kept, strict=True))


def test_a_state_of_other_data_is_refused(data, tmp_path):
    state = BatchStream(data, 2, seed=1).state_dict()
    for other, message in (
        (BatchStream(data, 2, seed=2), "another seed: the state was taken with 1, this is 2"),
        (BatchStream(data, 3, seed=1), "another global_batch: the state was taken with 2, this is 3"),
        (BatchStream(data.split(2)[0], 2, seed=1), "another fingerprint"),
        (BatchStream(data, 2, seed=1, caption_dropout=0.1), "another caption_dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="state must have the keys"):
        BatchStream(data, 2, seed=1).load_state_dict({"position": 3})


def test_streams_check_their_arguments(data, tmp_path):
    for arguments, message in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, r"rank must be in 0\.\.1, got 2"),
        ({"batch_size": 1, "caption_dropout": 1.5}, r"caption_dropout must be in \[0, 1\], got 1.5"),
        ({"batch_size": 1, "num_workers": -1}, "num_workers must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchStream(data, **arguments)
    write_latent_dataset(tmp_path / "pixels", [{"id": "a", "caption": "", "latents": torch.zeros(3, 1, 2, 2)}])
    pixels = LatentDataset(tmp_path / "pixels")
    assert pixels.empty_prompt() == {}
    assert set(pixels[0]) == {"id", "caption", "latents"}
    with pytest.raises(ValueError, match="caption_dropout needs a dataset with text"):
        BatchStream(pixels, 1, caption_dropout=0.5)
    with pytest.raises(ValueError, match="the dataset has no samples"):
        BatchStream(data.split(0)[1], 1)


def test_read_errors_reach_the_reader(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    stream = BatchStream(LatentDataset(tmp_path / "copy"), 2, num_workers=2)
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(FileNotFoundError):
        next(stream)
    assert stream.position == 0
    stream.close()
