"""Small valid files of every kind that modstruct reads: the seeds of tools/fuzz_readers.py."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from crafted_shards import sample, write_tar
from PIL import Image
from published_samples import KARPATHY_COCO, KARPATHY_FLICKR, NLVR2_DEV, SNLI_VE, VQA_ANNOTATIONS, VQA_QUESTIONS
from whole_checkpoint import Whole
from whole_checkpoint import write as write_whole

from modstruct import checkpoints
from modstruct.config import Recipe
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.sentencepiece_training import train_sentencepiece
from modstruct.data.shards.index import index_tar
from modstruct.data.tokenizers import ClipTokenizer, SentencePieceTokenizer

SHARD_BYTES = 40_000  # of a real shard: several samples, and short enough to be tried often
CAPTIONS = ["a red star", "über café: 星と月", "a  b\tc &amp; <end_of_text>", "word " * 60]
DEEP = b'{"a":' * 600 + b"{}" + b"}" * 600  # no mutation would find so many brackets that match
METADATA = [{}, {"captions": ["a", " b "], "key": "0"}, {"label": 3, "nested": {"list": [1.5, None, True, {"a": []}]}}]
WORDS = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "star", "##s", "a"])
CLASSES = """label: colour
templates: ["a {}", "the {} one"]
classes: {1: red, 2: &blue blue, 3: *blue}
"""


def sound_inputs(reader: str, shards: Sequence[Path]) -> list[bytes]:
    """Files for one reader; shards: tars whose starts are taken as well."""
    with tempfile.TemporaryDirectory() as folder:
        return MAKERS[reader](Path(folder), shards)


def tars(folder: Path, shards: Sequence[Path]) -> list[bytes]:
    link = tarfile.TarInfo("000004.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    sparse = tarfile.TarInfo("000005.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    long_names = [(f"folder/{'long' * 40}{name}", content) for name, content in sample(3)]
    written = [
        write_tar(folder / f"{form}.tar", [*sample(1), link, *sample(2, json=None), *names, sparse], form)
        for form, names in (
            (tarfile.GNU_FORMAT, long_names),
            (tarfile.PAX_FORMAT, long_names),
            (tarfile.USTAR_FORMAT, []),
        )
    ]
    return [path.read_bytes() for path in written] + [path.open("rb").read(SHARD_BYTES) for path in shards]


def images(folder: Path, shards: Sequence[Path]) -> list[bytes]:
    noise = Image.effect_noise((40, 30), 60)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    kinds = [(mode, "PNG", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    kinds += [("L", "JPEG", {}), ("RGB", "JPEG", {"exif": exif}), ("RGB", "JPEG", {"progressive": True})]
    kinds += [("CMYK", "JPEG", {}), ("RGB", "WEBP", {}), ("RGBA", "WEBP", {"lossless": True, "exif": exif})]
    made = []
    for mode, kind, options in kinds:
        content = io.BytesIO()
        noise.convert("RGB").convert(mode).save(content, kind, **options)
        made.append(content.getvalue())
    content = io.BytesIO()
    Image.fromarray(np.full((9, 9), 700, dtype=np.uint16)).save(content, "PNG")
    return [*made, content.getvalue(), *(image for path in shards for image in _members(path, ".png", ".jpg", ".webp"))]


def captions(folder: Path, shards: Sequence[Path]) -> list[bytes]:
    return [*(text.encode() for text in CAPTIONS), *(text for path in shards for text in _members(path, ".txt"))]


def metadata(folder: Path, shards: Sequence[Path]) -> list[bytes]:
    return [
        DEEP,
        *(json.dumps(m).encode() for m in METADATA),
        *(text for path in shards for text in _members(path, ".json")),
    ]


def _members(path: Path, *extensions: str) -> list[bytes]:
    with tarfile.open(path) as tar:
        found = (member for member in tar if member.name.endswith(extensions))
        return [tar.extractfile(next(found)).read() for _ in range(5)]


def indexes(folder: Path, shards: Sequence[Path]) -> list[bytes]:
    path = write_tar(folder / "x.tar", [*sample(1), *sample(2, txt=None), *sample(3)])
    index_tar(path).save(folder / "x.npz")
    with np.load(folder / "x.npz") as saved:
        np.savez(folder / "plain.npz", **saved)  # uncompressed, so that a changed byte is a changed value
    return [(folder / name).read_bytes() for name in ("x.npz", "plain.npz")]


def yamls(folder: Path, shards: Sequence[Path]) -> list[bytes]:
    return [CLASSES.encode(), b"a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]\n<<: {d: 2001-01-01}\n"]


def write_checkpoint(output: Path) -> Path:
    """A checkpoint of few bytes in a run's folder, marked as its best."""
    written = Whole(
        weights={"a": torch.ones(2, 3), "logit_scale": torch.ones(1)},
        moments={"exp_avg.a": torch.ones(2, 3)},
        rng={"cpu.0": torch.get_rng_state()[:16]},
        state=checkpoints.TrainState(step=1, data_fingerprint="f"),
        optimizer={"step": 1, "groups": []},
        recipe=recipe_to_dict(Recipe()),
    )
    path = checkpoints.step_folder(output, 1)
    write_whole(path, written, SentencePieceTokenizer(_sentencepiece(), 8))
    checkpoints.note_score(path, 0.5)
    return path


def checkpoint_files(folder: Path, shards: Sequence[Path]) -> list[bytes]:
    files = sorted(file for file in write_checkpoint(folder).rglob("*") if file.is_file())
    return [bytes([number]) + file.read_bytes() for number, file in enumerate(files)]


def tokenizers(folder: Path, shards: Sequence[Path]) -> list[bytes]:
    return [b"\0" + _sentencepiece(), b"\1" + ClipTokenizer.shipped_model()[: 1 << 16], b"\2" + WORDS.encode()]


def _sentencepiece() -> bytes:
    return train_sentencepiece(CAPTIONS, 64)


def task_files(folder: Path, shards: Sequence[Path]) -> list[bytes]:
    """A byte that chooses the reader, in the order of hostile_readers.task, and what its file holds."""
    published = [VQA_QUESTIONS, VQA_ANNOTATIONS, ["yes", "no", "2"]]
    lines = ["\n".join(map(json.dumps, records)) for records in (NLVR2_DEV, SNLI_VE)]
    texts = [*map(json.dumps, published), *lines, json.dumps(KARPATHY_COCO)]
    sound = [bytes([number]) + text.encode() for number, text in enumerate(texts)]
    flickr = bytes([len(texts) - 1]) + json.dumps(KARPATHY_FLICKR).encode()
    return [*sound, flickr, *(bytes([number]) + DEEP for number in range(len(texts)))]


MAKERS = {
    "tar": tars,
    "image": images,
    "caption": captions,
    "metadata": metadata,
    "index": indexes,
    "yaml": yamls,
    "checkpoint": checkpoint_files,
    "tokenizer": tokenizers,
    "task": task_files,
}
