"""Shards damaged during a run, or between two: the order stays, and the lost samples count as bad ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from crafted_shards import config, opened, write_shards

from modstruct.config import Source
from modstruct.data.faults import BadSample
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import open_saved_samples
from modstruct.data.shards.sources import names_only


def cut(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


DAMAGES = {"delete": (os.unlink, "missing shard"), "cut": (cut, "shard changed since it was indexed")}


@pytest.fixture
def ten_shards(tmp_path):
    data = config(tmp_path, max_bad_share=0.25)
    pattern = write_shards(tmp_path / "shards", [3] * 10)
    return pattern, data, opened(pattern, data)


def again(pattern: str, data, fingerprint: str):
    return open_saved_samples([Source(pattern)], data, "data.train", fingerprint)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_damaged_under_an_open_reader_is_bad_at_once_as_for_a_new_reader(ten_shards, damage):
    _, data, samples = ten_shards
    harm, cause = DAMAGES[damage]
    old = ShardReader(samples, data)
    before = [old.read(sample).key for sample in range(30)]
    harm(samples.shards[4])
    for reader in (old, ShardReader(samples, data)):
        for sample in range(30):
            if 12 <= sample < 15:
                with pytest.raises(BadSample) as bad:
                    reader.read(sample)
                assert bad.value.cause == cause
            else:
                assert reader.read(sample).key == before[sample]


def test_a_shard_replaced_by_the_same_file_is_read_on(ten_shards):
    _, data, samples = ten_shards
    reader = ShardReader(samples, data)
    key = reader.read(13).key
    path, status = samples.shards[4], os.stat(samples.shards[4])
    content = Path(path).read_bytes()
    os.unlink(path)
    Path(path).write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reader.read(13).key == key


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("braces", [False, True])
def test_a_resumed_run_numbers_its_samples_as_before(ten_shards, damage, braces):
    pattern, data, samples = ten_shards
    if braces:
        pattern = pattern.replace("*", "{000..009}")
    for shard in (4, 7):
        DAMAGES[damage][0](samples.shards[shard])
    found = again(pattern, data, samples.fingerprint)
    assert found.fingerprint == samples.fingerprint
    assert list(found.shards) == list(samples.shards)
    assert ShardReader(found, data).read(29).key == "000029"


def test_too_much_lost_is_left_to_the_caller_to_refuse(ten_shards):
    pattern, data, samples = ten_shards
    for shard in range(3):
        os.unlink(samples.shards[shard])
    assert again(pattern, data, samples.fingerprint).fingerprint != samples.fingerprint
    with pytest.raises(ValueError, match=r"3 of 10 files do not exist"):
        again(pattern.replace("*", "{000..009}"), data, samples.fingerprint)


def test_other_shards_are_not_damaged_ones(ten_shards, tmp_path):
    pattern, data, samples = ten_shards
    write_shards(tmp_path / "shards", [3], name="shard-more")
    assert again(pattern, data, samples.fingerprint).fingerprint != samples.fingerprint


@pytest.mark.parametrize("named", ["elsewhere/nothing-*.tar", "copy/shard-{000..009}.tar", "copy/shard-000.tar"])
def test_a_pattern_of_other_shards_that_are_not_there_is_refused(ten_shards, tmp_path, named):
    _, data, samples = ten_shards
    with pytest.raises(ValueError, match=r"^data\.train.*(no file matches|do not exist)"):
        again(str(tmp_path / named), data, samples.fingerprint)


@pytest.mark.parametrize(
    ("pattern", "allow_pipe", "none_else"),
    [
        ("/d/a/{0,1}.tar", False, True),
        ("/d/a/{0,1,2}.tar", False, False),
        ("/d/*.tar", False, False),
        ("/d/**/*.tar", False, True),
        ("/d/{a,b}/*.tar", False, True),
        ("pipe:cat 0", False, False),
        ("pipe:cat 0", True, True),
        ("pipe:cat 1", True, False),
        ("s3://bucket/{0,1}.tar", False, True),
        ("s3://bucket/*.tar", False, True),
        ("s3://other/*.tar", False, False),
    ],
)
def test_what_a_pattern_names_beside_known_shards(pattern, allow_pipe, none_else):
    known = ["/d/a/0.tar", "/d/a/1.tar", "pipe:cat 0", "s3://bucket/0.tar", "s3://bucket/1.tar"]
    assert names_only(pattern, known, allow_pipe, "data.train") == none_else


def test_a_glob_that_matches_a_new_shard_names_another(ten_shards, tmp_path):
    pattern, _, samples = ten_shards
    assert names_only(pattern, samples.shards, False, "data.train")
    write_shards(tmp_path / "shards", [3], name="shard-more")
    assert not names_only(pattern, samples.shards, False, "data.train")


def test_all_shards_of_a_glob_may_be_gone_and_missed(ten_shards, tmp_path):
    pattern, data, samples = ten_shards
    for shard in samples.shards:
        os.unlink(shard)
    data.max_bad_share = 1.0
    for glob in (pattern, str(tmp_path / "**" / "*.tar")):
        assert list(again(glob, data, samples.fingerprint).shards) == list(samples.shards)
