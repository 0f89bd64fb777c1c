"""The folder of the built-in data: written once into the cache, whole or not at all, then read like anyone's shards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from modstruct.config import ScenesConfig
from modstruct.data.synthetic.shards import shard_pattern, split_size, write_scenes
from modstruct.data.synthetic.splits import SPLITS
from modstruct.errors import refuse, require
from modstruct.files import locked, sync_folder

# Part of the folder's name: raise it when the same configuration would give other images, captions or factors.
GENERATOR_VERSION = 3
SMALLEST_IMAGE = 16
PATTERN_CHARACTERS = "{}[]*?"
STALE_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class ScenesPaths:
    """Where the built-in data lies: a file or brace pattern of shards for each split, and the zero-shot class file.

    The classes are the colours; zero_shot_shape.yaml beside that file has the shapes, which take longer to learn.
    """

    train: str
    validation: str
    test: str
    zero_shot: str


def scenes_folder(config: ScenesConfig, cache: Path, image_size: int) -> Path:
    """The folder of exactly these scenes: its name holds a hash of all that decides them."""
    decisive = json.dumps({"version": GENERATOR_VERSION, "image_size": image_size} | asdict(config), sort_keys=True)
    return cache / f"scenes-{image_size}px-{hashlib.sha256(decisive.encode()).hexdigest()[:12]}"


def ensure_scenes(config: ScenesConfig, cache: Path | str, image_size: int) -> ScenesPaths:
    """Paths of the built-in shards, which are drawn and written first if the cache does not hold them (about 30 s).

    image_size: side of the images in pixels. The folder is complete or not there: it is written under another name,
    synced and renamed. Of several processes that come at once, one writes and the others wait; on a file system without
    locks each writes a folder of its own, and the first one counts. What a killed run left behind is removed after a
    day. Raises ValueError, naming data.cache, if the cache cannot be written or its disk is full.
    """
    cache = Path(cache).expanduser().absolute()
    require_drawable(image_size)
    require(
        not set(PATTERN_CHARACTERS) & set(str(cache)),
        "data.cache",
        str(cache),
        f"shards are named by patterns: choose a path without the characters {PATTERN_CHARACTERS}",
    )
    folder = scenes_folder(config, cache, image_size)
    total = sum(split_size(config, split) for split in SPLITS)
    ensure_folder(folder, lambda part: write_scenes(part, config, image_size), f"{total:,} scenes")
    patterns = {split: str(folder / shard_pattern(split, split_size(config, split))) for split in SPLITS}
    return ScenesPaths(**patterns, zero_shot=str(folder / "zero_shot.yaml"))


def require_drawable(image_size: int) -> None:
    """Refuse images too small to show anything."""
    require(
        image_size >= SMALLEST_IMAGE, "model.vision.image_size", image_size, f"at least {SMALLEST_IMAGE} for scenes"
    )


def ensure_folder(folder: Path, write: Callable[[Path], None], what: str) -> None:
    """Have `write` fill the folder if it is not there; it is then complete, as `ensure_scenes` describes.

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
        remedy = f"{what} cannot be written there ({error}); make room, or name a folder you may write to"
        refuse("data.cache", str(folder.parent), remedy)


def _write_folder(folder: Path, write: Callable[[Path], None], what: str) -> None:
    """Write beside, sync, rename. The caller holds the lock, but on some network file systems that keeps nobody out."""
    _remove_stale(folder)
    # The process number alone may occur on two hosts that share the cache.
    part = folder.with_name(f"{folder.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    part.mkdir()
    print(f"Built-in data: drawing {what} once, into {folder}", file=sys.stderr, flush=True)
    try:
        write(part)
        sync_folder(part)
        try:
            os.rename(part, folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(part)  # another host was quicker, and wrote the same
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # a full disk gets its room back
        raise
    sync_folder(folder.parent)


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left of this folder; a younger one may be in the making on another host."""
    for part in folder.parent.glob(f"{folder.name}*.part"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(part)
