"""What tools/fuzz_readers.py feeds: everything that reads files of others, with the errors it may raise.

Each entry makes a reader in a folder of its own: (function of an input's bytes, documented errors).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from published_samples import VQA_QUESTIONS, as_json, touched
from sound_inputs import write_checkpoint

from modstruct import checkpoints
from modstruct.config import DataConfig, ViewsConfig
from modstruct.data.classification.class_files import load_classes
from modstruct.data.downstream.karpathy import read_karpathy
from modstruct.data.downstream.nlvr2 import read_nlvr2
from modstruct.data.downstream.snli_ve import read_snli_ve
from modstruct.data.downstream.vqa import read_answer_list, read_vqa
from modstruct.data.faults import BadSample
from modstruct.data.shards.index import ShardIndex, index_tar
from modstruct.data.shards.reader import RawSample, ShardReader
from modstruct.data.shards.texts import parse_metadata
from modstruct.data.tokenizers import ClipTokenizer, SentencePieceTokenizer, WordPieceTokenizer, load_tokenizer
from modstruct.data.transforms.augment import Views
from modstruct.data.transforms.decoding import decode_image
from modstruct.files import read_yaml

Reader = tuple[Callable[[bytes], None], tuple[type[Exception], ...]]


def tar(folder: Path) -> Reader:
    path = folder / "x.tar"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        index = index_tar(path)
        index.save(folder / "x.npz")
        assert ShardIndex.load(folder / "x.npz") is not None, "an index that was just made is sound"
        reader = ShardReader(one_shard(path, index), DataConfig(cache=str(folder)))
        for number in range(min(len(index.rows), 20)):
            try:
                raw = reader.read(number)
                assert raw.lines == reader.texts(number) != ()
                assert all(raw.captions)
                assert raw.where.isprintable(), "a name in the log holds no control characters"
                decode_image(raw.image, 4_000_000, raw.where)
            except BadSample:
                continue
        reader.close()

    return read, ()


def one_shard(path: Path, index: ShardIndex) -> SimpleNamespace:
    """Samples of one shard without the table on disk, whose syncing would take most of the time."""
    status = path.stat()
    return SimpleNamespace(
        shards=[str(path)],
        size_bytes=np.array([status.st_size]),
        modified_ns=np.array([status.st_mtime_ns]),
        shard_starts=np.array([0, len(index.rows)]),
        rows=index.rows,
        shard_of=lambda sample: 0,
        lines_are_captions=lambda shard: True,
    )


def image(folder: Path) -> Reader:
    views = Views(ViewsConfig(), 32)

    def read(content: bytes) -> None:
        found = decode_image(content, 20_000_000, "here")
        assert found.mode == "RGB"
        assert views.evaluation_image(found).shape == views.augmented_image(found, len(content)).shape == (3, 32, 32)

    return read, (BadSample,)


def caption(folder: Path) -> Reader:
    views, tokenizer = Views(ViewsConfig(), 32), ClipTokenizer(ClipTokenizer.shipped_model(), 32)

    def read(content: bytes) -> None:
        text = content.decode("utf-8", "ignore").strip()
        assert tokenizer([text, views.augmented_text(text, len(content))]).shape == (2, 32)

    return read, ()


def metadata(folder: Path) -> Reader:
    def read(content: bytes) -> None:
        found = parse_metadata(content, "here")
        assert all(RawSample("k", b"", "c", found).captions)
        pickle.dumps(found)  # so it travels from a loader process
        json.dumps(found)  # and so between training processes

    return read, (BadSample,)


def index(folder: Path) -> Reader:
    def read(content: bytes) -> None:
        (folder / "x.npz").write_bytes(content)
        found = ShardIndex.load(folder / "x.npz")
        if found is not None:
            ends = found.rows["image_block"].astype(int) * 512 + found.rows["image_bytes"]
            assert (ends <= found.size_bytes).all(), "no row points out of its shard"

    return read, ()


def yaml(folder: Path) -> Reader:
    path = folder / "x.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with suppress(ValueError):
            json.dumps(read_yaml(path), default=str, skipkeys=True)  # a value that ends
        load_classes(path)

    return read, (ValueError,)


def checkpoint(folder: Path) -> Reader:
    path = write_checkpoint(folder)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sound = [file.read_bytes() for file in files]

    def read(content: bytes) -> None:
        """content: a byte that chooses the file, and what it holds."""
        changed = content[0] % len(files) if content else 0
        files[changed].write_bytes(content[1:])
        with suppress(ValueError):
            assert checkpoints.find("best", folder) == path, "it never leads out of the run"
        try:
            with suppress(ValueError):
                load_tokenizer(path / "tokenizer")
            checkpoints.read(path)
        finally:
            files[changed].write_bytes(sound[changed])

    return read, (ValueError,)


def tokenizer(folder: Path) -> Reader:
    kinds = (SentencePieceTokenizer, ClipTokenizer, WordPieceTokenizer)

    def read(content: bytes) -> None:
        """content: a byte that chooses the kind, and a model file."""
        made = kinds[content[0] % 3 if content else 0](content[1:], 8)
        assert made(["a red star", ""]).shape == (2, 8)

    return read, (ValueError,)


def task(folder: Path) -> Reader:
    """The published files of the downstream tasks, whose images need not be there."""
    path, questions = folder / "x.json", as_json(folder / "questions.json", VQA_QUESTIONS)
    for images in ("train2014", "val2014", "test2015"):
        touched(folder / images / "COCO_train2014_000000458752.jpg")
    options = {"leave_out_missing": True}
    readers = (
        lambda: read_vqa(path, folder, **options).fingerprint,
        lambda: read_vqa(questions, folder, path, **options).fingerprint,
        lambda: json.dumps(read_answer_list(path)).encode(),
        lambda: read_nlvr2(path, folder, **options).fingerprint,
        lambda: read_snli_ve(path, folder, **options).fingerprint,
        lambda: [read_karpathy(path, folder, split, **options).fingerprint for split in ("train", "val", "test")],
    )

    def read(content: bytes) -> None:
        """content: a byte that chooses the reader, and what its file holds."""
        path.write_bytes(content[1:])
        readers[content[0] % len(readers) if content else 0]()

    return read, (ValueError,)


READERS: dict[str, Callable[[Path], Reader]] = {
    make.__name__: make for make in (tar, image, caption, metadata, index, yaml, checkpoint, tokenizer, task)
}
