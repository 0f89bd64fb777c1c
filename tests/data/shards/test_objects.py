"""Shards at addresses: read by range from a server on loopback that fails, is slow, cuts off or changes them."""

from __future__ import annotations

import hashlib
import html
import os
import pickle
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs

import fsspec
import numpy as np
import pytest
import torch
from crafted_shards import LengthTokenizer, config, encoded_image, opened, sample, views, write_shards, write_tar

from modstruct.config import Source
from modstruct.data.faults import BadSample
from modstruct.data.shards import index as index_module
from modstruct.data.shards import objects
from modstruct.data.shards.ahead import ReadAhead
from modstruct.data.shards.evaluation_samples import EvaluationSamples, evaluation_loader, train_captions
from modstruct.data.shards.loader import BatchContents, BatchPlan, train_loader
from modstruct.data.shards.order import SampleOrder
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import open_samples, open_saved_samples
from modstruct.errors import RunError, printable

TOOLS = Path(__file__).parents[3] / "tools"
sys.path.insert(0, str(TOOLS / "benchmarks"))
from object_server import ObjectServer  # noqa: E402

SIGNED = "?X-Amz-Signature=hidden"


class HurtServer(ObjectServer):
    """Its next answers are those of `faults`; lists a bucket as S3 does."""

    def __init__(self, folder: Path):
        self.faults: list[Callable] = []
        self.broken: set[str] = set()
        super().__init__(folder)

    def hurt(self, handler) -> bool:
        path, _, query = handler.path.partition("?")
        if path in self.broken:
            return status(500)(handler)
        if self.faults:
            return self.faults.pop(0)(handler)
        if "list-type" not in query:
            return False
        prefix = parse_qs(query).get("prefix", [""])[0]
        keys = sorted(str(file.relative_to(self.folder / path[1:])) for file in self.folder.rglob("*.tar"))
        sizes = {key: (self.folder / path[1:] / key).stat().st_size for key in keys if key.startswith(prefix)}
        item = "<Contents><Key>{}</Key><Size>{}</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        listed = "".join(item.format(html.escape(key), size) for key, size in sizes.items())
        handler.answer(200, f"<ListBucketResult><KeyCount>{len(sizes)}</KeyCount>{listed}</ListBucketResult>".encode())
        return True

    @property
    def count(self) -> int:
        return self.requests.total()


def status(number: int, header: str = "X-None") -> Callable:
    def answer(handler) -> bool:
        handler.answer(number, b"", {header: "1"})
        return True

    return answer


def cut(handler) -> bool:
    handler.cut = True
    return False


def slow(handler) -> bool:
    time.sleep(0.5)
    return False


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(objects, "NAMED_SECONDS", 0.0)
    for noted in ("_failures", "_answered", "_given_up"):
        monkeypatch.setattr(objects, noted, type(getattr(objects, noted))())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    write_shards(tmp_path / "store" / "bucket", [30, 20, 40])
    with HurtServer(tmp_path / "store") as served:
        monkeypatch.setenv("AWS_ENDPOINT_URL", served.url)
        yield served


def shards(server: HurtServer, query: str = SIGNED) -> str:
    return f"{server.url.replace('//', '//user:hidden@')}/bucket/shard-{{000..002}}.tar{query}"


def batches(samples, data) -> list:
    fields = frozenset({"image_augmented", "text_augmented"})
    contents = BatchContents(views(), LengthTokenizer(), fields)
    return list(train_loader(samples, data, contents, BatchPlan(16, 3, 0, 12), 0, 1))


def test_a_run_over_the_network_is_that_over_local_files(server, tmp_path, caplog):
    """Also where requests fail, and in a loader process."""
    here, there = config(tmp_path / "here"), config(tmp_path / "there")
    local, far = opened(tmp_path / "store/bucket/*.tar", here), opened(shards(server), there)
    assert far.content == local.content
    there.workers = 1
    server.faults = [status(500), cut, status(429)] * 3
    for one, other in zip(batches(far, there), batches(local, here), strict=True):
        assert other.faults == one.faults == []
        assert all(torch.equal(rows, other.tensors[name]) for name, rows in one.tensors.items())
    assert server.faults == []
    server.faults = [status(503)]
    found = list(evaluation_loader(EvaluationSamples([Source(shards(server))], there), views(), 32, workers=0))
    assert [row["number"] for batch in found for row in batch.metadata] == list(range(90))
    assert list(train_captions(far, there, 9)) == list(train_captions(local, here, 9))

    asked = server.count
    opened(shards(server, "?X-Amz-Signature=hidden_too"), there)  # signed anew, it is indexed already
    assert server.count - asked <= 2 * 3 + len(range(90))  # states; texts are looked at anew
    told = [*caplog.messages, *map(str, (tmp_path / "there").rglob("*"))]
    assert any("did not answer for" in line for line in told)
    assert not [line for line in told if "hidden" in line]


def test_what_is_fetched_is_used(server, tmp_path):
    """A block of samples is one request."""
    members = [m for n in range(96) for m in sample(n, png=np.random.default_rng(n).bytes(60_000))]
    write_tar(tmp_path / "store" / "large.tar", members)
    data = config(tmp_path)
    samples = opened(f"{server.url}/large.tar", data)
    order, reader = SampleOrder(samples.shard_sizes(), 0, block=8, window=4), ShardReader(samples, data)

    def epoch(room_bytes: float) -> tuple[float, int]:
        server.bytes, asked = 0, server.count
        ahead = ReadAhead(reader, lambda step: order.locate(np.arange(16 * step, 16 * step + 16))[1], room_bytes, 1, 6)
        raws = [raw for step in range(6) for raw in ahead.read(step, 16)]
        assert sorted(raw.metadata["number"] for raw in raws) == list(range(96))
        return server.bytes / sum(len(raw.image) for raw in raws), server.count - asked

    ratio, asked = epoch(2**23)  # half of it holds nearly two windows
    assert asked <= 96 // 8 + 4
    assert ratio < 1.1
    ratio, asked = epoch(2**19)  # half of a window
    assert asked > 96 // 8 + 4
    assert ratio < 1.1


def test_what_fails_for_a_while_is_asked_for_again(server, tmp_path, monkeypatch, caplog):
    url = f"{server.url}/bucket/shard-000.tar"
    content = (tmp_path / "store/bucket/shard-000.tar").read_bytes()
    for fault in (status(500), status(429), cut, slow):
        monkeypatch.setattr(objects, "REQUEST_SECONDS", 0.3 if fault is slow else 60.0)
        server.faults = [fault, fault]
        assert objects.read_range(url, 700, 4000).content == content[700:4700]
        assert server.faults == []
        assert re.search(r"http://127[\d.:]+ did not answer for \d seconds: 2 requests failed", caplog.messages.pop())

    monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.1)
    server.faults = [status(500)] * 1000
    with pytest.raises(RunError, match=r"has not answered for .*500 Internal Server Error.*--resume latest"):
        objects.read_range(url, 0, 1)
    with pytest.raises(RunError, match=r"http://127.0.0.1:1 has not answered for .*Cannot connect"):
        objects.read_range("http://127.0.0.1:1/x.tar", 0, 1)


def test_an_object_that_fails_alone_is_left_out_by_name(server, tmp_path, monkeypatch):
    """Whether others are asked for meanwhile, or all wait for it; and what comes after does not wait for it anew."""
    data = config(tmp_path)
    reader = ShardReader(opened(shards(server), data), data)
    monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.1)
    server.broken = {"/bucket/shard-001.tar"}
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            objects.read_range(f"{server.url}/bucket/shard-000.tar", 0, 1)

    told = r"unreadable shard: http.*shard-001.tar.*: sample 3: 500 Internal Server Error"
    for threads in (0, 1):
        objects._given_up.clear()
        asking = [threading.Thread(target=others) for _ in range(threads)]
        for thread in asking:
            thread.start()
        with pytest.raises(BadSample, match=told + ".*in which its store answered for others"):
            reader.read(33)
        stop.set()
        for thread in asking:
            thread.join()
    asked = server.count
    with pytest.raises(BadSample, match=told):
        reader.read(33)
    assert server.count == asked + 1
    server.broken.clear()
    assert reader.read(33).metadata == {"number": 33}
    assert reader.read(2).metadata == {"number": 2}


@pytest.mark.parametrize(
    ("hurt", "told"),
    [
        (status(404), "404 Not Found: .*correct the address"),
        (status(403), "403 Forbidden: give the address with user:password@, or a signed one"),
        (status(200), "sends whole files only: use pipe:"),
    ],
)
def test_what_lasts_is_refused_at_once(server, tmp_path, hurt, told):
    server.faults = [hurt]
    with pytest.raises(ValueError, match=rf"^data\.train = 'http://127[\d.:]+/bucket/shard-000.tar\?\.\.\.': .*{told}"):
        opened(f"{server.url}/bucket/shard-000.tar{SIGNED}", config(tmp_path))
    assert server.count == 1


def test_an_object_that_changes_under_a_run_is_left_out_by_name(server, tmp_path, caplog):
    data = config(tmp_path, max_bad_share=0.5)
    samples = opened(shards(server), data)
    reader, store = ShardReader(samples, data), tmp_path / "store/bucket"
    assert reader.read(40).metadata == {"number": 40}
    whole = (store / "shard-001.tar").read_bytes()
    for content in (whole.replace(b"thing 4", b"thing 5"), whole[:9000]):
        (store / "shard-001.tar").write_bytes(content)
        changed = "shard changed since it was indexed"
        with pytest.raises(BadSample, match=rf"{changed}: .*shard-001.tar.*sample 19"):
            reader.read(49)
        assert [bad.cause for bad in reader.read_run([31, 32, 33])] == [changed] * 3
    found = open_saved_samples([Source(shards(server))], data, "data.train", samples.fingerprint, progress=True)
    assert found.fingerprint == samples.fingerprint
    assert "1 of 3 shards are missing or changed since the checkpoint (http" in caplog.text
    (store / "shard-002.tar").unlink()
    with pytest.raises(BadSample, match=r"missing shard: .*shard-002.tar.*404"):
        reader.read(70)
    server.faults = [status(403)]
    with pytest.raises(BadSample, match=r"unreadable shard: .*shard-000.tar.*403"):
        reader.read(0)


def test_a_forked_process_reads(server):
    url = f"{server.url}/bucket/shard-000.tar"
    before = objects.read_range(url, 0, 512)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if objects.read_range(url, 0, 512) == before else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert objects.read_range(url, 0, 512) == before


def test_a_bucket_of_s3(server, tmp_path):
    data = config(tmp_path)
    samples = opened("s3://bucket/shard-*.tar", data)
    assert [*samples.shards] == [f"s3://bucket/shard-00{n}.tar" for n in range(3)]
    reader = ShardReader(samples, data)
    assert [raw.metadata["number"] for raw in reader.read_run([40, 41, 42])] == [40, 41, 42]
    write_tar(tmp_path / "store/bucket/shard-001.tar", [m for n in range(50, 70) for m in sample(n)])
    with pytest.raises(BadSample, match="shard changed"):
        reader.read(40)
    with pytest.raises(ValueError, match="no object matches"):
        opened("s3://bucket/none-*.tar", data)
    server.faults = [status(403)]
    with pytest.raises(ValueError, match="set AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
        opened("s3://bucket/shard-000.tar", data)
    server.faults = [status(200)]
    with pytest.raises(ValueError, match="sends whole files only: use pipe:"):
        opened("s3://bucket/shard-000.tar", data)
    with mock.patch.dict(objects._GETS, s3=lambda: None), pytest.raises(TypeError):  # an error of ours is none of it
        reader.read(0)


def test_other_protocols_and_an_index_beside_the_shard(tmp_path, monkeypatch, caplog):
    write_shards(tmp_path, [9, 5])
    memory = fsspec.filesystem("memory")
    for file in tmp_path.glob("*.tar"):
        memory.pipe_file(f"/store/{file.name}", file.read_bytes())
    words = [str(TOOLS / "index_shards.py"), "memory://store/*.tar", "--beside", "--output", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(words[0], run_name="__main__")
    data = config(tmp_path)
    with mock.patch.object(index_module, "index_tar", side_effect=AssertionError("indexed again")):
        opened("memory://store/shard-{000..001}.tar", data)
    reader = ShardReader(opened("memory://store/shard-{000..001}.tar", data), data)
    assert reader.read(12).image == encoded_image(12)
    memory.pipe_file("/store/shard-001.tar", memory.cat_file("/store/shard-001.tar"))
    with pytest.raises(BadSample, match="shard changed"):
        reader.read(12)
    # Tars are padded: another may have the size of the one that was indexed.
    members = [*sample(9, txt=b"a" * 600), *(m for n in range(10, 14) for m in sample(n))]
    other = write_tar(tmp_path / "other.tar", members).read_bytes()
    assert len(other) == len(memory.cat_file("/store/shard-001.tar"))
    memory.pipe_file("/store/shard-001.tar", other)
    reader = ShardReader(opened("memory://store/shard-{000..001}.tar", data), data)
    assert [len(reader.read(n).caption) for n in (9, 10)] == [600, len("thing 10")]
    assert "shard-001.tar.npz is damaged or of another version of the shard" in caplog.text


@pytest.mark.parametrize("first", ["checksums", "keys"])
@pytest.mark.parametrize("store", ["memory://carried", ""])
def test_an_index_keeps_what_it_has_when_more_is_asked_for(tmp_path, store, first):
    write_shards(tmp_path, [2])
    fsspec.filesystem("memory").pipe_file("/carried/shard-000.tar", (tmp_path / "shard-000.tar").read_bytes())
    job = f"{store or tmp_path}/shard-000.tar", tmp_path / "index.npz"
    for asked in (first, "keys" if first == "checksums" else "checksums"):
        index_module.index_shards([job], progress=False, **{asked: True})
    index = index_module.ShardIndex.load(job[1])
    assert index.sha256 == hashlib.sha256((tmp_path / "shard-000.tar").read_bytes()).hexdigest()
    assert len(index.keys) == 2


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("gs://bucket/0.tar", r"needs a package that is missing: pip install 'modstruct\[gs\]'"),
        ("nowhere://bucket/0.tar", "fsspec cannot read it: Protocol not known: nowhere"),
        ("https://host/*.tar", "lists no files"),
        ("simplecache::s3://bucket/0.tar", "chained protocols"),
        ("{memory://x,/data}/0.tar", "addresses and paths in one pattern"),
    ],
)
def test_patterns_that_cannot_be_read_are_refused(tmp_path, monkeypatch, pattern, told):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=rf"^data\.eval = .*{told}"):
        open_samples([Source(pattern)], config(tmp_path), "data.eval")


@pytest.mark.parametrize(
    ("address", "same", "others"),
    [
        ("s3://b/0.tar", ["s3://key:secret@b/0.tar"], ["s3://b/0.tar?versionId=1"]),
        (
            "https://h/0?n=1",
            ["https://me:x@h/0?n=1&Expires=3&Signature=a", "https://h/0?AWSAccessKeyId=a&n=1"],
            ["https://h/0?n=2"],
        ),
        (
            "https://h/0",
            ["https://h/0?X-Amz-Date=1&X-Amz-Signature=a", "https://h/0?X-Goog-Signature=b"],
            ["https://h/1"],
        ),
        ("https://h/0?comp=1", ["https://h/0?sv=1&sr=b&comp=1&se=3&sig=a"], ["https://h/0?comp=1&sr=b"]),
        ("pipe:curl https://h/0?n=0", [], ["pipe:curl https://h/0?n=1", "pipe:curl https://h/0?n=0&Expires=1"]),
        ("/a/x://h/0?n=0", [], ["/a/x://h/0?n=1"]),
    ],
)
def test_an_address_is_the_same_however_it_is_signed(address, same, others):
    assert {*map(index_module.index_file_name, same)} <= {index_module.index_file_name(address)}
    assert len({*map(index_module.index_file_name, [address, *others])}) == 1 + len(others)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("https://me:secret@host:80/a/{0..1}.tar?X-Amz=secret&b=2: no", "https://host:80/a/{0..1}.tar?... no"),
        ("x='https://secret@host/x?y=secret', z", "x='https://host/x?...', z"),
        ("https://me:p@secret@host, https://host/a@b", "https://host, https://host/a@b"),
        ("a" * 2**20 + " https://secret@host", "a" * 2**20 + " https://host"),  # a caption: for hours, if quadratic
        ("s3://key:secret@bucket/a.tar, abfs://box@account/a", "s3://bucket/a.tar, abfs://box@account/a"),
    ],
    ids=["signed", "quoted", "at_sign", "long", "schemes"],
)
def test_credentials_are_not_shown(said, shown):
    assert printable(said) == shown
    assert pickle.loads(pickle.dumps(objects.ObjectFailed("cause", said))).cause == "cause"
