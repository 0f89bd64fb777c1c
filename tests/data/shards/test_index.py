"""An index finds every whole sample of a tar, whatever else is in it, and says what it left out."""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
from unittest import mock

import numpy as np
import pytest
from crafted_shards import config, opened, sample, write_shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.config import Source
from modstruct.data.shards import index as index_module
from modstruct.data.shards.index import ROW, ShardIndex, index_file_name, index_tar
from modstruct.data.shards.members import MemberGroups, key_of, printable
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import open_samples, open_saved_samples

BLOCK = 512


def contents(path, index):
    """What the index points at: (image, text, metadata) of each sample."""
    whole = path.read_bytes()

    def cut(row, kind):
        start = int(row[f"{kind}_block"]) * BLOCK
        return whole[start : start + int(row[f"{kind}_bytes"])]

    return [tuple(cut(row, kind) for kind in ("image", "text", "metadata")) for row in index.rows]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=1500), st.binary(max_size=600), st.booleans()), max_size=12),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(["", "a.folder/", "long/" * 40, "ünï/"]),
)
def test_the_index_points_at_every_member(tmp_path_factory, samples, form, folder):
    if form == tarfile.USTAR_FORMAT and len(folder) > 100:
        folder = ""
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    members = []
    for number, (image, text, has_metadata) in enumerate(samples):
        members += [(f"{folder}{number}.JPG", image), (f"{folder}{number}.txt", text)]
        members += [(f"{folder}{number}.json", b"{}")] if has_metadata else []
    index = index_tar(write_tar(path, members, form))
    assert contents(path, index) == [(i, t, b"{}" if m else b"") for i, t, m in samples]
    assert (index.faults, index.broken, index.size_bytes) == ({}, None, path.stat().st_size)


def test_what_is_no_sample_is_left_out_and_counted(tmp_path):
    link = tarfile.TarInfo("000007.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        ("readme", b"x"),
        (".hidden.png", b"x"),
        ("._000001.png", b"x"),
        *sample(1, png=None),
        *sample(2, txt=None),
        *sample(3),
        *sample(4, png=None, txt=None),
        ("000005.seg.png", b"no image of the sample"),
        ("000005.txt", b"words"),
        link,
        *sample(7, png=None),
        *sample(8, jpg=b"another image, which does not count"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    index = index_tar(path)
    assert [metadata for _, _, metadata in contents(path, index)] == [b'{"number": 3}', b'{"number": 8}']
    assert contents(path, index)[1][0].startswith(b"\x89PNG")
    assert index.faults == {"no image": 4, "no caption": 1}
    assert index.unused == {
        "members hidden or without a name": 3,
        "members named .seg.png": 1,
        "links and other members that are no plain files": 1,
        "a second image of a key": 1,
    }
    assert index.examples == {
        "no image": ["000001", "000004", "000005"],
        "no caption": ["000002"],
        "members hidden or without a name": ["readme", ".hidden.png", "._000001.png"],
        "members named .seg.png": ["000005.seg.png"],
        "links and other members that are no plain files": ["000007.png"],
        "a second image of a key": ["000008.jpg"],
    }
    assert index.broken is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_tar_cut_anywhere_keeps_the_samples_before_the_cut(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tar")
    path = write_tar(folder / "whole.tar", [member for n in range(5) for member in sample(n)])
    index = index_tar(path)
    whole = contents(path, index)
    ends = [int(row["metadata_block"]) * BLOCK + int(row["metadata_bytes"]) for row in index.rows]
    length = data.draw(st.integers(ends[0], ends[-1] + BLOCK - 1))
    cut = folder / "cut.tar"
    cut.write_bytes(path.read_bytes()[:length])
    index = index_tar(cut)
    kept = sum(end <= length for end in ends)
    assert contents(cut, index) == whole[:kept]
    assert index.broken.startswith("cut off after")
    assert sum(index.faults.values()) <= 1
    assert index.faults.keys() <= {"truncated shard"}


def test_damage_in_the_middle_keeps_the_samples_before_it(tmp_path):
    path = write_tar(tmp_path / "x.tar", [member for n in range(5) for member in sample(n)])
    content = bytearray(path.read_bytes())
    header = int(index_tar(path).rows[3]["text_block"]) * BLOCK - BLOCK
    content[header : header + 100] = b"\xff" * 100
    path.write_bytes(content)
    index = index_tar(path)
    assert len(index.rows) == 3
    assert index.faults == {"truncated shard": 1}
    assert index.broken == f"damaged header at byte {header}"


def forged_header(size: int, kind: bytes = tarfile.REGTYPE, name: str = "000001.png") -> bytes:
    """A tar header with a right checksum that claims any size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 256**11).to_bytes(11, "big")  # in base 256
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header)


@pytest.mark.parametrize(
    "forged",
    [
        forged_header(-100),
        forged_header(-4096),
        forged_header(-4096, tarfile.DIRTYPE),
        forged_header(-4096, b"Z"),
        forged_header(2**80),
        forged_header(2**80, b"Z"),
        forged_header(-4096, tarfile.GNUTYPE_LONGNAME),
        forged_header(2**44, tarfile.GNUTYPE_LONGNAME),
        forged_header(2**80, tarfile.GNUTYPE_LONGNAME),
        forged_header(0, tarfile.GNUTYPE_LONGNAME) * 3000,
    ],
)
def test_a_forged_header_ends_the_reading_and_keeps_the_samples_before_it(tmp_path, forged):
    whole = write_tar(tmp_path / "whole.tar", sample(0)).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 6 * BLOCK] + forged + bytes(1024))
    index = index_tar(tmp_path / "x.tar")
    assert contents(tmp_path / "x.tar", index)[0][2] == b'{"number": 0}'
    assert len(index.rows) == 1
    assert re.match("damaged header at byte 3072|cut off after", index.broken)

    (tmp_path / "x.tar").write_bytes(forged + bytes(1024))
    index = index_tar(tmp_path / "x.tar")
    assert len(index.rows) == 0
    assert index.broken


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"<html>no such key</html>" * 100, "not a tar"),
        (gzip.compress(b"x" * 2000, mtime=0), "a compressed tar.*gunzip"),
        (os.urandom(5000), "not a tar"),
    ],
)
def test_a_file_that_is_no_tar_is_told_by_what_it_is(tmp_path, content, reason):
    (tmp_path / "x.tar").write_bytes(content)
    index = index_tar(tmp_path / "x.tar")
    assert len(index.rows) == 0
    assert re.match(reason, index.broken)


def test_a_saved_index_comes_back_and_a_damaged_one_does_not(tmp_path):
    index = index_tar(write_tar(tmp_path / "x.tar", [*sample(0), *sample(1, png=None)]))
    index.save(tmp_path / "x.npz")
    back = ShardIndex.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(back.rows, index.rows)
    assert back.rows.dtype == ROW
    assert (back.faults, back.examples, back.broken) == (index.faults, index.examples, index.broken)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:100])
    assert ShardIndex.load(tmp_path / "x.npz") is None
    assert ShardIndex.load(tmp_path / "none.npz") is None


def test_an_index_is_made_once_and_anew_when_its_shard_changes(tmp_path, monkeypatch):
    indexed = []

    def counting(path, **options):
        indexed.append(os.path.basename(path))
        return index_tar(path)

    monkeypatch.setattr(index_module, "index_tar", counting)
    pattern = write_shards(tmp_path, [3, 4])
    data = config(tmp_path)
    first = opened(pattern, data)
    again = opened(pattern, data)
    assert indexed == ["shard-000.tar", "shard-001.tar"]
    assert len(first) == len(again) == 7
    assert first.fingerprint == again.fingerprint

    write_shards(tmp_path, [3, 6])
    changed = opened(pattern, data)
    assert indexed[2:] == ["shard-000.tar", "shard-001.tar"]  # both were rewritten
    assert len(changed) == 9
    assert changed.fingerprint != first.fingerprint
    assert [ShardReader(changed, data).read(n).metadata["number"] for n in range(9)] == list(range(9))

    opened(tmp_path / "shard-001.tar", data)  # another choice of shards needs no new index
    assert len(indexed) == 4


def test_the_same_shards_elsewhere_have_the_same_fingerprint(tmp_path):
    one = opened(write_shards(tmp_path / "a", [3, 4]), config(tmp_path))
    other = opened(write_shards(tmp_path / "b", [3, 4]), config(tmp_path / "b"))
    split = opened(write_shards(tmp_path / "c", [4, 3]), config(tmp_path))
    assert one.fingerprint == other.fingerprint != split.fingerprint


def test_many_shards_are_indexed_by_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "SHORT_JOBS_WORTH_A_POOL", 2)
    samples = opened(write_shards(tmp_path, [2, 3, 1]), config(tmp_path))
    np.testing.assert_array_equal(samples.shard_starts, [0, 2, 5, 6])


def test_a_damaged_index_in_the_cache_is_made_anew(tmp_path):
    pattern = write_shards(tmp_path, [3])
    data = config(tmp_path)
    opened(pattern, data)
    for file in (tmp_path / "cache" / "indexes").rglob("*.npz"):
        file.write_bytes(b"damaged")
    for file in (tmp_path / "cache" / "indexes" / "sets").iterdir():
        file.unlink()
    assert len(opened(pattern, data)) == 3


def named(*names: str) -> list[tuple[str, bytes]]:
    """Members whose content is their name."""
    return [(name, name.encode()) for name in names]


def keys(path) -> list[str]:
    """Of the samples of a shard, as their images tell them."""
    return [key_of(image.decode()) for image, _, _ in contents(path, index_tar(path))]


def test_keys_with_dots_are_read_beside_others(tmp_path):
    dotted = [f"v1.{n}.{kind}" for n in range(3) for kind in ("jpg", "txt", "json")]
    path = write_tar(
        tmp_path / "x.tar", named("0.jpg", "0.txt", *dotted, "a.b/c.d.png", "a.b/c.d.txt", "1.jpg", "1.txt")
    )
    index = index_tar(path)
    assert keys(path) == ["0", "v1.0", "v1.1", "v1.2", "a.b/c.d", "1"]
    assert contents(path, index)[1] == (b"v1.0.jpg", b"v1.0.txt", b"v1.0.json")
    assert (index.faults, index.unused) == ({}, {})


def test_faults_of_keys_with_dots_are_counted(tmp_path):
    names = named("v1.0.jpg", "v1.0.txt", "v1.1.jpg", "v1.2.txt", "v1.3.jpg", "v1.3.jpeg", "v1.3.txt", "v1.3.cls")
    index = index_tar(write_tar(tmp_path / "x.tar", [*names, *named("v2.4.jpg")]))
    assert len(index.rows) == 2
    assert index.faults == {"no caption": 2, "no image": 1}
    assert index.unused == {"a second image of a key": 1, "members named .cls": 1}
    assert index.examples["no caption"] == ["v1.1", "v2.4"]


def test_members_of_several_parts_stay_what_they_are(tmp_path):
    names = [f"{n}.{kind}" for n in range(4) for kind in ("jpg", "seg.png", "cls.txt", "txt", "caption")]
    path = write_tar(tmp_path / "x.tar", named(*names, "5.full.jpg", "5.caption.txt", "6.txt", "6.jpg"))
    index = index_tar(path)
    assert keys(path) == ["0", "1", "2", "3", "6"]
    assert index.unused == {
        "members named .seg.png": 4,
        "members named .cls.txt": 4,
        "members named .caption": 4,
        "members named .full.jpg": 1,
        "members named .caption.txt": 1,
    }


def test_repeated_keys_are_read_and_counted(tmp_path):
    apart = index_tar(write_tar(tmp_path / "x.tar", [*sample(0), *sample(1), *sample(0)]))
    assert (len(apart.rows), apart.unused) == (3, {"samples with the key of an earlier one": 1})
    adjacent = index_tar(write_tar(tmp_path / "y.tar", [*sample(0), *sample(0)]))
    assert (len(adjacent.rows), adjacent.unused) == (
        1,
        {f"a second {k} of a key": 1 for k in ("image", "text", "metadata")},
    )


def test_names_of_a_hostile_tar_do_not_fill_the_index(tmp_path):
    names = [f"{n}.{'x' * 90}{n}" for n in range(300)]
    index = index_tar(write_tar(tmp_path / "x.tar", [*sample(0), *named(*names)]))
    assert sum(index.unused.values()) == 300
    assert len(index.unused) <= 25
    assert max(map(len, index.unused)) < 90


def test_what_is_not_used_is_named_with_the_layout(tmp_path, caplog):
    path = write_tar(tmp_path / "x.tar", [*sample(0), ("000000.caption", b"x"), *sample(1)])
    open_samples([Source(str(path))], config(tmp_path), "data.train", progress=True)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(
        f"data.train: not used: 1 members named .caption (first {path}: 000000.caption); a sample is"
    )
    only = write_tar(tmp_path / "y.tar", sample(0, txt=None, caption=b"words"))
    with pytest.raises(ValueError, match=r"no usable sample; .*: no caption .* 1 members named \.caption"):
        opened(only, config(tmp_path))


def test_shards_that_are_named_twice_are_said(tmp_path, caplog):
    pattern, data = write_shards(tmp_path, [2, 2]), config(tmp_path)
    samples = open_samples(
        [Source(pattern), Source(str(tmp_path / "shard-001.tar"))], data, "data.train", progress=True
    )
    assert len(samples) == 6
    assert f"data.train: 1 shards are named more than once (first {tmp_path / 'shard-001.tar'})" in caplog.text


def test_a_resumed_run_keeps_the_samples_that_an_older_index_had(tmp_path, caplog):
    names = [f"v1.{n}.{kind}" for n in range(3) for kind in ("jpg", "txt")]
    pattern, data = str(write_tar(tmp_path / "x.tar", [*sample(0), *sample(1), *named(*names)])), config(tmp_path)
    with mock.patch.object(MemberGroups, "_is_whole", return_value=False):  # as no key with a dot was one
        old = opened(pattern, data)
    description = {  # as that version wrote it
        "shards": list(old.shards),
        "size_bytes": old.size_bytes.tolist(),
        "modified_ns": old.modified_ns.tolist(),
        "samples": [2],
        "source_shards": [1],
        "shard_faults": [{"faults": {"no image": 1}, "examples": {"no image": "key"}, "broken": None}],
        "fingerprint": old.fingerprint,
    }
    (tmp_path / "cache/indexes/sets/older.json").write_text(json.dumps(description))
    old.table.rename(tmp_path / "cache/indexes/sets/older.rows")
    for suffix in (".json", ".shards"):
        old.table.with_suffix(suffix).unlink()
    for file in (tmp_path / "cache/indexes").glob("*.npz"):
        file.unlink()
    assert len(opened(pattern, data)) == 5
    saved = open_saved_samples([Source(pattern)], data, "data.train", old.fingerprint, progress=True)
    assert (len(saved), saved.fingerprint) == (2, old.fingerprint)
    assert (list(saved.shards), saved.faults[0].examples) == (list(old.shards), {"no image": [f"{pattern}: key"]})
    assert "data.train: 2 of 5 samples, as in the checkpoint" in caplog.text


def test_an_index_of_the_first_version_still_serves_a_pipe(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*sample(0), *sample(1, txt=None)])
    index = index_tar(path)
    index.unused, index.examples = {}, {"no caption": "000001"}
    (tmp_path / "index").mkdir()
    command = f"pipe:cat {path}"
    index.save(tmp_path / "index" / index_file_name(command, version=1))
    data = config(tmp_path, allow_pipe=True, max_bad_share=1)
    samples = open_samples([Source(command, index=str(tmp_path / "index"))], data, "data.train", progress=True)
    assert ShardReader(samples, data).read(0).key == "000000"


def test_names_in_the_log_hold_no_control_characters():
    assert printable("ok ü\n\x1b[31m\udcff") == "ok ü\\n\\x1b[31m\\udcff"
