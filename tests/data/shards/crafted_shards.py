"""Shards made by hand, sound and damaged, and small doubles for what reads them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image

from modstruct.config import DataConfig, Source, ViewsConfig
from modstruct.data.shards.loader import BatchContents, BatchPlan, TrainBatch, train_loader
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.samples import open_samples
from modstruct.data.transforms.augment import Views

IMAGE_SIDE = 12


def encoded_image(number: int = 0, side: int = IMAGE_SIDE, kind: str = "PNG") -> bytes:
    """An image of one colour, which tells its number up to 65,535."""
    content = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 77)).save(content, kind)
    return content.getvalue()


def number_of(image: torch.Tensor) -> int:
    """The number that a (3, H, W) view of an image tells."""
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def sample(number: int, **other: bytes | None) -> list[tuple[str, bytes]]:
    """Members of one sample; `other` replaces the content of an extension, or leaves it out if it is None."""
    members = {
        "png": encoded_image(number),
        "txt": b"thing %d" % number,
        "json": json.dumps({"number": number}).encode(),
    }
    members |= other
    return [(f"{number:06d}.{extension}", content) for extension, content in members.items() if content is not None]


def write_tar(path: Path, members: list[tuple[str, bytes] | tarfile.TarInfo], form: int = tarfile.GNU_FORMAT) -> Path:
    """Write (name, content) pairs, and TarInfos for what is no ordinary file, in order."""
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def write_shards(folder: Path, sizes: list[int], name: str = "shard") -> str:
    """Sound shards of the given sizes, their samples numbered through; returns a glob of them."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        write_tar(folder / f"{name}-{shard:03d}.tar", [m for n in range(number, number + size) for m in sample(n)])
        number += size
    return str(folder / f"{name}-*.tar")


def config(folder: Path, **fields) -> DataConfig:
    return DataConfig(
        **{"cache": str(folder / "cache"), "workers": 0, "shuffle_block": 4, "shuffle_window": 3} | fields
    )


def opened(pattern: str | Path, data: DataConfig) -> Samples:
    return open_samples([Source(str(pattern))], data, "data.train")


class LengthTokenizer:
    """Ids (B, 2): the length of the text and its last character."""

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text), ord(text[-1]) if text else 0] for text in texts], dtype=torch.int64).reshape(
            -1, 2
        )


def views(side: int = 8, text: str = "eda") -> Views:
    return Views(ViewsConfig(text=text), side)


BOTH = frozenset({"image_augmented", "text_augmented"})


def load(
    samples,
    data,
    start=0,
    stop=5,
    process=0,
    processes=1,
    batch=12,
    extra=BOTH,
    seed=3,
    tokenizer=None,
    micro_batch=None,
    text="eda",
):
    contents = BatchContents(views(text=text), tokenizer or LengthTokenizer(), extra)
    plan = BatchPlan(batch, seed, start, stop, micro_batch)
    loader = train_loader(samples, data, contents, plan, process, processes)
    assert len(loader) == (stop - start) * loader.parts
    return list(loader)


def assert_same(ones: list[TrainBatch], others: list[TrainBatch]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        assert one.faults == other.faults
