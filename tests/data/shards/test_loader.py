"""The batches of a step are the same on any number of processes and workers, after any start; faults are replaced."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from crafted_shards import (
    BOTH,
    LengthTokenizer,
    assert_same,
    config,
    encoded_image,
    load,
    number_of,
    opened,
    sample,
    views,
    write_shards,
    write_tar,
)
from PIL import Image
from test_images import png_header
from tiny_models import word_tokenizer

from modstruct.config import Source, ViewsConfig
from modstruct.data.faults import TooManyBadSamples
from modstruct.data.shards import loader as loader_module
from modstruct.data.shards.evaluation_samples import train_captions
from modstruct.data.shards.loader import (
    EXTRA_FIELDS,
    BatchContents,
    BatchPlan,
    TrainBatch,
    counted,
    train_loader,
    train_order,
)
from modstruct.data.shards.samples import open_samples
from modstruct.data.transforms.augment import Views
from modstruct.data.transforms.device_views import made_views


def joined(parts: list[list[TrainBatch]]) -> list[TrainBatch]:
    """The global batches of processes given in order of rank."""
    return [
        TrainBatch(
            {name: torch.cat([part.tensors[name] for part in step]) for name in step[0].tensors},
            [fault for part in step for fault in part.faults],
        )
        for step in zip(*parts, strict=True)
    ]


def test_a_batch_has_the_promised_kinds_and_shapes(tmp_path):
    data = config(tmp_path)
    samples = opened(write_shards(tmp_path, [20]), data)
    (batch,) = load(samples, data, stop=1)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.tensors.items()} == {
        "image": (torch.uint8, (12, 3, 8, 8)),
        "text": (torch.int64, (12, 2)),
        "image_augmented": (torch.uint8, (12, 3, 8, 8)),
        "text_augmented": (torch.int64, (12, 2)),
    }
    assert (batch.faults, batch.tried) == ([], 12)


def test_what_the_fusion_model_trains_on_is_made(tmp_path):
    same_image = sample(3, png=encoded_image(1))
    same_caption = sample(4, txt=b"thing 2")
    write_tar(tmp_path / "shard.tar", [*sample(1), *sample(2), *same_image, *same_caption])
    data = config(tmp_path)
    fields = ("text_masked", "masked_labels", "image_id", "text_id", "slot")
    samples = opened(tmp_path / "shard.tar", data)
    batches = load(samples, data, stop=3, batch=4, extra=fields, tokenizer=word_tokenizer())
    for step, batch in enumerate(batches):
        rows = batch.tensors
        assert rows.keys() == {"image", "text", "masked_places", *fields}
        assert {rows[name].dtype for name in (*fields, "text")} == {torch.int64}
        assert rows["text_masked"].shape == rows["masked_labels"].shape == rows["text"].shape == (4, 12)
        assert rows["slot"].tolist() == [4 * step + row for row in range(4)]
        kept = rows["masked_labels"] == -100
        assert torch.equal(rows["masked_places"], (~kept).nonzero())
        assert torch.equal(rows["text_masked"][kept], rows["text"][kept])
        # Four samples with three different images and three different captions.
        assert (len(rows["image_id"].unique()), len(rows["text_id"].unique())) == (3, 3)
        numbers = torch.tensor([number_of(image) for image in rows["image"]])
        assert torch.equal(rows["image_id"][:, None] == rows["image_id"], numbers[:, None] == numbers)
    # A sample's masked tokens differ between epochs.
    assert len({str(batch.tensors["masked_labels"].sort(0).values.tolist()) for batch in batches}) == 3


@pytest.mark.parametrize("processes", [2, 3])
def test_masked_tokens_and_identities_do_not_depend_on_the_processes(damaged, processes):
    options = {"extra": EXTRA_FIELDS - BOTH, "tokenizer": word_tokenizer()}
    alone = load(*damaged, **options)
    parts = [load(*damaged, process=rank, processes=processes, **options) for rank in range(processes)]
    for batch in [*alone, *(batch for part in parts for batch in part)]:
        del batch.tensors["masked_places"]  # places in the process's own labels
    assert_same(alone, joined(parts))


@pytest.fixture
def retold(tmp_path):
    """A shard whose samples have two texts in the field `retold`, another length each, but for every fifth."""

    def members(number):
        texts = None if number % 5 == 2 else ["x" * (100 + number), 3, "", "y" * (200 + number)]
        return sample(number, json=json.dumps({"retold": texts, "one": f" {'z' * (300 + number)}\n"}).encode())

    write_tar(tmp_path / "shard.tar", [member for number in range(20) for member in members(number)])
    data = config(tmp_path, max_bad_share=0.5)
    return opened(tmp_path / "shard.tar", data), data


def test_augmented_captions_come_from_a_field(retold):
    batches = load(*retold, stop=6, text="field:one")
    for batch in batches:
        numbers = torch.tensor([number_of(image) for image in batch.tensors["image"]])
        assert batch.tensors["text_augmented"][:, 0].tolist() == (300 + numbers).tolist()  # stripped
    assert sum(len(batch.faults) for batch in batches) == 0


def test_of_several_texts_one_is_drawn_and_a_sample_without_any_is_replaced(retold):
    batches = load(*retold, stop=10, text="field:retold")
    drawn: dict[int, set[int]] = {}
    for batch in batches:
        assert batch.tried == len(batch.tensors["image"]) + len(batch.faults)
        for image, text in zip(batch.tensors["image"], batch.tensors["text_augmented"], strict=True):
            number = number_of(image)
            assert number % 5 != 2
            drawn.setdefault(number, set()).add(int(text[0]) - number)
    assert set().union(*drawn.values()) == {100, 200}
    assert sum(len(lengths) == 2 for lengths in drawn.values()) > 8  # in other epochs others
    causes = {cause for batch in batches for cause, _ in batch.faults}
    assert causes == {"no text in the field 'retold' of KEY.json"}
    assert {where.rpartition(" ")[2] for batch in batches for _, where in batch.faults} <= {
        f"{number:06d}.png" for number in (2, 7, 12, 17)
    }


def test_the_text_of_a_step_depends_on_no_process_start_or_worker(retold):
    alone = load(*retold, stop=6, text="field:retold")
    assert_same(alone, joined([load(*retold, stop=6, process=p, processes=3, text="field:retold") for p in range(3)]))
    assert_same(alone[3:], load(*retold, start=3, stop=6, text="field:retold"))
    samples, data = retold
    assert_same(alone[:2], load(samples, replace(data, workers=1), stop=2, text="field:retold"))


def test_a_field_that_nobody_needs_is_not_missed(retold):
    (batch,) = load(*retold, stop=1, batch=20, extra={"image_augmented"}, text="field:retold")
    assert batch.faults == []


def test_what_is_sent_for_the_device_makes_the_views_of_the_loader(tmp_path):
    """The same draws in every epoch, whichever process or worker makes them, with substitutes for bad samples."""
    members = []
    for number in range(20):
        content = io.BytesIO()
        Image.effect_noise((20 + 3 * number, 60 - 2 * number), 90).convert("RGB").save(content, "JPEG")
        members += sample(number, png=b"bad" if number % 7 == 5 else content.getvalue())
    write_tar(tmp_path / "shard.tar", members)
    data = config(tmp_path, max_bad_share=0.5)
    samples = opened(tmp_path / "shard.tar", data)

    def made(on: str, data=data, process: int = 0, processes: int = 1) -> list[TrainBatch]:
        contents = BatchContents(Views(ViewsConfig(on=on), 16), LengthTokenizer(), BOTH)
        batches = train_loader(samples, data, contents, BatchPlan(12, 3, 0, 4), process, processes)
        return [replace(batch, tensors=made_views(batch.tensors, batch.tensors)) for batch in batches]

    of_loader = made("loader")
    assert any(batch.faults for batch in of_loader)
    assert_same(of_loader, made("device", replace(data, workers=1)))
    assert_same(of_loader, joined([made("device", process=process, processes=3) for process in range(3)]))


def test_views_that_nobody_needs_are_not_made(tmp_path, monkeypatch):
    data = config(tmp_path)
    samples = opened(write_shards(tmp_path, [20]), data)
    for augmented in (frozenset(), {"image_augmented"}, {"text_augmented"}):
        made = views()
        for name in BOTH - set(augmented):
            method = {"image_augmented": "augmented_image", "text_augmented": "augmented_text"}[name]
            monkeypatch.setattr(type(made), method, lambda *_: pytest.fail("made a view for nobody"))
        (batch,) = load(samples, data, stop=1, extra=augmented)
        assert set(batch.tensors) == {"image", "text", *augmented}
        monkeypatch.undo()


def test_each_sample_comes_once_an_epoch_across_batches(tmp_path):
    data = config(tmp_path)
    samples = opened(write_shards(tmp_path, [7, 13, 1]), data)
    batches = load(samples, data, stop=7)  # 84 rows are four epochs of 21
    numbers = [number_of(image) for batch in batches for image in batch.tensors["image"]]
    for epoch in range(4):
        assert sorted(numbers[epoch * 21 : epoch * 21 + 21]) == list(range(21))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_together_read_the_batch_of_one(damaged, processes):
    alone = load(*damaged)
    together = joined([load(*damaged, process=rank, processes=processes) for rank in range(processes)])
    assert_same(alone, together)
    assert any(batch.faults for batch in alone)


def test_a_resumed_run_sees_the_same_batches(damaged):
    whole = load(*damaged, stop=9)
    assert_same(whole[4:], load(*damaged, start=4, stop=9))
    assert load(*damaged, start=4, stop=4) == []


def test_another_seed_and_another_epoch_give_other_views(tmp_path):
    data = config(tmp_path)
    content = Image.effect_noise((40, 40), 90)
    content.save(tmp_path / "noise.png")
    write_tar(tmp_path / "x.tar", sample(0, png=(tmp_path / "noise.png").read_bytes()))
    samples = opened(tmp_path / "x.tar", data)

    def images(seed, step):
        (batch,) = load(samples, data, start=step, stop=step + 1, batch=1, seed=seed)
        return batch.tensors["image_augmented"], batch.tensors["image"]

    (one, plain), (other_epoch, plain_again), (other_seed, _) = images(0, 0), images(0, 1), images(1, 0)
    assert torch.equal(plain, plain_again)
    assert not torch.equal(one, other_epoch)
    assert not torch.equal(one, other_seed)


def test_every_kind_of_fault_is_replaced_counted_and_named(tmp_path):
    faults = {
        3: ({"png": b"bad"}, "undecodable image"),
        9: ({"png": encoded_image(9)[:-30]}, "undecodable image"),
        12: ({"png": png_header(20_000, 20_000)}, "decompression bomb"),
        15: ({"txt": b"\xff\xfe"}, "undecodable text"),
        18: ({"txt": b""}, "empty caption"),
        21: ({"json": b"{"}, "malformed metadata"),
    }
    members = [m for n in range(40) for m in sample(n, **faults.get(n, ({}, ""))[0])]
    write_tar(tmp_path / "a.tar", [*members, *sample(50, png=None), *sample(51, txt=None)])
    write_tar(tmp_path / "b.tar", [m for n in range(60, 70) for m in sample(n)])
    os.truncate(tmp_path / "b.tar", 29 * 1024)  # in the last sample
    write_tar(tmp_path / "c.tar", [m for n in range(70, 80) for m in sample(n)])
    (tmp_path / "d.tar").write_bytes(b"no tar" * 100)
    data = config(tmp_path, max_bad_share=0.5)
    samples = opened(tmp_path / "?.tar", data)
    assert len(samples) == 59
    (tmp_path / "c.tar").unlink()
    good = {n for n in range(40) if n not in faults} | set(range(60, 69))

    batches = load(samples, data, stop=5, batch=59)  # five epochs
    for batch in batches:
        numbers = [number_of(image) for image in batch.tensors["image"]]
        assert set(numbers) == good
        assert batch.tried == 59 + len(batch.faults)
        seen = {tuple(fault) for fault in batch.faults}
        expected = {(cause, f"{tmp_path / 'a.tar'}: {number:06d}.png") for number, (_, cause) in faults.items()}
        found = {(cause, re.sub(r" \(.*\)$", "", where)) for cause, where in seen if "c.tar" not in where}
        assert found == expected
        assert {cause for cause, where in seen if "c.tar" in where} == {"missing shard"}
    (found,) = samples.faults
    assert found.left_out == samples.left_out == {"no image": 1, "no caption": 1, "truncated shard": 1}
    broken = [one.split(" after")[0] for one in found.broken]
    assert broken == [f"bad shard {tmp_path / 'b.tar'}: cut off", f"bad shard {tmp_path / 'd.tar'}: not a tar"]
    assert (found.broken_shards, found.empty_shards) == (2, 1)


def test_nothing_but_bad_samples_ends_with_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "SUBSTITUTES", 5)
    write_tar(tmp_path / "x.tar", [m for n in range(4) for m in sample(n, png=b"bad")])
    data = config(tmp_path, max_bad_share=1.0)
    with pytest.raises(
        TooManyBadSamples, match=r"6 samples in a row cannot be used, the last: undecodable image: .*x.tar"
    ):
        load(opened(tmp_path / "x.tar", data), data)


def test_weights_reach_the_order(tmp_path):
    data = config(tmp_path)
    sources = [Source(write_shards(tmp_path / name, [30]), weight=w) for name, w in (("a", 3.0), ("b", 1.0))]
    samples = open_samples(sources, data, "data.train")
    _, sample = train_order(samples, data, 0, 12).locate(torch.arange(10_000).numpy())
    assert (sample < 30).sum() == 7500


def test_captions_are_drawn_from_fields_by_weight_and_counts_are_by_source(tmp_path):
    members = []
    for n in range(40):
        texts = {} if n % 4 == 0 else {"blip": "B" * (n + 30)} if n % 4 == 1 else {"blip": ["C" * (n + 30), " ", "D"]}
        members += sample(n, json=json.dumps({"number": n, **texts}).encode(), **({"png": b"bad"} if n == 7 else {}))
    write_tar(tmp_path / "a.tar", members)
    data = config(tmp_path, caption_fields={"txt": 1.0, "blip": 3.0})
    sources = [Source(str(tmp_path / "a.tar"), 3.0, name="web"), Source(write_shards(tmp_path / "b", [20]), 1.0)]
    samples = open_samples(sources, data, "data.train")
    alone = load(samples, data, stop=40)
    captions = torch.cat([batch.tensors["text"] for batch in alone])
    sources_of_rows = torch.tensor([source for batch in alone for source in batch.sources])
    last, blip = captions[:, 1], sources_of_rows == 0
    from_field = torch.isin(last, torch.tensor([ord(letter) for letter in "BCD"]))
    assert not from_field[~blip].any()
    share = from_field[blip].float().mean().item()
    assert 0.75 * 0.75 - 0.08 < share < 0.75 * 0.75 + 0.08  # three quarters have a field, drawn three times of four
    assert {chr(letter) for letter in last[from_field].tolist()} == {"B", "C", "D"}
    counts = sum((batch.counts for batch in alone), Counter())
    assert counted(samples, data) == ["bad_samples/web", "bad_samples/source_1", "caption_fallbacks"]
    assert counts["bad_samples/web"] == sum(len(batch.faults) for batch in alone) > 0
    assert counts["bad_samples/source_1"] == 0
    lacking = (~from_field[blip]).sum() + (~blip).sum() - counts["caption_fallbacks"]  # drawn from KEY.txt
    assert 0.25 * len(captions) * 0.7 < lacking < 0.25 * len(captions) * 1.3
    for processes, start, workers in ((2, 3, 0), (4, 0, 0)):
        mine = replace(data, workers=workers)
        parts = [load(samples, mine, start, 40, process=p, processes=processes) for p in range(processes)]
        assert_same(joined(parts), alone[start:])
    told = list(train_captions(samples, data, 1000))
    assert {"thing 1", "B" * 31, "C" * 32, "D"} <= {*told}


def test_groups_are_read_alike_by_any_number_of_processes_that_divides_them(damaged):
    samples, data = damaged
    data.groups, data.order_version = 4, 2
    alone = load(samples, data)
    assert any(batch.faults for batch in alone)
    for processes, start, workers in ((2, 0, 0), (4, 3, 0), (2, 3, 1)):
        mine = replace(data, workers=workers)
        parts = [load(samples, mine, start, process=process, processes=processes) for process in range(processes)]
        assert_same(joined(parts), alone[start:])
    with pytest.raises(ValueError, match=r"^data\.groups = 4: 3 processes cannot take whole groups"):
        load(samples, data, processes=3)


def test_rows_that_do_not_divide_are_refused(tmp_path):
    data = config(tmp_path)
    samples = opened(write_shards(tmp_path, [20]), data)
    with pytest.raises(
        ValueError, match=r"^train\.global_batch = 10: must be a multiple of the 4 processes, such as 8"
    ):
        load(samples, data, batch=10, processes=4)
    with pytest.raises(ValueError, match=r"^train\.global_batch = 2: must be a multiple of the 4 processes, such as 4"):
        load(samples, data, batch=2, processes=4)


def test_pipes_that_would_be_fetched_again_and_again_are_refused(tmp_path):
    from modstruct.data.shards.index import index_file_name, index_tar

    write_shards(tmp_path, [8] * 6)
    for shard in range(6):
        name = f"pipe:cat {tmp_path}/shard-00{shard}.tar"
        index_tar(tmp_path / f"shard-00{shard}.tar").save(tmp_path / "cache" / "indexes" / index_file_name(name))
    shard_gib = (tmp_path / "shard-000.tar").stat().st_size / 2**30
    room = config(tmp_path, allow_pipe=True, pipe_cache_gib=4.5 * shard_gib)
    pattern = f"pipe:cat {tmp_path}/shard-{{000..005}}.tar"
    samples = opened(pattern, room)
    with pytest.raises(ValueError, match=r"^data\.pipe_cache_gib = .*data\.shuffle_block: 8 and a small"):
        load(samples, room)
    room.shuffle_block, room.shuffle_window = 8, 2
    numbers = sorted(number_of(i) for b in load(samples, room, stop=4) for i in b.tensors["image"])
    assert numbers == list(range(48))


def test_loading_leaves_the_random_state_alone(damaged):
    state = torch.random.get_rng_state()
    load(*damaged)
    assert torch.equal(state, torch.random.get_rng_state())
