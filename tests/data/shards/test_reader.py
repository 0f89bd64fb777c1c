"""A sample is read as it was written, by its number; whatever is wrong with it has a cause and a place."""

from __future__ import annotations

import json
import os
import pickle
import tarfile

import pytest
from crafted_shards import config, encoded_image, opened, sample, write_shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.config import Source
from modstruct.data.faults import BadSample
from modstruct.data.shards import reader as reader_module
from modstruct.data.shards.reader import LARGEST_GAPS, RawSample, ShardReader, _sum
from modstruct.data.shards.samples import open_samples


def test_every_sample_is_read_as_written(tmp_path):
    data = config(tmp_path)
    reader = ShardReader(opened(write_shards(tmp_path, [3, 1, 4]), data), data)
    for number in (7, 0, 3, 4, 2):
        raw = reader.read(number)
        assert (raw.key, raw.image, raw.caption) == (f"{number:06d}", encoded_image(number), f"thing {number}")
        assert raw.metadata == {"number": number}
        assert reader.texts(number) == (raw.caption,)
    assert raw.where == f"{tmp_path / 'shard-000.tar'}: 000002.png"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_kept(tmp_path, form):
    key = "földer/" + "long" * 60
    path = write_tar(tmp_path / "x.tar", [(f"{key}.png", encoded_image()), (f"{key}.txt", b"x")], form)
    data = config(tmp_path)
    assert ShardReader(opened(path, data), data).read(0).key == key


def test_names_are_never_paths(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    link = tarfile.TarInfo("000002.txt")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    hard = tarfile.TarInfo("000003.txt")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../secret.txt"
    device = tarfile.TarInfo("000004.txt")
    device.type = tarfile.CHRTYPE
    members = [("/etc/passwd.png", encoded_image(1)), ("/etc/passwd.txt", b"one")]
    members += [("../../escape.png", encoded_image(2)), ("../../escape.txt", b"two")]
    for number, special in ((2, link), (3, hard), (4, device)):
        members += [*sample(number, txt=None, json=None), special]
    before = sorted(tmp_path.rglob("*"))
    path = write_tar(tmp_path / "x.tar", members)
    data = config(tmp_path, max_bad_share=0.7)
    samples = opened(path, data)
    reader = ShardReader(samples, data)
    assert [(reader.read(n).key, reader.read(n).caption) for n in range(len(samples))] == [
        ("/etc/passwd", "one"),
        ("../../escape", "two"),
    ]
    assert samples.faults[0].left_out == {"no caption": 3}
    made = set(tmp_path.rglob("*")) - set(before)
    assert {p for p in made if tmp_path / "cache" not in (p, *p.parents)} == {path}


@pytest.mark.parametrize(
    ("member", "content", "cause"),
    [
        ("txt", b"\xff\xfe\xfa", "undecodable text"),
        ("txt", b"", "empty caption"),
        ("txt", b" \n\t ", "empty caption"),
        ("json", b"{", "malformed metadata"),
        ("json", b"[1]", "malformed metadata"),
        ("json", b"\xff", "malformed metadata"),
        ("json", b"[" * 100_000, "malformed metadata"),
    ],
)
def test_bad_members_have_a_cause_and_a_place(tmp_path, member, content, cause):
    path = write_tar(tmp_path / "x.tar", [*sample(0), *sample(1, **{member: content})])
    data = config(tmp_path)
    with pytest.raises(BadSample) as bad:
        ShardReader(opened(path, data), data).read(1)
    assert (bad.value.cause, bad.value.where) == (cause, f"{path}: 000001.png")


def test_members_far_apart_are_read_as_neighbours_are(tmp_path):
    image_, text, described = sample(0)
    other = ("000000.npy", bytes(3 * LARGEST_GAPS))
    data = config(tmp_path)
    for number, members in enumerate(([text, other, image_, described], [described, image_, other, text])):
        raw = ShardReader(opened(write_tar(tmp_path / f"{number}.tar", members), data), data).read(0)
        assert (raw.key, raw.image, raw.caption, raw.metadata) == ("000000", encoded_image(0), "thing 0", {"number": 0})


@settings(deadline=None)
@given(st.binary(min_size=512, max_size=512))
def test_the_sum_of_a_header_is_that_of_its_bytes(header):
    assert _sum(header) == sum(header)
    assert _sum(b"\xff" * 512) == 512 * 255


def test_a_byte_order_mark_and_missing_metadata_do_no_harm(tmp_path):
    path = write_tar(tmp_path / "x.tar", sample(0, txt="\ufeffwörds \n".encode(), json=None))
    data = config(tmp_path)
    raw = ShardReader(opened(path, data), data).read(0)
    assert (raw.caption, raw.metadata) == ("wörds", {})


def test_a_shard_deleted_changed_or_cut_after_it_was_indexed_is_bad(tmp_path):
    data = config(tmp_path)
    samples = opened(write_shards(tmp_path, [2, 2, 2]), data)
    os.unlink(tmp_path / "shard-000.tar")
    write_tar(tmp_path / "shard-001.tar", [*sample(8), *sample(9)])  # of the same size and layout
    os.utime(tmp_path / "shard-001.tar", (1, 1))
    reader = ShardReader(samples, data)
    assert reader.read(4).caption == "thing 4"
    os.truncate(tmp_path / "shard-002.tar", 700)  # while it is open
    causes = []
    for number in (1, 3, 5):
        with pytest.raises(BadSample, match=f"shard-00{number // 2}.tar: sample 1") as bad:
            reader.read(number)
        causes.append(bad.value.cause)
    assert causes == ["missing shard", "shard changed since it was indexed", "shard changed since it was indexed"]


def test_a_long_chain_of_headers_is_read_without_recursion(tmp_path):
    long_name = tarfile.TarInfo("long")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 11
    # Each renames the member; tarfile reads such a chain recursively, and stops at Python's limit.
    chain = (long_name.tobuf(tarfile.GNU_FORMAT) + b"000001.png".ljust(512, b"\0")) * 1000
    path = write_tar(tmp_path / "x.tar", sample(1))
    path.write_bytes(chain + path.read_bytes())
    data = config(tmp_path)
    assert ShardReader(opened(path, data), data).read(0).key == "000001"


def test_few_shards_are_open_at_once_and_all_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "OPEN_SHARDS", 2)
    data = config(tmp_path)
    reader = ShardReader(opened(write_shards(tmp_path, [1] * 6), data), data)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(6), *range(6)]:
        assert reader.read(number).caption == f"thing {number}"
    assert len(os.listdir("/proc/self/fd")) <= before + 2 + 1  # and the table of rows
    reader.close()
    assert reader.read(3).caption == "thing 3"


def test_a_reader_travels_without_its_files_and_rows(tmp_path):
    data = config(tmp_path)
    reader = ShardReader(opened(write_shards(tmp_path, [500]), data), data)
    fresh = len(pickle.dumps(reader))
    reader.read(400)
    sent = pickle.dumps(reader)
    assert len(sent) == fresh < 500 * 28
    assert pickle.loads(sent).read(400).caption == "thing 400"


@pytest.mark.parametrize(
    ("metadata", "captions"),
    [
        ({}, ["c"]),
        ({"captions": ["a", " b "]}, ["a", "b"]),
        ({"captions": []}, ["c"]),
        ({"captions": "a"}, ["c"]),
        ({"captions": [1, "", " "]}, ["c"]),
    ],
)
def test_several_captions_come_from_the_metadata(metadata, captions):
    assert RawSample("k", b"", "c", json.loads(json.dumps(metadata))).captions == captions


def test_sources_are_numbered_through(tmp_path):
    data = config(tmp_path)
    patterns = [write_shards(tmp_path / name, sizes) for name, sizes in (("a", [2, 1]), ("b", [3]))]
    samples = open_samples([Source(p) for p in patterns], data, "data.train")
    reader = ShardReader(samples, data)
    assert [reader.read(n).metadata["number"] for n in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [sizes.tolist() for sizes in samples.shard_sizes()] == [[2, 1], [3]]
