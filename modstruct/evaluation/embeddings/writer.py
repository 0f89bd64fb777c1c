"""Sets embedded by all processes, part by part, into folders that metrics read (`EmbeddedSet`)."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modstruct import distributed
from modstruct.config.embedding import EmbeddingConfig
from modstruct.distributed.collect import on_main
from modstruct.distributed.hosts import require_same, require_shared_folder
from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings.assembly import Assembly
from modstruct.evaluation.embeddings.embedded_files import IMAGE_ARRAYS, MANIFEST, TEXT_ARRAYS
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet, clear
from modstruct.evaluation.embeddings.encoding import embed_images, embed_texts
from modstruct.evaluation.embeddings.model import EmbeddingModel
from modstruct.evaluation.embeddings.parts import FOLDER, Parts
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.evaluation.embeddings.texts import TextLines, TextList
from modstruct.files import atomic_write

BEGUN = "begun.json"
CAPTIONS = "captions.jsonl"


def embed_sets(
    model: EmbeddingModel,
    sets: Sequence[EmbeddingSource],
    folder: str | Path,
    config: EmbeddingConfig,
    command: Sequence[str] = (),
) -> list[EmbeddedSet]:
    """Embed sets one after the other, each into folder/NAME; every process calls it and gets the finished sets.

    Sets that are there already, of the same model and settings, are left as they are, and one that was begun is gone on
    with, on any number of processes: its arrays and lists are the same to the byte. command: for the manifests. Raises
    ValueError where a set that is there differs in model, source or settings, unless config.overwrite starts it anew;
    TooManyBadSamples above config.max_bad_share, FailedElsewhere where another process failed.
    """
    names = [source.name for source in sets]
    require(len(set(names)) == len(names), "sets", names, "each needs a name of its own")
    return [embed_set(model, source, Path(folder).expanduser() / source.name, config, command) for source in sets]


def embed_set(
    model: EmbeddingModel,
    source: EmbeddingSource,
    folder: Path,
    config: EmbeddingConfig,
    command: Sequence[str] = (),
) -> EmbeddedSet:
    """Embed one set into a folder; see `embed_sets`."""
    started = time.monotonic()
    arrays = model.chosen_arrays(config.arrays)
    settings = _settings(model, source, config, arrays)
    require_same(settings, "processes must see the same model and files: share the folders, or copy them to each host")
    require_shared_folder(folder, "--out")
    if on_main(lambda: _begin(folder, settings, config.overwrite)):
        return EmbeddedSet.open(folder)

    def parts(kind: str, items: int) -> tuple[Parts, list[int]]:
        """The parts and, as the main process sees it before any is made, those that are missing."""
        made = Parts(folder / FOLDER, kind, items, config.batch, config.part_batches)
        return made, distributed.broadcast_object(made.missing() if distributed.is_main() else None)

    of_images, of_texts = ([a for a in arrays if a in known] for known in (IMAGE_ARRAYS, TEXT_ARRAYS))
    pictures, missing = parts("image", len(source.samples))
    embed_images(model, source, pictures, missing, config, of_images)

    lines = TextLines(folder / FOLDER / CAPTIONS)
    assembly = Assembly(source, pictures, lines.path)
    captions, missing = parts("text", on_main(lambda: assembly.gather(config)))
    if of_texts and captions.items:
        embed_texts(model, lines, captions, missing, config, of_texts, f"captions of {source.name}")
    prompts, missing = parts("prompts", len(source.prompts))
    title = f"class names of {source.name}"
    embed_texts(model, TextList(source.prompts), prompts, missing, config, ["text"], title, dtype="float32")

    def finish() -> None:
        assembly.finish(
            folder,
            captions if of_texts and captions.items else None,
            prompts,
            arrays,
            config.dtype,
            model=model.described(),
            settings=settings,
            command=command,
            seconds=time.monotonic() - started,
        )
        shutil.rmtree(folder / FOLDER)

    on_main(finish)
    return EmbeddedSet.open(folder)


def _settings(
    model: EmbeddingModel, source: EmbeddingSource, config: EmbeddingConfig, arrays: list[str]
) -> dict[str, Any]:
    """All that decides the bytes of a set."""
    return {
        "model fingerprint": model.fingerprint,
        "preprocessing": model.preprocessing,
        "source fingerprint": source.fingerprint,
        "samples": len(source.samples),
        "classes": source.classes_fingerprint,
        "embedding.arrays": arrays,
        "embedding.dtype": config.dtype,
        "embedding.precision": config.precision,
        "embedding.batch": config.batch,
        "embedding.part_batches": config.part_batches,
        "embedding.seed": config.seed if "image_augmented" in arrays else None,
    }


def _begin(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Make the folder ready to go on with or to start, and say whether the set is finished already."""
    parts = folder / FOLDER
    finished = (folder / MANIFEST).is_file()
    if overwrite:
        clear(folder)
    elif finished:
        _require_equal(EmbeddedSet.open(folder).manifest.get("settings", {}), settings, folder)
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was stopped between its last two steps
        return True
    elif (parts / BEGUN).is_file():
        _require_equal(json.loads((parts / BEGUN).read_bytes()), settings, folder)
        return False
    shutil.rmtree(parts, ignore_errors=True)  # left half removed
    with atomic_write(parts / BEGUN) as file:
        file.write(json.dumps(settings).encode())
    return False


def _require_equal(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse a restart with another model, source or setting, by its name."""
    for name, value in now.items():
        if before.get(name) != value:
            was = f"{folder} was embedded with {before.get(name)!r}"
            refuse(name, value, f"{was}; give that, another folder, or --embedding.overwrite true to start anew")
