"""Sets embedded by all processes, part by part, into folders that metrics read (`EmbeddedSet`).

Each process reads, encodes and writes its share of the parts, with no collective until the end; the main process then
assembles the finished set from them, in bounded memory.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config.training import EmbeddingConfig
from modstruct.data.shards.evaluation_samples import EvaluationBatch, evaluation_loader
from modstruct.distributed.collect import on_main
from modstruct.distributed.hosts import require_same, require_shared_folder
from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings.assembly import Assembly
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet, clear, write_embedded_set
from modstruct.evaluation.embeddings.model import EmbeddingModel
from modstruct.evaluation.embeddings.parts import (
    FOLDER,
    Parts,
    Progress,
    TextLines,
    TextList,
    apart,
    token_loader,
)
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, MANIFEST, TEXT_ARRAYS, damaged
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.files import atomic_write

log = logging.getLogger(__name__)

AUGMENTED = "image_augmented"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"float16": torch.float16, "float32": torch.float32}
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

    A finished set of the same model and settings is left as it is; an interrupted one is resumed, on any number of
    processes: its arrays and lists are the same to the byte. command: for the manifests. Raises ValueError where an
    existing set differs in model, source or settings, unless config.overwrite replaces it; TooManyBadSamples above
    config.max_bad_share, FailedElsewhere where another process failed.
    """
    check_sets(model, [(source, config) for source in sets], folder)
    return [embed_set(model, source, Path(folder).expanduser() / source.name, config, command) for source in sets]


def check_sets(
    model: EmbeddingModel, planned: Sequence[tuple[EmbeddingSource, EmbeddingConfig]], folder: str | Path
) -> None:
    """Refuse sets of one name, and what is in the folder already and could not be used, before anything is embedded.

    planned: each set and how it will be embedded. Every process calls it.
    """
    names = [source.name for source, _ in planned]
    require(len(set(names)) == len(names), "sets", names, "each needs a name of its own")

    def check() -> None:
        for source, config in planned:
            settings = _settings(model, source, config, model.chosen_arrays(config.arrays))
            found = _found(Path(folder).expanduser() / source.name, settings, config.overwrite)
            if found is not None:
                found.check()

    on_main(check)


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
        """The parts and, as the main process sees it before any is written, those that are missing."""
        made = Parts(folder / FOLDER, kind, items, config.batch, config.part_batches)
        return made, on_main(made.missing)

    of_images, of_texts = ([a for a in arrays if a in known] for known in (IMAGE_ARRAYS, TEXT_ARRAYS))
    images, missing = parts("image", len(source.samples))
    _embed_images(model, source, images, missing, config, of_images)

    lines = TextLines(folder / FOLDER / CAPTIONS)
    assembly = Assembly(source, images, lines.path)
    captions, missing = parts("text", on_main(lambda: assembly.gather(config)))
    if of_texts and captions.items:
        _embed_texts(model, lines, captions, missing, config, of_texts, f"captions of {source.name}")
    prompts, missing = parts("prompts", len(source.prompts))
    title = f"class names of {source.name}"
    _embed_texts(model, TextList(source.prompts), prompts, missing, config, ["text"], title, dtype="float32")

    def finish() -> None:
        contents = assembly.contents(
            model.described(), captions if of_texts and captions.items else None, prompts, arrays, config.dtype
        )
        contents.settings, contents.command, contents.seconds = settings, command, time.monotonic() - started
        write_embedded_set(folder, contents)
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
    """Prepare the folder for a start or a resumption; true where the set is finished already."""
    parts = folder / FOLDER
    before = _found(folder, settings, overwrite)
    if overwrite:
        clear(folder)
    elif before is not None:
        if not before.merged and len(before.pairs):
            remedy = "--embedding.overwrite true embeds it again"
            log.warning("%s: of an earlier version, and equal images are not merged; %s", folder, remedy)
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was interrupted between its last two steps
        return True
    elif (parts / BEGUN).is_file():
        return False
    shutil.rmtree(parts, ignore_errors=True)  # left by an interrupted removal
    with atomic_write(parts / BEGUN) as file:
        file.write(json.dumps(settings).encode())
    return False


def _found(folder: Path, settings: dict[str, Any], overwrite: bool) -> EmbeddedSet | None:
    """The finished set in the folder, if there is one; refused, as an interrupted one, where its settings differ."""
    begun = folder / FOLDER / BEGUN
    if overwrite:
        return None
    if (folder / MANIFEST).is_file():
        found = EmbeddedSet.open(folder)
        _require_equal(found.manifest.get("settings", {}), settings, folder)
        return found
    if begun.is_file():
        try:
            before = dict(json.loads(begun.read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            damaged(begun, str(error))
        _require_equal(before, settings, folder)
    return None


def _require_equal(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse a restart with another model, source or setting, by its name."""
    for name, value in now.items():
        if before.get(name) != value:
            was = f"{folder} was embedded with {before.get(name)!r}"
            refuse(name, value, f"{was}; give that, another folder, or --embedding.overwrite true to start again")


def _embed_images(
    model: EmbeddingModel,
    source: EmbeddingSource,
    parts: Parts,
    missing: Sequence[int],
    config: EmbeddingConfig,
    arrays: Sequence[str],
) -> None:
    """Make the missing parts of a source's images, with all that is read beside them.

    Notes of a part: keys, captions, metadata of the images; faults, the [cause, where] of those left out. Its arrays
    beside the embeddings: indices, numbers of the images in the source; labels, where it has classes; digests, where
    they are known.
    """
    mine = _share(missing)
    counter = source.bad_sample_counter(config, distributed.rank())
    encoder = _Encoder(model, config, arrays)

    def work(progress: Progress) -> None:
        numbers = [number for part in mine for number in parts.numbers(part)]
        seed = config.seed if AUGMENTED in arrays else None
        # Parts are whole batches but for the source's last, so a loader of all of them cuts them where they end.
        loader = evaluation_loader(source.samples, model.views, config.batch, numbers, seed, config.workers)
        batches = iter(loader)
        for part in mine:
            made: list[dict[str, np.ndarray]] = []
            notes: dict[str, list] = {"keys": [], "captions": [], "metadata": [], "faults": []}
            for batch in islice(batches, len(parts.batches(part))):
                rows = {"indices": batch.indices.numpy()}
                if source.class_names:
                    rows["labels"] = source.labels_of(batch.metadata)
                if batch.digests is not None:
                    rows["digests"] = batch.digests
                made.append(rows | encoder.images(batch))
                notes["keys"] += batch.keys
                notes["captions"] += batch.captions
                notes["metadata"] += batch.metadata
                notes["faults"] += batch.faults
                counter.add(batch.faults, batch.tried)
                # Of the whole source: the samples of the other processes may all be sound.
                counter.check(counter.bad, len(source.samples), fewest=1)
                progress.add(batch.tried)
            parts.write(part, _joined(made), notes)

    total = sum(len(parts.numbers(part)) for part in missing)
    apart(work, f"images of {source.name}", total, "image")


def _embed_texts(
    model: EmbeddingModel,
    texts: TextLines | TextList,
    parts: Parts,
    missing: Sequence[int],
    config: EmbeddingConfig,
    arrays: Sequence[str],
    title: str,
    dtype: str | None = None,
) -> None:
    """Make the missing parts of texts. dtype: of what is written, by default config.dtype."""
    mine = _share(missing)
    encoder = _Encoder(model, config, arrays, dtype)

    def work(progress: Progress) -> None:
        batches = [numbers for part in mine for numbers in parts.batches(part)]
        loader = iter(token_loader(texts, model.tokenize, batches, config.workers))
        for part in mine:
            made = []
            for ids in islice(loader, len(parts.batches(part))):
                made.append(encoder.encoded({"text": ids}))
                progress.add(len(ids))
            parts.write(part, _joined(made))

    apart(work, title, sum(len(parts.numbers(part)) for part in missing), "text")


class _Encoder:
    """The model's encode in the configured precision, to arrays of the dtype that is written."""

    def __init__(self, model: EmbeddingModel, config: EmbeddingConfig, arrays: Sequence[str], dtype: str | None = None):
        self._encode, self._arrays = model.encode, frozenset(arrays)
        self._dtype = DTYPES[dtype or config.dtype]
        self._precision, self._device = config.precision, distributed.device()
        fits = self._precision != "fp16" or self._device.type == "cuda"
        require(fits, "embedding.precision", self._precision, "needs a GPU; use fp32 or bf16")

    @torch.no_grad()
    def encoded(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The wanted arrays of a batch of images or texts, (B, …) each.

        Raises ValueError for a row that is not finite: the set could not be finished with it.
        """
        with self._autocast():
            made = self._encode({name: inputs.to(self._device) for name, inputs in batch.items()})
        wanted = {name: made[name].to(self._dtype).cpu().numpy() for name in made.keys() & self._arrays}
        for name, rows in wanted.items():
            if not np.isfinite(rows).all():
                remedy = "it has diverged, or overflows: --embedding.dtype float32 and --embedding.precision fp32"
                refuse("embedding.arrays", name, f"the model makes rows that are not finite: {remedy}")
        return wanted

    def images(self, batch: EvaluationBatch) -> dict[str, np.ndarray]:
        """The same, augmented images included; nothing of a batch of which no image could be read."""
        if len(batch.indices) == 0:
            return {}
        made = self.encoded({"image": batch.image})
        if batch.image_augmented is not None:
            made[AUGMENTED] = self.encoded({"image": batch.image_augmented})["image"]
        return made

    def _autocast(self) -> AbstractContextManager:
        dtype = AUTOCAST.get(self._precision)
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)


def _share(missing: Sequence[int]) -> Sequence[int]:
    """This process's parts: every so many-th, so that all have equally many but for one."""
    return missing[distributed.rank() :: distributed.world_size()]


def _joined(made: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = {name for rows in made for name in rows}
    return {name: np.concatenate([rows[name] for rows in made if name in rows]) for name in sorted(names)}
