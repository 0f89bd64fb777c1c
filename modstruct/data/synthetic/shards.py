"""The built-in scenes as ordinary webdataset shards in img2dataset's layout: key.jpg, key.txt, key.json.

key.json holds every factor of the scene (`Scene.record`) beside key, caption, width, height, split and index, so that
what each modality can and cannot express is recorded for each sample; `told` where captions tell less than all
(data.scenes.told), and for training, where it is wanted, `reworded`, the caption in other words. `ensure_scenes` writes
the shards into the cache once, atomically.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from modstruct.config import ScenesConfig
from modstruct.config.data import REWORDED
from modstruct.data.synthetic.captions import caption, reworded
from modstruct.data.synthetic.drawing import draw
from modstruct.data.synthetic.factors import COLOURS, FILLS, SHAPES, SIZES, Scene
from modstruct.data.synthetic.splits import SPLITS, scenes
from modstruct.errors import refuse, require
from modstruct.files import atomic_write, disk_error, locked, naming, sync_folder

# Part of the folder's name: raise it when the same configuration would give other images, captions or factors.
GENERATOR_VERSION = 3
SMALLEST_IMAGE = 16
PATTERN_CHARACTERS = "{}[]*?"
STALE_SECONDS = 24 * 3600.0
SAMPLES_PER_SHARD = 2_000
JPEG_QUALITY = 92

# Only scenes of one object have labels. Colour is learned within the first few hundred steps, shape much later. The
# prompts of a class together name every shape and colour, and so its own factor alone.
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
ZERO_SHOT: dict[str, dict[str, Any]] = {
    "zero_shot.yaml": {
        "label": "colour",
        "templates": [f"a {{}} {shape}" for shape in SHAPES],
        "classes": {colour: colour for colour in COLOURS},
    },
    "zero_shot_shape.yaml": {
        "label": "shape",
        "templates": [f"a {colour} {{}}" for colour in COLOURS],
        "classes": {shape: shape for shape in SHAPES},
    },
    "zero_shot_size.yaml": {
        "label": "size",
        "templates": [f"a {{}} {name}" for name in NAMES],
        "classes": {size: size for size in SIZES},
    },
    "zero_shot_fill.yaml": {
        "label": "fill",
        "templates": [f"a {{}} {name}" for name in NAMES],
        "classes": {fill: fill for fill in FILLS},
    },
}


def split_size(config: ScenesConfig, split: str) -> int:
    """Samples of a split."""
    return getattr(config, f"{split}_samples")


def shard_count(samples: int) -> int:
    return math.ceil(samples / SAMPLES_PER_SHARD)


def shard_pattern(split: str, samples: int) -> str:
    """Brace pattern of the file names of a split's shards; the plain name when there is one shard only."""
    last = shard_count(samples) - 1
    return f"{split}-{{000000..{last:06d}}}.tar" if last else f"{split}-000000.tar"


def as_jpeg(scene: Scene, image_size: int) -> bytes:
    """The image of a scene as a JPEG file; equal arguments give equal bytes."""
    content = io.BytesIO()
    draw(scene, image_size).save(content, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return content.getvalue()


def as_sample(
    scene: Scene, split: str, index: int, image_size: int, told: float = 1.0, rewords: bool = False
) -> dict[str, Any]:
    """One sample as webdataset takes it; equal arguments give equal bytes. rewords: of the training split."""
    key, text = f"{split}-{index:09d}", caption(scene, told)
    about = {"key": key, "split": split, "index": index, "caption": text, "width": image_size, "height": image_size}
    about |= {"told": told} if told < 1 else {}
    about |= {REWORDED: reworded(scene, told)} if rewords and split == "train" else {}
    return {
        "__key__": key,
        "jpg": as_jpeg(scene, image_size),
        "txt": text.encode(),
        "json": json.dumps(about | scene.record()).encode(),
    }


def write_class_files(folder: Path) -> None:
    """Write those of ZERO_SHOT that the folder lacks. Raises OSError."""
    import yaml

    for name, classes in ZERO_SHOT.items():
        if not (folder / name).exists():
            with atomic_write(folder / name) as file:
                file.write(yaml.safe_dump(classes, sort_keys=False).encode())


def write_scenes(folder: Path, config: ScenesConfig, image_size: int, rewords: bool) -> None:
    """Write all splits and the class files into an empty folder, and wait until they are on the disk.

    Raises OSError when the disk is full or cannot be written.
    """
    import webdataset
    from tqdm import tqdm

    write_class_files(folder)
    total = sum(split_size(config, split) for split in SPLITS)
    with tqdm(total=total, unit=" scenes", dynamic_ncols=True) as progress:
        for split in SPLITS:
            progress.set_description(f"drawing scenes, {split}")
            size = split_size(config, split)
            numbered = enumerate(islice(scenes(config.seed, split), size))
            for shard in range(shard_count(size)):
                with open(folder / f"{split}-{shard:06d}.tar", "wb") as file:
                    with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
                        for index, (scene, _) in islice(numbered, SAMPLES_PER_SHARD):
                            tar.write(as_sample(scene, split, index, image_size, config.told, rewords))
                            progress.update()
                    file.flush()
                    os.fsync(file.fileno())


@dataclass(frozen=True)
class ScenesPaths:
    """A file or brace pattern of shards for each split, and the zero-shot class file of the colours.

    zero_shot_shape.yaml, zero_shot_size.yaml and zero_shot_fill.yaml beside that file have what takes longer to learn.
    """

    train: str
    validation: str
    test: str
    zero_shot: str


def scenes_folder(config: ScenesConfig, cache: Path, image_size: int, rewords: bool = False) -> Path:
    """The folder of these scenes; its name holds a hash of everything that determines them.

    Options younger than the version count where they are on, so that older runs find their samples.
    """
    options = asdict(config) | ({"rewords": True} if rewords else {})
    if config.told == 1:
        del options["told"]
    decisive = json.dumps({"version": GENERATOR_VERSION, "image_size": image_size} | options, sort_keys=True)
    return cache / f"scenes-{image_size}px-{hashlib.sha256(decisive.encode()).hexdigest()[:12]}"


def ensure_scenes(config: ScenesConfig, cache: Path | str, image_size: int, rewords: bool = False) -> ScenesPaths:
    """Paths of the built-in shards, which are drawn and written first if the cache does not hold them (about 30 s).

    image_size: side of the images in pixels. rewords: training samples have their caption in other words, too, for
    views.text: reworded; all else is the same without. The folder is complete or absent: it is written under another
    name, synced and renamed. Of several processes at once, one writes and the others wait; on a file system without
    locks each writes a folder of its own, and the first one is kept. Leftovers of a killed run are removed after a day.
    Raises ValueError, naming data.cache, if the cache cannot be written or its disk is full.
    """
    cache = Path(cache).expanduser().absolute()
    require_drawable(image_size)
    require(
        not set(PATTERN_CHARACTERS) & set(str(cache)),
        "data.cache",
        str(cache),
        f"shards are named by patterns: choose a path without the characters {PATTERN_CHARACTERS}",
    )
    folder = scenes_folder(config, cache, image_size, rewords)
    total = sum(split_size(config, split) for split in SPLITS)
    ensure_folder(folder, lambda part: write_scenes(part, config, image_size, rewords), f"{total:,} scenes")
    with suppress(OSError):  # a cache that cannot be written serves what it has
        write_class_files(folder)  # of an older version
    patterns = {split: str(folder / shard_pattern(split, split_size(config, split))) for split in SPLITS}
    return ScenesPaths(**patterns, zero_shot=str(folder / "zero_shot.yaml"))


def require_drawable(image_size: int) -> None:
    """Raise ValueError for an image size too small to show anything."""
    require(
        image_size >= SMALLEST_IMAGE, "model.vision.image_size", image_size, f"at least {SMALLEST_IMAGE} for scenes"
    )


def ensure_folder(folder: Path, write: Callable[[Path], None], what: str) -> None:
    """Have `write` fill the folder atomically if it is absent, as `ensure_scenes` describes.

    write: fills an empty folder and returns when all is on the disk. what: what it writes, for messages ("26,000
    scenes"). Raises ValueError, naming data.cache, if the folder cannot be written.
    """
    if folder.is_dir():
        return
    try:
        with locked(folder.parent / f"{folder.name}.lock"):
            if not folder.is_dir():
                _write_folder(folder, write, what)
    except OSError as error:
        told = f"{what} cannot be written there ({disk_error(error, folder)})"
        refuse("data.cache", str(folder.parent), f"{told}; make room, or name a folder you may write to")


def _write_folder(folder: Path, write: Callable[[Path], None], what: str) -> None:
    """Write beside, sync, rename. The caller holds the lock, which some network file systems do not enforce."""
    _remove_stale(folder)
    # The process id alone may occur on two hosts that share the cache.
    part = folder.with_name(f"{folder.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    part.mkdir()
    print(f"Built-in data: drawing {what} once, into {folder}", file=sys.stderr, flush=True)
    try:
        with naming(part):
            write(part)
        sync_folder(part)
        try:
            os.rename(part, folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(part)  # another host was faster, and wrote the same
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # frees a full disk
        raise
    sync_folder(folder.parent)


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left of this folder; a recent one may be in use on another host."""
    for part in folder.parent.glob(f"{folder.name}*.part"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(part)
