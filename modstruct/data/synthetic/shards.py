"""Writes scenes as ordinary webdataset shards in img2dataset's layout: key.jpg, key.txt, key.json.

key.json holds every factor of the scene (`Scene.record`) beside key, caption, width, height, split and index, so that
what a modality can and cannot know is on file for each sample.
"""

from __future__ import annotations

import io
import json
import math
import os
from itertools import islice
from pathlib import Path
from typing import Any

from modstruct.config import ScenesConfig
from modstruct.data.synthetic.drawing import draw
from modstruct.data.synthetic.factors import COLOURS, SHAPES, Scene
from modstruct.data.synthetic.splits import SPLITS, scenes

SAMPLES_PER_SHARD = 2_000
JPEG_QUALITY = 92

# Labels are set for scenes of one object only: of several, none is "the" answer. Colour is learned within the first few
# hundred steps; shape comes much later, so it has a file of its own.
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
    picture = io.BytesIO()
    draw(scene, image_size).save(picture, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return picture.getvalue()


def as_sample(scene: Scene, text: str, split: str, index: int, image_size: int) -> dict[str, Any]:
    """One sample as webdataset takes it; equal arguments give equal bytes."""
    key = f"{split}-{index:09d}"
    about = {"key": key, "split": split, "index": index, "caption": text, "width": image_size, "height": image_size}
    return {
        "__key__": key,
        "jpg": as_jpeg(scene, image_size),
        "txt": text.encode(),
        "json": json.dumps(about | scene.record()).encode(),
    }


def write_scenes(folder: Path, config: ScenesConfig, image_size: int) -> None:
    """Write all splits and the class files into an empty folder, and wait until they are on the disk.

    Raises OSError when the disk is full or cannot be written.
    """
    import webdataset
    import yaml
    from tqdm import tqdm

    for name, classes in ZERO_SHOT.items():
        with open(folder / name, "w", encoding="utf-8") as file:
            yaml.safe_dump(classes, file, sort_keys=False)
            file.flush()
            os.fsync(file.fileno())
    total = sum(split_size(config, split) for split in SPLITS)
    with tqdm(total=total, unit=" scenes", dynamic_ncols=True) as progress:
        for split in SPLITS:
            progress.set_description(f"drawing scenes, {split}")
            size = split_size(config, split)
            numbered = enumerate(islice(scenes(config.seed, split), size))
            for shard in range(shard_count(size)):
                with open(folder / f"{split}-{shard:06d}.tar", "wb") as file:
                    with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
                        for index, (scene, text) in islice(numbered, SAMPLES_PER_SHARD):
                            tar.write(as_sample(scene, text, split, index, image_size))
                            progress.update()
                    file.flush()
                    os.fsync(file.fileno())
