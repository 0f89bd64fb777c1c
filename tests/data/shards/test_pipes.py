"""Pipes: run once a host, read like files, refused without permission or index, room made by age."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import select
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from crafted_shards import config, encoded_image, write_shards

from modstruct.config import Source
from modstruct.data.faults import BadSample
from modstruct.data.shards import pipes as pipes_module
from modstruct.data.shards.pipes import PipeCache, PipeFailed
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import open_samples
from modstruct.errors import RunError

TOOL = Path(__file__).parents[3] / "tools" / "index_shards.py"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(pipes_module, "PAUSE_SECONDS", 0.0)


def content(cache, shard, size=None):
    with open(cache.open(shard, size), "rb") as file:
        return file.read()


def test_a_command_runs_once(tmp_path):
    cache = PipeCache(tmp_path / "pipes", 10**9)
    shard = f"pipe:echo ran >> {tmp_path}/log; printf 12345"
    assert (
        content(cache, shard)
        == content(cache, shard, 5)
        == content(PipeCache(tmp_path / "pipes", 10**9), shard)
        == b"12345"
    )
    assert (tmp_path / "log").read_text() == "ran\n"


def test_a_failing_command_is_tried_three_times_and_leaves_nothing(tmp_path):
    cache = PipeCache(tmp_path / "pipes", 10**9)
    shard = f"pipe:echo ran >> {tmp_path}/log; printf half; echo 'no such bucket' >&2; exit 4"
    for _ in range(2):
        with pytest.raises(PipeFailed, match="exit status 4: no such bucket"):
            cache.open(shard)
    assert (tmp_path / "log").read_text() == "ran\n" * 3
    assert [path.suffix for path in (tmp_path / "pipes").iterdir()] == [".lock"]


def test_a_stalled_command_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(pipes_module, "PIPE_SECONDS", 1.0)
    monkeypatch.setattr(pipes_module, "ATTEMPTS", 1)
    os.mkfifo(tmp_path / "alive")
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    cache = PipeCache(tmp_path / "pipes", 10**9)
    with pytest.raises(PipeFailed, match="did not finish within 1 seconds"):
        cache.open(f"pipe:(echo started; exec sleep 30) > {tmp_path}/alive & wait")
    os.set_blocking(alive, True)
    with open(alive, "rb") as file:
        assert select.select([file], [], [], 10)[0]
        assert file.readline() == b"started\n"
        assert select.select([file], [], [], 10)[0]  # no process holds the other end any more
        assert file.read() == b""
    assert [path.suffix for path in (tmp_path / "pipes").iterdir()] == [".lock"]


def test_a_passing_failure_is_outlived(tmp_path):
    shard = f"pipe:if [ -e {tmp_path}/seen ]; then printf whole; else touch {tmp_path}/seen; exit 1; fi"
    assert content(PipeCache(tmp_path / "pipes", 10**9), shard) == b"whole"


def test_another_size_than_when_it_was_indexed_is_a_failure(tmp_path):
    cache = PipeCache(tmp_path / "pipes", 10**9)
    with pytest.raises(PipeFailed, match="it delivered 3 bytes, 5 were indexed"):
        cache.open("pipe:printf abc", 5)
    assert content(PipeCache(tmp_path / "pipes", 10**9), "pipe:printf abc") == b"abc"


def test_a_command_that_writes_too_much_is_ended_before_it_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(pipes_module, "ATTEMPTS", 1)
    with pytest.raises(PipeFailed, match="it delivers more than the 5 bytes"):
        PipeCache(tmp_path / "pipes", 10**9).open("pipe:printf 123456; exec sleep 600", 5)
    assert [path.suffix for path in (tmp_path / "pipes").iterdir()] == [".lock"]


def test_a_cache_disk_without_room_ends_the_run(tmp_path, monkeypatch):
    cache = PipeCache(tmp_path / "pipes", 10**9)
    full = "pipe:echo 'write error: No space left on device' >&2; exit 1"
    with pytest.raises(PipeFailed, match="No space left"):  # as a store may say it, too
        cache.open(full, 5)
    disk = SimpleNamespace(total=100, used=97, free=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    cache = PipeCache(tmp_path / "pipes", 10**9)
    cache.fetch(full, 5)  # ahead of need: who needs it says so
    with pytest.raises(RunError, match=r"^data.cache: no room .* in .*pipes: .* MiB are free there; make room"):
        cache.open(full, 5)


def test_a_stale_spooled_shard_is_fetched_again(tmp_path):
    (tmp_path / "store").write_text("old")
    cache = PipeCache(tmp_path / "pipes", 10**9)
    shard = f"pipe:cat {tmp_path}/store"
    assert content(cache, shard, 3) == b"old"
    (tmp_path / "store").write_text("newer")
    assert content(cache, shard, 5) == b"newer"


def test_room_is_made_by_last_use_and_open_files_stay_readable(tmp_path):
    cache = PipeCache(tmp_path / "pipes", 250)
    shards = [f"pipe:head -c 100 /dev/zero; : {n}" for n in range(4)]
    held = cache.open(shards[0])
    cache.open(shards[1])
    for age, shard in ((300, shards[0]), (200, shards[1])):
        os.utime(cache.path(shard), (os.stat(cache.path(shard)).st_atime, os.stat(cache.path(shard)).st_mtime - age))
    cache.open(shards[0])  # used again, so the other one is now the older
    cache.open(shards[2])
    assert [cache.path(shard).exists() for shard in shards[:3]] == [True, False, True]
    assert len(os.pread(held, 1000, 0)) == 100
    big = PipeCache(tmp_path / "pipes", 10)
    assert len(content(big, shards[3])) == 100  # larger than all the room, and still read
    assert [cache.path(shard).exists() for shard in shards] == [False, False, False, True]


@pytest.fixture
def index(monkeypatch, tmp_path):
    """Runs the tool; returns its exit status."""

    def run(pattern: str, *options: str) -> int:
        monkeypatch.setattr(
            sys, "argv", [str(TOOL), pattern, "--cache", str(tmp_path / "cache"), "--jobs", "1", *options]
        )
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code

    return run


def test_pipes_that_differ_in_the_query_of_an_address_are_others(tmp_path, index):
    write_shards(tmp_path / "store", [3, 2])
    pattern = f"pipe:sh -c 'cat {tmp_path}/store/shard-00${{0#*=}}.tar' https://host/get?shard={{0,1}}"
    data, cache = config(tmp_path, allow_pipe=True), tmp_path / "cache" / "indexes"
    for one in (pattern.replace("{0,1}", "0"), pattern):
        assert index(one) == 0
        manifest = json.loads((cache / "manifest.json").read_bytes())
    assert [one["samples"] for one in manifest["shards"]] == [3, 2]
    reader = ShardReader(open_samples([Source(pattern)], data, "data.train"), data)
    assert [reader.read(n).image for n in range(5)] == [encoded_image(n) for n in range(5)]


def test_pipes_are_indexed_by_the_tool_and_read_like_files(tmp_path, index, capsys):
    write_shards(tmp_path / "store", [3, 2])
    pattern = f"pipe:cat {tmp_path}/store/shard-{{000..001}}.tar"
    data = config(tmp_path, allow_pipe=True)
    source = Source(pattern, index=str(tmp_path / "made"))
    (tmp_path / "made").mkdir()
    for option in ("--jobs", "--workers"):
        assert index(pattern, option, "0") == 2
        assert f"{option} = 0: at least 1" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"^data\.train = 'pipe:cat .*000\.tar': no index of it in .*tools/index_shards.py"
    ):
        open_samples([source], data, "data.train")
    assert index(pattern, "--output", str(tmp_path / "made")) == 0
    assert capsys.readouterr().out == "5 samples in 2 shards\n"
    write_shards(tmp_path / "local", [4])
    index(str(tmp_path / "local" / "*.tar"), "--output", str(tmp_path / "made"), "--checksums")
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_bytes())
    assert manifest["samples"] == 9
    assert [one["samples"] for one in manifest["shards"]] == [3, 2, 4]
    digest = hashlib.sha256((tmp_path / "local" / "shard-000.tar").read_bytes()).hexdigest()
    assert [one["sha256"] for one in manifest["shards"]] == [None, None, digest]

    data = config(tmp_path / "elsewhere", allow_pipe=True)  # another host, whose cache is empty
    samples = open_samples([source], data, "data.train")
    reader = ShardReader(samples, data)
    assert [reader.read(n).image for n in range(5)] == [encoded_image(n) for n in range(5)]
    with pytest.raises(ValueError, match=r"data\.allow_pipe: true"):
        open_samples([source], config(tmp_path), "data.train")

    (tmp_path / "store" / "shard-001.tar").unlink()
    data = config(tmp_path / "third", allow_pipe=True)
    with pytest.raises(
        BadSample, match=r"failed pipe: pipe:cat .*shard-001.tar: sample 1: exit status 1: cat: .*No such file"
    ):
        ShardReader(samples, data).read(4)


def test_the_tool_indexes_into_the_cache_and_says_what_failed(tmp_path, index, capsys):
    write_shards(tmp_path / "store", [3])
    assert index(f"pipe:cat {tmp_path}/store/shard-{{000..001}}.tar") == 1
    assert "failed: pipe:cat" in capsys.readouterr().err
    data = config(tmp_path, allow_pipe=True)
    assert len(open_samples([Source(f"pipe:cat {tmp_path}/store/shard-000.tar")], data, "data.eval")) == 3


def test_the_tool_indexes_changed_pipes_anew_when_asked(tmp_path, index, capsys):
    write_shards(tmp_path / "store", [3])
    pattern = f"pipe:cat {tmp_path}/store/shard-000.tar"
    index(pattern)
    write_shards(tmp_path / "store", [7])
    index(pattern)
    index(pattern, "--renew")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["3", "3", "7"]
    data = config(tmp_path, allow_pipe=True)
    samples = open_samples([Source(pattern)], data, "data.train")
    assert ShardReader(samples, data).read(6).metadata == {"number": 6}
