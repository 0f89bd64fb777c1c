"""The embedder: a source's images, then its distinct captions, then its class prompts, by all processes.

Into memory for validation in training, or into a folder that metrics read (`EmbeddedSet`). An interrupted run into a
folder is resumed from FOLDER/parts, which holds
    begun.json              model, source and settings: a restart with others is refused
    image-00003.npz         rows of the batches of part 3, and what else was read with them (see passes.py)
    text-00003.npz          alike, of the distinct captions
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from modstruct import distributed
from modstruct.config.training import EmbeddingConfig
from modstruct.data.shards.evaluation_samples import evaluation_loader
from modstruct.data.shards.workers import WorkerLoader
from modstruct.distributed.collect import on_main
from modstruct.distributed.hosts import require_same, require_shared_folder
from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings import set_files
from modstruct.evaluation.embeddings.derived import relabelled, twin_of
from modstruct.evaluation.embeddings.embedded_set import MANIFEST, EmbeddedSet, clear
from modstruct.evaluation.embeddings.model import EmbeddingModel, Encode
from modstruct.evaluation.embeddings.passes import Batch, Pass
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, TEXT_ARRAYS, RowStream
from modstruct.evaluation.embeddings.source import EmbeddingSource, distinct, distinct_captions, say_merged
from modstruct.files import write_json

log = logging.getLogger(__name__)

AUGMENTED = "image_augmented"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Tokenize = Callable[[Sequence[str]], Tensor]
UNMERGED = (
    "%s: %d of %d images were embedded by an earlier version, and equal images are not merged; "
    "--embedding.overwrite true embeds the set again"
)
BATCHES_FOR_WORKERS = 32
"""Of texts: the ids of fewer are made sooner than loader processes start, which takes seconds."""


def embed_sets(
    model: EmbeddingModel,
    planned: Sequence[tuple[EmbeddingSource, EmbeddingConfig]],
    folder: str | Path,
    command: Sequence[str] = (),
) -> list[EmbeddedSet]:
    """`embed` sets one after the other, each into folder/NAME; every process calls it and gets the finished sets.

    Sets of one name, and what is in the folder and cannot be used, are refused before anything is embedded.
    """
    names, folder = [source.name for source, _ in planned], Path(folder).expanduser()
    require(len(set(names)) == len(names), "sets", names, "each needs a name of its own")

    def check() -> None:
        for source, config in planned:
            if found := _found(folder / source.name, _settings(model, source, config), config.overwrite):
                found.check()

    on_main(check)
    return [embed(model, source, config, folder / source.name, command) for source, config in planned]


def embed(
    model: EmbeddingModel,
    source: EmbeddingSource,
    config: EmbeddingConfig,
    folder: Path | None = None,
    command: Sequence[str] = (),
) -> EmbeddedSet:
    """Embed one set; every process calls it and gets the set.

    With a folder, the set is written there and opened; from a finished set beside it of the same samples with other
    classes, if there is one, without another pass. A finished set of the same model and settings is left as it is;
    an interrupted one is resumed, on any number of processes: its arrays and lists are the same to the byte. Class
    prompts are kept beside the folder, for other sets of the same classes. command: for the manifest.
    Without one, the set is in memory, without metadata; all processes make equally many forward passes (ZeRO-3), and
    embeddings and class prompts are on the MAIN process alone: elsewhere they have the same shape and hold NaN.
    Raises ValueError where an existing set differs in model, source or settings, unless config.overwrite replaces it,
    and where no image could be read; TooManyBadSamples above config.max_bad_share.
    """
    started, settings, parts = time.monotonic(), _settings(model, source, config), folder and folder / "parts"
    arrays = settings["embedding.arrays"]
    if folder is not None:
        remedy = "processes must see the same model and files: share the folders, or copy them to each host"
        require_same(settings, remedy)
        require_shared_folder(folder, "--out")
        if on_main(lambda: _begin(folder, settings, config.overwrite)):
            return EmbeddedSet.open(folder)

        if (twin := on_main(lambda: twin_of(folder, source, settings))) is not None and not config.overwrite:
            more = {"class_prompts": _class_prompts(model, source, config, folder), "settings": settings}
            on_main(lambda: relabelled(EmbeddedSet.open(twin), source, **more, command=[*command]).save(folder).folder)
            on_main(lambda: shutil.rmtree(folder / "parts"))
            return EmbeddedSet.open(folder)

    of_images, of_texts = ([name for name in arrays if name in known] for known in (IMAGE_ARRAYS, TEXT_ARRAYS))
    images = _embed_images(model, source, config, of_images, parts)
    skipped = on_main(lambda: _skipped(source, images, config))
    captions, pairs = on_main(lambda: distinct_captions(images.notes("captions") if of_texts else ()))
    title = f"captions of {source.name}"
    texts = _embed_texts(model.encode, model.tokenize, captions, config, title, of_texts, parts)
    prompts = _class_prompts(model, source, config, folder)

    def made() -> EmbeddedSet:
        rounds, copies = _rounds(source, images, len(pairs) > 0)
        embeddings = {name: _rows(images, name, rounds, config) for name in of_images}
        embeddings |= {
            name: _rows(texts, name, [np.ones(len(captions), bool)], config) for name in of_texts if captions
        }
        row = np.argsort(np.concatenate([np.flatnonzero(kept) for kept in rounds]))
        tables: dict[str, Any] = {"pairs": set_files.merged_pairs(pairs, row), "copies": copies}
        for name in ("indices", "labels") if source.class_names else ("indices",):
            tables[name] = np.concatenate(list(images.in_order(name, rounds)))
        more: dict[str, Any] = {"class_prompts": prompts, "captions": captions, "skipped": skipped}
        more |= {"keys": list(images.notes("keys", rounds)), "settings": settings, "command": list(command)}
        if folder is not None:
            more["metadata"] = images.notes("metadata", rounds)
        more["left_out"] = [{"cause": cause, "where": where} for cause, where in images.notes("faults")]
        more |= tables | source.noted | {"seconds": time.monotonic() - started}
        return EmbeddedSet(source.name, model.described(), embeddings, **more)

    if folder is None:
        return made()
    on_main(lambda: made().save(folder).folder)
    on_main(lambda: shutil.rmtree(folder / "parts"))
    return EmbeddedSet.open(folder)


def embed_texts(encode: Encode, texts: Sequence[str], tokenize: Tokenize, batch: int, title: str) -> np.ndarray:
    """Embed texts, the same list on every process, into memory, (n, D) float32, as `embed` does without a folder."""
    config = EmbeddingConfig(batch=batch, dtype="float32")
    return next(_embed_texts(encode, tokenize, texts, config, title).pieces("text"))


def _settings(model: EmbeddingModel, source: EmbeddingSource, config: EmbeddingConfig) -> dict[str, Any]:
    """All that decides the bytes of a set."""
    arrays = model.chosen_arrays(config.arrays)
    if config.precision == "fp16" and distributed.device().type != "cuda":
        refuse("embedding.precision", "fp16", "needs a GPU; use fp32 or bf16")
    return {
        "model fingerprint": model.fingerprint,
        "preprocessing": model.preprocessing,
        "source fingerprint": source.fingerprint,
        "samples": len(source.samples),
        "classes": source.classes_fingerprint,
        "embedding.arrays": arrays,
        **{f"embedding.{name}": getattr(config, name) for name in ("dtype", "precision", "batch", "part_batches")},
        "embedding.seed": config.seed if AUGMENTED in arrays else None,
    }


def _begin(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Prepare the folder for a start or a resumption; true where the set is finished already."""
    parts, before = folder / "parts", _found(folder, settings, overwrite)
    if overwrite:
        clear(folder)
    elif before is None and (parts / "begun.json").is_file():
        return False
    shutil.rmtree(parts, ignore_errors=True)  # of a run that was interrupted between its last two steps
    if before is None:
        write_json(parts / "begun.json", settings)
    elif not before.merged and len(before.pairs):
        log.warning(UNMERGED, folder, before.rows_of("image"), before.rows_of("image"))
    return before is not None


def _found(folder: Path, settings: dict[str, Any], overwrite: bool) -> EmbeddedSet | None:
    """The finished set in the folder, if there is one; refused, as an interrupted one, where its settings differ."""
    begun, finished = folder / "parts" / "begun.json", (folder / MANIFEST).is_file()
    if overwrite or not (finished or begun.is_file()):
        return None
    found = EmbeddedSet.open(folder) if finished else None
    before = found.settings if found else set_files.read_json(begun)
    for name, value in settings.items():
        if before.get(name) != value:
            was, option = f"{folder} was embedded with {before.get(name)!r}", name.startswith("embedding.")
            remedy = "give that, another folder" if option else "give the set another name, or another folder"
            refuse(name, value, f"{was}; {remedy}, or --embedding.overwrite true to start again")
    return found


def _skipped(source: EmbeddingSource, images: Pass, config: EmbeddingConfig) -> dict[str, int]:
    """Samples left out, by cause; refused where they are too many, or all."""
    counter, total = source.bad_sample_counter(config.max_bad_share), len(source.samples)
    counter.add(images.notes("faults"), total, say=False)  # the process that met them has reported them
    counter.check(counter.bad, total, fewest=1)  # the whole source was tried, so its fraction is exact
    cause = f"none of its {total} samples could be used: {counter.summary()}"
    require(counter.bad < total, source.field or "set", source.name, cause)
    return dict(Counter(source.samples.left_out) + counter.counts)


def _rounds(source: EmbeddingSource, images: Pass, captioned: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Which images, (n,) bool, come first and, where some are copies, which last; and `EmbeddedSet.copies`."""
    count, digests = sum(map(len, images.pieces("indices"))), [*images.pieces("digests")]
    if (known := sum(map(len, digests))) < count:
        if captioned and distributed.is_main():
            log.warning(UNMERGED, source.described, count - known, count)
        return [np.ones(count, dtype=bool)], np.empty(0, dtype=np.int64)
    first, image_row = distinct(np.concatenate(digests))
    copied = ~np.isin(np.arange(count), first)
    if not copied.any():
        return [~copied], np.empty(0, dtype=np.int64)
    if distributed.is_main():
        say_merged(source.described, count, len(first))
    return [~copied, copied], image_row[copied]


def _rows(made: Pass, name: str, rounds: Sequence[np.ndarray], config: EmbeddingConfig) -> np.ndarray | RowStream:
    """An embedding; of a pass in files to be read once, a part at a time."""
    shape = (len(rounds[0]), *next(made.pieces(name)).shape[1:])
    if made.folder is not None:
        return RowStream(shape, np.dtype(config.dtype), made.in_order(name, rounds))
    if distributed.is_main():
        return np.concatenate(list(made.in_order(name, rounds)))
    return np.broadcast_to(np.array(np.nan, config.dtype), shape)


def _embed_images(
    model: EmbeddingModel, source: EmbeddingSource, config: EmbeddingConfig, arrays: Sequence[str], parts: Path | None
) -> Pass:
    """A source's images, with all that is read beside them.

    Lists: keys, captions, metadata (unless in memory) of the images; faults, the [cause, where] of those left out.
    Arrays beside the embeddings: indices, numbers of the images in the source; labels, where it has classes; digests,
    where they are known.
    """
    counter = source.bad_sample_counter(config.max_bad_share, distributed.rank())
    seed, side = config.seed if AUGMENTED in arrays else None, model.views.image_size
    grey = model.views.evaluation_image(Image.new("RGB", (side, side), "grey"))[None]
    encoded = _encoder(model.encode, config, arrays, "image", grey)

    def rows_of(images: Tensor, augmented: Tensor | None) -> Batch:
        """Where no image could be read, it still takes the forward passes."""
        rows: Batch = encoded(images)
        if seed is not None:
            rows[AUGMENTED] = encoded(grey[:0] if augmented is None else augmented)["image"]
        return rows

    def batches(numbers: Sequence[range]) -> Iterator[Batch]:
        # Batches are whole but for the source's last, so a loader of all of them cuts them where they end.
        wanted = list(chain.from_iterable(numbers))
        for batch in evaluation_loader(source.samples, model.views, config.batch, wanted, seed, config.workers):
            counter.add(batch.faults, batch.tried)
            # Of the whole source: the samples of the other processes may all be sound.
            counter.check(counter.bad, len(source.samples), fewest=1)
            read = {"keys": batch.keys, "captions": batch.captions, "faults": batch.faults, "digests": batch.digests}
            read |= {"indices": batch.indices.numpy(), "metadata": batch.metadata if parts else None}
            read["labels"] = source.labels_of(batch.metadata) if source.class_names else None
            made = rows_of(batch.image, batch.image_augmented)
            yield made | {name: values for name, values in read.items() if values is not None}
        yield from (rows_of(grey[:0], None) for empty in numbers if not empty)

    return Pass(len(source.samples), config, parts, "image").make(batches, f"images of {source.name}")


def _embed_texts(
    encode: Encode,
    tokenize: Tokenize,
    texts: Sequence[str],
    config: EmbeddingConfig,
    title: str,
    arrays: Sequence[str] = ("text",),
    parts: Path | None = None,
) -> Pass:
    """Texts; into files with ids of many from loader processes."""
    encoded = _encoder(encode, config, arrays, "text", tokenize([""]))

    def batches(numbers: Sequence[range]) -> Iterator[Batch]:
        full = [some for some in numbers if some]
        workers = config.workers if parts is not None and len(full) >= BATCHES_FOR_WORKERS else 0
        for ids in WorkerLoader(_Tokens(texts, tokenize), full, workers):
            yield encoded(ids)
        yield from (encoded(tokenize([""])[:0]) for empty in numbers if not empty)

    return Pass(len(texts), config, parts, "text").make(batches, title)


def _encoder(
    encode: Encode, config: EmbeddingConfig, arrays: Sequence[str], modality: str, filler: Tensor
) -> Callable[[Tensor], dict[str, np.ndarray]]:
    """Images or ids (B, …) -> the wanted arrays, (B, …) each, in the configured precision and dtype.

    filler: (1, …), takes the forward pass where there are none.
    """
    device, autocast = distributed.device(), AUTOCAST.get(config.precision)

    @torch.no_grad()
    def encoded(inputs: Tensor) -> dict[str, np.ndarray]:
        some = (inputs if len(inputs) else filler).to(device)
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            made = encode({modality: some})
        wanted = [name for name in arrays if name in made]
        return {name: made[name][: len(inputs)].to(getattr(torch, config.dtype)).cpu().numpy() for name in wanted}

    return encoded


def _class_prompts(
    model: EmbeddingModel, source: EmbeddingSource, config: EmbeddingConfig, folder: Path | None
) -> np.ndarray | None:
    """(c, t, D) float32 of the classes of a source; NaN beside the main process.

    Equal prompts are embedded once, since a batch's other rows may move the last bit of an embedding, and, in a file
    beside the folder, once for all sets of a model that have these classes.
    """
    if not source.class_names:
        return None
    row = {prompt: n for n, prompt in enumerate(dict.fromkeys(source.prompts))}
    places = np.array([row[prompt] for prompt in source.prompts]).reshape(len(source.class_names), -1)

    about = [model.fingerprint, model.preprocessing, config.precision, config.batch, list(row)]
    name = f"class_prompts-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.npy"
    if folder is None or config.overwrite or not on_main((folder.parent / name).is_file):
        own, title = replace(config, dtype="float32"), f"class names of {source.name}"
        rows = next(_embed_texts(model.encode, model.tokenize, list(row), own, title).pieces("text"))
        if folder is not None:
            on_main(lambda: set_files.write_array(folder.parent / name, rows, unit=True))
    if folder is not None:
        rows = set_files.open_array(folder.parent / name, (len(row), model.dimension))
    shape = (*places.shape, rows.shape[1])
    return rows[places] if distributed.is_main() else np.broadcast_to(np.float32(np.nan), shape)


class _Tokens(Dataset):
    """Map from consecutive places to ids (B, L)."""

    def __init__(self, texts: Sequence[str], tokenize: Tokenize):
        self._texts, self._tokenize = texts, tokenize

    def __getitem__(self, places: range) -> Tensor:
        return self._tokenize(self._texts[places.start : places.stop])
