"""The folder of the built-in tasks: written once into the cache, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from modstruct.config import ScenesConfig
from modstruct.data.synthetic.folder import GENERATOR_VERSION, ensure_folder, require_drawable
from modstruct.data.synthetic.splits import SPLITS
from modstruct.data.synthetic.tasks.files import nlvr2_files, snli_ve_files, vqa_files, write_scene_tasks
from modstruct.data.synthetic.tasks.sizes import SceneTaskSizes

# Part of the folder's name: raise it when the same scenes would give other tasks.
TASKS_VERSION = 1


@dataclass(frozen=True)
class VqaPaths:
    """Arguments of modstruct.data.downstream.vqa.read_vqa."""

    questions: str
    images: str
    annotations: str


@dataclass(frozen=True)
class Nlvr2Paths:
    """Arguments of modstruct.data.downstream.nlvr2.read_nlvr2."""

    statements: str
    images: str


@dataclass(frozen=True)
class SnliVePaths:
    """Arguments of modstruct.data.downstream.snli_ve.read_snli_ve."""

    hypotheses: str
    images: str


@dataclass(frozen=True)
class KarpathyPaths:
    """Arguments of modstruct.data.downstream.karpathy.read_karpathy, which takes the split (train, val, test) too."""

    captions: str
    images: str


@dataclass(frozen=True)
class SceneTaskPaths:
    """Where the built-in tasks lie; the keys are train, validation and test."""

    vqa: dict[str, VqaPaths]
    answer_list: str
    nlvr2: dict[str, Nlvr2Paths]
    snli_ve: dict[str, SnliVePaths]
    karpathy: KarpathyPaths


def scene_tasks_folder(config: ScenesConfig, cache: Path, image_size: int, sizes: SceneTaskSizes) -> Path:
    """The folder of exactly these tasks: its name holds a hash of all that decides them."""
    versions = {"version": TASKS_VERSION, "scenes_version": GENERATOR_VERSION}
    decisive = json.dumps(versions | {"image_size": image_size, "seed": config.seed} | asdict(sizes), sort_keys=True)
    return cache / f"scene-tasks-{image_size}px-{hashlib.sha256(decisive.encode()).hexdigest()[:12]}"


def ensure_scene_tasks(
    config: ScenesConfig, cache: Path | str, image_size: int, sizes: SceneTaskSizes | None = None
) -> SceneTaskPaths:
    """Paths of the built-in tasks, which are drawn and written first if the cache does not hold them (about 40 s).

    config: its seed counts, its numbers of samples are those of the shards. image_size: side of the images in
    pixels. sizes: how much of each task; None for the default. The folder is complete or not there, as with
    `ensure_scenes`. Raises ValueError, naming data.cache, if the cache cannot be written or its disk is full.
    """
    require_drawable(image_size)
    sizes = sizes or SceneTaskSizes()
    root = scene_tasks_folder(config, Path(cache).expanduser().absolute(), image_size, sizes)
    what = "the scenes of the downstream tasks"
    ensure_folder(root, lambda part: write_scene_tasks(part, config.seed, sizes, image_size), what)
    vqa, nlvr2, snli_ve = {}, {}, {}
    for split in SPLITS:
        questions, annotations = vqa_files(root, split)
        vqa[split] = VqaPaths(str(questions), str(root / "vqa" / "images"), str(annotations))
        nlvr2[split] = Nlvr2Paths(*map(str, nlvr2_files(root, split)))
        snli_ve[split] = SnliVePaths(*map(str, snli_ve_files(root, split)))
    karpathy = KarpathyPaths(str(root / "karpathy" / "dataset_coco.json"), str(root / "karpathy" / "images"))
    return SceneTaskPaths(vqa, str(root / "vqa" / "answer_list.json"), nlvr2, snli_ve, karpathy)
