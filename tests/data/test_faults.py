"""Bad samples are counted by cause and named; too many of them stop the run or refuse the source."""

from __future__ import annotations

import logging

import pytest
from crafted_shards import config, opened, sample, write_shards, write_tar

from modstruct.config import Source
from modstruct.data.faults import BadSampleCounter, TooManyBadSamples
from modstruct.data.shards.samples import open_samples


def test_a_ledger_counts_by_cause_and_names_the_first(caplog):
    ledger = BadSampleCounter("data.train", 0.1, process=3)
    with caplog.at_level(logging.WARNING):
        ledger.add([("empty caption", f"x.tar: {n}") for n in range(10)], tried=50)
        ledger.add([("empty caption", "x.tar: 0"), ("undecodable image", "y.tar: 1")], tried=50)
    assert (ledger.counts, ledger.bad, ledger.tried) == ({"empty caption": 11, "undecodable image": 1}, 12, 100)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.count("empty caption") for line in lines] == [1, 1, 1, 0]
    assert "data.train, process 3: sample left out: undecodable image: y.tar: 1" in lines[-1]
    assert "11 empty caption (as x.tar: 0), 1 undecodable image (as y.tar: 1)" in ledger.summary()


@pytest.mark.parametrize(
    ("bad", "tried", "stops"),
    [(0, 0, False), (9, 9, False), (25, 30, False), (26, 30, True), (100, 1000, False), (101, 1000, True)],
)
def test_a_run_stops_above_the_share(bad, tried, stops):
    ledger = BadSampleCounter("data.train", 0.1)
    if stops:
        with pytest.raises(
            TooManyBadSamples, match=rf"data.max_bad_share = 0.1: {bad} of {tried} samples of data.train"
        ):
            ledger.check(bad, tried)
    else:
        ledger.check(bad, tried)


def test_a_source_without_a_usable_sample_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>" * 500)
    with pytest.raises(ValueError, match=r"^data\.train = .*x\.tar': holds no usable sample; bad shard .*: not a tar"):
        opened(tmp_path / "x.tar", config(tmp_path))
    write_tar(tmp_path / "y.tar", sample(1, txt=None))
    with pytest.raises(ValueError, match=r"no usable sample; 1 samples left out: no caption \(first .*000001\)"):
        opened(tmp_path / "y.tar", config(tmp_path, max_bad_share=1.0))


def test_one_good_source_does_not_excuse_an_empty_one(tmp_path):
    good = write_shards(tmp_path, [5])
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match=r"empty\.tar': holds no usable sample"):
        open_samples([Source(good), Source(str(tmp_path / "empty.tar"))], config(tmp_path), "data.train")


@pytest.mark.parametrize(("share", "refused"), [(0.19, True), (0.2, False)])
def test_a_source_too_bad_to_train_on_is_refused_at_start(tmp_path, share, refused, caplog):
    members = [m for n in range(10) for m in (sample(n) if n > 1 else sample(n, png=None))]
    path = write_tar(tmp_path / "x.tar", members)
    data = config(tmp_path, max_bad_share=share)
    if refused:
        with pytest.raises(ValueError, match=r"^data\.max_bad_share = 0\.19: 20\.0% of data\.train = .*no image"):
            opened(path, data)
    else:
        with caplog.at_level(logging.WARNING):
            assert len(open_samples([Source(str(path))], data, "data.train", progress=True)) == 8
        assert f"data.train: 2 samples left out: no image (first {path}: 000000, 000001)" in caplog.text


@pytest.mark.parametrize(("share", "refused"), [(0.3, True), (0.4, False)])
def test_shards_that_hold_nothing_are_weighed_too(tmp_path, share, refused, caplog):
    pattern = write_shards(tmp_path, [3, 3])
    (tmp_path / "shard-009.tar").write_bytes(b"no tar" * 200)
    data = config(tmp_path, max_bad_share=share)
    if refused:
        with pytest.raises(ValueError, match=r"33\.3% of data\.train"):
            opened(pattern, data)
    else:
        with caplog.at_level(logging.WARNING):
            assert len(open_samples([Source(pattern)], data, "data.train", progress=True)) == 6
        assert f"bad shard {tmp_path / 'shard-009.tar'}: not a tar" in caplog.text
