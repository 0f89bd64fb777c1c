"""Lines of KEY.txt are captions where a source is made so, and else one caption has them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from crafted_shards import LengthTokenizer, config, encoded_image, number_of, sample, views, write_shards, write_tar

from modstruct.config import DataConfig, Source
from modstruct.config.migrations import migrate_checkpoint
from modstruct.data.shards import texts as texts_module
from modstruct.data.shards.evaluation_samples import EvaluationSamples, train_captions
from modstruct.data.shards.loader import BatchContents, BatchPlan, train_loader
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.samples import open_saved_samples

SHOWN = "KEY.txt looked at in"


def lines(number: int, count: int = 5) -> bytes:
    """Captions of different lengths, by which LengthTokenizer tells them apart."""
    return "\r\n".join(f"caption {number:03d} {'x' * (line + 1)}" for line in range(count)).encode() + b"\n\n"


def clip_benchmark(number: int) -> list[tuple[str, bytes]]:
    """A sample of a retrieval set as CLIP_benchmark converts it."""
    return [(f"s{number:07d}.jpg", encoded_image(number, kind="JPEG")), (f"s{number:07d}.txt", lines(number))]


def img2dataset(number: int, caption: str) -> list[tuple[str, bytes]]:
    about = {"url": "https://host/x.jpg", "caption": caption, "key": f"{number:09d}", "status": "success"}
    return sample(number, txt=caption.encode(), json=json.dumps(about).encode())


def opened(path: Path, data: DataConfig, wanted=None) -> EvaluationSamples:
    return EvaluationSamples([Source(str(path), caption_lines=wanted)], data, progress=True)


@pytest.fixture
def several(tmp_path) -> Path:
    return write_tar(tmp_path / "several.tar", [m for number in range(12) for m in clip_benchmark(number)])


def test_lines_of_a_retrieval_set_are_captions_and_that_is_said(several, tmp_path, caplog):
    samples = opened(several, config(tmp_path))
    captions = [samples[number].captions for number in range(12)]
    assert captions == [[line.strip() for line in lines(n).decode().strip().split("\n")] for n in range(12)]
    assert f"data.eval: 12 of 12 {SHOWN} {several} hold several lines: each line is a caption" in caplog.text
    assert "data.caption_lines: false takes each text for one" in caplog.text


@pytest.mark.parametrize(("field", "wanted"), [(False, None), ("auto", False), (True, False)])
def test_a_user_may_take_them_for_one_caption(several, tmp_path, caplog, field, wanted):
    samples = opened(several, config(tmp_path, caption_lines=field), wanted)
    assert samples[3].captions == [lines(3).decode().strip()]
    assert f"12 of 12 {SHOWN} {several} hold several lines: each whole text is a caption" in caplog.text


@pytest.mark.parametrize("broken", [1, 12])
def test_captions_of_img2dataset_keep_their_line_breaks(tmp_path, caplog, broken):
    """All or few: the caption of KEY.json says that it is one."""
    members = [img2dataset(n, f"first {n}\nsecond\n\nthird" if n < broken else f"plain {n}") for n in range(12)]
    write_tar(tmp_path / "x.tar", [m for of_sample in members for m in of_sample])
    samples = opened(tmp_path / "x.tar", config(tmp_path))
    assert samples[0].captions == ["first 0\nsecond\n\nthird"]
    assert all(len(samples[number].captions) == 1 for number in range(12))
    assert SHOWN not in caplog.text
    wanted = opened(tmp_path / "x.tar", config(tmp_path, caption_lines=True))
    assert wanted[0].captions == ["first 0", "second", "third"]


def test_a_mixed_source_has_one_caption_a_text_and_is_counted(tmp_path, caplog):
    members = [sample(n, txt=lines(n) if n < 8 else b"plain", json=None) for n in range(10)]
    write_tar(tmp_path / "x.tar", [m for of_sample in members for m in of_sample])
    samples = opened(tmp_path / "x.tar", config(tmp_path))
    assert all(len(samples[number].captions) == 1 for number in range(10))
    assert f"8 of 10 {SHOWN} {tmp_path / 'x.tar'} hold several lines: each whole text is a caption" in caplog.text
    assert "data.caption_lines: true takes each line for one" in caplog.text


def test_a_list_in_the_metadata_goes_before_the_lines(tmp_path):
    about = json.dumps({"captions": ["one", "two"]}).encode()
    write_tar(tmp_path / "x.tar", [m for n in range(4) for m in sample(n, txt=lines(n), json=about)])
    assert opened(tmp_path / "x.tar", config(tmp_path))[1].captions == ["one", "two"]


def test_it_is_decided_once_for_each_source(several, tmp_path, monkeypatch):
    plain = write_shards(tmp_path / "plain", [5, 5])
    sources = [Source(str(several)), Source(plain), Source(str(several), caption_lines=False)]
    samples = EvaluationSamples(sources, config(tmp_path), "data.train").samples
    assert samples.caption_lines == [True, False, False]
    assert samples.content == f"{samples.fingerprint} lines 100"
    with monkeypatch.context() as later:
        later.setattr(texts_module, "look", lambda *_: pytest.fail("looked at twice"))
        again = EvaluationSamples(sources, config(tmp_path), "data.train").samples
    assert again.caption_lines == [True, False, False]
    kept = open_saved_samples(sources, config(tmp_path), "data.train", samples.fingerprint)
    assert (kept.caption_lines, kept.content) == (samples.caption_lines, samples.content)
    unaffected = EvaluationSamples([Source(plain)], config(tmp_path)).samples
    assert unaffected.content == unaffected.fingerprint


def drawn(samples: Samples, data: DataConfig, process: int = 0, processes: int = 1, start: int = 0) -> list[dict]:
    """Of four epochs of twelve samples, image number -> (length of the caption, its last letter), step by step."""
    plan = BatchPlan(4, 0, start, 12)
    loader = train_loader(samples, data, BatchContents(views(), LengthTokenizer()), plan, process, processes)
    numbered = [zip(map(number_of, b.tensors["image"]), b.tensors["text"].tolist(), strict=True) for b in loader]
    return [dict(rows) for rows in numbered]


def test_training_draws_a_line_an_epoch_on_any_number_of_processes(tmp_path):
    write_tar(tmp_path / "x.tar", [m for n in range(12) for m in sample(n, txt=lines(n))])
    data = config(tmp_path)
    samples = opened(tmp_path / "x.tar", data).samples
    steps = drawn(samples, data)
    lengths = {n: [step[n][0] for step in steps if n in step] for n in range(12)}
    assert {length - len("caption 000 ") for of_image in lengths.values() for length in of_image} == {1, 2, 3, 4, 5}
    assert all(len(of_image) == 4 for of_image in lengths.values())
    assert sum(len(set(of_image)) > 1 for of_image in lengths.values()) > 8, "not the same line each epoch"
    two = [drawn(samples, data, process, 2) for process in range(2)]
    assert [a | b for a, b in zip(*two, strict=True)] == steps
    assert drawn(samples, data, start=5) == steps[5:], "resumed"


def test_tokenizers_are_trained_on_lines(several, tmp_path):
    data = config(tmp_path)
    samples = opened(several, data).samples
    everything = list(train_captions(samples, data, 10**6))
    assert sorted(everything) == sorted(line for n in range(12) for line in lines(n).decode().strip().split("\r\n"))
    few = list(train_captions(samples, data, 6))
    assert len(few) == len(set(few)) == 6
    assert len(list(train_captions(samples, data, 30))) == 24  # two of each
    assert len({caption.rpartition(" ")[2] for caption in train_captions(samples, data, 12)}) == 5


def test_checkpoints_of_earlier_versions_keep_their_captions():
    older = migrate_checkpoint({"schema": 2, "data": {"train": "x.tar"}})
    assert older["data"]["caption_lines"] is False
    assert "data" not in migrate_checkpoint({"schema": 2, "task": {"name": "vqa"}})


def test_a_pipe_is_looked_at_in_its_first_shard(tmp_path):
    from modstruct.data.shards.index import index_file_name, index_tar

    for shard in range(3):
        members = [m for n in range(4) for m in sample(n, txt=lines(n))]
        path = write_tar(tmp_path / f"{shard}.tar", members)
        index_tar(path).save(tmp_path / "cache" / "indexes" / index_file_name(f"pipe:cat {path}"))
    pattern = f"pipe:cat {tmp_path}/{{0..2}}.tar"
    samples = EvaluationSamples([Source(pattern)], config(tmp_path, allow_pipe=True)).samples
    assert samples.caption_lines == [True]
    assert len(list((tmp_path / "cache" / "pipes").glob("*.tar"))) == 1
