"""Tables are mapped, not read; one process of a host checks the shards, of very many a part, for all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re

import numpy as np
import pytest
from crafted_shards import config, opened, write_shards, write_tar

from modstruct.config import Source
from modstruct.data.faults import BadSample
from modstruct.data.shards import samples as samples_module
from modstruct.data.shards import sources as sources_module
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.samples import open_saved_samples
from modstruct.distributed import main_first


def test_a_table_travels_as_its_name(tmp_path):
    samples = opened(write_shards(tmp_path / "shards", [3, 1, 2]), config(tmp_path))
    samples.caption_lines = [True]
    sent = pickle.dumps(samples)
    assert len(sent) < 1000
    arrived = pickle.loads(sent)
    assert list(arrived.shards) == [str(tmp_path / f"shards/shard-{shard:03}.tar") for shard in range(3)]
    assert arrived.shard_starts.tolist() == [0, 3, 4, 6]
    assert arrived.size_bytes.tolist() == [os.path.getsize(shard) for shard in arrived.shards]
    assert arrived.modified_ns.tolist() == [os.stat(shard).st_mtime_ns for shard in arrived.shards]
    assert arrived.caption_lines == [True]
    for column in (arrived.shard_starts, arrived.size_bytes, arrived.modified_ns):
        assert not column.flags.owndata
        assert not column.flags.writeable


def test_names_of_shards_are_a_sequence(tmp_path):
    write_shards(tmp_path, [1], name="ü\udcff")
    names = opened(write_shards(tmp_path, [1, 1]), config(tmp_path)).shards
    assert names.part(1, 2)[0] == names[1] == str(tmp_path / "shard-001.tar")
    assert (len(names), len(names.part(1, 2))) == (2, 1)
    with pytest.raises(IndexError):
        names[2]
    assert opened(tmp_path / "ü\udcff-000.tar", config(tmp_path)).shards[0] == str(tmp_path / "ü\udcff-000.tar")


def test_others_of_a_host_take_the_table_of_the_first_without_a_look_at_the_shards(tmp_path, monkeypatch):
    data, pattern = config(tmp_path, max_bad_share=0.5), write_shards(tmp_path / "shards", [3] * 4)
    fingerprint = opened(pattern, data).fingerprint
    os.unlink(tmp_path / "shards/shard-002.tar")

    def open_all() -> list[Samples]:
        return [opened(pattern, data), open_saved_samples([Source(pattern)], data, "data.train", fingerprint)]

    now, saved = main_first(open_all)
    assert (len(now), len(saved)) == (9, 12)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(samples_module, "expand_sources", lambda *_: pytest.fail("a second look at the shards"))
    with monkeypatch.context() as no_first:
        no_first.setattr("modstruct.distributed.processes.fail_together", lambda *_: None)
        assert len(main_first(lambda: opened(pattern, data))) == 12, "as the first process opened it last"
    with pytest.raises(pytest.fail.Exception):
        opened(pattern, data)  # on its own


def test_of_very_many_shards_some_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "CHECKED", 2)
    data, pattern = config(tmp_path), write_shards(tmp_path / "shards", [2] * 6)
    pattern = pattern.replace("*", "{000..005}")
    looked_at, stat = [], os.stat
    samples = opened(pattern, data)
    monkeypatch.setattr(os, "stat", lambda path, **_: looked_at.append(str(path)) or stat(path, **_))
    assert opened(pattern, data).table == samples.table
    assert {path[-7:-4] for path in looked_at if re.search(r"/shard-\d+\.tar$", path)} == {"000", "003"}

    write_tar(tmp_path / "shards/shard-001.tar", [("x.jpg", b"x"), ("x.txt", b"x")])  # another file, which is not seen
    same = opened(pattern, data)
    assert same.table == samples.table
    with pytest.raises(BadSample, match="shard changed since it was indexed"):
        ShardReader(same, data).read(2)
    write_tar(tmp_path / "shards/shard-003.tar", [("x.jpg", b"x"), ("x.txt", b"x")])
    assert len(opened(pattern, data)) == 10, "once one is seen to be another, all are"

    os.unlink(tmp_path / "shards/shard-004.tar")
    os.utime(tmp_path / "shards/shard-000.tar", (1, 1))
    with pytest.raises(ValueError, match=r"^data\.train = .*shard-004\.tar.* does not exist; correct the pattern"):
        opened(pattern, data)


def test_a_table_keeps_its_name(tmp_path, monkeypatch):
    """That of earlier versions, whose tables are then found."""
    monkeypatch.setattr(sources_module, "CHECKED", 2)
    samples = opened(write_shards(tmp_path / "shards", [1] * 5, name="ü"), config(tmp_path))
    states = [[name, os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in samples.shards]
    known = [state[:1] if number % 3 else state for number, state in enumerate(states)]
    text = "".join(map(json.dumps, [[samples_module.TABLE_VERSION, samples_module.INDEX_VERSION], *known])) + "/"
    assert samples.table.stem == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def test_pipes_are_told_by_source(tmp_path):
    samples = opened(write_shards(tmp_path, [1, 2]), config(tmp_path))
    np.testing.assert_array_equal(samples.piped(), [False, False])
