"""Evaluation sees each good sample once and in order, whatever the split; a tokenizer gets captions from all over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from crafted_shards import (
    LengthTokenizer,
    config,
    encoded_image,
    number_of,
    opened,
    sample,
    views,
    write_shards,
    write_tar,
)

from modstruct.config import DataConfig, Source
from modstruct.data.faults import BadSample
from modstruct.data.shards.evaluation_samples import EvaluationSamples, evaluation_loader, train_captions
from modstruct.data.shards.loader import BatchContents, BatchPlan, train_loader
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.sample_table import SourceFaults
from modstruct.data.shards.samples import open_samples

EMOJI = Path("/work/shared/data/emoji")


def evaluation(pattern, data) -> EvaluationSamples:
    return EvaluationSamples([Source(str(pattern))], data)


@pytest.fixture
def mixed(tmp_path):
    """Twelve samples; 2 and 5 are bad, 3 has three captions."""
    captions = json.dumps({"captions": ["one", "two", "three"], "number": 3}).encode()
    other = {2: {"png": b"bad"}, 5: {"txt": b""}, 3: {"json": captions}}
    write_tar(tmp_path / "x.tar", [m for n in range(12) for m in sample(n, **other.get(n, {}))])
    data = config(tmp_path, max_bad_share=0.5)
    return evaluation(tmp_path / "x.tar", data), data


def test_a_sample_holds_image_captions_and_metadata(mixed):
    samples, _ = mixed
    assert len(samples) == 12
    three = samples[3]
    assert (three.captions, three.metadata["number"]) == (["one", "two", "three"], 3)
    assert three.image.mode == "RGB"
    assert samples[4].captions == ["thing 4"]
    with pytest.raises(BadSample, match="undecodable image"):
        samples[2]
    with pytest.raises(IndexError):
        samples[12]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_good_samples_come_once_and_in_order(mixed, workers, batch):
    samples, data = mixed
    data.workers = workers if batch == 5 else 0
    batches = list(evaluation_loader(samples, views(), batch))
    good = [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    assert torch.cat([b.indices for b in batches]).tolist() == good
    assert [number_of(image) for b in batches for image in b.image] == good
    assert [meta["number"] for b in batches for meta in b.metadata] == good
    faults = [fault for b in batches for fault in b.faults]
    assert [cause for cause, _ in faults] == ["undecodable image", "empty caption"]
    assert sum(b.tried for b in batches) == 12
    assert all(b.image.shape[1:] == (3, 8, 8) for b in batches)
    captions = [captions for b in batches for captions in b.captions]
    assert captions == [["one", "two", "three"] if n == 3 else [f"thing {n}"] for n in good]


def test_a_part_is_loaded_alone(mixed):
    parts = (range(0, 4), range(4, 5), range(5, 12))
    found = [[n for b in evaluation_loader(mixed[0], views(), 2, part) for n in b.indices.tolist()] for part in parts]
    assert found == [[0, 1, 3], [4], [6, 7, 8, 9, 10, 11]]


def test_captions_are_spread_evenly_without_bad_ones_and_images(tmp_path):
    write_tar(
        tmp_path / "x.tar", [m for n in range(100) for m in sample(n, png=b"bad", **({"txt": b" "} if n == 50 else {}))]
    )
    data = config(tmp_path)
    samples = opened(tmp_path / "x.tar", data)
    assert list(train_captions(samples, data, 4)) == ["thing 0", "thing 25", "thing 75"]
    assert list(train_captions(samples, data, 10**6)) == [f"thing {n}" for n in range(100) if n != 50]
    assert list(train_captions(samples, data, 0)) == []


def test_captions_of_pipes_come_from_few_shards(tmp_path):
    from modstruct.data.shards.index import index_file_name, index_tar

    write_shards(tmp_path, [3] * 20)
    for shard in range(20):
        name = f"pipe:cat {tmp_path}/shard-{shard:03d}.tar"
        index_tar(tmp_path / f"shard-{shard:03d}.tar").save(tmp_path / "cache" / "indexes" / index_file_name(name))
    data = config(tmp_path, allow_pipe=True)
    samples = opened(f"pipe:cat {tmp_path}/shard-{{000..019}}.tar", data)
    numbers = [int(caption.split()[1]) for caption in train_captions(samples, data, 1000)]
    assert len(numbers) == 24
    assert len(list((tmp_path / "cache" / "pipes").glob("*.tar"))) == 8


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji shards are not on this machine")
def test_real_shards_are_read_whole(tmp_path):
    data = DataConfig(cache=str(tmp_path), workers=0)
    samples = open_samples([Source(str(EMOJI / "train-{00000..00008}.tar"))], data, "data.train")
    assert len(samples) == 8006
    assert samples.faults == [SourceFaults()]
    reader = ShardReader(samples, data)
    for number in range(0, 8006, 400):
        raw = reader.read(number)
        assert (raw.metadata["key"], raw.metadata["caption"]) == (raw.key.rpartition("/")[2], raw.caption)
    loader = train_loader(samples, data, BatchContents(views(64), LengthTokenizer()), BatchPlan(64, 0, 120, 128))
    for batch in loader:  # across the end of the first epoch
        assert batch.tensors["image"].shape == (64, 3, 64, 64)
        assert batch.faults == []


def test_one_image_format_is_as_good_as_another(tmp_path):
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "PNG": "PNG", "webp": "WEBP"}
    members = []
    for number, (extension, kind) in enumerate(kinds.items()):
        members += [(f"{number}.{extension}", encoded_image(0, kind=kind)), (f"{number}.txt", b"x")]
    write_tar(tmp_path / "x.tar", members)
    (batch,) = evaluation_loader(evaluation(tmp_path / "x.tar", config(tmp_path)), views(), 10)
    assert batch.image.shape[0] == 4
    assert (batch.image.float() - batch.image[2].float()).abs().max() <= 3
